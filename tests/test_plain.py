"""The weightless net keeps every shape and no weight."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import tinynet

from igate_edge.errors import GraphError
from igate_edge.plain import fill, weightless


@pytest.fixture(scope="module")
def model() -> bytes:
    return tinynet.gated_onnx(form="plain")


def answers(data: bytes) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": np.ones((1, 3, tinynet.SIZE, tinynet.SIZE), np.float32)})


def test_no_weight_is_left(model: bytes) -> None:
    light, proto = onnx.load_from_string(weightless(model)), onnx.load_from_string(model)
    names = {tensor.name for tensor in proto.graph.initializer}
    assert names and {value.name for value in light.graph.input} == {"image", *names}
    assert not light.graph.initializer
    for tensor in proto.graph.initializer:
        assert tensor.raw_data[:16] not in weightless(model) or not any(tensor.raw_data)
    assert {prop.key for prop in light.metadata_props} == {"igate"}
    onnx.checker.check_model(light, full_check=True)


def test_filled_it_runs_with_the_same_shapes_and_other_numbers(model: bytes) -> None:
    filled = fill(weightless(model))
    ours, theirs = answers(filled), answers(model)
    assert [a.shape for a in ours] == [a.shape for a in theirs]
    assert all(np.isfinite(a).all() and a.std() > 0 for a in ours)
    assert not any(np.allclose(a, b, rtol=0.1) for a, b in zip(ours, theirs, strict=True))
    assert fill(weightless(model)) == filled != fill(weightless(model), seed=1)
    assert not any(a.any() for a in answers(fill(weightless(model), None)))


def test_weights_are_he_scaled() -> None:
    wide = onnx.load_from_string(fill(weightless(tinynet.gated_onnx(form="plain", width=64))))
    weight = next(t for t in wide.graph.initializer if t.name == "two.shared.conv.weight")
    spread = onnx.numpy_helper.to_array(weight).std()
    assert spread == pytest.approx(np.sqrt(2 / (64 * 3 * 3)), rel=0.02)


@pytest.mark.parametrize("size", [10**12, 10**8, 0, -1])
def test_claimed_weights_are_counted_before_they_are_made(model: bytes, size: int) -> None:
    proto = onnx.load_from_string(weightless(model))
    value = next(v for v in proto.graph.input if len(v.type.tensor_type.shape.dim) == 4 and v.name != "image")
    value.type.tensor_type.shape.dim[0].dim_value = size
    with pytest.raises(GraphError, match="impossible weights"):
        fill(proto.SerializeToString(), None)
