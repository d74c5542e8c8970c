"""Raw network output -> what a robot's program uses: class indices, metres, unit vectors, probabilities."""

from __future__ import annotations

import numpy as np

from ..contract import OutputSpec
from ..errors import InputError
from .preprocess import resize

#: exp of this is about 10**6 metres: larger logarithms are noise and would overflow to inf.
MAX_LOG_DEPTH = 13.8


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
    image = resize(raw, size)
    if spec.kind == "semseg":
        return _classes(spec, image)
    if spec.kind == "depth":
        return np.exp(np.clip(image[0], -MAX_LOG_DEPTH, MAX_LOG_DEPTH))
    if spec.kind == "normals":
        return _unit(image)
    return _sigmoid(image[0])


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
