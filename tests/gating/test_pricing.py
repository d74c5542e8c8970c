"""Prices of gate patterns: what merging makes of them, exactly, and gradients that say what a gate would save."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from staircase import table
from torch import nn
from torch_nets import Bottlenecks, TinyResNet, tasks

from igate_edge.compiler import graph
from igate_edge.contract import Preprocess
from igate_edge.gating.convert import InterroGateNet, interrogate
from igate_edge.gating.export import to_onnx
from igate_edge.gating.merge import merge, merge_unchecked
from igate_edge.gating.pricing import Pricing, live_values, needs_conv, shares

STEP = 8


def net_of(backbone: nn.Module, granule: int = 4, tie: str = "stage") -> InterroGateNet:
    return interrogate(backbone, tasks(), granule=granule, tie=tie)


def set_random(pricing: Pricing, seed: int, joint: bool) -> None:
    rng = np.random.default_rng(seed)
    for gates in pricing.gates:
        mask = rng.random((len(gates.tasks), -(-gates.channels // gates.granule))) < 0.4
        mask = mask[:1].repeat(len(mask), 0) if joint else mask
        gates.assign(torch.from_numpy(mask.repeat(gates.granule, 1)[:, : gates.channels]))


@pytest.fixture(scope="module")
def pricing() -> Pricing:
    """Stem and layer1 tied (16 channels), conv1 of both blocks (16, 32) and layer2's add (32); three tasks."""
    return Pricing(net_of(TinyResNet(16)), table(STEP))


def closed(pricing: Pricing) -> list[np.ndarray]:
    return [np.zeros((pricing.tasks, count), bool) for count in pricing.channels]


def opened(pricing: Pricing, group: int, tasks: int, channels: int) -> list[np.ndarray]:
    pattern = closed(pricing)
    pattern[group][:tasks, :channels] = True
    return pattern


@pytest.mark.parametrize("make", [lambda: TinyResNet(8), Bottlenecks])
@pytest.mark.parametrize("tie", ["stage", "none"])
def test_widths_and_skips_are_those_of_the_merged_net(make: Callable[[], nn.Module], tie: str) -> None:
    """One definition serves pricing and merging: the widths, and the convolutions that make mixes and repeats."""
    net = net_of(make(), 1, tie)
    pricing = Pricing(net, table(STEP))
    for seed in range(6):
        set_random(pricing, seed, joint=seed == 0)
        merged, pattern = merge_unchecked(net), pricing.pattern()
        sizes = dict(zip([id(gates) for gates in pricing.gates], pricing.sizes(pattern), strict=True))
        assert merged.widths() == {site.name: sizes[id(site.gates)] for site in net.gate_sites()}
        needed = sum(needs_conv(pattern[skip.reads], pattern[skip.makes]) for skip in pricing.skips)
        assert len(merged.skips) == needed and (needed == 0) == (seed == 0 and tie == "stage")


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("make", [lambda: TinyResNet(8), Bottlenecks])
def test_the_price_is_the_tables_prediction_of_the_merged_net(make: Callable[[], nn.Module], joint: bool) -> None:
    net, times = net_of(make(), 1), table(STEP)
    pricing = Pricing(net, times)
    set_random(pricing, 3, joint)
    exported = graph.load(to_onnx(merge(net), Preprocess(64, 64)))
    price = pricing.price(pricing.pattern())
    assert price.ms == pytest.approx(times.predict(exported).ms, rel=0.01)
    assert price.ms > 1.05 * price.plain_ms == pytest.approx(1.05 * pricing.plain_ms)


def test_closed_gates_cost_the_plain_net_and_open_ones_most(pricing: Pricing) -> None:
    assert pricing.ms(closed(pricing)) == pytest.approx(pricing.plain_ms)
    for group in range(len(pricing.gates)):
        costs = [pricing.ms(opened(pricing, group, 3, count)) for count in (0, 4, 16)]
        assert costs == sorted(costs) and costs[0] < costs[2] < pricing.most_ms


def test_the_price_has_the_machines_steps(pricing: Pricing) -> None:
    """16 channels and 4 for one task are 20 values, made at the price of 24; four more cost only who reads them."""
    group = next(g for g, name in enumerate(pricing.names) if name == "layer1_conv1")
    base, ragged, whole, next_step = (pricing.ms(opened(pricing, group, 1, count)) for count in (0, 4, 8, 12))
    assert base < ragged < whole < next_step
    assert next_step - whole > 2 * (whole - ragged)


def test_the_last_task_of_a_channel_opens_it_for_nothing(pricing: Pricing) -> None:
    two, three = (opened(pricing, 1, tasks, 8) for tasks in (2, 3))
    assert pricing.ms(two) == pytest.approx(pricing.ms(three)) and live_values(two[1]) == live_values(three[1])


def test_a_residual_stage_with_partly_open_channels_costs_a_convolution_more(pricing: Pricing) -> None:
    """Sixteen more values either way; joint ones need no mix on the skip."""
    group = next(skip.reads for skip in pricing.skips)
    joint, lone = opened(pricing, group, 3, 8), opened(pricing, group, 1, 16)
    assert live_values(joint[group]) == live_values(lone[group]) == 32
    assert pricing.ms(lone) > pricing.joint_ms(lone) == pytest.approx(pricing.ms(joint))
    assert any(name.endswith(".skip") for name in pricing.price(lone).by_layer)
    assert not any(name.endswith(".skip") for name in pricing.price(joint).by_layer)


def test_what_gates_answer_for_adds_up_to_the_price(pricing: Pricing) -> None:
    for seed in range(3):
        set_random(pricing, seed, joint=False)
        over = pricing.joint_ms(pricing.pattern()) - pricing.plain_ms
        assert float(pricing.added().sum().detach()) == pytest.approx(over)
        assert (pricing.added() > 0).all()


def test_shares_add_up_to_the_live_values() -> None:
    mask = np.random.default_rng(0).random((3, 50)) < 0.5
    assert (shares(mask) * mask).sum() + 50 == pytest.approx(live_values(mask))
    assert (shares(np.ones((1, 4), bool)) == 0).all()  # a single task opens for nothing


def test_slopes_foretell_what_a_step_saves(pricing: Pricing) -> None:
    """A secant over one step each way: half of what a step more and a step less differ by."""
    group = 1
    pattern = opened(pricing, group, 3, 8)  # 32 values; 24 and 40 are one step away
    slope = pricing.slopes(pattern)[group]
    more, less = pricing.ms(opened(pricing, group, 3, 12)), pricing.ms(opened(pricing, group, 3, 4))
    assert slope[0, 0] == pytest.approx(2 / 3 * (more - less) / 16)
    assert slope[0, 8] == pytest.approx(1.5 * slope[0, 0])  # closed for all: a whole value for the first task


def test_gradients_reach_the_logits_and_only_them(pricing: Pricing) -> None:
    set_random(pricing, 1, joint=False)
    alphas = [gates.alpha[task] for gates in pricing.gates for task in gates.tasks]
    for alpha in alphas:
        alpha.grad = None
    pricing.added().sum().backward()
    assert all(alpha.grad is not None and torch.isfinite(alpha.grad).all() for alpha in alphas)
    assert any((alpha.grad > 0).any() for alpha in alphas if alpha.grad is not None)


def test_the_plain_nets_time_is_told_by_head(pricing: Pricing) -> None:
    assert set(pricing.heads) == {"semseg", "depth", "normals"} and min(pricing.heads.values()) > 0
    assert pricing.backbone_ms + sum(pricing.heads.values()) == pytest.approx(pricing.plain_ms)
    assert "ms" in pricing.costliest
