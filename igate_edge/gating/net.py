"""The gated network: T task branches, one shared branch, gate sites between them, and one ordinary head per task."""

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
from .plain import TaskNet, load_into, make_heads, split_state
from .site import GateSite
from .streams import Plan
from .view import ConstantSite, GatedView, fold_head, fold_norms

if TYPE_CHECKING:
    from ..training.tasks import Task


class InterroGateNet(TaskNet):
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
        self.branches = nn.ModuleDict({name: plan.branch(backbone) for name in names})
        self.heads = make_heads(tasks, plan)
        sites = {place.name: GateSite(place.name, place.channels, gates[place.group]) for place in places}
        self.sites = nn.ModuleDict(sites)
        self._needs: dict[tuple[int, ...], Need] = {}
        self._compact: tuple[Any, Compact] | None = None

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
            select = compact.selector(silent)
            fetch = run(self.plan, branches, image, need, select, sites=sites, inner=compact.inner, silent=silent)
        else:
            need = find_need(self.plan, sites, len(self.tasks), active)
            select = self._selector([self.tasks[t].name for t in active])
            fetch = run(self.plan, branches, image, need, select, sites=sites, silent=silent)
        return {
            self.tasks[t].name: self.heads[self.tasks[t].name]([fetch(index, t) for index in self.plan.outputs])
            for t in active
        }

    def gate_sites(self) -> list[GateSite]:
        """Sites in execution order."""
        return [site for site in self.sites.values() if isinstance(site, GateSite)]

    def gate_parameters(self) -> list[nn.Parameter]:
        """Gate logits, each once however many sites share it: for an optimiser group without weight decay."""
        return _unique(p for site in self.gate_sites() for p in site.gates.parameters())

    def mix_parameters(self) -> list[nn.Parameter]:
        """Mix logits beta: learned by the task losses only, without weight decay."""
        return [site.beta for site in self.gate_sites()]

    def weight_parameters(self) -> list[nn.Parameter]:
        """All other parameters: branches and heads."""
        return [*self.branches.parameters(), *self.heads.parameters()]

    def gate_masks(self) -> dict[str, Tensor]:
        """Decisions by site, bool [T,C]."""
        return {site.name: site.gates.mask() for site in self.gate_sites()}

    def sites_json(self) -> list[dict[str, Any]]:
        """Which channels each task opened, site by site, as an export's metadata says it; tied sites name the first
        of their group."""
        groups: dict[int, str] = {}
        sites = self.gate_sites()
        tied = [id(site.gates) for site in sites]
        found = []
        for site in sites:
            first = groups.setdefault(id(site.gates), site.name)
            rows = zip(self.task_names, site.gates.mask().tolist(), strict=True)
            found.append(
                {
                    "name": site.name,
                    "channels": site.channels,
                    "granule": site.gates.granule,
                    "tie": first if tied.count(id(site.gates)) > 1 else None,
                    "open": {task: "".join("01"[int(bit)] for bit in row) for task, row in rows},
                }
            )
        return found

    def set_gates(self, masks: Mapping[str, Tensor]) -> None:
        """Set decisions by site, bool [T,C]; sites that are not named keep theirs, sites that are tied follow.

        Raises InputError: unknown site, wrong shape, a granule that is split, tied sites that disagree.
        """
        sites = {site.name: site for site in self.gate_sites()}
        chosen: dict[Gates, tuple[str, Tensor]] = {}
        for name, value in masks.items():
            if name not in sites:
                raise InputError(f"no gate site is called {name!r}", f"sites: {', '.join(sites)}", "use one of these")
            mask = torch.as_tensor(value).cpu().bool()
            other, before = chosen.setdefault(sites[name].gates, (name, mask))
            if not torch.equal(before, mask):
                text = f"sites {other!r} and {name!r} share their gates"
                raise InputError(text, "masks differ", "give both one mask")
        for gates, (_, mask) in chosen.items():
            gates.check(mask)
        for gates, (_, mask) in chosen.items():
            gates.assign(mask)

    def freeze_gates(self) -> None:
        """Fix today's decisions for good and stop computing rows that nobody reads (see gating/compact.py)."""
        for site in self.gate_sites():
            site.gates.freeze()

    def site_costs(self) -> dict[str, float]:
        """MACs of one channel row of one branch, by site, for one image of the example's size."""
        return {place.name: place.macs_per_row for place in self.places}

    def hard_fractions(self, cost: Mapping[str, float] | None = None) -> dict[str, float]:
        """Fraction of open gates per task: mean over a site's channels, then over sites.

        With `cost` (per channel row and site, as from `site_costs`) sites weigh cost * channels instead of 1.
        """
        weights = site_weights(self, cost)
        total = sum(weights[site.name] * site.gates.mask().double().mean(1).cpu() for site in self.gate_sites())
        return dict(zip(self.task_names, torch.as_tensor(total).tolist(), strict=True))

    def load_task(self, task: str, state: Mapping[str, Tensor]) -> None:
        """Start a task's branch and head from a single-task PlainNet's state (or its branch from a bare backbone's)."""
        self._known(task)
        backbone, heads = split_state(state)
        load_into(self.branches[task], backbone, f"branch {task!r}")
        if heads:
            head = heads.get(task) or next(iter(heads.values()))
            load_into(self.heads[task], head, f"head {task!r}")

    def load_shared(self, state: Mapping[str, Tensor]) -> None:
        """Start the shared branch from a PlainNet's or a bare backbone's state."""
        load_into(self.branches["shared"], split_state(state)[0], "the shared branch")

    @torch.no_grad()
    def export_view(self) -> GatedView:
        """A copy in evaluation mode with norms folded and gates and mixes as constants; this net does not change."""
        branches, heads = copy.deepcopy(self.branches).eval(), copy.deepcopy(self.heads).eval()
        for branch in branches.values():
            fold_norms(self.plan, branch)
        for head in heads.values():
            fold_head(head, len(self.plan.outputs))
        sites = {
            site.name: ConstantSite(self.task_names, site.gates.mask(), site.mix_weights())
            for site in self.gate_sites()
        }
        places = {place.step: place.name for place in self.places}
        need = find_need(self.plan, places, len(self.tasks), range(len(self.tasks)))
        return GatedView(self.plan, need, branches, heads, nn.ModuleDict(sites), places).eval()

    def _known(self, task: str) -> None:
        if task not in self.task_names:
            raise InputError(f"no task is called {task!r}", f"tasks: {', '.join(self.task_names)}", "use one of these")

    def _selector(self, active: Collection[str]) -> Select:
        shared = len(self.tasks)
        by_step = self._by_step()

        def select(index: int, before: frozenset[int], after: frozenset[int], _: Any, compute: Any) -> dict[int, Any]:
            values = {stream: compute(stream) for stream in sorted(before)}
            psi = values[shared]
            # A branch that nobody reads was not run; its place is taken by psi and its output by nobody.
            phis = [values.get(t, psi) for t in range(shared)]
            outs, psi_next = by_step[index](psi, phis, mix=shared in after, active=active)
            return {**dict(enumerate(outs)), shared: psi_next}

        return select

    def _fixed(self, active: Sequence[int], device: torch.device) -> tuple[Need, Compact]:
        """What frozen execution needs, renewed when the decisions or the device changed."""
        key = (device, *(site.gates.version for site in self.gate_sites()))
        if self._compact is None or self._compact[0] != key:
            blocks = {place.step: place.block for place in self.places if place.block is not None}
            weights = {index: site.mix_weights for index, site in self._by_step().items()}
            fixed = {index: fix_site(site.gates.mask()) for index, site in self._by_step().items()}
            compact = Compact(self.plan, list(self.branches.values()), fixed, blocks, weights)
            self._compact, self._needs = (key, compact), {}
        compact, wanted = self._compact[1], tuple(active)
        if wanted not in self._needs:
            masks = {index: site.gates.mask() for index, site in self._by_step().items()}
            self._needs[wanted] = find_need(self.plan, masks, len(self.tasks), wanted, masks, compact.inner)
        return self._needs[wanted], compact

    def _by_step(self) -> dict[int, GateSite]:
        return {place.step: site for place, site in zip(self.places, self.gate_sites(), strict=True)}


def site_weights(net: InterroGateNet, cost: Mapping[str, float] | None) -> dict[str, float]:
    """Weight of each site in a mean over sites, sum 1: equal, or proportional to cost * channels.

    Raises InputError when `cost` lacks a site or is 0 everywhere.
    """
    sites = net.gate_sites()
    if cost is None:
        return {site.name: 1 / len(sites) for site in sites}
    lacking = [site.name for site in sites if site.name not in cost]
    if lacking:
        raise InputError("the cost table lacks gate sites", ", ".join(lacking[:5]), "take the names from net.sites")
    raw = {site.name: cost[site.name] * site.channels for site in sites}
    total = sum(raw.values())
    if not total > 0:
        raise InputError("the cost of all gate sites is 0", f"{len(raw)} sites", "pass net.site_costs()")
    return {name: value / total for name, value in raw.items()}


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters}.values())
