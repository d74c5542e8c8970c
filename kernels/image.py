"""Pictures in and out as kernels: frame -> INT8 input (preprocess_s8), INT8 output -> answer at the frame's size.

Bilinear with half-pixel centres, as runtime/preprocess.py has it, but with shares of 1/2048 in integers: a CPU and a
device give the same bytes. The references here are the definitions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from igate_edge.contract import Preprocess
from igate_edge.errors import InputError
from igate_edge.runtime.postprocess import MAX_LOG_DEPTH

from .exact import fmaf, to_int8
from .launch import UPSAMPLES, Launch, PreprocessParams, UpsampleParams, per_element
from .memory import Tables, check_addresses
from .pack import BlockLayout

ONE = 2048
TAP = np.dtype([("low", np.int16), ("high", np.int16), ("share", np.int16), ("spare", np.int16)])
#: ITU-R BT.601, limited range: (Y - 16, U - 128, V - 128) -> RGB.
BT601 = np.array([[1.164383, 0, 1.596027], [1.164383, -0.391762, -0.812968], [1.164383, 2.017232, 0]], np.float32)
LUMA = 16.0


def taps(source: int, target: int, start: int = 0, size: int | None = None) -> np.ndarray:
    """Where each of `target` pixels looks in `source` pixels, when the picture fills [start, start + size) of them.

    >>> taps(2, 4)["share"].tolist(), taps(2, 4)["low"].tolist()
    ([0, 512, 1536, 0], [0, 0, 0, 1])
    """
    size = target if size is None else size
    rows = np.zeros(target, TAP)
    place = np.arange(target) - start
    centre = np.maximum((2 * place + 1) * source - size, 0)  # in 1 / (2 size) pixels
    low = np.minimum(centre // (2 * size), source - 1)
    rows["low"], rows["high"] = low, np.minimum(low + 1, source - 1)
    rows["share"] = np.where(low == source - 1, 0, (centre % (2 * size) * ONE + size) // (2 * size))
    rows["low"][(place < 0) | (place >= size)] = -1
    return rows


def between(planes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """int64 [C, rows, columns], in 1 / 2048**2: the integer resize of integer planes [C, H, W]."""
    values = planes.astype(np.int64)
    top, bottom = values[:, np.maximum(rows["low"], 0)], values[:, rows["high"]]
    left, right, share = np.maximum(columns["low"], 0), columns["high"], columns["share"].astype(np.int64)
    down = rows["share"].astype(np.int64)[:, None]
    upper = top[:, :, left] * (ONE - share) + top[:, :, right] * share
    lower = bottom[:, :, left] * (ONE - share) + bottom[:, :, right] * share
    return upper * (ONE - down) + lower * down


def letterbox(frame: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest picture of the frame's proportions in the middle of `target`.

    >>> letterbox((1080, 1920), (480, 640))
    (60, 0, 360, 640)
    """
    scale = min(target[0] / frame[0], target[1] / frame[1])
    height, width = (max(1, min(side, round(size * scale))) for side, size in zip(target, frame, strict=True))
    return (target[0] - height) // 2, (target[1] - width) // 2, height, width


@dataclass(frozen=True)
class PreprocessPlan:
    """Frame of one size -> INT8 network input, `vector` bytes a pixel (folded: for 2x2 pixels): R, G, B, .., zeros."""

    frame: tuple[int, int]
    vector: int
    folded: bool
    size: tuple[int, int]
    nv12: bool
    scale: np.ndarray
    bias: np.ndarray
    pad: np.ndarray
    tables: Tables

    @classmethod
    def of(
        cls, frame: tuple[int, int], preprocess: Preprocess, step: float, *, nv12: bool = False, vector: int = 16,
        folded: bool = False, keep_proportions: bool = False, pad: tuple[int, int, int] = (0, 0, 0),
    ) -> PreprocessPlan:  # fmt: skip
        """Plan for frames (H, W). step: the input's INT8 scale. nv12: luma and half-size chroma instead of RGB.

        folded: written as `fold.fold_input` gives it, for a folded stem. keep_proportions: letterbox, with the colour
        `pad` (RGB) around it; else the frame is stretched, as in training.
        """
        target = preprocess.height, preprocess.width
        if (
            vector not in (4, 16, 32)
            or min(frame) < 1
            or max(frame) > 16384
            or (nv12 and (frame[0] % 2 or frame[1] % 2))
        ):
            evidence = f"frame {frame}, vector {vector}"
            raise InputError("not a picture for preprocess_s8", evidence, "vector 4, 16 or 32; NV12 has even sizes")
        if folded and (vector == 4 or target[0] % 2 or target[1] % 2):
            raise InputError("this input cannot be folded", f"size {target}, vector {vector}", "vector 16, even sides")
        if not (np.isfinite(step) and step > 0):
            raise InputError("the input has no scale", f"{step}", "calibrate the network")
        top, left, height, width = letterbox(frame, target) if keep_proportions else (0, 0, *target)
        tables = {"rows": taps(frame[0], target[0], top, height), "columns": taps(frame[1], target[1], left, width)}
        if nv12:
            tables["chroma_rows"] = taps(frame[0] // 2, target[0], top, height)
            tables["chroma_columns"] = taps(frame[1] // 2, target[1], left, width)
        mean, std = np.asarray(preprocess.mean), np.asarray(preprocess.std)
        scale, bias = (1 / (255 * std * step)).astype(np.float32), (-mean / (std * step)).astype(np.float32)
        colour = to_int8(fmaf(np.asarray(pad, np.float32), scale, bias))
        return cls(frame, vector, folded, target, nv12, scale, bias, colour, Tables.of(tables))

    def launch(self, frame: int, y: int, tables: int, chroma: int = 0) -> Launch:
        """The launch for a frame (RGB bytes, or the luma plane and `chroma`) without gaps between its rows."""
        check_addresses(y=y, tables=tables)
        if frame == 0 or (chroma != 0) != self.nv12:
            raise InputError("the frame's planes are not complete", f"{frame:#x}, {chroma:#x}", "NV12 has two, RGB one")
        width = self.frame[1]
        params = PreprocessParams(
            frame=frame, chroma=chroma or None, y=y, **self.tables.addresses(tables), height=self.size[0],
            width=self.size[1], frame_row=width if self.nv12 else 3 * width, chroma_row=width, vector=self.vector,
            fold=2 if self.folded else 1, scale=tuple(self.scale), bias=tuple(self.bias),
            matrix=tuple(BT601.reshape(-1)), luma=LUMA, pad=tuple(int(value) for value in self.pad),
        )  # fmt: skip
        return per_element("preprocess_s8", self.size[0] * self.size[1] // (4 if self.folded else 1), params)


def preprocess_reference(plan: PreprocessPlan, frame: np.ndarray, chroma: np.ndarray | None = None) -> np.ndarray:
    """The definition: uint8 [H, W, 3], or luma [H, W] and chroma [H/2, W/2, 2] -> int8 [3, height, width], unfolded."""
    parts = {name: plan.tables.data[a : a + n].view(TAP) for name, (a, n) in plan.tables.parts.items()}
    rows, columns = parts["rows"], parts["columns"]
    if chroma is None:
        colour = _level(between(frame.transpose(2, 0, 1), rows, columns))
    else:
        luma = _level(between(frame[None], rows, columns)) - np.float32(LUMA)
        u, v = _level(between(chroma.transpose(2, 0, 1), parts["chroma_rows"], parts["chroma_columns"])) - np.float32(
            128
        )
        rgb = [fmaf(m[2], v, fmaf(m[1], u, (m[0] * luma[0]).astype(np.float32))) for m in BT601]
        colour = np.clip(np.stack(rgb), np.float32(0), np.float32(255))
    steps = to_int8(fmaf(colour, plan.scale[:, None, None], plan.bias[:, None, None]))
    outside = (rows["low"] < 0)[:, None] | (columns["low"] < 0)
    return np.where(outside, plan.pad[:, None, None], steps)


def _level(samples: np.ndarray) -> np.ndarray:
    return samples.astype(np.float32) * np.float32(1 / ONE**2)


@dataclass(frozen=True)
class UpsamplePlan:
    """An INT8 output [1, C, h, w] -> the task's answer at another size. step: the output's INT8 scale."""

    kind: str
    source: BlockLayout
    size: tuple[int, int]
    step: float
    tables: Tables

    @classmethod
    def of(cls, kind: str, source: BlockLayout, size: tuple[int, int], step: float = 1.0) -> UpsamplePlan:
        """Plan for a task of `kind`: semseg (uint8 classes), depth (float32 metres), normals (float32 [H, W, 3])."""
        known = {"semseg": range(1, 256), "depth": (1,), "normals": (3,)}
        if kind not in known or source.channels not in known[kind] or source.images != 1:
            evidence = f"{kind!r:.40} with {source.channels} channels"
            raise InputError("no kernel for this output", evidence, f"known: {', '.join(known)}, one image")
        if min(size) < 1 or max(size) > 16384 or not (np.isfinite(step) and step > 0):
            raise InputError("not a picture's size or no scale", f"{size}, {step}", "pass (height, width) and a scale")
        tables = {"rows": taps(source.height, size[0]), "columns": taps(source.width, size[1])}
        return cls(kind, source, size, step, Tables.of(tables))

    @property
    def factor(self) -> np.float32:
        """What one unit of an integer sample is worth."""
        return np.float32(np.float64(self.step) / ONE**2)

    def launch(self, x: int, y: int, tables: int) -> Launch:
        """The launch for tensors and tables at these device addresses."""
        check_addresses(x=x, y=y, tables=tables)
        params = UpsampleParams(
            x=x, y=y, **self.tables.addresses(tables), height=self.size[0], width=self.size[1],
            x_width=self.source.width, x_pixel=self.source.pixel, channels=self.source.channels,
            x_plane=self.source.image // self.source.planes, scale=self.factor, low=-MAX_LOG_DEPTH, high=MAX_LOG_DEPTH,
        )  # fmt: skip
        return per_element(UPSAMPLES[self.kind], self.size[0] * self.size[1], params)


def upsample_reference(plan: UpsamplePlan, x: np.ndarray) -> np.ndarray:
    """The definition, on int8 x [C, h, w]; depth is exact but for the last two places of its exponential."""
    parts = {name: plan.tables.data[a : a + n].view(TAP) for name, (a, n) in plan.tables.parts.items()}
    samples = between(x, parts["rows"], parts["columns"])
    if plan.kind == "semseg":
        return samples.argmax(0).astype(np.uint8)
    if plan.kind == "depth":
        value = samples[0].astype(np.float32) * plan.factor
        return np.exp(np.clip(value, -MAX_LOG_DEPTH, MAX_LOG_DEPTH).astype(np.float64)).astype(np.float32)
    vector = _level(samples)
    squares = np.zeros(vector.shape[1:], np.float32)
    for part in vector:
        squares = fmaf(part, part, squares)
    return np.ascontiguousarray((vector / np.maximum(np.sqrt(squares), np.float32(1e-12))).transpose(1, 2, 0))
