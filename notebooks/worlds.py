"""The plane and the digits as worlds of experiments.py: a teacher, its pairs, and a distance to real data."""

import sys
from functools import cache, partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

import slimflow as sf  # noqa: E402
import toy2d  # noqa: E402

HELD_OUT = 1_024  # pairs on which nothing is trained, the last ones

class Plane:
    """Eight Gaussians in the plane. Distance: sliced Wasserstein's, of 10,000 points."""
    network, draw = staticmethod(partial(toy2d.MLP, 64)), staticmethod(toy2d.TARGETS["8gaussians"])
    D = staticmethod(sf.l2)  # of the distillation
    lr, distill_lr, precise, evaluations = 3e-3, 1e-3, 0, 60  # precise: by rk45, in about so many
    reflow_steps, guided_steps = 4_000, 1_500
    def __init__(self, seed, scale=1.0):
        self.seed, self.scale = seed, scale

        def flow_loss(flow, step):
            data = self.draw(toy2d.BATCH)
            return sf.rectified_flow_loss(flow, torch.randn_like(data), data)

        torch.manual_seed(seed)
        training = toy2d.TRAIN | dict(steps=round(toy2d.TRAIN["steps"] * scale), seed=seed)
        self.teacher, _ = sf.fit(toy2d.MLP(128), flow_loss, **training)
        self.noise, self.fresh = torch.randn(65_536 + HELD_OUT, 2), torch.randn(10_000, 2)
        self.data = torch.cat([sf.sample(self.teacher, z, nfe=0)[0] for z in self.noise.split(1_024)])
        self.target = self.draw(10_000)

    def distances(self, flow, nfe=1):
        made, _ = sf.sample(flow, self.fresh, nfe=nfe)
        return dict(distance=toy2d.sliced_wasserstein(made, self.target))

@cache
def judge():
    """The digits' features, the scans that train, and those that are only compared with."""
    return sf.features_and_images(sf.Run(device="cpu"))

class Digits:
    """The digits. Distance: Frechet's of 5,000 images, as they are and at the real digits' contrast."""
    D, network = staticmethod(sf.huber), staticmethod(partial(sf.UNet, **sf.digits["networks"]["small"]))
    lr, distill_lr, precise, evaluations = 4e-3, 2e-3, 12, 12
    reflow_steps, guided_steps, scale = 4_000, 800, 1.0
    def __init__(self, seed):
        self.seed, n = seed, (8_268 if seed < 3 else 512) + HELD_OUT
        settings = dict(train=dict(seed=seed), pairs=dict(n=n, seed=seed))
        run = sf.Run(out=f"runs/experiments/{seed}", device="cpu", settings=settings)
        sf.make(run, "pairs")
        self.noise, self.data, _ = (torch.cat(x).float() for x in zip(*sf.load_pairs(run, "pairs")))
        self.fresh, self.y = sf.fixed_noise(run, 5_000, seed=4321)

    def distances(self, flow, nfe=1):
        features, _, real = judge()
        made = torch.cat(list(sf.generate(flow, self.fresh, self.y, nfe)))
        stretched, contrast = at_equal_contrast(made, real)
        raw, equal = (sf.frechet_distance(*sf.moments([features(i)]), *sf.moments([features(real)]))
                      for i in (made, stretched))
        return dict(distance=raw, matched=equal, contrast=contrast)

def at_equal_contrast(made, real):
    """Images stretched about their mean to the pixel variance of the real ones; their own share of it."""
    x = sf.to_float(made)
    contrast = (x.var(dim=0).sum() / sf.to_float(real).var(dim=0).sum()).item()
    return sf.to_uint8(x.mean(dim=0) + (x - x.mean(dim=0)) / contrast**0.5), contrast
