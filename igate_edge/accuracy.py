"""How well a bundle's engine does its tasks on labelled frames, in float and in INT8. It runs on the robot."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .contract import OutputSpec
from .metrics import Metric, make_metric
from .runtime.engine import Engine

#: INT8 may cost this share of a task's main metric before it is worth a warning.
MAX_LOSS = 0.01


def int8_losses(tasks: Sequence[OutputSpec], results: Mapping[str, Any], most: float = MAX_LOSS) -> list[str]:
    """One sentence for each task whose main metric is worse in INT8 than in float by more than the share `most`.

    results: {"float": {task: {metric: value}}, "int8": the same}, as a bundle's manifest has it.

    >>> rows = {"float": {"d": {"rmse": 0.50}}, "int8": {"d": {"rmse": 0.52}}}
    >>> int8_losses([OutputSpec("d", "depth", 1)], rows)
    ["task 'd': INT8 costs 4.0% of rmse (0.5 in float, 0.52 in INT8)"]
    """
    sentences = []
    for spec in tasks:
        before, after = (float(results[which].get(spec.name, {}).get(spec.metric, 0)) for which in ("float", "int8"))
        lost = (before - after if spec.higher_is_better else after - before) / max(abs(before), 1e-9)
        if not lost <= most:
            values = f"{before:.4g} in float, {after:.4g} in INT8"
            sentences.append(f"task {spec.name!r}: INT8 costs {lost:.1%} of {spec.metric} ({values})")
    return sentences


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
