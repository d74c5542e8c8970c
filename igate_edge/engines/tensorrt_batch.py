"""A model of batch 1 as one of any batch, for a builder's batch profile: only where that changes nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import GraphError

if TYPE_CHECKING:
    import onnx

_FIX = "build it with batch 1 (batch=None)"


def dynamic_batch(model: bytes) -> bytes:
    """`model` with a first axis of any size in its input and outputs.

    Sizes that have the batch in them are restated: a Resize by its scales, a Reshape with 0, "as before". Raises
    GraphError where a node cannot be restated exactly, or an output does not follow the batch.
    """
    import onnx

    try:
        proto = onnx.load_from_string(model)
        if not proto.graph.node:
            raise ValueError("a graph without nodes")
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    except Exception as error:  # protobuf and onnx have classes of their own
        evidence = " ".join(str(error).split())[:200] or type(error).__name__
        raise GraphError("not an ONNX model", evidence, "pass the bytes of a model.onnx") from error
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    shapes = {value.name: _shape(value) for value in values}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    shapes.update({name: array.shape for name, array in constants.items()})
    for node in proto.graph.node:
        if node.op_type == "Resize" and len(node.input) > 3 and node.input[3]:
            _rescale(proto, node, shapes, constants)
        elif node.op_type == "Reshape":
            _reshape(proto, node, constants)
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return _checked(proto, shapes)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)


def _constant(proto: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    from onnx.numpy_helper import from_array

    proto.graph.initializer.append(from_array(value, name))
    return name


def _rescale(
    proto: onnx.ModelProto, node: Any, shapes: dict[str, tuple[int, ...]], constants: dict[str, np.ndarray]
) -> None:
    source, sizes = shapes.get(node.input[0], ()), constants.get(node.input[3])
    if sizes is None or not source or 0 in source or any(item.name == "axes" for item in node.attribute):
        raise GraphError("a Resize has no known size", f"node {node.name!r}", _FIX)
    scales = (np.asarray(sizes, np.float64) / source).astype(np.float32)
    if scales[0] != 1 or any(
        np.float64(scale) * size != made for scale, size, made in zip(scales, source, sizes, strict=True)
    ):
        evidence = f"node {node.name!r}: {list(source)} to {sizes.tolist()}"
        raise GraphError("a Resize has no exact scale, so its size would be rounded", evidence, _FIX)
    node.input[2] = _constant(proto, f"{node.output[0]}.scales", scales)
    del node.input[3:]


def _reshape(proto: onnx.ModelProto, node: Any, constants: dict[str, np.ndarray]) -> None:
    target = constants.get(node.input[1])
    zeros = any(item.name == "allowzero" and item.i for item in node.attribute)
    if target is None or zeros or target[0] not in (0, 1):
        raise GraphError("a Reshape moves the batch", f"node {node.name!r}", _FIX)
    node.input[1] = _constant(proto, f"{node.output[0]}.shape", np.concatenate([[0], target[1:]]).astype(np.int64))


def _checked(proto: onnx.ModelProto, before: dict[str, tuple[int, ...]]) -> bytes:
    import onnx

    try:
        for value in onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True).graph.output:
            axes = value.type.tensor_type.shape.dim
            if axes[0].dim_param != "batch" or _shape(value)[1:] != before[value.name][1:]:
                raise GraphError("an output does not follow the batch", value.name, _FIX)
    except onnx.shape_inference.InferenceError as error:
        raise GraphError("the batch is built into the graph", " ".join(str(error).split())[:200], _FIX) from error
    return proto.SerializeToString(deterministic=True)
