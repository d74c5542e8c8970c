"""Your own backbone: gate it, train it, export it, build it, run it. Half a minute on one core.

    python examples/own_backbone.py [OUT.igate]

The lines of `main` outside of the training loop are all that a backbone needs. The frames are synthetic: a bright
square (class 1, one metre away) on a dark floor (class 0, two metres away).
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import nn

from igate_edge import Budget, Depth, Engine, SemanticSegmentation, build, export, interrogate, land, merge
from igate_edge.training.landing import Measure


class MyBackbone(nn.Module):
    """Any CNN that torch.fx can trace; it returns its feature maps, fine to coarse."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(self.unit(3, 16), self.unit(16, 32))
        self.coarse = self.unit(32, 32)

    @staticmethod
    def unit(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        fine = self.fine(image)
        return [fine, self.coarse(fine)]


def scenes(count: int, seed: int) -> tuple[list[np.ndarray], dict[str, torch.Tensor]]:
    """Frames uint8 [64,64,3], and the batch that the network trains on."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 90, (count, 64, 64, 3), dtype=np.uint8)
    square = np.zeros((count, 64, 64), np.int64)
    for frame, mask, (y, x) in zip(frames, square, rng.integers(0, 32, (count, 2)), strict=True):
        frame[y : y + 32, x : x + 32] += 130
        mask[y : y + 32, x : x + 32] = 1
    image = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return list(frames), {"image": image, "semseg": torch.from_numpy(square), "depth": 2.0 - torch.from_numpy(square)}


def main(path: str = "own_backbone.igate", search: int = 50, steps: int = 60, measure: Measure | None = None) -> None:
    torch.manual_seed(0)
    tasks = [SemanticSegmentation("semseg", classes=["floor", "square"]), Depth("depth")]
    net = interrogate(MyBackbone(), tasks, granule=4, example=torch.zeros(1, 3, 64, 64))
    budget = Budget(ratio=1.2)  # 1.2 times the milliseconds of the plain shared net

    groups = [(net.weight_parameters(), 5e-3), (net.mix_parameters(), 1e-2), (net.gate_parameters(), 2e-2)]
    optimizer = torch.optim.Adam([{"params": parameters, "lr": rate} for parameters, rate in groups])
    for step in range(search):  # learn which channels are whose
        loss = net.loss(scenes(8, step)[1])
        optimizer.zero_grad(set_to_none=True)
        (loss + budget(net, step / search)).backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss:.3f}  predicted {budget.price(net).ratio:.2f} of the plain net's time")
    landed = land(net, budget, measure=measure)  # round to what this machine runs fast, and measure that engine
    print(f"the engine takes {landed.share:.0%} of the budget{f' ({landed.note})' if landed.note else ''}")

    merged = merge(net)  # a plain CNN, a little wider; it trains on at a plain net's cost
    optimizer = torch.optim.Adam(merged.weight_parameters(), 5e-3)
    for step in range(steps):
        loss = merged.loss(scenes(8, search + step)[1])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    frames, labels = scenes(32, 1000)
    export(merged, torch.zeros(1, 3, 64, 64), path, calibration=frames)
    report = build(path)
    with Engine.open(path) as engine:
        out = engine(frames[0])
    right = np.mean(out["semseg"] == labels["semseg"][0].numpy())
    error = np.abs(out["depth"] - labels["depth"][0].numpy()).mean()
    print(f"{path}: engine runs in {report.precision}; {right:.0%} of the pixels right, depth off by {error:.2f} m")


if __name__ == "__main__":
    main(*sys.argv[1:2])
