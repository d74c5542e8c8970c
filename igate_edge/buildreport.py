"""What a build reports: what was made and why, and predicted beside measured milliseconds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import devicetable
from .compiler.latency import explain
from .compiler.layout import Laid
from .profiler_clock import LEAST_SHARE
from .timing import pinned
from .tune import Tuned, predict

#: A network is run so often for its measured time, or until so many seconds have passed.
RUNS, MOST_SECONDS, WARM_UP = 40, 1.0, 3


@dataclass(frozen=True)
class BuildReport:
    """What was built and why.

    seconds: per stage, and "total". cost: {"ours", "plain", "separate", "dense"} -> {"macs", "params"}. timing:
    {"int8_ms", "float_ms", "ratio"} of the A/B run, empty when a precision was asked for. golden, lint: one dict a
    result. warnings: everything that fell back, one sentence each. cached: True when the engine came from the cache;
    seconds, timing and latency are then those of the build that made it. latency: see `latency_of`. batch: the most
    rows of a call. gates: one dict for each check of a TensorRT engine. rolled_back: why the engine that was asked for
    did not pass, where this is the one built before. plugin: {"layers" that run on the kernels' plugin, "note" why none
    do, "why" and "times" per layer, "engine" ms with and without, "library" and "kernels" SHA-256}; {} elsewhere.
    """

    bundle: str
    seal: str
    form: str
    backend: str
    version: str
    threads: int
    tasks: list[str]
    precision: str
    reason: str
    cached: bool
    key: str
    path: str
    seconds: dict[str, float]
    cost: dict[str, dict[str, int]]
    pruning: dict[str, Any]
    coverage: dict[str, Any]
    timing: dict[str, float]
    golden: list[dict[str, Any]]
    lint: list[dict[str, Any]]
    warnings: list[str]
    device: dict[str, Any]
    latency: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    gates: list[dict[str, Any]] = field(default_factory=list)
    rolled_back: str = ""
    plugin: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def latency_of(
    laid: Laid,
    run: Callable[[np.ndarray], object],
    image: np.ndarray,
    precision: str,
    threads: int,
    tuned: Tuned | None,
) -> dict[str, Any]:
    """Predicted and measured ms of an engine side by side.

    {"measured_ms" (median), "predicted_ms", "error" (predicted / measured - 1), "error_bar" (what the table claims),
    "table", "note", "dearest" (operators by predicted time), "lowering", "tuned"}; without a table of this machine
    nothing is predicted and the note says why. tuned: what `tune` found, or None.
    """
    measured, share = median_ms(run, image, threads)
    table, note = devicetable.find(threads, precision)
    if share < LEAST_SHARE:
        busy = (
            f"the machine is under load: the engine had a core for {share:.0%} of the time, its measured ms mean little"
        )
        note = f"{busy}; {note}" if note else busy
    modes = sorted(set(laid.report["layers"].values()))
    found: dict[str, Any] = {
        "measured_ms": measured,
        "predicted_ms": None,
        "error": None,
        "error_bar": None,
        "table": "" if table is None else table.name,
        "note": note,
        "dearest": [],
        "lowering": ", ".join(modes) or "merged",
        "tuned": None if tuned is None else tuned.as_json(),
    }
    if table is not None:
        expected = predict(laid, table)
        found |= {"predicted_ms": expected.ms, "error": expected.ms / measured - 1, "error_bar": expected.error}
        found["dearest"] = explain(expected)
    return found


def median_ms(
    run: Callable[[np.ndarray], object], image: np.ndarray, threads: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Median ms of a call after a warm-up, on cores of its own, and the share of the time that it had one."""
    times: list[float] = []
    with pinned(threads):
        for _ in range(WARM_UP):
            run(image)
        begun, used = clock(), time.process_time()
        while len(times) < RUNS and (len(times) < 5 or clock() - begun < MOST_SECONDS):
            start = clock()
            run(image)
            times.append(clock() - start)
        share = (time.process_time() - used) / max(clock() - begun, 1e-9)
    return float(np.median(times)) * 1e3, share
