"""How long `igate build` takes for the shipped bundle: pruning at most 1 s, all with calibration at most 10 s.

Processor time, which is the wall time of an idle machine (one thread works here): other programs must not decide.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from igate_edge.builder import build
from igate_edge.bundle import Bundle
from igate_edge.compiler import graph, prune

MAX_PRUNE_S = 1.0
MAX_BUILD_S = 10.0


@pytest.mark.benchmark(timer=time.process_time)
def test_pruning(example: Path, seconds: Callable[..., float]) -> None:
    data = Bundle.read(example).model
    assert seconds(lambda: prune.prune(graph.load(data))) <= MAX_PRUNE_S


@pytest.mark.benchmark(timer=time.process_time)
def test_build_with_calibration(
    example: Path, frames: list[np.ndarray], tmp_path: Path, seconds: Callable[..., float]
) -> None:
    folders = (tmp_path / str(index) for index in count())
    reports = []

    def once() -> None:
        reports.append(build(example, cache_dir=next(folders), calibration=frames))

    taken = seconds(once, rounds=3)
    print(f"\n{reports[-1].seconds}")
    assert not reports[-1].cached
    assert taken <= MAX_BUILD_S
