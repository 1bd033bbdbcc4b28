"""Tests, in the order of slimflow.py: closed forms, numbers from the authors' programs, and real runs."""

import io
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

os.environ |= dict(CUDA_VISIBLE_DEVICES="", MPLBACKEND="Agg", OMP_NUM_THREADS="1")  # all is small
sys.path.append(os.path.join(os.path.dirname(__file__), "notebooks"))

import experiments
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from student import without_solutions
from torch import nn

import convert
import slimflow as sf
import toy2d

HERE = Path(__file__).parent
NETWORK = dict(resolution=8, channels=1, model_channels=8, channel_mult=(1,), num_blocks=1,
               attn_resolutions=(), dropout=0.1, time_scale=16.0)
QUICK = dict(steps=12, batch=8, lr=2e-3, warmup=4, decay=0.5)
TINY = sf.digits | dict(
    n=100, networks=dict(teacher=NETWORK, small=NETWORK), train=sf.digits["train"] | QUICK,
    pairs=dict(n=36, nfe=3, batch=10, seed=0), reflow=sf.digits["reflow"] | QUICK | dict(anneal=0.5),
    own=dict(n=0, nfe=3, batch=10, seed=0), distill=sf.digits["distill"] | QUICK)

def tiny_preset(**network):
    """The tiny preset with another network."""
    return TINY | dict(classifier_steps=0, networks=dict.fromkeys(("teacher", "small"), network))

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An empty folder, and two presets made tiny: a function that makes a Run with settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sf.PRESETS, "digits", TINY)
    monkeypatch.setitem(sf.PRESETS, "pictures", tiny_preset(**NETWORK, label_dim=10))
    return lambda dataset="digits", **settings: sf.Run(dataset, settings=settings)

@pytest.fixture
def ran(capsys, tiny):
    """Run a command line: what it prints."""
    def call(line, main=sf.main):
        assert main(line.split()) == 0, capsys.readouterr().err
        return capsys.readouterr().out
    return call

@pytest.fixture
def refused(capsys, tiny):
    """Run a command line that fails: the one line that it says."""
    def call(line, main=sf.main):
        assert main(line.split()) == 2
        [error] = capsys.readouterr().err.splitlines()
        return error
    return call

@pytest.fixture
def finished(tiny):
    """A tiny run, from beginning to end."""
    sf.make(tiny(), "distill")
    return tiny()

def flat(x):
    """Nested content with its tensors as bytes, to be compared."""
    if isinstance(x, torch.Tensor):
        return x.numpy().tobytes()
    return {key: flat(value) for key, value in x.items()} if isinstance(x, dict) else x

def results():
    """What every file of ours in `runs` holds, by its path."""
    return {str(path): flat(torch.load(path)) for path in Path("runs").rglob("*.pt")}

# ---- 1. Flow -----------------------------------------------------------------------------------------------
def wave(w):
    """The field of the recorded losses."""
    return lambda x, t, y=None: w * torch.sin(3 * x) + t.reshape(-1, 1, 1, 1) * x

DATA, NOISE, FRESH = (torch.from_numpy(np.random.RandomState(i).randn(4, 3, 8, 8)) for i in (1, 2, 3))
TIMES = torch.tensor([0.25, 0.4, 0.6, 0.75], dtype=torch.float64)

@pytest.mark.parametrize("loss, value, gradient", [
    (lambda student, flow: sf.rectified_flow_loss(student, NOISE, DATA, t=TIMES),
     2.3551160505850666, 0.7436863352804368),
    (lambda student, flow: sf.guidance_loss(student, flow, FRESH, sf.l2, t=TIMES),
     0.05911210395680627, 0.12767633283079263),
], ids=["rectified flow", "guidance as the authors run it"])  # fmt: skip
def test_losses_have_the_recorded_values_and_gradients(loss, value, gradient):
    w, w2 = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, 0.4))
    got = loss(wave(w), wave(w2))
    assert got.item() == pytest.approx(value, rel=1e-8)
    slope, none = torch.autograd.grad(got, (w, w2), allow_unused=True)
    assert slope.item() == pytest.approx(gradient, rel=1e-8) and none is None

def test_times_are_drawn_where_they_should_be():
    seen, zeros = [], torch.zeros(20_000, 1)
    flow = lambda x, t, y: seen.append(t) or x  # noqa: E731
    sf.rectified_flow_loss(flow, zeros, zeros)
    sf.guidance_loss(flow, flow, zeros, sf.l2)
    whole, first, middle = seen
    assert sf.T0 == 1e-3 <= whole.min() < 0.01 and 0.99 < whole.max() <= 1 and abs(whole.mean() - 0.5) < 0.01
    assert (first == sf.T0).all()
    assert 0.2 <= middle.min() < 0.21 and 0.79 < middle.max() <= 0.8 and abs(middle.mean() - 0.5) < 0.01

def test_distillation_loss_is_zero_at_the_pairs_and_pulls_towards_them():
    z, x, shift = torch.randn(64, 2), torch.randn(64, 2), torch.full((), 0.1, requires_grad=True)
    loss = sf.distillation_loss(lambda z_, t, y: x - z + shift, z, x, sf.l2)
    assert loss.item() == pytest.approx(0.01, rel=1e-4)
    assert torch.autograd.grad(loss, shift)[0].item() == pytest.approx(0.2, rel=1e-4)

@pytest.mark.parametrize("schedule, recorded", [
    ("linear", [1.0, 0.7666666666666666, 0.5, 0.0033333333333332993, 0.0, 0.0]),
    ("cosine", [1.0, 0.8715724127386971, 0.5, 2.7415317243928428e-05, 0.0, 0.0]),
    ("exponential", [1.0, 0.7918895663367816, 0.6065306597126334,
                     0.3691077520227747, 0.36787944117144233, 0.18887560283756183]),
    ("hold", [1, 1, 1, 1, 0, 0]),  # ours
])  # fmt: skip
def test_anneal_beta_is_the_authors(schedule, recorded):
    steps = 0, 70, 150, 299, 300, 500
    assert [sf.anneal_beta(step, 300, schedule) for step in steps] == pytest.approx(recorded)
    assert sf.anneal_beta(0, 0, schedule) == sf.anneal_beta(9, 0, schedule) == 0  # plain reflow

@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 1.0])
def test_annealed_noise_keeps_unit_variance(beta):
    torch.manual_seed(0)
    z = torch.randn(400_000)
    a = sf.annealed_noise(z, beta)
    assert a.var().item() == pytest.approx(1, abs=0.01)
    assert (a * z).mean().item() == pytest.approx(math.sqrt(1 - beta**2), abs=0.01)
    assert (sf.annealed_noise(z, beta) == a).all() == (beta == 0)

@pytest.mark.parametrize("distance", ["l2", "huber"])
def test_distances_are_per_image_zero_at_equality_and_point_home(distance):
    d, a, b = sf.DISTANCES[distance], torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(5, 3, 4, 4)
    assert d(a, b).shape == (5,) and (d(a, b) > 0).all() and d(b, b).abs().max() < 1e-7
    for i, gradient in enumerate(torch.autograd.grad(d(a, b).sum(), a)[0]):
        torch.testing.assert_close(gradient / gradient.norm(), (a - b)[i] / (a - b)[i].norm())
    a, b, c = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0), 0.00054 * 2
    assert d(a, b).item() == pytest.approx(9 if distance == "l2" else math.sqrt(36 + c * c) - c)

# ---- 2. Solvers --------------------------------------------------------------------------------------------
X0 = [1.7886284734303186, 0.43650985051198943, 0.09649746807200862, -1.8634927033644908]
SCIPY = {
    1e-3: (56, [11.914123019090063, 4.723375460108509, 2.8187610988037326, -12.756153822340876]),
    1e-5: (134, [11.596953835731584, 4.701321133421295, 2.8165224748354003, -12.87784899997182]),
}

def wavy(x, t, y=None):
    return torch.sin(3 * x) + 4 * t[:, None] * x

@pytest.mark.parametrize("tolerance", SCIPY)
def test_rk45_is_as_precise_as_scipys_within_a_third_of_its_evaluations(tolerance):
    x0, (evaluations, end) = torch.tensor([X0], dtype=torch.float64), SCIPY[tolerance]
    exact = sf.sample(wavy, x0, nfe=5_000)[0]
    *_, (_, x, taken) = sf.rk45(wavy, x0, rtol=tolerance, atol=tolerance)
    assert evaluations * 2 / 3 < taken < evaluations * 4 / 3
    error, theirs = (x - exact).norm(), (torch.tensor([end], dtype=torch.float64) - exact).norm()
    assert error < 1.5 * theirs

@pytest.mark.parametrize("solver, order", [(sf.euler, 1), (sf.adams, 3)])
def test_solvers_converge_at_their_order_on_a_smooth_field(solver, order):
    field, z = lambda x, t, y: x * (t[:, None] - 2), torch.ones(1, 1, dtype=torch.float64)
    exponent = (1 / 2 - 2) - (sf.T0**2 / 2 - 2 * sf.T0)
    if solver is sf.euler:  # the authors' steps of 1/N over [T0, 1] solve (1 - T0) dx/dt = v
        exponent /= 1 - sf.T0
    ends = [[*solver(field, z, nfe=n)][-1][1].item() for n in (16, 32, 64)]
    errors = [abs(end - math.exp(exponent)) for end in ends]
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)

@pytest.mark.parametrize("solver, nfe", [(sf.euler, 7), (sf.adams, 7), (sf.adams, 1), (sf.rk45, None)])
def test_solvers_count_their_evaluations_and_go_from_t0_to_1(solver, nfe):
    z, calls = torch.randn(2, 3), []
    field = lambda x, t, y: calls.append(t) or wavy(x, t, y)  # noqa: E731
    states = [*(solver(field, z) if nfe is None else solver(field, z, nfe=nfe))]
    times, taken = [t for t, _, _ in states], [n for _, _, n in states]
    assert torch.equal(states[0][1], z) and times[0] == sf.T0 and times[-1] == pytest.approx(1)
    assert taken[-1] == len(calls) == (nfe or len(calls)) and taken == sorted(taken)
    assert nfe is None or len(states) == nfe + 1

@pytest.mark.parametrize("nfe, solver", [(0, sf.rk45), (1, sf.euler), (9, sf.adams)])
def test_sample_takes_the_solver_of_its_nfe_without_tf32(nfe, solver):
    z, tf32 = torch.randn(2, 3), []
    field = lambda x, t, y: tf32.append(torch.backends.cudnn.allow_tf32) or wavy(x, t, y)  # noqa: E731
    x, evaluations = sf.sample(field, z, nfe=nfe)
    *_, (_, end, taken) = solver(wavy, z, nfe=nfe) if nfe else solver(wavy, z)
    assert torch.equal(x, end) and evaluations == taken == tf32.count(False)

def test_losses_and_solvers_hand_the_class_on():
    z, y = torch.zeros(3, 2), torch.tensor([1, 2, 3])
    flow = lambda x, t, y: y[:, None].expand(-1, 2).float()  # noqa: E731
    x = flow(z, None, y)
    assert sf.rectified_flow_loss(flow, z, x, y) == sf.distillation_loss(flow, z, x, sf.l2, y) == 0
    assert sf.guidance_loss(flow, flow, z, sf.l2, y) < 1e-12
    for nfe in (0, 1, 3):
        end, _ = sf.sample(flow, z, y, nfe)
        torch.testing.assert_close(end, x, atol=4e-3, rtol=0)

@pytest.mark.parametrize("nfe, start, bad", [
    (0, 0.5, math.nan), (0, 0, math.inf), (1, 0, math.nan), (4, 0, math.nan)])
def test_velocities_that_are_not_finite_are_refused(nfe, start, bad):
    flow = lambda x, t, y: torch.where(t[:, None] < start, x, bad)  # noqa: E731
    with pytest.raises(sf.Fault, match=r"t = 0\.(49|50)" if start else "not finite"):
        sf.sample(flow, torch.ones(1, 1), nfe=nfe)

# ---- 3. Network --------------------------------------------------------------------------------------------
def fill(net):
    """The recorded networks' weights: each from a generator seeded by EDM's name of the parameter."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            edms = name.replace("in_conv", "enc.16x16_conv")
            if net.kind == "ddpm++":
                edms = edms.replace("out_", "dec.16x16_aux_")
            z = np.random.RandomState(zlib.crc32(edms.encode())).standard_normal(tuple(p.shape))
            if p.ndim > 1:
                z /= math.sqrt(np.prod(p.shape[1:]))
            else:
                z = 0.1 * z + (1 if "norm" in name and name.endswith("weight") else 0)
            p.copy_(torch.from_numpy(z))
    return net.double().eval()

SMALL = dict(resolution=16, channels=3, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,))
RECORDED = {  # of EDM's own classes: configuration, seed of the input, classes, parameters, norm, first eight
    "ddpm++": (SMALL | dict(model_channels=32), 11, None, 749_891, 21.807226209150294,
               [0.64721, 0.39570938, 0.05434661, 0.13135316, -0.14404724, -0.23872489, 0.41166826, 0.592715]),
    "adm": (SMALL | dict(model_channels=64, label_dim=10, kind="adm"),
            12, [0, 1], 3_295_939, 20.948834205226202, [-0.34044294, 0.320936, -0.31770957, -0.21249442,
                                                        -0.32999335, -0.12229487, -0.54960043, -0.06119815]),
}  # fmt: skip

def close_to(x, norm, first):
    """Whether x has this norm, and these first eight elements, to 1e-6."""
    first = torch.tensor(first, dtype=torch.float64)
    return abs(x.norm() / norm - 1) < 1e-6 and (x.flatten()[:8] - first).norm() < 1e-6 * first.norm()

@pytest.mark.parametrize("kind", RECORDED)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_network_computes_what_edm_computes(kind, layout):
    config, seed, y, parameters, norm, first = RECORDED[kind]
    net = sf.UNet(**config)
    assert sum(p.numel() for p in net.parameters()) == parameters
    net = fill(net).to(memory_format=layout)
    x = torch.from_numpy(np.random.RandomState(seed).standard_normal((2, 3, 16, 16)))
    out = net(x, torch.tensor([0.05, 0.95], dtype=torch.float64), y and torch.tensor(y))
    assert close_to(out, norm, first)

CIFAR, FFHQ, IMAGENET = (sf.PRESETS[dataset]["networks"] for dataset in ("cifar10", "ffhq64", "imagenet64"))
PUBLISHED = [  # network, parameters, MACs of convolutions and linear layers
    (CIFAR["27.9M"], 27_906_179, 6_791_954_432),
    (CIFAR["15.7M"], 15_707_235, 3_821_801_472),
    (CIFAR["teacher"], 61_804_419, 10_678_632_448),
    (CIFAR["teacher"] | dict(channel_mult=(2, 2, 2)), 55_732_739, 21_020_344_320),  # EDM's
    (CIFAR["3.4M"], 3_437_123, None), (CIFAR["7.0M"], 6_989_891, None),
    (FFHQ["27.9M"], 27_906_179, 26_555_777_024),
    (FFHQ["15.7M"], 15_707_235, 14_942_932_992),
    (FFHQ["teacher"], 61_804_419, 41_691_578_368),
    (IMAGENET["80.7M"], 80_685_315, 31_033_708_544),
    (IMAGENET["44.7M"], 44_685_827, None),
    (IMAGENET["teacher"], 295_899_267, 103_441_594_368),
]

@pytest.mark.parametrize("config, parameters, macs", PUBLISHED)
def test_networks_have_the_published_sizes(config, parameters, macs):
    with torch.device("meta"):
        net = sf.UNet(**config)
    assert sum(p.numel() for p in net.parameters()) == parameters
    image = torch.zeros(1, 3, config["resolution"], config["resolution"], device="meta")
    assert macs in (None, sf.count_macs(net, image))

def test_edm_as_a_flow_is_its_denoiser():
    """v(x, t) = E[data - noise | x_t], where data + sigma noise = x_t / t; finite at both ends."""
    net = sf.EDM(fill(sf.UNet(**RECORDED["ddpm++"][0] | dict(time_scale=1.0))))
    x = torch.from_numpy(np.random.RandomState(13).standard_normal((2, 3, 16, 16))).float().double()
    first = -0.17438708, 0.61188984, 0.09210698, 0.43783712, 0.855703, 0.36023948, 0.74949735, 0.61292821
    assert close_to(net.denoise(x, torch.tensor([0.5, 7.0]).double()), 16.64110733125644, first)
    t = torch.tensor([0.2, 0.7]).double()
    s = t.reshape(-1, 1, 1, 1)
    data = net.denoise(x / s, (1 - t) / t)
    torch.testing.assert_close(net(x, t), data - (x - s * data) / (1 - s))
    assert all(net(x, torch.full((2,), t).double()).isfinite().all() for t in (0, sf.T0, 1))

@pytest.mark.parametrize("kind", RECORDED)
def test_network_starts_near_zero_velocity_and_learns_compiled_and_in_bfloat16(kind):
    """As on CUDA: no part of the network falls out of the graph; loss and gradients stay in float32."""
    torch.manual_seed(0)
    net, y = sf.UNet(**RECORDED[kind][0]), torch.tensor([3, 4]) if kind == "adm" else None
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    assert net(x, t, y).abs().max() < 1e-2
    high = fill(net).float()(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        low = torch.compile(net, fullgraph=True, backend="eager")(x, t, y)
        loss = sf.rectified_flow_loss(net, torch.randn_like(x), x, y)
    assert low.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (low - high).norm() < 0.03 * high.norm()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in net.parameters())

# ---- 4. Training -------------------------------------------------------------------------------------------
def test_learning_rate_clipping_average_and_log_follow_their_rules():
    """Adam's steps are the learning rate while the gradient stays the same, here 1 after clipping."""
    net = nn.Linear(1, 1, bias=False)
    seen, loss = [], lambda net, step: seen.append(net.weight.item()) or net.weight.sum() * 10 ** (step % 2)
    average, log = sf.fit(net, loss, steps=250, lr=0.1, warmup=4, decay=0.5)
    rates = [0.1 * min(1, (step + 1) / 4, (250 - step) / 125) for step in range(250)]
    values = np.array([*seen, net.weight.item()])
    assert values[:-1] - values[1:] == pytest.approx(rates, rel=1e-2, abs=1e-5)
    expected = values[0]
    for step, value in enumerate(values[1:]):
        expected += 9 / (10 + step) * (value - expected)
    assert average.weight.item() == pytest.approx(expected, rel=1e-4) and not average.weight.requires_grad
    steps, means = zip(*log)
    assert steps == tuple(range(2, 251, 2))
    assert means == pytest.approx(np.reshape(seen, (-1, 2)) @ [0.5, 5.0], rel=1e-3, abs=1e-4)

def test_numbers_that_are_not_finite_stop_a_training_and_are_not_kept(monkeypatch):
    monkeypatch.setattr(sf, "KEEP_EVERY", 0)
    loss, kept = lambda net, step: net.weight.sum() * (math.nan if step == 13 else 1), []
    with pytest.raises(sf.Fault, match="lower lr"):
        sf.fit(nn.Linear(1, 1), loss, 20, lr=0.1, keep=lambda ema, step, **state: kept.append(step))
    assert kept == list(range(1, 14))

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    sf.save(tmp_path / "file", {}, value=1)
    error = RuntimeError("unexpected pos")  # torch's, which hides the system's
    error.__context__ = OSError(28, "No space left on device")
    with mock.patch.object(torch, "save", side_effect=error), pytest.raises(sf.Fault, match="file: No space"):
        sf.save(tmp_path / "file", {}, value=2)
    assert sf.load(tmp_path / "file")["value"] == 1 and len([*tmp_path.iterdir()]) == 1

# ---- 5. Stages ---------------------------------------------------------------------------------------------
def test_digits_are_the_real_ones_and_pixels_survive_the_way_to_floats_and_back():
    images, labels = sf.load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    x = sf.to_float(torch.arange(256, dtype=torch.uint8))
    assert x[[0, -1]].tolist() == [-1, 1] and sf.to_uint8(x).tolist() == [*range(256)]
    assert sf.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]

@pytest.mark.parametrize("dataset, factor", [("cifar10", 1), ("cifar16", 2)])
def test_cifar10_comes_by_torchvision_whole_or_at_half_its_size(dataset, factor, tiny, monkeypatch):
    x = torch.randint(256, (5, 32 // factor, 32 // factor, 3), dtype=torch.uint8).numpy()
    archive = mock.Mock(data=x.repeat(factor, axis=1).repeat(factor, axis=2), targets=[3, 1, 4, 1, 5])
    monkeypatch.setitem(sys.modules, "torchvision.datasets", mock.Mock(CIFAR10=lambda *args, **kw: archive))
    images, y = sf.load_images(sf.Run(dataset))
    assert y.tolist() == archive.targets and (images.numpy() == x.transpose(0, 3, 1, 2)).all()

def test_rows_are_drawn_from_all_files_alike_and_stay_together(tiny, monkeypatch):
    rows = torch.arange(25)
    files = [*zip((rows / 100).half().split(10), rows.to(torch.uint8).split(10), rows.split(10))]
    noise, data, y = sf.draw(tiny(), 5_000, files)
    assert [x.dtype for x in (noise, data, y)] == [torch.float32, torch.uint8, torch.int64]
    torch.testing.assert_close(noise, y / 100, atol=1e-3, rtol=0)
    assert torch.equal(data, y) and y.bincount().min() > 130
    monkeypatch.setattr(sf, "WORLD", 3)
    with pytest.raises(sf.Fault, match="3 processes"):
        sf.draw(tiny(), 8, files)

def passed(run, stage, name):
    """What a stage, which is made here, hands to sf.<name>: a list of arguments."""
    with mock.patch.object(sf, name, wraps=getattr(sf, name)) as called:
        sf.make(run, stage)
    return [call.args for call in called.call_args_list]

def place(images, stored):
    """For each image (or noise) the row of `stored` that is it, or -1."""
    distance = (images[:, None] - stored.float()).abs().amax((2, 3, 4))
    return [int(d.argmin()) if d.min() == 0 else -1 for d in distance]

def pairs_of(run, stage="pairs"):
    """Noise, data and classes of a stage."""
    return tuple(map(torch.cat, zip(*sf.load_pairs(run, stage))))

@pytest.mark.parametrize("mirror", [False, True])
def test_train_mirrors_each_image_by_its_own_coin(mirror, tiny):
    images = sf.to_float(sf.load_digits()[0])
    seen = passed(tiny(train=dict(mirror=mirror, steps=40)), "train", "rectified_flow_loss")
    flipped = [place(data, images).count(-1) for _, _, data, _ in seen]  # of 8
    assert 100 < sum(flipped) < 220 and max(flipped) < 8 if mirror else max(flipped) == 0

@pytest.mark.parametrize("mirror, schedule", [(False, "linear"), (True, "hold")])
def test_reflow_goes_from_random_to_the_stored_pairs_and_may_mirror_a_whole_batch(mirror, schedule, tiny):
    coins, seen, run = [], set(), tiny(reflow=dict(steps=40, anneal=0.2, mirror=mirror, schedule=schedule))
    batches = passed(run, "reflow", "rectified_flow_loss")[12:]  # without those of train
    z, x, _ = pairs_of(run)
    for step, (_, noise, data, _) in enumerate(batches):
        coins.append(min(place(data, x)) < 0)
        noise, data = (x.flip(-1) if coins[-1] else x for x in (noise, data))
        rows, beta = place(data, x), sf.anneal_beta(step, 8, schedule)
        assert (noise * z[rows]).mean().item() == pytest.approx(math.sqrt(1 - beta**2), abs=0.2)
        assert min(rows) >= 0 and (beta or torch.equal(noise, z[rows].float()))
        seen |= {*rows}
    assert seen == {*range(36)} and (10 < sum(coins) < 30 if mirror else not any(coins))

def test_distill_starts_from_the_2_flow_which_guides_it_on_fresh_noise_by_a_weight(finished, tiny):
    flow, (z, x, _), losses = flat(sf.load(finished.result("reflow"))["weights"]), pairs_of(finished), []
    for weight, calls in ((0.0, 1), (1.0, 3), (3.0, 3)):  # of a network in a step
        run = tiny(distill=dict(guidance=weight, lr=0.0))
        with mock.patch.object(sf.UNet, "forward", autospec=True, side_effect=sf.UNet.forward) as forward:
            sf.make(run, "distill")
        result = sf.load(run.result("distill"))
        assert forward.call_count == 12 * calls + 1 and flat(result["weights"]) == flow
        losses.append(result["log"][0][1])
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-4)
    for _, noise, data, D, _ in passed(tiny(distill=dict(steps=5)), "distill", "distillation_loss"):
        assert torch.equal(data, x[place(noise, z)].float()) and D is sf.huber
    for _, guide, noise, D, _ in passed(tiny(distill=dict(steps=6)), "distill", "guidance_loss"):
        assert flat(guide.state_dict()) == flow and {*place(noise, z)} == {-1} and D is sf.huber

@pytest.mark.parametrize("dataset, stage", [("digits", "pairs"), ("pictures", "pairs"), ("digits", "own")])
def test_pairs_are_a_flows_own_and_distill_takes_them(dataset, stage, tiny, monkeypatch):
    monkeypatch.setattr(sf, "load_images", lambda run: sf.load_digits())
    run = tiny(dataset, own=dict(n=25 if stage == "own" else 0), pairs=dict(n=96))
    batches = passed(run, "distill", "distillation_loss")
    flow, (noise, data, y) = sf.load_flow(run.folder(stage).parent / "result.pt"), pairs_of(run, stage)
    x, _ = sf.sample(flow, noise.float(), y, 3)
    torch.testing.assert_close(x.half(), data, atol=2e-3, rtol=2e-3)
    assert {*y.tolist()} == ({*range(10)} if dataset == "pictures" else {0})
    assert len(noise) == run.settings[stage]["n"] == len(noise.flatten(1).unique(dim=0))
    assert all(torch.equal(classes, y[place(z, noise)]) for _, z, _, _, classes in batches)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in sf.load_pairs(run, stage)[-1])  # no others

# ---- 6. Recipes --------------------------------------------------------------------------------------------
def test_a_folder_names_what_is_not_the_presets_which_stay_as_they_are(tiny):
    before = repr(sf.PRESETS)
    run = tiny(train=dict(steps=12, seed=3), pairs=dict(nfe=0), reflow=dict(lr=1e-3, batch=4), own=dict(n=5))
    folder = "runs/digits/train-seed=3/pairs-nfe=0/reflow-batch=4-lr=0.001/own-n=5/distill"
    assert run.folder("distill") == Path(folder)
    one, two = (tiny(train=dict(start=f"/{name}/partial.pt")).folder("train").name for name in "ab")
    assert one != two and one.startswith("train-start=partial-")
    run.settings["reflow"]["steps"] = run.networks["teacher"]["model_channels"] = 16
    assert repr(sf.PRESETS) == before

def made(out):
    """The stages that a command said it would make."""
    return re.findall(r"(\w+) is to be made in", out)

def test_the_seed_decides_on_weights_batches_and_noise(tiny):
    runs = [tiny(train=dict(lr=0.0, seed=i), pairs=dict(seed=i), reflow=dict(lr=0.0, seed=i)) for i in (0, 1)]
    for run in runs:
        sf.make(run, "reflow")
    assert {*place(*(pairs_of(run)[0].float() for run in runs))} == {-1}
    for stage in ("train", "reflow"):
        a, b = (sf.load(run.result(stage)) for run in runs)
        assert (a["weights"]["in_conv.weight"] != b["weights"]["in_conv.weight"]).any()
        assert abs(a["log"][0][1] - b["log"][0][1]) > 1e-3

def test_only_what_is_needed_is_made_again(finished, ran):
    for path in finished.chunks("pairs"):  # they may be deleted when the students are done
        path.unlink()
    shutil.rmtree(finished.folder("distill"))
    finished.result("train").unlink()
    assert made(ran("reflow")) == []
    assert made(ran("distill --own-n 5")) == ["own", "distill"]
    assert made(ran("distill")) == ["train", "pairs", "distill"]

INTERRUPTED = partial(mock.patch.object, sf, "save_pictures", side_effect=KeyboardInterrupt)

def test_a_forgotten_flag_is_refused_but_not_a_stage_that_is_asked_for_or_begun(finished, ran, refused):
    ran("reflow --reflow-lr 1e-3")
    shutil.rmtree(finished.folder("reflow"))
    assert "reflow-lr=0.001" in refused("distill") and "reflow-lr=0.001" in refused("own --own-n 5")
    assert not finished.folder("reflow").exists()
    assert made(ran("distill --reflow-lr 1e-3")) == ["distill"]
    with INTERRUPTED():
        refused("reflow")
    assert made(ran("distill")) == ["reflow", "distill"]

def test_a_result_of_an_edited_preset_is_refused_not_a_new_setting(finished, ran, refused, monkeypatch):
    content = sf.load(finished.result("distill"), mmap=False)
    content["recipe"].pop("train-warmup")
    sf.save(finished.result("distill"), **content)
    assert made(ran("distill")) == []
    for stage, goal in (("train", "distill"), ("pairs", "reflow --reflow-lr 1"), ("reflow", "own --own-n 5")):
        monkeypatch.setitem(sf.PRESETS, "digits", TINY | {stage: TINY[stage] | dict(seed=9)})
        assert "edited preset" in refused(goal)

def test_a_training_starts_from_any_file_of_ours(finished, ran, refused):
    with INTERRUPTED():
        refused("reflow --reflow-steps 100 --reflow-lr 1e-3")
    [start] = Path("runs").rglob("partial.pt")
    ran(f"reflow --reflow-start {start} --reflow-lr 0")
    [result] = Path("runs").rglob("reflow-*start=partial-*/result.pt")
    assert flat(sf.load(result)["weights"]) == flat(sf.load(start)["weights"])

PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
PROCESSES.set_forkserver_preload(["torch._dynamo", "torch.utils.data", "matplotlib.pyplot", "pytest"])

def work(line, hanging=None):
    """A command line in a process of its own; one stage hangs where it has saved something at first."""
    def wait(path, images):
        if path.parent.name.split("-")[0] == hanging:
            time.sleep(600)
    sf.PRESETS["digits"], sf.KEEP_EVERY, sf.save_pictures = TINY, 0, wait
    return sf.main(line.split())

def test_a_command_ends_the_same_if_it_was_killed_in_every_stage_or_started_twice_at_once(tiny, ran):
    command, run = "distill --own-n 25", tiny(own=dict(n=25))
    for stage in sf.STAGES:
        process = PROCESSES.Process(target=work, args=(command, stage))
        process.start()
        while not any(run.folder(stage).glob("[cp]*.pt")):  # chunk00000.pt, partial.pt
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
        process.join()
    assert "goes on from step 1 " in ran(command)
    ended = results()
    shutil.rmtree("runs")
    with PROCESSES.Pool(2) as pool:
        assert pool.map(work, [command, command]) == [0, 0]
    assert results() == ended and len(ended) == 12 and not list(Path().rglob("*.tmp"))

def test_two_processes_train_as_one(tiny, monkeypatch):
    """Each of two draws half of the batch: alone, the loss is the mean of both halves' losses."""
    Path("two.py").write_text("import test_slimflow as tests\ntests.work('distill')")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "two.py"]
    out = subprocess.check_output(command, env=os.environ | dict(PYTHONPATH=str(HERE)), text=True)
    assert made(out) == ["train", "pairs", "reflow", "distill"]  # only one of them says so
    fit = sf.fit
    def with_both_halves(net, half, name, **options):
        def loss(net, step):
            return sum(sf.seed_all(0, name, step, rank) or half(net, step) for rank in (0, 1)) / 2
        return fit(net, loss, name=name, **options)
    monkeypatch.setattr(sf, "fit", with_both_halves)
    halved = tiny(distill=dict(batch=4))
    sf.make(halved, "distill")
    one, two = (sf.load(run.result("distill")) for run in (halved, tiny()))
    for kept in ("weights", "log"):
        torch.testing.assert_close(one[kept], two[kept], atol=2e-5, rtol=1e-3)

# ---- 7. Evaluation -----------------------------------------------------------------------------------------
def test_frechet_distance_is_the_recorded_one_and_the_closed_form_of_singular_covariances():
    random = np.random.RandomState(5)
    a, b = random.randn(500, 16), random.randn(500, 16) @ random.randn(16, 16) / 4 + 0.3
    moments = [m for x in (a, b) for m in sf.moments(torch.from_numpy(x).split(70))]
    assert sf.frechet_distance(*moments) == pytest.approx(6.923588813096066, rel=1e-6)
    a, b, mu1, mu2 = (torch.from_numpy(random.randn(*shape)) for shape in ((40, 5), (40, 5), (40,), (40,)))
    traces = (mu1 - mu2).square().sum() + a.square().sum() + b.square().sum()
    expected = traces - 2 * torch.linalg.svdvals(a.T @ b).sum()
    assert sf.frechet_distance(mu1, a @ a.T, mu2, b @ b.T) == pytest.approx(expected.item(), rel=1e-6)
    assert abs(sf.frechet_distance(mu1, a @ a.T, mu1, a @ a.T)) < 1e-6 * traces

def test_the_digits_that_are_compared_with_train_nothing(tiny):
    images, y = sf.load_digits()  # of which every second one is compared with
    with mock.patch.object(sf, "draw", side_effect=sf.draw) as drawn:
        _, seen, real = sf.features_and_images(tiny())
        sf.make(tiny(), "train")
    for _, _, [stored] in (call.args for call in drawn.call_args_list):
        assert torch.equal(stored[0], seen) and torch.equal(stored[1], y[::2])
    assert torch.equal(seen, images[::2]) and torch.equal(real, images[1::2])
    features = lambda x: x[:, 0, 3, 1:7].double()  # noqa: E731
    same = torch.distributions.MultivariateNormal(*sf.moments([features(real)]))
    drawn = [[m for n in (5_000, 898) for m in sf.moments([same.sample((n,))])] for _ in range(30)]
    perfect = np.mean([sf.frechet_distance(*moments) for moments in drawn])
    assert sf.measure_floor(features(real), 5_000) == pytest.approx(perfect, rel=0.5)

def test_lpips_and_inception_are_the_packages(monkeypatch):
    try:
        pytest.importorskip("torchvision")
    except RuntimeError:  # it was built for another torch
        for operator in ("nms", "qnms"):  # which nothing here uses
            torch.library.define(f"torchvision::{operator}", "() -> ()")
    lpips, fidelity = map(pytest.importorskip, ("lpips", "torch_fidelity.feature_extractor_inceptionv3"))
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # needs no download
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: network)
    sf.lpips_network.cache_clear()
    a, b = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_(), torch.rand(2, 3, 32, 32) * 2 - 1
    d, resize = sf.DISTANCES["lpips"](a, b), partial(nn.functional.interpolate, size=64, mode="bilinear")
    torch.testing.assert_close(d, network(*(resize(x, align_corners=True) for x in (a, b))).flatten())
    assert torch.autograd.grad(d.sum(), a)[0].abs().max() > 0
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **options: {})
    monkeypatch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
    features = sf.inception_features("cpu")(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
    assert features.shape == (2, 2048) and features.isfinite().all() and (features[0] != features[1]).any()

def test_eval_compares_every_finished_network_with_the_training_images(finished, ran, refused, monkeypatch):
    ran("distill --reflow-anneal 0 --distill-guidance 0")
    with INTERRUPTED():
        refused("train --train-lr 1e-3")
    flow, (noise, y) = sf.load_flow(finished.result("distill")), sf.fixed_noise(finished, 40, 4321)
    images = sf.to_uint8(sf.one_step(flow, noise))  # what the student makes
    sf.save("images.pt", {}, images=images, y=y, shape=(1, 8, 8), classes=10)
    Path("runs/digits").rename("runs/pictures")
    command = "eval --dataset pictures --n 40 --train-data images.pt"
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    assert re.search(r"(?s)pip install torch-fidelity.*train, 1 step .* -\n", ran(command))
    monkeypatch.setattr(sf, "inception_features", lambda device: lambda x: x.double().flatten(1)[:, 20:30])
    found = dict(re.findall(r"(?m)^([^\s,]+), (?:1 step|precise) .* ([-\d.]+)$", ran(command)))
    one, two = "train/pairs/reflow", "train/pairs/reflow-anneal=0.0"
    assert {*found} == {"train", one, two, f"{one}/distill", f"{two}/distill-guidance=0.0"}
    assert [name for name in found if abs(float(found[name])) < 0.01] == [f"{one}/distill"]

def test_pictures_do_not_depend_on_the_users_style(tmp_path):
    x, one, two = torch.rand(12, 1, 8, 8), tmp_path / "1.png", tmp_path / "2.png"
    for path, style in ((one, {}), (two, {"image.origin": "lower", "savefig.dpi": 10})):
        with plt.rc_context(style):
            sf.save_pictures(path, x, labels=["one", "two"])
    assert one.read_bytes() == two.read_bytes()

# ---- 8. Command line ---------------------------------------------------------------------------------------
def test_the_default_run_ends_in_a_table_and_a_picture(ran):
    rows = re.findall(r"(?m)^(\w.*?)(?:, precise|, 1 step)?  .* [\d.]+$", ran("").split("\nrow")[1])
    assert rows == ["teacher", "teacher", "guided", "naive", "2-flow", "plain 2-flow", "copies", "floor"]
    naive = Path("runs/digits/train/pairs/reflow/distill-guidance=0.0-steps=28")
    assert (naive / "result.pt").exists()  # 12 steps of 7 passes cost 28 steps of 3
    pictures, left = [*Path("runs").rglob("*.png")], [*Path().rglob("*.tmp"), *Path().rglob("partial.pt")]
    assert len(pictures) == 6 and not left  # of five trainings, and the table's

@pytest.mark.parametrize("stdout", [None, io.StringIO(), io.TextIOWrapper(io.BytesIO(), "cp1252")])
def test_slimflow_is_a_command_also_by_a_link_into_any_output(stdout, tmp_path, monkeypatch):
    """None, an IDE's, or one that lacks the letters of the folder. WORLD_SIZE is here not torchrun's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "" if stdout else "4")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["linked.py", "train", "--train-steps", "3", "--out", "\u6570\u5b57"])
    Path("linked.py").symlink_to(HERE / "slimflow.py")
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path("linked.py", run_name="__main__")
    assert Path("\u6570\u5b57/digits/train-steps=3/result.pt").exists()

def test_flags_reach_their_stage_in_any_order():
    line = "--seed 4 distill --own-seed 5 --distill-lr 0.1 --distill-guidance 2 --distill-distance l2"
    command, run, _ = sf.parse(f"{line} --no-reflow-mirror --out o --dataset cifar10".split())
    assert (command, run.dataset, run.root) == ("distill", "cifar10", Path("o/cifar10"))
    assert [run.settings["distill"][name] for name in ("lr", "guidance", "distance")] == [0.1, 2.0, "l2"]
    assert run.settings["reflow"]["mirror"] is False and run.settings["train"]["mirror"] is True
    assert [run.settings[stage]["seed"] for stage in sf.STAGES] == [4, 4, 4, 5, 4]

@pytest.mark.parametrize("dataset, student, n, nfe", [
    ("cifar10", "15.7M", 50_000, 0), ("ffhq64", "15.7M", 50_000, 36), ("imagenet64", "80.7M", 400_000, 36)])
def test_presets_are_the_papers(dataset, student, n, nfe):
    train, pairs, reflow, own, distill = (sf.PRESETS[dataset][stage] for stage in sf.STAGES)
    common = dict(batch=128, lr=2e-4, warmup=5_000, decay=0.0, start="", seed=0, steps=800_000)
    assert train == common | dict(mirror=True, name="", data="")
    assert reflow == common | dict(mirror=True, student=student, anneal=0.375, schedule="linear")
    assert distill == common | dict(warmup=0, steps=400_000, guidance=1.0, distance="lpips")
    assert (pairs["n"], pairs["nfe"], own["n"], own["nfe"]) == (n, nfe, 500_000, 0)

def test_sample_writes_images_of_the_student_or_of_a_file(finished, ran):
    student, teacher = sf.load_flow(finished.result("distill")), finished.result("train")
    for seed, source in ((0, ""), (1, f"--seed 1 --ckpt {finished.result('distill')}")):
        ran(f"sample --n 170 --npz a.npz {source}")
        sf.seed_all(seed, "sample", 0)
        expected = sf.to_uint8(sf.one_step(student, torch.randn(170, 1, 8, 8)))
        assert (np.load("a.npz")["arr_0"].transpose(0, 3, 1, 2) == expected.numpy()).all()
    assert "rk45 evaluations" in ran(f"sample --ckpt {teacher} --n 2") and Path("samples.png").exists()
    assert "3 evaluations" in ran(f"sample --ckpt {teacher} --n 2 --nfe 3")

MISTAKES = f"""
train --train-stepz 5 | --train-stepz
pairs --pairs-n 0 | --pairs-n
reflow --reflow-anneal 50 | 50
reflow --dataset cifar10 --reflow-student small | 15.7M
train --dataset cifar | pictures32
train --dataset cifar10 | torchvision
--distill-distance lpips | pip install lpips
train --out a_file | a_file
train --out= | --out
train --n 5 | --n
own | own-n
train --train-data other.pt | other.pt
pairs --train-name nobody | nobody
train --out {"x" * 300} | too long
train --train-start good.pt | good.pt
sample | distill/result.pt
sample --ckpt good.pt --n 2 --npz a_file/x.npz | a_file
sample --ckpt good.pt --n 2 --npz good.npz --class 7 | samples.png
sample --ckpt good.pt --class 10 | 10 classes
eval | no network
"""

@pytest.mark.parametrize("row", MISTAKES.strip().splitlines())
def test_mistakes_get_one_line(row, refused, monkeypatch):
    (line, expected), network = row.split(" | "), NETWORK | dict(label_dim=10)
    sf.save("other.pt", {}, images=torch.zeros(4, 3, 8, 8), y=torch.zeros(4), shape=(3, 8, 8), classes=0)
    sf.save("good.pt", {}, network=network, weights=sf.UNet(**network).state_dict())
    Path("a_file").write_text("a file")
    Path("samples.png").mkdir()  # so that this picture cannot be written
    sf.lpips_network.cache_clear()
    for package in ("lpips", "torchvision.datasets"):  # which are not installed
        monkeypatch.setitem(sys.modules, package, None)
    assert expected in refused(line)
    assert Path("a_file").read_text() == "a file" and not list(Path("runs").rglob("*.pt"))
    assert "good.npz" not in line or np.load("good.npz")["arr_1"].tolist() == [7, 7]

@pytest.mark.parametrize("dataset", sf.PRESETS)
def test_help_has_a_row_for_each_setting_with_the_presets_values(dataset, capsys):
    with pytest.raises(SystemExit):
        sf.main(["--help", "--dataset", dataset])
    out, preset = " ".join(capsys.readouterr().out.split()), sf.PRESETS[dataset]
    for name in {name for stage in sf.STAGES for name in preset[stage]}:
        values = [str(preset[stage][name]) or "-" for stage in sf.STAGES if name in preset[stage]]
        assert f" {name} {' '.join(values)} " in out

# ---- convert.py: other people's files ----------------------------------------------------------------------
class Call(tuple):
    """A function and its arguments: it pickles to their call."""
    def __reduce__(self):
        return self[0], self[1:]

def edm_file(config, **others):
    """What EDM pickles of a network with the recorded weights, or with others in its first layer."""
    def persistent(class_name, module, **others):  # it pickles to a fatal call on its source and state
        state = vars(module) | others
        return Call([sys.exit, dict(module_src="1 / 0", class_name=class_name, state=state)])
    net, outer = fill(sf.UNet(**config)), nn.Module()
    net.enc["16x16_conv"] = net._modules.pop("in_conv")
    if net.kind == "ddpm++":
        net.dec["16x16_aux_norm"], net.dec["16x16_aux_conv"] = map(net._modules.pop, ("out_norm", "out_conv"))
    net.map_augment = nn.Linear(9, 32, bias=False)
    net.map_layer0._parameters |= others
    net._modules["map_layer0"] = persistent("Linear", net.map_layer0)
    given = {name: x for name, x in config.items() if name not in ("kind", "resolution", "channels")}
    given |= dict(img_resolution=16, in_channels=3)
    kind = "DhariwalUNet" if net.kind == "adm" else "SongUNet"
    outer._modules["model"] = persistent(kind, net, _init_kwargs=given)
    return pickle.dumps(dict(ema=persistent("EDMPrecond", outer, sigma_data=0.5)))

@pytest.mark.parametrize("kind", RECORDED)
def test_edms_networks_compute_what_edm_computes_and_teach(kind, ran, monkeypatch, refused):
    config, seed, y, _, norm, first = RECORDED[kind]
    for dataset, classes in (("pictures", config.get("label_dim", 0)), ("pictures64", 3)):
        monkeypatch.setitem(sf.PRESETS, dataset, tiny_preset(**SMALL, model_channels=8, label_dim=classes))
    Path("edm.pkl").write_bytes(edm_file(config))
    for dataset in ("digits", "pictures64"):
        assert "does not fit" in refused(f"edm.pkl {dataset} edm", convert.main)
    ran("edm.pkl pictures edm", convert.main)
    teacher = sf.load_flow("runs/pictures/train-name=edm/result.pt").double()
    x, y = np.random.RandomState(seed).standard_normal((2, 3, 16, 16)), y and torch.tensor(y)
    x, t = torch.from_numpy(x), torch.tensor([0.05, 0.95], dtype=torch.float64)
    assert close_to(teacher.net(x, 999 * t, y), norm, first) and not teacher.training
    assert y is None or (teacher(x, t, y) != teacher(x, t, 1 - y)).any()
    assert made(ran("pairs --dataset pictures --train-name edm --seed 1 --pairs-n 4")) == ["pairs"]
    assert "there already" in refused("edm.pkl pictures edm", convert.main)

def official_tensors(net):
    """A DDPM++'s weights as the authors list them, in the order of layers; q, k, v and out are matrices."""
    tensors = []
    for name, layer in net.named_modules():
        p = [*layer.parameters(recurse=False)]
        if name.endswith("qkv"):  # ours come channel by channel
            p = [x for i in range(3) for x in (p[0][i::3, :, 0, 0].T, p[1][i::3])]
        elif name.endswith("proj"):
            p[0] = p[0][:, :, 0, 0].T
        tensors += p
    order = [name for name, _ in net.dec["16x16_block1"].named_children() if name != "resample"]
    assert order == ["norm0", "conv0", "affine", "norm1", "conv1", "skip", "norm2", "qkv", "proj"]
    return tensors

@pytest.mark.parametrize("dataset, size", [("cifar10", "3.4M"), ("ffhq64", "3.4M"), ("imagenet64", "small")])
def test_the_authors_networks_compute_the_same(dataset, size, ran, refused, monkeypatch):
    monkeypatch.setitem(sf.PRESETS, "imagenet64", tiny_preset(**RECORDED["adm"][0]))
    net = fill(sf.UNet(**sf.PRESETS[dataset]["networks"][size])).float().requires_grad_(False)
    tensors = [*net.parameters()] if net.label_dim else official_tensors(net)  # with classes it is EDM's code
    file = dict(ema=dict(shadow_params=tensors), optimizer=dict(lr=np.float64(2e-4)), step=400_000)
    torch.save(file, "them.pth", _use_new_zipfile_serialization=False)
    Path("them.pth").write_bytes(Path("them.pth").read_bytes().replace(b"numpy._core", b"numpy.core"))
    ran(f"them.pth {dataset} them", convert.main)
    flow = sf.load_flow(f"runs/{dataset}/train-name=them/result.pt")
    x, t, y = torch.randn(1, 3, 16, 16), torch.tensor([0.7]), torch.tensor([3]) if net.label_dim else None
    torch.testing.assert_close(flow(x, t, y), net(x, t, y), atol=2e-5, rtol=1e-4)
    tensors.append(torch.zeros(1))
    torch.save(file, "other.pth")
    assert "other.pth" in refused(f"other.pth {dataset} other", convert.main)

def test_hostile_damaged_and_foreign_files_run_nothing_write_nothing_and_get_one_line(refused):
    edm, hostile = partial(edm_file, RECORDED["ddpm++"][0]), Call([os.system, "touch pwned"])
    nested = Call([torch.storage._load_from_bytes, pickle.dumps(hostile)])
    nested = Call([torch._utils._rebuild_tensor_v2, nested, 0, (128, 32), (32, 1), False, {}])
    torch.save(dict(recipe={}, network=NETWORK, weights=hostile), "zipped.pt")
    sf.save("ours.pt", {}, weights=torch.zeros(1_000))
    zipped, ours = (Path(name).read_bytes() for name in ("zipped.pt", "ours.pt"))
    edms = [edm(weight=weight) for weight in (hostile, nested, None, torch.zeros(3))]
    for content in (pickle.dumps(hostile), *edms, edm()[:-1000], zipped, ours, ours[:-1000], b"<html>"):
        for name in ("a.pkl", "a.pth"):
            Path(name).write_bytes(content)
            assert name in refused(f"{name} cifar10 x", convert.main)
            assert name in refused(f"sample --ckpt {name}")
    assert not Path("pwned").exists() and not Path("samples.png").exists() and not Path("runs").exists()

@pytest.mark.parametrize("flag, y", [("", [0] * 5), ("--classes", [0, 0, 0, 1, 1])])
def test_a_folder_of_pictures_becomes_a_data_set(flag, y, ran, refused, monkeypatch):
    pictures, names = torch.randint(256, (5, 8, 8, 3), dtype=torch.uint8), ("a/0", "a/1", "a/2", "b/0", "b/1")
    for picture, name in zip(pictures, names):
        Path("images", name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(f"images/{name}.png")
    Path("images/a/README.txt").write_text("no image")
    Path("images/a/.hidden.png").write_bytes(b"")
    ran(f"images data/pictures.pt --size 8 {flag}", convert.main)
    monkeypatch.setitem(sf.PRESETS, "pictures", tiny_preset(
        **NETWORK | dict(channels=3, label_dim=2 if flag else 0)))
    images, labels = sf.load_images(sf.Run("pictures"))
    assert torch.equal(images, pictures.permute(0, 3, 1, 2)) and labels.tolist() == y
    ran("train --dataset pictures")
    for name in ("images/a/2.png", "images/b/1.png"):
        Path(name).write_bytes(Path(name).read_bytes()[:100])
    error = refused(f"images other.pt --size 8 {flag}", convert.main)
    assert "a/2.png" in error and "b/1.png" in error and not Path("other.pt").exists()

def test_pictures_of_every_kind_look_as_in_a_viewer(tmp_path):
    looks = np.full((8, 8, 3), 255, np.uint8)
    looks[:, :4] = 200, 40, 90  # the right half is white
    rgb, exif, clear = Image.fromarray(looks), Image.Exif(), Image.new("RGBA", (8, 8), (1, 2, 3, 0))
    exif[0x0112] = 6  # a viewer turns it by 90 degrees, clockwise
    rgb.rotate(90).save(tmp_path / "turned.png", exif=exif)
    clear.paste(rgb.crop((0, 0, 4, 8)))
    clear.save(tmp_path / "transparent.png")
    rgb.quantize(4).save(tmp_path / "palette.gif")
    rgb.convert("CMYK").save(tmp_path / "print.tiff")
    rgb.resize((80, 160), Image.Resampling.NEAREST).save(tmp_path / "a\n.WEBP", lossless=True)
    paths = convert.list_pictures(tmp_path)
    for path in paths:
        picture = convert.read_picture(path, 8).numpy().transpose(1, 2, 0)
        assert np.abs(picture - looks.astype(int)).max() < 4, path
    Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16)).save(tmp_path / "deep.png")
    assert len(paths) == 5 and convert.read_picture(tmp_path / "deep.png", 4).unique().tolist() == [127]

# ---- toy2d.py, experiments, notebooks and README -----------------------------------------------------------
def test_straightness_is_zero_for_straight_flows_only_and_a_shift_has_its_distance():
    z = torch.randn(4_000, 2, dtype=torch.float64)
    assert toy2d.straightness(lambda x, t, y: torch.full_like(x, 3.0), z) < 1e-20
    # v = 2t: Euler's path goes by the mean of 2 t_i, so the mean square is that of 2 (t_i - their mean)
    t = sf.T0 + np.arange(20) / 20 * (1 - sf.T0)
    bend = toy2d.straightness(lambda x, t, y: 2 * t[:, None].expand_as(x), z)
    assert bend == pytest.approx((2 * t).var(), rel=1e-6)
    moved = toy2d.sliced_wasserstein(z.float(), z.float() + torch.tensor([3.0, 0.0]))
    assert moved == pytest.approx(3 * 2 / math.pi, rel=1e-3)  # mean over directions of |3 cos|

def test_toy_draws_its_pictures(tmp_path, monkeypatch, capsys):
    for name, value in dict(TRAIN=dict(steps=5, lr=1e-3), DISTILL=dict(steps=5, lr=1e-3), FRAMES=5).items():
        monkeypatch.setattr(toy2d, name, value)
    monkeypatch.setattr(sys, "argv", ["toy2d.py", "--out", str(tmp_path), "--target", "moons"])
    toy2d.main()
    assert min((tmp_path / name).stat().st_size for name in ("toy2d.png", "toy2d.gif")) > 10_000
    assert "teacher" in capsys.readouterr().out

def test_experiments_train_at_equal_cost(monkeypatch):
    flow, student, passes = toy2d.MLP(8), toy2d.MLP(8), []
    for net in (flow, student):  # back costs two
        net.register_forward_hook(lambda *args: passes.append(3 if torch.is_grad_enabled() else 1))
    monkeypatch.setattr(experiments, "fit", lambda world, net, loss, steps, *_: loss(student, 0) and steps)
    world, pairs = mock.Mock(D=sf.l2, guided_steps=120, distill_lr=1e-3), torch.randn(2, 9, 2)
    for how in experiments.WAYS:
        passes.clear()
        assert experiments.distilled(world, flow, how, *pairs) * sum(passes) == 7 * 120

@pytest.mark.parametrize("path", sorted((HERE / "notebooks").glob("*.csv")), ids=lambda path: path.stem)
def test_results_of_experiments_are_whole(path):
    rows = experiments.read(path.stem)
    for seeds in (np.bincount(rows["seed"][rows["case"] == case]) for case in np.unique(rows["case"])):
        assert len(seeds) >= 3 and len(set(seeds)) == 1
    assert all(0 < row[-1] < math.inf for row in rows.tolist())

@pytest.mark.parametrize("path", sorted((HERE / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_and_its_solutions_run_and_its_outputs_are_its_own(path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.getbasetemp())  # of all of them, so that they share a teacher
    monkeypatch.setitem(sys.modules, "IPython.display", mock.Mock())
    names, exercise, edition = {}, "", without_solutions(path.read_bytes())
    for cell, for_students in zip(*(json.loads(text)["cells"] for text in (path.read_bytes(), edition))):
        source, given = ("".join(x["source"]) for x in (cell, for_students))
        code = [given] if cell["cell_type"] == "code" else re.findall(r"(?s)```python\n(.*?)```", source)
        if exercise:  # the cell before; it now checks the solution's answer
            code.append(exercise.replace("answer = None", "assert answer"))
        exercise = source if "answer = None  # yours" in source else ""
        for text in code:
            text = re.sub(r"^SCALE = 1\b.*$", "SCALE = 0.002", text, flags=re.MULTILINE)
            exec(text, names)
        plt.close("all")
        printed = "".join(text for output in cell.get("outputs", ()) for text in output.get("text", ()))
        labels = re.findall(r'^print\(f?"([^{"]+)', source, re.MULTILINE)
        assert cell["cell_type"] != "code" or all(label in printed for label in labels)
    left = {*re.findall("<summary>([A-Z][a-z]+)", edition)}
    assert names["SCALE"] == 0.002 and left == (set() if "appendix" in path.stem else {"Hint"})

def test_readmes_python_runs_and_its_links_lead_somewhere(finished):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    (code,), names = re.findall(r"```python\n(.*?)```", readme, re.DOTALL), {}
    exec(code, names)
    example = torch.randn(5, 1, 8, 8), torch.full((5,), sf.T0)
    exported = torch.export.export(names["flow"], example).module()
    torch.testing.assert_close(example[0] + exported(*example), sf.one_step(names["flow"], example[0]))
    linked = set(re.findall(r"\]\((?!http|#)([^)#]+)", readme))
    assert [path for path in linked if not (HERE / path).exists()] == []
    assert linked >= {f"notebooks/{path.name}" for path in (HERE / "notebooks").glob("*.ipynb")}
