"""ONNX files in and out: what the compiler takes is checked here once, so that all later stages may rely on it.

After `load`: no external data, opset 17-19, no control flow, every value named and of static shape, every constant an
initializer, every task an output.
"""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import onnx_ir as ir

from ..contract import OutputSpec, Preprocess
from ..errors import GraphError, IgateError
from ..files import os_errors
from .lanes import constant, evaluate

if TYPE_CHECKING:
    import onnx

KEY = "igate"
SCHEMA = 1
OPSETS = (17, 18, 19)
MAX_BYTES = 2**31 - 1  # a protobuf message holds less
MAX_FOLD = 2**26  # elements of a folded constant: nothing a robot's network needs is larger
EXPORT = "export it again with igate_edge"
#: Never folded: random, or the marks of a quantised model.
KEPT = frozenset([
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial",
    "QuantizeLinear", "DequantizeLinear",
])  # fmt: skip


def load(data: bytes | str | os.PathLike[str]) -> ir.Model:
    """Read an ONNX model, given as bytes or as a path, and make it ready for the compiler.

    Folds constants (among them float16 weights followed by a Cast) and infers shapes. Raises GraphError for whatever
    is not a self-contained static model with igate metadata, UnavailableError when the file cannot be read.
    """
    proto = _parse(data if isinstance(data, bytes) else _read(Path(data)))
    _check_tensors(proto)
    _check_graph(proto)
    try:
        model = ir.from_proto(proto)
        _tidy(model)
    except IgateError:
        raise
    except Exception as error:  # whatever a strange file does to the libraries: it is refused
        _refuse("the ONNX graph is not valid", error)
    _check_static(model)
    _check_meta(model)
    return model


def dump(model: ir.Model) -> bytes:
    """The model as ONNX bytes; the same model gives the same bytes. Raises GraphError above 2 GB."""
    total = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    if total > MAX_BYTES:
        raise GraphError("the model is too large for one file", f"{total} bytes of weights", "use a narrower backbone")
    return ir.to_proto(model).SerializeToString(deterministic=True)


def meta(model: ir.Model) -> dict[str, Any]:
    """The igate metadata: schema, form, tasks, preprocess, sites; {} when there is none."""
    return dict(json.loads(model.metadata_props.get(KEY, "{}")))


def specs(model: ir.Model) -> list[OutputSpec]:
    """One OutputSpec a task, in order."""
    return [OutputSpec.from_json(task) for task in meta(model)["tasks"]]


def preprocess(model: ir.Model) -> Preprocess:
    """How a frame becomes the model's input."""
    return Preprocess.from_json(meta(model)["preprocess"])


def _refuse(cause: str, evidence: object, fix: str = EXPORT) -> NoReturn:
    text = (str(evidence).strip().splitlines() or [type(evidence).__name__])[0][:300]
    raise GraphError(cause, text, fix) from (evidence if isinstance(evidence, Exception) else None)


def _read(path: Path) -> bytes:
    with os_errors(path, "read"):
        size = path.stat().st_size
        if size > MAX_BYTES:
            _refuse(
                "the ONNX file is too large",
                f"{path} has {size} bytes of at most {MAX_BYTES}",
                "use a narrower backbone",
            )
        return path.read_bytes()


def _parse(data: bytes) -> onnx.ModelProto:
    import onnx

    if len(data) > MAX_BYTES:
        _refuse("the ONNX model is too large", f"{len(data)} bytes of at most {MAX_BYTES}", "use a narrower backbone")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's own error types differ between its versions
        _refuse("not an ONNX model", error, "pass a file written by igate_edge")
    if not proto.graph.node or not proto.graph.output or not proto.ir_version:
        start = bytes(data[:8])
        _refuse(
            "not an ONNX model",
            f"no graph in {len(data)} bytes that start with {start!r}",
            "pass a file written by igate_edge",
        )
    opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    if opsets.get("ai.onnx") not in OPSETS:
        _refuse(
            "the ONNX opset is not supported", f"{opsets} (needed: {OPSETS[0]} to {OPSETS[-1]})", "export with opset 18"
        )
    return proto


def _check_tensors(proto: onnx.ModelProto) -> None:
    """Every tensor holds the bytes that its shape claims, within the file."""
    import onnx

    for node in proto.graph.node:
        for item in node.attribute:
            if item.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                _refuse(
                    "the graph has control flow", f"{node.op_type} {node.name!r}", "export without branches and loops"
                )
    if proto.functions:
        _refuse("the model has local functions", f"{len(proto.functions)} of them", "inline them before")
    if proto.graph.sparse_initializer:
        _refuse("the model has sparse weights", f"{len(proto.graph.sparse_initializer)} of them", "store them densely")
    attributes = [item for node in proto.graph.node for item in node.attribute]
    tensors = [*proto.graph.initializer, *(item.t for item in attributes if item.HasField("t"))]
    tensors += [tensor for item in attributes for tensor in item.tensors]
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            where = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
            _refuse(
                "a weight lies outside of the model", f"{tensor.name!r} in {where!r}", "store all weights in the file"
            )
        if any(dim < 0 for dim in tensor.dims):
            _refuse("a weight has a negative size", f"{tensor.name!r}: {list(tensor.dims)}")
        claimed, held = math.prod(tensor.dims), _held(tensor)
        if claimed != held:
            _refuse(
                "a weight has another size than it claims", f"{tensor.name!r}: {claimed} elements claimed, {held} held"
            )


def _held(tensor: onnx.TensorProto) -> int:
    """Elements that a tensor really holds, -1 for a type nobody needs."""
    import onnx

    if tensor.data_type == onnx.TensorProto.STRING:
        return len(tensor.string_data)
    try:
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except Exception:  # an unknown type
        return -1
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data) // size if len(tensor.raw_data) % size == 0 else -1
    fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    return max(len(data) for data in fields)


def _check_graph(proto: onnx.ModelProto) -> None:
    import onnx

    # The checker parses text of its own making: only the graph's structure is shown to it.
    try:
        onnx.checker.check_model(proto, full_check=False)
    except Exception as error:  # ValidationError, or whatever the C++ side throws
        _refuse("the ONNX graph is not valid", error)


def _tidy(model: ir.Model) -> None:
    """Constants become initializers, and shapes are inferred; in place."""
    import onnx_ir.passes.common as passes

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        passes.RemoveInitializersFromInputsPass()(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.ShapeInferencePass(strict_mode=False)(model)
        if _fold(model):
            passes.ShapeInferencePass(strict_mode=False)(model)
    finally:
        logging.disable(level)
    taken: set[str] = set()
    for index, node in enumerate(model.graph):
        name = node.name or f"{node.op_type}.{index}"
        node.name = name if name not in taken else f"{name}.{index}"
        taken.add(node.name)


def _fold(model: ir.Model) -> bool:
    """Replace nodes over constants by their results; says whether any was."""
    graph, opset, folded = model.graph, model.graph.opset_imports.get("", 18), False
    outputs = set(map(id, graph.outputs))
    for node in list(graph):
        arrays = [constant(value) for value in node.inputs]
        if (
            node.domain not in ("", "ai.onnx")
            or node.op_type in KEPT
            or len(node.outputs) != 1
            or id(node.outputs[0]) in outputs
        ):
            continue
        if not arrays or any(a is None for a, value in zip(arrays, node.inputs, strict=True) if value is not None):
            continue
        made = node.outputs[0]
        if made.shape is None or not made.shape.is_static() or math.prod(made.shape.numpy()) > MAX_FOLD:
            continue
        result = _value(node, arrays, opset)
        value = ir.Value(name=made.name, shape=ir.Shape(result.shape), const_value=ir.tensor(result, name=made.name))
        value.type = ir.TensorType(value.const_value.dtype) if value.const_value is not None else None
        ir.convenience.replace_all_uses_with(made, value)
        graph.remove(node, safe=True)
        graph.initializers[made.name or ""] = value
        folded = True
    used = {id(value) for node in graph for value in node.inputs} | outputs
    for name, value in list(graph.initializers.items()):
        if id(value) not in used:
            del graph.initializers[name]
    return folded


def _value(node: ir.Node, arrays: list[np.ndarray | None], opset: int) -> np.ndarray:
    first, made = arrays[0], node.outputs[0]
    if node.op_type == "Cast" and first is not None and first.dtype == np.float16 and made.dtype == ir.DataType.FLOAT:
        return first.astype(np.float32)
    return evaluate(node, arrays, opset)


def _check_static(model: ir.Model) -> None:
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        unused = not value.name or (not list(value.uses()) and not value.is_graph_output())
        if unused and value.producer() is not None:
            continue
        if value.shape is None or not value.shape.is_static() or any(dim == 0 for dim in value.shape):
            _refuse(
                "a tensor has no static shape",
                f"{value.name!r}: {value.shape}",
                "export with a static batch of 1 and fixed sizes",
            )


def _check_meta(model: ir.Model) -> None:
    if KEY not in model.metadata_props:
        _refuse(
            "the ONNX file has no task metadata",
            f"keys: {sorted(model.metadata_props) or 'none'}",
            "write it with igate_edge's export",
        )
    try:
        about = meta(model)
        schema = about.get("schema")
        if not isinstance(schema, int) or schema > SCHEMA:
            _refuse("the task metadata is of a newer schema", f"{schema!r}, known: {SCHEMA}", "update igate_edge")
        names = [spec.name for spec in specs(model)]
        preprocess(model)
        for site in about.get("sites", []):
            _check_site(site)
    except GraphError:
        raise
    except Exception as error:  # JSON of any shape
        _refuse("the task metadata cannot be read", f"{type(error).__name__}: {error}")
    outputs = [value.name for value in model.graph.outputs]
    missing = [name for name in names if name not in outputs]
    if missing or not names:
        _refuse("a task has no output", f"tasks {missing or 'none'}, outputs {outputs}")


def _check_site(site: dict[str, Any]) -> None:
    if not isinstance(site["name"], str):
        _refuse("the task metadata cannot be read", f"a gate site is called {site['name']!r}")
    for task, bits in site["open"].items():
        if len(bits) != site["channels"] or set(bits) - {"0", "1"}:
            _refuse(
                "the gates do not fit their site", f"{site['name']!r}, task {task!r}: {len(bits)} of {site['channels']}"
            )
