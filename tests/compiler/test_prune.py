"""prune: the static graph answers what the gated graph answers, with exactly the rows that are needed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from gatednets import (
    KINDS,
    TASKS,
    TOLERANCE,
    Net,
    constant_masks,
    convs,
    difference,
    gated,
    layout,
    live,
    ops,
    plain,
    random_masks,
    run,
    sites_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from igate_edge.compiler import graph
from igate_edge.compiler.prune import prune

RELAXED = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])


def node(model: ir.Model, name: str) -> ir.Node:
    return next(item for item in model.graph if item.name == name)


@pytest.mark.parametrize("kind", KINDS)
@RELAXED
@given(share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_pruned_equals_gated(kind: str, share: float, seed: int) -> None:
    model = gated(kind, random_masks(kind, share, seed))
    pruned = prune(model)
    assert difference(run(model), run(pruned.model)) <= TOLERANCE
    assert not pruned.report["barriers"]
    left = ops(pruned.model)
    assert left["Where"] == left["Mul"] == 0
    assert layout(prune(pruned.model).model) == layout(pruned.model)


@pytest.mark.parametrize("kind", KINDS)
def test_all_gates_closed_leave_exactly_the_plain_net(kind: str) -> None:
    pruned, twin = prune(gated(kind, constant_masks(kind, False))).model, plain(kind)
    assert ops(pruned) == ops(twin)
    assert convs(pruned) == convs(twin)
    assert difference(run(twin), run(pruned)) <= TOLERANCE
    weights = {name: value.const_value.numpy() for name, value in pruned.graph.initializers.items()}
    for name, value in twin.graph.initializers.items():
        assert np.array_equal(weights[name], value.const_value.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_all_gates_open_leave_exactly_one_net_a_task(kind: str) -> None:
    pruned, twin = prune(gated(kind, constant_masks(kind, True))).model, plain(kind)
    heads = len(TASKS)
    body = [shape for shape in convs(twin) if shape[0] != 1]
    assert convs(pruned) == sorted(body * len(TASKS) + [shape for shape in convs(twin) if shape[0] == 1])
    expected = {op: len(TASKS) * count for op, count in ops(twin).items()}
    expected["Conv"] = len(TASKS) * (ops(twin)["Conv"] - heads) + heads
    assert dict(ops(pruned)) == expected
    assert not any("shared" in (item.name or "") or (item.name or "").endswith(".mix") for item in pruned.graph)


@pytest.mark.parametrize("kind", ["chain", "residual", "inverted", "dense"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
def test_live_rows_are_those_of_the_formula(kind: str, share: float) -> None:
    masks = random_masks(kind, share, seed=int(share * 100))
    report = prune(gated(kind, masks)).report["convs"]
    for site, mask in masks.items():
        rows = sum(row["live"] for name, row in report.items() if name.rsplit(".", 1)[0] == site)
        assert rows == live(mask), site


def test_live_rows_of_one_layer_by_hand() -> None:
    masks = constant_masks("chain", False)
    # Channel 0: open for all (3 own rows, no shared one); channel 1: for a and b (2 + 1); the other four: shared only.
    masks["s1"][:, 0] = masks["s1"][:2, 1] = True
    report = prune(gated("chain", masks)).report["convs"]
    assert {s: report[f"s1.{s}"]["live"] for s in (*TASKS, "shared")} == {"a": 2, "b": 2, "c": 1, "shared": 1 + 4}
    assert report["s1.a"]["rows"] == 6


def test_an_empty_branch_is_dropped_and_listed() -> None:
    masks = random_masks("chain", 0.5, 3)
    masks["s1"][1] = False
    pruned = prune(gated("chain", masks))
    assert pruned.report["dropped"] == ["s1.b"]
    assert not any((item.name or "").startswith(("s1.b", "pool.b.")) for item in pruned.model.graph)


def test_the_mix_is_a_small_convolution_over_specialised_channels_only() -> None:
    masks = constant_masks("chain", False)
    masks["s1"][0, 2] = masks["s1"][1, 4] = True
    pruned = prune(gated("chain", masks))
    (mix,) = [item for item in pruned.model.graph if (item.name or "").endswith(".mix")]
    assert pruned.report["mixes"] == [mix.name]
    # Two channels are mixed; each reads the shared map and one task's own.
    assert tuple(mix.inputs[1].shape) == (2, 2 + 1 + 1, 1, 1)
    weight = mix.inputs[1].const_value.numpy()
    np.testing.assert_allclose(weight.sum(axis=1), 1, atol=1e-6)
    assert (weight != 0).sum() == 2 + 2


def test_no_mix_where_nobody_reads_the_shared_stream() -> None:
    masks = random_masks("chain", 0.5, 1)
    masks["s1"][:] = masks["s2"][:] = True
    assert prune(gated("chain", masks)).report["mixes"] == []


def test_the_surviving_tensor_keeps_its_name() -> None:
    names = {
        v.name for item in prune(gated("residual", constant_masks("residual", False))).model.graph for v in item.outputs
    }
    assert names == {v.name for item in plain("residual").graph for v in item.outputs}
    masks = random_masks("chain", 0.4, 7)
    names = {v.name for item in prune(gated("chain", masks)).model.graph for v in item.outputs}
    assert {f"s1.{stream}" for stream in (*TASKS, "shared")} <= names
    assert set(TASKS) <= names


def test_prune_is_pure_and_deterministic() -> None:
    model = gated("residual", random_masks("residual", 0.4, 5))
    before = graph.dump(model)
    first = prune(model)
    assert graph.dump(model) == before
    assert graph.dump(first.model) == graph.dump(prune(model).model)
    assert graph.dump(prune(graph.load(before)).model) == graph.dump(first.model)


def test_metadata_stays_and_says_pruned() -> None:
    model = gated("chain", random_masks("chain", 0.4, 5))
    pruned = prune(model)
    assert graph.meta(pruned.model) == {**graph.meta(model), "pruned": True}
    site = graph.meta(model)["sites"][1]
    assert pruned.report["sites"]["s1"] == {"channels": 6, "open": {t: site["open"][t].count("1") for t in TASKS}}


def test_gates_tied_over_a_stage_need_no_gather() -> None:
    rng = np.random.default_rng(0)
    mask = np.tile(rng.random((1, 6)) < 0.4, (3, 1))  # the same channels for all tasks
    pruned = prune(gated("residual", dict.fromkeys(sites_of("residual", 6), mask)))
    assert pruned.report["gathers"] == []
    assert ops(pruned.model)["Gather"] == 0


def test_shared_channels_are_computed_once_even_after_the_select() -> None:
    masks = constant_masks("chain", False)
    masks["s0"][0, 1] = masks["s0"][1, 3] = masks["s1"][:2, 0] = True
    pruned = prune(gated("chain", masks)).model
    pooled = [item.outputs[0].shape[1] for item in pruned.graph if item.op_type == "MaxPool"]
    # Six shared channels, one own channel each of a and b, two mixed ones: nothing twice.
    assert sorted(pooled) == [1, 1, 2, 6]


# --- barriers and the rest ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Softmax", "Transpose", "LRN"])
def test_an_operator_across_channels_is_a_barrier_and_listed(op: str) -> None:
    attributes = {"Softmax": {"axis": 1}, "Transpose": {"perm": [0, 1, 3, 2]}, "LRN": {"size": 3}}[op]
    net, masks = Net(), random_masks("chain", 0.5, 2)
    x = {s: net.conv(f"s0.{s}", "image", 3, 6) for s in (*TASKS, "shared")}
    _, outs = net.site("s0", x["shared"], {t: x[t] for t in TASKS}, masks["s0"])
    ends = {t: net.conv(f"end.{t}", net.op(op, f"x.{t}", outs[t], **attributes), 6, 1) for t in TASKS}
    model = net.load(ends)
    pruned = prune(model)
    assert pruned.report["barriers"] == [[op, f"x.{t}"] for t in TASKS]
    assert difference(run(model), run(pruned.model)) <= TOLERANCE
    assert sum(row["live"] for name, row in pruned.report["convs"].items() if name.startswith("s0")) == live(
        masks["s0"]
    )


def test_channelwise_operators_of_many_kinds() -> None:
    net, rng = Net(), np.random.default_rng(0)
    masks = rng.random((3, 6)) < 0.5
    x = {s: net.conv(f"s0.{s}", "image", 3, 6) for s in (*TASKS, "shared")}
    _, outs = net.site("s0", x["shared"], {t: x[t] for t in TASKS}, masks)
    ends = {}
    for t in TASKS:
        y = net.op("PRelu", f"prelu.{t}", outs[t], net.const("slope", rng.random((6, 1, 1)).astype(np.float32)))
        y = net.op("Clip", f"clip.{t}", y, net.const("low", np.float32(-0.5)), net.const("high", np.float32(2)))
        y = net.op(
            "Pad",
            f"pad.{t}",
            y,
            net.const("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1])),
            net.const("fill", np.float32(0.25)),
        )
        y = net.op("AveragePool", f"pool.{t}", y, kernel_shape=[2, 2], strides=[2, 2])
        sizes = net.const("sizes", np.array([1, 6, 8, 8]))
        y = net.op("Resize", f"up.{t}", y, "", "", sizes, mode="linear", coordinate_transformation_mode="half_pixel")
        gate = net.op("GlobalAveragePool", f"gap.{t}", y)
        gate = net.op("HardSigmoid", f"hs.{t}", net.conv(f"se.{t}", gate, 6, 6, 1))
        y = net.op("Mul", f"scale.{t}", y, gate)
        y = net.op("Sub", f"sub.{t}", y, net.const("shift", rng.random((1, 6, 1, 1)).astype(np.float32)))
        y = net.op("Slice", f"cut.{t}", y, *(net.const(n, np.array([v])) for n, v in (("st", 1), ("en", 6), ("ax", 1))))
        y = net.op("Gather", f"pick.{t}", y, net.const("picked", np.array([4, 2, 2, 0])), axis=1)
        one = net.op("ReduceMax", f"max.{t}", y, net.const("axes", np.array([2, 3])), keepdims=0)
        ends[t] = net.op(
            "Gemm", f"fc.{t}", one, net.noise(f"fc.{t}.w", 3, 4), net.noise(f"fc.{t}.b", 3), transB=1, alpha=0.5
        )
    model = net.load(ends)
    pruned = prune(model)
    assert pruned.report["barriers"] == []
    assert difference(run(model), run(pruned.model)) <= TOLERANCE
    assert layout(prune(pruned.model).model) == layout(pruned.model)


def test_equal_branches_are_one() -> None:
    """A freshly forked net: own rows with the shared weights on the shared input are the shared channel."""
    net = Net()
    weight, bias = net.noise("weight", 6, 3, 3, 3), net.noise("bias", 6)
    x = {s: net.op("Conv", f"c.{s}", "image", weight, bias, pads=[1] * 4) for s in (*TASKS, "shared")}
    _, outs = net.site("s0", x["shared"], {t: x[t] for t in TASKS}, np.random.default_rng(0).random((3, 6)) < 0.5)
    model = net.load(_ends(net, outs))
    pruned = prune(model)
    assert difference(run(model), run(pruned.model)) <= TOLERANCE
    assert ops(pruned.model) == {"Conv": 1 + 3}


def _ends(net: Net, outs: dict[str, str]) -> dict[str, str]:
    return {t: net.conv(f"end.{t}", outs[t], 6, 1) for t in TASKS}


def test_two_tasks_with_one_and_the_same_output() -> None:
    net = Net(("a", "b"))
    y = net.conv("c", "image", 3, 4)
    net.op("Identity", "first", y)
    net.op("Identity", "second", y)
    model = net.load({"a": "first", "b": "second"})
    assert difference(run(model), run(prune(model).model)) == 0


def test_a_select_is_an_output_itself() -> None:
    net = Net()
    x = {s: net.conv(f"s0.{s}", "image", 3, 6) for s in (*TASKS, "shared")}
    _, outs = net.site("s0", x["shared"], {t: x[t] for t in TASKS}, np.random.default_rng(1).random((3, 6)) < 0.5)
    model = net.load(outs)
    assert difference(run(model), run(prune(model).model)) <= TOLERANCE
