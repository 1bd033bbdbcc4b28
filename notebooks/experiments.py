"""The experiments behind notebooks 2, 3 and 6: annealing, guidance, and other one-step methods.

`python notebooks/experiments.py annealing|guidance|methods plane|digits` (methods: plane only)
adds to CSV files beside this script the cases that are missing, by two processes of one thread. Each seed has
its own teacher, pairs and networks, and what is compared has equal training cost. The files that are there
are older: weights were averaged at a rate of at most 0.995 (where `rate` is constant, as now).
"""

import copy
import json
import sys
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import slimflow as sf  # noqa: E402
import toy2d  # noqa: E402

HELD_OUT, BATCH = 1_024, 64  # pairs on which nothing is trained; pairs of a step
STARTS = {  # of a 2-flow from random weights: a schedule of b, and the share of the steps until it is 0
    "plain": ("linear", 0), "linear": ("linear", 3 / 8), "exponential": ("exponential", 1 / 16),
    "hold": ("hold", 3 / 8), "hold longer": ("hold", 0.6), "hold on real data": ("hold", 3 / 8),
}
COST = {  # of a step of distillation, in forward passes; a backward pass counts as two
    "naive": 3,
    "naive with fewer steps": 7,  # costs 3, but makes as many steps as guided
    "guided": 7,  # as in slimflow: the first step of the target is the student's, the second the 2-flow's
    "both steps by the 2-flow": 8,  # the paper's equation
    "guidance alone": 4,  # without pairs
}
STYLE = {  # a colour and a marker for each network, the same in all notebooks
    "teacher": ("#D55E00", "s"), "2-flow": ("#0072B2", "o"), "plain": ("#0072B2", "o"),
    "linear": ("#56B4E9", "D"), "exponential": ("#009E73", "v"), "hold": ("#000000", "*"),
    "hold longer": ("#777777", "h"), "hold on real data": ("#CC79A7", "^"), "naive": ("#999933", "X"),
    "guided": ("#882255", "P"), "both steps by the 2-flow": ("#AA4499", "<"),
    "guidance alone": ("#44AA99", ">"), "naive with fewer steps": ("#777777", "d"),
}

# ---- Two worlds: a trained teacher, its pairs, real data, and a distance to them ---------------------------
class Plane:
    """Eight Gaussians in the plane. Distance: sliced Wasserstein's, of 10,000 points."""
    network, draw = staticmethod(partial(toy2d.MLP, 64)), staticmethod(toy2d.TARGETS["8gaussians"])
    D = staticmethod(sf.l2)  # of the distillation
    lr, distill_lr, precise = 3e-3, 1e-3, 0
    reflow_steps, guided_steps = 4_000, 1_500
    def __init__(self, seed, scale=1.0):
        self.seed, self.scale = seed, scale
        training = toy2d.TRAIN | dict(steps=round(toy2d.TRAIN["steps"] * scale), seed=seed)
        torch.manual_seed(seed)
        self.teacher, _ = sf.fit(toy2d.MLP(128), partial(flow_loss, self, toy2d.BATCH), **training)
        self.noise, self.fresh = torch.randn(65_536 + HELD_OUT, 2), torch.randn(10_000, 2)
        self.data, self.target = ends(self, self.teacher), self.draw(10_000)

    def distances(self, flow, nfe=1):
        made, _ = sf.sample(flow, self.fresh, nfe=nfe)
        return dict(distance=toy2d.sliced_wasserstein(made, self.target))

class Digits:
    """The digits. Distance: Frechet's of 5,000 images, as they are and at the real digits' contrast."""
    D, network = staticmethod(sf.huber), staticmethod(partial(sf.UNet, **sf.digits["networks"]["small"]))
    lr, distill_lr, precise = 4e-3, 2e-3, 12
    reflow_steps, guided_steps, scale = 1_100, 550, 1.0
    def __init__(self, seed):
        self.seed = seed
        settings = dict(train=dict(seed=seed), pairs=dict(n=6_000 + HELD_OUT, seed=seed))
        run = sf.Run(out=f"runs/experiments/{seed}", device="cpu", settings=settings)
        sf.make(run, "pairs")
        self.noise, self.data, _ = (torch.cat(x).float() for x in zip(*sf.load_pairs(run, "pairs")))
        self.images, labels = sf.load_digits()
        self.fresh, self.y = sf.fixed_noise(run, 5_000, seed=4321)
        self.features, self.real = sf.digit_features(run, self.images[::2], labels[::2]), self.images[1::2]

    def draw(self, n):
        return sf.to_float(self.images[torch.randint(len(self.images), (n,))])

    def distances(self, flow, nfe=1):
        made = torch.cat(list(sf.generate(flow, self.fresh, self.y, nfe)))
        x, real = sf.to_float(made), sf.to_float(self.real)
        contrast = (x.var(dim=0).sum() / real.var(dim=0).sum()).item()  # pixel variance, made over real
        matched = sf.to_uint8(x.mean(dim=0) + (x - x.mean(dim=0)) / contrast**0.5)
        target = sf.moments([self.features(self.real)])
        raw, equal = (sf.frechet_distance(*sf.moments([self.features(i)]), *target) for i in (made, matched))
        return dict(distance=raw, matched=equal, contrast=contrast)

# ---- What is trained ---------------------------------------------------------------------------------------
def fit(world, net, loss, steps, lr, decay=0.6):
    """Train a network for so many steps, by the world's scale."""
    steps = max(1, round(steps * world.scale))
    return sf.fit(net, loss, steps, lr, steps // 20, decay, seed=world.seed)[0]

def flow_loss(world, batch, flow, step):
    """The loss of `train`, on real data and independent noise."""
    data = world.draw(batch)
    return sf.rectified_flow_loss(flow, torch.randn_like(data), data)

def ends(world, flow, rows=slice(None)):
    """The precise end of a flow's ODE, from each of the world's noises (or of these rows)."""
    return torch.cat([sf.sample(flow, z, nfe=world.precise)[0] for z in world.noise[rows].split(1_024)])

def two_flow(world, pairs, steps, start="linear", rate="falling"):
    """A small 2-flow from the first `pairs` pairs, and what was measured on its way, a list of dicts."""
    torch.manual_seed(world.seed)
    (schedule, share), curve = STARTS[start], []
    steps = max(1, round(steps * world.scale))

    def loss(flow, step):
        if step % (steps // 20 + 1) == 0:
            curve.append(dict(step=step) | judged(world, flow, pairs))
        i = torch.randint(pairs, (BATCH,))
        noise, data = world.noise[i], world.data[i]
        beta = sf.anneal_beta(step, share * steps, schedule)
        if start == "hold on real data" and beta == 1:  # in place of the pairs' images
            data = world.draw(BATCH)
        return sf.rectified_flow_loss(flow, sf.annealed_noise(noise, beta), data)

    lr, decay = (world.lr / 2, 0.0) if rate == "constant" else (world.lr, 0.6)  # after the warm-up
    flow = fit(world, world.network(), loss, steps / world.scale, lr, decay)
    return flow, [*curve, dict(step=steps) | judged(world, flow, pairs)]

@torch.no_grad()
def judged(world, flow, pairs):
    """The loss of reflow (b = 0) on stored and on new pairs, and how far its precise ends are from these."""
    few, row = slice(-256, None), {}
    row["map"] = sf.l2(ends(world, flow, few), world.data[few]).mean().sqrt().item()
    for name, rows in (("stored", slice(min(pairs, HELD_OUT))), ("new", slice(-HELD_OUT, None))):
        z, x = world.noise[rows], world.data[rows]
        t = (torch.arange(len(z)) + 0.5) / len(z)  # each pair at another time
        row[name] = sf.rectified_flow_loss(flow, z, x, t=t).item()
    return row

def two_step(flow, noise, t, y=None):
    """Two Euler steps of one flow, which meet at t [B]: what the paper's equation guides by."""
    return sf.last_step(flow, sf.interpolate(noise, sf.one_step(flow, noise, y), t), t, y)

def both_steps_loss(student, flow, noise, distance):
    """Guidance as in the paper's equation: both steps of the target are the 2-flow's."""
    target = torch.no_grad()(two_step)(flow, noise, 0.2 + 0.6 * torch.rand(len(noise)))
    return distance(sf.one_step(student, noise), target).mean()

def distilled(world, flow, how, pairs, data, guide=None):
    """A student from a 2-flow, on the first pairs (noise, data), in a way of COST, or by your guide."""
    guide = guide or (both_steps_loss if how == "both steps by the 2-flow" else sf.guidance_loss)

    def loss(student, step):
        i, value = torch.randint(pairs, (BATCH,)), 0.0
        if how != "guidance alone":
            value = sf.distillation_loss(student, world.noise[i], data[i], world.D)
        return value if "naive" in how else value + guide(student, flow, torch.randn_like(data[i]), world.D)

    student = copy.deepcopy(flow).requires_grad_(True)
    return fit(world, student, loss, world.guided_steps * COST["guided"] / COST[how], world.distill_lr)

# ---- The experiments yield rows: a file's name, and its columns --------------------------------------------
def annealing(world, pairs, steps, start, rate="falling", students=False):
    """One 2-flow, how it got there, and where asked the students that are distilled from it."""
    case = dict(pairs=pairs, steps=steps, start=start, rate=rate)
    flow, curve = two_flow(world, pairs, steps, start, rate)
    for row in curve:
        yield "curves", case | row
    yield "annealing", case | dict(how="precise 2-flow") | world.distances(flow, world.precise)
    yield "annealing", case | dict(how="2-flow") | world.distances(flow)
    for how in ("naive", "guided") if students else ():
        student = distilled(world, flow, how, pairs, world.data)
        yield "annealing", case | dict(how=how) | world.distances(student)

def guidance(world, seen, pairs, ways=("naive", "guided")):
    """Students of few and many pairs, the teacher's or the 2-flow's own, and their errors on new ones."""
    flow, _ = two_flow(world, seen, world.reflow_steps)
    for targets, data in (("teacher's", world.data), ("own", ends(world, flow))):
        for how in ("2-flow", *ways):
            student = flow if how == "2-flow" else distilled(world, flow, how, pairs, data)
            made = sf.one_step(student, world.noise[-HELD_OUT:])
            rms = sf.l2(made, data[-HELD_OUT:]).mean().sqrt().item()
            row = dict(seen=seen, targets=targets, pairs=pairs, how=how, error=rms)
            yield "guidance", row | world.distances(student)

def methods(world):
    """One step of each method of notebook 6, by the notebook's own cells up to its results."""
    names = dict(world=world)
    for cell in json.loads((HERE / "6_where_targets_come_from.ipynb").read_bytes())["cells"]:
        if cell["cell_type"] == "code" and "RESULTS" not in names:
            exec("".join(cell["source"]).replace("experiments.Plane(0, SCALE)", "world"), names)
    for name, distance in names["RESULTS"].items():
        yield "methods", dict(method=name, distance=distance)

ABC, WAYS, FEW = ("plain", "linear", "hold"), tuple(COST), (6_000, 1_024)
CASES = {  # by experiment and world: (number of seeds, arguments)
    ("annealing", "digits"): [
        *[(3, (512, 4_000, start, "falling", True)) for start in ABC],
        *[(3, (512, 4_000, start, "constant")) for start in ABC],
        *[(3, (pairs, 4_000, start)) for pairs in (1_500, 256, 6_000) for start in ABC],
        *[(5, (512, 4_000, start)) for start in STARTS if start not in ABC]],
    ("annealing", "plane"): [
        (5, (pairs, steps, start)) for pairs, steps in ((64, 500), (64, 2_000), (65_536, 2_000))
        for start in STARTS],
    ("guidance", "digits"): [(3, case) for case in ((256, 256), (1_024, 1_024, WAYS), (6_000, 6_000), FEW)],
    ("guidance", "plane"): [*[(5, (n, n, WAYS)) for n in (32, 256, 1_024, 6_000)], (5, FEW)],
    ("methods", "plane"): [(5, ())],
}
WORLDS = dict(plane=cache(Plane), digits=cache(Digits))

def work(experiment, name, task):  # a generator cannot leave its process
    seed, case, arguments = task
    rows = globals()[experiment](WORLDS[name](seed), *arguments)
    return [(f"{file}_{name}.csv", dict(seed=seed, case=case) | row) for file, row in rows]

def read(name, **case):
    """The rows of notebooks/<name>.csv that have these values, a structured array, seed by seed."""
    rows = np.genfromtxt(HERE / f"{name}.csv", None, delimiter=",", names=True, skip_header=1, encoding=None)
    rows = rows[np.argsort(rows["seed"], kind="stable")]
    return rows[np.all([rows["seed"] >= 0, *(rows[name] == case[name] for name in case)], axis=0)]

def dots(axes, x, values, name, filled=False):
    """A network's mark for each seed's value, and a dash at their geometric mean."""
    colour, marker = STYLE[name]
    axes.plot(np.full(len(values), x), values, marker, color=colour, ms=5, mfc=colour if filled else "none")
    axes.plot(x, np.exp(np.log(values).mean()), "_", color=colour, ms=18, mew=2.5)

if __name__ == "__main__":
    (experiment, world), tasks = sys.argv[1:], []
    path = HERE / f"{experiment}_{world}.csv"
    there = {tuple(line.split(",")[:2]) for line in path.read_text().splitlines()} if path.exists() else ()
    for seeds, case in CASES[experiment, world]:
        name = " ".join(map(str, case)).replace(",", "") or experiment
        tasks += [(seed, name, case) for seed in range(seeds) if (str(seed), name) not in there]
    with get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        for rows in pool.imap_unordered(partial(work, experiment, world), tasks):
            for file, row in rows:
                cells = [f"{x:.4g}" if isinstance(x, float) else f"{x}" for x in row.values()]
                with open(HERE / file, "a") as lines:
                    if lines.tell() == 0:
                        lines.write(f"# {sys.argv}, torch {torch.__version__}, {np.datetime64('today')}\n")
                        lines.write(",".join(row) + "\n")
                    lines.write(",".join(cells) + "\n")
