"""What TensorRT's engine inspector says of a built engine: which layers run in INT8, and which only move data.

Reads the JSON of both generations: "Bindings" and "Format/Datatype" of 10.x, "I/O Tensors" and "DataType" of 11.x. The
grammar is NVIDIA's documented one, tried on synthetic files; not run on a device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CheckFailed

if TYPE_CHECKING:
    import onnx_ir as ir

#: Operators whose INT8 form is worth having, and is what the speed of an INT8 engine rests on.
WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")
_REFORMAT = re.compile(r"^Reformatting CopyNode")
_INT8_KERNEL = re.compile(r"i8i8|int8|imma", re.IGNORECASE)
#: A node of a local function is followed by the call: "[ONNX Layer: CALL/NODE | CALL (FUNCTION)]".
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+?)(?: \| [^\]]*)?\]")
#: (domain, operator) of a layer of ours, which reads and makes INT8.
PLUGIN = ("igate", "Kernel")


@dataclass(frozen=True)
class Tensor:
    """An input or output of a layer: dtype in lower case ("int8", "half", "float"), format as TensorRT words it."""

    name: str
    dtype: str
    format: str


@dataclass(frozen=True)
class Layer:
    """One kernel launch. nodes: the ONNX nodes that went into it. weights: their type in lower case, "" if not told."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    weights: str = ""
    tactic: str = ""

    @property
    def reformat(self) -> bool:
        """Whether it computes nothing: it copies a tensor into another layout or type."""
        return self.kind.lower() == "reformat" or bool(_REFORMAT.match(self.name))

    @property
    def int8(self) -> bool:
        """Whether it multiplies INT8 by INT8, as far as its tensors, weights and kernel name tell."""
        data = bool(self.inputs) and self.inputs[0].dtype == "int8"
        return self.weights in ("", "int8") and (data or bool(_INT8_KERNEL.search(self.tactic)))


@dataclass(frozen=True)
class Inspection:
    """All layers in order, the network's own inputs and outputs by name, and the schema: "10" or "11"."""

    layers: tuple[Layer, ...]
    tensors: tuple[str, ...]
    schema: str


@dataclass(frozen=True)
class Verdict:
    """How an engine compares with the graph it was made of.

    int8: expected layers that run so. wrong: (ONNX node, the engine's layer, why). reformats: copies of INT8 tensors
    that nothing in the graph asks for. other_reformats: copies between float layers; not judged.
    """

    int8: tuple[str, ...]
    wrong: tuple[tuple[str, str, str], ...]
    reformats: tuple[str, ...]
    other_reformats: tuple[str, ...]

    @property
    def problems(self) -> list[str]:
        """One sentence for everything that must not be; an empty list passes."""
        found = [f"{node} is not INT8: {why}" + (f" ({layer})" if layer else "") for node, layer, why in self.wrong]
        return found + [f"unexpected reformat {name}" for name in self.reformats]


def parse(text: str) -> Inspection:
    """Read `get_engine_information` JSON; raises CheckFailed where it does not tell what the layers compute in.

    >>> layer = {"Name": "a + b", "LayerType": "CaskConvolution", "Inputs": [], "Outputs": []}
    >>> parse(json.dumps({"Layers": [layer], "Bindings": ["image", "seg"]})).layers[0].nodes
    ('a', 'b')
    """
    fix = "build with ProfilingVerbosity.DETAILED"
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckFailed("the engine inspector's answer is no JSON", str(error)[:200], fix) from error
    rows = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows:
        raise CheckFailed("the engine inspector lists no layers", text[:100], fix)
    if not all(isinstance(row, dict) and "LayerType" in row for row in rows):
        raise CheckFailed("the engine inspector gives names only", f"{len(rows)} layers without types", fix)
    listed = document.get("I/O Tensors", document.get("Bindings"))
    names = [item.get("Name") if isinstance(item, dict) else item for item in listed or []]
    if not names:
        raise CheckFailed("the engine inspector names no inputs and outputs", f"keys: {', '.join(document)[:100]}", fix)
    schema = "11" if "I/O Tensors" in document else "10"
    return Inspection(tuple(_layer(row) for row in rows), tuple(str(name) for name in names), schema)


def _layer(row: Mapping[str, Any]) -> Layer:
    name, metadata = str(row.get("Name", "")), str(row.get("Metadata", ""))
    # Without metadata the name tells: the fused nodes joined by " + ", pointwise ones inside PWN(...).
    nodes = _ONNX_NODE.findall(metadata) or [
        word for part in name.split(" + ") for word in re.sub(r"PWN\(|\)", " ", part).replace(",", " ").split()
    ]
    weights = row.get("Weights")
    return Layer(
        name=name,
        kind=str(row.get("LayerType", "")),
        nodes=tuple(dict.fromkeys(nodes)),
        inputs=_tensors(row.get("Inputs")),
        outputs=_tensors(row.get("Outputs")),
        weights=str(weights.get("Type", "")).lower() if isinstance(weights, dict) else "",
        tactic=str(row.get("TacticName", "")),
    )


def _tensors(rows: Any) -> tuple[Tensor, ...]:
    found = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict):
            both = str(row.get("Format/Datatype", ""))
            layout = str(row.get("Format", both))
            found.append(Tensor(str(row.get("Name", "")), _dtype(str(row.get("DataType") or both or layout)), layout))
    return tuple(found)


def _dtype(text: str) -> str:
    """The type in a short ("Int8") or long ("Thirty-two wide channel vectorized row major Int8 format") description.

    >>> [_dtype(text) for text in ("Row major linear FP16 format (kLINEAR)", "Half", "FP32", "Int8", "Bool")]
    ['half', 'half', 'float', 'int8', 'bool']
    """
    words = text.lower()
    kinds = {"int8": "int8", "fp16": "half", "half": "half", "fp32": "float", "float": "float"}
    return next((kind for word, kind in kinds.items() if word in words), words)


def expected(model: ir.Model) -> tuple[list[str], set[str]]:
    """Of a Q/DQ graph: the nodes that must run in INT8, and all others, each of which may be a copy in the engine.

    Bodies of local functions count, not their calls; so do nodes of the plugin, as INT8.
    """
    int8, others = [], set()
    for node in (node for part in (model.graph, *model.functions.values()) for node in part):
        if node.op_identifier() in model.functions:
            continue
        name = node.name or str(node.outputs[0].name)
        makers = [value.producer() if value is not None else None for value in node.inputs[:2]]
        quantised = all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
        if (node.domain, node.op_type) == PLUGIN:
            int8.append(name)
        elif node.op_type in WEIGHTED:
            int8 += [name] if quantised else []
        else:
            others.add(name)
    return int8, others


def judge(inspection: Inspection, int8: Sequence[str], others: Collection[str]) -> Verdict:
    """Compare an engine with what `expected` says of its graph."""
    good, wrong = [], []
    for node in int8:
        layers = [layer for layer in inspection.layers if node in layer.nodes and not layer.reformat]
        if not layers:
            wrong.append((node, "", "no layer of the engine names it"))
        elif any(layer.int8 for layer in layers):
            good.append(node)
        else:
            wrong.append((node, layers[0].name, _types(layers[0])))
    copies = [layer for layer in inspection.layers if layer.reformat and not _asked(layer, inspection.tensors, others)]
    of_int8 = {layer.name for layer in copies if "int8" in _dtypes((*layer.inputs, *layer.outputs))}
    return Verdict(
        tuple(good),
        tuple(wrong),
        tuple(layer.name for layer in copies if layer.name in of_int8),
        tuple(layer.name for layer in copies if layer.name not in of_int8),
    )


def _asked(layer: Layer, tensors: Collection[str], others: Collection[str]) -> bool:
    """A copy at the network's border, or one that is an operator of the graph: Q, DQ, Cast, Concat, Slice, ..."""
    if any(tensor.name in tensors for tensor in (*layer.inputs, *layer.outputs)):
        return True
    return not _REFORMAT.match(layer.name) and any(node in others for node in layer.nodes)


def _dtypes(tensors: Iterable[Tensor]) -> set[str]:
    return {tensor.dtype for tensor in tensors}


def _types(layer: Layer) -> str:
    read = ", ".join(tensor.dtype for tensor in layer.inputs) or "nothing known"
    return f"reads {read}" + (f", weights {layer.weights}" if layer.weights else "")
