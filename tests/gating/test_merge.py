"""Merged nets: the same function as the gated net, zero blocks that stay zero, states, heads of every kind."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from merged_nets import SIDE, build, difference
from torch import Tensor, nn
from torch_nets import Block, all_masks, batch, random_masks, scatter, tasks

from igate_edge.errors import ConvertError, InputError
from igate_edge.gating.convert import PlainNet, interrogate
from igate_edge.gating.merge import MergedNet, merge, merge_unchecked
from igate_edge.gating.merge_layers import FrontedHead, MaskedConv2d
from igate_edge.training.step import Optim, make_optimizers
from igate_edge.training.tasks import Depth, Edges, Task

TIGHT = 1e-10  # in float64: what is left is rounding alone


def masked(net: nn.Module) -> list[MaskedConv2d]:
    return [module for module in net.modules() if isinstance(module, MaskedConv2d)]


@pytest.mark.parametrize("kind", ["random", "joint", "open", "closed"])
@pytest.mark.parametrize("name", ["resnet", "bottlenecks", "pyramid_net", "densenet_tiny"])
def test_a_merged_net_computes_what_the_gated_net_does(name: str, kind: str) -> None:
    net = build(name, kind=kind).double()
    merged = merge_unchecked(net)
    assert difference(copy.deepcopy(net).eval(), copy.deepcopy(merged).eval()) < TIGHT
    assert difference(net.train(), merged.train(), size=4) < TIGHT  # norms see the same maps


@pytest.mark.slow
@pytest.mark.parametrize("tie", ["none", "stage"])
@pytest.mark.parametrize("kind", ["random", "joint"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_lite0"])
def test_so_do_the_real_backbones(name: str, kind: str, tie: str) -> None:
    net = build(name, kind=kind, tie=tie).double()
    assert difference(net.eval(), merge_unchecked(net).eval()) < TIGHT


def test_in_float32_it_is_exact_to_rounding() -> None:
    net = build("resnet", tie="stage").eval()
    assert difference(net, merge(net)) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", ["random", "open", "closed"])
def test_any_number_of_tasks(count: int, kind: str) -> None:
    net = build("resnet", count, kind).double().eval()
    merged = merge_unchecked(net)
    assert difference(net, merged) < TIGHT
    assert merged.task_names == net.task_names and not merged.training


@pytest.mark.parametrize("name", ["resnet", "bottlenecks"])
def test_widths_are_the_live_values(name: str) -> None:
    """Sum over channels of (1 unless all tasks opened it) + (tasks that opened it); joint: C + (T - 1) k."""
    net = build(name, kind="joint", tie="stage")
    live = {s: int((~m.all(0)).sum() + m.sum()) for s, m in net.gate_masks().items()}
    merged = merge(net)
    assert merged.widths() == live
    for site, mask in net.gate_masks().items():
        assert live[site] == mask.shape[1] + 2 * int(mask[0].sum())
    assert merged.backbone.get_submodule("stem" if name == "resnet" else "stem.0").out_channels in live.values()


def test_tied_joint_gates_need_no_operation_of_their_own() -> None:
    for name in ("resnet", "bottlenecks", "pyramid_net"):
        merged = merge(build(name, kind="joint", tie="stage"))
        assert len(merged.skips) == 0
        kinds = [type(module).__bases__[0] if module in masked(merged) else type(module) for module in merged.modules()]
        plain = [type(module) for module in merged.plain_twin().modules()]
        for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU):
            assert kinds.count(kind) == plain.count(kind)


def test_running_statistics_move_with_their_channels() -> None:
    net = build("resnet", kind="joint")
    merged = merge(net).train()
    net.train()(image := batch(4, side=SIDE)["image"])
    merged(image)
    own = net.gate_masks()["layer1_conv1"][0]
    wanted = [net.branches["shared"].layer1.bn1.running_mean[~own]]
    wanted += [net.branches[task].layer1.bn1.running_mean[own] for task in net.task_names]
    got = merged.backbone.get_submodule("layer1.bn1").running_mean
    assert len(got) > 8 and torch.allclose(got, torch.cat(wanted), atol=1e-5)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_blocks_stay_exactly_zero(name: str) -> None:
    merged = merge(build("resnet", kind="random")).train()
    before = copy.deepcopy(merged.state_dict())
    train_some(merged, OPTIMIZERS[name](list(merged.parameters())))
    layers = masked(merged)
    assert len(layers) > 8 and any(layer in list(merged.skips.values()) for layer in layers)
    for layer in layers:
        outside = (layer.mask == 0).expand_as(layer.weight)
        assert outside.any() and bool((layer.weight[outside] == 0).all())
    moved = [key for key, value in merged.state_dict().items() if not torch.equal(value, before[key])]
    assert {"backbone.stem.weight", "skips.skip_layer1_add.weight"} <= set(moved)


def test_filled_blocks_start_at_zero_and_learn() -> None:
    net = build("resnet", kind="random")
    filled, twin = merge(net, "fill"), merge(net, "masked")
    assert filled.form == "filled" and twin.form == "merged" and not masked(filled)
    assert difference(net.eval(), filled.eval()) < 1e-5
    assert [p.shape for p in filled.parameters()] == [p.shape for p in twin.parameters()]
    conv = {key: layer.mask == 0 for key, layer in twin.named_modules() if isinstance(layer, MaskedConv2d)}
    train_some(filled.train(), OPTIMIZERS["adamw"](list(filled.parameters())))
    for path, outside in conv.items():
        weight = filled.get_submodule(path).weight
        assert (weight[outside.expand_as(weight)] != 0).any(), path


def train_some(net: MergedNet, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        net.loss(batch(4, side=SIDE)).backward()
        optimizer.step()


def test_what_lies_outside_of_the_blocks_never_counts() -> None:
    """A weight that something else put there (an average of weights, noise) changes nothing, and is not exported."""
    merged = merge(build("resnet")).eval()
    spoilt = copy.deepcopy(merged)
    for layer in masked(spoilt):
        layer.weight.data.add_((layer.mask == 0) * 7.0)
    assert difference(merged, spoilt) == 0
    (one, other), image = (net.export_view() for net in (merged, spoilt)), torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(one(image), other(image), strict=True))


def test_a_state_goes_into_the_net_of_the_same_gates_only() -> None:
    net = build("resnet")
    merged, other = merge(net), build("resnet", seed=5)
    other.set_gates(net.gate_masks())
    fresh = merge_unchecked(other)
    assert difference(merged.eval(), fresh.eval()) > 0.1
    fresh.load_state_dict(merged.state_dict())
    assert difference(merged, fresh) == 0
    assert not any("mask" in key for key in merged.state_dict())  # they follow from the gates
    masks = net.gate_masks()
    masks["layer1_conv1"] = masks["layer1_conv1"].flip(1)  # as wide as before
    other.set_gates(masks)
    with pytest.raises(InputError, match="merged net with other gates: gates.layer1_conv1"):
        merge_unchecked(other).load_state_dict(merged.state_dict())
    with pytest.raises(InputError, match="merged net with other gates: filled"):
        merge_unchecked(net, "fill").load_state_dict(merged.state_dict())


def test_it_is_an_ordinary_module() -> None:
    merged = merge(build("resnet")).eval()
    twin = copy.deepcopy(merged).to(memory_format=torch.channels_last)
    assert difference(merged, twin) < 1e-5
    layer = twin.get_submodule("backbone.layer1.conv1")
    assert isinstance(layer, MaskedConv2d)
    assert (layer.weight * layer.mask).is_contiguous(memory_format=torch.channels_last)
    assert difference(copy.deepcopy(merged).double(), merged.double()) == 0
    groups = make_optimizers(twin, nn.Module(), Optim())[0].param_groups  # type: ignore[arg-type]
    assert sum(len(group["params"]) for group in groups) == len(twin.weight_parameters()) == len([*twin.parameters()])


def test_some_tasks_alone() -> None:
    merged = merge(build("resnet")).eval()
    image = batch(side=SIDE)["image"]
    whole, part = merged(image), merged(image, tasks=["depth"])
    assert list(part) == ["depth"] and torch.equal(part["depth"], whole["depth"])
    losses = merged.losses(batch(side=SIDE, keys=("depth", "normals")))
    assert list(losses) == ["depth", "normals"]
    with pytest.raises(InputError, match="not a batch"):
        merged(image[0])


def test_frozen_gates_and_learned_ones_merge_alike_and_the_source_stays() -> None:
    net = build("resnet")
    before = copy.deepcopy(net.state_dict())
    one = merge(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net.freeze_gates()
    assert difference(one.eval(), merge(net).eval()) == 0
    assert all(torch.equal(one.gate_masks()[site], mask) for site, mask in net.gate_masks().items())


def test_its_plain_twin_is_the_plain_net() -> None:
    net = build("resnet")
    merged = merge(net)
    twin, plain = merged.plain_twin(), PlainNet(net.branches["shared"], net.tasks, torch.zeros(1, 3, SIDE, SIDE))
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    assert {key: value.shape for key, value in twin.state_dict().items()} == shapes
    assert all(bool(torch.isfinite(raw).all()) for raw in twin.eval()(torch.randn(1, 3, SIDE, SIDE)).values())
    assert not any("meta" in str(value.device) for value in merged.state_dict().values())


class Pooled(nn.Module):
    """Reads a map's mean, which fx traces but no convolution reads first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out = nn.Linear(channels, 3)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.out(features[-1].mean((2, 3)))


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out = nn.Conv2d(channels, 1, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.out(features[-1] if features[0].mean() > 1e9 else features[-1] * 2)


class Dense(nn.Module):
    """Convolutions read both maps, one of them twice, and a size is asked for."""

    def __init__(self, fine: int, coarse: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 4, 3, 1, 1) for n in (fine, coarse, coarse))
        self.norm, self.out = nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        coarse = nn.functional.interpolate(self.b(features[1]) + self.c(features[1]), size=features[0].shape[-2:])
        return self.out(self.norm(self.a(features[0]) + coarse).relu())


@pytest.mark.parametrize("fill", [False, True])
def test_heads_of_any_kind(fill: bool) -> None:
    made: list[Task] = [
        Edges("dense", head=lambda f: Dense(*(part.channels for part in f))),
        Depth("branching", head=lambda f: Branching(f[-1].channels)),
        Depth("pooled", head=lambda f: Pooled(f[-1].channels)),
    ]
    net = build("resnet", made=made).double().eval()
    merged = merge_unchecked(net, "fill" if fill else "masked")
    assert difference(net, merged) < TIGHT
    assert [isinstance(head, FrontedHead) for head in merged.heads.values()] == [False, True, True]
    assert merged.heads["dense"].c.in_channels == merged.widths()["layer2_add"] > 16
    assert isinstance(merged.heads["dense"].c, MaskedConv2d) is not fill


class Odd(nn.Module):
    """Layers that a merge must get right one by one: groups, a transposed convolution, sums, products, sizes, pools."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.grouped, self.gate = nn.Conv2d(8, 8, 3, 1, 1, groups=2), nn.Conv2d(8, 8, 1)
        self.multiplied = nn.Conv2d(8, 16, 3, 1, 1, groups=8)
        self.up, self.norm = nn.ConvTranspose2d(16, 8, 2, 2), nn.BatchNorm2d(16)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.stem(image)
        y = self.grouped(self.pool(x)) * self.gate(self.pool(x))  # the stem is read twice: its mix lies before a pool
        y = y * self.squeeze(y) - y
        z = self.up(self.multiplied(y))
        wide = self.norm(torch.cat([x, nn.functional.interpolate(z, size=x.shape[-2:])], 1))
        return [torch.maximum(x, z) + x + x, nn.functional.avg_pool2d(wide, 2), y]


@pytest.mark.parametrize("kind", ["random", "joint", "open", "closed"])
def test_odd_layers(kind: str) -> None:
    net = build(Odd(), kind=kind).double()
    merged = merge_unchecked(net)
    assert difference(net.eval(), merged.eval()) < TIGHT
    assert difference(net.train(), merged.train(), size=4) < TIGHT
    if kind == "random":
        assert "skip_pool" in merged.skips and any(isinstance(m, nn.ConvTranspose2d) for m in merged.modules())


def test_what_cannot_be_merged_is_refused_with_the_way_out() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, image: Tensor) -> Tensor:
            return self.conv(self.conv(self.stem(image)).relu())

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, image: Tensor) -> Tensor:
            return self.conv(image) * torch.ones(4, 1, 1)

    parametrized = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.ReLU())
    normed = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    refused: dict[str, nn.Module] = {
        "layer conv is called more than once": Twice(),
        "mul in the backbone's forward": Scaled(),
        "Conv2d in 0": parametrized,
        "GroupNorm in 1": normed,
    }
    for text, backbone in refused.items():
        net = interrogate(backbone, tasks(2))
        with pytest.raises(ConvertError, match=f'cannot be merged: .*{text}.*final="gated"'):
            merge(net)
    with pytest.raises(InputError, match="unknown mode 'filled'.*masked, fill"):
        merge(build("resnet"), "filled")
    with pytest.raises(InputError, match="unknown mode"):
        merge(build("resnet"), ["masked"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="only a gated net can be merged: got PlainNet"):
        merge(PlainNet(Block(3, 4), tasks(2)))  # type: ignore[arg-type]


def test_a_merge_that_went_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from igate_edge.gating import merge as module

    def spoilt(*args: object) -> MergedNet:
        merged = merge_unchecked(*args)  # type: ignore[arg-type]
        merged.backbone.get_submodule("stem").weight.data.mul_(1.01)
        return merged

    monkeypatch.setattr(module, "merge_unchecked", spoilt)
    with pytest.raises(ConvertError, match="differs after merging"):
        merge(build("resnet"))


def test_extreme_mixes_have_the_structure_of_any_other() -> None:
    """Which channels a layer reads depends on the gates alone: else a state would not fit its own net."""
    net, other = build("resnet"), build("resnet")
    for site in other.gate_sites():
        site.beta.data[0] = 1e4
    assert difference(other.double().eval(), merge_unchecked(other)) < 1e-6
    shapes = [[value.shape for value in merge_unchecked(n).state_dict().values()] for n in (net, other)]
    assert shapes[0] == shapes[1]
    for one, two in zip(masked(merge_unchecked(net)), masked(merge_unchecked(other)), strict=True):
        assert torch.equal(one.mask.bool(), two.mask.bool())


def test_gates_that_granules_and_ties_made() -> None:
    net = build("resnet", tie="stage", granule=4).double().eval()
    assert difference(net, merge_unchecked(net)) < TIGHT
    scatter(net)
    net.set_gates(random_masks(net, 0.6, seed=3))
    assert difference(net, merge_unchecked(net)) < TIGHT
    net.set_gates(all_masks(net, False))
    assert set(merge_unchecked(net).widths().values()) == {8, 16}
