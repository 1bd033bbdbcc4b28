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
  bench    speed of each stage on this machine
"""

import argparse
import contextlib
import copy
import importlib
import io
import itertools
import json
import math
import os
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class Fault(Exception):
    """Something that only the user can mend: the command line prints it as one line, with status 2."""

# ---- 1. Flow: the straight path, its loss, annealing, distillation, guidance -------------------------------
T0 = 1e-3  # t is trained on [T0, 1] and the ODE starts at T0, as in the authors' code
SCHEDULES = {  # b of annealing reflow, by u = step / horizon
    "linear": lambda u: max(0.0, 1 - u),
    "cosine": lambda u: (1 + math.cos(math.pi * min(1.0, u))) / 2,
    "exponential": lambda u: math.exp(-u),
}

def interpolate(noise, data, t):
    """The point x_t = (1 - t) z + t x of the straight path; noise z and data x [B, ...], t [B]."""
    t = t.reshape(-1, *[1] * (data.ndim - 1))
    return (1 - t) * noise + t * data

def rectified_flow_loss(flow, noise, data, y=None, t=None):
    """Mean of |x - z - v(x_t, t)|^2 over all elements, t ~ U(T0, 1) if None; least at v = E[x - z | x_t]."""
    if t is None:
        t = T0 + (1 - T0) * torch.rand(len(noise), device=noise.device)
    return (data - noise - flow(interpolate(noise, data, t), t, y)).square().mean()

def anneal_beta(step, horizon, schedule="linear"):
    """b of annealing reflow by the authors' schedules: 1 at step 0, 0 at `horizon` (exponential: 1/e)."""
    return SCHEDULES[schedule](step / horizon if horizon else math.inf)

def annealed_noise(noise, beta):
    """z' = sqrt(1 - b^2) z + b e with fresh e ~ N(0, I): N(0, I) for every b, from z (b = 0) to e (b = 1)."""
    return math.sqrt(1 - beta**2) * noise + beta * torch.randn_like(noise)

def velocity(flow, x, t, y=None):
    """v(x, t) at one time t for the whole batch x [B, ...]."""
    return flow(x, x.new_full((len(x),), t), y)

def one_step(flow, noise, y=None):
    """z + v(z, T0): the whole ODE in one Euler step, exact where the paths are straight."""
    return noise + velocity(flow, noise, T0, y)

def last_step(flow, middle, t, y=None):
    """m + (1 - t) v(m, t): the Euler step from m at time t [B] to the data."""
    return middle + (1 - t).reshape(-1, *[1] * (middle.ndim - 1)) * flow(middle, t, y)

def two_step(flow, noise, t, y=None):
    """Two Euler steps of one flow, which meet at t [B]: what the paper's equation guides by."""
    return last_step(flow, interpolate(noise, one_step(flow, noise, y), t), t, y)

def distillation_loss(student, noise, data, distance, y=None):
    """Mean of D(z + s(z, T0), x) over stored pairs; x is the precise end of the ODE that starts in z."""
    return distance(one_step(student, noise, y), data).mean()

def guidance_loss(student, flow, noise, distance, t=None, y=None):
    """Mean of D(z + s(z, T0), X) over fresh noise z, with t ~ U(0.2, 0.8) if None, as the authors run it.

    From m = z + t s(z, T0) on the student's own straight line the frozen 2-flow takes the second step, to
    X = m + (1 - t) v(m, t), without gradient. With l2 the loss is (1 - t)^2 |v(m, t) - s|^2 and its gradient
    that of (1 - t) |v - s|^2 with v held fixed: along its line the student's velocity should be the 2-flow's.
    """
    if t is None:
        t = 0.2 + 0.6 * torch.rand(len(noise), device=noise.device)
    image = one_step(student, noise, y)
    with torch.no_grad():
        middle = interpolate(noise, image, t)
        target = last_step(flow, middle, t, y)
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
def euler(flow, noise, steps, y=None):
    """Order 1, `steps` evaluations: x += v(x, t_i) / N at t_i = T0 + i/N (1 - T0), as the authors run it."""
    x = noise
    yield T0, x
    for i in range(steps):
        x = x + velocity(flow, x, T0 + i / steps * (1 - T0), y) / steps
        yield T0 + (i + 1) / steps * (1 - T0), x

@torch.no_grad()
def heun(flow, noise, steps, y=None):
    """Order 2, `2 steps - 1` evaluations: trapezoidal rule on a uniform grid; the last step is Euler's."""
    x, grid = noise, np.linspace(T0, 1, steps + 1).tolist()
    yield T0, x
    for t, t_next in itertools.pairwise(grid):
        v = velocity(flow, x, t, y)
        if t_next < 1:
            v = (v + velocity(flow, x + (t_next - t) * v, t_next, y)) / 2
        x = x + (t_next - t) * v
        yield t_next, x

@torch.no_grad()
def adams(flow, noise, steps, y=None):
    """Order 3, `steps` evaluations: a multistep method, Adams' predictor and corrector (PEC).

    A parabola through the last three velocities is integrated over the step behind, to correct x by what is
    known now, and over the step ahead, to guess where to evaluate next. The grid is dense near the data.
    """
    grid = (T0 + (1 - T0) * np.sin(np.linspace(0, np.pi / 2, steps + 1))).tolist()
    x, guess, known = noise, noise, []
    for t_before, t, t_next in zip([T0, *grid], grid, grid[1:]):
        known = [*known, (t, velocity(flow, guess, t, y))][-3:]
        x = x + _integral(known, t_before, t)
        yield t, x
        guess = x + _integral(known, t, t_next)
    yield 1.0, guess

def _integral(known, a, b):
    """Integral from a to b of the polynomial in t through the known [(t, velocity), ...]: a weighted sum."""
    origin, degree = known[-1][0], np.arange(1, len(known) + 1)
    powers = np.vander([t - origin for t, _ in known], increasing=True).T  # (degree, node)
    integrals = ((b - origin) ** degree - (a - origin) ** degree) / degree
    weights = np.linalg.solve(powers, integrals).tolist()
    return sum(w * v for w, (_, v) in zip(weights, known))

# Dormand and Prince: the weights of the stages (a row's sum is its time, the last row the step), of the error
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
            t, x, v = (1.0 if h == 1 - t else t + h), x_new, stages[-1]  # the last stage is the next first
            yield t, x
        elif h < 1e-9:
            raise Fault(f"the ODE cannot be solved past t = {t:.4f}: the velocity is not finite there")
        # For an error of NaN this order makes it 0.2: max(nan, 1e-9) is nan, and max(0.2, nan) is 0.2.
        h *= min(8.0, max(0.2, 0.9 * max(error, 1e-9) ** -0.2))

SOLVERS = {"euler": euler, "heun": heun, "adams": adams, "rk45": rk45}
ONE_STEP = dict(solver="euler", steps=1)
SAMPLE_BATCH = 100  # images that a solver takes at once

def sample(flow, noise, solver="rk45", y=None, **options):
    """Run a solver to its end: images [B, ...], and how many evaluations they took. Fault if not finite."""
    calls = []
    def counted(x, t, y):
        calls.append(t)
        return flow(x, t, y)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):  # too coarse for RK45
        for _, x in SOLVERS[solver](counted, noise, y=y, **options):  # noqa: B007
            pass
    if not x.isfinite().all():
        raise Fault(f"the images of {solver} are not finite; take another solver, or another network")
    return x, len(calls)

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
            h = shift + self.norm1(h) * (scale + 1)
        else:
            h = self.norm1(h + emb)
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        x = (self.skip(self._resampled(x)) + h) * self.gain
        if self.attention:
            x = (self.proj(self._attended(self.qkv(self.norm2(x)))) + x) * self.gain
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
    """Velocity network v(x, t, y), of kind "ddpm++" or "adm", with EDM's parameter names: its weights load.

    Level i has half the resolution of the one before, channel_mult[i] * model_channels channels, num_blocks
    residual blocks (one more in the decoder), and self-attention if at attn_resolutions. label_dim is the
    number of classes, or 0. Time t in [0, 1] enters its sinusoids as time_scale * t.
    """
    def __init__(self, resolution, channels, model_channels, channel_mult, num_blocks, attn_resolutions,
                 label_dim=0, dropout=0.0, kind="ddpm++", time_scale=999.0):
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.kind, self.model_channels = kind, model_channels
        self.label_dim, self.time_scale = label_dim, time_scale
        adm, c, c_emb, skips = kind == "adm", model_channels, 4 * model_channels, []
        sizes = [resolution >> level for level in range(len(channel_mult))]
        levels = [(f"{n}x{n}", n in attn_resolutions, c * mult) for n, mult in zip(sizes, channel_mult)]
        block = partial(Block, c_emb=c_emb, kind=kind, dropout=dropout)
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
            none = emb.new_zeros(len(t), self.label_dim)
            one_hot = none if y is None else none.scatter(1, y[:, None], 1.0)
            label = self.map_label(one_hot if adm else one_hot * math.sqrt(self.label_dim))
        emb = F.silu(self.map_layer0(emb if adm else emb + label))
        return F.silu(self.map_layer1(emb) + (label if adm else 0.0))

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

# ---- 4. Training: one loop for every stage, on one device or, under torchrun, on many ----------------------
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # processes; torchrun sets it, and which of them this is
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0
LOCAL = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this host
barrier = dist.barrier if WORLD > 1 else lambda: None  # waits for the other processes
SAVE_EVERY = 60.0  # seconds between checkpoints

def flag(help, commands, default=MISSING, choices=None, least=1):
    """A dataclass field that is also a flag of these commands; its choices, or the least number."""
    return field(default=default, metadata=dict(help=help, commands=commands, choices=choices, least=least))

@dataclass(frozen=True)
class Schedule:
    """How one network is trained: Adam, gradients clipped at norm 1. The defaults are the authors'."""
    steps: int = flag("steps of the stage, or of sample's solver", "train reflow distill sample", 800_000)
    batch: int = flag("images per step", "train reflow distill", 128)
    lr: float = flag("Adam's learning rate", "train reflow distill", 2e-4, least=0)
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

def fit(net, loss_fn, schedule, seed=0, stage="fit", folder=None, picture=None, settings=None):
    """Minimise loss_fn(net, step), a batch's mean; return the averaged (EMA) network, frozen, in eval mode.

    A folder keeps the run once a minute: ckpt.pt, log.csv and, from picture(ema) -> images, samples.png. The
    same call goes on from there, on a CPU bit for bit as if it had never stopped. Fault if that was made with
    other `settings` (a dict of what shapes the loss), or if loss or gradient is not finite; the file stays.
    """
    device, path = next(net.parameters()).device, folder and Path(folder) / "ckpt.pt"
    settings = dict(settings or {}, seed=seed, batch=schedule.batch, network=getattr(net, "config", None))
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=schedule.lr, fused=True)
    start, rows = 0, []  # rows of the log: step, mean loss and gradient norm since the row before
    if path and path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        refuse_other_settings(path, state["settings"], settings)
        start, rows = state["step"], state["rows"]
        for name, part in dict(net=net, ema=ema, optimizer=optimizer).items():
            part.load_state_dict(state[name])
        print(f"{stage:<10} goes on from step {start:,} of {path}")
    model = nn.parallel.DistributedDataParallel(net.train()) if WORLD > 1 else net.train()
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    report = progress(stage, start, schedule.steps, schedule.batch)
    sums, saved = torch.zeros(2, device=device), time.monotonic()
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
            rate = min(schedule.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - rate)
            sums += torch.stack([loss, norm])
        done, last = step + 1, step + 1 == schedule.steps
        if last or done in (1, 10) or done % 50 == 0:  # only here the loop waits for the device
            if WORLD > 1:
                dist.all_reduce(sums)
            before = rows[-1][0] if rows else 0
            rows.append((done, *(sums / WORLD / (done - before)).tolist()))
            sums.zero_()
            if not math.isfinite(sum(rows[-1])):
                raise Fault(f"{stage}: loss or gradient not finite after step {before:,}; try a lower --lr")
            if path and RANK == 0 and (last or time.monotonic() - saved > SAVE_EVERY):
                state = dict(net=net.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
                state |= dict(stage=stage, step=done, schedule=vars(schedule), settings=settings, rows=rows)
                table = dict(fmt="%.6g", delimiter=",", comments="", header="step,loss,grad_norm")
                save_file(path.with_name("log.csv"), partial(np.savetxt, X=rows, **table))
                if picture:
                    save_pictures(path.with_name("samples.png"), picture(ema))
                save_file(path, partial(torch.save, state))  # last: a finished stage is not run again
                saved = time.monotonic()
        report(done, f"loss {rows[-1][1]:.4f}" if rows else "")
    return ema

def progress(name, start, total, images=1, unit="steps"):
    """A function (done, note): one live line with speed and time left; off a terminal, a line every 10 s."""
    live, began, shown = sys.stdout.isatty(), time.monotonic(), time.monotonic()
    def report(done, note=""):
        nonlocal shown
        now, last = time.monotonic(), done == total
        if last or now - shown > (0.2 if live else 10):
            shown, pace = now, (now - began) / (done - start) + 1e-9  # seconds per unit
            seconds = timedelta(seconds=round(now - began if last else (total - done) * pace))
            left = f"took {seconds}" if last else f"{seconds} left"
            line = f"{name:<10} {done:,}/{total:,} {unit}  {note}  {images / pace:,.0f} images/s  {left}"
            print(f"{line:<79.79}", end="\r" if live and not last else "\n", flush=True)
    return report

def save_file(path, write):
    """Write a file whole or not at all: write(file) fills memory, then a temporary file takes its place."""
    memory, temporary = io.BytesIO(), Path(f"{path}.tmp")
    write(memory)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(memory.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Fault(f"cannot write {path}: {error.strerror}; what was there is kept") from error

@contextlib.contextmanager
def reading(path, what):
    """Turn whatever a damaged or foreign file causes into a Fault that names it."""
    try:
        yield
    except Exception as error:  # what the system says of a file, with its name, is clear
        if isinstance(error, (Fault, torch.OutOfMemoryError)) or getattr(error, "filename", None):
            raise
        raise Fault(f"{path} is damaged or no {what}; replace it, remove it, or name another") from error

def refuse_other_settings(path, made, wanted):
    """Raise Fault where a file was made with other settings than those wanted."""
    other = [f"{name} {made[name]}" for name in wanted if name in made and made[name] != wanted[name]]
    if other:
        raise Fault(f"{path} was made with {', '.join(other)}; use the same, --fresh or another --out")

def build(config, device, weights=None):
    """A UNet, random or with exactly these weights and frozen, in the fastest form measured on its device."""
    net = UNet(**config)
    if weights:
        net.load_state_dict(weights)
        net.eval().requires_grad_(False)
    tiny, cuda = config["resolution"] <= 8, torch.device(device).type == "cuda"
    if cuda and not tiny:
        torch._dynamo.config.recompile_limit = 32  # of all networks; training has one batch size
        net.compile(dynamic=None if weights else False)
    return net.to(device, memory_format=torch.contiguous_format if tiny or cuda else torch.channels_last)

def load_flow(path, device="cpu"):
    """The averaged network of a ckpt.pt, frozen, in eval mode; its `stage` is the one that made it."""
    with reading(path, "checkpoint of slimflow's"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        flow = build(state["settings"]["network"], device, state["ema"])
        flow.stage = state["stage"]
        return flow

# ---- 5. Stages: train -> pairs -> reflow -> distill, each from the files of the one before -----------------
RUNS = "all train pairs reflow distill"  # the commands that run stages
COMMANDS, DATASETS = f"{RUNS} sample eval bench", ("digits", "cifar10", "ffhq64", "imagenet64")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

@dataclass(frozen=True, kw_only=True)
class Run:
    """A preset (Section 9) with what the command line asks for. A field with a help text is a flag."""
    dataset: str = flag("preset; below, [ ] has the values of the presets", COMMANDS, "digits", DATASETS)
    shape: tuple  # of an image, (C, H, W)
    label_dim: int = 0  # number of classes, 0 if unconditional
    networks: dict  # arguments of `UNet` for "teacher" and for each student's size
    student: str = flag("size of the student, such as 15.7M", f"{RUNS} bench")
    teacher: str | None = flag("EDM's .pkl or a ckpt.pt, in place of train", "all pairs reflow distill", None)
    train: Schedule
    reflow: Schedule
    distill: Schedule
    pairs: int = flag("how many pairs (noise, data) to make", RUNS)
    pair_solver: dict  # which makes them: arguments of `sample`
    mirror: bool = True  # half of reflow's batches; False for what has a left and a right, as digits
    anneal: int = flag("K, the step at which b is 0; 0: plain reflow", "all reflow distill", least=0)
    anneal_schedule: str = flag("exponential is exp(-step/K), for a small K; authors: 300000, 100000, 50000",
                                "all reflow distill", "linear", tuple(SCHEDULES))
    targets: str = flag("whose pairs are distilled", "all distill", choices=("2-flow", "teacher"))
    guidance: float = flag("weight of the guidance loss; 0: naive distillation", "all distill", 1.0, least=0)
    distance: str = flag("D of the distillation", "all distill bench", choices=tuple(DISTANCES))
    seed: int = flag("of all random numbers", f"{RUNS} sample", 0, least=0)
    out: str = flag("folder of <dataset>/<stage>/", f"{RUNS} sample eval", "runs")
    data_dir: str | None = flag("folder of the images; else data/<dataset>", f"{RUNS} eval", None)
    device: str = flag("where to compute", COMMANDS, DEVICES[-1], DEVICES)
    fresh: bool = flag("start this stage over; its folder, and those after it, are renamed", RUNS, False)
    ckpt: str | None = flag("a ckpt.pt, EDM's .pkl or the authors' .pth; else distill's", "sample", None)
    n: int = flag("how many images; sample: 64", "sample eval")
    solver: str | None = flag("else one step if distilled, rk45 if not", "sample", None, tuple(SOLVERS))
    npz: str | None = flag("file for all images: arr_0, uint8 [N, H, W, C]", "sample", None)
    ref: str | None = flag("npz with mu and sigma, in place of the training images", "eval", None)
    @property
    def folder(self):  # of the stages' folders
        return Path(self.out) / self.dataset
    @property
    def naive(self):  # as distill, without guidance, at equal cost: 3 forward passes a step, a guided one 7
        return replace(self.distill, steps=self.distill.steps * 7 // 3)

def train(run):
    """Stage 1: the teacher, a rectified flow on independent noise and data."""
    stored = load_images(run)

    def loss(flow, step):
        images, y = draw_batch(run, run.train, stored)
        data = to_float(images)
        return rectified_flow_loss(flow, torch.randn_like(data), data, y)

    fit_stage(run, "train", run.networks["teacher"], loss, dict(solver="heun", steps=8), {})

def pairs(run):
    """Stage 2: the teacher's ODE from each z to its x."""
    path = run.teacher or run.folder / "train/ckpt.pt"
    teacher = load_network(path, run.device)
    channels, size, classes = (teacher.config[name] for name in ("channels", "resolution", "label_dim"))
    if (channels, size, size, classes) != (*run.shape, run.label_dim):
        raise Fault(f"{path} makes {size}x{size} images of {classes} classes, not {run.dataset}'s")
    write_pairs(run, "pairs", teacher)

def reflow(run):
    """Stage 3: annealing reflow, from random weights to a small 2-rectified flow."""
    stored = load_pairs(run, "pairs")

    def loss(student, step):
        noise, data, y = draw_batch(run, run.reflow, stored)
        if run.mirror and torch.rand(()) < 0.5:  # one coin a batch, as the authors
            noise, data = noise.flip(-1), data.flip(-1)
        beta = anneal_beta(step, run.anneal, run.anneal_schedule)
        return rectified_flow_loss(student, annealed_noise(noise, beta), data, y)

    settings = dict(student=run.student, anneal=run.anneal, anneal_schedule=run.anneal_schedule)
    fit_stage(run, "reflow", run.networks[run.student], loss, ONE_STEP, settings)

def distill(run, stage="distill"):
    """Stage 4: flow-guided distillation, from the 2-flow's weights; stage "naive" leaves out the guidance."""
    flow = load_flow(run.folder / "reflow/ckpt.pt", run.device)
    if run.targets == "2-flow" and stage == "distill":  # its own: poster; the authors' README: teacher's
        write_pairs(run, "distill", flow)
    stored = load_pairs(run, "distill" if run.targets == "2-flow" else "pairs")
    distance = DISTANCES[run.distance]
    def loss(student, step):
        noise, data, y = draw_batch(run, run.distill, stored)
        value = distillation_loss(student, noise, data, distance, y)
        if stage == "distill" and run.guidance:  # on as much fresh noise; the authors guide by raw weights
            value += run.guidance * guidance_loss(student, flow, torch.randn_like(noise), distance, y=y)
        return value

    settings = dict(distance=run.distance, targets=run.targets)
    settings |= dict(guidance=run.guidance) if stage == "distill" else {}
    fit_stage(run, stage, flow.config, loss, ONE_STEP, settings, start=flow)

def fit_stage(run, stage, config, loss_fn, solver, settings, start=None):
    """`fit` by the run's schedule, from random weights or those of `start`; pictures by the solver."""
    seed_all(run.seed, f"{stage}, weights", 0)
    net = build(config, run.device)
    if start:
        net.load_state_dict(start.state_dict())
    noise, y = fixed_noise(run)
    fit(net, loss_fn, getattr(run, stage), run.seed, stage, run.folder / stage,
        lambda flow: sample(flow, noise, y=y, **solver)[0], settings)

def fixed_noise(run, n=64, seed=1234):
    """The same noise [n, C, H, W] every time, and classes for it (or None)."""
    noise = torch.randn(n, *run.shape, generator=torch.Generator().manual_seed(seed)).to(run.device)
    return noise, torch.arange(n, device=run.device) % run.label_dim if run.label_dim else None

def draw_batch(run, schedule, tensors):
    """A random batch of rows of each tensor (or None), on the device; each process draws its share."""
    i = torch.randint(len(tensors[0]), (schedule.batch // WORLD,))
    rows = [x if x is None else x[i.to(x.device, non_blocking=True)] for x in tensors]
    if run.device == "cuda":  # from pinned memory, so that the loop runs ahead of the GPU
        rows = [x if x is None or x.is_cuda else x.pin_memory().to("cuda", non_blocking=True) for x in rows]
    return [x.float() if x is not None and x.dtype == torch.float16 else x for x in rows]

def resident(run, tensors):
    """The tensors on a CUDA device if they take at most a quarter of its memory, else where they are."""
    room = torch.cuda.get_device_properties("cuda").total_memory / 4 if run.device == "cuda" else -1
    fits = sum(x.nbytes for x in tensors if x is not None) <= room
    return [x.cuda() if fits and x is not None else x for x in tensors]

def write_pairs(run, stage, flow):
    """Fill <stage>/pairs.npy: noise z, data x at the end of the flow's ODE, class (or -1), evaluations (nfe).

    The file is memory-mapped and filled in place by the processes of the first host. nfe = 0 is still to do:
    an interrupted run goes on. pairs.json notes how: by the preset's solver, for EDM's networks by `adams`.
    """
    path, note = run.folder / stage / "pairs.npy", run.folder / stage / "pairs.json"
    solver = dict(solver="adams", steps=36) if isinstance(flow, EDMTeacher) else run.pair_solver
    settings = dict(pairs=run.pairs, seed=run.seed, solver=solver)
    settings |= dict(teacher=run.teacher) if stage == "pairs" else {}
    if RANK == 0 and not path.exists():
        save_file(note, lambda file: file.write(json.dumps(settings).encode()))
        row = [("noise", "f2", run.shape), ("data", "f2", run.shape), ("y", "i8"), ("nfe", "i8")]
        new_rows(path, row, run.pairs)
    barrier()
    refuse_other_settings(path, json.loads(note.read_text()), settings)
    rows = np.load(path, mmap_mode="r+")
    starts = range(0, run.pairs, SAMPLE_BATCH)[RANK::LOCAL] if RANK < LOCAL else ()
    todo = [start for start in starts if not rows["nfe"][start : start + SAMPLE_BATCH].all()]
    report = progress("pairs", 0, len(todo), min(SAMPLE_BATCH, run.pairs) * LOCAL, "batches")
    for done, start in enumerate(todo):
        batch = rows[start : start + SAMPLE_BATCH]
        seed_all(run.seed, f"{stage}, pairs", start)
        noise = torch.randn(len(batch), *run.shape).half()
        y = torch.randint(run.label_dim, (len(batch),)).to(run.device) if run.label_dim else None
        data, nfe = sample(flow, noise.to(run.device).float(), y=y, **solver)
        batch["noise"], batch["data"], batch["y"] = noise, data.cpu(), -1 if y is None else y.cpu()
        batch["nfe"] = nfe  # last: the batch is done
        report(done + 1, f"{nfe} evaluations each")
    barrier()
    if RANK == 0:
        save_pictures(run.folder / stage / "samples.png", torch.from_numpy(rows["data"][:64].astype("f4")))

def load_pairs(run, stage):
    """Noise and data, float16 [N, C, H, W], and classes, int64 [N] or None: on the GPU if they fit there."""
    rows = np.load(run.folder / stage / "pairs.npy", mmap_mode="c")
    noise, data, y = (torch.from_numpy(rows[name]) for name in ("noise", "data", "y"))
    return resident(run, [noise, data, y if run.label_dim else None])

def new_rows(path, columns, n):
    """A memory-mapped .npy file of n rows, its room reserved: on a full disk, writing to a map would kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        rows = np.lib.format.open_memmap(path, "w+", columns, (n,))
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise Fault(f"no room for {n:,} rows in {path}: {error.strerror}") from error
    return rows

STAGES = dict(train=train, pairs=pairs, reflow=reflow, distill=distill, naive=partial(distill, stage="naive"))

def status(run, stage):
    """Steps (or pairs) that a stage has done, its schedule and its settings; without a file none."""
    path = run.folder / stage / ("pairs.npy" if stage == "pairs" else "ckpt.pt")
    if not path.exists():
        return 0, dict(steps=1), {}
    with reading(path, "file of this stage"):
        if stage == "pairs":
            nfe = np.load(path, mmap_mode="r")["nfe"]
            made = json.loads(path.with_suffix(".json").read_text())
            return np.count_nonzero(nfe), dict(steps=len(nfe)), made
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads no weights
        return state["step"], state["schedule"], state["settings"]

def run_stages(run, command, given):
    """Run a stage and those before it, where not finished; Fault if a file was not made as `given`."""
    if not (run.teacher or command == "train" or (run.fresh and command in ("all", "pairs"))):
        run = replace(run, teacher=status(run, "pairs")[2].get("teacher"))  # whoever made the pairs
    names, last = list(STAGES)[bool(run.teacher) :], "distill" if command == "all" else command
    anew = names[0 if command == "all" else names.index(command) :] if run.fresh else []
    todo, finished = [], False
    for stage in reversed(names[: names.index(last) + 1]):
        done, schedule, made = (0, dict(steps=1), {}) if stage in anew else status(run, stage)
        asked = getattr(given.get(stage), "__dict__", {})  # of a Schedule
        refuse_other_settings(run.folder / stage, made, given | asked)
        finished = finished or done >= asked.get("steps", schedule["steps"])
        todo = todo if finished else [stage, *todo]
        if done and stage not in ("pairs", "naive", *given):  # it goes on as it began
            run = replace(run, **{stage: Schedule(**schedule)})
        run = replace(run, **{k: made[k] for k in ("guidance", "distance", "targets") if k in made})
    if command == "all" and run.dataset == "digits" and run.guidance:
        todo += ["naive"] if "naive" in anew or status(run, "naive")[0] < run.naive.steps else []
    if "distill" in todo and run.distance == "lpips":  # what can fail should fail before days of work
        lpips_network(run.device)
    if command == "all" and run.dataset != "digits" and WORLD == 1:
        inception_features(run.device)
    if RANK == 0 and "train" in todo:
        load_images(run)  # also makes the files for all processes
    for folder in [run.folder / stage for stage in anew if RANK == 0 and (run.folder / stage).exists()]:
        print(f"{folder} is now", folder.rename(f"{folder}.{time.strftime('%Y%m%d-%H%M%S')}"))
    if not todo:
        print(f"{last} is finished, see {run.folder / last}; --fresh starts it over")
    elif RANK == 0:
        plan = " -> ".join(f"{stage} ({timedelta(seconds=round(speed(run, stage)[1]))})" for stage in todo)
        print(f"plan, with rough estimates: {plan}, into {run.folder}, on {WORLD} x {run.device}", flush=True)
    barrier()
    for stage in todo:
        STAGES[stage](run)
        barrier()
    if command == "all" and WORLD == 1:
        evaluate(run)

# ---- 6. Data: images are uint8 until a batch is drawn ------------------------------------------------------
def to_float(images):
    """uint8 0..255 to float -1..1."""
    return images.float() / 127.5 - 1

def to_uint8(x):
    """Float -1..1 to uint8 0..255, clipped."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)

def load_images(run):
    """All training images, uint8 [N, C, H, W], and their labels, int64 [N] (or None)."""
    folder = Path(run.data_dir or f"data/{run.dataset}")
    if run.dataset == "digits":  # 1,797 scans of 8x8 pixels, beside this file
        path = Path(__file__).with_name("digits.npz")
        with reading(path, "digits.npz of slimflow's"), np.load(path) as file:
            images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"].astype("i8"))
    elif run.dataset == "cifar10":  # torchvision checks the archive's MD5 sum
        dataset = import_optional("torchvision.datasets").CIFAR10
        data = downloaded(partial(dataset, folder, train=True, download=True), dataset.url, folder)
        images, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), None
    else:
        images, labels = load_folder(run, folder)
    return resident(run, [images, labels])

def load_folder(run, folder):
    """Images of a folder, scaled and cropped to squares, decoded once into a memory-mapped file."""
    decoded, size = run.folder / f"{'_'.join(folder.resolve().parts[1:])}.npy", run.shape[-1]
    if not decoded.exists():
        tv, transforms = map(import_optional, ("torchvision.datasets.folder", "torchvision.transforms"))
        try:  # one folder for each class, as ImageNet comes; without classes, images in any folders
            classes = tv.find_classes(folder)[1] if run.label_dim else {"": 0}
            files = tv.make_dataset(folder, classes, tv.IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise Fault(f"no images in {folder}; name their folder with --data-dir") from error
        if run.label_dim not in (0, len(classes)):
            raise Fault(f"{folder} holds {len(classes)} folders; {run.dataset} has {run.label_dim} classes")
        resize = transforms.Resize(size, transforms.InterpolationMode.BOX)
        square = transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])
        def decode(file):
            with reading(file[0], "image"):
                return square(tv.default_loader(file[0])).numpy(), file[1]
        rows = new_rows(Path(f"{decoded}.tmp"), [("image", "u1", run.shape), ("y", "i8")], len(files))
        report = progress("decode", 0, len(files), unit="images")
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(files), 512):  # so that few images wait in memory
                for i, row in enumerate(pool.map(decode, files[start : start + 512]), start):
                    rows[i] = row
                    report(i + 1)
        os.replace(f"{decoded}.tmp", decoded)
    rows = np.load(decoded, mmap_mode="c")
    return torch.from_numpy(rows["image"]), torch.from_numpy(rows["y"]) if run.label_dim else None

def downloaded(make, url, folder=None):
    """make(), which downloads what is not in the folder; without one it is torch's."""
    try:
        return make()
    except (OSError, RuntimeError) as error:
        folder = folder or f"{torch.hub.get_dir()}/checkpoints"
        raise Fault(f"cannot use or download {url} ({error!r}); put it into {folder}") from error

def import_optional(name):
    """Import torchvision, or a package that needs it, also where torchvision's build does not fit torch's."""
    register = torch.library.register_fake
    try:  # one that does not fit fails where it describes its compiled operators; none is used here
        torch.library.register_fake = lambda *args, **kwargs: lambda function: function
        importlib.import_module("torchvision")
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0].replace("_", "-")
        raise Fault(f"this needs the package {package}: pip install {package}") from None
    finally:
        torch.library.register_fake = register

# ---- 7. Teachers' files: weights are read, and nothing in a file is executed -------------------------------
def load_network(path, device="cpu"):
    """The network of any file: EDM's .pkl, the authors' .pth, or a ckpt.pt of ours."""
    return {".pkl": load_edm, ".pth": load_slimflow_official}.get(Path(path).suffix, load_flow)(path, device)

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

class Record(dict):
    """Stands in for any object of a pickle: it keeps what the object would be made from, and does nothing."""
    args, state = (), None
    def __init__(self, *args):
        self.args = args
    def __setstate__(self, state):
        self.state = state

class InertUnpickler(pickle.Unpickler):
    """Reads a pickle's numbers, texts, containers and tensors; any other object becomes a Record."""
    def find_class(self, module, name):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return getattr(torch._utils, name)
        return dict if name == "OrderedDict" else Record

def load_edm(path, device="cpu"):
    """The EMA network of a .pkl of NVIDIA's EDM (DDPM++ or ADM), frozen; the source code in it is not run."""
    def state_of(record):  # EDM's own classes give a dict to the function that would rebuild them
        return record.args[0]["state"] if record.args else record.state
    def weights_of(record, prefix=""):
        weights = {prefix + name: p for name, p in state_of(record)["_parameters"].items() if p is not None}
        for name, child in state_of(record)["_modules"].items():
            weights |= weights_of(child, f"{prefix}{name}.")
        return weights
    with reading(path, "network of EDM's"), open(path, "rb") as file:
        outer = InertUnpickler(file).load()["ema"]
        if outer.args[0]["class_name"] != "EDMPrecond" or state_of(outer)["sigma_data"] != 0.5:
            raise ValueError("another preconditioning")
        inner = state_of(outer)["_modules"]["model"]
        like = dict(SongUNet=cifar10, DhariwalUNet=imagenet64)[inner.args[0]["class_name"]]  # EDM's defaults
        given, weights = state_of(inner)["_init_kwargs"], weights_of(inner)
        config = {name: given.get(name, value) for name, value in like.networks["teacher"].items()}
        config |= dict(resolution=given["img_resolution"], channels=given["in_channels"],
                       label_dim=given.get("label_dim", 0), time_scale=1.0)  # its time is ln(sigma) / 4
        weights.pop("map_augment.weight", None)  # of EDM's augmentation, not used for sampling
        return EDMTeacher(build(config, device, weights))

def load_slimflow_official(path, device="cpu"):
    """The EMA network of a .pth of the authors, a distilled student, in the first layout that fits."""
    with reading(path, "network of SlimFlow's authors"):
        given = torch.load(path, map_location="cpu", weights_only=True)["ema"]["shadow_params"]
        for config in [*cifar10.networks.values(), *ffhq64.networks.values()]:
            with contextlib.suppress(RuntimeError, ValueError, StopIteration):  # if it is another layout
                net = build(config, device, official_weights(UNet(**config), given))
                net.stage = "distill"
                return net
        raise ValueError("an unknown layout")

def official_weights(net, given):
    """Weights for a UNet from the authors' tensors, which come in the order in which ours are applied."""
    given, weights = iter(given), {}
    for name, _ in net.named_parameters():
        if name.endswith("qkv.weight"):  # from matrices [in, out] to a convolution, interleaved by channel
            q, q_bias, k, k_bias, v, v_bias = itertools.islice(given, 6)
            weights[name] = torch.stack([q.t(), k.t(), v.t()], dim=1).flatten(0, 1)[:, :, None, None]
            weights[name.replace("weight", "bias")] = torch.stack([q_bias, k_bias, v_bias], dim=1).flatten()
        elif not name.endswith("qkv.bias"):
            weights[name] = next(given).t()[:, :, None, None] if name.endswith("proj.weight") else next(given)
    if list(given):
        raise ValueError("more tensors than the network has")
    return weights

# ---- 8. Evaluation: distances between sets of images, sizes, speed, pictures -------------------------------
def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)); means [d], covariances [d, d], in float64."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (mu1, cov1, mu2, cov2))
    (a, u), (b, v) = torch.linalg.eigh(cov1), torch.linalg.eigh(cov2)
    A, B = u * a.clamp(min=0).sqrt(), v * b.clamp(min=0).sqrt()  # cov1 = A A^T, cov2 = B B^T
    root_trace = torch.linalg.svdvals(A.T @ B).sum()  # stable where the covariances are singular
    return ((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * root_trace).item()

def moments(batches):
    """Mean [d] and covariance [d, d], in float64, of features [n, d] that come batch by batch."""
    x = torch.cat([features.double() for features in batches])
    return x.mean(dim=0), x.T.cov()

def straightness(flow, noise, steps=20, y=None):
    """Mean of |x_1 - x_0 - v(x_t, t)|^2 over elements and Euler's path: 0 if all paths are straight lines."""
    path = torch.stack([x for _, x in euler(flow, noise, steps, y)])  # (steps + 1, B, ...)
    return (path[-1] - path[0] - (path[1:] - path[:-1]) * steps).square().mean().item()

def count_parameters(net):
    """Number of trainable weights."""
    return sum(p.numel() for p in net.parameters())

@torch.no_grad()
def count_macs(net, shape):
    """Multiply-accumulates of all convolutions and linear layers for one image of shape (C, H, W)."""
    from torch.utils.flop_counter import FlopCounterMode  # here and below: imported late, for a quick start
    with FlopCounterMode(display=False) as counter:
        velocity(net, torch.zeros(1, *shape, device=next(net.parameters()).device), 0.5)
    aten, flops = torch.ops.aten, counter.get_flop_counts()["Global"]  # bmm, in the attention, does not count
    return sum(flops.get(op, 0) for op in (aten.convolution, aten.addmm, aten.mm)) // 2

def digit_features(run, images, labels, seed=0):
    """A function uint8 [n, 1, 8, 8] -> [n, 64]: features of a digit classifier, trained here."""
    seed_all(seed, "classifier, weights", 0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)]
    net = nn.Sequential(*layers).to(run.device)
    schedule = Schedule(steps=600, lr=1e-3, warmup=0, decay=0.3, ema=0.99)
    def loss(net, step):
        pictures, y = draw_batch(run, schedule, (images, labels))
        data = to_float(pictures)
        return F.cross_entropy(net(data + 0.1 * torch.randn_like(data)), y)
    features = fit(net, loss, schedule, seed, "classifier")[:6]
    return torch.no_grad()(lambda pictures: features(to_float(pictures)))

def inception_features(device):
    """A function uint8 [n, 3, H, W] -> [n, 2048]: FID's Inception features, by torch-fidelity."""
    package = import_optional("torch_fidelity.feature_extractor_inceptionv3")
    make = partial(package.FeatureExtractorInceptionV3, "inception-v3-compat", ["2048"])
    net = downloaded(make, package.URL_INCEPTION_V3).to(device).eval()
    return torch.no_grad()(lambda pictures: net(pictures)[0])

@cache
def lpips_network(device):
    """LPIPS with VGG, as the package `lpips` has it."""
    make = partial(import_optional("lpips").LPIPS, net="vgg", verbose=False)
    net = downloaded(make, "https://download.pytorch.org/models/vgg16-397923af.pth")
    return net.to(device).eval().requires_grad_(False)

def generate(flow, noise, y, solver):
    """Images for any number of noises [N, C, H, W], SAMPLE_BATCH at a time: yields them as uint8."""
    classes = itertools.repeat(None) if y is None else y.split(SAMPLE_BATCH)
    batches, report = noise.split(SAMPLE_BATCH), progress("images", 0, len(noise), unit="images")
    for done, (z, c) in enumerate(zip(batches, classes), 1):
        yield to_uint8(sample(flow, z, y=c, **solver)[0])
        report(min(done * SAMPLE_BATCH, len(noise)))

def evaluate(run):
    """Print a table of the networks that are there, and draw summary.png: the same noise through each."""
    done, _, made = status(run, "pairs")
    guided = "guided" if status(run, "distill")[2].get("guidance") else "naive"
    names = dict(train="teacher", reflow="2-flow", naive="naive", distill=guided)
    paths = {name: run.folder / stage / "ckpt.pt" for stage, name in names.items()}
    paths["teacher"] = Path(made.get("teacher") or paths["teacher"])
    rows = [("teacher, precise", paths["teacher"], made["solver"])] if made else []
    rows += [(f"{name}, 1 step", path, ONE_STEP) for name, path in paths.items()]
    rows = [row for row in rows if row[1].exists()]
    if not rows:
        raise Fault(f"{run.folder} holds no network; train {run.dataset} first, or name its --out")
    digits = run.dataset == "digits"  # its classifier replaces Inception
    images, labels = load_images(run) if digits or not run.ref else (None, None)
    features = digit_features(run, images, labels) if digits else inception_features(run.device)
    if run.ref:
        with reading(run.ref, "npz with mu and sigma"), np.load(run.ref) as file:
            real = file["mu"], file["sigma"]
    else:
        real = moments(features(x.to(run.device)) for x in images.split(SAMPLE_BATCH))
    (noise, y), (few, few_y) = fixed_noise(run, run.n, seed=4321), fixed_noise(run, 12)
    metric, strips = "Frechet" if digits else "FID", []
    table = [("row", "parameters", "MACs", "evaluations", metric, "straightness")]
    for name, path, solver in rows:
        flow = load_network(path, run.device)
        generated = generate(flow, noise, y, solver)
        if "precise" in name and done >= run.n:  # the stored pairs are such images
            stored = torch.from_numpy(np.load(run.folder / "pairs/pairs.npy", mmap_mode="c")["data"][: run.n])
            generated = (to_uint8(x.to(run.device).float()) for x in stored.split(SAMPLE_BATCH))
        distance = frechet_distance(*moments(map(features, generated)), *real)
        picture, nfe = sample(flow, few, y=few_y, **solver)
        sizes = f"{count_parameters(flow):,}", f"{count_macs(flow, run.shape) / 1e6:,.1f}M"
        table.append((name, *sizes, nfe, f"{distance:.2f}", f"{straightness(flow, few, y=few_y):.4f}"))
        strips.append((picture, f"{name}\n{metric} {distance:,.0f}"))
    if digits:  # what a perfect generator would get: half against half, scaled as the bias is, by 1 / images
        found = features(images)
        halves = [found[torch.randperm(len(found))].tensor_split(2) for _ in range(100)]
        distance = np.mean([frechet_distance(*moments([a]), *moments([b])) for a, b in halves])
        bias = (1 / run.n + 1 / len(images)) / sum(1 / len(half) for half in halves[0])
        table.append(("floor", "", "", "", f"{distance * bias:.2f}", ""))
    print_table(table)
    save_pictures(run.folder / "summary.png", torch.cat([x for x, _ in strips]), 12, [s for _, s in strips])
    print(f"{run.n:,} images against {run.ref or f'{len(images):,} real ones'}; see {run.folder}/summary.png")

def print_table(rows):
    """Rows of cells in aligned columns, the first to the left, the others to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for first, *rest in rows:
        print(f"{first:<{widths[0]}}", *(f"{x:>{width}}" for x, width in zip(rest, widths[1:])), sep="  ")

def save_pictures(path, images, columns=8, labels=()):
    """A PNG of images [N, C, H, W] in [-1, 1] side by side, small ones enlarged; a label beside each row."""
    from matplotlib.figure import Figure
    x = F.interpolate(to_uint8(images.float().cpu()), scale_factor=max(1, 64 // images.shape[-1]))
    picture = import_optional("torchvision.utils").make_grid(x, columns, 4, pad_value=255).permute(1, 2, 0)
    height, width, margin = *picture.shape[:2], 150 if labels else 0
    figure = Figure(figsize=((margin + width) / 100, height / 100), dpi=100)
    axes = figure.add_axes((margin / (margin + width), 0, width / (margin + width), 1))
    axes.imshow(picture.numpy())
    axes.set_axis_off()
    for i, label in enumerate(labels):
        axes.text(-8, (i + 0.5) * height / len(labels), label, ha="right", va="center", fontsize=9)
    save_file(path, partial(figure.savefig, format="png"))

def sample_images(run, steps):
    """Write samples.png, up to 64 images by the network of a file, and all of them to --npz."""
    if not (path := Path(run.ckpt or run.folder / "distill/ckpt.pt")).exists():
        raise Fault(f"{path} does not exist; distill {run.dataset} first, or name a file by --ckpt")
    flow = load_network(path, run.device)
    usual = ONE_STEP if getattr(flow, "stage", None) in ("distill", "naive") else dict(solver="rk45")
    solver = (dict(solver=run.solver) if run.solver else usual) | steps
    if (solver["solver"] == "rk45") == ("steps" in solver):
        raise Fault(f"--solver {solver['solver']} {'takes no' if steps else 'needs'} --steps")
    seed_all(run.seed, "sample", 0)
    channels, size = flow.config["channels"], flow.config["resolution"]
    noise = torch.randn(run.n, channels, size, size).to(run.device)
    y = torch.randint(flow.label_dim, (run.n,)).to(run.device) if flow.label_dim else None
    images = torch.cat([x.cpu() for x in generate(flow, noise, y, solver)])
    save_pictures(Path("samples.png"), to_float(images[:64]))
    if run.npz:
        save_file(Path(run.npz), partial(np.savez, arr_0=images.permute(0, 2, 3, 1).numpy()))
    print(f"{path}, {' '.join(map(str, solver.values()))}: {run.n} images, see samples.png {run.npz or ''}")

def speed(run, stage, repeats=1):
    """Images (of pairs: evaluations) per second of a stage, on random ones, and seconds of all of it."""
    from torch.utils.benchmark import Timer
    net = build(run.networks["teacher" if stage in ("train", "pairs") else run.student], run.device)
    net, schedule = net.train(stage != "pairs"), getattr(run, stage)
    n = SAMPLE_BATCH if stage == "pairs" else schedule.batch // WORLD
    noise, y = fixed_noise(run, n if run.device == "cuda" or run.dataset == "digits" else 4)
    def step():
        with torch.autocast(run.device, torch.bfloat16, enabled=run.device == "cuda" and stage != "pairs"):
            if stage == "pairs":
                return sample(net.requires_grad_(False), noise, y=y, **ONE_STEP)
            if stage != "distill" or not run.guidance:  # naive distillation costs as much as a flow's loss
                return rectified_flow_loss(net, noise, noise, y).backward()
            loss = distillation_loss(net, noise, noise, DISTANCES[run.distance], y)
            return (loss + guidance_loss(net, net, noise, DISTANCES[run.distance], y=y)).backward()

    timer = Timer("step()", globals=dict(step=step), num_threads=torch.get_num_threads())
    rate = len(noise) / timer.timeit(repeats).mean
    evaluations = run.pairs * run.pair_solver.get("steps", 100)  # RK45 takes about 100
    return rate, (evaluations if stage == "pairs" else schedule.steps * schedule.batch) / rate / WORLD

def bench(run):
    """Print the speed of each stage on this device, and the hours of its schedule."""
    speeds = [(stage, *speed(run, stage, repeats=5)) for stage in RUNS.split()[1:]]
    rows = [(stage, f"{rate:,.1f}", f"{seconds / 3600:,.2f}") for stage, rate, seconds in speeds]
    print_table([("stage", "images/s", "hours"), *rows])
    print(f"{run.dataset}, {run.student}, {run.distance}, on {run.device}, torch {torch.__version__}")

# ---- 9. Presets and command line ---------------------------------------------------------------------------
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

DIGITS = dict(resolution=8, channels=1, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
DIGITS |= dict(time_scale=16.0)  # with 999 the velocity oscillates in t, and solvers take 3 times as long
digits = Run(  # the numbers are ours
    dataset="digits", shape=(1, 8, 8), student="0.19M", n=5_000, mirror=False, distance="huber",
    networks={"teacher": DIGITS | dict(model_channels=32), "0.19M": DIGITS | dict(model_channels=16)},
    train=Schedule(steps=1_200, batch=64, lr=2e-3, warmup=100, decay=0.6, ema=0.998),
    reflow=Schedule(steps=1_100, batch=64, lr=4e-3, warmup=100, decay=0.6, ema=0.998),
    distill=Schedule(steps=800, batch=64, lr=2e-3, warmup=0, decay=0.6, ema=0.998),
    pairs=1_500, pair_solver=dict(solver="adams", steps=12), anneal=250, targets="teacher",
)
cifar10 = Run(  # all numbers are the authors', but where another source is named
    dataset="cifar10", shape=(3, 32, 32), student="15.7M", networks=ddpmpp_networks(32),
    train=Schedule(), reflow=Schedule(), distill=Schedule(steps=400_000, warmup=0),  # train's length is ours
    pairs=50_000,  # by a 1-flow; 100,000 by EDM's network
    pair_solver=dict(solver="rk45", rtol=1e-5, atol=1e-5),
    anneal=300_000, distance="lpips", targets="2-flow",  # the targets: poster
    n=50_000,  # FID's convention
)
ffhq64 = replace(cifar10, dataset="ffhq64", shape=(3, 64, 64), networks=ddpmpp_networks(64))
imagenet64 = replace(
    ffhq64, dataset="imagenet64", label_dim=1000, student="80.7M",
    networks={
        "teacher": ADM,  # EDM's
        "80.7M": ADM_STUDENT | dict(channel_mult=(1, 2, 2, 4)),
        "44.7M": ADM_STUDENT | dict(channel_mult=(1, 2, 2, 2)),
    },
    pairs=400_000,  # ours, 400 of each class: the authors' number is not public
)
PRESETS = {preset.dataset: preset for preset in (digits, cifar10, ffhq64, imagenet64)}

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""
    def error(self, message):
        raise Fault(f"{message}; see `{self.prog} --help`")

def parse(argv):
    """A command line as (command, run, settings that are given); for sample these are its solver's."""
    parser = Parser(prog="slimflow.py", description=__doc__, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("command", nargs="?", choices=COMMANDS.split(), default="all", help="default: all")
    flags = {f.name: f for f in (*fields(Run), *fields(Schedule)) if f.metadata}
    for name, f in flags.items():
        values = dict.fromkeys(str(getattr(preset, name, None)) for preset in PRESETS.values())
        default = "" if "None" in values else f" [{', '.join(values)}]"
        kind = dict(type=f.type if f.type in (int, float) else str, choices=f.metadata["choices"])
        kind = dict(action="store_true") if f.type is bool else kind
        parser.add_argument(f"--{name.replace('_', '-')}", help=f.metadata["help"] + default, **kind)
    given = vars(parser.parse_args(argv))
    command, preset = given.pop("command"), PRESETS[given.pop("dataset", "digits")]
    for name, value in given.items():
        option, rules = f"--{name.replace('_', '-')}", flags[name].metadata
        if command not in rules["commands"].split():
            raise Fault(f"{option} is for {rules['commands'].replace(' ', ', ')}, not for {command}")
        if isinstance(value, (int, float)) and not value >= rules["least"]:
            raise Fault(f"{option} {value} is too small; the least is {rules['least']}")
    students = list(preset.networks)[1:]
    if given.get("student", preset.student) not in students:
        raise Fault(f"{preset.dataset} has no student {given['student']}; choose from {', '.join(students)}")
    schedule = {name: given.pop(name) for name in ("steps", "batch", "lr") if name in given}
    if schedule and command != "sample":
        given[command] = replace(getattr(preset, command), **schedule)
    usual = dict(sample=dict(n=64), bench=dict(distance="l2")).get(command, {})
    return command, replace(preset, **usual | given), schedule if command == "sample" else given

def main(argv=None):
    """Run the command line; return its exit status. What the user must mend is one line on stderr, and 2."""
    try:
        command, run, given = parse(argv)
        if WORLD > 1 and command not in RUNS.split():
            raise Fault(f"{command} is for one process; run it without torchrun")
        if WORLD > 1:  # join the other processes, of which only the first prints
            dist.init_process_group(timeout=timedelta(days=1))  # images may be decoded meanwhile
            if run.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            sys.stdout = open(os.devnull, "w") if RANK else sys.stdout  # noqa: SIM115
        if command == "sample":
            sample_images(run, given)
        elif command in ("eval", "bench"):
            dict(eval=evaluate, bench=bench)[command](run)
        else:
            run_stages(run, command, given)
        return 0
    except Fault as fault:
        message = str(fault)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full; use a smaller --batch, a smaller --student, or more GPUs"
    except KeyboardInterrupt:
        message = "interrupted; the same command, without --fresh, goes on from what was saved, if anything"
    print(f"slimflow: {message}", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
