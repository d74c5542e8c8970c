"""EfficientNet-Lite0: TensorFlow's padding, and real ImageNet weights on real photos."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from igate_edge.backbones import EfficientNetLite0Classifier, efficientnet_lite0, imagenet_weights, load_imagenet
from igate_edge.backbones.efficientnet import IMAGENET_MEAN, IMAGENET_STD
from igate_edge.compiler import calibrate, graph, prune, quantize
from igate_edge.contract import Preprocess
from igate_edge.engines import onnxruntime as engine
from igate_edge.errors import DataError, UnavailableError
from igate_edge.gating.convert import PlainNet
from igate_edge.gating.export import to_onnx
from igate_edge.training.tasks import Classification

#: Photos inside the scikit-image wheel, and the ImageNet classes that are right for each.
PHOTOS = {
    "chelsea": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee": {967},  # espresso
    "rocket": {657, 744},  # missile, projectile
    "motorcycle_left": {665},  # moped
}


@pytest.fixture(scope="module")
def classifier() -> EfficientNetLite0Classifier:
    try:
        path = imagenet_weights()
    except UnavailableError as error:
        pytest.skip(str(error))
    net = EfficientNetLite0Classifier().eval()
    load_imagenet(net, path)
    return net


def photo(name: str) -> torch.Tensor:
    """Central square of the photo at 224 x 224, float32 [1,3,224,224], as the weights expect it."""
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    file = next(path for path in (folder / f"{name}.png", folder / f"{name}.jpg") if path.is_file())
    image = Image.open(file).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
    rgb = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]
    return (rgb - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


@pytest.mark.parametrize("name", PHOTOS)
def test_real_photos_are_recognised(classifier, name):
    with torch.no_grad():
        assert int(classifier(photo(name)).argmax()) in PHOTOS[name]


def test_the_backbone_loads_what_the_classifier_loads(classifier):
    backbone = efficientnet_lite0().eval()
    load_imagenet(backbone, imagenet_weights())
    with torch.no_grad():
        image = photo("coffee")
        assert torch.equal(backbone(image)[-1], classifier.backbone(image)[-1])


def test_parameters_are_those_of_the_published_network():
    assert sum(p.numel() for p in EfficientNetLite0Classifier().parameters()) == 4_652_008


def tf_same(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """TensorFlow's rule, written per axis: out = ceil(in / stride), the odd pixel goes to the bottom and the right."""
    pads: list[int] = []
    for axis in (3, 2):
        total = max((-(-x.shape[axis] // 2) - 1) * 2 + conv.kernel_size[axis - 2] - x.shape[axis], 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), conv.weight, stride=2, groups=conv.groups)


@pytest.mark.parametrize("size", [(64, 96), (75, 50), (33, 47)])
def test_padding_at_stride_2_is_tensorflows(size):
    torch.manual_seed(0)
    net = efficientnet_lite0(size=size).eval()
    image = torch.randn(1, 3, *size)
    seen: list[tuple[nn.Conv2d, torch.Tensor, torch.Tensor]] = []
    pads: dict[str, torch.Tensor] = {}

    def remember_pad(module: nn.Module, args: tuple[torch.Tensor, ...], _out: torch.Tensor) -> None:
        pads["last"] = args[0]

    def remember_conv(module: nn.Module, _args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        if module.stride == (2, 2):
            seen.append((module, pads["last"], out))

    for module in net.modules():
        if isinstance(module, nn.ZeroPad2d):
            module.register_forward_hook(remember_pad)
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(remember_conv)
    maps = net(image)
    assert len(seen) == 5  # the stem and the four stages that halve
    assert all(torch.equal(tf_same(x, conv), out) for conv, x, out in seen)
    assert maps[-1].shape[2:] == (-(-size[0] // 32), -(-size[1] // 32))


def test_a_file_that_is_no_state_dict_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not a torch file")
    net = efficientnet_lite0()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(DataError, match="not EfficientNet-Lite0 ImageNet weights.*weights.pth"):
        load_imagenet(net, path)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, path)
    with pytest.raises(DataError, match="Fix: pass the .pth file of the pip package"):
        load_imagenet(efficientnet_lite0(), path)


def test_pickled_code_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "executed").write_text, ("x",))

    torch.save({"_conv_stem.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(DataError):
        load_imagenet(efficientnet_lite0(), tmp_path / "bomb.pth")
    assert not (tmp_path / "executed").exists()


class OfLast(nn.Module):
    """The classifier's own head on the coarsest map."""

    def __init__(self, classifier: EfficientNetLite0Classifier) -> None:
        super().__init__()
        self.head, self.pool, self.fc = classifier.head, classifier.pool, classifier.fc

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        return self.fc(self.pool(self.head(features[-1])).flatten(1))


def test_real_weights_survive_export_pruning_and_int8(classifier):
    """Filters of the published network are exactly zero once norms are folded: INT8 scales of 0 would give NaN."""
    backbone = efficientnet_lite0()
    load_imagenet(backbone, imagenet_weights())
    task = Classification("label", 1000, head=lambda _: OfLast(classifier))
    net = PlainNet(backbone, [task], torch.zeros(1, 3, 224, 224)).eval()
    model = graph.load(to_onnx(net, Preprocess(224, 224, mean=IMAGENET_MEAN, std=IMAGENET_STD)))
    pruned = prune.prune(model)
    weights = [node.inputs[1].const_value.numpy() for node in pruned.model.graph if node.op_type == "Conv"]
    assert sum(int((np.abs(w).reshape(len(w), -1).max(1) < 1e-6).sum()) for w in weights) >= 5
    images = {name: photo(name).numpy() for name in PHOTOS}
    small = quantize.quantize(pruned.model, calibrate.calibrate(pruned.model, images.values()), "ort")
    for form in (pruned.model, small):
        with contextlib.closing(engine.open(graph.dump(form))) as session:
            for name, image in images.items():
                found = session.run(image)["label"]
                assert np.isfinite(found).all() and int(found.argmax()) in PHOTOS[name]
