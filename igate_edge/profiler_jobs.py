"""What a latency table is measured from: one job a network, and which of its convolutions are points of which grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir

from . import profiler_nets as nets
from .profiler_nets import Hw

#: Grid or tail or stride and its kernel and kind, output pixels, cin, cout.
Point = tuple[str, int, int, int]
STEP = 16
#: ONNX Runtime's packed INT8 kernels want counts in these multiples; other counts take another way.
FIT = {"cin": 4, "cout": 8}
SIZES: tuple[Hw, ...] = ((1, 1), (3, 4), (6, 8), (12, 16), (24, 32), (48, 64), (96, 128))
COUNTS = (4, 16, 32, 64, 96, 128, 192, 256, 512)
DEPTHWISE = (16, 32, 64, 128, 256, 512)
#: Larger convolutions are not measured: time grows with their pixels.
MOST_MACS, MOST_ELEMENTS = 8e7, 6e5
TAIL_HW: Hw = (12, 16)
TAIL_CIN, TAIL_STEPS = (32, 128), (1, 2)
STRIDED: tuple[Hw, ...] = ((12, 16), (24, 32))
STRIDED_COUNTS = (32, 64, 128)
#: A kind of convolution and what follows it in the chain that measures it.
INT8_KINDS: dict[str, str | None] = {"unsigned": "Relu", "signed": None}


@dataclass(frozen=True)
class Job:
    """A network; `points`: its convolutions in order, None for one that only stands between; heads: see `match`."""

    name: str
    build: Callable[[], ir.Model]
    points: tuple[Point | None, ...] = ()

    def match(self, convs: Sequence[tuple[int, float]]) -> list[tuple[Point, float]]:
        """Points with their times, convs: (elements made, ms) of every convolution that ran, in order.

        Of last convolutions the order is not kept: they are told by what they make.
        """
        if self.name.startswith("heads"):
            return [(point, ms) for point in self.points if point for made, ms in convs if made == point[1] * point[3]]
        times = [ms for _, ms in convs[: len(self.points)]]
        return [(point, ms) for point, ms in zip(self.points, times, strict=True) if point]


def jobs(precision: str, quick: bool = False) -> list[Job]:
    """All networks of a table; `quick` leaves out sizes and counts, for a table of half the accuracy."""
    sizes = SIZES[1:6:2] if quick else SIZES
    counts = COUNTS[1::3] if quick else COUNTS
    found: list[Job] = []
    for kernel in (3, 1):
        kinds: dict[str, str | None] = INT8_KINDS if precision == "int8" else {"float": "Relu"}
        for kind, act in kinds.items():
            found += [_chain(hw, _few(counts, hw, kernel), kernel, kind, act) for hw in sizes]
            found.append(_tail(kernel, kind, act))
        if precision == "int8":
            found += [_loose(hw, _few(counts, hw, kernel), kernel) for hw in sizes]
            found.append(_tail(kernel, "loose", "Relu", off=FIT["cin"] // 2))
            found += [_heads(hw, kernel, cin) for hw in sizes for cin in (16, 64)]
        found += [_stride(hw, kernel, kinds) for hw in STRIDED]
    for kernel in (3, 5):
        found += [_depthwise(hw, kernel) for hw in sizes]
    found += [_stride_depthwise(hw) for hw in STRIDED]
    found += [Job(f"operators {_size(hw)} {c}", partial(nets.operators, hw, c)) for hw, c in _operators(sizes)]
    return found


def _size(hw: Hw) -> str:
    return f"{hw[0]}x{hw[1]}"


def _few(counts: Sequence[int], hw: Hw, kernel: int) -> list[int]:
    """The counts whose largest pair is not too much work at this size."""
    taps = kernel * kernel * math.prod(hw)
    return [count for count in counts if taps * count * count <= MOST_MACS and math.prod(hw) * count <= MOST_ELEMENTS]


def _chain(hw: Hw, counts: Sequence[int], kernel: int, kind: str, act: str | None) -> Job:
    line, label = nets.pairs(counts), f"grid {kernel}x{kernel} {kind}"
    points = [(label, math.prod(hw), cin, cout) for cin, cout in zip(line, line[1:], strict=False)]
    kept = [point if point[3] >= STEP else None for point in points]
    return Job(f"{label} {_size(hw)}", partial(nets.chain, hw, line, kernel, act), (None, *kept))


def _detours(label: str, hw: Hw, ends: Sequence[tuple[int, int]], kernel: int, act: str | None) -> Job:
    """The first convolution makes the first cin; then points and the ways between them take turns."""
    pairs = [((label, math.prod(hw), cin, cout), None) for cin, cout in ends]
    points = (None, *(point for pair in pairs for point in pair))
    return Job(f"{label} {_size(hw)}", partial(nets.detours, hw, ends, kernel, act), points)


def _loose(hw: Hw, counts: Sequence[int], kernel: int) -> Job:
    off = FIT["cin"] // 2
    ends = [(cin - off, cout) for cin in counts for cout in counts if cout >= STEP]
    return _detours(f"grid {kernel}x{kernel} loose", hw, ends, kernel, "Relu")


def _tail(kernel: int, kind: str, act: str | None, off: int = 0) -> Job:
    ends = [(cin - off, STEP * whole + rest) for cin in TAIL_CIN for whole in TAIL_STEPS for rest in range(1, STEP)]
    return _detours(f"tail {kernel}x{kernel} {kind}", TAIL_HW, ends, kernel, act)


def _stride(hw: Hw, kernel: int, kinds: dict[str, str | None]) -> Job:
    line, label = nets.pairs(STRIDED_COUNTS), f"stride {kernel}x{kernel} {next(iter(kinds))}"
    points = [(label, math.prod(hw) // 4, cin, cout) for cin, cout in zip(line, line[1:], strict=False)]
    return Job(f"{label} {_size(hw)}", partial(nets.strided, hw, line, kernel), (None, *points))


def _depthwise(hw: Hw, kernel: int, stride: int = 1, label: str = "grid") -> Job:
    counts = [count for count in DEPTHWISE if count * math.prod(hw) <= MOST_ELEMENTS]
    label = f"{label} {kernel}x{kernel} depthwise"
    pixels = math.prod(hw) // stride**2
    points = [point for count in counts for point in (None, (label, pixels, 1, count))]
    build = partial(nets.depthwise, hw, counts, kernel, stride)
    return Job(f"{label} {_size(hw)}", build, (None, *points))


def _stride_depthwise(hw: Hw) -> Job:
    return _depthwise(hw, 3, stride=2, label="stride")


def _heads(hw: Hw, kernel: int, cin: int) -> Job:
    label, pixels, couts = f"{kernel}x{kernel} output", math.prod(hw), (1, 4, 8, 16, 32)
    points = tuple((f"{'tail' if cout < STEP else 'grid'} {label}", pixels, cin, cout) for cout in couts)
    return Job(f"heads {kernel}x{kernel} {_size(hw)} {cin}", partial(nets.heads, hw, cin, couts, kernel), points)


def _operators(sizes: Sequence[Hw]) -> Iterator[tuple[Hw, int]]:
    for hw in sizes:
        if min(hw) >= 6:
            yield from ((hw, count) for count in (16, 64) if count * math.prod(hw) <= MOST_ELEMENTS)
