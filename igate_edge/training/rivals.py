"""The nets of the results table, each trained as one unit with the same loss balance, compute and learning-rate cycles.

Compute is counted in multiply-accumulates of training steps. Every net gets what the plain net needs for `steps` steps.
Ours pays for warm start, fork and search out of it; the net with random gates trains on instead of searching.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..errors import InputError
from ..files import write_atomic
from ..gating.convert import InterroGateNet
from .balance import Balance
from .config import TrainConfig, digest, make_tasks
from .loop import Progress, step_macs
from .recipe import measure_balance
from .source import Source, open_source
from .stages import Context, Done, assemble, build_gated, build_plain, cached, final, freeze, plain, search
from .tasks import Task


@dataclass(frozen=True)
class Shares:
    """How ours divides its compute; the rest goes to the final cycle. Rivals: first cycle `base`, second the rest."""

    base: float = 0.35
    fork: float = 0.12
    search: float = 0.18


@dataclass(frozen=True)
class Table:
    """One seed of the comparison: data, output folder, settings, and the loss weights (None: measured by a unit)."""

    data: str
    folder: Path
    config: TrainConfig
    steps: int
    shares: Shares = Shares()
    fractions: tuple[float, ...] = (0.10, 0.25, 0.50)
    weights: Mapping[str, float] | None = None
    progress: Progress | None = None

    @cached_property
    def source(self) -> Source:
        """The frames, loaded once."""
        return open_source(self.data, self.config)

    @cached_property
    def tasks(self) -> list[Task]:
        """All tasks of the comparison."""
        return make_tasks(self.config, self.source.available, self.source.class_weights)

    def context(self, unit: str, config: TrainConfig | None = None) -> Context:
        """Where a unit keeps its stages."""
        return Context(config or self.config, self.tasks, self.source, self.folder / unit, True, self.progress)

    def units(self) -> dict[str, tuple[str, ...]]:
        """Unit -> the units that must be done before, in an order that keeps two workers busy."""
        first = () if self.weights is not None else ("balance",)
        names = [f"{round(100 * f)}" for f in self.fractions]
        table: dict[str, tuple[str, ...]] = {} if self.weights is not None else {"balance": ()}
        table |= {"base": first, "fork": ("base",)}
        table |= {f"search-{n}": ("fork",) for n in names}
        table |= {f"single-{name}": () for name in self.config.tasks}
        table |= {f"ours-{n}": (f"search-{n}",) for n in names}
        table |= {"plain": ("base",)}
        table |= {f"widened-{n}": (*first, f"search-{n}") for n in names}
        table |= {f"third-{name}": () for name in self.config.tasks}
        return table | {f"random-{n}": (f"search-{n}",) for n in names}

    def run(self, unit: str) -> None:
        """Train one unit, or find it done. Raises InputError when a unit it needs is not."""
        needs = self.units().get(unit)
        if needs is None:
            raise InputError(f"unknown unit {unit!r}", f"known: {', '.join(self.units())}", "choose one of these")
        lacking = [name for name in needs if not self.done(name)]
        if lacking:
            raise InputError(f"{unit} needs {', '.join(lacking)}", "not finished yet", "run these units first")
        kind, _, which = unit.partition("-")
        runs: dict[str, Callable[[str], object]] = {
            "balance": self._balance,
            "base": lambda _: self.base(),
            "fork": lambda _: self.forks(),
            "search": self.frozen,
            "single": self.single,
            "third": self.third,
            "ours": self.ours,
            "random": self.random,
            "plain": lambda _: self.plain(),
            "widened": self.widened,
        }
        runs[kind](which)
        write_atomic(self.folder / unit / "done", self.key)

    @cached_property
    def key(self) -> str:
        """A name for all settings."""
        return digest(self.config.as_json(), self.steps, asdict(self.shares), self.data, self.weights)

    def done(self, unit: str) -> bool:
        """Whether a unit has run to its end with these settings."""
        mark = self.folder / unit / "done"
        return mark.exists() and mark.read_text() == self.key

    def balance(self) -> Balance:
        """The loss weights of every multi-task net."""
        if self.weights is not None:
            return Balance(self.weights)
        return Balance(json.loads((self.folder / "balance" / "balance.json").read_text())["weights"])

    def _balance(self, _: str) -> None:
        measure_balance(self.context("balance", replace(self.config, balance_steps=max(self.steps // 15, 1))))

    @cached_property
    def batch(self) -> Mapping[str, torch.Tensor]:
        """A batch to count a step's cost on."""
        return self.source.train(self.config.batch, 0)(0)

    @cached_property
    def compute(self) -> float:
        """Multiply-accumulates that every net may spend on training."""
        return self.steps * step_macs(build_plain(self.context("base")), self.batch)

    def steps_for(self, net: Any, share: float) -> int:
        """Steps of this net that fit in a share of the compute."""
        return max(1, round(share * self.compute / step_macs(net, self.batch)))

    def base(self) -> Done:
        """First cycle of the plain net: warm start of ours, and of the plain rival."""
        ctx = self.context("base")
        steps = self.steps_for(build_plain(ctx), self.shares.base)
        return plain(ctx, "base", self.balance(), steps=steps, lr=self.config.lr)

    def forks(self) -> dict[str, Done]:
        """The base's copies, each fine-tuned on one task."""
        base, ctx, made = self.base(), self.context("fork"), {}
        for task in self.tasks:
            steps = self.steps_for(build_plain(ctx, [task]), self.shares.fork / len(self.tasks))
            weight = Balance({task.name: 1.0})
            lr = self.config.fork_lr
            made[task.name] = plain(ctx, f"fork-{task.name}", weight, steps=steps, lr=lr, tasks=[task], start=base)
        return made

    def frozen(self, which: str) -> Done:
        """Learned gates at a hard fraction, fixed."""
        ctx = self._gated(f"search-{which}", which)
        base, forks = self.base(), self.forks()
        searched = search(ctx, base, forks, self.balance(), name="search", steps=self.search_steps(ctx))
        return freeze(ctx, searched)

    def search_steps(self, ctx: Context) -> int:
        """Steps of the search, whose net runs all branches."""
        return self.steps_for(build_gated(ctx), self.shares.search)

    def final_steps(self, frozen: Done) -> int:
        """Steps of the final cycle, whose net runs what survives."""
        return self.steps_for(self._load(frozen), 1 - sum(asdict(self.shares).values()))

    def ours(self, which: str) -> Done:
        """The gated net: a full cycle on the frozen structure."""
        frozen, ctx = self.frozen(which), self._gated(f"ours-{which}", which)
        steps, lr = self.final_steps(frozen), self.config.lr
        return final(ctx, frozen, self.balance(), name="final", steps=steps, lr=lr)

    def random(self, which: str) -> Done:
        """As ours, but each layer's open channels are drawn at random, jointly for all tasks: same counts, same cost.

        In place of the search it trains with these gates fixed, at the search's rate and for the search's compute.
        """
        frozen, ctx = self.frozen(which), self._gated(f"random-{which}", which)
        base, forks = self.base(), self.forks()

        def make() -> tuple[InterroGateNet, dict[str, Any]]:
            net = assemble(ctx, base, forks)
            net.set_gates(shuffled(net, frozen, self.config.seed))
            net.freeze_gates()
            return net, {"hard": net.hard_fractions()}

        drawn = cached(ctx, "drawn", frozen.key, make)
        steps, lr = self.steps_for(self._load(frozen), self.shares.search), self.config.search_lr
        settled = final(ctx, drawn, self.balance(), name="settled", steps=steps, lr=lr)
        return final(ctx, settled, self.balance(), name="final", steps=self.final_steps(frozen), lr=self.config.lr)

    def plain(self) -> Done:
        """The plain net: the base's weights, a second cycle with the rest of the compute."""
        ctx = self.context("plain")
        steps = self.steps_for(build_plain(ctx), 1 - self.shares.base)
        return plain(ctx, "final", self.balance(), steps=steps, lr=self.config.lr, start=self.base())

    def single(self, name: str) -> Done:
        """A single-task net with the whole compute for itself, in two cycles."""
        task = next(task for task in self.tasks if task.name == name)
        return self._two_cycles(self.context(f"single-{name}"), Balance({name: 1.0}), task)

    def third(self, name: str) -> Done:
        """A single-task net with its part of the compute: all of them together spend what one shared net does."""
        task = next(task for task in self.tasks if task.name == name)
        part = 1 / len(self.tasks)
        return self._two_cycles(self.context(f"third-{name}"), Balance({name: 1.0}), task, part)

    def widened(self, which: str) -> Done:
        """The plain net, as wide as ours' inference cost allows (rounded up to an even width), in two cycles."""
        width = self.width_like(self.frozen(which))
        return self._two_cycles(self.context(f"widened-{which}", replace(self.config, width=width)), self.balance())

    def _two_cycles(self, ctx: Context, balance: Balance, task: Task | None = None, part: float = 1.0) -> Done:
        tasks, lr = [task] if task else None, self.config.lr
        net = build_plain(ctx, tasks)
        first = self.steps_for(net, part * self.shares.base)
        start = plain(ctx, "base", balance, steps=first, lr=lr, tasks=tasks)
        rest = self.steps_for(net, part * (1 - self.shares.base))
        return plain(ctx, "final", balance, steps=rest, lr=lr, tasks=tasks, start=start)

    def width_like(self, frozen: Done) -> int:
        """The smallest even width whose plain net costs at least as many MACs as the frozen net."""
        wanted, width = forward_macs(self._load(frozen), self.config), int(self.config.width or 2)
        while forward_macs(build_plain(self.context("base", replace(self.config, width=width))), self.config) < wanted:
            width += 2
        return width

    def _load(self, frozen: Done) -> InterroGateNet:
        net = build_gated(self.context("base"))
        net.load_state_dict(frozen.state())
        return net

    def _gated(self, unit: str, which: str) -> Context:
        return self.context(unit, replace(self.config, budget=int(which) / 100))


def forward_macs(net: Any, config: TrainConfig) -> float:
    """Multiply-accumulates of one frame."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(torch.zeros(1, 3, *config.size))
    return counter.get_total_flops() / 2


def shuffled(net: InterroGateNet, frozen: Done, seed: int) -> dict[str, torch.Tensor]:
    """The frozen masks with the granules of each group of tied sites permuted, by one permutation for all tasks."""
    generator = torch.Generator().manual_seed(seed)
    orders: dict[int, torch.Tensor] = {}
    masks = {}
    for name, rows in frozen.result["gates"].items():
        gates: Any = net.sites[name].gates
        mask = torch.tensor([[bit == "1" for bit in rows[task]] for task in net.task_names])
        whole = mask.shape[1] // gates.granule
        order = orders.setdefault(id(gates), torch.randperm(whole, generator=generator))
        cut = whole * gates.granule
        moved = mask[:, :cut].view(len(mask), whole, gates.granule)[:, order].reshape(len(mask), cut)
        masks[name] = torch.cat([moved, mask[:, cut:]], dim=1)
    return masks
