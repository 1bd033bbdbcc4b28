"""SlimFlow in one file: small one-step image generators, trained with rectified flow.

After Zhu, Liu, Liu, "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow" (ECCV 2024,
arXiv 2407.12718). Time runs from noise at t = 0 to data at t = 1; the paper's text has it reversed.

commands, the first four being the stages of the method:
  train    the teacher, a rectified flow: min E |x - z - v(x_t, t)|^2 over independent noise z and data x
  pairs    solve the teacher's ODE dx/dt = v(x, t) precisely, from each z to its x, and keep (z, x)
  reflow   the same loss for a small student on (z', x), z' = sqrt(1-b^2) z + b e, b annealed from 1 to 0
  distill  min E D(one step from z, x) on stored pairs + E D(one step, guided target) on fresh noise
  all      these four, then eval (the default: on 8x8 digits, minutes on a laptop; with a naive student)
  eval     table and picture of the networks that are there
  sample   images from a checkpoint

`slimflow.py COMMAND --help` lists the flags of a command; `--dataset pictures` trains on your own pictures.
Here, Sections 1 to 3 (flow, solvers, network) and 6 (stages) are the method; 4 trains, 5 loads, 7 has the
presets, 8 evaluates, 9 reads other people's files.
"""

import argparse
import contextlib
import copy
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import pickle
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout  # torch requires it too
from PIL import Image, ImageOps  # matplotlib requires it too
from torch import nn


class Fault(Exception):
    """Something that only the user can mend: the command line prints it as one line, with status 2."""

# ---- 1. Flow: the straight path, its loss, annealing, distillation, guidance -------------------------------
T0 = 1e-3  # t is trained on [T0, 1] and the ODE starts at T0, as in the authors' code

def interpolate(noise, data, t):
    """The point x_t = (1 - t) z + t x of the straight path; noise z and data x [B, ...], t [B]."""
    t = t.reshape(-1, *[1] * (data.ndim - 1))
    return (1 - t) * noise + t * data

def rectified_flow_loss(flow, noise, data, y=None, t=None):
    """Mean of |x - z - v(x_t, t)|^2 over all elements, t ~ U(T0, 1) if None; least at v = E[x - z | x_t]."""
    if t is None:
        t = T0 + (1 - T0) * torch.rand(len(noise), device=noise.device)
    return (data - noise - flow(interpolate(noise, data, t), t, y)).square().mean()

# Why anneal? The teacher's weights do not fit a smaller network, so the student starts from random ones. With
# beta = 1 it learns an ordinary rectified flow of the teacher's images, whose map from noise to image is the
# teacher's own; with beta = 0 it learns the teacher's pairs. One training goes from the first to the second,
# instead of two: a small 1-flow, then its reflow.
SCHEDULES = {  # beta, by u = step / horizon
    "linear": lambda u: max(0.0, 1 - u),
    "cosine": lambda u: (1 + math.cos(math.pi * min(1.0, u))) / 2,
    "exponential": lambda u: math.exp(-u),  # never reaches 0: the horizon is a time constant
    "hold": lambda u: float(u < 1),  # ours; better where few pairs are seen often (notebook 2)
}

def anneal_beta(step, horizon, schedule="linear"):
    """beta of annealing reflow at a step: 1 at step 0, 0 from `horizon` on (exponential: 1/e there)."""
    return SCHEDULES[schedule](step / horizon) if horizon else 0.0  # horizon 0: plain reflow

def annealed_noise(noise, beta):
    """z' = sqrt(1 - beta^2) z + beta eps with fresh eps ~ N(0, I); z' is N(0, I) for every beta in [0, 1]."""
    return math.sqrt(1 - beta**2) * noise + beta * torch.randn_like(noise)

def velocity(flow, x, t, y=None):
    """v(x, t) at one time t for the whole batch x [B, ...]."""
    return flow(x, x.new_full(x.shape[:1], t), y)

def one_step(flow, noise, y=None):
    """z + v(z, T0): the whole ODE in one Euler step, exact where the paths are straight."""
    return noise + velocity(flow, noise, T0, y)

def last_step(flow, middle, t, y=None):
    """m + (1 - t) v(m, t): the Euler step from m at time t [B] to the data."""
    return middle + (1 - t).reshape(-1, *[1] * (middle.ndim - 1)) * flow(middle, t, y)

def distillation_loss(student, noise, data, distance, y=None):
    """Mean of D(z + s(z, T0), x) over stored pairs; x is the precise end of the ODE that starts in z."""
    return distance(one_step(student, noise, y), data).mean()

def guidance_loss(student, two_flow, noise, distance, y=None, t=None):
    """Mean of D(image, target) over fresh noise z, as the authors run it; t ~ U(0.2, 0.8) if None.

        z -------- m -------- image = z + s(z, T0)       the student's own straight line
                    \\-------> target = m + (1-t) v(m, t)  the frozen 2-flow turns off at m = z + t s(z, T0)

    With l2 the loss is (1 - t)^2 |v(m, t) - s|^2, its gradient that of (1 - t) |v - s|^2 with v held fixed:
    along its line the student's velocity should be the 2-flow's. t keeps away from both ends: near 1 the loss
    vanishes, and near 0 the target is one step of the 2-flow, which is what distillation is to improve on.
    """
    if t is None:
        t = 0.2 + 0.6 * torch.rand(len(noise), device=noise.device)
    image = one_step(student, noise, y)
    with torch.no_grad():
        middle = interpolate(noise, image, t)  # in the paper's equation this step too is the 2-flow's
        target = last_step(two_flow, middle, t, y)
    return distance(image, target).mean()

def l2(a, b):
    """Mean squared difference of each image: [B, ...] -> [B]."""
    return (a - b).square().flatten(1).mean(1)

def huber(a, b):
    """Pseudo-Huber sqrt(|a - b|^2 + c^2) - c of each image, c = 0.00054 sqrt(number of elements): [B]."""
    c = 0.00054 * math.sqrt(a[0].numel())
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c

def lpips(a, b):
    """Learned perceptual distance (VGG) of each image, resized to 64x64 as the authors do: [B]."""
    a, b = (x.float().expand(-1, 3, -1, -1) for x in (a, b))
    a, b = (F.interpolate(x, size=64, mode="bilinear", align_corners=True) for x in (a, b))
    with torch.autocast(a.device.type, enabled=False):
        return lpips_network(a.device.type)(a, b).flatten()

DISTANCES = {"l2": l2, "huber": huber, "lpips": lpips}

# ---- 2. Solvers: they follow dx/dt = v(x, t) from noise at T0 to data at 1, and yield each (t, x) ----------
@torch.no_grad()
def euler(flow, noise, steps=1, y=None):
    """Order 1, `steps` evaluations: x += v(x, t_i) / N at t_i = T0 + i/N (1 - T0), as the authors run it."""
    x = noise
    yield T0, x
    for i in range(steps):
        x = x + velocity(flow, x, T0 + i / steps * (1 - T0), y) / steps
        yield T0 + (i + 1) / steps * (1 - T0), x

@torch.no_grad()
def adams(flow, noise, steps=36, y=None):
    """Order 3, `steps` evaluations: a multistep method, Adams' predictor and corrector (PEC).

    A parabola through the last three velocities is integrated over the step behind, to correct x by what is
    known now, and over the step ahead, to guess where to evaluate next. The grid is dense near the data.
    """
    grid = (T0 + (1 - T0) * np.sin(np.linspace(0, np.pi / 2, steps + 1))).tolist()
    x, guess, known, t_before = noise, noise, [], T0
    for t, t_next in itertools.pairwise(grid):
        known = [*known, (t, velocity(flow, guess, t, y))][-3:]
        x = x + _integral(known, t_before, t)
        yield t, x
        t_before = t
        guess = x + _integral(known, t, t_next)
    yield 1.0, guess

def _integral(known, a, b):
    """Integral from a to b of the polynomial in t through the known [(t, velocity), ...]: a weighted sum.

    Its weights are those that integrate 1, s, s^2, ... exactly, s being the time since the last known one.
    """
    last = known[-1][0]
    powers = np.array([[(t - last) ** k for t, _ in known] for k in range(len(known))])
    integrals = [((b - last) ** k - (a - last) ** k) / k for k in range(1, len(known) + 1)]
    weights = np.linalg.solve(powers, integrals).tolist()
    return sum(w * v for w, (_, v) in zip(weights, known))

# Dormand and Prince: each row has the weights of the stages before it; its sum is the stage's time, and the
# last row is the step. The error is the difference to a step of order 4.
DP_STAGES = (
    (1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DP_ERROR = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)

@torch.no_grad()
def rk45(flow, noise, rtol=1e-5, atol=1e-5, y=None):
    """Order 5, the authors' choice (Dormand and Prince): the estimated error of the batch sets the steps."""
    t, x, h = T0, noise, 0.02
    v = velocity(flow, x, t, y)
    yield t, x
    while t < 1:
        h, stages = min(h, 1 - t), [v]
        for weights in DP_STAGES:
            x_new = x + h * sum(w * k for w, k in zip(weights, stages))
            stages.append(velocity(flow, x_new, t + h * sum(weights), y))
        scale = atol + rtol * torch.maximum(x.abs(), x_new.abs())
        error = (h * sum(w * k for w, k in zip(DP_ERROR, stages)) / scale).square().mean().sqrt().item()
        if error < 1:
            t = 1.0 if h == 1 - t else t + h
            x, v = x_new, stages[-1]  # the last stage is the first of the next step
            yield t, x
        elif h < 1e-9:
            raise Fault(f"the ODE cannot be solved past t = {t:.4f}: the velocity is not finite there")
        factor = 0.9 * max(error, 1e-9) ** -0.2 if math.isfinite(error) else 0.2
        h *= min(8.0, max(0.2, factor))

SOLVERS = {"euler": euler, "adams": adams, "rk45": rk45}
ONE_STEP = dict(solver="euler", steps=1)
SAMPLE_BATCH = 100  # images that a solver takes at once

def sample(flow, noise, solver="rk45", y=None, **options):
    """Run a solver to its end: images [B, ...], and how many evaluations they took. Fault if not finite."""
    evaluations = 0

    def counted(x, t, y):
        nonlocal evaluations
        evaluations += 1
        return flow(x, t, y)

    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):  # TF32 is too coarse
        for _, x in SOLVERS[solver](counted, noise, y=y, **options):  # noqa: B007
            pass
    if not x.isfinite().all():
        raise Fault(f"the images of {solver} are not finite; take another solver, or another network")
    return x, evaluations

# ---- 3. Network: one UNet for both published families, DDPM++ (CIFAR-10, FFHQ) and ADM (ImageNet) ----------
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
        self.adm, self.dropout, self.attention = adm, dropout, attention
        self.heads, self.gain = (c_out // 64, 1.0) if adm else (1, math.sqrt(0.5))
        self.norm0, self.conv0 = group_norm(c_in, kind), conv(c_in, c_out, 3)
        self.affine = nn.Linear(c_emb, 2 * c_out if adm else c_out)
        self.norm1, self.conv1 = group_norm(c_out, kind), conv(c_out, c_out, 3)
        self.resample = nn.Identity()
        if resample == "down":
            self.resample = nn.AvgPool2d(2)
        elif resample == "up":
            self.resample = nn.Upsample(scale_factor=2.0)
        needs_skip = c_in != c_out or (resample and not adm)
        self.skip = conv(c_in, c_out, 1) if needs_skip else nn.Identity()
        if attention:
            self.norm2, self.qkv = group_norm(c_out, kind), conv(c_out, 3 * c_out, 1)
            self.proj = conv(c_out, c_out, 1)

    def forward(self, x, emb):
        """x [B, c_in, H, W], emb [B, c_emb] -> [B, c_out, H', W'] with H' = H, H/2 (down) or 2H (up)."""
        h = self.conv0(self.resample(F.silu(self.norm0(x))))  # (B, c_out, H', W')
        emb = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = emb.chunk(2, dim=1)  # each (B, c_out, 1, 1)
            h = shift + self.norm1(h) * (scale + 1)
        else:
            h = self.norm1(h + emb)
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = (self.skip(self.resample(x)) + h) * self.gain
        if self.attention:
            x = (self.proj(self._attended(self.qkv(self.norm2(x)))) + x) * self.gain
        return x

    def _attended(self, qkv):
        b, c, height, width = qkv.shape  # c = 3 c_out, the channels ordered as (head, channel, q k v)
        qkv = qkv.reshape(b, self.heads, c // 3 // self.heads, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # each (B, heads, H W, channels of a head)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c // 3, height, width)

class UNet(nn.Module):
    """Velocity network v(x, t, y), of kind "ddpm++" or "adm", with EDM's parameter names: its weights load.

    Level i has half the resolution of the one before, channel_mult[i] * model_channels channels, num_blocks
    residual blocks (one more in the decoder), and self-attention if at attn_resolutions. label_dim is the
    number of classes, or 0. Time t in [0, 1] enters its sinusoids as time_scale * t.
    """
    def __init__(self, resolution, channels, model_channels, channel_mult, num_blocks, attn_resolutions,
                 label_dim=0, dropout=0.0, kind="ddpm++", time_scale=999.0):
        super().__init__()
        self.config = dict(
            resolution=resolution, channels=channels, model_channels=model_channels,
            channel_mult=channel_mult, num_blocks=num_blocks, attn_resolutions=attn_resolutions,
            label_dim=label_dim, dropout=dropout, kind=kind, time_scale=time_scale)
        self.kind, self.model_channels = kind, model_channels
        self.label_dim, self.time_scale = label_dim, time_scale
        adm, c, c_emb = kind == "adm", model_channels, 4 * model_channels
        block = partial(Block, c_emb=c_emb, kind=kind, dropout=dropout)
        sizes = [resolution >> level for level in range(len(channel_mult))]
        levels = [(f"{n}x{n}", n in attn_resolutions, c * mult) for n, mult in zip(sizes, channel_mult)]

        self.map_layer0, self.map_layer1 = nn.Linear(c, c_emb), nn.Linear(c_emb, c_emb)
        if label_dim:
            self.map_label = nn.Linear(label_dim, c_emb if adm else c, bias=not adm)

        self.enc, skips = nn.ModuleDict(), []  # skips: channels of what the encoder hands to the decoder
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
            elif closing:
                nn.init.xavier_uniform_(p, gain=1e-5)
            else:
                nn.init.xavier_uniform_(p, gain=math.sqrt(0.2) if "qkv" in name else 1.0)

    def _embedded(self, t, y):
        """Sinusoids of time [B] and class [B] (or None) through two linear layers: [B, 4 model_channels]."""
        half = self.model_channels // 2
        i = torch.arange(half, dtype=torch.float32, device=t.device)
        frequency = (1 / 10_000) ** (i / (half if self.kind == "adm" else half - 1))
        angle = (self.time_scale * t)[:, None] * frequency.to(t.dtype)  # (B, half)
        label = 0.0
        if self.label_dim:
            one_hot = angle.new_zeros(len(t), self.label_dim)
            if y is not None:
                one_hot = one_hot.scatter(1, y[:, None], 1.0)
            label = self.map_label(one_hot * (1.0 if self.kind == "adm" else math.sqrt(self.label_dim)))
        if self.kind == "adm":
            emb = F.silu(self.map_layer0(torch.cat([angle.cos(), angle.sin()], dim=1)))
            return F.silu(self.map_layer1(emb) + label)
        emb = F.silu(self.map_layer0(torch.cat([angle.sin(), angle.cos()], dim=1) + label))
        return F.silu(self.map_layer1(emb))

    def forward(self, x, t, y=None):
        """Velocity at x [B, C, H, W], time t [B] in [0, 1], class y int64 [B] or None: like x."""
        emb, skips = self._embedded(t, y), []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("conv") else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            if "aux" not in name:
                x = layer(x, emb)
        if self.kind == "adm":
            return self.out_conv(F.silu(self.out_norm(x)))
        *_, aux_norm, aux_conv = self.dec.values()
        return aux_conv(F.silu(aux_norm(x)))

# ---- 4. Training: one loop for every stage, on one device or, under torchrun, on many ----------------------
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
WORLD = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1  # number of processes
RANK = int(os.environ["RANK"]) if TORCHRUN else 0  # which of them this is
barrier = dist.barrier if WORLD > 1 else lambda: None  # waits for the other processes
SAVE_EVERY = 60.0  # seconds between checkpoints

@dataclass(frozen=True)
class Schedule:
    """How one network is trained: Adam, gradients clipped at norm 1. The defaults are the authors'."""
    steps: int = 800_000
    batch: int = 128  # images per step, of all processes together
    lr: float = 2e-4
    warmup: int = 5_000  # steps of linear warm-up
    decay: float = 0.0  # last share of the steps, over which lr falls linearly to 0
    ema: float = 0.999999  # largest decay rate of the averaged weights

def learning_rate(schedule, step):
    """Linear warm-up, then constant, then linear decay to 0 over the last `decay` share of the steps."""
    up = (step + 1) / schedule.warmup if schedule.warmup else 1
    down = (schedule.steps - step) / (schedule.decay * schedule.steps) if schedule.decay else 1
    return schedule.lr * min(1, up, down)

def seed_all(seed, name, step, rank=0):
    """Seed torch from all four: a resumed run then draws at each step what an uninterrupted one draws."""
    torch.manual_seed(int(np.random.SeedSequence([seed, *name.encode(), step, rank]).generate_state(1)[0]))

def fit(net, loss_fn, schedule, seed=0, stage="fit", folder=None, picture=None):
    """Minimise loss_fn(net, step), a batch's mean; return the averaged (EMA) network, frozen, in eval mode.

    A folder keeps the training, at first and then once a minute: ckpt.pt, log.csv and, from picture(ema) ->
    images, samples.png. The same call goes on from there, on a CPU bit for bit as if it had never stopped.
    Fault if the loss or the gradient is not finite; the files stay as they were.
    """
    device = next(net.parameters()).device
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=schedule.lr, fused=True)
    trained = dict(net=net, ema=ema, optimizer=optimizer)
    start, rows = restore(folder, trained)
    model = nn.parallel.DistributedDataParallel(net.train()) if WORLD > 1 else net.train()
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    report = progress(stage, start, schedule.steps, schedule.batch)
    sums = torch.zeros(3, device=device)  # of loss, gradient norm and steps, since the last row of the log
    saved = time.monotonic()
    for step in range(start, schedule.steps):
        seed_all(seed, stage, step, RANK)
        optimizer.param_groups[0]["lr"] = learning_rate(schedule, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = loss_fn(model, step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            rate = min(schedule.ema, (1 + step) / (10 + step))  # early averages are short
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - rate)
            sums += torch.stack([loss, norm, torch.ones_like(norm)])
        done = step + 1
        if done in (1, 10, schedule.steps) or done % 50 == 0:  # only here the loop waits for the device
            if WORLD > 1:
                dist.all_reduce(sums)
            mean_loss, mean_norm = (sums[:2] / sums[2]).tolist()
            if not math.isfinite(mean_loss + mean_norm):
                raise Fault(f"{stage}: loss or gradient not finite by step {done:,}; try a lower --lr")
            rows.append((done, mean_loss, mean_norm))
            sums.zero_()
            due = done in (1, schedule.steps) or time.monotonic() - saved > SAVE_EVERY
            if folder and RANK == 0 and due:
                keep(folder, trained, dict(stage=stage, done=done, rows=rows, config=net.config))
                if picture:
                    save_pictures(folder / "samples.png", picture(ema))
                saved = time.monotonic()
        report(done, f"loss {rows[-1][1]:.4f}")
    return ema

def keep(folder, trained, facts):
    """Write log.csv, and ckpt.pt: the facts, and the states of network, average and optimizer."""
    table = dict(fmt="%.6g", delimiter=",", comments="", header="step,loss,grad_norm")
    save_file(folder / "log.csv", lambda file: np.savetxt(file, facts["rows"], **table))
    states = {name: part.state_dict() for name, part in trained.items()}
    save_file(folder / "ckpt.pt", lambda file: torch.save(facts | states, file))

def restore(folder, trained):
    """Load the states in a folder's ckpt.pt; return the steps done and the log's rows, or 0 and []."""
    path = folder and folder / "ckpt.pt"
    if not path or not path.exists():
        return 0, []
    with trying(f"read {path}", "it is damaged; start over with --fresh"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in trained.items():
            part.load_state_dict(state[name])
        print(f"goes on from step {state['done']:,} of {path}")
        return state["done"], state["rows"]

def build(config, device, weights=None):
    """A UNet in the fastest form measured on its device: to be trained, or with `weights` and frozen."""
    net = UNet(**config)
    if weights is not None:
        net.load_state_dict(weights)
        net.eval().requires_grad_(False)
    large = config["resolution"] > 8  # 8x8 images gain nothing by what follows
    cuda = torch.device(device).type == "cuda"
    if large and cuda:
        torch._dynamo.config.recompile_limit = 32  # of all networks
        net.compile(dynamic=False if weights is None else None)  # training has one batch size
    channels_last = large and not cuda
    return net.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)

def load_flow(path, device="cpu"):
    """The averaged network of a ckpt.pt, frozen, in eval mode; its `stage` is the one that made it."""
    with trying(f"read {path} as a checkpoint of slimflow's", "it is damaged or something else"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        flow = build(state["config"], device, state["ema"])
        flow.stage = state["stage"]
        return flow

def progress(name, start, total, images=1, unit="steps"):
    """A function report(done, note), which prints speed and time left: in one live line, or every 10 s."""
    live = sys.stdout.isatty()
    began = shown = time.monotonic()

    def report(done, note=""):
        nonlocal shown
        now, last = time.monotonic(), done == total
        if not last and now - shown < (0.2 if live else 10):
            return
        shown = now
        pace = (now - began + 1e-9) / (done - start)  # seconds per unit
        clock = timedelta(seconds=round(now - began if last else (total - done) * pace))
        clock = f"took {clock}" if last else f"{clock} left"
        line = f"{name:<10} {done:,}/{total:,} {unit}  {note}  {images / pace:,.0f} images/s  {clock}"
        print(line[:79].ljust(79), end="\r" if live and not last else "\n", flush=True)

    return report

@contextlib.contextmanager
def trying(what, otherwise):
    """Turn whatever goes wrong within into a Fault, 'cannot <what>: <what the system says>; <otherwise>'."""
    try:
        yield
    except (Fault, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides the system's
        reasons = filter(None, [getattr(cause, "strerror", None), otherwise])
        raise Fault(f"cannot {what}: {'; '.join(reasons)}") from error

def save_file(path, write):
    """Write a file whole or not at all: write(file) fills a temporary one, which then takes its place."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    with trying(f"write {path}", "what was there is kept"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

# ---- 5. Data: images and pairs, kept as uint8 and float16 until a batch is drawn ---------------------------
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

@dataclass(frozen=True, kw_only=True)
class Run:
    """A preset (Section 7), and what the command line changes in it."""
    dataset: str
    shape: tuple  # of an image, (C, H, W)
    label_dim: int = 0  # number of classes, 0 if unconditional
    networks: dict  # arguments of `UNet` for "teacher" and for each student's size
    precise: dict  # arguments of `sample` that solve the ODE of these networks precisely
    settings: dict  # of each stage, the arguments of its function (Section 6)
    n: int  # images of the evaluation
    seed: int = 0
    out: str = "runs"
    data_dir: str | None = None  # folder of the images, None for data/<dataset>
    device: str = DEVICES[-1]

    @property
    def folder(self):
        """The folder of the stages' folders."""
        return Path(self.out) / self.dataset

def to_float(images):
    """uint8 0..255 to float -1..1."""
    return images.float() / 127.5 - 1

def to_uint8(x):
    """Float -1..1 to uint8 0..255, rounded (the authors cut off) and clipped."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)

def load_digits():
    """The 1,797 scans beside this file, uint8 [1797, 1, 8, 8], and their digits, int64 [1797]."""
    path = Path(__file__).with_name("digits.npz")
    with trying(f"read {path}", "it is damaged"), np.load(path) as file:
        return torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()

@cache
def list_pictures(folder, results):
    """The paths of the pictures in a folder and in those inside it. Says which files it leaves out.

    Left out are hidden files, linked folders, the run's own results, and what Pillow reads but is no picture.
    """
    kinds = {suffix for suffix, kind in Image.registered_extensions().items()
             if Image.MIME.get(kind, "").startswith("image/")}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and results not in path.parents]
    found = [path for path in files if path.suffix.lower() in kinds
             and not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if 0 < len(found) < len(files):
        names = " ".join(sorted({path.suffix or path.name for path in set(files) - set(found)}))
        print(f"left out of {folder}: {len(files) - len(found):,} files, hidden or no pictures: {names}")
    return found

def find_images(run, data_dir):
    """The run's pictures, a list of (path, class); [] for the digits, and for cifar10 if there are none."""
    if run.dataset == "digits":
        return []
    folder = Path(data_dir or f"data/{run.dataset}").resolve()
    if not folder.is_dir() and run.dataset != "cifar10":
        raise Fault(f"there is no folder {folder}; --data-dir names another one")
    folders = [folder]
    if run.label_dim:
        folders = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
        if len(folders) != run.label_dim:
            raise Fault(f"{run.dataset} needs {run.label_dim} folders, one for each class, but in {folder} "
                        f"there are {len(folders)}; --data-dir names another folder")
    found = [list_pictures(folder, run.folder.resolve()) for folder in folders]
    empty = [str(folder) for folder, paths in zip(folders, found) if not paths]
    if empty and run.dataset != "cifar10":
        raise Fault(f"there are no pictures in {', '.join(empty)}; --data-dir names another folder")
    return [(path, y) for y, paths in enumerate(found) for path in paths]

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

def decode(run, found):
    """The pictures that `find_images` found, uint8 [N, 3, H, W], and their classes, int64 [N]."""
    if len(found) < 500:
        print(f"{len(found)} pictures are few: expect a generator that repeats them")
    Image.MAX_IMAGE_PIXELS = None  # scans may be large
    paths, y = zip(*found)
    images, damaged = torch.empty(len(paths), *run.shape, dtype=torch.uint8), []
    report = progress("decode", 0, len(paths), unit="images")

    def put(i):
        try:
            images[i] = read_picture(paths[i], run.shape[-1])
        except MemoryError:
            raise
        except Exception:  # a damaged file raises anything
            damaged.append(str(paths[i]))

    with ThreadPoolExecutor() as pool:
        for part in torch.arange(len(paths)).split(1_000):
            list(pool.map(put, part.tolist()))
            report(part[-1].item() + 1)
    if damaged:
        raise Fault(f"cannot read these pictures; replace or remove them: {', '.join(sorted(damaged))}")
    return images, torch.tensor(y)

def download_cifar10(folder):
    """CIFAR-10's training images from the archive in a folder, or from the network; one class, 0."""
    dataset = import_package("torchvision.datasets").CIFAR10  # checks the archive's MD5 sum
    with trying(f"use or download {dataset.url} (or put it into {folder})", "no network, or damaged"):
        images = torch.from_numpy(dataset(folder, train=True, download=True).data)  # (N, H, W, C)
    return images.permute(0, 3, 1, 2).contiguous(), torch.zeros(len(images), dtype=torch.int64)

def load_images(run, data_dir=None):
    """All training images, uint8 [N, C, H, W], and their classes, int64 [N], all 0 where there are none.

    What was decoded is kept in images-*.pt, under a digest of the files: of changed ones another is made.
    """
    if run.dataset == "digits":
        return resident(run, load_digits())
    found = find_images(run, data_dir)
    facts = [(str(path), y, path.stat().st_size, path.stat().st_mtime_ns) for path, y in found]
    path = run.folder / f"images-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}.pt"
    if RANK == 0 and not path.exists():
        decoded = decode(run, found) if found else download_cifar10(data_dir or "data/cifar10")
        save_file(path, partial(torch.save, decoded))
    barrier()
    with trying(f"read {path}", "it is damaged; remove it"):
        images_and_classes = torch.load(path, mmap=True, weights_only=True)
    return resident(run, images_and_classes)

def pair_columns(run):
    """A row of pairs.bin: noise z, the image x at the end of the ODE that starts there, and its class y."""
    return np.dtype([("noise", "f2", run.shape), ("data", "f2", run.shape), ("y", "i8")])

def count_pairs(run, stage):
    """The number of whole rows in a stage's pairs.bin."""
    path = run.folder / stage / "pairs.bin"
    return path.stat().st_size // pair_columns(run).itemsize if path.exists() else 0

def solve_pairs(run, flow):
    """SAMPLE_BATCH new rows for pairs.bin, by a precise solver, and how many evaluations they took."""
    noise = torch.randn(SAMPLE_BATCH, *run.shape).half()
    y = torch.randint(max(1, run.label_dim), (SAMPLE_BATCH,))
    solver = getattr(flow, "precise", run.precise)
    data, evaluations = sample(flow, noise.to(run.device).float(), y=y.to(run.device), **solver)
    rows = np.empty(SAMPLE_BATCH, pair_columns(run))
    rows["noise"], rows["data"], rows["y"] = noise, data.cpu(), y
    return rows, evaluations

def write_pairs(run, stage, flow, n, seed):
    """Append rows to <stage>/pairs.bin until there are n.

    Each process solves a batch, and the first one appends them all. Each batch has random numbers of its own,
    so that the file is the same however often this was interrupted, by however many processes.
    """
    path, row_bytes = run.folder / stage / "pairs.bin", pair_columns(run).itemsize
    there = count_pairs(run, stage)
    if there >= n:
        return
    there = there // SAMPLE_BATCH * SAMPLE_BATCH  # a batch that was cut is made again
    report = progress("pairs", there, n, unit="pairs")
    for start in range(there, n, SAMPLE_BATCH * WORLD):
        seed_all(seed, f"{stage}, pairs", start + RANK * SAMPLE_BATCH)
        rows, evaluations = solve_pairs(run, flow)
        batches = [rows]
        if WORLD > 1:
            batches = [None] * WORLD
            dist.all_gather_object(batches, rows)
        rows = np.concatenate(batches)[: n - start]
        if RANK == 0:
            with trying(f"write {path}", "what was there is kept"), open(path, "ab") as file:
                file.truncate(start * row_bytes)
                file.write(rows.tobytes())
        report(start + len(rows), f"{evaluations} evaluations each")
    if RANK == 0:
        save_pictures(path.with_name("samples.png"), load_pairs(run, stage)[1][:64].float())
    barrier()

def load_pairs(run, stage):
    """Noise and data, float16 [N, C, H, W], and classes, int64 [N]; mapped, so that they need no memory."""
    path = run.folder / stage / "pairs.bin"
    with trying(f"read {path}", "it is damaged; remove it"):
        rows = np.memmap(path, pair_columns(run), mode="c", shape=count_pairs(run, stage))
    return resident(run, [torch.from_numpy(rows[name]) for name in rows.dtype.names])

def resident(run, tensors):
    """The tensors, on a CUDA device if they take at most a quarter of its memory."""
    if run.device == "cuda":
        room = torch.cuda.get_device_properties("cuda").total_memory / 4
        if sum(x.nbytes for x in tensors) <= room:
            return [x.cuda() for x in tensors]
    return tensors

def draw_batch(run, batch, tensors):
    """This process's share of a batch of random rows, on the device: images and noise as float32."""
    i = torch.randint(len(tensors[0]), (batch // WORLD,))
    drawn = []
    for x in tensors:
        x = x[i.to(x.device, non_blocking=True)]
        if run.device == "cuda" and not x.is_cuda:  # from pinned memory, so that the loop runs ahead
            x = x.pin_memory().to("cuda", non_blocking=True)
        if x.dtype == torch.uint8:  # images; pairs are float16
            x = to_float(x)
        elif x.dtype == torch.float16:
            x = x.float()
        drawn.append(x)
    return drawn

def fixed_noise(run, n=64, seed=1234):
    """The same noise [n, C, H, W] every time, and classes for it, int64 [n]."""
    noise = torch.randn(n, *run.shape, generator=torch.Generator().manual_seed(seed)).to(run.device)
    return noise, torch.arange(n, device=run.device) % max(1, run.label_dim)

def import_package(name):
    """Import what only some commands need: torchvision, or an optional package."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0].replace("_", "-")
        raise Fault(f"this needs the package {package}: pip install {package}") from None
    except RuntimeError:  # torchvision, built for another torch, lacks two operators that nothing here uses
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "() -> ()")
        return importlib.import_module(name)

# ---- 6. Stages: each is a function of the run and of its settings, and its folder remembers them -----------
def train(run, seed, data_dir, mirror, **schedule):
    """Stage 1: the teacher, a rectified flow on independent noise z and data x."""
    schedule, stored = Schedule(**schedule), load_images(run, data_dir)

    def loss(flow, step):
        data, y = draw_batch(run, schedule.batch, stored)
        if mirror:  # each image by its own coin
            coins = torch.rand(len(data), 1, 1, 1, device=data.device)
            data = torch.where(coins < 0.5, data.flip(-1), data)
        return rectified_flow_loss(flow, torch.randn_like(data), data, y)

    fit_stage(run, "train", run.networks["teacher"], loss, schedule, seed, dict(solver="adams", steps=12))

def make_pairs(run, seed, pairs, teacher):
    """Stage 2: the teacher's ODE from each z to its x. The teacher is a file; None: that of stage 1."""
    flow = load_network(teacher or run.folder / "train/ckpt.pt", run.device)
    write_pairs(run, "pairs", flow, pairs, seed)

def reflow(run, seed, student, mirror, anneal, anneal_schedule, anneal_steps, **schedule):
    """Stage 3: annealing reflow, from random weights to a small 2-rectified flow."""
    schedule, stored = Schedule(**schedule), load_pairs(run, "pairs")

    def loss(flow, step):
        noise, data, y = draw_batch(run, schedule.batch, stored)
        if mirror and torch.rand(()) < 0.5:  # noise and image together, one coin a batch
            noise, data = noise.flip(-1), data.flip(-1)
        beta = anneal_beta(step, anneal * anneal_steps, anneal_schedule)
        return rectified_flow_loss(flow, annealed_noise(noise, beta), data, y)

    fit_stage(run, "reflow", run.networks[student], loss, schedule, seed, ONE_STEP)

def distill(run, seed, guidance, distance, own_pairs, **schedule):
    """Stage 4: flow-guided distillation, from the 2-flow's weights; with guidance 0 the naive student.

    The stored targets are the 2-flow's own (paper's poster), or with own_pairs 0 the teacher's (the command
    in the authors' README).
    """
    stage = "distill" if guidance else "naive"
    schedule, D = Schedule(**schedule), DISTANCES[distance]
    two_flow = load_flow(run.folder / "reflow/ckpt.pt", run.device)
    if own_pairs:
        write_pairs(run, stage, two_flow, own_pairs, seed)
    stored = load_pairs(run, stage if own_pairs else "pairs")

    def loss(student, step):
        noise, data, y = draw_batch(run, schedule.batch, stored)
        value = distillation_loss(student, noise, data, D, y)
        if guidance:  # on as much fresh noise
            value = value + guidance * guidance_loss(student, two_flow, torch.randn_like(noise), D, y)
        return value

    # The student starts from the 2-flow's averaged weights, the authors' from the raw ones.
    fit_stage(run, stage, two_flow.config, loss, schedule, seed, ONE_STEP, start=two_flow)

def fit_stage(run, stage, config, loss, schedule, seed, solver, start=None):
    """`fit` in the stage's folder, from random weights or those of `start`; pictures by a solver."""
    seed_all(seed, f"{stage}, weights", 0)
    net, (noise, y) = build(config, run.device), fixed_noise(run)
    if start:
        net.load_state_dict(start.state_dict())

    def picture(flow):
        return sample(flow, noise, y=y, **solver)[0]

    fit(net, loss, schedule, seed, stage, run.folder / stage, picture)

STAGES = dict(train=train, pairs=make_pairs, reflow=reflow, distill=distill, naive=distill)
STALE = dict(  # by stage: those that are out of date when it goes on
    train=["pairs", "reflow", "distill", "naive"], pairs=["reflow", "distill", "naive"],
    reflow=["distill", "naive"], distill=[], naive=[])
GOAL = dict.fromkeys(STAGES, "steps") | dict(pairs="pairs")  # the setting that says how far a stage goes
PAIR_SETTINGS = ("seed", "pairs", "teacher", "own_pairs")  # what pairs are made with

def run_stage(run, stage, fresh=False, **given):
    """Bring a stage, and first those that it is made from, to its end; False if there was nothing to do.

    `given` are settings of this stage; its folder has the others, or the preset. With `fresh` it starts over.
    """
    settings = settle(run, stage, given, fresh)
    if not fresh and count_done(run, stage) >= settings[GOAL[stage]]:
        return False
    for source in sources(stage, settings):
        run_stage(run, source)
    barrier()  # all processes have read what is there
    if RANK == 0:
        stale = STALE[stage]
        if stage == "train" and remembered(run, "pairs").get("teacher"):
            stale = []  # the pairs are made from a file
        set_aside(run, [stage, *stale] if fresh else stale)
        path, text = run.folder / stage / "settings.json", json.dumps(settings)
        save_file(path, lambda file: file.write(text.encode()))
        print(f"{stage}, into {path.parent}:", ", ".join(f"{k} {v}" for k, v in settings.items()))
    barrier()
    STAGES[stage](run, **settings)
    barrier()
    return True

def sources(stage, settings):
    """The stages that one with these settings is made from, in their order."""
    if stage == "pairs":
        return [] if settings["teacher"] else ["train"]
    if stage == "reflow":
        return ["pairs"]
    if stage in ("distill", "naive"):
        return ["reflow"] if settings["own_pairs"] else ["pairs", "reflow"]
    return []

def run_all(run, given, fresh=False):
    """Pairs, reflow, distill; on the digits also the naive student, at the guided one's cost. Then the table.

    `given` has the settings, a dict for each stage.
    """
    if run.dataset == "digits" and "distill" in given:
        naive = dict(guidance=0.0, steps=naive_steps(run, given["distill"], fresh))
        given = given | dict(naive=given["distill"] | naive)
    external = settle(run, "pairs", given.get("pairs", {}), fresh)["teacher"]
    for stage in given:  # what does not fit is refused before anything runs
        if stage != "train" or not external:
            settle(run, stage, given[stage], fresh)
    # The teacher is trained by run_stage("pairs"), if they need one, and then with these settings.
    run = replace(run, settings=run.settings | dict(train=run.settings["train"] | given["train"]))
    if run.dataset in PAPERS and WORLD == 1:
        inception_features(run.device)
    if fresh and RANK == 0:
        set_aside(run, STAGES)
    barrier()
    for stage in given:
        if stage != "train":
            run_stage(run, stage, **given[stage])
    if WORLD == 1:
        evaluate(run)
    else:
        print("for the table run `slimflow.py eval`, without torchrun")

def naive_steps(run, given, fresh):
    """As many steps as cost what the guided student costs, or those that the naive one already has.

    A step takes 3 forward passes, with guidance 7; a backward pass counts as two.
    """
    steps = settle(run, "distill", given, fresh)["steps"] * 7 // 3
    return steps if fresh else max(steps, count_done(run, "naive"))

def settle(run, stage, given, fresh=False):
    """A stage's settings: each is the given one, else what its results were made with, else the preset's.

    Fault if the results were made with another one, or if it would fail. More steps or pairs may be given,
    and another lr. `fresh`: as if there were no results.
    """
    folder = run.folder / stage
    kept = {} if fresh else remembered(run, stage)
    if not (folder / "ckpt.pt").exists():  # there are pairs, but nothing is trained on them yet
        kept = {name: kept[name] for name in kept if name in PAIR_SETTINGS}
    settings = defaults(run, stage) | kept | given
    if "anneal" in settings:  # a share of these steps; with more steps later beta stays 0
        settings.setdefault("anneal_steps", settings["steps"])
    for name, value in given.items():
        was = kept.get(name, value)  # what nothing was made with yet may be anything
        more = name == GOAL[stage] and value > was
        if value != was and not more and name != "lr":
            was = f"no {flag(name)}" if was is None else f"{flag(name)} {was}"
            raise Fault(f"{folder} was made with {was}; give the same, --fresh or another --out")
    if fresh or count_done(run, stage) < settings[GOAL[stage]]:
        check(run, settings)
    return settings

def check(run, settings):
    """What would fail late fails here, before anything runs."""
    students = list(run.networks)[1:]
    if "data_dir" in settings:
        find_images(run, settings["data_dir"])
    if "student" in settings and settings["student"] not in students:
        raise Fault(f"there is no student {settings['student']}; choose from {', '.join(students)}")
    if "batch" in settings and settings["batch"] % WORLD:
        raise Fault(f"{WORLD} processes cannot share a batch of {settings['batch']}; give another --batch")
    if settings.get("distance") == "lpips":
        lpips_network(run.device)
    if settings.get("teacher"):
        path = Path(settings["teacher"])
        config = load_network(path).config
        if (config["channels"], config["resolution"], config["label_dim"]) != (*run.shape[:2], run.label_dim):
            raise Fault(f"{path} makes images of another size or other classes than {run.dataset}'s")
        if run.folder.resolve() in path.parents:
            raise Fault(f"{path} is in this run's folder; leave --teacher out, or copy it to another place")

def defaults(run, stage):
    """The preset's settings of a stage; the naive student has those of distill."""
    settings = dict(seed=run.seed) | run.settings["distill" if stage == "naive" else stage]
    if stage == "train":
        settings["data_dir"] = run.data_dir
    if stage == "naive":
        settings["guidance"] = 0.0
    return settings

def remembered(run, stage):
    """The settings that a stage's results were made with; {} if it has none."""
    folder = run.folder / stage
    if not (folder / "ckpt.pt").exists() and not (folder / "pairs.bin").exists():
        return {}
    path = folder / "settings.json"
    with trying(f"read {path}", f"it is damaged, or of another edition; start over with {stage} --fresh"):
        kept = json.loads(path.read_text())
        if not kept.keys() >= defaults(run, stage).keys():
            raise ValueError
        return kept

def count_done(run, stage):
    """How many steps (of `pairs`: pairs) a stage has done; reads no weights."""
    path = run.folder / stage / "ckpt.pt"
    if stage == "pairs":
        return count_pairs(run, stage)
    if not path.exists():
        return 0
    with trying(f"read {path} as slimflow's", "it is damaged; start over with --fresh"):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["done"]

def set_aside(run, stages):
    """Rename the folders of these stages, where they are there: nothing is ever deleted."""
    for folder in [run.folder / stage for stage in stages]:
        if folder.exists():
            numbered = (Path(f"{folder}.{i}") for i in itertools.count(1))
            free = next(path for path in numbered if not path.exists())
            print(f"{folder} is now {folder.rename(free)}")

# ---- 7. Presets and command line ---------------------------------------------------------------------------
DDPMPP = dict(channels=3, channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(16,), dropout=0.15)
ADM = dict(kind="adm", resolution=64, channels=3, label_dim=1000, dropout=0.13, model_channels=192,
           channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(32, 16, 8))
ADM_STUDENT = ADM | dict(model_channels=128, num_blocks=2, attn_resolutions=(32, 16))

def ddpmpp_networks(resolution):
    """The paper's 1-flow for CIFAR-10, and the authors' students by size."""
    network = DDPMPP | dict(resolution=resolution)
    return {
        "teacher": network | dict(model_channels=128, channel_mult=(1, 2, 2, 2), num_blocks=4),
        "27.9M": network | dict(model_channels=128),
        "15.7M": network | dict(model_channels=96),
        "7.0M": network | dict(model_channels=64),
        "3.4M": network | dict(model_channels=64, channel_mult=(1, 1, 2), num_blocks=1),
    }

DIGITS = dict(resolution=8, channels=1, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,),
              time_scale=16.0)  # with 999 the velocity oscillates in t, and solvers take 3 times as long
SHORT = dict(batch=64, decay=0.6, ema=0.998)
digits = Run(  # all numbers are ours
    dataset="digits", shape=(1, 8, 8), n=5_000, precise=dict(solver="adams", steps=12),
    networks={"teacher": DIGITS | dict(model_channels=32), "0.19M": DIGITS | dict(model_channels=16)},
    settings=dict(
        train=SHORT | dict(mirror=False, steps=1_200, lr=2e-3, warmup=100),
        pairs=dict(pairs=1_500, teacher=None),
        reflow=SHORT | dict(student="0.19M", mirror=False, anneal=0.2, anneal_schedule="linear",
                            steps=1_100, lr=4e-3, warmup=100),
        distill=SHORT | dict(guidance=1.0, distance="huber", own_pairs=0, steps=800, lr=2e-3, warmup=0),
    ),
)

def pictures(size):
    """Your own pictures, scaled to size x size; small networks and few steps, for two CPU cores."""
    network = DIGITS | dict(resolution=size, channels=3, channel_mult=(1, 2) + (2,) * (size // 32),
                            attn_resolutions=(8,))
    longer = dict(
        train=dict(steps=4_000), pairs=dict(pairs=3_000),
        reflow=dict(student="small", steps=5_000, anneal=0.3), distill=dict(steps=1_000, lr=1e-3),
    )
    return Run(
        dataset=f"pictures{size}", shape=(3, size, size), n=2_000, precise=dict(solver="adams", steps=18),
        networks={"teacher": network | dict(model_channels=32), "small": network | dict(model_channels=16)},
        settings={stage: digits.settings[stage] | longer[stage] for stage in longer},
    )

AUTHORS = vars(Schedule())
cifar10 = Run(  # all numbers are the authors', but where another source is named
    dataset="cifar10", shape=(3, 32, 32), n=50_000,  # FID's convention
    precise=dict(solver="rk45", rtol=1e-5, atol=1e-5), networks=ddpmpp_networks(32),
    settings=dict(
        train=AUTHORS | dict(mirror=True),  # the number of steps is ours
        pairs=dict(pairs=50_000, teacher=None),  # with EDM's network 100,000
        reflow=AUTHORS | dict(student="15.7M", mirror=True, anneal=0.375, anneal_schedule="linear"),
        distill=AUTHORS | dict(guidance=1.0, distance="lpips", own_pairs=500_000, steps=400_000, warmup=0),
    ),
)
ffhq64 = replace(cifar10, dataset="ffhq64", shape=(3, 64, 64), networks=ddpmpp_networks(64))
imagenet64 = replace(
    ffhq64, dataset="imagenet64", label_dim=1000,
    networks={
        "teacher": ADM,  # EDM's
        "80.7M": ADM_STUDENT | dict(channel_mult=(1, 2, 2, 4)),
        "44.7M": ADM_STUDENT | dict(channel_mult=(1, 2, 2, 2)),
    },
    settings=cifar10.settings | dict(
        pairs=dict(pairs=400_000, teacher=None),
        reflow=cifar10.settings["reflow"] | dict(student="80.7M"),
    ),
)
PAPERS = dict(cifar10=cifar10, ffhq64=ffhq64, imagenet64=imagenet64)
PRESETS = dict(digits=digits, pictures=pictures(16)) | PAPERS

FLAGS = dict(  # how argparse reads each, and its help
    dataset=dict(choices=PRESETS, help="preset [digits]; pictures: your own, in --data-dir"),
    size=dict(type=int, choices=(16, 32, 64), help="of --dataset pictures: height and width [16]"),
    out=dict(help="folder of <dataset>/<stage>/ [runs]"),
    device=dict(choices=DEVICES, help=f"[{DEVICES[-1]}]"),
    fresh=dict(action="store_true", help="start over (all: everything); what is there is renamed"),
    seed=dict(type=int, help="of all random numbers [0]"),
    data_dir=dict(type=os.path.realpath, help="folder of the images [data/<dataset>]"),
    steps=dict(type=int, help="training steps; of sample: steps of the solver"),
    batch=dict(type=int, help="images per step"),
    lr=dict(type=float, help="Adam's learning rate"),
    pairs=dict(type=int, help="number of pairs (noise, image) to make"),
    teacher=dict(type=os.path.realpath, help="EDM's .pkl, the authors' .pth or a ckpt.pt, in place of train"),
    student=dict(help="size of the student"),
    mirror=dict(action=argparse.BooleanOptionalAction, help="show the images mirrored too"),
    anneal=dict(type=float, help="share of the steps until b is 0 (exponential: 1/e); 0: plain reflow"),
    anneal_schedule=dict(choices=SCHEDULES, help="how b falls"),
    guidance=dict(type=float, help="weight of the guidance loss; 0: naive distillation, in its own folder"),
    distance=dict(choices=DISTANCES, help="D of the distillation"),
    own_pairs=dict(type=int, help="number of pairs to make by the 2-flow and to distill; 0: the teacher's"),
    ref=dict(help="npz with mu and sigma, in place of the training images"),
    ckpt=dict(help="a ckpt.pt, EDM's .pkl or the authors' .pth [the one of distill]"),
    n=dict(type=int, help="number of images"),
    solver=dict(choices=SOLVERS, help="[one Euler step for a student, rk45 for other networks]"),
    npz=dict(help="file for all images: arr_0, uint8 [N, H, W, C]"),
)
RUN, TRAINING = ["dataset", "size", "out", "device"], ["steps", "batch", "lr"]
MAKE = [*RUN, "fresh", "seed", "data_dir"]
COMMANDS = dict(  # and their flags
    all=[*MAKE, "mirror", "pairs", "teacher", "student", "anneal", "anneal_schedule", "guidance", "distance",
         "own_pairs"],
    train=[*MAKE, "mirror", *TRAINING],
    pairs=[*MAKE, "pairs", "teacher"],
    reflow=[*MAKE, "student", "mirror", "anneal", "anneal_schedule", *TRAINING],
    distill=[*MAKE, "guidance", "distance", "own_pairs", *TRAINING],
    eval=[*RUN, "data_dir", "n", "ref"],
    sample=[*RUN, "seed", "ckpt", "n", "solver", "steps", "npz"],
)

def flag(name):
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""
    def error(self, message):
        raise Fault(f"{message}; see `{self.prog} --help`")

def parse(argv):
    """A command line as (command, values of the flags that are given)."""
    command, *rest = argv if argv and not argv[0].startswith("-") else ["all", *argv]
    if command not in COMMANDS:
        raise Fault(f"there is no command {command}; choose from {', '.join(COMMANDS)}")
    parser = Parser(prog=f"slimflow.py {command}", description=__doc__ if command == "all" else None,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name in COMMANDS[command]:
        parser.add_argument(flag(name), **FLAGS[name] | dict(help=help_text(command, name)))
    given, unknown = parser.parse_known_args(rest)
    if unknown:
        word = unknown[0].split("=")[0]
        takers = [other for other, names in COMMANDS.items() if word in map(flag, names)]
        whose = f"it is for {', '.join(takers)}" if takers else f"see `{parser.prog} --help`"
        raise Fault(f"{command} takes no {word}; {whose}")
    for name, value in vars(given).items():
        least = 0 if name in ("seed", "lr", "anneal", "guidance", "own_pairs") else 1
        if type(value) in (int, float) and not least <= value <= 1e9:
            raise Fault(f"{flag(name)} {value} is not a number from {least} to 10^9")
    return command, vars(given)

def help_text(command, name):
    """The help of a flag, with the presets' values."""
    values = [f"{dataset} {settings[name]}"
              for dataset, preset in PRESETS.items() for stage, settings in preset.settings.items()
              if command in (stage, "all") and settings.get(name) is not None]
    values = dict.fromkeys(values)  # once each, in this order
    return f"{FLAGS[name]['help']} [{', '.join(values)}]" if values else FLAGS[name]["help"]

def run_command(command, given):
    """Do what a command line asks for."""
    fresh = given.pop("fresh", False)
    dataset = given.get("dataset", "digits")
    if "size" in given and dataset != "pictures":
        raise Fault("--size is for --dataset pictures")
    preset = pictures(given["size"]) if "size" in given else PRESETS[dataset]
    fields = {name: given[name] for name in ("out", "device", "seed", "data_dir") if name in given}
    run = replace(preset, **fields)
    if run.dataset == "digits" and ("data_dir" in given or "ref" in given):
        raise Fault("--data-dir and --ref are not for the digits; name a data set with --dataset")
    if command == "sample":
        names = "ckpt", "n", "solver", "steps", "npz"
        return sample_images(run, **{name: given[name] for name in names if name in given})
    if command == "eval":
        return evaluate(run, given.get("n"), given.get("ref"))

    def given_to(stage):
        return {name: given[name] for name in given if name in defaults(run, stage)}

    student = "naive" if given.get("guidance") == 0 else "distill"
    with locked(run):
        if command == "all":
            stages = "train", "pairs", "reflow", student
            return run_all(run, {stage: given_to(stage) for stage in stages}, fresh)
        stage = student if command == "distill" else command
        if "data_dir" in given and stage != "train":  # then those of the teacher must be the same
            settle(run, "train", dict(data_dir=given["data_dir"]))
        if not run_stage(run, stage, fresh, **given_to(stage)):
            print(f"{stage} is finished, see {run.folder / stage}; --fresh starts it over")

@contextlib.contextmanager
def locked(run):
    """Only one command at a time works in a run's folder. A kill frees it too."""
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run.folder / ".lock", timeout=0) if RANK == 0 else contextlib.nullcontext():
            yield
    except Timeout:
        raise Fault(f"another run works in {run.folder}; wait for its end, or give another --out") from None

# ---- 8. Evaluation: distances between sets of images, sizes, pictures --------------------------------------
def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)); means [d], covariances [d, d], in float64."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (mu1, cov1, mu2, cov2))
    (a, u), (b, v) = torch.linalg.eigh(cov1), torch.linalg.eigh(cov2)
    A, B = u * a.clamp(min=0).sqrt(), v * b.clamp(min=0).sqrt()  # cov1 = A A^T, cov2 = B B^T
    # cov1 cov2 has the eigenvalues of (A^T B) (A^T B)^T, so their roots are the singular values of A^T B.
    root_trace = torch.linalg.svdvals(A.T @ B).sum()
    return ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * root_trace).item()

def moments(batches):
    """Mean [d] and covariance [d, d], in float64, of features [n, d] that come batch by batch."""
    n = total = squares = 0
    for x in batches:
        x = x.double()
        n, total, squares = n + len(x), total + x.sum(dim=0), squares + x.T @ x
    if n < 2:
        raise Fault("a distance needs at least 2 images on each side; give a larger --n")
    return total / n, (squares - total.outer(total) / n) / (n - 1)

def straightness(flow, noise, steps=20, y=None):
    """Mean of |x_1 - x_0 - v(x_t, t)|^2 over elements and Euler's path: 0 if all paths are straight lines."""
    path = torch.stack([x for _, x in euler(flow, noise, steps, y)])  # (steps + 1, B, ...)
    return (path[-1] - path[0] - (path[1:] - path[:-1]) * steps).square().mean().item()

def count_parameters(net):
    """Number of weights."""
    return sum(p.numel() for p in net.parameters())

@torch.no_grad()
def count_macs(net, shape):
    """Multiply-accumulates of all convolutions and linear layers for one image of shape (C, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode  # here and below: imported late, for a quick start
    with FlopCounterMode(display=False) as counter:
        velocity(net, torch.zeros(1, *shape, device=next(net.parameters()).device), 0.5)
    aten, flops = torch.ops.aten, counter.get_flop_counts()["Global"]  # bmm, in the attention, does not count
    return sum(flops.get(op, 0) for op in (aten.convolution, aten.addmm, aten.mm)) // 2

def digit_features(run, images, y, seed=0):
    """A function uint8 [n, 1, 8, 8] -> [n, 64]: features of a classifier trained on these digits."""
    seed_all(seed, "classifier, weights", 0)
    features = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1)]
    features += [nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64)]
    net = nn.Sequential(*features, nn.ReLU(), nn.Linear(64, 10)).to(run.device)
    schedule = Schedule(steps=600, lr=1e-3, warmup=0, decay=0.3, ema=0.99)

    def loss(net, step):
        data, labels = draw_batch(run, schedule.batch, (images, y))
        return F.cross_entropy(net(data + 0.1 * torch.randn_like(data)), labels)

    trained = fit(net, loss, schedule, seed, "classifier")[: len(features)]
    return lambda images: trained(to_float(images))

BY_HAND = f"(or put it into {torch.hub.get_dir()}/checkpoints)"

def inception_features(device):
    """A function uint8 [n, 3, H, W] -> [n, 2048]: FID's Inception features, by torch-fidelity."""
    package = import_package("torch_fidelity.feature_extractor_inceptionv3")
    with trying(f"use or download {package.URL_INCEPTION_V3} {BY_HAND}", "no network, or it is damaged"):
        net = package.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    return torch.no_grad()(lambda images: net(images)[0])

@cache
def lpips_network(device):
    """LPIPS with VGG, as the package `lpips` has it."""
    package = import_package("lpips")
    with trying(f"use or download torch's vgg16-397923af.pth {BY_HAND}", "no network, or it is damaged"):
        return package.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)

def generate(flow, noise, y, solver):
    """Images for any number of noises [N, C, H, W], SAMPLE_BATCH at a time: yields them as uint8."""
    report, done = progress("images", 0, len(noise), unit="images"), 0
    for z, c in zip(noise.split(SAMPLE_BATCH), y.split(SAMPLE_BATCH)):
        yield to_uint8(sample(flow, z, y=c, **solver)[0])
        done += len(z)
        report(done)

def measure_floor(real, n):
    """The distance that n images of a perfect generator would have from these real features [N, d].

    It is a bias, which falls as 1 / images. Half of the real ones against half has it too; scale that.
    """
    a, b = real.tensor_split(2)
    halves = [real[torch.randperm(len(real))].split([len(a), len(b)]) for _ in range(100)]
    between = np.mean([frechet_distance(*moments([a]), *moments([b])) for a, b in halves])
    return between * (1 / n + 1 / len(real)) / (1 / len(a) + 1 / len(b))

def distance_to_real(run, ref=None):
    """A function of a set of images, in batches: their distance to the real ones. And the digits' floor."""
    floor = None
    if run.dataset == "digits":  # half of them train the classifier, and the rest are compared with
        images, y = load_digits()
        features = digit_features(run, images[::2], y[::2])
        real = features(images[1::2].to(run.device))
        target, floor = moments([real]), measure_floor(real, run.n)
    else:
        features = inception_features(run.device)
        if ref:
            wanted = "it is no npz with mu [2048] and sigma [2048, 2048]"
            with trying(f"read {ref}", wanted), np.load(ref) as file:
                target = file["mu"].reshape(2048), file["sigma"].reshape(2048, 2048)
        else:
            images, _ = load_images(run, run.data_dir or remembered(run, "train").get("data_dir"))
            target = moments(features(x.to(run.device)) for x in images.split(SAMPLE_BATCH))

    def distance(batches):
        return frechet_distance(*moments(features(x.to(run.device)) for x in batches), *target)

    return distance, floor

def table_rows(run):
    """What the table compares, (name, network, solver). Says which networks are missing or unfinished."""
    rows = []
    stages = {"teacher": "train", "2-flow": "reflow", "naive": "naive", "guided": "distill"}
    for name, stage in stages.items():
        external = stage == "train" and remembered(run, "pairs").get("teacher")
        path = Path(external or run.folder / stage / "ckpt.pt")
        if not path.exists():
            print(f"{name} is left out: there is no {path}")
            continue
        if not external:
            done, steps = count_done(run, stage), remembered(run, stage)["steps"]
            if done < steps:
                print(f"{name} is unfinished: {done:,} of {steps:,} steps")
        flow = load_network(path, run.device)
        if name == "teacher":
            rows.append(("teacher, precise", flow, getattr(flow, "precise", run.precise)))
        rows.append((f"{name}, 1 step", flow, ONE_STEP))
    if not rows:
        raise Fault(f"{run.folder} holds no network; train {run.dataset} first, or name its --out")
    return rows

def images_of(run, flow, solver):
    """run.n images of a network, uint8, batch by batch; pairs, where they are enough, are the teacher's."""
    if solver == ONE_STEP or count_pairs(run, "pairs") < run.n:
        return generate(flow, *fixed_noise(run, run.n, seed=4321), solver)
    stored = load_pairs(run, "pairs")[1][: run.n]
    return (to_uint8(x.float()) for x in stored.split(SAMPLE_BATCH))

def evaluate(run, n=None, ref=None):
    """Print a table of the networks that are there, and draw summary.png: the same noise through each."""
    run = replace(run, n=n or run.n)
    rows = table_rows(run)
    metric = "Frechet" if run.dataset == "digits" else "FID"
    distance = floor = None
    try:
        distance, floor = distance_to_real(run, ref)
    except Fault as fault:
        if run.dataset in PAPERS:
            raise
        print(f"the table has no {metric}: {fault}")
    noise, y = fixed_noise(run, 12)
    table, images, labels = [("row", "parameters", "MACs", "evaluations", metric)], [], []
    for name, flow, solver in rows:
        value = f"{distance(images_of(run, flow, solver)):.2f}" if distance else "-"
        x, evaluations = sample(flow, noise, y=y, **solver)
        macs = f"{count_macs(flow, run.shape) / 1e6:,.1f}M"
        table.append((name, f"{count_parameters(flow):,}", macs, evaluations, value))
        images.append(x)
        labels.append(f"{name}\n{metric} {value}" if distance else name)
    if floor is not None:
        table.append(("floor", "", "", "", f"{floor:.2f}"))
    print_table(table)
    save_pictures(run.folder / "summary.png", torch.cat(images), 12, labels)
    print(f"distances of {run.n:,} images (those of other numbers differ); see {run.folder / 'summary.png'}")

def print_table(rows):
    """Rows of cells in aligned columns, the first to the left, the others to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for first, *rest in rows:
        print(f"{first:<{widths[0]}}", *(f"{x:>{width}}" for x, width in zip(rest, widths[1:])), sep="  ")

def save_pictures(path, images, columns=8, labels=()):
    """A PNG of images [N, C, H, W] in [-1, 1] side by side, small ones enlarged; a label beside each row."""
    from matplotlib.figure import Figure
    x = F.interpolate(to_uint8(images.float().cpu()), scale_factor=max(1, 64 // images.shape[-1]))
    picture = import_package("torchvision.utils").make_grid(x, columns, 4, pad_value=255).permute(1, 2, 0)
    height, width = picture.shape[:2]
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1), frame_on=False, xticks=[])
    axes.imshow(picture.numpy())
    # A label stands in the middle of each row.
    axes.set_yticks([(i + 0.5) * height / len(labels) for i in range(len(labels))], labels)
    axes.tick_params(length=0, labelsize=9)
    save_file(path, partial(figure.savefig, format="png", bbox_inches="tight", pad_inches=0.05))

def sample_images(run, ckpt=None, n=64, solver=None, steps=None, npz=None):
    """Write n images of a network to the file npz, if named, and up to 64 of them to samples.png."""
    path = Path(ckpt or run.folder / "distill/ckpt.pt")
    if not path.exists():
        raise Fault(f"{path} is not there; distill {run.dataset} first, or name a file with --ckpt")
    flow = load_network(path, run.device)
    if solver is None:
        solver = "euler" if flow.stage in ("distill", "naive") else "rk45"
        print(f"{path} is taken for a network of stage {flow.stage}: --solver {solver}")
    options = dict(solver=solver)
    if steps and solver == "rk45":
        raise Fault("rk45 chooses its own steps; give --solver euler or adams with --steps")
    if steps:
        options["steps"] = steps
    seed_all(run.seed, "sample", 0)
    channels, size, classes = (flow.config[key] for key in ("channels", "resolution", "label_dim"))
    noise = torch.randn(n, channels, size, size).to(run.device)
    y = torch.randint(max(1, classes), (n,)).to(run.device)
    images = torch.cat([x.cpu() for x in generate(flow, noise, y, options)])
    if npz:
        save_file(npz, lambda file: np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy()))
    save_pictures("samples.png", to_float(images[:64]))
    print(f"{n} images, up to 64 of them in samples.png{f', all in {npz}' if npz else ''}")

# ---- 9. Other people's files: weights are read, and nothing in a file is executed --------------------------
def load_network(path, device="cpu"):
    """The network of any file: EDM's .pkl, the authors' .pth, or a ckpt.pt of ours; its `stage` is set."""
    load = {".pkl": load_edm, ".pth": load_slimflow_official}.get(Path(path).suffix, load_flow)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of old files is not for the user
        return load(path, device)

class EDMTeacher(nn.Module):
    """EDM's denoiser D(x; sigma), a preconditioned UNet; called, it is the same model's flow v(x, t)."""
    stage, precise = "train", dict(solver="adams", steps=36)  # in place of the run's

    def __init__(self, net):
        super().__init__()
        self.net, self.config = net, net.config

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

def load_edm(path, device="cpu"):
    """The EMA network of a .pkl of NVIDIA's EDM (DDPM++ or ADM), frozen; the source code in it is not run."""
    with trying(f"read {path} as a network of EDM's", "it is damaged or something else"):
        with open(path, "rb") as file:
            outer = InertUnpickler(file).load()["ema"]
        if outer["class_name"] != "EDMPrecond" or outer["sigma_data"] != 0.5:
            raise Fault(f"{path} is a network with {outer['class_name']!r}; only EDMPrecond can be used")
        inner = outer["_modules"]["model"]
        given, weights = inner["_init_kwargs"], weights_of(inner)
        if given.get("encoder_type", "standard") != "standard":
            raise Fault(f"{path} is an NCSN++ (-ve) of EDM's; take the same network with -vp in its name")
        like = dict(SongUNet=cifar10, DhariwalUNet=imagenet64)[inner["class_name"]]  # EDM's defaults
        config = {name: given.get(name, value) for name, value in like.networks["teacher"].items()}
        config |= dict(resolution=given["img_resolution"], channels=given["in_channels"],
                       label_dim=given.get("label_dim", 0), time_scale=1.0)  # its time is ln(sigma) / 4
        weights.pop("map_augment.weight", None)  # of EDM's augmentation, not used for sampling
        return EDMTeacher(build(config, device, weights))

def load_slimflow_official(path, device="cpu"):
    """The EMA network of a .pth of the authors, in the first layout that fits: a student, or their 1-flow."""
    # Their optimizer's learning rate is a number of numpy's, which this function rebuilds.
    scalar = np.float64(0).__reduce__()[0]
    allowed = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # numpy 1, numpy 2
    allowed += [np.dtype, type(np.dtype("f8"))]
    with trying(f"read {path} as a network of SlimFlow's authors", "it is damaged or something else"):
        with torch.serialization.safe_globals(allowed):
            tensors = torch.load(path, map_location="cpu", weights_only=True)["ema"]["shadow_params"]
        layouts = [layout for preset in (cifar10, ffhq64, imagenet64) for layout in preset.networks.items()]
        for size, config in layouts:
            try:
                weights = official_weights(config, tensors)
            except (RuntimeError, StopIteration, ValueError):  # another layout
                continue
            net = build(config, device, weights)
            net.stage = "train" if size == "teacher" else "distill"
            return net
        raise ValueError("an unknown layout")

def official_weights(config, tensors):
    """Weights for a UNet from the authors' tensors, which come in the order in which ours are applied."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in UNet(**config).named_parameters()}
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

def main(argv=None):
    """Run the command line; return its exit status. What the user must mend is one line on stderr, and 2."""
    try:
        command, given = parse(sys.argv[1:] if argv is None else argv)
        if WORLD > 1:
            if command in ("eval", "sample"):
                raise Fault(f"{command} is for one process; run it without torchrun")
            dist.init_process_group(timeout=timedelta(days=1))  # images may be decoded meanwhile
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            if RANK > 0:  # only the first prints
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        run_command(command, given)
        if WORLD > 1:
            dist.destroy_process_group()
        return 0
    except Fault as fault:
        message = str(fault)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):  # on CPU or GPU
            raise
        message = "the memory is full; use a smaller --batch, --n or --student, or more GPUs"
    except KeyboardInterrupt:
        message = "interrupted; the same command, without --fresh, goes on from what was saved, if anything"
    print("slimflow:", message.replace("\n", " "), file=sys.stderr)
    return 2

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for names that the terminal's encoding lacks
    sys.exit(main())
