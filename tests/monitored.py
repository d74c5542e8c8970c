"""A monitor's world for tests: a clock that is set by hand, results of chosen times, and a quiet machine."""

from __future__ import annotations

import numpy as np

from igate_edge.runtime.frame import Result
from igate_edge.runtime.monitor import Monitor
from igate_edge.runtime.monitor_causes import Load

IMAGE = np.zeros((4, 4, 3), np.uint8)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def quiet(self) -> Load:
        """Accounts of two cores on which nobody runs."""
        return Load(2, 2 * self.now, 0.0, 0.0)


def result(total: float, **ms: float) -> Result:
    """A result that took `total` ms from arrival to published."""
    return Result(0, "camera", "", 0, IMAGE, {}, ms={"end_to_end": total, **ms})


def feed(monitor: Monitor, clock: Clock, *totals: float, every: float = 0.033, **ms: float) -> None:
    """One frame per total, `every` seconds apart."""
    for total in totals:
        clock.now += every
        monitor.frame(result(total, **ms))


def causes(monitor: Monitor) -> list[str]:
    """The causes that a verdict names."""
    return [hint.partition(":")[0] for hint in monitor.verdict().hints]
