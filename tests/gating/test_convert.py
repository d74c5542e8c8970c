from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch_nets import (
    BACKBONES,
    Bottlenecks,
    TinyResNet,
    all_masks,
    batch,
    gated,
    plain_state,
    random_masks,
    scatter,
    tasks,
)

from igate_edge.errors import DataError, InputError
from igate_edge.gating.convert import InterroGateNet, PlainNet, interrogate

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
EXAMPLE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("tie", ["none", "stage"])
def test_all_open_is_the_single_task_nets_bit_for_bit(backbone: str, tie: str) -> None:
    """method.md section 4, invariant a."""
    net = gated(backbone, tie=tie).eval()
    singles = {}
    for task in tasks():
        singles[task.name] = PlainNet(BACKBONES[backbone](), [task], EXAMPLE).eval()
        scatter(singles[task.name])
        net.load_task(task.name, singles[task.name].state_dict())
    net.set_gates(all_masks(net, True))
    outputs = net(IMAGE)
    for name, single in singles.items():
        assert torch.equal(outputs[name], single(IMAGE)[name])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("training", [False, True])
def test_all_closed_is_the_plain_net_bit_for_bit(backbone: str, training: bool) -> None:
    """method.md section 4, invariant b."""
    net = gated(backbone)
    net.set_gates(all_masks(net, False))
    plain = PlainNet(BACKBONES[backbone](), tasks(), EXAMPLE)
    plain.load_state_dict(plain_state(net))
    outputs, expected = net.train(training)(IMAGE), plain.train(training)(IMAGE)
    for name in expected:
        assert torch.equal(outputs[name], expected[name])


def test_forking_a_plain_net_gives_the_plain_net_whatever_the_gates() -> None:
    plain = PlainNet(TinyResNet(), tasks(), EXAMPLE)
    scatter(plain)
    net = gated()
    net.load_shared(plain.state_dict())
    for task in net.tasks:
        net.load_task(task.name, plain.state_dict())
    net.set_gates(random_masks(net))
    outputs, expected = net.eval()(IMAGE), plain.eval()(IMAGE)
    for name in expected:
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_order_of_tasks_does_not_matter(backbone: str) -> None:
    """method.md section 4, invariant f; the mix is summed in another order, so not bit for bit."""
    net = gated(backbone).eval()
    net.set_gates(random_masks(net))
    order = [2, 0, 1]
    names = [net.task_names[t] for t in order]
    other = interrogate(BACKBONES[backbone](), [tasks()[t] for t in order], example=EXAMPLE).eval()
    for name in [*names, "shared"]:
        other.branches[name].load_state_dict(net.branches[name].state_dict())
    other.heads.load_state_dict(net.heads.state_dict())
    other.set_gates({site: mask[order] for site, mask in net.gate_masks().items()})
    for site in net.gate_sites():
        other.sites[site.name].beta.data.copy_(site.beta.data[order])  # type: ignore[operator, union-attr]
    outputs, expected = other(IMAGE), net(IMAGE)
    for name in names:
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-5)


def test_an_output_does_not_depend_on_the_rest_of_the_batch() -> None:
    net = gated().eval()
    net.set_gates(random_masks(net))
    whole, alone = net(IMAGE), net(IMAGE[:1])
    for name in whole:
        torch.testing.assert_close(whole[name][:1], alone[name], rtol=1e-5, atol=1e-5)


def test_the_backbone_given_is_copied() -> None:
    backbone = TinyResNet()
    before = copy.deepcopy(backbone.state_dict())
    net = interrogate(backbone, tasks(), example=EXAMPLE)
    net.train()(IMAGE)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert backbone.relu.inplace and backbone.training
    shared = {id(p) for p in backbone.parameters()} & {id(p) for p in net.parameters()}
    assert not shared


def test_gates_mixes_and_weights_are_all_parameters_once() -> None:
    net = gated("bottlenecks", tie="stage")
    groups = [net.gate_parameters(), net.mix_parameters(), net.weight_parameters()]
    ids = [id(p) for group in groups for p in group]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in net.parameters()}


def test_state_names_are_stable() -> None:
    keys = set(gated(tie="stage").state_dict())
    assert {
        "branches.semseg.layer1.conv1.weight",
        "branches.shared.bn.running_mean",
        "heads.depth.out.weight",
        "sites.layer1_conv1.beta",
        "sites.layer1_conv1.gates.alpha.normals",
        "sites.layer1_add.gates.frozen_mask",
    } <= keys


def test_state_round_trip_and_deepcopy() -> None:
    net = gated(granule=2, tie="stage").eval()
    net.set_gates(random_masks(net))
    fresh = gated(seed=1, granule=2, tie="stage").eval()
    fresh.load_state_dict(net.state_dict())
    twin = copy.deepcopy(net)
    for name, value in net(IMAGE).items():
        assert torch.equal(fresh(IMAGE)[name], value) and torch.equal(twin(IMAGE)[name], value)
    twin.set_gates(all_masks(twin, False))
    assert any(mask.any() for mask in net.gate_masks().values())


def test_an_absent_task_stays_bit_identical_under_adamw() -> None:
    """cases.md M3: head, branch and gates of tasks without a label do not move, momentum and decay included."""
    net = gated()
    net.set_gates(random_masks(net))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    net.loss(batch()).backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.zero_grad(set_to_none=True)
    net.loss(batch(keys=["depth"])).backward()
    optimizer.step()
    for name, parameter in net.named_parameters():
        part = name.split(".")
        absent = (part[0] in ("branches", "heads") and part[1] in ("semseg", "normals")) or part[-1] in (
            "semseg",
            "normals",
        )
        if absent:
            assert parameter.grad is None and torch.equal(parameter, before[name]), name
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert {"branches.depth.stem.weight", "branches.shared.stem.weight", "heads.depth.out.weight"} <= moved
    assert "sites.layer1_conv1.gates.alpha.depth" in moved and "sites.layer1_conv1.beta" in moved


def test_a_subset_of_tasks_computes_the_same_values() -> None:
    net = gated().eval()
    net.set_gates(random_masks(net))
    everything = net(IMAGE)
    some = net(IMAGE, tasks=["depth"])
    assert list(some) == ["depth"] and torch.equal(some["depth"], everything["depth"])


def test_losses_of_the_labels_that_are_there() -> None:
    net = gated()
    net.tasks[1].weight = 3.0
    losses = net.losses(batch())
    assert list(losses) == ["semseg", "depth", "normals"]
    net.zero_grad()
    both = net.losses(batch(keys=["semseg", "depth"]))
    assert list(both) == ["semseg", "depth"]
    total = net.loss(batch(keys=["semseg", "depth"]))
    torch.testing.assert_close(total, both["semseg"] + 3.0 * both["depth"])
    with pytest.raises(DataError, match=r"no label of any task.*\['image'\]"):
        net.loss(batch(keys=[]))


def test_one_task_is_allowed() -> None:
    net = gated(count=1)
    net.loss(batch(keys=["semseg"])).backward()
    assert all(p.grad is not None for p in net.gate_parameters())


@pytest.mark.parametrize("names", [["a", "a"], [], ["1x"], ["a b"], ["shared"], ["keys"], ["class"], [""]])
def test_bad_task_names(names: list[str]) -> None:
    from igate_edge.training.tasks import Depth

    for build in (interrogate, PlainNet):
        with pytest.raises(InputError):
            build(TinyResNet(), [Depth(name) for name in names])


def test_wrong_use() -> None:
    with pytest.raises(InputError, match="unknown tie 'all'.*none, stage"):
        interrogate(TinyResNet(), tasks(), tie="all")
    with pytest.raises(InputError, match="example is not an image"):
        interrogate(TinyResNet(), tasks(), example=torch.zeros(3, 32, 32))
    net = gated(tie="stage")
    with pytest.raises(InputError, match="no gate site is called 'layer9'"):
        net.set_gates({"layer9": torch.ones(3, 8, dtype=torch.bool)})
    with pytest.raises(InputError, match="share their gates"):
        one = torch.ones(3, 8, dtype=torch.bool)
        net.set_gates({"stem": one, "layer1_add": ~one})
    with pytest.raises(InputError, match="no task is called 'flow'"):
        net.load_task("flow", {})
    with pytest.raises(InputError, match="weights do not fit branch 'depth'"):
        net.load_task("depth", Bottlenecks().state_dict())
    with pytest.raises(InputError, match="image is not a batch"):
        net(torch.zeros(3, 32, 32))


def test_a_refused_set_gates_changes_nothing() -> None:
    net = gated(granule=4)
    before = net.gate_masks()
    bad = torch.ones(3, 16, dtype=torch.bool)
    bad[0, 1] = False
    with pytest.raises(InputError, match="splits a granule"):
        net.set_gates({"stem": torch.zeros(3, 8, dtype=torch.bool), "layer2_conv1": bad})
    assert all(torch.equal(mask, before[name]) for name, mask in net.gate_masks().items())


def test_bare_backbone_weights_load_into_branches() -> None:
    backbone = TinyResNet()
    net = gated()
    net.load_shared(backbone.state_dict())
    net.load_task("depth", backbone.state_dict())
    for name in ("shared", "depth"):
        assert torch.equal(net.branches[name].stem.weight, backbone.stem.weight)  # type: ignore[arg-type]
    assert not torch.equal(net.branches["semseg"].stem.weight, backbone.stem.weight)  # type: ignore[arg-type]


def test_fractions_of_open_gates() -> None:
    net = gated(tie="none")
    masks = all_masks(net, False)
    masks["stem"][1, :2] = True  # 2 of 8 channels
    net.set_gates(masks)
    sites = len(net.sites)
    assert net.hard_fractions() == pytest.approx({"semseg": 0.0, "depth": 0.25 / sites, "normals": 0.0})
    # MACs of a row: 3 x 3 taps times input channels, at each output position.
    costs = net.site_costs()
    assert costs["stem"] == 3 * 3 * 3 * 16 * 16
    assert costs["layer2_add"] == (3 * 3 * 16 + 1 * 1 * 8) * 4 * 4
    total = sum(costs[name] * site.channels for name, site in net.sites.items())  # type: ignore[operator]
    assert net.hard_fractions(costs)["depth"] == pytest.approx(2 * costs["stem"] / total)
    with pytest.raises(InputError, match="cost table lacks gate sites"):
        net.hard_fractions({"stem": 1.0})


def test_a_net_learns_gates_mixes_and_weights() -> None:
    net = gated()
    net.set_gates(random_masks(net))
    net.loss(batch()).backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None]
    # The mix behind the last site is read by nobody: no forward, no gradient.
    assert missing == ["sites.layer2_add.beta"]
    assert isinstance(net, InterroGateNet) and isinstance(net, nn.Module)
