"""A model of batch 1 restated for any batch: ONNX Runtime computes every row as the model alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from toy_onnx import model

from igate_edge.engines.tensorrt_batch import dynamic_batch
from igate_edge.errors import GraphError


def run(data: bytes, image: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"image": image})


def test_every_row_is_as_alone() -> None:
    images = np.random.default_rng(0).standard_normal((3, 3, 4, 4)).astype(np.float32)
    together = run(dynamic_batch(model()), images)
    for row in range(3):
        for alone, both in zip(run(model(), images[row : row + 1]), together, strict=True):
            np.testing.assert_array_equal(alone[0], both[row])


def changed(*nodes: onnx.NodeProto, sizes: tuple[int, ...] = (1, 2, 8, 8), **stored: np.ndarray) -> bytes:
    """The toy with its Resize to `sizes`, and with more nodes behind "features"."""
    proto = onnx.load_from_string(model())
    proto.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.array(sizes, np.int64), "sizes"))
    proto.graph.output[0].type.tensor_type.shape.dim[2].dim_value = sizes[2]
    proto.graph.output[0].type.tensor_type.shape.dim[3].dim_value = sizes[3]
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in stored.items())
    for node in nodes:
        proto.graph.node.append(node)
        proto.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    return onnx.shape_inference.infer_shapes(proto).SerializeToString()


def test_a_reshape_keeps_the_batch() -> None:
    node = onnx.helper.make_node("Reshape", ["features", "to"], ["flat"], name="reshape1")
    data = dynamic_batch(changed(node, to=np.array([1, 32], np.int64)))
    assert run(data, np.zeros((5, 3, 4, 4), np.float32))[2].shape == (5, 32)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            changed(onnx.helper.make_node("Resize", ["w", "", "", "to"], ["x"], name="r"), to=np.array([2, 3, 4, 3])),
            "no exact scale.*'r': .*3, 3.* to .*4, 3",
        ),
        (
            changed(onnx.helper.make_node("Reshape", ["features", "to"], ["x"], name="r"), to=np.array([2, 16])),
            "a Reshape moves the batch: node 'r'",
        ),
        (
            changed(onnx.helper.make_node("Expand", ["w", "to"], ["x"], name="e"), to=np.array([2, 3, 3, 3])),
            "does not follow the batch: x",
        ),
        (b"\x00no", "not an ONNX model"),
    ],
)
def test_what_cannot_be_restated(data: bytes, words: str) -> None:
    with pytest.raises(GraphError, match=words):
        dynamic_batch(data)


def test_a_resize_by_a_half_step_has_an_exact_scale() -> None:
    assert run(dynamic_batch(changed(sizes=(1, 2, 6, 10))), np.zeros((2, 3, 4, 4), np.float32))[0].shape == (
        2,
        2,
        6,
        10,
    )
