"""Rounding: whole granules by worth per millisecond, on the machine's steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from staircase import table
from torch import nn
from torch_nets import TinyResNet, scatter, tasks

from igate_edge.errors import InputError
from igate_edge.gating.budget import Budget
from igate_edge.gating.convert import InterroGateNet, interrogate
from igate_edge.gating.pricing import Pricing, live_values
from igate_edge.gating.rounding import aligned, assign, coarse, fine, fit, gate_worth, grown, round_gates, shrunk
from igate_edge.training.tasks import Classification


def line(times: dict[int, float], channels: int, granule: int, tasks: int = 2) -> Pricing:
    """A net of one layer: live values -> ms, the nearest known count above decides."""

    def ms(pattern: list[np.ndarray]) -> float:
        size = live_values(pattern[0])
        return times[min(count for count in times if count >= size)]

    gates = SimpleNamespace(granule=granule, channels=channels)
    return cast(
        "Pricing", SimpleNamespace(ms=ms, gates=[gates], table=SimpleNamespace(step=16), plain_ms=times[channels])
    )


def test_a_ragged_count_that_costs_more_is_never_chosen() -> None:
    """cases.md P2: 61 of 64 costs more than 64, 56 costs less; at least three must go: 56, or stay at 64."""
    prices = line(
        {48: 4.0, **dict.fromkeys(range(49, 57), 5.0), **dict.fromkeys(range(57, 64), 7.0), 64: 6.0, 96: 9.0}, 48, 1
    )
    worth = [np.linspace(1, 2, 96).reshape(2, 48)]
    start = [np.zeros((2, 48), bool)]
    start[0][0, :16] = True  # 64 live values
    assert prices.ms(start) == 6.0
    for most, wanted in ((6.5, 64), (5.5, 56), (5.0, 56), (4.5, 48)):
        assert live_values(fit(prices, start, worth, (0.0, most))[0]) == (wanted if wanted < 64 else 64)


def test_what_is_worth_least_goes_first_and_what_is_worth_most_comes_first() -> None:
    worth = np.array([[3.0, 1.0, 2.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    opened = np.array([[1, 1, 1, 0], [0, 0, 0, 0]], bool)
    sizes = np.full(4, 4)
    down, up = shrunk(opened, worth, sizes), grown(opened, worth, sizes)
    assert down is not None and up is not None
    assert down[0].tolist() == [[True, False, True, False], [False] * 4] and down[1] == 4
    assert up[0][0].all() and up[1] == 4


def test_a_channel_is_completed_for_nothing_when_that_is_worth_something() -> None:
    """Two of three tasks own it: the third adds no live value."""
    mask, sizes = np.array([[1], [1], [0]], bool), np.array([4])
    found = grown(mask, np.array([[1.0], [1.0], [0.1]]), sizes)
    assert found is not None and found[0].all() and found[1] == 0
    down = shrunk(np.ones((3, 1), bool), np.ones((3, 1)), sizes)  # for two tasks 4 values go, for all three 8
    assert down is not None and not down[0].any() and down[1] == 8
    useless = shrunk(np.ones((3, 1), bool), np.array([[-1.0], [1.0], [1.0]]), sizes)  # alone it frees no value
    assert useless is not None and useless[1] > 0
    assert shrunk(np.zeros((3, 1), bool), np.ones((3, 1)), sizes) is None
    assert grown(np.ones((3, 1), bool), np.ones((3, 1)), sizes) is None


def test_aligned_masks_open_the_best_granules_for_all_tasks() -> None:
    mask = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], bool)  # three values more: one granule and a half
    worth = np.array([[0, 0, 0, 5.0], [0, 0, 2.0, 0], [0, 1.0, 0, 0]])
    one, two = aligned(mask, worth, np.full(4, 2))
    assert one.all(0).tolist() == [False, False, False, True] and two.all(0).tolist() == [False, False, True, True]
    assert not list(aligned(np.ones((3, 4), bool), worth, np.full(4, 2)))


@pytest.fixture(scope="module")
def net() -> InterroGateNet:
    return interrogate(TinyResNet(16), tasks(), granule=4, tie="stage")


@pytest.fixture(scope="module")
def budget(net: InterroGateNet) -> Budget:
    made = Budget(ratio=1.25, table=table(8))
    made.pricing(net)
    return made


def random_worth(pricing: Pricing, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=mask.shape) for mask in coarse(pricing)]


@pytest.mark.parametrize("logit", [0.5, -0.5])
def test_patterns_are_brought_to_the_budget_from_both_sides(net: InterroGateNet, budget: Budget, logit: float) -> None:
    pricing = budget.pricing(net)
    for seed in range(3):
        for alpha in net.gate_parameters():
            alpha.data.fill_(logit)
        ms = round_gates(net, budget, random_worth(pricing, seed))
        assert ms == pytest.approx(budget.price(net).ms)
        assert 0.95 <= ms / budget.limit(net) <= 1


def test_a_pattern_on_the_budget_with_nothing_to_gain_stays(net: InterroGateNet, budget: Budget) -> None:
    pricing = budget.pricing(net)
    round_gates(net, budget, random_worth(pricing, 0))
    before = [mask.copy() for mask in coarse(pricing)]
    worth = [np.where(mask, 1.0, -1.0) for mask in before]  # what is open is worth it, what is closed is not
    round_gates(net, budget, worth)
    assert all((old == new).all() for old, new in zip(before, coarse(pricing), strict=True))


def test_known_error_of_the_table_is_heeded(net: InterroGateNet, budget: Budget) -> None:
    pricing, worth = budget.pricing(net), random_worth(budget.pricing(net), 1)
    slow = round_gates(net, budget, worth, scale=1.1)  # engines take 10 % more than predicted
    assert 0.95 <= 1.1 * slow / budget.limit(net) <= 1
    assert slow == pytest.approx(pricing.ms(pricing.pattern()))


def test_skips_that_cost_a_convolution_make_openings_joint(net: InterroGateNet, budget: Budget) -> None:
    """All gates are worth the same: what decides is the price, and lone openings cost more in a residual stage."""
    pricing = budget.pricing(net)
    stage = next(skip.reads for skip in pricing.skips)
    pattern = [np.zeros_like(mask) for mask in coarse(pricing)]
    pattern[stage][0, :2] = True
    worth = [np.ones_like(mask, float) if g == stage else np.full(mask.shape, -1.0) for g, mask in enumerate(pattern)]
    found = fit(pricing, pattern, worth, (0.0, pricing.ms(fine(pricing, pattern))))[stage].sum(0)
    assert found.any() and set(found.tolist()) <= {0, 3}


def test_assigning_keeps_the_logits_that_stay(net: InterroGateNet, budget: Budget) -> None:
    pricing = budget.pricing(net)
    for alpha in net.gate_parameters():
        alpha.data.fill_(0.2)
    wanted = [mask.copy() for mask in coarse(pricing)]
    wanted[0][1, 0] = False
    assign(pricing, wanted)
    assert all((a == b).all() for a, b in zip(wanted, coarse(pricing), strict=True))
    row: Any = pricing.gates[0].alpha[pricing.gates[0].tasks[1]]
    assert row[0] == -0.5 and (row[1:] == torch.tensor(0.2)).all()


def test_worth_is_what_closing_costs() -> None:
    """Exact where the loss is linear in the gates: one layer, read by an average and a linear head."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
    net = interrogate(backbone, [Classification("a", 2), Classification("b", 2)], granule=4)
    scatter(net)
    image, (site,) = torch.randn(2, 3, 16, 16), net.gate_sites()
    before = {key: value.clone() for key, value in net.state_dict().items()}

    def loss(probe: InterroGateNet) -> torch.Tensor:
        found = probe(image)
        return found["a"].mean() + 3 * found["b"].mean()

    (worth,) = gate_worth(net, lambda probe: [loss(probe)])
    for task in range(2):
        for granule in range(2):
            values = []
            for value in (True, False):
                mask = site.gates.mask().clone()
                mask[task, 4 * granule : 4 * granule + 4] = value
                net.set_gates({site.name: mask})
                values.append(float(loss(net).detach()))
            assert worth[task, granule] == pytest.approx(values[1] - values[0], rel=1e-3)
    net.set_gates({site.name: torch.ones(2, 8, dtype=torch.bool)})
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_the_worth_of_another_net_is_refused(net: InterroGateNet, budget: Budget) -> None:
    for worth in ([], [np.zeros((1, 1))], random_worth(budget.pricing(net), 0)[:-1]):
        with pytest.raises(InputError, match="the gates' worth is of another net"):
            round_gates(net, budget, worth)
