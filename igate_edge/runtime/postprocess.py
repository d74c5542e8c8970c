"""Raw network output -> what a robot's program uses: class indices, metres, unit vectors, probabilities."""

from __future__ import annotations

import numpy as np

from ..contract import OutputSpec
from ..errors import InputError
from .preprocess import Taps, taps

#: exp of this is about 10**6 metres: larger logarithms are noise and would overflow to inf.
MAX_LOG_DEPTH = 13.8
MAX_PICTURE = 65536


def decode(
    spec: OutputSpec,
    raw: np.ndarray,
    size: tuple[int, int],
    part: tuple[float, float, float, float] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode one task's raw output at `size` = (H, W); the result is an owned array.

    semseg uint8 [H,W] class index; depth float32 [H,W] metres; normals float32 [H,W,3], unit length (zero where the
    network gave no direction); edges float32 [H,W] probability; classification and multilabel float32 [K]
    probabilities. `raw` is [1,...] or [...] as OutputSpec says; dense outputs are resized before they are decoded, as
    in training. part: (top, left, height, width) of the output that is decoded, in shares of it (`Fit.part`), None =
    all. out: an array of an earlier result that may be written; it is used where it fits. Raises InputError on another
    shape.

    >>> decode(OutputSpec("d", "depth", 1), np.zeros((1, 1, 1, 1), np.float32), (1, 2)).tolist()
    [[1.0, 1.0]]
    """
    raw = _checked(spec, raw).astype(np.float32, copy=False)
    if spec.kind == "classification":
        return _softmax(raw)
    if spec.kind == "multilabel":
        return _sigmoid(raw)
    height, width = _checked_size(size)
    top, left, tall, wide = part or (0.0, 0.0, 1.0, 1.0)
    rows, columns = taps(raw.shape[1], height, top, tall), taps(raw.shape[2], width, left, wide)
    image = _mix(raw, columns, 2)
    if spec.kind == "semseg":
        return _classes(spec, raw, image, rows, columns, _room(out, (height, width), np.uint8))
    if spec.kind == "normals":
        return _unit(image, rows, _room(out, (height, width, 3), np.float32))
    if spec.kind == "edges":
        return _sigmoid(_mix(image, rows, 1)[0])
    metres = _mix(image, rows, 1)[0]
    np.clip(metres, -MAX_LOG_DEPTH, MAX_LOG_DEPTH, out=metres)
    return np.exp(metres, out=_room(out, metres.shape, np.float32))


def invalid_depth(metres: np.ndarray, least: float, most: float) -> np.ndarray:
    """Make depth outside of `least`..`most` NaN, in place: what is beyond the range that the network learned.

    >>> invalid_depth(np.array([0.1, 2.0, 90.0], np.float32), 0.2, 20.0).tolist()
    [nan, 2.0, nan]
    """
    metres[~((metres >= least) & (metres <= most))] = np.nan
    return metres


def _checked(spec: OutputSpec, raw: np.ndarray) -> np.ndarray:
    """`raw` without its batch axis; raises InputError for what is no output of this task."""
    dims = 3 if spec.dense else 1
    if not isinstance(raw, np.ndarray) or raw.dtype.kind not in "biuf" or not raw.size:
        got = f"{raw.dtype} {list(raw.shape)}" if isinstance(raw, np.ndarray) else type(raw).__name__
        fix = "pass the engine's own output"
        raise InputError(f"task {spec.name!r} got a raw output it cannot decode", f"got {got}", fix)
    if raw.ndim == dims + 1 and raw.shape[0] == 1:
        raw = raw[0]
    if raw.ndim != dims or raw.shape[0] != spec.channels:
        evidence = f"shape {list(raw.shape)}, expected {spec.channels} channels and {dims} dimensions"
        raise InputError(
            f"task {spec.name!r} got a raw output it cannot decode", evidence, "pass the engine's own output"
        )
    return raw


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    good = isinstance(size, tuple | list) and len(size) == 2
    if not good or not all(isinstance(side, int | np.integer) and 0 < side <= MAX_PICTURE for side in size):
        raise InputError("not a picture's size", f"{size!r:.60}", f"pass (height, width), 1 to {MAX_PICTURE} pixels")
    return int(size[0]), int(size[1])


#: Values of a plane that are resized at once: they stay in the cache until they are decoded.
BAND = 16_384
#: Rows of a wide picture that are: fewer cost more calls than the cache saves.
LEAST_ROWS = 16


def _room(out: np.ndarray | None, shape: tuple[int, ...], kind: type) -> np.ndarray:
    """The caller's array where it fits, else a new one."""
    if out is not None and out.shape == shape and out.dtype == kind and out.flags.c_contiguous:
        return out
    return np.empty(shape, kind)


def _mix(planes: np.ndarray, along: Taps, axis: int, begin: int = 0, end: int | None = None) -> np.ndarray:
    """Resize [C,H,W] along one axis; only the target's indices begin..end."""
    low, high, share = (part[begin:end] for part in along)
    first, second = planes.take(low, axis), planes.take(high, axis)
    second -= first
    second *= share[:, None] if axis == 1 else share
    second += first
    return second


def _classes(
    spec: OutputSpec, logits: np.ndarray, image: np.ndarray, rows: Taps, columns: Taps, out: np.ndarray
) -> np.ndarray:
    """The largest of the resized logits, band by band; `image` is resized along the columns already.

    Between four values an interpolated one is neither above their largest nor below their smallest, so a class whose
    largest is below another's smallest loses everywhere between them and is not computed.
    """
    if spec.channels > 255:
        raise InputError(
            f"task {spec.name!r} has {spec.channels} classes", "a class index is uint8", "use at most 255 classes"
        )
    most, least = _corners(logits, np.maximum), _corners(logits, np.minimum)
    limit = least.max(0) - 1e-5 * (1 + np.abs(least).max())  # a margin for rounding
    possible = (most >= limit)[:, :, columns[0][0] : columns[0][-1] + 1].any(2)
    for begin, end in _bands(out):
        band = out[begin:end]
        able = np.flatnonzero(possible[:, rows[0][begin] : rows[0][begin + len(band) - 1] + 1].any(1))
        band[...] = able[0]
        if len(able) == 1:
            continue
        best, wins = _mix(image[able[:1]], rows, 1, begin, end), np.empty((1, *band.shape), bool)
        for index in able[1:].tolist():
            value = _mix(image[index : index + 1], rows, 1, begin, end)
            np.greater(value, best, out=wins)
            np.copyto(band, index, where=wins[0])
            np.maximum(value, best, out=best)
    return out


def _corners(logits: np.ndarray, of: np.ufunc) -> np.ndarray:
    """The largest or smallest of each value, its right and lower neighbours, and the one between those."""
    below = of(logits, np.concatenate([logits[:, 1:], logits[:, -1:]], axis=1))
    return of(below, np.concatenate([below[:, :, 1:], below[:, :, -1:]], axis=2))


def _bands(out: np.ndarray) -> list[tuple[int, int]]:
    """Rows of a picture that are decoded together: begin and end."""
    rows = max(LEAST_ROWS, BAND // out.shape[1])
    return [(begin, min(begin + rows, len(out))) for begin in range(0, len(out), rows)]


def _unit(image: np.ndarray, rows: Taps, out: np.ndarray) -> np.ndarray:
    for begin, end in _bands(out):
        vectors = _mix(image, rows, 1, begin, end)
        length = np.sqrt(np.einsum("chw,chw->hw", vectors, vectors))
        vectors /= np.maximum(length, 1e-12, out=length)
        out[begin:end] = vectors.transpose(1, 2, 0)
    return out


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    # Through tanh: exp of a large negative logit would overflow.
    return 0.5 * np.tanh(0.5 * logits) + np.float32(0.5)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()
