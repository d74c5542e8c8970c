from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_nets import BACKBONES, gated, random_masks, scatter, tasks

from igate_edge.gating.convert import PlainNet, interrogate
from igate_edge.gating.view import fold_head

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(7))
EXAMPLE = torch.zeros(1, 3, 32, 32)


def digest(net: nn.Module) -> str:
    """Hash of every tensor, flag and mode."""
    state = hashlib.sha256()
    for name, value in net.state_dict().items():
        state.update(name.encode() + value.numpy().tobytes())
    state.update(str([(name, module.training, type(module)) for name, module in net.named_modules()]).encode())
    state.update(str([(name, p.requires_grad) for name, p in net.named_parameters()]).encode())
    return state.hexdigest()


def nets(backbone: str) -> list[Any]:
    free = gated(backbone)
    free.set_gates(random_masks(free))
    frozen = gated(backbone, tie="stage")
    frozen.set_gates(random_masks(frozen))
    frozen.freeze_gates()
    plain = PlainNet(BACKBONES[backbone](), tasks(), EXAMPLE)
    scatter(plain)
    return [free, frozen, plain]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_view_computes_the_net_and_leaves_it_alone(backbone: str) -> None:
    """cases.md P9."""
    for net in nets(backbone):
        before = digest(net)
        view = net.export_view()
        outputs = view(IMAGE)
        again = net.export_view()(IMAGE)
        assert digest(net) == before
        expected = net.eval()(IMAGE)
        assert isinstance(outputs, tuple) and len(outputs) == 3
        for name, value, second in zip(expected, outputs, again, strict=True):
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
            assert torch.equal(value, second)


def test_the_view_has_no_norm_behind_a_convolution() -> None:
    for net in nets("resnet"):
        kinds = [type(module) for module in net.export_view().modules()]
        assert nn.BatchNorm2d not in kinds and nn.Conv2d in kinds


def test_norms_that_cannot_be_folded_stay() -> None:
    """The mixture's group norm, and its batch norm behind a concatenation."""
    view = gated("mixture").export_view()
    names = {
        name.split(".", 2)[2] for name, m in view.branches.named_modules(prefix="b") if isinstance(m, nn.BatchNorm2d)
    }
    assert names == {"norm"}
    assert sum(isinstance(module, nn.GroupNorm) for module in view.branches.modules()) == 4


def test_a_layer_called_twice_is_not_folded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, image: Tensor) -> Tensor:
            x = self.bn(self.conv(self.stem(image))).relu()
            return self.bn(self.conv(x)).relu()

    net = interrogate(Net(), tasks(2), example=EXAMPLE)
    scatter(net)
    net.set_gates(random_masks(net))
    view = net.export_view()
    for name, value in zip(net.task_names, view(IMAGE), strict=True):
        torch.testing.assert_close(value, net.eval()(IMAGE)[name], rtol=1e-4, atol=1e-5)


def test_masks_and_mix_weights_are_buffers() -> None:
    net = gated()
    net.set_gates(random_masks(net))
    view = net.export_view()
    buffers = dict(view.named_buffers())
    for name, mask in net.gate_masks().items():
        weights = net.sites[name].mix_weights()  # type: ignore[operator, union-attr]
        for t, task in enumerate(net.task_names):
            row = buffers[f"sites.{name}.mask_{task}"]
            assert row.dtype == torch.bool and torch.equal(row, mask[t].view(1, -1, 1, 1))
            assert torch.equal(buffers[f"sites.{name}.mix_{task}"], weights[t].view(1, -1, 1, 1))
    assert not any(p.requires_grad for name, p in view.named_parameters() if "alpha" in name or "beta" in name)


def test_a_head_that_cannot_be_traced_keeps_its_norms() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)

        def forward(self, features: list[Tensor]) -> Tensor:
            x = self.bn(self.conv(features[0]))
            return x if float(x.sum()) > 0 else -x

    head = Head().eval()
    fold_head(head, 1)
    assert isinstance(head.bn, nn.BatchNorm2d)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_views_export_to_constant_wheres(backbone: str) -> None:
    """torch.export sees no gate logits: one Where per site and needed task, no threshold, no softmax, no scatter."""
    net = gated(backbone)
    net.set_gates(random_masks(net))
    net.freeze_gates()
    program = torch.export.export(net.export_view(), (IMAGE,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("aten.where" in name for name in called) == 3 * len(net.sites)
    assert not any(word in name for name in called for word in ("softmax", "ge.Scalar", "index", "sigmoid_backward"))
    torch.testing.assert_close(program.module()(IMAGE), net.export_view()(IMAGE))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_live_net_exports_too(frozen: bool) -> None:
    net = gated().eval()
    net.set_gates(random_masks(net))
    if frozen:
        net.freeze_gates()
    program = torch.export.export(net, (IMAGE,))
    for name, value in program.module()(IMAGE).items():
        torch.testing.assert_close(value, net(IMAGE)[name], rtol=1e-4, atol=1e-5)
