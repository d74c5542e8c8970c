"""channels: which channels are equal, and which are needed."""

from __future__ import annotations

import numpy as np
import pytest
from gatednets import TASKS, Net, gated, sites_of

from igate_edge.compiler.channels import Channels, analyse
from igate_edge.compiler.numbers import Numbers


def masks(rows: list[str]) -> np.ndarray:
    return np.array([[bit == "1" for bit in row] for row in rows])


def site_net(mask: np.ndarray) -> tuple[Net, dict[str, str], str]:
    net, channels = Net(), mask.shape[1]
    x = {s: net.conv(f"c.{s}", "image", 3, channels) for s in (*TASKS, "shared")}
    mixed, outs = net.site("s", x["shared"], {t: x[t] for t in TASKS}, mask)
    return net, outs, mixed


def result(net: Net, outputs: dict[str, str]) -> Channels:
    return analyse(net.load(outputs))


def test_a_select_has_the_numbers_of_what_it_selects() -> None:
    net, outs, mixed = site_net(masks(["1100", "1000", "1010"]))
    ids = result(net, {"a": net.conv("end", mixed, 4, 1), "b": outs["b"]}).ids
    own, shared = ids["c.a"], ids["c.shared"]
    assert ids["s.a.where"].tolist() == [own[0], own[1], shared[2], shared[3]]
    assert ids["b"].tolist() == [ids["c.b"][0], *shared[1:]]


def test_a_mix_of_one_map_is_that_map() -> None:
    net, _, mixed = site_net(masks(["1100", "1000", "1010"]))
    found = result(net, {"a": net.conv("end", mixed, 4, 1)})
    mix, shared = found.ids["s.c.add"], found.ids["c.shared"]
    assert [m == s for m, s in zip(mix, shared, strict=True)] == [False, False, False, True]
    assert len(found.numbers.forms[int(mix[0])]) == 3  # all open: three own maps
    assert (
        len(found.numbers.forms[int(mix[1])]) == 2
    )  # one open: its own map and the shared one, whose weights are added


def test_linear_forms_are_canonical_and_equal_up_to_order() -> None:
    table = Numbers()
    x, y = table.new(2).tolist()
    first, second, third = table.combine([{x: 0.25, y: 0.75}, {y: 0.75, x: 0.25}, {x: 0.75, y: 0.25}]).tolist()
    assert first == second != third


@pytest.mark.parametrize(
    ("weight", "same"), [(1.0, True), (1 - 5e-7, True), (1 + 5e-7, True), (0.999, False), (1.001, False)]
)
def test_a_weight_of_one_is_the_identity_within_a_millionth(weight: float, same: bool) -> None:
    table = Numbers()
    (x,) = table.new(1).tolist()
    assert bool(table.combine([{x: weight}])[0] == x) is same


def test_no_term_is_zero_and_constants_add_up() -> None:
    table = Numbers()
    (x,) = table.new(1).tolist()
    zero, one, half = table.combine([{x: 0.0}, {0: 1.0}, {0: 0.5}]).tolist()
    assert (table.constants[zero], table.constants[one], table.constants[half]) == (0.0, 1.0, 0.5)


def test_equal_rows_on_equal_inputs_are_equal() -> None:
    net = Net()
    rows = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    one = net.op("Conv", "one", "image", net.const("w1", rows), pads=[1] * 4)
    two = net.op("Conv", "two", "image", net.const("w2", rows[[2, 0, 3]]), pads=[1] * 4)
    apart = net.op("Conv", "apart", "image", net.const("w3", rows), pads=[0] * 4)
    ids = result(net, {"a": one, "b": two, "c": apart}).ids
    assert ids["b"].tolist() == ids["a"][[2, 0, 3]].tolist()
    assert not set(ids["c"]) & set(ids["a"])  # another attribute


def test_rows_that_differ_in_one_weight_or_in_the_bias_are_not_equal() -> None:
    net = Net()
    rows = np.zeros((3, 3, 3, 3), np.float32)
    rows[1, 1, 1, 1] = 1e-7
    y = net.op(
        "Conv", "c", "image", net.const("w", rows), net.const("bias", np.array([0, 0, 1], np.float32)), pads=[1] * 4
    )
    assert len(set(result(net, {"a": y}).ids["a"])) == 3


def test_elementwise_results_of_equal_channels_are_equal() -> None:
    net, outs, _ = site_net(masks(["1100", "1000", "1010"]))
    ends = {task: net.op("Relu", f"relu.{task}", outs[task]) for task in TASKS}
    ids = result(net, ends).ids
    assert ids["a"][3] == ids["b"][3] == ids["c"][3]
    assert ids["a"][2] == ids["b"][2] != ids["c"][2]


def test_sums_commute_differences_do_not() -> None:
    net = Net(("a", "b", "c", "d"))
    x, y = net.conv("x", "image", 3, 2), net.conv("y", "image", 3, 2)
    ends = {"a": net.op("Add", "p", x, y), "b": net.op("Add", "q", y, x), "c": net.op("Sub", "r", x, y)}
    ends["d"] = net.op("Sub", "s", y, x)
    ids = result(net, ends).ids
    assert ids["a"].tolist() == ids["b"].tolist()
    assert not set(ids["c"]) & set(ids["d"])


def test_concat_split_slice_and_gather_move_numbers() -> None:
    net = Net(("a", "b", "c"))
    x = net.conv("x", "image", 3, 4)
    joined = net.op("Concat", "cat", x, "image", x, axis=1)
    net.op("Split", "parts", joined, net.const("sizes", np.array([5, 6])), outputs=2, axis=1)
    cut = net.op(
        "Slice",
        "cut",
        joined,
        *(net.const(n, np.array([v])) for n, v in (("st", -1), ("en", -4), ("ax", 1), ("by", -1))),
    )
    picked = net.op("Gather", "picked", joined, net.const("at", np.array([0, 7, -1])), axis=1)
    ids = result(net, {"a": "parts.1", "b": cut, "c": picked}).ids
    x_ids, image = ids["x"].tolist(), ids["image"].tolist()
    assert ids["cat"].tolist() == x_ids + image + x_ids
    assert ids["parts.0"].tolist() == [*x_ids, image[0]]
    assert ids["a"].tolist() == [*image[1:], *x_ids]
    assert ids["b"].tolist() == x_ids[:0:-1]
    assert ids["c"].tolist() == [x_ids[0], x_ids[0], x_ids[3]]


def test_constants_run_through_elementwise_operators_but_not_through_padding() -> None:
    net = Net(("a", "b", "c"))
    zero = net.op("Mul", "off", net.conv("x", "image", 3, 2), net.const("k", np.zeros((1, 2, 1, 1), np.float32)))
    two = net.op("Relu", "relu", net.op("Add", "two", zero, net.const("t", np.full((1, 2, 1, 1), 2, np.float32))))
    padded = net.op("AveragePool", "pool", two, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
    conv = net.conv("end", zero, 2, 1)
    found = result(net, {"a": two, "b": padded, "c": conv})
    value = found.numbers.constants
    assert [value[number] for number in found.ids["a"]] == [2.0, 2.0]
    assert found.ids["b"][0] not in value
    assert value[int(found.ids["c"][0])] == net.weights["end.bias"][0]  # zeros are zero at the border too
    assert not found.live[found.ids["x"]].any()


def test_liveness_is_the_union_over_all_readers() -> None:
    net = Net(("a", "b"))
    x = net.conv("x", "image", 3, 5)
    cut = {
        t: net.op("Gather", f"g.{t}", x, net.const(f"at.{t}", np.array(at)), axis=1)
        for t, at in (("a", [0, 2]), ("b", [2, 3]))
    }
    found = result(net, {t: net.conv(f"end.{t}", cut[t], 2, 1) for t in ("a", "b")})
    assert found.live[found.ids["x"]].tolist() == [True, False, True, True, False]


@pytest.mark.parametrize("kind", ["chain", "residual"])
def test_a_dead_branch_has_no_live_channel(kind: str) -> None:
    closed = {site: np.zeros((3, count), bool) for site, count in sites_of(kind, 6).items()}
    found = analyse(gated(kind, closed))
    assert not any(found.live[found.ids[f"{site}.{task}"]].any() for site in closed for task in TASKS)
    assert all(found.live[found.ids[f"{site}.shared"]].all() for site in closed)


def test_barriers_are_listed_and_need_all_their_inputs() -> None:
    net = Net(("a",))
    x = net.conv("x", "image", 3, 4)
    soft = net.op("Softmax", "soft", x, axis=1)
    cut = net.op("Gather", "g", soft, net.const("at", np.array([1])), axis=1)
    found = result(net, {"a": cut})
    assert found.barriers == [("Softmax", "soft")]
    assert found.live[found.ids["x"]].all()


def test_channels_of_a_stage_are_sorted_so_that_gates_lie_together() -> None:
    pattern = masks(["101001", "101001", "101001"])
    found = analyse(gated("residual", dict.fromkeys(sites_of("residual", 6), pattern)))
    ranks = found.order["s1.shared"]
    assert np.argsort(ranks).tolist() == [1, 3, 4, 0, 2, 5]  # shared channels first, each part in its old order
    assert (
        found.order["s0.shared"].tolist() == ranks.tolist() == found.order["s2.a"].tolist()
    )  # one order for the stage
