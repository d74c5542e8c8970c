"""Small networks, and how their ONNX files are run and compared, for the tests of the export."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from igate_edge.contract import Preprocess
from igate_edge.gating.convert import PlainNet, interrogate
from igate_edge.training.tasks import Depth, SemanticSegmentation

SIZE = Preprocess(32, 48, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
#: Arguments that make each backbone small.
SMALL = {
    "resnet18": {"width": 4},
    "resnet34": {"width": 4},
    "resnet50": {"width": 2},
    "efficientnet_lite0": {},
    "mobilenet_v2": {"width": 0.25},
    "densenet_tiny": {"growth": 4},
    "pyramid_net": {"width": 4},
}


class Grouped(nn.Module):
    """Grouped and dilated convolutions, and the padding that odd sizes need."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, groups=4, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 2, 2, groups=2), nn.BatchNorm2d(16), nn.LeakyReLU(0.1))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.wide(self.stem(x))
        return [x, self.deep(x)]


def tiny() -> nn.Sequential:
    unit = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*unit, nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())


def tasks(*names: str) -> list:
    first, second = names or ("semseg", "depth")
    return [SemanticSegmentation(first, 3, head_width=8), Depth(second, head_width=8)]


def settle(net: nn.Module, seed: int = 0) -> None:
    """Weights that the seed alone decides; norm statistics, mixes and gates away from where they start."""
    rng = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1, generator=rng)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.3, 0.3, generator=rng)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.2 * torch.randn(module.num_features, generator=rng))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=rng))
    for site in getattr(net, "sites", {}).values():
        with torch.no_grad():
            site.beta.copy_(torch.randn(site.beta.shape, generator=rng))
            for alpha in site.gates.alpha.values():
                alpha.copy_(torch.randn(alpha.shape, generator=rng))


def gated(backbone: nn.Module, names: tuple[str, ...] = (), **options) -> nn.Module:
    net = interrogate(backbone, tasks(*names), example=torch.zeros(1, 3, 32, 48), **options)
    settle(net)
    return net.eval()


def plain(backbone: nn.Module, names: tuple[str, ...] = ()) -> nn.Module:
    net = PlainNet(backbone, tasks(*names), example=torch.zeros(1, 3, 32, 48))
    settle(net)
    return net.eval()


def run(data: bytes, image: torch.Tensor) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": image.numpy()}), strict=True))


def image(seed: int = 1) -> torch.Tensor:
    return torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def agree(net: nn.Module, data: bytes, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        wanted = net(image())
    got = run(data, image())
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert np.abs(got[name] - value.numpy()).max() <= tolerance * np.abs(value.numpy()).max(), name


def about(data: bytes) -> dict:
    return json.loads({p.key: p.value for p in onnx.load_from_string(data).metadata_props}["igate"])


class First(nn.Module):
    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return features[0]


class Head(nn.Module):
    """A head that does what a test asks for with the finest map."""

    def __init__(self, call) -> None:
        super().__init__()
        self.call = call

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.call(features[0])


def with_heads(*calls) -> nn.Module:
    """One task per call: depth_0, depth_1... The map that every call gets is [1, 8, 8, 12]."""
    heads = [lambda _features, call=call: Head(call) for call in calls]
    net = PlainNet(tiny(), [Depth(f"depth_{i}", head=head) for i, head in enumerate(heads)])
    settle(net)
    return net.eval()
