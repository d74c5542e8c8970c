"""Benchmarks are tests of a promise: one that did not run, or whose times were not kept, fails."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tabletop.igate"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """A skipped benchmark proves nothing, so it is a failure."""
    report = (yield).get_result()
    if report.skipped and Path(item.path).is_relative_to(Path(__file__).parent):
        report.outcome, report.longrepr = "failed", f"this benchmark did not run: {report.longrepr}"


@pytest.fixture
def seconds(benchmark: Any) -> Callable[..., float]:
    """Time a call over some rounds and return the median in seconds; fails when pytest-benchmark was switched off."""

    def measure(call: Callable[[], object], rounds: int = 5) -> float:
        benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=1)
        assert benchmark.stats is not None, "the benchmark was disabled, so nothing was measured"
        return float(benchmark.stats.stats.median)

    return measure


@pytest.fixture(scope="session")
def example() -> Path:
    """The shipped bundle: a ResNet-18 layout at 128x128 with three tasks."""
    assert EXAMPLE.is_file(), f"{EXAMPLE} is missing: train it with `make train-demo`"
    return EXAMPLE


@pytest.fixture(scope="session")
def frames() -> list[np.ndarray]:
    """32 calibration frames with structure: smooth slopes, a rectangle and noise, uint8 [128,128,3]."""
    rng, out = np.random.default_rng(0), []
    for _ in range(32):
        image = np.linspace(20, 140, 128)[None, :, None] * rng.uniform(0.5, 1.2, 3) + rng.normal(0, 8, (128, 128, 3))
        y, x = rng.integers(0, 64, 2)
        image[y : y + 50, x : x + 60] += rng.uniform(20, 100, 3)
        out.append(np.clip(image, 0, 255).astype(np.uint8))
    return out
