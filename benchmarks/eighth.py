"""One net and its rivals, timed together once for all benchmarks that ask about it.

ResNet-18 of 64 channels at 128x128, three tasks; an eighth of a layer is specialised, the same channels for all tasks,
in granules of 16: layers of 64 channels stay shared, the others become 160, 320 and 640 wide in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import subjects
from subjects import Built
from timing import Times, measure

WIDTH, SIZE, GRANULE = 64, (128, 128), 16
#: Of the stages of ours, all values counted.
WIDTHS = (64, 160, 320, 640)


@dataclass(frozen=True)
class Eighth:
    """Nets by name, and the seconds of all of them, and of the three single-task nets together, in the same rounds."""

    nets: dict[str, Built]
    times: Times

    def keep(self, benchmark: Any, name: str) -> None:
        """Put a net's own times into the result file."""
        benchmark.pedantic(self.nets[name].run, (subjects.image(SIZE),), rounds=20, warmup_rounds=2)


def timed(seconds: float, clock: Callable[[], float]) -> Eighth:
    """Build and time: "ours" (merged), "split" (the same net), "plain", "separate", "dense" (equal useful MACs), "peak"
    (large layers only).
    """
    gated = subjects.gated(WIDTH, SIZE)
    chosen = subjects.gates(gated, subjects.joint(gated, 1 / 8, GRANULE))
    useful = subjects.useful_macs(chosen)
    plain = subjects.plain(WIDTH, SIZE)
    nets = {
        "ours": subjects.build(chosen, "merged", useful),
        "split": subjects.build(chosen, "split", useful),
        "plain": subjects.build(plain),
        "dense": subjects.build(subjects.dense(useful, SIZE)),
        "peak": subjects.build(subjects.peak(SIZE)),
    }
    runs: dict[str, Any] = {name: net.run for name, net in nets.items()}
    runs["separate"] = subjects.together([subjects.build(model) for model in subjects.singles(plain)])
    pairs = [("ours", "plain"), ("split", "plain"), ("separate", "ours"), ("ours", "dense"), ("ours", "peak")]
    return Eighth(nets, measure(runs, subjects.image(SIZE), pairs, seconds=seconds, clock=clock))
