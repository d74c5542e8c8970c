"""The nets of the results table and of a sweep, each trained as one unit: same loss balance, compute and cycles.

Compute is counted in multiply-accumulates of training steps, as executed. Every net gets what the plain net needs for
`steps` steps. Ours pays for warm start, fork and search out of it; the net with random gates trains on instead of
searching; the grown net skips fork and search; separate nets get an equal part each. Budgets share the warm start and
the fork.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..compiler import graph
from ..compiler.latency import LatencyTable
from ..contract import is_number
from ..errors import InputError
from ..files import write_atomic
from ..gating.convert import InterroGateNet, PlainNet
from ..gating.export import to_onnx
from ..gating.merge import merge
from ..gating.separate import SeparateNets
from . import peers
from .balance import Balance
from .config import TrainConfig, digest, make_tasks
from .draws import joint, shuffled
from .goal import Goal
from .loop import Progress, step_macs
from .recipe import measure_balance
from .source import Source, open_source
from .stages import Context, Done, assemble, build_gated, build_plain, cached, freeze, gates_json, merged, plain, search
from .tasks import Task
from .widths import Fit, base_width, fits

#: Kinds of rows, in the order of a table. Those of `BY_BUDGET` come once a budget, those of `BY_WIDTH` once a width.
BY_BUDGET = ("pruned", "ours", "fill", "grown", "random")
BY_WIDTH = ("wide", "narrow")
NETS = ("single", "third", "plain", *BY_WIDTH, *BY_BUDGET)
#: Without the rival that needs the extra `peers`.
DEFAULT = tuple(name for name in NETS if name != "pruned")
#: A net that is to be pruned is this much wider than the plain net that meets the budget.
TO_PRUNE = 1.25
SEPARATE = ("single", "third", "narrow")


@dataclass(frozen=True)
class Shares:
    """How ours divides its compute; the rest goes to the final cycle. Rivals: first cycle `base`, second the rest."""

    base: float = 0.35
    fork: float = 0.03
    search: float = 0.08

    def __post_init__(self) -> None:
        given = list(asdict(self).values())
        if not all(is_number(share) and share > 0 for share in given) or sum(given) >= 1:
            raise InputError("shares of the compute", str(asdict(self)), "give three above 0 with a sum below 1")


@dataclass(frozen=True)
class Table:
    """One seed of a comparison: data, output folder, settings, budgets, loss weights (None: measured by a unit).

    Units are trainings with a folder each: balance, base, fork, plain; for a budget named N search-N, ours-N (merged,
    zero blocks stay zero), fill-N (they train), grown-N (no fork, no search), random-N (the same counts, drawn) and
    pruned-N (Torch-Pruning); wide-W and narrow-W-TASK by width; single-TASK and third-TASK; narrow-W, single and third
    are all of a kind side by side. `nets`: which kinds of nets to compare.
    """

    data: str
    folder: Path
    config: TrainConfig
    steps: int
    goals: tuple[Goal, ...]
    shares: Shares = Shares()
    weights: Mapping[str, float] | None = None
    nets: tuple[str, ...] = DEFAULT
    progress: Progress | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.nets if name not in NETS]
        if unknown or not self.nets:
            raise InputError(f"unknown nets {', '.join(unknown)}", f"known: {', '.join(NETS)}", "choose among these")

    @cached_property
    def source(self) -> Source:
        """The frames, loaded once."""
        return open_source(self.data, self.config)

    @cached_property
    def tasks(self) -> list[Task]:
        """All tasks of the comparison."""
        return make_tasks(self.config, self.source.available, self.source.class_weights)

    @cached_property
    def latency(self) -> LatencyTable:
        """The table that budgets are priced by."""
        return LatencyTable.load(self.config.table)

    @cached_property
    def fits(self) -> dict[str, Fit]:
        """Budget -> widths of its rivals: measured on first use, the same for all seeds."""
        return fits(self.config, self.tasks, self.goals, self.latency, self.folder.parent / "widths.json")

    def context(self, unit: str, config: TrainConfig | None = None) -> Context:
        """Where a unit keeps its stages."""
        return Context(config or self.config, self.tasks, self.source, self.folder / unit, True, self.progress)

    def rows(self) -> list[str]:
        """The nets that are compared; each is a unit whose folder holds the trained net as `final`."""
        found: list[str] = []
        for kind in (kind for kind in NETS if kind in self.nets):
            if kind in BY_BUDGET:
                found += [f"{kind}-{goal.name}" for goal in self.goals]
            elif kind in BY_WIDTH:
                widths = [getattr(self.fits[goal.name], kind) for goal in self.goals]
                found += [f"{kind}-{width}" for width in dict.fromkeys(widths) if width is not None]
            else:
                found.append(kind)
        return found

    def units(self) -> dict[str, tuple[str, ...]]:
        """Unit -> the units that must be done before; every unit stands after those."""
        found: dict[str, tuple[str, ...]] = {}

        def add(unit: str) -> None:
            for need in self.needs(unit):
                add(need)
            found.setdefault(unit, self.needs(unit))

        for row in self.rows():
            add(row)
        return found

    def needs(self, unit: str) -> tuple[str, ...]:
        """The units that a unit starts from. Raises InputError for one that this table cannot have."""
        balance: tuple[str, ...] = ("balance",) if self.weights is None else ()
        names = [task.name for task in self.tasks]
        known = {"balance": (), "base": balance, "fork": ("base",), "plain": ("base",)}
        for name in (goal.name for goal in self.goals):
            known |= {f"{kind}-{name}": (f"search-{name}",) for kind in ("ours", "fill", "random")}
            known |= {f"search-{name}": ("fork",), f"grown-{name}": ("base",), f"pruned-{name}": balance}
        kind, _, which = unit.partition("-")
        width, _, task = which.partition("-")
        if kind == "wide" and _is_number(which):
            known[unit] = balance
        alone = [kind, f"{kind}-{width}"][kind == "narrow"]  # all single-task nets of this kind
        if kind in ("single", "third") or (kind == "narrow" and _is_number(width)):
            known |= {alone: tuple(f"{alone}-{name}" for name in names), **{f"{alone}-{name}": () for name in names}}
        if unit not in known:
            kinds = f"balance, base, fork, search-N, {', '.join(NETS)}; budgets {', '.join(g.name for g in self.goals)}"
            raise InputError(f"unknown unit {unit!r}", f"known: {kinds}", "choose one of these")
        return known[unit]

    def run(self, unit: str) -> None:
        """Train one unit, and first whatever it needs that is not done; finished stages are found, not trained."""
        for need in self.needs(unit):
            if not self.done(need):
                self.run(need)
        kind, _, which = unit.partition("-")
        runs: dict[str, Callable[[str], object]] = {
            "balance": self._balance,
            "base": lambda _: self.base(),
            "fork": lambda _: self.forks(),
            "search": self.frozen,
            "ours": lambda name: self.ours(name, "masked"),
            "fill": lambda name: self.ours(name, "fill"),
            "grown": self.grown,
            "random": self.random,
            "pruned": self.pruned,
            "plain": lambda _: self.plain(),
            "wide": self.wide,
        }
        (self.separate(unit) if kind in SEPARATE else runs[kind](which))
        write_atomic(self.folder / unit / "done", self.key)

    @cached_property
    def key(self) -> str:
        """A name for all settings."""
        return digest(self.config.as_json(), self.steps, asdict(self.shares), self.data, self.weights)

    def done(self, unit: str) -> bool:
        """Whether a unit has run to its end with these settings."""
        mark = self.folder / unit / "done"
        return mark.exists() and mark.read_bytes() == self.key.encode()

    def balance(self) -> Balance:
        """The loss weights of every multi-task net: 1 for a task whose weight was not given."""
        if self.weights is not None:
            return Balance({task.name: self.weights.get(task.name, task.weight) for task in self.tasks})
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
        return self.steps * self._plain_macs(self.context("base"))

    def steps_for(self, net: Any, share: float) -> int:
        """Steps of this net that fit in a share of the compute."""
        return self._steps(step_macs(net, self.batch), share)

    def _steps(self, macs: float, share: float) -> int:
        return max(1, round(share * self.compute / macs))

    def _plain_macs(self, ctx: Context, task: Task | None = None) -> float:
        """Multiply-accumulates of a step of a plain net, counted once."""
        key = (ctx.config.width, task.name if task else None)
        if key not in self._counted:
            self._counted[key] = step_macs(build_plain(ctx, [task] if task else None), self.batch)
        return self._counted[key]

    @cached_property
    def _counted(self) -> dict[tuple[float | None, str | None], float]:
        return {}

    def base(self) -> Done:
        """First cycle of the plain net: warm start of ours, and of the plain rival."""
        ctx = self.context("base")
        steps = self._steps(self._plain_macs(ctx), self.shares.base)
        return plain(ctx, "base", self.balance(), steps=steps, lr=self.config.lr)

    def forks(self) -> dict[str, Done]:
        """The base's copies, each fine-tuned on one task."""
        base, ctx, made = self.base(), self.context("fork"), {}
        for task in self.tasks:
            steps = self._steps(self._plain_macs(ctx, task), self.shares.fork / len(self.tasks))
            weight = Balance({task.name: 1.0})
            lr = self.config.fork_lr
            made[task.name] = plain(ctx, f"fork-{task.name}", weight, steps=steps, lr=lr, tasks=[task], start=base)
        return made

    def frozen(self, which: str) -> Done:
        """The gates that a search found within a budget, rounded to the machine's steps and landed: fixed."""
        ctx = self._gated(f"search-{which}", which)
        base, forks = self.base(), self.forks()
        steps = self.steps_for(build_gated(ctx), self.shares.search)
        return freeze(ctx, search(ctx, base, forks, self.balance(), name="search", steps=steps))

    def ours(self, which: str, mode: str) -> Done:
        """The merged net of the fixed gates, trained for a full cycle: "masked" keeps its zero blocks, "fill" not."""
        kind = "ours" if mode == "masked" else "fill"
        frozen, ctx = self.frozen(which), self._gated(f"{kind}-{which}", which)
        steps = self.steps_for(merge(_load(ctx, frozen)), 1 - sum(asdict(self.shares).values()))
        return merged(ctx, frozen, self.balance(), mode=mode, steps=steps, lr=self.config.lr, name="final")

    def grown(self, which: str) -> Done:
        """Ours without fork and search: the base, grown in mid-training to the layers of the widened rival.

        In every layer the same share of channels, drawn once, is copied for each task; the zero blocks train.
        """
        ctx, base = self._gated(f"grown-{which}", which), self.base()
        wide, narrow = self._wide(which)
        share = (wide / narrow - 1) / max(len(self.tasks) - 1, 1)

        def make() -> tuple[InterroGateNet, dict[str, Any]]:
            net = assemble(ctx, base, {task.name: base for task in self.tasks})
            net.set_gates(joint(net, share, self.config.seed))
            net.freeze_gates()
            return net, {"hard": net.hard_fractions(), "gates": gates_json(net)}

        drawn = cached(ctx, "drawn", digest("grown", share, self.config.seed, base.key), make)
        steps = self.steps_for(merge(_load(ctx, drawn)), 1 - self.shares.base)
        return merged(ctx, drawn, self.balance(), mode="fill", steps=steps, lr=self.config.lr, name="final")

    def random(self, which: str) -> Done:
        """As ours, but each layer's open channels are drawn at random, jointly for all tasks: same counts, same time.

        The compute of the search goes into its final cycle.
        """
        frozen, ctx = self.frozen(which), self._gated(f"random-{which}", which)
        base, forks = self.base(), self.forks()

        def make() -> tuple[InterroGateNet, dict[str, Any]]:
            net = assemble(ctx, base, forks)
            net.set_gates(shuffled(net, frozen, self.config.seed))
            net.freeze_gates()
            met = {"budget": frozen.result.get("budget")}
            return net, {"hard": net.hard_fractions(), "gates": gates_json(net), **met}

        drawn = cached(ctx, "drawn", digest("drawn", frozen.key), make)
        steps = self.steps_for(merge(_load(ctx, drawn)), 1 - self.shares.base - self.shares.fork)
        return merged(ctx, drawn, self.balance(), mode="masked", steps=steps, lr=self.config.lr, name="final")

    def pruned(self, which: str) -> Done:
        """A wider plain net's first cycle, pruned by Torch-Pruning to the budget's predicted time; then a second."""
        goal, (wide, _) = next(goal for goal in self.goals if goal.name == which), self._wide(which)
        step = 2 if wide >= 2 else 0.05
        ctx = self.context(f"pruned-{which}", self._of_width(f"{round(TO_PRUNE * wide / step) * step:.6g}"))
        first = self._steps(self._plain_macs(ctx), self.shares.base)
        base = plain(ctx, "base", self.balance(), steps=first, lr=self.config.lr)
        known: dict[str, float] = {}

        def cost(net: PlainNet) -> float:
            key = digest(peers.widths(net))
            known[key] = known.get(key) or self._predicted(net)
            return known[key]

        goes_on = build_plain(ctx)
        goes_on.load_state_dict(base.state())
        target, granule = goal.limit(self._predicted(build_plain(self.context("base")))), self.latency.step // 2
        steps = self.steps_for(peers.prune_to(goes_on, target, cost, granule), 1 - self.shares.base)
        meet: dict[str, Any] = {"target": target, "cost": cost, "step": granule}
        return peers.pruned(ctx, base, self.balance(), name="final", steps=steps, lr=self.config.lr, **meet)

    def _predicted(self, net: PlainNet) -> float:
        return self.latency.predict(graph.load(to_onnx(net.eval(), self.config.preprocess()))).ms

    def _wide(self, which: str) -> tuple[float, float]:
        """Widths of the plain net that meets a budget, and of the plain net."""
        wide, narrow = self.fits[which].wide, base_width(self.config)
        if wide is None or narrow is None:
            raise InputError(f"no net can be made for {which}", "no widened net fits this budget", "raise the budget")
        return wide, narrow

    def plain(self) -> Done:
        """The plain net: the base's weights, a second cycle with the rest of the compute."""
        ctx = self.context("plain")
        steps = self._steps(self._plain_macs(ctx), 1 - self.shares.base)
        return plain(ctx, "final", self.balance(), steps=steps, lr=self.config.lr, start=self.base())

    def wide(self, width: str) -> Done:
        """The plain net of another width, in two cycles."""
        return self._two_cycles(self.context(f"wide-{width}", self._of_width(width)), self.balance())

    def separate(self, unit: str) -> Done:
        """A single-task net (`single-TASK`, `third-TASK`, `narrow-W-TASK`), or all of a kind side by side as one net.

        A single-task net has the whole compute for itself; of the other kinds each has an equal part.
        """
        kind, *rest = unit.split("-")
        config = self._of_width(rest[0]) if kind == "narrow" else self.config
        if unit in ("single", "third") or (kind == "narrow" and len(rest) == 1):
            return self._joined(self.context(unit, config), [self.separate(need) for need in self.needs(unit)])
        task = next(task for task in self.tasks if task.name == rest[-1])
        part = 1.0 if kind == "single" else 1 / len(self.tasks)
        return self._two_cycles(self.context(unit, config), Balance({task.name: 1.0}), task, part)

    def _joined(self, ctx: Context, parts: list[Done]) -> Done:
        """Single-task nets as one net and one file, as they are."""

        def make() -> tuple[SeparateNets, dict[str, Any]]:
            nets = [build_plain(ctx, [task]) for task in self.tasks]
            for net, part in zip(nets, parts, strict=True):
                net.load_state_dict(part.state())
            metrics = {name: values for part in parts for name, values in part.result["metrics"].items()}
            return SeparateNets(nets), {"metrics": metrics, "config": ctx.config.as_json()}

        return cached(ctx, "final", digest("joined", [part.key for part in parts]), make)

    def _two_cycles(self, ctx: Context, balance: Balance, task: Task | None = None, part: float = 1.0) -> Done:
        tasks, lr = [task] if task else None, self.config.lr
        macs = self._plain_macs(ctx, task)
        first = self._steps(macs, part * self.shares.base)
        start = plain(ctx, "base", balance, steps=first, lr=lr, tasks=tasks)
        rest = self._steps(macs, part * (1 - self.shares.base))
        return plain(ctx, "final", balance, steps=rest, lr=lr, tasks=tasks, start=start)

    def _gated(self, unit: str, which: str) -> Context:
        goal = next(goal for goal in self.goals if goal.name == which)
        return self.context(unit, replace(self.config, **goal.settings()))

    def _of_width(self, text: str) -> TrainConfig:
        width = float(text)
        if base_width(self.config) is None:
            raise InputError(f"{self.config.backbone} takes no width", f"width {text}", "choose another net")
        return replace(self.config, width=int(width) if width.is_integer() else width)


def _load(ctx: Context, frozen: Done) -> InterroGateNet:
    net = build_gated(ctx)
    net.load_state_dict(frozen.state())
    return net


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
