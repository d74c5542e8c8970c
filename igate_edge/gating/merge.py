"""A gated net with its gates as they are -> an ordinary CNN, a little wider, that computes the same.

Each step of the backbone runs once, on one tensor [shared | own of task 1 | ... | own of task T]; branches are blocks
of one convolution, mixes are folded into its weights. A training step costs what a plain net of that width costs.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConvertError, InputError
from .merge_layers import dense_conv, depthwise_conv, front, replace, wide_head, wide_norm, without_masks
from .merge_layout import owners, runs
from .merge_plan import Physical, lay_out
from .net import InterroGateNet
from .placement import operation
from .plain import PlainNet, TaskNet
from .streams import Plan, evaluate, input_value
from .view import fold_head, fold_norms

FORMS = {"masked": "merged", "fill": "filled"}
TOLERANCE = 1e-4  # of an output's largest magnitude
#: Mix weights keep off 0 and 1, so that which channels a layer reads depends on the gates alone.
LEAST_MIX = 1e-12


class _Once(nn.Module):
    """The steps of a backbone, each run once: `backbone` holds its layers, `skips` the 1x1 convolutions between."""

    backbone: nn.Module
    skips: nn.ModuleDict

    def __init__(
        self,
        plan: Plan,
        backbone: nn.Module,
        skips: nn.ModuleDict,
        fronts: Mapping[tuple[int, int], str],
        steps: Sequence[int],
    ) -> None:
        super().__init__()
        self.plan, self.backbone, self.skips = plan, backbone, skips
        self._fronts, self._steps = dict(fronts), tuple(steps)
        last = {use: index for index in steps for use in plan.steps[index].uses}
        self._freed = {
            index: [u for u, reader in last.items() if reader == index and u not in plan.outputs] for index in steps
        }

    def maps(self, image: Tensor) -> list[Tensor]:
        """The backbone's merged feature maps of a batch."""
        if image.ndim != 4:
            raise InputError("the image is not a batch", f"shape {list(image.shape)}", "pass float32 [N,3,H,W]")
        values: dict[int, Any] = {}
        for index in self._steps:
            step = self.plan.steps[index]
            if step.kind == "input":
                values[index] = input_value(step, image)
                continue

            def fetch(use: int, index: int = index) -> Any:
                name = self._fronts.get((index, use))
                return values[use] if name is None else self.skips[name](values[use])

            values[index] = evaluate(step, self.backbone, fetch)
            for use in self._freed[index]:
                values.pop(use, None)
        return [values[index] for index in self.plan.outputs]


class MergedNet(_Once, TaskNet):
    """What `merge` returns; an ordinary nn.Module with the interface of a PlainNet.

    Parameters: backbone.<path>, heads.<task>.<path>, skips.<step>.weight (1x1 convolutions that build an operand which
    no tensor holds). `form`: "merged" (zero blocks stay zero) or "filled" (they train). Buffers gates.<site> [T,C] and
    filled say which net a state belongs to; a state of other gates is refused.
    """

    heads: nn.ModuleDict
    gates: nn.Module
    filled: Tensor

    def __init__(self, net: InterroGateNet, physical: Physical, mode: str) -> None:
        fill, dtype = mode == "fill", next(net.branches.parameters()).dtype
        backbone = copy.deepcopy(net.branches["shared"])
        names = _front_names(net.plan, backbone, physical)
        skips = {
            name: front(physical.fronts[place], physical.layouts[place[1]].width, fill, dtype)
            for place, name in names.items()
        }
        super().__init__(net.plan, backbone, nn.ModuleDict(skips), names, tuple(physical.roles))
        branches = list(net.branches.values())
        for index, rows in physical.made.items():
            step, kind = net.plan.steps[index], physical.roles[index]
            if kind == "join":
                continue
            layers: list[Any] = [branch.get_submodule(step.target) for branch in branches]
            if kind == "conv":
                made = dense_conv(layers, rows, physical.layouts[step.uses[0]], fill)
            else:
                made = (depthwise_conv if kind == "depthwise" else wide_norm)(layers, rows)
            replace(backbone, step.target, made)
        self.tasks, self.form = net.tasks, FORMS[mode]
        outs = [physical.layouts[index] for index in net.plan.outputs]
        seen = {task: [(out.width, out.streams[k]) for out in outs] for k, task in enumerate(net.task_names)}
        self.heads = nn.ModuleDict({task: wide_head(net.heads[task], maps, fill) for task, maps in seen.items()})
        self.gates = nn.Module()
        for name, mask in net.gate_masks().items():
            self.gates.register_buffer(name, mask.cpu().clone())
        self.register_buffer("filled", torch.tensor(fill))
        streams = [*net.task_names, "shared"]
        self._sites = net.sites_json()
        for site, place in zip(self._sites, net.places, strict=True):
            layout, mask = physical.layouts[place.step], self.gates.get_buffer(place.name)
            site["rows"] = [[streams[s] if s >= 0 else "", *span] for s, *span in runs(owners(layout, mask))]
        # Layers of the plain net without their weights; in a tuple, so that they are no part of this module.
        self._plain = (copy.deepcopy(net.branches["shared"]).to("meta"), net.plan.shapes[0])
        self._widths = {place.name: physical.layouts[place.step].width for place in net.places}

    def forward(self, image: Tensor, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        """Raw outputs by task name (all, or those in `tasks`); image float32 [N,3,H,W]."""
        features = self.maps(image)
        return {t.name: self.heads[t.name](features) for t in self.tasks if tasks is None or t.name in tasks}

    def gate_masks(self) -> dict[str, Tensor]:
        """The decisions that this net was merged with, by site, bool [T,C]."""
        return {name: mask.clone() for name, mask in self.gates.named_buffers()}

    def sites_json(self) -> list[dict[str, Any]]:
        """The gate sites as the gated net described them (see InterroGateNet.sites_json), and as "rows" the physical
        channels in order, in runs [task, "shared" or "" for nobody's, first channel, count]."""
        return copy.deepcopy(self._sites)

    def widths(self) -> dict[str, int]:
        """Physical channels behind each site."""
        return dict(self._widths)

    def plain_twin(self) -> PlainNet:
        """The plain shared net of the same backbone and tasks, fresh: what its milliseconds are compared with."""
        layers, shape = self._plain
        backbone = copy.deepcopy(layers).to_empty(device="cpu")
        for tensor in (*backbone.parameters(), *backbone.buffers()):
            tensor.data.zero_()
        for module in backbone.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        return PlainNet(backbone, self.tasks, example=torch.zeros(shape))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; raises InputError when the state is of a net with other gates: its blocks lie elsewhere."""
        own = {f"gates.{name}": mask for name, mask in self.gates.named_buffers()} | {"filled": self.filled}
        other = [k for k, v in own.items() if k in state_dict and not torch.equal(v.cpu(), state_dict[k].cpu())]
        if other:
            raise InputError("the weights are of a merged net with other gates", other[0], "merge with its gates first")
        return super().load_state_dict(state_dict, *args, **kwargs)

    @torch.no_grad()
    def export_view(self) -> MergedView:
        """A copy in evaluation mode, norms folded, masked weights as plain ones; returns outputs in task order."""
        backbone, skips, heads = copy.deepcopy(self.backbone), copy.deepcopy(self.skips), copy.deepcopy(self.heads)
        view = MergedView(self.plan, backbone, skips, heads, self._fronts, self._steps)
        without_masks(view).eval()
        fold_norms(self.plan, view.backbone)
        for head in view.heads.values():
            fold_head(head, len(self.plan.outputs))
        return view


class MergedView(_Once):
    """Export form of a MergedNet: forward(image [1,3,H,W]) -> raw outputs, a tuple in task order."""

    heads: nn.ModuleDict

    def __init__(
        self,
        plan: Plan,
        backbone: nn.Module,
        skips: nn.ModuleDict,
        heads: nn.ModuleDict,
        fronts: Mapping[tuple[int, int], str],
        steps: Sequence[int],
    ) -> None:
        super().__init__(plan, backbone, skips, fronts, steps)
        self.heads = heads

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.maps(image)
        return tuple(head(features) for head in self.heads.values())


def merge(net: InterroGateNet, mode: str = "masked") -> MergedNet:
    """The merged net of a gated net with its gates as they are now, frozen or not; `net` does not change.

    Exact: outputs agree in evaluation mode, and in training mode, where norms see the same maps. mode: "masked" keeps
    the zero blocks zero while it trains, "fill" lets them train: same milliseconds, more capacity. Raises InputError
    for another net or mode, ConvertError for a backbone with steps that couple the channels of one stream.

    >>> from igate_edge.gating.convert import interrogate
    >>> from igate_edge.training.tasks import Depth, Edges
    >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    >>> merge(interrogate(backbone, [Depth("depth"), Edges("edges")])).widths()  # all open: nothing is shared
    {'0': 16}
    """
    merged = merge_unchecked(net, mode)
    image = torch.randn(net.plan.shapes[0], generator=torch.Generator().manual_seed(0)).to(merged.filled.device)
    with torch.no_grad():
        wanted, got = copy.deepcopy(net).eval()(image), copy.deepcopy(merged).eval()(image)
    for name, value in wanted.items():
        error, scale = (value - got[name]).abs().max().item(), value.abs().max().item()
        if not error <= TOLERANCE * scale + 1e-6:
            fix = 'report this backbone; final="gated" trains it unmerged'
            raise ConvertError(f"task {name!r} differs after merging", f"by {error:.3g} at magnitude {scale:.3g}", fix)
    return merged


@torch.no_grad()
def merge_unchecked(net: InterroGateNet, mode: str = "masked") -> MergedNet:
    """As `merge`, without comparing the two nets: for one whose weights are about to be loaded."""
    if not isinstance(net, InterroGateNet):
        raise InputError("only a gated net can be merged", f"got {type(net).__name__}", "pass what interrogate returns")
    if mode not in tuple(FORMS):
        raise InputError(f"unknown mode {mode!r:.60}", f"known: {', '.join(FORMS)}", "use one of these")
    sites = {}
    for place, site in zip(net.places, net.gate_sites(), strict=True):
        weights = torch.softmax(site.beta.detach().cpu().double(), dim=0)
        if len(net.tasks) > 1:
            weights = weights.clamp(LEAST_MIX, 1 - LEAST_MIX)
        sites[place.step] = (site.gates.mask().cpu(), weights)
    physical = lay_out(net.plan, net.branches["shared"], sites, len(net.tasks))
    device = next(net.branches.parameters()).device
    return MergedNet(net, physical, mode).to(device).train(net.training)


def _front_names(plan: Plan, module: nn.Module, physical: Physical) -> dict[tuple[int, int], str]:
    """A name for each 1x1 convolution, after the step that reads it."""
    names: dict[tuple[int, int], str] = {}
    for place in physical.fronts:
        step = plan.steps[place[0]]
        called = module.get_submodule(step.target) if step.kind == "module" else None
        base = str(step.target) if called is not None else f"{step.path}.{operation(step, None)}"
        base = "skip_" + base.strip(".").replace(".", "_")
        name, count = base, 1
        while name in names.values():
            count += 1
            name = f"{base}_{count}"
        names[place] = name
    return names
