"""SlimFlow in one file: small image generators that need one step, trained with rectified flow.

After Zhu, Liu, Liu, "SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow" (ECCV 2024,
arXiv 2407.12718). z is noise, x is an image, and x_t = (1 - t) z + t x is the straight path between them.
Time t runs from noise at 0 to data at 1; the paper's text has it reversed. There are five stages:

  train    the teacher, a rectified flow: min E |x - z - v(x_t, t)|^2 over independent z and x
  pairs    solve the teacher's ODE dx/dt = v(x, t) precisely, from each z to its x, and keep the pairs (z, x)
  reflow   the 2-flow: the same loss for a small network, on pairs whose noise is mixed with fresh noise at
           first, and with none at the end (annealing)
  own      pairs of the 2-flow: its own ODE, solved precisely (may be left out)
  distill  the student: one step from z should end at x on stored pairs, and on fresh noise at a target that
           the 2-flow gives (guidance)

Sections 1 to 3 and 5 are the method. `python slimflow.py --help` lists commands and flags.
"""

import argparse
import contextlib
import copy
import importlib.util
import itertools
import math
import os
import sys
import time
import zlib
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# ---- 1. Flow: the straight path, its loss, annealing, distillation, guidance -------------------------------
T0 = 1e-3  # t is trained on [T0, 1] and the ODE starts at T0, as in the authors' code

def rectified_flow_loss(flow, noise, data, y=None, t=None):
    """Mean of |x - z - v(x_t, t)|^2 over all elements; it is least at v(x_t, t) = E[x - z | x_t].

    noise z and data x [B, ...], class y int64 [B] or None, t [B], or None: drawn from U(T0, 1).
    """
    if t is None:
        t = T0 + (1 - T0) * torch.rand(noise.shape[0], device=noise.device)
    return (data - noise - flow(interpolate(noise, data, t), t, y)).square().mean()

def interpolate(noise, data, t):
    """The point x_t = (1 - t) z + t x of the straight path; noise z, data x [B, ...], t [B]: like data."""
    t = factor(t, data)
    return (1 - t) * noise + t * data

def factor(t, x):
    """Times t [B] as [B, 1, ..., 1], to multiply x [B, ...] with."""
    return t.reshape(-1, *[1] * (x.ndim - 1))

# Why anneal? The teacher's weights do not fit a smaller network, so it starts from random ones. With beta = 1
# it learns from random pairs, as the teacher did, and in the end from the teacher's pairs. One training goes
# from the first to the second, instead of two: a small 1-flow, then its reflow.
SCHEDULES = {  # beta, by u = step / horizon
    "linear": lambda u: max(0.0, 1 - u),
    "cosine": lambda u: (1 + math.cos(math.pi * min(1.0, u))) / 2,
    "exponential": lambda u: math.exp(-u),  # never reaches 0: the horizon is a time constant
    "hold": lambda u: float(u < 1),  # ours; better than the others on few digits (notebook 3)
}

def anneal_beta(step, horizon, schedule="linear"):
    """beta of annealing reflow: 1 at step 0, and 0 from `horizon` on (exponential: 1/e there)."""
    return SCHEDULES[schedule](step / horizon) if horizon else 0.0  # horizon 0: plain reflow

def annealed_noise(noise, beta):
    """z' = sqrt(1 - beta^2) z + beta eps, eps fresh: N(0, I) for every beta in [0, 1]; z [B, ...]: like z."""
    return math.sqrt(1 - beta**2) * noise + beta * torch.randn_like(noise)

def velocity(flow, x, t, y=None):
    """v(x, t) at one number t for the whole batch x [B, ...]: like x."""
    return flow(x, x.new_full(x.shape[:1], t), y)

def one_step(flow, noise, y=None):
    """z + v(z, T0): the whole ODE in one Euler step, exact where paths are straight; z [B, ...]: like z."""
    return noise + velocity(flow, noise, T0, y)

def last_step(flow, middle, t, y=None):
    """m + (1 - t) v(m, t): the Euler step from m [B, ...] at time t [B] to the data: like m."""
    return middle + factor(1 - t, middle) * flow(middle, t, y)

def distillation_loss(student, noise, data, distance, y=None):
    """Mean of D(z + s(z, T0), x) over pairs z, x [B, ...]; x is the precise end of the ODE from z."""
    return distance(one_step(student, noise, y), data).mean()

def guidance_loss(student, two_flow, noise, distance, y=None, t=None):
    r"""Mean of D(image, target) over fresh noise z [B, ...], as the authors run it; t [B] ~ U(0.2, 0.8).

        z -------- m -------- image  = z + s(z, T0)         the student's own straight line
                    \-------- target = m + (1-t) v(m, t)    the frozen 2-flow leaves it at m = z + t s(z, T0)

    So image - target = (1 - t) (s - v): along its line the student's velocity should be the 2-flow's. With l2
    the gradient is that of (1 - t) |s - v|^2 with v held fixed. t keeps away from both ends: near 1 the loss
    vanishes, and near 0 the target is one step of the 2-flow, which distillation is to improve on. A step of
    training costs 7 forward passes with guidance, 3 without (a backward pass counts as two).
    """
    if t is None:
        t = 0.2 + 0.6 * torch.rand(noise.shape[0], device=noise.device)
    image = one_step(student, noise, y)
    with torch.no_grad():
        middle = interpolate(noise, image, t)  # in the paper's equation this step is the 2-flow's
        target = last_step(two_flow, middle, t, y)
    return distance(image, target).mean()

def l2(a, b):
    """Mean squared difference of each image: a, b [B, ...] -> [B]."""
    return (a - b).square().flatten(1).mean(1)

def huber(a, b):
    """Pseudo-Huber sqrt(|a - b|^2 + c^2) - c of each image: a, b [B, ...] -> [B]."""
    c = 0.00054 * math.sqrt(a[0].numel())  # as in improved consistency training (arXiv 2310.14189)
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c

def lpips(a, b):
    """Learned perceptual distance (VGG), at 64x64 as the authors do: a, b [B, C, H, W] -> [B]."""
    a, b = (F.interpolate(x.float(), size=64, mode="bilinear", align_corners=True) for x in (a, b))
    with torch.autocast(a.device.type, enabled=False):
        return lpips_network(a.device.type)(a, b).flatten()

DISTANCES = {"l2": l2, "huber": huber, "lpips": lpips}

# ---- 2. Solvers of dx/dt = v(x, t), from noise at T0 to data at 1: they yield t, x, evaluations so far ----
@torch.no_grad()
def euler(flow, noise, y=None, nfe=1):
    """Order 1: x += v(x, t_i) / N at t_i = T0 + i/N (1 - T0), N = nfe, as the authors run it; x [B, ...]."""
    x = noise
    yield T0, x, 0
    for i in range(nfe):
        x = x + velocity(flow, x, T0 + i / nfe * (1 - T0), y) / nfe  # so one step is z + v(z, T0)
        yield T0 + (i + 1) / nfe * (1 - T0), x, i + 1

@torch.no_grad()
def adams(flow, noise, y=None, nfe=36):
    """Order 3: a multistep method, Adams' predictor and corrector (PEC); noise and each x [B, ...].

    A parabola through the last three velocities is integrated over the step behind, to correct x by what is
    known now, and over the step ahead, to guess where to evaluate next. The grid is dense near the data.
    """
    grid = (T0 + (1 - T0) * np.sin(np.linspace(0, np.pi / 2, nfe + 1))).tolist()
    x, guess, known, t_before = noise, noise, [], T0
    for i, (t, t_next) in enumerate(itertools.pairwise(grid), 1):
        known = [*known, (t, velocity(flow, guess, t, y))][-3:]
        x = x + _integral(known, t_before, t)  # corrected
        yield t, x, i
        guess = x + _integral(known, t, t_next)  # predicted
        t_before = t
    yield 1.0, guess, nfe

def _integral(known, a, b):
    """Integral from a to b of the polynomial in t through the known [(t, velocity), ...]: a weighted sum."""
    last = known[-1][0]
    powers = np.array([[(t - last) ** k for t, _ in known] for k in range(len(known))])
    integrals = [((b - last) ** k - (a - last) ** k) / k for k in range(1, len(known) + 1)]
    weights = np.linalg.solve(powers, integrals).tolist()  # exact for 1, s, s^2, ...; s = t - last
    return sum(w * v for w, (_, v) in zip(weights, known))

# Dormand and Prince (1980): each row has the weights of the slopes before it; its sum is the time of the next
# slope, and the last row is the step. The error is the difference to a step of order 4.
DP_WEIGHTS = (
    (1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
DP_ERROR = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)

@torch.no_grad()
def rk45(flow, noise, y=None, rtol=1e-5, atol=1e-5):
    """Order 5, the authors' choice: the batch's error sets the steps. Fault if the velocity is not finite."""
    t, x, h, evaluations = T0, noise, 0.02, 1
    v = velocity(flow, x, t, y)
    yield t, x, evaluations
    while t < 1:
        h, slopes = min(h, 1 - t), [v]
        for weights in DP_WEIGHTS:
            x_new = x + h * sum(w * k for w, k in zip(weights, slopes))
            slopes.append(velocity(flow, x_new, t + h * sum(weights), y))
        evaluations += len(DP_WEIGHTS)
        scale = atol + rtol * torch.maximum(x.abs(), x_new.abs())
        error = (h * sum(w * k for w, k in zip(DP_ERROR, slopes)) / scale).square().mean().sqrt().item()
        if error < 1:
            t = 1.0 if h == 1 - t else t + h
            x, v = x_new, slopes[-1]  # the last slope is the first of the next step
            yield t, x, evaluations
        elif h < 1e-9:
            raise Fault(f"the ODE cannot be solved past t = {t:.4f}: velocity not finite there")
        change = 0.9 * max(error, 1e-9) ** -0.2 if math.isfinite(error) else 0.2
        h *= min(8.0, max(0.2, change))

def sample(flow, noise, y=None, nfe=1):
    """Images from noise [B, ...], like it, and how many evaluations they took. Fault if they are not finite.

    nfe 1 is one Euler step, 0 is rk45, and any other number is adams with so many evaluations.
    """
    solver = {0: rk45, 1: euler}.get(nfe, partial(adams, nfe=nfe))
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):  # TF32 is too coarse
        for _, x, evaluations in solver(flow, noise, y):
            pass
    if not x.isfinite().all():
        raise Fault("the images are not finite; take other evaluations, or another network")
    return x, evaluations

# ---- 3. Network: one UNet for DDPM++ (CIFAR-10, FFHQ) and ADM (ImageNet; to be skipped at first) -----------
def group_norm(channels, kind):
    """GroupNorm as both families set it: at least 4 channels per group, at most 32 groups."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-5 if kind == "adm" else 1e-6)

def conv(c_in, c_out, kernel):
    """Convolution that keeps the resolution."""
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)

class Block(nn.Module):
    """Residual block, with an optional 2x resampling in it, and self-attention after it.

    DDPM++ adds the embedding of time and class to the features, and scales each sum by sqrt(1/2) to keep its
    variance. ADM lets the embedding scale and shift the normalised features; its heads have 64 channels.
    """
    def __init__(self, c_in, c_out, c_emb, kind, dropout=0.0, resample=None, attention=False):
        super().__init__()
        adm = kind == "adm"
        self.adm, self.dropout, self.attention = adm, dropout, attention
        self.heads = c_out // 64 if adm else 1
        self.gain = 1.0 if adm else math.sqrt(0.5)
        self.norm0, self.conv0 = group_norm(c_in, kind), conv(c_in, c_out, 3)
        self.affine = nn.Linear(c_emb, 2 * c_out if adm else c_out)
        self.norm1, self.conv1 = group_norm(c_out, kind), conv(c_out, c_out, 3)
        resampling = {None: nn.Identity(), "down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2.0)}
        self.resample = resampling[resample]
        needs_skip = c_in != c_out or (resample and not adm)
        self.skip = conv(c_in, c_out, 1) if needs_skip else nn.Identity()
        if attention:
            self.norm2, self.qkv = group_norm(c_out, kind), conv(c_out, 3 * c_out, 1)
            self.proj = conv(c_out, c_out, 1)

    def forward(self, x, emb):
        """x [B, c_in, H, W], emb [B, c_emb] -> [B, c_out, H', W'], H' = H, H/2 (down) or 2H (up)."""
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
        b, c, height, width = qkv.shape  # c = 3 c_out, ordered as (head, channel, q k v)
        qkv = qkv.reshape(b, self.heads, c // 3 // self.heads, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # each (B, heads, H W, c / 3 / heads)
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c // 3, height, width)

class UNet(nn.Module):
    """Velocity network v(x, t, y), of kind "ddpm++" or "adm".

    Level i has half the resolution of the one before, channel_mult[i] * model_channels channels, num_blocks
    residual blocks (one more in the decoder), and self-attention if at attn_resolutions. label_dim is the
    number of classes, or 0. Time t enters its sinusoids as time_scale * t. Layers have EDM's names
    (but in_conv, out_norm, out_conv): `up`, `down`, `in` and `block`, which in the decoder takes a skip, too.
    """
    def __init__(self, resolution, channels, model_channels, channel_mult, num_blocks, attn_resolutions,
                 label_dim=0, dropout=0.0, kind="ddpm++", time_scale=999.0):
        super().__init__()
        self.kind, self.model_channels = kind, model_channels
        self.label_dim, self.time_scale = label_dim, time_scale
        adm = kind == "adm"
        c = model_channels
        c_emb = 4 * c
        block = partial(Block, c_emb=c_emb, kind=kind, dropout=dropout)
        sizes = [resolution >> level for level in range(len(channel_mult))]
        levels = [(f"{n}x{n}", n in attn_resolutions, c * mult) for n, mult in zip(sizes, channel_mult)]

        self.map_layer0, self.map_layer1 = nn.Linear(c, c_emb), nn.Linear(c_emb, c_emb)
        if label_dim:
            self.map_label = nn.Linear(label_dim, c_emb if adm else c, bias=not adm)

        self.in_conv = conv(channels, c, 3)
        self.enc, skips = nn.ModuleDict(), [c]  # skips: channels of what the encoder hands to the decoder
        for level, (name, attention, width) in enumerate(levels):
            if level > 0:
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
        self.out_norm, self.out_conv = group_norm(c, kind), conv(c, channels, 3)
        self._initialise()

    @torch.no_grad()
    def _initialise(self):
        """DDPM++: Xavier uniform; ADM: PyTorch's default; residual branches and output start near zero."""
        for name, p in self.named_parameters():
            layer = name.split(".")[-2]
            closing = layer in ("conv1", "proj", "out_conv")
            if "norm" in layer:
                continue
            if self.kind == "adm":
                if closing:
                    p.zero_()
                elif layer == "map_label":
                    p.normal_()  # variance label_dim / fan_in = 1
            elif p.ndim == 1:
                p.zero_()
            elif closing:
                nn.init.xavier_uniform_(p, gain=1e-5)
            else:
                nn.init.xavier_uniform_(p, gain=math.sqrt(0.2) if layer == "qkv" else 1.0)

    def _embedded(self, t, y):
        """Sinusoids of time [B] and class [B] (or None) through two linear layers: [B, 4 model_channels]."""
        adm, half = self.kind == "adm", self.model_channels // 2
        i = torch.arange(half, dtype=torch.float32, device=t.device)
        last = half if adm else half - 1  # with half - 1 the lowest frequency is 1/10,000 exactly
        angle = (self.time_scale * t)[:, None] * ((1 / 10_000) ** (i / last)).to(t.dtype)  # (B, half)
        waves = [angle.cos(), angle.sin()] if adm else [angle.sin(), angle.cos()]
        label = 0.0
        if self.label_dim:
            one_hot = angle.new_zeros(t.shape[0], self.label_dim)
            if y is not None:
                one_hot = one_hot.scatter(1, y[:, None], 1.0)
            label = self.map_label(one_hot * (1.0 if adm else math.sqrt(self.label_dim)))
        emb = torch.cat(waves, dim=1)
        emb = F.silu(self.map_layer0(emb if adm else emb + label))
        emb = self.map_layer1(emb)
        return F.silu(emb + label if adm else emb)

    def forward(self, x, t, y=None):
        """Velocity at x [B, C, H, W], time t [B] in [0, 1], class y int64 [B] or None: like x."""
        emb, x = self._embedded(t, y), self.in_conv(x)
        skips = [x]
        for layer in self.enc.values():
            x = layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))

class EDM(nn.Module):
    """EDM's denoiser D(x; sigma), a preconditioned UNet. Called, it is the model's flow v(x, t)."""
    def __init__(self, net):
        super().__init__()
        self.net = net

    def denoise(self, x, sigma, y=None):
        """Estimate of the images in x = image + sigma eps, [B, C, H, W], sigma [B] (EDM, Table 1): like x."""
        s, sigma_data = factor(sigma, x), 0.5  # standard deviation of noise, of data
        total = s**2 + sigma_data**2
        c_skip, c_out, c_in = sigma_data**2 / total, s * sigma_data / total.sqrt(), total.rsqrt()
        return c_skip * x + c_out * self.net(c_in * x, sigma.log() / 4, y)

    def forward(self, x, t, y=None):
        """v(x, t) = (D(x/t; (1-t)/t) - x) / (1-t), since x_t / t = data + (1-t)/t noise; t [B]: like x."""
        t = t.clamp(1 / 81, 1 / 1.002)  # to EDM's sigma in [0.002, 80]
        s = factor(t, x)
        return (self.denoise(x / s, (1 - t) / t, y) - x) / (1 - s)

def build(config, device="cpu", weights=None):
    """The network of a config, in the form fastest on its device: to be trained, or with frozen weights."""
    arguments = dict(config)
    denoiser = arguments.pop("denoiser", False)
    net = UNet(**arguments)
    if denoiser:
        net = EDM(net)
    if weights is not None:
        net.load_state_dict(weights)
        net.eval().requires_grad_(False)
    if config["resolution"] <= 8:  # so small that nothing below helps
        return net.to(device)
    if torch.device(device).type == "cpu":
        return net.to(memory_format=torch.channels_last)
    if importlib.util.find_spec("triton") and torch.cuda.get_device_capability() >= (7, 0):
        torch._dynamo.config.recompile_limit = 32  # of all networks
        net.compile(dynamic=False if weights is None else None)  # training has one batch size
    return net.to(device)

# ---- 4. Training: one loop for every network, on one device or, by torchrun, on many; our files -----------
WORLD = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1  # processes
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0  # which of them this is
KEEP_EVERY = 15.0  # seconds from one checkpoint to the next
AT_ONCE = 100  # images that are made, or looked at, together

class Fault(Exception):
    """What only the user can mend: the command line prints it as one line, with status 2."""

def fit(net, loss_fn, steps, lr, warmup=0, decay=0.0, name="fit", seed=0, kept=None, keep=None):
    """Minimise loss_fn(net, step), a batch's mean: the averaged (EMA) network, frozen, and a log.

    Adam, gradients clipped at norm 1; on a GPU in bfloat16 (ours). A hundred times, but at least every 500
    steps, a row (step, mean loss) is added to the log; Fault if it is not finite. Then, if 15 seconds have
    passed, and at the end, keep(ema, **state) is called. With kept=state the same call goes on from there, on
    a CPU bit for bit as if it had never stopped.
    """
    device = next(net.parameters()).device
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    log, logged = [], 0
    if kept:
        log, logged = kept["log"], kept["step"]
        net.load_state_dict(kept["net"])
        ema.load_state_dict(kept["weights"])
        optimizer.load_state_dict(kept["optimizer"])
    model = nn.parallel.DistributedDataParallel(net.train()) if WORLD > 1 else net.train()
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    every = max(1, min(500, steps // 100))
    total = torch.zeros((), device=device)  # of the losses since the last row
    report = progress(name, steps, logged)
    saved = time.monotonic()

    for step in range(logged, steps):
        seed_all(seed, name, step, RANK)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, warmup, decay)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = loss_fn(model, step)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate = (1 + step) / (10 + step)  # the authors': averages about the last ninth
        with torch.no_grad():
            for average, p in zip(ema.parameters(), net.parameters()):
                average.lerp_(p, 1 - rate)
        total += loss.detach()

        done = step + 1
        if done % every and done < steps:
            continue
        if WORLD > 1:
            dist.all_reduce(total)
        mean = (total / WORLD / (done - logged)).item()  # only here it waits for the device
        if not math.isfinite(mean):
            raise Fault(f"{name}: the loss is not finite by step {done:,}; give a lower lr")
        log.append((done, mean))
        total.zero_()
        logged = done
        report(done, f"loss {mean:.4f}")
        if keep and RANK == 0 and (done == steps or time.monotonic() - saved > KEEP_EVERY):
            keep(ema, step=done, log=log,
                 net=net.state_dict(), weights=ema.state_dict(), optimizer=optimizer.state_dict())
            saved = time.monotonic()
    return ema, log

def seed_all(seed, name, step, rank=0):
    """Seed torch from all four: a resumed run then draws at each step what an uninterrupted one draws."""
    torch.manual_seed(int(np.random.SeedSequence([seed, *name.encode(), step, rank]).generate_state(1)[0]))

def learning_rate(step, steps, lr, warmup=0, decay=0.0):
    """Linear warm-up, then constant, then linear decay to 0 over the last share `decay` of steps."""
    up = (step + 1) / warmup if warmup else 1
    down = (steps - step) / (decay * steps) if decay else 1
    return lr * min(1, up, down)

def progress(name, total, start=0):
    """A function report(done, note), which prints speed and time left every 10 seconds, and at the end."""
    began = shown = time.monotonic()

    def report(done, note=""):
        nonlocal shown
        now = time.monotonic()
        if done == total or now - shown > 10:
            shown = now
            pace = (done - start) / (now - began + 1e-9)
            left = timedelta(seconds=round((total - done) / pace))
            print(f"{name:<10} {done:,}/{total:,}  {note}  {pace:,.1f}/s  {left} left", flush=True)

    return report

def save(path, recipe, **content):
    """Write one of our files, whole or not at all: numbers, texts, tensors, and the recipe that made them."""
    temporary = Path(f"{path}.{time.time_ns()}.tmp")
    try:
        with trying(f"write {path}"), open(temporary, "wb") as file:
            torch.save(dict(recipe=recipe, **content), file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def load(path, recipe=None, mmap=True):
    """What `save` wrote; no code in it is run. Fault if it was made by another recipe than the given one.

    Mapped, its tensors are read from the disk where they are used, and need no memory.
    """
    with trying(f"read {path}", "it is damaged, or no file of slimflow's"):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        made_by = content["recipe"].items()
    if recipe and not made_by <= recipe.items():  # it may know fewer settings
        raise Fault(f"{path} was made by another recipe (an edited preset?); remove its folder")
    return content

def load_flow(path, device="cpu"):
    """The averaged network of one of our files, also of a partial.pt: frozen, in eval mode."""
    content = load(path)
    if "network" not in content:
        raise Fault(f"{path} holds no network")
    return build(content["network"], device, content["weights"])

@contextlib.contextmanager
def trying(what, otherwise=""):
    """Turn an error within into a Fault: 'cannot <what>: <the system's reason, or otherwise>'."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides the system's
        raise Fault(f"cannot {what}: {getattr(cause, 'strerror', None) or otherwise or error}") from error

# ---- 5. Stages: each is a function of the run (Section 6) and its settings, and returns what to keep ------
def train(run, stage, name, data, mirror, batch, start, **training):
    """The teacher: a rectified flow on independent noise z and data x."""
    stored, _ = load_halves(run)

    def loss(flow, step):
        x, y = draw(run, batch, [stored])
        x = to_float(x)
        if mirror:  # each image by its own coin
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
        return rectified_flow_loss(flow, torch.randn_like(x), x, y)

    return fit_stage(run, stage, "teacher", loss, start, nfe=12, **training)

def make_pairs(run, stage, n, nfe, batch, seed):
    """Pairs (z, x): x is the end of a flow's ODE from z. In `own` the flow is the 2-flow.

    Each batch is a file, with its own random numbers: pairs do not depend on interruptions or processes.
    """
    flow = load_flow(run.result("train" if stage == "pairs" else "reflow"), run.device)
    paths = run.chunks(stage)
    todo = [i for i in range(RANK, len(paths), WORLD) if not paths[i].exists()]
    report = progress(stage, len(todo))
    for done, i in enumerate(todo, 1):
        seed_all(seed, f"{stage}, pairs", i * batch)
        rows = min(batch, n - i * batch)  # fewer in the last file
        noise = torch.randn(rows, *run.shape).half()  # as it is kept
        y = torch.randint(max(1, run.classes), (rows,))
        data, evaluations = sample(flow, noise.to(run.device).float(), y.to(run.device), nfe)
        save(paths[i], run.recipe(stage), noise=noise, data=data.half().cpu(), y=y)
        report(done, f"files of {batch} pairs, {evaluations} evaluations each")
    return dict(n=n)

def reflow(run, stage, student, anneal, schedule, mirror, steps, batch, start, **training):
    """The 2-flow: annealing reflow of a small network, from random weights."""
    pairs = load_pairs(run, "pairs")

    def loss(flow, step):
        noise, data, y = draw(run, batch, pairs)
        if mirror and torch.rand(()) < 0.5:  # noise and image together, one coin a batch
            noise, data = noise.flip(-1), data.flip(-1)
        beta = anneal_beta(step, anneal * steps, schedule)
        return rectified_flow_loss(flow, annealed_noise(noise, beta), data, y)

    return fit_stage(run, stage, student, loss, start, nfe=1, steps=steps, **training)

def distill(run, stage, guidance, distance, batch, start, **training):
    """The student: flow-guided distillation from the 2-flow's weights. With guidance 0 it is the naive one.

    The stored targets are the 2-flow's own (the paper's poster), or where there is no stage `own` the
    teacher's (the command in the authors' README).
    """
    two_flow = load_flow(run.result("reflow"), run.device)
    pairs = load_pairs(run, run.targets)
    D = DISTANCES[distance]

    def loss(student, step):
        noise, data, y = draw(run, batch, pairs)
        value = distillation_loss(student, noise, data, D, y)
        if guidance:  # on as much fresh noise
            value = value + guidance * guidance_loss(student, two_flow, torch.randn_like(noise), D, y)
        return value

    start = start or run.result("reflow")  # averaged weights; the authors start from raw ones
    return fit_stage(run, stage, run.settings["reflow"]["student"], loss, start, nfe=1, **training)

STAGES = dict(train=train, pairs=make_pairs, reflow=reflow, own=make_pairs, distill=distill)

def fit_stage(run, stage, size, loss, start, nfe, seed, **training):
    """`fit`, from random weights or those in the file `start`, with checkpoints (partial.pt) and pictures."""
    seed_all(seed, f"{stage}, weights", 0)
    net = build(run.networks[size], run.device)
    noise, y = fixed_noise(run)
    if start:
        with trying(f"start from {start}", "its network is another one"):
            net.load_state_dict(load(start)["weights"])
    kept, path = None, run.folder(stage) / "partial.pt"
    if path.exists():
        kept = load(path, run.recipe(stage), mmap=False)  # it is replaced while in use
        print(f"goes on from step {kept['step']:,} of {path}")

    def keep(ema, **state):
        images, _ = sample(ema, noise, y, nfe)  # a Fault, if the network is ruined
        save(path, run.recipe(stage), network=run.networks[size], **state)
        save_pictures(path.with_name("samples.png"), images)

    ema, log = fit(net, loss, name=stage, seed=seed, kept=kept, keep=keep, **training)
    return dict(network=run.networks[size], weights=ema.state_dict(), log=log)

def to_float(images):
    """uint8 0..255 to float -1..1."""
    return images.float() / 127.5 - 1

def to_uint8(x):
    """Float -1..1 to uint8 0..255, rounded (the authors cut off) and clipped."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)

def load_digits():
    """The 1,797 scans beside this file, uint8 [1797, 1, 8, 8], and their digits, int64 [1797]."""
    with np.load(Path(__file__).resolve().with_name("digits.npz")) as file:
        return torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()

def load_cifar10(size):
    """CIFAR-10's training images, reduced to a size, and classes; the archive is in data/, or downloaded."""
    needed = "it needs torchvision that fits torch, and data/cifar-10-python.tar.gz, or a way to download it"
    with trying("have CIFAR-10", needed):
        from torchvision.datasets import CIFAR10
        archive = CIFAR10("data", download=True)
    images = torch.from_numpy(archive.data).permute(0, 3, 1, 2)  # (N, C, 32, 32)
    return F.adaptive_avg_pool2d(images.float(), size).round().byte(), torch.tensor(archive.targets)

def load_images(run):
    """All images, uint8 [N, C, H, W], and classes, int64 [N]; most data sets need a file of convert.py."""
    data = run.settings["train"]["data"]
    path = Path(data or f"data/{run.dataset}.pt")
    if run.dataset == "digits" and not data:
        return load_digits()
    if "cifar" in run.dataset and not data and not path.exists():
        return load_cifar10(run.shape[-1])
    content = load(path)
    found = content.get("shape"), content.get("classes")
    if found != (run.shape, run.classes):
        raise Fault(f"{path} has (shape, classes) {found}, but {run.dataset} needs {run.shape, run.classes}")
    return content["images"], content["y"]

def load_halves(run):
    """Images and classes to train on, and to compare with: by Inception, FID's convention, all for both."""
    columns = load_images(run)
    if run.preset["classifier_steps"]:
        return [x[::2] for x in columns], [x[1::2] for x in columns]
    return columns, columns

def load_pairs(run, stage):
    """The files of a stage's pairs, mapped: a list of (noise, data, y), float16 and int64."""
    files = [load(path, run.recipe(stage)) for path in run.chunks(stage)]
    return [(file["noise"], file["data"], file["y"]) for file in files]

def draw(run, batch, files):
    """This process's share of a batch of random rows of files (lists of columns), on the device."""
    if batch % WORLD:
        raise Fault(f"{WORLD} processes cannot share a batch of {batch}")
    length = len(files[0][0])  # of all files but the last
    n = sum(len(columns[0]) for columns in files)
    rows = [divmod(i, length) for i in torch.randint(n, (batch // WORLD,)).tolist()]
    drawn = []
    for column in zip(*files):
        x = torch.stack([column[file][row] for file, row in rows])
        if run.device != "cpu":  # from pinned memory, so that the loop runs ahead
            x = x.pin_memory().to(run.device, non_blocking=True)
        drawn.append(x.float() if x.dtype == torch.float16 else x)
    return drawn

def fixed_noise(run, n=100, seed=1234):
    """The same noise [n, C, H, W] every time, and classes for it, int64 [n]."""
    noise = torch.randn(n, *run.shape, generator=torch.Generator().manual_seed(seed)).to(run.device)
    return noise, torch.arange(n, device=run.device) % max(1, run.classes)

# ---- 6. Recipes: a stage's folder tells its settings, and the stage is done when its result is there ------
ADM = dict(kind="adm", resolution=64, channels=3, label_dim=1000, dropout=0.13, model_channels=192,
           channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(32, 16, 8))
ADM_STUDENT = ADM | dict(model_channels=128, num_blocks=2, attn_resolutions=(32, 16))

def small_networks(size, channels=3, classes=0):
    """A teacher and a student for two CPU cores, for images of 8x8 to 64x64."""
    network = dict(
        resolution=size, channels=channels, label_dim=classes, num_blocks=1,
        channel_mult=(1, 2) + (2,) * (size // 32), attn_resolutions=(min(8, size // 2),),
        time_scale=16.0)  # with 999 the velocity oscillates in t, and solvers take 3 times as long
    return {"teacher": network | dict(model_channels=32), "small": network | dict(model_channels=16)}

def ddpmpp_networks(size):
    """The paper's 1-flow for CIFAR-10, and the authors' students by their number of weights."""
    network = dict(resolution=size, channels=3, channel_mult=(1, 2, 2), num_blocks=2, attn_resolutions=(16,),
                   dropout=0.15)
    return {
        "teacher": network | dict(model_channels=128, channel_mult=(1, 2, 2, 2), num_blocks=4),
        "27.9M": network | dict(model_channels=128),
        "15.7M": network | dict(model_channels=96),
        "7.0M": network | dict(model_channels=64),
        "3.4M": network | dict(model_channels=64, channel_mult=(1, 1, 2), num_blocks=1),
    }

digits = dict(  # all numbers are ours
    n=5_000, networks=small_networks(8, channels=1),  # n: images of the evaluation
    classifier_steps=600,  # of the classifier that judges; 0: Inception does
    train=dict(name="", data="", mirror=False,
               steps=1_800, batch=64, lr=2e-3, warmup=100, decay=0.6, start="", seed=0),
    pairs=dict(n=512, nfe=12, batch=100, seed=0),
    reflow=dict(student="small", anneal=0.375, schedule="hold", mirror=False,
                steps=1_800, batch=64, lr=4e-3, warmup=100, decay=0.6, start="", seed=0),
    own=dict(n=0, nfe=12, batch=100, seed=0),
    distill=dict(guidance=1.0, distance="huber",
                 steps=800, batch=64, lr=2e-3, warmup=0, decay=0.6, start="", seed=0),
)
pictures = digits | dict(  # your own, by convert.py; all numbers are ours
    n=2_000, classifier_steps=0, networks=small_networks(16),
    train=digits["train"] | dict(steps=4_000), pairs=dict(n=3_000, nfe=18, batch=100, seed=0),
    reflow=digits["reflow"] | dict(anneal=0.3, schedule="linear", steps=5_000),
    distill=digits["distill"] | dict(steps=1_000, lr=1e-3),
)
cifar16 = pictures | dict(  # CIFAR-10 at half its size; all numbers are ours
    n=5_000, classifier_steps=3_000, networks=small_networks(16, classes=10),
    train=pictures["train"] | dict(mirror=True, steps=7_000), pairs=pictures["pairs"] | dict(n=5_000),
    reflow=digits["reflow"] | dict(mirror=True, steps=4_000),
)
cifar10 = dict(  # all numbers are the authors', but where another source is named
    n=50_000, classifier_steps=0, networks=ddpmpp_networks(32),  # n is FID's convention
    train=dict(name="", data="", mirror=True,  # the number of steps is ours
               steps=800_000, batch=128, lr=2e-4, warmup=5_000, decay=0.0, start="", seed=0),
    pairs=dict(n=50_000, nfe=0, batch=500, seed=0),  # with EDM's network 100,000; the batch is ours
    reflow=dict(student="15.7M", anneal=0.375, schedule="linear", mirror=True,
                steps=800_000, batch=128, lr=2e-4, warmup=5_000, decay=0.0, start="", seed=0),
    own=dict(n=500_000, nfe=0, batch=500, seed=0),
    distill=dict(guidance=1.0, distance="lpips",
                 steps=400_000, batch=128, lr=2e-4, warmup=0, decay=0.0, start="", seed=0),
)
# The pairs of ffhq64 are ours: their number is not public.
ffhq64 = cifar10 | dict(networks=ddpmpp_networks(64), pairs=dict(n=50_000, nfe=36, batch=200, seed=0))
imagenet64 = ffhq64 | dict(  # steps, anneal and own are CIFAR-10's
    networks={
        "teacher": ADM,  # EDM's
        "80.7M": ADM_STUDENT | dict(channel_mult=(1, 2, 2, 4)),
        "44.7M": ADM_STUDENT | dict(channel_mult=(1, 2, 2, 2)),
    },
    pairs=dict(n=400_000, nfe=36, batch=200, seed=0), reflow=cifar10["reflow"] | dict(student="80.7M"),
)
PRESETS = dict(
    digits=digits, cifar16=cifar16, cifar10=cifar10, ffhq64=ffhq64, imagenet64=imagenet64, pictures=pictures,
    **{f"pictures{size}": pictures | dict(networks=small_networks(size)) for size in (32, 64)},
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATHS = "data", "start"  # settings that name files

def image_shape(config):
    """The shape (C, H, W) of a network's images, and its number of classes."""
    size = config["resolution"]
    return (config["channels"], size, size), config.get("label_dim", 0)

class Run:
    """A recipe: a preset, with other settings where given, {stage: {name: value}}."""
    def __init__(self, dataset="digits", out="runs", device=DEVICE, settings=None):
        self.dataset, self.device, self.root = dataset, device, Path(out) / dataset
        self.preset, given = copy.deepcopy(PRESETS[dataset]), settings or {}
        self.networks = self.preset["networks"]
        self.shape, self.classes = image_shape(self.networks["teacher"])
        self.settings = {stage: self.preset[stage] | given.get(stage, {}) for stage in STAGES}
        self.targets = "own" if self.settings["own"]["n"] else "pairs"  # of the distillation

    def line(self, stage):
        """The stages up to this one, in order."""
        stages = [name for name in STAGES if name != "own" or self.targets == "own"]
        if stage not in stages:
            raise Fault("there is no stage own, since own-n is 0")
        return stages[: stages.index(stage) + 1]

    def counting(self, stage):
        """The settings of a stage; of a teacher from elsewhere only its name counts."""
        settings = self.settings[stage]
        return {"name": settings["name"]} if settings.get("name") else settings

    def recipe(self, stage):
        """The settings of a stage and of those before it, as {"train-steps": 1200, ...}."""
        return {f"{name}-{key}": x for name in self.line(stage) for key, x in self.counting(name).items()}

    def folder(self, stage):
        """The recipe as a path: a folder in a folder for each stage, named by what is not the preset's."""
        path = self.root
        for name in self.line(stage):
            words = [name]
            for key, value in sorted(self.counting(name).items()):
                if value == self.preset[name][key]:
                    continue
                if key in PATHS:
                    value = f"{Path(value).stem}-{zlib.crc32(os.fsencode(value)):08x}"
                words.append(f"{key}={value}")
            path /= "-".join(words)
        return path

    def result(self, stage):
        """The file of a finished stage."""
        return self.folder(stage) / "result.pt"

    def chunks(self, stage):
        """The files of a stage's pairs; other stages have none."""
        count = math.ceil(self.settings[stage].get("n", 0) / self.settings[stage]["batch"])
        return [self.folder(stage) / f"chunk{i:05}.pt" for i in range(count)]

def missing(run, goal):
    """The stages to make for a goal, in order: only those that it, or one of them, reads."""
    if all(path.exists() for path in [run.result(goal), *run.chunks(goal)]):
        load(run.result(goal), run.recipe(goal))  # which checks it
        return []
    reads = dict(train=[], pairs=["train"], reflow=["pairs"], own=["reflow"], distill=["reflow", run.targets])
    stages = [stage for source in reads[goal] for stage in missing(run, source)]
    return [*dict.fromkeys(stages), goal]

def make(run, goal):
    """Print the plan, then make a stage and first those that it needs, if not there already: its file."""
    plans = [missing(run, goal)]
    if WORLD > 1:  # the first process has planned before any of them writes
        dist.broadcast_object_list(plans)
    [plan] = plans
    refuse_forgotten(run, plan)
    if "train" in plan and run.settings["train"]["name"]:
        raise Fault(f"{run.folder('train')} has no teacher; convert.py makes it")
    if "distill" in plan and run.settings["distill"]["distance"] == "lpips":
        lpips_network(run.device)  # which may not be there
    for stage in plan:
        settings = ", ".join(f"{name} {value}" for name, value in run.settings[stage].items() if value != "")
        print(f"{stage} is to be made in {run.folder(stage)}: {settings}")
        run.folder(stage).mkdir(parents=True, exist_ok=True)

    for stage in plan:
        content = STAGES[stage](run, stage, **run.settings[stage])
        if RANK == 0:
            if not run.result(stage).exists():  # an equal command may have been quicker
                save(run.result(stage), run.recipe(stage), **content)
            (run.folder(stage) / "partial.pt").unlink(missing_ok=True)
        if WORLD > 1:
            dist.barrier()
    print(f"{goal} is finished: {run.result(goal)}")
    return run.result(goal)

def refuse_forgotten(run, plan):
    """Fault where flags seem forgotten: a stage that is only needed is there, but not by the preset's."""
    for stage in plan[:-1]:
        folder = run.folder(stage)
        others = [path.parent.name for path in folder.parent.glob(f"{stage}-*/result.pt")]
        if others and folder.name == stage and not any(folder.glob("*.pt")):
            raise Fault(f"{folder} is not there, but {', '.join(others)}; repeat flags, or run {stage} first")

# ---- 7. Evaluation: distances between sets of images, sizes, table, pictures -------------------------------
def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)); means [d], covariances [d, d], in float64."""
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
    return total / n, (squares - total.outer(total) / n) / (n - 1)

@torch.no_grad()
def count_macs(net, x):
    """Multiply-accumulates for an image x [1, C, H, W], without the two products of attention."""
    from torch.utils.flop_counter import FlopCounterMode  # imported late, for a quick start
    with FlopCounterMode(display=False) as counter:
        velocity(net, x, 0.5)
    aten, flops = torch.ops.aten, counter.get_flop_counts()["Global"]
    return sum(flops.get(op, 0) for op in (aten.convolution, aten.addmm, aten.mm)) // 2

def train_classifier(run, images, y):
    """A small classifier of images, uint8 [N, C, H, W], into ten classes y, int64 [N]."""
    seed_all(0, "classifier, weights", 0)
    channels, size, _ = run.shape
    net = nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * size**2, 64), nn.ReLU(), nn.Linear(64, 10)).to(run.device)

    def loss(net, step):
        x, labels = draw(run, 128, [(images, y)])
        return F.cross_entropy(net(to_float(x) + 0.1 * torch.randn(x.shape, device=x.device)), labels)

    return fit(net, loss, run.preset["classifier_steps"], lr=1e-3, decay=0.3, name="classifier")[0]

def inception_features(device):
    """A function uint8 [n, 3, H, W] -> [n, 2048]: FID's Inception features, by torch-fidelity."""
    with trying("have Inception", "it needs `pip install torch-fidelity`, and a network for its weights"):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    return torch.no_grad()(lambda images: net(images.to(device))[0])

@cache
def lpips_network(device):
    """LPIPS with VGG, as the package `lpips` has it."""
    with trying("have LPIPS", "it needs `pip install lpips`, and a network for its weights (or "
                f"vgg16-397923af.pth in {torch.hub.get_dir()}/checkpoints)"):
        from lpips import LPIPS
        return LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)

def generate(flow, noise, y, nfe):
    """Images for any number of noises [N, C, H, W], a batch at a time: yields them as uint8."""
    report, done = progress("images", len(noise)), 0
    for z, labels in zip(noise.split(AT_ONCE), y.split(AT_ONCE)):
        yield to_uint8(sample(flow, z, labels, nfe)[0])
        done += len(z)
        report(done)

def measure_floor(real, n):
    """The distance that n images of a perfect generator would have from these features [N, d]."""
    halves = [real[torch.randperm(len(real))].tensor_split(2) for _ in range(100)]
    between = np.mean([frechet_distance(*moments([a]), *moments([b])) for a, b in halves])
    return between * (len(real) / n + 1) / 4  # a bias, which falls as 1 / images of each side

def features_and_images(run):
    """A function from images to features, the training images, and real images to compare with."""
    (seen, y), (real, _) = load_halves(run)
    if not run.preset["classifier_steps"]:
        return inception_features(run.device), seen, real
    classifier = train_classifier(run, seen, y)
    return lambda images: classifier[:-2](to_float(images.to(run.device))), seen, real

def evaluate(run, networks, n=None):
    """Print a table of networks {name: path}, and draw summary.png: the same noise through each."""
    n, metric = n or run.preset["n"], "Frechet" if run.preset["classifier_steps"] else "FID"
    try:
        features, seen, real = features_and_images(run)
        known = torch.cat([features(x) for x in real.split(AT_ONCE)])  # (N, d)
        target = moments(known.split(AT_ONCE))
    except Fault as fault:
        features = None
        print(f"the table has no {metric}: {fault}")
    table, images = [("row", "parameters", "MACs", "evaluations", metric)], []
    few, many = fixed_noise(run, 10), fixed_noise(run, n, seed=4321)
    for name, path in networks.items():
        flow = load_flow(path, run.device)
        parameters = f"{sum(p.numel() for p in flow.parameters()):,}"
        macs = f"{count_macs(flow, few[0][:1]) / 1e6:,.1f}M"
        teacher = path.parent.name.startswith("train")
        for nfe in (1, run.settings["pairs"]["nfe"]) if teacher else (1,):
            x, evaluations = sample(flow, *few, nfe)
            value = "-"
            if features:
                made = moments(map(features, generate(flow, *many, nfe)))
                value = f"{frechet_distance(*made, *target):.2f}"
            row = f"{name}, {'1 step' if nfe == 1 else 'precise'}"
            table.append((row, parameters, macs, evaluations, value))
            images.append(x)
    labels = [f"{row}\n{metric} {value}" for row, *_, value in table[1:]]
    if features and metric == "Frechet":  # what a perfect memoriser and a perfect generator would have
        copies = moments(map(features, seen[torch.randint(len(seen), (n,))].split(AT_ONCE)))
        table.append(("copies", "", "", "", f"{frechet_distance(*copies, *target):.2f}"))
        table.append(("floor", "", "", "", f"{measure_floor(known, n):.2f}"))
    print_table(table)
    save_pictures(run.root / "summary.png", torch.cat(images), labels)
    print(f"distances of {n:,} images; pictures in {run.root / 'summary.png'}")

def finished_networks(run):
    """Every finished network of the data set, {folder: path}."""
    paths = sorted(run.root.rglob("result.pt"), reverse=True)  # each before those that are made from it
    found = {str(path.parent.relative_to(run.root)): path for path in paths if "network" in load(path)}
    if not found:
        raise Fault(f"{run.root} holds no network; train {run.dataset} first, or name its --out")
    return found

def print_table(rows):
    """Rows of cells in columns, the first to the left, the others to the right."""
    width = max(len(first) for first, *_ in rows)
    for first, *rest in rows:
        print(f"{first:<{width}}", "".join(f"{cell:>13}" for cell in rest))

def save_pictures(path, images, labels=()):
    """A PNG of images [N, C, H, W] in [-1, 1], ten in a row, with a label beside each row."""
    from matplotlib.figure import Figure
    x = to_uint8(images.float().cpu()).expand(-1, 3, -1, -1)
    x = F.pad(x, (1, 1, 1, 1, 0, 0, 0, -len(x) % 10), value=255)  # white frames, and a whole last row
    rows = x.unflatten(0, (-1, 10)).permute(0, 3, 1, 4, 2)  # (rows, H, 10, W, 3)
    figure = Figure(figsize=(10, len(rows)))
    axes = figure.add_axes((0, 0, 1, 1), frame_on=False, xticks=[], yticks=[])
    axes.imshow(rows.flatten(2, 3).flatten(0, 1).numpy(), origin="upper", interpolation="nearest")
    for i, label in enumerate(labels):
        axes.text(-1, (i + 0.5) * x.shape[2], label, ha="right", va="center")
    figure.savefig(path, dpi=132, bbox_inches="tight")  # so a pixel of 64x64 has 2

def sample_images(run, ckpt=None, n=100, nfe=None, npz=None, label=None):
    """n images of the student, which makes one step, or of a file's network, by rk45 or nfe evaluations."""
    path = ckpt or run.result("distill")
    content, flow = load(path), load_flow(path, run.device)
    shape, classes = image_shape(content["network"])
    if nfe is None:
        nfe = 1 if "distill-steps" in content["recipe"] else 0
    if label is not None and label >= classes:
        raise Fault(f"there is no --class {label}: {path} has {classes} classes")
    seed_all(run.settings["distill"]["seed"], "sample", 0)
    noise = torch.randn(n, *shape).to(run.device)
    y = torch.randint(max(1, classes), (n,)) if label is None else torch.full((n,), label)
    images = torch.cat([x.cpu() for x in generate(flow, noise, y.to(run.device), nfe)])
    if npz:
        np.savez(npz, arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=y.numpy())
    save_pictures("samples.png", to_float(images[:100]))
    print(f"{n} images of {path}, {nfe or 'rk45'} evaluations each; up to 100 in samples.png")

# ---- 8. Command line ---------------------------------------------------------------------------------------
COMMANDS = """commands:
  all                                  every stage, then the table
  train, pairs, reflow, own, distill   one stage, and first those that it needs
  eval, sample                         the table of all networks; images of one"""
SETTINGS = """
name      teacher of convert.py
data      images of convert.py
mirror    show images mirrored, too
n         pairs (own: 0, the teacher's)
nfe       evaluations; 0: rk45
student   size of the network
anneal    share of steps with beta > 0
schedule  of beta: linear, hold, ...
guidance  weight; 0: naive student
distance  D: l2, huber, lpips
steps     of training
batch     images (pairs of a file)
lr        learning rate of Adam
warmup    steps until lr is reached
decay     lr falls over this last share
start     file, to begin with weights
seed      of all random numbers"""

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""
    def error(self, message):
        raise Fault(f"{message}; see `python {self.prog} --help`")

def settings_help(preset):
    """A row for each setting, a column for each stage, with the preset's values."""
    lines = ["".join(f"{word:>8}" for word in ("", *STAGES))]
    for name, words in (line.split(maxsplit=1) for line in SETTINGS.strip().splitlines()):
        values = "".join(f"{str(preset[stage].get(name, ' ')) or '-':>8}" for stage in STAGES)
        lines.append(f"{name:>8}{values}  {words}")
    return "\n".join(lines)

def parse(argv):
    """A command line as its command, its run, and what else is given. Fault if there is a mistake in it."""
    first = Parser(add_help=False, allow_abbrev=False)  # the other flags depend on the data set
    first.add_argument("--dataset", choices=PRESETS, default="digits")
    dataset = first.parse_known_args(argv)[0].dataset
    preset = PRESETS[dataset]
    epilog = f"settings, --<stage>-<setting>, and their values for {dataset}:\n{settings_help(preset)}"
    parser = Parser(
        prog="slimflow.py", description=COMMANDS, epilog=epilog, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("command", nargs="?", choices=["all", *STAGES, "eval", "sample"], default="all", metavar="command")
    add("--dataset", default=dataset, metavar="NAME", help=", ".join(PRESETS))
    add("--out", default="runs", help="folder of the results [runs]")
    add("--seed", type=int, help="of every stage, and of the noise of sample [0]")
    add("--n", type=int, help="eval, sample: number of images")
    add("--ckpt", help="sample: file of a network [the student's]")
    add("--nfe", type=int, help="sample: evaluations, 0 for rk45 [a student 1, else 0]")
    add("--npz", help="sample: file for images, arr_0 uint8 [N, H, W, C], and classes, arr_1")
    add("--class", type=int, dest="label", metavar="K", help="sample: of this class only")
    choices = dict(schedule=SCHEDULES, distance=DISTANCES, student=[*preset["networks"]][1:])
    for stage in STAGES:
        for name, value in preset[stage].items():
            kind = dict(type=os.path.abspath if name in PATHS else type(value), choices=choices.get(name))
            if isinstance(value, bool):
                kind = dict(action=argparse.BooleanOptionalAction)
            add(f"--{stage}-{name}", dest=f"{stage}-{name}", help=argparse.SUPPRESS, **kind)

    given = vars(parser.parse_intermixed_args(argv))
    settings = {stage: dict(seed=given["seed"]) if "seed" in given else {} for stage in STAGES}
    for flag, value in list(given.items()):
        stage, _, name = flag.rpartition("-")
        least = 1 if name in ("n", "steps", "batch") and stage != "own" else 0
        most = 1 if name in ("anneal", "decay") else 1e12
        if value == "" or (type(value) in (int, float) and not least <= value <= most):
            raise Fault(f"--{flag} cannot be {value!r}; numbers are from {least} to {most:g}")
        if stage:
            settings[stage][name] = given.pop(flag)
    command = given.pop("command")
    run = Run(given.pop("dataset"), given.pop("out"), settings=settings)
    given.pop("seed", None)
    if given and command not in ("eval", "sample"):
        raise Fault(f"{command} takes no --{min(given)}; settings are --<stage>-<setting>")
    return command, run, given

def run_all(run):
    """Every stage, then the table; where a classifier judges also rivals, which show what each idea adds."""
    make(run, "distill")
    given, plain, naive = run.settings["distill"], copy.deepcopy(run), copy.deepcopy(run)
    plain.settings["reflow"]["anneal"] = 0.0
    naive.settings["distill"].update(guidance=0.0, steps=given["steps"] * 7 // 3)  # each 3 passes, not 7
    student = "guided" if given["guidance"] else "naive"
    networks = {"teacher": run.result("train"), student: run.result("distill")}
    if run.preset["classifier_steps"] and given["guidance"]:
        networks["naive"] = make(naive, "distill")
    networks["2-flow"] = run.result("reflow")
    if run.preset["classifier_steps"] and run.settings["reflow"]["anneal"]:
        networks["plain 2-flow"] = make(plain, "reflow")
    if WORLD == 1:  # after torchrun, `slimflow.py eval` makes the table
        evaluate(run, networks)

def main(argv=None):
    """Run the command line; return its exit status. What the user must mend is one line on stderr, and 2."""
    try:
        if WORLD > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(timeout=timedelta(days=1))  # pairs may take long
            if RANK > 0:  # only the first prints
                sys.stdout = None
        command, run, given = parse(argv)
        if command in STAGES:
            make(run, command)
        elif command == "all":
            run_all(run)
        elif command == "eval":
            evaluate(run, finished_networks(run), given.get("n"))
        else:
            sample_images(run, **given)
        if WORLD > 1:
            dist.destroy_process_group()
        return 0
    except (Fault, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from what was saved, if anything"
    print("slimflow:", message.replace("\n", " "), file=sys.stderr)
    return 2

if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for any name
    sys.exit(main())
