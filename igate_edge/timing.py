"""Networks timed in turn and judged by paired ratios, on cores of their own."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .compiler import calibrate, quantize
from .engines import onnxruntime as ort
from .runtime.preprocess import to_input

if TYPE_CHECKING:
    import onnx_ir as ir

    from .contract import Preprocess

#: A ratio is called meaningless when its median is not known (95 %) to within this share of it in all,
MAX_INTERVAL = 0.1
#: or when the middle half of its rounds spreads over more than this share of it.
MAX_SPREAD = 0.5
_WARM_UP = 5


def interleave(
    runs: Mapping[str, Callable[[np.ndarray], object]],
    image: np.ndarray,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Seconds of every net in every round, float64 [rounds]; the order turns and flips: no fixed neighbours."""
    names = list(runs)
    for _ in range(_WARM_UP):
        for name in names:
            runs[name](image)
    times = {name: np.zeros(rounds) for name in names}
    for index in range(rounds):
        turn = index % len(names)
        order = names[turn:] + names[:turn]
        for name in order if index % 2 else reversed(order):
            start = clock()
            runs[name](image)
            times[name][index] = clock() - start
    return times


def ratio(ours: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Median of paired ratios with its quartiles; a machine that slows both arms of a round does not move it.

    >>> ratio(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))["ratio"]
    2.0
    """
    pairs = np.sort(ours / reference)
    low, middle, high = ort.ratio_quartiles(ours, reference)
    spread, (least, most) = (high - low) / middle, _median_interval(pairs)
    sure = most - least <= MAX_INTERVAL * middle and spread <= MAX_SPREAD
    note = (
        ""
        if sure
        else f"the ratio means nothing: median between {least:.2f} and {most:.2f} (95 %), spread {spread:.0%}"
    )
    return {
        "ratio": middle,
        "interval": (least, most),
        "quartiles": (low, high),
        "spread": spread,
        "meaningful": sure,
        "note": note,
    }


def _median_interval(ordered: np.ndarray) -> tuple[float, float]:
    """95 % interval of the median from order statistics, whatever the distribution: ranks n/2 +- 0.98 sqrt(n)."""
    count = len(ordered)
    reach = 0.98 * np.sqrt(count)
    low, high = int(np.floor((count - 1) / 2 - reach)), int(np.ceil((count - 1) / 2 + reach))
    return float(ordered[max(low, 0)]), float(ordered[min(high, count - 1)])


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[bool]:
    """Keep this process on as many cores as it has threads; says whether that worked, and undoes it."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
    if len(before) < threads:
        yield False
        return
    try:
        os.sched_setaffinity(0, sorted(before)[-threads:])
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setaffinity(0, before)


def noise(size: Preprocess, count: int = 4) -> list[np.ndarray]:
    """Frames to calibrate an engine with that is only timed, preprocessed: the same noise every time."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, size.height, size.width, 3), np.uint8)
    return [to_input(frame, size) for frame in pixels]


def noise_int8(model: ir.Model, frames: list[np.ndarray]) -> ir.Model:
    """A float graph quantised for ONNX Runtime with ranges from `noise`: an engine's time does not depend on them."""
    return quantize.quantize(model, calibrate.calibrate(model, frames), dialect="ort")
