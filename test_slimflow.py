"""Tests: parity with the authors' programs, closed forms, invariants, and the command line as a user runs it.

Reference numbers were recorded from EDM's networks, SciPy's RK45 and a Frechet distance in float64.
"""

import contextlib
import copy
import errno
import faulthandler
import hashlib
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import traceback
import types
import urllib.error
import warnings
import zipfile
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import slimflow as sf
import toy2d

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "notebooks"))
import sweeps  # noqa: E402

# ------------------------------------------------------------------------------------------------------------
# Networks


def fill(net):
    """The recorded networks' weights: each from a generator seeded by the parameter's name."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(p.shape))
            if p.ndim > 1:
                z /= math.sqrt(np.prod(p.shape[1:]))
            else:
                z = 0.1 * z + (1 if "norm" in name and name.endswith("weight") else 0)
            p.copy_(torch.from_numpy(z))
    return net.double().eval()


SMALL = dict(resolution=16, channels=3, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
NETWORKS = {
    "ddpm++": dict(
        config=SMALL | dict(model_channels=32), seed=11, y=None, params=749891,
        first=[0.64721, 0.39570938, 0.05434661, 0.13135316, -0.14404724, -0.23872489, 0.41166826, 0.592715],
        mean=-0.045988777543834146, std=0.5545189148807279, norm=21.807226209150294,
    ),
    "adm": dict(
        config=SMALL | dict(model_channels=64, label_dim=10, kind="adm"), seed=12, y=[0, 1], params=3295939,
        first=[-0.34044294, 0.320936, -0.31770957, -0.21249442,
               -0.32999335, -0.12229487, -0.54960043, -0.06119815],
        mean=-0.008057750943048019, std=0.5344596218012859, norm=20.948834205226202,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_network_computes_what_edm_computes(kind, layout):
    case = NETWORKS[kind]
    net = sf.UNet(**case["config"])
    assert sf.count_parameters(net) == case["params"]
    net = fill(net).to(memory_format=layout)
    x = torch.from_numpy(np.random.RandomState(case["seed"]).standard_normal((2, 3, 16, 16)))
    y = case["y"] and torch.tensor(case["y"])
    with torch.no_grad():
        out = net(x, torch.tensor([0.05, 0.95], dtype=torch.float64), y)
    assert out.norm().item() == pytest.approx(case["norm"], rel=1e-6)
    assert out.mean().item() == pytest.approx(case["mean"], rel=1e-6)
    assert out.std(correction=0).item() == pytest.approx(case["std"], rel=1e-6)
    error = out.flatten()[:8] - torch.tensor(case["first"], dtype=torch.float64)
    assert error.norm() / out.flatten()[:8].norm() < 1e-6


EDM_CIFAR = sf.DDPMPP | dict(resolution=32, model_channels=128, channel_mult=(2, 2, 2), num_blocks=4)
PAPER = [  # network, image size, parameters, MACs of convolutions and linear layers
    ("cifar10 27.9M", sf.PRESETS["cifar10"].students["27.9M"], 27906179, 6791954432),
    ("cifar10 15.7M", sf.PRESETS["cifar10"].students["15.7M"], 15707235, 3821801472),
    ("cifar10 teacher", sf.PRESETS["cifar10"].teacher, 61804419, 10678632448),
    ("cifar10 EDM", EDM_CIFAR, 55732739, 21020344320),
    ("ffhq64 27.9M", sf.PRESETS["ffhq64"].students["27.9M"], 27906179, 26555777024),
    ("ffhq64 15.7M", sf.PRESETS["ffhq64"].students["15.7M"], 15707235, 14942932992),
    ("ffhq64 teacher", sf.PRESETS["ffhq64"].teacher, 61804419, 41691578368),
    ("imagenet64 80.7M", sf.PRESETS["imagenet64"].students["80.7M"], 80685315, 31033708544),
    ("imagenet64 teacher", sf.PRESETS["imagenet64"].teacher, 295899267, 103441594368),
]


@pytest.mark.parametrize("config, params, macs", [row[1:] for row in PAPER], ids=[row[0] for row in PAPER])
def test_networks_have_the_published_sizes(config, params, macs):
    net, shape = sf.blueprint(config), (3, config["resolution"], config["resolution"])
    assert sf.count_parameters(net) == params
    assert sf.count_macs(net, shape) == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize("name", sf.PRESETS)
def test_students_have_the_size_that_names_them(name):
    for size, config in sf.PRESETS[name].students.items():
        millions = sf.count_parameters(sf.blueprint(config)) / 1e6
        assert f"{millions:.{len(size.split('.')[1]) - 1}f}M" == size


@pytest.mark.parametrize("kind", ["ddpm++", "adm"])
def test_network_starts_at_zero_velocity_and_every_weight_learns(kind):
    torch.manual_seed(0)
    net = sf.UNet(**NETWORKS[kind]["config"])
    x, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([3, 4]) if kind == "adm" else None
    assert net(x, t, y).abs().max() < 1e-2
    fill(net)(x.double(), t.double(), y).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize("kind", NETWORKS)
def test_network_compiles_whole_and_in_bfloat16_stays_close(kind):
    """As on CUDA: no part of the network falls out of the graph; loss and gradients stay in float32."""
    net = fill(sf.UNet(**NETWORKS[kind]["config"])).float()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x, t, y = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([3, 4]) if kind == "adm" else None
    with torch.autocast("cpu", torch.bfloat16):
        low = compiled(x, t, y)
        loss = sf.rectified_flow_loss(net, torch.randn_like(x), x, y)
    high = net(x, t, y)
    assert low.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (low - high).norm() < 0.03 * high.norm()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_class_changes_the_output_and_none_means_no_class():
    net = fill(sf.UNet(**NETWORKS["adm"]["config"]))
    x, t = torch.randn(1, 3, 16, 16).double(), torch.full((1,), 0.5).double()
    one, other, none = net(x, t, torch.tensor([1])), net(x, t, torch.tensor([2])), net(x, t)
    assert (one - other).abs().max() > 1e-3 and (one - none).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------
# Flow


def gaussian_flow(mean, std):
    """The exact velocity E[x - z | x_t] from N(0, 1) to N(mean, std^2), per element."""

    def flow(x, t, y=None):
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        gain = (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2)
        return mean + gain * (x - t * mean)

    return flow


def test_rectified_flow_loss_is_least_at_the_known_velocity():
    torch.manual_seed(0)
    z, x, t = torch.randn(200_000, 1), 0.7 + 0.3 * torch.randn(200_000, 1), torch.rand(200_000)
    exact = gaussian_flow(0.7, 0.3)
    shift = torch.zeros((), requires_grad=True)
    scale = torch.zeros((), requires_grad=True)

    def gradient(a, b):
        loss = sf.rectified_flow_loss(
            lambda x, t, y: exact(x, t) * (1 + b + scale) + a + shift, z, x, t=t
        )
        return torch.stack(torch.autograd.grad(loss, [shift, scale]))

    assert gradient(0, 0).abs().max() < 5e-3
    assert gradient(0.1, 0)[0] == pytest.approx(0.2, abs=5e-3)  # d/da (a^2)
    assert gradient(0, 0.1)[1] > 0.02 and gradient(0, -0.1)[1] < -0.02
    z_next = torch.randn_like(z)
    pairs = z_next, x, lambda x_t, t, y: x - z_next
    assert sf.rectified_flow_loss(pairs[2], z_next, x) == 0


def test_rectified_flow_loss_draws_time_over_the_whole_path():
    seen, zeros = [], torch.zeros(20_000, 1)
    sf.rectified_flow_loss(lambda x, t, y: seen.append(t) or x, zeros, zeros)
    assert sf.T0 <= seen[0].min() < 0.01 and 0.99 < seen[0].max() <= 1 and abs(seen[0].mean() - 0.5) < 0.01


def test_interpolate_runs_from_noise_to_data():
    z, x = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    at = sf.interpolate(z, x, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(at[0], z[0]) and torch.equal(at[2], x[2])
    torch.testing.assert_close(at[1], 0.75 * z[1] + 0.25 * x[1])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential"])
def test_anneal_beta_falls_from_one_to_zero(schedule):
    b = [sf.anneal_beta(step, 100, schedule) for step in range(101)]
    assert b[0] == 1 and b[100] == 0 and b[99] < 0.02 and all(p > q for p, q in zip(b, b[1:]))
    assert sf.anneal_beta(10**6, 100, schedule) == 0 and sf.anneal_beta(0, 0, schedule) == 0
    middle = {"linear": 0.5, "cosine": 0.5, "exponential": 1 / (1 + math.exp(2.5))}
    assert b[50] == pytest.approx(middle[schedule])
    with pytest.raises(ValueError, match="linear"):
        sf.anneal_beta(1, 100, "square")


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 1.0])
def test_annealed_noise_keeps_unit_variance(beta):
    torch.manual_seed(0)
    z = torch.randn(400_000)
    a = sf.annealed_noise(z, beta)
    assert a.var().item() == pytest.approx(1, abs=0.01)
    assert (a * z).mean().item() == pytest.approx(math.sqrt(1 - beta**2), abs=0.01)
    assert beta > 0 or torch.equal(a, z)


@pytest.mark.parametrize("distance", ["l2", "huber"])
def test_distances_are_per_image_zero_only_at_equality_and_point_home(distance):
    d = sf.DISTANCES[distance]
    a, b = torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(5, 3, 4, 4)
    assert d(a, b).shape == (5,) and (d(a, b) > 0).all() and d(b, b).abs().max() < 1e-7
    (gradient,) = torch.autograd.grad(d(a, b).sum(), a)
    assert (d(a - 1e-2 * gradient / gradient.norm(), b) < d(a, b)).all()
    assert torch.allclose(gradient / gradient.norm(), (a - b) / (a - b).norm(), atol=0.2)


def test_l2_and_huber_values():
    a, b = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)
    c = 0.00054 * 2
    assert sf.l2(a, b).item() == pytest.approx(9)
    assert sf.huber(a, b).item() == pytest.approx(math.sqrt(36 + c * c) - c)


def test_one_and_two_steps_of_a_known_flow():
    z, t = torch.randn(4, 2), torch.tensor([0.25, 0.5, 0.75, 1.0])
    assert torch.allclose(sf.one_step(lambda x, t, y: x * t[:, None], z), z * (1 + sf.T0))
    x = sf.two_step(lambda x, t, y: x + t[:, None], z, t)
    s = t[:, None]
    middle = z + s * (z + sf.T0)
    torch.testing.assert_close(x, middle + (1 - s) * (middle + s))


def test_distillation_loss_is_zero_at_the_pairs_and_pulls_towards_them():
    z, x = torch.randn(64, 2), torch.randn(64, 2)
    shift = torch.full((), 0.1, requires_grad=True)
    loss = sf.distillation_loss(lambda z_, t, y: x - z + shift, z, x, sf.l2)
    assert loss.item() == pytest.approx(0.01, rel=1e-4)
    assert torch.autograd.grad(loss, shift)[0].item() == pytest.approx(0.2, rel=1e-4)
    assert sf.distillation_loss(lambda z_, t, y: x - z, z, x, sf.l2) < 1e-12


def test_guidance_loss_is_zero_for_a_straight_flow_and_pulls_towards_two_steps():
    torch.manual_seed(0)
    z = torch.randn(256, 2)
    straight = lambda x, t, y: torch.full_like(x, 0.5)  # noqa: E731
    assert sf.guidance_loss(straight, straight, z, sf.l2) < 1e-12
    flow = gaussian_flow(0.7, 0.3)
    t = torch.full((256,), 0.4)
    target = sf.two_step(flow, z, t)
    gain = torch.ones((), requires_grad=True)
    student = lambda x, t, y: (target - z) * gain  # noqa: E731
    assert sf.guidance_loss(student, flow, z, sf.l2, t=t) < 1e-12
    (slope,) = torch.autograd.grad(sf.guidance_loss(lambda *a: student(*a) * 1.1, flow, z, sf.l2, t=t), gain)
    assert slope > 0.01


def test_guidance_loss_does_not_train_the_flow_and_draws_its_middle_between_0_2_and_0_8():
    seen, weight = [], torch.ones((), requires_grad=True)

    def flow(x, t, y):
        seen.append(t)
        return x * weight

    loss = sf.guidance_loss(lambda x, t, y: x * 2, flow, torch.randn(5_000, 2), sf.l2)
    assert not loss.requires_grad
    assert (seen[0] == sf.T0).all()
    assert 0.2 <= seen[1].min() < 0.21 and 0.79 < seen[1].max() <= 0.8


# ------------------------------------------------------------------------------------------------------------
# Solvers

X0 = [1.7886284734303186, 0.43650985051198943, 0.09649746807200862, -1.8634927033644908]
SCIPY = {
    1e-3: (56, 5, [11.914123019090063, 4.723375460108509, 2.8187610988037326, -12.756153822340876]),
    1e-5: (134, 14, [11.596953835731584, 4.701321133421295, 2.8165224748354003, -12.87784899997182]),
}


def wavy(x, t, y=None):
    return torch.sin(3 * x) + 4 * t[:, None] * x


@pytest.mark.parametrize("tolerance", SCIPY)
def test_rk45_takes_scipys_steps(tolerance):
    x0 = torch.tensor([X0], dtype=torch.float64)
    nfe, accepted, end = SCIPY[tolerance]
    x, taken = sf.sample(wavy, x0, "rk45", rtol=tolerance, atol=tolerance)
    assert taken == nfe
    assert len(list(sf.rk45(wavy, x0, tolerance, tolerance))) == accepted + 1
    torch.testing.assert_close(x, torch.tensor([end], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("adams", 3)])
def test_solvers_converge_at_their_order(solver, order):
    """On a smooth field; with Heun's last step Euler's, its local error h^2 keeps the order 2."""
    field = lambda x, t, y: x * (t[:, None] - 2)  # noqa: E731
    z = torch.ones(1, 1, dtype=torch.float64)
    exact = math.exp(sum(s * (t * t / 2 - 2 * t) for t, s in ((1, 1), (sf.T0, -1))))
    if solver == "euler":  # the authors' steps of 1/N over [T0, 1] solve (1 - T0) dx/dt = v
        exact = math.exp(sum(s * (t * t / 2 - 2 * t) for t, s in ((1, 1), (sf.T0, -1))) / (1 - sf.T0))
    errors = [abs(sf.sample(field, z, solver, steps=n)[0].item() - exact) for n in (16, 32, 64)]
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver, steps, nfe", [
    ("euler", 7, 7), ("heun", 7, 13), ("heun", 1, 1), ("adams", 7, 7), ("adams", 1, 1),
])  # fmt: skip
def test_solvers_take_the_evaluations_they_promise(solver, steps, nfe):
    z = torch.randn(2, 3)
    assert sf.sample(wavy, z, solver, steps=steps)[1] == nfe
    times = [t for t, _ in sf.SOLVERS[solver](wavy, z, steps)]
    assert times[0] == sf.T0 and times[-1] == pytest.approx(1) and len(times) == steps + 1


def test_adams_is_exact_where_the_velocity_is_linear_in_time():
    """Its first step is Euler's, mended by the trapezoid; from then on it integrates parabolas."""
    z = torch.randn(2, 3, dtype=torch.float64)
    states = list(sf.adams(lambda x, t, y: (3 - 5 * t)[:, None].expand_as(x), z, 6))
    for t, x in states[1:]:
        exact = z + 3 * (t - sf.T0) - 2.5 * (t**2 - sf.T0**2)
        torch.testing.assert_close(x, exact, rtol=1e-12, atol=1e-12)


def test_adams_beats_rk45_at_half_of_its_evaluations():
    z = torch.randn(256, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, _ = sf.sample(wavy, z, "rk45", rtol=1e-9, atol=1e-9)
    for tolerance in (1e-3, 1e-5):
        x, nfe = sf.sample(wavy, z, "rk45", rtol=tolerance, atol=tolerance)
        ours, taken = sf.sample(wavy, z, "adams", steps=nfe // 2)
        assert taken == nfe // 2 and sf.l2(ours, exact).mean() < sf.l2(x, exact).mean()


def test_one_euler_step_is_one_step():
    z = torch.randn(5, 2)
    torch.testing.assert_close(sf.sample(wavy, z, "euler", steps=1)[0], sf.one_step(wavy, z))


def test_solvers_hand_the_class_on():
    z, y = torch.zeros(3, 2), torch.tensor([1, 2, 3])
    for solver in sf.SOLVERS:
        options = {} if solver == "rk45" else dict(steps=3)
        x, _ = sf.sample(lambda x, t, y: y[:, None].expand(-1, 2).float(), z, solver, y=y, **options)
        torch.testing.assert_close(x, y[:, None].expand(-1, 2).float(), atol=4e-3, rtol=0)


@pytest.mark.parametrize("solver", [dict(solver="euler", steps=2), dict(solver="adams", steps=4)])
def test_images_that_are_not_finite_are_refused(solver):
    with pytest.raises(sf.Fault, match=f"the images of {solver['solver']} are not finite; take another"):
        sf.sample(lambda x, t, y: x * math.inf, torch.ones(1, 2), **solver)


def test_rk45_names_the_time_at_which_a_field_breaks():
    def broken(x, t, y=None):
        return x if t[0] < 0.5 else x * math.nan

    with pytest.raises(sf.Fault, match=r"past t = 0\.(49|50)"):
        sf.sample(broken, torch.ones(1, 1), "rk45")
    for bad in (math.nan, math.inf):
        with pytest.raises(sf.Fault, match=r"past t = 0\.001"):
            sf.sample(lambda x, t, y, bad=bad: x * bad, torch.ones(1, 1), "rk45")


def test_straightness_is_zero_for_straight_flows_only():
    z = torch.randn(100, 2, dtype=torch.float64)
    end = torch.randn(100, 2, dtype=torch.float64)
    assert sf.straightness(lambda x, t, y: end, z) < 1e-20
    bent = sf.straightness(lambda x, t, y: end * 2 * t[:, None], z, steps=200)
    assert bent == pytest.approx(end.square().mean().item() / 3, rel=0.02)  # integral of (1 - 2 t)^2


# ------------------------------------------------------------------------------------------------------------
# Metrics


def test_frechet_distance():
    r = np.random.RandomState(5)
    a, b = r.randn(500, 16), r.randn(500, 16) @ r.randn(16, 16) / 4 + 0.3
    a, b = sf.moments([torch.from_numpy(a)]), sf.moments(torch.from_numpy(b).split(77))
    assert sf.frechet_distance(*a, *b) == pytest.approx(6.923588813096066, rel=1e-6)
    assert sf.frechet_distance(*b, *a) == pytest.approx(6.923588813096066, rel=1e-6)
    assert abs(sf.frechet_distance(*a, *a)) < 1e-9
    with pytest.raises(sf.Fault, match="statistics of 16 and of 3 features cannot be compared"):
        sf.frechet_distance(*a, a[0][:3], a[1][:3, :3])
    with pytest.raises(sf.Fault, match="needs at least 17 images, not 16"):
        sf.moments([torch.randn(16, 16)])


def test_frechet_distance_is_stable_where_covariances_are_singular():
    """200 cases against the exact relation tr (A A^T B B^T)^(1/2) = sum of singular values of A^T B."""
    random, worst = np.random.RandomState(0), 0.0
    for _ in range(200):
        d = random.randint(2, 65)
        a, b = (random.randn(d, random.randint(1, 2 * d)) * 10 ** random.uniform(-3, 3) for _ in range(2))
        a *= 10 ** random.uniform(-6, 0, (d, 1))  # features of very different size
        b = a.copy() if random.rand() < 0.2 else b  # equal, so 0
        mu1, mu2 = random.randn(2, d)
        traces = (a**2).sum() + (b**2).sum()
        expected = ((mu1 - mu2) ** 2).sum() + traces - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
        got = sf.frechet_distance(mu1, a @ a.T, mu2, b @ b.T)
        worst = max(worst, abs(got - expected) / (traces + ((mu1 - mu2) ** 2).sum()))
    assert worst < 1e-8  # a covariance is precise to 1e-16, its root to 1e-8


def test_moments_of_few_samples_far_from_zero():
    x = 1e4 + np.random.RandomState(0).randn(40, 16)
    mu, cov = sf.moments(torch.from_numpy(x).split(7))
    np.testing.assert_allclose(mu, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.T), atol=1e-6)
    with pytest.raises(sf.Fault, match=r"in 16 features needs at least 17 images, not 16; use a larger --n"):
        sf.moments([torch.from_numpy(x[:16])])


def test_frechet_distance_of_commuting_gaussians():
    v, w = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 4.0, 1.0])
    d = sf.frechet_distance(torch.zeros(3), torch.diag(v), torch.ones(3), torch.diag(w))
    assert d == pytest.approx(3 + (1 - 3) ** 2 + 0 + 1)


# ------------------------------------------------------------------------------------------------------------
# Data, pictures


def test_digits_are_the_real_ones():
    images, labels = sf.load_images(sf.PRESETS["digits"])
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (HERE / "digits.npz").stat().st_size <= 60_000


def test_pixels_survive_the_way_to_floats_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    x = sf.to_float(every)
    assert x[0] == -1 and x[-1] == 1
    assert torch.equal(sf.to_uint8(x), every)
    assert sf.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def test_flips_keep_pairs_together():
    torch.manual_seed(0)
    a = torch.randn(100, 1, 4, 4)
    b, c = sf.flip_together(a, 2 * a)
    assert torch.equal(2 * b, c)
    mirrored = [not torch.equal(x, y) for x, y in zip(a, b)]
    assert 30 < sum(mirrored) < 70 and torch.equal(b[mirrored.index(True)], a[mirrored.index(True)].flip(-1))


def test_grid_keeps_the_order_of_images():
    x = torch.arange(10).reshape(10, 1, 1, 1).expand(-1, 1, 8, 8) / 127.5 - 1
    picture = sf.grid(x, columns=4)
    assert picture.shape == (3 * 68, 4 * 68, 3)
    assert picture[2, 2, 0] == 0 and picture[70, 70, 0] == 5 and picture[138, 70, 0] == 9
    assert (picture[138:, 138:] == 255).all()


def little(name, n, label_dim=0):
    """A paper preset with images of n x n."""
    return replace(sf.PRESETS[name], shape=(3, n, n), label_dim=label_dim)


def png(array):
    """An image file as bytes."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def colours(seed, *shape):
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def test_images_come_from_a_zip_of_edms_and_from_a_folder_alike(tmp_path, capsys):
    pictures = {f"0000{i % 2}/img{i:08}.png": colours(i, 8, 8, 3) for i in range(5)}
    labels = [[name, 2 - i % 2] for i, name in enumerate(pictures)]
    files = {name: png(x) for name, x in pictures.items()}
    zipped(tmp_path / "edm.zip", files | {"dataset.json": json.dumps(dict(labels=labels[::-1]))})
    images, y = sf.load_images(little("imagenet64", 8, 3), tmp_path / "edm.zip")
    by_name = sorted(pictures)
    assert images.dtype == torch.uint8 and images.shape == (5, 3, 8, 8)
    assert (images.permute(0, 2, 3, 1).numpy() == [pictures[name] for name in by_name]).all()
    assert y.tolist() == [dict(labels)[name] for name in by_name] and y.dtype == torch.int64
    assert "decode" in capsys.readouterr().out
    assert np.load(tmp_path / "edm.zip.8x8.labels.npy", mmap_mode="r").shape == (5,)
    for name, data in files.items():
        path = tmp_path / "folder" / name.replace("0000", "class", 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "folder/README.txt").write_text("no image")
    again, y = sf.load_images(little("imagenet64", 8, 2), tmp_path / "folder")
    assert torch.equal(images, again) and y.tolist() == [0, 0, 0, 1, 1]
    again, y = sf.load_images(little("ffhq64", 8), tmp_path / "folder")
    assert torch.equal(images, again) and y is None
    again, y = sf.load_images(little("imagenet64", 8, 2), tmp_path / "folder")
    assert y.tolist() == [0, 0, 0, 1, 1]  # what was decoded without labels does not stand in


def test_files_that_grow_and_pictures_that_start_programs_are_refused(tmp_path, one_line):
    """A few hundred KB each, which want more than memory should give, or Ghostscript."""
    for path, name, mebibytes in (("bomb.zip", "0.png", 200), ("digits.npz", "images.npy", 300)):
        archive = zipfile.ZipFile(tmp_path / path, "w", zipfile.ZIP_DEFLATED)
        with archive, archive.open(name, "w") as file:
            for _ in range(mebibytes):
                file.write(bytes(2**20))
    with pytest.raises(sf.Fault, match=r"0.png cannot be used: more than 128 MiB; mend it or take it out"):
        sf.load_images(little("ffhq64", 8), tmp_path / "bomb.zip")
    with pytest.raises(sf.Fault, match=r"digits.npz is damaged or no digits.npz \(too large\); take the one"):
        sf.load_images(sf.PRESETS["digits"], tmp_path)
    large, eps = io.BytesIO(), io.BytesIO()
    Image.new("1", (6_000, 6_000)).save(large, "PNG")
    Image.new("RGB", (99, 99)).save(eps, "EPS")
    for file, reason in ((large, "6000x6000 are more than 32 million"), (eps, "cannot identify image file")):
        zipped(tmp_path / "x.zip", {"0.png": file.getvalue()})
        with pytest.raises(sf.Fault, match=f"0.png cannot be used: {reason}"):
            sf.load_images(little("ffhq64", 8), tmp_path / "x.zip")


def test_decoded_images_are_kept_until_the_source_is_newer(tmp_path, capsys):
    path, preset = tmp_path / "some.zip", little("ffhq64", 8)
    zipped(path, {"a.png": png(colours(0, 8, 8, 3))})
    first, _ = sf.load_images(preset, path)
    capsys.readouterr()
    sf.load_images(preset, path)
    assert capsys.readouterr().out == ""
    zipped(path, {"a.png": png(colours(1, 8, 8, 3))})
    os.utime(path, (time.time() + 10,) * 2)
    assert not torch.equal(sf.load_images(preset, path)[0], first)


def test_images_of_every_kind_become_rgb_squares():
    rgb, alpha = colours(0, 8, 8, 3), colours(1, 8, 8, 1)
    grey, deep = colours(2, 8, 8), np.random.RandomState(3).randint(0, 65536, (8, 8)).astype(np.uint16)

    def decoded(data, size=8):
        return sf.decode(io.BytesIO(data), size).transpose(1, 2, 0)

    assert (decoded(png(rgb)) == rgb).all()
    assert (decoded(png(grey)) == grey[:, :, None]).all()
    assert (decoded(png(grey > 127)) == 255 * (grey > 127)[:, :, None]).all()
    assert (decoded(png(deep)) == (deep // 257)[:, :, None]).all()
    over_white = 255 - (255 - rgb.astype(float)) * alpha / 255
    assert np.abs(decoded(png(np.concatenate([rgb, alpha], axis=2))) - over_white).max() <= 1
    over_white = 255 - (255 - grey[:, :, None].astype(float)) * alpha / 255
    assert np.abs(decoded(png(np.stack([grey, alpha[:, :, 0]], axis=2))) - over_white).max() <= 1
    palette = Image.fromarray(rgb).quantize(16)
    index, table = np.asarray(palette), np.array(palette.getpalette()[:48]).reshape(16, 3)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=3)
    assert (decoded(file.getvalue()) == np.where(index[:, :, None] == 3, 255, table[index])).all()
    Image.fromarray(rgb).convert("CMYK").save(file := io.BytesIO(), "JPEG", quality=100)
    assert decoded(file.getvalue()).shape == (8, 8, 3)
    wide = colours(4, 16, 40, 3)
    boxes = wide[:, 12:28].reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    assert np.abs(decoded(png(wide)) - boxes).max() <= 1
    tall = wide.transpose(1, 0, 2)
    assert np.abs(decoded(png(tall)) - boxes.transpose(1, 0, 2)).max() <= 1
    half = np.concatenate([np.full((16, 8, 4), 255), np.zeros((16, 8, 4))], axis=1).astype(np.uint8)
    assert (decoded(png(half)) == 255).all()  # nothing of the black under full transparency


def test_unusable_images_and_labels_are_named_and_nothing_is_kept(tmp_path):
    good = {"0/a.png": png(colours(0, 8, 8, 3)), "1/b.png": png(colours(1, 9, 8, 3))}
    labels = lambda *pairs: {"dataset.json": json.dumps(dict(labels=pairs))}  # noqa: E731
    bomb = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(bomb, "PNG")
    cases = {
        "x.png cannot be used: 8x7 pixels, and 8x8 are needed": good | {"1/x.png": png(colours(0, 7, 8, 3))},
        "1/x.png cannot be used: ": good | {"1/x.png": good["0/a.png"][:100]},
        "0/x.png cannot be used: cannot identify": good | {"0/x.png": b"hello"},
        "0/x.png cannot be used: Image size": good | {"0/x.png": bomb.getvalue()},
        "no .bmp .gif .jpeg .jpg .png": {"a.txt": b"hello"},
        "c.png has no class from 0 to 1": good | {"c.png": good["0/a.png"]},
        "2/c.png has no class from 0 to 1": good | {"2/c.png": good["0/a.png"]},
        "0/a.png has no class from 0 to 1": good | labels(["0/a.png", 2], ["1/b.png", 0]),
        "1/b.png has no class from 0 to 1": good | labels(["0/a.png", 1]),
        "no folder or zip of images with a class each": good | {"dataset.json": b'{"labels": null}'},
        "damaged or no folder or zip": good | {"dataset.json": b"{"},
    }
    for i, (line, files) in enumerate(cases.items()):
        zipped(tmp_path / f"{i}.zip", files)
        with pytest.raises(sf.Fault) as caught:
            sf.load_images(little("imagenet64", 8, 2), tmp_path / f"{i}.zip")
        assert line in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(sf.Fault, match=r"no images at .*nowhere; --data-dir takes a folder of images or"):
        sf.load_images(little("ffhq64", 8), tmp_path / "nowhere")
    (tmp_path / "not.zip").write_bytes(b"PK nothing")
    with pytest.raises(sf.Fault, match="damaged or no folder or zip of images"):
        sf.load_images(little("ffhq64", 8), tmp_path / "not.zip")
    assert not list(tmp_path.glob("*.npy"))
    zipped(tmp_path / "ok.zip", good)
    sf.load_images(little("imagenet64", 8, 2), tmp_path / "ok.zip")
    (tmp_path / "ok.zip.8x8.labels.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(sf.Fault, match=r"no file of decoded images .*; delete it"):
        sf.load_images(little("imagenet64", 8, 2), tmp_path / "ok.zip")


@pytest.fixture
def cifar_class(monkeypatch):
    """torchvision's CIFAR10, whose address leads nowhere."""
    cls = sf.import_optional("torchvision.datasets").CIFAR10
    monkeypatch.setattr(cls, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    return cls


def test_cifar10_comes_from_its_archive(tmp_path, monkeypatch, cifar_class):
    """A small archive in the real binary format: 5 training batches, 1 of test, all of them pickles."""
    random, md5 = np.random.RandomState(0), lambda data: hashlib.md5(data).hexdigest()
    pixels, labels = random.randint(0, 256, (6, 4, 3072), dtype=np.uint8), random.randint(0, 10, (6, 4))
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    batches = [dict(data=x, labels=y.tolist()) for x, y in zip(pixels, labels)]
    contents = dict(zip(names, batches)) | {"batches.meta": dict(label_names=list("abcdefghij"))}
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in contents.items():
            data = contents[name] = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    sums = {name: md5(data) for name, data in contents.items()}
    with pytest.raises(sf.Fault, match=r"put cifar-10-python\.tar\.gz"):  # an archive with another sum
        sf.load_images(sf.PRESETS["cifar10"], tmp_path)
    monkeypatch.setattr(cifar_class, "tgz_md5", md5(archive.read_bytes()))
    monkeypatch.setattr(cifar_class, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(cifar_class, "test_list", [["test_batch", sums["test_batch"]]])
    meta = dict(filename="batches.meta", key="label_names", md5=sums["batches.meta"])
    monkeypatch.setattr(cifar_class, "meta", meta)
    images, y = sf.load_images(sf.PRESETS["cifar10"], tmp_path)
    assert images.dtype == torch.uint8 and y.tolist() == labels[:5].flatten().tolist()
    assert (images.numpy() == pixels[:5].reshape(20, 3, 32, 32)).all()


def test_cifar10_without_network_and_file_says_which_file_goes_where(tmp_path, cifar_class, capsys):
    common = "--dataset", "cifar10", "--data-dir", str(tmp_path / "here"), "--out", str(tmp_path / "runs")
    assert sf.main(["reflow", *common]) == 2
    out, line = capsys.readouterr()
    assert line.startswith("slimflow: cannot download CIFAR-10; put cifar-10-python.tar.gz (from http")
    assert line.count("\n") == 1 and f"into {tmp_path}/here, or name its --data-dir" in line
    assert "plan: train -> pairs -> reflow, into" in out


# ------------------------------------------------------------------------------------------------------------
# Training


def tiny_run(folder, batch=8, **changes):
    """A run of the digits with tiny networks."""
    tiny = sf.DIGITS | dict(model_channels=8, channel_mult=(1,), attn_resolutions=(), dropout=0.1)
    plan = sf.Schedule(steps=12, batch=batch, lr=2e-3, warmup=4, decay=0.5, ema=0.9)
    networks = dict(teacher=tiny, students={"tiny": tiny}, student="tiny")
    numbers = dict(pairs=300, solver=dict(solver="heun", steps=2), anneal=6)
    preset = replace(sf.PRESETS["digits"], train=plan, reflow=plan, distill=plan, **networks, **numbers)
    return sf.Run(replace(preset, **changes), folder / "digits")


def weights(run):
    """What a finished run ends in, as bytes: its pairs, the averaged weights and logs of its stages."""
    parts = [(run.folder / "pairs/pairs.npy").read_bytes()]
    for stage in ("train", "reflow", "distill"):
        state = sf.load_checkpoint(run.folder / stage / "ckpt.pt")
        parts += [tensor.numpy().tobytes() for tensor in state["ema"].values()]
        parts.append((run.folder / stage / "log.csv").read_bytes())
    return parts


def test_seed_decides_every_stage_and_nothing_else_does(tmp_path, monkeypatch):
    run = tiny_run(tmp_path / "one")
    sf.run_stages(run, "distill")
    torch.manual_seed(5)  # what was drawn before does not matter
    again = tiny_run(tmp_path / "again")
    sf.run_stages(again, "distill")
    assert weights(run) == weights(again)
    monkeypatch.setattr(sf, "SAVE_EVERY", 1)
    often = replace(tiny_run(tmp_path / "often"), log_every=5)
    sf.run_stages(often, "distill")
    differ = [one != two for one, two in zip(weights(often), weights(run))]
    assert sum(differ) == 3  # the logs
    assert (often.folder / "train/log.csv").read_text().count("\n") == 1 + 3
    other = replace(tiny_run(tmp_path / "other"), seed=1)
    sf.run_stages(other, "distill")
    noise, draws = stored(run)["noise"], stored(other)["noise"]
    assert (noise == draws).mean() < 0.01  # both are rounded to float16
    for stage in ("train", "reflow", "distill"):
        one, two = (sf.load_checkpoint(r.folder / stage / "ckpt.pt")["ema"] for r in (run, other))
        assert not any(torch.equal(one[name], two[name]) for name in one if "weight" in name)


def test_stages_take_classes_and_flips(tmp_path):
    classes = sf.DIGITS | dict(model_channels=8, channel_mult=(1,), attn_resolutions=(), label_dim=10)
    run = tiny_run(tmp_path, teacher=classes, students={"tiny": classes}, label_dim=10, flip=True)
    sf.run_stages(run, "distill")
    noise, data, y = sf.load_pairs(run)
    assert set(y.tolist()) == set(range(10))
    teacher = sf.load_flow(run.folder / "train/ckpt.pt")
    x, _ = sf.sample(teacher, noise.float(), y=y, **run.preset.solver)
    torch.testing.assert_close(x.half(), data, atol=2e-3, rtol=2e-3)


def test_distill_starts_from_the_2_flow_and_batches_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(sf, "SAMPLE_BATCH", 100)
    run = tiny_run(tmp_path)
    still = replace(run.preset.distill, lr=0.0)
    sf.run_stages(replace(run, preset=replace(run.preset, distill=still)), "distill")
    flow, student = (sf.load_flow(run.folder / stage / "ckpt.pt") for stage in ("reflow", "distill"))
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(flow.parameters(), student.parameters()))
    assert len(np.unique(stored(run)["noise"].reshape(300, -1), axis=0)) == 300
    draws = []

    def loss(net, step):
        draws.append(torch.rand(1).item())
        return net.weight.sum()

    for seed in (0, 0, 1):
        sf.fit(torch.nn.Linear(1, 1, bias=False), loss, sf.Schedule(steps=3), seed)
    assert len(set(draws)) == 6 and draws[:3] == draws[3:6]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"good")

    def write(file):
        file.write(b"ba")
        raise OSError(errno.ENOSPC, "No space left on device")

    def hidden(file):  # as by torch.save
        try:
            write(file)
        except OSError:
            raise RuntimeError("unexpected pos 768 vs 662")  # noqa: B904

    for fails in (write, hidden):
        with pytest.raises(sf.Fault, match=r"cannot write .*file: No space left on device; what was there"):
            sf.save_safely(path, fails)
        assert path.read_bytes() == b"good" and len(list(tmp_path.iterdir())) == 1


def stored(run):
    """The rows of pairs.npy."""
    return np.load(run.folder / "pairs/pairs.npy")


def test_interrupted_pairs_go_on_where_they_stopped(tmp_path, monkeypatch):
    whole, parts = tiny_run(tmp_path / "whole"), tiny_run(tmp_path / "parts")
    monkeypatch.setattr(sf, "SAMPLE_BATCH", 100)
    sf.run_stages(whole, "pairs")
    sample, calls = sf.sample, []

    def interrupted(*args, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return sample(*args, **options)

    sf.run_stages(parts, "train")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sf, "sample", interrupted)
        sf.pairs(parts)
    assert not sf.finished(parts, "pairs") and len(list((parts.folder / "pairs/parts").iterdir())) == 2
    with pytest.raises(sf.Fault, match=r"begun with another seed, see .*settings.json; use pairs"):
        sf.pairs(replace(parts, seed=1))
    sf.pairs(parts)
    assert (stored(parts) == stored(whole)).all() and not (parts.folder / "pairs/parts").exists()
    teacher, first = sf.load_flow(whole.folder / "train/ckpt.pt"), stored(whole)[:100]
    x, nfe = sf.sample(teacher, torch.from_numpy(first["noise"]).float(), **whole.preset.solver)
    assert nfe == first["nfe"][0] == 3
    torch.testing.assert_close(x.half(), torch.from_numpy(first["data"]))


def stage_loss(monkeypatch, run, stage):
    """The loss function that a stage hands to `fit`."""
    captured = []
    with monkeypatch.context() as patch:
        patch.setattr(sf, "fit_stage", lambda *args, **options: captured.append((args, options)))
        sf.STAGES[stage](run)
    (_, _, _, loss, _), options = captured[0]
    return loss, options


def test_pairs_that_are_not_finite_are_not_kept(tmp_path):
    run = tiny_run(tmp_path, solver=dict(solver="adams", steps=3))
    sf.run_stages(run, "train")
    broken = sf.load_checkpoint(run.folder / "train/ckpt.pt")
    next(iter(broken["ema"].values())).fill_(math.nan)
    torch.save(broken, run.folder / "train/ckpt.pt")
    with pytest.raises(sf.Fault, match="weights are not finite"):
        sf.run_stages(run, "pairs")
    assert not list(run.folder.rglob("*.npy"))


def test_reflow_anneals_from_random_pairs_to_the_stored_ones(tmp_path, monkeypatch):
    run = tiny_run(tmp_path)
    sf.run_stages(run, "pairs")
    noise = torch.from_numpy(stored(run)["noise"]).float()
    loss, _ = stage_loss(monkeypatch, run, "reflow")

    def distance_to_stored_noise(step):
        seen = []
        loss(lambda x, t, y: seen.append((x, t)) or x, step)
        x, t = seen[0]
        early = t.argmin()  # there x_t is mostly noise
        return (noise - x[early]).square().flatten(1).mean(1).min()

    torch.manual_seed(0)
    assert distance_to_stored_noise(run.preset.anneal) < 0.2 < 0.5 < distance_to_stored_noise(0)


def test_distill_adds_its_share_of_guidance_and_starts_from_the_2_flow(tmp_path, monkeypatch):
    run = tiny_run(tmp_path)
    sf.run_stages(run, "reflow")
    flow, losses = sf.load_flow(run.folder / "reflow/ckpt.pt"), {}
    for weight in (0.0, 1.0, 3.0):
        heavier = replace(run, preset=replace(run.preset, guidance=weight))
        loss, options = stage_loss(monkeypatch, heavier, "distill")
        torch.manual_seed(0)
        losses[weight] = loss(flow, 0).item()
        assert all(torch.equal(p, q) for p, q in zip(options["start"].parameters(), flow.parameters()))
    assert losses[1.0] > losses[0.0] > 0
    assert losses[3.0] - losses[0.0] == pytest.approx(3 * (losses[1.0] - losses[0.0]), rel=1e-3)
    sizes = []
    loss(lambda x, t, y=None: sizes.append(len(x)) or x, 0)
    assert sizes == [8, 2]  # the batch, and a quarter of it in fresh noise


def test_exchanged_noise_and_data_are_noticed(tmp_path):
    run = tiny_run(tmp_path)
    sf.run_stages(run, "pairs")
    rows = stored(run)
    rows["noise"] = np.random.RandomState(0).uniform(-1, 1, rows["noise"].shape)
    np.save(run.folder / "pairs/pairs.npy", rows)
    with pytest.raises(sf.Fault, match=r"not N\(0, 1\)"):
        sf.load_pairs(run)


def test_training_reaches_the_known_velocity():
    class Shift(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(2))

        def forward(self, x, t, y=None):
            return self.shift.expand_as(x)

    def loss(flow, step):
        z = torch.randn(256, 2)
        return sf.rectified_flow_loss(flow, z, z + torch.tensor([0.5, -1.0]))

    flow = sf.fit(Shift(), loss, sf.Schedule(steps=200, batch=256, lr=0.05, warmup=10, decay=0.5, ema=0.9))
    torch.testing.assert_close(flow.shift, torch.tensor([0.5, -1.0]), atol=1e-3, rtol=0)
    assert not flow.training and not flow.shift.requires_grad


def test_average_is_of_the_newest_weights_at_first_and_of_the_schedules_rate_later():
    values, net = [], torch.nn.Linear(1, 1, bias=False)

    def loss(net, step):
        values.append(net.weight.item())
        return net.weight.sum()

    start = net.weight.item()
    average = sf.fit(net, loss, sf.Schedule(steps=30, lr=0.1, warmup=0, ema=0.5)).weight.item()
    expected = start
    for step, value in enumerate([*values[1:], net.weight.item()]):
        rate = min(0.5, (1 + step) / (10 + step))
        expected = rate * expected + (1 - rate) * value
    assert average == pytest.approx(expected, rel=1e-4)


def test_learning_rate_and_average_follow_the_schedule():
    plan = sf.Schedule(steps=100, lr=1.0, warmup=10, decay=0.2)
    rates = [sf.learning_rate(plan, step) for step in (0, 4, 9, 50, 80, 90, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.05])
    net, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).requires_grad_(False)
    before, weight = ema.weight.clone(), net.weight.item()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ((net.weight * 3).sum() * 100).backward()
    norm = sf.update(net, ema, optimizer, 0.75)
    assert norm == pytest.approx(300)
    assert net.weight.item() == pytest.approx(weight - 0.1, rel=1e-5)  # lr times the clipped gradient, 1
    torch.testing.assert_close(ema.weight, 0.75 * before + 0.25 * net.weight)


def poisoned(kind, step):
    """A loss that goes bad in one of four ways at a step."""

    def loss(net, i):
        value = net(torch.ones(1, 1)).square().sum()
        if i != step:
            return value
        if kind == "gradient":
            return value + (net.weight - net.weight.detach()).abs().sqrt().sum()  # 0, gradient inf
        if kind == "weights":  # finite loss and gradient, and a step that is not
            with torch.no_grad():
                net.weight.fill_(math.inf)
            return net.bias.sum()
        return value * dict(nan=math.nan, inf=math.inf)[kind]

    return loss


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient", "weights"])
def test_bad_numbers_stop_the_stage_and_keep_the_last_checkpoint(tmp_path, monkeypatch, kind):
    torch.manual_seed(0)
    plan, folder, nets = sf.Schedule(steps=24, batch=1, warmup=0), tmp_path / "run", []
    make = lambda: nets.append(torch.nn.Linear(1, 1)) or nets[-1]  # noqa: E731
    sf.fit(make(), poisoned(kind, 22), replace(plan, steps=20), stage="reflow", folder=folder)
    kept = (folder / "ckpt.pt").read_bytes()
    step = 24 if kind == "weights" else 23  # the loss is the first to tell
    message = f"reflow: loss, gradient or weights are not finite at step {step}; .*ckpt.pt is good; try a"
    with pytest.raises(sf.Fault, match=message):
        sf.fit(make(), poisoned(kind, 22), plan, stage="reflow", folder=folder)
    assert (folder / "ckpt.pt").read_bytes() == kept
    assert (folder / "log.csv").read_text().splitlines()[-1].startswith("20,")
    monkeypatch.setattr(sf, "SAVE_EVERY", 0)  # now it stops at once, with the checkpoint of step 22
    with pytest.raises(sf.Fault, match="not finite at step 23"):
        sf.fit(make(), poisoned(kind, 22), plan, stage="reflow", folder=folder)
    state = sf.load_checkpoint(folder / "ckpt.pt")
    moments = [x for of_one in state["optimizer"]["state"].values() for x in of_one.values()]
    assert state["step"] == 22
    assert all(x.isfinite().all() for x in [*state["model"].values(), *state["ema"].values(), *moments])
    sf.fit(make(), poisoned(kind, -1), plan, stage="reflow", folder=folder)  # without the poison it goes on
    assert sf.load_checkpoint(folder / "ckpt.pt")["step"] == 24


# ------------------------------------------------------------------------------------------------------------
# Safety: kills, full disks, damaged files, two processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has disturbed, saved at its end only: its folder."""
    run = replace(tiny_run(tmp_path_factory.mktemp("whole")), log_every=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sf, "SAMPLE_BATCH", 20)
        sf.run_stages(run, "distill")
    return run


TINY = """
import sys, time
from pathlib import Path
import slimflow as sf, test_slimflow as tests

sf.SAVE_EVERY, sf.SAMPLE_BATCH = 0, 20  # saved at every step
sf.PRESETS["digits"] = tests.tiny_run(Path()).preset
work = sf.sample
sf.sample = lambda *args, **options: time.sleep(0.1) or work(*args, **options)  # pairs, too, take their time
sys.exit(sf.main())
"""


def tiny_process(*args, **options):
    """slimflow.py in a process of its own, with the networks and schedules of `tiny_run`."""
    environment = os.environ | dict(PYTHONPATH=str(HERE), PYTHONUNBUFFERED="1", PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-c", TINY, *map(str, args), "--log-every", "5"]
    return subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True, **options)


def tiny(*args, status=0, **options):
    """`tiny_process` to its end: what it prints, or the one line of its error."""
    process = tiny_process(*args, **options)
    out, error = process.communicate(timeout=170)
    assert process.returncode == status, error
    assert error.count("\n") == (status == 2) and error.startswith("slimflow: " * (status == 2)), error
    return error if status == 2 else out


@pytest.mark.slow
def test_killed_at_fifty_random_moments_it_ends_as_if_it_never_was(tmp_path, whole):
    random, kills, torn, hit, folders = np.random.RandomState(0), 0, 0, set(), 0
    while kills < 50:
        folders += 1
        run = replace(whole, folder=tmp_path / str(folders) / "digits")
        while not sf.finished(run, "distill"):
            process = tiny_process("distill", "--out", run.folder.parent)
            assert process.stdout.readline().startswith("plan: ")
            time.sleep(random.uniform(0, 4))
            process.kill()
            _, error = process.communicate(timeout=60)
            assert error == ""
            if process.returncode == -signal.SIGKILL:
                kills += 1
                torn += any(run.folder.rglob("*.tmp"))
                hit.update([stage for stage in sf.STAGES if not sf.finished(run, stage)][:1])
        assert weights(run) == weights(whole)
    assert hit == set(sf.STAGES) and torn >= 5, (hit, torn)
    print(f"{kills} kills, {torn} while a file was written, {folders} runs, all as the undisturbed one")


def test_killed_while_it_writes_it_goes_on(tmp_path, whole):
    """At each file that a run writes, once before it is complete and once after."""
    run, written = replace(whole, folder=tmp_path / "digits"), []
    save, replaced = sf.save_safely, os.replace

    class Killed(BaseException):
        pass

    def kill_in(path, write, keep=False):
        written.append(path.name)
        if len(written) in (5, 50):
            raise Killed
        if len(written) in (20, 80):
            Path(f"{path}.tmp").write_bytes(b"torn")
            raise Killed
        save(path, write, keep)
        if len(written) in (30, 60, 90) or (path.name == "pairs.npy" and written.count("pairs.npy") == 1):
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sf, "SAMPLE_BATCH", 20)
        patch.setattr(sf, "SAVE_EVERY", 0)
        patch.setattr(sf, "save_safely", kill_in)
        for _ in range(8):
            with pytest.raises(Killed):
                sf.run_stages(run, "distill")
        sf.run_stages(run, "distill")
        sf.pairs(run)  # they are complete, and what was left of their parts goes
    assert os.replace is replaced and weights(run) == weights(whole)
    assert not list(tmp_path.rglob("*.tmp")) and not (run.folder / "pairs/parts").exists()
    assert {"ckpt.pt", "log.csv", "loss.png", "samples.png", "pairs.npy", "settings.json"} < set(written)


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, whole, monkeypatch, capsys):
    run = replace(whole, folder=tmp_path / "digits")
    monkeypatch.setattr(sf, "SAMPLE_BATCH", 20)
    with monkeypatch.context() as patch:
        patch.setattr(sf, "SAVE_EVERY", 0)
        sf.run_stages(run, "train")
    path, old = run.folder / "train/ckpt.pt", run.folder / "train/ckpt.pt.old"
    ema = sf.load_checkpoint(path)["ema"]
    before = path.read_bytes()
    flipped, at = bytearray(before), before.index(next(iter(ema.values())).numpy().tobytes())
    flipped[at + 1] ^= 1  # one bit of a weight, which torch would not notice
    for data in (before[: len(before) // 2], flipped, b""):
        path.write_bytes(data)
        sf.warn.cache_clear()
        capsys.readouterr()
        assert sf.load_checkpoint(path)["step"] == sf.load_checkpoint(path)["step"] == 11
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"warning: {path} is damaged or no checkpoint (" in error
        assert f"); the one before it, {old}, takes its place" in error
    (run.folder / "train/log.csv").write_bytes(b"\xff,")  # only written, never read
    assert sf.unfinished(run, "train") == ["train"]  # so the next command makes the last step again
    sf.run_stages(run, "distill")
    assert sf.load_checkpoint(path)["step"] == 12 and weights(run) == weights(whole)
    assert sf.load_checkpoint(old)["step"] == 11  # not the damaged one
    path.write_bytes(b"")
    old.write_bytes(b"")
    with pytest.raises(sf.Fault, match=r"ckpt.pt.old is damaged or no checkpoint"):
        sf.load_checkpoint(path)


def test_tampered_checkpoints_are_refused_or_harmless(tmp_path, whole):
    """Files with right sums and odd content."""
    path, small = tmp_path / "digits/train/ckpt.pt", torch.zeros(2, 2)
    good = torch.load(whole.folder / "train/ckpt.pt", weights_only=True)
    network, state = good["settings"]["network"], good["optimizer"]["state"]
    groups = [dict(good["optimizer"]["param_groups"][0], betas="no", weight_decay=1e9)]
    name = next(iter(good["ema"]))
    plan = replace(whole.preset.train, steps=14)
    run = replace(whole, folder=tmp_path / "digits", preset=replace(whole.preset, train=plan))

    def tampered(**changes):
        torch.save(good | changes, path)
        sf.train(run)

    def resized(**changes):
        torch.save(good | dict(settings=good["settings"] | dict(network=network | changes)), path)
        sf.load_flow(path)

    path.parent.mkdir(parents=True)
    nan, odd = torch.full_like(good["ema"][name], math.nan), dict(state[0], exp_avg=small)
    wide = dict(state[0], exp_avg=torch.zeros(1).expand(state[0]["exp_avg"].shape))
    for change, reason in (
        (partial(tampered, step="9"), "entries are missing or of other types"),
        (partial(tampered, rows=torch.zeros(1, 1).expand(10**8, 3)), "a tensor is larger than its file"),
        (partial(tampered, recent=[small]), "shape '\\[2\\]' is invalid"),
        (partial(tampered, recent=[torch.Size([2])]), "torch Size is not what checkpoints are made of"),
        (partial(tampered, optimizer=dict(state=state | {0: wide})), "a tensor is larger than its file"),
        (partial(tampered, model=good["model"] | {name: small}), "size mismatch"),
        (partial(tampered, optimizer=dict(state=state | {0: odd})), "optimizer's state is another network's"),
        (partial(tampered, optimizer=dict(state=state | {0: {}})), "step"),
        (partial(tampered, model=good["model"] | {name: nan}), "not finite at step 13"),
        (partial(resized, num_blocks=10**9), "network is of unknown sizes"),
        (partial(resized, model_channels=6), "network is of unknown sizes"),
        (partial(resized, resolution=2**40), "network is of unknown sizes"),
        (partial(resized, time_scale=math.nan), "network has unknown settings"),
        (partial(resized, dropout=7.0), "network has unknown settings"),
    ):
        with pytest.raises(sf.Fault, match=reason):
            change()
    tampered(optimizer=dict(state=state, param_groups=groups))  # what is not needed is not used
    assert sf.load_checkpoint(path)["step"] == 14
    Path(f"{path}.old").unlink()
    sound = path.read_bytes()
    first = zipfile.ZipFile(path).namelist()[0]
    for member, data in (("more", bytes(10**7)), (first, b"N.")):  # grows, is there twice
        path.write_bytes(sound)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(member, data)
        with pytest.raises(sf.Fault, match=r"\(sizes or sums are wrong\)"):
            sf.load_checkpoint(path)


def test_odd_arrays_and_notes_are_refused(tmp_path, whole):
    good = dict(np.load(HERE / "digits.npz"))
    for name, array in (
        ("images", good["images"].astype(float)),
        ("images", good["images"][:9]),
        ("images", good["images"][:, 0]),
        ("labels", good["labels"] + 1),
        ("labels", good["labels"] * 0.5),
    ):
        np.savez(tmp_path / "digits.npz", **good | {name: array})
        with pytest.raises(sf.Fault, match=r"no digits.npz \(other arrays\); take the one that comes with"):
            sf.load_images(whole.preset, tmp_path)
    mu, sigma = np.zeros(3), np.eye(3)
    nan = mu + math.nan
    for pair in ((mu[:2], sigma), (sigma, mu), (mu, sigma[:2]), (nan, sigma), (mu, sigma + math.inf)):
        np.savez(tmp_path / "ref.npz", mu=pair[0], sigma=pair[1])
        with pytest.raises(sf.Fault, match=r"ref.npz is damaged .*shapes or values are wrong\); name"):
            sf.load_moments(tmp_path / "ref.npz")
    note = tmp_path / "digits/pairs/settings.json"
    note.parent.mkdir(parents=True)
    made = json.loads((whole.folder / "pairs/settings.json").read_text())
    solvers = 3, {}, dict(solver="x", steps=3), dict(solver="heun"), dict(solver="heun", steps="3")
    solvers += dict(solver="heun", steps=10**9), dict(solver="rk45", steps=3), sf.RK45 | dict(rtol=0)
    solvers += (dict(solver="heun", steps=2.5),)
    for odd in ([], {}, dict(solver=made["solver"]), *(made | dict(solver=solver) for solver in solvers)):
        note.write_text(json.dumps(odd))
        with pytest.raises(sf.Fault, match=r"no note of how the pairs were made .*; use pairs --fresh"):
            sf.pair_settings(replace(whole, folder=tmp_path / "digits"))


def test_fresh_gives_folders_back_if_nothing_takes_their_place(tmp_path, whole, one_line, capsys):
    shutil.copytree(whole.folder, tmp_path / "digits")
    (tmp_path / "digits/lock").touch()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    fresh = "--fresh", "--out", tmp_path
    assert "nowhere/digits.npz does not exist" in one_line("train", *fresh, "--data-dir", "nowhere")
    assert "cannot be split" in one_line("reflow", *fresh, "--batch", 7, "--accumulate", 2)
    assert "nope.pkl" in one_line("pairs", *fresh, "--teacher", "nope.pkl")
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_pairs_of_two_teachers_are_not_mixed(tmp_path, whole, monkeypatch):
    run = replace(whole, folder=tmp_path / "digits")
    monkeypatch.setattr(sf, "SAMPLE_BATCH", 20)
    sf.run_stages(run, "pairs")
    pairs, parts = run.folder / "pairs/pairs.npy", run.folder / "pairs/parts"
    pairs.unlink()
    longer = replace(run, preset=replace(run.preset, train=replace(run.preset.train, steps=13)))
    sf.run_stages(longer, "train", asked=True)
    match = r"pairs was begun with another teacher_weights, see .*json; use pairs --fresh"
    with pytest.raises(sf.Fault, match=match):
        sf.pairs(run)
    shutil.rmtree(pairs.parent)
    parts.mkdir(parents=True)
    np.save(parts / "40.npy", stored(whole)[:7])
    with pytest.raises(sf.Fault, match=r"pairs.npy would have 287 rows in place of 300; use --fresh"):
        sf.pairs(run)
    (parts / "40.npy").write_bytes(b"")
    with pytest.raises(sf.Fault, match=r"parts/40.npy is damaged or no file of pairs .*; delete it"):
        sf.pairs(run)
    (parts / "40.npy").unlink()
    sf.pairs(run)
    whole_file = pairs.read_bytes()
    pairs.write_bytes(whole_file[:1000])
    with pytest.raises(sf.Fault, match=r"pairs.npy is damaged or no file of pairs"):
        sf.pairs(run)
    pairs.write_bytes(whole_file)
    rows = stored(run)
    assert len(rows) == 300 and not parts.exists()
    rows["noise"][0] = math.nan
    np.save(pairs, rows)
    with pytest.raises(sf.Fault, match=r"the noise in .* is not N\(0, 1\)"):
        sf.load_pairs(run)


def test_what_would_fail_late_fails_early(tmp_path, whole):
    odd = replace(whole.preset, distill=replace(whole.preset.distill, batch=9))
    with pytest.raises(sf.Fault, match="a batch of 9 cannot be split into 1 x 2 parts"):
        sf.run_stages(replace(whole, folder=tmp_path / "digits", preset=odd, accumulate=2), "distill")
    assert not list(tmp_path.iterdir())


def test_only_files_are_replaced_and_names_are_printed_harmlessly(tmp_path, whole, one_line):
    ckpt = whole.folder / "distill/ckpt.pt"
    os.mkfifo(tmp_path / "pipe")
    line = one_line("sample", "--ckpt", ckpt, "--png", tmp_path / "pipe")
    assert line.startswith(f"slimflow: cannot write {tmp_path}/pipe: it is a folder or a device; what was")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1
    assert one_line("sample", "--ckpt", "a\n\x1b[31m.pt").startswith("slimflow: a??[31m.pt does not exist")


def test_second_process_on_a_folder_is_refused_until_the_first_is_gone(tmp_path, one_line):
    first = tiny_process("train", "--out", tmp_path)
    assert first.stdout.readline().startswith("plan: ")
    os.kill(first.pid, signal.SIGSTOP)
    for args in (("distill",), ("train", "--fresh"), ("all",)):
        line = one_line(*args, "--out", tmp_path)
        where = f"{tmp_path}/digits/lock; wait until it ends, or use another --out\n"
        assert line == f"slimflow: another process holds {where}"
    first.kill()
    first.communicate(timeout=60)
    with sf.lock(tmp_path / "digits/lock"):
        assert one_line("all", "--out", tmp_path) == line


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, and a function that changes its mount options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder, lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_full_and_read_only_disks_cost_a_line_and_nothing_else(disk, whole):
    folder, remount = disk
    run = replace(whole, folder=folder / "digits")
    for size in (64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704):
        remount(f"size={size}k")
        line = tiny("distill", "--out", folder, status=2)
        assert re.fullmatch(f"slimflow: cannot write {folder}/.*: No space left on device; .*\n", line)
        for path in run.folder.rglob("*.pt"):
            assert sf.load_checkpoint(path)["step"] > 0
        assert not list(folder.rglob("*.tmp"))
    remount("ro")
    line = tiny("distill", "--out", folder, status=2)
    assert re.fullmatch(f"slimflow: .*{folder}/digits.*: Read-only file system.*\n", line)
    remount("rw,size=50m")
    tiny("distill", "--out", folder)
    assert weights(run) == weights(whole)


def test_unwritable_folder_and_vanished_files_cost_a_line(tmp_path, whole, one_line):
    for name, mode in (("sealed", 0o500), ("gone", 0o700)):
        (tmp_path / name).mkdir(mode=mode)
    if os.getuid():  # root may write anywhere
        assert "sealed/digits: Permission denied" in one_line("train", "--out", tmp_path / "sealed")
    shutil.copy(HERE / "digits.npz", tmp_path / "gone")
    run = replace(whole, folder=tmp_path / "digits", data_dir=tmp_path / "gone")
    sf.run_stages(replace(run, preset=replace(run.preset, train=replace(run.preset.train, steps=5))), "train")
    (tmp_path / "gone/digits.npz").unlink()
    with pytest.raises(sf.Fault, match=r"gone/digits.npz does not exist; make it first, or name the right"):
        sf.train(run)
    shutil.copy(HERE / "digits.npz", tmp_path / "gone")
    sf.train(run)
    sf.run_stages(run, "pairs")
    pairs = run.folder / "pairs/pairs.npy"
    pairs.write_bytes(pairs.read_bytes()[:-1])
    with pytest.raises(sf.Fault, match=r"pairs.npy is damaged or no file of pairs .*; use pairs --fresh"):
        sf.run_stages(run, "reflow")
    pairs.unlink()
    sf.run_stages(run, "reflow")  # makes them anew
    assert sf.finished(run, "reflow")


@pytest.mark.slow
def test_a_million_rows_are_logged_whole_and_drawn_thinly(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y: drawn.append(len(x)))
    rows = [[50 * i, 1 / i, 0.5] for i in range(1, 1_000_001)]
    sf.draw_loss(tmp_path / "run", rows)
    text = (tmp_path / "run/log.csv").read_text()
    assert text.count("\n") == 1_000_001 and text.endswith("\n50000000,1e-06,0.5\n")
    assert 1_000 <= drawn[0] <= 2_000 and (tmp_path / "run/loss.png").exists()


@pytest.mark.slow
def test_20_000_steps_take_no_more_memory_or_files_than_5_000(tmp_path, monkeypatch):
    monkeypatch.setattr(sf, "SAVE_EVERY", 1)
    run, used = tiny_run(tmp_path), {}
    work = sf.update

    def update(*args):
        used["step"] = step = used.get("step", 0) + 1
        if step % 5_000 == 0:
            memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
            used[step] = memory, len(os.listdir("/proc/self/fd"))
        return work(*args)

    monkeypatch.setattr(sf, "update", update)
    plan = replace(run.preset.train, steps=20_000)
    sf.train(replace(run, preset=replace(run.preset, train=plan)))
    print({step: f"{mib} MiB, {files} files" for step, (mib, files) in list(used.items())[1:]})
    assert used[20_000][0] < used[5_000][0] + 10 and used[20_000][1] == used[5_000][1]


# ------------------------------------------------------------------------------------------------------------
# Files from others: EDM's teachers, the checkpoints of SlimFlow's authors


class Persistent:
    """What NVIDIA's persistence does: a pickled object is a call of a function on source code and state."""

    def __init__(self, class_name, **state):
        self.meta = dict(type="class", version=6, module_src="raise SystemExit", class_name=class_name)
        self.meta["state"] = self.state = state

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def nvidia_modules():
    """Modules under the names that EDM's pickles refer to."""
    persistence, dnnlib = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    exec("def _reconstruct_persistent_obj(meta): raise SystemExit", persistence.__dict__)
    persistence._reconstruct_persistent_obj.__module__ = persistence.__name__
    dnnlib.EasyDict = type("EasyDict", (dict,), dict(__module__="dnnlib.util"))
    parents = types.ModuleType("torch_utils"), types.ModuleType("dnnlib")
    return {module.__name__: module for module in (*parents, persistence, dnnlib)}


@pytest.fixture
def nvidia(monkeypatch):
    """Those modules, for the time of a test."""
    for name, module in nvidia_modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def edm_tree(module):
    """A network's layers as EDM pickles them: its own classes, and torch's ModuleDict by NEWOBJ."""
    state = dict(_parameters=dict(module._parameters), _buffers={}, _modules={}, training=False)
    state["_modules"] = {name: edm_tree(child) for name, child in module._modules.items()}
    if getattr(module, "resample", None):
        state["_modules"]["conv0"].state["_buffers"]["resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    if isinstance(module, torch.nn.ModuleDict):
        tree = torch.nn.ModuleDict()
        tree.__dict__.update(state)
        return tree
    return Persistent(type(module).__name__, **state)


def edm_objects(net, **changes):
    """The dict that EDM pickles for a network of ours, and its inner object's state, to be tampered with."""
    config, given = net.config, sys.modules["dnnlib.util"].EasyDict()
    given.update(img_resolution=config["resolution"], in_channels=config["channels"])
    given.update(out_channels=config["channels"], label_dim=config["label_dim"], augment_dim=9, dropout=0.1)
    for name in ("model_channels", "num_blocks"):
        given[name] = config[name]
    for name in ("channel_mult", "attn_resolutions"):
        given[name] = list(config[name])
    given.update(embedding_type="positional", resample_filter=[1, 1])
    if net.kind == "adm":
        for name in ("embedding_type", "resample_filter"):
            del given[name]
    given.update(changes)
    inner = edm_tree(net)
    inner.meta["class_name"] = "DhariwalUNet" if net.kind == "adm" else "SongUNet"
    inner.state["_init_kwargs"] = given
    sigma = dict(sigma_min=0, sigma_max=np.float64(np.inf), sigma_data=0.5)
    outer = Persistent("EDMPrecond", _parameters={}, _buffers={}, _modules=dict(model=inner), **sigma)
    return dict(ema=outer, loss_fn=None, augment_pipe=None), inner.state


EDM = SMALL | dict(model_channels=32, time_scale=1.0)
EDM_DENOISED = [-0.17438708, 0.61188984, 0.09210698, 0.43783712, 0.855703, 0.36023948, 0.74949735, 0.61292821]
EDM_SAMPLED = {  # order: (steps, evaluations, norm, first eight)
    2: (18, 35, 28.553487424386418, [0.08390351, 1.04910779, 0.5697009, 1.00116408,
                                     1.3935858, 0.77902114, 1.21589983, 1.36794984]),
    1: (10, 10, 21.539857296003863, [0.09416281, 0.71508747, 0.4101516, 0.68729985,
                                     0.91390985, 0.48895419, 0.82110226, 1.00694489]),
}  # fmt: skip


@pytest.fixture
def edm_teacher(nvidia, tmp_path):
    path = tmp_path / "edm.pkl"
    path.write_bytes(pickle.dumps(edm_objects(fill(sf.UNet(**EDM)).float())[0]))
    return sf.load_edm(path).double()


def close_to(x, norm, first):
    """Whether x has these first eight elements and this norm, to 1e-6."""
    error = x.flatten()[:8].double() - torch.tensor(first).double()
    return abs(x.norm().item() / norm - 1) < 1e-6 and error.norm() < 1e-6 * torch.tensor(first).norm()


def test_edm_teacher_computes_what_edm_computes(edm_teacher):
    x = torch.from_numpy(np.random.RandomState(13).standard_normal((2, 3, 16, 16))).float().double()
    denoised = edm_teacher.denoise(x, torch.tensor([0.5, 7.0]).double())
    assert close_to(denoised, 16.64110733125644, EDM_DENOISED)
    for order, (steps, nfe, norm, first) in EDM_SAMPLED.items():
        sampled, taken = sf.edm_sample(edm_teacher, x, steps, order)
        assert taken == nfe and close_to(sampled, norm, first)


def test_edm_teacher_as_a_flow_is_its_denoiser(edm_teacher):
    """v(x, t) is E[x - z | x_t], and RK45 on it ends where EDM's own sampler does."""
    x, t = torch.randn(2, 3, 16, 16).double(), torch.tensor([0.2, 0.7]).double()
    s = t.reshape(-1, 1, 1, 1)
    data = edm_teacher.denoise(x / s, (1 - t) / t)
    noise = (x - s * data) / (1 - s)
    torch.testing.assert_close(edm_teacher(x, t), data - noise)
    z = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    ours, _ = sf.sample(edm_teacher, z, "rk45", rtol=1e-4, atol=1e-4)
    theirs, _ = sf.sample(edm_teacher, z, "edm", steps=160)
    assert (ours - theirs).square().mean().sqrt() < 0.02 * theirs.square().mean().sqrt()
    assert edm_teacher(x, torch.zeros(2).double()).isfinite().all()
    assert edm_teacher(x, torch.ones(2).double()).isfinite().all()


def test_pairs_and_samples_come_from_an_edm_teacher(nvidia, tmp_path, one_line, capsys):
    path = tmp_path / "edm.pkl"
    path.write_bytes(pickle.dumps(edm_objects(fill(sf.UNet(**EDM)).float())[0]))
    student = SMALL | dict(model_channels=8)
    changes = dict(shape=(3, 16, 16), students={"tiny": student}, pairs=30)
    changes["solver"] = dict(solver="edm", steps=3)
    run = replace(tiny_run(tmp_path, **changes), teacher=str(path))
    sf.run_stages(run, "reflow")
    assert "plan: pairs -> reflow, into" in capsys.readouterr().out
    rows, teacher = stored(run), sf.load_edm(path)
    x, nfe = sf.edm_sample(teacher, torch.from_numpy(rows["noise"]).float(), 3)
    assert nfe == 5 == rows["nfe"][0]
    torch.testing.assert_close(x.half(), torch.from_numpy(rows["data"]), atol=2e-3, rtol=2e-3)
    written = (run.folder / "pairs/pairs.npy").stat().st_mtime_ns
    sf.run_stages(run, "pairs", asked=True)
    assert "30 pairs are complete" in capsys.readouterr().out
    assert (run.folder / "pairs/pairs.npy").stat().st_mtime_ns == written
    with pytest.raises(sf.Fault, match="another teacher wrote"):
        sf.run_stages(replace(run, teacher="another.pkl"), "reflow", asked=True)
    given = "sample", "--ckpt", str(path), "--n", "2", "--png", str(tmp_path / "a.png")
    assert sf.main(list(given)) == 0 and "edm, steps 18" in capsys.readouterr().out
    assert "makes images of (C, H, W, classes) (3, 16, 16, 0); digits has (1, 8, 8, 0)" in one_line(
        "pairs", "--teacher", path, "--out", tmp_path / "runs")
    for name, steps in (("ffhq64", 40), ("cifar10", 18)):
        preset, asked = sf.changed(sf.PRESETS[name], sf.parse(["pairs", "--teacher", "x.pkl"]))
        assert preset == replace(sf.PRESETS[name], solver=dict(solver="edm", steps=steps)) and not asked


def test_edm_adm_teacher_takes_classes(nvidia, tmp_path):
    net = fill(sf.UNet(**NETWORKS["adm"]["config"], time_scale=1.0)).float()
    (tmp_path / "adm.pkl").write_bytes(pickle.dumps(edm_objects(net)[0]))
    teacher = sf.load_edm(tmp_path / "adm.pkl")
    assert teacher.config["kind"] == "adm" and teacher.label_dim == 10
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), teacher.net.parameters()))
    x, sigma, y = torch.randn(2, 3, 16, 16), torch.tensor([1.0, 2.0]), torch.tensor([3, 4])
    assert (teacher.denoise(x, sigma, y) - teacher.denoise(x, sigma, y.flip(0))).abs().max() > 1e-4


class Call:
    """Pickles to a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile_pickles(folder):
    """Pickles that want to run code, take memory, or are not EDM's networks: name -> bytes."""
    net = fill(sf.UNet(**EDM)).float()
    pwn = f"open({str(folder / 'pwned')!r}, 'w')"
    good = pickle.dumps(edm_objects(net)[0])

    def tampered(change, **config):
        objects, state = edm_objects(net, **config)
        objects = change(objects, state) or objects
        return pickle.dumps(objects)

    def weight(value):
        layer = lambda state: state["_modules"]["map_layer0"].state  # noqa: E731
        return tampered(lambda _, state: layer(state)["_parameters"].update(weight=value))

    def tensor_of(blob, size=(128, 32), stride=(32, 1), offset=0):
        storage = Call(torch.storage._load_from_bytes, blob)
        return weight(Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {}))

    def saved(value, **options):
        file = io.BytesIO()
        torch.save(value, file, **options)
        return file.getvalue()

    def storage(n, **options):
        with warnings.catch_warnings():  # the class is deprecated, and what EDM's files have
            warnings.simplefilter("ignore")
            return saved(torch.zeros(n).storage(), **options)

    def endless(**options):  # keys that hash for ever, in place of one that torch.save has written
        blob, key = saved(dict(model={"k": 7, "l": 8}), **options), b"X\x01\x00\x00\x00k"
        put = b"q\x63" if options else b"q\x62q\x63"
        tuples = b")" + put + (b"h\x63h\x63\x86" + put) * 61 + b"h\x63"
        assert key in blob
        if options:
            return blob.replace(key, tuples).ljust(16_384)
        bomb = rezipped(blob, Random(1), lambda member, _: member.replace(key, tuples))
        assert key not in bomb
        return bomb

    doubled = ()
    for _ in range(60):
        doubled = (doubled, doubled)
    floats = storage(4096, _use_new_zipfile_serialization=False)
    short = storage(100, _use_new_zipfile_serialization=False)

    def cycle(objects, state):
        state["_modules"]["enc"].__dict__["_modules"]["16x16_conv"] = state["_modules"]["enc"]
        state["_init_kwargs"]["self"] = objects

    files = {
        "os.system": pickle.dumps(Call(os.system, f"touch {folder / 'pwned'}")),
        "eval": pickle.dumps(dict(ema=Call(eval, pwn))),
        "eval in place of a weight": weight(Call(eval, pwn)),
        "a pickle in a storage": tensor_of(pickle.dumps(Call(eval, pwn)).ljust(16_384)),
        "a torch file with code": tensor_of(
            saved(Call(eval, pwn), _use_new_zipfile_serialization=False).ljust(16_384)),
        "a zip in a storage": tensor_of(storage(4096)),
        "storage too short": tensor_of(short + bytes(16_000)),
        "storage of another size": tensor_of(short),
        "stride out of bounds": tensor_of(floats, stride=(10**12, 1)),
        "offset out of bounds": tensor_of(floats, offset=4095),
        "offset below zero": tensor_of(floats, offset=-1),
        "tensor of absurd size": tensor_of(floats, (10**6, 10**6), (0, 0)),
        "network of absurd width": tampered(lambda *_: None, model_channels=10**9),
        "network of absurd depth": tampered(lambda *_: None, num_blocks=10**9),
        "image of absurd size": tampered(lambda *_: None, img_resolution=2**40),
        "widths that are texts": tampered(lambda *_: None, channel_mult=["a" * 10**6]),
        "no levels": tampered(lambda *_: None, channel_mult=[]),
        "levels below one pixel": tampered(lambda *_: None, img_resolution=1),
        "cyclic state": tampered(cycle),
        "cyclic list": b"\x80\x04]q\x00h\x00a.",
        "NCSN++": tampered(lambda *_: None, embedding_type="fourier"),
        "another filter": tampered(lambda *_: None, resample_filter=[1, 3, 3, 1]),
        "another preconditioning": tampered(lambda all, _: all["ema"].meta.update(class_name="VPPrecond")),
        "another sigma_data": tampered(lambda all, _: all["ema"].state.update(sigma_data=math.nan)),
        "another network": tampered(lambda _, state: state.pop("_init_kwargs") and None),
        "no weights": tampered(lambda _, state: state["_modules"].pop("enc") and None),
        "no network": pickle.dumps(dict(ema=None)),
        "not a dict": pickle.dumps([1, 2, 3]),
        "a dict of numbers": pickle.dumps(dict(ema=3)),
        "not a pickle": b"<html>404</html>",
        "empty": b"",
        "length of 2**62": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".",
        "byte array of 2**31": b"\x80\x05\x96" + (2**31).to_bytes(8, "little") + b".",
        "memo at 2**31": b"\x80\x04]r" + (2**31 - 1).to_bytes(4, "little") + b".",
        "frame of 2**40": b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"N.",
        "attributes by BUILD": b"\x80\x04ccollections\nOrderedDict\n)\x81N}\x8c\x09__class__cos\nx\ns\x86b.",
        "persistent id": b"\x80\x04\x8c\x03abcQ.",
        "key that hashes for ever": b"\x80\x04})" + b"2\x86" * 60 + b"Ns.",
        "name that hashes for ever": tampered(
            lambda all, _: all["ema"].state["_modules"]["model"].meta.update(class_name=doubled)),
        "storage that hashes for ever": tensor_of(endless(_use_new_zipfile_serialization=False)),
        "checkpoint that hashes for ever.pt": endless(),
        "checkpoint that hashes for ever.pth": endless(),
        "deeply nested": b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
    }  # fmt: skip
    return files | {f"cut at {i}/10": good[: len(good) * i // 10] for i in range(1, 10)}


READ_EACH = """
import resource, sys, time
import slimflow as sf
sf.main(["sample", "--ckpt", "nowhere.pkl"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    began = time.perf_counter()
    print(sf.main(["sample", "--ckpt", path]), round(time.perf_counter() - began, 3), path, flush=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_hostile_pickles_run_nothing_take_nothing_and_get_one_line(nvidia, tmp_path):
    paths = []
    for i, (name, data) in enumerate(hostile_pickles(tmp_path).items()):
        paths.append(tmp_path / f"{i}{Path(name).suffix if '.pt' in name else '.pkl'}")
        paths[-1].write_bytes(data)
    command = [sys.executable, "-c", READ_EACH, *(path.name for path in paths)]
    environment = os.environ | dict(PYTHONPATH=str(HERE))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    *results, mebibytes = done.stdout.splitlines()
    statuses = [line.split()[0] for line in results]
    assert statuses == ["2"] * len(paths)
    lines = done.stderr.splitlines()
    assert len(lines) == len(paths) + 1 and all(line.startswith("slimflow: ") for line in lines), done.stderr
    assert [line.split()[1] for line in lines[1:]] == [path.name for path in paths]
    assert int(mebibytes) < 1024
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "samples.png").exists()


def official_modules(config, seed=0):
    """The numbered modules of the authors' network, random: a list of dicts part -> tensor."""
    random, c, modules = torch.Generator().manual_seed(seed), config["model_channels"], []

    def make(**shapes):
        parts = {name.replace("_b", ".b").replace("_w", ".w").replace("_W", ".W"): shape
                 for name, shape in shapes.items()}  # fmt: skip
        scale = {name: 1 / math.sqrt(max(1, math.prod(shape[1:]))) for name, shape in parts.items()}
        draws = {name: torch.randn(shape, generator=random) for name, shape in parts.items()}
        modules.append({name: draw * scale[name] for name, draw in draws.items()})

    def block(c_in, c_out, resample=False):
        shapes = dict(GroupNorm_0_weight=(c_in,), GroupNorm_0_bias=(c_in,))
        shapes |= dict(Conv_0_weight=(c_out, c_in, 3, 3), Conv_0_bias=(c_out,))
        shapes |= dict(Dense_0_weight=(c_out, 4 * c), Dense_0_bias=(c_out,))
        shapes |= dict(GroupNorm_1_weight=(c_out,), GroupNorm_1_bias=(c_out,))
        shapes |= dict(Conv_1_weight=(c_out, c_out, 3, 3), Conv_1_bias=(c_out,))
        if c_in != c_out or resample:
            shapes |= dict(Conv_2_weight=(c_out, c_in, 1, 1), Conv_2_bias=(c_out,))
        make(**shapes)

    def attention(n):
        matrices = {f"NIN_{i}_{part}": (n, n) if part == "W" else (n,) for i in range(4) for part in "Wb"}
        make(GroupNorm_0_weight=(n,), GroupNorm_0_bias=(n,), **matrices)

    make(weight=(4 * c, c), bias=(4 * c,))
    make(weight=(4 * c, 4 * c), bias=(4 * c,))
    make(weight=(c, 3, 3, 3), bias=(c,))
    skips, n, levels = [c], c, len(config["channel_mult"])
    attends = [config["resolution"] >> level in config["attn_resolutions"] for level in range(levels)]
    for level, mult in enumerate(config["channel_mult"]):
        for _ in range(config["num_blocks"]):
            block(n, c * mult)
            n = c * mult
            if attends[level]:
                attention(n)
            skips.append(n)
        if level < levels - 1:
            block(n, n, resample=True)
            skips.append(n)
    block(n, n)
    attention(n)
    block(n, n)
    for level, mult in reversed(list(enumerate(config["channel_mult"]))):
        for _ in range(config["num_blocks"] + 1):
            block(n + skips.pop(), c * mult)
            n = c * mult
        if attends[level]:
            attention(n)
        if level:
            block(n, n, resample=True)
    make(weight=(n,), bias=(n,))
    make(weight=(3, n, 3, 3), bias=(3,))
    return modules


def official_forward(modules, config, x, t):
    """The authors' network written a second time, after its modules' order, attention by plain matrices."""
    silu, modules = torch.nn.functional.silu, iter(modules)

    def norm(x, p, name=""):
        groups = min(x.shape[1] // 4, 32)
        return torch.nn.functional.group_norm(x, groups, p[name + "weight"], p[name + "bias"], eps=1e-6)

    def conv(x, p, name=""):
        weight = p[name + "weight"]
        return torch.nn.functional.conv2d(x, weight, p[name + "bias"], padding=weight.shape[-1] // 2)

    def linear(x, p, name=""):
        return x @ p[name + "weight"].T + p[name + "bias"]

    def block(x, resample=lambda x: x):
        p = next(modules)
        h = conv(resample(silu(norm(x, p, "GroupNorm_0."))), p, "Conv_0.")
        h = h + linear(emb, p, "Dense_0.")[:, :, None, None]
        h = conv(silu(norm(h, p, "GroupNorm_1.")), p, "Conv_1.")
        x = resample(x)
        return (h + (conv(x, p, "Conv_2.") if "Conv_2.weight" in p else x)) / math.sqrt(2)

    def attention(x):
        p, (b, c, height, width) = next(modules), x.shape
        h = norm(x, p, "GroupNorm_0.").flatten(2).transpose(1, 2)  # (B, H W, C)
        q, k, v = (h @ p[f"NIN_{i}.W"] + p[f"NIN_{i}.b"] for i in range(3))
        weights = (q @ k.transpose(1, 2) / math.sqrt(c)).softmax(dim=2)
        h = (weights @ v) @ p["NIN_3.W"] + p["NIN_3.b"]
        return (x + h.transpose(1, 2).reshape(b, c, height, width)) / math.sqrt(2)

    half = config["model_channels"] // 2
    angle = 999 * t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
    emb = silu(linear(torch.cat([angle.sin(), angle.cos()], dim=1), next(modules)))
    emb = silu(linear(emb, next(modules)))
    x = conv(x, next(modules))
    skips, levels = [x], len(config["channel_mult"])
    for level in range(levels):
        for _ in range(config["num_blocks"]):
            x = block(x)
            if x.shape[-1] in config["attn_resolutions"]:
                x = attention(x)
            skips.append(x)
        if level < levels - 1:
            x = block(x, lambda x: torch.nn.functional.avg_pool2d(x, 2))
            skips.append(x)
    x = block(attention(block(x)))
    for level in reversed(range(levels)):
        for _ in range(config["num_blocks"] + 1):
            x = block(torch.cat([x, skips.pop()], dim=1))
        if x.shape[-1] in config["attn_resolutions"]:
            x = attention(x)
        if level:
            x = block(x, lambda x: x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    x = silu(norm(x, next(modules)))
    return conv(x, next(modules))


def save_official(path, modules):
    """A .pth as the authors write it; the averaged weights are those in question."""
    names = [f"module.all_modules.{i}.{part}" for i, parts in enumerate(modules) for part in parts]
    shadow = [tensor for parts in modules for tensor in parts.values()]
    model = dict.fromkeys(names, torch.zeros(1)) | {"module.sigmas": torch.zeros(10)}
    ema = dict(decay=0.999999, num_updates=10, shadow_params=shadow)
    torch.save(dict(optimizer={}, model=model, ema=ema, step=800_000), path)


@pytest.mark.parametrize("changes", [
    dict(resolution=32, channel_mult=(1, 2, 2), num_blocks=2),
    dict(resolution=64, channel_mult=(1, 2, 2), num_blocks=1),
    dict(resolution=16, channel_mult=(1, 2), num_blocks=1),
], ids=["cifar10", "ffhq64", "two levels"])  # fmt: skip
def test_checkpoints_of_the_authors_compute_the_same_by_a_second_implementation(tmp_path, changes):
    config = sf.DDPMPP | dict(model_channels=16) | changes
    modules = official_modules(config)
    save_official(tmp_path / "official.pth", modules)
    net = sf.load_slimflow_official(tmp_path / "official.pth")
    assert {name: net.config[name] for name in config} == config
    x, t = torch.randn(2, 3, config["resolution"], config["resolution"]), torch.tensor([0.001, 0.7])
    theirs = official_forward(modules, config, x, t)
    torch.testing.assert_close(net(x, t), theirs, atol=2e-5, rtol=1e-4)
    assert theirs.std() > 0.05


@pytest.mark.parametrize("name", ["cifar10", "ffhq64"])
@pytest.mark.parametrize("size", ["15.7M", "27.9M"])
def test_checkpoints_of_the_papers_sizes_are_recognised(name, size):
    config = sf.PRESETS[name].students[size]
    modules = official_modules(config)
    tensors = {f"{i}.{part}": value for i, parts in enumerate(modules) for part, value in parts.items()}
    assert sum(value.numel() for value in tensors.values()) == sf.count_parameters(sf.blueprint(config))
    assert sf.official_config(tensors) == config


def test_sample_takes_the_authors_checkpoints(tmp_path, capsys, one_line):
    path, config = tmp_path / "them.pth", sf.DDPMPP | dict(resolution=32, model_channels=8, num_blocks=1)
    modules = official_modules(config)
    save_official(path, modules)
    assert sf.main(["sample", "--ckpt", str(path), "--n", "2", "--png", str(tmp_path / "a.png")]) == 0
    assert "euler, steps 1" in capsys.readouterr().out and (tmp_path / "a.png").exists()
    more = [*modules[:-1], modules[-1] | dict(more=torch.zeros(1))]
    for wrong in (modules[:-1], modules[:5] + modules[4:], modules[3:], more):
        save_official(path, wrong)
        assert "SlimFlow's authors" in one_line("sample", "--ckpt", path)
    torch.save(dict(model={}, optimizer={}), path)
    assert "entries are missing" in one_line("sample", "--ckpt", path)


# ------------------------------------------------------------------------------------------------------------
# Damaged and hostile files, in every format that the program reads

JUNK = (
    None, True, -1, 0, 7, 2**31, 2**63, 10**30, 0.5, 1e308, math.nan, math.inf, "", "euler", "9" * 1000, b"x",
    [], {}, (), [[]] * 3, {"a": [1]}, [math.nan], ((1, 2), (3,)), 3 + 4j, torch.zeros(0), torch.tensor(-1),
    torch.zeros(3, dtype=torch.int64), torch.full((2, 2), math.nan), torch.zeros(1, dtype=torch.complex64),
    torch.zeros(1).expand(10**9), torch.Size([3]), torch.float16,
)  # fmt: skip


def scratched(data, random):
    """Bytes cut off, with flipped bits, or with a piece lost, doubled, or overwritten."""
    i, n = random.randrange(len(data) + 1), random.randint(1, 64)
    kind = random.choice(["cut", "bits", "bits", "lost", "doubled", "zeros", "noise"])
    if kind == "cut":
        return data[:i]
    if kind == "bits":
        flipped = bytearray(data)
        for _ in range(random.randint(1, 16) if data else 0):
            flipped[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return bytes(flipped)
    new = dict(lost=b"", doubled=data[i : i + n] * 2, zeros=bytes(n), noise=random.randbytes(n))[kind]
    return data[:i] + new + data[i + n :]


def rezipped(data, random, change=scratched):
    """A zip of which one member is scratched, its sum being right again."""
    source, file = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    chosen = random.choice(source.namelist())
    pickled = [name for name in source.namelist() if name.endswith("data.pkl")]
    chosen = pickled[0] if pickled and random.random() < 0.7 else chosen
    with zipfile.ZipFile(file, "w") as archive:
        for name in source.namelist():
            member = source.read(name)
            archive.writestr(name, change(member, random) if name == chosen else member)
    return file.getvalue()


def replaced(value, random):
    """A tree of dicts and lists of which one node, at any depth, is junk or gone."""
    keys = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
    if not keys or random.random() < 0.15:
        return random.choice(JUNK)
    key = random.choice(list(keys))
    changed = copy.copy(value)
    if random.random() < 0.1:
        del changed[key]
    else:
        changed[key] = replaced(value[key], random)
    return changed


def saved(value):
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def as_npy(random, *good):
    """An array of another type or shape, at times with a header that promises more than there is."""
    shape = tuple(random.randrange(5) for _ in range(random.randrange(4)))
    kinds = "f2", "f8", "i8", "u1", "?", "c8", "S3", "U2", "M8[s]", "f4,i2", "V8", "O"
    array = random.choice(good) if random.random() < 0.3 else np.zeros(shape, random.choice(kinds))
    file = io.BytesIO()
    np.lib.format.write_array(file, array.T if random.random() < 0.3 else array)
    data = file.getvalue()
    if random.random() < 0.3:
        data = re.sub(rb"'shape': \(.*?\)", b"'shape': (%d,)" % 10 ** random.randrange(14), data)
    return data


def bomb(random):
    """A PNG header, with its sum right, of a picture of any size, and a little of its content."""
    width, height = (int(10 ** random.uniform(0, 5)) for _ in range(2))
    bits, colour = random.choice([1, 8, 16]), random.choice([0, 2, 6])
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = header, b"IDAT" + zlib.compress(bytes(random.randint(1, 10**6))), b"IEND"
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


class Fuzz:
    """Good files of each format, their mutations, and the command that reads them."""

    def __init__(self, folder):
        self.folder, digits, colour = folder, tiny_run(folder / "good"), little("imagenet64", 8, 3)
        plans = {stage: sf.Schedule(3, 8) for stage in sf.TRAINING.split()}
        digits = replace(digits, preset=replace(digits.preset, pairs=40, **plans))
        network = digits.preset.teacher | dict(channels=3, label_dim=3)
        colour = replace(colour, teacher=network, students={"tiny": network}, student="tiny", **plans)
        sf.PRESETS.update(digits=digits.preset, imagenet64=colour)
        sf.SAMPLE_BATCH = 20
        sf.draw_loss = sf.save_grid = lambda *args: None  # pictures are not what is tried here
        sf.run_stages(digits, "reflow")
        sys.modules.update(nvidia_modules())
        self.run, self.edm = digits, sf.UNet(**EDM | dict(model_channels=8, attn_resolutions=()))
        self.pictures = {f"{i % 3}/{i}.png": png(colours(i, 8, 9, 3)) for i in range(4)}
        self.labels = dict(labels=[[name, i % 3] for i, name in enumerate(self.pictures)])
        self.zip = self.folder / "good.zip"
        zipped(self.zip, self.pictures | {"dataset.json": json.dumps(self.labels)})
        sf.load_images(colour, self.zip)
        self.decoded = self.folder / "good.zip.8x8.labels.npy"

    def put(self, path, data):
        """Write the file of a case."""
        path = self.folder / "case" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def copied(self, stage):
        """A copy of the good run's stage, and of what it needs, to be damaged."""
        for name in (*sf.INPUTS[stage], stage):
            if (self.run.folder / name).exists():
                shutil.copytree(self.run.folder / name, self.folder / "case/digits" / name)

    def ckpt(self, random):
        name = "train/ckpt.pt"
        good = (self.run.folder / name).read_bytes()
        state = torch.load(io.BytesIO(good), weights_only=True)
        made = saved(replaced(state, random)), rezipped(good, random), scratched(good, random)
        path = self.put(f"digits/{name}", random.choice(made))
        out = "--out", self.folder / "case"
        return random.choice([("sample", "--n", 2, "--ckpt", path), ("train", "--steps", 4, *out)])

    def pth(self, random):
        config = SMALL | dict(model_channels=8, attn_resolutions=(16,))
        save_official(self.folder / "good.pth", official_modules(config))
        good = (self.folder / "good.pth").read_bytes()
        state = torch.load(io.BytesIO(good), weights_only=True)
        made = saved(replaced(state, random)), rezipped(good, random), scratched(good, random)
        return "sample", "--n", 1, "--ckpt", self.put("x.pth", random.choice(made))

    def pkl(self, random):
        objects, state = edm_objects(self.edm)
        if random.random() < 0.5:
            outer = objects["ema"]
            where = random.choice([state["_init_kwargs"], state["_modules"], outer.state, outer.meta])
            changed = replaced(dict(where), random)
            where.update(changed if isinstance(changed, dict) else {key: changed for key in where})
            return self.sample_pkl(pickle.dumps(objects))
        return self.sample_pkl(scratched(pickle.dumps(objects), random))

    def sample_pkl(self, data):
        return "sample", "--n", 1, "--solver", "euler", "--steps", 1, "--ckpt", self.put("x.pkl", data)

    def npz(self, random):
        mu, sigma, digit = np.zeros(4), np.eye(4), HERE / "digits.npz"
        file = io.BytesIO()
        np.savez(file, mu=mu, sigma=sigma)
        good = [digit.read_bytes(), file.getvalue()][i := random.randrange(2)]
        swap = lambda data, random: as_npy(random, mu, sigma)  # noqa: E731
        data = random.choice([rezipped(good, random), rezipped(good, random, swap), scratched(good, random)])
        if i:
            return partial(sf.load_moments, self.put("ref.npz", data))
        return "train", "--out", self.folder / "case", "--data-dir", self.put("digits.npz", data).parent

    def npy(self, random):
        names = self.run.folder / "pairs/pairs.npy", self.decoded
        source = names[i := random.randrange(2)]
        good, wrong = source.read_bytes(), np.load(source)
        wrong["y"] = random.choice([-1, 2, 3, 2**40])
        head = scratched(good[:200], random) + good[200:]
        data = random.choice([head, scratched(good, random), as_npy(random, wrong)])
        if i:
            shutil.copy(self.zip, self.put("x.zip", b""))
            self.put("x.zip.8x8.labels.npy", data)
            return self.colour("x.zip")
        self.copied("pairs")
        self.put("digits/pairs/pairs.npy", data)
        return "reflow", "--out", self.folder / "case"

    def parts(self, random):
        self.copied("pairs")
        (self.folder / "case/digits/pairs/pairs.npy").unlink()
        rows = np.load(self.run.folder / "pairs/pairs.npy")
        file = io.BytesIO()
        np.save(file, rows[:20])
        data = random.choice([scratched(file.getvalue(), random), as_npy(random, rows[:3])])
        self.put(f"digits/pairs/parts/{random.choice([0, 20])}.npy", data)
        return "pairs", "--out", self.folder / "case"

    def colour(self, name):
        out = "--out", self.folder / "case"
        return "train", "--dataset", "imagenet64", *out, "--data-dir", self.folder / "case" / name

    def zip_(self, random):
        good = self.zip.read_bytes()
        data = random.choice([scratched(good, random), rezipped(good, random)])
        if random.random() < 0.3:
            names = "../evil.png", "/tmp/evil.png", "a/../../evil.png", "C:\\evil.png", "link.png", "\x00.png"
            entry = zipfile.ZipInfo(random.choice(names))
            entry.external_attr = random.choice([0, 0o120777 << 16])  # a file, a symbolic link
            file = io.BytesIO(good)
            with zipfile.ZipFile(file, "a") as archive:
                archive.writestr(entry, random.choice([b"/etc/passwd", png(colours(0, 9, 8, 3))]))
            data = file.getvalue()
        self.put("x.zip", data)
        return self.colour("x.zip")

    def png(self, random):
        for name, data in self.pictures.items():
            self.put(f"x/{name}", data)
        modes = "1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16"
        file, kind = io.BytesIO(), random.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
        image = Image.fromarray(colours(0, 9, 9, 3)).convert(random.choice(modes))
        with contextlib.suppress(OSError, KeyError, ValueError):  # not each format has each mode
            image.save(file, kind)
        made = [scratched(file.getvalue(), random), scratched(self.pictures["0/0.png"], random), bomb(random)]
        self.put("x/0/0.png", random.choice(made))
        return self.colour("x")

    def dataset_json(self, random):
        text = json.dumps(self.labels).encode()
        data = scratched(text, random)
        if random.random() < 0.5:
            data = json.dumps(replaced(self.labels, random), default=str).encode()
        self.put("x.zip", b"")
        zipped(self.folder / "case/x.zip", self.pictures | {"dataset.json": data})
        return self.colour("x.zip")

    def settings_json(self, random):
        self.copied("pairs")
        good = json.loads((self.run.folder / "pairs/settings.json").read_text())
        data = scratched(json.dumps(good).encode(), random)
        if random.random() < 0.5:
            data = json.dumps(replaced(good, random), default=str).encode()
        self.put("digits/pairs/settings.json", data)
        return "pairs", "--n", 40, "--out", self.folder / "case"


def fuzz(folder, cases, *formats):
    """Try some cases of each format; print how often it was refused, and whatever went wrong."""
    tries, work, root = Fuzz(Path(folder)), sf.command, sorted(Path(folder).parent.iterdir())
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # noqa: E731
    for name in formats:
        random, refused, slowest, before = Random(name), 0, 0.0, peak()
        for i in range(cases):
            shutil.rmtree(tries.folder / "case", ignore_errors=True)
            args, output, errors = getattr(tries, name)(random), io.StringIO(), io.StringIO()
            sf.command = work if isinstance(args, tuple) else lambda _, call=args: call()
            args = [str(a) for a in args] if isinstance(args, tuple) else ["all"]
            faulthandler.dump_traceback_later(60, exit=True)
            began, kept = time.perf_counter(), set(tries.folder.glob("*"))
            try:
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                    status = sf.main(args)
            except Exception:
                status = traceback.format_exc()
            slowest = max(slowest, time.perf_counter() - began)
            lines = [line for line in errors.getvalue().splitlines() if "slimflow: warning: " not in line]
            ours = all(line.startswith("slimflow: ") for line in lines)
            if status not in (0, 2) or len(lines) != (status == 2) or not ours:
                print("WRONG", name, i, args, status, errors.getvalue())
            new = set(tries.folder.glob("*")) - kept - {tries.folder / "case", tries.folder / "samples.png"}
            if new or sorted(Path(folder).parent.iterdir()) != root:
                print("WRONG", name, i, "wrote", new or "outside")
            refused += status == 2
        figures = f"{refused} refused, slowest {slowest:.2f} s, {peak() - before} MiB more"
        print(f"{name:<14}{cases} cases, {figures}")


FORMATS = "ckpt", "pth", "pkl", "npz", "npy", "parts", "zip_", "png", "dataset_json", "settings_json"


def fuzzed(folder, cases):
    """The lines that `fuzz` prints, run in a process of its own."""
    folder.mkdir()
    environment = os.environ | dict(PYTHONPATH=str(HERE))
    script = f"import test_slimflow as tests; tests.fuzz({str(folder)!r}, {cases}, *tests.FORMATS)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert "WRONG" not in done.stdout, done.stdout
    figures = re.findall(r"(\d+) refused, slowest (.*) s, (\d+) MiB", done.stdout)
    assert len(figures) == len(FORMATS)
    assert all(float(slowest) < 5 and int(more) < 1024 for _, slowest, more in figures)
    return {name: int(refused) for name, (refused, *_) in zip(FORMATS, figures)}


def test_damaged_files_of_every_format_cost_a_line(tmp_path):
    refused = fuzzed(tmp_path / "fuzz", 12)
    assert all(refused.values())


@pytest.mark.slow
def test_300_damaged_files_of_every_format_cost_a_line(tmp_path):
    refused = fuzzed(tmp_path / "fuzz", 300)
    assert all(50 < number < 300 for number in refused.values())


# ------------------------------------------------------------------------------------------------------------
# LPIPS and FID: by packages that need not be there, with weights that nobody need download for a test


def optional(name):
    """An optional package, or the test is skipped."""
    try:
        return sf.import_optional(name)
    except sf.Fault as fault:
        pytest.skip(str(fault))


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache of torch's downloads, and no way to fill it."""

    def refuse(url, *args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    sf.lpips_network.cache_clear()
    yield tmp_path / "cache/hub/checkpoints"
    sf.lpips_network.cache_clear()


def test_missing_packages_are_named(monkeypatch, tmp_path, one_line):
    sf.lpips_network.cache_clear()
    monkeypatch.setitem(sf.STAGES, "train", lambda run: pytest.fail("trained before the package was missed"))
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    line = one_line("distill", "--distance", "lpips", "--out", tmp_path)
    assert "this needs the package lpips: pip install lpips" in line and not list(tmp_path.rglob("*.pt"))
    with pytest.raises(sf.Fault, match="package torch-fidelity: pip install torch-fidelity"):
        sf.inception_features("cpu")


def test_missing_weights_are_named_before_anything_is_trained(no_network, tmp_path, capsys):
    optional("lpips")
    assert sf.main(["distill", "--distance", "lpips", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("slimflow: cannot download VGG; put https://") and "vgg16-397923af.pth" in line
    assert str(no_network) in line and not list(tmp_path.rglob("*.pt"))
    optional("torch_fidelity")
    with pytest.raises(sf.Fault, match=r"put https.*weights-inception-2015-12-05-.*\.pth into ") as caught:
        sf.inception_features("cpu")
    assert str(no_network) in str(caught.value)


def test_lpips_is_the_packages_at_64_pixels(monkeypatch):
    package, vgg = optional("lpips"), sf.import_optional("torchvision.models.vgg")
    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs["D"])
    stub = types.SimpleNamespace(vgg16=lambda pretrained: types.SimpleNamespace(features=features))
    monkeypatch.setattr(package.pretrained_networks, "tv", stub)
    sf.lpips_network.cache_clear()
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    d = sf.DISTANCES["lpips"](a.requires_grad_(), b)
    assert d.shape == (2,) and (d > 0).all() and sf.lpips(b, b).abs().max() == 0
    assert torch.autograd.grad(d.sum(), a)[0].abs().max() > 0
    resize = partial(torch.nn.functional.interpolate, size=64, mode="bilinear", align_corners=True)
    bigger = resize(a), resize(b)
    theirs = package.LPIPS(net="vgg", verbose=False).eval()(*bigger).flatten()
    torch.testing.assert_close(d, theirs)
    grey = torch.rand(2, 1, 8, 8)
    rgb = grey.repeat(1, 3, 1, 1)
    torch.testing.assert_close(sf.lpips(grey, -grey), sf.lpips(rgb, -rgb))
    sf.lpips_network.cache_clear()


def test_inception_features_are_the_packages(monkeypatch):
    package = optional("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    net = package.FeatureExtractorInceptionV3
    monkeypatch.setattr(package, "load_state_dict_from_url", lambda *args, **options: {})
    monkeypatch.setattr(net, "load_state_dict", lambda self, weights: None)
    features = sf.inception_features("cpu")(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
    assert features.shape == (2, 2048) and features.isfinite().all() and (features[0] != features[1]).any()


def test_table_compares_with_the_training_images_or_with_given_statistics(tmp_path, monkeypatch, capsys):
    """The table of a paper preset, with means of pixels in place of Inception's features."""
    count = []

    def means(pictures):
        count.append(len(pictures))
        return pictures.float().unflatten(2, (2, -1)).mean(dim=(1, 3, 4))  # (n, 2): upper and lower half

    monkeypatch.setattr(sf, "inception_features", lambda device: means)
    zipped(tmp_path / "some.zip", {f"{i}.png": png(colours(i, 8, 8, 3)) for i in range(20)})
    network = sf.DIGITS | dict(model_channels=8, channel_mult=(1,), attn_resolutions=(), channels=3)
    networks = dict(teacher=network, students={"tiny": network})
    run = tiny_run(tmp_path, name="ffhq64", shape=(3, 8, 8), samples=600, **networks)
    run = replace(run, data_dir=tmp_path / "some.zip")
    sf.run_stages(run, "distill")
    capsys.readouterr()

    def fids(given=None):
        sf.evaluate(run, given)
        *lines, last = capsys.readouterr().out.splitlines()
        table = [line.rsplit(maxsplit=6) for line in lines if " step" in line or "precise" in line]
        assert [row[0].split("  ")[0] for row in table] == [name for name, *_ in sf.ROWS]
        assert [row[-3] for row in table] == ["300", "600", "600", "600"]
        return [float(row[-4]) for row in table], last

    own, last = fids()
    assert "FID against 20 real images" in last
    images, _ = sf.load_images(run.preset, run.data_dir)
    student = sf.load_flow(run.folder / "distill/ckpt.pt")
    made = sf.to_uint8(sf.one_step(student, sf.fixed_noise(run, 600, seed=4321)[0]))
    real = means(images).double().mean(0), np.cov(means(images).double().T)
    assert own[3] == pytest.approx(sf.frechet_distance(*sf.moments([means(made)]), *real), abs=0.01)
    count.clear()
    assert fids()[0] == own and sum(count) == 20 + 300 + 3 * 600  # the stored pairs are not made again
    np.savez(tmp_path / "stats.npz", mu=real[0] + 10, sigma=real[1])
    run = replace(run, data_dir=tmp_path / "nowhere")  # the images are not needed then
    given, last = fids(tmp_path / "stats.npz")
    assert "FID against" in last and "stats.npz" in last and given != own
    np.savez(tmp_path / "stats.npz", mean=real[0])
    with pytest.raises(sf.Fault, match=r"stats\.npz is damaged or no npz with mu and sigma"):
        sf.evaluate(run, tmp_path / "stats.npz")
    monkeypatch.setattr(sf, "inception_features", lambda device: lambda pictures: pictures.flatten(1).float())
    features = 3 * 8 * 8  # of which a distance needs more images than the 100 stored pairs that are left
    np.savez(tmp_path / "stats.npz", mu=np.zeros(features), sigma=np.eye(features))
    np.save(run.folder / "pairs/pairs.npy", stored(run)[:100])
    capsys.readouterr()
    sf.evaluate(run, tmp_path / "stats.npz")
    assert capsys.readouterr().out.splitlines()[1].split()[-3] == "600"


# ------------------------------------------------------------------------------------------------------------
# Several processes


MANY = """
import os, signal, sys
import slimflow as sf, test_slimflow as tests
from dataclasses import replace
from pathlib import Path

folder = Path(sys.argv[1])
killed = sys.argv[2] == "killed"
sf.SAVE_EVERY, sf.SAMPLE_BATCH = 0 if killed else 60, 50
run, work = replace(tests.tiny_run(folder, batch=64), log_every=1), sf.update

def update(*args):
    path = run.folder / "reflow/ckpt.pt"
    if killed and sf.RANK == 1 and path.exists() and sf.load_checkpoint(path)["step"] >= 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*args)

sf.update = update
sf.command = lambda args: sf.run_stages(run, "distill")
sys.exit(sf.main(["distill"]))
"""


def two_processes(script, *args, cwd):
    """Run a script in two processes under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | dict(PYTHONPATH=str(HERE))
    command = [*launcher, str(script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=170)


def test_two_processes_train_as_one_and_go_on_after_one_was_killed(tmp_path, monkeypatch):
    script = tmp_path / "many.py"
    script.write_text(MANY)
    first = two_processes(script, "two", "killed", cwd=tmp_path)
    assert first.returncode != 0 and not (tmp_path / "two/digits/distill").exists()
    second = two_processes(script, "two", "whole", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "plan: reflow -> distill, into two/digits, on 2 x cpu" in second.stdout
    assert second.stdout.count("plan:") == 1 and "continues from" in second.stdout
    monkeypatch.setattr(sf, "SAMPLE_BATCH", 50)
    sf.run_stages(replace(tiny_run(tmp_path / "one", batch=64), accumulate=2, log_every=1), "distill")
    rows = [np.load(tmp_path / name / "digits/pairs/pairs.npy") for name in ("one", "two")]
    assert len(rows[0]) == 300
    np.testing.assert_allclose(rows[0]["data"].astype(float), rows[1]["data"].astype(float), atol=2e-3)
    for stage in ("train", "reflow", "distill"):
        paths = [tmp_path / name / "digits" / stage / "ckpt.pt" for name in ("one", "two")]
        a, b = (sf.load_checkpoint(path)["rows"] for path in paths)
        assert a.shape == (12, 3)
        torch.testing.assert_close(a, b, rtol=2e-4 if stage != "train" else 1e-5, atol=0)


def test_failure_of_processes_is_one_message(tmp_path, monkeypatch):
    done = two_processes(HERE / "slimflow.py", "train", "--data-dir", "nowhere", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("slimflow: ") == 1 and "nowhere/digits.npz does not exist" in done.stderr
    monkeypatch.setattr(sf, "WORLD", 2)
    with pytest.raises(sf.Fault, match="eval is for one process; run it without torchrun"):
        sf.command(sf.parse(["eval"]))


# ------------------------------------------------------------------------------------------------------------
# Command line


def slimflow(*args, cwd=None):
    """Run slimflow.py in a process of its own; its output."""
    command = [sys.executable, str(HERE / "slimflow.py"), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


@pytest.fixture
def one_line(capsys):
    """Run slimflow.py's command line in this process: the one line of its error."""

    def call(*args):
        assert sf.main([str(a) for a in args]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("slimflow: "), error
        return error

    return call


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    """The whole pipeline, a few steps a stage, by the command line: (folder, output of the last call)."""
    folder = tmp_path_factory.mktemp("miniature")
    for line in (
        "train --steps 12 --batch 16",
        "pairs --n 600 --solver euler --steps 4",
        "reflow --steps 10 --batch 16 --anneal 5 --anneal-schedule cosine",
        "distill --steps 8 --batch 16 --guidance 0.5 --distance huber",
    ):
        assert sf.main([*line.split(), "--out", str(folder / "runs")]) == 0
    return folder, slimflow(cwd=folder)


def test_miniature_pipeline_leaves_all_its_files(miniature):
    folder, output = miniature
    for stage in ("train", "reflow", "distill"):
        for file in ("ckpt.pt", "log.csv", "loss.png", "samples.png"):
            assert (folder / "runs/digits" / stage / file).stat().st_size > 0
    assert (folder / "runs/digits/pairs/samples.png").exists()
    assert (folder / "runs/digits/summary.png").exists()
    assert not list(folder.rglob("*.tmp"))
    rows = {line[:16].strip(): line.split() for line in output.splitlines()}
    assert rows["teacher, precise"][2:5] == ["748,737", "18.6M", "4"]
    assert rows["teacher, precise"][6] == "600"
    assert rows["student, 1 step"][3:6] == ["188,769", "4.7M", "1"] and rows["student, 1 step"][7] == "5,000"
    assert 5 < float(rows["real half/half"][2]) < 20 and rows["real half/half"][3] == "898"
    assert "distill is finished" in output


def test_ctrl_c_ends_with_one_line(tmp_path):
    command = [sys.executable, "-u", str(HERE / "slimflow.py"), "train", "--batch", "8"]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a command started with & would ignore it
    how = dict(cwd=tmp_path, stdout=-1, stderr=-1, text=True, preexec_fn=heed)
    with subprocess.Popen(command, **how) as process:
        assert process.stdout.readline().startswith("plan: train, into runs/digits")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "slimflow: interrupted; the same command without --fresh goes on from what was saved\n"


@pytest.fixture
def output(capsys):
    """Run slimflow.py's command line in this process: what it prints."""

    def call(*args):
        capsys.readouterr()
        assert sf.main([str(a) for a in args]) == 0
        return capsys.readouterr().out

    return call


def test_finished_stage_says_so_and_more_steps_continue_it(miniature, output):
    runs, more = miniature[0] / "runs", miniature[0] / "more"
    before = (runs / "digits/train/ckpt.pt").read_bytes()
    assert "train is finished" in output("train", "--out", runs)
    assert (runs / "digits/train/ckpt.pt").read_bytes() == before
    shutil.copytree(runs, more)
    out = output("train", "--steps", 14, "--batch", 16, "--out", more)
    assert "12/14 steps  continues from" in out
    assert "note: pairs is older than train; `pairs --fresh` makes it anew" in out and out.count("note:") == 1
    assert "14/14 steps  is complete" in output("train", "--steps", 14, "--batch", 16, "--out", more)
    same = "--batch", 16, "--guidance", 0.5, "--distance", "huber", "--out", runs
    out = output("distill", "--steps", 2, *same)
    assert "8/2 steps  is complete" in out and "note:" not in out
    assert sf.load_checkpoint(more / "digits/train/ckpt.pt")["step"] == 14


def test_a_run_is_not_continued_with_other_settings(miniature, one_line):
    folder, _ = miniature
    with np.load(HERE / "digits.npz") as file:
        np.savez(folder / "digits.npz", images=file["images"][:99], labels=file["labels"][:99])
    before = (folder / "runs/digits/distill/ckpt.pt").read_bytes()
    same = "--batch", 16, "--steps", 20, "--out", folder / "runs"
    line = one_line("distill", *same, "--guidance", 0, "--distance", "huber")
    assert "made with another guidance; use --fresh" in line
    assert "made with another images;" in one_line("train", *same, "--data-dir", folder)
    assert "made with another seed;" in one_line("train", *same, "--seed", 1)
    finished = "--batch", 16, "--distance", "huber", "--out", folder / "runs"
    assert "made with another guidance;" in one_line("distill", "--guidance", 0, *finished)
    assert "made with another anneal," in one_line("reflow", *same)
    assert (folder / "runs/digits/distill/ckpt.pt").read_bytes() == before


def test_fresh_sets_the_stage_and_what_was_made_from_it_aside(miniature, output):
    folder, _ = miniature
    shutil.copytree(folder / "runs", folder / "again")
    fresh = "reflow", "--batch", 4, "--fresh", "--out", folder / "again"
    assert "note: b is still 0.99 after the last step" in output(*fresh, "--steps", 3)
    again = folder / "again/digits"
    assert sf.load_checkpoint(again / "reflow/ckpt.pt")["step"] == 3
    assert sf.load_checkpoint(again / "reflow.old1/ckpt.pt")["step"] == 10
    assert (again / "distill.old1").exists() and not (again / "distill").exists()
    output(*fresh, "--steps", 2)
    assert sf.load_checkpoint(again / "reflow.old1/ckpt.pt")["step"] == 10
    assert sf.load_checkpoint(again / "reflow.old2/ckpt.pt")["step"] == 3
    assert (again / "pairs").exists()


def test_sample_writes_pictures_and_arrays(miniature, tmp_path, monkeypatch, output):
    ckpt = miniature[0] / "runs/digits/distill/ckpt.pt"
    monkeypatch.chdir(tmp_path)
    assert "euler" in output("sample", "--ckpt", ckpt, "--n", 70, "--npz", "a.npz", "--png", "a.png")
    assert Path("a.png").exists()
    a = np.load("a.npz")["arr_0"]
    assert a.shape == (70, 8, 8, 1) and a.dtype == np.uint8
    output("sample", "--ckpt", ckpt, "--n", 70, "--npz", "b.npz", "--seed", 1)
    assert (np.load("b.npz")["arr_0"] != a).any() and Path("samples.png").exists()
    given = sf.parse(["sample", "--ckpt", str(ckpt), "--solver", "adams", "--steps", "3"])
    assert sf.solver_options(given) == dict(solver="adams", steps=3)
    flow = sf.load_flow(ckpt)
    sf.seed_all(0, "sample", 0)
    assert (sf.to_uint8(sf.one_step(flow, torch.randn(70, 1, 8, 8))).permute(0, 2, 3, 1).numpy() == a).all()


def test_solvers_compares_their_errors(miniature, tmp_path, capsys):
    given = "--ckpt", miniature[0] / "runs/digits/train/ckpt.pt", "--n", 8, "--png", tmp_path / "errors.png"
    assert sf.main(["solvers", *map(str, given)]) == 0
    out = capsys.readouterr().out
    rows = [re.split(r"  +", line) for line in out.splitlines()[1:-1]]
    errors = {name: float(error) for name, _, error in rows}
    assert len(rows) == 19 and [nfe for name, nfe, _ in rows if name.startswith("heun")][-1] == "127"
    for name in ("euler", "heun", "adams"):
        assert errors[f"{name}, 64"] < errors[f"{name}, 8"] / 4
    assert (tmp_path / "errors.png").stat().st_size > 0 and "8 images, against rk45" in out


def test_bench_prints_a_share_of_the_matmul_rate(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    out = output("bench", "--batch", 4, "--profile")
    assert "188,769 parameters" in out and "distance l2" in out
    rows = {line.split("  ")[0]: line.split()[-7:] for line in out.splitlines()[-7:-2]}
    assert list(rows) == ["train", "pairs, per evaluation", "reflow", "distill", "sample, one step"]
    for rate, spread, flops, share, _, images, hours in rows.values():
        assert float(flops.replace(",", "")) > 0 and share.endswith("%") and spread.endswith("%")
        days = float(images.replace(",", "")) / float(rate.replace(",", "")) / 3600
        assert float(hours.replace(",", "")) == pytest.approx(days, rel=0.1, abs=0.1)
    assert re.search(r"cpu: matmul \d+ GFLOP/s \(2048 x 2048, float32\), memory \d+ GB/s; torch", out)
    operations = out.split("of reflow")[1].splitlines()[1:11]
    assert "convolution_backward" in " ".join(operations[:2])
    shares = [float(line.split()[-1].rstrip("%")) for line in operations]
    assert shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100
    assert not list(tmp_path.iterdir())


BAD = """
dance | argument command: invalid choice: dance {commands}
--dance | all does not take --dance; see `slimflow.py all --help`
train 5 | train does not take 5; {help}
train --dataset mnist | argument --dataset: invalid choice: mnist {datasets}; {help}
train --dataset | argument --dataset: expected one argument; {help}
train --datas cifar10 | train does not take --datas cifar10; {help}
train --out | argument --out: expected one argument; {help}
train --out in_the_way | in_the_way/digits: Not a directory; {path}
train --data-dir nowhere | nowhere/digits.npz {missing}
train --data-dir in_the_way | in_the_way/digits.npz: Not a directory; {path}
train --data-dir empty | empty/digits.npz {missing}
train --device tpu | argument --device: invalid choice: tpu (choose from cpu, cuda); {help}
train --device cuda | --device cuda: torch sees no GPU; use --device cpu, or install torchs CUDA build
train --seed -1 | argument --seed: -1 {whole}; {help}
train --seed 1.5 | argument --seed: 1.5 {whole}; {help}
train --seed one | argument --seed: one {whole}; {help}
train --steps 0 | argument --steps: 0 {count}; {help}
train --steps -3 | argument --steps: -3 {count}; {help}
train --steps 1e3 | argument --steps: 1e3 {count}; {help}
train --steps ten | argument --steps: ten {count}; {help}
train --steps 10000000000 | argument --steps: 10000000000 {count}; {help}
train --batch 1.5 | argument --batch: 1.5 {count}; {help}
train --batch 0 | argument --batch: 0 {count}; {help}
train --lr nan | argument --lr: nan {real}; {help}
train --lr inf | argument --lr: inf {real}; {help}
train --lr -0.1 | argument --lr: -0.1 {real}; {help}
train --lr fast | argument --lr: fast {real}; {help}
train --accumulate 3 | a batch of 64 {split} 1 x 3 parts {divide}
train --accumulate 0 | argument --accumulate: 0 {count}; {help}
train --batch 10 --accumulate 4 | a batch of 10 {split} 1 x 4 parts {divide}
train --log-every 0 | argument --log-every: 0 {log}; {help}
train --fresh yes | train does not take yes; {help}
train --guidance 1 | train does not take --guidance 1; it is for distill
train --anneal 5 | train does not take --anneal 5; it is for reflow
train --n 10 | train does not take --n 10; it is for pairs, eval, sample, solvers
train --teacher x.pkl | train does not take --teacher x.pkl; it is for all, pairs, reflow, distill
train --student 0.19M | train does not take --student 0.19M; it is for all, reflow, distill, bench
train --distance l2 | train does not take --distance l2; it is for distill, bench
train --solver euler | train does not take --solver euler; it is for pairs, sample
train --ckpt x.pt | train does not take --ckpt x.pt; it is for sample, solvers
train --dataset ffhq64 --data-dir nowhere | {nothing}
train --dataset ffhq64 --data-dir in_the_way | {here}/in_the_way {images}
train --dataset ffhq64 --data-dir empty | {here}/empty {no_images}
train --dataset imagenet64 --data-dir in_the_way | {here}/in_the_way {classes}
train --dataset cifar10 --data-dir empty --lr | argument --lr: expected one argument; {help}
all --steps 5 | all does not take --steps 5; it is for train, reflow, distill, pairs, sample
all --n 5 | all does not take --n 5; it is for pairs, eval, sample, solvers
all --student 9.9M | digits has no student 9.9M; choose from 0.19M
all --accumulate 3 | a batch of 64 {split} 1 x 3 parts {divide}
pairs --n 0 | argument --n: 0 {count}; {help}
pairs --n many | argument --n: many {count}; {help}
pairs --solver dopri | argument --solver: invalid choice: dopri {solvers}; {help}
pairs --solver heun | --solver heun needs --steps, for instance --steps 20
pairs --solver rk45 --steps 5 | --solver rk45 chooses its steps itself; leave out --steps
pairs --steps 3 | --steps needs --solver euler, heun or adams beside it
pairs --steps 0 --solver heun | argument --steps: 0 {count}; {help}
pairs --lr 1 | pairs does not take --lr 1; it is for train, reflow, distill
pairs --student 0.19M | pairs does not take --student 0.19M; it is for all, reflow, distill, bench
pairs --teacher nowhere.pkl | nowhere.pkl does not exist; name the right file
pairs --teacher nowhere.pt | nowhere.pt does not exist; name the right file
distill --teacher nowhere.pkl | nowhere.pkl does not exist; name the right file
pairs --teacher in_the_way | in_the_way {no_zip}
pairs --teacher empty | empty: Is a directory; {path}
pairs --teacher bare.pt | bare.pt {no_entries}
reflow --student 9.9M | digits has no student 9.9M; choose from 0.19M
reflow --student 15.7M | digits has no student 15.7M; choose from 0.19M
reflow --dataset cifar10 --student 0.19M | cifar10 has no student 0.19M; {sizes}
reflow --anneal -1 | argument --anneal: -1 {whole}; {help}
reflow --anneal 2.5 | argument --anneal: 2.5 {whole}; {help}
reflow --anneal-schedule quadratic | argument --anneal-schedule: invalid choice: quadratic {schedules}; {help}
reflow --anneal 0 --anneal-schedule cosine | --anneal 0 has no schedule; leave out --anneal-schedule
reflow --guidance 0 | reflow does not take --guidance 0; it is for distill
reflow --batch 7 --accumulate 2 | a batch of 7 {split} 1 x 2 parts {divide}
distill --distance l3 | argument --distance: invalid choice: l3 (choose from l2, huber, lpips); {help}
distill --guidance -1 | argument --guidance: -1 {real}; {help}
distill --guidance nan | argument --guidance: nan {real}; {help}
distill --anneal 10 | distill does not take --anneal 10; it is for reflow
distill --steps 5 5 | distill does not take 5; {help}
sample | the following arguments are required: --ckpt; {help}
sample --ckpt | argument --ckpt: expected one argument; {help}
sample --ckpt nowhere.pt | nowhere.pt {missing}
sample --ckpt in_the_way | in_the_way {no_zip}
sample --ckpt empty | empty: Is a directory; {path}
sample --ckpt bare.pt | bare.pt {no_entries}
sample --ckpt nowhere.pth | nowhere.pth {missing}
sample --ckpt nowhere.pkl | nowhere.pkl {missing}
sample --ckpt bare.pt --png x --npz x | {same}
sample --ckpt bare.pt --png bare.pt | {same}
solvers --ckpt bare.pt --png ./bare.pt | {same}
sample --ckpt bare.pt --n 0 | argument --n: 0 {count}; {help}
sample --ckpt bare.pt --dataset digits | sample does not take --dataset digits; it is for {runs}, eval, bench
sample --ckpt bare.pt --out runs | sample does not take --out runs; it is for {runs}, eval
solvers | the following arguments are required: --ckpt; {help}
solvers --ckpt nowhere.pt | nowhere.pt {missing}
solvers --ckpt bare.pt --solver euler | solvers does not take --solver euler; it is for pairs, sample
eval | runs/digits {unfinished}
eval --n 0 | argument --n: 0 {count}; {help}
eval --fresh | eval does not take --fresh; it is for {runs}
eval --dataset cifar10 --ref a.npz --data-dir b | --ref stands for the images; leave out --data-dir
eval --ref | argument --ref: expected one argument; {help}
eval --out in_the_way | in_the_way/digits {unfinished}
eval --batch 5 | eval does not take --batch 5; it is for train, reflow, distill, bench
bench --out x | bench does not take --out x; it is for {runs}, eval
bench --batch 0 | argument --batch: 0 {count}; {help}
bench --student 9.9M | digits has no student 9.9M; choose from 0.19M
bench --distance l3 | argument --distance: invalid choice: l3 (choose from l2, huber, lpips); {help}
bench --seed 1 | bench does not take --seed 1; it is for {runs}, sample, solvers
bench --dataset mnist | argument --dataset: invalid choice: mnist {datasets}; {help}
"""
WORDS = dict(  # parts of the lines above
    classes="is damaged or no folder or zip of images with a class each {zip}; {mend}",
    commands="(choose from {runs}, sample, eval, solvers, bench); see `slimflow.py --help`",
    count="is not a whole number from 1 to 1,000,000,000",
    log="is not a whole number from 1 to 1,000",
    datasets="(choose from digits, cifar10, ffhq64, imagenet64)",
    divide="(processes x --accumulate); choose numbers that divide it",
    entries="(entries are missing or of other types)",
    images="is damaged or no folder or zip of images {zip}; {mend}",
    mend="mend it, or name another --data-dir",
    missing="does not exist; make it first, or name the right file or folder",
    no_entries="is damaged or no checkpoint {entries}; {other}",
    other="name another file, or start its stage over with --fresh",
    no_images="is damaged or no folder or zip of images ({kinds}); {mend}",
    kinds="no .bmp .gif .jpeg .jpg .png .ppm .tif .tiff .webp in it",
    no_zip="is damaged or no checkpoint {zip}; {other}",
    nothing="no images at {here}/nowhere; --data-dir takes a folder of images or EDMs zip",
    path="take another path, or change this one",
    real="is not a number from 0 to 1,000,000,000",
    runs="all, train, pairs, reflow, distill",
    schedules="(choose from linear, cosine, exponential)",
    same="--ckpt, --png and --npz are the same file; name another",
    sizes="choose from 27.9M, 15.7M, 7.0M, 3.4M",
    solvers="(choose from euler, heun, adams, rk45)",
    split="cannot be split into",
    unfinished="holds no finished stage; run `python slimflow.py all --dataset digits` first, {its}",
    its="or name its --out",
    whole="is not a whole number from 0 to 1,000,000,000",
    zip="(File is not a zip file)",
)


@pytest.mark.parametrize("row", BAD.strip().splitlines())
def test_bad_input_gets_this_line_and_changes_nothing(tmp_path, monkeypatch, one_line, row):
    arguments, expected = row.split(" | ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("in_the_way").write_text("a file")
    Path("empty").mkdir()
    torch.save({}, "bare.pt")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    known = WORDS | dict(here=tmp_path, help=f"see `slimflow.py {arguments.split()[0]} --help`")
    while "{" in expected:
        expected = expected.format(**known)
    line = one_line(*arguments.split()).replace("'", "")  # of Python's messages versions differ in them
    assert line == f"slimflow: {expected}\n"
    after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    made = {path.name for path in after if path not in before and path.suffix != ".lock"}
    assert made <= {"runs", "lock", *sf.PRESETS} and all(after[path] == before[path] for path in before)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_is_one_line_and_other_errors_are_not_hidden(monkeypatch, one_line, error):
    def fails(args):
        raise error

    monkeypatch.setattr(sf, "command", fails)
    assert one_line("train") == (
        "slimflow: out of memory; try --accumulate 2 or more, a smaller --n, or another --device\n"
    )
    error = RuntimeError("a mistake of ours")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        sf.main(["train"])


@pytest.mark.parametrize("name", sf.COMMANDS)
def test_help_shows_defaults_and_an_example_that_parses(name, capsys):
    with pytest.raises(SystemExit):
        sf.main([name, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    example = out.split("example: python slimflow.py ")[1]
    args = sf.parse(example.split())
    assert args.command == name
    for flag, takers, options in sf.FLAGS:
        if name in takers.split() and not options.get("required") and options.get("action") != "store_true":
            assert re.search(f"{flag} [^-]*(default: |which need it)", out), flag
    if name == "reflow":
        assert "optimizer steps; default: 1,100 (digits), 800,000 (cifar10 ffhq64 imagenet64)" in out
        assert "default: 250 (digits), 300,000 (cifar10" in out and "80.7M (imagenet64)" in out


def test_bad_checkpoints_get_one_line_and_stay_as_they_are(miniature, tmp_path, one_line):
    folder, _ = miniature
    good = (folder / "runs/digits/train/ckpt.pt").read_bytes()
    state = sf.load_checkpoint(folder / "runs/digits/train/ckpt.pt")
    path = tmp_path / "runs/digits/train/ckpt.pt"
    path.parent.mkdir(parents=True)
    hostile = path.with_name("hostile.pt")
    torch.save(EvalWhenLoaded(), hostile)
    other = path.with_name("other.pt")
    narrow = state["settings"]["network"] | dict(model_channels=16)
    torch.save(state | dict(settings=state["settings"] | dict(network=narrow)), other)
    damaged = good[: len(good) // 2], b"", hostile.read_bytes()
    for data in (*damaged, other.read_bytes()):
        words = "is damaged" if data in damaged else "another network"
        path.write_bytes(data)
        assert words in one_line("train", "--steps", 20, "--batch", 16, "--out", tmp_path / "runs")
        assert path.read_bytes() == data
        one_line("sample", "--ckpt", path, "--png", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists() and not (HERE / "pwned").exists()


class EvalWhenLoaded:
    """A pickle that would create a file if it were unpickled with code execution."""

    def __reduce__(self):
        return eval, (f"open({str(HERE / 'pwned')!r}, 'w')",)


def test_exploding_loss_is_reported_with_its_step(tmp_path, one_line):
    line = one_line("train", "--steps", 60, "--batch", 4, "--lr", 1e9, "--out", tmp_path / "runs")
    assert "train: loss, gradient or weights are not finite at step" in line and "--lr" in line
    assert not (tmp_path / "runs/digits/train/ckpt.pt").exists()


# ------------------------------------------------------------------------------------------------------------
# The picture in two dimensions


@pytest.mark.parametrize("target", toy2d.TARGETS)
def test_targets_are_points_inside_the_picture(target):
    torch.manual_seed(0)
    x = toy2d.TARGETS[target](5_000)
    assert x.shape == (5_000, 2) and x.abs().max() < 4.2 and x.std() > 0.5 and x.mean(dim=0).norm() < 1


def test_sliced_wasserstein_distance():
    torch.manual_seed(0)
    x = torch.randn(4_000, 2)
    assert toy2d.sliced_wasserstein(x, x[torch.randperm(4_000)]) < 1e-6
    moved = toy2d.sliced_wasserstein(x, x + torch.tensor([3.0, 0.0]))
    assert moved == pytest.approx(3 * 2 / math.pi, rel=1e-3)  # mean over directions of |3 cos|


def test_toy_draws_its_pictures(tmp_path, monkeypatch, capsys):
    for stage in ("TRAIN", "REFLOW", "DISTILL"):
        monkeypatch.setattr(toy2d, stage, sf.Schedule(steps=5, batch=16, lr=1e-3, warmup=0, ema=0.9))
    monkeypatch.setattr(sys, "argv", ["toy2d.py", "--out", str(tmp_path), "--target", "moons"])
    toy2d.main()
    assert min((tmp_path / name).stat().st_size for name in ("toy2d.png", "toy2d.gif")) > 10_000
    table = capsys.readouterr().out.splitlines()[-4:-1]
    assert [line.split()[0] for line in table] == ["1-flow", "2-flow", "student"]


def test_toy_answers_bad_input_with_one_line(tmp_path, monkeypatch):
    for flags, line in (
        (["--target", "cat"], "argument --target: invalid choice: 'cat'"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0 to 1,000,000,000"),
    ):
        monkeypatch.setattr(sys, "argv", ["toy2d.py", *flags])
        with pytest.raises(sf.Fault, match=line):
            toy2d.main()
    (tmp_path / "file").touch()
    command = [sys.executable, str(HERE / "toy2d.py"), "--out", "file"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr == "toy2d: [Errno 17] File exists: 'file'\n"


# ------------------------------------------------------------------------------------------------------------
# The notebooks, and the experiments behind them

NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))


def cells(path):
    """A notebook's cells, each with its source as one text."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell | dict(source="".join(cell["source"])) for cell in notebook["cells"]]


@pytest.fixture(scope="module")
def notebook_folder(tmp_path_factory):
    """The folder in which all of them run, so that they share a teacher."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_and_its_solutions_run(path, notebook_folder, monkeypatch):
    monkeypatch.chdir(notebook_folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sf, "timed", lambda work, device: (work(), [1.0])[1])  # once instead of six times
    monkeypatch.setattr(sweeps, "HELD_OUT", 128)
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names, pictures = {}, 0
    for cell in cells(path):
        code = [cell["source"]]
        if cell["cell_type"] == "markdown":
            code = re.findall(r"```python\n(.*?)```", cell["source"], re.DOTALL)
        for text in code:
            exec(compile(text, str(path), "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert names["SCALE"] == 1
            names |= dict(SCALE=0.002, BENCH="digits")
        pictures += len(plt.get_fignums())
        plt.close("all")
    assert pictures >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_with_the_outputs_of_one_run(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not {"error", "stderr"} & {output.get("name", output["output_type"]) for output in outputs}
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 2
    assert not re.search(r"/(tmp|home|root|work)/", "".join(map(str, outputs)))
    text = "".join(cell["source"] for cell in cells(path))
    assert not re.search(r"@[A-Z]+@", text)
    assert text.count("<details><summary>Solution</summary>") == text.count("</details>") >= 2


def test_readme_links_the_five_notebooks_and_no_missing_file():
    linked = set(re.findall(r"\]\((?!http)([^)]+)\)", (HERE / "README.md").read_text(encoding="utf-8")))
    assert all((HERE / path).exists() for path in linked)
    assert linked >= {f"notebooks/{path.name}" for path in NOTEBOOKS} and len(NOTEBOOKS) == 5


@pytest.mark.parametrize("name", sweeps.EXPERIMENTS)
def test_stored_numbers_are_those_of_the_experiments(name):
    experiment, world = sweeps.EXPERIMENTS[name]
    if experiment == sweeps.annealing:
        cases = [(*case, start) for case in world.annealing for start in sweeps.STARTS]
    elif experiment == sweeps.guidance:
        hows = "2-flow", "2-flow, two steps", *sweeps.STUDENTS
        cases = [(pairs, how) for pairs in world.pairs for how in hows]
    else:
        nets = [sf.blueprint(sf.DIGITS | dict(model_channels=width)) for width in (8, 12, 16, 24, 32)]
        sizes = [(net.config["model_channels"], sf.count_parameters(net)) for net in nets]
        cases = [(*size, network) for size in sizes for network in ("2-flow", "student")]
    rows = [tuple(row.values()) for row in sweeps.read(name)]
    wide = 1 + len(cases[0])
    assert [row[:wide] for row in rows] == [(seed, *case) for seed in range(5) for case in cases]
    for measured in zip(*(row[wide:] for row in rows)):
        assert min(measured) > 0 and len(set(measured)) == len(rows)


def test_sweep_writes_what_the_notebooks_read(tmp_path):
    command = [sys.executable, str(HERE / "notebooks/sweeps.py"), "guidance_plane"]
    command += ["--seeds", "2", "--out", "."]
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    done = run([*command, "--scale", "0.001"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["seed 0: 42 rows", "seed 1: 42 rows"]
    mine = (tmp_path / "guidance_plane.csv").read_text().splitlines()
    stored = (HERE / "notebooks/guidance_plane.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in mine] == [line.split(",")[:3] for line in stored[: len(mine)]]
    done = run([*command, "--scale", "2"])
    line = "sweeps: argument --scale: '2' is not a number from 0.001 to 1; see `sweeps.py --help`\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_equal_cost_counts_passes():
    # per image: naive 1 + 2; guided 1 + 2 of the student on each of two batches, and 2 of the 2-flow
    assert sweeps.equal_cost(800, 0) == 800 and sweeps.equal_cost(800, 1) == 300
    assert sweeps.equal_cost(800, 1) * (3 + 3 + 2) == 800 * 3


def test_experiments_measure_what_they_say():
    world = types.SimpleNamespace(noise=torch.zeros(2_000, 2), data=torch.ones(2_000, 2))
    world.data[-sweeps.HELD_OUT :] = 3.0

    def flow(x, t, y=None):
        return torch.full_like(x, 0.5) * (1 + (t[:, None] >= 0.5))

    assert sweeps.error(world, flow, slice(0, 10)) == 0.5 and sweeps.held_out_error(world, flow) == 2.5
    assert sf.one_step(sweeps.two_steps_in_one(flow), torch.ones(3, 2))[0].tolist() == [1.75, 1.75]
    assert sweeps.held_out_loss(world, lambda x, t, y=None: torch.ones_like(x)) == 4
    assert len(sweeps.first(world, None)[0]) == len(sweeps.first(world, 1_500)[0]) == 2_000 - sweeps.HELD_OUT
    assert sweeps.first(world, 5)[1].tolist() == [[1.0, 1.0]] * 5


def test_comparison_is_made_seed_by_seed():
    rows = [dict(pairs=8.0, how=how, distance=d) for how, d in zip("aabbcc", (2.0, 4.0, 1.0, 8.0, 1.0, 2.0))]
    table = sweeps.compare(rows, "how", "a", "pairs")
    assert table == [("distance / a's", "b", "c"), ("pairs 8", "1.00 (1/2)", "0.50 (2/2)")]


def test_runs_of_other_lengths_keep_to_themselves():
    runs = [sweeps.digits_run(0, n, "runs", scale) for n in (256, 4_096) for scale in (0.1, 1.0)]
    assert len({run.folder for run in runs}) == 4
    assert len({(run.preset.train.steps, run.preset.pairs) for run in runs}) == 4
