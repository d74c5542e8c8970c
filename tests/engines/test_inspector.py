"""The engine inspector's JSON in both grammars: what runs in INT8, which copies nobody asked for."""

from __future__ import annotations

import json
from typing import Any

import int8_nets
import onnx_ir as ir
import plugin_kit
import pytest
from standin_engine import inspector_json, inspector_rows, row

from igate_edge.compiler import calibrate, functions, graph, quantize
from igate_edge.compiler.half import half
from igate_edge.engines import inspector
from igate_edge.errors import CheckFailed

WIDE = "Thirty-two wide channel vectorized row major Int8 format"
VERSIONS = ("10.3.0", "11.4.0")


@pytest.fixture(scope="module", params=["resnet", "gated", "mobile"])
def model(request: pytest.FixtureRequest) -> ir.Model:
    net, made = int8_nets.NETS[request.param]()
    return half(quantize.quantize(net, calibrate.calibrate(net, made.frames()), dialect="trt"))


def judged(rows: list[dict[str, Any]], version: str, model: ir.Model) -> inspector.Verdict:
    return inspector.judge(inspector.parse(inspector_json(rows, version)), *inspector.expected(model))


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_as_expected_passes(model: ir.Model, version: str) -> None:
    verdict = judged(inspector_rows(graph.dump(model)), version, model)
    expected, _ = inspector.expected(model)
    assert verdict.problems == [] and list(verdict.int8) == expected and len(expected) >= 4


@pytest.mark.parametrize("version", VERSIONS)
def test_a_float_layer_is_named_with_what_it_reads(model: ir.Model, version: str) -> None:
    node = inspector.expected(model)[0][1]
    rows = inspector_rows(graph.dump(model))
    layer = next(one for one in rows if one["Name"].endswith(f"+ {node}"))
    layer["Inputs"][0]["Format/Datatype"] = "Row major linear FP16 format (kLINEAR)"
    verdict = judged(rows, version, model)
    assert verdict.problems == [f"{node} is not INT8: reads half, weights int8 ({layer['Name']})"]


def test_a_layer_that_is_not_there_is_not_taken_for_good(model: ir.Model) -> None:
    node = inspector.expected(model)[0][0]
    rows = [one for one in inspector_rows(graph.dump(model)) if not one["Name"].endswith(f"+ {node}")]
    assert judged(rows, "10.3.0", model).problems == [f"{node} is not INT8: no layer of the engine names it"]
    copy = row("Reformatting CopyNode for Input Tensor 0 to it", [node], WIDE, "Half", "Reformat")
    copy["Inputs"][0]["Name"] = "image"
    assert judged([*rows, copy], "10.3.0", model).problems == [f"{node} is not INT8: no layer of the engine names it"]


@pytest.mark.parametrize("version", VERSIONS)
def test_copies_of_int8_are_told_from_those_the_graph_asks_for(model: ir.Model, version: str) -> None:
    rows = inspector_rows(graph.dump(model))
    cast = next(iter(inspector.expected(model)[1]))
    rows.append(row("Reformatting CopyNode for Input Tensor 0 to a", [], WIDE, "Int8", "Reformat"))
    rows.append(row("Reformatting CopyNode for Output Tensor 0 to b", [], "Half", "Half", "Reformat"))
    rows.append(row("Reformatting CopyNode for Input Tensor 1 to d", [cast], WIDE, WIDE, "Reformat"))
    rows.append(row(f"{cast} copy", [cast], WIDE, WIDE, "Reformat"))
    rows.append(row("Reformatting CopyNode for Output Tensor 0 to c", [], WIDE, "Float", "Reformat"))
    rows[-1]["Outputs"][0]["Name"] = "seg"
    verdict = judged(rows, version, model)
    names = ("Input Tensor 0 to a", "Input Tensor 1 to d")
    assert verdict.problems == [f"unexpected reformat Reformatting CopyNode for {name}" for name in names]
    assert verdict.other_reformats == ("Reformatting CopyNode for Output Tensor 0 to b",)


def test_names_alone_tell_where_there_is_no_metadata() -> None:
    name = "w + /c1/Conv + PWN(PWN(/c1/Sigmoid), /c1/Mul)"
    (layer,) = inspector.parse(inspector_json([{**row(name, [], WIDE, WIDE), "Metadata": ""}], "10.3.0")).layers
    assert layer.nodes == ("w", "/c1/Conv", "/c1/Sigmoid", "/c1/Mul") and layer.int8


def test_a_kernel_s_name_tells_where_the_first_input_does_not() -> None:
    fused = row("fused", ["a", "b"], "Half", "Half", "kgen", TacticName="sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32")
    (layer,) = inspector.parse(inspector_json([fused], "10.3.0")).layers
    assert layer.int8 and layer.nodes == ("a", "b")
    only_weights = row("x", ["x"], "Half", "Half", Weights={"Type": "Int8"})
    skip = row("y", ["y"], "Half", "Half", Weights={"Type": "Float"}, TacticName="int8_of_the_skip")
    both = inspector.parse(inspector_json([only_weights, skip], "10.3.0")).layers
    assert [layer.int8 for layer in both] == [False, False]


def test_the_schema_is_the_one_of_the_version() -> None:
    for version, schema in (("10.16.2", "10"), ("11.0.0", "11")):
        found = inspector.parse(inspector_json([row("a", ["a"], WIDE, "Half")], version))
        assert (found.schema, found.tensors) == (schema, ("image", "seg"))
        assert (found.layers[0].inputs[0].dtype, found.layers[0].outputs[0].dtype) == ("int8", "half")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "lists no layers"),
        (json.dumps({"Layers": [], "Bindings": ["a"]}), "lists no layers"),
        (json.dumps({"Layers": ["conv1", "conv2"], "Bindings": ["a"]}), "gives names only"),
        (json.dumps({"Layers": [row("a", ["a"], "Int8", "Int8")]}), "names no inputs and outputs"),
    ],
)
def test_what_cannot_be_judged_does_not_pass(text: str, words: str) -> None:
    with pytest.raises(CheckFailed, match=words):
        inspector.parse(text)


def test_odd_rows_do_not_crash() -> None:
    odd = {"Name": 5, "LayerType": None, "Inputs": "x", "Outputs": [3, {}], "Weights": [], "Metadata": None}
    (layer,) = inspector.parse(json.dumps({"Layers": [odd], "Bindings": ["a"]})).layers
    assert not layer.int8 and not layer.reformat and layer.inputs == ()


def test_nodes_of_local_functions_and_of_the_plugin_are_found(model: ir.Model) -> None:
    """The metadata is what TensorRT-RTX 1.7's parser wrote for such a file."""
    calls = functions.with_functions(model)
    named = functions.layers(calls)
    data = graph.dump(calls)
    metadata = [row["Metadata"] for row in inspector_rows(data)]
    first = next(node for node in calls.graph if node.name in named)
    conv = f"{first.name}/{first.name}"
    assert f"[ONNX Layer: {conv} | {first.name} ({first.op_type})]" in metadata
    verdict = judged(inspector_rows(data), "10.3.0", calls)
    assert verdict.problems == [] and conv in verdict.int8 and len(verdict.int8) == len(inspector.expected(model)[0])
    dropped = functions.drop_functions(calls, plugin_kit.image(), only=[first.name or ""])
    rows = inspector_rows(graph.dump(dropped))
    assert first.name in judged(rows, "10.3.0", dropped).int8
    plugin = next(row for row in rows if row["LayerType"] == "PluginV3")
    rows.remove(plugin)
    assert judged(rows, "10.3.0", dropped).problems == [f"{first.name} is not INT8: no layer of the engine names it"]
