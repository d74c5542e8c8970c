"""What torch's exporter makes of a network: odd resizes, pools, float16 weights, and what it must refuse."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
import torch
from export_nets import SIZE, First, agree, image, plain, run, tiny, with_heads
from torch import nn
from torch.nn import functional as F

from igate_edge.backbones import pyramid_net
from igate_edge.errors import ConvertError, UnavailableError
from igate_edge.gating.export import to_onnx


def test_half_weights_halve_the_file_and_are_the_rounded_network():
    net = plain(pyramid_net(width=12))
    full, half = to_onnx(net, SIZE), to_onnx(net, SIZE, half_weights=True)
    assert len(half) < 0.6 * len(full)
    graph = onnx.load_from_string(half).graph
    large = [i for i in graph.initializer if np.prod(i.dims) >= 1024]
    assert large and all(i.data_type == onnx.TensorProto.FLOAT16 for i in large)
    assert sum(node.op_type == "Cast" for node in graph.node) == len(large)
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load_from_string(full).graph.initializer}
    for stored in large:
        assert np.array_equal(
            onnx.numpy_helper.to_array(stored), weights[stored.name.removesuffix(".half")].astype(np.float16)
        )
    for name, value in run(full, image()).items():
        difference = np.abs(run(half, image())[name] - value).max()
        assert 0 < difference < 0.02 * np.abs(value).max()


def test_weights_beyond_float16_are_refused():
    net = plain(tiny())
    wide = nn.Conv2d(8, 128, 1)
    nn.init.constant_(wide.weight, 1e5)
    net.heads["depth"] = nn.Sequential(First(), wide)
    with pytest.raises(ConvertError, match="a weight does not fit in float16.*1e.05.*half_weights=False"):
        to_onnx(net, SIZE, half_weights=True)


def test_bilinear_resize_at_odd_sizes():
    cases = [(size, corners) for size in [(1, 1), (5, 7), (10, 13)] for corners in (False, True)]

    def resize(size: tuple[int, int], corners: bool):
        return lambda x: F.interpolate(x, size=size, mode="bilinear", align_corners=corners)

    net = with_heads(*(resize(*case) for case in cases))
    data = to_onnx(net, SIZE)
    agree(net, data)
    nodes = [n for n in onnx.load_from_string(data).graph.node if n.op_type == "Resize"]
    modes = [a.s.decode() for n in nodes for a in n.attribute if a.name == "coordinate_transformation_mode"]
    assert modes == ["half_pixel", "align_corners"] * 3
    assert all(len(n.input) == 4 and n.input[3] and not n.input[2] for n in nodes), "sizes, not scales"


def test_adaptive_pools_that_do_not_divide_become_matrices():
    """The map is 8 x 12: to 3 x 5 neither side divides; pyramid pooling does this."""
    net = with_heads(lambda x: F.adaptive_avg_pool2d(x, (3, 5)))
    data = to_onnx(net, SIZE)
    agree(net, data)
    kinds = [node.op_type for node in onnx.load_from_string(data).graph.node]
    assert kinds.count("MatMul") == 2 and not {"GatherND", "Transpose", "ReduceMean"} & set(kinds)


def test_a_branch_on_the_batch_is_frozen_at_one_and_other_batches_are_refused():
    def call(x: torch.Tensor) -> torch.Tensor:
        x = x if x.shape[0] == 1 else x * 2
        return torch.stack([x[i] for i in range(x.shape[0])]).squeeze().reshape(x.shape)

    net = with_heads(call)
    data = to_onnx(net, SIZE)
    agree(net, data)
    for batch in (2, 3):
        with pytest.raises(Exception, match="Got: 2|Got: 3|invalid dimensions"):
            run(data, image().expand(batch, -1, -1, -1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: x * 2 if x.sum() > 0 else x,
            "cannot be exported to ONNX.*Fix: use operators without Python branches",
        ),
        (lambda x: x[x > 0], "cannot be exported|depends on the data|no fixed shape"),
        (lambda x: x + torch.rand_like(x), "differs after folding norms.*deterministic"),
    ],
)
def test_what_depends_on_the_data_or_on_chance_is_refused(call, message):
    with pytest.raises(ConvertError, match=message):
        to_onnx(with_heads(call), SIZE)


def test_a_missing_onnxscript_is_named(monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "onnxscript"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UnavailableError, match="export needs onnxscript.*Fix: pip install 'igate-edge"):
        to_onnx(plain(tiny()), SIZE)
