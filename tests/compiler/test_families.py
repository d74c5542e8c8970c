"""families: the versions of a value are found from the graph alone, and the layers come in an order of execution."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from gatednets import KINDS, TASKS, Net, cycle, gated, plain, random_masks

from igate_edge.compiler.families import families
from igate_edge.compiler.lanes import is_constant

STREAMS = ("shared", *TASKS)


def executable(model: ir.Model) -> None:
    """Every node comes once, after all that it reads."""
    found = families(model)
    known = {value.name for value in model.graph.inputs}
    for layer in found.layers:
        ready = set(known)
        for node in layer.nodes:
            read = {value.name for value in node.inputs if value is not None and not is_constant(value)}
            assert read <= (known if layer.joins else ready)
            known.update(value.name for value in node.outputs)
    nodes = [node for layer in found.layers for node in layer.nodes]
    assert len(nodes) == len(set(nodes)) == len(list(model.graph))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_net_has_a_family_a_value_and_a_layer_a_node(kind: str) -> None:
    model = plain(kind)
    found = families(model)
    assert all(name == family for name, family in found.of.items())
    assert [layer.nodes for layer in found.layers] == [(node,) for node in model.graph]
    executable(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_net_has_the_layers_of_its_plain_net(kind: str) -> None:
    model = gated(kind, random_masks(kind, 0.4, 1))
    layers = [layer for layer in families(model).layers if not layer.joins]
    expected = [node.op_type for node in plain(kind).graph]
    if kind == "dense":  # behind the last site nothing says that the tasks' concatenations are versions of one
        expected += ["Concat"] * (len(TASKS) - 1)
    assert sorted(layer.nodes[0].op_type for layer in layers) == sorted(expected)
    assert {len(layer.nodes) for layer in layers} == {len(STREAMS), 1}  # 1: a head, and what it alone reads
    assert not any(layer.alone for layer in layers)
    executable(model)


def test_names_and_order_are_those_of_the_shared_version_first() -> None:
    found = families(gated("chain", random_masks("chain", 0.4, 1)))
    first = found.layers[0]
    assert [node.name for node in first.nodes] == [f"s0.{stream}" for stream in STREAMS]
    assert first.name == "s0.shared"
    assert (
        {found.of[f"s0.{s}.relu"] for s in STREAMS} == {found.of[f"s0.{t}.where"] for t in TASKS} == {"s0.shared.relu"}
    )
    assert found.of["image"] == "image"


def test_the_families_do_not_depend_on_the_masks() -> None:
    one, other = (families(gated("residual", random_masks("residual", share, 1))) for share in (0.0, 0.7))
    assert one.of == other.of


def test_versions_that_depend_on_each_other_stand_alone() -> None:
    model = cycle()
    alone = {layer.nodes[0].name for layer in families(model).layers if layer.alone}
    # x and z are joined, so are the convolutions before them: c0 reads other channels than c2, c1 lies between.
    assert {"x", "z"} <= alone
    assert "end" not in alone and "c0" not in alone
    executable(model)


def test_a_learned_scale_joins_nothing() -> None:
    net = Net(("a",))
    x = net.conv("c0", "image", 3, 4)
    y = net.op("Mul", "y", x, net.const("k", np.array([0.5, 1.5, -1, 1], np.float32).reshape(1, 4, 1, 1)))
    model = net.load({"a": net.conv("end", y, 4, 1)})
    assert families(model).of["y"] == "y"


def test_versions_of_other_shapes_are_other_layers() -> None:
    net = Net(("a", "b"))
    wide = net.conv("wide", "image", 3, 6, 3)
    narrow = net.conv("narrow", "image", 3, 6, 1)
    mask = net.const("mask", (np.arange(6) < 3).reshape(1, 6, 1, 1))
    picked = net.op("Where", "w", mask, wide, narrow)
    model = net.load({t: net.conv(f"end.{t}", picked, 6, 1) for t in ("a", "b")})
    found = families(model)
    assert found.of["wide"] == found.of["narrow"] == found.of["w"] == "narrow"  # the select's else-branch is shared
    assert [[node.name for node in layer.nodes] for layer in found.layers][:2] == [["wide"], ["narrow"]]
