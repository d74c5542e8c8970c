"""The last step of a search: gates rounded to the machine's steps, until the engine of the pattern, measured, lands.

An engine's time does not depend on its weights, so the merged net of a pattern can be measured before it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import timing
from ..compiler import graph, layout
from ..engines import onnxruntime as ort
from ..errors import BudgetError, InputError
from ..gating.budget import LANDING, Budget
from ..gating.export import to_onnx
from ..gating.merge import merge_unchecked
from ..gating.net import InterroGateNet
from ..gating.rounding import Coarse, assign, coarse, round_gates

if TYPE_CHECKING:
    import onnx_ir as ir

#: How many patterns are built and measured at most.
BUILDS = 6
#: A share of the budget that another measurement, a per cent off, would still see within it: looked for first.
SURE = (0.96, 0.985)
#: Interleaved calls of each engine in a block; blocks until the ratio is known (95 %) to within NARROW of it, or MOST.
ROUNDS, LEAST, MOST, NARROW = 30, 4, 12, 0.01
#: Of a block's calls, the share that nothing else on the machine held up.
FAST = 0.2
#: Engines of each net: how one lies in memory is worth a per cent by itself.
TWINS = 4


@dataclass(frozen=True)
class Measured:
    """Milliseconds of an engine, its ratio to the plain shared net's, and the share of it within which it is known."""

    ms: float
    ratio: float
    interval: float = 0.0


#: Times the engine of a net with its gates as they are.
Measure = Callable[[InterroGateNet], Measured]


@dataclass(frozen=True)
class Landed:
    """Where a pattern landed. share: of the budget that is used, measured where `measured_ratio` is not None, else
    predicted; landed: between 95 and 100 %; note: why not measured, or why it did not land; "" otherwise.
    """

    predicted_ms: float
    predicted_ratio: float
    measured_ms: float | None
    measured_ratio: float | None
    share: float
    landed: bool
    builds: int
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def land(
    net: InterroGateNet,
    budget: Budget,
    worth: Sequence[np.ndarray] | None = None,
    measure: Measure | None = None,
    builds: int = BUILDS,
) -> Landed:
    """Round the net's gates so that the engine takes 95 to 100 % of the budget; the gates must not be frozen.

    measure: how an engine is timed, None = interleaved with the plain net on this machine. With a latency table of
    another device nothing is measured, and the note says so. The nearest pattern within the budget is kept when none
    lands; where even the nearest takes longer, raises BudgetError.
    """
    if any(site.gates.is_frozen for site in net.gate_sites()) or not isinstance(builds, int) or builds < 1:
        evidence = f"builds {builds!r:.20}, frozen gates: {any(site.gates.is_frozen for site in net.gate_sites())}"
        raise InputError("nothing can be landed", evidence, "pass one build or more, and gates that may move")
    budget.check(net)
    foreign = budget.latency().foreign()
    if foreign:
        round_gates(net, budget, worth)
        return _predicted(net, budget, foreign)
    measure = measure or measured(budget.pricing(net).plain)
    tried: dict[bytes, tuple[Coarse, Landed]] = {}
    scale, pricing = 1.0, budget.pricing(net)
    for _ in range(builds):
        round_gates(net, budget, worth, scale)
        pattern = coarse(pricing)
        key = b"".join(mask.tobytes() for mask in pattern)
        if key in tried:
            break  # granules allow nothing nearer
        found = _measured(net, budget, measure(net), len(tried) + 1)
        tried[key] = pattern, found
        if SURE[0] <= found.share <= SURE[1]:
            break
        scale = found.share / (found.predicted_ms / budget.limit(net))
    return _nearest(net, budget, list(tried.values()))


def measured(plain: ir.Model) -> Measure:
    """Times merged engines of a net's patterns: INT8, one thread, batch 1, interleaved with the plain shared net's."""
    size = graph.preprocess(plain)
    frames = timing.noise(size)
    reference = int8(plain, frames)

    def one(gated: InterroGateNet) -> Measured:
        return compare(int8(graph.load(to_onnx(merge_unchecked(gated), size)), frames), reference, frames[0])

    return one


def compare(ours: bytes, plain: bytes, image: np.ndarray) -> Measured:
    """One engine's time against another's, in blocks of interleaved rounds until the ratio is known well enough.

    Of each block the time that the fastest fifth of calls stays below: what else the machine does only ever adds.
    """
    with timing.pinned(1), ExitStack() as stack:
        nets = {f"{name}{k}": data for k in range(TWINS) for name, data in (("ours", ours), ("plain", plain))}
        runs: dict[str, Any] = {}
        for name, data in nets.items():
            runs[name] = stack.enter_context(closing(ort.open(data, threads=1))).run
        times, ratios, interval = list[float](), list[float](), np.inf
        while len(ratios) < MOST and (len(ratios) < LEAST or interval > NARROW):
            seconds = timing.interleave(runs, image, ROUNDS)
            fast = {name: float(np.quantile(value, FAST)) for name, value in seconds.items()}
            mine, theirs = (sum(fast[f"{name}{k}"] for k in range(TWINS)) / TWINS for name in ("ours", "plain"))
            times.append(mine * 1e3)
            ratios.append(mine / theirs)
            if len(ratios) > 1:
                interval = 4 * np.std(ratios, ddof=1) / np.sqrt(len(ratios)) / np.median(ratios)
    return Measured(float(np.median(times)), float(np.median(ratios)), float(interval))


def int8(model: ir.Model, frames: list[np.ndarray]) -> bytes:
    """A float graph laid out as a build does, and quantised: an engine's time does not depend on the ranges."""
    return graph.dump(timing.noise_int8(layout.lay_out(model).model, frames))


def _measured(net: InterroGateNet, budget: Budget, found: Measured, builds: int) -> Landed:
    price = budget.price(net)
    share = found.ratio / budget.ratio if budget.ratio is not None else found.ms / budget.limit(net)
    wide = f"the machine was busy: the ratio is known to {found.interval:.1%} only" if found.interval > 0.02 else ""
    return Landed(price.ms, price.ratio, found.ms, found.ratio, share, LANDING <= share <= 1, builds, wide)


def _predicted(net: InterroGateNet, budget: Budget, why: str) -> Landed:
    price = budget.price(net)
    share = price.ms / budget.limit(net)
    return Landed(price.ms, price.ratio, None, None, share, LANDING <= share <= 1, 0, why)


def _nearest(net: InterroGateNet, budget: Budget, tried: list[tuple[Coarse, Landed]]) -> Landed:
    """Keep the surest pattern that landed, else the one within the budget that uses most; none: BudgetError."""
    within = [pair for pair in tried if pair[1].share <= 1]
    if not within:
        best = min((found for _, found in tried), key=lambda found: found.share)
        evidence = (
            f"the fastest of {len(tried)} engines takes {best.measured_ms:.3g} ms, {best.share:.1%} of the budget"
        )
        fix = "give a little more, or measure the latency table again: `igate profile`"
        raise BudgetError("no measured engine is within the budget", evidence, fix)
    pattern, best = min(within, key=lambda pair: abs(pair[1].share - sum(SURE) / 2))
    assign(budget.pricing(net), pattern)
    if best.landed:
        return replace(best, builds=len(tried))
    note = f"the nearest engine of {len(tried)} within the budget uses {best.share:.1%} of it: granules are too coarse"
    return replace(best, builds=len(tried), note=note)
