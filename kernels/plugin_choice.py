"""Which layers take the plugin: those where it was measured faster, on the device, in whole engines.

The builder measures and decides in this order; nothing here touches TensorRT:

1. calls = functions.with_functions(quantised); build A from it: TensorRT inlines the calls and uses its own kernels.
2. Build B from functions.drop_functions(calls, image): every call is a plugin node.
3. times = gather(functions.layers(calls), runs of A, runs of B), a run being Session.layer_times of one engine.
4. choice = choose(times). If it names layers, build C from drop_functions(calls, image, only=choice.layers), else A it
   is.
5. C stands beside the other candidates: it passes the same gates, and wins only if the whole engine is faster than A,
   since profiled layers do not add up to a frame. The report lists choice.why.

No kernels for the device, or no plugin library: A, with the reason.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from igate_edge.errors import InputError

#: A layer has to be this much faster as a plugin: below it, clocks and neighbours decide what a profiler says.
MARGIN = 0.05
#: Of each engine; the middle half of fewer runs says nothing.
RUNS = 4

#: Layers of one run of an engine: (name, milliseconds), as TensorRT's profiler reports them.
Run = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one layer, one number a run: as TensorRT's own layers and as the plugin, reformats included.

    Empty where an engine has no layers that belong to this one alone.
    """

    engine: tuple[float, ...]
    plugin: tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    """layers: those that take the plugin, in order. why: a sentence for every layer that was looked at."""

    layers: tuple[str, ...]
    why: Mapping[str, str]


def choose(times: Mapping[str, Times], margin: float = MARGIN) -> Choice:
    """Take the plugin where it is faster beyond doubt: its median by `margin`, its slower runs than the others' faster.

    "Slower" and "faster" are upper and lower quartiles. Raises InputError for times that are negative or not finite, or
    a margin outside 0 to 1.

    >>> choose({"conv": Times((1.0, 1.1, 1.0, 1.2), (0.5, 0.6, 0.5, 0.5))}).layers
    ('conv',)
    """
    if not _number(margin) or not 0 <= margin < 1:
        raise InputError("not a margin", f"{margin!r:.40}", "pass a share from 0 to 1")
    if not isinstance(times, Mapping) or not all(isinstance(both, Times) for both in times.values()):
        raise InputError("not the times of layers", f"{times!r:.60}", "pass what `gather` gives")
    layers, why = [], {}
    for name, both in times.items():
        for each in (*both.engine, *both.plugin):
            if not (_number(each) and each >= 0):
                raise InputError("a layer's time is not a number of milliseconds", f"{name}: {each!r}", "measure again")
        faster, why[name] = _judge(both, margin)
        if faster:
            layers.append(name)
    return Choice(tuple(layers), why)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _judge(times: Times, margin: float) -> tuple[bool, str]:
    if min(len(times.engine), len(times.plugin)) < RUNS:
        return False, f"not compared: {len(times.engine)} and {len(times.plugin)} runs, {RUNS} needed"
    if min(*times.engine, *times.plugin) == 0:
        return False, "not compared: a run of 0 ms was not measured"
    own, ours = statistics.median(times.engine), statistics.median(times.plugin)
    said = f"plugin {ours:.4f} ms, TensorRT {own:.4f} ms"
    if ours > own * (1 - margin):
        return False, f"{said}: not faster by {margin:.0%}"
    slow, quick = statistics.quantiles(times.plugin, n=4)[2], statistics.quantiles(times.engine, n=4)[0]
    if slow >= quick:
        return False, f"{said}: their runs overlap"
    return True, f"{said}: the plugin is faster"


def gather(calls: Iterable[str], engine: Sequence[Run], plugin: Sequence[Run]) -> dict[str, Times]:
    """The times of each call in runs of both engines, by the names that layers and their reformats carry.

    A layer that TensorRT fused from parts of several calls belongs to none of them: those calls get no times from that
    engine. Layers of one call add up within a run.
    """
    names = tuple(calls)
    sums = [[_sums(names, run) for run in runs] for runs in (engine, plugin)]
    found = {}
    for name in names:
        own, ours = (tuple(run[name] for run in runs) if all(name in run for run in runs) else () for runs in sums)
        found[name] = Times(own, ours)
    return found


def _sums(names: Collection[str], run: Run) -> dict[str, float]:
    sums: dict[str, float] = {}
    shared: set[str] = set()
    for layer, ms in run:
        owners = _owners(names, layer)
        if len(owners) > 1:
            shared |= owners
        for name in owners:
            sums[name] = sums.get(name, 0.0) + ms
    return {name: ms for name, ms in sums.items() if name not in shared}


_BETWEEN = re.compile(r"[\s+|,\[\](){}]+")


def _owners(names: Collection[str], layer: str) -> set[str]:
    """The calls that a layer has parts of: a part is the call itself, or named CALL/NODE as inlining does it."""
    owners = set()
    for part in _BETWEEN.split(layer):
        fits = [name for name in names if part == name or part.startswith(f"{name}/")]
        if fits:
            owners.add(max(fits, key=len))
    return owners
