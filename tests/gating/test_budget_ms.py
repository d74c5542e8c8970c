"""A budget of time: what is refused, what the penalty pushes, and that gates under it land without a weight to tune."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from staircase import table
from torch_nets import TinyResNet, tasks

from igate_edge.errors import BudgetError, InputError
from igate_edge.gating.budget import Budget
from igate_edge.gating.convert import InterroGateNet, interrogate
from igate_edge.gating.export import _plain_budget


@pytest.fixture(scope="module")
def net() -> InterroGateNet:
    return interrogate(TinyResNet(16), tasks(), granule=2, tie="stage")


@pytest.fixture(scope="module")
def half(net: InterroGateNet) -> Budget:
    """Half way between the plain net and the one with every gate open."""
    probe = Budget(ratio=1.1, table=table(4))
    pricing = probe.pricing(net)
    budget = Budget(ms=(pricing.plain_ms + pricing.most_ms) / 2, table=probe.table)
    budget._pricings[net] = pricing  # one export of the plain net is enough
    return budget


def fill(net: InterroGateNet, logit: float) -> None:
    for gates in {site.gates for site in net.gate_sites()}:
        for alpha in gates.alpha.values():
            alpha.data.fill_(logit)
            alpha.grad = None


@pytest.mark.parametrize(
    "options",
    [{}, {"ms": 1.0, "ratio": 2.0}, {"ms": 0}, {"ms": -1.0}, {"ratio": float("nan")}, {"ratio": True}, {"ms": "fast"},
     {"ratio": 1.5, "close": 0}, {"ratio": 1.5, "close": 2}, {"ms": 10**400}, {"ms": 1.0, "table": 5},
     {"ms": 1.0, "table": None}],
)  # fmt: skip
def test_nonsense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Budget(**{"table": table(), **options})


def test_only_a_gated_net_has_a_price(half: Budget) -> None:
    with pytest.raises(InputError, match="only a gated net has a price: got Linear"):
        half(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("ratio", [1.2, 50.0])
def test_one_task_alone_has_nothing_to_spend_a_budget_on(ratio: float) -> None:
    with pytest.raises(BudgetError, match="no budget is left for one task"):
        Budget(ratio=ratio, table=table(4)).check(interrogate(TinyResNet(8), tasks()[:1]))


def test_a_budget_below_the_plain_net_says_the_least_and_what_takes_it(net: InterroGateNet, half: Budget) -> None:
    pricing = half.pricing(net)
    low = Budget(ratio=0.9, table=half.table)
    low._pricings[net] = pricing
    with pytest.raises(BudgetError) as caught:
        low.check(net)
    text = str(caught.value)
    assert "0.9 times the plain net's time" in text and f"takes {pricing.plain_ms:.3g} ms" in text
    assert all(name in text for name in ("backbone", "semseg", "depth", "normals", "most costly layer"))
    heads = Budget(ms=sum(pricing.heads.values()) / 2, table=half.table)
    heads._pricings[net] = pricing
    with pytest.raises(BudgetError, match="less than the heads alone"):
        heads.check(net)
    with pytest.raises(BudgetError, match="cannot be met"):
        heads(net)  # also without asking first


def test_a_budget_that_never_binds_is_refused(net: InterroGateNet, half: Budget) -> None:
    wide = Budget(ms=2 * half.pricing(net).most_ms, table=half.table)
    wide._pricings[net] = half.pricing(net)
    with pytest.raises(BudgetError, match=r"never binds: with every gate open"):
        wide.check(net)
    half.check(net)


def test_the_goal_falls_from_all_open_to_the_budget(net: InterroGateNet, half: Budget) -> None:
    fill(net, 0.5)
    values = [half(net, progress).item() for progress in (0.0, 0.35, 0.7, 1.0)]
    # Open gates add twice what the budget does, and each task answers for a third of both.
    sizes = [100**progress * (2**done - 1) ** 2 / 2 for progress, done in ((0, 0), (0.35, 0.5), (0.7, 1), (1, 1))]
    assert values == pytest.approx(sizes, rel=1e-3, abs=1e-6)


def test_the_penalty_closes_gates_above_the_budget_and_opens_them_below(net: InterroGateNet, half: Budget) -> None:
    for logit, sign in ((0.1, 1), (-0.1, -1)):
        fill(net, logit)
        half(net).backward()
        slopes = torch.cat([alpha.grad for alpha in net.gate_parameters() if alpha.grad is not None])
        assert (sign * slopes > 0).all() and len(slopes) == sum(alpha.numel() for alpha in net.gate_parameters())


def test_one_task_cannot_take_what_is_another_ones(net: InterroGateNet, half: Budget) -> None:
    """The whole is within the budget, but one task holds it all: it gives back, and the others open."""
    fill(net, -0.1)
    for gates in {site.gates for site in net.gate_sites()}:
        gates.alpha["depth"].data.fill_(0.1)
        for alpha in gates.alpha.values():
            alpha.grad = None
    half(net).backward()
    for gates in {site.gates for site in net.gate_sites()}:
        assert (gates.alpha["depth"].grad > 0).all()  # type: ignore[operator]
        assert (gates.alpha["semseg"].grad < 0).all()  # type: ignore[operator]


@pytest.mark.parametrize("pull", [1e-4, 1e-3, 1e-2])
def test_gates_land_however_hard_the_tasks_pull(net: InterroGateNet, half: Budget, pull: float) -> None:
    """Adam at the recipe's rate; the tasks are a fixed pull of either sign on every logit, and as much noise."""
    steps, generator = 120, torch.Generator().manual_seed(0)
    fill(net, 0.5)
    alphas = net.gate_parameters()
    pulls = [pull * torch.randn(alpha.shape, generator=generator) for alpha in alphas]
    optimizer = torch.optim.Adam(alphas, lr=0.02)
    for step in range(steps):
        optimizer.zero_grad()
        half(net, step / steps).backward()
        for alpha, fixed in zip(alphas, pulls, strict=True):
            assert alpha.grad is not None
            alpha.grad += fixed + pull * torch.randn(alpha.shape, generator=generator)
        optimizer.step()
    pricing = half.pricing(net)
    assert pricing.joint_ms(pricing.pattern()) / half.limit(net) == pytest.approx(1, abs=0.07)


def test_the_manifest_says_what_the_budget_was(half: Budget) -> None:
    found = _plain_budget(half)
    assert found is not None and found["kind"] == "Budget" and found["ms"] == half.ms and found["ratio"] is None
    assert found["threads"] == 1 and found["device"] == {"cpu": "none"}


def test_the_shipped_table_is_the_default() -> None:
    assert Budget(ratio=1.5).latency().name == Budget(ratio=1.5).table
