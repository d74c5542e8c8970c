"""Measured points -> the grids of a latency table, and whole networks -> its overhead, anchors and error bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .compiler import latency
from .compiler.latency import Grid, LatencyTable
from .profiler_jobs import STEP, Point

#: No table claims to be better than this.
LEAST_ERROR = 0.02
#: A node's overhead takes at most this share of the cheapest operator's time away.
MOST_OF_AN_OPERATOR = 0.8


@dataclass(frozen=True)
class Found:
    """What jobs gave, in ms: points of convolutions, (operator, elements, ms) of the rest, spread of every job."""

    convs: list[tuple[Point, float]]
    ops: list[tuple[str, int, float]]
    spreads: list[float]


@dataclass(frozen=True)
class Whole:
    """A network timed as one: lowering, ms, number of nodes that run, predicted ms without overhead and factor."""

    lowering: str
    ms: float
    nodes: int
    predicted_ms: float


def table_of(found: Found, **about: Any) -> LatencyTable:
    """A table without anchors from measured points; `about`: the fields that say what and where it is."""
    conv = {label.removeprefix("grid "): _grid(found.convs, label) for label in _labels(found.convs, "grid")}
    bare = LatencyTable(**about, step=STEP, conv=conv, ops=_operators(found.ops), spread=_median(found.spreads))
    tails = {label.removeprefix("tail "): label for label in _labels(found.convs, "tail")}
    for key, label in tails.items():
        conv[key] = dataclasses.replace(conv[key], tail=_tail(conv[key], _of(found.convs, label)))
    return dataclasses.replace(bare, stride=_strides(bare, found.convs))


def anchored(table: LatencyTable, wholes: Sequence[Whole]) -> LatencyTable:
    """The table with what whole networks say: overhead of a node, one factor a lowering, the largest error left.

    Networks of few and of many nodes tell the two apart: ms = factor * (sum of operators + overhead * nodes), by least
    squares of relative errors. The overhead is below 0 where the profiler's own clock makes small operators look slow.
    """
    terms = np.array([[net.predicted_ms / net.ms, net.nodes / net.ms] for net in wholes])
    factor, slope = np.linalg.lstsq(terms, np.ones(len(wholes)), rcond=None)[0]
    least = min(float(ms[0]) for _, ms in table.ops.values())
    overhead = max(float(slope / factor), -MOST_OF_AN_OPERATOR * least)
    ratios: dict[str, list[float]] = {name: [] for name in latency.LOWERINGS}
    for net in wholes:
        ratios[net.lowering].append(net.ms / (net.predicted_ms + overhead * net.nodes))
    anchors = {name: float(np.exp(np.mean(np.log(values)))) for name, values in ratios.items()}
    left = max(abs(anchors[name] / value - 1) for name, values in ratios.items() for value in values)
    return dataclasses.replace(table, overhead_ms=overhead, anchors=anchors, error=max(left, LEAST_ERROR))


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def _labels(convs: Iterable[tuple[Point, float]], word: str) -> list[str]:
    return sorted({point[0] for point, _ in convs if point[0].startswith(f"{word} ")})


def _of(convs: Iterable[tuple[Point, float]], label: str) -> list[tuple[Point, float]]:
    return [(point, ms) for point, ms in convs if point[0] == label]


def _grid(convs: Iterable[tuple[Point, float]], label: str) -> Grid:
    """Points measured more than once are averaged; those never measured are filled in (see latency.fill)."""
    points = _of(convs, label)
    axes = [sorted({point[index] for point, _ in points}) for index in (1, 2, 3)]
    total, count = np.zeros([len(axis) for axis in axes]), np.zeros([len(axis) for axis in axes])
    for point, ms in points:
        place = tuple(axis.index(value) for axis, value in zip(axes, point[1:], strict=True))
        total[place] += ms
        count[place] += 1
    pixels, cin, cout = (np.array(axis, np.float64) for axis in axes)
    times = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    full = latency.fill(pixels, times)
    for axis in range(3):  # more work never takes less time at whole steps: what says so is noise
        full = np.maximum.accumulate(full, axis)
    return Grid(pixels, cin, cout, full, np.zeros(0))


def _tail(grid: Grid, points: Sequence[tuple[Point, float]]) -> np.ndarray:
    """Share of the next step that 1..STEP-1 channels above a multiple cost; between measured counts a line."""
    over, whole = np.zeros(STEP + 1), np.zeros(STEP + 1)
    for (_, pixels, cin, cout), ms in points:
        steps, rest = divmod(cout, STEP)
        low, high = (grid.at(pixels, cin, STEP * count, STEP) for count in (steps, steps + 1))
        over[rest] += ms - low
        whole[rest] += high - low
    known = np.flatnonzero(whole > 0)
    shares = [*(over[known] / whole[known]), 1.0]
    return np.interp(np.arange(1, STEP), [*known, STEP], shares)


def _strides(table: LatencyTable, convs: Iterable[tuple[Point, float]]) -> dict[str, float]:
    """Kernel -> time at stride 2 over that at stride 1 for as many output pixels; one of all depthwise ones."""
    found = {}
    for label in _labels(convs, "stride"):
        key = label.removeprefix("stride ")
        points = _of(convs, label)
        whole = sum(table.conv[key].at(pixels, cin, cout, STEP) for (_, pixels, cin, cout), _ in points)
        size, kind = key.split()
        found[kind if kind == "depthwise" else size] = sum(ms for _, ms in points) / whole
    return found


def _operators(samples: Iterable[tuple[str, int, float]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per operator, sizes of one binary order of magnitude together: mean size, median time, never falling."""
    bins: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for op, elements, ms in samples:
        bins.setdefault(op, {}).setdefault(max(elements, 1).bit_length(), []).append((max(elements, 1), ms))
    table = {}
    for op, by_size in bins.items():
        sizes = [float(np.mean([size for size, _ in items])) for _, items in sorted(by_size.items())]
        times = [_median(ms for _, ms in items) for _, items in sorted(by_size.items())]
        table[op] = (np.array(sizes), _rising(times))
    return table


def _rising(values: Sequence[float]) -> np.ndarray:
    """The nearest sequence that never falls: neighbours that do are averaged.

    >>> _rising([1.0, 3.0, 2.0, 4.0]).tolist()
    [1.0, 2.5, 2.5, 4.0]
    """
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return np.array([np.mean(block) for block in blocks for _ in block])
