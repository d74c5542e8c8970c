"""Times in buckets whose width grows with them: quantiles of any number of frames in memory that never grows."""

from __future__ import annotations

import math

#: Buckets per factor of two: a quantile is off by 4.4 % at most.
STEPS = 8
#: Milliseconds of the first and last bucket's edges; what lies beyond is counted in these.
LOWEST, HIGHEST = 2.0**-10, 2.0**17
_FIRST = round(math.log2(LOWEST) * STEPS)
_COUNT = round(math.log2(HIGHEST) * STEPS) - _FIRST
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}


class Histogram:
    """Milliseconds by logarithmic buckets; `count`, `total` and `peak` are exact. The caller holds a lock.

    >>> times = Histogram()
    >>> for ms in range(1, 101): times.add(ms)
    >>> abs(times.quantile(0.5) / 50 - 1) < 0.05, times.peak
    (True, 100)
    """

    def __init__(self) -> None:
        self.count, self.total, self.peak = 0, 0.0, 0.0
        self._counts = [0] * _COUNT

    def add(self, ms: float) -> None:
        """Count one time; NaN, infinity and times below 0 are left out: nothing was measured."""
        if not 0.0 <= ms < math.inf:
            return
        self.count += 1
        self.total += ms
        if ms > self.peak:
            self.peak = ms
        index = math.ceil(math.log2(ms) * STEPS) - _FIRST - 1 if ms > LOWEST else 0
        self._counts[min(index, _COUNT - 1)] += 1

    def quantile(self, share: float) -> float:
        """Milliseconds that `share` (0..1) of the times do not exceed; NaN when there are none."""
        rank, seen = math.ceil(share * self.count), 0
        if not self.count:
            return math.nan
        for index, number in enumerate(self._counts):
            seen += number
            if number and seen >= rank:
                # The bucket's geometric middle, which never lies above the largest time.
                return min(2.0 ** ((index + 0.5 + _FIRST) / STEPS), self.peak)
        return self.peak

    def summary(self) -> dict[str, float | int | None]:
        """count, sum, mean, max and `QUANTILES`, milliseconds; None where there is no time."""
        some = self.count > 0
        values: dict[str, float | int | None] = {"count": self.count, "sum": self.total}
        values["mean"] = self.total / self.count if some else None
        values |= {name: self.quantile(share) if some else None for name, share in QUANTILES.items()}
        return {**values, "max": self.peak if some else None}

    def cumulative(self, every: int = STEPS // 2, low: float = 2.0**-4, high: float = 2.0**13) -> list[list[float]]:
        """[[upper edge in ms, times up to it], ...] of every `every`-th bucket from `low` to `high` ms."""
        edges, seen = [], 0
        for index, number in enumerate(self._counts):
            seen += number
            edge = 2.0 ** ((index + 1 + _FIRST) / STEPS)
            if (index + 1 + _FIRST) % every == 0 and low <= edge <= high:
                edges.append([edge, seen])
        return edges
