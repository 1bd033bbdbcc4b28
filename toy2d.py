"""Straightening in two dimensions: the stages of SlimFlow as paths from a Gaussian to a shape you can see.

python toy2d.py [--target 8gaussians|moons|spiral|checkerboard]

Draws toy2d.png (random pairs, then the paths of each network, side by side) and toy2d.gif (the same, moving).
Prints how straight the paths are and how far the samples are from the target.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import nn

import slimflow as sf

N_PAIRS, BATCH = 20_000, 512
TRAIN = dict(steps=4_000, lr=3e-3, warmup=50, decay=0.5)
DISTILL = dict(steps=1_500, lr=1e-3, warmup=50, decay=0.5)


# ------------------------------------------------------------------------------------------------------------
# Targets: n points [n, 2]

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


# ------------------------------------------------------------------------------------------------------------
# The flow and the four stages

class MLP(nn.Module):
    """Velocity v(x, t) in the plane: x [B, 2], t [B] -> [B, 2]."""

    def __init__(self, width):
        super().__init__()
        sizes = [2 + 8, width, width, width]
        layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x, t, y=None):
        angle = t[:, None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])  # (B, 4)
        return self.net(torch.cat([x, angle.sin(), angle.cos()], dim=1))

def train_all(draw, seed):
    """The teacher, the small 2-rectified flow by annealing reflow, and the student distilled from it."""

    def flow_loss(flow, step):
        data = draw(BATCH)
        return sf.rectified_flow_loss(flow, torch.randn_like(data), data)

    torch.manual_seed(seed)
    teacher, _ = sf.fit(MLP(128), flow_loss, **TRAIN, name="teacher", seed=seed)
    torch.manual_seed(seed)
    noise = torch.randn(N_PAIRS, 2)
    data, _ = sf.sample(teacher, noise, nfe=0)

    def reflow_loss(flow, step):
        i = torch.randint(N_PAIRS, (BATCH,))
        beta = sf.anneal_beta(step, TRAIN["steps"] // 3)
        return sf.rectified_flow_loss(flow, sf.annealed_noise(noise[i], beta), data[i])

    two_flow, _ = sf.fit(MLP(64), reflow_loss, **TRAIN, name="2-flow", seed=seed)

    def distill_loss(student, step):
        i = torch.randint(N_PAIRS, (BATCH,))
        stored = sf.distillation_loss(student, noise[i], data[i], sf.l2)
        return stored + sf.guidance_loss(student, two_flow, torch.randn(BATCH, 2), sf.l2)

    student = MLP(64)
    student.load_state_dict(two_flow.state_dict())
    student, _ = sf.fit(student, distill_loss, **DISTILL, name="student", seed=seed)
    return teacher, two_flow, student

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


# ------------------------------------------------------------------------------------------------------------
# Pictures

COLOURS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#666666"]

def sector(points):
    """In which eighth of the plane each point [n, 2] lies, 0 to 7: for the eight Gaussians, its blob."""
    return (torch.atan2(points[:, 1], points[:, 0]) / (math.pi / 4)).round().long() % 8

def axes_row(target, titles):
    """A figure with one square panel for each title, the target in grey behind it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(titles), 3.9), layout="constrained")
    panels = figure.subplots(1, len(titles))
    for axes, title in zip(panels, titles):
        axes.scatter(*target[:2000].T, s=2, color="0.8", linewidths=0)
        axes.set(title=title, aspect="equal", xlim=(-4, 4), ylim=(-4, 4), xticks=[], yticks=[])
    return figure, panels

def draw_paths(path, stages, target):
    """The paths of 100 particles in each stage: (title, states [k, n, 2])."""
    figure, panels = axes_row(target, [title for title, _ in stages])
    for axes, (_, states) in zip(panels, stages):
        axes.plot(*states[:, :100].permute(2, 0, 1), color="#0072B2", lw=0.8, alpha=0.7)
        axes.scatter(*states[0, :100].T, s=8, color="#E69F00", zorder=3, label="noise, t = 0")
        axes.scatter(*states[-1, :100].T, s=8, color="black", zorder=3, label="data, t = 1")
    panels[0].legend(loc="lower left", fontsize=8)
    figure.savefig(path, dpi=110)

def draw_particles(path, stages, target, frames=40):
    """The particles of each stage, moving from t = 0 to t = 1, in the colour of their end's eighth."""
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure, panels = axes_row(target, [title for title, _ in stages])
    dots = []
    for axes, (_, states) in zip(panels, stages):
        dots.append(axes.scatter(*states[0, :600].T, s=5, c=[COLOURS[k] for k in sector(states[-1, :600])]))
    clock = panels[0].text(-3.8, -3.8, "")

    def show(frame):
        u = min(frame / (frames - 10), 1)  # the last frames stand still
        for dot, (_, states) in zip(dots, stages):
            i = u * (len(states) - 1)
            k = min(int(i), len(states) - 2)
            dot.set_offsets(torch.lerp(states[k], states[k + 1], i - k)[:600])
        clock.set_text(f"t = {u:.2f}")
        return [*dots, clock]

    FuncAnimation(figure, show, frames=frames).save(path, writer=PillowWriter(fps=15), dpi=60)

def main():
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(description="The stages of SlimFlow in two dimensions.")
    parser.add_argument("--target", choices=TARGETS, default="8gaussians", help="default: 8gaussians")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures; default: .")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    teacher, two_flow, student = train_all(TARGETS[args.target], args.seed)
    torch.manual_seed(args.seed + 1)
    noise, target = torch.randn(10_000, 2), TARGETS[args.target](10_000)
    stages = [("random pairs: the lines cross", torch.stack([noise, target]))]
    rows = [("", "parameters", "straightness", "evaluations", "distance", "in 1 step")]
    for name, flow, steps in (("teacher", teacher, 100), ("2-flow", two_flow, 100), ("student", student, 1)):
        states = torch.stack([x for _, x, _ in sf.euler(flow, noise, nfe=steps)])
        many, one = (sliced_wasserstein(x, target) for x in (states[-1], sf.one_step(flow, noise)))
        size, bend = sum(p.numel() for p in flow.parameters()), straightness(flow, noise)
        rows.append((name, size, f"{bend:.4f}", steps, f"{many:.3f}", f"{one:.3f}"))
        stages.append((f"{name}: {steps} Euler step{'s' * (steps > 1)}", states))
    floor = sliced_wasserstein(TARGETS[args.target](10_000), target)
    sf.print_table([*rows, ("floor: two draws of the target", "", "", "", f"{floor:.3f}", "")])
    print("distances: sliced Wasserstein, of 10,000 samples")
    draw_paths(args.out / "toy2d.png", stages, target)
    draw_particles(args.out / "toy2d.gif", stages, target)

if __name__ == "__main__":
    main()
