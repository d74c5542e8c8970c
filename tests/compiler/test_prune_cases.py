"""prune: the faults of other pruners (cases.md, group 1), one test each."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from gatednets import TASKS, TOLERANCE, Net, constant_masks, difference, gated, layout, ops, random_masks, run

from igate_edge.compiler.prune import prune
from igate_edge.errors import GraphError


def node(model: ir.Model, name: str) -> ir.Node:
    return next(item for item in model.graph if item.name == name)


def test_p1_a_channel_masked_behind_a_norm_is_a_constant_and_padding_is_exact() -> None:
    net = Net(("a",))
    y = net.conv("c1", "image", 3, 8)
    mask = np.array([1, 0, 1, 0, 1, 0, 1, 0], np.float32).reshape(1, 8, 1, 1)
    y = net.op("Mul", "masked", y, net.const("mask", mask))
    ones = np.ones(8, np.float32)
    stats = [
        net.const(f"bn.{n}", a) for n, a in (("scale", ones), ("beta", ones * 0.5), ("mean", ones * 0), ("var", ones))
    ]
    y = net.op("Relu", "relu", net.op("BatchNormalization", "bn", y, *stats))
    model = net.load({"a": net.conv("c2", y, 8, 1)})
    pruned = prune(model)
    assert difference(run(model), run(pruned.model)) <= TOLERANCE
    assert pruned.report["convs"]["c1"] == {"op": "Conv", "rows": 8, "live": 4}
    # The four dead channels are one channel of ones: 4 + 1 columns, and no mask is left.
    assert tuple(node(pruned.model, "c2").inputs[1].shape) == (1, 5, 3, 3)
    assert ops(pruned.model)["Mul"] == 0
    assert layout(prune(pruned.model).model) == layout(pruned.model)


def test_p3_a_map_concatenated_with_itself() -> None:
    masks = random_masks("chain", 0.5, 11)
    net = Net()
    x = {s: net.op("Relu", f"r.{s}", net.conv(f"s0.{s}", "image", 3, 6)) for s in (*TASKS, "shared")}
    z = net.conv("z", "image", 3, 2)
    _, outs = net.site("s0", x["shared"], {t: x[t] for t in TASKS}, masks["s0"])
    ends = {}
    for task in TASKS:
        joined = net.op("Concat", f"cat.{task}", outs[task], outs[task], z, axis=1)
        net.op("Split", f"split.{task}", joined, net.const(f"sizes.{task}", np.array([9, 5])), outputs=2, axis=1)
        left = net.conv(f"left.{task}", f"split.{task}.0", 9, 2, 1)
        right = net.conv(f"right.{task}", f"split.{task}.1", 5, 2)
        ends[task] = net.op("Add", f"end.{task}", left, right)
    model = net.load(ends)
    pruned = prune(model)
    assert difference(run(model), run(pruned.model)) <= TOLERANCE
    # The left convolution reads channels 0-5 and again 0-2: six columns, equal ones added up.
    weight = node(pruned.model, "left.a").inputs[1].const_value.numpy()
    original = net.weights["left.a.weight"]
    assert weight.shape == (2, 6, 1, 1)
    assert sorted(weight.sum(axis=0).ravel().round(5)) == sorted(
        (original[:, :6] + np.pad(original[:, 6:9], ((0, 0), (0, 3), (0, 0), (0, 0)))).sum(axis=0).ravel().round(5)
    )


def test_p4_depthwise_shrinks_as_one_set() -> None:
    masks = constant_masks("inverted", True)
    masks["s1"][0, :5] = masks["s2"][0, :5] = False  # task a reads 5 of 12 channels from the shared branch
    pruned = prune(gated("inverted", masks)).model
    own = node(pruned, "s2.a")
    assert own.attributes["group"].as_int() == 7
    assert tuple(own.inputs[1].shape) == (7, 1, 3, 3)
    assert own.inputs[0].shape[1] == own.outputs[0].shape[1] == 7
    shared = node(pruned, "s2.shared")
    assert (shared.attributes["group"].as_int(), tuple(shared.inputs[1].shape)) == (5, (5, 1, 3, 3))


def grouped(dead: list[int]) -> tuple[ir.Model, dict]:
    """conv 3->8, grouped conv g=4 8->8, then a 1x1 that cannot see the `dead` channels."""
    net = Net(("a",))
    y = net.conv("g", net.conv("c", "image", 3, 8), 8, 8, 3, group=4)
    mask = np.ones((1, 8, 1, 1), np.float32)
    mask[:, dead] = 0
    model = net.load({"a": net.conv("end", net.op("Mul", "masked", y, net.const("mask", mask)), 8, 1, 1)})
    pruned = prune(model)
    assert difference(run(model), run(pruned.model)) <= TOLERANCE
    return pruned.model, pruned.report


def test_p4_a_whole_dead_group_goes() -> None:
    model, report = grouped([2, 3])
    assert tuple(node(model, "g").inputs[1].shape) == (6, 2, 3, 3)
    assert node(model, "g").attributes["group"].as_int() == 3
    assert report["convs"]["c"]["live"] == 6  # and so do its inputs
    assert report["whole"] == []


def test_p4_an_equal_count_of_each_group_goes() -> None:
    model, report = grouped([0, 3, 5, 6])
    assert tuple(node(model, "g").inputs[1].shape) == (4, 2, 3, 3)
    assert report["whole"] == []


def test_p4_unequal_groups_keep_their_rows_and_are_listed() -> None:
    model, report = grouped([0])
    assert tuple(node(model, "g").inputs[1].shape) == (8, 2, 3, 3)
    assert report["whole"] == ["g"]
    assert report["convs"]["g"] == {"op": "Conv", "rows": 8, "live": 7}


def test_p5_a_convolution_to_one_channel_is_not_depthwise() -> None:
    net = Net(("depth",))
    y = net.conv("c", "image", 3, 8)
    mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32).reshape(1, 8, 1, 1)
    model = net.load({"depth": net.conv("end", net.op("Mul", "m", y, net.const("mask", mask)), 8, 1)})
    pruned = prune(model).model
    assert tuple(node(pruned, "end").inputs[1].shape) == (1, 5, 3, 3)
    assert run(pruned)["depth"].shape == (1, 1, 8, 8)
    assert difference(run(model), run(pruned)) <= TOLERANCE


@pytest.mark.parametrize("place", ["chain", "residual", "all"])
def test_p6_zero_live_channels(place: str) -> None:
    net = Net(("a",))
    x = net.op("Relu", "r0", net.conv("c0", "image", 3, 4))
    y = net.conv("c1", x, 4, 4)
    y = net.op("Relu", "r1", net.op("Mul", "m", y, net.const("mask", np.zeros((1, 4, 1, 1), np.float32))))
    y = net.conv("c2", y, 4, 4)  # a constant: its bias
    if place == "residual":
        y = net.op("Add", "sum", y, x)
    y = net.op("Relu", "r2", y)
    if place == "all":
        model = net.load({"a": y})
    else:
        model = net.load({"a": net.conv("end", y, 4, 1)})
    pruned = prune(model)
    assert difference(run(model), run(pruned.model)) <= TOLERANCE
    assert pruned.report["convs"]["c1"]["live"] == 0
    assert "c1" not in {item.name for item in pruned.model.graph}


def test_p6_a_task_that_uses_only_the_shared_branch_in_the_middle() -> None:
    masks = constant_masks("residual", True)
    masks["s1m"][:] = masks["s1"][:] = False
    model = gated("residual", masks)
    pruned = prune(model)
    assert difference(run(model), run(pruned.model)) <= TOLERANCE
    assert set(pruned.report["dropped"]) >= {"s1m.a", "s1.a", "s2.shared"}


@pytest.mark.parametrize("flatten", ["Flatten", "Reshape"])
def test_p7_flatten_expands_channels_to_columns(flatten: str) -> None:
    net = Net(("a",), size=6)
    y = net.conv("c", "image", 3, 6, 3, strides=[3, 2])  # [1, 6, 2, 3]
    mask = np.array([1, 0, 1, 1, 0, 1], np.float32).reshape(1, 6, 1, 1)
    y = net.op("Mul", "m", y, net.const("mask", mask))
    if flatten == "Flatten":
        y = net.op("Flatten", "flat", y)
    else:
        y = net.op("Reshape", "flat", y, net.const("shape", np.array([1, 36])))
    y = net.op("Gemm", "fc", y, net.noise("fc.weight", 36, 5), net.noise("fc.bias", 5))
    model = net.load({"a": y})
    pruned = prune(model)
    assert difference(run(model), run(pruned.model)) <= TOLERANCE
    assert tuple(node(pruned.model, "fc").inputs[1].shape) == (5, 4 * 2 * 3)
    assert pruned.report["convs"]["c"]["live"] == 4
    assert layout(prune(pruned.model).model) == layout(pruned.model)


def test_p7_a_reshape_that_mixes_channels_is_a_barrier() -> None:
    net = Net(("a",))
    y = net.op(
        "Mul", "m", net.conv("c", "image", 3, 4), net.const("k", np.array([1, 0, 1, 1], np.float32).reshape(1, 4, 1, 1))
    )
    y = net.op("Reshape", "shuffle", y, net.const("shape", np.array([1, 2, 16, 8])))
    model = net.load({"a": net.conv("end", y, 2, 1)})
    pruned = prune(model)
    assert pruned.report["barriers"] == [["Reshape", "shuffle"]]
    assert difference(run(model), run(pruned.model)) <= TOLERANCE


def test_p8_a_residual_sum_keeps_the_union() -> None:
    net = Net(("a",))
    masks = [np.array(m, np.float32).reshape(1, 4, 1, 1) for m in ([1, 1, 0, 0], [0, 0, 1, 1])]
    left, right = (
        net.op("Mul", f"m{i}", net.conv(f"c{i}", "image", 3, 4), net.const(f"k{i}", mask))
        for i, mask in enumerate(masks)
    )
    model = net.load({"a": net.conv("end", net.op("Add", "sum", left, right), 4, 1)})
    pruned = prune(model)
    assert difference(run(model), run(pruned.model)) <= TOLERANCE
    assert {name: row["live"] for name, row in pruned.report["convs"].items()} == {"c0": 2, "c1": 2, "end": 1}
    assert tuple(node(pruned.model, "end").inputs[1].shape) == (1, 4, 3, 3)
    assert ops(pruned.model)["Add"] == 0  # disjoint halves: the sum is their concatenation


@pytest.mark.parametrize("index", [8, -9])
def test_a_gather_of_channels_that_do_not_exist_is_refused(index: int) -> None:
    net = Net(("a",))
    y = net.conv("c1", "image", 3, 8)
    y = net.op("Gather", "picked", y, net.const("at", np.array([0, index])), axis=1)
    model = net.load({"a": net.conv("c2", y, 2, 1)})
    with pytest.raises(GraphError, match=f"channels that do not exist: node .picked.* asks for .0, {index}. of 8"):
        prune(model)
