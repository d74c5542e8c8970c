"""torch module -> onnx_ir graph with readable names; every way in which the exporter surprises is dealt with here."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..errors import ConvertError, UnavailableError

if TYPE_CHECKING:
    import onnx_ir

OPSET = 18
IR_VERSION = 10  # what ONNX Runtime 1.20, the oldest supported, can read
INPUT = "image"
HALF_FROM = 1024  # weights of fewer elements stay float32: nothing to win
#: Operators whose shapes or whose work depend on the data, or that draw random numbers.
DYNAMIC = frozenset(
    ["If", "Loop", "Scan", "NonZero", "Unique", "Compress", "GatherND", "ScatterND", "NonMaxSuppression"]
    + ["Multinomial", "Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"]
)


class _FixedPools(TorchFunctionMode):
    """Adaptive average pools that do not divide their input become two constant matrices (ONNX lacks the operator)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.adaptive_avg_pool2d:
            return self._pool(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _pool(input: Tensor, output_size: Any) -> Tensor:
        wanted = (output_size, output_size) if isinstance(output_size, int) else output_size
        inner = [int(length) for length in input.shape[-2:]]
        outer = [length if want is None else int(want) for length, want in zip(inner, wanted, strict=True)]
        if all(i % o == 0 for i, o in zip(inner, outer, strict=True)):
            return functional.adaptive_avg_pool2d(input, (outer[0], outer[1]))
        rows, columns = (torch.tensor(_averages(i, o)) for i, o in zip(inner, outer, strict=True))
        return rows @ (input @ columns.T.contiguous())


def _averages(inner: int, outer: int) -> list[list[float]]:
    """[outer][inner] matrix that averages as PyTorch's adaptive pools do: from floor(i*n/m) to ceil((i+1)*n/m)."""
    spans = [(i * inner // outer, -(-(i + 1) * inner // outer)) for i in range(outer)]
    return [[1 / (stop - start) if start <= j < stop else 0.0 for j in range(inner)] for start, stop in spans]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints, warns and logs about its own inner life: keep that from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(level)


def trace(view: nn.Module, example: Tensor) -> onnx_ir.Model:
    """The view as an ONNX graph, simplified, with every node named after the module it comes from."""
    import onnx_ir.passes.common as passes

    try:
        import onnxscript.optimizer
        import onnxscript.rewriter
    except ImportError as error:
        raise UnavailableError("ONNX export needs onnxscript", str(error), "pip install 'igate-edge[train]'") from error
    try:
        with _quiet():
            with _FixedPools():
                traced = torch.export.export(view, (example,), strict=False)
            program = torch.onnx.export(
                traced, dynamo=True, opset_version=OPSET, optimize=False, verbose=False, input_names=[INPUT]
            )
    except Exception as error:  # the exporter wraps whatever the network raised in its own types
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise ConvertError(
            "the network cannot be exported to ONNX",
            (str(root).strip().splitlines() or [type(root).__name__])[0],
            "use operators without Python branches on tensor values",
        ) from error
    assert program is not None
    model = program.model
    _name_nodes(model)
    # The exporter's own optimiser also merges equal weights and equal nodes: freshly forked branches would vanish.
    with _quiet():
        onnxscript.optimizer.fold_constants_ir(model)
        model = onnxscript.rewriter.rewrite(model)
        passes.RemoveUnusedNodesPass()(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        passes.IdentityEliminationPass()(model)
        passes.RemoveUnusedNodesPass()(model)
    taken: set[str] = set()
    for node in model.graph:  # the optimiser makes new nodes: a convolution without its zero bias
        node.name = _unique(_weight_path(model, node) or node.name or node.op_type.lower(), taken)
    _check_static(model)
    return model


def _name_nodes(model: onnx_ir.Model) -> None:
    """Name nodes after the weight they read or the module they come from; several may still share one name."""
    for node in model.graph:
        path = _weight_path(model, node)
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        kinds = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.class_hierarchy", "[]"))
        if path:
            base = path
        elif len(scopes) > 1 and len(kinds) > 1 and scopes[-2] and kinds[-2].startswith("torch.nn.modules."):
            base = scopes[-2]
        else:
            base = ".".join(part for part in scopes[-2:] if part) or node.op_type.lower()
        node.name = base


def _weight_path(model: onnx_ir.Model, node: onnx_ir.Node) -> str:
    """Path of the module whose weight a node reads; "" when it reads none."""
    names = [v.name or "" for v in node.inputs if v is not None and v.name in model.graph.initializers]
    return next((name.removesuffix(".weight") for name in names if name.endswith(".weight")), "")


def _unique(base: str, taken: set[str]) -> str:
    """`base`, or `base_2`, `base_3`... when it is taken; the answer is taken from then on."""
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name


def _check_static(model: onnx_ir.Model) -> None:
    for node in model.graph:
        if node.op_type in DYNAMIC:
            raise ConvertError(
                "an operator depends on the data",
                f"{node.op_type} in {node.name}",
                "use operators of fixed shape and cost",
            )
    for value in model.graph.outputs:
        if value.shape is None or not all(isinstance(length, int) for length in value.shape):
            raise ConvertError("an output has no fixed shape", f"{value.name}: {value.shape}", "use fixed sizes")


def rename(model: onnx_ir.Model, names: Sequence[str]) -> None:
    """Public names outside, "v.<node>" inside, so that a task may have any name."""
    import onnx_ir as ir

    graph = model.graph
    taken = {INPUT, *names}
    seen: set[int] = set()
    for index, value in enumerate(list(graph.outputs)):
        if id(value) in seen or value.producer() is None:
            copied = ir.node("Identity", [value], name=f"output.{names[index]}")
            copied.outputs[0].type, copied.outputs[0].shape = value.type, value.shape
            graph.append(copied)
            graph.outputs[index] = value = copied.outputs[0]
        seen.add(id(value))
    constants = list(graph.initializers.values())
    graph.initializers.clear()
    for value in constants:
        assert value.name is not None and value.const_value is not None
        value.name = _unique(value.name if "." in value.name else f"constant.{value.name}", taken)
        value.const_value.name = value.name
        graph.initializers[value.name] = value
    for node in graph:
        for index, value in enumerate(node.outputs):
            if id(value) not in seen:
                value.name = _unique(f"v.{node.name}" + (f".{index}" if index else ""), taken)
    for name, value in zip(names, graph.outputs, strict=True):
        value.name = name


def round_to_half(view: nn.Module) -> None:
    """Round every large weight to the nearest float16, in place; raises ConvertError when one does not fit."""
    for name, tensor in (*view.named_parameters(), *view.named_buffers()):
        if tensor.dtype == torch.float32 and tensor.numel() >= HALF_FROM:
            rounded = tensor.half()
            if not torch.isfinite(rounded).all():
                raise ConvertError(
                    "a weight does not fit in float16",
                    f"{name} reaches {tensor.abs().max().item():.3g}",
                    "export with half_weights=False",
                )
            tensor.copy_(rounded.float())


def store_half(model: onnx_ir.Model) -> None:
    """float16 initializer and a Cast that bears the old name, for every large weight that float16 holds exactly."""
    import onnx_ir as ir

    graph, casts = model.graph, []
    for value in list(graph.initializers.values()):
        assert value.name is not None and value.const_value is not None
        if value.dtype != ir.DataType.FLOAT or value.const_value.size < HALF_FROM:
            continue
        array = value.const_value.numpy()
        half = array.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), array):
            continue
        stored = ir.Value(name=f"{value.name}.half", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16))
        stored.const_value = ir.tensor(half, name=stored.name)
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value}, name=f"{value.name}.cast")
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        del graph.initializers[value.name]
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        cast.outputs[0].name = value.name
        graph.initializers[f"{value.name}.half"] = stored
        casts.append(cast)
    if casts:
        graph.insert_before(graph[0], casts)


def strip(model: onnx_ir.Model) -> None:
    """Drop whatever names this machine, this run or the exporter; fill in missing shapes."""
    import onnx_ir.passes.common as passes

    from .. import __version__

    with _quiet():
        passes.ShapeInferencePass()(model)
        passes.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.ir_version, model.producer_name, model.producer_version = IR_VERSION, "igate_edge", __version__
    model.domain, model.model_version, model.doc_string, model.graph.name = None, None, None, "igate"
