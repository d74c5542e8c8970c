"""Throughput of the INT8 engine at batch 1 to 16, and that a frame's answer does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import judging
import numpy as np
import subjects
from timing import Clock, measure

from igate_edge.engines import onnxruntime as ort

WIDTH, SIZE = 32, (96, 128)
BATCHES = (1, 2, 4, 8, 16)
#: A frame of a batch may cost this much more than a frame alone: at 16 frames a layer no longer fits the cache.
MOST_PER_FRAME = 1.25


def test_batch(longest: float, clock: Clock, benchmark: Any, figures: Callable[..., None]) -> None:
    gated = subjects.gated(WIDTH, SIZE)
    net = subjects.build(subjects.gates(gated, subjects.joint(gated, 1 / 8)), "merged")
    sessions = {count: ort.open(subjects.rebatch(net.int8, count)) for count in BATCHES}
    images = {count: subjects.image(SIZE, count) for count in BATCHES}
    judging.same_rows(net.session.run, {count: sessions[count].run for count in BATCHES}, subjects.image(SIZE))

    def run(count: int, _: np.ndarray) -> object:
        return sessions[count].run(images[count])

    runs = {str(count): partial(run, count) for count in BATCHES}
    pairs = [(str(count), "1") for count in BATCHES[1:]]
    times = measure(runs, images[1], pairs, seconds=2 * longest, clock=clock)
    benchmark.pedantic(sessions[16].run, (images[16],), rounds=20, warmup_rounds=1)
    for count in BATCHES:
        frames = count / np.median(times[str(count)])
        figures(f"batch {count:2}: {frames:6.0f} frames/s", **{f"frames_per_s_{count}": frames})
    for count in BATCHES[1:]:
        what = f"time of a frame in a batch of {count} over a frame alone"
        fix = f"use batches below {count} on this machine"
        judging.at_most(what, times[str(count)] / count, times["1"], MOST_PER_FRAME, fix)
