"""Backbones with their own definitions: every one is a plain `nn.Module` that torch.fx can trace.

`forward(image float32 [N,3,H,W])` returns a list of feature maps, fine to coarse. Any other traceable CNN
may be used instead.
"""

from .densenet import densenet_tiny
from .efficientnet import EfficientNetLite0Classifier, efficientnet_lite0, imagenet_weights, load_imagenet
from .mobilenet import mobilenet_v2
from .pyramid import pyramid_net
from .resnet import resnet18, resnet34, resnet50

#: Constructors by the name that configuration files and the command line use.
BACKBONES = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "efficientnet_lite0": efficientnet_lite0,
    "mobilenet_v2": mobilenet_v2,
    "densenet_tiny": densenet_tiny,
    "pyramid_net": pyramid_net,
}

__all__ = [*BACKBONES, "BACKBONES", "EfficientNetLite0Classifier", "imagenet_weights", "load_imagenet"]
