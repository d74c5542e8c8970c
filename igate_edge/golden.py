"""Golden frames: real frames with the outputs that the network gave when it was packaged.

Whoever runs the network asks here whether it still gives them, in the terms of each task: INT8 runtimes never agree bit
by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .bundle import Bundle
from .contract import OutputSpec, Preprocess
from .errors import CheckFailed, DataError
from .runtime.postprocess import decode
from .runtime.preprocess import to_input

#: Float outputs may differ by this share of the task's largest output: other CPUs sum in another order, nothing else.
FLOAT_LIMIT = 1e-4
#: The INT8 limit is this many times the gap of INT8 to float when packaged, between floor and ceiling of the kind.
MARGIN = 2.0
#: Per kind: what is measured (worst frame), the smallest limit, and the largest: INT8 that was further from float when
#: it was packaged is of no use, whatever a manifest says.
MEASURES: dict[str, tuple[str, float, float]] = {
    "semseg": ("share of pixels of another class", 0.02, 0.10),
    "depth": ("mean relative error of metres", 0.02, 0.10),
    "normals": ("mean angle in degrees", 2.0, 10.0),
    "edges": ("mean difference of probability", 0.02, 0.10),
    "classification": ("largest difference of probability", 0.05, 0.20),
    "multilabel": ("largest difference of probability", 0.05, 0.20),
}


@dataclass(frozen=True)
class GoldenResult:
    """One task's check: `value` is the worst frame's distance to the stored output in the terms of `measure`."""

    task: str
    precision: str
    measure: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """False also when the value is NaN."""
        return bool(self.value <= self.limit)

    def as_json(self) -> dict[str, Any]:
        value = self.value if np.isfinite(self.value) else None
        return {**asdict(self), "value": value, "passed": self.passed}

    def __str__(self) -> str:
        word = "as packaged" if self.passed else "NOT as packaged"
        return (
            f"task {self.task!r} ({self.precision}) is {word}: {self.measure} {self.value:.4g}, limit {self.limit:.4g}"
        )


def run_frames(
    run: Callable[[np.ndarray], Mapping[str, np.ndarray]], frames: np.ndarray, preprocess: Preprocess
) -> dict[str, np.ndarray]:
    """Run uint8 frames [N,h,w,3] one by one (`run`: float32 [1,3,h,w] -> raw outputs); gives float32 [N,...]."""
    rows = [run(to_input(frame, preprocess)) for frame in frames]
    return {name: np.concatenate([np.asarray(row[name], np.float32) for row in rows]) for name in rows[0]}


def gap(spec: OutputSpec, ours: np.ndarray, stored: np.ndarray, size: tuple[int, int]) -> float:
    """Distance of raw outputs [N,...] in decoded terms (see MEASURES), worst frame; inf where anything is not finite.

    >>> logits = np.array([[[[2.0, 2.0]], [[1.0, 1.0]]]])
    >>> gap(OutputSpec("s", "semseg", 2), logits, logits[:, ::-1] * [1, 0], (1, 2))
    0.5
    """
    if ours.shape != stored.shape or not np.isfinite(ours).all():
        return float("inf")
    pairs = ((decode(spec, a, size), decode(spec, b, size)) for a, b in zip(ours, stored, strict=True))
    return float(max(distance(spec.kind, a, b) for a, b in pairs))


def distance(kind: str, a: np.ndarray, b: np.ndarray) -> float:
    """Distance of two decoded answers of one frame, in the terms of MEASURES."""
    if kind == "semseg":
        return float(np.mean(a != b))
    if kind == "depth":
        return float(np.mean(np.abs(a - b) / b))
    if kind == "normals":
        return float(np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1))).mean())
    return float(np.abs(a - b).mean() if kind == "edges" else np.abs(a - b).max())


def tolerances(
    specs: Sequence[OutputSpec],
    floats: Mapping[str, np.ndarray],
    int8s: Mapping[str, np.ndarray],
    size: tuple[int, int],
) -> dict[str, dict[str, Any]]:
    """Per task: what is measured, the gap between INT8 and float when packaged, and the limit that later checks use.

    Raises DataError when an output is not finite.
    """
    table = {}
    for spec in specs:
        measure, floor, ceiling = MEASURES[spec.kind]
        packaged = gap(spec, int8s[spec.name], floats[spec.name], size)
        if not np.isfinite(packaged):
            fix = "check the weights and the calibration frames"
            raise DataError(f"task {spec.name!r} gives NaN or infinity", "on the golden frames, float or INT8", fix)
        limit = min(max(floor, MARGIN * packaged), ceiling)
        table[spec.name] = {"measure": measure, "packaged": packaged, "limit": limit}
    return table


def too_far(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence for each task whose INT8 form was further from float when packaged than any check lets pass."""
    return [
        f"INT8 of task {name!r} is no use, engines will run in float: {row['measure']} {row['packaged']:.3g} against "
        f"float, at most {row['limit']:.3g}; calibrate on more frames or other ones"
        for name, row in table.items()
        if row["packaged"] > row["limit"]
    ]


def check(
    bundle: Bundle,
    run: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    precision: str,
    tasks: Sequence[str] | None = None,
) -> list[GoldenResult]:
    """Run the golden frames and compare with the stored outputs of `precision` ("float" or "int8"), per task."""
    outputs = run_frames(run, bundle.golden["frame"], bundle.preprocess)
    size = bundle.preprocess.height, bundle.preprocess.width
    results = []
    for spec in bundle.tasks:
        if tasks is not None and spec.name not in tasks:
            continue
        stored, ours = bundle.golden[f"{precision}/{spec.name}"], outputs.get(spec.name, np.empty(0))
        if precision == "float":
            measure, limit = "largest difference as a share of the largest output", FLOAT_LIMIT
            value = _relative(ours, stored)
        else:
            measure, _, ceiling = MEASURES[spec.kind]
            limit = min(float(bundle.manifest["tolerances"][spec.name]["limit"]), ceiling)
            value = gap(spec, ours, stored, size)
            packaged = gap(spec, stored, bundle.golden[f"float/{spec.name}"], size)
            if packaged > limit and value <= limit:
                # Faithful to what was stored, which itself was not what the network computes.
                measure, value = f"{measure}, INT8 to float when packaged", packaged
        results.append(GoldenResult(spec.name, precision, measure, value, limit))
    return results


def _relative(ours: np.ndarray, stored: np.ndarray) -> float:
    if ours.shape != stored.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - stored).max() / max(float(np.abs(stored).max()), 1e-12))


def require(results: Sequence[GoldenResult], what: str) -> None:
    """Raise CheckFailed that names every task which no longer computes what was packaged."""
    failed = [str(result) for result in results if not result.passed]
    if failed:
        fix = "do not use this network: copy the bundle again, then try another version of the runtime"
        raise CheckFailed(f"{what} does not compute what was packaged", "; ".join(failed), fix)
