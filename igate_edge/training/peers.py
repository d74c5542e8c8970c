"""Torch-Pruning (extra `peers`) as a rival: a trained plain net, structurally pruned to a cost, then trained on.

Fang, G. et al., DepGraph: Towards Any Structural Pruning, CVPR 2023. Groups of coupled channels are found by that
library and ranked over the whole net by the norm of their weights; counts stay multiples of a step, since ragged ones
are slower than the channels they save.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import BudgetError, InputError, UnavailableError
from ..gating.convert import PlainNet
from .balance import Balance
from .checkpoint import load_tensors
from .stages import Context, Done, _key, _train, build_plain, cached
from .tasks import Task

Cost = Callable[[PlainNet], float]
#: Bisections of the share of channels to prune: the cost is met to about a hundredth.
PROBES = 7
#: No layer loses more than this share of its channels.
MOST = 0.95


def _load() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise UnavailableError("Torch-Pruning is missing", str(error), "pip install 'igate-edge[peers]'") from error
    return torch_pruning


def macs(net: PlainNet) -> float:
    """Multiply-accumulates of one frame of the size that the net was traced with."""
    frame = torch.zeros(_size(net))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).eval()(frame)
    return counter.get_total_flops() / 2


def prune(net: PlainNet, share: float, step: int = 8) -> PlainNet:
    """A copy without about `share` (0..1) of the channels of its layers, counts multiples of `step`; heads included.

    The answers' own channels stay. Raises InputError and UnavailableError.
    """
    if not 0 <= share <= MOST:
        raise InputError("a share of channels to prune", f"{share}", f"choose 0 to {MOST}")
    pruning, pruned = _load(), copy.deepcopy(net).cpu().eval()
    if share == 0:
        return pruned
    pruning.pruner.BasePruner(
        pruned,
        torch.zeros(_size(net)),
        importance=pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=share,
        max_pruning_ratio=MOST,
        global_pruning=True,
        isomorphic=True,
        round_to=step,
        ignored_layers=[_last(head) for head in pruned.heads.values()],
    ).step()
    return pruned


def prune_to(net: PlainNet, target: float, cost: Cost = macs, step: int = 8) -> PlainNet:
    """The least pruned copy whose `cost` (MACs, predicted or measured ms, ...) is at most `target`, by bisection.

    Raises BudgetError when no pruning reaches it, UnavailableError without the extra.
    """
    low, high, best = 0.0, MOST, prune(net, 0.0, step)
    reached = cost(best)
    if reached <= target:
        return best
    best = prune(net, high, step)
    least = cost(best)
    if least > target:
        raise BudgetError(
            "pruning does not reach the target", f"{least:.4g} at least, {target:.4g} asked", "ask for more"
        )
    for _ in range(PROBES):
        middle = (low + high) / 2
        tried = prune(net, middle, step)
        if cost(tried) <= target:
            high, best = middle, tried
        else:
            low = middle
    return best


def pruned(
    ctx: Context,
    start: Done,
    balance: Balance,
    *,
    name: str,
    target: float,
    steps: int,
    lr: float,
    cost: Cost = macs,
    step: int = 8,
    tasks: Sequence[Task] | None = None,
) -> Done:
    """A stage: the plain net of `start`, pruned as `prune_to` does it, then a fresh learning-rate cycle.

    `tasks`: those of `start` (one: a single-task net). The result says "widths": output channels by layer.
    """
    key = _key(ctx, name, "torch-pruning", target, step, steps, lr, balance.weights(), start.key)

    def make() -> tuple[PlainNet, dict[str, Any]]:
        net = build_plain(ctx, tasks)
        net.load_state_dict(start.state())
        smaller = prune_to(net, target, cost, step)
        result = _train(ctx, name, key, smaller, balance, steps, ctx.config.optim(lr))
        return smaller, result | {"form": "pruned", "widths": widths(smaller)}

    return cached(ctx, name, key, make)


def restore(ctx: Context, path: Path, tasks: Sequence[Task] | None = None) -> PlainNet:
    """The network of a `pruned` stage file, in eval mode; `tasks` as they were given there."""
    state = load_tensors(path)[0]
    return shrink(build_plain(ctx, tasks), state).eval()


def shrink(net: PlainNet, state: Mapping[str, Tensor]) -> PlainNet:
    """Give `net` the layer sizes of a pruned net's state, and its weights. Raises InputError for another net's."""
    own = net.state_dict()
    strange = sorted(own.keys() ^ state.keys())
    if strange or any(own[name].ndim != state[name].ndim for name in own):
        raise InputError("the weights do not fit this net", f"{(strange or ['shapes'])[0]}", "use the same backbone")
    for name, module in net.named_modules():
        weight = state.get(f"{name}.weight")
        if isinstance(module, nn.Conv2d) and weight is not None:
            if module.groups > 1:
                module.groups = module.groups * weight.shape[0] // module.out_channels
            module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
        elif isinstance(module, nn.BatchNorm2d) and weight is not None:
            module.num_features = len(weight)
        elif isinstance(module, nn.Linear) and weight is not None:
            module.out_features, module.in_features = weight.shape
        for key, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            value.data = torch.empty_like(state[f"{name}.{key}" if name else key])
    net.load_state_dict(dict(state))
    return net


def widths(net: PlainNet) -> dict[str, int]:
    """Output channels of every convolution."""
    return {name: module.out_channels for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}


def _size(net: PlainNet) -> tuple[int, ...]:
    return tuple(net.plan.shapes[0])


def _last(head: nn.Module) -> nn.Module:
    """The layer that makes a head's answer."""
    layers = [module for module in head.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    if not layers:
        raise InputError("a head has no convolution", type(head).__name__, "prune nets with the ready heads")
    return layers[-1]
