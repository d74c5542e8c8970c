"""The weightless net: a graph whose weights are inputs with a shape.

Its time on a device does not depend on the numbers, so the plain net and T separate nets can be timed from some kB.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .errors import GraphError

if TYPE_CHECKING:
    import onnx

#: Operators whose second and third inputs are weights.
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_IMAGE = "image"
MAX_WEIGHTS = 2**29 - 1  # of 4 bytes: what one ONNX file can hold


def weightless(model: bytes) -> bytes:
    """Turn every weight of an ONNX model into a graph input of its shape and drop what describes the nodes' origin."""
    import onnx

    proto = onnx.load_from_string(model)
    graph = proto.graph
    weights = _weight_users(graph)
    kept = []
    for tensor in graph.initializer:
        if tensor.name in weights:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            kept.append(tensor)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]
    for node in graph.node:
        node.ClearField("doc_string")
        del node.metadata_props[:]
    return proto.SerializeToString(deterministic=True)


def fill(model: bytes, seed: int | None = 0) -> bytes:
    """Give a weightless model weights again: He-scaled noise of `seed`, or zeros when it is None (enough to count).

    He, K. et al., Delving Deep into Rectifiers, 2015: a standard deviation of sqrt(2 / fan-in) keeps the activations'
    size. Raises GraphError.
    """
    import onnx

    try:
        proto = onnx.load_from_string(model)
    except Exception as error:  # protobuf's DecodeError is a class of its own in every version
        raise GraphError("not an ONNX model", " ".join(str(error).split())[:200], "export it again") from error
    graph = proto.graph
    users, rng = _weight_users(graph), np.random.default_rng(seed or 0)
    inputs = [value for value in graph.input if value.name in users]
    shapes = [tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in inputs]
    # Some kB of graph may claim any number of weights: counted before they are made.
    total = sum(math.prod(shape) for shape in shapes)
    if total > MAX_WEIGHTS or any(size < 1 for shape in shapes for size in shape):
        evidence = f"{total} weights claimed, at most {MAX_WEIGHTS}, each size at least 1"
        raise GraphError("the weightless net claims impossible weights", evidence, "export it again")
    for value, shape in zip(inputs, shapes, strict=True):
        scale = 0.0 if seed is None else _scale(shape, users[value.name])
        array = np.zeros(shape, np.float32) if not scale else rng.standard_normal(shape, np.float32) * np.float32(scale)
        graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        graph.input.remove(value)
    return proto.SerializeToString(deterministic=True)


def _weight_users(graph: onnx.GraphProto) -> dict[str, str]:
    """Names of weights and biases -> the operator that reads them."""
    made = {name for node in graph.node for name in node.output}
    users = {}
    for node in graph.node:
        for name in node.input[1:] if node.op_type in _WEIGHTED else ():
            if name and name not in made and name != _IMAGE:
                users[name] = node.op_type
    return users


def _scale(shape: tuple[int, ...], op: str) -> float:
    if len(shape) < 2:
        return 0.01
    fan_in = shape[0] if op == "MatMul" else math.prod(shape[1:])
    return math.sqrt(2 / max(fan_in, 1))
