"""The experiments behind notebooks 3 and 4: annealing and guidance.

`python notebooks/experiments.py annealing|guidance plane|digits|icons` adds to CSV files beside this script
the cases that are missing, by two processes of one thread. Each seed has its own teacher (icons have one),
pairs and networks; worlds.py and colour.py make them. What was expected of each case is in predictions.md.
"""

import copy
import sys
from functools import cache, partial
from multiprocessing import get_context

import numpy as np
import torch
from colour import Icons
from worlds import HELD_OUT, HERE, Digits, Plane, sf

BATCH = 64
FIRST = {512: 0, 256: 512, 3_000: 512, 1_500: 768, 6_000: 2_268}  # the first of so many, new for each number
PLAIN = dict(  # a 2-flow from random weights, without annealing; lengths are shares of the steps
    schedule="linear", share=0, b0=1, fixed_noise=False, network={}, weight_decay=0.0,
    length=1, warmup=1 / 20, decay=0.6)
HOLD = dict(schedule="hold", share=3 / 8)
STARTS = {  # what differs from it
    "plain": {}, "linear": dict(share=3 / 8), "linear for 0.75": dict(share=0.75), "hold": HOLD,
    **{f"hold at {b0}": HOLD | dict(b0=b0) for b0 in (0.97, 0.95, 0.9, 0.8, 0.5)},
    "hold with fixed noise": HOLD | dict(fixed_noise=True),
    "plain with hold's last steps": dict(length=5 / 8, warmup=0, decay=0.96),  # its rates after the drop
    **{f"plain for {share}": dict(length=share) for share in (0.25, 0.5)},  # stopped early
    **{f"dropout {p}": dict(network=dict(dropout=p)) for p in (0.05, 0.15, 0.3)},
    **{f"weight decay {w}": dict(weight_decay=w) for w in (0.01, 0.1, 1.0)},
    **{f"hold for {share}": HOLD | dict(share=share) for share in (0.025, 0.1, 0.6, 0.75)},
}
STYLE = {  # a colour and a marker for each network, the same in all notebooks
    "teacher": ("#D55E00", "s"), "2-flow": ("#0072B2", "o"), "plain": ("#0072B2", "o"),
    "linear": ("#56B4E9", "D"), "hold": ("#000000", "*"),
    "naive": ("#999933", "X"), "guided": ("#882255", "P"), "guidance alone": ("#44AA99", ">"),
}

# ---- What is trained ---------------------------------------------------------------------------------------
def fit(world, net, loss, steps, lr, decay=0.6, warmup=1 / 20):
    """Train a network for so many steps, by the world's scale; its warm-up and decay are shares of them."""
    steps = max(1, round(steps * world.scale))
    return sf.fit(net, loss, steps, lr, round(steps * warmup), decay, seed=world.seed)[0]

def ends(world, flow, noise):
    """The precise ends of a flow's ODE."""
    return torch.cat([sf.sample(flow, z, nfe=world.precise)[0] for z in noise.split(1_024)])

def stored(world, pairs, more=0):
    """Noise and data of so many pairs, and of more."""
    first = FIRST.get(pairs, 0)
    return [x[first : first + pairs + more] for x in (world.noise, world.data)]

def new(world):
    """Noise and data of the pairs on which nothing is trained."""
    return world.noise[-HELD_OUT:], world.data[-HELD_OUT:]

def two_flow(world, pairs, steps, start="linear", more=0):
    """A small 2-flow of so many pairs, and of more."""
    arm, (noise, data) = PLAIN | STARTS[start], stored(world, pairs, more)
    torch.manual_seed(world.seed)
    net, fixed = world.network(**arm["network"]), torch.randn_like(noise)
    length = steps * world.scale

    def loss(flow, step):
        for p in net.parameters() if arm["weight_decay"] else ():  # decoupled from Adam, as AdamW's
            p.data *= 1 - sf.learning_rate(step, length, world.lr, decay=0.6) * arm["weight_decay"]
        i = torch.randint(len(noise), (BATCH,))
        z, x = noise[i], data[i]
        beta = arm["b0"] * sf.anneal_beta(step, arm["share"] * length, arm["schedule"])
        if arm["fixed_noise"] and beta == 1:  # the same for a pair in each step
            z, beta = fixed[i], 0
        return sf.rectified_flow_loss(flow, sf.annealed_noise(z, beta), x)

    return fit(world, net, loss, steps * arm["length"], world.lr, arm["decay"], arm["warmup"])

def to_the_2_flow(student, flow, noise, distance, nfe):
    """The 2-flow's own end as the target, in so many evaluations."""
    return sf.distillation_loss(student, noise, sf.sample(flow, noise, nfe=nfe)[0], distance)

def at_any_time(student, flow, noise, distance):
    """Guidance with t ~ U(0, 1)."""
    return sf.guidance_loss(student, flow, noise, distance, t=torch.rand(len(noise)))

GUIDE = sf.guidance_loss
WAYS = {  # of distillation: passes of a step (a backward pass is two), weights of pairs and guide, the guide
    "naive": (3, 1, 0, None), "guided": (7, 1, 1, GUIDE), "guidance alone": (4, 0, 1, GUIDE),
    "guided with w 0.5": (7, 1, 0.5, GUIDE), "guided with w 2": (7, 1, 2, GUIDE),
    "guided with any t": (7, 1, 1, at_any_time),
    **{f"fresh with {k} evaluations": (3 + k, 0, 1, partial(to_the_2_flow, nfe=k)) for k in (2, 4, 12)},
}
GROUPS = dict(all=WAYS, main=[how for how in WAYS if "guided with" not in how], two=["naive", "guided"])

def distilled(world, flow, how, noise, data, steps=None, guide=None):
    """A student from a 2-flow, on pairs, in a way of WAYS, or by your guide; at equal cost."""
    cost, pairs, weight, usual = WAYS[how]

    def loss(student, step):
        i, value = torch.randint(len(noise), (BATCH,)), 0.0
        if pairs:
            value = sf.distillation_loss(student, noise[i], data[i], world.D)
        if weight:
            value = value + weight * (guide or usual)(student, flow, torch.randn_like(noise[i]), world.D)
        return value

    student = copy.deepcopy(flow).requires_grad_(True)
    return fit(world, student, loss, steps or world.guided_steps * 7 / cost, world.distill_lr)

# ---- The experiments yield rows ----------------------------------------------------------------------------
def measured(world, flow, how, precise=False):
    """A row: the network's distances, and its error on noise that no training saw."""
    noise, data = new(world)
    made = ends(world, flow, noise) if precise else sf.one_step(flow, noise)
    error = sf.l2(made, data).mean().sqrt().item()
    return dict(how=how, error=error) | world.distances(flow, world.precise if precise else 1)

def reflow_loss(flow, noise, data):
    """The loss of reflow, without annealing, with each pair at another time."""
    t = (torch.arange(len(noise)) + 0.5) / len(noise)
    return sf.rectified_flow_loss(flow, noise, data, t=t).item()

def annealing(world, pairs, steps, start):
    """One 2-flow, and how well it fits the pairs it has seen and new ones."""
    flow = two_flow(world, pairs, steps, start)
    losses = dict(stored=reflow_loss(flow, *stored(world, pairs)), new=reflow_loss(flow, *new(world)))
    for how in ("precise", "one step"):
        row = dict(pairs=pairs, steps=steps, start=start) | losses
        yield row | measured(world, flow, how, how == "precise")

def guidance(world, pairs, ways):
    """Students of one 2-flow at equal cost, and what more pairs would have done for the same."""
    flow = two_flow(world, pairs, world.reflow_steps, "hold")
    networks = {"one step": flow}
    for how in GROUPS[ways]:
        networks[how] = distilled(world, flow, how, *stored(world, pairs))

    if ways != "two":
        # What guidance adds to naive steps, 4 passes, spent on pairs instead: the 2-flow's own, or the
        # teacher's, whose network is 4 times as large. The number of steps is then that of guided.
        steps = world.guided_steps
        own = torch.randn(4 * BATCH * steps // world.evaluations, *world.fresh.shape[1:])
        networks["own pairs"] = distilled(world, flow, "naive", own, ends(world, flow, own), steps)
        more = len(own) // 4
        richer = two_flow(world, pairs, world.reflow_steps, "hold", more)
        networks["one step with more pairs"] = richer
        networks["naive with more pairs"] = distilled(
            world, richer, "naive", *stored(world, pairs, more), steps)
        yield dict(pairs=pairs) | measured(world, richer, "precise with more pairs", True)

    yield dict(pairs=pairs) | measured(world, flow, "precise", True)
    for how, network in networks.items():
        yield dict(pairs=pairs) | measured(world, network, how)

ABC, DOSE = ("plain", "linear", "hold"), [start for start in STARTS if "hold at" in start or "fixed" in start]
OTHERS = [start for start in STARTS if start not in (*ABC, *DOSE)]
CASES = {  # by experiment and world: (seeds, arguments)
    ("annealing", "digits"): [
        *[(range(3), (512, 4_000, start)) for start in (*ABC, *DOSE, *OTHERS)],
        *[(range(3), (pairs, 4_000, start)) for pairs in (256, 1_500, 6_000) for start in ABC],
        *[(range(3, 6), (512, 4_000, start)) for start in ("plain", "hold", *DOSE)]],
    ("annealing", "plane"): [
        (range(5), (pairs, steps, start)) for start in ABC
        for pairs, steps in ((64, 500), (64, 2_000), (65_536, 2_000))],
    ("annealing", "icons"): [(range(3), (pairs, 1_600, start)) for pairs in (512, 3_000) for start in ABC],
    ("guidance", "digits"): [(range(3), case) for case in ((512, "all"), (256, "main"), (1_500, "main"))],
    ("guidance", "plane"): [(range(5), (pairs, "main")) for pairs in (32, 256, 1_024, 6_000)],
    ("guidance", "icons"): [(range(3), (512, "two"))],
}
WORLDS = dict(plane=cache(Plane), digits=cache(Digits), icons=cache(Icons))

def work(task):
    """The rows of one case, in a process of its own."""
    experiment, world, seed, name, arguments = task
    first = dict(seed=seed, case=name)
    return [first | row for row in globals()[experiment](WORLDS[world](seed), *arguments)]

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
    experiment, world = sys.argv[1:]
    path = HERE / f"{experiment}_{world}.csv"
    there = path.read_text() if path.exists() else ""
    tasks = []
    for seeds, case in CASES[experiment, world]:
        name = " ".join(map(str, case))
        tasks += [(experiment, world, seed, name, case) for seed in seeds if f"\n{seed},{name}," not in there]
    with get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool, open(path, "a") as file:
        for rows in pool.imap_unordered(work, tasks):
            if file.tell() == 0:
                print("#", *sys.argv, "torch", torch.__version__, np.datetime64("today"), file=file)
                print(*rows[0], sep=",", file=file)
            for row in rows:
                cells = [f"{x:.4g}" if isinstance(x, float) else x for x in row.values()]
                print(*cells, sep=",", file=file, flush=True)
