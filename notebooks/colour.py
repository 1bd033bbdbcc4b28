"""Colour: 3,570 icons of 16x16 pixels, two trained networks that judge them, and a world for experiments.py.

Notebook 7 and `python notebooks/experiments.py annealing icons` need two packages in this folder, 64 MB:
`pip install --no-deps --target runs/packages fugue-icons==3.5.6 stlpips-pytorch==0.0.2`
"""

import re
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from worlds import HELD_OUT, at_equal_contrast, sf

PACKAGES, DATA = Path("runs/packages"), Path("runs/icons.pt")
LAYERS = {  # c: convolution, b: blur, r: ReLU, p: pooling of 3x3 pixels, q: of 2x2
    "alex": "cbr pbcr pbcr cr cr",
    "vgg": "crcr qbcrcr qbcrcrcr qbcrcrcr qbcrcrcr",
}

def unpack(folder):
    """The icons of the package's one large picture: 16x16 PNG files."""
    package = PACKAGES / "fugue_icons/static"
    sheet = Image.open(package / "fugue-icons.png")
    position = r"\.fugue-([\w-]+)\{background-position:-(\d+)px -(\d+)px"
    folder.mkdir(parents=True, exist_ok=True)
    for name, x, y in re.findall(position, (package / "fugue-icons.css").read_text()):
        x, y = int(x), int(y)
        sheet.crop((x, y, x + 16, y + 16)).save(folder / f"{name}.png")

def icons_run(**settings):
    """The preset for pictures of your own, with the icons as its pictures."""
    if not DATA.exists():
        import convert

        unpack(Path("runs/icons"))
        convert.convert_folder(Path("runs/icons"), DATA, size=16, by_class=False)
    return sf.Run("pictures", "runs/colour", "cpu", dict(train=dict(data=str(DATA))) | settings)

@cache
def trained(name):
    """Layers and weights of a network of shift-tolerant LPIPS (2022), trained on photographs."""
    path = PACKAGES / f"stlpips_pytorch/weights/vST0.0/{name}_shift_tolerant.pth"
    w = torch.load(path, map_location="cpu", weights_only=True)
    return LAYERS[name].replace(" ", ""), w

def features(layers, w, x):
    """What a network has after each ReLU, for pictures in [-1, 1]."""
    x = (x - w["scaling_layer.shift"]) / w["scaling_layer.scale"]
    kernels = iter([key for key in w if re.match(r"net.*(weight|filt)", key)])
    for layer in layers:
        if layer in "cb":
            key = next(kernels)
        if layer == "c":
            bias, width = w[key.replace("weight", "bias")], w[key].shape[-1]
            x = F.conv2d(x, w[key], bias, padding=min(2, width // 2))
        elif layer == "b":  # this makes it tolerant to shifts
            x = F.pad(x, (2, 2, 2, 2), mode="reflect")
            x = F.conv2d(x, w[key], stride=2, groups=len(w[key]))
        elif layer in "pq":
            x = F.max_pool2d(x, 3 if layer == "p" else 2, stride=1)
        else:
            x = x.relu()
            yield x

def enlarged(x, factor):  # to 24 pixels for AlexNet, to 32 for VGG; both are made for more
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)

def normalised(x):
    return x / (x.norm(dim=1, keepdim=True) + 1e-10)

@torch.no_grad()
def judged(images):
    """VGG's 10th and last features, each [N, 512], of uint8 pictures [N, 3, H, W]."""
    rows = []
    for x in images.split(100):
        layers = list(features(*trained("vgg"), enlarged(sf.to_float(x), 2)))
        rows.append([normalised(f).mean((2, 3)) for f in (layers[9], layers[12])])
    return [torch.cat(layer) for layer in zip(*rows)]

def frechet(a, b):
    """1000 times the distance between two sets of pictures, in each of the judge's layers."""
    moments = [(*sf.moments([f]), *sf.moments([g])) for f, g in zip(a, b)]
    return [1000 * sf.frechet_distance(*four) for four in moments]

@cache
def real():
    """The icons, and the judge's features of them."""
    images, _ = sf.load_images(icons_run())
    return images, judged(images)

class Icons:
    """One teacher for all seeds; each has its own pairs. Distance: Frechet's of 1,000 icons, last layer."""
    D, network = staticmethod(sf.huber), staticmethod(partial(sf.UNet, **sf.pictures["networks"]["small"]))
    lr, distill_lr, precise, evaluations = 4e-3, 1e-3, 18, 18
    reflow_steps, guided_steps, scale = 1_600, 350, 1.0
    def __init__(self, seed):
        self.seed, own = seed, 3_512
        run = icons_run(pairs=dict(n=3 * own + HELD_OUT))
        sf.make(run, "pairs")
        z, x, _ = (torch.cat(part).float() for part in zip(*sf.load_pairs(run, "pairs")))
        at = np.r_[seed * own : (seed + 1) * own, 3 * own : len(z)]
        self.noise, self.data = z[at], x[at]
        self.fresh, self.y = sf.fixed_noise(run, 1_000, seed=1)

    def distances(self, flow, nfe=1):
        made = torch.cat(list(sf.generate(flow, self.fresh, self.y, nfe)))
        images, wanted = real()
        stretched, contrast = at_equal_contrast(made, images)
        middle, last = frechet(judged(made), wanted)
        _, matched = frechet(judged(stretched), wanted)
        return dict(distance=last, matched=matched, contrast=contrast, middle=middle)
