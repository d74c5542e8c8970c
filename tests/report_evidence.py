"""A bundle's evidence without a network: three tasks on small made-up frames, to test what is drawn and written."""

from __future__ import annotations

from typing import Any

import numpy as np

from igate_edge.bench import BenchReport, BenchRow
from igate_edge.builder import BuildReport
from igate_edge.bundle import Bundle
from igate_edge.contract import OutputSpec, Preprocess
from igate_edge.reports.gallery import Shown
from igate_edge.reports.report import Evidence
from igate_edge.verify import VerifyReport

SIZE = (24, 32)
SPECS = (
    OutputSpec("semseg", "semseg", 3, ("floor", "table", "cup <hot>")),
    OutputSpec("depth", "depth", 1, units="m"),
    OutputSpec("normals", "normals", 3),
)
OPEN = {"semseg": "1100", "depth": "0100", "normals": "0000"}
SITES = [
    {"name": "stem", "channels": 4, "granule": 1, "tie": None, "open": OPEN},
    {"name": "layer1.0.out", "channels": 4, "granule": 1, "tie": "layer1", "open": dict.fromkeys(OPEN, "0000")},
]


def row(name: str, label: str, macs: int, ms: float) -> BenchRow:
    ratio = ms / 2.0
    times: Any = {"ms": ms, "ms_quartiles": (ms, ms), "ratio": ratio, "ratio_interval": (ratio, ratio), "spread": 0.0}
    return BenchRow(
        name, label, macs, macs // 10, int8_share=1.0, ratio_quartiles=(ratio, ratio), meaningful=True, note="", **times
    )


def make_frames() -> list[Shown]:
    """Four frames: depth is off by 0.5 m everywhere, the first row of the classes is wrong, normals are right."""
    height, width = SIZE
    rng = np.random.default_rng(0)
    shown = []
    for _ in range(4):
        classes = np.repeat((np.arange(width) * 3 // width)[None].astype(np.uint8), height, axis=0)
        metres = np.linspace(1, 3, height, dtype=np.float32)[:, None] * np.ones(width, np.float32)
        normals = np.zeros((height, width, 3), np.float32)
        normals[..., 1] = -1
        label = {"semseg": classes, "depth": metres, "normals": normals}
        predicted = {"semseg": classes.copy(), "depth": metres + 0.5, "normals": normals}
        predicted["semseg"][0] = 0
        shown.append(
            Shown(rng.integers(0, 256, (height, width, 3), np.uint8), dict(label), dict(predicted), dict(predicted))
        )
    return shown


def make_evidence() -> Evidence:
    (height, width), shown = SIZE, make_frames()
    manifest = {
        "tasks": [spec.as_json() for spec in SPECS],
        "preprocess": Preprocess(height, width).as_json(),
        "form": "gated",
        "opset": 18,
        "gates": SITES,
        "created_by": "igate_edge 0.1.0",
        "calibration": {"count": 32},
        "budget": {"own_channels": 0.25},
        "training": {"backbone": "resnet18", "seed": 0},
        "results": None,
    }
    bundle = Bundle(manifest, b"", {}, b"", {"frame": np.stack([s.frame for s in shown])}, "ab" * 32)
    cost = {
        "ours": {"macs": 1500, "params": 150},
        "plain": {"macs": 1000, "params": 100},
        "separate": {"macs": 3000, "params": 300},
    }
    device = {"cpu": "Test CPU", "machine": "x86_64", "cores": 2}
    golden = [
        {"task": s.name, "precision": "int8", "measure": "distance", "value": 0.1, "limit": 0.2, "passed": True}
        for s in SPECS
    ]
    build = BuildReport(
        bundle="made-up.igate", seal=bundle.seal, form="gated", backend="onnxruntime", version="1.32", threads=1,
        tasks=[s.name for s in SPECS], precision="int8", reason="INT8 is faster: INT8 3.00 ms, float 5.00 ms",
        cached=False,
        key="k", path="", seconds={"layout": 0.1}, cost=cost, pruning={}, coverage={"int8_conv_macs_share": 0.97},
        timing={}, golden=golden, lint=[], device=device,
        warnings=["pruning stopped at Loop node7: all its channels are kept"],
    )  # fmt: skip
    verify = VerifyReport("made-up.igate", bundle.seal, {}, golden, lint=[], warnings=[], problems=[], passed=True)
    rows = [
        row("ours", "ours, INT8", 1500, 3.0),
        row("ours-float", "ours, float", 1500, 5.0),
        row("plain", "plain shared net, INT8", 1000, 2.0),
        row("separate", "3 separate nets, INT8", 3000, 6.0),
    ]
    pair = {
        "ratio": 2.0,
        "interval": (2.0, 2.0),
        "quartiles": (2.0, 2.0),
        "spread": 0.0,
        "meaningful": True,
        "note": "",
    }
    bench = BenchReport("made-up.igate", bundle.seal, 40, 1, True, device, rows, pair, [])
    return Evidence("made-up.igate", 2_500_000, bundle, build, verify, bench, shown)
