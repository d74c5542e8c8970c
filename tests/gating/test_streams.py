from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch_nets import BACKBONES, tasks

from igate_edge.errors import ConvertError
from igate_edge.gating.convert import PlainNet, interrogate
from igate_edge.gating.execute import find_need
from igate_edge.gating.streams import evaluate, input_value, trace, without_inplace

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Fn(nn.Module):
    """A convolution, then a function of its output (and of the module)."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3, 1, 1), function

    def forward(self, image: Tensor) -> object:
        return self.function(self.conv(image), image)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_plan_computes_what_the_backbone_computes(backbone: str) -> None:
    module = without_inplace(BACKBONES[backbone]()).eval()
    plan = trace(module, torch.zeros(1, 3, 32, 32))
    image = torch.randn(2, 3, 32, 32)
    values: list[object] = []
    for step in plan.steps:
        values.append(input_value(step, image) if step.kind == "input" else evaluate(step, module, values.__getitem__))
    want = module(image)
    expected = [want] if isinstance(want, Tensor) else list(want.values() if isinstance(want, dict) else want)
    for index, value in zip(plan.outputs, expected, strict=True):
        assert torch.equal(values[index], value)  # type: ignore[arg-type]
        assert plan.shapes[index][1:] == value.shape[1:]


def add_then_read(x: Tensor, image: Tensor) -> Tensor:
    y = x
    y += 1.0
    return x * y


def method_then_read(x: Tensor, image: Tensor) -> Tensor:
    y = x.add_(1.0)
    return x * y


def relu_then_read(x: Tensor, image: Tensor) -> Tensor:
    y = functional.relu(x, inplace=True)
    return x - 2 * y


def positional_relu(x: Tensor, image: Tensor) -> Tensor:
    y = functional.relu(x, True)
    return x - 2 * y


def torch_relu(x: Tensor, image: Tensor) -> Tensor:
    y = torch.relu_(x)
    return x - 2 * y


def chained(x: Tensor, image: Tensor) -> Tensor:
    return x.mul_(2.0).clamp_(-1.0, 1.0).sigmoid_() + x


@pytest.mark.parametrize("function", [method_then_read, relu_then_read, positional_relu, torch_relu, chained])
def test_in_place_operations_are_undone_with_their_meaning(function: Callable[..., Tensor]) -> None:
    """Later readers of an overwritten value read the new one; streams that share a tensor are not corrupted."""
    torch.manual_seed(0)
    plan = trace(Fn(function), EXAMPLE)  # compares with the backbone itself
    assert not any(str(step.target).endswith("_") for step in plan.steps if step.kind == "method")
    assert not any(step.target in (operator.iadd, torch.relu_) for step in plan.steps)
    net = interrogate(Fn(function), tasks(2), example=EXAMPLE).eval()
    image = torch.randn(1, 3, 16, 16)
    kept = image.clone()
    first = net(image)
    assert torch.equal(image, kept)
    for name, value in net(image).items():
        assert torch.equal(value, first[name])


def test_an_in_place_activation_module_is_read_as_written() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3, 1, 1), nn.LeakyReLU(0.5, inplace=True)

        def forward(self, image: Tensor) -> Tensor:
            x = self.conv(image)
            y = self.act(x)
            return torch.cat([x, y], 1)

    net = Net()
    plan = trace(net, EXAMPLE)
    cat = plan.steps[plan.outputs[0]]
    assert len(set(cat.uses)) == 1


def flag(x: Tensor, image: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def loop(x: Tensor, image: Tensor) -> Tensor:
    for row in x:
        x = x + row
    return x


def write(x: Tensor, image: Tensor) -> Tensor:
    x[:, 0] = 0.0
    return x


def into(x: Tensor, image: Tensor) -> Tensor:
    torch.add(x, x, out=x)
    return x


def view_write(x: Tensor, image: Tensor) -> Tensor:
    x[:, :1].add_(1.0)
    return x


def flat(x: Tensor, image: Tensor) -> Tensor:
    return x.flatten(1)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (flag, "cannot be traced.*bool|cannot be traced.*control flow"),
        (loop, "cannot be traced.*iter"),
        (write, "cannot be traced.*item assignment.*Fix: .*assignments to parts of a tensor"),
        (add_then_read, "traced backbone computes something else"),
        (into, "writes into a tensor.*add"),
        (view_write, "traced backbone computes something else.*avoid views that are written in place"),
        (flat, r"output is not a feature map.*\[1, 1024\].*drop pooling, flatten and classifier"),
        (lambda x, image: [], r"returns no feature maps.*returns \[\]"),
        (lambda x, image: [x, None], "returns no feature maps"),
        (lambda x, image: [x, x.shape[1]], "returns no feature maps|traced"),
        (lambda x, image: x + torch.zeros(1, 5, 1, 1), "fails on the example.*input .1, 3, 16, 16"),
    ],
)
def test_what_cannot_be_gated_is_named(function: Callable[..., object], text: str) -> None:
    for build in (interrogate, PlainNet):
        with pytest.raises(ConvertError, match=text):
            build(Fn(function), tasks(2), example=EXAMPLE)


def test_tensors_made_in_forward_are_constants_of_every_branch() -> None:
    torch.manual_seed(0)
    net = interrogate(Fn(lambda x, image: x * torch.linspace(1.0, 2.0, 4).view(1, 4, 1, 1)), tasks(2), example=EXAMPLE)
    assert list(net.sites) == ["conv"]
    assert not any("constant" in key for key in net.state_dict())
    assert sum("constant" in name for name, _ in net.named_buffers()) == 3
    assert net(torch.zeros(1, 3, 16, 16))["semseg"].shape == (1, 4, 16, 16)


def test_forward_that_looks_at_training_is_refused() -> None:
    class Net(Fn):
        def forward(self, image: Tensor) -> Tensor:
            return functional.dropout(self.conv(image), 0.5, self.training)

    with pytest.raises(ConvertError, match="depends on self.training.*node dropout.*use a module"):
        trace(Net(lambda x, image: x), EXAMPLE)


def test_a_second_input_needs_a_default() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, image: Tensor, flow: Tensor) -> Tensor:
            return self.conv(image) + flow

    with pytest.raises(ConvertError, match="more than one input.*'flow'"):
        trace(Net(), EXAMPLE)

    class WithDefault(Net):
        def forward(self, image: Tensor, scale: float = 2.0) -> Tensor:  # type: ignore[override]
            return self.conv(image) * scale

    assert trace(WithDefault(), EXAMPLE).shapes[0] == (1, 3, 16, 16)


def test_tracing_leaves_the_backbone_in_its_mode() -> None:
    net = Fn(lambda x, image: x)
    net.conv.eval()
    trace(net, EXAMPLE)
    assert net.training and not net.conv.training


def test_what_all_streams_share_is_computed_once() -> None:
    plan = trace(Fn(lambda x, image: torch.cat([x, (image * 2 - 1).abs()], 1)), EXAMPLE)
    same = [step.same for step in plan.steps]
    # image, conv, mul, sub, abs, cat: only what hangs on the convolution differs between streams.
    assert same == [True, False, True, True, True, False]


def test_the_mix_behind_the_last_site_is_not_needed() -> None:
    plan = trace(Fn(lambda x, image: x.relu()), EXAMPLE)
    need = find_need(plan, {2}, 2, [0, 1])
    assert need.after[2] == {0, 1} and need.before[2] == {0, 1, 2}


def test_a_branch_without_an_open_gate_is_not_needed_nor_psi_without_a_closed_one() -> None:
    plan = trace(Fn(lambda x, image: x.relu()), EXAMPLE)
    mask = torch.tensor([[True, True, True, True], [False, False, False, False]])
    assert find_need(plan, {2}, 2, [0, 1], {2: mask}).before[2] == {0, 2}
    assert find_need(plan, {2}, 2, [0], {2: mask}).before[2] == {0}
    assert find_need(plan, {2}, 2, [1], {2: mask}).before[2] == {2}
