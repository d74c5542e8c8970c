"""Where a run's frames come from: a data folder, or anything that answers the same three questions."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..errors import DataError
from .config import TrainConfig, digest
from .data import FrameDataset
from .folder import load_arrays, read_info
from .layout import held_out
from .loop import BatchAt
from .step import Batch
from .tasks import sqrt_inverse_frequency


@dataclass(frozen=True)
class Source:
    """Frames. `available`: modality -> class names; `fingerprint`: changes when the frames do.

    `frames`: how many there are to train on, 0 = not known. `class_weights`: of semseg's classes, by how rare they are.
    `train(batch, seed)`: step -> batch, the same batch for the same step. `val()`: batches in order.
    """

    available: Mapping[str, tuple[str, ...]]
    fingerprint: str
    train: Callable[[int, int], BatchAt]
    val: Callable[[], Iterable[Batch]]
    frames: int = 0
    class_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def open_source(folder: str | os.PathLike[str], config: TrainConfig) -> Source:
    """Load a data folder into memory: `train` augmented by flips and colour jitter, `val` as it is.

    A folder without a `val` split is validated on the last tenth of its frames, which are then not trained on.
    Raises DataError for whatever the folder has wrong, or when it has none of the tasks.
    """
    info = read_info(folder)
    names = config.tasks or tuple(info.tasks)
    unknown = [name for name in names if name not in info.tasks]
    if unknown:
        known = ", ".join(info.tasks)
        raise DataError(f"the data has no task {', '.join(unknown)}", f"{folder} has {known}", "choose among these")
    train, held = load_arrays(folder, "train", names), held_out(info)
    if held.split == "train":
        train, val = _part(train, 0, held.first), _part(train, held.first, held.last)
    else:
        val = load_arrays(folder, held.split, names)
    if not len(train["image"]):
        raise DataError("there is no frame to train on", f"{folder} has one frame", "add frames")
    return from_arrays(train, val, {name: info.tasks[name] for name in names}, config)


def from_arrays(
    train: Mapping[str, np.ndarray],
    val: Mapping[str, np.ndarray],
    available: Mapping[str, tuple[str, ...]],
    config: TrainConfig,
) -> Source:
    """A source of frames in memory, arrays as `load_arrays` returns them."""
    preprocess = config.preprocess()

    def batches(batch: int, seed: int) -> BatchAt:
        data = FrameDataset(train, preprocess=preprocess, augment=True, seed=seed)
        return lambda step: thin(data.batch_at(step, batch), config.label_stride, step)

    held = FrameDataset(val, preprocess=preprocess)
    print_of = digest(*(_crc(arrays) for arrays in (train, val)), sorted(available.items()))
    rare = {
        name: sqrt_inverse_frequency(train[name], len(classes))
        for name, classes in available.items()
        if name == "semseg" and config.class_weights
    }
    return Source(available, print_of, batches, lambda: held.in_order(32), len(train["image"]), rare)


def thin(batch: Batch, stride: int, step: int) -> Batch:
    """Every `stride`-th label pixel of both axes; corners take turns, so that no side is favoured over four steps."""
    if stride == 1:
        return batch
    top, left = step // stride % stride, step % stride
    return {k: v[..., top::stride, left::stride] if k in _DENSE else v for k, v in batch.items()}


_DENSE = ("semseg", "depth", "normals", "edges")


def _part(arrays: Mapping[str, np.ndarray], start: int, stop: int | None) -> dict[str, np.ndarray]:
    return {name: array[start:stop] for name, array in arrays.items()}


def _crc(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {name: zlib.crc32(np.ascontiguousarray(array).data) for name, array in sorted(arrays.items())}
