"""Budgets on gates: each is called as budget(net) and gives a scalar to add to the task loss.

All push the gates of every task at every step, also of tasks that are absent from a batch: a budget belongs to the
network, not to a batch. `Budget` holds milliseconds as a latency table predicts them; the others, the paper's among
them, hold a fraction of gates or MACs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..contract import is_number
from ..errors import BudgetError, InputError
from .gate import Gates, is_open
from .net import InterroGateNet, site_weights
from .pricing import Price, Pricing
from .site import GateSite

if TYPE_CHECKING:
    from ..compiler.latency import LatencyTable

Target = float | Mapping[str, float]
JUST = 1e-3  # logit of a gate that fix_fraction flips: just across the threshold
TABLE = "x86-epyc-avx2-1t"  # the latency table that is shipped
#: What a budget's penalty weighs at the end of a search, and 1 at its start.
STIFFEN = 100.0
#: A finished engine lands when it takes at least this share of its budget, and no more than all of it.
LANDING = 0.95


@dataclass(frozen=True)
class Budget:
    """Holds the predicted time of the gate pattern's engine: `ms` milliseconds, or `ratio` times the plain shared net.

    table: a LatencyTable, or a file's or a shipped table's name. Called with the fraction of the search that is done,
    it gives weight / T * sum_t (time_t / goal_t - 1)^2 / 2, where time_t is what the gates of task t add to the plain
    net's time (of a channel that all opened, each its part) and goal_t an equal part of what the budget adds. Openings
    count as joint where others would cost a convolution: rounding.py makes them so. The goal falls from all gates open
    to the budget until `close` of the search is done, a constant share a step, so that gates close in the order of
    their worth; below the goal they open again. The weight is not there to be tuned: it grows from 1 to 100, a penalty
    method, and gates land for tasks that pull on them a thousand times more or less. Raises InputError for what is no
    budget, BudgetError for one that cannot be held.
    """

    ms: float | None = None
    ratio: float | None = None
    table: LatencyTable | str = TABLE
    close: float = 0.7
    _pricings: WeakKeyDictionary[InterroGateNet, Pricing] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        given = [value for value in (self.ms, self.ratio) if value is not None]
        if len(given) != 1 or not is_number(given[0]) or given[0] <= 0:
            raise InputError("not a budget of time", f"ms={self.ms}, ratio={self.ratio}", "give one, above 0")
        if not is_number(self.close) or not 0 < self.close <= 1:
            raise InputError("a budget's close is not usable", f"{self.close!r:.60}", "pass a share of the search")
        if not isinstance(self.table, str) and not callable(getattr(self.table, "predict", None)):
            raise InputError("not a latency table", f"got {self.table!r:.60}", "pass a LatencyTable or a file's name")

    def __call__(self, net: InterroGateNet, progress: float = 1.0) -> Tensor:
        pricing = self.pricing(net)
        opened, goal = pricing.most_ms - pricing.plain_ms, self.limit(net) - pricing.plain_ms
        if not 0 < goal < opened:
            self.check(net)
        done = _ramp(self.close, progress)
        part = opened ** (1 - done) * goal**done / pricing.tasks
        return STIFFEN ** min(max(progress, 0.0), 1.0) * ((pricing.added() / part - 1) ** 2 / 2).mean()

    def pricing(self, net: InterroGateNet) -> Pricing:
        """The prices of this net's gate patterns; made once a net."""
        if not isinstance(net, InterroGateNet):
            raise InputError(
                "only a gated net has a price", f"got {type(net).__name__}", "pass what interrogate returns"
            )
        if net not in self._pricings:
            self._pricings[net] = Pricing(net, self.latency())
        return self._pricings[net]

    def latency(self) -> LatencyTable:
        """The latency table."""
        from ..compiler.latency import LatencyTable

        return LatencyTable.load(self.table) if isinstance(self.table, str) else self.table

    def price(self, net: InterroGateNet) -> Price:
        """Predicted time of the gates as they are now, in merged form."""
        pricing = self.pricing(net)
        return pricing.price(pricing.pattern())

    def limit(self, net: InterroGateNet) -> float:
        """The budget in predicted milliseconds."""
        return self.ms if self.ms is not None else (self.ratio or 0.0) * self.pricing(net).plain_ms

    def least(self, net: InterroGateNet) -> tuple[float, str]:
        """The least possible milliseconds, those of the plain shared net, and a sentence on what takes them."""
        pricing = self.pricing(net)
        heads = sorted(pricing.heads.items(), key=lambda item: -item[1])
        names = ", ".join(f"{name} {ms:.3g}" for name, ms in heads)
        text = (
            f"the plain shared net takes {pricing.plain_ms:.3g} ms: its backbone {pricing.backbone_ms:.3g}, "
            f"its heads {sum(pricing.heads.values()):.3g} ({names}); the most costly layer is {pricing.costliest}"
        )
        return pricing.plain_ms, text

    def check(self, net: InterroGateNet) -> None:
        """Raise BudgetError for a budget that no gate pattern meets, or that all of them do."""
        pricing, limit = self.pricing(net), self.limit(net)
        least, text = self.least(net)
        if limit <= least:
            asked = f"{limit:.3g} ms" if self.ms is not None else f"{self.ratio:g} times the plain net's time"
            if limit < sum(pricing.heads.values()):
                asked += ", less than the heads alone"
            fix = f"give more than {least:.3g} ms, or make the part that costs most cheaper"
            raise BudgetError(f"the budget cannot be met: {asked}", text, fix)
        if pricing.tasks == 1:
            fix = "train it without a budget, or several tasks with one"
            raise BudgetError("no budget is left for one task", f"{text}, whatever its gates do", fix)
        if limit >= pricing.most_ms:
            ratio = pricing.most_ms / pricing.plain_ms
            evidence = f"with every gate open the net takes {pricing.most_ms:.3g} ms, {ratio:.2f} times the plain net"
            raise BudgetError(f"the budget of {limit:.3g} ms never binds", evidence, "give less")

    def as_json(self) -> dict[str, Any]:
        """What an export's manifest says of the budget."""
        table = self.latency()
        about = {"table": table.name, "device": table.device, "backend": table.backend, "threads": table.threads}
        return {"kind": "Budget", "ms": self.ms, "ratio": self.ratio, **about}


@dataclass(frozen=True)
class SparsityHinge:
    """The paper's budget (method.md section 2, eq. 4): weight / T * sum_t max(0, mean_l mean_c sigmoid(alpha_t) -
    tau_t).

    tau: one number, or one per task. Its gradient is exactly 0 for a task at or below its tau. It holds the soft gate,
    not the hard one: all sigmoids at 0.51 count 0.51 though every gate is open. Measure `net.hard_fractions()`, or use
    HardFraction.
    """

    tau: Target
    weight: float = 1.0
    ramp: float = 0.0

    def __post_init__(self) -> None:
        _strength(self.weight, self.ramp)

    def __call__(self, net: InterroGateNet, progress: float = 1.0) -> Tensor:
        soft = _soft(net)
        over = torch.relu(soft - _targets(self.tau, net, soft))
        return _ramp(self.ramp, progress) * self.weight * over.mean()


@dataclass(frozen=True)
class L1Gates:
    """The ablation without a threshold: weight * mean over tasks, sites and channels of sigmoid(alpha)."""

    weight: float = 1.0
    ramp: float = 0.0

    def __post_init__(self) -> None:
        _strength(self.weight, self.ramp)

    def __call__(self, net: InterroGateNet, progress: float = 1.0) -> Tensor:
        soft = _soft(net)
        return _ramp(self.ramp, progress) * self.weight * soft.mean()


@dataclass(frozen=True)
class HardFraction:
    """Holds the fraction of open gates itself (recipe.md section 2): weight / T * sum_t max(0, h_t - target_t).

    h_t: mean of the hard gates through their straight-through estimate; cost "uniform": every site counts the same,
    "macs": sites count by their MACs. target: in [0, 1], one number or one per task. ramp: the weight grows linearly
    until `progress` (fraction of the search done, in [0, 1]) reaches it. Raises InputError.
    """

    target: Target
    weight: float = 1.0
    cost: str = "uniform"
    ramp: float = 0.1

    def __post_init__(self) -> None:
        _strength(self.weight, self.ramp)
        if self.cost not in ("uniform", "macs"):
            raise InputError(f"unknown cost {self.cost!r}", "known: uniform, macs", "use one of these")

    def __call__(self, net: InterroGateNet, progress: float = 1.0) -> Tensor:
        opened = _means(net, Gates.hard, site_weights(net, _cost_table(net, self.cost)))
        over = torch.relu(opened - _targets(self.target, net, opened))
        return _ramp(self.ramp, progress) * self.weight * over.mean()


@torch.no_grad()
def fix_fraction(net: InterroGateNet, target: Target, cost: str = "uniform") -> dict[str, int]:
    """Bring every task's hard fraction as near to its target as whole gates allow; returns the flips per task.

    The logits nearest to the threshold flip, in order of rank: of the open ones the lowest, of the closed ones the
    highest. Meant for the last few at the freeze, before `freeze_gates`; it may change many if the search ended
    elsewhere.
    """
    weights = site_weights(net, _cost_table(net, cost))
    shares = _granule_shares(net, weights)
    goals = _targets(target, net, torch.zeros(len(net.tasks), dtype=torch.float64)).tolist()
    return {task: _fix_task(task, goal, shares) for task, goal in zip(net.task_names, goals, strict=True)}


def _fix_task(task: str, goal: float, shares: list[tuple[Gates, Tensor]]) -> int:
    if any(gates.is_frozen for gates, _ in shares):
        raise InputError("the gates are frozen", "their decisions are fixed", "call fix_fraction before freeze_gates")
    logits = torch.cat([gates.alpha[task].detach().double().cpu() for gates, _ in shares])
    share = torch.cat([part for _, part in shares])
    before = is_open(logits)
    opened, excess = before.tolist(), float(share[before].sum()) - goal
    order, weights, settled = logits.abs().argsort(stable=True).tolist(), share.tolist(), False
    while not settled:
        settled = True
        for index in order:
            moved = excess - weights[index] if opened[index] else excess + weights[index]
            if abs(moved) < abs(excess) - 1e-12:  # rounding of the sums must not flip a gate for nothing
                opened[index], excess, settled = not opened[index], moved, False
    after = torch.tensor(opened)
    flipped = after != before
    start = 0
    for gates, part in shares:
        alpha, piece = gates.alpha[task], slice(start, start + part.numel())
        start += part.numel()
        crossed = torch.where(after[piece], JUST, -JUST).to(alpha)
        alpha.copy_(torch.where(flipped[piece].to(alpha.device), crossed, alpha))
        gates.version += 1
    return int(flipped.sum())


def _granule_shares(net: InterroGateNet, weights: Mapping[str, float]) -> list[tuple[Gates, Tensor]]:
    """Each Gates object once, with what one of its logits contributes to a task's fraction (summed over tied sites)."""
    found: dict[int, tuple[Gates, Tensor]] = {}
    for site in net.gate_sites():
        gates = site.gates
        sizes = torch.full((gates.alpha[gates.tasks[0]].numel(),), float(gates.granule), dtype=torch.float64)
        sizes[-1] = gates.channels - gates.granule * (sizes.numel() - 1)
        part = sizes / gates.channels * weights[site.name]
        known = found.get(id(gates))
        found[id(gates)] = (gates, part if known is None else known[1] + part)
    return list(found.values())


def _soft(net: InterroGateNet) -> Tensor:
    """The paper's soft measure [T]: mean sigmoid over channels, then over sites."""
    return _means(net, lambda gates: torch.sigmoid(gates.expanded()), site_weights(net, None))


def _means(net: InterroGateNet, measure: Callable[[Gates], Tensor], weights: Mapping[str, float]) -> Tensor:
    """[T]: weighted mean over sites of the mean over channels of measure(gates), a [T,C] tensor."""
    per_gates: dict[int, Tensor] = {}
    total: Tensor | None = None
    for site in net.gate_sites():
        mean = _mean_of(site, measure, per_gates)
        total = mean * weights[site.name] if total is None else total + mean * weights[site.name]
    assert total is not None
    return total


def _mean_of(site: GateSite, measure: Callable[[Gates], Tensor], known: dict[int, Tensor]) -> Tensor:
    key = id(site.gates)
    if key not in known:
        known[key] = measure(site.gates).mean(1)
    return known[key]


def _cost_table(net: InterroGateNet, cost: str) -> dict[str, float] | None:
    return net.site_costs() if cost == "macs" else None


def _targets(target: Target, net: InterroGateNet, like: Tensor) -> Tensor:
    names = net.task_names
    if isinstance(target, Mapping):
        if set(target) != set(names):
            raise InputError(
                "targets do not match the tasks",
                f"targets for {', '.join(sorted(target))}; tasks are {', '.join(names)}",
                "give one target per task",
            )
        values = [target[name] for name in names]
    else:
        values = [target] * len(names)
    if not all(is_number(value) and 0 <= value <= 1 for value in values):
        evidence = f"{values!r:.80}"
        raise InputError("a target fraction is outside of [0, 1]", evidence, "pass a fraction, not a percentage")
    return like.new_tensor(values)


def _strength(weight: float, ramp: float) -> None:
    """Raise InputError unless these can scale a loss: a NaN would reach every weight at the first step."""
    for name, value in (("weight", weight), ("ramp", ramp)):
        if not is_number(value) or value < 0:
            raise InputError(f"a budget's {name} is not usable", f"{value!r:.60}", "pass a number of 0 or more")


def _ramp(ramp: float, progress: float) -> float:
    if not is_number(progress):
        raise InputError("progress is not a number", f"{progress!r:.60}", "pass the fraction done, 0 to 1")
    return 1.0 if ramp <= 0 else min(1.0, max(0.0, progress / ramp))
