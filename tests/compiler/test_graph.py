"""graph: what the compiler takes and refuses; masks: other gates and fewer tasks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from gatednets import TASKS, TOLERANCE, Net, constant_masks, difference, gated, ops, run, sites_of
from onnx import TensorProto, helper, numpy_helper

from igate_edge.compiler import graph
from igate_edge.compiler.prune import close_all, keep_outputs, prune, set_masks
from igate_edge.errors import GraphError, InputError, UnavailableError


def small() -> onnx.ModelProto:
    net = Net(("a",))
    return net.proto({"a": net.conv("c", "image", 3, 2)})


def refused(proto: onnx.ModelProto | bytes, match: str) -> GraphError:
    with pytest.raises(GraphError, match=match) as caught:
        graph.load(proto if isinstance(proto, bytes) else proto.SerializeToString())
    assert caught.value.cause
    assert caught.value.evidence
    assert caught.value.fix
    return caught.value


def test_load_takes_bytes_and_paths(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(small().SerializeToString())
    for source in (path, str(path), path.read_bytes()):
        model = graph.load(source)
        assert [spec.name for spec in graph.specs(model)] == ["a"]
        assert (graph.preprocess(model).height, graph.meta(model)["form"]) == (8, "gated")


def test_every_value_has_a_static_shape() -> None:
    model = gated("inverted", constant_masks("inverted", True))
    values = [value for node in model.graph for value in node.outputs]
    assert all(value.shape is not None and value.shape.is_static() for value in values)
    assert len({node.name for node in model.graph}) == len(list(model.graph))


def test_dump_gives_the_same_bytes() -> None:
    data = small().SerializeToString()
    assert (
        graph.dump(graph.load(data))
        == graph.dump(graph.load(data))
        == graph.dump(graph.load(graph.dump(graph.load(data))))
    )


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 a bundle", b"\x00" * 64, b"\xff" * 64, b"text, not a model\n" * 9])
def test_not_onnx(data: bytes) -> None:
    refused(data, "not an ONNX model")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="nowhere.onnx"):
        graph.load(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("location", ["../../x", "/etc/passwd", "weights.bin", ""])
def test_s1_external_data_is_refused_wherever_it_points(location: str) -> None:
    proto = small()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    refused(proto, "outside of the model")


def test_external_data_in_an_attribute_is_refused_too() -> None:
    proto = small()
    value = numpy_helper.from_array(np.zeros(2, np.float32), "t")
    value.ClearField("raw_data")
    value.data_location = TensorProto.EXTERNAL
    entry = value.external_data.add()
    entry.key, entry.value = "location", "x"
    proto.graph.node.append(helper.make_node("Constant", [], ["k"], value=value))
    refused(proto, "outside of the model")


def test_x8_a_tensor_that_claims_2_gb_is_refused_by_its_size() -> None:
    proto = small()
    proto.graph.initializer.append(TensorProto(name="big", data_type=TensorProto.FLOAT, dims=[2_100_000_000 // 4]))
    error = refused(proto, "another size than it claims")
    assert "525000000 elements claimed, 0 held" in error.evidence


@pytest.mark.parametrize("dims", [[3], [2**62, 2**62], [-1, 2], [1]])
def test_lying_sizes(dims: list[int]) -> None:
    proto = small()
    proto.graph.initializer.append(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=bytes(8)))
    refused(proto, "size")


def test_files_above_2_gb_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse: takes no disk
    with pytest.raises(GraphError, match="too large.*2147483648 bytes"):
        graph.load(path)


@pytest.mark.parametrize("version", [16, 20, 13])
def test_opset(version: int) -> None:
    proto = small()
    proto.opset_import[0].version = version
    error = refused(proto, "opset is not supported")
    assert str(version) in error.evidence


@pytest.mark.parametrize("version", [17, 18, 19])
def test_supported_opsets(version: int) -> None:
    proto = small()
    proto.opset_import[0].version = version
    assert graph.load(proto.SerializeToString()).graph.opset_imports[""] == version


def test_missing_metadata() -> None:
    proto = small()
    del proto.metadata_props[:]
    refused(proto, "no task metadata")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"schema": 1}',
        '{"schema": 1, "tasks": [{"name": "a"}], "preprocess": {}}',
        '{"schema": "x"}',
    ],
)
def test_broken_metadata(text: str) -> None:
    proto = small()
    proto.metadata_props[0].value = text
    refused(proto, "metadata")


def edited(**changes: object) -> onnx.ModelProto:
    proto = small()
    about = json.loads(proto.metadata_props[0].value)
    proto.metadata_props[0].value = json.dumps({**about, **changes})
    return proto


def test_newer_schema_and_missing_outputs_and_wrong_gates() -> None:
    refused(edited(schema=2), "newer schema")
    refused(edited(tasks=[{"name": "other", "kind": "edges", "channels": 1}]), "no output")
    refused(edited(tasks=[]), "no output")
    refused(edited(tasks=[{"name": "a", "kind": "teapot", "channels": 1}]), "metadata")
    refused(edited(sites=[{"name": "s", "channels": 4, "open": {"a": "010"}}]), "gates do not fit")
    refused(edited(sites=[{"name": "s", "channels": 3, "open": {"a": "01x"}}]), "gates do not fit")
    refused(edited(sites=["s"]), "metadata")


def test_symbolic_and_missing_shapes() -> None:
    proto = small()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    refused(proto, "static shape")


def test_control_flow_and_functions() -> None:
    proto = small()
    body = helper.make_graph([], "g", [], [])
    proto.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body))
    refused(proto, "control flow")
    proto = small()
    proto.functions.append(helper.make_function("d", "F", ["x"], ["y"], [], [helper.make_opsetid("", 18)]))
    refused(proto, "local functions")


def test_a_graph_that_reads_nothing_known() -> None:
    proto = small()
    proto.graph.node[0].input[0] = "nowhere"
    refused(proto, "not valid")


def test_flipped_bytes_are_refused_or_harmless() -> None:
    data, rng = (
        bytearray(gated("chain", constant_masks("chain", True)) and small().SerializeToString()),
        random.Random(0),
    )
    for _ in range(300):
        copy = bytearray(data)
        for _ in range(rng.choice([1, 1, 4])):
            copy[rng.randrange(len(copy))] = rng.randrange(256)
        if rng.random() < 0.2:
            copy = copy[: rng.randrange(len(copy))]
        try:
            model = graph.load(bytes(copy))
            graph.dump(prune(model).model)
        except GraphError as error:
            assert error.fix


def test_half_weights_are_folded_back() -> None:
    proto = small()
    weight = next(t for t in proto.graph.initializer if t.name == "c.weight")
    half = numpy_helper.to_array(weight).astype(np.float16)
    proto.graph.initializer.remove(weight)
    proto.graph.initializer.append(numpy_helper.from_array(half, "c.weight.half"))
    proto.graph.node.insert(0, helper.make_node("Cast", ["c.weight.half"], ["c.weight"], "cast", to=TensorProto.FLOAT))
    model = graph.load(proto.SerializeToString())
    assert ops(model) == {"Conv": 1}
    assert set(model.graph.initializers) == {"c.weight", "c.bias"}
    assert np.array_equal(model.graph.initializers["c.weight"].const_value.numpy(), half.astype(np.float32))


def test_constant_nodes_and_constant_arithmetic_are_folded() -> None:
    net = Net(("a",))
    shape = net.op("Concat", "shape", net.const("head", np.array([1])), net.const("tail", np.array([-1])), axis=0)
    net.op("Constant", "extra", value=numpy_helper.from_array(np.float32(2)))
    net.op("Mul", "twice", "extra", net.const("k", np.full((1, 2, 1, 1), 0.5, np.float32)))
    y = net.op("Mul", "scaled", net.conv("c", "image", 3, 2), "twice")
    model = net.load({"a": net.op("Reshape", "flat", y, shape)})
    assert ops(model) == {"Conv": 1, "Mul": 1, "Reshape": 1}
    # 2 * 0.5 is 1: the product is nothing.
    assert ops(prune(model).model) == {"Conv": 1, "Reshape": 1}


def test_a_huge_constant_is_not_folded() -> None:
    net = Net(("a",))
    huge = net.op("ConstantOfShape", "huge", net.const("shape", np.array([1, 2, 2**13, 2**14])))
    mean = net.op("ReduceMean", "mean", huge, net.const("axes", np.array([2, 3])))
    model = net.load({"a": net.op("Add", "sum", net.conv("c", "image", 3, 2), mean)})
    assert ops(model)["ConstantOfShape"] == 1


def test_what_no_output_needs_is_dropped_unseen() -> None:
    net = Net(("a",))
    net.op("ConstantOfShape", "huge", net.const("shape", np.array([1, 2, 2**20, 2**20])))
    net.op("NonZero", "unknown shape", "image")
    assert ops(net.load({"a": net.conv("c", "image", 3, 2)})) == {"Conv": 1}


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("a tensor of 4 TB", "too large"),
        ("a second input", "does not take one preprocessed image"),
        ("an image of another size", "does not take one preprocessed image"),
        ("a uint8 image", "not valid"),
        ("a float64 weight", "not valid"),
        ("a weight of rank 1", "not valid"),
        ("an output named twice", "named twice"),
        ("an output that is the input", "named twice"),
        ("a task of another kind", "another kind"),
        ("a task named twice", "of its own"),
        ("a site of other tasks", "other tasks"),
        ("no form", "no known form"),
        ("a shape that is claimed only", "another kind|not valid"),
    ],
)
def test_a_graph_that_could_not_run_is_refused_when_it_is_read(kind: str, match: str) -> None:
    net = Net(("a",))
    if kind == "a tensor of 4 TB":
        huge = net.op("ConstantOfShape", "huge", net.const("shape", np.array([1, 2, 2**20, 2**20])))
        mean = net.op("ReduceMean", "mean", huge, net.const("axes", np.array([2, 3])))
        return refused(net.proto({"a": net.op("Add", "sum", net.conv("c", "image", 3, 2), mean)}), match) and None
    proto = small()
    image, weight = proto.graph.input[0], next(t for t in proto.graph.initializer if len(t.dims) == 4)
    about = json.loads(proto.metadata_props[0].value)
    if kind == "a second input":
        proto.graph.input.append(onnx.helper.make_tensor_value_info("second", 1, [1, 3, 8, 8]))
    elif kind == "an image of another size":
        about["preprocess"]["height"] += 1
    elif kind == "a uint8 image":
        image.type.tensor_type.elem_type = onnx.TensorProto.UINT8
    elif kind in ("a float64 weight", "a weight of rank 1"):
        array = onnx.numpy_helper.to_array(weight)
        array = array.astype(np.float64) if "64" in kind else array.ravel()
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    elif kind.startswith("an output"):
        proto.graph.output.append(image if "input" in kind else proto.graph.output[0])
    elif kind == "a task of another kind":
        about["tasks"][0] = {"name": about["tasks"][0]["name"], "kind": "classification", "channels": 7}
    elif kind == "a task named twice":
        about["tasks"].append(about["tasks"][0])
    elif kind == "a site of other tasks":
        about["sites"] = [{"name": "s", "channels": 1, "open": {"else": "1"}}]
    elif kind == "no form":
        del about["form"]
    else:
        for dim in proto.graph.output[0].type.tensor_type.shape.dim:
            dim.dim_value = 5
    proto.metadata_props[0].value = json.dumps(about)
    return refused(proto, match) and None


def test_set_masks_equals_building_with_those_masks() -> None:
    rng = np.random.default_rng(0)
    masks = {site: rng.random((3, count)) < 0.5 for site, count in sites_of("residual", 6).items()}
    model = gated("residual", constant_masks("residual", False))
    before = graph.dump(model)
    changed = set_masks(model, masks)
    assert graph.dump(model) == before
    assert difference(run(gated("residual", masks)), run(changed)) == 0
    assert graph.meta(changed)["sites"] == graph.meta(gated("residual", masks))["sites"]
    part = set_masks(changed, {"s1": np.ones((3, 6), bool)})
    assert graph.meta(part)["sites"][2]["open"] == dict.fromkeys(TASKS, "1" * 6)
    assert graph.meta(part)["sites"][1] == graph.meta(changed)["sites"][1]


def test_set_masks_finds_selects_by_order_when_masks_have_other_names() -> None:
    proto = onnx.load_from_string(graph.dump(gated("chain", constant_masks("chain", False))))
    names = {t.name: f"m{i}" for i, t in enumerate(proto.graph.initializer) if ".mask_" in t.name}
    for tensor in proto.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for item in proto.graph.node:
        item.input[:] = [names.get(name, name) for name in item.input]
    masks = constant_masks("chain", False)
    masks["s1"][1, 2] = True
    changed = set_masks(graph.load(proto.SerializeToString()), masks)
    assert difference(run(gated("chain", masks)), run(changed)) == 0


def test_set_masks_splits_a_mask_that_two_selects_share() -> None:
    proto = onnx.load_from_string(graph.dump(gated("chain", constant_masks("chain", False))))
    for item in proto.graph.node:
        item.input[:] = ["sites.s0.mask_a" if ".mask_" in name and "s2" not in name else name for name in item.input]
    proto = onnx.load_from_string(graph.dump(graph.load(proto.SerializeToString())))
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.replace("sites.", "x.")
    for item in proto.graph.node:
        item.input[:] = [name.replace("sites.", "x.") for name in item.input]
    masks = constant_masks("chain", False)
    masks["s1"][1, 2] = masks["s0"][2, 0] = True
    changed = set_masks(graph.load(proto.SerializeToString()), masks)
    assert difference(run(gated("chain", masks)), run(changed)) == 0


def test_set_masks_refuses() -> None:
    model = gated("chain", constant_masks("chain", False))
    with pytest.raises(InputError, match="no gate site 'nowhere'"):
        set_masks(model, {"nowhere": np.ones((3, 6), bool)})
    with pytest.raises(InputError, match="wrong shape"):
        set_masks(model, {"s1": np.ones((2, 6), bool)})
    about = graph.meta(model)
    about["sites"][0]["open"]["a"] = "1" * 6
    model.metadata_props["igate"] = json.dumps(about)
    with pytest.raises(GraphError, match="does not match the metadata"):
        set_masks(model, {})


def test_close_all_closes_all() -> None:
    closed = close_all(gated("chain", constant_masks("chain", True)))
    assert difference(run(gated("chain", constant_masks("chain", False))), run(closed)) == 0
    assert all(set(bits) == {"0"} for site in graph.meta(closed)["sites"] for bits in site["open"].values())


def test_keep_outputs_drops_what_only_others_need() -> None:
    rng = np.random.default_rng(0)
    masks = {site: rng.random((3, count)) < 0.5 for site, count in sites_of("chain", 6).items()}
    model = gated("chain", masks)
    kept = keep_outputs(model, ["c", "a"])
    assert [value.name for value in kept.graph.outputs] == ["a", "c"]
    assert [spec.name for spec in graph.specs(kept)] == ["a", "c"]
    assert "head.b" not in {node.name for node in kept.graph}
    assert "head.b.weight" not in kept.graph.initializers
    assert list(graph.meta(kept)["sites"][0]["open"]) == ["a", "c"]
    everything = run(model)
    assert difference({name: everything[name] for name in ("a", "c")}, run(kept)) == 0
    assert difference(run(kept), run(prune(kept).model)) <= TOLERANCE
    again = graph.load(graph.dump(kept))
    assert [spec.name for spec in graph.specs(again)] == ["a", "c"]


def test_one_task_needs_the_others_branches_unless_all_is_its_own() -> None:
    """method.md section 3: head a reads the shared map, which mixes all tasks' maps."""
    masks = constant_masks("chain", False)
    masks["s0"][1, 0] = True
    report = prune(keep_outputs(gated("chain", masks), ["a"])).report
    assert report["convs"]["s0.b"]["live"] == 1
    report = prune(keep_outputs(gated("chain", constant_masks("chain", True)), ["a"])).report
    assert [name for name, row in report["convs"].items() if row["live"]] == ["s0.a", "s1.a", "s2.a", "head.a"]


def test_keep_outputs_refuses_unknown_tasks() -> None:
    with pytest.raises(InputError, match="unknown task 'x'.*a, b, c"):
        keep_outputs(gated("chain", constant_masks("chain", False)), ["x"])
    with pytest.raises(InputError):
        keep_outputs(gated("chain", constant_masks("chain", False)), [])


def test_editing_keeps_the_type() -> None:
    assert isinstance(close_all(gated("chain", constant_masks("chain", True))), ir.Model)
