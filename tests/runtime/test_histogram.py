"""Histograms: quantiles to 5 % of the sorted times, exact ends, nothing counted that is no time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from igate_edge.runtime.histogram import HIGHEST, LOWEST, Histogram


@pytest.mark.parametrize("scale", [0.02, 1.0, 40.0, 3000.0])
def test_quantiles_are_those_of_the_sorted_times(scale: float) -> None:
    times = np.random.default_rng(3).lognormal(math.log(scale), 0.8, 5000)
    histogram = Histogram()
    for ms in times:
        histogram.add(float(ms))
    for share in (0.5, 0.9, 0.99, 0.999):
        want = np.sort(times)[math.ceil(share * 5000) - 1]
        assert histogram.quantile(share) == pytest.approx(want, rel=0.05)
    found = histogram.summary()
    assert (found["count"], found["max"]) == (5000, times.max())
    assert found["sum"] == pytest.approx(times.sum()) and found["mean"] == pytest.approx(times.mean())


def test_an_edge_belongs_to_the_bucket_below_it() -> None:
    """Prometheus' le means less or equal."""
    histogram = Histogram()
    for ms in (1.0, 1.0001, 2.0):
        histogram.add(ms)
    assert dict(map(tuple, histogram.cumulative()))[1.0] == 1
    assert dict(map(tuple, histogram.cumulative()))[2.0] == 3


def test_buckets_only_grow_and_end_at_all() -> None:
    histogram = Histogram()
    for ms in (0.001, 0.5, 3.0, 3.1, 900.0, 10.0**7):
        histogram.add(ms)
    edges, seen = zip(*histogram.cumulative(), strict=True)
    assert list(edges) == sorted(edges) and list(seen) == sorted(seen)
    assert (seen[0], seen[-1], histogram.count) == (1, 5, 6)


def test_what_is_no_time_is_left_out() -> None:
    histogram = Histogram()
    for ms in (math.nan, math.inf, -1.0):
        histogram.add(ms)
    assert histogram.count == 0 and math.isnan(histogram.quantile(0.5))
    assert set(histogram.summary().values()) == {0, None}


def test_times_beyond_the_ends_are_counted_in_them() -> None:
    histogram = Histogram()
    for ms in (0.0, LOWEST / 9, HIGHEST * 9):
        histogram.add(ms)
    assert histogram.count == 3 and histogram.quantile(0.5) == pytest.approx(LOWEST, rel=0.1)
    assert histogram.quantile(1.0) == pytest.approx(HIGHEST, rel=0.1) and histogram.peak == HIGHEST * 9
