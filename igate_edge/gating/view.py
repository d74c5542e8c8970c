"""Networks as the exporter wants them: evaluation only, norms folded, gates and mixes as constants, a tuple out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .execute import Fetch, Need, run
from .streams import Plan, feature_maps


class ConstantSite(nn.Module):
    """A gate site with constants: buffers mask_<task> bool [1,C,1,1] and mix_<task> float [1,C,1,1]."""

    def __init__(self, tasks: Sequence[str], mask: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        for task, row, weight in zip(tasks, mask, weights, strict=True):
            self.register_buffer(f"mask_{task}", row.detach().clone().view(1, -1, 1, 1))
            self.register_buffer(f"mix_{task}", weight.detach().clone().view(1, -1, 1, 1))

    def forward(self, psi: Tensor, phis: Mapping[int, Tensor], mix: bool) -> dict[int, Tensor]:
        """Where(mask, phi, psi) per given task; with `mix` also the weighted sum, as stream T."""
        outs = {t: torch.where(getattr(self, f"mask_{self.tasks[t]}"), phi, psi) for t, phi in phis.items()}
        if mix:
            terms = [outs[t] * getattr(self, f"mix_{task}") for t, task in enumerate(self.tasks)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            outs[len(self.tasks)] = total
        return outs


class GatedView(nn.Module):
    """Export form of an InterroGateNet: forward(image [1,3,H,W]) -> raw outputs, a tuple in task order."""

    def __init__(
        self,
        plan: Plan,
        need: Need,
        branches: nn.ModuleDict,
        heads: nn.ModuleDict,
        sites: nn.ModuleDict,
        places: Mapping[int, str],
    ) -> None:
        super().__init__()
        self.plan, self.need, self.places = plan, need, dict(places)
        self.branches, self.heads, self.sites = branches, heads, sites

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        branches = list(self.branches.values())
        fetch = run(self.plan, branches, image, self.need, self._select, sites=self.places)
        return tuple(
            head([fetch(index, stream) for index in self.plan.outputs])
            for stream, head in enumerate(self.heads.values())
        )

    def _select(
        self, index: int, before: frozenset[int], after: frozenset[int], fetch: Fetch, compute: Callable[[int], Any]
    ) -> Mapping[int, Any]:
        shared = len(self.heads)
        values = {stream: compute(stream) for stream in sorted(before)}
        phis = {stream: value for stream, value in values.items() if stream != shared}
        return self.sites[self.places[index]](values[shared], phis, shared in after)


class PlainView(nn.Module):
    """Export form of a PlainNet: forward(image [1,3,H,W]) -> raw outputs, a tuple in task order."""

    def __init__(self, backbone: nn.Module, heads: nn.ModuleDict) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = feature_maps(self.backbone(image))
        return tuple(head(features) for head in self.heads.values())


def fold_norms(plan: Plan, module: nn.Module) -> None:
    """Fold every BatchNorm2d that alone reads a convolution into it; `module` is the copy of the backbone to change.

    Modules that are called twice, and norms without running statistics, stay as they are. Evaluation mode only.
    """
    users = plan.users()
    calls = [step.target for step in plan.steps if step.kind == "module"]
    pairs = []
    for step in plan.steps:
        readers = [plan.steps[index] for index in users[step.index]]
        if (
            step.kind == "module"
            and len(readers) == 1
            and step.index not in plan.outputs
            and readers[0].kind == "module"
        ):
            pairs.append((step.target, readers[0].target))
    _fold_pairs(module, pairs, calls)


def fold_head(head: nn.Module, maps: int) -> None:
    """Fold the norms of a head that takes a list of `maps` tensors; one that cannot be traced keeps its norms."""
    argument = next(iter(inspect.signature(head.forward).parameters))
    try:
        graph = fx.Tracer().trace(head, concrete_args={argument: [fx.PH] * maps})
    except Exception:  # the trace runs the head's own code; folding is an optimisation, the exporter has its own too
        return
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    pairs = [
        (str(node.target), str(user.target))
        for node in nodes
        for user in node.users
        if len(node.users) == 1 and user.op == "call_module"
    ]
    _fold_pairs(head, pairs, [str(node.target) for node in nodes])


def _fold_pairs(module: nn.Module, pairs: Sequence[tuple[str, str]], calls: Sequence[str]) -> None:
    for first, second in pairs:
        conv, norm = module.get_submodule(first), module.get_submodule(second)
        if type(norm) is not nn.BatchNorm2d or norm.running_mean is None:
            continue
        if isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)) and calls.count(first) == calls.count(second) == 1:
            _replace(module, first, fuse_conv_bn_eval(conv, norm, isinstance(conv, nn.ConvTranspose2d)))
            _replace(module, second, nn.Identity())


def _replace(module: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    module.get_submodule(parent)._modules[name] = part
