"""SlimFlow in one file: small one-step image generators, trained with rectified flow.

After Zhu, Liu, Liu, "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow" (ECCV 2024,
arXiv 2407.12718). `python slimflow.py` turns 1,797 real 8x8 digits into a one-step generator in 5 minutes on
2 CPU cores: one evaluation of 0.19M weights reaches a Frechet distance of 12 to the real digits; the 0.75M
teacher has 6 in 15 evaluations and 1,499 in one; half the digits have 9 to the other half (torch 2.13.0).

The method in four lines. Time runs from noise z at t = 0 to data x at t = 1; the paper has it the other way.
  1. rectified flow      min E |x - z - v(x_t, t)|^2 over independent z and x, on the path x_t = (1-t) z + t x
  2. pairs               integrate the teacher's ODE dx/dt = v(x, t) precisely from z to its x; keep (z, x)
  3. annealing reflow    regress a small network likewise on (z', x), z' = sqrt(1-b^2) z + b e, b: 1 -> 0
  4. guided distillation min E D(z + s(z, T0), x) on the pairs + E D(z + s(z, T0), X(z)) on fresh noise, X
                         being the 2-rectified flow's two-step Euler; one step z + s(z, T0) is an image

Sections: 1 presets, 2 data, 3 network, 4 flow, 5 solvers, 6 teachers, 7 training, 8 stages, 9 metrics,
10 command line.
"""

import argparse
import copy
import itertools
import math
import os
import shutil
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


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
    anneal: int  # reflow steps over which b falls from 1 to 0; 0 is plain reflow
    anneal_schedule: str = "linear"  # authors
    guidance: float = 1.0  # weight of the guidance loss; 0 is naive distillation
    distance: str = "l2"  # D of the distillation
    flip: bool = True  # mirror half of the images; authors
    label_dim: int = 0  # number of classes, 0 if unconditional

DIGITS = dict(resolution=8, channels=1, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))  # ours
DDPMPP = dict(channels=3, channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(16,), dropout=0.15)
ADM = dict(kind="adm", resolution=64, channels=3, label_dim=1000, dropout=0.1)  # EDM's ImageNet-64 setting
SIZES = {  # the paper's sizes, met exactly; for 3.4M the layout is ours
    "27.9M": DDPMPP | dict(model_channels=128),
    "15.7M": DDPMPP | dict(model_channels=96),
    "7.0M": DDPMPP | dict(model_channels=64),
    "3.4M": DDPMPP | dict(model_channels=64, channel_mult=(1, 1, 2), num_blocks=1, attn_resolutions=()),
}
RK45 = dict(solver="rk45", rtol=1e-5, atol=1e-5)  # authors, by SciPy

digits = Preset(
    name="digits",
    shape=(1, 8, 8),
    teacher=DIGITS | dict(model_channels=32),
    students={"0.19M": DIGITS | dict(model_channels=16)},
    student="0.19M",
    # Searched with one seed. In equal time batch 64 beat 32 and 128, attention at 4x4 beat none, and neither
    # 24 channels nor channel_mult (1, 3) was better. The lengths are what 5 minutes on 2 CPU cores allow.
    train=Schedule(steps=1_200, batch=64, lr=2e-3, warmup=100, decay=0.3, ema=0.998),
    reflow=Schedule(steps=1_800, batch=64, lr=2e-3, warmup=100, decay=0.3, ema=0.998),
    distill=Schedule(steps=1_100, batch=64, lr=1e-3, warmup=0, decay=0.3, ema=0.998),  # lr 2e-3 was no better
    pairs=5_000,  # as many as the table's distance needs
    solver=dict(solver="heun", steps=8),  # 15 evaluations
    anneal=400,  # the first quarter of the steps
    guidance=0.1,  # with this many pairs 0 is a little better, 1 worse: see README
    flip=False,
)
cifar10 = Preset(
    name="cifar10",
    shape=(3, 32, 32),
    teacher=DDPMPP  # the paper's 61.8M
    | dict(resolution=32, model_channels=128, channel_mult=(1, 2, 2, 2), num_blocks=4),
    students={size: network | dict(resolution=32) for size, network in SIZES.items()},
    student="15.7M",
    train=Schedule(steps=800_000),  # length: ours, as reflow
    reflow=Schedule(steps=800_000),  # authors: about 800,000
    distill=Schedule(steps=200_000, warmup=0),  # authors: no warm-up; length: ours
    pairs=50_000,  # authors
    solver=RK45,
    anneal=300_000,  # authors
)
ffhq64 = replace(
    cifar10,  # ours: its schedules
    name="ffhq64",
    shape=(3, 64, 64),
    teacher=cifar10.teacher | dict(resolution=64, dropout=0.05),  # EDM's FFHQ-64 network
    students={size: network | dict(resolution=64) for size, network in SIZES.items()},
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
)
PRESETS = {preset.name: preset for preset in (digits, cifar10, ffhq64, imagenet64)}


# ------------------------------------------------------------------------------------------------------------
# 2. Data: images are uint8 on disk and in memory, and become float in [-1, 1] batch by batch

def load_images(preset, data_dir=None):
    """All training images, uint8 [N, C, H, W], and their labels, int64 [N] or None."""
    if preset.name != "digits":
        raise Fault(f"images of {preset.name} cannot be read yet; --dataset digits is built in")
    path = Path(data_dir or Path(__file__).parent) / "digits.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["images"]), torch.from_numpy(file["labels"].astype(np.int64))
    except FileNotFoundError:
        raise Fault(f"{path} is missing; it comes with slimflow.py, --data-dir says where it is") from None
    except Exception as error:  # a damaged file can fail anywhere inside np.load
        raise Fault(f"{path} is damaged; put back the one that comes with slimflow.py") from error

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
        q, k, v = qkv.permute(3, 0, 1, 4, 2)  # each (B, heads, H W, channels of a head)
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

DISTANCES = {"l2": l2, "huber": huber}


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

SOLVERS = {"euler": euler, "heun": heun, "rk45": rk45}

def sample(flow, noise, solver="rk45", y=None, **options):
    """Run a solver to its end: the images, and how many evaluations of the flow they took."""
    nfe = 0

    def counted(x, t, y):
        nonlocal nfe
        nfe += 1
        return flow(x, t, y)

    [(_, x)] = deque(SOLVERS[solver](counted, noise, y=y, **options), maxlen=1)  # keeps the last state only
    return x, nfe


# ------------------------------------------------------------------------------------------------------------
# 6. Teachers and checkpoints: files are read as plain tensors; nothing in them is ever executed

def build(config, device="cpu"):
    """A UNet in the memory layout that is fastest for it: channels last, except for tiny images."""
    layout = torch.channels_last if config["resolution"] > 8 else torch.contiguous_format
    return UNet(**config).to(device, memory_format=layout)

def load_checkpoint(path):
    """The dict that `fit` saved, on the CPU; Fault if the file is missing, damaged or something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"step", "steps", "settings", "model", "ema", "optimizer"} <= set(state):
            raise ValueError("entries are missing")
    except FileNotFoundError:
        raise Fault(f"{path} does not exist; make it first, or name the right --ckpt or --out") from None
    except OSError:  # a folder, or no permission: the system's own words say it best
        raise
    except Exception as error:  # a damaged file can fail anywhere inside torch.load
        raise Fault(f"{path} is damaged or no ckpt.pt of this program; name one or use --fresh") from error
    return state

def load_flow(path, device="cpu"):
    """The averaged (EMA) network of a checkpoint of ours, frozen, in eval mode."""
    state = load_checkpoint(path)
    try:
        net = build(state["settings"]["network"], device)
        net.load_state_dict(state["ema"])
    except (TypeError, KeyError, RuntimeError) as error:
        raise Fault(f"{path} holds no UNet of this program ({str(error).splitlines()[0][:60]})") from None
    return net.eval().requires_grad_(False)

def save_safely(path, write):
    """Write a file whole or not at all: write(file) to a temporary one, which then replaces the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------------
# 7. Training: one loop for every stage

def seed_all(seed, stage, step, rank=0):
    """Seed torch from all four, so that a resumed run draws at each step what an uninterrupted one draws."""
    torch.manual_seed(int(np.random.SeedSequence([seed, *stage.encode(), step, rank]).generate_state(1)[0]))

def progress(stage, total, unit, images=1, start=0):
    """A function (done, note): one live line with speed and time left; off a terminal, a line every 10 s."""
    live, began, shown = sys.stdout.isatty(), time.time(), time.time()

    def clock(seconds):
        return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02}"

    def report(done, note):
        nonlocal shown
        now, last = time.time(), done == total
        if not last and now - shown < (0.2 if live else 10):
            return
        shown, pace = now, (now - began) / (done - start)  # seconds per unit
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

def update(net, ema, optimizer, loss, ema_rate):
    """One optimizer step; returns (loss, gradient norm), a tensor [2], without waiting for the device."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - ema_rate)
    return torch.stack([loss.detach(), norm])

LOG_EVERY = 50  # steps between lines of log.csv

def fit(net, loss_fn, schedule, seed=0, stage="fit", folder=None, picture=None, save_every=60, **settings):
    """Minimise loss_fn(net, step); return the averaged network, frozen, in eval mode.

    With a folder, the run is kept there every `save_every` seconds: ckpt.pt, log.csv, loss.png and, from
    picture(ema) -> images, samples.png. An interrupted run goes on from there, on a CPU bit for bit as if it
    had never stopped; a run of other `settings` (any numbers that shape the loss) raises Fault, and so does a
    loss or gradient that is not finite. Both leave the last checkpoint as it is.
    """
    settings |= dict(stage=stage, seed=seed, batch=schedule.batch, network=getattr(net, "config", None))
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=schedule.lr, fused=True)
    start = resume(folder, settings, net, ema, optimizer) if folder else 0
    if start:
        goes_on = "is complete, see" if start >= schedule.steps else "continues from"
        print(f"{stage:<10} {start:,}/{schedule.steps:,} steps  {goes_on} {folder}")
    net.train()
    report = progress(stage, schedule.steps, "steps", schedule.batch, start)
    recent, saved = [], time.time()
    for step in range(start, schedule.steps):
        seed_all(seed, stage, step)
        optimizer.param_groups[0]["lr"] = learning_rate(schedule, step)
        ema_rate = min(schedule.ema, (1 + step) / (10 + step))
        recent.append(update(net, ema, optimizer, loss_fn(net, step), ema_rate))
        done, last = step + 1, step + 1 == schedule.steps
        save = folder and (last or time.time() - saved >= save_every)
        if save or last or done % LOG_EVERY == 0:
            loss = log(torch.stack(recent).cpu(), done, stage, folder)  # waits for the device only here
            report(done, f"loss {loss:.4f}")
            recent = []
        if save:
            state = dict(model=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
            state |= dict(step=done, steps=schedule.steps, settings=settings)
            save_safely(folder / "ckpt.pt", partial(torch.save, state))
            draw_loss(folder)
            if picture:
                save_grid(folder / "samples.png", picture(ema))
            saved = time.time()
    return ema

def resume(folder, settings, net, ema, optimizer):
    """Load the folder's checkpoint, if there is one, into net, ema and optimizer; return the steps done."""
    folder.mkdir(parents=True, exist_ok=True)
    path, start = folder / "ckpt.pt", 0
    if path.exists():
        state = load_checkpoint(path)
        other = [name for name, value in settings.items() if state["settings"].get(name) != value]
        if other:
            raise Fault(f"{path} was made with another {', '.join(other)}; use --fresh or another --out")
        net.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    rows = (folder / "log.csv").read_text().splitlines()[1:] if (folder / "log.csv").exists() else []
    whole = [row for row in rows if row.count(",") == 2 and row.split(",")[0].isdigit()]
    kept = [row for row in whole if int(row.split(",")[0]) <= start]  # later steps come again
    (folder / "log.csv").write_text("\n".join(["step,loss,grad_norm", *kept]) + "\n")
    return start

def log(rows, done, stage, folder):
    """Check the last steps' (loss, gradient norm) [n, 2], add their mean to log.csv, return the mean loss."""
    bad = (~rows.isfinite().all(dim=1)).nonzero()
    if len(bad):
        first = done - len(rows) + int(bad[0]) + 1
        saved = folder and (folder / "ckpt.pt").exists()
        good = f"{folder}/ckpt.pt is good" if saved else "nothing was saved"
        raise Fault(f"{stage}: loss or gradient is not finite at step {first:,}; {good}; try a lower --lr")
    loss, norm = rows.mean(dim=0).tolist()
    if folder:
        with open(folder / "log.csv", "a") as file:
            file.write(f"{done},{loss:.6g},{norm:.6g}\n")
    return loss

def draw_loss(folder):
    """loss.png from log.csv."""
    from matplotlib.figure import Figure  # here and below: imported where needed, for a quick start

    step, loss = np.loadtxt(folder / "log.csv", delimiter=",", skiprows=1, usecols=(0, 1), ndmin=2).T
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(step, loss)
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
    """What is run (a preset, with the changes that the command line asks for) and where."""

    preset: Preset
    folder: Path  # runs/<dataset>; each stage has a folder in it
    device: str = "cpu"
    seed: int = 0
    data_dir: str | None = None
    save_every: float = 60.0  # seconds between checkpoints

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
    return fit(net, loss_fn, schedule, run.seed, stage, folder, picture, run.save_every, **settings)

def fixed_noise(run, n=64, seed=1234):
    """The same noise every time, and classes for it (or None)."""
    noise = torch.randn(n, *run.preset.shape, generator=torch.Generator().manual_seed(seed)).to(run.device)
    return noise, torch.arange(n, device=run.device) % run.preset.label_dim if run.preset.label_dim else None

def train(run):
    """Stage 1: the teacher, a rectified flow on independent pairs of noise and data."""
    preset = run.preset
    images, labels = load_images(preset, run.data_dir)
    images, labels = images.to(run.device), labels.to(run.device) if preset.label_dim else None

    def loss(flow, step):
        i = torch.randint(len(images), (preset.train.batch,), device=run.device)
        data, y = to_float(images[i]), None if labels is None else labels[i]
        if preset.flip:
            (data,) = flip_together(data)
        return rectified_flow_loss(flow, torch.randn_like(data), data, y)

    fit_stage(run, "train", preset.teacher, loss, preset.solver)

PAIRS_BATCH = 500  # pairs per call of the solver; an interrupted run goes on after the last whole batch

def pairs(run):
    """Stage 2: the teacher's ODE from each z to its x, kept in pairs.npy; nfe = 0 marks what is to do."""
    preset = run.preset
    teacher = load_flow(run.folder / "train" / "ckpt.pt", run.device)
    store = open_pairs(run, create=True)
    done = int((store["nfe"] > 0).sum()) // PAIRS_BATCH * PAIRS_BATCH
    report = progress("pairs", len(store), "pairs", start=done)
    for start in range(done, len(store), PAIRS_BATCH):
        seed_all(run.seed, "pairs", start)
        batch = store[start : start + PAIRS_BATCH]
        noise = torch.randn(len(batch), *preset.shape).half().float()  # as it is stored
        y = torch.randint(preset.label_dim, (len(batch),)).to(run.device) if preset.label_dim else None
        data, nfe = sample(teacher, noise.to(run.device), y=y, **preset.solver)
        batch["noise"], batch["data"], batch["y"] = noise, data.cpu(), -1 if y is None else y.cpu()
        store.flush()
        batch["nfe"] = nfe  # after the flush, so that it vouches for a complete pair
        store.flush()
        report(start + len(batch), f"{nfe} evaluations each")
    save_grid(run.folder / "pairs" / "samples.png", torch.from_numpy(store["data"][:64].copy()))

def open_pairs(run, create=False):
    """pairs.npy as a memory map of records: noise, data (float16 [C, H, W]), y (class or -1), nfe."""
    path, shape = run.folder / "pairs" / "pairs.npy", run.preset.shape
    kind = np.dtype([("noise", "f2", shape), ("data", "f2", shape), ("y", "i4"), ("nfe", "i4")])
    if create and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(path, "w+", kind, (run.preset.pairs,))
    try:
        store = np.load(path, mmap_mode="r+" if create else "r", allow_pickle=False)
    except (ValueError, EOFError):
        raise Fault(f"{path} is damaged; `pairs --fresh` makes it anew") from None
    if store.dtype != kind or (create and len(store) != run.preset.pairs):
        raise Fault(f"{path} holds {len(store):,} other pairs than asked for; use --fresh or another --out")
    return store

def load_pairs(run):
    """Noise and data, float16 [N, C, H, W], and classes, int64 [N] or None, on the device."""
    store = open_pairs(run)
    columns = [np.ascontiguousarray(store[name]) for name in ("noise", "data")]
    noise, data = (torch.from_numpy(column).to(run.device) for column in columns)
    slack = 6 / math.sqrt(noise.numel())  # six standard errors of the mean
    if abs(noise.float().mean()) > slack or abs(noise.float().std() - 1) > slack:
        raise Fault(f"the noise in {run.folder}/pairs is not N(0, 1); `pairs --fresh` makes the pairs anew")
    y = torch.from_numpy(store["y"].astype(np.int64)).to(run.device)
    return noise, data, y if run.preset.label_dim else None

def draw_pairs(stored, batch, flip):
    """A random batch (noise, data, y) of the stored pairs, noise and data mirrored together."""
    i = torch.randint(len(stored[0]), (batch,), device=stored[0].device)
    noise, data, y = (None if x is None else x[i] for x in stored)
    noise, data = noise.float(), data.float()
    return (*flip_together(noise, data), y) if flip else (noise, data, y)

def reflow(run):
    """Stage 3: annealing reflow, from random weights to a small 2-rectified flow."""
    preset, stored = run.preset, load_pairs(run)

    def loss(student, step):
        noise, data, y = draw_pairs(stored, preset.reflow.batch, preset.flip)
        beta = anneal_beta(step, preset.anneal, preset.anneal_schedule)
        return rectified_flow_loss(student, annealed_noise(noise, beta), data, y)

    settings = dict(anneal=preset.anneal, anneal_schedule=preset.anneal_schedule)
    fit_stage(run, "reflow", preset.students[preset.student], loss, ONE_STEP, **settings)

def distill(run):
    """Stage 4: flow-guided distillation, from the 2-rectified flow's weights to the one-step generator."""
    preset, stored, distance = run.preset, load_pairs(run), DISTANCES[run.preset.distance]
    flow = load_flow(run.folder / "reflow" / "ckpt.pt", run.device)
    if flow.config | preset.students[preset.student] != flow.config:
        raise Fault(f"{run.folder}/reflow/ckpt.pt is not the {preset.student} student; name its --student")

    def loss(student, step):
        noise, data, y = draw_pairs(stored, preset.distill.batch, preset.flip)
        loss = distillation_loss(student, noise, data, distance, y)
        if preset.guidance:
            fresh = torch.randn_like(noise)
            loss = loss + preset.guidance * guidance_loss(student, flow, fresh, distance, y=y)
        return loss

    settings = dict(guidance=preset.guidance, distance=preset.distance)
    fit_stage(run, "distill", flow.config, loss, ONE_STEP, start=flow, **settings)

ONE_STEP = dict(solver="euler", steps=1)
STAGES = {"train": train, "pairs": pairs, "reflow": reflow, "distill": distill}

def finished(run, stage):
    """Whether a stage has done all the steps (or pairs) that its own files say it was started for."""
    path = run.folder / stage / ("pairs.npy" if stage == "pairs" else "ckpt.pt")
    if not path.exists():
        return False
    if stage == "pairs":
        return bool((open_pairs(run)["nfe"] > 0).all())
    state = load_checkpoint(path)
    return state["step"] >= state["steps"]

def run_stages(run, last, asked=False):
    """Run the stages up to `last` that are not finished; `last` in any case if its numbers were asked for."""
    at = list(STAGES).index(last) + 1
    todo = [name for name in list(STAGES)[:at] if not finished(run, name) or (asked and name == last)]
    if todo:
        print(f"plan: {' -> '.join(todo)}, into {run.folder}, on {run.device}")
    else:
        print(f"{last} is finished, see {run.folder / last}; --fresh starts it over")
    for name in todo:
        STAGES[name](run)
    later = [name for name in list(STAGES)[at:] if (run.folder / name).exists()]
    if todo and later:
        print(f"note: {', '.join(later)} in {run.folder} were made before this; --fresh makes them anew")

def set_aside(run, first):
    """Rename the folders of a stage and of those made from it to the next free <stage>.old1, .old2, ..."""
    for name in list(STAGES)[list(STAGES).index(first) :]:
        if (run.folder / name).exists():
            names = (run.folder / f"{name}.old{number}" for number in itertools.count(1))
            old = next(path for path in names if not path.exists())
            os.replace(run.folder / name, old)
            print(f"{run.folder / name} is now {old}")


# ------------------------------------------------------------------------------------------------------------
# 9. Metrics: Frechet distance, straightness, sizes, speed

def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) of two Gaussians, means [d], covariances [d, d].

    In float64, through symmetric matrices: tr (cov1 cov2)^(1/2) = tr (S cov2 S)^(1/2) with S = cov1^(1/2).
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mu1, cov1, mu2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    s = vectors * values.clamp(min=0).sqrt() @ vectors.T
    root_trace = torch.linalg.eigvalsh(s @ cov2 @ s).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * root_trace).item()

def moments(features):
    """Mean [d] and covariance [d, d] of features [N, d], in float64."""
    n, d = features.shape
    if n <= d:
        raise Fault(f"a Frechet distance in {d} features needs at least {d + 1} images, not {n}")
    return features.double().mean(dim=0), features.double().T.cov()

def straightness(flow, noise, steps=20, y=None):
    """Mean of |x_1 - x_0 - v(x_t, t)|^2 over elements and Euler's path: 0 if all paths are straight lines."""
    path = [x for _, x in euler(flow, noise, steps, y)]
    velocities = [(after - before) * steps for before, after in zip(path, path[1:])]
    return statistics.mean((path[-1] - path[0] - v).square().mean().item() for v in velocities)

def count_parameters(net):
    """Number of trainable weights."""
    return sum(p.numel() for p in net.parameters())

@torch.no_grad()
def count_macs(net, shape):
    """Multiply-accumulates of all convolutions and linear layers for one image of shape (C, H, W)."""
    macs = 0

    def hook(layer, inputs, output):
        nonlocal macs
        macs += output.numel() * layer.weight[0].numel()

    layers = [layer for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    device = next(net.parameters()).device
    net(torch.zeros(1, *shape, device=device), torch.ones(1, device=device))
    for handle in handles:
        handle.remove()
    return macs

def digit_features(run, images, labels):
    """A function [N, 1, 8, 8] -> [N, 64]: a digit classifier's features, trained once with a fixed seed."""
    seed_all(0, "classifier, weights", 0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10),
    ).to(run.device)  # fmt: skip

    def loss(net, step):
        i = torch.randint(len(images), (128,), device=run.device)
        data = to_float(images[i])
        return F.cross_entropy(net(data + 0.1 * torch.randn_like(data)), labels[i])

    schedule = Schedule(steps=600, lr=1e-3, warmup=0, decay=0.3, ema=0.99)
    return torch.no_grad()(fit(net, loss, schedule, 0, "classifier", run.folder / "classifier")[:6])

def generate(flow, noise, solver, y=None, batch=500):
    """Images for any number of noises, `batch` at a time."""
    classes = y.split(batch) if y is not None else [None] * len(noise)
    return torch.cat([sample(flow, z, y=c, **solver)[0] for z, c in zip(noise.split(batch), classes)])

ROWS = (  # of the table and of summary.png: name, stage whose network it is, solver
    ("teacher, precise", "train", None),  # the solver that wrote the pairs
    ("teacher, 1 step", "train", ONE_STEP),
    ("2-flow, 1 step", "reflow", ONE_STEP),
    ("student, 1 step", "distill", ONE_STEP),
)

def evaluate(run, count=5_000):
    """Print the table of the finished stages, and draw summary.png: the same noise through each of them."""
    preset = run.preset
    rows = [row for row in ROWS if finished(run, row[1])]
    if not rows:
        raise Fault(f"{run.folder} holds no finished stage; run `python slimflow.py train` first")
    images, labels = (x.to(run.device) for x in load_images(preset, run.data_dir))
    features = digit_features(run, images, labels)
    real = features(to_float(images))
    noise, y = fixed_noise(run, count, seed=4321)  # noise that no stage was trained on
    table = [("stage", "parameters", "MACs", "NFE", "Frechet", "images", "straightness", "ms/image")]
    strips = []
    for name, stage, solver in rows:
        flow = load_flow(run.folder / stage / "ckpt.pt", run.device)
        strip, nfe = sample(flow, noise[:12], **(solver or preset.solver))
        if solver is None and finished(run, "pairs"):  # what is stored need not be sampled again
            x, nfe = load_pairs(run)[1][:count].float(), int(open_pairs(run)["nfe"][0])
        else:
            x = generate(flow, noise, solver or preset.solver, y)
        seen = features(to_float(to_uint8(x)))  # as the real ones: clipped, in 256 levels
        distance = frechet_distance(*moments(seen), *moments(real))
        sizes = f"{count_parameters(flow):,}", f"{count_macs(flow, preset.shape) / 1e6:.1f}M"
        bend = f"{straightness(flow, noise[:500]):.4f}"
        ms = nfe * seconds_per(partial(one_step, flow, noise[:500]), run.device) / 500 * 1e3
        table.append((name, *sizes, nfe, f"{distance:.2f}", f"{len(x):,}", bend, f"{ms:.3f}"))
        strips.append((f"{name}\n{nfe} NFE, Frechet {distance:,.0f}", grid(strip, 12)))
    half = len(real) // 2
    table.append(("real half/half", "", "", "", f"{halves_distance(real):.2f}", f"{half:,}", "", ""))
    print_table(table)
    draw_summary(run.folder / "summary.png", strips)
    print(f"picture: {run.folder / 'summary.png'}")

def halves_distance(features, splits=10):
    """Mean Frechet distance between random halves of the real images, the scale of the table."""
    distances = []
    for seed in range(splits):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        one, other = order.chunk(2)
        distances.append(frechet_distance(*moments(features[one]), *moments(features[other])))
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

def seconds_per(work, device, repeats=5):
    """Median seconds of a call, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])

def bench(run, batch):
    """Training speed of the student on random images, as a share of this machine's matmul rate."""
    preset, device = run.preset, run.device
    net = build(preset.students[preset.student], device)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    data = torch.randn(batch, *preset.shape, device=device)
    y = torch.randint(preset.label_dim, (batch,), device=device) if preset.label_dim else None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # one precision for both rates
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device)

    def step():
        update(net, ema, optimizer, rectified_flow_loss(net, torch.randn_like(data), data, y), 0.999)

    before = seconds_per(lambda: a @ a, device)
    seconds = seconds_per(step, device)
    rate = 4 * n**3 / (before + seconds_per(lambda: a @ a, device))  # operations per second
    macs = count_macs(net, preset.shape)
    work = 6 * macs * batch / seconds  # an addition and a multiplication, forward and twice that backward
    print(f"{preset.name} {preset.student}: {count_parameters(net):,} parameters, {macs / 1e6:,.1f}M MACs")
    print(f"matmul    {rate / 1e9:,.0f} GFLOP/s, {n} x {n}, float32, {device}")
    print(f"training  {work / 1e9:,.0f} GFLOP/s, {work / rate:.0%} of matmul")
    print(f"          {batch / seconds:,.1f} images/s, batch {batch}")


# ------------------------------------------------------------------------------------------------------------
# 10. Command line

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        raise Fault(f"{message}; see `slimflow.py COMMAND --help`")

def number(kind, least):
    """An argparse type: a finite int or float of at least `least`."""
    name = "a whole number" if kind is int else "a number"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} of at least {least}")
        return value

    return parse

COMMANDS = {
    "all": "the whole pipeline, ending in a table and summary.png; what runs if no command is given",
    "train": "stage 1: the teacher, a 1-rectified flow",
    "pairs": "stage 2: pairs (noise, data) by the teacher's ODE",
    "reflow": "stage 3: annealing reflow of a small student",
    "distill": "stage 4: flow-guided distillation into one step",
    "sample": "images from a checkpoint",
    "eval": "table and summary.png of the finished stages",
    "bench": "training speed on random images",
}
RUNS = "all train pairs reflow distill"
COUNT, WHOLE, REAL = number(int, 1), number(int, 0), number(float, 0)
FLAGS = (  # flag, commands that take it, arguments of add_argument; those without a default change the preset
    ("--dataset", RUNS + " eval bench", dict(choices=PRESETS, default="digits", help="default: digits")),
    ("--out", RUNS + " eval", dict(default="runs", help="folder for <dataset>/<stage>/; default: runs")),
    ("--data-dir", RUNS + " eval", dict(help="folder of the images; default: that of slimflow.py")),
    ("--device", RUNS + " eval sample bench", dict(choices=("cpu", "cuda"), help="default: cuda if there")),
    ("--seed", RUNS + " sample", dict(type=WHOLE, help="default: 0")),
    ("--save-every", RUNS, dict(type=REAL, default=60.0, help="seconds between checkpoints; default: 60")),
    ("--fresh", RUNS, dict(action="store_true", help="start over; the old folder becomes <stage>.old1")),
    ("--student", "all reflow distill bench", dict(help="digits: 0.19M; cifar10: 15.7M, ...")),
    ("--steps", "train reflow distill", dict(type=COUNT, help="optimizer steps")),
    ("--lr", "train reflow distill", dict(type=REAL, help="Adam's learning rate")),
    ("--batch", "train reflow distill bench", dict(type=COUNT, help="images per step")),
    ("--anneal", "reflow", dict(type=WHOLE, help="steps until b = 0; 0: plain reflow")),
    ("--anneal-schedule", "reflow", dict(choices=("linear", "cosine", "exponential"), help="how fast")),
    ("--guidance", "distill", dict(type=REAL, help="weight of the guidance; 0 is naive distillation")),
    ("--distance", "distill", dict(choices=DISTANCES, help="D of the losses")),
    ("--ckpt", "sample", dict(required=True, help="a ckpt.pt")),
    ("--n", "pairs sample", dict(type=COUNT, help="how many; sample: 64")),
    ("--solver", "pairs sample", dict(choices=SOLVERS, help="sample: 1 step if distilled, else rk45")),
    ("--steps", "pairs sample", dict(type=COUNT, help="steps of euler and heun")),
    ("--png", "sample", dict(default="samples.png", help="picture to write; default: samples.png")),
    ("--npz", "sample", dict(help="also write the images, as arr_0: uint8 [N, H, W, C]")),
)

def parse(argv):
    """The command line as a namespace; without a command it is `all`."""
    epilog = "`slimflow.py COMMAND --help` lists the flags of a command."
    parser = Parser(prog="slimflow.py", description=__doc__.split("\n")[0], epilog=epilog)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, text in COMMANDS.items():
        rest = "Flags without a default change the data set's preset, PRESETS in slimflow.py."
        sub = commands.add_parser(name, help=text, description=text, epilog=rest)
        for flag, takers, options in FLAGS:
            if name in takers.split():
                sub.add_argument(flag, **options)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["all", *argv]
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Fault("--device cuda: torch sees no GPU; use --device cpu, or install torch's CUDA build")
    return args

def changed(preset, args):
    """The preset with the changes that the command line asks for, and whether there are any."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    if given.get("student", preset.student) not in preset.students:
        raise Fault(f"{preset.name} has no student {args.student}; choose from {', '.join(preset.students)}")
    changes = {name: given[name] for name in given if name in asdict(preset)}
    if args.command in ("train", "reflow", "distill"):
        schedule = {name: given[name] for name in ("steps", "lr", "batch") if name in given}
        changes |= {args.command: replace(getattr(preset, args.command), **schedule)} if schedule else {}
    if args.command == "pairs":
        changes |= {"pairs": args.n} if args.n else {}
        changes |= {"solver": solver_options(args)} if args.solver or args.steps else {}
    return replace(preset, **changes), bool(changes)

def solver_options(args):
    """--solver and --steps as keyword arguments of `sample`."""
    if args.solver in ("euler", "heun") and args.steps:
        return dict(solver=args.solver, steps=args.steps)
    if args.solver == "rk45" and not args.steps:
        return RK45
    raise Fault("--solver euler and --solver heun need --steps, rk45 takes none")

def sample_command(args):
    """Images from a checkpoint, as a picture of up to 64 and, with --npz, as an array of all."""
    flow, n = load_flow(args.ckpt, args.device), args.n or 64
    default = ONE_STEP if load_checkpoint(args.ckpt)["settings"]["stage"] == "distill" else RK45
    solver = solver_options(args) if args.solver or args.steps else default
    seed_all(args.seed or 0, "sample", 0)
    size, classes = flow.config["resolution"], flow.label_dim
    noise = torch.randn(n, flow.config["channels"], size, size).to(args.device)
    y = torch.randint(classes, (n,)).to(args.device) if classes else None
    images = generate(flow, noise, solver, y)
    save_grid(Path(args.png), images[:64])
    how = ", ".join(f"{name} {value}" for name, value in solver.items())
    print(f"{args.png}: {min(n, 64)} of {n} images, {how}")
    if args.npz:
        array = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
        save_safely(Path(args.npz), lambda file: np.savez(file, arr_0=array))

def command(args):
    """Run one command."""
    if args.command == "sample":
        return sample_command(args)
    preset, asked = changed(PRESETS[args.dataset], args)
    if args.command == "bench":
        batch = args.batch or (preset.train.batch if args.device == "cuda" else 16)
        return bench(Run(preset, Path(), args.device), batch)
    run = Run(preset, Path(args.out) / preset.name, args.device, data_dir=args.data_dir)
    if args.command == "eval":
        return evaluate(run)
    run = replace(run, seed=args.seed or 0, save_every=args.save_every)
    last = "distill" if args.command == "all" else args.command
    if args.fresh:
        set_aside(run, "train" if args.command == "all" else last)
    run_stages(run, last, last == args.command and (asked or args.seed is not None))
    if args.command == "all":
        evaluate(run)

def main(argv=None):
    """Run the command line and return the exit status: a Fault is one line on stderr and status 2."""
    try:
        command(parse(sys.argv[1:] if argv is None else argv))
        return 0
    except Fault as fault:
        message, status = str(fault), 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message, status = f"{where}{error.strerror or error}", 2
    except (torch.OutOfMemoryError, MemoryError):
        message, status = "out of memory; try a smaller --batch", 2
    except KeyboardInterrupt:
        message, status = "interrupted; the same command continues from the last checkpoint", 130
    if sys.stdout.isatty():
        print()  # end the live line
    print(f"slimflow: {message}", file=sys.stderr)
    return status

if __name__ == "__main__":
    sys.exit(main())
