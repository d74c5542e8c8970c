"""The networks that the benchmarks time are what they say: gates, widths, MACs, batches, layers. Tiny ones here."""

from __future__ import annotations

import judging
import numpy as np
import onnx_ir as ir
import pytest
import subjects
import timing

from igate_edge.compiler import cost, graph

WIDTH, SIZE = 16, (32, 32)


@pytest.fixture(scope="module")
def gated() -> ir.Model:
    return subjects.gated(WIDTH, SIZE)


@pytest.fixture(scope="module")
def ours(gated: ir.Model) -> subjects.Built:
    chosen = subjects.gates(gated, subjects.joint(gated, 1 / 8))
    return subjects.build(chosen, "merged", subjects.useful_macs(chosen))


def test_joint_gates_are_the_same_for_all_tasks_and_can_fill_a_step(gated: ir.Model) -> None:
    widths = sorted({mask.shape[1] for mask in subjects.joint(gated, 1 / 8).values()})
    assert widths == [16, 32, 64, 128]
    for name, mask in subjects.joint(gated, 1 / 8).items():
        assert mask.sum(1).tolist() == [mask.shape[1] // 8] * 3, name
    coarse = {mask.shape[1]: int(mask[0].sum()) for mask in subjects.joint(gated, 1 / 8, granule=4).values()}
    assert coarse == {16: 0, 32: 4, 64: 8, 128: 16}, "half a granule is none"
    for mask in subjects.joint(gated, 1 / 5, step=16).values():
        assert (mask.shape[1] + 2 * mask[0].sum()) % 16 == 0
    early = subjects.joint(gated, (1 / 4, 0, 0, 0))
    assert {mask.shape[1] for mask in early.values() if mask.any()} == {16}


def test_scattered_gates_are_tied_only_when_asked(gated: ir.Model) -> None:
    tied, free = (subjects.scattered(gated, 0.4, 0, tied=tied) for tied in (True, False))
    groups = [sites for sites in subjects.groups(gated).values() if len(sites) > 1]
    assert groups
    for sites in groups:
        first, other = (site["name"] for site in sites[:2])
        assert np.array_equal(tied[first], tied[other]) and not np.array_equal(free[first], free[other])
    assert 0.35 < np.mean([mask.mean() for mask in free.values()]) < 0.45


def test_no_branch_equals_another_so_open_gates_cost_something(gated: ir.Model, ours: subjects.Built) -> None:
    plain = int(cost.count(subjects.plain(WIDTH, SIZE)).macs)
    assert 1.1 * plain < ours.useful < 1.3 * plain < ours.macs < 1.6 * plain
    judging.same_operators(judging.operators(ours.model), judging.operators(subjects.plain(WIDTH, SIZE)))


@pytest.mark.slow
def test_the_dense_net_has_nearly_the_macs_asked_for() -> None:
    plain = subjects.plain(subjects.BASE[0], SIZE)
    assert subjects.backbone_macs((1, 1, 1, 1), SIZE) == 27 * 256 + 9 * 4 * (64 + 16 + 4 + 1) + 16 + 4 + 1
    wanted = int(1.25 * cost.count(plain).macs)
    dense = subjects.dense(wanted, SIZE)
    assert cost.count(dense).macs == pytest.approx(wanted, rel=0.03)
    counts = {weight.shape[0] for name, weight in _weights(dense).items() if name.startswith("backbone")}
    assert all(count % 16 == 0 for count in counts)
    assert graph.specs(dense) == graph.specs(plain)


def _weights(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy() for name, value in model.graph.initializers.items() if len(value.shape) == 4
    }


def test_batches_answer_row_by_row(ours: subjects.Built) -> None:
    frame = subjects.image(SIZE)
    four = subjects.ort.open(subjects.rebatch(ours.int8, 4))
    assert four.shape == (4, 3, *SIZE)
    judging.same_rows(ours.session.run, {4: four.run}, frame)


def test_every_layer_is_timed_in_both_precisions(ours: subjects.Built) -> None:
    seen = timing.layer_us({"int8": ours.int8, "float": ours.floats}, subjects.image(SIZE), rounds=3)
    layers = subjects.layers(ours.model, seen["int8"], seen["float"])
    judging.all_layers(layers, subjects.conv_macs(ours.model), share=0.95)
    assert sum(pair[0] for pair in layers.values()) <= sum(seen["int8"].values())
    assert sum(pair[1] for pair in layers.values()) <= sum(seen["float"].values())
