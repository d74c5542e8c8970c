from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch_nets import BACKBONES, Block, gated, tasks

from igate_edge.errors import ConvertError
from igate_edge.gating.convert import interrogate
from igate_edge.gating.placement import Chain, Place, Sum, place_sites
from igate_edge.gating.streams import trace

EXAMPLE = torch.zeros(1, 3, 32, 32)


def places(module: nn.Module, tie: str = "none") -> dict[str, Place]:
    found = place_sites(trace(module, EXAMPLE), module, tie=tie)
    return {place.name: place for place in found}


def groups(module: nn.Module, tie: str) -> set[frozenset[str]]:
    """Tied sites as sets of names."""
    found = places(module, tie)
    return {frozenset(n for n, p in found.items() if p.group == place.group) for place in found.values()}


def sequence(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


@pytest.mark.parametrize(
    ("modules", "step"),
    [
        ([nn.Conv2d(3, 4, 1)], 1),
        ([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)], 2),
        ([nn.Conv2d(3, 4, 1), nn.ReLU()], 2),
        ([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()], 3),
        ([nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Hardswish()], 3),
        ([nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4), nn.GELU()], 3),
        ([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4)], 3),
        ([nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4), nn.ReLU6()], 3),
        ([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)], 4),
        ([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)], 3),
    ],
)
def test_the_site_is_behind_convolution_norm_and_activation(modules: list[nn.Module], step: int) -> None:
    (place,) = places(sequence(*modules)).values()
    assert (place.name, place.step, place.channels) == ("0_site" if hasattr(nn.ModuleDict(), "0") else "0", step, 4)


def test_residual_blocks_are_gated_behind_the_add() -> None:
    found = places(BACKBONES["resnet"]())
    assert list(found) == ["stem", "layer1_conv1", "layer1_add", "layer2_conv1", "layer2_add"]
    body = found["layer2_add"].block
    assert body is not None and isinstance(body.body, Sum)
    assert isinstance(body.body.left, Chain) and isinstance(body.body.right, Chain)  # the strided shortcut too
    identity = found["layer1_add"].block
    assert identity is not None and isinstance(identity.body, Sum)
    assert sum(isinstance(side, Chain) for side in (identity.body.left, identity.body.right)) == 1


def test_linear_projections_depthwise_ties_and_skips() -> None:
    module = BACKBONES["bottlenecks"]()
    assert list(places(module)) == ["stem_0", "first_0", "first_3", "first_6", "second_0", "second_3", "add"]
    pairs = {frozenset({"first_0", "first_3"}), frozenset({"second_0", "second_3"})}
    assert groups(module, "none") == pairs | {frozenset({name}) for name in ("stem_0", "first_6", "add")}
    assert groups(module, "stage") == pairs | {frozenset({"stem_0"}), frozenset({"first_6", "add"})}


def test_a_stage_is_tied_through_its_pool_and_identity_adds() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pool = sequence(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()), nn.MaxPool2d(3, 2, 1)
            self.one, self.two, self.three = Block(4, 4), Block(4, 4), Block(4, 4, 2)

        def forward(self, image: Tensor) -> Tensor:
            return self.three(self.two(self.one(self.pool(self.stem(image)))))

    assert groups(Net(), "stage") == {
        frozenset({"stem_0", "one_add", "two_add"}),
        *(frozenset({name}) for name in ("one_conv1", "two_conv1", "three_conv1", "three_add")),
    }
    assert all(len(group) == 1 for group in groups(Net(), "none"))


def test_tied_sites_share_one_object_and_one_decision() -> None:
    net = gated("resnet", tie="stage", granule=lambda channels: channels // 4)
    one, other = net.sites["stem"].gates, net.sites["layer1_add"].gates
    assert one is other
    assert [site.gates.granule for site in net.gate_sites()] == [8 // 4, 8 // 4, 8 // 4, 16 // 4, 16 // 4]
    mask = torch.zeros(3, 8, dtype=torch.bool)
    net.set_gates({"layer1_add": mask})
    assert torch.equal(net.gate_masks()["stem"], mask)
    assert len(net.gate_parameters()) == 4 * 3  # four groups, three tasks


def test_a_depthwise_convolution_on_the_image_or_a_concatenation_has_its_own_gates() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.point = nn.Conv2d(3, 3, 3, 1, 1, groups=3), nn.Conv2d(3, 3, 1)
            self.depth = nn.Conv2d(6, 6, 3, 1, 1, groups=6)

        def forward(self, image: Tensor) -> Tensor:
            x = self.first(image)
            return self.depth(torch.cat([x, self.point(x)], 1))

    assert groups(Net(), "stage") == {frozenset({"first"}), frozenset({"point"}), frozenset({"depth"})}


def test_one_channel_is_not_depthwise() -> None:
    """cases.md P5."""
    module = sequence(nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 3, 1, 1))
    assert len(groups(module, "none")) == 2


def test_a_convolution_read_by_an_add_and_by_others_keeps_its_own_site() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, image: Tensor) -> Tensor:
            x = self.a(image)
            return x + self.b(x)

    assert list(places(Net())) == ["a", "add"]


def test_a_chain_of_adds_is_gated_once_at_its_end() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 4, 1) for _ in range(3))

        def forward(self, image: Tensor) -> Tensor:
            return (self.a(image) + self.b(image) + self.c(image)).relu()

    (place,) = places(Net()).values()
    assert place.name == "add_2" or place.name == "add"
    assert place.macs_per_row == 3 * (3 * 32 * 32)
    assert place.block is not None and place.block.inner == {1, 2, 3, 4, 5}


def test_a_map_that_leaves_with_ungated_parameters_gets_a_site() -> None:
    """Without it, all gates closed would not be the plain net (test_convert)."""
    found = places(BACKBONES["mixture"]())
    outputs = trace(BACKBONES["mixture"](), EXAMPLE).outputs
    assert {place.step for place in found.values()} >= set(outputs)


def test_a_layer_that_is_called_twice_has_two_sites() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, image: Tensor) -> Tensor:
            return self.conv(self.conv(self.stem(image)).relu())

    assert list(places(Net())) == ["stem", "conv", "conv_2"]


def test_names_that_python_has_taken() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"a": nn.Conv2d(3, 4, 1)})
            self.add_module("type_", nn.Conv2d(4, 4, 1))

        def forward(self, image: Tensor) -> Tensor:
            return self.type_(self.layers["a"](image))

    assert list(interrogate(Net(), tasks(2), example=EXAMPLE).sites) == ["layers_a", "type_"]


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.clamp(0, 6),
        lambda x: torch.tanh(x),
        lambda x: nn.functional.silu(x),
        lambda x: nn.functional.relu6(x, inplace=True),
        lambda x: x.relu_(),
    ],
)
def test_activations_written_as_functions_and_methods(act: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, image: Tensor) -> Tensor:
            return act(self.bn(self.conv(image)))

    (place,) = places(Net()).values()
    assert place.step == 3 and place.block is not None


def test_a_backbone_without_convolutions_is_refused() -> None:
    with pytest.raises(ConvertError, match="no convolution that can be gated.*2 traced operations.*torch.nn modules"):
        interrogate(nn.Sequential(nn.MaxPool2d(2)), tasks(2))


def test_costs_of_rows() -> None:
    module = sequence(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.ConvTranspose2d(8, 4, 2, 2)
    )
    costs = {name: place.macs_per_row for name, place in places(module).items()}
    # taps x input channels x positions (of the input, for a transposed convolution).
    assert costs == {"0": 9 * 3 * 16 * 16, "2": 9 * 1 * 16 * 16, "3": 4 * 8 * 16 * 16}
