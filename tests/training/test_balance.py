"""Loss balances: the equalised norms, the learned variances, checkpointed state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from igate_edge.errors import InputError
from igate_edge.training.balance import Balance, GradNorm, Uncertainty, gradient_norm, make_balance


class Shared(nn.Module):
    """One shared vector; the losses' gradients on it have norms 5 and 0.5, and each head has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Parameter(torch.ones(2))
        self.heads = nn.ParameterDict({"a": nn.Parameter(torch.ones(1)), "b": nn.Parameter(torch.ones(1))})

    def losses(self) -> dict[str, torch.Tensor]:
        a = (torch.tensor([3.0, 4.0]) * self.trunk).sum() + 100 * self.heads["a"].sum()
        b = (torch.tensor([0.3, 0.4]) * self.trunk).sum() + self.heads["b"].sum()
        return {"a": a, "b": b}


def test_fixed_is_a_weighted_sum_over_tasks_present() -> None:
    balance = Balance({"a": 2.0, "b": 3.0})
    assert float(balance({"a": torch.tensor(5.0), "b": torch.tensor(7.0)})) == 2 * 5 + 3 * 7
    assert float(balance({"b": torch.tensor(7.0)})) == 3 * 7


def test_gradnorm_equalises_on_shared_parameters_only() -> None:
    net, balance = Shared(), GradNorm({"a": 1.0, "b": 1.0})
    losses = net.losses()
    balance.observe(losses, net, 0)
    weights = balance.weights()
    assert weights["a"] * 5 == pytest.approx(weights["b"] * 0.5)
    assert sum(weights.values()) / 2 == pytest.approx(1)
    balance(losses).backward()
    assert net.trunk.grad is not None
    expected = weights["a"] * torch.tensor([3.0, 4.0]) + weights["b"] * torch.tensor([0.3, 0.4])
    torch.testing.assert_close(net.trunk.grad, expected)


def test_gradnorm_moves_slowly_and_only_when_due() -> None:
    net, balance = Shared(), GradNorm({"a": 1.0, "b": 1.0}, every=10, keep=0.5)
    balance.observe(net.losses(), net, 0)
    before = balance.weights()
    tenfold = {name: 10 * loss if name == "b" else loss for name, loss in net.losses().items()}
    balance.observe(tenfold, net, 5)
    assert balance.weights() == before
    balance.observe(tenfold, net, 10)
    ratio = math.sqrt(0.5 * 5.0)  # geometric mean of the two norms of b
    assert balance.weights()["a"] / balance.weights()["b"] == pytest.approx(ratio / 5, rel=1e-5)


def test_gradnorm_keeps_own_weights_as_factors() -> None:
    net, balance = Shared(), GradNorm({"a": 1.0, "b": 4.0})
    balance.observe(net.losses(), net, 0)
    assert balance.weights()["b"] * 0.5 == pytest.approx(4 * balance.weights()["a"] * 5)


def test_a_task_without_gradient_keeps_weight_one() -> None:
    net, balance = Shared(), GradNorm({"a": 1.0, "b": 1.0})
    balance.observe({"a": net.losses()["a"], "b": torch.tensor(0.0)}, net, 0)
    assert balance.weights() == pytest.approx({"a": 1.0, "b": 1.0})


def test_uncertainty_finds_the_inverse_loss() -> None:
    balance = Uncertainty({"a": 1.0, "b": 1.0})
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        total = balance({"a": torch.tensor(0.5), "b": torch.tensor(4.0)})
        total.backward()
        optimizer.step()
    assert balance.weights() == pytest.approx({"a": 1 / 0.5, "b": 1 / 4.0}, rel=0.02)


def test_state_survives_a_round_trip() -> None:
    net, balance = Shared(), GradNorm({"a": 1.0, "b": 1.0})
    balance.observe(net.losses(), net, 0)
    again = GradNorm({"a": 1.0, "b": 1.0})
    again.load_state_dict(balance.state_dict())
    assert again.weights() == balance.weights()


def test_state_does_not_depend_on_the_order_of_names() -> None:
    balance = Balance({"b": 2.0, "a": 1.0})
    again = Balance({"a": 5.0, "b": 5.0})
    again.load_state_dict(balance.state_dict())
    assert again.weights() == {"a": 1.0, "b": 2.0}


def test_gradient_norm_is_euclidean() -> None:
    net = Shared()
    assert float(gradient_norm(net.losses()["a"], [net.trunk])) == pytest.approx(5)


def test_wrong_use_is_a_sentence() -> None:
    with pytest.raises(InputError, match="unknown loss balance 'magic': known: fixed, gradnorm, uncertainty"):
        make_balance("magic", {"a": 1.0})
    with pytest.raises(InputError, match="0 or more"):
        make_balance("fixed", {"a": -1.0})
