"""Predicted against measured milliseconds of 20 networks: gates of every structure, laid out both ways, INT8, 1 thread.

With a table of this machine the errors are held to limits. With one of another machine the prediction is only reported;
what is held is its shape: one factor for all nets, the median of measured over predicted, is the anchor as measured
here, and what is left must be smaller than that of a cost of so many MACs a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import judging
import numpy as np
import subjects
from subjects import Masks
from timing import Clock

from igate_edge.compiler.latency import LatencyTable, bundled
from igate_edge.devicetable import find
from igate_edge.errors import CheckFailed
from igate_edge.timing import interleave

WIDTH, SIZE = 32, (96, 128)
MEAN, MOST = 0.03, 0.10
ROUNDS = 60


def patterns() -> dict[str, Masks]:
    """Ten gate patterns: scattered, tied, the same for all tasks, rounded to the machine's step, early and late."""
    net = subjects.gated(WIDTH, SIZE)
    return {
        "8 % scattered": subjects.scattered(net, 0.08, 0, tied=False),
        "25 % scattered": subjects.scattered(net, 0.25, 1, tied=False),
        "10 % tied": subjects.scattered(net, 0.10, 2, tied=True),
        "30 % tied": subjects.scattered(net, 0.30, 3, tied=True),
        "1/16 same channels": subjects.joint(net, 1 / 16),
        "1/8 same channels": subjects.joint(net, 1 / 8),
        "3/8 same channels": subjects.joint(net, 3 / 8),
        "1/4 rounded": subjects.joint(net, 1 / 4, step=16),
        "early, rounded": subjects.joint(net, (1 / 4, 1 / 4, 0, 0), step=16),
        "late": subjects.joint(net, (0, 0, 1 / 8, 1 / 4)),
    }


def any_table() -> tuple[LatencyTable, str]:
    """This machine's table and "", or a shipped one and why it is not this machine's."""
    table, why = find(1)
    if table is not None:
        return table, ""
    if not bundled():
        raise CheckFailed("statistics of the latency model are missing", why, "igate profile")
    return LatencyTable.load(bundled()[0]), why


def test_latency_model(clock: Clock, benchmark: Any, figures: Callable[..., None]) -> None:
    table, foreign = any_table()
    gated, nets, guesses = subjects.gated(WIDTH, SIZE), {}, {}
    for name, masks in patterns().items():
        chosen = subjects.gates(gated, masks)
        for lowering in ("merged", "split"):
            built = subjects.build(chosen, lowering)
            nets[f"{name}, {lowering}"] = built
            guesses[f"{name}, {lowering}"] = table.predict(built.model, lowering).ms
    times = interleave({name: net.run for name, net in nets.items()}, subjects.image(SIZE), ROUNDS, clock)
    benchmark.pedantic(next(iter(nets.values())).run, (subjects.image(SIZE),), rounds=20, warmup_rounds=2)
    real = {name: judging.steady(name, seconds) for name, seconds in times.items()}
    macs = np.array([net.macs for net in nets.values()], np.float64)
    by_macs = macs * np.median([real[name] / net.macs for name, net in nets.items()])
    naive = np.abs(by_macs / np.array(list(real.values())) - 1)
    figures(f"table {table.name} of {table.date}{': ' + foreign if foreign else ''}")
    for name in nets:
        figures(f"{name:28} {guesses[name]:6.2f} ms predicted, {real[name]:6.2f} measured")
    # A foreign table must at least know more than a count of MACs.
    mean, most = (MEAN, MOST) if not foreign else (float(naive.mean()), float(naive.max()))
    errors = judging.predictions(list(guesses.values()), list(real.values()), foreign, mean=mean, most=most)
    found = np.abs(errors)
    figures(
        f"error: mean {found.mean():.1%}, largest {found.max():.1%} (at most {mean:.1%} and {most:.1%}); MACs alone: "
        f"{naive.mean():.1%}, {naive.max():.1%}",
        errors=dict(zip(nets, errors, strict=True)),
        foreign=foreign,
    )
