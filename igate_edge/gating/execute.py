"""Running a plan once per stream: which streams are needed where, and the loop over the steps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .streams import Plan, Step, evaluate, input_value

SAME = -1  # key of a value that all streams share; streams are 0..T-1 for the tasks and T for the shared one
Fetch = Callable[[int, int], Any]  # (step, stream) -> value
#: (site's step, streams needed before it, streams needed after it, fetch, compute one stream) -> values by stream
Select = Callable[[int, frozenset[int], frozenset[int], Fetch, Callable[[int], Any]], Mapping[int, Any]]


@dataclass(frozen=True)
class Need:
    """Per step, the streams whose value is read: before its gate site and after it (the same without a site)."""

    before: tuple[frozenset[int], ...]
    after: tuple[frozenset[int], ...]
    last_use: tuple[tuple[int, ...], ...]  # per step, the values that nobody reads afterwards


def find_need(
    plan: Plan,
    sites: Collection[int],
    tasks: int,
    wanted: Collection[int],
    fixed: Mapping[int, Tensor] | None = None,
    inner: Mapping[int, int] | None = None,
) -> Need:
    """Liveness of streams for the heads of the `wanted` tasks; `fixed`: bool [T,C] of sites whose gates are frozen.
    `inner`: steps that are executed late, with the site they belong to.

    The mix behind the last sites feeds nothing and is never wanted; nor is a branch without an open gate.
    """
    before: list[frozenset[int]] = [frozenset()] * len(plan.steps)
    after: list[set[int]] = [set() for _ in plan.steps]
    for index in plan.outputs:
        after[index].update(wanted)
    for step in reversed(plan.steps):
        live = frozenset(after[step.index])
        if step.index in sites:
            live = _before_site(live, tasks, (fixed or {}).get(step.index))
        before[step.index] = live
        for use in step.uses:
            after[use] |= live
    return Need(tuple(before), tuple(frozenset(streams) for streams in after), _last_uses(plan, inner or {}))


def _before_site(after: frozenset[int], tasks: int, mask: Tensor | None) -> frozenset[int]:
    readers = range(tasks) if tasks in after else sorted(after)  # the mix reads the selected map of every task
    opened = [mask is None or bool(mask[t].any()) for t in range(tasks)]
    closed = [mask is None or not bool(mask[t].all()) for t in range(tasks)]
    shared = {tasks} if any(closed[t] for t in readers) else set()
    return frozenset({t for t in readers if opened[t]} | shared)


def _last_uses(plan: Plan, inner: Mapping[int, int]) -> tuple[tuple[int, ...], ...]:
    last: dict[int, int] = {}
    for step in plan.steps:
        for use in step.uses:
            last[use] = max(last.get(use, 0), inner.get(step.index, step.index))
    freed: list[list[int]] = [[] for _ in plan.steps]
    for use, reader in last.items():
        if use not in plan.outputs:
            freed[reader].append(use)
    return tuple(tuple(uses) for uses in freed)


def run(
    plan: Plan,
    branches: Sequence[nn.Module],
    image: Tensor,
    need: Need,
    select: Select,
    *,
    sites: Collection[int],
    inner: Collection[int] = (),
    silent: Collection[int] = (),
) -> Callable[[int, int], Any]:
    """Execute a plan; returns fetch(step, stream) for its outputs.

    `branches`: T task copies of the backbone, then the shared one. `sites`: steps behind which `select` is called.
    `inner`: steps that `select` computes itself. `silent`: streams that learn nothing from this pass.
    """
    table: dict[int, Mapping[int, Any]] = {}

    def fetch(index: int, stream: int) -> Any:
        values = table[index]
        return values[SAME] if SAME in values else values[stream]

    def compute(step: Step, stream: int) -> Any:
        with torch.no_grad() if stream in silent else contextlib.nullcontext():
            return evaluate(step, branches[stream], lambda index: fetch(index, stream))

    for step in plan.steps:
        streams = need.before[step.index]
        if step.kind == "input":
            table[step.index] = {SAME: input_value(step, image)}
        elif not streams or step.index in inner:
            pass
        elif step.same:
            table[step.index] = {SAME: compute(step, min(streams))}
        elif step.index in sites:
            after = need.after[step.index]
            table[step.index] = select(step.index, streams, after, fetch, functools.partial(compute, step))
        else:
            table[step.index] = _each(step, streams, silent, fetch, compute)
        for use in need.last_use[step.index]:
            table.pop(use, None)
    return fetch


def _each(
    step: Step, streams: frozenset[int], silent: Collection[int], fetch: Fetch, compute: Callable[[Step, int], Any]
) -> dict[int, Any]:
    """One value per stream; streams that read the very same tensors share one where that changes nothing."""
    values: dict[int, Any] = {}
    seen: dict[tuple[Any, ...], int] = {}
    for stream in sorted(streams):
        key: tuple[Any, ...] = (stream in silent, *(id(fetch(use, stream)) for use in step.uses))
        twin = seen.setdefault(key, stream) if step.pure else stream
        values[stream] = values[twin] if twin != stream else compute(step, stream)
    return values
