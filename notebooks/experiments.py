"""The experiments behind notebooks 2, 3 and 6: annealing, guidance, and other one-step methods.

python notebooks/experiments.py annealing|guidance|methods plane|digits (methods: plane only)

writes CSV files beside this script. Two seeds run at a time, each in a process with one thread. Each seed has
its own teacher, pairs and networks, and networks that are compared have equal training cost.
"""

import argparse
import copy
import itertools
import json
import sys
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import slimflow as sf  # noqa: E402
import toy2d  # noqa: E402

HELD_OUT, BATCH = 1_024, 64  # pairs on which nothing is trained; pairs of a step
COST = {  # of a step of distillation, in forward passes; a backward pass counts as two
    "naive": 3,
    "naive with fewer steps": 7,  # costs 3, but makes as many steps as guided
    "guided": 7,  # as in slimflow: the first step of the target is the student's, the second the 2-flow's
    "both steps by the 2-flow": 8,  # the paper's equation
    "guidance alone": 4,  # without pairs
}
STYLE = {  # a colour and a marker for each network, the same in all notebooks
    "teacher": ("#D55E00", "s"), "1-flow": ("#CC79A7", "^"), "2-flow": ("#0072B2", "o"),
    "random": ("#0072B2", "o"), "linear": ("#56B4E9", "D"), "exponential": ("#009E73", "v"),
    "naive": ("#999933", "X"), "guided": ("#882255", "P"), "both steps by the 2-flow": ("#AA4499", "<"),
    "guidance alone": ("#44AA99", ">"), "naive with fewer steps": ("#777777", "d"),
}

# ---- Two worlds: a trained teacher, its pairs, real data, and a distance to them ---------------------------
class Plane:
    """Eight Gaussians in the plane. Distance: sliced Wasserstein's, of 10,000 points."""
    network, draw = staticmethod(partial(toy2d.MLP, 64)), staticmethod(toy2d.TARGETS["8gaussians"])
    D = staticmethod(sf.l2)  # of the distillation
    lr, distill_lr, precise = 3e-3, 1e-3, dict(solver="rk45")
    reflow_steps, guided_steps = 4_000, 1_500
    guidance = (32, 32), (256, 256), (1_024, 1_024), (6_000, 6_000), (6_000, 1_024)  # 2-flow's, student's
    annealing, rotations = ((64, 100), (64, 500), (64, 2_000), (65_536, 2_000)), (0, 1)  # pairs, steps
    compared = guidance[:4]  # where all ways of COST are tried
    def __init__(self, seed, scale=1.0):
        self.seed, self.scale = seed, scale
        schedule = replace(toy2d.TRAIN, steps=round(toy2d.TRAIN.steps * scale))
        torch.manual_seed(seed)
        self.teacher = sf.fit(toy2d.MLP(128), partial(flow_loss, self, toy2d.BATCH), schedule, seed)
        self.noise, self.fresh = torch.randn(65_536 + HELD_OUT, 2), torch.randn(10_000, 2)
        self.data, self.target = ends(self, self.teacher), self.draw(10_000)

    def distances(self, flow, solver):
        return dict(distance=toy2d.sliced_wasserstein(sf.sample(flow, self.fresh, **solver)[0], self.target))

class Digits:
    """The digits. Distance: Frechet's of 5,000 images, by the table's classifier and one of another seed."""
    D, network = staticmethod(sf.huber), staticmethod(partial(sf.UNet, **sf.digits.networks["0.19M"]))
    lr, distill_lr, precise = 4e-3, 2e-3, dict(solver="adams", steps=12)
    reflow_steps, guided_steps = 1_100, 550
    guidance = (256, 256), (1_024, 1_024), (6_000, 6_000), (6_000, 1_024)
    annealing, rotations = ((512, 250), (512, 4_000)), (0,)
    compared = guidance[1:2]
    def __init__(self, seed):
        self.seed, self.scale, out = seed, 1.0, f"runs/experiments/{seed}"
        run = replace(sf.digits, seed=seed, device="cpu", out=out)
        sf.run_stage(run, "pairs", pairs=6_000 + HELD_OUT)
        self.noise, self.data = (x.float() for x in sf.load_pairs(run, "pairs")[:2])
        self.images, labels = sf.load_digits()
        self.fresh, self.y = sf.fixed_noise(run, 5_000, seed=4321)
        self.features = [sf.digit_features(run, self.images[::2], labels[::2], k) for k in (0, 1)]

    def draw(self, n):
        return sf.to_float(self.images[torch.randint(len(self.images), (n,))])

    def distances(self, flow, solver):
        made = torch.cat(list(sf.generate(flow, self.fresh, self.y, solver)))
        moments = [(*sf.moments([f(made)]), *sf.moments([f(self.images[1::2])])) for f in self.features]
        return dict(zip(("distance", "other"), itertools.starmap(sf.frechet_distance, moments)))

# ---- What is trained ---------------------------------------------------------------------------------------
def fit(world, net, loss, steps, lr):
    """Train a network for so many steps, by the world's scale."""
    steps = max(1, round(steps * world.scale))
    schedule = sf.Schedule(steps, BATCH, lr, warmup=steps // 20, decay=0.6, ema=0.995)
    return sf.fit(net, loss, schedule, world.seed)

def flow_loss(world, batch, flow, step):
    """The loss of `train`, on real data and independent noise."""
    data = world.draw(batch)
    return sf.rectified_flow_loss(flow, torch.randn_like(data), data)

def ends(world, flow):
    """The precise end of a flow's ODE, from each of the world's noises."""
    return torch.cat([sf.sample(flow, z, **world.precise)[0] for z in world.noise.split(1_024)])

STARTS = {"random": 0, "linear": 3 / 8, "exponential": 1 / 16, "1-flow": 3 / 8}  # annealed: as in the paper

def two_flow(world, pairs, steps, start="linear", rotated=False):
    """A small 2-flow from the first `pairs` pairs, and rows (step, loss on stored pairs, on new ones).

    Starts: random weights; annealed, K being a share of the steps; a 1-flow, which takes that share of them.
    """
    torch.manual_seed(world.seed)
    net, share, curve = world.network(), STARTS[start] * steps, []
    if start == "1-flow":
        net = fit(world, net, partial(flow_loss, world, BATCH), share, world.lr).requires_grad_(True)
        steps, share = steps - share, 0

    def loss(flow, step):
        if step % (steps * world.scale // 20 + 1) == 0:
            rows = slice(min(pairs, HELD_OUT)), slice(-HELD_OUT, None)  # stored pairs, new ones
            curve.append((step, *(reflow_loss(flow, world.noise[k], world.data[k]) for k in rows)))
        i = torch.randint(pairs, (BATCH,))
        noise, data = world.noise[i], world.data[i]
        if rotated:  # the eight Gaussians look the same after each eighth of a turn
            turn = torch.polar(torch.ones(BATCH), torch.randint(8, (BATCH,)) * (torch.pi / 4))
            noise, data = (torch.view_as_real(torch.view_as_complex(x) * turn) for x in (noise, data))
        beta = sf.anneal_beta(step, share * world.scale, start if start in sf.SCHEDULES else "linear")
        return sf.rectified_flow_loss(flow, sf.annealed_noise(noise, beta), data)

    return fit(world, net, loss, steps, world.lr), curve

@torch.no_grad()
def reflow_loss(flow, noise, data):
    """The loss of reflow (b = 0) on these pairs, each at another time."""
    return sf.rectified_flow_loss(flow, noise, data, t=(torch.arange(len(noise)) + 0.5) / len(noise)).item()

def two_step(flow, noise, t, y=None):
    """Two Euler steps of one flow, which meet at t [B]: what the paper's equation guides by."""
    return sf.last_step(flow, sf.interpolate(noise, sf.one_step(flow, noise, y), t), t, y)

def both_steps_loss(student, flow, noise, distance):
    """Guidance as in the paper's equation: both steps of the target are the 2-flow's."""
    target = torch.no_grad()(two_step)(flow, noise, 0.2 + 0.6 * torch.rand(len(noise)))
    return distance(sf.one_step(student, noise), target).mean()

def distilled(world, flow, how, pairs, data):
    """A one-step student from a 2-flow, on the first pairs (noise, data), in one of the ways of COST."""
    guide = both_steps_loss if how == "both steps by the 2-flow" else sf.guidance_loss

    def loss(student, step):
        i, value = torch.randint(pairs, (BATCH,)), 0.0
        if how != "guidance alone":
            value = sf.distillation_loss(student, world.noise[i], data[i], world.D)
        return value if "naive" in how else value + guide(student, flow, torch.randn_like(data[i]), world.D)

    student = copy.deepcopy(flow).requires_grad_(True)
    return fit(world, student, loss, world.guided_steps * COST["guided"] / COST[how], world.distill_lr)

# ---- The experiments yield rows: a file's name, and its columns --------------------------------------------
def guidance(world):
    """Students of few and many pairs, the teacher's or the 2-flow's own, and their errors on new ones."""
    for seen, pairs in world.guidance:
        if seen == pairs:  # a new 2-flow, also for the fewer pairs after it
            flow, _ = two_flow(world, seen, world.reflow_steps)
            own = ends(world, flow)
        for targets, data in (("teacher's", world.data), ("own", own)):
            for how in ("2-flow", *(COST if (seen, pairs) in world.compared else ("naive", "guided"))):
                student = flow if how == "2-flow" else distilled(world, flow, how, pairs, data)
                made = sf.one_step(student, world.noise[-HELD_OUT:])
                rms = sf.l2(made, data[-HELD_OUT:]).mean().sqrt().item()
                row = dict(seen=seen, targets=targets, pairs=pairs, how=how, error=rms)
                yield "guidance", row | world.distances(student, sf.ONE_STEP)

def annealing(world):
    """2-flows by their start; after 500 passes over the pairs also the students distilled from them."""
    for (pairs, steps), start, rotated in itertools.product(world.annealing, STARTS, world.rotations):
        case = dict(pairs=pairs, steps=steps, start=start, rotated=rotated)
        flow, curve = two_flow(world, pairs, steps, start, rotated)
        for step, stored, new in curve:
            yield "curves", case | dict(step=step, stored=stored, new=new)
        yield "annealing", case | dict(how="precise 2-flow") | world.distances(flow, world.precise)
        yield "annealing", case | dict(how="2-flow") | world.distances(flow, sf.ONE_STEP)
        if steps * BATCH == 500 * pairs and start in ("random", "linear"):
            for how in ("naive", "guided"):
                student = distilled(world, flow, how, pairs, world.data)
                yield "annealing", case | dict(how=how) | world.distances(student, sf.ONE_STEP)

def methods(world):
    """One step of each method of notebook 6, by the notebook's own cells up to its results."""
    names = dict(world=world)
    for cell in json.loads((HERE / "6_where_targets_come_from.ipynb").read_bytes())["cells"]:
        if cell["cell_type"] == "code" and "RESULTS" not in names:
            exec("".join(cell["source"]).replace("experiments.Plane(0, SCALE)", "world"), names)
    for name, distance in names["RESULTS"].items():
        yield "methods", dict(method=name, distance=distance)

def one_seed(experiment, world, seed):  # a generator cannot leave its process
    return [(name, dict(seed=seed) | row) for name, row in experiment(world(seed))]

def read(name, **case):
    """The rows of notebooks/<name>.csv that have these values, a structured array, seed by seed."""
    rows = np.genfromtxt(HERE / f"{name}.csv", None, delimiter=",", names=True, skip_header=1, encoding=None)
    return rows[np.all([rows["seed"] >= 0, *(rows[name] == case[name] for name in case)], axis=0)]

def dots(axes, x, values, name, filled=False):
    """A network's mark for each seed's value, and a dash at their geometric mean."""
    colour, marker = STYLE[name]
    axes.plot(np.full(len(values), x), values, marker, color=colour, ms=5, mfc=colour if filled else "none")
    axes.plot(x, np.exp(np.log(values).mean()), "_", color=colour, ms=18, mew=2.5)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=("annealing", "guidance", "methods"))
    parser.add_argument("world", choices=("plane", "digits"))
    parser.add_argument("--seeds", type=int, default=4, help="default: 4")
    args = parser.parse_args()
    experiment, world = globals()[args.experiment], dict(plane=Plane, digits=Digits)[args.world]
    with get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        seeds = pool.map(partial(one_seed, experiment, world), range(args.seeds), chunksize=1)
    for name in {name: 0 for rows in seeds for name, _ in rows}:
        rows = [row for rows in seeds for file, row in rows if file == name]
        lines = [[f"# {' '.join(sys.argv)}, torch {torch.__version__}, {np.datetime64('today')}"], rows[0]]
        lines += [[f"{x:.4g}" if isinstance(x, float) else f"{x}" for x in row.values()] for row in rows]
        (HERE / f"{name}_{args.world}.csv").write_text("".join(",".join(line) + "\n" for line in lines))
