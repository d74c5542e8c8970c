"""Task metrics in numpy: sums over all valid pixels of a whole set, divided once, so batch size cannot change them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .contract import OutputSpec
from .errors import DataError, InputError

ANGLE_BINS = 18000  # of 0.01 degree: the resolution of the median
EDGE_THRESHOLDS = 100


class Metric(Protocol):
    """A streaming metric of one task."""

    def update(self, predicted: np.ndarray, label: np.ndarray) -> None:
        """Add decoded predictions and their labels: one frame, or several stacked along a first axis."""

    def compute(self) -> dict[str, float]:
        """All values of this kind, `spec.metric` among them; NaN while no valid label was seen."""


class SemsegMetric:
    """miou (mean over classes present in label or prediction), pixel_accuracy, iou/<class>."""

    def __init__(self, spec: OutputSpec) -> None:
        self._spec = spec
        self._counts = np.zeros((spec.channels, spec.channels), np.int64)

    def update(self, predicted: np.ndarray, label: np.ndarray) -> None:
        predicted, label = _arrays(self._spec, predicted, label)
        _same(self._spec, predicted.shape, label.shape)
        valid = label != self._spec.ignore
        truth, guess, size = label[valid].astype(np.int64), predicted[valid].astype(np.int64), self._spec.channels
        if truth.size and (min(truth.min(), guess.min()) < 0 or max(truth.max(), guess.max()) >= size):
            evidence = f"labels {truth.min()}..{truth.max()}, predictions up to {guess.max()}, {size} classes"
            raise DataError(f"task {self._spec.name!r}: a class is out of range", evidence, "check the class list")
        self._counts += np.bincount(truth * size + guess, minlength=size * size).reshape(size, size)

    def compute(self) -> dict[str, float]:
        hit = np.diag(self._counts).astype(np.float64)
        union = self._counts.sum(0) + self._counts.sum(1) - hit
        iou = _divide(hit, union)
        seen = union > 0
        names = self._spec.classes or tuple(str(i) for i in range(self._spec.channels))
        total = self._counts.sum()
        return {
            "miou": float(iou[seen].mean()) if seen.any() else math.nan,
            "pixel_accuracy": float(hit.sum() / total) if total else math.nan,
            **{f"iou/{name}": float(value) for name, value in zip(names, iou, strict=True)},
        }


class DepthMetric:
    """rmse in metres, abs_rel, delta1 (share within a factor of 1.25). Label invalid: 0, negative, NaN, inf."""

    def __init__(self, spec: OutputSpec) -> None:
        self._spec, self._sums, self._count = spec, np.zeros(3), 0

    def update(self, predicted: np.ndarray, label: np.ndarray) -> None:
        predicted, label = _arrays(self._spec, predicted, label)
        _same(self._spec, predicted.shape, label.shape)
        valid = np.isfinite(label) & (label > 0)
        truth, guess = label[valid].astype(np.float64), predicted[valid].astype(np.float64)
        error = guess - truth
        ratio = np.maximum(guess / truth, truth / np.maximum(guess, 1e-12))
        self._sums += [(error**2).sum(), (np.abs(error) / truth).sum(), (ratio < 1.25).sum()]
        self._count += truth.size

    def compute(self) -> dict[str, float]:
        square, relative, inside = _divide(self._sums, np.full(3, self._count))
        return {"rmse": float(np.sqrt(square)), "abs_rel": float(relative), "delta1": float(inside)}


class NormalsMetric:
    """mean_angle and median_angle in degrees, within_11, within_22, within_30 (shares under 11.25, 22.5, 30 degrees).

    Predicted [...,H,W,3]; label [...,H,W,3] or [...,3,H,W], invalid = zero vector or NaN.
    """

    def __init__(self, spec: OutputSpec) -> None:
        self._spec, self._sums, self._count = spec, np.zeros(4), 0
        self._bins = np.zeros(ANGLE_BINS, np.int64)

    def update(self, predicted: np.ndarray, label: np.ndarray) -> None:
        predicted, label = _arrays(self._spec, predicted, label)
        if label.shape != predicted.shape and label.ndim >= 3:
            label = np.moveaxis(label, -3, -1)
        _same(self._spec, predicted.shape, label.shape)
        length = np.linalg.norm(label.astype(np.float64), axis=-1)
        valid = np.isfinite(length) & (length > 0.5)
        truth, guess = label[valid].astype(np.float64), predicted[valid].astype(np.float64)
        lengths = np.maximum(np.linalg.norm(truth, axis=-1) * np.linalg.norm(guess, axis=-1), 1e-12)
        angle = np.degrees(np.arccos(np.clip((truth * guess).sum(-1) / lengths, -1, 1)))
        self._sums += [angle.sum(), (angle < 11.25).sum(), (angle < 22.5).sum(), (angle < 30).sum()]
        self._count += angle.size
        index = np.minimum((angle * (ANGLE_BINS / 180)).astype(np.int64), ANGLE_BINS - 1)
        self._bins += np.bincount(index, minlength=ANGLE_BINS)

    def compute(self) -> dict[str, float]:
        mean, eleven, twenty_two, thirty = _divide(self._sums, np.full(4, self._count))
        middle = int(np.searchsorted(np.cumsum(self._bins), self._count / 2))
        median = (middle + 0.5) * 180 / ANGLE_BINS if self._count else math.nan
        return {
            "mean_angle": float(mean),
            "median_angle": median,
            "within_11": float(eleven),
            "within_22": float(twenty_two),
            "within_30": float(thirty),
        }


class EdgesMetric:
    """f1 at probability 0.5, and ods_f1: the best over 100 thresholds for the whole set (no matching tolerance)."""

    def __init__(self, spec: OutputSpec) -> None:
        self._spec = spec
        self._bins = np.zeros((2, EDGE_THRESHOLDS), np.int64)
        self._half = np.zeros(3, np.int64)

    def update(self, predicted: np.ndarray, label: np.ndarray) -> None:
        predicted, label = _arrays(self._spec, predicted, label)
        _same(self._spec, predicted.shape, label.shape)
        valid = label != self._spec.ignore
        edge, probability = label[valid].astype(bool), predicted[valid].astype(np.float64)
        index = np.clip((probability * EDGE_THRESHOLDS).astype(np.int64), 0, EDGE_THRESHOLDS - 1)
        for side in (0, 1):
            self._bins[side] += np.bincount(index[edge == bool(side)], minlength=EDGE_THRESHOLDS)
        found = probability >= 0.5
        self._half += [(found & edge).sum(), found.sum(), edge.sum()]

    def compute(self) -> dict[str, float]:
        above = self._bins[:, ::-1].cumsum(1)
        curve = _divide(2.0 * above[1], above.sum(0) + self._bins[1].sum())
        hit, found, edges = self._half
        return {"f1": 2 * hit / (found + edges) if found + edges else math.nan, "ods_f1": float(np.max(curve))}


class ClassificationMetric:
    """accuracy of the most probable class. Predicted probabilities [K] or [N,K]; label int, -1 = ignored."""

    def __init__(self, spec: OutputSpec) -> None:
        self._spec, self._hits, self._count = spec, 0, 0

    def update(self, predicted: np.ndarray, label: np.ndarray) -> None:
        predicted, label = _arrays(self._spec, predicted, label)
        _same(self._spec, predicted.shape, (*label.shape, self._spec.channels))
        valid = label != self._spec.ignore
        self._hits += int((predicted.argmax(-1)[valid] == label[valid]).sum())
        self._count += int(valid.sum())

    def compute(self) -> dict[str, float]:
        return {"accuracy": self._hits / self._count if self._count else math.nan}


class MultiLabelMetric:
    """balanced_accuracy: (true-positive + true-negative rate) / 2 at 0.5, mean over labels that have both answers."""

    def __init__(self, spec: OutputSpec) -> None:
        self._spec = spec
        self._counts = np.zeros((spec.channels, 2, 2), np.int64)  # label, truth, prediction

    def update(self, predicted: np.ndarray, label: np.ndarray) -> None:
        predicted, label = _arrays(self._spec, predicted, label)
        _same(self._spec, predicted.shape, label.shape)
        found, valid = predicted >= 0.5, np.isfinite(label)
        for truth in (0, 1):
            for guess in (0, 1):
                cell = valid & (label == truth) & (found == bool(guess))
                self._counts[:, truth, guess] += cell.reshape(-1, self._spec.channels).sum(0)

    def compute(self) -> dict[str, float]:
        totals = self._counts.sum(2)
        rates = _divide(self._counts[:, (0, 1), (0, 1)].astype(np.float64), totals)
        both = (totals > 0).all(1)
        return {"balanced_accuracy": float(rates[both].mean()) if both.any() else math.nan}


def make_metric(spec: OutputSpec) -> Metric:
    """The metric of this task's kind.

    >>> metric = make_metric(OutputSpec("depth", "depth", 1))
    >>> metric.update(np.array([[2.0, 2.0]]), np.array([[1.0, 0.0]]))
    >>> metric.compute()["rmse"]
    1.0
    """
    kinds: dict[str, type] = {
        "semseg": SemsegMetric,
        "depth": DepthMetric,
        "normals": NormalsMetric,
        "edges": EdgesMetric,
        "classification": ClassificationMetric,
        "multilabel": MultiLabelMetric,
    }
    return kinds[spec.kind](spec)


def delta_mtl(values: Mapping[str, Any], single: Mapping[str, Any], specs: Sequence[OutputSpec]) -> float:
    """Mean relative gain over single-task nets in %, positive = better (method.md section 7's formula).

    `values` and `single`: task name -> its main metric, or the dict that `compute` gave.
    Raises InputError when a task is missing.

    >>> specs = [OutputSpec("s", "semseg", 2), OutputSpec("d", "depth", 1)]
    >>> round(delta_mtl({"s": 44, "d": 0.9}, {"s": 40, "d": 1.0}, specs), 6)
    10.0
    """
    gains = []
    if not specs:
        raise InputError("no task to compare", "specs is empty", "pass the bundle's tasks")
    for spec in specs:
        new, old = (_main(side, spec) for side in (values, single))
        if not old:
            evidence = f"its {spec.metric} is {old}"
            fix = "a relative gain over nothing means nothing: train the single-task net longer"
            raise InputError(f"the single-task net of {spec.name!r} cannot be compared with", evidence, fix)
        gains.append((new - old) / old * (1 if spec.higher_is_better else -1))
    return 100 * math.fsum(gains) / len(gains)


def _main(values: Mapping[str, Any], spec: OutputSpec) -> float:
    if spec.name not in values:
        raise InputError(f"no result for task {spec.name!r}", f"there are {', '.join(values)}", "evaluate every task")
    value = values[spec.name]
    if isinstance(value, Mapping) and spec.metric not in value:
        evidence = f"there are {', '.join(value) or 'none'}"
        raise InputError(f"no {spec.metric} for task {spec.name!r}", evidence, "pass what Metric.compute returned")
    return float(value[spec.metric] if isinstance(value, Mapping) else value)


def _divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), math.nan), where=np.asarray(bottom) > 0)


def _arrays(spec: OutputSpec, predicted: Any, label: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; a prediction is finite, a label may be NaN where its kind says so."""
    arrays = np.asarray(predicted), np.asarray(label)
    if any(array.dtype.kind not in "biuf" for array in arrays) or not np.isfinite(arrays[0]).all():
        evidence = f"prediction {arrays[0].dtype}, label {arrays[1].dtype}, or a prediction is NaN or infinite"
        raise DataError(f"task {spec.name!r}: not a prediction and its label", evidence, "pass what decode returned")
    return arrays


def _same(spec: OutputSpec, predicted: tuple[int, ...], label: tuple[int, ...]) -> None:
    if predicted != label:
        raise DataError(
            f"task {spec.name!r}: prediction and label differ in shape",
            f"{list(predicted)} against {list(label)}",
            "decode at the label's size",
        )
