"""How paths straighten, in two dimensions: every stage of SlimFlow in a minute.

python toy2d.py [--target moons|8gaussians|spiral|checkerboard]

Draws toy2d.png (random pairs, the teacher's paths, its pairs, the 2-flow's paths; then one step of each) and
toy2d.gif (annealing reflow while it trains). Prints how straight the paths are, and how far samples are from
the target.
"""

import argparse
import copy
import math
from pathlib import Path

import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from torch import nn

import slimflow as sf

N_PAIRS, BATCH, FRAMES = 20_000, 512, 80  # frames: of the movie, if it showed all steps
TRAIN = dict(steps=4_000, lr=3e-3, warmup=50, decay=0.5)
DISTILL = dict(steps=1_500, lr=1e-3, warmup=50, decay=0.5)

# ---- Targets: n points [n, 2] ------------------------------------------------------------------------------
def eight_gaussians(n):
    """Eight blobs on a circle."""
    angle = torch.randint(8, (n,)) * (math.pi / 4)
    return 3 * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.2 * torch.randn(n, 2)

def moons(n):
    """Two interlocking half circles."""
    angle, upper = math.pi * torch.rand(n), (torch.rand(n) < 0.5).float() * 2 - 1
    x = torch.stack([angle.cos() - upper * 0.5, upper * (angle.sin() - 0.25)], dim=1)
    return 2 * x + 0.1 * torch.randn(n, 2)

def spiral(n):
    """One and a half turns, of even density."""
    angle = 3 * math.pi * torch.rand(n).sqrt()
    return 0.35 * angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.1 * torch.randn(n, 2)

def checkerboard(n):
    """The black squares of a 4x4 board."""
    column, row = torch.randint(4, (n,)), 2 * torch.randint(2, (n,))
    corner = torch.stack([column, row + column % 2], dim=1)
    return 1.5 * (corner + torch.rand(n, 2) - 2)

TARGETS = {"8gaussians": eight_gaussians, "moons": moons, "spiral": spiral, "checkerboard": checkerboard}

# ---- The flow and the stages -------------------------------------------------------------------------------
class MLP(nn.Module):
    """Velocity v(x, t) in the plane: x [B, 2], t [B] -> [B, 2]; or in more dimensions."""
    def __init__(self, width, dim=2):
        super().__init__()
        sizes = [dim + 8, width, width, width]
        layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, x, t, y=None):
        angle = t[:, None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])  # (B, 4)
        return self.net(torch.cat([x, angle.sin(), angle.cos()], dim=1))

def train_all(draw, seed):
    """Teacher, 2-flow by annealing reflow, and student; the pairs; and the movie of reflow.

    The movie has the 2-flow as it was during its training: a list of (step, beta, network).
    """
    def flow_loss(flow, step):
        data = draw(BATCH)
        return sf.rectified_flow_loss(flow, torch.randn_like(data), data)

    torch.manual_seed(seed)
    teacher, _ = sf.fit(MLP(128), flow_loss, **TRAIN, name="teacher", seed=seed)
    torch.manual_seed(seed)
    noise = torch.randn(N_PAIRS, 2)
    data, _ = sf.sample(teacher, noise, nfe=0)
    movie = []

    def reflow_loss(flow, step):
        i = torch.randint(N_PAIRS, (BATCH,))
        beta = sf.anneal_beta(step, TRAIN["steps"] // 2)
        if step % (TRAIN["steps"] // FRAMES) == 0 and step <= 0.6 * TRAIN["steps"]:
            movie.append((step, beta, copy.deepcopy(flow).requires_grad_(False)))
        return sf.rectified_flow_loss(flow, sf.annealed_noise(noise[i], beta), data[i])

    two_flow, _ = sf.fit(MLP(64), reflow_loss, **TRAIN, name="2-flow", seed=seed)

    def distill_loss(student, step):
        i = torch.randint(N_PAIRS, (BATCH,))
        stored = sf.distillation_loss(student, noise[i], data[i], sf.l2)
        return stored + sf.guidance_loss(student, two_flow, torch.randn(BATCH, 2), sf.l2)

    student = MLP(64)
    student.load_state_dict(two_flow.state_dict())
    student, _ = sf.fit(student, distill_loss, **DISTILL, name="student", seed=seed)
    return {"teacher": teacher, "2-flow": two_flow, "student": student}, (noise, data), movie

def straightness(flow, noise, nfe=20):
    """Mean of |x_1 - x_0 - v(x_t, t)|^2 over elements and Euler's path: 0 if all paths are straight lines."""
    path = torch.stack([x for _, x, _ in sf.euler(flow, noise, nfe=nfe)])  # (nfe + 1, B, 2)
    return (path[-1] - path[0] - (path[1:] - path[:-1]) * nfe).square().mean().item()

@torch.no_grad()
def sliced_wasserstein(a, b, directions=200):
    """Mean over directions of the 1-Wasserstein distance of the projections of two point sets [n, 2]."""
    angle = torch.arange(directions) * (math.pi / directions)
    normal = torch.stack([angle.cos(), angle.sin()])  # (2, directions)
    return ((a @ normal).sort(dim=0)[0] - (b @ normal).sort(dim=0)[0]).abs().mean().item()

# ---- Pictures ----------------------------------------------------------------------------------------------
def draw(axes, title, target, points=None, states=None):
    """The target in grey, and over it points [n, 2], or the states [k, n, 2] of lines from noise to data."""
    axes.clear()
    axes.scatter(*target[:2_000].T, s=3, color="0.85", linewidths=0)
    if points is not None:
        axes.scatter(*points[:1_000].T, s=5, color="#D55E00", linewidths=0)
    if states is not None:
        axes.plot(*states.permute(2, 0, 1), color="#0072B2", lw=1, alpha=0.8)
        axes.scatter(*states[0].T, s=12, color="#E69F00", zorder=3, label="noise, t = 0")
        axes.scatter(*states[-1].T, s=12, color="black", zorder=3, label="data, t = 1")
    axes.set(aspect="equal", xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)

def paths(flow, noise, nfe=50):
    """All states of Euler's steps, [nfe + 1, n, 2]."""
    return torch.stack([x for _, x, _ in sf.euler(flow, noise, nfe=nfe)])

def draw_summary(path, networks, pairs, noise, target):
    """Above, how paths straighten; below, what one step of each network makes of noise."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    grid, lines = figure.subplots(2, 4), torch.stack([x[:50] for x in pairs])
    teacher, two_flow, _ = networks.values()
    above = [
        ("1. random pairs: the lines cross", torch.stack([lines[0], target[:50]])),
        (f"2. so the teacher's paths bend: {straightness(teacher, noise):.3f}", paths(teacher, lines[0])),
        ("3. its pairs: the lines hardly cross", lines),
        (f"4. so the 2-flow's are straight: {straightness(two_flow, noise):.3f}", paths(two_flow, lines[0])),
    ]
    for axes, (title, states) in zip(grid[0], above):
        draw(axes, title, target, states=states)
    grid[0, 0].legend(loc="lower left", fontsize=8)
    for axes, (name, flow) in zip(grid[1], networks.items()):
        made = sf.one_step(flow, noise)
        draw(axes, f"{name}, one step: distance {sliced_wasserstein(made, target):.2f}", target, made)
    draw(grid[1, 3], "the target", target, target)
    figure.savefig(path, dpi=100)

def draw_movie(path, movie, pairs, target):
    """Reflow while it trains: its annealed pairs, the network's paths, and what it makes in one step."""
    figure = Figure(figsize=(7.5, 2.9), layout="constrained")
    panels, (noise, data), fresh = figure.subplots(1, 3), pairs, torch.randn(50, 2)

    def show(k):
        step, beta, flow = movie[min(k, len(movie) - 1)]  # the last one stands still
        annealed = (1 - beta**2) ** 0.5 * noise[:50] + beta * fresh
        draw(panels[0], f"pairs, beta {beta:.2f}", target, states=torch.stack([annealed, data[:50]]))
        panels[0].legend(loc="lower left", fontsize=7)
        draw(panels[1], f"paths after {step:,} steps", target, states=paths(flow, noise[:50]))
        draw(panels[2], "one step", target, sf.one_step(flow, noise[:1_000]))

    FuncAnimation(figure, show, frames=len(movie) + 15).save(path, writer=PillowWriter(fps=8), dpi=85)

def main():
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(description="Every stage of SlimFlow in two dimensions.")
    parser.add_argument("--target", choices=TARGETS, default="moons", help="default: moons")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures; default: .")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    networks, pairs, movie = train_all(TARGETS[args.target], args.seed)
    torch.manual_seed(args.seed + 1)
    noise, target = torch.randn(10_000, 2), TARGETS[args.target](10_000)
    rows = [("", "parameters", "straightness", "100 steps", "one step")]
    for name, flow in networks.items():
        size, bend = sum(p.numel() for p in flow.parameters()), straightness(flow, noise)
        many, one = (sliced_wasserstein(paths(flow, noise, nfe)[-1], target) for nfe in (100, 1))
        rows.append((name, size, f"{bend:.4f}", f"{many:.3f}", f"{one:.3f}"))
    floor = sliced_wasserstein(TARGETS[args.target](10_000), target)
    sf.print_table([*rows, ("two draws of the target", "", "", f"{floor:.3f}", "")])
    print("straightness: 0 if all paths are straight; steps: sliced Wasserstein distance of 10,000 samples")
    draw_summary(args.out / "toy2d.png", networks, pairs, noise, target)
    draw_movie(args.out / "toy2d.gif", movie, pairs, target)

if __name__ == "__main__":
    main()
