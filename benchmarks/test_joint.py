"""The figures of one net: an eighth of the channels specialised, the same for all tasks.

ResNet-18 of 64 channels at 128x128, three tasks; see eighth.py. Its time is that of the faster layout, which
`igate build --tune` finds; everything else is asked of the merged one, the default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import judging
import numpy as np
from eighth import Eighth
from timing import ms

MOST_OF_PLAIN = 1.33
LEAST_SEPARATE = 1.7
LEAST_PEAK = 0.65


def test_an_eighth_specialised_against_the_plain_net(
    eighth: Eighth, benchmark: Any, figures: Callable[..., None]
) -> None:
    times = eighth.times
    layouts = {"merged": times["ours"], "split": times["split"]}
    best = min(layouts, key=lambda name: float(np.median(layouts[name])))
    eighth.keep(benchmark, "ours" if best == "merged" else "split")
    fix = "look at the layers: igate bench, and benchmarks/test_latency_model.py"
    pair = judging.at_most(f"ours ({best}) / plain", layouts[best], times["plain"], MOST_OF_PLAIN, fix)
    low, high = pair["interval"]
    each = ", ".join(f"{name} {ms(seconds):.2f} ms" for name, seconds in layouts.items())
    figures(
        f"ours ({best}) / plain {pair['ratio']:.3f} ({low:.3f}-{high:.3f}, at most {MOST_OF_PLAIN}): {each}, "
        f"plain {ms(times['plain']):.2f} ms, {len(layouts[best])} rounds",
        ours_over_plain=pair["ratio"],
    )


def test_a_merged_net_is_a_plain_one(eighth: Eighth, benchmark: Any, figures: Callable[..., None]) -> None:
    """Nothing of selecting, mixing and joining is left: operator for operator the plain net, a little wider."""
    eighth.keep(benchmark, "ours")
    counts = {name: judging.operators(eighth.nets[name].model) for name in ("ours", "plain")}
    figures(f"operators of ours: {counts['ours']}")
    judging.same_operators(counts["ours"], counts["plain"])


def test_three_separate_nets_against_ours(eighth: Eighth, benchmark: Any, figures: Callable[..., None]) -> None:
    eighth.keep(benchmark, "ours")
    times = eighth.times
    fix = "specialise fewer channels: ours must stay well below separate nets"
    pair = judging.at_least("separate / ours", times["separate"], times["ours"], LEAST_SEPARATE, fix)
    figures(f"separate / ours {pair['ratio']:.2f} (at least {LEAST_SEPARATE})", separate_over_ours=pair["ratio"])


def test_share_of_the_measured_int8_peak(eighth: Eighth, benchmark: Any, figures: Callable[..., None]) -> None:
    """MACs a second, zero blocks included, against those of convolutions large enough to reach this machine's peak."""
    eighth.keep(benchmark, "peak")
    nets, times = eighth.nets, eighth.times
    shares = {}
    for name in ("plain", "ours"):
        scale = nets["peak"].macs / nets[name].macs
        what = f"time of {name} over its time at peak"
        limit = 1 / LEAST_PEAK if name == "ours" else np.inf
        fix = "look for layers that run far from peak: igate profile"
        pair = judging.at_most(what, scale * times[name], times["peak"], limit, fix)
        shares[name] = 1 / pair["ratio"]
    peak = nets["peak"].macs / np.median(times["peak"]) / 1e9
    figures(
        f"share of the INT8 peak ({peak:.0f} GMAC/s): ours {shares['ours']:.0%} (at least {LEAST_PEAK:.0%}), plain "
        f"{shares['plain']:.0%}",
        peak_gmacs=peak,
        **{f"peak_share_{name}": share for name, share in shares.items()},
    )
