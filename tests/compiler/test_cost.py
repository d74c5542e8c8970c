"""cost: counts as arithmetic, and nothing unknown counted silently."""

from __future__ import annotations

import numpy as np
from gatednets import TASKS, Net, constant_masks, gated, plain

from igate_edge.compiler.cost import count, useful
from igate_edge.compiler.prune import close_all, keep_outputs, prune


def one(build) -> tuple[int, int]:
    net = Net(("a",), size=28)
    cost = count(net.load({"a": build(net)}))
    assert cost.unknown == []
    return cost.macs, cost.params


def test_convolution() -> None:
    assert one(lambda n: n.conv("c", "image", 3, 32, 3, strides=[2, 2])) == (
        3 * 3 * 3 * 32 * 14 * 14,
        3 * 3 * 3 * 32 + 32,
    )


def test_convolution_of_a_convolution() -> None:
    macs, params = one(lambda n: n.conv("d", n.conv("c", "image", 3, 16, 3, strides=[2, 2]), 16, 32))
    assert macs == 3 * 3 * 3 * 16 * 14 * 14 + 3 * 3 * 16 * 32 * 14 * 14
    assert params == (3 * 3 * 3 * 16 + 16) + (3 * 3 * 16 * 32 + 32)


def test_depthwise_and_grouped_convolutions_count_their_group_only() -> None:
    macs, _ = one(lambda n: n.conv("d", n.conv("c", "image", 3, 16, 1), 16, 16, 3, group=16))
    assert macs == 3 * 16 * 28 * 28 + 3 * 3 * 1 * 16 * 28 * 28
    macs, _ = one(lambda n: n.conv("d", n.conv("c", "image", 3, 16, 1), 16, 8, 3, group=4))
    assert macs == 3 * 16 * 28 * 28 + 3 * 3 * 4 * 8 * 28 * 28


def test_transposed_convolution_counts_by_its_input() -> None:
    def build(net: Net) -> str:
        return net.op("ConvTranspose", "t", "image", net.noise("w", 3, 5, 2, 2), strides=[2, 2])

    assert one(build) == (28 * 28 * 3 * 5 * 2 * 2, 3 * 5 * 2 * 2)


def test_matrices() -> None:
    def gemm(net: Net) -> str:
        flat = net.op("Flatten", "f", net.op("GlobalAveragePool", "g", "image"))
        return net.op("Gemm", "fc", flat, net.noise("w", 10, 3), net.noise("bias", 10), transB=1)

    def matmul(net: Net) -> str:
        flat = net.op("Flatten", "f", net.op("GlobalAveragePool", "g", "image"))
        return net.op("MatMul", "fc", flat, net.noise("w", 3, 10))

    assert one(gemm) == (3 * 10, 3 * 10 + 10)
    assert one(matmul) == (3 * 10, 3 * 10)


def test_a_weight_read_twice_counts_once() -> None:
    def build(net: Net) -> str:
        weight = net.noise("w", 3, 3, 1, 1)
        return net.op("Conv", "d", net.op("Conv", "c", "image", weight), weight)

    assert one(build) == (2 * 3 * 3 * 28 * 28, 3 * 3)


def test_an_unknown_operator_is_listed() -> None:
    net = Net(("a",))
    cost = count(net.load({"a": net.op("LRN", "x", net.conv("c", "image", 3, 4, 1), size=3)}))
    assert cost.unknown == ["LRN"]
    assert cost.macs == 3 * 4 * 8 * 8
    assert cost.as_json() == {"macs": cost.macs, "params": 3 * 4 + 4, "head_macs": 0, "unknown": ["LRN"]}


def test_nodes_add_up_and_say_where() -> None:
    cost = count(plain("chain", 6))
    assert sum(node.macs for node in cost.nodes) == cost.macs
    assert sum(node.params for node in cost.nodes) == cost.params
    first = cost.nodes[0]
    assert (first.name, first.op, first.out_shape) == ("s0.shared", "Conv", (1, 6, 8, 8))
    assert (first.macs, first.params) == (3 * 3 * 3 * 6 * 8 * 8, 3 * 3 * 3 * 6 + 6)


def test_heads_are_told_from_the_encoder_by_their_weights() -> None:
    net = Net(("a",))
    model = net.load({"a": net.conv("heads.a.out", net.conv("branches.shared.c", "image", 3, 4), 4, 2, 1)})
    cost = count(model)
    assert cost.head_macs == 4 * 2 * 8 * 8
    assert cost.macs - cost.head_macs == 3 * 3 * 3 * 4 * 8 * 8


def test_closed_gates_cost_the_plain_net_and_open_ones_three_nets() -> None:
    shared = plain("residual")
    assert count(prune(gated("residual", constant_masks("residual", False))).model).macs == count(shared).macs
    opened = count(prune(gated("residual", constant_masks("residual", True))).model)
    single = [count(keep_outputs(shared, [task])) for task in TASKS]
    assert opened.macs == sum(cost.macs for cost in single)
    assert opened.params == sum(cost.params for cost in single)


def test_cost_of_one_specialised_channel() -> None:
    masks = constant_masks("chain", False)
    base = count(prune(gated("chain", masks)).model).macs
    masks["s2"][0, 0] = True  # one row of the last layer, for task a: 6 inputs, 3x3, 4x4 pixels
    model = gated("chain", masks)
    # Nobody reads the last site's mix. The head of a reads the shared tensor whole: a zero column, not a slice.
    assert count(prune(model).model).macs == base + 3 * 3 * 6 * 4 * 4 + 1 * 4 * 4
    assert count(prune(close_all(model)).model).macs == base


def test_the_dense_gated_graph_counts_all_branches() -> None:
    dense, shared = count(gated("chain", constant_masks("chain", False))), count(plain("chain"))
    heads = 3 * 8 * 1 * 4 * 4
    assert dense.macs == (len(TASKS) + 1) * (shared.macs - heads) + heads
    assert dense.unknown == []


def test_types_are_plain_integers() -> None:
    cost = count(plain("inverted"))
    assert type(cost.macs) is int
    assert type(cost.params) is int
    assert not any(isinstance(node.macs, np.integer) for node in cost.nodes)


def test_zero_blocks_are_not_useful() -> None:
    net = Net(("a",), size=28)
    net.conv("c", "image", 3, 8, 3, strides=[2, 2])
    net.weights["c.weight"][:2, 1] = 0  # 2 of the 24 pairs of channels
    net.weights["c.weight"][5, 2, 0] = 0  # a part of a kernel is not a block
    model = net.load({"a": "c"})
    assert useful(model) == 3 * 3 * (24 - 2) * 14 * 14 and count(model).macs == 3 * 3 * 24 * 14 * 14
