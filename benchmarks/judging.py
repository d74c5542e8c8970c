"""What decides whether a benchmark passes. Each function raises CheckFailed with cause, evidence and fix, or returns.

Nothing passes for want of numbers: an absent, empty or impossible measurement is a failure, and so is one whose spread
is too wide to tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from machine import differences
from timing import ms

from igate_edge.builder import MIN_COVERAGE
from igate_edge.engines.onnxruntime import Coverage
from igate_edge.errors import CheckFailed
from igate_edge.timing import ratio

MIN_ROUNDS = 50
#: A 99th percentile of fewer frames is decided by two of them.
MIN_FRAMES = 200
QUIET = "run it alone on this machine, with nothing else using its cores"


def samples(what: str, seconds: Any, least: int = MIN_ROUNDS) -> np.ndarray:
    """Measured seconds as float64 [n]; raises CheckFailed when they are absent, too few or no times at all."""
    array = np.asarray([] if seconds is None else seconds, np.float64)
    if array.ndim != 1 or len(array) < least or not np.isfinite(array).all() or (array <= 0).any():
        evidence = f"{array.size} usable times of at least {least}"
        if array.ndim == 1 and len(array) >= least:
            evidence = f"{int((~np.isfinite(array) | (array <= 0)).sum())} of {len(array)} times are not above 0"
        raise CheckFailed(f"statistics of {what} are missing", evidence, "measure again; without times nothing passes")
    return array


def known_ratio(what: str, a: Any, b: Any, least: int = MIN_ROUNDS) -> dict[str, Any]:
    """`bench.ratio` of two nets timed in the same rounds; raises CheckFailed when there is none or it means nothing."""
    first, second = samples(what, a, least), samples(what, b, least)
    if len(first) != len(second):
        raise CheckFailed(f"statistics of {what} are missing", f"{len(first)} and {len(second)} rounds", "interleave")
    pair = ratio(first, second)
    if not pair["meaningful"]:
        raise CheckFailed(f"{what} cannot be told on this machine now", pair["note"], QUIET)
    return pair


def at_most(what: str, a: Any, b: Any, limit: float, fix: str, least: int = MIN_ROUNDS) -> dict[str, Any]:
    """The ratio a / b, whose median must not lie above `limit` for sure (the 95 % interval decides)."""
    pair = known_ratio(what, a, b, least)
    if pair["interval"][0] > limit:
        raise CheckFailed(f"{what} is {pair['ratio']:.3f}, at most {limit:.3f} is allowed", _evidence(pair, a, b), fix)
    return pair


def at_least(what: str, a: Any, b: Any, limit: float, fix: str) -> dict[str, Any]:
    """The ratio a / b, whose median must not lie below `limit` for sure."""
    pair = known_ratio(what, a, b)
    if pair["interval"][1] < limit:
        raise CheckFailed(f"{what} is {pair['ratio']:.3f}, at least {limit:.3f} is asked", _evidence(pair, a, b), fix)
    return pair


def _evidence(pair: Mapping[str, Any], a: Any, b: Any) -> str:
    low, high = pair["interval"]
    return f"median known to {low:.3f}-{high:.3f}, {ms(a):.2f} ms against {ms(b):.2f} ms, {len(a)} rounds"


def tail_ratio(a: np.ndarray, b: np.ndarray, quantile: float = 99) -> tuple[float, float, float]:
    """Ratio of two tails and its 95 % interval, by drawing the paired rounds again 400 times."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(a), (400, len(a)))
    drawn = np.percentile(a[picks], quantile, axis=1) / np.percentile(b[picks], quantile, axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.percentile(a, quantile) / np.percentile(b, quantile)), float(low), float(high)


def tail_at_most(what: str, a: Any, b: Any, limit: float, fix: str) -> tuple[float, float, float]:
    """The ratio of the 99th percentiles of two nets on the same frames, not above `limit` for sure."""
    first, second = samples(what, a, MIN_FRAMES), samples(what, b, MIN_FRAMES)
    found, low, high = tail_ratio(first, second)
    if low > limit:
        tails = f"99th percentiles {ms(first, 99):.2f} ms against {ms(second, 99):.2f} ms, {len(first)} frames"
        raise CheckFailed(
            f"{what} is {found:.3f}, at most {limit:.3f} is allowed", f"{low:.3f}-{high:.3f}, {tails}", fix
        )
    return found, low, high


def int8(coverage: Coverage | None, precision: str = "int8") -> float:
    """Share of convolution MACs in INT8; raises CheckFailed when the engine runs in float or its coverage is absent."""
    fix = "run `igate build` and read why; on a device where float is faster a budget in INT8 makes no sense"
    if coverage is None or not coverage.convs:
        raise CheckFailed("statistics of the INT8 coverage are missing", "no convolution was inspected", fix)
    if precision != "int8":
        raise CheckFailed("the engine does not run in INT8", f"it was built in {precision}", fix)
    coverage.require(MIN_COVERAGE)
    return coverage.int8_conv_macs_share


@dataclass(frozen=True)
class Budget:
    """A bundle's time budget: ratio to the plain net, or ms on `device` with `threads`; at least one is set."""

    ratio: float | None
    ms: float | None
    device: Any
    threads: int


def read_budget(entry: Any) -> Budget:
    """The manifest's budget; raises CheckFailed when there is none in time, or it is no number above 0."""
    fix = "train with `igate train --ratio 1.3` (or --ms) and export again"
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or kind != "Budget":
        evidence = "the manifest has none" if entry is None else f"its budget is of kind {kind!r}, which is no time"
        raise CheckFailed("the bundle carries no budget in time", evidence, fix)
    values = {name: entry.get(name) for name in ("ratio", "ms")}
    for name, value in values.items():
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if value is not None and not good:
            raise CheckFailed("the bundle's budget is no number", f"{name} is {value!r}", fix)
    if all(value is None for value in values.values()):
        raise CheckFailed("the bundle's budget states no time", "neither ratio nor ms is set", fix)
    return Budget(values["ratio"], values["ms"], entry.get("device"), int(entry.get("threads") or 1))


def tails(way: str, times: Mapping[str, Any]) -> str:
    """Median and 99th percentile of "ours" and "plain" in words; raises CheckFailed when there are no times."""
    kept = {name: samples(f"{name}, {way}", times.get(name)) for name in ("ours", "plain")}
    seen = [f"{name} p50 {ms(array):.2f} p99 {ms(array, 99):.2f} ms" for name, array in kept.items()]
    return f"{way}: {'; '.join(seen)}; {len(kept['ours'])} frames"


def meets_budget(
    budget: Budget,
    saturated: Mapping[str, Any],
    paced: Mapping[str, Any],
    here: Mapping[str, Any],
) -> list[str]:
    """Hold "ours" against "plain", both ways of running, at the median and the 99th percentile; returns the verdicts.

    ms are held where `here` is the machine of the budget: at the median as they are, and at the 99th percentile times
    what this machine adds to the plain net's own in the same run. Raises CheckFailed for the first thing missed, or
    when the budget says nothing about this machine.
    """
    lines, judged = [], 0
    foreign = differences(here, budget.device) if budget.ms is not None else []
    for way, times in (("back to back", saturated), ("paced", paced)):
        ours, plain = (samples(f"{name}, {way}", times.get(name)) for name in ("ours", "plain"))
        if budget.ratio is not None:
            judged += 1
            lines.append(_ratio_budget(way, ours, plain, budget.ratio))
        if budget.ms is not None and not foreign:
            judged += 1
            lines.append(_ms_budget(way, ours, plain, budget.ms))
    if foreign:
        lines.append(f"ms are not held here: {'; '.join(foreign)}")
    if not judged:
        fix = "run it on the machine of the budget, or train with a ratio, which holds on any machine"
        raise CheckFailed("the budget says nothing about this machine", "; ".join(foreign), fix)
    return lines


_RETRAIN = "train and land it again with this budget (`igate train --ratio`), or accept a larger one"


def _ratio_budget(way: str, ours: np.ndarray, plain: np.ndarray, limit: float) -> str:
    middle = at_most(f"{way}, the engine's time over the plain net's", ours, plain, limit, _RETRAIN)["ratio"]
    found, low, high = _tail_budget(way, ours, plain, limit)
    return f"{way}: x{middle:.3f} of plain at p50, x{found:.3f} ({low:.3f}-{high:.3f}) at p99, budget {limit:g}"


def _ms_budget(way: str, ours: np.ndarray, plain: np.ndarray, limit: float) -> str:
    low, _ = ratio(ours, np.ones(len(ours)))["interval"]
    if low > limit / 1e3:
        evidence = f"p50 {ms(ours):.2f} ms, known to be above {1e3 * low:.2f}; plain {ms(plain):.2f} ms in the same run"
        raise CheckFailed(f"{way}, the engine misses its budget of {limit:g} ms", evidence, _RETRAIN)
    _tail_budget(way, ours, plain, limit / ms(plain))
    return f"{way}: {ms(ours):.2f} ms at p50, budget {limit:g} ms"


def _tail_budget(way: str, ours: np.ndarray, plain: np.ndarray, limit: float) -> tuple[float, float, float]:
    what = f"{way}, at p99, the engine's time over the plain net's"
    return tail_at_most(what, ours, plain, limit, _RETRAIN)


def steady(what: str, seconds: Any) -> float:
    """Median milliseconds; raises CheckFailed when it is not known to within what `bench.ratio` calls meaningful."""
    times = samples(what, seconds)
    return 1e3 * float(known_ratio(what, times, np.ones(len(times)))["ratio"])


def predictions(
    predicted: Sequence[float], measured: Sequence[float], foreign: str, *, mean: float, most: float
) -> list[float]:
    """Signed errors of predicted ms as shares of measured ms; raises CheckFailed when they pass the limits.

    foreign: "" for a table of this machine, else the reason why it is none: the errors are then those that are left
    after one factor for all nets (its anchor, as measured here) is taken out.
    """
    guess, real = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    if len(guess) < 2 or guess.shape != real.shape or not (np.isfinite([guess, real]).all() and (real > 0).all()):
        evidence = f"{guess.size} predictions for {real.size} measured nets"
        raise CheckFailed("statistics of the latency model are missing", evidence, "measure every pattern")
    if foreign:
        guess = guess * np.median(real / guess)
    errors = guess / real - 1
    worst, average = float(np.abs(errors).max()), float(np.abs(errors).mean())
    if average > mean or worst > most:
        evidence = f"mean error {average:.1%} (at most {mean:.0%}), largest {worst:.1%} (at most {most:.0%})"
        fix = "measure this machine again, alone: igate profile" if not foreign else "run `igate profile` here"
        raise CheckFailed("the latency model does not predict this machine", evidence, fix)
    return [float(error) for error in errors]


def int8_pays(layers: Mapping[str, tuple[float, float]], most_lost: float) -> list[str]:
    """{layer: (INT8 us, float us)} -> the layers where INT8 loses; raises CheckFailed when they lose too much in all.

    most_lost: what an engine of mixed precision could gain at best, as a share of the INT8 layers' time.
    """
    if not layers or not np.isfinite(list(layers.values())).all() or min(min(pair) for pair in layers.values()) <= 0:
        raise CheckFailed("statistics of the layers are missing", f"{len(layers)} layers timed", "measure every layer")
    total = sum(pair[0] for pair in layers.values())
    losers = {name: pair for name, pair in layers.items() if pair[0] > pair[1]}
    lost = sum(pair[0] - pair[1] for pair in losers.values())
    lines = [f"{name}: INT8 {pair[0]:.0f} us, float {pair[1]:.0f} us" for name, pair in losers.items()]
    if lost > most_lost * total:
        evidence = f"{lost:.0f} of {total:.0f} us ({lost / total:.0%}, at most {most_lost:.0%}); {'; '.join(lines[:5])}"
        raise CheckFailed(
            "INT8 does not pay in these layers", evidence, "use precision='float', or report the processor"
        )
    return lines


def operators(model: Any) -> dict[str, int]:
    """How often each operator is in a graph."""
    counts: dict[str, int] = {}
    for node in model.graph:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def same_operators(ours: Mapping[str, int], plain: Mapping[str, int]) -> None:
    """Raise CheckFailed unless both graphs hold the same operators equally often."""
    if not ours or not plain:
        raise CheckFailed("statistics of the graph are missing", "no operators counted", "count both graphs")
    names = sorted({*ours, *plain})
    differing = [
        f"{name} {ours.get(name, 0)} for {plain.get(name, 0)}" for name in names if ours.get(name) != plain.get(name)
    ]
    if differing:
        fix = "lay it out as merged; gates must be tied over residual streams"
        raise CheckFailed("the merged net is not a plain one", "; ".join(differing), fix)


def all_layers(layers: Mapping[str, Any], macs: Mapping[str, int], share: float = 0.98) -> None:
    """Raise CheckFailed unless layers of at least `share` of the MACs were timed."""
    total = sum(macs.values())
    done = sum(count for name, count in macs.items() if name in layers)
    if not total or done < share * total:
        lacking = ", ".join([name for name in macs if name not in layers][:5])
        evidence = f"{done / max(total, 1):.1%} of the MACs, {share:.0%} asked; not found: {lacking or 'any'}"
        raise CheckFailed(
            "statistics of the layers are missing", evidence, "the runtime names its nodes otherwise here"
        )


def same_rows(alone: Any, batched: Mapping[int, Any], frame: np.ndarray) -> None:
    """Raise CheckFailed unless every row of a batch of one frame is answered as the frame alone (cases T1)."""
    wanted = alone(frame)
    for count, run in batched.items():
        for name, rows in run(np.repeat(frame, count, axis=0)).items():
            far = float(np.abs(rows - wanted[name]).max()) if rows.shape == (count, *wanted[name].shape[1:]) else np.inf
            if not far <= 1e-5 * float(np.abs(wanted[name]).max()):
                evidence = f"task {name!r}, batch {count}: up to {far:.3g} from the frame alone"
                raise CheckFailed(
                    "equal frames of a batch get different answers", evidence, "use batch 1 on this machine"
                )


def equal_time(what: str, pair: Mapping[str, Any], within: float) -> None:
    """Raise CheckFailed unless two nets take the same time, to a share `within`."""
    if not abs(pair["ratio"] - 1) <= within:
        evidence = f"x{pair['ratio']:.3f}, at most {within:.0%} off is a comparison"
        raise CheckFailed(f"{what}: no such net was found", evidence, QUIET)
