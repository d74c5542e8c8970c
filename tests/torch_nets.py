"""Small backbones and helpers for the tests of gating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from igate_edge.gating.convert import InterroGateNet, interrogate
from igate_edge.training.tasks import Classification, Depth, Normals, SemanticSegmentation, Task


class Block(nn.Module):
    """Residual block with the traps of real code: in-place activations and `+=`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        plain = stride == 1 and inputs == outputs
        shortcut = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.down = None if plain else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class TinyResNet(nn.Module):
    """Stem, max pool, two stages of one identity and one strided block; maps at strides 4 and 8."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.bn, self.relu, self.pool = nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = Block(width, width), Block(width, 2 * width, 2)

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.layer1(self.pool(self.relu(self.bn(self.stem(image)))))
        return [x, self.layer2(x)]


class Bottlenecks(nn.Module):
    """MobileNet pattern: pointwise, depthwise, linear projection; the second block has a skip."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU6(inplace=True))
        self.first, self.second = self.block(width), self.block(width)

    @staticmethod
    def block(width: int) -> nn.Sequential:
        wide = 3 * width
        return nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(self.stem(image))
        return x + self.second(x)


class Mixture(nn.Module):
    """Concatenation, group norm, learned activation, a scale parameter, transposed convolution, squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.SiLU(inplace=True))
        self.right = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.PReLU(4))
        self.norm = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8).view(1, 8, 1, 1))
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid()
        )
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.drop = nn.Dropout(0.0)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = torch.cat([self.left(image), self.right(image)], 1)
        x = self.drop(self.norm(x).relu_() * self.scale)
        x = x * self.squeeze(x)
        fine = nn.functional.relu(self.up(x), inplace=True)
        coarse = nn.functional.interpolate(fine, size=x.shape[-2:], mode="nearest")
        return {"fine": fine, "coarse": torch.cat([x, coarse], 1)}


BACKBONES = {"resnet": TinyResNet, "bottlenecks": Bottlenecks, "mixture": Mixture}


def tasks(count: int = 3) -> list[Task]:
    """semseg, depth, normals, label: the first `count`."""
    return [
        SemanticSegmentation("semseg", classes=4, head_width=8),
        Depth("depth", head_width=8),
        Normals("normals", head_width=8),
        Classification("label", classes=3),
    ][:count]


def gated(backbone: str = "resnet", count: int = 3, seed: int = 0, **options: Any) -> InterroGateNet:
    """A gated net whose branches, norms and mixes all differ."""
    torch.manual_seed(seed)
    net = interrogate(BACKBONES[backbone](), tasks(count), example=torch.zeros(1, 3, 32, 32), **options)
    scatter(net)
    return net


@torch.no_grad()
def scatter(net: nn.Module) -> None:
    """Move every weight, mix and running statistic away from its initial value."""
    for name, parameter in net.named_parameters():
        if ".alpha." not in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)


def random_masks(net: InterroGateNet, chance: float = 0.4, seed: int = 0) -> dict[str, Tensor]:
    """Random decisions that respect granules and ties."""
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[int, Tensor] = {}
    for site in net.gate_sites():
        if id(site.gates) not in chosen:
            granule = site.gates.granule
            coarse = torch.rand(len(net.tasks), -(-site.channels // granule), generator=generator) < chance
            chosen[id(site.gates)] = coarse.repeat_interleave(granule, 1)[:, : site.channels]
    return {site.name: chosen[id(site.gates)] for site in net.gate_sites()}


def plain_state(net: InterroGateNet) -> dict[str, Tensor]:
    """The shared branch and the heads as a PlainNet's state: what is left when all gates are closed."""
    state = {f"backbone.{key}": value for key, value in net.branches["shared"].state_dict().items()}
    return state | {f"heads.{key}": value for key, value in net.heads.state_dict().items()}


def all_masks(net: InterroGateNet, value: bool) -> dict[str, Tensor]:
    """The same decision everywhere."""
    return {name: torch.full_like(mask, value) for name, mask in net.gate_masks().items()}


def batch(size: int = 2, keys: Sequence[str] = ("semseg", "depth", "normals"), side: int = 32) -> dict[str, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(size, 3, side, side, generator=generator)
    labels = {
        "semseg": torch.randint(0, 4, (size, side, side), generator=generator),
        "depth": torch.rand(size, side, side, generator=generator) + 0.5,
        "normals": nn.functional.normalize(torch.randn(size, 3, side, side, generator=generator), dim=1),
        "label": torch.randint(0, 3, (size,), generator=generator),
    }
    return {"image": image} | {key: labels[key] for key in keys}
