"""Labelled frames as torch batches: seeded shuffling and augmentation that depend on (seed, epoch, frame) alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..contract import Preprocess
from ..errors import DataError
from .folder import SplitReader, compact, open_split

#: Dimensions of each array, the frame's own included.
_DIMS = {"image": 4, "semseg": 3, "depth": 3, "normals": 4, "edges": 3, "label": 1, "labels": 2}
_TYPES = {"image": "u1", "semseg": "u1", "edges": "u1"}
_FLIPPED = ("image", "semseg", "depth", "normals", "edges")


class FrameDataset(Dataset[dict[str, Tensor]]):
    """Frames of a data folder (read one by one) or of `load_arrays` (in memory, fast), preprocessed and augmented.

    A batch is a dict: image float32 [N,3,h,w] as `preprocess` makes it (default: 0..1 at the frames' size); semseg and
    edges uint8 [N,H,W]; depth float32 [N,H,W]; normals float32 [N,3,H,W], unit or zero; label int64 [N]; labels float32
    [N,K]. `tasks` picks labels (default: all); `augment` adds flips and colour jitter, the same for a frame in an epoch
    whoever asks. In a DataLoader, call `set_epoch` before each epoch (persistent workers would not see it).
    Raises DataError for arrays of a wrong shape or type, and for whatever a folder has wrong.

    >>> data = FrameDataset({"image": np.full((2, 8, 8, 3), 255, np.uint8), "label": np.array([0, 1])})
    >>> data.batch([1])["image"].max().item(), data[1]["label"].item()
    (1.0, 1)
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Mapping[str, np.ndarray],
        split: str = "train",
        *,
        tasks: Sequence[str] | None = None,
        preprocess: Preprocess | None = None,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        wanted = None if tasks is None else tuple(tasks)
        self._arrays: dict[str, np.ndarray] | None = None
        self._reader: SplitReader | None = None
        if isinstance(source, Mapping):
            self._arrays = _checked(source, wanted)
            self._count, size = len(self._arrays["image"]), self._arrays["image"].shape[1:3]
        else:
            self._reader = open_split(source, split, wanted)
            self._count, size = len(self._reader), self._reader[0]["image"].shape[:2]
        self.preprocess = preprocess or Preprocess(int(size[0]), int(size[1]))
        self.augment, self.seed, self._epoch = augment, seed, 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(f"frame {index} of {self._count}")
        return {name: value[0] for name, value in self.batch([index], self._epoch).items()}

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation that `dataset[i]` draws from now on."""
        self._epoch = epoch

    def batch(self, indices: Sequence[int] | np.ndarray, epoch: int = 0) -> dict[str, Tensor]:
        """The frames `indices` as one batch; augmentation is drawn from (seed, epoch, index)."""
        return self._batch(np.asarray(indices), np.full(len(indices), epoch))

    def batch_at(self, step: int, batch_size: int) -> dict[str, Tensor]:
        """Batch `step` of an endless shuffled stream: an epoch shows every frame once, batches run across epochs."""
        places = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs = places // self._count
        indices = np.empty(batch_size, np.int64)
        for epoch in np.unique(epochs):
            order = np.random.default_rng([self.seed, int(epoch)]).permutation(self._count)
            here = epochs == epoch
            indices[here] = order[places[here] % self._count]
        return self._batch(indices, epochs)

    def in_order(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Every frame once, in order, for evaluation; the last batch may be smaller."""
        for start in range(0, self._count, batch_size):
            yield self.batch(range(start, min(start + batch_size, self._count)))

    def _batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, Tensor]:
        raw = {name: torch.from_numpy(array) for name, array in self._gather(indices).items()}
        jitter = None
        if self.augment:
            draws = [
                np.random.default_rng([self.seed, int(epoch), int(index), 1]).random(7)
                for epoch, index in zip(epochs, indices, strict=True)
            ]
            jitter = torch.from_numpy(np.array(draws, np.float32))
            raw = _flip(raw, jitter[:, 0] < 0.5)
        out = {name: _label(name, value) for name, value in raw.items() if name != "image"}
        return {"image": self._image(raw["image"], jitter), **out}

    def _gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        if self._arrays is not None:
            return {name: array[indices] for name, array in self._arrays.items()}
        reader = self._reader
        assert reader is not None
        frames = [reader[int(index)] for index in indices]
        if len({frame["image"].shape for frame in frames}) > 1:
            evidence = ", ".join(sorted({str(frame["image"].shape[:2]) for frame in frames}))
            raise DataError(
                f"frames of {reader.info.path / reader.split} differ in size", evidence, "scale them to one"
            )
        return {name: np.stack([compact(name, frame[name]) for frame in frames]) for name in frames[0]}

    def _image(self, image: Tensor, jitter: Tensor | None) -> Tensor:
        size = (self.preprocess.height, self.preprocess.width)
        out = image.permute(0, 3, 1, 2).float()
        if out.shape[2:] != size:
            out = F.interpolate(out, size=size, mode="bilinear", align_corners=False)
        out = out * (1 / 255)
        if jitter is not None:
            out = _jitter(out, jitter)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.preprocess.mean, self.preprocess.std))
        return ((out - mean) / std).contiguous()


def _checked(arrays: Mapping[str, np.ndarray], tasks: tuple[str, ...] | None) -> dict[str, np.ndarray]:
    missing = [name for name in ("image", *(tasks or ())) if name not in arrays]
    if missing:
        evidence = f"they hold {', '.join(arrays)}"
        raise DataError(f"the arrays lack {', '.join(missing)}", evidence, "add it, or choose other tasks")
    names = [name for name in arrays if name in _DIMS] if tasks is None else ["image", *tasks]
    image = arrays["image"]
    for name in names:
        array = arrays[name]
        wrong = array.ndim != _DIMS.get(name, 0) or len(array) != len(image) or not len(array)
        wrong |= name in ("semseg", "depth", "edges", "normals") and array.shape[1:3] != image.shape[1:3]
        wrong |= name in ("image", "normals") and array.shape[-1] != 3
        if wrong:
            evidence = f"shape {array.shape}; image has {image.shape}"
            raise DataError(f"array {name!r} has a wrong shape", evidence, "give frames first, channels last")
        if name in _TYPES and array.dtype != np.dtype(_TYPES[name]):
            fix = "pass 0..255 as uint8: scaling and normalising happen inside"
            raise DataError(f"array {name!r} must be uint8", f"got {array.dtype}", fix)
    return {name: arrays[name] for name in names}


def _flip(raw: dict[str, Tensor], flip: Tensor) -> dict[str, Tensor]:
    """Mirror the marked frames left to right; a mirrored normal's x changes sign."""
    for name, value in raw.items():
        if name in _FLIPPED:
            mirrored = value[flip].flip(2)
            if name == "normals":
                mirrored[..., 0] *= -1
            value[flip] = mirrored
    return raw


def _jitter(image: Tensor, draws: Tensor) -> Tensor:
    """Saturation, contrast, brightness and white balance of images 0..1, each frame by its own six draws from 0..1."""
    saturation, contrast, brightness = (0.7 + 0.6 * draws[:, k].view(-1, 1, 1, 1) for k in (1, 2, 3))
    balance = 0.92 + 0.16 * draws[:, 4:7].view(-1, 3, 1, 1)
    grey = image.mean(1, keepdim=True)
    image = grey + saturation * (image - grey)
    middle = image.mean((1, 2, 3), keepdim=True)
    return ((middle + contrast * (image - middle)) * brightness * balance).clamp_(0, 1)


def _label(name: str, value: Tensor) -> Any:
    if name == "depth":
        return value.float()
    if name == "normals":
        # int8 steps leave lengths off by a percent; float labels may hold NaN, which stays for the loss to mask.
        return F.normalize(value.permute(0, 3, 1, 2).float(), dim=1, eps=1e-6).contiguous()
    if name == "label":
        return value.long()
    return value.float() if name == "labels" else value
