"""A latency table that was not measured: round numbers with a staircase at 16 channels, for tests."""

from __future__ import annotations

import itertools
from typing import Any

from igate_edge.compiler.latency import LatencyTable, from_json

PIXELS, CHANNELS = (1, 4096), (4, 16, 512)
LAUNCH, PER_MAC, PER_ELEMENT = 0.004, 2e-8, 1e-6


def table(step: int = 16, **changes: Any) -> LatencyTable:
    """Milliseconds: a launch, and a part for each multiply-accumulate; counts between multiples of `step` cost the next
    multiple's."""
    kinds = ("unsigned", "loose", "signed", "output")
    grids = {f"{k}x{k} {kind}": _grid(k * k, step) for k, kind in itertools.product((1, 3), kinds)}
    grids["3x3 depthwise"] = {**_grid(9, step), "cin": [1], "ms": [[_line(9, p, 1)] for p in PIXELS]}
    document = {
        "format": "igate latency table",
        "version": 1,
        "device": {"cpu": "none"},
        "backend": {"name": "onnxruntime", "version": "0", "provider": "CPUExecutionProvider"},
        "threads": 1,
        "precision": "int8",
        "date": "2026-01-01",
        "step": step,
        "fit": {"cin": 1, "cout": 1},
        "conv": grids,
        "stride": {"3x3": 1.0, "1x1": 1.0},
        "ops": {op: {"elements": [1, 1_000_000], "ms": [PER_ELEMENT, 1.0]} for op in ("Mul", "Clip")},
        "overhead_ms": 0.0,
        "anchors": {"merged": 1.0, "split": 1.0},
        "error": 0.05,
        "spread": 0.01,
    }
    return from_json({**document, **changes})


def _grid(taps: int, step: int) -> dict[str, Any]:
    ms = [[_line(taps, pixels, cin) for cin in CHANNELS] for pixels in PIXELS]
    return {"pixels": PIXELS, "cin": CHANNELS, "cout": CHANNELS, "ms": ms, "tail": [1.0] * (step - 1)}


def _line(taps: int, pixels: int, cin: int) -> list[float]:
    return [LAUNCH + PER_MAC * taps * pixels * cin * cout for cout in CHANNELS]
