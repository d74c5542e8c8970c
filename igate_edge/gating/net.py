"""The gated network: T task branches and one shared branch with gate sites between them, and one ordinary head per task."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .compact import Compact, fix_site
from .execute import Need, Select, find_need, run
from .gate import Gates
from .placement import Place
from .plain import load_into, losses_of, make_heads, split_state, weighted_sum
from .site import GateSite
from .streams import Plan, without_inplace
from .view import ConstantSite, GatedView, fold_head, fold_norms

if TYPE_CHECKING:
    from ..training.tasks import Task


class InterroGateNet(nn.Module):
    """What `interrogate` returns; an ordinary nn.Module: deepcopy, state_dict, train, to and optimisers work as usual.

    Parameters: branches.<task or "shared">.<path in the backbone>, heads.<task>.<path>, sites.<site>.beta [T,C] and
    sites.<site>.gates.alpha.<task> [granules]; tied sites show the same gates under each of their names.
    Gates are constants of the data: outputs of an image do not depend on other images in evaluation mode.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tasks: Sequence[Task],
        plan: Plan,
        places: Sequence[Place],
        gates: Mapping[int, Gates],
    ) -> None:
        super().__init__()
        self.tasks, self.plan, self.places = tuple(tasks), plan, tuple(places)
        names = [*self.task_names, "shared"]
        self.branches = nn.ModuleDict({name: without_inplace(copy.deepcopy(backbone)) for name in names})
        self.heads = make_heads(tasks, plan)
        sites = {place.name: GateSite(place.name, place.channels, gates[place.group]) for place in places}
        self.sites = nn.ModuleDict(sites)
        self._needs: dict[tuple[int, ...], Need] = {}
        self._compact: tuple[Any, Compact] | None = None

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in order."""
        return [task.name for task in self.tasks]

    def forward(self, image: Tensor, tasks: Collection[str] | None = None) -> dict[str, Tensor]:
        """Raw outputs by task name; image float32 [N,3,H,W].

        With `tasks`, only those heads and what they read are computed, and nothing that belongs to another task (head,
        branch, gates) gets a gradient: an optimiser that skips None leaves it bit-identical.
        """
        if image.ndim != 4:
            raise InputError("the image is not a batch", f"shape {list(image.shape)}", "pass float32 [N,3,H,W]")
        active = [t for t, task in enumerate(self.tasks) if tasks is None or task.name in tasks]
        silent = frozenset(range(len(self.tasks))) - frozenset(active)
        branches = list(self.branches.values())
        frozen = all(site.gates.is_frozen for site in self.gate_sites())
        sites = {place.step: place.name for place in self.places}
        if frozen and not torch.compiler.is_compiling():
            need, compact = self._fixed(active, image.device)

            def select(*args: Any) -> Mapping[int, Any]:
                return compact.select(*args, silent)

            fetch = run(
                self.plan, branches, image, need, select, sites=sites, inner=compact.inner, silent=silent
            )
        else:
            need = find_need(self.plan, sites, len(self.tasks), active, {})
            select = self._selector([self.tasks[t].name for t in active])
            fetch = run(self.plan, branches, image, need, select, sites=sites, silent=silent)
        return {
            self.tasks[t].name: self.heads[self.tasks[t].name]([fetch(index, t) for index in self.plan.outputs])
            for t in active
        }

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Loss per task that has a label in the batch, unweighted; see `forward` for what happens to the others."""
        return losses_of(self, self.tasks, batch)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Weighted sum of the losses, scalar; add a budget to it (gating/budget.py)."""
        return weighted_sum(self.tasks, self.losses(batch))
