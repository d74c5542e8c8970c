"""Activation ranges from real frames: the float model runs with every intermediate tensor as an output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..contract import Preprocess
from ..errors import DataError, GraphError, InputError
from . import groups
from .groups import Range

METHODS = ("minmax", "percentile", "mse")
#: Fewer frames than this give a warning: a range from a handful of frames is a guess.
ENOUGH = 8
BINS = 2048
PERCENTILE = 99.99


@dataclass(frozen=True)
class Calibration:
    """Ranges by tensor name (joined by site), number and SHA-256 of the frames, and what looked wrong."""

    ranges: dict[str, Range]
    frames: int
    sha256: str
    method: str
    warnings: tuple[str, ...] = ()


def calibrate(model: ir.Model, frames: Iterable[np.ndarray], method: str = "minmax") -> dict[str, Range]:
    """(low, high) of every float tensor of a static model; see `observe`, which also returns warnings and a digest."""
    return observe(model, frames, method).ranges


def observe(model: ir.Model, frames: Iterable[np.ndarray], method: str = "minmax") -> Calibration:
    """Run `frames` (float32, the input's shape, preprocessed) through `model` and collect joined activation ranges.

    Methods: "minmax" (default), "percentile" (99.99 % of absolute values) and "mse" (the clip with the least squared
    error on a 127-step grid); the last two run the frames twice. Raises DataError (no frame, wrong shape or dtype, not
    finite, not preprocessed as the model's metadata says), InputError (unknown method), GraphError (model overflows).
    Warns about fewer than 8 frames, a constant frame, and frames that are all the same.
    """
    if method not in METHODS:
        raise InputError(f"unknown calibration method {method!r}", f"known: {', '.join(METHODS)}", "use one of these")
    source = groups.typed(model)
    checked, warnings = _checked(source, frames)
    probe = _Probe(source)
    limits = probe.limits(checked)
    if method != "minmax":
        limits = _clip(limits, probe.histograms(checked, limits), method)
    digest = hashlib.sha256()
    for frame in checked:
        digest.update(np.ascontiguousarray(frame).tobytes())
    return Calibration(groups.share(source, limits), len(checked), digest.hexdigest(), method, tuple(warnings))


def _checked(model: ir.Model, frames: Iterable[np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
    value = model.graph.inputs[0]
    shape = tuple(value.shape.numpy()) if value.shape is not None and value.shape.is_static() else None
    if shape is None:
        raise GraphError("the model's input has no static shape", str(value.shape), "export with a static batch of 1")
    allowed = _allowed(model)
    kept, constants = [], 0
    for index, frame in enumerate(frames):
        if not isinstance(frame, np.ndarray) or frame.dtype != np.float32 or frame.shape != shape:
            seen = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise DataError(
                f"calibration frame {index} does not fit the model",
                f"float32 {shape} expected, {seen} given",
                "preprocess frames with runtime.preprocess.to_input",
            )
        if not np.isfinite(frame).all():
            bad = int((~np.isfinite(frame)).sum())
            raise DataError(
                f"calibration frame {index} is not finite",
                f"{bad} NaN or infinite values",
                "remove or repair this frame",
            )
        if allowed is not None:
            _check_range(index, frame, allowed)
        constants += bool(frame.min() == frame.max() or (np.ptp(frame, axis=(-2, -1)) == 0).all())
        kept.append(frame)
    if not kept:
        raise DataError(
            "no calibration frames", "0 frames given", f"give at least {ENOUGH} frames of the robot's camera"
        )
    return kept, _warnings(kept, constants)


def _warnings(frames: list[np.ndarray], constants: int) -> list[str]:
    found = []
    if len(frames) < ENOUGH:
        found.append(f"only {len(frames)} calibration frames: ranges are a guess below {ENOUGH}")
    if constants:
        found.append(f"{constants} of {len(frames)} calibration frames are constant images")
    if len(frames) > 1 and all(np.array_equal(frames[0], frame) for frame in frames[1:]):
        found.append(f"all {len(frames)} calibration frames are the same image")
    return found


def _allowed(model: ir.Model) -> tuple[np.ndarray, np.ndarray] | None:
    """Smallest and largest possible value of each input channel by the preprocessing in the model's metadata."""
    try:
        data = json.loads(model.metadata_props.get("igate", "{}")).get("preprocess")
    except ValueError:
        return None
    if not data:
        return None
    preprocess = Preprocess.from_json(data)
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    return (0.0 - mean) / std, (1.0 - mean) / std


def _check_range(index: int, frame: np.ndarray, allowed: tuple[np.ndarray, np.ndarray]) -> None:
    """Refuse frames that cannot come from the recorded preprocessing: not scaled, or normalised twice (cases Q10)."""
    low, high = (side.reshape(1, -1, 1, 1) for side in allowed)
    if frame.shape[1] != low.size:
        return
    slack = 0.01 * (high - low)
    if (frame < low - slack).any() or (frame > high + slack).any():
        raise DataError(
            f"calibration frame {index} was not preprocessed as the model says",
            f"values {frame.min():.3g}..{frame.max():.3g}, possible are {low.min():.3g}..{high.max():.3g}",
            "preprocess frames with runtime.preprocess.to_input and the model's Preprocess",
        )


class _Probe:
    """The model with every float activation as an output, one frame at a time."""

    def __init__(self, source: ir.Model) -> None:
        import onnx

        from ..engines.onnxruntime import open as open_session

        proto = ir.to_proto(source)
        made = [name for node in source.graph for name in map(groups.name_of, groups.activations(node.outputs))]
        outputs = {value.name for value in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in outputs)
        self.session = open_session(proto.SerializeToString())
        self.input, self.names = groups.name_of(source.graph.inputs[0]), made

    def tensors(self, frame: np.ndarray) -> dict[str, np.ndarray]:
        values = self.session.run(frame)
        return {self.input: frame, **{name: values[name] for name in self.names}}

    def limits(self, frames: list[np.ndarray]) -> dict[str, Range]:
        found: dict[str, Range] = {}
        for frame in frames:
            for name, value in self.tensors(frame).items():
                low, high = (float(value.min()), float(value.max())) if value.size else (0.0, 0.0)
                if not (np.isfinite(low) and np.isfinite(high)):
                    raise GraphError(
                        "the float model overflows on a calibration frame",
                        f"tensor {name!r} reaches {low}..{high}",
                        "check the trained weights",
                    )
                before = found.get(name, (low, high))
                found[name] = (min(low, before[0]), max(high, before[1]))
        return found

    def histograms(self, frames: list[np.ndarray], limits: Mapping[str, Range]) -> dict[str, np.ndarray]:
        """Counts of |value| in `BINS` equal bins up to each tensor's peak."""
        counts = {name: np.zeros(BINS, np.int64) for name in limits}
        for frame in frames:
            for name, value in self.tensors(frame).items():
                scale = np.float32((BINS - 1e-3) / max(groups.peak(limits[name]), 1e-30))
                bins = np.minimum((np.abs(value) * scale).astype(np.int32), BINS - 1)
                counts[name] += np.bincount(bins.ravel(), minlength=BINS)
        return counts


def _clip(limits: Mapping[str, Range], counts: Mapping[str, np.ndarray], method: str) -> dict[str, Range]:
    choose = _percentile_share if method == "percentile" else _mse_share
    clipped = {}
    for name, (low, high) in limits.items():
        top = groups.peak((low, high)) * choose(counts[name])
        clipped[name] = (max(low, -top), min(high, top))
    return clipped


def _percentile_share(counts: np.ndarray) -> float:
    """Share of the peak that holds `PERCENTILE` % of the values outside the first bin: zeros of a Relu say nothing."""
    rest = counts.copy()
    rest[0] = 0
    total = rest.sum()
    if total == 0:
        return 1.0
    return float(np.searchsorted(np.cumsum(rest), total * PERCENTILE / 100.0) + 1) / BINS


def _mse_share(counts: np.ndarray) -> float:
    """Share of the peak whose 127-step grid has the least squared error over the histogram."""
    centers = (np.arange(BINS) + 0.5) / BINS
    weights = counts.astype(np.float64)
    weights[0] = 0.0
    if not weights.any():
        return 1.0
    shares = np.linspace(0.2, 1.0, 81)
    errors = []
    for share in shares:
        step = share / 127.0
        clipped = centers > share
        # Inside the grid the error is that of rounding, step^2 / 12 on average; outside, the distance to it.
        errors.append(float((weights * np.where(clipped, (centers - share) ** 2, step * step / 12.0)).sum()))
    return float(shares[int(np.argmin(errors))])
