from __future__ import annotations

import copy

import pytest
import torch
from torch_nets import gated

from igate_edge.errors import InputError
from igate_edge.gating.budget import HardFraction
from igate_edge.gating.gate import Gates, hard, is_open

EDGE = torch.tensor([-1e-7, 0.0, 1e-7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_one_decision_at_the_threshold(dtype: torch.dtype) -> None:
    """cases.md M8; -1e-7 is a subnormal in float16, still below 0."""
    assert is_open(EDGE.to(dtype)).tolist() == [False, True, True]
    assert hard(EDGE.to(dtype)).tolist() == [0.0, 1.0, 1.0]


def test_negative_zero_is_open_and_nan_is_closed() -> None:
    assert is_open(torch.tensor([-0.0, float("nan")])).tolist() == [True, False]


def test_training_evaluation_budget_and_export_decide_alike() -> None:
    net = gated(count=1)
    for site in net.gate_sites():
        site.gates.alpha["semseg"].data.copy_(EDGE.repeat(6)[: site.channels])
    masks = net.gate_masks()
    counted = HardFraction(0.0, ramp=0.0)(net)
    assert counted.item() == pytest.approx(net.hard_fractions()["semseg"], abs=1e-6)
    view = net.export_view()
    for name, mask in masks.items():
        assert torch.equal(view.sites[name].mask_semseg.flatten(), mask[0])  # type: ignore[union-attr, operator]
        assert torch.equal(mask[0], EDGE.repeat(6)[: mask.shape[1]] >= 0)
    image = torch.randn(1, 3, 32, 32)
    outputs = [net.eval()(image)["semseg"]]
    net.freeze_gates()
    outputs += [net(image)["semseg"], view(image)[0]]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-5)


def test_hard_gate_keeps_the_derivative_of_the_sigmoid() -> None:
    logits = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.double, requires_grad=True)
    hard(logits).backward(torch.tensor([1.0, 2.0, -1.0], dtype=torch.double))
    soft = torch.sigmoid(logits.detach())
    torch.testing.assert_close(logits.grad, torch.tensor([1.0, 2.0, -1.0], dtype=torch.double) * soft * (1 - soft))


@pytest.mark.parametrize(("channels", "granule", "count"), [(8, 1, 8), (8, 4, 2), (10, 4, 3), (3, 16, 1), (1, 1, 1)])
def test_granules(channels: int, granule: int, count: int) -> None:
    gates = Gates(["a", "b"], channels, granule)
    assert gates.logits().shape == (2, count)
    assert gates.expanded().shape == gates.mask().shape == gates.hard().shape == (2, channels)
    gates.alpha["b"].data[-1] = -1.0
    short = channels - granule * (count - 1) if count > 1 else channels
    assert gates.mask()[1].tolist() == [True] * (channels - short) + [False] * short
    assert gates.mask()[0].all()


def test_granule_gradient_is_the_sum_over_its_channels() -> None:
    gates = Gates(["a"], 5, 4, init=0.0)
    gates.hard().sum().backward()
    assert gates.alpha["a"].grad.tolist() == [4 * 0.25, 1 * 0.25]  # type: ignore[union-attr]


def test_frozen_gates_survive_everything() -> None:
    gates = Gates(["a", "b"], 6, 2)
    gates.alpha["a"].data.copy_(torch.tensor([1.0, -1.0, 1.0]))
    before = gates.mask()
    gates.freeze()
    gates.alpha["a"].data.neg_()
    gates.train()
    fresh = Gates(["a", "b"], 6, 2)
    fresh.load_state_dict(gates.state_dict())
    for one in (gates, copy.deepcopy(gates), fresh):
        assert one.is_frozen and torch.equal(one.mask(), before)
        assert not any(alpha.requires_grad for alpha in one.alpha.values())
        assert torch.equal(one.hard(), before.float()) and not one.hard().requires_grad


def test_loading_an_open_state_thaws_nothing_by_halves() -> None:
    frozen, free = Gates(["a"], 2), Gates(["a"], 2)
    frozen.freeze()
    frozen.load_state_dict(free.state_dict())
    assert not frozen.is_frozen and frozen.alpha["a"].requires_grad


def test_errors() -> None:
    gates = Gates(["a"], 6, 4)
    with pytest.raises(InputError, match="splits a granule"):
        gates.assign(torch.tensor([[True, True, True, False, False, False]]))
    with pytest.raises(InputError, match=r"wrong shape.*\[1, 5\], not \[1, 6\]"):
        gates.assign(torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(InputError, match="granule is less than one channel"):
        Gates(["a"], 6, 0)
    for wrong in (1.5, "x", None, True):
        with pytest.raises(InputError, match="no whole number"):
            Gates(["a"], 4, wrong)  # type: ignore[arg-type]
    for wrong in (float("nan"), float("inf"), "x"):
        with pytest.raises(InputError, match="first logit"):
            Gates(["a"], 4, 1, wrong)  # type: ignore[arg-type]
