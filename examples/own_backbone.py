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

from igate_edge import Depth, Engine, HardFraction, SemanticSegmentation, build, export, fix_fraction, interrogate


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


def main(path: str = "own_backbone.igate", search: int = 50, steps: int = 80) -> None:
    torch.manual_seed(0)
    tasks = [SemanticSegmentation("semseg", classes=["floor", "square"]), Depth("depth")]
    net = interrogate(MyBackbone(), tasks, granule=4, example=torch.zeros(1, 3, 64, 64))
    budget = HardFraction(0.25)  # a quarter of the channels may be a task's own

    groups = [(net.weight_parameters(), 5e-3), (net.mix_parameters(), 1e-2), (net.gate_parameters(), 2e-2)]
    optimizer = torch.optim.Adam([{"params": parameters, "lr": rate} for parameters, rate in groups])
    for step in range(steps):
        if step == search:  # which channels are whose is settled: exactly a quarter, then the weights settle
            fix_fraction(net, 0.25)
            net.freeze_gates()
        loss = net.loss(scenes(8, step)[1])
        optimizer.zero_grad(set_to_none=True)
        (loss + budget(net)).backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            own = ", ".join(f"{task} {fraction:.0%}" for task, fraction in net.hard_fractions().items())
            print(f"step {step:3d}  loss {loss:.3f}  own channels: {own}")

    frames, labels = scenes(32, 1000)
    export(net, torch.zeros(1, 3, 64, 64), path, calibration=frames)
    report = build(path)
    with Engine.open(path) as engine:
        out = engine(frames[0])
    right = np.mean(out["semseg"] == labels["semseg"][0].numpy())
    error = np.abs(out["depth"] - labels["depth"][0].numpy()).mean()
    print(f"{path}: engine runs in {report.precision}; {right:.0%} of the pixels right, depth off by {error:.2f} m")


if __name__ == "__main__":
    main(*sys.argv[1:2])
