"""lay_out: every lowering of every layer computes what the gated graph computes; merged is a plain CNN."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from gatednets import (
    KINDS,
    TASKS,
    TOLERANCE,
    constant_masks,
    convs,
    difference,
    gated,
    joint_masks,
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
from igate_edge.compiler.layout import Laid, lay_out, layers
from igate_edge.compiler.masks import keep_outputs
from igate_edge.compiler.prune import prune
from igate_edge.errors import InputError

RELAXED = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
LOWERINGS = ("merged", "split", "merged:4", "merged:8")
#: Without these, a merged net is a plain CNN.
MOVES = {"Where", "Mul", "Slice", "Gather"}


def choices(model: ir.Model, seed: int) -> dict[str, str]:
    """A lowering a layer, drawn at random."""
    rng = np.random.default_rng(seed)
    return {layer.name: str(rng.choice(LOWERINGS)) for layer in layers(model)}


def node(model: ir.Model, name: str) -> ir.Node:
    return next(item for item in model.graph if item.name == name)


def weight(item: ir.Node) -> np.ndarray:
    return item.inputs[1].const_value.numpy()


def same(model: ir.Model, choice: str | Mapping[str, str] = "merged") -> Laid:
    laid = lay_out(model, choice)
    assert difference(run(model), run(laid.model)) <= TOLERANCE
    return laid


@pytest.mark.parametrize("kind", KINDS)
@RELAXED
@given(share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_any_choice_equals_the_gated_graph(kind: str, share: float, seed: int) -> None:
    model = gated(kind, random_masks(kind, share, seed))
    for choice in ("merged", "split", choices(model, seed)):
        same(model, choice)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grouped"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_merged_is_a_plain_cnn(kind: str, share: float) -> None:
    masks = random_masks(kind, share, 3)
    laid = same(gated(kind, masks))
    left, twin = ops(laid.model), ops(plain(kind))
    assert not MOVES & set(left) and laid.report["mixes"] == laid.report["gathers"] == []
    # Nothing but the 1x1 convolutions that make an operand is added to the plain net's nodes.
    assert left - twin == ({"Conv": len(laid.report["skips"])} if laid.report["skips"] else {})
    assert all(name.endswith(".skip") for name in laid.report["skips"])


@pytest.mark.parametrize("kind", ["residual", "inverted", "dense"])
def test_gates_tied_and_the_same_for_all_tasks_leave_the_plain_nets_nodes(kind: str) -> None:
    laid = same(gated(kind, joint_masks(kind, 0.4, 2)))
    assert ops(laid.model) == ops(plain(kind))
    assert laid.report["skips"] == []


@pytest.mark.parametrize("kind", ["chain", "residual", "dense"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_physical_widths_are_live_values(kind: str, share: float) -> None:
    """A layer's width: every channel's values, 1 unless all tasks open it + 1 for each that does."""
    masks = random_masks(kind, share, 5)
    model = gated(kind, masks)
    widths = {layer.label.rsplit(".", 1)[0]: layer.outputs for layer in layers(model)}
    for site, mask in masks.items():
        assert widths[site] == live(mask), site


def test_layers_of_a_net() -> None:
    model = gated("chain", constant_masks("chain", False))
    first, *_, head = layers(model)
    assert (first.name, first.label, first.kind) == ("s0.shared", "s0.shared", "Conv")
    assert (first.versions, first.mergeable, first.inputs, first.outputs) == (1, False, 3, 6)
    assert (head.name, head.inputs, head.outputs) == ("c", 8, 1)
    masks = joint_masks("chain", 0.5, 1)
    opened = int(masks["s0"][0].sum())
    first, second, *_ = layers(gated("chain", masks))
    assert (first.versions, first.mergeable, first.outputs) == (4, True, 6 + 2 * opened)
    assert second.inputs == first.outputs + opened  # + the mixed maps after the pooling, which does not commute


def test_all_gates_closed_leave_exactly_the_plain_net() -> None:
    for kind in KINDS:
        laid, twin = lay_out(gated(kind, constant_masks(kind, False))).model, plain(kind)
        assert layout(laid) == layout(prune(gated(kind, constant_masks(kind, False))).model)
        weights = {name: value.const_value.numpy() for name, value in laid.graph.initializers.items()}
        for name, value in twin.graph.initializers.items():
            assert np.array_equal(weights[name], value.const_value.numpy())


def test_all_gates_open_merge_one_net_a_task() -> None:
    laid = same(gated("residual", constant_masks("residual", True)))
    body = [shape for shape in convs(plain("residual")) if shape[0] != 1]
    wide = [(3 * o, i if i == 3 else 3 * i, *kernel) for o, i, *kernel in body]
    assert [shape for shape in convs(laid.model) if shape[0] != 1] == sorted(wide)
    # Three nets side by side: of a weight's nine blocks, three are not zero.
    block = weight(node(laid.model, "s1m.a")).reshape(3, 6, 3, 6, 3, 3)
    assert [[bool(block[i, :, j].any()) for j in range(3)] for i in range(3)] == np.eye(3, dtype=bool).tolist()


def test_only_one_task_opens_gates() -> None:
    masks = constant_masks("residual", False)
    for site in masks:
        masks[site][1, :3] = True
    model = gated("residual", masks)
    for choice in ("merged", "split"):
        same(model, choice)


def test_blocks_name_all_that_is_not_zero() -> None:
    laid = same(gated("residual", joint_masks("residual", 0.4, 2)))
    merged = [item for item in laid.model.graph if "igate.blocks" in item.metadata_props]
    assert len(merged) == 5  # all but the heads
    for item in merged:
        kernel, covered = weight(item), np.zeros(weight(item).shape[:2], bool)
        for block in json.loads(item.metadata_props["igate.blocks"]):
            (start, stop) = block["rows"]
            for first, last in block["columns"]:
                covered[start:stop, first:last] = True
                assert kernel[start:stop, first:last].any()
        assert not kernel[~covered].any()
        assert item.inputs[0].name == "image" or not covered.all()
    mask = joint_masks("residual", 0.4, 2)["s1"][0]
    shared, own = int((~mask).sum()), int(mask.sum())
    blocks = json.loads(merged[1].metadata_props["igate.blocks"])
    rows = [shared + own * index for index in range(4)]
    assert [block["rows"] for block in blocks] == [[0, shared], *([start, start + own] for start in rows[:3])]
    # The shared rows read the mix of all own maps; a task's rows read the shared maps and its own.
    assert blocks[0]["columns"] == [[0, shared + 3 * own]]
    assert blocks[2]["columns"] == [[0, shared], [shared + own, shared + 2 * own]]


@pytest.mark.parametrize("step", [4, 8, 16])
def test_padding_fills_up_with_zeros(step: int) -> None:
    masks = joint_masks("residual", 0.4, 2)
    model = gated("residual", masks)
    bare, laid = lay_out(model), lay_out(model, pad=step)
    assert difference(run(model), run(laid.model)) <= TOLERANCE
    assert ops(laid.model) == ops(bare.model)
    for item in laid.model.graph:
        if item.op_type == "Conv" and item.name != "a":
            width, full = len(weight(node(bare.model, item.name))), len(weight(item))
            head = item.name.startswith("head") or item.outputs[0].name in TASKS
            assert full == (width if head else -(-width // step) * step)
            assert laid.report["padded"].get(item.name, 0) == full - width
            dead = ~weight(item).reshape(full, -1).any(axis=1)
            assert dead.sum() == full - width
            assert not item.inputs[2].const_value.numpy()[dead].any()
    named = lay_out(model, {layer.name: f"merged:{step}" for layer in layers(model)})
    assert layout(named.model) == layout(laid.model)


def test_a_skip_with_zeros_in_it_still_leads() -> None:
    model = gated("residual", joint_masks("residual", 0.4, 2))
    laid = same(model, {"s0.shared": "merged:32"})
    assert laid.report["skips"] == []
    assert {len(weight(node(laid.model, name))) for name in ("s0.shared", "s1.shared", "s2.shared")} == {32}


@pytest.mark.parametrize(
    ("choice", "text"),
    [("dense", "unknown lowering 'dense'"), ("split:4", "split:4"), ("merged:0", "merged:0"), ("merged:x", "merged:x"),
     ("merged:" + "9" * 5000, "unknown lowering")],
)  # fmt: skip
def test_an_unknown_lowering_is_refused(choice: str, text: str) -> None:
    model = plain("chain")
    with pytest.raises(InputError, match=text):
        lay_out(model, choice)
    with pytest.raises(InputError, match=text):
        lay_out(model, {layers(model)[0].name: choice})


@pytest.mark.parametrize("choice", [{1: "split"}, {None: "split", "a": "split"}])
def test_a_choice_names_its_layers(choice: Any) -> None:
    with pytest.raises(InputError, match="a choice names its layers"):
        lay_out(plain("chain"), choice)


@pytest.mark.parametrize("pad", [0, -1, 257, 1.5, "16", None])
def test_an_impossible_padding_is_refused(pad: Any) -> None:
    with pytest.raises(InputError, match=f"a multiple of {pad!r}"):
        lay_out(plain("chain"), pad=pad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_for_all_is_a_choice_for_each(kind: str) -> None:
    """Depthwise convolutions follow what they read: they have no choice of their own."""
    model = gated(kind, random_masks(kind, 0.4, 7))
    for choice in ("merged", "split", "merged:8"):
        named = lay_out(model, {layer.name: choice for layer in layers(model)})
        assert graph.dump(named.model) == graph.dump(lay_out(model, choice).model)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(InputError, match=r"no layer of this name.*nowhere; known: .*s0\.shared"):
        lay_out(plain("chain"), {"nowhere": "merged"})


def test_a_choice_for_some_layers_leaves_the_rest_merged() -> None:
    model = gated("chain", random_masks("chain", 0.4, 7))
    laid = same(model, {"s1.shared": "split"})
    assert laid.report["layers"] == {
        "s0.shared": "merged",
        "s1.shared": "split",
        "s2.shared": "merged",
    } | dict.fromkeys(TASKS, "merged")
    names = {item.name for item in laid.model.graph}
    assert {f"s1.{stream}" for stream in (*TASKS, "shared")} <= names
    assert len({f"s2.{stream}" for stream in (*TASKS, "shared")} & names) == 1


def test_a_seam_needs_no_gather() -> None:
    masks = joint_masks("residual", 0.4, 2)
    model = gated("residual", masks)
    names = [layer.name for layer in layers(model)]
    for cut in range(1, len(names)):
        for early, late in (("merged", "split"), ("split", "merged")):
            laid = same(model, {name: early if i < cut else late for i, name in enumerate(names)})
            assert laid.report["gathers"] == []


def test_split_stacks_branches_that_read_the_same_input() -> None:
    masks = random_masks("chain", 0.5, 3)
    masks["s1"][1] = False
    model = gated("chain", masks)
    laid = same(model, "split")
    stems = [item for item in laid.model.graph if item.op_type == "Conv" and item.inputs[0].name == "image"]
    assert [len(weight(item)) for item in stems] == [live(masks["s0"])]
    assert not [item for item in laid.model.graph if item.name == "s1.b"]
    assert len([item for item in prune(model).model.graph if item.inputs[0].name == "image"]) == 4


def test_a_skip_that_holds_more_than_is_added_is_read_as_it_is() -> None:
    """Task c is not asked for, so its own sums are not made at the end: zero rows stand there instead of a node."""
    masks = {site: np.zeros((3, 12), bool) for site in sites_of("residual", 12)}
    for mask in masks.values():
        mask[:, :2] = True
    model = gated("residual", masks, 12)
    assert same(model).report["padded"] == {}
    laid = same(keep_outputs(model, ["a", "b"]))
    assert laid.report["skips"] == [] and ops(laid.model)["Add"] == 2
    assert laid.report["padded"] == {"s2.shared": 2}
    kernel = weight(node(laid.model, "s2.shared"))
    assert kernel.shape[:2] == (10 + 3 * 2, 10 + 3 * 2)  # the shared rows still read the mix with c's maps
    assert kernel[:-2].reshape(14, -1).any(axis=1).all() and not kernel[-2:].any()


def test_a_skip_that_lacks_a_value_is_made_by_one_convolution() -> None:
    """Channel 0 is one shared map before the block and three own maps behind it: the sum reads that map three times."""
    masks = constant_masks("residual", False)
    masks["s1"][:, 0] = True
    laid = same(gated("residual", masks))
    assert laid.report["skips"] == ["s1.shared.sum.skip", "s2.shared.sum.skip"]
    kernel = weight(node(laid.model, "s1.shared.sum.skip"))
    assert kernel.shape == (5 + 3, 6, 1, 1)
    assert kernel.sum() == (kernel != 0).sum() == 8
    # Behind the next block channel 0 is one shared map again: the mix of the three.
    kernel = weight(node(laid.model, "s2.shared.sum.skip"))
    assert kernel.shape == (6, 8, 1, 1) and (kernel != 0).sum() == 5 + 3
    np.testing.assert_allclose(kernel.sum(axis=1), 1, atol=1e-6)


def test_a_mix_in_front_of_a_pooling_is_made_by_one_convolution() -> None:
    masks = joint_masks("chain", 0.5, 1)
    laid = same(gated("chain", masks))
    assert laid.report["skips"] == ["pool.shared.skip"]
    kernel = weight(node(laid.model, "pool.shared.skip"))
    mask = masks["s0"][0]
    assert kernel.shape == (live(masks["s0"]) + mask.sum(), live(masks["s0"]), 1, 1)
    np.testing.assert_allclose(kernel.sum(axis=1), 1, atol=1e-6)


def test_layout_is_pure_deterministic_and_idempotent() -> None:
    for choice, masks in (("merged", joint_masks("residual", 0.4, 5)), ("split", random_masks("residual", 0.4, 5))):
        model = gated("residual", masks)
        before = graph.dump(model)
        first = lay_out(model, choice)
        assert graph.dump(model) == before
        assert graph.dump(first.model) == graph.dump(lay_out(graph.load(before), choice).model)
        assert layout(lay_out(first.model, choice).model) == layout(first.model)


def test_metadata_and_outputs_stay() -> None:
    model = gated("chain", random_masks("chain", 0.4, 5))
    laid = lay_out(model)
    assert graph.meta(laid.model) == {**graph.meta(model), "pruned": True}
    assert [value.name for value in laid.model.graph.outputs] == list(TASKS)
    graph.load(graph.dump(laid.model))
