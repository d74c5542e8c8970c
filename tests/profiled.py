"""A machine for profiles whose every operator costs by a law, and a plan of few small networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import pytest

from igate_edge import profiler, profiler_jobs, profiler_nets
from igate_edge.engines import onnxruntime as ort
from igate_edge.profiler_clock import Means, Pulse

LAUNCH, READ, MADE, NODE = 0.002, 1e-6, 3e-6, 0.02


def law(read: int, made: int) -> float:
    """Milliseconds of any operator that reads and makes so many elements."""
    return LAUNCH + READ * read + MADE * made


@lru_cache(maxsize=256)
def structure(model: bytes) -> list[ort.NodeTime]:
    return ort.node_times(model, 1, warmup=0)


class Machine:
    """slow: how much slower than its law the machine is just now; calls: how many networks it has run by node."""

    def __init__(self) -> None:
        self.slow, self.calls, self.share = 1.0, 0, 1.0
        self.paused: list[float] = []
        self.stop_after: int | None = None

    def bring(self, reference: bytes, threads: int) -> Means:
        return Means(lambda: Pulse(0.5 * self.slow, self.share), self.nodes, self.whole, self.paused.append)

    def nodes(self, model: bytes, runs: int) -> list[ort.NodeTime]:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        timed = [(node, self.slow * law(node.read, node.made)) for node in structure(model)]
        return [ort.NodeTime(node.op, node.read, node.made, np.full(runs, ms)) for node, ms in timed]

    def whole(self, models: list[bytes], runs: int) -> list[float]:
        return [self.slow * sum(law(n.read, n.made) + NODE for n in structure(model)) for model in models]


def plan(precision: str, quick: bool = False) -> list[profiler_jobs.Job]:
    """The 3x3 convolutions of a plan without signed ones, and all operators."""
    small = {"grid 1x1", "tail 1x1", "stride 1x1", "grid 5x5", "heads 3x3", "grid 3x3 signed", "tail 3x3 signed"}
    return [job for job in profiler_jobs.jobs(precision, quick) if not job.name.startswith(tuple(small))]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Plans of a dozen tiny networks; gives the number of networks of a plan."""
    small = {"SIZES": ((2, 2), (6, 8)), "COUNTS": (4, 16, 32), "DEPTHWISE": (16, 32)}
    small |= {"TAIL_HW": (2, 2), "TAIL_CIN": (8,), "TAIL_STEPS": (1,), "STRIDED": ((4, 4),), "STRIDED_COUNTS": (16, 32)}
    for name, value in small.items():
        monkeypatch.setattr(profiler_jobs, name, value)
    monkeypatch.setattr(profiler, "jobs", plan)
    shapes = {"merged": ((6, 8), [16] * 3), "split": ((2, 2), [16] * 9)}
    nets = [(name, partial(profiler_nets.chain, *shape, 3)) for name, shape in shapes.items()]
    monkeypatch.setattr(profiler_nets, "anchors", lambda quick: nets)
    return lambda: len(plan("int8"))
