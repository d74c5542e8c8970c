"""Gate patterns that meet a budget: whole granules open and close by what they are worth in task loss per millisecond.

A pattern is worth the sum over its open gates of the loss that closing each would cost. The staircase of the device's
times decides where a site's width ends: a count that fits no step costs as much as the next that does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .budget import Budget
from .net import InterroGateNet
from .pricing import Pricing

#: bool [T, granules] for each group of tied gates.
Coarse = list[np.ndarray]
Losses = Callable[[InterroGateNet], Iterable[Tensor]]
#: A budget is filled to between these shares of it, as predicted.
FILL = (0.96, 0.98)
MOST_MOVES = 1000
_LOGIT = 0.5


@dataclass(frozen=True)
class Move:
    """One group's other mask: the pattern's milliseconds with it, and how much more the pattern is worth."""

    group: int
    mask: np.ndarray
    ms: float
    gain: float


def round_gates(
    net: InterroGateNet, budget: Budget, worth: Sequence[np.ndarray] | None = None, scale: float = 1.0
) -> float:
    """Open and close granules until the predicted time is 96 to 98 % of the budget; returns that time in ms.

    worth: of each gate, float [T, granules] a group (see `gate_worth`; default: the logits). scale: measured time /
    predicted, where that is known. The gates must not be frozen. Coarse granules may leave more of the budget unused.
    """
    pricing = budget.pricing(net)
    limit = budget.limit(net) / scale
    values, shapes = list(worth) if worth is not None else _logits(pricing), [m.shape for m in coarse(pricing)]
    if [np.shape(value) for value in values] != shapes:
        evidence = f"{[np.shape(value) for value in values]!r:.80}, wanted {shapes!r:.80}"
        raise InputError("the gates' worth is of another net", evidence, "pass what gate_worth returns")
    pattern = fit(pricing, coarse(pricing), values, (FILL[0] * limit, FILL[1] * limit))
    assign(pricing, pattern)
    return pricing.ms(fine(pricing, pattern))


def gate_worth(net: InterroGateNet, losses: Losses) -> list[np.ndarray]:
    """What each gate is worth open, in loss: float [T, granules] a group, in the order of `Pricing.gates`.

    First-order: minus the loss's derivative by the gate's value, on the straight-through path. It is averaged over
    batches and over three patterns, today's, all open and all closed: at one end the slope says little about the way.
    losses: net -> the scalar loss of a few batches. `net` does not change.
    """
    probe = copy.deepcopy(net).train()
    gates = list(dict.fromkeys(site.gates for site in probe.gate_sites()))
    today = [gate.logits().detach().clone() for gate in gates]
    total = [torch.zeros_like(logits) for logits in today]
    for pattern in (today, [torch.ones_like(t) for t in today], [-torch.ones_like(t) for t in today]):
        with torch.no_grad():
            for gate, logits in zip(gates, pattern, strict=True):
                for task, row in zip(gate.tasks, logits, strict=True):
                    gate.alpha[task].copy_(torch.where(row >= 0, _LOGIT, -_LOGIT))
        found = [torch.zeros_like(logits) for logits in today]
        count = 0
        for loss in losses(probe):
            count += 1
            for sum_, slope in zip(found, _slopes(gates, loss), strict=True):
                sum_ -= slope
        for sum_, part in zip(total, found, strict=True):
            sum_ += part / max(count, 1)
    inner = torch.sigmoid(torch.tensor(_LOGIT))
    return [(part / (3 * inner * (1 - inner))).cpu().double().numpy() for part in total]


def _slopes(gates: Sequence[object], loss: Tensor) -> list[Tensor]:
    parameters = [[gate.alpha[task] for task in gate.tasks] for gate in gates]  # type: ignore[attr-defined]
    flat = [alpha for rows in parameters for alpha in rows]
    slopes = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    return [
        torch.stack([torch.zeros_like(a) if (s := next(slopes)) is None else s for a in rows]) for rows in parameters
    ]


def fit(pricing: Pricing, pattern: Coarse, worth: Sequence[np.ndarray], window: tuple[float, float]) -> Coarse:
    """The pattern, changed granule by granule until its predicted ms lies in the window (least, most).

    Above the window it gives up what is worth least per millisecond. Below, it takes what is worth most, and what is
    worth nothing too as long as the window is not reached: the milliseconds are there to be used.
    """
    low, high = window
    pattern, ms = list(pattern), pricing.ms(fine(pricing, pattern))
    while ms > high:
        moves = [move for move in _moves(pricing, pattern, worth) if move.ms < ms - 1e-12]
        if not moves:
            return pattern
        best = max(moves, key=lambda move: move.gain / (ms - move.ms))
        pattern, ms = _made(pattern, best), best.ms
    filling = False
    for _ in range(MOST_MOVES):
        moves = [move for move in _moves(pricing, pattern, worth) if move.ms <= high]
        better = [move for move in moves if move.gain > 0 and (move.ms > ms or not filling)]
        if not better and ms < low:
            filling, better = True, [move for move in moves if move.ms > ms]
        if not better:
            break
        best = max(better, key=lambda move: move.gain / max(move.ms - ms, 1e-6 * pricing.plain_ms))
        pattern, ms = _made(pattern, best), best.ms
    return pattern


def coarse(pricing: Pricing) -> Coarse:
    """Today's decisions, a column a granule."""
    return [mask[:, :: gates.granule] for mask, gates in zip(pricing.pattern(), pricing.gates, strict=True)]


def fine(pricing: Pricing, pattern: Coarse) -> Coarse:
    """A column a channel."""
    pairs = zip(pattern, pricing.gates, strict=True)
    return [mask.repeat(gates.granule, 1)[:, : gates.channels] for mask, gates in pairs]


@torch.no_grad()
def assign(pricing: Pricing, pattern: Coarse) -> None:
    """Make the gates decide so; logits whose decision stays keep their value."""
    for gates, mask, before in zip(pricing.gates, pattern, coarse(pricing), strict=True):
        for task, row, old in zip(gates.tasks, mask, before, strict=True):
            alpha = gates.alpha[task]
            wanted = torch.as_tensor(row, device=alpha.device)
            flips = torch.as_tensor(row != old, device=alpha.device)
            alpha.copy_(torch.where(flips, torch.where(wanted, _LOGIT, -_LOGIT).to(alpha), alpha))
        gates.version += 1


def _logits(pricing: Pricing) -> list[np.ndarray]:
    return [gates.logits().detach().cpu().double().numpy() for gates in pricing.gates]


def _made(pattern: Coarse, move: Move) -> Coarse:
    return [*pattern[: move.group], move.mask, *pattern[move.group + 1 :]]


def _moves(pricing: Pricing, pattern: Coarse, worth: Sequence[np.ndarray]) -> Iterator[Move]:
    """Every group a little wider, narrower, or with its openings made common to all tasks."""
    whole = fine(pricing, pattern)
    for group, mask in enumerate(pattern):
        gates = pricing.gates[group]
        sizes = _granule_sizes(gates.channels, gates.granule)
        seen = {mask.tobytes()}
        for other in _others(mask, worth[group], sizes, pricing.table.step):
            if other.tobytes() in seen:
                continue
            seen.add(other.tobytes())
            gain = float((worth[group] * (other.astype(int) - mask)).sum())
            one = other.repeat(gates.granule, 1)[:, : gates.channels]
            yield Move(group, other, pricing.ms([*whole[:group], one, *whole[group + 1 :]]), gain)


def _granule_sizes(channels: int, granule: int) -> np.ndarray:
    sizes = np.full(-(-channels // granule), granule)
    sizes[-1] = channels - granule * (len(sizes) - 1)
    return sizes


def _others(mask: np.ndarray, worth: np.ndarray, sizes: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """Masks within one step of live values from this one, the best of each size; and this one with joint openings."""
    for change in (grown, shrunk):
        other, moved = mask, 0
        while moved < step and (found := change(other, worth, sizes)) is not None:
            other, more = found
            moved += more
            yield other
    yield from aligned(mask, worth, sizes)


def grown(mask: np.ndarray, worth: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, int] | None:
    """One granule opened for further tasks, where that is worth most a live value; and the live values added.

    Opening what completes a channel for all tasks adds none, as the shared value goes.
    """
    return _best(mask, worth, sizes, opening=True)


def shrunk(mask: np.ndarray, worth: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, int] | None:
    """One granule closed for some tasks, where that costs least a live value; and the live values saved."""
    return _best(mask, worth, sizes, opening=False)


def _best(mask: np.ndarray, worth: np.ndarray, sizes: np.ndarray, opening: bool) -> tuple[np.ndarray, int] | None:
    gain, found = (worth if opening else -worth), None
    most = -math.inf
    for column, size in enumerate(sizes):
        free = [int(task) for task in np.flatnonzero(mask[:, column] != opening)]
        free.sort(key=gain[:, column].__getitem__, reverse=True)
        for count in range(1, len(free) + 1):
            other = mask[:, column].copy()
            other[free[:count]] = opening
            moved = abs(_extra(other) - _extra(mask[:, column])) * int(size)
            if not moved and not opening:
                continue  # the shared value takes the place of what closes
            rate = float(gain[free[:count], column].sum()) / max(moved, 0.1)
            if rate > most:
                most, found = rate, (column, other, moved)
    if found is None:
        return None
    changed = mask.copy()
    changed[:, found[0]] = found[1]
    return changed, found[2]


def aligned(mask: np.ndarray, worth: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Where channels are open for some tasks only: about as many live values, all open for every task.

    Such a residual stage needs no convolution that makes mixes. The granules of most worth to all tasks are opened.
    """
    tasks, opened = len(mask), mask.sum(0)
    if tasks < 2 or not ((opened > 0) & (opened < tasks)).any():
        return
    live = sum(_extra(column) * size for column, size in zip(mask.T, sizes, strict=True))
    whole = float(live) / ((tasks - 1) * float(sizes[0]))
    order = np.argsort(-worth.sum(0), kind="stable")
    for count in sorted({int(whole), min(int(np.ceil(whole)), len(sizes))}):
        joint = np.zeros_like(mask)
        joint[:, order[:count]] = True
        yield joint


def _extra(column: np.ndarray) -> int:
    """Live values of a channel, bool [T], besides the one that a plain net has."""
    return min(int(column.sum()), len(column) - 1)
