"""Where every channel of every stream is when each step of a gated net runs once, on one tensor of all live values.

A value is [shared | own of task 1 | ... | own of task T], only rows that somebody reads. What a stream sees of it is
(merge_layout.py) one physical channel each, or a sum of few where the shared stream reads a mix. Dense convolutions
fold that into their weights; steps that keep channels apart pass it on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import ConvertError
from .merge_layout import (
    Layout,
    Reading,
    Row,
    behind_site,
    fits,
    identity,
    materialise,
    of_rows,
    order_of,
    side_by_side,
    stack,
)
from .placement import CHANNEL_PRESERVING, operation
from .streams import Plan, Ref, Step

#: Elementwise operations on several maps: channel c of the result reads channel c of each.
JOINS = frozenset(("add", "sub", "mul", "maximum", "minimum"))
#: Steps that give the same for a mix of maps as the mix of what they give for each.
LINEAR = frozenset(
    (
        *("avgpool2d", "avg_pool2d", "adaptiveavgpool2d", "adaptive_avg_pool2d", "identity", "contiguous"),
        *("upsample", "upsamplingnearest2d", "upsamplingbilinear2d", "interpolate", "zeropad2d", "pad"),
    )
)
FIX = 'leave it a gated net: final="gated" in training'


@dataclass(frozen=True)
class Physical:
    """The whole net: layouts behind each step's site, rows that convolutions and norms make, by step.

    `roles`: what each step that is needed is to the layout, in order of execution. `fronts`: (step, value it reads) ->
    what the 1x1 convolution in between makes of that value.
    """

    roles: Mapping[int, str]
    layouts: Mapping[int, Layout]
    made: Mapping[int, tuple[Row, ...]]
    fronts: Mapping[tuple[int, int], Reading]


def lay_out(plan: Plan, module: nn.Module, sites: Mapping[int, tuple[Tensor, Tensor]], tasks: int) -> Physical:
    """Layouts of a net with T `tasks` whose sites, by step, have (mask bool [T, C], mix weights [T, C]).

    `module` is a copy of the backbone: only the types of its layers are read. Raises ConvertError for what cannot be
    merged.
    """
    return _Planner(plan, module, sites, tasks).run()


def role(plan: Plan, module: nn.Module, step: Step) -> str:
    """What a step is to the layout: same, conv, depthwise, norm, join, map, cat or size. Raises ConvertError."""
    called = module.get_submodule(step.target) if step.kind == "module" else None
    if step.same:
        return "same"
    if len(plan.shapes.get(step.index, ())) != 4:
        if step.index in plan.shapes or not step.pure:
            _refuse(step, called)
        return "size"
    if type(called) in (nn.Conv2d, nn.ConvTranspose2d) and len(step.uses) == 1:
        return _role_of_conv(step, called)
    if type(called) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return "norm"
    name, maps = operation(step, called), _operands(plan, step)
    others = [shape for use, shape in plan.shapes.items() if use in step.uses and use not in maps]
    if any(math.prod(shape) != 1 for shape in others):
        _refuse(step, called)  # a vector has one value a channel of the plain net
    if name in ("cat", "concat", "concatenate") and _axis(step) in (1, -3):
        return "cat"
    if name in JOINS and len(maps) >= 1 and step.kind != "module":
        return "join" if len([arg for arg in step.args if isinstance(arg, Ref)]) > 1 else "map"
    stateless = called is None or not any(True for _ in (*called.parameters(), *called.buffers()))
    if name not in CHANNEL_PRESERVING or len(maps) != 1 or not stateless or not _channels_kept(plan, step):
        _refuse(step, called)
    return "map"


def _role_of_conv(step: Step, conv: Any) -> str:
    transposed = isinstance(conv, nn.ConvTranspose2d)
    depthwise = conv.groups == conv.in_channels == conv.out_channels > 1
    if nn.utils.parametrize.is_parametrized(conv) or (transposed and conv.groups > 1 and not depthwise):
        _refuse(step, conv)
    return "depthwise" if depthwise else "conv"


def _refuse(step: Step, called: nn.Module | None) -> NoReturn:
    what = type(called).__name__ if called is not None else getattr(step.target, "__name__", str(step.target))
    where = str(step.target) if called is not None else step.path or "the backbone's forward"
    raise ConvertError("this backbone cannot be merged", f"{what} in {where} couples channels or keeps state", FIX)


def _operands(plan: Plan, step: Step) -> list[int]:
    """Values with channels that a step reads, each once."""
    return [use for use in step.uses if len(plan.shapes.get(use, ())) == 4]


def _axis(step: Step) -> Any:
    return step.kwargs.get("dim", step.kwargs.get("axis", step.args[1] if len(step.args) > 1 else 0))


def _channels_kept(plan: Plan, step: Step) -> bool:
    return plan.shapes[step.index][1] == plan.shapes[_operands(plan, step)[0]][1]


def _parts(step: Step) -> list[int]:
    """Operands of a concatenation, in order and as often as they occur."""
    first: Any = step.args[0] if step.args else step.kwargs["tensors"]
    return [part.index for part in first if isinstance(part, Ref)]


class _Planner:
    """The pass over the steps: liveness backwards, layouts forwards."""

    def __init__(self, plan: Plan, module: nn.Module, sites: Mapping[int, tuple[Tensor, Tensor]], tasks: int) -> None:
        self.plan, self.module, self.sites, self.tasks = plan, module, sites, tasks
        self.users = plan.users()
        self.live: dict[int, dict[int, Tensor]] = {step.index: {} for step in plan.steps}
        self.roles: dict[int, str] = {}
        self.layouts: dict[int, Layout] = {}
        self.made: dict[int, tuple[Row, ...]] = {}
        self.fronts: dict[tuple[int, int], Reading] = {}

    def run(self) -> Physical:
        self._find_live()
        _check_called_once(self.plan, self.roles)
        for step in self.plan.steps:
            if self.roles.get(step.index, "size") != "size" and not self._is_free(step.index):
                layout = self._layout(step)
                if step.index in self.sites:
                    layout = behind_site(layout, *self.sites[step.index])
                self.layouts[step.index] = layout
        roles = {index: self.roles[index] for index in sorted(self.roles)}
        return Physical(roles, self.layouts, self.made, self.fronts)

    # --- liveness: which channels of which stream are read, before the step's site ---

    def _find_live(self) -> None:
        for index in self.plan.outputs:
            whole = torch.ones(self.plan.shapes[index][1], dtype=torch.bool)
            self.live[index] = dict.fromkeys(range(self.tasks), whole)
        for step in reversed(self.plan.steps):
            after = self.live[step.index]
            sized = step.same or any(self.roles.get(user) == "size" for user in self.users[step.index])
            if not after and not sized and step.index in self.plan.shapes:
                continue  # nobody reads it
            self.roles[step.index] = role(self.plan, self.module, step)
            if step.index in self.sites:
                after = _live_before(after, self.sites[step.index][0])
            if not after and self.roles[step.index] not in ("same", "size"):  # read for its size alone
                after = {self.tasks: torch.ones(self.plan.shapes[step.index][1], dtype=torch.bool)}
            self.live[step.index] = after
            for stream, rows in after.items():
                for use, needed in self._needs(step, rows):
                    before = self.live[use].get(stream)
                    self.live[use][stream] = needed if before is None else before | needed

    def _needs(self, step: Step, rows: Tensor) -> Iterable[tuple[int, Tensor]]:
        """Channels of each operand that some output channels of a stream need."""
        kind = self.roles[step.index]
        if kind == "cat":
            parts, start = _parts(step), 0
            for part in parts:
                stop = start + self.plan.shapes[part][1]
                yield part, rows[start:stop]
                start = stop
            return
        for use in _operands(self.plan, step) if kind not in ("same", "size") else ():
            channels = self.plan.shapes[use][1]
            if kind == "conv" or channels != len(rows):
                yield use, rows.any().expand(channels)
            else:
                yield use, rows

    # --- layouts ---

    def _is_free(self, index: int) -> bool:
        """A value that only one step reads, which decides the order of its rows."""
        users, kind = self.users[index], self.roles.get(index)
        if kind not in ("conv", "depthwise", "norm", "join") or len(users) != 1 or index in self.sites:
            return False
        return index not in self.plan.outputs and self.roles.get(users[0]) in ("norm", "join", "depthwise")

    def _layout(self, step: Step) -> Layout:
        kind = self.roles[step.index]
        if kind == "same":
            shape = self.plan.shapes.get(step.index, ())
            return identity(shape[1] if len(shape) == 4 else 0, self.tasks + 1)
        if kind == "cat":
            return side_by_side([self.layouts[part] for part in _parts(step)], list(self.live[step.index]))
        if kind == "map":
            return self._pass_on(step)
        rows = self._choose(step.index)
        self._make(step.index, rows)
        return of_rows(rows, self.plan.shapes[step.index][1], list(self.live[step.index]))

    def _choose(self, index: int) -> tuple[Row, ...]:
        """Rows to make: [shared | own...], or the order of an operand that has them all, where that saves a front."""
        live = self.live[index]
        order = [self.tasks, *range(self.tasks)]
        plain = tuple((s, c) for s in order if s in live for c in live[s].nonzero().flatten().tolist())
        fixed = self._fixed_operands(index)
        found: list[tuple[Row, ...]] = [plain]
        for layout in fixed:
            order_of_it = order_of(layout, plain)
            if order_of_it is not None:
                found.append(order_of_it)
        return min(found, key=lambda rows: (sum(not fits(layout, rows) for layout in fixed), len(rows)))

    def _fixed_operands(self, index: int) -> list[Layout]:
        """Layouts that were decided before and that these rows must meet."""
        if self.roles[index] == "conv":
            return []
        found = []
        for use in self._aligned(index):
            found += self._fixed_operands(use) if self._is_free(use) else [self.layouts[use]]
        return found

    def _aligned(self, index: int) -> list[int]:
        step = self.plan.steps[index]
        maps = _operands(self.plan, step)
        channels = self.plan.shapes[index][1]
        for use in maps:
            if self.plan.shapes[use][1] != channels and not self.plan.steps[use].same:
                _refuse(step, None)
        return [use for use in maps if self.plan.shapes[use][1] == channels]

    def _make(self, index: int, rows: tuple[Row, ...]) -> None:
        """Decide the rows of a step and of all that only it reads."""
        self.made[index] = rows
        if self.roles[index] == "conv":
            return
        for use in self._aligned(index):
            if self._is_free(use):
                self._make(use, rows)
            elif not fits(self.layouts[use], rows):
                self.fronts[index, use] = stack(self.layouts[use], rows)

    def _pass_on(self, step: Step) -> Layout:
        """A step that keeps channels apart; in front of one that does not pass a mix, mixes become channels."""
        (use,) = _operands(self.plan, step)
        before, live = self.layouts[use], self.live[step.index]
        passed = Layout(before.width, {stream: before.streams[stream].only(rows) for stream, rows in live.items()})
        called = self.module.get_submodule(step.target) if step.kind == "module" else None
        picks = all(bool(passed.streams[stream].picks[rows].all()) for stream, rows in live.items())
        if picks or operation(step, called) in LINEAR:
            return passed
        self.fronts[step.index, use], after = materialise(before, live)
        return after


def _live_before(after: Mapping[int, Tensor], mask: Tensor) -> dict[int, Tensor]:
    """Channels by stream that a site reads, from those that are read behind it (see execute.find_need)."""
    tasks, channels = mask.shape
    mixed = after.get(tasks, torch.zeros(channels, dtype=torch.bool))
    before, shared = {}, torch.zeros(channels, dtype=torch.bool)
    for task in range(tasks):
        wanted = mixed | after.get(task, torch.zeros_like(mixed))
        before[task] = wanted & mask[task]
        shared |= wanted & ~mask[task]
    before[tasks] = shared
    return {stream: rows for stream, rows in before.items() if bool(rows.any())}


def _check_called_once(plan: Plan, roles: Mapping[int, str]) -> None:
    """A layer with weights that is called twice would need two widths."""
    targets = [step.target for step in plan.steps if roles.get(step.index) in ("conv", "depthwise", "norm")]
    for target in targets:
        if targets.count(target) > 1:
            raise ConvertError("this backbone cannot be merged", f"layer {target} is called more than once", FIX)
