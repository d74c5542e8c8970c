"""Ours against a dense net of the same useful MACs: what the zero blocks of the merged layout cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import judging
from eighth import Eighth

from igate_edge.compiler import graph

MOST_OF_DENSE = 1.20


def test_equal_useful_macs(eighth: Eighth, benchmark: Any, figures: Callable[..., None]) -> None:
    """The honest control: a dense net, all its channel counts multiples of 16, with the MACs of ours less its zeros."""
    eighth.keep(benchmark, "dense")
    nets, times = eighth.nets, eighth.times
    dense, useful = nets["dense"].macs, nets["ours"].useful
    assert abs(dense / useful - 1) <= 0.03, f"dense {dense / 1e6:.0f} MMAC, ours {useful / 1e6:.0f}"
    # The few per cent that the dense net's MACs differ by are taken out in proportion.
    pair = judging.at_most(
        "ours / dense net of equal useful MACs",
        times["ours"],
        times["dense"] * (useful / dense),
        MOST_OF_DENSE,
        "ours pays too much for its zero blocks: specialise fewer channels, or build with --tune",
    )
    figures(
        f"ours / dense of equal useful MACs {pair['ratio']:.3f} (at most {MOST_OF_DENSE}): {useful / 1e6:.0f} and "
        f"{dense / 1e6:.0f} MMAC, with zero blocks {nets['ours'].macs / 1e6:.0f}",
        ours_over_dense=pair["ratio"],
    )
    assert graph.specs(nets["dense"].model) == graph.specs(nets["ours"].model)
