"""ONNX files in and out: what the compiler takes is checked here once, so that all later stages may rely on it.

After `load`: no external data, opset 17-19, no control flow, one image as input, every value named and of static shape,
every constant an initializer, every task an output of its kind's shape, nothing that no output needs.
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

from ..contract import OutputSpec, Preprocess, check_sites
from ..errors import GraphError, IgateError
from ..files import as_path, os_errors
from .lanes import constant, evaluate

if TYPE_CHECKING:
    import onnx

KEY = "igate"
SCHEMA = 1
OPSETS = (17, 18, 19)
MAX_BYTES = 2**31 - 1  # a protobuf message holds less
SMALL = 256  # elements: sizes, axes and scales, whose values decide shapes
MAX_ELEMENTS = 2**28  # of one tensor: 1 GB in float32
FORMS = ("gated", "merged", "filled", "plain")
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
    proto = _parse(data if isinstance(data, bytes) else _read(as_path(data)))
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
        # Asked before opening: a named pipe would wait for a writer, a device may have no end.
        if not path.is_file():
            _refuse("not an ONNX model", f"{path} is not a regular file", "pass a file written by igate_edge")
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
        # Shapes inside are inferred, never believed: a file may claim any.
        del proto.graph.value_info[:]
        onnx.shape_inference.infer_shapes(_shell(proto), check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # ValidationError, or whatever the C++ side throws
        _refuse("the ONNX graph is not valid", error)
    names = [value.name for value in proto.graph.output]
    twice = [name for name in names if names.count(name) > 1 or name in {value.name for value in proto.graph.input}]
    if twice:
        _refuse("an output is named twice, or is an input", f"{twice[0]!r}")


def _shell(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large weights as inputs of their shape: all that shape inference needs."""
    import onnx

    shell = onnx.ModelProto()
    shell.CopyFrom(proto)
    graph, known = shell.graph, {value.name for value in shell.graph.input}
    small = [tensor for tensor in proto.graph.initializer if math.prod(tensor.dims) <= SMALL]
    for tensor in proto.graph.initializer:
        if math.prod(tensor.dims) > SMALL and tensor.name not in known:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del graph.initializer[:]
    graph.initializer.extend(small)
    return shell


def _tidy(model: ir.Model) -> None:
    """Constants become initializers, and shapes are inferred; in place."""
    import onnx_ir.passes.common as passes

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        passes.RemoveInitializersFromInputsPass()(model)
        passes.RemoveUnusedNodesPass()(model)
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
        static = value.shape is not None and value.shape.is_static()
        sizes = tuple(value.shape.numpy()) if static and value.shape is not None else (0,)
        if math.prod(sizes) > MAX_ELEMENTS:
            fix = "export with a smaller input or fewer channels"
            _refuse("a tensor is too large", f"{value.name!r}: {list(sizes)}, at most {MAX_ELEMENTS} elements", fix)
        if any(size < 1 for size in sizes):
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
        about = json.loads(model.metadata_props[KEY])
        schema = about.get("schema")
        if type(schema) is not int or schema != SCHEMA:
            _refuse("the task metadata is of a newer schema", f"{schema!r}, known: {SCHEMA}", "update igate_edge")
        tasks = [OutputSpec.from_json(task) for task in about["tasks"]]
        size = Preprocess.from_json(about["preprocess"])
        check_sites(about.get("sites", []), tasks)
        if about.get("form") not in FORMS or (about["form"] == "gated" and "sites" not in about):
            _refuse("the task metadata names no known form", f"{about.get('form')!r}", EXPORT)
    except GraphError:
        raise
    except Exception as error:  # JSON of any shape
        _refuse("the task metadata cannot be read", f"{type(error).__name__}: {error}")
    _check_ends(model, tasks, [1, 3, size.height, size.width])


def _check_ends(model: ir.Model, tasks: list[OutputSpec], image: list[int]) -> None:
    """One float image of the preprocessing's size goes in, one float tensor a task comes out."""
    ends = [(value.name, value.dtype, list(value.shape or ())) for value in model.graph.inputs]
    if len(ends) != 1 or ends[0][1] != ir.DataType.FLOAT or ends[0][2] != image:
        found = ", ".join(f"{name!r} {dtype} {shape}" for name, dtype, shape in ends) or "no input"
        _refuse("the model does not take one preprocessed image", f"{found}; float32 {image} needed")
    outputs = {value.name: value for value in model.graph.outputs}
    missing = [spec.name for spec in tasks if spec.name not in outputs]
    if missing or not tasks or len({spec.name for spec in tasks}) != len(tasks):
        _refuse("a task has no output of its own", f"tasks {missing or [t.name for t in tasks]}, outputs {[*outputs]}")
    for spec in tasks:
        shape, dtype = list(outputs[spec.name].shape or ()), outputs[spec.name].dtype
        if dtype != ir.DataType.FLOAT or len(shape) != (4 if spec.dense else 2) or shape[:2] != [1, spec.channels]:
            wanted = f"[1, {spec.channels}{', h, w' if spec.dense else ''}]"
            _refuse(f"task {spec.name!r} has an output of another kind", f"{dtype} {shape}, float32 {wanted} needed")
