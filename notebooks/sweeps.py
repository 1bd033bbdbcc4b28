"""The long runs behind the notebooks' error bars. Their numbers are kept beside this file.

They are the first edition's: guidance takes both steps by the 2-flow, and the exponential schedule ends at 0.

python notebooks/sweeps.py annealing_plane|annealing_digits|guidance_plane|guidance_digits|sizes_digits

writes notebooks/<experiment>.csv. Two seeds run at a time, each in a process with one thread. The notebooks
import this file, repeat parts of one seed live, and draw them onto what is stored.
"""

import contextlib
import copy
import csv
import io
import itertools
import math
import os
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import slimflow as sf  # noqa: E402
import toy2d  # noqa: E402

HELD_OUT = 1_024  # pairs on which nothing is trained

# ---- Where: a trained teacher and its pairs, how a student is made and trained, how good one step of it is

class Digits:
    """The digits. Distances: Frechet's, of 5,000 images, as in slimflow's table."""

    batch, width, lr, warmup, decay, ema = 64, 16, 4e-3, 0.1, 0.6, 0.998
    D = staticmethod(sf.huber)  # of the distillation
    # width, pairs, steps in all
    annealing = (16, 4_096, 100), (16, 4_096, 250), (16, 4_096, 500), (8, 4_096, 250), (16, 512, 250)
    pairs = 256, 1_024, 4_096, 16_384
    reflow_steps, naive_steps = 600, 600

    def __init__(self, seed, n=16_384, folder="runs/sweeps", scale=1.0):
        self.seed, self.scale, self.run = seed, scale, digits_run(seed, n, folder, scale)
        sf.run_stages(self.run, "pairs", {})
        self.noise, self.data = (x.float() for x in sf.load_pairs(self.run, "pairs")[:2])
        self.images, self.labels = sf.load_images(self.run)
        self.features = sf.digit_features(self.run, self.images, self.labels)
        self.moments = sf.moments([self.features(self.images)])
        self.fresh, _ = sf.fixed_noise(self.run, self.run.n, seed=4321)

    def draw(self, n):
        """Real images."""
        return sf.to_float(self.images[torch.randint(len(self.images), (n,))])

    def student(self, width):
        """A network with random weights."""
        sf.seed_all(self.seed, "student", 0)
        return sf.UNet(**self.run.networks["teacher"] | dict(model_channels=width))

    def distance(self, flow):
        """Frechet distance between the real images and those that one step makes of fresh noise."""
        made = map(self.features, sf.generate(flow, self.fresh, None, sf.ONE_STEP))
        return sf.frechet_distance(*sf.moments(made), *self.moments)

    def teacher_distance(self):
        """The same of the teacher's images, those of the pairs."""
        made = self.features(sf.to_uint8(self.data))
        return sf.frechet_distance(*sf.moments([made]), *self.moments)


def digits_run(seed, n, folder, scale=1.0):
    """A run of slimflow's with a shorter teacher, and n pairs beside those held out."""
    run = sf.PRESETS["digits"]
    sizes = dict(pairs=round(n * scale) + HELD_OUT, n=max(500, round(run.n * scale)))
    teacher, out = replace(run.train, steps=round(800 * scale)), f"{folder}/{seed}-{n}-{scale:g}"
    return replace(run, train=teacher, seed=seed, out=out, device="cpu", **sizes)


class Plane:
    """Eight Gaussians in the plane. Distances: sliced Wasserstein's, of 10,000 points."""

    batch, width, lr, warmup, decay, ema = 256, 32, 3e-3, 0.05, 0.5, 0.995
    D = staticmethod(sf.l2)  # of the distillation
    annealing = tuple(itertools.product((16, 64), (512, 16_384), (250, 500, 1_000, 2_000)))
    pairs = 32, 64, 128, 256, 1_024, 4_096, 16_384
    reflow_steps, naive_steps = 4_000, 3_000

    def __init__(self, seed, n=16_384, scale=1.0):
        self.seed, self.scale, self.draw = seed, scale, toy2d.TARGETS["8gaussians"]

        def loss(flow, step):
            data = self.draw(512)
            return sf.rectified_flow_loss(flow, torch.randn_like(data), data)

        torch.manual_seed(seed)
        schedule = replace(toy2d.TRAIN, steps=round(toy2d.TRAIN.steps * scale))
        self.teacher = quiet_fit(toy2d.MLP(128), loss, schedule, seed, "teacher")
        torch.manual_seed(seed)
        samples = max(1_000, round(10_000 * scale))
        self.noise, self.fresh = torch.randn(round(n * scale) + HELD_OUT, 2), torch.randn(samples, 2)
        self.target = self.draw(samples)
        self.data, _ = sf.sample(self.teacher, self.noise)

    def student(self, width):
        """A network with random weights."""
        torch.manual_seed(self.seed)
        return toy2d.MLP(width)

    def distance(self, flow):
        """Distance between the target and the points that one step makes of fresh noise."""
        return toy2d.sliced_wasserstein(sf.sample(flow, self.fresh, **sf.ONE_STEP)[0], self.target)

    def teacher_distance(self):
        """The same of the teacher's points, those of the pairs."""
        n = min(len(self.data), len(self.target))
        return toy2d.sliced_wasserstein(self.data[:n], self.target[:n])

# ---- What is trained --------------------------------------------------------------------------------------

def quiet_fit(*args, **kwargs):
    """`fit` without its progress."""
    with contextlib.redirect_stdout(io.StringIO()):
        return sf.fit(*args, **kwargs)

def schedule(world, steps, lr=None):
    """The world's schedule for so many steps."""
    steps = max(1, round(steps * world.scale))
    warmup = round(world.warmup * steps)
    return sf.Schedule(steps, world.batch, lr or world.lr, warmup, world.decay, world.ema)

def one_flow(world, steps, width=None):
    """A small rectified flow, on real data and independent noise."""

    def loss(flow, step):
        data = world.draw(world.batch)
        return sf.rectified_flow_loss(flow, torch.randn_like(data), data)

    net = world.student(width or world.width)
    return quiet_fit(net, loss, schedule(world, steps), world.seed, "one_flow")

def first(world, pairs):
    """Noise and data of the first so many pairs, or of all; those held out are never among them."""
    return world.noise[:-HELD_OUT][:pairs], world.data[:-HELD_OUT][:pairs]

def beta(step, horizon, name):
    """b of the annealing; the first edition's exponential schedule is 0 at the horizon, slimflow's is 1/e."""
    if name != "exponential":
        return sf.anneal_beta(step, horizon, name)
    return max(0.0, (math.exp(-5 * step / horizon) - math.exp(-5)) / (1 - math.exp(-5)))

def two_flow(world, steps, anneal=0, b="linear", width=None, pairs=None, start=None):
    """A 2-flow from the weights of `start`, else random ones; b falls to 0 over `anneal` steps, if any."""
    noise, data = first(world, pairs)

    def loss(flow, step):
        i = torch.randint(len(noise), (world.batch,))
        mixed = sf.annealed_noise(noise[i], beta(step, anneal * world.scale, b))
        return sf.rectified_flow_loss(flow, mixed, data[i])

    net = copy.deepcopy(start).requires_grad_(True) if start else world.student(width or world.width)
    return quiet_fit(net, loss, schedule(world, steps), world.seed, "two_flow")

def both_steps_loss(student, flow, noise, distance):
    """Guidance as in the paper's equation: both steps by the 2-flow (slimflow's first is the student's)."""
    with torch.no_grad():
        target = sf.two_step(flow, noise, 0.2 + 0.6 * torch.rand(len(noise)))
    return distance(sf.one_step(student, noise), target).mean()

def distilled(world, flow, steps, weight=0.0, share=1.0, pairs=None, watch=None):
    """A one-step student from a 2-flow, on the first pairs; weight of the guidance, its share of the batch.

    `watch(student, step)`, if given, is called before each step.
    """
    noise, data = first(world, pairs)

    def loss(student, step):
        if watch:
            watch(student, step)
        i = torch.randint(len(noise), (world.batch,))
        value = sf.distillation_loss(student, noise[i], data[i], world.D)
        if weight:
            fresh = torch.randn(round(share * world.batch), *noise.shape[1:])
            value = value + weight * both_steps_loss(student, flow, fresh, world.D)
        return value

    student = copy.deepcopy(flow).requires_grad_(True)
    return quiet_fit(student, loss, schedule(world, steps, 1e-3), world.seed, "distilled")

@torch.no_grad()
def error(world, flow, rows):
    """Root mean square difference between one step and the stored end of the path, on these pairs."""
    return (sf.one_step(flow, world.noise[rows]) - world.data[rows]).square().mean().sqrt().item()

def held_out_error(world, flow):
    """`error` on pairs that nothing was trained on."""
    return error(world, flow, slice(-HELD_OUT, None))

@torch.no_grad()
def held_out_loss(world, flow):
    """The loss of reflow (b = 0) on pairs that nothing was trained on, at 10 times each."""
    noise, data = world.noise[-HELD_OUT:], world.data[-HELD_OUT:]
    times = (torch.arange(10) + 0.5) / 10
    losses = [sf.rectified_flow_loss(flow, noise, data, t=t.expand(len(noise))) for t in times]
    return statistics.mean(map(float, losses))

# ---- The experiments: generators of rows ------------------------------------------------------------------

STARTS = "random", "random, 2/3 of the steps", "1-flow", "linear", "cosine", "exponential"

def started(world, start, steps, width, pairs):
    """A 2-flow after so many steps in all; a third of them go to its start, if that is not random.

    With random weights and 2/3 of the steps it sees the pairs, as they are, as often as the others do.
    """
    third = steps // 3
    if start == "random, 2/3 of the steps":
        return two_flow(world, steps - third, width=width, pairs=pairs)
    if start == "1-flow":
        return two_flow(world, steps - third, pairs=pairs, start=one_flow(world, third, width))
    anneal, b = (0, "linear") if start == "random" else (third, start)
    return two_flow(world, steps, anneal, b, width, pairs)

def annealing(world):
    """A 2-flow from random weights, from a small 1-flow, and annealed, after equally many steps in all."""
    for width, pairs, steps in world.annealing:
        for start in STARTS:
            flow = started(world, start, steps, width, pairs)
            row = dict(width=width, pairs=pairs, steps=steps, start=start)
            yield row | dict(loss=held_out_loss(world, flow), distance=world.distance(flow))

STUDENTS = {  # weight of the guidance, share of the batch that it takes (and that sets the number of steps)
    "naive": (0, 0),
    "naive, fewer steps": (0, 1),  # as many as guided
    "guided": (1, 1),
    "guided a little": (0.1, 0.25),
}
NAMES = {  # of the files' columns and rows, for tables and pictures
    "guided": "both steps by the 2-flow",
    "guided a little": "both steps, a little",
}

def two_steps_in_one(flow):
    """A flow whose one step is the other's two, meeting at t = 1/2."""
    return lambda noise, t, y=None: sf.two_step(flow, noise, torch.full((len(noise),), 0.5)) - noise

def equal_cost(steps, share):
    """How many guided steps cost as much as so many naive ones.

    A pass forward costs 1, one backward 2. A naive step takes both; guidance adds both of the student, and
    two forward of the 2-flow, for its share of the batch.
    """
    return round(steps * 3 / (3 + share * (3 + 2)))

def guidance(world):
    """Students distilled from few and from many pairs, naively and with guidance, at equal cost."""
    for pairs in world.pairs:
        flow = two_flow(world, world.reflow_steps, world.reflow_steps // 3, pairs=pairs)
        students = {"2-flow": flow, "2-flow, two steps": two_steps_in_one(flow)}
        for how, (weight, share) in STUDENTS.items():
            steps = equal_cost(world.naive_steps, share)
            students[how] = distilled(world, flow, steps, weight, share, pairs)
        for how, student in students.items():
            row = dict(pairs=pairs, how=how, distance=world.distance(student))
            stored = error(world, student, slice(0, min(pairs, 256)))
            yield row | dict(stored=stored, held_out=held_out_error(world, student))

def of_width(world, width):
    """A 2-flow of this width, and a student from it."""
    flow = two_flow(world, 400, 130, width=width, pairs=4_096)
    return flow, distilled(world, flow, 200, *STUDENTS["guided a little"], 4_096)

def sizes(world):
    """2-flows and students of several widths, trained with equally many steps."""
    for width in (8, 12, 16, 24, 32):
        for network, net in zip(("2-flow", "student"), of_width(world, width)):
            row = dict(width=width, parameters=sf.count_parameters(net), network=network)
            yield row | dict(distance=world.distance(net))

EXPERIMENTS = {
    "annealing_plane": (annealing, Plane),
    "annealing_digits": (annealing, Digits),
    "guidance_plane": (guidance, Plane),
    "guidance_digits": (guidance, Digits),
    "sizes_digits": (sizes, Digits),
}

# ---- Files and pictures -----------------------------------------------------------------------------------

def read(name):
    """Rows of notebooks/<name>.csv, numbers as floats."""

    def value(text):
        try:
            return float(text)
        except ValueError:
            return text

    with open(HERE / f"{name}.csv", newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]

COLOURS, MARKERS = ("#000000", "#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), "osv^DX"

def bars(axes, rows, x, line, y):
    """Mean and standard deviation over the seeds of y against x, a line for each value of one column."""
    for k, (name, mine) in enumerate(group(rows, line).items()):
        points = [(at, [row[y] for row in some]) for at, some in sorted(group(mine, x).items())]
        means, spreads = ([f(values) for _, values in points] for f in (statistics.mean, statistics.stdev))
        places, style = [at * shift(k) for at, _ in points], dict(marker=MARKERS[k], ms=4, capsize=2, lw=1.2)
        axes.errorbar(places, means, spreads, color=COLOURS[k], label=NAMES.get(name, name), **style)
    ticks = sorted({row[x] for row in rows})
    axes.set(xscale="log", yscale="log", xlim=(ticks[0] / 1.2, ticks[-1] * 1.2), xlabel=x, ylabel=y)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], rotation=30)
    axes.xaxis.minorticks_off()

def strip(axes, name, images):
    """Digits [n, 1, 8, 8] in [-1, 1] side by side, a name on their left."""
    row = torch.nn.functional.pad(images[:, 0], (0, 1), value=1.0)  # a white line after each
    axes.imshow(torch.cat(list(row), dim=1), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_ylabel(name, rotation=0, ha="right", va="center")

def shift(k):
    """A factor that keeps the bars of line k from hiding those of others."""
    return 1.03 ** (k - 2)

def cross(axes, k, x, y):
    """A value made now, beside the bars of line k."""
    axes.plot(x * shift(k), y, "x", color=COLOURS[k], ms=8, mew=2, zorder=5)

def compare(rows, column, rival, *case):
    """Rows of a table: geometric means of distances over the rival's of the same seed, how many are below 1.

    The rows have the seeds in one order.
    """
    others = [name for name in group(rows, column) if name != rival]
    table = [(f"distance / {rival}'s", *(NAMES.get(name, name) for name in others))]
    for values, mine in group(rows, *case).items():
        by_name, cells = group(mine, column), []
        for name in others:
            ratios = [a["distance"] / b["distance"] for a, b in zip(by_name[name], by_name[rival])]
            better = sum(ratio < 1 for ratio in ratios)
            cells.append(f"{statistics.geometric_mean(ratios):.2f} ({better}/{len(ratios)})")
        values = values if len(case) > 1 else [values]
        table.append((", ".join(f"{name} {value:,.0f}" for name, value in zip(case, values)), *cells))
    return table

def group(rows, *columns):
    """The rows by their value in a column, or by their values in several."""
    groups = defaultdict(list)
    for row in rows:
        values = tuple(row[column] for column in columns)
        groups[values if len(columns) > 1 else values[0]].append(row)
    return groups

# ---- Command line -----------------------------------------------------------------------------------------

def one_seed(name, scale, seed):
    """The rows of one seed."""
    torch.set_num_threads(1)
    experiment, world = EXPERIMENTS[name]
    return [dict(seed=seed) | row for row in experiment(world(seed, scale=scale))]

def write(path, rows):
    """A CSV file of these rows, dicts with the same keys."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

def main():
    """Run an experiment for some seeds and write its file."""
    parser = sf.Parser(prog="sweeps.py", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=5, help="default: 5")
    parser.add_argument("--scale", type=float, default=1.0, help="share of all training; default: 1")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the file; default: this script's")
    args = parser.parse_args()
    if args.seeds < 2 or not 0.001 <= args.scale <= 1:
        parser.error("--seeds takes 2 or more, --scale a share from 0.001 to 1")
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    with get_context("spawn").Pool(2) as pool:
        seeds = pool.imap(partial(one_seed, args.experiment, args.scale), range(args.seeds))
        for seed, some in enumerate(seeds):
            rows += some
            write(args.out / f"{args.experiment}.csv", rows)
            print(f"seed {seed}: {len(some)} rows", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (sf.Fault, OSError) as error:
        print(f"sweeps: {error}", file=sys.stderr)
        sys.exit(2)
