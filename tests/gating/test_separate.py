"""Single-task nets side by side: they answer as each alone does, and are one file."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from igate_edge.contract import Preprocess
from igate_edge.errors import InputError
from igate_edge.gating.export import to_onnx
from igate_edge.gating.plain import PlainNet
from igate_edge.gating.separate import SeparateNets
from igate_edge.training.tasks import Depth, Edges

SIZE = 32


def backbone(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())


def nets() -> list[PlainNet]:
    example = torch.zeros(1, 3, SIZE, SIZE)
    return [
        PlainNet(backbone(4), [Depth("depth", head_width=4)], example),
        PlainNet(backbone(6), [Edges("edges", head_width=4)], example),
    ]


def test_each_answers_as_alone_also_as_a_file() -> None:
    parts = [net.eval() for net in nets()]
    both, image = SeparateNets(parts).eval(), torch.randn(1, 3, SIZE, SIZE)
    wanted = parts[0](image) | parts[1](image)
    got = both(image)
    assert list(got) == ["depth", "edges"] and all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert list(both(image, tasks=["edges"])) == ["edges"]
    data = to_onnx(both, Preprocess(SIZE, SIZE))
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    outputs = session.run(["depth", "edges"], {session.get_inputs()[0].name: image.numpy()})
    for output, name in zip(outputs, wanted, strict=True):
        assert np.allclose(output, wanted[name].detach().numpy(), atol=1e-5)


def test_losses_and_weights_are_those_of_all() -> None:
    parts = nets()
    both = SeparateNets(parts)
    batch = {"image": torch.randn(2, 3, SIZE, SIZE), "depth": torch.ones(2, SIZE, SIZE)}
    assert list(both.losses(batch)) == ["depth"] and torch.isfinite(both.loss(batch))
    assert len(both.weight_parameters()) == sum(len(net.weight_parameters()) for net in parts)


def test_a_task_that_two_nets_have_is_refused() -> None:
    first, _ = nets()
    with pytest.raises(InputError, match="two tasks are called 'depth'"):
        SeparateNets([first, first])
