"""How long `igate build` takes: pruning and layout at most 1 s, all with calibration at most 10 s.

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
from igate_edge.compiler import graph
from igate_edge.compiler.layout import lay_out

MAX_LAYOUT_S = 1.0
MAX_BUILD_S = 10.0


@pytest.mark.benchmark(timer=time.process_time)
def test_pruning_and_layout(example: Path, seconds: Callable[..., float], figures: Callable[..., None]) -> None:
    model = graph.load(Bundle.read(example).model)
    taken = seconds(lambda: lay_out(model))
    figures(f"pruning and layout {taken:.2f} s (at most {MAX_LAYOUT_S:g})")
    assert taken <= MAX_LAYOUT_S


@pytest.mark.benchmark(timer=time.process_time)
def test_pruning_and_layout_of_a_gated_resnet(seconds: Callable[..., float], figures: Callable[..., None]) -> None:
    """The gated ResNet-18 of eighth.py: what a bundle of an unmerged net takes."""
    import subjects
    from eighth import GRANULE, SIZE, WIDTH

    gated = subjects.gated(WIDTH, SIZE)
    chosen = subjects.gates(gated, subjects.joint(gated, 1 / 8, GRANULE))
    taken = seconds(lambda: lay_out(chosen), rounds=3)
    figures(f"pruning and layout of a gated ResNet-18 {taken:.2f} s (at most {MAX_LAYOUT_S:g})")
    assert taken <= MAX_LAYOUT_S


@pytest.mark.benchmark(timer=time.process_time)
def test_build_with_calibration(
    example: Path,
    frames: list[np.ndarray],
    tmp_path: Path,
    seconds: Callable[..., float],
    figures: Callable[..., None],
) -> None:
    folders = (tmp_path / str(index) for index in count())
    reports = []

    def once() -> None:
        reports.append(build(example, cache_dir=next(folders), calibration=frames))

    taken = seconds(once, rounds=3)
    figures(f"whole build {taken:.2f} s (at most {MAX_BUILD_S:g}): {reports[-1].seconds}")
    assert not reports[-1].cached
    assert taken <= MAX_BUILD_S
