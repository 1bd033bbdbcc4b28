"""Tests, in slimflow.py's order: closed forms, numbers recorded from the authors' own programs (EDM's
networks, SciPy's RK45, SlimFlow's losses), and the program as its user meets it: runs, kills, mistakes."""

import errno
import importlib
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import types
import zipfile
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

os.environ |= dict(CUDA_VISIBLE_DEVICES="", MPLBACKEND="Agg", OMP_NUM_THREADS="1")  # all is small

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_map_only

import slimflow as sf
import toy2d

HERE = Path(__file__).parent
NETWORK = dict(resolution=8, channels=1, model_channels=8, channel_mult=(1,), num_blocks=1)
NETWORK |= dict(attn_resolutions=(), dropout=0.1, time_scale=16.0)
PLAN = dict(steps=12, batch=8, lr=2e-3, warmup=4, decay=0.5, ema=0.9)
TRAIN = PLAN | dict(mirror=False)

def tiny(out, stages=None, **changes):
    """The digits' run with tiny networks and schedules, under a folder; `stages` has other settings."""
    settings = dict(
        train=TRAIN, pairs=dict(pairs=40, teacher=None),
        reflow=TRAIN | dict(student="small", anneal=0.5, anneal_schedule="linear"),
        distill=PLAN | dict(guidance=1.0, distance="huber", own_pairs=0),
    )
    for stage, other in (stages or {}).items():
        settings[stage] = settings[stage] | other
    few = dict(networks=dict(teacher=NETWORK, small=NETWORK), precise=dict(solver="adams", steps=3), n=100)
    few |= dict(settings=settings, out=str(out), device="cpu")
    return replace(sf.PRESETS["digits"], **few | changes)

def python(*args, **options):
    """A Python process that can import slimflow."""
    how = dict(env=os.environ | dict(PYTHONPATH=str(HERE)), stdout=-1, stderr=-1, text=True)
    return subprocess.Popen([sys.executable, *map(str, args)], **how | options)

@pytest.fixture
def ran(capsys, tmp_path, monkeypatch):
    """Run a command line, in an empty folder and with tiny presets: what it prints."""
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "ffhq64", "imagenet64"):
        classes = 1000 if name == "imagenet64" else 0
        monkeypatch.setitem(sf.PRESETS, name, tiny("runs", dataset=name, label_dim=classes))
    def call(line):
        assert sf.main(line.split()) == 0, capsys.readouterr().err
        return capsys.readouterr().out
    return call

@pytest.fixture
def refused(capsys):
    """Run a command line that fails: the one line that it says."""
    def call(line):
        assert sf.main(line.split()) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("slimflow: "), error
        return error
    return call

# ---- 1. Flow -----------------------------------------------------------------------------------------------
def wave(w):
    """The field of the recorded losses."""
    return lambda x, t, y=None: w * torch.sin(3 * x) + t.reshape(-1, 1, 1, 1) * x

DATA, NOISE, FRESH = (np.random.RandomState(seed).standard_normal((4, 3, 8, 8)) for seed in (1, 2, 3))
DATA, NOISE, FRESH = map(torch.from_numpy, (DATA, NOISE, FRESH))
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
    exact = sf.sample(wavy, x0, "adams", steps=5_000)[0]
    x, taken = sf.sample(wavy, x0, "rk45", rtol=tolerance, atol=tolerance)
    assert evaluations * 2 / 3 < taken < evaluations * 4 / 3
    error, theirs = (x - exact).norm(), (torch.tensor([end], dtype=torch.float64) - exact).norm()
    assert error < 1.5 * theirs

@pytest.mark.parametrize("solver, order", [("euler", 1), ("adams", 3)])
def test_solvers_converge_at_their_order(solver, order):
    """On a smooth field."""
    field, z = lambda x, t, y: x * (t[:, None] - 2), torch.ones(1, 1, dtype=torch.float64)
    exponent = (1 / 2 - 2) - (sf.T0**2 / 2 - 2 * sf.T0)
    if solver == "euler":  # the authors' steps of 1/N over [T0, 1] solve (1 - T0) dx/dt = v
        exponent /= 1 - sf.T0
    errors = [abs(sf.sample(field, z, solver, steps=n)[0].item() - math.exp(exponent)) for n in (16, 32, 64)]
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)

@pytest.mark.parametrize("solver, steps, evaluations", [
    ("euler", 7, 7), ("adams", 7, 7), ("adams", 1, 1)])
def test_solvers_take_the_evaluations_they_promise_without_tf32(solver, steps, evaluations):
    z, tf32 = torch.randn(2, 3), []
    field = lambda x, t, y: tf32.append(torch.backends.cudnn.allow_tf32) or wavy(x, t, y)  # noqa: E731
    assert sf.sample(field, z, solver, steps=steps)[1] == evaluations == tf32.count(False)
    times = [t for t, _ in sf.SOLVERS[solver](wavy, z, steps)]
    assert times[0] == sf.T0 and times[-1] == pytest.approx(1) and len(times) == steps + 1

def test_losses_and_solvers_hand_the_class_on():
    z, y = torch.zeros(3, 2), torch.tensor([1, 2, 3])
    flow = lambda x, t, y: y[:, None].expand(-1, 2).float()  # noqa: E731
    x = flow(z, None, y)
    assert sf.rectified_flow_loss(flow, z, x, y) == sf.distillation_loss(flow, z, x, sf.l2, y) == 0
    assert sf.guidance_loss(flow, flow, z, sf.l2, y) < 1e-12
    for solver in sf.SOLVERS:
        options = {} if solver == "rk45" else dict(steps=3)
        end, _ = sf.sample(flow, z, solver, y=y, **options)
        torch.testing.assert_close(end, x, atol=4e-3, rtol=0)

@pytest.mark.parametrize("solver, start, bad, said", [
    ("rk45", 0.5, math.nan, r"t = 0\.(49|50)"), ("rk45", 0, math.inf, r"t = 0\.001"),
    ("euler", 0, math.nan, "euler are not finite"), ("adams", 0, math.nan, "adams are not finite")])
def test_velocities_that_are_not_finite_are_refused(solver, start, bad, said):
    flow = lambda x, t, y: torch.where(t[:, None] < start, x, bad)  # noqa: E731
    options = {} if solver == "rk45" else dict(steps=4)
    with pytest.raises(sf.Fault, match=said):
        sf.sample(flow, torch.ones(1, 1), solver, **options)

# ---- 3. Network --------------------------------------------------------------------------------------------
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
    error = (x.flatten()[:8].double() - first).norm() / first.norm()
    return abs(x.norm().item() / norm - 1) < 1e-6 and error < 1e-6

@pytest.mark.parametrize("kind", RECORDED)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_network_computes_what_edm_computes(kind, layout):
    config, seed, y, parameters, norm, first = RECORDED[kind]
    net = sf.UNet(**config)
    assert sf.count_parameters(net) == parameters
    net = fill(net).to(memory_format=layout)
    x = torch.from_numpy(np.random.RandomState(seed).standard_normal((2, 3, 16, 16)))
    out = net(x, torch.tensor([0.05, 0.95], dtype=torch.float64), y and torch.tensor(y))
    assert close_to(out, norm, first)

def paper(dataset, size):
    return sf.PRESETS[dataset].networks[size]

PUBLISHED = [  # network, parameters, MACs of convolutions and linear layers
    (paper("cifar10", "27.9M"), 27_906_179, 6_791_954_432),
    (paper("cifar10", "15.7M"), 15_707_235, 3_821_801_472),
    (paper("cifar10", "teacher"), 61_804_419, 10_678_632_448),
    (paper("cifar10", "teacher") | dict(channel_mult=(2, 2, 2)), 55_732_739, 21_020_344_320),  # EDM's
    (paper("cifar10", "3.4M"), 3_437_123, None),
    (paper("cifar10", "7.0M"), 6_989_891, None),
    (paper("ffhq64", "27.9M"), 27_906_179, 26_555_777_024),
    (paper("ffhq64", "15.7M"), 15_707_235, 14_942_932_992),
    (paper("ffhq64", "teacher"), 61_804_419, 41_691_578_368),
    (paper("imagenet64", "80.7M"), 80_685_315, 31_033_708_544),
    (paper("imagenet64", "44.7M"), 44_685_827, None),
    (paper("imagenet64", "teacher"), 295_899_267, 103_441_594_368),
]

@pytest.mark.parametrize("config, parameters, macs", PUBLISHED)
def test_networks_have_the_published_sizes(config, parameters, macs):
    with torch.device("meta"):
        net = sf.UNet(**config)
    assert sf.count_parameters(net) == parameters
    if macs:
        assert sf.count_macs(net, (3, net.config["resolution"], net.config["resolution"])) == macs

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
def test_learning_rate_clipping_average_and_log_follow_their_rules(tmp_path):
    """Adam's steps are the learning rate while the gradient stays the same, here 1 after clipping."""
    schedule = sf.Schedule(steps=30, lr=0.1, warmup=4, decay=0.5, ema=0.5)
    net, seen = nn.Linear(1, 1, bias=False), []
    net.config = {}
    def loss(net, step):
        seen.append(net.weight.item())
        return net.weight.sum() * (10 if step % 2 else 1)
    ema = sf.fit(net, loss, schedule, folder=tmp_path, picture=lambda ema: torch.zeros(1, 1, 8, 8))
    assert not ema.training and not ema.weight.requires_grad
    rates = [0.1 * min(1, (step + 1) / 4, (30 - step) / 15) for step in range(30)]
    assert [sf.learning_rate(schedule, step) for step in range(30)] == pytest.approx(rates)
    values = [*seen, net.weight.item()]
    assert [p - q for p, q in zip(values, values[1:])] == pytest.approx(rates, rel=1e-3)
    expected = values[0]
    for step, value in enumerate(values[1:]):
        rate = min(0.5, (1 + step) / (10 + step))
        expected = rate * expected + (1 - rate) * value
    assert ema.weight.item() == pytest.approx(expected, rel=1e-4)
    losses = [value * (10 if step % 2 else 1) for step, value in enumerate(values)]
    log = np.loadtxt(tmp_path / "log.csv", delimiter=",", skiprows=1)
    assert log[:, 0].tolist() == [1, 10, 30] and log[:, 2] == pytest.approx([1, 6, 5.5], rel=0.1)
    assert log[:, 1] == pytest.approx([losses[0], np.mean(losses[1:10]), np.mean(losses[10:30])], rel=1e-4)

def test_bad_numbers_stop_the_training_and_keep_the_last_checkpoint(tmp_path):
    def train(steps, bad=None):
        def loss(net, step):
            out = net(torch.randn(4, 1, 8, 8), torch.rand(4))
            return out.square().mean() * (math.nan if step == bad else 1)
        schedule = sf.Schedule(steps=steps, batch=4, lr=1e-3, warmup=0, ema=0.9)
        sf.fit(sf.UNet(**NETWORK), loss, schedule, 0, "reflow", tmp_path)
    train(20)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(sf.Fault, match=r"reflow.* not finite by step 60.*--lr"):
        train(60, bad=53)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    sf.save_file(path, lambda file: file.write(b"good"))
    def full(file):  # as torch.save, which hides the system's error
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos")
    for write in (full, lambda file: 1 / 0):
        with pytest.raises(sf.Fault, match="cannot write .*file: " + ("No space" if write is full else "")):
            sf.save_file(path, write)
        assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]

# ---- 5. Data -----------------------------------------------------------------------------------------------
def test_digits_are_the_real_ones_and_pixels_survive_the_way_to_floats_and_back():
    images, labels = sf.load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    every = torch.arange(256, dtype=torch.uint8)
    x = sf.to_float(every)
    assert x[[0, -1]].tolist() == [-1, 1] and torch.equal(sf.to_uint8(x), every)
    assert sf.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]

@pytest.fixture
def folder(tmp_path):
    """A folder of images in two classes, and what is in them."""
    pictures = torch.randint(256, (5, 8, 8, 3), dtype=torch.uint8).numpy()
    for i, picture in enumerate(pictures):
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "images/a/README.txt").write_text("no image")
    return tmp_path / "images", pictures.transpose(0, 3, 1, 2)[[0, 2, 4, 1, 3]]

def little(folder, dataset, classes, **changes):
    changes |= dict(dataset=dataset, shape=(3, 8, 8), label_dim=classes, data_dir=str(folder))
    return tiny(folder.parent, **changes)

@pytest.mark.parametrize("dataset, classes", [("imagenet64", 2), ("ffhq64", 0), ("cifar10", 0)])
def test_images_come_from_a_folder_and_are_decoded_once(folder, dataset, classes, monkeypatch, capsys):
    folder, pictures = folder
    run = little(folder, dataset, classes)
    (folder / "a/.hidden").mkdir()
    (folder / "a/.hidden/x.png").write_bytes(b"")
    (folder / "a/loop").symlink_to(folder)
    images, y = sf.load_images(run, folder)
    assert images.dtype == torch.uint8 and (images.numpy() == pictures).all()
    assert y.tolist() == ([0, 0, 0, 1, 1] if classes else [0] * 5)
    out = capsys.readouterr().out
    assert out.count("2 files, hidden or no pictures: .png .txt") == 1 and "5 pictures are few" in out
    monkeypatch.setattr(sf, "read_picture", lambda *args: pytest.fail("decoded again"))
    assert torch.equal(sf.load_images(run, folder)[0], images)

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
    rgb.resize((800, 1600), Image.Resampling.NEAREST).save(tmp_path / f"{'long ' * 40}\n.WEBP", lossless=True)
    for path in tmp_path.iterdir():
        assert np.abs(sf.read_picture(path, 8).numpy().transpose(1, 2, 0) - looks.astype(int)).max() < 4, path
    Image.fromarray(np.full((8, 8), 65535 // 2, np.uint16)).save(tmp_path / "deep.png")
    assert sf.read_picture(tmp_path / "deep.png", 4).unique().tolist() == [127]

def test_folders_that_do_not_fit_and_damaged_images_are_named(folder):
    folder, _ = folder
    with pytest.raises(sf.Fault, match=r"needs 3 folders, .* there are 2;"):
        sf.load_images(little(folder, "imagenet64", 3), folder)
    (folder / "c").mkdir()
    with pytest.raises(sf.Fault, match=r"no pictures in \S+/c; "):
        sf.load_images(little(folder, "imagenet64", 3), folder)
    for name in ("a/2.png", "b/3.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    run = little(folder, "ffhq64", 0)
    with pytest.raises(sf.Fault, match=r"a/2\.png, .*b/3\.png"):
        sf.load_images(run, folder)
    assert not list(run.folder.glob("*/*"))

def test_other_images_start_over_and_are_not_mixed_with_the_first(folder, monkeypatch, ran, refused):
    folder, pictures = folder
    networks = dict.fromkeys(("teacher", "small"), NETWORK | dict(channels=3))
    run = replace(little(folder, "ffhq64", 0), networks=networks, out="runs", data_dir=None)
    monkeypatch.setitem(sf.PRESETS, "ffhq64", run)
    assert "nowhere" in refused(f"train --dataset ffhq64 --data-dir {folder}/nowhere")
    ran(f"reflow --dataset ffhq64 --data-dir {folder}")  # the mistake does not stick
    assert "nowhere" in refused(f"train --dataset ffhq64 --data-dir {folder}/nowhere --fresh")
    assert not list(run.folder.glob("*.1"))
    for stage in ("train", "reflow"):
        error = refused(f"{stage} --dataset ffhq64 --data-dir {folder}/a")
        assert f"--data-dir {folder}; give the same" in error
    ran(f"train --dataset ffhq64 --data-dir {folder}/a --fresh")
    assert (sf.load_images(run, folder / "a")[0].numpy() == pictures[:3]).all()
    (folder / "a/0.png").unlink()
    sf.list_pictures.cache_clear()
    assert (sf.load_images(run, folder / "a")[0].numpy() == pictures[1:3]).all()

def test_your_own_pictures_need_only_a_folder(folder, ran, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    preset = sf.pictures(32)
    small = tiny("runs", dataset="pictures32", shape=(3, 32, 32), networks=preset.networks,
                 stages={stage: dict(steps=2) for stage in ("train", "reflow", "distill")})
    monkeypatch.setattr(sf, "pictures", lambda size: small)
    assert "--size is for --dataset pictures" in refused("--size 32")
    out = ran("--dataset pictures --size 32 --data-dir . --mirror")
    assert "the table has no FID: this needs the package torch-fidelity: pip install" in out
    assert re.search(r"guided, 1 step +[\d,]+ +[\d.]+M +1 +-$", out, re.MULTILINE)
    assert all(sf.remembered(small, stage)["mirror"] for stage in ("train", "reflow"))
    assert Path("runs/pictures32/summary.png").exists()
    sf.list_pictures.cache_clear()
    assert len(sf.find_images(small, ".")) == 5  # none of the results

def test_cifar10_comes_by_torchvision_or_says_which_file_goes_where(tmp_path, monkeypatch, refused):
    cifar = sf.import_package("torchvision.datasets").CIFAR10
    pixels = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8).numpy()
    monkeypatch.setattr(cifar, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    line = refused(f"train --dataset cifar10 --out {tmp_path}/runs --data-dir {tmp_path}/data")
    assert f"http://127.0.0.1:9/cifar-10-python.tar.gz (or put it into {tmp_path}/data)" in line
    monkeypatch.setattr(cifar, "__init__", lambda self, folder, **options: setattr(self, "data", pixels))
    images, y = sf.load_images(replace(sf.PRESETS["cifar10"], out=str(tmp_path / "other")))
    assert y.tolist() == [0] * 5 and (images.numpy() == pixels.transpose(0, 3, 1, 2)).all()

# ---- 6. Stages ---------------------------------------------------------------------------------------------
def rows_of(run, stage="pairs"):
    return np.memmap(run.folder / stage / "pairs.bin", sf.pair_columns(run), mode="r")

def checkpoint(folder):
    """All that a checkpoint holds, its tensors as bytes."""
    return tree_map_only(torch.Tensor, lambda x: x.numpy().tobytes(), torch.load(folder / "ckpt.pt"))

def contents(run):
    """What a finished run ends in, as bytes: pairs, logs, settings, checkpoints."""
    files = sorted(path for path in run.folder.rglob("*.*") if path.suffix in (".bin", ".csv", ".json"))
    found = {str(path.relative_to(run.folder)): path.read_bytes() for path in files}
    return found | {path.parent.name: checkpoint(path.parent) for path in run.folder.glob("*/ckpt.pt")}

def handed_to_fit(run, stage, **given):
    """The network that a stage would train, and its loss."""
    with mock.patch.object(sf, "fit") as fit:
        sf.STAGES[stage](run, **sf.settle(run, stage, {}) | given)
    return fit.call_args.args[:2]

def batches(run, stage, name, steps=40, **given):
    """What a stage's loss hands to sf.<name> in its first steps: a list of arguments."""
    net, loss = handed_to_fit(run, stage, **given)
    with mock.patch.object(sf, name, wraps=getattr(sf, name)) as called:
        for step in range(steps):
            sf.seed_all(0, stage, step)
            loss(net, step)
    return [call.args for call in called.call_args_list]

def place(noise, stored):
    """For each noise of a batch the row that is it, or -1."""
    distance = (noise[:, None] - torch.from_numpy(stored.astype("f4"))).abs().amax((2, 3, 4))
    return [int(d.argmin()) if d.min() == 0 else -1 for d in distance]

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A miniature run from beginning to end, for reading only."""
    run = tiny(tmp_path_factory.mktemp("whole"))
    sf.run_stage(run, "distill")
    return run

@pytest.fixture
def copied(whole, tmp_path):
    """The same in a folder of its own, to be changed."""
    shutil.copytree(whole.out, tmp_path / "copy")
    return replace(whole, out=str(tmp_path / "copy"))

def test_the_first_stages_are_made_first_and_the_seed_decides_all(whole, tmp_path, capsys):
    torch.manual_seed(5)  # what was drawn before does not matter
    again, other = tiny(tmp_path / "again"), tiny(tmp_path / "other", seed=1)
    assert sf.run_stage(again, "distill")
    made = re.findall(r"(\w+), into .*: seed 0", capsys.readouterr().out)
    assert made == ["train", "pairs", "reflow", "distill"]
    assert contents(again) == contents(whole)
    sf.run_stage(other, "distill")
    assert (rows_of(other)["noise"] == rows_of(whole)["noise"]).mean() < 0.01
    for stage in ("train", "reflow", "distill"):
        one, two = (sf.load_flow(run.folder / stage / "ckpt.pt").state_dict() for run in (whole, other))
        assert not any(torch.equal(one[name], two[name]) for name in one if name.endswith("conv0.weight"))

def test_interrupted_pairs_go_on_where_they_stopped_and_more_are_added(copied, monkeypatch):
    monkeypatch.setattr(sf, "SAMPLE_BATCH", 10)
    shutil.rmtree(copied.folder / "pairs")
    sf.run_stage(copied, "pairs", pairs=55)
    expected = rows_of(copied)
    assert len(np.unique(expected["noise"].reshape(55, -1), axis=0)) == 55
    shutil.rmtree(copied.folder / "pairs")
    work, calls = sf.sample, []
    def interrupted(*args, **options):
        calls.append(args)
        return 1 / 0 if len(calls) == 3 else work(*args, **options)
    monkeypatch.setattr(sf, "sample", interrupted)
    with pytest.raises(ZeroDivisionError):
        sf.run_stage(copied, "pairs", pairs=38)
    assert sf.count_done(copied, "pairs") == 20
    sf.run_stage(copied, "pairs")  # two batches are there; the interrupted one and the last are made
    assert len(calls) == 3 + 2 and (rows_of(copied) == expected[:38]).all()
    sf.run_stage(copied, "pairs", pairs=55)
    assert len(calls) == 3 + 2 + 3 and (rows_of(copied) == expected).all()
    path = copied.folder / "pairs/pairs.bin"
    path.write_bytes(path.read_bytes()[: -5 * expected.itemsize - 7])  # as a kill or a full disk leaves it
    sf.run_stage(copied, "pairs")
    assert (rows_of(copied) == expected).all()

def test_train_mirrors_each_image_by_its_own_coin_and_reflow_the_whole_batch(copied):
    images = sf.to_float(sf.load_digits()[0]).numpy()
    passed = batches(copied, "train", "rectified_flow_loss", mirror=True)
    flipped = [place(data, images).count(-1) for _, _, data, _ in passed]
    assert 100 < sum(flipped) < 220 and np.std(flipped) > 0 and max(flipped) < 8  # of 320
    for _, _, data, _ in batches(copied, "train", "rectified_flow_loss"):
        assert min(place(data, images)) >= 0
    stored, coins = rows_of(copied), []
    for _, noise, data, _ in batches(copied, "reflow", "rectified_flow_loss", anneal=0.0, mirror=True):
        coins.append(min(place(noise, stored["noise"])) < 0)
        noise, data = (x.flip(-1) if coins[-1] else x for x in (noise, data))
        assert (data.numpy() == stored["data"][place(noise, stored["noise"])]).all()  # z and x alike
    assert 10 < sum(coins) < 30
    for args in batches(copied, "distill", "distillation_loss"):
        assert min(place(args[1], stored["noise"])) >= 0

def test_reflow_starts_on_random_pairs_and_ends_on_the_stored_ones(whole):
    stored, passed = rows_of(whole)["noise"], batches(whole, "reflow", "rectified_flow_loss")
    rows = [place(noise, stored) for _, noise, *_ in passed]
    assert [max(batch) for batch in rows[:6]] == [-1] * 6  # half of 12 steps
    assert {row for batch in rows[6:] for row in batch} == set(range(40))
    for (_, _, data, _), batch in zip(passed[6:], rows[6:]):
        assert (data.numpy() == rows_of(whole)["data"][batch]).all()
    ((z, beta),) = batches(whole, "reflow", "annealed_noise", 1)
    assert beta == 1 and abs((z * passed[0][1]).mean()) < 0.2  # nothing of z is left

def test_distill_starts_from_the_2_flow_which_guides_it_on_fresh_noise_by_a_weight(whole):
    flow, stored = sf.load_flow(whole.folder / "reflow/ckpt.pt"), rows_of(whole)
    net, _ = handed_to_fit(whole, "distill")
    assert all(torch.equal(p, q) and p.requires_grad for p, q in zip(net.parameters(), flow.parameters()))
    for _, noise, data, D, _ in batches(whole, "distill", "distillation_loss", 5):
        assert (data.numpy() == stored["data"][place(noise, stored["noise"])]).all() and D is sf.huber
    seen = batches(whole, "distill", "guidance_loss", 5)
    assert all(torch.equal(p, q) for p, q in zip(seen[0][1].parameters(), flow.parameters()))
    noises = torch.cat([args[2] for args in seen])
    assert noises.shape == (40, 1, 8, 8) and max(place(noises, stored["noise"])) == -1
    assert len(noises.flatten(1).unique(dim=0)) == 40 and abs(noises.std() - 1) < 0.1
    losses = []
    for weight in (0.0, 1.0, 3.0):
        net, loss = handed_to_fit(whole, "distill", guidance=weight)
        torch.manual_seed(0)
        losses.append(loss(net.eval(), 0).item())
    assert losses[1] > losses[0] and losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]))

def passes(loss, *nets):
    """Forward passes that a step of training costs; a backward pass counts as two."""
    counts = []
    for net in nets:
        net.register_forward_hook(lambda *args: counts.append(3 if torch.is_grad_enabled() else 1))
    loss(nets[0], 0)
    return sum(counts)

def test_naive_and_guided_students_of_all_are_trained_at_equal_cost(copied, monkeypatch):
    flow = sf.load_flow(copied.folder / "reflow/ckpt.pt")
    with mock.patch.object(sf, "load_flow", return_value=flow):
        naive, guided = (passes(handed_to_fit(copied, stage, guidance=weight)[1], sf.UNet(**NETWORK), flow)
                         for stage, weight in (("naive", 0.0), ("distill", 1.0)))
    monkeypatch.setattr(sf, "evaluate", lambda run: None)
    for steps in (12, 15):  # a longer distill makes naive longer
        sf.run_all(copied, dict(train={}, distill=dict(steps=steps)))
        assert sf.count_done(copied, "distill") * guided == 7 * steps
        assert sf.count_done(copied, "naive") * naive == 7 * steps

def test_distill_makes_pairs_of_its_own_where_the_2_flow_gives_the_targets(copied, refused):
    shutil.rmtree(copied.folder / "distill")
    assert "it is for all, pairs" in refused(f"distill --pairs 50 --out {copied.out}")
    with mock.patch.object(sf, "fit", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        sf.run_stage(copied, "distill", own_pairs=30, batch=4)
    sf.run_stage(copied, "distill", batch=8)  # of what was made before a first step, only the pairs bind
    own, flow = rows_of(copied, "distill"), sf.load_flow(copied.folder / "reflow/ckpt.pt")
    data, _ = sf.sample(flow, torch.from_numpy(own["noise"]).float(), **copied.precise)
    torch.testing.assert_close(data.half(), torch.from_numpy(own["data"]), atol=2e-3, rtol=2e-3)
    assert len(own) == 30 and (own["noise"] == rows_of(copied)["noise"][:30]).mean() < 0.01
    for _, noise, data, *_ in batches(copied, "distill", "distillation_loss", 5):
        assert (data.numpy() == own["data"][place(noise, own["noise"])]).all()

def test_pairs_are_the_teachers_also_with_classes(tmp_path):
    networks = dict.fromkeys(("teacher", "small"), NETWORK | dict(label_dim=10))
    run = tiny(tmp_path, dict(pairs=dict(pairs=90)), label_dim=10, networks=networks)
    sf.run_stage(run, "distill")
    teacher = sf.load_flow(run.folder / "train/ckpt.pt")
    noise, data, y = sf.load_pairs(run, "pairs")
    assert set(y.tolist()) == set(range(10)) and y.tolist() == rows_of(run)["y"].tolist()
    x, _ = sf.sample(teacher, noise.float(), y=y, **run.precise)
    torch.testing.assert_close(x.half(), data, atol=2e-3, rtol=2e-3)

def test_what_is_not_given_is_remembered_and_else_the_presets(ran, refused):
    ran("train --lr 0.01 --seed 3")
    assert sf.remembered(tiny("runs"), "train") == dict(TRAIN, lr=0.01, seed=3, data_dir=None)
    ran("train --steps 20")
    assert sf.remembered(tiny("runs"), "train") == dict(TRAIN, lr=0.01, seed=3, steps=20, data_dir=None)
    ran("pairs")
    for name, anneal in (("load_pairs", 0.7), ("save_pictures", 0.25)):  # before and after the first step
        with mock.patch.object(sf, name, side_effect=KeyboardInterrupt):
            assert "interrupted" in refused(f"reflow --anneal {anneal}")
    assert sf.count_done(tiny("runs"), "reflow") == 1
    ran("distill")
    assert sf.remembered(tiny("runs"), "reflow")["anneal"] == 0.25

def test_more_steps_or_pairs_set_aside_what_was_made_and_never_raise_b(copied):
    before = contents(copied)
    assert sf.run_stage(copied, "reflow", steps=30, lr=1e-3)
    assert batches(copied, "reflow", "anneal_beta", 1) == [(0, 6.0, "linear")]  # 0 from step 6 on, as before
    assert sf.count_done(copied, "reflow") == 30 and not (copied.folder / "distill").exists()
    assert checkpoint(copied.folder / "distill.1") == before["distill"]
    path = copied.folder / "pairs/pairs.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    assert sf.run_stage(copied, "distill")  # reads the pairs, so they are made whole, and then reflow anew
    assert checkpoint(copied.folder / "distill") == before["distill"]
    assert (copied.folder / "reflow.1").exists()
    assert sf.run_stage(copied, "pairs", pairs=50)
    assert len(rows_of(copied)) == 50 and (copied.folder / "reflow.2/ckpt.pt").exists()
    assert sf.run_stage(copied, "train", steps=14)
    left = {path.name for path in copied.folder.glob("[a-z]*")}
    assert left == {"train", "pairs.1", "reflow.1", "reflow.2", "distill.1", "distill.2"}

def test_a_finished_stage_reads_no_weights(copied, monkeypatch, ran):
    monkeypatch.setattr(sf, "UNet", lambda **config: 1 / 0)
    shutil.rmtree(copied.folder / "train")  # a teacher is not made again while its pairs are there
    assert not sf.run_stage(copied, "distill")
    assert "finished" in ran(f"distill --out {copied.out}") and not (copied.folder / "train").exists()

def test_fresh_renames_the_stage_and_those_made_from_it(copied, ran, refused):
    before = contents(copied)
    assert "for all, reflow" in refused(f"distill --fresh --student 5M --out {copied.out}")
    assert contents(copied) == before
    ran(f"reflow --fresh --seed 1 --out {copied.out}")
    assert (copied.folder / "pairs").exists() and (copied.folder / "distill.1").exists()
    assert checkpoint(copied.folder / "reflow.1") == before["reflow"]
    ran(f"reflow --fresh --out {copied.out}")
    assert (copied.folder / "reflow.2").exists() and sf.remembered(copied, "reflow")["seed"] == 0
    torch.save(dict(step=12), copied.folder / "reflow/ckpt.pt")  # of another edition
    assert "start over with --fresh" in refused(f"reflow --out {copied.out}")

@pytest.mark.parametrize("line, word", [
    ("distill --guidance 2", "--guidance 1.0"), ("distill --distance l2", "--distance huber"),
    ("all --seed 1", "--seed 0"), ("reflow --anneal 0.7", "--anneal 0.5"), ("pairs --pairs 39", "--pairs 40"),
    ("train --batch 4 --steps 20", "--batch 8"), ("train --steps 11", "--steps 12"),
    (f"pairs --teacher {__file__}", "no --teacher"),
])  # fmt: skip
def test_other_settings_are_refused_before_anything_is_done(line, word, copied, ran, refused):
    before = contents(copied)
    error = refused(f"{line} --out {copied.out}")
    assert f"was made with {word}; give the same, --fresh or another --out" in error
    assert contents(copied) == before

def test_an_external_teacher_is_one_file_however_it_is_named(copied, ran, refused, monkeypatch):
    teacher = copied.folder / "train/ckpt.pt"
    error = refused(f"pairs --fresh --teacher {teacher} --out {copied.out}")
    assert "leave --teacher out" in error and not (copied.folder / "pairs.1").exists()
    Path("near").mkdir()
    shutil.copy(teacher, "near/t.pt")
    ran("pairs --teacher near/t.pt")
    monkeypatch.chdir("near")
    assert "finished" in ran("pairs --teacher t.pt --out ../runs")
    assert "made with" in refused(f"pairs --teacher {teacher} --out ../runs")
    ran("train --out ../runs")  # which is not theirs
    assert Path("../runs/digits/pairs/pairs.bin").exists()
    ran("reflow --out ../runs")
    assert "teacher, precise" in ran("eval --out ../runs")

COMMAND = """
import sys, slimflow as sf, test_slimflow as tests
sf.SAVE_EVERY, sf.SAMPLE_BATCH = 0, 10
sf.PRESETS["digits"] = tests.tiny("runs")
sys.exit(sf.main())
"""

def test_killed_in_mid_reflow_it_ends_as_if_it_never_was(copied, tmp_path):
    shutil.rmtree(copied.folder / "reflow")
    shutil.rmtree(copied.folder / "distill")
    shutil.copytree(copied.out, tmp_path / "killed")
    killed = replace(copied, out=str(tmp_path / "killed"))
    command = "-c", COMMAND, "reflow", "--steps", 400, "--out", killed.out
    with python(*command) as process:
        while sf.count_done(killed, "reflow") < 50:
            assert process.poll() is None
            time.sleep(0.01)
        with python(*command) as second:  # two at once
            _, error = second.communicate()
        assert second.returncode == 2 and re.fullmatch("slimflow: another run works in .*\n", error)
        process.kill()
    assert 50 <= sf.count_done(killed, "reflow") < 400
    with python("-c", COMMAND, "distill", "--out", killed.out) as process:
        out, error = process.communicate()
    assert process.returncode == 0 and error == "" and "goes on from step" in out
    sf.run_stage(copied, "reflow", steps=400)
    sf.run_stage(copied, "distill")
    assert contents(killed) == contents(copied)

def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """Each of two draws half of the batch: alone, the loss is the mean of both halves' losses."""
    (tmp_path / "two.py").write_text(COMMAND)
    command = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "two.py", "distill"
    with python(*command, cwd=tmp_path) as process:
        work = sf.fit
        def fit(net, loss_fn, schedule, seed, stage, *rest):
            def mean_of_halves(net, step):
                losses = []
                for rank in (0, 1):
                    sf.seed_all(seed, stage, step, rank)
                    losses.append(loss_fn(net, step))
                return sum(losses) / 2
            return work(net, mean_of_halves, schedule, seed, stage, *rest)
        monkeypatch.setattr(sf, "fit", fit)
        monkeypatch.setattr(sf, "SAMPLE_BATCH", 10)
        halves = {stage: dict(batch=4) for stage in ("train", "reflow", "distill")}
        one, two = tiny(tmp_path / "one", halves), tiny(tmp_path / "runs")
        sf.run_stage(one, "distill")
        out, error = process.communicate()
    assert process.returncode == 0, error
    assert out.count("reflow, into") == 1
    np.testing.assert_allclose(*(rows_of(run)["data"].astype("f4") for run in (one, two)), atol=2e-3)
    for stage in ("train", "reflow", "distill"):
        a, b = (torch.load(run.folder / stage / "ckpt.pt") for run in (one, two))
        assert np.array(a["rows"]) == pytest.approx(np.array(b["rows"]), rel=1e-3)
        for name in a["ema"]:
            torch.testing.assert_close(a["ema"][name], b["ema"][name], atol=2e-4, rtol=1e-3)

def test_processes_are_torchruns_and_divide_the_batch(tmp_path, monkeypatch, refused):
    for size in ("", "4"):  # of a container, of Slurm
        others = os.environ | dict(PYTHONPATH=str(HERE), WORLD_SIZE=size)
        with python("-c", "import slimflow; print(slimflow.WORLD)", env=others) as process:
            assert process.communicate() == ("1\n", "")
    monkeypatch.setattr(sf, "WORLD", 3)
    assert "without torchrun" in refused("eval")
    with pytest.raises(sf.Fault, match="3 processes cannot share a batch of 8"):
        sf.run_stage(tiny(tmp_path), "train")

# ---- 7. Command line ---------------------------------------------------------------------------------------
def test_the_whole_pipeline_ends_in_a_table_and_a_picture(ran):
    out = ran("")
    for row in ("teacher, precise", "teacher, 1", "2-flow, 1", "naive, 1", "guided, 1", "floor"):
        (line,) = [line for line in out.splitlines() if line.startswith(row)]
        assert "nan" not in line
    assert all(Path("runs/digits", stage, "samples.png").exists() for stage in sf.STAGES)
    assert Path("runs/digits/summary.png").stat().st_size > 10_000 and not list(Path().rglob("*.tmp"))
    assert ", into" not in ran("")  # all stages are finished
    out = ran("all --fresh --guidance 0")
    assert "naive, into" in out and "guided is left out" in out
    assert {path.stem for path in Path("runs/digits").glob("*.1")} == set(sf.STAGES)

def test_slimflow_is_a_command(tmp_path):
    command = HERE / "slimflow.py", "train", "--steps", 3, "--batch", 8, "--out", "\u6570\u5b57"
    windows = os.environ | dict(PYTHONIOENCODING="cp1252")
    with python(*command, cwd=tmp_path, env=windows) as process:
        out, error = process.communicate()
    assert process.returncode == 0 and error == "" and "3/3 steps" in out
    assert (tmp_path / "\u6570\u5b57/digits/train/ckpt.pt").exists()

def test_flags_reach_the_stage_that_they_are_for(ran, monkeypatch):
    calls = []
    for name in ("run_stage", "run_all"):
        monkeypatch.setattr(sf, name, lambda *args, **given: calls.append((args, given)) or True)
    def passed(line):
        sf.run_command(*sf.parse(line.split()))
        return calls.pop()
    (run, *stage), given = passed("distill --dataset cifar10 --steps 5 --lr 0.1 --guidance 2 --distance l2")
    assert (run, stage) == (sf.PRESETS["cifar10"], ["distill", False])
    assert given == dict(steps=5, lr=0.1, guidance=2, distance="l2")
    (run, *stage), given = passed("distill --guidance 0 --seed 2 --out o --fresh")
    assert (run, stage) == (replace(sf.PRESETS["digits"], seed=2, out="o"), ["naive", True])
    assert given == dict(guidance=0, seed=2)
    (_, given, fresh), _ = passed("--pairs 9 --student small --own-pairs 5")
    assert given["train"] == {} and given["pairs"] == dict(pairs=9) and not fresh
    assert given["reflow"] == dict(student="small") and given["distill"] == dict(own_pairs=5)

def test_presets_are_the_papers():
    for name in ("cifar10", "ffhq64", "imagenet64"):
        preset = sf.PRESETS[name]
        authors = dict(batch=128, lr=2e-4, warmup=5_000, decay=0.0, ema=0.999999)
        reflow = dict(student=list(preset.networks)[1 if name == "imagenet64" else 2], steps=800_000)
        reflow |= dict(anneal=0.375, anneal_schedule="linear", mirror=True)
        assert preset.settings["reflow"] == authors | reflow
        distill = dict(steps=400_000, warmup=0, guidance=1, distance="lpips", own_pairs=500_000)
        assert preset.settings["distill"] == authors | distill
        assert preset.settings["train"] == authors | dict(steps=800_000, mirror=True)
        assert preset.precise == dict(solver="rk45", rtol=1e-5, atol=1e-5)
        assert preset.settings["pairs"]["pairs"] == (400_000 if name == "imagenet64" else 50_000)

def test_sample_writes_a_picture_and_an_array(whole, ran, refused):
    ckpt = whole.folder / "distill/ckpt.pt"
    ran(f"sample --ckpt {ckpt} --n 70 --npz a.npz")
    a = np.load("a.npz")["arr_0"]
    assert a.shape == (70, 8, 8, 1) and a.dtype == np.uint8 and Path("samples.png").exists()
    flow = sf.load_flow(ckpt)
    sf.seed_all(0, "sample", 0)
    images = sf.one_step(flow, torch.randn(70, 1, 8, 8))
    assert (sf.to_uint8(images).permute(0, 2, 3, 1).numpy() == a).all()
    ran(f"sample --ckpt {ckpt} --n 70 --npz a.npz --seed 1")
    assert (np.load("a.npz")["arr_0"] != a).any()
    assert "rk45" in ran(f"sample --ckpt {whole.folder}/train/ckpt.pt --n 2")
    Path("samples.png").unlink()
    Path("samples.png").mkdir()  # a picture that cannot be written
    assert "samples.png" in refused(f"sample --ckpt {ckpt} --n 2 --npz b.npz")
    assert np.load("b.npz")["arr_0"].shape == (2, 8, 8, 1)

MISTAKES = """
dance | there is no command dance; choose from all, train
train --steps 0 | --steps 0 is not a number from 1 to 10^9
all --steps 5 | it is for train, reflow, distill, sample
train --out a_file | a_file
train --data-dir empty | not for the digits; name a data set with --dataset
train --dataset ffhq64 --data-dir nowhere | there is no folder
train --dataset imagenet64 --data-dir empty | there are 0;
reflow --dataset cifar10 --student 0.19M | choose from 27.9M, 15.7M
sample | runs/digits/distill/ckpt.pt
sample --ckpt good.pt --steps 5 | rk45 chooses its own steps
sample --ckpt good.pt --n 2 --npz a_file/x.npz | a_file
eval | holds no network
"""

@pytest.mark.parametrize("row", MISTAKES.strip().splitlines())
def test_mistakes_get_one_line(row, ran, refused, whole):
    line, expected = row.split(" | ")
    Path("a_file").write_text("a file")
    Path("empty").mkdir()
    shutil.copy(whole.folder / "train/ckpt.pt", "good.pt")
    assert expected in refused(line)
    assert Path("a_file").read_text() == "a file" and not list(Path().glob("runs/digits/*/*"))

def test_help_of_a_command_has_its_flags_and_the_presets_values(capsys):
    def shown(line):
        with pytest.raises(SystemExit):
            sf.main(line.split())
        return " ".join(capsys.readouterr().out.split())
    out = shown("distill --help")
    assert "--guidance" in out and "--student" not in out and "[digits 800, pictures 1000," in out
    out = shown("--help")
    assert all(f" {command} " in out for command in sf.COMMANDS) and "[digits 1500, pictures 3000," in out

# ---- 8. Evaluation -----------------------------------------------------------------------------------------
def test_frechet_distance_is_the_recorded_one_and_the_closed_form_of_singular_covariances():
    random = np.random.RandomState(5)
    a, b = random.randn(500, 16), random.randn(500, 16) @ random.randn(16, 16) / 4 + 0.3
    moments = [m for x in (a, b) for m in sf.moments(torch.from_numpy(x).split(70))]
    assert sf.frechet_distance(*moments) == pytest.approx(6.923588813096066, rel=1e-6)
    a, b, mu1, mu2 = random.randn(40, 5), random.randn(40, 5), random.randn(40), random.randn(40)
    traces = ((mu1 - mu2) ** 2).sum() + (a**2).sum() + (b**2).sum()
    expected = traces - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    assert sf.frechet_distance(mu1, a @ a.T, mu2, b @ b.T) == pytest.approx(expected, rel=1e-6)
    assert abs(sf.frechet_distance(mu1, a @ a.T, mu1, a @ a.T)) < 1e-6 * traces

def test_straightness_is_zero_for_straight_flows_only():
    z = torch.randn(100, 2, dtype=torch.float64)
    assert sf.straightness(lambda x, t, y: torch.full_like(x, 3.0), z) < 1e-20
    # v = 2t: Euler's path goes by the mean of 2 t_i, so the mean square is that of 2 (t_i - their mean)
    t = sf.T0 + np.arange(20) / 20 * (1 - sf.T0)
    bend = sf.straightness(lambda x, t, y: 2 * t[:, None].expand_as(x), z)
    assert bend == pytest.approx((2 * t).var(), rel=1e-6)

def test_missing_packages_are_named_before_anything_is_trained(ran, refused, monkeypatch, tmp_path):
    sf.lpips_network.cache_clear()
    for name in ("lpips", "torch_fidelity"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install lpips" in refused("distill --distance lpips")
    assert "pip install lpips" in refused("all --distance lpips")
    Path("data/ffhq64").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("data/ffhq64/one.png")
    assert "pip install torch-fidelity" in refused("all --dataset ffhq64")
    assert not list(tmp_path.glob("*/*/*/*"))

def test_lpips_is_the_packages_at_64_pixels(monkeypatch):
    vgg, package = sf.import_package("torchvision.models.vgg"), pytest.importorskip("lpips")
    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs["D"])  # random, so that no test needs a download
    stub = types.SimpleNamespace(vgg16=lambda pretrained: types.SimpleNamespace(features=features))
    monkeypatch.setattr(package.pretrained_networks, "tv", stub)
    sf.lpips_network.cache_clear()
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    d = sf.DISTANCES["lpips"](a.requires_grad_(), b)
    assert d.shape == (2,) and (d > 0).all() and sf.lpips(b, b).abs().max() == 0
    assert torch.autograd.grad(d.sum(), a)[0].abs().max() > 0
    resize = partial(nn.functional.interpolate, size=64, mode="bilinear", align_corners=True)
    theirs = package.LPIPS(net="vgg", verbose=False).eval()(resize(a), resize(b)).flatten()
    torch.testing.assert_close(d, theirs)

def test_inception_features_are_the_packages(monkeypatch):
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(package, "load_state_dict_from_url", lambda *args, **options: {})
    monkeypatch.setattr(package.FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
    features = sf.inception_features("cpu")(torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
    assert features.shape == (2, 2048) and features.isfinite().all() and (features[0] != features[1]).any()

def test_table_compares_with_the_training_images_or_with_given_statistics(folder, monkeypatch, capsys):
    """The table of a paper preset, with pixels' means in place of Inception's features."""
    def means(pictures):
        return pictures.float().flatten(1).mean(dim=1, keepdim=True).expand(-1, 2048)
    def distances(run, ref=None):
        capsys.readouterr()
        sf.evaluate(run, ref=ref)
        out = capsys.readouterr().out
        assert "FID" in out and "naive is left out" in out
        return [float(re.search(rf"^{name}.* ([-\d.]+)$", out, re.MULTILINE).group(1)) for name in names]
    names = "teacher, precise", "teacher, 1 step", "2-flow, 1 step", "guided, 1 step"
    monkeypatch.setattr(sf, "inception_features", lambda device: means)
    monkeypatch.setattr(sf, "frechet_distance", lambda mu1, cov1, mu2, cov2: float(mu1[0] - mu2[0]))
    folder, pictures = folder
    networks = dict.fromkeys(("teacher", "small"), NETWORK | dict(channels=3))
    run = little(folder, "ffhq64", 0, networks=networks, n=40)
    sf.run_stage(run, "distill")
    own, real = distances(run), pictures.mean()
    student = sf.load_flow(run.folder / "distill/ckpt.pt")
    made = sf.to_uint8(sf.one_step(student, sf.fixed_noise(run, run.n, seed=4321)[0]))
    stored = sf.to_uint8(torch.from_numpy(rows_of(run)["data"]).float())
    assert own[0] == pytest.approx(stored.float().mean().item() - real, abs=0.01)
    assert own[3] == pytest.approx(made.float().mean().item() - real, abs=0.01)
    np.savez(folder / "stats.npz", mu=np.full(2048, real + 10), sigma=np.zeros((2048, 2048)))
    shutil.rmtree(folder / "a")
    given = distances(run, folder / "stats.npz")  # needs no images
    assert given[3] == pytest.approx(own[3] - 10, abs=0.01)

def test_the_digits_classifier_sees_neither_side_of_a_distance():
    """It is trained on every other scan; the floor is what new draws of the same distribution get."""
    run = replace(sf.PRESETS["digits"], n=5_000, device="cpu")
    images, y = sf.load_digits()
    features = lambda pictures: pictures.float().flatten(1)[:, 20:30]  # noqa: E731
    with mock.patch.object(sf, "digit_features", return_value=features) as trained:
        distance, floor = sf.distance_to_real(run)
    _, seen, classes = trained.call_args.args
    assert torch.equal(seen, images[::2]) and torch.equal(classes, y[::2])
    real = sf.moments([features(images[1::2])])
    assert abs(distance([images[1::2]])) < 1e-6 < distance([images[::2]])
    L = torch.linalg.cholesky(real[1])
    def drawn(n):
        return sf.moments([real[0] + torch.randn(n, 10, dtype=torch.float64) @ L.T])
    perfect = [sf.frechet_distance(*drawn(5_000), *drawn(898)) for _ in range(30)]
    assert floor == pytest.approx(np.mean(perfect), rel=0.35)

def test_what_is_unfinished_or_too_small_is_said(copied, monkeypatch, ran, refused):
    state = torch.load(copied.folder / "distill/ckpt.pt")
    torch.save(state | dict(done=7), copied.folder / "distill/ckpt.pt")
    (copied.folder / "reflow/ckpt.pt").unlink()
    out = ran(f"eval --n 20 --out {copied.out}")
    assert "guided is unfinished: 7 of 12 steps" in out and "guided, 1 step" in out
    assert "2-flow is left out: there is no" in out and "2-flow, 1 step" not in out
    assert "at least 2 images" in refused(f"eval --n 1 --out {copied.out}")

# ---- 9. Teachers' files ------------------------------------------------------------------------------------
class Persistent:
    """What NVIDIA's persistence does: a pickled object is a call of a function on source code and state."""
    def __init__(self, class_name, **state):
        self.meta = dict(type="class", version=6, module_src="raise SystemExit", class_name=class_name)
        self.meta["state"] = self.state = state

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)

@pytest.fixture
def nvidia(monkeypatch):
    """Modules under the names that EDM's pickles refer to."""
    persistence, dnnlib = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    exec("def _reconstruct_persistent_obj(meta): raise SystemExit", persistence.__dict__)
    persistence._reconstruct_persistent_obj.__module__ = persistence.__name__
    dnnlib.EasyDict = type("EasyDict", (dict,), dict(__module__="dnnlib.util"))
    for module in (types.ModuleType("torch_utils"), types.ModuleType("dnnlib"), persistence, dnnlib):
        monkeypatch.setitem(sys.modules, module.__name__, module)

def edm_tree(module):
    """A network's layers as EDM pickles them: its own classes, and torch's ModuleDict by NEWOBJ."""
    state = dict(_parameters=dict(module._parameters), _buffers={}, _modules={}, training=False)
    state["_modules"] = {name: edm_tree(child) for name, child in module._modules.items()}
    if isinstance(getattr(module, "resample", None), (nn.AvgPool2d, nn.Upsample)):
        state["_modules"]["conv0"].state["_buffers"]["resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    if isinstance(module, nn.ModuleDict):
        tree = nn.ModuleDict()
        tree.__dict__.update(state)
        return tree
    return Persistent(type(module).__name__, **state)

def edm_objects(net):
    """What EDM pickles for a network of ours."""
    config, given = net.config, sys.modules["dnnlib.util"].EasyDict()
    given.update(img_resolution=config["resolution"], in_channels=config["channels"], augment_dim=9)
    given.update({name: config[name] for name in ("model_channels", "num_blocks", "label_dim")})
    given.update({name: list(config[name]) for name in ("channel_mult", "attn_resolutions")}, dropout=0.1)
    inner = edm_tree(net)
    inner.meta["class_name"] = "DhariwalUNet" if net.kind == "adm" else "SongUNet"
    inner.state["_init_kwargs"] = given
    inner.state["_modules"]["map_augment"] = Persistent(
        "Linear", _parameters=dict(weight=nn.Parameter(torch.ones(9)), bias=None), _buffers={}, _modules={})
    outer = Persistent("EDMPrecond", _parameters={}, _buffers={}, _modules=dict(model=inner), sigma_data=0.5)
    return dict(ema=outer, loss_fn=None, augment_pipe=None)

@pytest.fixture(params=RECORDED)
def edm(request, nvidia, tmp_path):
    """A .pkl of EDM's with the recorded weights: its path and kind."""
    net = fill(sf.UNet(**RECORDED[request.param][0])).float()
    (tmp_path / "edm.pkl").write_bytes(pickle.dumps(edm_objects(net)))
    return tmp_path / "edm.pkl", request.param

def test_edm_teachers_compute_what_edm_computes(edm):
    path, kind = edm
    teacher, (_, seed, y, _, norm, first) = sf.load_edm(str(path)).double(), RECORDED[kind]
    assert teacher.config["kind"] == kind and teacher.config["dropout"] == 0.1 and not teacher.net.training
    x = torch.from_numpy(np.random.RandomState(seed).standard_normal((2, 3, 16, 16)))
    out = teacher.net(x, 999 * torch.tensor([0.05, 0.95], dtype=torch.float64), y and torch.tensor(y))
    assert close_to(out, norm, first)
    if kind == "ddpm++":
        x = torch.from_numpy(np.random.RandomState(13).standard_normal((2, 3, 16, 16))).float().double()
        denoised = teacher.denoise(x, torch.tensor([0.5, 7.0], dtype=torch.float64))
        first = -0.17438708, 0.61188984, 0.09210698, 0.43783712, 0.855703, 0.36023948, 0.74949735, 0.61292821
        assert close_to(denoised, 16.64110733125644, first)

def test_edm_teacher_as_a_flow_is_its_denoiser(edm):
    """v(x, t) = E[data - noise | x_t], where data + sigma noise = x_t / t."""
    teacher, y = sf.load_edm(edm[0]).double(), torch.tensor([3, 4]) if edm[1] == "adm" else None
    x, t = torch.randn(2, 3, 16, 16).double(), torch.tensor([0.2, 0.7]).double()
    s = t.reshape(-1, 1, 1, 1)
    data = teacher.denoise(x / s, (1 - t) / t, y)
    torch.testing.assert_close(teacher(x, t, y), data - (x - s * data) / (1 - s))
    assert all(teacher(x, torch.full((2,), t).double(), y).isfinite().all() for t in (0, sf.T0, 1))

@pytest.mark.parametrize("edm", ["ddpm++"], indirect=True)
def test_pairs_and_samples_come_from_an_edm_teacher_and_train_is_skipped(edm, ran, refused, monkeypatch):
    path, _ = edm
    assert "other classes than digits" in refused(f"pairs --teacher {path}")
    networks = dict.fromkeys(("teacher", "small"), NETWORK | dict(resolution=16, channels=3))
    run = tiny("runs", dict(pairs=dict(pairs=4)), shape=(3, 16, 16), networks=networks)
    monkeypatch.setitem(sf.PRESETS, "digits", run)
    monkeypatch.setattr(sf, "SAMPLE_BATCH", 4)
    ran(f"pairs --teacher {path}")
    rows, teacher = rows_of(run), sf.load_network(path)
    x, _ = sf.sample(teacher, torch.from_numpy(rows["noise"]).float(), "adams", steps=36)
    assert not (run.folder / "train").exists()
    torch.testing.assert_close(x.half(), torch.from_numpy(rows["data"]), atol=2e-3, rtol=2e-3)
    ran(f"sample --ckpt {path} --n 2 --solver adams --steps 3 --npz a.npz")
    assert np.load("a.npz")["arr_0"].shape == (2, 16, 16, 3)

class Call:
    """Pickles to a call of any function."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

def test_hostile_and_foreign_files_run_nothing_and_get_one_line(nvidia, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    net, code = fill(sf.UNet(**RECORDED["ddpm++"][0])).float(), "open('pwned', 'w')"
    zipped, good = io.BytesIO(), edm_objects(net)
    torch.save(dict(ema=net.state_dict()), zipped)
    def with_weight(value):
        objects = edm_objects(net)
        layer = objects["ema"].state["_modules"]["model"].state["_modules"]["map_layer0"]
        layer.state["_parameters"]["weight"] = value
        return pickle.dumps(objects)
    nested = Call(torch.storage._load_from_bytes, pickle.dumps(Call(eval, code)))
    rebuild = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
    meta = dict(type="class", version=6, class_name="EDMPrecond", module_src=code, state={})
    files = dict(
        system=pickle.dumps(Call(os.system, "touch pwned")),
        eval=pickle.dumps(dict(ema=Call(eval, code))),
        weight=with_weight(Call(eval, code)),
        module_src=pickle.dumps(dict(ema=Call(rebuild, meta))),
        nested=with_weight(Call(torch._utils._rebuild_tensor_v2, nested, 0, (128, 32), (32, 1), False, {})),
        missing_weight=with_weight(None), wrong_shape=with_weight(nn.Parameter(torch.zeros(3))),
        cut=pickle.dumps(good)[:-1000], zip=zipped.getvalue(), text=b"<html>",
    )  # fmt: skip
    for name, data in files.items():
        for suffix in ("pkl", "pt", "pth"):
            Path(f"{name}.{suffix}").write_bytes(data)
            assert f"cannot read {name}.{suffix} as" in refused(f"sample --ckpt {name}.{suffix}")
    assert not Path("pwned").exists() and not Path("samples.png").exists()
    good["ema"].state["_modules"]["model"].state["_init_kwargs"]["encoder_type"] = "residual"
    Path("good.pkl").write_bytes(pickle.dumps(good))
    assert "NCSN++" in refused("sample --ckpt good.pkl")
    good["ema"].meta["class_name"] = "VPPrecond"
    Path("good.pkl").write_bytes(pickle.dumps(good))
    assert "VPPrecond" in refused("sample --ckpt good.pkl")

def official(config, x, t):
    """The authors' network written a second time, with random weights: its output, and its tensors in their
    files' order, in which it makes them."""
    F, random, tensors = nn.functional, torch.Generator().manual_seed(0), []
    def new(*shape):
        tensors.append(torch.randn(shape, generator=random) / math.sqrt(max(1, math.prod(shape[1:]))))
        return tensors[-1]
    def norm(x):
        n = x.shape[1]
        return F.group_norm(x, min(n // 4, 32), new(n), new(n), eps=1e-6)
    def conv(x, n, kernel=3):
        return F.conv2d(x, new(n, x.shape[1], kernel, kernel), new(n), padding=kernel // 2)
    def linear(x, n):
        return x @ new(n, x.shape[1]).T + new(n)
    def block(x, n, resample=None):
        change = resample or (lambda x: x)
        h = conv(change(F.silu(norm(x))), n) + linear(emb, n)[:, :, None, None]
        h = conv(F.silu(norm(h)), n)
        return (h + (conv(change(x), n, 1) if resample or x.shape[1] != n else x)) / math.sqrt(2)
    def attention(x):
        b, c, height, width = x.shape
        h = norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        q, k, v = (h @ new(c, c) + new(c) for _ in range(3))
        h = (q @ k.transpose(1, 2) / math.sqrt(c)).softmax(dim=2) @ v @ new(c, c) + new(c)
        return (x + h.transpose(1, 2).reshape(b, c, height, width)) / math.sqrt(2)
    c, mults, blocks = (config[name] for name in ("model_channels", "channel_mult", "num_blocks"))
    angle = 999 * t[:, None] * torch.exp(-math.log(10_000) * torch.arange(c // 2) / (c // 2 - 1))
    emb = F.silu(linear(torch.cat([angle.sin(), angle.cos()], dim=1), 4 * c))
    emb = F.silu(linear(emb, 4 * c))
    x = conv(x, c)
    skips = [x]
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            x = block(x, c * mult)
            x = attention(x) if x.shape[-1] in config["attn_resolutions"] else x
            skips.append(x)
        if level < len(mults) - 1:
            x = block(x, c * mult, lambda x: F.avg_pool2d(x, 2))
            skips.append(x)
    x = block(attention(block(x, c * mult)), c * mult)
    for level, mult in reversed(list(enumerate(mults))):
        for _ in range(blocks + 1):
            x = block(torch.cat([x, skips.pop()], dim=1), c * mult)
        x = attention(x) if x.shape[-1] in config["attn_resolutions"] else x
        if level:
            x = block(x, c * mult, lambda x: x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    return conv(F.silu(norm(x)), 3), tensors

def save_official(path, tensors):
    """As the authors do; the averaged weights are those in question, and numpy 1 made the learning rate."""
    ema = dict(decay=0.999999, num_updates=10, shadow_params=list(tensors))
    model = {"module.all_modules.0.weight": torch.zeros(1), "module.sigmas": torch.zeros(10)}
    optimizer = dict(state={}, param_groups=[dict(lr=np.float64(2e-4), params=[0])])
    torch.save(dict(optimizer=optimizer, model=model, ema=ema, step=400_000), path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    (name,) = [name for name in members if name.endswith("data.pkl")]
    assert b"cnumpy._core.multiarray\nscalar\n" in members[name]
    members[name] = members[name].replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    with zipfile.ZipFile(path, "w") as file:
        for member, data in members.items():
            file.writestr(member, data)

@pytest.mark.parametrize("dataset, size, stage", [
    ("cifar10", "3.4M", "distill"), ("ffhq64", "3.4M", "distill"), ("cifar10", "teacher", "train")])
def test_the_authors_files_compute_the_same_by_a_second_implementation(
        dataset, size, stage, tmp_path, ran, refused, recwarn):
    config, path = getattr(sf, dataset).networks[size], tmp_path / "them.pth"
    x, t = torch.randn(1, 3, config["resolution"], config["resolution"]), torch.tensor([0.7])
    theirs, tensors = official(config, x, t)
    save_official(path, tensors)
    net = sf.load_network(path)
    assert {name: net.config[name] for name in config} == config and not net.training and net.stage == stage
    torch.testing.assert_close(net(x, t), theirs, atol=2e-5, rtol=1e-4)
    assert theirs.std() > 0.05 and not recwarn.list
    if (dataset, size) == ("cifar10", "3.4M"):
        assert "stage distill: --solver euler" in ran(f"sample --ckpt {path} --n 2 --npz a.npz")
        assert np.load("a.npz")["arr_0"].shape == (2, 32, 32, 3)
        for wrong in (tensors[:-1], [*tensors, torch.zeros(1)]):
            save_official(path, wrong)
            assert "cannot read" in refused(f"sample --ckpt {path}")

def test_the_authors_imagenet_students_load(tmp_path, monkeypatch):
    """Their layouts are EDM's, with smaller channels here; tensors in the order of EDM's modules."""
    fewer = dict(model_channels=64, num_blocks=1)
    small = {name: config | fewer for name, config in sf.imagenet64.networks.items()}
    monkeypatch.setattr(sf, "imagenet64", replace(sf.imagenet64, networks=small))
    for size in ("44.7M", "80.7M"):
        net = fill(sf.UNet(**small[size])).float()
        save_official(tmp_path / "them.pth", [p.detach() for p in net.parameters()])
        loaded = sf.load_network(tmp_path / "them.pth")
        assert loaded.config == net.config and loaded.stage == "distill"
        assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), net.parameters()))

# ---- The picture in two dimensions -------------------------------------------------------------------------
def test_sliced_wasserstein_distance():
    torch.manual_seed(0)
    x = torch.randn(4_000, 2)
    assert toy2d.sliced_wasserstein(x, x[torch.randperm(4_000)]) < 1e-6
    moved = toy2d.sliced_wasserstein(x, x + torch.tensor([3.0, 0.0]))
    assert moved == pytest.approx(3 * 2 / math.pi, rel=1e-3)  # mean over directions of |3 cos|

def test_toy_draws_its_pictures(tmp_path, monkeypatch, capsys):
    for stage in ("TRAIN", "DISTILL"):
        monkeypatch.setattr(toy2d, stage, sf.Schedule(steps=5, batch=16, lr=1e-3, warmup=0, ema=0.9))
    monkeypatch.setattr(sys, "argv", ["toy2d.py", "--out", str(tmp_path), "--target", "moons"])
    toy2d.main()
    assert min((tmp_path / name).stat().st_size for name in ("toy2d.png", "toy2d.gif")) > 10_000
    assert "teacher" in capsys.readouterr().out
    with python(HERE / "toy2d.py", "--target", "cat") as process:
        assert re.fullmatch("toy2d: .*cat.*\n", process.communicate()[1]) and process.returncode == 2

# ---- Experiments, notebooks and README ---------------------------------------------------------------------
@pytest.fixture
def experiments(monkeypatch):
    """The module of the notebooks' experiments."""
    monkeypatch.syspath_prepend(HERE / "notebooks")
    return importlib.import_module("experiments")

def test_experiments_train_at_equal_cost(experiments, monkeypatch):
    flow, student = toy2d.MLP(8), toy2d.MLP(8)
    monkeypatch.setattr(experiments, "fit", lambda *args: args[3] * passes(args[2], student, flow))
    world = types.SimpleNamespace(noise=torch.randn(9, 2), D=sf.l2, guided_steps=120, distill_lr=1e-3)
    for how in {*experiments.COST} - {"naive with fewer steps"}:
        assert experiments.distilled(world, flow, how, 9, world.noise) == 7 * 120

@pytest.mark.parametrize("path", sorted((HERE / "notebooks").glob("*.csv")), ids=lambda path: path.stem)
def test_results_of_experiments_are_whole(path, experiments):
    rows = experiments.read(path.stem)
    cases = rows["case"] if "case" in rows.dtype.names else np.zeros(len(rows))
    for seeds in (np.bincount(rows["seed"][cases == case]) for case in np.unique(cases)):
        assert len(seeds) >= 3 and len(set(seeds)) == 1
    assert all(0 < row[-1] < math.inf for row in rows.tolist())

NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))

def cells(path):
    """A notebook's cells, each with its source as one text."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell | dict(source="".join(cell["source"])) for cell in notebook["cells"]]

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_and_its_solutions_run(path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.getbasetemp())  # of all of them, so that they share a teacher
    monkeypatch.setattr(sys, "path", [str(HERE / "notebooks"), *sys.path])
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(Image=lambda data, format: 0))
    names, exercise, pictures = {}, "", 0
    for cell in cells(path):
        solutions = re.findall(r"```python\n(.*?)```", cell["source"], re.DOTALL)
        code = [cell["source"]] if cell["cell_type"] == "code" else solutions
        if exercise:  # the cell before; it now checks the solution's answer
            code.append(exercise.replace("answer = None", "assert answer"))
        exercise = cell["source"] if "answer = None  # yours" in cell["source"] else ""
        for text in code:
            text = re.sub(r"^SCALE = 1\b.*$", "SCALE = 0.002", text, flags=re.MULTILINE)
            exec(compile(text, str(path), "exec"), names)
        assert all(plt.figure(n).get_size_inches()[0] <= 10 for n in plt.get_fignums())
        pictures += len(plt.get_fignums())
        plt.close("all")
    assert names["SCALE"] == 0.002 and callable(names["answer"]) and pictures >= 2

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_with_the_outputs_of_one_run(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:  # a label that was changed after the run
        printed = "".join(text for output in cell["outputs"] for text in output.get("text", ()))
        labels = re.findall(r'^print\(f?"([^{"]+)', cell["source"], re.MULTILINE)
        assert all(label in printed for label in labels)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not {"error", "stderr"} & {output.get("name", output["output_type"]) for output in outputs}
    assert all(len(output.get("text", ())) <= 15 for output in outputs)
    lines = [cell["source"].splitlines() for cell in code]
    assert max(map(len, lines)) <= 25 and max(len(line) for cell in lines for line in cell) <= 95
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 2
    assert not re.search(r"/(tmp|home|root|work)/", "".join(map(str, outputs)))
    text = "".join(cell["source"] for cell in cells(path))
    assert text.count("<details><summary>") == text.count("</details>") >= 2

def test_readme_exports_a_student(whole, tmp_path, monkeypatch):
    shutil.copytree(whole.folder, tmp_path / "runs/digits")
    monkeypatch.chdir(tmp_path)
    (code,), names = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL), {}
    exec(code, names)
    noise = torch.randn(5, 1, 8, 8)
    exported = noise + torch.export.load("student.pt2").module()(noise, torch.full((5,), sf.T0))
    torch.testing.assert_close(exported, sf.one_step(names["flow"], noise))

def test_readme_links_the_notebooks_and_no_missing_file():
    linked = set(re.findall(r"\]\((?!http|#)([^)#]+)", (HERE / "README.md").read_text(encoding="utf-8")))
    assert [path for path in linked if not (HERE / path).exists()] == []
    assert linked >= {f"notebooks/{path.name}" for path in NOTEBOOKS}
