"""How well a bundle's engine does its tasks on labelled frames, in float and in INT8. It runs on the robot."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .metrics import Metric, make_metric
from .runtime.engine import Engine


def accuracy(path: Path, frames: Iterable[Mapping[str, Any]], precision: str) -> dict[str, dict[str, float]]:
    """Metrics per task over frames {"image": uint8 [H,W,3], TARGET: label, ...}; a task without its label is skipped.

    Outputs are compared at the frame's own size, pixels pooled over the set. Raises what `Engine.open` raises.
    """
    metrics: dict[str, Metric] = {}
    with tempfile.TemporaryDirectory() as cache, Engine.open(path, precision=precision, cache_dir=cache) as engine:
        targets = {spec.name: spec.target or spec.name for spec in engine.tasks}
        for frame in frames:
            outputs = engine(frame["image"])
            for spec in engine.tasks:
                if targets[spec.name] in frame:
                    metrics.setdefault(spec.name, make_metric(spec)).update(
                        outputs[spec.name], frame[targets[spec.name]]
                    )
    return {name: metric.compute() for name, metric in metrics.items()}
