"""SlimFlow in one file: small one-step image generators, trained with rectified flow.

After Zhu, Liu, Liu, "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow" (ECCV 2024,
arXiv 2407.12718). `python slimflow.py` turns 1,797 real 8x8 digits into a one-step generator in 4 minutes on
2 CPU cores: one evaluation of 0.19M weights reaches a Frechet distance of 11 to the real digits; the 0.75M
teacher reaches 4 in 12 evaluations and 1,523 in one; two random halves of the digits are 9 apart.

The method in four lines. Time runs from noise z at t = 0 to data x at t = 1; the paper has it the other way.
  1. rectified flow      min E |x - z - v(x_t, t)|^2 over independent z and x, on the path x_t = (1-t) z + t x
  2. pairs               integrate the teacher's ODE dx/dt = v(x, t) precisely from z to its x; keep (z, x)
  3. annealing reflow    regress a small network likewise on (z', x), z' = sqrt(1-b^2) z + b e, b: 1 -> 0
  4. guided distillation min E D(z + s(z, T0), x) on the pairs + E D(z + s(z, T0), X(z)) on fresh noise
s is the student, whose one step z + s(z, T0) makes an image, D a distance between images, X two Euler steps
of the 2-rectified flow.

Sections: 1 presets, 2 data, 3 network, 4 flow, 5 solvers, 6 teachers, 7 training, 8 stages, 9 metrics,
10 command line.
"""

import argparse
import contextlib
import copy
import errno
import importlib
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import re
import shutil
import statistics
import sys
import time
import warnings
import zipfile
import zlib
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

WORLD = int(os.environ.get("WORLD_SIZE", 1))  # processes; torchrun sets it, and which of them this is
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0


class Fault(Exception):
    """Something only the user can mend; the command line prints it as one line and exits with status 2."""


# ------------------------------------------------------------------------------------------------------------
# 1. Presets: the numbers of the experiments and their source ("authors": their CIFAR-10 configuration)

@dataclass(frozen=True)
class Schedule:
    """How one network is trained: Adam, gradients clipped at norm 1. The defaults are the authors'."""

    steps: int  # optimizer steps
    batch: int = 128  # images per step
    lr: float = 2e-4  # Adam's learning rate
    warmup: int = 5_000  # steps of linear warm-up
    decay: float = 0.0  # last share of the steps, over which lr falls linearly to 0
    ema: float = 0.999999  # largest decay rate of the averaged weights

@dataclass(frozen=True)
class Preset:
    """One data set with its networks (keyword arguments of `UNet`) and the schedule of each stage."""

    name: str
    shape: tuple  # of an image, (C, H, W)
    teacher: dict
    students: dict  # by size
    student: str  # the default size
    train: Schedule
    reflow: Schedule
    distill: Schedule
    pairs: int  # (noise, data) pairs that the teacher writes
    solver: dict  # the ODE solver that writes them
    edm_steps: int  # of EDM's own solver, which writes them if the teacher is one of EDM's
    anneal: int  # reflow steps over which b falls from 1 to 0; 0 is plain reflow
    anneal_schedule: str = "linear"  # authors
    guidance: float = 1.0  # weight of the guidance loss; 0 is naive distillation
    guidance_share: float = 1.0  # fresh noises in the guidance loss per stored pair of the batch
    distance: str = "l2"  # D of the distillation
    flip: bool = True  # mirror half of the images; authors
    label_dim: int = 0  # number of classes, 0 if unconditional
    samples: int = 50_000  # images of a Frechet distance: FID's convention

DIGITS = dict(resolution=8, channels=1, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))  # ours
DIGITS |= dict(time_scale=16.0)  # with 999 the velocity oscillates in t, and RK45 takes 3 times as long
DDPMPP = dict(channels=3, channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(16,), dropout=0.15)
ADM = dict(kind="adm", resolution=64, channels=3, label_dim=1000, dropout=0.1)  # EDM's ImageNet-64 setting

def small_ddpmpp(resolution):
    """The paper's students by size; the layout of 3.4M is ours."""
    network = DDPMPP | dict(resolution=resolution)
    return {
        "27.9M": network | dict(model_channels=128),
        "15.7M": network | dict(model_channels=96),
        "7.0M": network | dict(model_channels=64),
        "3.4M": network | dict(model_channels=64, channel_mult=(1, 1, 2), num_blocks=1, attn_resolutions=()),
    }

RK45 = dict(solver="rk45", rtol=1e-5, atol=1e-5)  # with which the authors write their pairs

digits = Preset(
    name="digits",
    shape=(1, 8, 8),
    teacher=DIGITS | dict(model_channels=32),
    students={"0.19M": DIGITS | dict(model_channels=16)},
    student="0.19M",
    # Searched with one or two seeds. In equal time batch 64 beat 32 and 128, attention at 4x4 beat none, and
    # neither 24 channels nor channel_mult (1, 3) was better. The lengths fit into 4 minutes on 2 CPU cores.
    train=Schedule(steps=1_200, batch=64, lr=2e-3, warmup=100, decay=0.6, ema=0.998),
    reflow=Schedule(steps=1_100, batch=64, lr=4e-3, warmup=100, decay=0.6, ema=0.998),
    distill=Schedule(steps=550, batch=64, lr=1e-3, warmup=0, decay=0.6, ema=0.998),  # lr 2e-3 was no better
    pairs=6_000,  # still few: the student errs twice as much on other noise as on theirs
    solver=dict(solver="adams", steps=12),
    edm_steps=18,
    anneal=250,  # 23 % of the steps
    guidance=0.1,  # with this many pairs 0 is a little better, 1 worse: see README
    guidance_share=0.25,  # as good as 1, in 0.6 of the time
    distance="huber",
    flip=False,
    samples=5_000,
)
cifar10 = Preset(
    name="cifar10",
    shape=(3, 32, 32),
    teacher=DDPMPP  # the paper's 61.8M
    | dict(resolution=32, model_channels=128, channel_mult=(1, 2, 2, 2), num_blocks=4),
    students=small_ddpmpp(32),
    student="15.7M",
    train=Schedule(steps=800_000),  # length: ours, as reflow
    reflow=Schedule(steps=800_000),  # authors: about 800,000
    distill=Schedule(steps=200_000, warmup=0),  # authors: no warm-up; length: ours
    pairs=50_000,  # authors
    solver=dict(solver="adams", steps=48),  # ours, about a third of RK45's evaluations: see README
    edm_steps=18,  # EDM's for CIFAR-10: 35 evaluations
    anneal=300_000,  # authors
    distance="lpips",  # authors
)
ffhq64 = replace(
    cifar10,  # ours: its schedules
    name="ffhq64",
    shape=(3, 64, 64),
    teacher=cifar10.teacher | dict(resolution=64, dropout=0.05),  # EDM's FFHQ-64 network
    students=small_ddpmpp(64),
    edm_steps=40,  # EDM's for FFHQ: 79 evaluations
)
imagenet64 = replace(
    cifar10,  # ours: its schedules
    name="imagenet64",
    shape=(3, 64, 64),
    label_dim=1000,
    teacher=ADM  # EDM's ImageNet-64 network
    | dict(model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(32, 16, 8)),
    students={  # the paper's sizes; for 44.7M the layout is ours
        size: ADM | dict(model_channels=128, channel_mult=mult, num_blocks=2, attn_resolutions=(32, 16))
        for size, mult in (("80.7M", (1, 2, 2, 4)), ("44.7M", (1, 2, 2, 2)))
    },
    student="80.7M",
    pairs=400_000,  # ours: 400 of each class
    edm_steps=40,  # as for FFHQ; EDM's published ImageNet samples took 256, with fresh noise on the way
)
SIZES = list(dict.fromkeys(size for preset in (digits, cifar10, imagenet64) for size in preset.students))
PRESETS = {preset.name: preset for preset in (digits, cifar10, ffhq64, imagenet64)}


# ------------------------------------------------------------------------------------------------------------
# 2. Data: images are uint8 on disk and in memory, and become float in [-1, 1] batch by batch

def load_images(preset, data_dir=None):
    """All training images, uint8 [N, C, H, W], and their labels, int64 [N] or None.

    digits come with this file. `data_dir` (data/<name> if None) holds CIFAR-10's archive, or receives it; of
    the others it is a folder of images, with a subfolder per class, or the zip of EDM's dataset tool.
    """
    if preset.name == "digits":
        return load_digits(Path(data_dir or Path(__file__).parent) / "digits.npz")
    path = Path(os.path.abspath(data_dir or f"data/{preset.name}"))
    return load_cifar10(path) if preset.name == "cifar10" else load_pictures(path, preset)

def load_digits(path):
    """The embedded digits."""
    with faults(path, "digits.npz", "take the one that comes with slimflow.py"):
        images, labels = load_npz(path, "images", "labels")
        known = images.dtype == np.uint8 and images.shape == (len(labels), 1, 8, 8)
        if not (known and len(labels) and set(labels) <= set(range(10))):
            raise ValueError("other arrays")
        return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))

def load_npz(path, *names):
    """Arrays of an .npz file, each of at most 256 MiB, whatever the file makes of its few bytes."""
    with np.load(path) as file:
        if max(entry.file_size for entry in file.zip.infolist()) > 2**28:
            raise ValueError("too large")
        return [file[name] for name in names]

def load_rows(path, row, label_dim, what, remedy):
    """The rows of an .npy file, of this dtype and with classes y of label_dim, memory-mapped: [N]."""
    with faults(path, what, remedy):
        rows = np.load(path, mmap_mode="c")
        if rows.dtype != row or rows.ndim != 1 or not len(rows):
            raise ValueError("rows of another kind")
        if label_dim and not set(np.unique(rows["y"])) <= set(range(label_dim)):
            raise ValueError(f"classes outside of 0 to {label_dim - 1}")
        return rows

def import_optional(name):
    """Import torchvision, or a package that needs it, also where torchvision's build does not fit torch's."""
    register = torch.library.register_fake
    try:
        # A torchvision that does not fit fails where it describes its compiled operators; none is used here.
        torch.library.register_fake = lambda *args, **kwargs: lambda function: function
        importlib.import_module("torchvision")
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0].replace("_", "-")
        raise Fault(f"this needs the package {package}: pip install {package}") from None
    finally:
        torch.library.register_fake = register

def load_cifar10(folder):
    """CIFAR-10's 50,000 training images, by torchvision: nothing is unpickled before its MD5 sum is right."""
    cifar10 = import_optional("torchvision.datasets").CIFAR10
    try:
        data = cifar10(folder, train=True, download=True)
    except (OSError, RuntimeError):
        file = f"{cifar10.filename} (from {cifar10.url})"
        raise Fault(f"cannot download CIFAR-10; put {file} into {folder}, or name its --data-dir") from None
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
ONE_LARGE = Lock()  # of the threads that decode, one at a time takes the memory of a large picture
FORMATS = "PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM"  # others may start programs (EPS: Ghostscript)

def load_pictures(path, preset):
    """Images of a folder or zip, decoded once into a file beside it and memory-mapped there."""
    size, row = preset.shape[-1], np.dtype([("image", "u1", preset.shape), ("y", "i8")])
    decoded = Path(f"{path}.{size}x{size}{'.labels' if preset.label_dim else ''}.npy")
    if not path.exists() or path == path.parent:
        raise Fault(f"no images at {path}; --data-dir takes a folder of images or EDM's zip")
    if not decoded.exists() or decoded.stat().st_mtime < path.stat().st_mtime:
        what = f"folder or zip of images{' with a class each' if preset.label_dim else ''}"
        with lock(Path(f"{decoded}.lock")), faults(path, what, "mend it, or name another --data-dir"):
            names, read = list_files(path)
            pictures = sorted(name for name in names if Path(name).suffix.lower() in PICTURES)
            labels = classify(pictures, names, read, preset.label_dim)
            write_npy(decoded, row, len(pictures), decode_all(pictures, labels, read, row))
    store = load_rows(decoded, row, preset.label_dim, "file of decoded images", "delete it")
    images, labels = torch.from_numpy(store["image"]), torch.from_numpy(store["y"])
    return images, labels if preset.label_dim else None

def list_files(path):
    """The names of all files in a folder or zip, and a function from a name to the file's bytes."""
    archive = None if path.is_dir() else zipfile.ZipFile(path)

    def read(name):
        size = archive.getinfo(name).file_size if archive else (path / name).stat().st_size
        if size > 2**27:
            raise ValueError("more than 128 MiB")
        return archive.read(name) if archive else (path / name).read_bytes()

    if archive:
        return archive.namelist(), read
    return [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()], read

def classify(pictures, names, read, label_dim):
    """The class of each picture: from EDM's dataset.json, else the number of its subfolder; 0 if unneeded."""
    if not pictures:
        raise ValueError(f"no {' '.join(sorted(PICTURES))} in it")
    if not label_dim:
        return [0] * len(pictures)
    if "dataset.json" in names:
        text = read("dataset.json")
        if len(text) > 2**16 + 300 * len(pictures):
            raise ValueError("dataset.json is too large")
        table = dict(json.loads(text)["labels"])
    else:
        folders = {folder: i for i, folder in enumerate(sorted({name.split("/")[0] for name in pictures}))}
        table = {name: folders[name.split("/")[0]] for name in pictures if "/" in name}
    for name in pictures:
        if table.get(name) not in range(label_dim):
            raise ValueError(f"{name} has no class from 0 to {label_dim - 1}")
    return [table[name] for name in pictures]

def decode_all(pictures, labels, read, row):
    """Arrays of rows (image, label), some hundred at a time."""
    report = progress("decode", len(pictures), "images")

    def one(name):
        try:
            return decode(io.BytesIO(read(name)), row["image"].shape[-1])
        except Exception as error:  # a damaged file can fail anywhere inside the image library
            raise Fault(f"{name} cannot be used: {error}; mend it or take it out") from error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(pictures), 512):
            some = slice(start, start + 512)
            rows = np.zeros(len(pictures[some]), row)
            rows["image"], rows["y"] = list(pool.map(one, pictures[some])), labels[some]
            yield rows
            report(start + len(rows), "")

def decode(file, size):
    """One picture as uint8 [3, size, size]: transparency over white, the centre square, box-filtered."""
    from PIL import Image  # here and below: imported where needed, for a quick start

    with Image.open(file, formats=FORMATS) as image, contextlib.ExitStack() as stack:
        if math.prod(image.size) > 2**22:
            stack.enter_context(ONE_LARGE)
        if math.prod(image.size) > 2**25:
            raise ValueError(f"{image.width}x{image.height} are more than 32 million pixels")
        side, left, top = min(image.size), *((n - min(image.size)) // 2 for n in image.size)
        if side < size:
            raise ValueError(f"{image.width}x{image.height} pixels, and {size}x{size} are needed")
        if image.mode.startswith("I;16"):  # 16-bit grey, which convert() would clip
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        square = (left, top, left + side, top + side)
        image = image.convert("RGB").resize((size, size), Image.Resampling.BOX, square)
    return np.asarray(image).transpose(2, 0, 1)

def write_npy(path, row, n, chunks):
    """An .npy file of n rows of this dtype, from an iterator over arrays of some of them."""
    header = dict(descr=np.lib.format.dtype_to_descr(row), fortran_order=False, shape=(n,))

    def write(file):
        np.lib.format.write_array_header_1_0(file, header)
        written = sum(file.write(chunk.tobytes()) for chunk in chunks)
        if written != n * row.itemsize:
            raise Fault(f"{path} would have {written // row.itemsize} rows in place of {n}; use --fresh")

    save_safely(path, write)

def resident(tensors, device):
    """The tensors on a CUDA device if they take at most a quarter of its memory, else where they are."""
    if device != "cuda":
        return tensors
    room = torch.cuda.get_device_properties(device).total_memory / 4
    fits = sum(x.nbytes for x in tensors if x is not None) <= room
    return [x if x is None or not fits else x.to(device) for x in tensors]

def fetch(tensors, i, device):
    """Rows i [B] of each tensor (or None) on the device.

    From the CPU they go through pinned memory, without waiting: the training loop runs ahead of the GPU, so
    the next batch is gathered and copied while the GPU still works on this one.
    """
    rows = [x if x is None else x[i.to(x.device, non_blocking=True)] for x in tensors]
    if device == "cuda":
        rows = [x if x is None or x.is_cuda else x.pin_memory().to(device, non_blocking=True) for x in rows]
    return rows

def to_float(images):
    """uint8 0..255 to float -1..1."""
    return images.float() / 127.5 - 1

def to_uint8(x):
    """Float -1..1 to uint8 0..255, clipped."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)

def flip_together(*tensors):
    """Mirror each image left-right with probability 1/2, the same way in every tensor [B, C, H, W]."""
    mirrored = torch.rand(len(tensors[0]), 1, 1, 1, device=tensors[0].device) < 0.5
    return [torch.where(mirrored, x.flip(-1), x) for x in tensors]


# ------------------------------------------------------------------------------------------------------------
# 3. Network: one UNet for both published families, DDPM++ (CIFAR-10, FFHQ) and ADM (ImageNet)

def group_norm(channels, kind):
    """GroupNorm as both families set it: at least 4 channels per group, at most 32 groups."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-5 if kind == "adm" else 1e-6)

def conv(c_in, c_out, kernel):
    """Convolution that keeps the resolution."""
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)

class Block(nn.Module):
    """Residual block, after an optional 2x resampling, before an optional self-attention.

    DDPM++ adds the embedding of time and class to the features, and scales each sum by sqrt(1/2) to keep its
    variance. ADM lets the embedding scale and shift the normalised features; its heads have 64 channels.
    """

    def __init__(self, c_in, c_out, c_emb, kind, dropout=0.0, resample=None, attention=False):
        super().__init__()
        adm = kind == "adm"
        self.adm, self.dropout, self.resample, self.attention = adm, dropout, resample, attention
        self.heads, self.gain = (c_out // 64, 1.0) if adm else (1, math.sqrt(0.5))
        self.norm0, self.conv0 = group_norm(c_in, kind), conv(c_in, c_out, 3)
        self.affine = nn.Linear(c_emb, 2 * c_out if adm else c_out)
        self.norm1, self.conv1 = group_norm(c_out, kind), conv(c_out, c_out, 3)
        needs_skip = c_in != c_out or (resample and not adm)
        self.skip = conv(c_in, c_out, 1) if needs_skip else nn.Identity()
        if attention:
            self.norm2, self.qkv = group_norm(c_out, kind), conv(c_out, 3 * c_out, 1)
            self.proj = conv(c_out, c_out, 1)

    def forward(self, x, emb):
        """x [B, c_in, H, W], emb [B, c_emb] -> [B, c_out, H', W'] with H' = H, H/2 (down) or 2H (up)."""
        h = self.conv0(self._resampled(F.silu(self.norm0(x))))  # (B, c_out, H', W')
        emb = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = emb.chunk(2, dim=1)  # each (B, c_out, 1, 1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h.add_(emb))
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = self.skip(self._resampled(x)).add(h).mul_(self.gain)
        if self.attention:
            x = self.proj(self._attended(self.qkv(self.norm2(x)))).add_(x).mul_(self.gain)
        return x

    def _resampled(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def _attended(self, qkv):
        b, c, height, width = qkv.shape  # c = 3 c_out, the channels ordered as (head, channel, q k v)
        qkv = qkv.reshape(b, self.heads, c // 3 // self.heads, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # each (B, heads, H W, channels of a head)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c // 3, height, width)

class UNet(nn.Module):
    """Velocity network v(x, t, y): DDPM++ or ADM, with EDM's parameter names, so that its weights load."""

    def __init__(
        self,
        resolution,  # of the images, a multiple of 2 ** (levels - 1)
        channels,  # of the images
        model_channels,  # width of the first level
        channel_mult,  # width of each level in units of model_channels
        num_blocks,  # residual blocks per level of the encoder; the decoder has one more
        attn_resolutions,  # resolutions with self-attention
        label_dim=0,  # number of classes, 0 if unconditional
        dropout=0.0,
        kind="ddpm++",  # or "adm"
        time_scale=999.0,  # t in [0, 1] enters the sinusoids as time_scale * t
    ):
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.kind, self.model_channels = kind, model_channels
        self.label_dim, self.time_scale = label_dim, time_scale
        adm, c, c_emb, skips = kind == "adm", model_channels, 4 * model_channels, []
        block = partial(Block, c_emb=c_emb, kind=kind, dropout=dropout)
        sizes = [resolution >> level for level in range(len(channel_mult))]
        levels = [(f"{n}x{n}", n in attn_resolutions, c * mult) for n, mult in zip(sizes, channel_mult)]

        self.map_layer0, self.map_layer1 = nn.Linear(c, c_emb), nn.Linear(c_emb, c_emb)
        if label_dim:
            self.map_label = nn.Linear(label_dim, c_emb if adm else c, bias=not adm)
        self.enc = nn.ModuleDict()
        for level, (name, attention, width) in enumerate(levels):
            if level == 0:
                self.enc[f"{name}_conv"] = conv(channels, c, 3)
            else:
                self.enc[f"{name}_down"] = block(c, c, resample="down")
            skips.append(c)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = block(c, width, attention=attention)
                c = width
                skips.append(c)
        self.dec = nn.ModuleDict()
        for level, (name, attention, width) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                self.dec[f"{name}_in0"] = block(c, c, attention=True)
                self.dec[f"{name}_in1"] = block(c, c)
            else:
                self.dec[f"{name}_up"] = block(c, c, resample="up")
            for i in range(num_blocks + 1):
                attend = attention and (adm or i == num_blocks)
                self.dec[f"{name}_block{i}"] = block(c + skips.pop(), width, attention=attend)
                c = width
        if adm:
            self.out_norm, self.out_conv = group_norm(c, kind), conv(c, channels, 3)
        else:
            self.dec[f"{resolution}x{resolution}_aux_norm"] = group_norm(c, kind)
            self.dec[f"{resolution}x{resolution}_aux_conv"] = conv(c, channels, 3)
        self._initialise()

    @torch.no_grad()
    def _initialise(self):
        """DDPM++: Xavier uniform; ADM: PyTorch's default; residual branches and output start near zero."""
        for name, p in self.named_parameters():
            closing = any(part in name for part in ("conv1.", "proj.", "aux_conv.", "out_conv."))
            if "norm" in name:
                continue
            if self.kind == "adm":
                if closing:
                    p.zero_()
                elif "map_label" in name:
                    p.normal_()  # variance label_dim / fan_in = 1
            elif p.ndim == 1:
                p.zero_()
            else:
                nn.init.xavier_uniform_(p, gain=1e-5 if closing else math.sqrt(0.2) if "qkv" in name else 1.0)

    def _embedded(self, t, y):
        """Sinusoids of time [B] and class [B] (or None) through two linear layers: [B, 4 model_channels]."""
        adm, half = self.kind == "adm", self.model_channels // 2
        i = torch.arange(half, dtype=torch.float32, device=t.device)
        frequency = (1 / 10_000) ** (i / (half if adm else half - 1))
        angle = (self.time_scale * t)[:, None] * frequency.to(t.dtype)  # (B, half)
        emb = torch.cat([angle.cos(), angle.sin()] if adm else [angle.sin(), angle.cos()], dim=1)
        label = 0.0
        if self.label_dim:
            one_hot = emb.new_zeros(len(t), self.label_dim)
            if y is not None:
                one_hot.scatter_(1, y[:, None], 1.0)
            label = self.map_label(one_hot if adm else one_hot * math.sqrt(self.label_dim))
        if adm:
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))) + label)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb + label))))

    def forward(self, x, t, y=None):
        """Velocity at x [B, C, H, W], time t [B] in [0, 1], class y int64 [B] or None: like x."""
        emb, skips = self._embedded(t, y), []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if "aux" not in name:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        norm, last = (self.out_norm, self.out_conv) if self.kind == "adm" else list(self.dec.values())[-2:]
        return last(F.silu(norm(x)))


# ------------------------------------------------------------------------------------------------------------
# 4. Flow: the paths, the losses, and the one and two steps that they train

T0 = 1e-3  # the ODE starts here instead of at 0, as in the authors' code, so that their checkpoints work

def interpolate(noise, data, t):
    """The point x_t = (1 - t) z + t x of the straight path; noise and data [B, ...], t [B]."""
    t = t.reshape(-1, *[1] * (data.ndim - 1))
    return (1 - t) * noise + t * data

def rectified_flow_loss(flow, noise, data, y=None, t=None):
    """Mean of |x - z - v(x_t, t)|^2 over all elements, t ~ U(T0, 1) if None; least at v = E[x - z | x_t]."""
    if t is None:
        t = T0 + (1 - T0) * torch.rand(len(noise), device=noise.device)
    return (data - noise - flow(interpolate(noise, data, t), t, y)).square().mean()

def anneal_beta(step, horizon, schedule="linear"):
    """b of annealing reflow: 1 at step 0, falling to 0 at step `horizon`, 0 from there on."""
    if step >= horizon:
        return 0.0
    u = step / horizon
    if schedule == "linear":
        return 1 - u
    if schedule == "cosine":
        return (1 + math.cos(math.pi * u)) / 2
    if schedule == "exponential":
        return (math.exp(-5 * u) - math.exp(-5)) / (1 - math.exp(-5))
    raise ValueError(f"no annealing schedule {schedule!r}: use linear, cosine or exponential")

def annealed_noise(noise, beta):
    """z' = sqrt(1 - b^2) z + b e with fresh e ~ N(0, I): N(0, I) for every b, from z (b = 0) to e (b = 1)."""
    return math.sqrt(1 - beta**2) * noise + beta * torch.randn_like(noise)

def one_step(flow, noise, y=None):
    """z + v(z, T0): the whole ODE in one Euler step, exact where the flow is straight."""
    return noise + flow(noise, noise.new_full((len(noise),), T0), y)

def two_step(flow, noise, t, y=None):
    """Two Euler steps that meet at t [B]: m = z + t v(z, T0), X = m + (1 - t) v(m, t)."""
    s = t.reshape(-1, *[1] * (noise.ndim - 1))
    middle = noise + s * flow(noise, torch.full_like(t, T0), y)
    return middle + (1 - s) * flow(middle, t, y)

def distillation_loss(student, noise, data, distance, y=None):
    """Mean of D(z + s(z, T0), x) over stored pairs, x being the precise end of the teacher's path from z."""
    return distance(one_step(student, noise, y), data).mean()

def guidance_loss(student, flow, noise, distance, t=None, y=None):
    """Mean of D(z + s(z, T0), X(z)), X the frozen flow's two steps, meeting at t ~ U(0.2, 0.8) if None."""
    if t is None:
        t = 0.2 + 0.6 * torch.rand(len(noise), device=noise.device)
    with torch.no_grad():
        target = two_step(flow, noise, t, y)
    return distance(one_step(student, noise, y), target).mean()

def l2(a, b):
    """Mean squared difference of each image: [B]."""
    return (a - b).square().flatten(1).mean(1)

def huber(a, b):
    """Pseudo-Huber sqrt(|a - b|^2 + c^2) - c of each image, c = 0.00054 sqrt(number of elements): [B]."""
    c = 0.00054 * math.sqrt(a[0].numel())
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c

@cache
def lpips_network(device):
    """LPIPS with VGG, as the package `lpips` has it."""
    package = import_optional("lpips")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package calls torchvision in an older way
            return package.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    except (OSError, RuntimeError):
        folder, url = Path(torch.hub.get_dir()) / "checkpoints", "https://download.pytorch.org/models"
        raise Fault(f"cannot download VGG; put {url}/vgg16-397923af.pth into {folder}") from None

def lpips(a, b):
    """Learned perceptual distance (VGG) of each image, resized to 64x64 as the authors do: [B]."""
    a, b = (x.float().expand(-1, 3, -1, -1) for x in (a, b))
    a, b = (F.interpolate(x, size=64, mode="bilinear", align_corners=True) for x in (a, b))
    with torch.autocast(a.device.type, enabled=False):
        return lpips_network(a.device.type)(a, b).flatten()

DISTANCES = {"l2": l2, "huber": huber, "lpips": lpips}


# ------------------------------------------------------------------------------------------------------------
# 5. Solvers: generators that walk dx/dt = v(x, t) from noise at T0 to data at 1 and yield (t, x) on the way

@torch.no_grad()
def euler(flow, noise, steps, y=None):
    """Order 1, `steps` evaluations: x += v(x, t_i) / N at t_i = T0 + i/N (1 - T0), as the authors run it."""
    x = noise
    yield T0, x
    for i in range(steps):
        t = T0 + i / steps * (1 - T0)
        x = x + flow(x, x.new_full((len(x),), t), y) / steps
        yield T0 + (i + 1) / steps * (1 - T0), x

@torch.no_grad()
def heun(flow, noise, steps, y=None):
    """Order 2, `2 steps - 1` evaluations: trapezoidal rule on a uniform grid; the last step is Euler's."""
    x, grid = noise, np.linspace(T0, 1, steps + 1).tolist()
    yield T0, x
    for t, t_next in zip(grid, grid[1:]):
        v = flow(x, x.new_full((len(x),), t), y)
        if t_next < 1:
            guess = x + (t_next - t) * v
            v = (v + flow(guess, x.new_full((len(x),), t_next), y)) / 2
        x = x + (t_next - t) * v
        yield t_next, x

@torch.no_grad()
def adams(flow, noise, steps, y=None):
    """Order 3, `steps` evaluations: a multistep method, Adams' predictor and corrector (PEC).

    The parabola through the last three velocities is integrated twice: over the step behind, to correct x
    with what is known now, and over the step ahead, to guess where to evaluate next. The grid sin(pi/2 i/N)
    is dense near the data, where images settle. The last step is a guess that nothing corrects.
    """
    grid = (T0 + (1 - T0) * np.sin(np.linspace(0, np.pi / 2, steps + 1))).tolist()
    x, guess, known = noise, noise, []
    for t_before, t, t_next in zip([T0, *grid], grid, grid[1:]):
        known = [*known, (t, flow(guess, x.new_full((len(x),), t), y))][-3:]
        x = x + _integral(known, t_before, t)
        yield t, x
        guess = x + _integral(known, t, t_next)
    yield 1.0, guess

def _integral(known, a, b):
    """Integral from a to b of the polynomial in t through the known [(t, velocity), ...]."""
    origin, degree = known[-1][0], np.arange(1, len(known) + 1)
    powers = np.vander([t - origin for t, _ in known], increasing=True).T  # (degree, node)
    integrals = ((b - origin) ** degree - (a - origin) ** degree) / degree
    weights = np.linalg.solve(powers, integrals).tolist()
    return sum(w * v for w, (_, v) in zip(weights, known))

# Dormand and Prince: times of the stages, their weights (the last row is the step itself), the error estimate
DP_TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
DP_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DP_ERROR = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)

@torch.no_grad()
def rk45(flow, noise, rtol=1e-5, atol=1e-5, y=None):
    """Order 5; an error estimate of order 4, one norm over the whole batch, sets the steps by SciPy's rules.

    Raises Fault where the steps shrink to nothing: the velocity is not finite there.
    """

    def velocity(x, t):
        return flow(x, x.new_full((len(x),), t), y)

    def combine(weights, vectors):
        return sum(w * vector for w, vector in zip(weights, vectors) if w)

    t, x, v = T0, noise, velocity(noise, T0)
    yield t, x
    if not v.isfinite().all():
        raise Fault(f"the ODE cannot be solved past t = {t:.6f}: the velocity is not finite there")
    h = _first_step(velocity, x, v, rtol, atol)
    while t < 1:
        most = 10.0  # a step grows at most tenfold, and not at all after a rejection
        while True:
            h, k = min(h, 1 - t), [v]
            for c, weights in zip(DP_TIMES, DP_STAGES):
                x_new = x + h * combine(weights, k)
                k.append(velocity(x_new, t + c * h))
            error = _rms(h * combine(DP_ERROR, k) / (atol + rtol * torch.maximum(x.abs(), x_new.abs())))
            if error < 1:
                break
            if not h > 1e-13:
                raise Fault(f"the ODE cannot be solved past t = {t:.6f}: the velocity is not finite there")
            h, most = h * max(0.2, 0.9 * error**-0.2), 1.0
        t, x, v = 1.0 if h == 1 - t else t + h, x_new, k[-1]
        h *= min(most, 0.9 * error**-0.2) if error else most
        yield t, x

def _rms(x):
    return x.square().mean().sqrt().item()

def _first_step(velocity, x, v, rtol, atol):
    """SciPy's first step: from the sizes of x, x' and, by a trial Euler step, x''."""
    scale = atol + rtol * x.abs()
    d0, d1 = _rms(x / scale), _rms(v / scale)
    trial = min(1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1, 1 - T0)
    d2 = _rms((velocity(x + trial * v, T0 + trial) - v) / scale) / trial
    h = max(1e-6, trial * 1e-3) if d1 <= 1e-15 and d2 <= 1e-15 else (0.01 / max(d1, d2)) ** 0.2
    return min(100 * trial, h, 1 - T0)

SAMPLE_BATCH = 100  # images that a solver takes at once where there are many
ONE_STEP = dict(solver="euler", steps=1)
SOLVERS = {"euler": euler, "heun": heun, "adams": adams, "rk45": rk45}

def sample(flow, noise, solver="rk45", y=None, **options):
    """Run a solver ("edm": `edm_sample`) to its end: the images, and how many evaluations each took.

    Raises Fault if they are not finite.
    """
    nfe = 0

    def counted(x, t, y):
        nonlocal nfe
        nfe += 1
        return flow(x, t, y)

    if solver == "edm":
        x, nfe = edm_sample(flow, noise, y=y, **options)
    else:
        [(_, x)] = deque(SOLVERS[solver](counted, noise, y=y, **options), maxlen=1)  # keeps the last state
    if not x.isfinite().all():
        raise Fault(f"the images of {solver} are not finite; take another solver, or another network")
    return x, nfe


# ------------------------------------------------------------------------------------------------------------
# 6. Teachers and checkpoints: files are read as plain tensors; nothing in them is ever executed

def blueprint(config):
    """A UNet whose weights have shapes, but take no memory; ValueError if a file asks for absurd sizes."""
    levels, width = config["channel_mult"], config["model_channels"]
    sizes = [config["resolution"], width, *levels, 50 * config["num_blocks"]]
    unit = 64 if config.get("kind") == "adm" else 4  # channels of a head, of a group
    fits = width % unit == 0 and 0 < len(levels) < 10 and config["resolution"] % 2 ** (len(levels) - 1) == 0
    if not fits or min(sizes) < 1 or max(sizes) > 1024 or config["channels"] not in (1, 3):
        raise ValueError("its network is of unknown sizes")
    if not 0 <= config.get("dropout", 0.0) < 1 or not math.isfinite(config.get("time_scale", 999.0)):
        raise ValueError("its network has unknown settings")
    with torch.device("meta"):
        return UNet(**config)

def build(config, device="cpu", weights=None):
    """A UNet, random or with these weights and frozen, in its fastest layout: channels last, unless tiny."""
    net = blueprint(config)
    if weights is None:
        net = UNet(**config)
    else:
        net.load_state_dict(weights, assign=True)
        net.eval().requires_grad_(False)
        if not all(p.isfinite().all() for p in net.parameters()):
            raise ValueError("its weights are not finite")
    layout = torch.channels_last if config["resolution"] > 8 else torch.contiguous_format
    return net.to(device, torch.float32, memory_format=layout)

def out_of_memory(error):
    """Whether an exception is Python's or torch's lack of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)

@contextlib.contextmanager
def faults(path, what, remedy="name another file, or start its stage over with --fresh"):
    """Turn whatever goes wrong while a file is read, where a damaged one can fail anywhere, into a Fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with the file is said once, by the error
            yield
    except FileNotFoundError:
        raise Fault(f"{path} does not exist; make it first, or name the right file or folder") from None
    except (Fault, OSError):  # a folder, or no permission: the system's own words say it best
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split()).split(". ")[0][:80]
        raise Fault(f"{path} is damaged or no {what} ({reason}); {remedy}") from error

PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}

def torch_load(file, *pickles):
    """What torch.save wrote: tensors and numbers, on the CPU. `pickles` are the pickles in the file.

    weights_only runs no code of the file's, but some functions that ask for memory; a tuple of the same tuple
    twice, 60 deep, would as a key hash for ever; and strides of 0 make a small tensor look large.
    """
    for pickled in pickles:
        tuples, name, reused = set(), "", 0
        for operation, value, _ in pickletools.genops(pickled):
            if "PUT" in operation.name:
                tuples |= {value} if "TUPLE" in name else set()
                continue  # a second PUT would name the same object
            name = operation.name
            reused += name == "DUP" or ("GET" in name and value in tuples)
            if "GLOBAL" in name and not (value in PICKLED or re.fullmatch(r"torch \w+Storage", str(value))):
                raise ValueError(f"{value} is not what checkpoints are made of")
        if reused > 10:
            raise ValueError("tuples in it are used too often")
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    for x in tree_leaves(loaded):
        if isinstance(x, torch.Tensor) and x.nbytes > x.untyped_storage().nbytes():
            raise ValueError("a tensor is larger than its file")
    return loaded

CHECKPOINT = dict(step=int, steps=int, settings=dict, model=dict, ema=dict, optimizer=dict)
CHECKPOINT |= dict(rows=torch.Tensor, recent=list)

def load_checkpoint(path, entries=CHECKPOINT):
    """The dict in a file of torch.save's, or, if it is damaged, in <name>.old, the one that was there before.

    Its entries must be there and of these types, and the sums in the zip right, which torch does not check.
    "file" is added, the one that was read.
    """
    try:
        with faults(path, "checkpoint"), zipfile.ZipFile(path) as archive:
            names, size = archive.namelist(), sum(entry.file_size for entry in archive.infolist())
            if len({*names}) < len(names) or size > os.path.getsize(path) or archive.testzip():
                raise ValueError("sizes or sums are wrong")
            state = torch_load(path, *(archive.read(name) for name in names if name.endswith("data.pkl")))
            if not all(isinstance(state.get(name), kind) for name, kind in entries.items()):
                raise ValueError("entries are missing or of other types")
            return state | dict(file=str(path))
    except Fault as fault:
        previous = Path(f"{path}.old")
        if not previous.exists():
            raise
        state = load_checkpoint(previous, entries)
        warn(f"{str(fault).rpartition('; ')[0]}; the one before it, {previous}, takes its place")
        return state

@cache
def warn(text):
    """A line on stderr, once, of several processes by the first."""
    if not RANK:
        print(f"slimflow: warning: {text}", file=sys.stderr)

def load_flow(path, device="cpu"):
    """The averaged (EMA) network of a checkpoint of ours, frozen, in eval mode; `stage` is what made it."""
    state = load_checkpoint(path, dict(settings=dict, ema=dict))
    with faults(path, "checkpoint of this program"):
        flow = build(state["settings"]["network"], device, state["ema"])
        flow.stage = state["settings"].get("stage")
        return flow

class EDMTeacher(nn.Module):
    """EDM's denoiser D(x; sigma), a preconditioned UNet; called, it is the same model's flow v(x, t)."""

    def __init__(self, net):
        super().__init__()
        self.net, self.config, self.label_dim = net, net.config, net.label_dim

    def denoise(self, x, sigma, y=None):
        """Estimate of the images in x = image + sigma e, [B, C, H, W], sigma [B] (EDM, Table 1): like x."""
        s, sigma_data = sigma.reshape(-1, 1, 1, 1), 0.5  # standard deviation of noise, of data
        total = s**2 + sigma_data**2
        c_skip, c_out, c_in = sigma_data**2 / total, s * sigma_data / total.sqrt(), total.rsqrt()
        return c_skip * x + c_out * self.net(c_in * x, sigma.log() / 4, y)

    def forward(self, x, t, y=None):
        """v(x, t) = (D(x/t; (1-t)/t) - x) / (1-t), at the nearest t whose sigma is in EDM's [0.002, 80]."""
        t = t.clamp(1 / 81, 1 / 1.002)
        s = t.reshape(-1, 1, 1, 1)
        return (self.denoise(x / s, (1 - t) / t, y) - x) / (1 - s)

@torch.no_grad()
def edm_sample(teacher, noise, steps, order=2, y=None):
    """EDM's deterministic sampler: Heun (order 2, 2 steps - 1 evaluations) or DDIM (order 1).

    It solves dx/dsigma = (x - D(x; sigma)) / sigma from sigma 80 to 0. Images and evaluations, as `sample`.
    """
    ramp = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps) ** 7
    x = 80 * noise

    def slope(x, sigma):
        return (x - teacher.denoise(x, x.new_full((len(x),), sigma), y)) / sigma

    for sigma, sigma_next in itertools.pairwise([*ramp.tolist(), 0.0]):
        d = slope(x, sigma)
        guess = x + (sigma_next - sigma) * d
        if order == 2 and sigma_next > 0:
            guess = x + (sigma_next - sigma) * (d + slope(guess, sigma_next)) / 2
        x = guess
    return x, 2 * steps - 1 if order == 2 else steps

class Record(dict):
    """Stands in for any object of a pickle: it keeps what the object would be made from, and does nothing."""

    def __new__(cls, *args):
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state):
        self.state = state

class InertUnpickler(pickle._Unpickler):  # in Python, since the one in C lets a file ask for any memory
    """Reads a pickle's numbers, texts, lists and dicts; each class or function that it names is a Record."""

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: None}  # that one allocates what it is told
    # Tuples become lists: a tuple of the same tuple twice, 60 deep, would as a key of a dict hash for ever.
    dispatch |= {pickle.TUPLE[0]: dispatch[pickle.LIST[0]]}
    dispatch |= {pickle.EMPTY_TUPLE[0]: dispatch[pickle.EMPTY_LIST[0]]}
    dispatch |= {pickle.TUPLE1[0]: lambda self: self.list_last(1)}
    dispatch |= {pickle.TUPLE2[0]: lambda self: self.list_last(2)}
    dispatch |= {pickle.TUPLE3[0]: lambda self: self.list_last(3)}

    def list_last(self, n):
        self.stack[-n:] = [self.stack[-n:]]

    def find_class(self, module, name):
        return record_class(name)

@cache
def record_class(name):
    """A kind of Record for each name."""
    return type(name, (Record,), {})

def attributes(record):
    """The state of a pickled module: EDM's own classes hand it to the function that rebuilds them."""
    return record.args[0]["state"] if record.args else record.state

def read_tensor(record, shape):
    """The float32 tensor of this shape that a Record of torch's rebuilding functions describes."""
    if type(record).__name__ == "_rebuild_parameter":
        record = record.args[0]
    storage, offset, size, stride = record.args[:4]
    (blob,) = storage.args
    n = math.prod(shape)
    if tuple(size) != tuple(shape) or not 2 * n <= len(blob) <= 8 * n + 4096 or blob[:2] == b"PK":
        raise ValueError(f"a tensor is not of shape {tuple(shape)}")
    stream = io.BytesIO(blob)
    storage = torch_load(io.BytesIO(blob), *[stream] * 5)  # five pickles in a row, then the numbers
    flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    return flat.as_strided(size, stride, offset).float()  # fails where the storage is too short

def load_edm(path, device="cpu"):
    """The EMA network of a .pkl of NVIDIA's EDM (DDPM++ or ADM), frozen: an EDMTeacher.

    Such files are pickles that carry source code. Nothing in them is run: numbers and tensors are picked out.
    """
    with faults(path, "network of EDM's DDPM++ or ADM", "name another file"):
        outer = InertUnpickler(io.BytesIO(Path(path).read_bytes())).load()["ema"]
        if outer.args[0]["class_name"] != "EDMPrecond" or attributes(outer)["sigma_data"] != 0.5:
            raise ValueError("its preconditioning is another")
        inner = attributes(outer)["_modules"]["model"]
        config = edm_config(inner.args[0]["class_name"], attributes(inner)["_init_kwargs"])
        weights = {}
        for name, p in blueprint(config).named_parameters():
            *parents, leaf = name.split(".")
            node = attributes(inner)
            for parent in parents:
                node = attributes(node["_modules"][parent])
            weights[name] = read_tensor(node["_parameters"][leaf], p.shape)
            box = node["_buffers"].get("resample_filter")
            if box is not None and (read_tensor(box, (1, 1, 2, 2)) != 0.25).any():
                raise ValueError("it does not resample by 2x2 boxes")
        return EDMTeacher(build(config, device, weights))

EDM_NETWORKS = {  # their default arguments
    "SongUNet": dict(model_channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4, attn_resolutions=[16]),
    "DhariwalUNet": dict(
        model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3, attn_resolutions=[32, 16, 8]
    ),
}
EDM_FIXED = dict(embedding_type="positional", encoder_type="standard", decoder_type="standard")
EDM_FIXED |= dict(channel_mult_emb=4, channel_mult_noise=1, resample_filter=[1, 1])

def edm_config(name, given):
    """Keyword arguments of `UNet` for one of EDM's networks, with what its file says."""
    config = {option: given.get(option, value) for option, value in EDM_NETWORKS[name].items()}
    config |= dict(resolution=given["img_resolution"], channels=given["in_channels"])
    config |= dict(label_dim=given.get("label_dim", 0), kind="adm" if name == "DhariwalUNet" else "ddpm++")
    other = [option for option, value in EDM_FIXED.items() if given.get(option, value) != value]
    if other:
        raise ValueError(f"unknown {', '.join(other)}")
    return config | dict(time_scale=1.0)  # the network's time is ln(sigma) / 4

def load_slimflow_official(path, device="cpu"):
    """The EMA network of a .pth that the authors of SlimFlow published: a UNet.

    Its tensors come in the order in which ours are applied. Only the attention differs: it has matrices
    [in, out] for q, k, v and the output, where ours has 1x1 convolutions, q, k, v interleaved by channel.
    """
    state = load_checkpoint(path, dict(model=dict, ema=dict))
    with faults(path, "network of SlimFlow's authors", "name another file"):
        names = [name.split("all_modules.")[1] for name in state["model"] if "all_modules." in name]
        given = state["ema"]["shadow_params"]
        config = official_config(dict(zip(names, given, strict=True)))
        given, weights = iter(given), {}
        for name, _ in blueprint(config).named_parameters():
            if name.endswith("qkv.weight"):
                q, q_bias, k, k_bias, v, v_bias = itertools.islice(given, 6)
                weights[name] = torch.stack([q.t(), k.t(), v.t()], dim=1).flatten(0, 1)[:, :, None, None]
            elif name.endswith("qkv.bias"):
                weights[name] = torch.stack([q_bias, k_bias, v_bias], dim=1).flatten()
            elif name.endswith("proj.weight"):
                weights[name] = next(given).t()[:, :, None, None]
            else:
                weights[name] = next(given)
        if list(given):
            raise ValueError("it has more tensors than the network")
        net = build(config, device, weights)
        net.stage = "distill"  # what they published is distilled
        return net

def official_config(tensors):
    """Keyword arguments of `UNet`, read off the tensors; the images' size from where the attention stands."""
    modules = defaultdict(dict)
    for name, weights in tensors.items():
        number, part = name.split(".", 1)
        modules[int(number)][part] = weights.shape
    modules = [modules[number] for number in sorted(modules)]
    c, channels = modules[2]["weight"][:2]
    middle = modules[3:-2]  # between two linear layers and a convolution, a normalisation and a convolution

    def kind(parts):  # A: attention, R: residual block, /: one that resamples, so has a skip of equal widths
        same = "Conv_2.weight" in parts and len(set(parts["Conv_2.weight"][:2])) == 1
        return "A" if "NIN_0.W" in parts else "/" if same else "R"

    levels = "".join(map(kind, middle)).split("/")  # encoder, lowest and middle, decoder
    depth = len(levels) // 2 + 1
    first = [sum(map(len, levels[:level])) + level for level in range(depth)]  # block of each level
    attention = [level for level in range(depth) if levels[level].count("A") > (level == depth - 1)]
    if not attention:
        raise ValueError("without attention its image size cannot be told")
    return DDPMPP | dict(
        resolution=16 << attention[0],  # the authors' networks attend at 16x16
        channels=channels,
        model_channels=c,
        channel_mult=tuple(middle[i]["Conv_0.weight"][0] // c for i in first),
        num_blocks=levels[0].count("R"),
    )

LOADERS = {".pkl": load_edm, ".pth": load_slimflow_official}  # by the ending of the file; others: load_flow

def load_network(path, device="cpu"):
    """The network of any of the three kinds of files."""
    return LOADERS.get(Path(path).suffix, load_flow)(path, device)

def save_safely(path, write, keep=False):
    """Write a file whole or not at all: write(file) to a temporary one, which then replaces the old one.

    `keep` leaves the old one as <name>.old. Raises Fault where the system refuses.
    """
    temporary, old = Path(f"{path}.tmp"), Path(f"{path}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(errno.EEXIST, "it is a folder or a device")
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            old.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a file system without links keeps the newest only
                os.link(path, old)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = error.__context__ if type(error) is RuntimeError else error  # torch.save's own says nothing
        if isinstance(reason, KeyboardInterrupt):
            raise reason from None
        if not isinstance(reason, OSError):
            raise
        remedy = "what was there is kept; make room, or choose another place"
        raise Fault(f"cannot write {path}: {reason.strerror or reason}; {remedy}") from error

@contextlib.contextmanager
def lock(path):
    """Hold this file until done, or until the process ends, however; Fault if another process holds it.

    Of a torchrun the first process holds it for all. On Windows, which has no fcntl, nothing is held.
    """
    if RANK or os.name == "nt":
        yield
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fault(f"another process holds {path}; wait until it ends, or use another --out") from None
        except OSError:
            warn(f"the file system of {path} has no locks; run one process at a time there")
        yield


# ------------------------------------------------------------------------------------------------------------
# 7. Training: one loop for every stage, on one device or, under torchrun, on many

def seed_all(seed, stage, step, part=0):
    """Seed torch from all four, so that a resumed run draws at each step what an uninterrupted one draws."""
    torch.manual_seed(int(np.random.SeedSequence([seed, *stage.encode(), step, part]).generate_state(1)[0]))

def barrier():
    """Wait for the other processes of a torchrun."""
    if WORLD > 1:
        dist.barrier()

def images_per_pass(batch, accumulate):
    """How many images of a batch one forward pass takes: processes, and passes in each, share it."""
    if batch % (WORLD * accumulate):
        parts = f"{WORLD} x {accumulate} parts (processes x --accumulate)"
        raise Fault(f"a batch of {batch} cannot be split into {parts}; choose numbers that divide it")
    return batch // (WORLD * accumulate)

def progress(stage, total, unit, images=1, start=0):
    """A function (done, note): one live line with speed and time left; off a terminal, a line every 10 s."""
    live, began, shown = sys.stdout.isatty(), time.monotonic(), time.monotonic()

    def clock(seconds):
        return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"

    def report(done, note):
        nonlocal shown
        now, last = time.monotonic(), done == total
        if not last and now - shown < (0.2 if live else 10):
            return
        shown, pace = now, max(now - began, 1e-9) / (done - start)  # seconds per unit
        left = f"took {clock(now - began)}" if last else f"{clock((total - done) * pace)} left"
        line = f"{stage:<10} {done:,}/{total:,} {unit}  {note}  {images / pace:,.0f} images/s  {left}"
        width, end = shutil.get_terminal_size().columns - 1, "\n" if last or not live else ""
        print(f"\r{line[:width]:<{width}}" if live else line, end=end, flush=True)

    return report

def learning_rate(schedule, step):
    """Linear warm-up, then constant, then linear decay to 0 over the last `decay` share of the steps."""
    up = (step + 1) / schedule.warmup if schedule.warmup else 1
    down = (schedule.steps - step) / (schedule.decay * schedule.steps) if schedule.decay else 1
    return schedule.lr * min(1, up, down)

def backward(net, loss_fn, seed, stage, step, accumulate=1):
    """Gradients of the batch's mean loss, which is returned. On CUDA, if it can, in bfloat16.

    The parts of the batch are numbered across processes, and each draws its own random numbers: two
    processes compute what one with two passes computes.
    """
    device, total = next(net.parameters()).device, 0.0
    low = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    for i in range(accumulate):
        seed_all(seed, stage, step, RANK + WORLD * i)
        wait = WORLD > 1 and i < accumulate - 1  # processes exchange gradients after the last part only
        with net.no_sync() if wait else contextlib.nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                loss = loss_fn(net, step) / accumulate
            loss.backward()
        total += loss.detach()
    if WORLD > 1:
        dist.all_reduce(total)
    return total / WORLD

def update(net, ema, optimizer, ema_rate):
    """One optimizer step; returns the gradient's norm, as a tensor, without waiting for the device."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - ema_rate)
    return norm

SAVE_EVERY = 60.0  # seconds between checkpoints; longer if they take long to write

def fit(net, loss_fn, schedule, seed=0, stage="fit", folder=None, picture=None, accumulate=1, log_every=50,
        **settings):  # fmt: skip
    """Minimise loss_fn(net, step); return the averaged network, frozen, in eval mode.

    With a folder, the run is kept there every SAVE_EVERY seconds: ckpt.pt (the one before it as ckpt.pt.old),
    log.csv with a row every `log_every` steps, loss.png and, from picture(ema) -> images, samples.png. An
    interrupted run goes on from there, on a CPU bit for bit as if it had never stopped. A run of other
    `settings` (any numbers that shape the loss) raises Fault, and so does a loss, gradient or weight that is
    not finite; both leave the last checkpoint as it is.
    """
    settings |= dict(stage=stage, seed=seed, batch=schedule.batch, network=getattr(net, "config", None))
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=schedule.lr, fused=True)
    start, rows, recent = resume(folder, settings, net, ema, optimizer) if folder else (0, [], [])
    if start:
        goes_on = "is complete, see" if start >= schedule.steps else "continues from"
        print(f"{stage:<10} {start:,}/{schedule.steps:,} steps  {goes_on} {folder}")
    model = nn.parallel.DistributedDataParallel(net.train()) if WORLD > 1 else net.train()
    report = progress(stage, schedule.steps, "steps", schedule.batch, start)
    due = time.monotonic() + SAVE_EVERY
    for step in range(start, schedule.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(schedule, step)
        ema_rate = min(schedule.ema, (1 + step) / (10 + step))
        loss = backward(model, loss_fn, seed, stage, step, accumulate)
        recent.append(torch.stack([loss, update(net, ema, optimizer, ema_rate)]))
        done, last = step + 1, step + 1 == schedule.steps
        log = last or done % log_every == 0
        save = folder and RANK == 0 and (last or time.monotonic() >= due)
        if log or save:
            means = checked_means(recent, ema, done, stage, folder)  # waits for the device only here
            report(done, f"loss {means[0]:.4f}")
        if log:
            rows.append([done, *means])
            recent = []
        if save:
            began = time.monotonic()
            state = dict(model=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
            state |= dict(step=done, steps=schedule.steps, settings=settings)
            state |= dict(rows=torch.tensor(rows, dtype=torch.float64))
            state |= dict(recent=torch.stack(recent).tolist() if recent else [])
            save_run(folder, state, rows, picture and partial(picture, ema), last)
            due = time.monotonic() + SAVE_EVERY * max(1, (time.monotonic() - began) / 3)  # at most 5 % of it
    return ema

def save_run(folder, state, rows, picture, last):
    """Write a run's files, the checkpoint first; at the end last, since a finished stage is not run again."""
    checkpoint = partial(save_safely, folder / "ckpt.pt", partial(torch.save, state), keep=True)
    if not last:
        checkpoint()
    draw_loss(folder, rows)
    if picture:
        save_grid(folder / "samples.png", picture())
    if last:
        checkpoint()

def resume(folder, settings, net, ema, optimizer):
    """Load the folder's checkpoint, if any: steps done, rows of the log, losses and norms since the last."""
    path, device = folder / "ckpt.pt", next(net.parameters()).device
    if not path.exists():
        return 0, [], []
    state = load_checkpoint(path)
    barrier()  # all have read it
    if state["file"] != str(path) and not RANK:
        os.replace(state["file"], path)  # else the next save would keep the damaged one as the one before it
    with faults(path, "checkpoint of this stage"):
        other = [name for name, value in settings.items() if state["settings"].get(name) != value]
        if other:
            raise Fault(f"{path} was made with another {', '.join(other)}; use --fresh or another --out")
        net.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(dict(state=state["optimizer"]["state"], param_groups=groups))
        for p in net.parameters():
            shapes = [optimizer.state[p][name].shape for name in ("step", "exp_avg", "exp_avg_sq")]
            if shapes != [(), p.shape, p.shape]:
                raise ValueError("the optimizer's state is another network's")
        recent = [torch.tensor(x, dtype=torch.float32, device=device).reshape(2) for x in state["recent"]]
        return state["step"], state["rows"].double().reshape(-1, 3).tolist(), recent

def checked_means(recent, ema, done, stage, folder):
    """Means of the last (loss, gradient norm), tensors [2]; Fault if one, or a weight, is not finite."""
    recent = torch.stack(recent).cpu()
    weights = torch.stack([p.isfinite().all() for p in ema.parameters()]).all().item()  # one wait for all
    finite = [*recent.isfinite().all(dim=1).tolist(), weights]
    if not all(finite):
        first = min(done - len(recent) + finite.index(False) + 1, done)
        saved = folder and (folder / "ckpt.pt").exists()
        good = f"{folder}/ckpt.pt is good" if saved else "nothing was saved"
        bad = f"loss, gradient or weights are not finite at step {first:,}"
        raise Fault(f"{stage}: {bad}; {good}; try a lower --lr")
    return recent.mean(dim=0).tolist()

def draw_loss(folder, rows):
    """log.csv and, of at most 2,000 of them, loss.png from rows of (step, loss, gradient norm)."""
    from matplotlib.figure import Figure

    lines = ["step,loss,grad_norm", *(f"{step:.0f},{loss:.6g},{norm:.6g}" for step, loss, norm in rows)]
    save_safely(folder / "log.csv", lambda file: file.write("\n".join([*lines, ""]).encode()))
    some = rows[:: len(rows) // 2_000 + 1]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row[0] for row in some], [row[1] for row in some])
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=f"{folder.parent.name}: {folder.name}")
    save_safely(folder / "loss.png", lambda file: figure.savefig(file, dpi=120, format="png"))

def grid(images, columns=8):
    """Images [N, C, H, W] in [-1, 1] side by side, small ones enlarged: uint8 [height, width, 3]."""
    x = to_uint8(images.float().cpu()).expand(-1, 3, -1, -1)
    x = F.pad(F.interpolate(x, scale_factor=max(1, 64 // x.shape[-1])), (2, 2, 2, 2), value=255)
    x = F.pad(x, (0, 0) * 3 + (0, -len(x) % columns), value=255)  # white images complete the last row
    rows = [torch.cat(list(row), dim=2) for row in x.split(columns)]
    return torch.cat(rows, dim=1).permute(1, 2, 0).contiguous().numpy()

def save_grid(path, images):
    """The `grid` of images [N, C, H, W] as a PNG."""
    from matplotlib.image import imsave

    save_safely(path, lambda file: imsave(file, grid(images), format="png"))


# ------------------------------------------------------------------------------------------------------------
# 8. Stages: train -> pairs -> reflow -> distill, each from the files of the one before

@dataclass(frozen=True)
class Run:
    """What is run (a preset, with the changes that the command line asks for), where and how."""

    preset: Preset
    folder: Path  # runs/<dataset>; each stage has a folder in it
    device: str = "cpu"
    seed: int = 0
    data_dir: str | None = None
    teacher: str | None = None  # file of a network that writes the pairs, instead of stage 1's
    accumulate: int = 1  # forward passes that a process splits its share of a batch into
    log_every: int = 50  # steps between lines of log.csv
    compile: bool = False  # networks by torch.compile

def result(run, stage):
    """The file that a stage makes."""
    return run.folder / stage / ("pairs.npy" if stage == "pairs" else "ckpt.pt")

def read_images(run):
    """`load_images`, on the GPU if they fit; under torchrun one process makes the files for all."""
    if RANK:
        barrier()
    images = load_images(run.preset, run.data_dir)
    if not RANK:
        barrier()
    return resident(images, run.device)

def compiled(net, run):
    """The network (of a teacher of EDM's: the one inside), compiled if the run says so."""
    if run.compile:
        getattr(net, "net", net).compile()
    return net

def fit_stage(run, stage, config, loss_fn, solver, start=None, **settings):
    """`fit` by the preset's schedule, from random weights or those of `start`; pictures by the solver."""
    seed_all(run.seed, f"{stage}, weights", 0)
    net = build(config, run.device)
    if start:
        net.load_state_dict(start.state_dict())

    def picture(flow):
        noise, y = fixed_noise(run)
        return sample(flow, noise, y=y, **solver)[0]

    schedule, folder = getattr(run.preset, stage), run.folder / stage
    net = compiled(net, run)
    how = dict(seed=run.seed, accumulate=run.accumulate, log_every=run.log_every)
    fit(net, loss_fn, schedule, stage=stage, folder=folder, picture=picture, **how, **settings)

def fixed_noise(run, n=64, seed=1234):
    """The same noise every time, and classes for it (or None)."""
    noise = torch.randn(n, *run.preset.shape, generator=torch.Generator().manual_seed(seed)).to(run.device)
    return noise, torch.arange(n, device=run.device) % run.preset.label_dim if run.preset.label_dim else None

def train(run):
    """Stage 1: the teacher, a rectified flow on independent pairs of noise and data."""
    preset, batch = run.preset, images_per_pass(run.preset.train.batch, run.accumulate)
    images, labels = read_images(run)
    stored = images, labels if preset.label_dim else None

    def loss(flow, step):
        data, y = fetch(stored, torch.randint(len(images), (batch,)), run.device)
        data = to_float(data)
        if preset.flip:
            (data,) = flip_together(data)
        return rectified_flow_loss(flow, torch.randn_like(data), data, y)

    fit_stage(run, "train", preset.teacher, loss, dict(solver="heun", steps=8), images=len(images))

def pairs(run):
    """Stage 2: the teacher's ODE from each z to its x, kept in pairs.npy as float16.

    Each batch is a file in pairs/parts, written whole; processes share the batches, and an interrupted run
    makes those that are missing.
    """
    preset, folder = run.preset, run.folder / "pairs"
    teacher = load_teacher(run)
    settings = dict(pairs=preset.pairs, solver=preset.solver, seed=run.seed, teacher=run.teacher)
    settings |= dict(teacher_weights=checksum(teacher))
    path, note, parts = result(run, "pairs"), folder / "settings.json", folder / "parts"
    if path.exists() or note.exists():
        made = pair_settings(run)
        other = [name for name, value in settings.items() if made.get(name) != value]
        if other:
            raise Fault(f"{folder} was begun with another {', '.join(other)}, see {note}; use pairs --fresh")
    if path.exists():
        print(f"pairs      {len(load_pair_rows(run, path)):,} pairs are complete, see {folder}")
        return
    if RANK == 0:
        save_safely(note, lambda file: file.write(json.dumps(settings).encode()))
    starts = range(0, preset.pairs, SAMPLE_BATCH)
    todo = [start for start in starts[RANK::WORLD] if not (parts / f"{start}.npy").exists()]
    report = progress("pairs", len(todo), "batches", min(SAMPLE_BATCH, preset.pairs) * WORLD)
    for done, start in enumerate(todo):
        batch = make_pairs(run, teacher, start)
        save_safely(parts / f"{start}.npy", partial(np.save, arr=batch))
        report(done + 1, f"{batch['nfe'][0]} evaluations each")
    barrier()
    if RANK == 0:
        made = (load_pair_rows(run, parts / f"{start}.npy", "delete it") for start in starts)
        save_grid(folder / "samples.png", torch.from_numpy(load_pair_rows(run, parts / "0.npy")["data"][:64]))
        write_npy(path, pair_dtype(preset), preset.pairs, made)
        shutil.rmtree(parts)

def make_pairs(run, teacher, start):
    """The batch of pairs that begins with this one, as rows of pairs.npy."""
    preset = run.preset
    n = min(SAMPLE_BATCH, preset.pairs - start)
    seed_all(run.seed, "pairs", start)
    noise = torch.randn(n, *preset.shape).half().float()  # as it is stored
    y = torch.randint(preset.label_dim, (n,)).to(run.device) if preset.label_dim else None
    data, nfe = sample(teacher, noise.to(run.device), y=y, **preset.solver)
    batch = np.zeros(n, pair_dtype(preset))
    batch["noise"], batch["data"] = noise, data.cpu()
    batch["y"], batch["nfe"] = -1 if y is None else y.cpu(), nfe
    return batch

def pair_settings(run):
    """What `pairs` noted before it began: the solver, the teacher's file (or None), the seed, how many."""
    path = run.folder / "pairs" / "settings.json"
    with faults(path, "note of how the pairs were made", "use pairs --fresh"):
        made = json.loads(path.read_text())
        numbers = dict(made["solver"])
        solver = numbers.pop("solver")
        known = solver in (*SOLVERS, "edm") and isinstance(made["teacher"], (str, type(None)))
        known = known and set(numbers) == ({"rtol", "atol"} if solver == "rk45" else {"steps"})
        if not known or min(numbers.values()) <= 0 or numbers.get("steps", 1) not in range(1, 10_000):
            raise ValueError("entries are missing or unknown")
        return made

def load_teacher(run):
    """The network that writes the pairs: --teacher's, or that of stage 1."""
    path, preset = run.teacher or result(run, "train"), run.preset
    teacher = load_network(path, run.device)
    channels, size = teacher.config["channels"], teacher.config["resolution"]
    made, needed = (channels, size, size, teacher.label_dim), (*preset.shape, preset.label_dim)
    if made != needed:
        raise Fault(f"{path} makes images of (C, H, W, classes) {made}; {preset.name} has {needed}")
    return compiled(teacher, run)

def checksum(net):
    """A number that tells the weights of one network from another's."""
    total = 0
    for p in net.parameters():
        total = zlib.crc32(p.detach().cpu().contiguous().numpy(), total)
    return total

def pair_dtype(preset):
    """One row of pairs.npy: noise and data [C, H, W], class (or -1), evaluations that the data took."""
    return np.dtype([("noise", "f2", preset.shape), ("data", "f2", preset.shape), ("y", "i8"), ("nfe", "i8")])

def load_pair_rows(run, path, remedy="use pairs --fresh"):
    """The rows of pairs.npy, or of one of its parts."""
    return load_rows(path, pair_dtype(run.preset), run.preset.label_dim, "file of pairs", remedy)

def load_pairs(run):
    """Noise and data, float16 [N, C, H, W], and classes, int64 [N] or None: on the GPU if they fit there."""
    path = result(run, "pairs")
    if run.teacher and pair_settings(run)["teacher"] != run.teacher:
        raise Fault(f"another teacher wrote {path}; use pairs --fresh or another --out")
    store = load_pair_rows(run, path)
    noise, data, y = (torch.from_numpy(store[name]) for name in ("noise", "data", "y"))
    some = noise[:10_000].float()
    slack = 6 / math.sqrt(some.numel())  # six standard errors of the mean
    if not (abs(some.mean()) <= slack and abs(some.std() - 1) <= slack):  # so that NaN is refused
        raise Fault(f"the noise in {path} is not N(0, 1); `pairs --fresh` makes the pairs anew")
    return resident([noise, data, y if run.preset.label_dim else None], run.device)

def draw_pairs(run, stored, batch):
    """A random batch (noise, data, y) of the stored pairs, noise and data mirrored together."""
    noise, data, y = fetch(stored, torch.randint(len(stored[0]), (batch,)), run.device)
    noise, data = noise.float(), data.float()
    return (*flip_together(noise, data), y) if run.preset.flip else (noise, data, y)

def reflow(run):
    """Stage 3: annealing reflow, from random weights to a small 2-rectified flow."""
    preset, stored = run.preset, load_pairs(run)
    batch = images_per_pass(preset.reflow.batch, run.accumulate)

    def loss(student, step):
        noise, data, y = draw_pairs(run, stored, batch)
        beta = anneal_beta(step, preset.anneal, preset.anneal_schedule)
        return rectified_flow_loss(student, annealed_noise(noise, beta), data, y)

    b = anneal_beta(preset.reflow.steps, preset.anneal, preset.anneal_schedule)
    if b:
        print(f"note: b is still {b:.2f} after the last step; --anneal sets the step at which it is 0")
    settings = dict(anneal=preset.anneal, anneal_schedule=preset.anneal_schedule)
    fit_stage(run, "reflow", preset.students[preset.student], loss, ONE_STEP, **settings)

def distill(run):
    """Stage 4: flow-guided distillation, from the 2-rectified flow's weights to the one-step generator."""
    preset, stored = run.preset, load_pairs(run)
    batch = images_per_pass(preset.distill.batch, run.accumulate)
    flow = load_flow(result(run, "reflow"), run.device)
    if any(flow.config[name] != value for name, value in preset.students[preset.student].items()):
        raise Fault(f"{result(run, 'reflow')} is not the {preset.student} student; name its --student")
    flow, distance = compiled(flow, run), DISTANCES[preset.distance]

    def loss(student, step):
        noise, data, y = draw_pairs(run, stored, batch)
        loss = distillation_loss(student, noise, data, distance, y)
        if preset.guidance:
            n = math.ceil(preset.guidance_share * batch)
            z, y = torch.randn_like(noise[:n]), y if y is None else y[:n]
            loss = loss + preset.guidance * guidance_loss(student, flow, z, distance, y=y)
        return loss

    settings = dict(guidance=preset.guidance, guidance_share=preset.guidance_share, distance=preset.distance)
    fit_stage(run, "distill", flow.config, loss, ONE_STEP, start=flow, **settings)

STAGES = {"train": train, "pairs": pairs, "reflow": reflow, "distill": distill}
INPUTS = {"train": (), "pairs": ("train",), "reflow": ("pairs",), "distill": ("pairs", "reflow")}

def finished(run, stage):
    """Whether a stage has made all the steps (or pairs) that its own files say it was started for."""
    path = result(run, stage)
    if stage == "pairs" or not path.exists():
        return path.exists()
    state = load_checkpoint(path)
    return state["step"] >= state["steps"]

def unfinished(run, stage):
    """The stages to run for this one, in order: itself and what it needs, where results are missing."""
    if finished(run, stage):
        return []
    inputs = () if stage == "pairs" and run.teacher else INPUTS[stage]
    return list(dict.fromkeys([name for need in inputs for name in unfinished(run, need)] + [stage]))

def run_stages(run, last, asked=False):
    """Run a stage and what it needs, where not finished; `last` in any case if its numbers were asked for."""
    todo = unfinished(run, last) or ([last] if asked else [])
    if todo:
        print(f"plan: {' -> '.join(todo)}, into {run.folder}, on {WORLD} x {run.device}")
    else:
        print(f"{last} is finished, see {run.folder / last}; --fresh starts it over")
    for name in todo:  # what can fail should, before days of work
        if name != "pairs":
            images_per_pass(getattr(run.preset, name).batch, run.accumulate)
    run.folder.mkdir(parents=True, exist_ok=True)
    if finished(run, "pairs") and not RANK:
        shutil.rmtree(run.folder / "pairs" / "parts", ignore_errors=True)  # of a run killed just then
    if "distill" in todo and run.preset.distance == "lpips":
        lpips_network(run.device)
    for name in todo:
        STAGES[name](run)
        barrier()
    note_age(run)

def note_age(run):
    """Say which stages are older than what they were made from."""
    ages = {name: result(run, name).stat().st_mtime for name in STAGES if result(run, name).exists()}
    for name, age in ages.items():
        inputs = () if name == "pairs" and run.teacher else INPUTS[name]
        newer = [need for need in inputs if ages.get(need, 0) > age]
        if newer:
            print(f"note: {name} is older than {' and '.join(newer)}; `{name} --fresh` makes it anew")

@contextlib.contextmanager
def set_aside(run, first):
    """Rename the folders of a stage and of those made from it to the next free <stage>.old1, .old2, ...

    Where what follows fails before the stage has written anything, they get their names back.
    """
    moved = {}
    for name in reversed(list(STAGES)[list(STAGES).index(first) :]):  # so that none outlives what it is from
        if (run.folder / name).exists():
            names = (run.folder / f"{name}.old{number}" for number in itertools.count(1))
            moved[run.folder / name] = old = next(path for path in names if not path.exists())
            os.replace(run.folder / name, old)
            print(f"{run.folder / name} is now {old}")
    try:
        yield
    except BaseException:
        if not (run.folder / first).exists():
            for folder, old in moved.items():
                os.replace(old, folder)
                print(f"{old} is {folder} again")
        raise


# ------------------------------------------------------------------------------------------------------------
# 9. Metrics: Frechet distance, straightness, sizes, speed

def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) of two Gaussians, means [d], covariances [d, d].

    In float64, and stable for singular covariances: with cov1 = A A^T and cov2 = B B^T the last trace is the
    sum of the singular values of A^T B.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (mu1, cov1, mu2, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape:
        raise Fault(f"statistics of {len(mu1)} and of {len(mu2)} features cannot be compared")
    (a, u), (b, v) = torch.linalg.eigh(cov1), torch.linalg.eigh(cov2)
    roots = u * a.clamp(min=0).sqrt(), v * b.clamp(min=0).sqrt()  # each times its transpose is a covariance
    root_trace = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    return ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * root_trace).item()

def moments(batches):
    """Mean [d] and covariance [d, d], in float64, of features [n, d] that come batch by batch."""
    n, total, outer = 0, 0.0, 0.0
    for features in batches:
        features = features.double()
        n, total, outer = n + len(features), total + features.sum(dim=0), outer + features.T @ features
    if n <= len(total):
        needed = f"a Frechet distance in {len(total)} features needs at least {len(total) + 1} images"
        raise Fault(f"{needed}, not {n}; use a larger --n")
    mu = total / n
    return mu, (outer - n * mu.outer(mu)) / (n - 1)

def straightness(flow, noise, steps=20, y=None):
    """Mean of |x_1 - x_0 - v(x_t, t)|^2 over elements and Euler's path: 0 if all paths are straight lines."""
    path = [x for _, x in euler(flow, noise, steps, y)]
    velocities = [(after - before) * steps for before, after in itertools.pairwise(path)]
    return statistics.mean((path[-1] - path[0] - v).square().mean().item() for v in velocities)

def count_parameters(net):
    """Number of trainable weights."""
    return sum(p.numel() for p in net.parameters())

@torch.no_grad()
def count_macs(net, shape):
    """Multiply-accumulates of all convolutions and linear layers for one image of shape (C, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(net.parameters()).device
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, *shape, device=device), torch.full((1,), 0.5, device=device))
    aten, flops = torch.ops.aten, counter.get_flop_counts()["Global"]  # bmm, in the attention, does not count
    return sum(flops.get(op, 0) for op in (aten.convolution, aten.addmm, aten.mm)) // 2

def digit_features(run, images, labels):
    """A function uint8 [n, 1, 8, 8] -> [n, 64]: a digit classifier's features, trained once, fixed seed."""
    seed_all(0, "classifier, weights", 0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10),
    ).to(run.device)  # fmt: skip

    def loss(net, step):
        data, y = fetch((images, labels), torch.randint(len(images), (128,)), run.device)
        data = to_float(data)
        return F.cross_entropy(net(data + 0.1 * torch.randn_like(data)), y)

    schedule = Schedule(steps=600, lr=1e-3, warmup=0, decay=0.3, ema=0.99)
    features = fit(net, loss, schedule, 0, "classifier", run.folder / "classifier")[:6]
    return torch.no_grad()(lambda pictures: features(to_float(pictures)))

def inception_features(device):
    """A function uint8 [n, 3, H, W] -> [n, 2048]: FID's Inception features, by torch-fidelity."""
    package = import_optional("torch_fidelity.feature_extractor_inceptionv3")
    try:
        net = package.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    except (OSError, RuntimeError):
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise Fault(f"cannot download Inception; put {package.URL_INCEPTION_V3} into {folder}") from None
    return torch.no_grad()(lambda pictures: net(pictures)[0])

def load_moments(path):
    """Mean [d] and covariance [d, d] of an npz of EDM's or another's."""
    with faults(path, "npz with mu and sigma", "name another"):
        mu, sigma = (array.astype(np.float64) for array in load_npz(path, "mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not math.isfinite(mu.sum() + sigma.sum()):
            raise ValueError("shapes or values are wrong")
        return mu, sigma

def generate(flow, noise, y, solver):
    """Images for any number of noises [N, C, H, W], SAMPLE_BATCH at a time: yields them as uint8."""
    classes = y.split(SAMPLE_BATCH) if y is not None else itertools.repeat(None)
    for z, c in zip(noise.split(SAMPLE_BATCH), classes):
        yield to_uint8(sample(flow, z, y=c, **solver)[0])

ROWS = (  # of the table and of summary.png: name, stage whose network it is, solver
    ("teacher, precise", "train", None),  # the solver that wrote the pairs
    ("teacher, 1 step", "train", ONE_STEP),
    ("2-flow, 1 step", "reflow", ONE_STEP),
    ("student, 1 step", "distill", ONE_STEP),
)

def evaluate(run, given=None):
    """Print the table of the finished stages, and draw summary.png: the same noise through each of them."""
    preset, begun = run.preset, (run.folder / "pairs" / "settings.json").exists()
    made = pair_settings(run) if begun else dict(teacher=None, solver=preset.solver)
    run = replace(run, teacher=made["teacher"], compile=False)  # many sizes of batches, each used once
    rows = [row for row in ROWS if finished(run, row[1]) or (run.teacher and row[1] == "train")]
    if not rows:
        remedy = f"run `python slimflow.py all --dataset {preset.name}` first, or name its --out"
        raise Fault(f"{run.folder} holds no finished stage; {remedy}")
    builtin = preset.name == "digits"  # judged by a classifier of digits instead of Inception
    images, labels = read_images(run) if builtin or not given else (None, None)
    features = digit_features(run, images, labels) if builtin else inception_features(run.device)
    batches = () if given else images.split(SAMPLE_BATCH)
    real = load_moments(given) if given else moments(features(x.to(run.device)) for x in batches)
    noise, y = fixed_noise(run, preset.samples, seed=4321)  # noise that no stage was trained on
    distance = "Frechet" if builtin else "FID"
    table = [("stage", "parameters", "MACs", "NFE", distance, "images", "straightness", "ms/image")]
    strips = []
    for name, stage, solver in rows:
        flow = load_teacher(run) if stage == "train" else load_flow(result(run, stage), run.device)
        strip, nfe = sample(flow, noise[:12], y=y if y is None else y[:12], **(solver or made["solver"]))
        stored = load_pairs(run)[1][: preset.samples] if not solver and finished(run, "pairs") else ()
        if len(stored) > len(real[0]):  # what is stored need not be sampled again
            nfe = round(np.load(result(run, "pairs"), mmap_mode="r")["nfe"].mean())
            parts, count = stored.split(SAMPLE_BATCH), len(stored)
            pictures = (to_uint8(x.to(run.device).float()) for x in parts)
        else:
            count, pictures = len(noise), generate(flow, noise, y, solver or made["solver"])
        fid = frechet_distance(*moments(map(features, pictures)), *real)
        sizes = f"{count_parameters(flow):,}", f"{count_macs(flow, preset.shape) / 1e6:,.1f}M"
        bend = f"{straightness(flow, noise[:100], y=y if y is None else y[:100]):.4f}"
        ms = nfe * statistics.median(timed(partial(one_step, flow, noise[:100]), run.device)) / 100 * 1e3
        table.append((name, *sizes, nfe, f"{fid:.2f}", f"{count:,}", bend, f"{ms:.3f}"))
        strips.append((f"{name}\n{nfe} NFE, {distance} {fid:,.0f}", grid(strip, 12)))
    if builtin:
        half = f"{halves_distance(features(images)):.2f}"
        table.append(("real half/half", "", "", "", half, f"{len(images) // 2:,}", "", ""))
    print_table(table)
    note_age(run)
    draw_summary(run.folder / "summary.png", strips)
    print(f"{distance} against {given or f'{len(images):,} real images'}; picture: {run.folder}/summary.png")

def halves_distance(features, splits=10):
    """Mean Frechet distance between random halves of the real images, the scale of the table."""
    distances = []
    for seed in range(splits):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        one, other = (moments([features[half]]) for half in order.chunk(2))
        distances.append(frechet_distance(*one, *other))
    return statistics.mean(distances)

def print_table(rows):
    """Rows of cells in aligned columns, the first to the left, the others to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for first, *rest in rows:
        print(f"{first:<{widths[0]}}", *(f"{x:>{width}}" for x, width in zip(rest, widths[1:])), sep="  ")

def draw_summary(path, strips):
    """One strip of images for each (text, uint8 picture)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.85 * len(strips) + 0.1), layout="constrained")
    for axes, (text, picture) in zip(figure.subplots(len(strips), squeeze=False)[:, 0], strips):
        axes.imshow(picture)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
        axes.spines[:].set_visible(False)
    save_safely(path, lambda file: figure.savefig(file, dpi=130, format="png"))

def timed(work, device, repeats=5):
    """Sorted seconds of some calls, after one to warm up; of three at most where they are slow."""
    seconds = []
    while len(seconds) <= min(repeats, 3) or (len(seconds) <= repeats and sum(seconds) < 20):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])

def peak_memory(device):
    """Most bytes in use so far, on the GPU or by the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def workloads(run, batch):
    """What `bench` times, one after the other: name, function to call, MACs of an image, images in all."""
    preset, device = run.preset, run.device
    configs = preset.teacher, preset.students[preset.student]
    teacher, student = (build(config, device).eval() for config in configs)
    teacher_macs, student_macs = (count_macs(net, preset.shape) for net in (teacher, student))
    for name, net, macs in (("teacher", teacher, teacher_macs), ("student", student, student_macs)):
        print(f"{preset.name} {name}: {count_parameters(net):,} parameters, {macs / 1e6:,.1f}M MACs")
        compiled(net, run)
    data, noise = torch.randn(2, batch, *preset.shape, device=device)
    y = torch.randint(preset.label_dim, (batch,), device=device) if preset.label_dim else None
    distance, n = DISTANCES[preset.distance], math.ceil(preset.guidance_share * batch)

    def flow_loss(net, step):
        return rectified_flow_loss(net, torch.randn_like(data), data, y)

    def student_loss(net, step):
        z, c = torch.randn_like(data[:n]), y if y is None else y[:n]
        guidance = guidance_loss(net, student, z, distance, y=c)
        return distillation_loss(net, noise, data, distance, y) + guidance

    def training(config, loss_fn):
        net = build(config, device).train()
        ema, optimizer = copy.deepcopy(net), torch.optim.Adam(net.parameters(), fused=True)
        compiled(net, run)
        return lambda: (backward(net, loss_fn, 0, "bench", 0), update(net, ema, optimizer, 0.999))

    def sampling(net):
        return torch.no_grad()(lambda: one_step(net, noise, y))

    train, reflow, distill = (p.steps * p.batch for p in (preset.train, preset.reflow, preset.distill))
    # A backward pass takes twice the forward's MACs; the guidance has both, and two steps more.
    yield "train", training(configs[0], flow_loss), 3 * teacher_macs, train
    yield "pairs, per evaluation", sampling(teacher), teacher_macs, preset.solver["steps"] * preset.pairs
    yield "reflow", training(configs[1], flow_loss), 3 * student_macs, reflow
    distill_macs = (3 + 5 * preset.guidance_share) * student_macs
    yield "distill", training(configs[1], student_loss), distill_macs, distill
    yield "sample, one step", sampling(student), student_macs, preset.samples

def bench(run, batch, profile=False):
    """Speed of each stage on random images, its share of the matmul rate, and its schedule's hours."""
    device = run.device
    n, low = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=low)

    def matmul_rate():  # operations per second
        return 2 * n**3 / statistics.median(timed(lambda: a @ a, device))

    after = matmul_rate()
    table = [("stage", "images/s", "spread", "GFLOP/s", "of matmul", "peak GiB", "images", "hours")]
    for name, call, macs, images in workloads(run, batch):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        calls, before, peak = timed(call, device), after, peak_memory(device) / 2**30
        after, seconds = matmul_rate(), statistics.median(calls) / batch
        rate, spread = 2 * macs / seconds, (calls[-1] - calls[0]) / batch / seconds
        share = rate / ((before + after) / 2)
        cells = f"{1 / seconds:,.1f}", f"{spread:.0%}", f"{rate / 1e9:,.0f}", f"{share:.0%}", f"{peak:.1f}"
        table.append((name, *cells, f"{images:,}", f"{images * seconds / 3600:,.1f}"))
        if profile and name == "reflow":
            print_table(costliest(call, device))
    print_table(table)
    one, other = torch.zeros(2, 2**26, device=device)
    bandwidth = 2 * one.nbytes / statistics.median(timed(lambda: one.copy_(other), device))
    matmul = f"matmul {after / 1e9:,.0f} GFLOP/s ({n} x {n}, {str(low)[6:]})"
    print(f"{device}: {matmul}, memory {bandwidth / 1e9:,.0f} GB/s; torch {torch.__version__}; batch {batch}")
    how = ", ".join(f"{name} {value}" for name, value in run.preset.solver.items())
    print(f"distance {run.preset.distance}; pairs by {how}; spread: (slowest - fastest call) / median")

def costliest(call, device, n=10):
    """Rows of a table: the operations in which a call spends most time, and their share of it."""
    from torch.profiler import ProfilerActivity, profile

    gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as record:
        timed(call, device, repeats=1)  # two calls
    operations = [
        (x.self_device_time_total if gpu else x.self_cpu_time_total, x.key, x.count)
        for x in record.key_averages()
    ]
    total = sum(spent for spent, _, _ in operations)
    rows = [("ten costliest operations of reflow", "calls", "ms", "share")]
    for spent, name, count in sorted(operations, reverse=True)[:n]:
        rows.append((name[:70], count // 2, f"{spent / 2e3:.2f}", f"{spent / total:.1%}"))
    return rows


# ------------------------------------------------------------------------------------------------------------
# 10. Command line

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        raise Fault(f"{message}; see `{self.prog} --help`")

def number(kind, least, most=10**9):
    """An argparse type: an int or float in this range."""
    name = "a whole number" if kind is int else "a number"

    def parse(text):
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {least} to {most:,}")

    return parse

COMMANDS = {  # name: what it does, an example
    "all": ("every stage, then `eval` (not under torchrun); the default", "--seed 1 --out seed1"),
    "train": ("stage 1: the teacher, a 1-rectified flow", "--dataset cifar10 --data-dir data/cifar10"),
    "pairs": ("stage 2: pairs (noise, data) by the teacher's ODE", "--solver heun --steps 18 --out heun"),
    "reflow": ("stage 3: annealing reflow of a small student", "--dataset cifar10 --student 15.7M"),
    "distill": ("stage 4: flow-guided distillation into one step", "--guidance 0 --fresh"),
    "sample": ("images from a checkpoint", "--ckpt runs/digits/distill/ckpt.pt --n 1000 --npz samples.npz"),
    "eval": ("table and summary.png of the finished stages", "--dataset cifar10 --ref cifar10-32x32.npz"),
    "solvers": ("error of each solver against its evaluations", "--ckpt runs/digits/train/ckpt.pt"),
    "bench": ("speed of each stage, and the hours it takes", "--dataset cifar10 --batch 16 --profile"),
}
RUNS, TRAINING = "all train pairs reflow distill", "train reflow distill"
COUNT, WHOLE, REAL, LOG = number(int, 1), number(int, 0), number(float, 0), number(int, 1, 1000)
FLAGS = (  # flag, commands that take it, arguments of add_argument; {} is the presets' default
    ("--dataset", RUNS + " eval bench", dict(choices=PRESETS, default="digits", help="default: digits")),
    ("--out", RUNS + " eval", dict(default="runs", help="folder for <dataset>/<stage>/; default: runs")),
    ("--data-dir", RUNS + " eval", dict(help="folder or zip of the images; default: data/<dataset>")),
    ("--device", " ".join(COMMANDS), dict(choices=("cpu", "cuda"), help="default: cuda if there is one")),
    ("--seed", RUNS + " sample solvers", dict(type=WHOLE, help="of all random numbers; default: 0")),
    ("--fresh", RUNS, dict(action="store_true", help="start over; the old folder becomes <stage>.old1")),
    ("--teacher", "all pairs reflow distill", dict(help="EDM's .pkl, or a ckpt.pt; default: stage 1's")),
    ("--student", "all reflow distill bench", dict(help=f"of {', '.join(SIZES)}; default: {{}}")),
    ("--steps", TRAINING, dict(type=COUNT, help="optimizer steps; default: {}")),
    ("--lr", TRAINING, dict(type=REAL, help="Adam's learning rate; default: {}")),
    ("--batch", TRAINING, dict(type=COUNT, help="images per step; default: {}")),
    ("--batch", "bench", dict(type=COUNT, help="images per step; default: 4, on a GPU the preset's")),
    ("--accumulate", f"all {TRAINING}", dict(type=COUNT, default=1, help="passes per batch; default: 1")),
    ("--log-every", f"all {TRAINING}", dict(type=LOG, default=50, help="steps per log row; default: 50")),
    ("--profile", "bench", dict(action="store_true", help="also the ten costliest operations of reflow")),
    ("--no-compile", RUNS + " bench", dict(action="store_true", help="do not use torch.compile on CUDA")),
    ("--anneal", "reflow", dict(type=WHOLE, help="steps until b = 0, 0 for plain reflow; default: {}")),
    ("--anneal-schedule", "reflow", dict(choices=("linear", "cosine", "exponential"), help="default: {}")),
    ("--guidance", "distill", dict(type=REAL, help="its weight, 0 for naive distillation; default: {}")),
    ("--distance", "distill", dict(choices=DISTANCES, help="D of the losses; default: {}")),
    ("--distance", "bench", dict(choices=DISTANCES, default="l2", help="D of the losses; default: l2")),
    ("--ckpt", "sample solvers", dict(required=True, help="a ckpt.pt, the authors' .pth or EDM's .pkl")),
    ("--n", "pairs eval", dict(type=COUNT, help="how many images; default: {}")),
    ("--n", "sample solvers", dict(type=COUNT, default=64, help="how many images; default: 64")),
    ("--ref", "eval", dict(help="npz with mu and sigma; default: those of the training images")),
    ("--solver", "pairs", dict(choices=SOLVERS, help="default: {}; of a .pkl EDM's own")),
    ("--solver", "sample", dict(choices=SOLVERS, help="default: rk45; 1 step if distilled; of a .pkl EDM's")),
    ("--steps", "pairs sample", dict(type=COUNT, help="of euler, heun and adams, which need it")),
    ("--png", "sample", dict(default="samples.png", help="picture to write; default: samples.png")),
    ("--png", "solvers", dict(default="solvers.png", help="picture to write; default: solvers.png")),
    ("--npz", "sample", dict(help="file for the images as arr_0, uint8 [N, H, W, C]; default: none")),
)

def preset_default(command, flag):
    """What a flag is if not given, in words: the value in each preset."""
    name = flag[2:].replace("-", "_")
    name = name if name != "n" else "pairs" if command == "pairs" else "samples"
    values = defaultdict(list)
    for preset in PRESETS.values():
        value = getattr(getattr(preset, command) if name in ("steps", "lr", "batch") else preset, name)
        value = " ".join(map(str, value.values())) if name == "solver" else value
        values[f"{value:,}" if isinstance(value, int) else value].append(preset.name)
    return ", ".join(f"{value} ({' '.join(names)})" for value, names in values.items())

def parse(argv):
    """The command line as a namespace; without a command it is `all`."""
    epilog = "`slimflow.py COMMAND --help` lists the flags of a command."
    parser = Parser(prog="slimflow.py", description=__doc__.split("\n")[0], epilog=epilog)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (text, example) in COMMANDS.items():
        epilog = f"example: python slimflow.py {name} {example}"
        sub = commands.add_parser(name, help=text, description=text, epilog=epilog, allow_abbrev=False)
        for flag, takers, options in FLAGS:
            if name in takers.split():
                words = options["help"]
                if "{}" in words:
                    words = words.format(preset_default(name, flag))
                sub.add_argument(flag, **options | dict(help=words))
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["all", *argv]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        takers = " ".join(takers for flag, takers, _ in FLAGS if flag == unknown[0].split("=")[0]).split()
        remedy = f"it is for {', '.join(takers)}" if takers else f"see `slimflow.py {args.command} --help`"
        raise Fault(f"{args.command} does not take {' '.join(unknown)}; {remedy}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Fault("--device cuda: torch sees no GPU; use --device cpu, or install torch's CUDA build")
    return args

def changed(preset, args):
    """The preset with the changes that the command line asks for, and whether there are any."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    if given.get("student", preset.student) not in preset.students:
        raise Fault(f"{preset.name} has no student {args.student}; choose from {', '.join(preset.students)}")
    own = "student", "anneal", "anneal_schedule", "guidance", "distance"
    changes = {name: given[name] for name in own if name in given}
    if args.command in ("train", "reflow", "distill"):
        schedule = {name: given[name] for name in ("steps", "lr", "batch") if name in given}
        changes |= {args.command: replace(getattr(preset, args.command), **schedule)} if schedule else {}
    if args.command == "eval" and args.n:
        changes["samples"] = args.n
    if args.command == "pairs" and args.n:
        changes["pairs"] = args.n
    if args.command == "pairs" and (args.solver or args.steps):
        changes["solver"] = solver_options(args)
    by_edm = str(given.get("teacher")).endswith(".pkl")
    solver = dict(solver="edm", steps=preset.edm_steps) if by_edm else preset.solver
    return replace(preset, **(dict(solver=solver) | changes)), bool(changes)

def solver_options(args):
    """--solver and --steps as keyword arguments of `sample`."""
    if args.solver == "rk45":
        if args.steps:
            raise Fault("--solver rk45 chooses its steps itself; leave out --steps")
        return RK45
    if not args.solver:
        raise Fault("--steps needs --solver euler, heun or adams beside it")
    if not args.steps:
        raise Fault(f"--solver {args.solver} needs --steps, for instance --steps 20")
    return dict(solver=args.solver, steps=args.steps)

def default_solver(flow):
    """One step for what was distilled, EDM's own sampler for its networks, else the authors' RK45."""
    if isinstance(flow, EDMTeacher):
        return dict(solver="edm", steps=18)
    return ONE_STEP if flow.stage == "distill" else RK45

def flow_and_noise(args):
    """The network of --ckpt, and --n noises (of --seed) and classes (or None) for it."""
    flow, n = load_network(args.ckpt, args.device), args.n
    seed_all(args.seed or 0, "sample", 0)
    size, classes = flow.config["resolution"], flow.label_dim
    noise = torch.randn(n, flow.config["channels"], size, size).to(args.device)
    return flow, noise, torch.randint(classes, (n,)).to(args.device) if classes else None

def sample_command(args):
    """Images from a checkpoint, as a picture of up to 64 and, with --npz, as an array of all."""
    flow, noise, y = flow_and_noise(args)
    solver = solver_options(args) if args.solver or args.steps else default_solver(flow)
    images = torch.cat([x.cpu() for x in generate(flow, noise, y, solver)])
    save_grid(Path(args.png), to_float(images[:64]))
    how = ", ".join(f"{name} {value}" for name, value in solver.items())
    print(f"{args.png}: {len(images[:64])} of {len(images)} images, {how}")
    if args.npz:
        array = images.permute(0, 2, 3, 1).numpy()
        save_safely(Path(args.npz), lambda file: np.savez(file, arr_0=array))
        print(f"{args.npz}: {len(images)} images")

def solvers_command(args):
    """Error of each solver, the root mean square over all pixels, against its evaluations."""
    from matplotlib.figure import Figure

    flow, noise, y = flow_and_noise(args)
    exact, _ = sample(flow, noise, y=y, rtol=1e-7, atol=1e-7)
    settings = [dict(solver=name, steps=n) for name in ("euler", "heun", "adams") for n in (4, 8, 16, 32, 64)]
    settings += [dict(solver="rk45", rtol=10**-n, atol=10**-n) for n in (2, 3, 4, 5)]
    table, lines = [("solver, steps or tolerance", "NFE", "error")], defaultdict(list)
    for options in settings:
        x, nfe = sample(flow, noise, y=y, **options)
        name, error = options["solver"], _rms(x - exact)
        lines[name].append((nfe, error))
        table.append((f"{name}, {options.get('steps') or options['rtol']:g}", nfe, f"{error:.1e}"))
    print_table(table)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    colours = "#000000", "#E69F00", "#0072B2", "#D55E00"
    for (name, points), colour, marker in zip(lines.items(), colours, "os^D"):
        axes.plot(*zip(*points), marker=marker, color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="error of a pixel (rms)")
    axes.legend()
    save_safely(Path(args.png), lambda file: figure.savefig(file, dpi=120, format="png"))
    print(f"{args.png}: {len(noise)} images, against rk45 at tolerance 1e-7; images lie in [-1, 1]")

def refuse_contradictions(args):
    """Refuse flags of which one makes another useless."""
    given = {name for name, value in vars(args).items() if value is not None}
    if {"anneal", "anneal_schedule"} <= given and not args.anneal:
        raise Fault("--anneal 0 has no schedule; leave out --anneal-schedule")
    if {"ref", "data_dir"} <= given and args.dataset != "digits":
        raise Fault("--ref stands for the images; leave out --data-dir")
    if "teacher" in given and not Path(args.teacher).exists():
        raise Fault(f"{args.teacher} does not exist; name the right file")
    files = [Path(getattr(args, name)).resolve() for name in ("ckpt", "png", "npz") if name in given]
    if len({*files}) < len(files):
        raise Fault("--ckpt, --png and --npz are the same file; name another")

def command(args):
    """Run one command."""
    if WORLD > 1 and args.command not in RUNS.split():
        raise Fault(f"{args.command} is for one process; run it without torchrun")
    refuse_contradictions(args)
    if args.command == "sample":
        return sample_command(args)
    if args.command == "solvers":
        return solvers_command(args)
    preset, asked = changed(PRESETS[args.dataset], args)
    compile = args.device == "cuda" and preset.name != "digits" and not getattr(args, "no_compile", True)
    own = "device", "seed", "data_dir", "teacher", "accumulate", "log_every"
    given = {name: value for name, value in vars(args).items() if name in own and value is not None}
    run = Run(preset, Path(getattr(args, "out", "")) / preset.name, compile=compile, **given)
    if args.command == "bench":
        batch = args.batch or (preset.train.batch if args.device == "cuda" else 4)
        return bench(run, batch, args.profile)
    if args.command == "eval":
        return evaluate(run, args.ref)
    last = "distill" if args.command == "all" else args.command
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock(run.folder / "lock"))
        if args.fresh and RANK == 0:
            stack.enter_context(set_aside(run, "train" if args.command == "all" else last))
        barrier()
        run_stages(run, last, asked or args.seed is not None or run.teacher is not None)
    if args.command == "all" and WORLD == 1:
        evaluate(run)
    elif args.command == "all":
        print(f"now `python slimflow.py eval --dataset {args.dataset}` makes the table and the picture")

def join():
    """Join the other processes of a torchrun, of which only the first prints; the store that they share."""
    warnings.filterwarnings("ignore", "Grad strides do not match")  # each process would say so
    store, *_ = next(dist.rendezvous("env://"))
    cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    options = dict(store=store, rank=RANK, world_size=WORLD, timeout=timedelta(days=1))  # images may be read
    dist.init_process_group(backend, **options)
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for the rest of the process
    return store

def main(argv=None):
    """Run the command line and return the exit status: a Fault is one line on stderr and status 2."""
    torch.backends.cudnn.allow_tf32 = False  # its rounding would look like error to RK45 at 1e-5
    os.environ["MPLBACKEND"] = "agg"  # files are drawn, not windows
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, where a service has none
    store = join() if WORLD > 1 else None
    try:
        command(parse(sys.argv[1:] if argv is None else argv))
        if store:
            dist.destroy_process_group()
        return 0
    except Fault as fault:
        message, status = str(fault), 2
    except OSError as error:
        message, status = error.strerror or str(error), 2
        if error.filename:
            message = f"{error.filename}: {message}; take another path, or change this one"
    except (MemoryError, RuntimeError) as error:
        if store and store.add("failed", 0):  # the connection to a process that has said why it failed
            return 2
        if not out_of_memory(error):
            raise
        message, status = "out of memory; try --accumulate 2 or more, a smaller --n, or another --device", 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command without --fresh goes on from what was saved", 130
    if sys.stdout.isatty():
        print()  # end the live line
    if not store or store.add("failed", 1) == 1:  # of several processes, the first to fail speaks
        message = "".join(c if c.isprintable() else "?" for c in message)  # of names in files from strangers
        print(f"slimflow: {message}", file=sys.stderr)
    return status

if __name__ == "__main__":
    sys.exit(main())
