"""The soak fails on growth of anything, on lost frames and on frames out of order; a real leak is found in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soak
import tinynet

from igate_edge.errors import CheckFailed
from igate_edge.package import package
from igate_edge.runtime.frame import Result

GOOD: dict[str, Any] = {"received": 900, "answered": 890, "dropped": 7, "stale": 1, "refused": {}, "errors": {}}
GOOD |= {"seen": 890, "disorder": 0}
#: What one of 30 samples a minute apart looks like, with some noise.
FLAT = soak.Sample(0.0, 200.0, 20, 9, 100_000, 30, 3.0, 5.0)


def run(**slopes: float) -> list[soak.Sample]:
    """Sixty samples, each figure rising by its slope a sample."""
    rng = np.random.default_rng(0)
    rows = [replace(FLAT, seconds=float(k), rss_mb=200 + rng.normal(0, 0.5)) for k in range(60)]
    return [
        replace(row, **{name: getattr(row, name) + slope * row.seconds for name, slope in slopes.items()})
        for row in rows
    ]


def test_a_flat_run_passes() -> None:
    grown = soak.judge(run(), GOOD | {"stale": 3})
    assert grown["lost"] == 0 and abs(grown["rss_mb"]) < 1 and grown["p99_first_ms"] == grown["p99_last_ms"] == 5.0


def test_growth_at_the_start_is_warm_up() -> None:
    rows = [replace(row, rss_mb=row.rss_mb + 100 * min(row.seconds / 20, 1.0)) for row in run()]
    soak.judge(rows, GOOD | {"stale": 3})


@pytest.mark.parametrize(
    ("slopes", "counts", "words"),
    [
        ({"rss_mb": 0.5}, {}, "rss_mb grew by 1[78]"),
        ({"descriptors": 0.1}, {}, "descriptors grew"),
        ({"threads": 0.1}, {}, "threads grew"),
        ({"blocks": 40.0}, {}, "blocks grew by 1.4e"),
        ({"p99": 1.0}, {}, "p99 rose from"),
        ({}, {"stale": 1}, "frames were lost"),
        ({}, {"seen": 889}, "frames were lost"),
        ({}, {"disorder": 1}, "out of order"),
        ({}, {"errors": {"infer": 2}, "answered": 888, "seen": 888}, "frames failed"),
        ({}, {"received": 0, "answered": 0, "seen": 0, "dropped": 0, "stale": 0}, "frames were lost"),
    ],
)
def test_it_fails_on_growth_and_loss(slopes: dict[str, float], counts: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckFailed, match=words):
        soak.judge(run(**slopes), GOOD | {"stale": 3} | counts)


def test_a_soak_that_nobody_watched_is_none() -> None:
    with pytest.raises(CheckFailed, match="was not watched"):
        soak.judge(run()[:5], GOOD | {"stale": 3})
    silent = [replace(row, p50=None, p99=None) for row in run()]
    with pytest.raises(CheckFailed, match="no frame came out at the end"):
        soak.judge(silent, GOOD | {"stale": 3})


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux keeps these accounts")
def test_a_real_leak_is_found_and_its_absence_too(tmp_path: Path) -> None:
    """Each result kept by the sink, with 300 kB beside it: 2 s of the tiny network at 60 frames a second."""
    frames, kept = tinynet.frames(8), []
    package(tinynet.gated_onnx(), tmp_path / "a.igate", calibration=frames, golden=frames[:4])

    def leak(result: Result) -> None:
        kept.append((result, np.ones(75_000, np.float32)))

    record = soak.soak(tmp_path / "a.igate", 2.0, rate=60.0, size=(48, 64), also=leak)
    with pytest.raises(CheckFailed, match="rss_mb grew by") as caught:
        soak.judge(record["samples"], record["counts"])
    assert "lost" not in str(caught.value) and "order" not in str(caught.value)
    assert record["counts"]["received"] == 120 and record["counts"]["answered"] == len(kept)
    # Of two seconds a slope says nothing: a thread that writes a recording comes and goes. A leak would be of 120.
    threads = [sample.threads for sample in record["samples"]]
    assert max(threads) - min(threads) <= 4
