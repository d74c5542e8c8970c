"""A small real ONNX network for tests of builders."""

from __future__ import annotations

import numpy as np
import onnx


def model(batch: int = 1, kind: int = onnx.TensorProto.FLOAT) -> bytes:
    """A network of one image [batch,3,4,4] and two outputs, "semseg" [batch,2,8,8] and "depth" [batch,1,4,4]."""
    value, helper, numpy = onnx.helper.make_tensor_value_info, onnx.helper, onnx.numpy_helper
    random = np.random.default_rng(1)
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["features"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Resize", ["features", "", "", "sizes"], ["semseg"], name="resize1", mode="nearest"),
        helper.make_node("ReduceMean", ["features"], ["depth"], name="mean1", axes=[1], keepdims=1),
    ]
    stored = [
        numpy.from_array(random.standard_normal((2, 3, 3, 3)).astype(np.float32), "w"),
        numpy.from_array(np.array([batch, 2, 8, 8], np.int64), "sizes"),
    ]
    inputs = [value("image", kind, [batch, 3, 4, 4])]
    outputs = [value("semseg", kind, [batch, 2, 8, 8]), value("depth", kind, [batch, 1, 4, 4])]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
