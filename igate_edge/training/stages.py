"""The stages of the recipe: each reads whole files, trains, and writes one file that holds weights and result."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import BudgetError
from ..files import os_errors, write_atomic
from ..gating.budget import Budget, HardFraction, L1Gates, SparsityHinge, fix_fraction
from ..gating.convert import InterroGateNet, PlainNet, interrogate
from ..gating.merge import MergedNet, merge
from ..gating.rounding import gate_worth
from .balance import Balance
from .checkpoint import CheckpointError, load_tensors, save_tensors
from .config import TrainConfig, digest, make_backbone
from .landing import land
from .loop import Progress, Run, drop_checkpoints, fit
from .source import Source
from .step import Optim, Penalty, evaluate, memory_format, to_device
from .tasks import Task

#: Share of the search over which the budget's weight grows. Long, because Adam moves all gates at one speed: tasks must
#: have sorted them before the budget closes them, else all close at once and rank alone decides (seen at 100 steps).
RAMP = 0.6
#: How far a frozen hard fraction may be from the one that was asked for.
TOLERANCE = 0.02
#: Batches on which the worth of gates is measured, when a budget of time is landed on.
WORTH_BATCHES = 4


@dataclass(frozen=True)
class Context:
    """What all stages of a run share."""

    config: TrainConfig
    tasks: Sequence[Task]
    source: Source
    folder: Path
    resume: bool = True
    progress: Progress | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Done:
    """A finished stage: its file, the key of all that made it, and its result (metrics, seconds, macs, weights...)."""

    name: str
    path: Path
    key: str
    result: dict[str, Any]

    def state(self) -> dict[str, torch.Tensor]:
        """The network's state_dict."""
        return load_tensors(self.path)[0]


def cached(ctx: Context, name: str, key: str, make: Callable[[], tuple[Any, dict[str, Any]]]) -> Done:
    """The stage's file when it is whole and was made from the same key, else `make` it and write it."""
    path = ctx.folder / f"{name}.safetensors"
    if ctx.resume and path.exists():
        try:
            meta = load_tensors(path)[1]
            if meta["key"] == key:
                drop_checkpoints(ctx.folder, name)
                return Done(name, path, key, meta["result"])
        except CheckpointError:
            pass
    with os_errors(ctx.folder, "create"):
        ctx.folder.mkdir(parents=True, exist_ok=True)
    net, result = make()
    save_tensors(path, net.state_dict(), {"key": key, "stage": name, "result": result})
    write_atomic(path.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    drop_checkpoints(ctx.folder, name)
    return Done(name, path, key, result)


def plain(
    ctx: Context,
    name: str,
    balance: Balance,
    *,
    steps: int,
    lr: float,
    tasks: Sequence[Task] | None = None,
    start: Done | None = None,
) -> Done:
    """Train a plain shared net (one task: a single-task net), from scratch or from the weights of `start`."""
    tasks = tasks or ctx.tasks
    names = [task.name for task in tasks]
    key = _key(ctx, name, names, steps, lr, type(balance).__name__, balance.weights(), start and start.key)

    def make() -> tuple[PlainNet, dict[str, Any]]:
        net = build_plain(ctx, tasks)
        if start is not None:
            wanted = net.state_dict()
            net.load_state_dict({k: v for k, v in start.state().items() if k in wanted})
        return net, _train(ctx, name, key, net, balance, steps, ctx.config.optim(lr))

    return cached(ctx, name, key, make)


def search(ctx: Context, base: Done, branches: Mapping[str, Done], balance: Balance, *, name: str, steps: int) -> Done:
    """Learn which channels to open: shared weights from `base`, each task's branch and head from `branches`."""
    made = [base.key, *(branches[task.name].key for task in ctx.tasks)]
    key = _key(ctx, name, _gating(ctx.config), steps, balance.weights(), made)

    def make() -> tuple[InterroGateNet, dict[str, Any]]:
        net = assemble(ctx, base, branches)
        lr = ctx.config.search_lr if ctx.config.recipe == "forked" else ctx.config.lr
        result = _train(ctx, name, key, net, balance, steps, ctx.config.optim(lr), penalty(ctx.config))
        return net, result | {"gates": gates_json(net)}

    return cached(ctx, name, key, make)


def freeze(ctx: Context, searched: Done, *, name: str = "frozen") -> Done:
    """Fix the gates. A budget of time is landed on (see landing.py); a hard one takes the last few by rank.

    Raises BudgetError when no gates meet a budget of time, or a hard one to 2 points. Others fix what the search found.
    """
    key = _key(ctx, name, _gating(ctx.config), searched.key)

    def make() -> tuple[InterroGateNet, dict[str, Any]]:
        net = build_gated(ctx)
        net.load_state_dict(searched.state())
        before, met = net.hard_fractions(), dict[str, Any](flipped={})
        if ctx.config.kind == "time":
            met = {"budget": _land(ctx, net, Balance(searched.result["weights"]))}
        elif ctx.config.kind == "hard":
            met = {"flipped": meet_budget(net, ctx.config)}
        net.freeze_gates()
        return net, {"searched": before, "hard": net.hard_fractions(), "gates": gates_json(net), **met}

    return cached(ctx, name, key, make)


def _land(ctx: Context, net: InterroGateNet, balance: Balance) -> dict[str, Any]:
    """Round the gates by what they are worth on a few batches, and say where the budget landed."""
    budget, device, form = time_budget(ctx.config), ctx.device, memory_format(net)
    pricing = budget.pricing(net)
    price = pricing.joint_ms(pricing.pattern())
    batch_at = ctx.source.train(ctx.config.batch, zlib.crc32(f"{ctx.config.seed} worth".encode()))
    cast("Any", net).to(device, memory_format=form)
    balance.to(device)
    batches = [to_device(batch_at(step), device, form) for step in range(WORTH_BATCHES)]
    worth = gate_worth(net, lambda probe: (balance(probe.losses(batch)) for batch in batches))
    landed = land(net.cpu(), budget, worth)
    searched_at = {"searched_ms": price, "searched_share": price / budget.limit(net)}
    return {**budget.as_json(), "limit_ms": budget.limit(net), **searched_at, **landed.as_json()}


def meet_budget(net: InterroGateNet, config: TrainConfig) -> dict[str, int]:
    """Flip the gates nearest to the threshold until the budget is met; returns flips by task. Raises BudgetError."""
    flipped = fix_fraction(net, config.budget)
    for task, share in net.hard_fractions().items():
        wanted = config.budget[task] if isinstance(config.budget, Mapping) else config.budget
        if abs(share - wanted) > TOLERANCE:
            fix = 'use a smaller granule, tie "none", or another budget'
            raise BudgetError(f"{task} cannot own {wanted:.0%} of the channels", f"whole gates allow {share:.1%}", fix)
    return flipped


def final(ctx: Context, frozen: Done, balance: Balance, *, name: str, steps: int, lr: float) -> Done:
    """A fresh full learning-rate cycle with the structure fixed: only what survives pruning is computed."""
    key = _key(ctx, name, steps, lr, balance.weights(), frozen.key)

    def make() -> tuple[InterroGateNet, dict[str, Any]]:
        net = build_gated(ctx)
        net.load_state_dict(frozen.state())
        net.freeze_gates()
        result = _train(ctx, name, key, net, balance, steps, ctx.config.optim(lr))
        return net, result | {"gates": gates_json(net)} | _landed(frozen)

    return cached(ctx, name, key, make)


def merged(ctx: Context, frozen: Done, balance: Balance, *, mode: str, steps: int, lr: float, name: str) -> Done:
    """A fresh full learning-rate cycle on the merged net of the frozen gates (see gating/merge.py): a plain CNN of that
    width, at a plain net's cost a step. mode: "masked" or "fill".
    """
    key = _key(ctx, name, mode, steps, lr, balance.weights(), frozen.key)

    def make() -> tuple[MergedNet, dict[str, Any]]:
        source = build_gated(ctx)
        source.load_state_dict(frozen.state())
        net = merge(source, mode)
        result = _train(ctx, name, key, net, balance, steps, ctx.config.optim(lr))
        gates = {"hard": source.hard_fractions(), "gates": gates_json(source)}
        return net, result | gates | {"form": net.form, "widths": net.widths()} | _landed(frozen)

    return cached(ctx, name, key, make)


def build_plain(ctx: Context, tasks: Sequence[Task] | None = None) -> PlainNet:
    """A fresh plain net, the same for the same seed."""
    torch.manual_seed(ctx.config.seed)
    return PlainNet(make_backbone(ctx.config), list(tasks or ctx.tasks), example=_example(ctx.config))


def build_gated(ctx: Context) -> InterroGateNet:
    """A fresh gated net with every gate open."""
    torch.manual_seed(ctx.config.seed)
    config = ctx.config
    granule = granule_of(config, len(ctx.tasks))
    return interrogate(
        make_backbone(config), list(ctx.tasks), granule=granule, tie=config.tie, example=_example(config)
    )


def assemble(ctx: Context, base: Done, branches: Mapping[str, Done]) -> InterroGateNet:
    """The gated net whose shared branch is `base` and whose task branches and heads are `branches`."""
    net = build_gated(ctx)
    net.load_shared(base.state())
    for task in ctx.tasks:
        net.load_task(task.name, branches[task.name].state())
    return net


def auto_granule(channels: int, most: int | None = None) -> int:
    """An eighth of a layer's width as a power of two, at least 4: coarser gates cost accuracy (recipe.md section 3).

    most: the granule whose opening for all T tasks, which adds T - 1 values a channel, takes one step of the machine.

    >>> [auto_granule(c) for c in (16, 32, 64, 100, 256)]
    [4, 4, 8, 8, 32]
    >>> [auto_granule(c, 16 // (3 - 1)) for c in (16, 32, 64, 100, 256)]
    [4, 4, 8, 8, 8]
    """
    eighth = max(4, 1 << max(channels // 8, 1).bit_length() - 1)
    return eighth if most is None else max(1, min(eighth, most))


def granule_of(config: TrainConfig, tasks: int) -> int | Callable[[int], int]:
    """Channels a gate of the layers of a net for this many tasks."""
    if config.granule or config.kind != "time":
        return config.granule or auto_granule
    step = config.step or time_budget(config).latency().step
    return partial(auto_granule, most=step // max(tasks - 1, 1))


def time_budget(config: TrainConfig) -> Budget:
    """The budget of time that a config asks for."""
    return Budget(config.ms, config.ratio, config.table)


def penalty(config: TrainConfig) -> Callable[[float], Penalty]:
    """Share of the stage done -> budget penalty: of time, a ramped hinge on hard gates, the paper's soft one, or L1."""
    weight = config.strength
    makes: dict[str, Callable[[], Callable[..., torch.Tensor]]] = {
        "time": lambda: time_budget(config),
        "hard": lambda: HardFraction(config.budget, weight, ramp=RAMP),
        "hinge": lambda: SparsityHinge(config.budget, weight),
        "l1": lambda: L1Gates(weight),
    }
    budget = makes[config.kind]()
    return lambda done: partial(budget, progress=done)


def gates_json(net: InterroGateNet) -> dict[str, dict[str, str]]:
    """Site -> task -> open channels as a string of 0 and 1."""
    return {
        site: {t: "".join("01"[int(b)] for b in row) for t, row in zip(net.task_names, mask.tolist(), strict=True)}
        for site, mask in net.gate_masks().items()
    }


def _train(
    ctx: Context,
    name: str,
    key: str,
    net: Any,
    balance: Balance,
    steps: int,
    optim: Optim,
    budget: Callable[[float], Penalty] | None = None,
) -> dict[str, Any]:
    """Train a net in place and measure it: the part of a stage's result that all stages share."""
    device, config = ctx.device, ctx.config
    form = memory_format(net)
    net.to(device, memory_format=form)
    balance.to(device)
    batch_at = ctx.source.train(config.batch, zlib.crc32(f"{config.seed} {name}".encode()))
    epoch = -(-ctx.source.frames // config.batch)
    run = Run(name, steps, optim, config.log_every, config.checkpoint_every, key, epoch)
    fitted = fit(
        net,
        lambda step: to_device(batch_at(step), device, form),
        run,
        balance,
        ctx.folder,
        penalty=budget,
        resume=ctx.resume,
        progress=ctx.progress,
    )
    metrics = evaluate(net, net.tasks, (to_device(batch, device, form) for batch in ctx.source.val()))
    hard = {"hard": net.hard_fractions()} if isinstance(net, InterroGateNet) else {}
    result = {**asdict(fitted), "metrics": metrics, "weights": balance.weights(), **hard}
    return result | {"config": config.as_json()}


def _landed(frozen: Done) -> dict[str, Any]:
    return {name: frozen.result[name] for name in ("budget",) if name in frozen.result}


def _example(config: TrainConfig) -> torch.Tensor:
    return torch.zeros(1, 3, *config.size)


def _gating(config: TrainConfig) -> tuple[Any, ...]:
    own = {name: getattr(config, name) for name in ("budget_kind", "sparsity_weight", "gate_lr", "ratio", "ms", "step")}
    given = {name: value for name, value in own.items() if value is not None}
    if config.kind == "time":
        given["table"] = config.table
    # Nothing is added for the recipe's own values, so that networks trained before these settings existed stay valid.
    return (config.granule, config.tie, config.budget, config.recipe, config.search_lr, *([given] if given else []))


def _key(ctx: Context, name: str, *parts: Any) -> str:
    c = ctx.config
    net = (c.backbone, c.width, c.size, c.batch, c.weight_decay, c.seed, c.head_width, c.class_weights)
    return digest(name, net, ctx.source.fingerprint, *parts)
