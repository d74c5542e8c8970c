"""Where the gates go: sites, ties, and the patterns whose closed rows need not be computed.

Rules (method.md section 4, choices 13 to 20): a site after conv+norm+activation, and after a residual add(+activation).
A max pool that alone reads it comes before its site: selection is the same on both sides, and the mix, which a max pool
would not pass, is then linear up to the next layer and folds into its weights. A conv+norm that only feeds adds has
none: the add's site gates it. Depthwise convolutions share the gates of the site that feeds them. A map that leaves the
backbone with a branch's parameters still ungated in it gets a site of its own, so that with all gates closed nothing
but the shared branch is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import ConvertError
from .streams import Plan, Ref, Step

CONVS = (nn.Conv2d, nn.ConvTranspose2d)
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm2d)
#: Elementwise activations: as modules in lower case, as functions and as methods.
ACTIVATIONS = frozenset(
    (
        *("relu", "relu6", "leakyrelu", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish"),
        *("hardswish", "hardsigmoid", "hardtanh", "hardshrink", "softshrink", "sigmoid", "logsigmoid", "tanh"),
        *("tanhshrink", "softplus", "softsign", "threshold", "clamp", "clip", "identity"),
    )
)
#: Operations that keep channels apart and have no parameters: gates on both sides may be tied.
CHANNEL_PRESERVING = ACTIVATIONS | {
    *("maxpool2d", "max_pool2d", "avgpool2d", "avg_pool2d", "adaptiveavgpool2d", "adaptive_avg_pool2d", "upsample"),
    *("adaptivemaxpool2d", "adaptive_max_pool2d", "upsamplingnearest2d", "upsamplingbilinear2d", "interpolate"),
    *("dropout", "dropout2d", "contiguous", "zeropad2d", "pad"),
}


@dataclass(frozen=True)
class Chain:
    """A convolution and the batch norm behind it, by step index."""

    conv: int
    norm: int | None


@dataclass(frozen=True)
class Sum:
    """A residual add of two operands; an int operand is the value of that step."""

    left: Chain | Sum | int
    right: Chain | Sum | int


@dataclass(frozen=True)
class Block:
    """What computes a site's maps row by row: operands, then activation and pool (no parameters), the steps between."""

    body: Chain | Sum
    tail: tuple[int, ...]
    inner: frozenset[int]


@dataclass(frozen=True)
class Place:
    """One gate site: behind which step, how wide, tied with which others, MACs of one channel row of one branch."""

    name: str
    step: int
    channels: int
    group: int
    macs_per_row: float
    block: Block | None


@dataclass
class _Analysis:
    plan: Plan
    module: nn.Module
    users: dict[int, list[int]] = field(default_factory=dict)
    sites: dict[int, str] = field(default_factory=dict)

    def called(self, step: Step) -> nn.Module | None:
        return self.module.get_submodule(step.target) if step.kind == "module" else None

    def only_user(self, index: int) -> Step | None:
        users = self.users[index]
        return self.plan.steps[users[0]] if len(users) == 1 and index not in self.plan.outputs else None

    def is_conv(self, step: Step) -> bool:
        return isinstance(self.called(step), CONVS) and len(self.plan.shapes.get(step.index, ())) == 4

    def is_norm(self, step: Step) -> bool:
        return isinstance(self.called(step), NORMS)

    def is_act(self, step: Step) -> bool:
        return operation(step, self.called(step)) in ACTIVATIONS and len(step.uses) == 1

    def is_max_pool(self, step: Step) -> bool:
        pools = operation(step, self.called(step)) in ("maxpool2d", "max_pool2d")
        return pools and len(step.uses) == 1 and len(self.plan.shapes.get(step.index, ())) == 4

    def is_add(self, step: Step) -> bool:
        if operation(step, None) != "add" or len(step.args) != 2 or step.kwargs:
            return False
        shapes = [self.plan.shapes.get(arg.index) if isinstance(arg, Ref) else None for arg in step.args]
        same = [self.plan.steps[arg.index].same for arg in step.args if isinstance(arg, Ref)]
        return shapes[0] is not None and shapes[0] == shapes[1] and len(shapes[0]) == 4 and not any(same)


def operation(step: Step, module: nn.Module | None) -> str:
    """Lower-case name of what a step does, whichever way it is written; "" for inputs and parameters."""
    if step.kind == "module":
        return "" if module is None else type(module).__name__.lower()
    if step.kind == "method":
        return str(step.target)
    return getattr(step.target, "__name__", "").lower() if step.kind == "function" else ""


def place_sites(plan: Plan, module: nn.Module, *, tie: str) -> tuple[Place, ...]:
    """Sites of a plan in execution order. tie: "none", or "stage" to share gates along identity residual adds."""
    found = _Analysis(plan, module, plan.users())
    _after_convs_and_adds(found)
    if not any(found.is_conv(step) for step in plan.steps):
        raise ConvertError(
            "the backbone has no convolution that can be gated",
            f"{len(plan.steps)} traced operations, no nn.Conv2d called as a module",
            "pass a convolutional backbone whose layers are torch.nn modules",
        )
    _at_ungated_outputs(found)
    groups = _groups(found, tie)
    return tuple(
        Place(name, index, plan.shapes[index][1], groups[index], _macs_per_row(found, index), _block(found, index))
        for index, name in sorted(found.sites.items())
    )


def _after_convs_and_adds(found: _Analysis) -> None:
    for step in found.plan.steps:
        if found.is_conv(step):
            end = _follow(found, step, found.is_norm)
        elif found.is_add(step):
            end = step
        else:
            continue
        act = found.only_user(end.index)
        if act is not None and found.is_act(act):
            end = act
        elif _feeds_only_adds(found, end.index):
            continue  # the site behind the add gates this
        _add_site(found, _follow(found, end, found.is_max_pool).index, _site_name(found, step))


def _feeds_only_adds(found: _Analysis, index: int) -> bool:
    users = [found.plan.steps[user] for user in found.users[index]]
    return bool(users) and index not in found.plan.outputs and all(found.is_add(user) for user in users)


def _follow(found: _Analysis, step: Step, test: Callable[[Step], bool]) -> Step:
    after = found.only_user(step.index)
    return after if after is not None and test(after) else step


def _site_name(found: _Analysis, step: Step) -> str:
    label = step.target if step.kind == "module" else f"{step.path}.{operation(step, None)}"
    return str(label).strip(".").replace(".", "_")


def _add_site(found: _Analysis, index: int, base: str) -> None:
    if hasattr(nn.ModuleDict(), base):
        base += "_site"
    name, count = base, 1
    while name in found.sites.values():
        count += 1
        name = f"{base}_{count}"
    found.sites.setdefault(index, name)


def _at_ungated_outputs(found: _Analysis) -> None:
    dirty: dict[int, bool] = {}
    for step in found.plan.steps:
        module = found.called(step)
        own = (step.kind == "attr" and not step.same) or (module is not None and _any_state(module))
        dirty[step.index] = (own or any(dirty[use] for use in step.uses)) and step.index not in found.sites
    for index in found.plan.outputs:
        if dirty[index]:
            _add_site(found, index, _site_name(found, found.plan.steps[index]))


def _any_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _groups(found: _Analysis, tie: str) -> dict[int, int]:
    parent = {index: index for index in found.sites}

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    def join(left: int, right: int | None) -> None:
        if right is not None and found.plan.shapes[left][1] == found.plan.shapes[right][1]:
            a, b = sorted((root(left), root(right)))
            parent[b] = a

    for index in found.sites:
        start, convs, adds = _inside(found, index)
        for conv in convs:
            if _is_depthwise(found.called(conv)) and not adds:
                join(index, _feeding_site(found, conv.uses[0]))
        if tie == "stage" and adds:
            for entry in start:
                join(index, _feeding_site(found, entry))
    return {index: root(index) for index in found.sites}


def _is_depthwise(module: nn.Module | None) -> bool:
    """groups == in == out > 1: a convolution of one channel to one is dense (cases.md P5)."""
    return isinstance(module, CONVS) and module.groups == module.in_channels == module.out_channels > 1


def _inside(found: _Analysis, site: int) -> tuple[list[int], list[Step], list[Step]]:
    """Behind a site, up to other sites: (values that adds read from outside, convolutions, adds) it gates by row."""
    entries, convs, adds, todo = [], [], [], [site]
    while todo:
        index = todo.pop()
        step = found.plan.steps[index]
        if index != site and index in found.sites:
            entries.append(index)
        elif found.is_conv(step):
            convs.append(step)
        elif found.is_add(step):
            adds.append(step)
            todo.extend(step.uses)
        elif found.is_norm(step) or found.is_act(step) or found.is_max_pool(step):
            todo.extend(step.uses)
        else:
            entries.append(index)
    return entries, convs, adds


def _feeding_site(found: _Analysis, index: int) -> int | None:
    """The site whose channels arrive unmixed at a value, through pools and the like; None if there is none."""
    while index not in found.sites:
        step = found.plan.steps[index]
        module = found.called(step)
        if operation(step, module) not in CHANNEL_PRESERVING or not step.uses or (module and _any_state(module)):
            return None
        first = step.args[0] if step.args else step.kwargs.get("input")
        if not isinstance(first, Ref) or len(found.plan.shapes.get(index, ())) != 4:
            return None
        if found.plan.shapes[index][1] != found.plan.shapes[first.index][1]:
            return None
        index = first.index
    return index


def _macs_per_row(found: _Analysis, site: int) -> float:
    """MACs of one output channel for one image: all convolutions that this site gates."""
    total = 0.0
    for conv in _inside(found, site)[1]:
        module: Any = found.called(conv)
        shape = found.plan.shapes[conv.uses[0] if isinstance(module, nn.ConvTranspose2d) else conv.index]
        taps = module.in_channels // module.groups * math.prod(module.kernel_size)
        total += float(taps * math.prod(shape[2:]))
    return total


def _block(found: _Analysis, site: int) -> Block | None:
    """The row-by-row pattern behind a site, or None when some of it couples channels or is read elsewhere."""
    step, tail = found.plan.steps[site], []
    while found.is_act(step) or found.is_max_pool(step):
        module = found.called(step)
        if module is not None and _any_state(module):
            return None
        tail.append(step.index)
        step = found.plan.steps[step.uses[0]]
        if found.only_user(step.index) is None or step.index in found.sites:
            return None
    inner = {step.index, *tail} - {site}
    body = _body(found, step, inner)
    return None if body is None or isinstance(body, int) else Block(body, tuple(tail[::-1]), frozenset(inner))


def _body(found: _Analysis, step: Step, inner: set[int]) -> Chain | Sum | int | None:
    module = found.called(step)
    if type(module) is nn.BatchNorm2d:
        conv = found.plan.steps[step.uses[0]]
        if not _rows_apart(found, conv) or found.only_user(conv.index) is None:
            return None
        inner.add(conv.index)
        return Chain(conv.index, step.index)
    if found.is_conv(step):
        return Chain(step.index, None) if _rows_apart(found, step) else None
    if not found.is_add(step):
        return None
    sides: list[Chain | Sum | int] = []
    for use in step.uses if len(step.uses) == 2 else (*step.uses, *step.uses):
        operand = found.plan.steps[use]
        trial: set[int] = set()
        body = None
        if use not in found.sites and found.only_user(use) is not None:
            body = _body(found, operand, trial)
        if body is None:
            sides.append(use)
        else:
            inner.update({use} | trial)
            sides.append(body)
    if all(isinstance(side, int) for side in sides):
        return None
    return Sum(sides[0], sides[1])


def _rows_apart(found: _Analysis, step: Step) -> bool:
    """True for an nn.Conv2d whose output rows can be computed one by one: dense or depthwise, not a subclass."""
    module = found.called(step)
    if type(module) is not nn.Conv2d or len(step.args) != 1 or step.kwargs:
        return False
    dense = module.groups == 1 or _is_depthwise(module)
    return dense and module.padding_mode == "zeros" and not nn.utils.parametrize.is_parametrized(module)


@dataclass(frozen=True)
class Inside:
    """What a site decides row by row: paths of convolutions, and what else it reads channel by channel.

    `apart`: (step of a site before, step of the value read): operands of adds and inputs of depthwise convolutions.
    """

    convs: tuple[str, ...]
    apart: tuple[tuple[int, int], ...]


def insides(plan: Plan, module: nn.Module, sites: Mapping[int, str]) -> dict[int, Inside]:
    """By step of a site, what lies between it and the sites before."""
    found = _Analysis(plan, module, plan.users(), dict(sites))
    table = {}
    for index in found.sites:
        entries, convs, adds = _inside(found, index)
        read = [conv.uses[0] for conv in convs if _is_depthwise(found.called(conv))]
        read += [entry for entry in entries if entry not in read and adds]
        apart = tuple((site, value) for value in read if (site := _feeding_site(found, value)) is not None)
        table[index] = Inside(tuple(str(conv.target) for conv in convs), apart)
    return table
