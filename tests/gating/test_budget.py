from __future__ import annotations

import pytest
import torch
from torch import nn
from torch_nets import all_masks, batch, gated, random_masks, tasks

from igate_edge.errors import InputError
from igate_edge.gating.budget import HardFraction, L1Gates, SparsityHinge, fix_fraction
from igate_edge.gating.convert import InterroGateNet, interrogate
from igate_edge.training.balance import Balance
from igate_edge.training.config import TrainConfig
from igate_edge.training.stages import penalty
from igate_edge.training.step import make_optimizers, set_lr, train_step


def fill(net: InterroGateNet, values: dict[str, float]) -> None:
    """One logit per task, everywhere."""
    for site in net.gate_sites():
        for task, value in values.items():
            site.gates.alpha[task].data.fill_(value)


def logit(share: float) -> float:
    return float(torch.logit(torch.tensor(share, dtype=torch.double)))


def test_the_hinge_is_the_papers_equation() -> None:
    net = gated()
    fill(net, {"semseg": logit(0.6), "depth": logit(0.3), "normals": logit(0.9)})
    loss = SparsityHinge({"semseg": 0.2, "depth": 0.4, "normals": 0.5}, weight=2.0)(net)
    assert loss.item() == pytest.approx(2.0 * ((0.6 - 0.2) + 0 + (0.9 - 0.5)) / 3)


def test_every_site_counts_the_same_in_the_hinge() -> None:
    net = gated()
    net.sites["stem"].gates.alpha["semseg"].data.fill_(logit(0.9))  # type: ignore[union-attr, index]
    for name in list(net.sites)[1:]:
        net.sites[name].gates.alpha["semseg"].data.fill_(logit(0.4))  # type: ignore[union-attr, index]
    fill_others = {"depth": -50.0, "normals": -50.0}
    fill(net, fill_others)
    sites = len(net.sites)
    assert SparsityHinge(0.0)(net).item() == pytest.approx((0.9 + (sites - 1) * 0.4) / sites / 3, rel=1e-5)


@pytest.mark.parametrize(("soft", "moves"), [(0.2, False), (0.5, False), (0.51, True)])
def test_no_gradient_at_or_below_tau(soft: float, moves: bool) -> None:
    """method.md section 4, invariant e: exactly 0, also at equality."""
    net = gated()
    fill(net, {"semseg": logit(soft), "depth": 0.0, "normals": 0.0})
    SparsityHinge(0.5)(net).backward()
    for site in net.gate_sites():
        grad = site.gates.alpha["semseg"].grad
        assert bool((grad > 0).all()) if moves else bool((grad == 0).all())
        assert bool((site.gates.alpha["depth"].grad == 0).all())


def test_the_push_on_one_gate() -> None:
    """method.md section 2: lambda * sigmoid' / (T * L * C)."""
    net = gated()
    SparsityHinge(0.1, weight=3.0)(net).backward()
    soft = torch.sigmoid(torch.tensor(0.5))
    for site in net.gate_sites():
        expected = 3.0 * soft * (1 - soft) / (3 * len(net.sites) * site.channels)
        torch.testing.assert_close(site.gates.alpha["depth"].grad, expected.expand(site.channels))


def test_l1_pushes_always() -> None:
    net = gated()
    fill(net, {"semseg": logit(0.1), "depth": logit(0.2), "normals": logit(0.6)})
    loss = L1Gates(weight=2.0)(net)
    assert loss.item() == pytest.approx(2.0 * (0.1 + 0.2 + 0.6) / 3)
    loss.backward()
    assert all(bool((p.grad > 0).all()) for p in net.gate_parameters() if p.grad is not None)


@pytest.mark.parametrize("cost", ["uniform", "macs"])
def test_hard_fraction_counts_gates_not_sigmoids(cost: str) -> None:
    net = gated(granule=3, tie="stage")
    net.set_gates(random_masks(net))
    table = net.site_costs() if cost == "macs" else None
    hard = net.hard_fractions(table)
    loss = HardFraction(0.05, weight=1.5, cost=cost, ramp=0.0)(net)
    assert loss.item() == pytest.approx(1.5 * sum(max(0.0, value - 0.05) for value in hard.values()) / 3, rel=1e-5)
    loss.backward()
    for parameter in net.gate_parameters():
        assert parameter.grad is not None and bool((parameter.grad > 0).all())


def test_hard_fraction_is_silent_when_met() -> None:
    net = gated()
    net.set_gates(all_masks(net, False))
    HardFraction({"semseg": 0.0, "depth": 0.5, "normals": 1.0})(net).backward()
    assert all(bool((p.grad == 0).all()) for p in net.gate_parameters() if p.grad is not None)


@pytest.mark.parametrize("budget", [HardFraction(0.0, ramp=0.2), SparsityHinge(0.0, ramp=0.2), L1Gates(ramp=0.2)])
def test_ramp(budget: HardFraction | SparsityHinge | L1Gates) -> None:
    net = gated()
    whole = budget(net).item()
    assert [budget(net, progress).item() for progress in (0.0, 0.1, 0.2, 0.7)] == pytest.approx(
        [0.0, whole / 2, whole, whole]
    )


def test_all_gates_move_also_those_of_absent_tasks() -> None:
    net = gated()
    (net.loss(batch(keys=["depth"])) + HardFraction(0.1)(net)).backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in net.gate_parameters())


def test_a_frozen_net_has_a_constant_budget() -> None:
    net = gated()
    net.freeze_gates()
    assert HardFraction(0.25, ramp=0.0)(net).item() == pytest.approx(0.75)


@pytest.mark.parametrize("target", [0.1, 0.25, 0.5])
def test_a_requested_fraction_is_reached(target: float) -> None:
    """At the recipe's rates the search alone gets below the target; the last gates by rank: within 2 points.

    It may close too many (a hinge has no pull upwards): only the smallest target is held to 8 points here, since
    100 steps end a gate or two apart on processors that sum in another order.
    """
    config, steps = TrainConfig(budget=target), 100
    torch.manual_seed(0)
    layers = [(nn.Conv2d(a, 32, 3, s, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()) for a, s in ((3, 4), (32, 1))]
    net = interrogate(nn.Sequential(*layers[0], *layers[1]), tasks(2), example=torch.zeros(1, 3, 16, 16))
    data, balance = batch(4, ("semseg", "depth"), 16), Balance(dict.fromkeys(net.task_names, 1.0))
    optimizers, budget = make_optimizers(net, balance, config.optim(config.search_lr)), penalty(config)
    for step in range(steps):
        set_lr(optimizers, step, steps, 30)
        train_step(net, data, optimizers, balance, budget(step / steps), step)
    searched = net.hard_fractions()
    assert all(0 < value <= target + 0.06 for value in searched.values()), searched
    if target == 0.1:
        assert all(value >= target - 0.08 for value in searched.values()), searched
    flips = fix_fraction(net, target)
    assert set(flips) == set(net.task_names)
    net.freeze_gates()
    assert all(abs(value - target) <= 0.02 for value in net.hard_fractions().values())


@pytest.mark.parametrize("cost", ["uniform", "macs"])
@pytest.mark.parametrize("target", [0.0, 0.1, 0.33, 0.9, 1.0])
def test_the_fix_is_as_near_as_whole_gates_allow(cost: str, target: float) -> None:
    net = gated(tie="stage", granule=3)
    torch.manual_seed(0)
    for parameter in net.gate_parameters():
        parameter.data.normal_()
    fix_fraction(net, target, cost)
    table = net.site_costs() if cost == "macs" else None
    found = net.hard_fractions(table)
    for name in net.sites:  # no flip of a single gate comes nearer
        for t, task in enumerate(net.task_names):
            for channel in range(0, net.sites[name].channels, 3):  # type: ignore[arg-type, call-overload]
                mask = net.gate_masks()[name].clone()
                mask[t, channel : channel + 3] ^= True
                net.set_gates({name: mask})
                changed = net.hard_fractions(table)[task]
                mask[t, channel : channel + 3] ^= True
                net.set_gates({name: mask})
                if (changed - found[task]) * (target - found[task]) > 0:
                    assert abs(changed - target) >= abs(found[task] - target) - 1e-9


@pytest.mark.parametrize("target", [0.0, 0.2, 0.5, 0.85, 1.0])
def test_the_fix_flips_the_logits_nearest_to_the_threshold(target: float) -> None:
    torch.manual_seed(0)
    net = interrogate(nn.Sequential(nn.Conv2d(3, 20, 3, 2, 1)), tasks(2), example=torch.zeros(1, 3, 16, 16))
    alpha = net.gate_sites()[0].gates.alpha["semseg"]
    alpha.data.normal_()
    old = alpha.detach().clone()
    flips = fix_fraction(net, {"semseg": target, "depth": 1.0})
    flipped = (old >= 0) != (alpha >= 0)
    assert int((alpha >= 0).sum()) == round(20 * target)
    assert int(flipped.sum()) == flips["semseg"] == abs(int((old >= 0).sum()) - round(20 * target))
    assert torch.equal(old[~flipped], alpha.detach()[~flipped])
    if flipped.any():
        kept = old[((old >= 0) == (old[flipped][0] >= 0)) & ~flipped].abs()
        assert kept.numel() == 0 or old[flipped].abs().max() <= kept.min()


def test_the_fix_changes_nothing_where_nothing_is_wrong() -> None:
    net = gated()
    net.set_gates(random_masks(net))
    before = net.gate_masks()
    assert set(fix_fraction(net, net.hard_fractions()).values()) == {0}
    assert all(torch.equal(mask, before[name]) for name, mask in net.gate_masks().items())


def test_errors() -> None:
    net = gated()
    with pytest.raises(InputError, match="unknown cost 'ms'.*uniform, macs"):
        HardFraction(0.1, cost="ms")
    with pytest.raises(InputError, match=r"outside of \[0, 1\].*pass a fraction, not a percentage"):
        HardFraction(25)(net)
    with pytest.raises(InputError, match="targets do not match the tasks.*tasks are semseg, depth, normals"):
        SparsityHinge({"semseg": 0.1})(net)
    for make in (SparsityHinge, HardFraction):
        for wrong in (float("nan"), None, "0.1", True):
            with pytest.raises(InputError, match=r"outside of \[0, 1\]"):
                make(wrong)(net)
            for name in ("weight", "ramp"):
                with pytest.raises(InputError, match=f"budget's {name} is not usable"):
                    make(0.1, **{name: wrong})
    with pytest.raises(InputError, match="budget's weight"):
        L1Gates(-1.0)
    with pytest.raises(InputError, match="progress is not a number"):
        HardFraction(0.1)(net, float("nan"))
    net.freeze_gates()
    with pytest.raises(InputError, match="gates are frozen.*before freeze_gates"):
        fix_fraction(net, 0.1)
