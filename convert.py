"""Other people's files as files of slimflow's. Nothing in a file is executed.

    python convert.py FILE DATASET NAME                    a network: EDM's .pkl, or the authors' .pth
    python convert.py FOLDER OUT.pt --size 64              pictures, in one class
    python convert.py FOLDER OUT.pt --size 64 --classes    pictures, a class for each folder in FOLDER

A network is written to runs/DATASET/train-name=NAME/result.pt, and `slimflow.py --dataset DATASET
--train-name NAME` takes it as the teacher. Pictures are taken by `--train-data OUT.pt`.
"""

import contextlib
import io
import itertools
import pickle
import re
import sys
import warnings
from argparse import RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import slimflow as sf


# ---- EDM's .pkl --------------------------------------------------------------------------------------------
class Record(dict):
    """Stands in for any object of a pickle, and does nothing. Its items are the object's attributes."""
    def __init__(self, made_from=None, *_):  # EDM's classes: from a dict with their name and their state
        if isinstance(made_from, dict):
            super().__init__(made_from.get("state") or {}, class_name=made_from.get("class_name"))

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.update(state)

class InertUnpickler(pickle.Unpickler):
    """Reads a pickle's numbers, texts, containers and tensors; any other object becomes a Record."""
    def find_class(self, module, name):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return getattr(torch._utils, name)
        return dict if name == "OrderedDict" else Record

def weights_of(module, prefix=""):
    """The weights of a module of EDM's and of those in it, by their names."""
    weights = {prefix + name: p for name, p in module["_parameters"].items() if p is not None}
    for name, child in module["_modules"].items():
        weights |= weights_of(child, f"{prefix}{name}.")
    return weights

def read_edm(path):
    """The EMA network of a .pkl of NVIDIA's EDM (DDPM++ or ADM): its config and its weights by our names."""
    with open(path, "rb") as file:
        outer = InertUnpickler(file).load()["ema"]
    if outer["class_name"] != "EDMPrecond" or outer["sigma_data"] != 0.5:
        raise sf.Fault(f"{path} is a network with {outer['class_name']!r}; only EDMPrecond can be used")
    inner = outer["_modules"]["model"]
    given, weights = inner["_init_kwargs"], weights_of(inner)
    if given.get("encoder_type", "standard") != "standard":
        raise sf.Fault(f"{path} is an NCSN++ (-ve) of EDM's; take the same network with -vp in its name")
    like = dict(SongUNet="cifar10", DhariwalUNet="imagenet64")[inner["class_name"]]  # EDM's defaults
    config = {name: given.get(name, x) for name, x in sf.PRESETS[like]["networks"]["teacher"].items()}
    config |= dict(resolution=given["img_resolution"], channels=given["in_channels"], denoiser=True,
                   label_dim=given.get("label_dim", 0), time_scale=1.0)  # its time is ln(sigma) / 4
    weights.pop("map_augment.weight", None)  # of EDM's augmentation, not used for sampling
    return config, {f"net.{our_name(name)}": p.data.clone() for name, p in weights.items()}

def our_name(name):
    """EDM's, but for the first and the last layers."""
    name = re.sub(r"^enc\.\d+x\d+_conv\.", "in_conv.", name)
    return re.sub(r"^dec\.\d+x\d+_aux_(norm|conv)\.", r"out_\1.", name)

# ---- The .pth of SlimFlow's authors, and what is written of a network --------------------------------------
def read_official(path):
    """The EMA network of a .pth of the authors, in the first layout that fits: its config and its weights."""
    # Their optimizer's learning rate is a number of numpy's, which this function rebuilds.
    scalar = np.float64(0).__reduce__()[0]
    allowed = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # numpy 1, numpy 2
    with torch.serialization.safe_globals([*allowed, np.dtype, type(np.dtype("f8"))]):
        tensors = torch.load(path, map_location="cpu", weights_only=True)["ema"]["shadow_params"]
    for dataset in ("cifar10", "ffhq64", "imagenet64"):
        for config in sf.PRESETS[dataset]["networks"].values():
            with contextlib.suppress(RuntimeError, StopIteration, ValueError):  # another layout
                return config, official_weights(config, tensors)
    raise ValueError("an unknown layout")

def official_weights(config, tensors):
    """Weights by our names from the authors' tensors, which come in the order in which ours are applied."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in sf.UNet(**config).named_parameters()}
    weights, rest = {}, iter(tensors)
    if config.get("kind") == "adm":  # EDM's own code
        weights = dict(zip(shapes, rest))
    else:
        for name in shapes:
            if name.endswith("qkv.weight"):  # matrices [in, out] and biases of q, k, v; ours is interleaved
                q, q_bias, k, k_bias, v, v_bias = itertools.islice(rest, 6)
                weights[name] = torch.stack([q.mT, k.mT, v.mT], dim=1).flatten(0, 1)[:, :, None, None]
                bias = torch.stack([q_bias, k_bias, v_bias], dim=1).flatten()
                weights[name.replace("weight", "bias")] = bias
            elif name.endswith("proj.weight"):
                weights[name] = next(rest).mT[:, :, None, None]
            elif not name.endswith("qkv.bias"):
                weights[name] = next(rest)
    if list(rest) or {name: w.shape for name, w in weights.items()} != shapes:
        raise ValueError("another layout")
    return weights

def convert_network(path, dataset, name, out):
    """Write the network in a file as the teacher `name` of a data set."""
    if dataset not in sf.PRESETS or not name:
        raise sf.Fault(f"a teacher needs a data set ({', '.join(sf.PRESETS)}) and a name of yours")
    read = read_edm if path.suffix == ".pkl" else read_official
    foreign = "it is damaged, or neither EDM's nor the authors'"
    with warnings.catch_warnings(), sf.trying(f"read {path}", foreign):
        warnings.simplefilter("ignore")  # what torch says of old files is not for the user
        config, weights = read(path)
        sf.build(config, weights=weights)
    run = sf.Run(dataset, out, settings=dict(train=dict(name=name)))
    shape, classes = sf.image_shape(config)
    found = f"{config.get('kind', 'ddpm++')}, images {shape}, {classes} classes"
    if (shape, classes) != (run.shape, run.classes):
        raise sf.Fault(f"{path} ({found}) does not fit {dataset}: {run.shape}, {run.classes} classes")
    result = free(run.result("train"))
    sf.save(result, {"train-name": name}, network=config, weights=weights)
    print(f"{path}: {found}, is now {result}")

# ---- Pictures ----------------------------------------------------------------------------------------------
def list_pictures(folder):
    """The pictures in a folder and in those inside it, by their suffixes; without hidden ones."""
    kinds = {suffix for suffix, kind in Image.registered_extensions().items()
             if Image.MIME.get(kind, "").startswith("image/")}

    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in kinds
             and not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not found:
        raise sf.Fault(f"there are no pictures in {folder}")
    return found

def read_picture(path, size):
    """The middle of a picture at size x size, uint8 [3, size, size]; what is transparent becomes white."""
    with Image.open(path) as file:
        file.draft(None, (2 * size, 2 * size))  # a large JPEG is read at less than its full size
        picture = ImageOps.exif_transpose(file)  # turned as every viewer shows it
    if picture.mode.startswith("I"):  # grey levels of 16 bits
        picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

def convert_folder(folder, path, size, by_class):
    """Write the pictures in a folder to a file: images, uint8 [N, 3, size, size], and classes, int64 [N]."""
    folders = [folder]
    if by_class:
        folders = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    pictures = [(picture, y) for y, inside in enumerate(folders) for picture in list_pictures(inside)]
    if not pictures:
        raise sf.Fault(f"there are no folders in {folder}")
    if len(pictures) < 500:
        print(f"{len(pictures)} pictures are few: expect a generator that repeats them")
    Image.MAX_IMAGE_PIXELS = None  # scans may be large
    images, damaged = torch.empty(len(pictures), 3, size, size, dtype=torch.uint8), []
    report = sf.progress("pictures", len(pictures))

    def put(i):
        try:
            images[i] = read_picture(pictures[i][0], size)
        except MemoryError:
            raise
        except Exception:  # a damaged file raises anything
            damaged.append(str(pictures[i][0]))

    with ThreadPoolExecutor() as pool:
        for done, _ in enumerate(pool.map(put, range(len(pictures))), 1):
            report(done)
    if damaged:
        raise sf.Fault(f"cannot read these pictures; remove them: {', '.join(sorted(damaged))}")
    y, classes = torch.tensor([y for _, y in pictures]), len(folders) if by_class else 0
    sf.save(path, {}, images=images, y=y, shape=(3, size, size), classes=classes)
    print(f"{len(images):,} pictures at {size}x{size}, {classes} classes, are now {path}")

def free(path):
    """A path to write to: Fault if there is a file. Its folder is made."""
    if path.exists():
        raise sf.Fault(f"{path} is there already; remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

def main(argv=None):
    """Run the command line; return its exit status. What the user must mend is one line on stderr, and 2."""
    parser = sf.Parser(prog="convert.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a file with a network, or a folder of pictures")
    parser.add_argument("target", help="the data set of the network, or the file to write")
    parser.add_argument("name", nargs="?", help="of the teacher")
    parser.add_argument("--size", type=int, choices=(8, 16, 32, 64), default=32, help="of pictures [32]")
    parser.add_argument("--classes", action="store_true", help="pictures: one class for each folder")
    parser.add_argument("--out", default="runs", help="teacher: folder of the results [runs]")
    try:
        args = parser.parse_args(argv)
        if args.source.is_dir():
            convert_folder(args.source, free(Path(args.target)), args.size, args.classes)
        else:
            convert_network(args.source, args.target, args.name, args.out)
        return 0
    except (sf.Fault, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; nothing was written"
    print("convert:", message.replace("\n", " "), file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
