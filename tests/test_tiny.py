"""The whole chain on the smallest problem, in ten seconds: read this file first.

A two-block backbone and two tasks: gated, trained for 20 steps, exported, pruned, quantised, bundled, built, run.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from igate_edge import Depth, Engine, HardFraction, SemanticSegmentation, build, export, interrogate
from igate_edge.compiler import graph, prune
from igate_edge.contract import Preprocess
from igate_edge.gating.export import to_onnx
from igate_edge.verify import verify


class Backbone(nn.Module):
    """Two convolutions at strides 2 and 4; any traceable CNN does."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.two(self.one(x))]


def batch(count: int, seed: int) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Frames with a bright square: its pixels are class 1 and one metre away, all others class 0 and two metres."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 90, (count, 32, 32, 3), dtype=np.uint8)
    label = np.zeros((count, 32, 32), np.int64)
    for frame, mask, (y, x) in zip(frames, label, rng.integers(0, 16, (count, 2)), strict=True):
        frame[y : y + 16, x : x + 16] += 130
        mask[y : y + 16, x : x + 16] = 1
    image = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return frames, {"image": image, "semseg": torch.from_numpy(label), "depth": torch.from_numpy(2.0 - label).float()}


def test_the_whole_chain(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tasks = [SemanticSegmentation("semseg", classes=2), Depth("depth")]
    net = interrogate(Backbone(), tasks, granule=4, example=torch.zeros(1, 3, 32, 32))
    budget = HardFraction(0.25)
    weights = torch.optim.AdamW(net.weight_parameters(), lr=1e-2)
    gates = torch.optim.Adam(net.gate_parameters(), lr=0.1)
    losses = []
    for step in range(20):
        loss = net.loss(batch(8, step)[1])
        weights.zero_grad(set_to_none=True)
        gates.zero_grad(set_to_none=True)
        (loss + budget(net)).backward()
        weights.step()
        gates.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert all(fraction < 1 for fraction in net.hard_fractions().values()), "the gates moved"

    frames, _ = batch(8, 99)
    path = tmp_path / "tiny.igate"
    export(
        net,
        torch.zeros(1, 3, 32, 32),
        path,
        preprocess=Preprocess(32, 32),
        calibration=list(frames),
        golden=list(frames[:4]),
    )

    gated = graph.load(to_onnx(net, Preprocess(32, 32)))
    assert "Where" in {node.op_type for node in gated.graph}
    assert "Where" not in {node.op_type for node in prune.prune(gated).model.graph}

    report = build(path, cache_dir=tmp_path / "cache", precision="int8")
    assert report.precision == "int8"
    assert verify(path).passed
    with Engine.open(path, cache_dir=tmp_path / "cache", precision="int8") as engine:
        out = engine(frames[5])
    assert out["semseg"].shape == (32, 32) and out["semseg"].dtype == np.uint8
    assert out["depth"].shape == (32, 32) and np.isfinite(out["depth"]).all()
    agreement = np.mean(out["semseg"] == batch(8, 99)[1]["semseg"][5].numpy())
    assert agreement > 0.8, f"only {agreement:.0%} of the pixels are right"
