"""Raw network output -> what a robot's program uses: class indices, metres, unit vectors, probabilities."""

from __future__ import annotations

import numpy as np

from ..contract import OutputSpec
from ..errors import InputError
from .preprocess import resize

#: exp of this is about 10**6 metres: larger logarithms are noise and would overflow to inf.
MAX_LOG_DEPTH = 13.8
MAX_PICTURE = 65536


def decode(spec: OutputSpec, raw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Decode one task's raw output at `size` = (H, W); the result is an owned array.

    semseg uint8 [H,W] class index; depth float32 [H,W] metres; normals float32 [H,W,3], unit length (zero where the
    network gave no direction); edges float32 [H,W] probability; classification and multilabel float32 [K]
    probabilities. `raw` is [1,...] or [...] as OutputSpec says; dense outputs are resized before they are decoded, as
    in training. Raises InputError on another shape.

    >>> decode(OutputSpec("d", "depth", 1), np.zeros((1, 1, 1, 1), np.float32), (1, 2)).tolist()
    [[1.0, 1.0]]
    """
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
    raw = raw.astype(np.float32)
    if spec.kind == "classification":
        return _softmax(raw)
    if spec.kind == "multilabel":
        return _sigmoid(raw)
    image = resize(raw, _checked_size(size))
    if spec.kind == "semseg":
        return _classes(spec, image)
    if spec.kind == "depth":
        return np.exp(np.clip(image[0], -MAX_LOG_DEPTH, MAX_LOG_DEPTH))
    if spec.kind == "normals":
        return _unit(image)
    return _sigmoid(image[0])


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    good = isinstance(size, tuple | list) and len(size) == 2
    if not good or not all(isinstance(side, int | np.integer) and 0 < side <= MAX_PICTURE for side in size):
        raise InputError("not a picture's size", f"{size!r:.60}", f"pass (height, width), 1 to {MAX_PICTURE} pixels")
    return int(size[0]), int(size[1])


def _classes(spec: OutputSpec, logits: np.ndarray) -> np.ndarray:
    if spec.channels > 255:
        raise InputError(
            f"task {spec.name!r} has {spec.channels} classes", "a class index is uint8", "use at most 255 classes"
        )
    return logits.argmax(0).astype(np.uint8)


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.sqrt((vectors * vectors).sum(0, keepdims=True))
    return np.ascontiguousarray((vectors / np.maximum(length, 1e-12)).transpose(1, 2, 0))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    # Through tanh: exp of a large negative logit would overflow.
    return 0.5 * np.tanh(0.5 * logits) + np.float32(0.5)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()
