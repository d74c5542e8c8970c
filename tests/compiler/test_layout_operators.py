"""lay_out: every operator that stands between convolutions, in every lowering."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from gatednets import TASKS, TOLERANCE, Net, cycle, difference, joint_masks, ops, random_masks, run

from igate_edge.compiler.layout import Laid, lay_out


def same(model: ir.Model, choice: str | Mapping[str, str] = "merged") -> Laid:
    laid = lay_out(model, choice)
    assert difference(run(model), run(laid.model)) <= TOLERANCE
    return laid


@pytest.mark.parametrize(("op", "skips"), [("AveragePool", 0), ("LpPool", 1)])
def test_the_average_of_a_mix_is_the_mix_of_averages(op: str, skips: int) -> None:
    net, masks = Net(), joint_masks("chain", 0.5, 1)
    maps = {s: net.conv(f"s0.{s}", "image", 3, 6) for s in (*TASKS, "shared")}
    mixed, outs = net.site("s0", maps["shared"], {t: maps[t] for t in TASKS}, masks["s0"])
    for s, value in {**outs, "shared": mixed}.items():
        y = net.op(op, f"pool.{s}", value, kernel_shape=[2, 2], strides=[2, 2])
        maps[s] = net.conv(f"s1.{s}", y, 6, 6)
    _, outs = net.site("s1", maps["shared"], {t: maps[t] for t in TASKS}, masks["s1"])
    model = net.load({t: net.conv(f"end.{t}", outs[t], 6, 1) for t in TASKS})
    laid = same(model)
    assert len([name for name in laid.report["skips"] if name.startswith("pool")]) == skips
    same(model, "split")


def test_equal_branches_are_one() -> None:
    net = Net()
    kernel, bias = net.noise("weight", 6, 3, 3, 3), net.noise("bias", 6)
    x = {s: net.op("Conv", f"c.{s}", "image", kernel, bias, pads=[1] * 4) for s in (*TASKS, "shared")}
    _, outs = net.site("s0", x["shared"], {t: x[t] for t in TASKS}, np.random.default_rng(0).random((3, 6)) < 0.5)
    model = net.load({t: net.conv(f"end.{t}", outs[t], 6, 1) for t in TASKS})
    for choice in ("merged", "split"):
        assert ops(same(model, choice).model) == {"Conv": 1 + 3}


@pytest.mark.parametrize("op", ["Softmax", "Transpose", "LRN"])
@pytest.mark.parametrize("choice", ["merged", "split", "merged:8"])
def test_a_barrier_reads_what_it_read(op: str, choice: str) -> None:
    attributes = {"Softmax": {"axis": 1}, "Transpose": {"perm": [0, 1, 3, 2]}, "LRN": {"size": 3}}[op]
    net, masks = Net(), random_masks("chain", 0.5, 2)
    x = {s: net.conv(f"s0.{s}", "image", 3, 6) for s in (*TASKS, "shared")}
    mixed, outs = net.site("s0", x["shared"], {t: x[t] for t in TASKS}, masks["s0"])
    maps = {**outs, "shared": mixed}
    y = {s: net.conv(f"s1.{s}", net.op(op, f"x.{s}", maps[s], **attributes), 6, 6) for s in maps}
    _, outs = net.site("s1", y["shared"], {t: y[t] for t in TASKS}, masks["s1"])
    model = net.load({t: net.conv(f"end.{t}", outs[t], 6, 1) for t in TASKS})
    laid = same(model, choice)
    assert sorted(laid.report["barriers"]) == sorted([op, f"x.{s}"] for s in maps)


@pytest.mark.parametrize("choice", ["merged", "split", "merged:8"])
def test_a_select_between_a_map_and_a_function_of_it(choice: str) -> None:
    same(cycle(), choice)


@pytest.mark.parametrize("choice", ["merged", "split", "merged:8"])
def test_norms_of_their_own_in_every_version(choice: str) -> None:
    """Norm before convolution: one shared map has another norm in every branch."""
    net, rng = Net(), np.random.default_rng(0)
    masks = random_masks("chain", 0.4, 2)
    maps = {s: net.conv(f"s0.{s}", "image", 3, 6) for s in (*TASKS, "shared")}
    mixed, outs = net.site("s0", maps["shared"], {t: maps[t] for t in TASKS}, masks["s0"])
    maps = {**outs, "shared": mixed}
    for s, value in maps.items():
        stats = [net.const(f"bn.{s}.{n}", rng.random(6).astype(np.float32) + 0.5) for n in ("g", "b", "m", "v")]
        y = net.op("Relu", f"relu.{s}", net.op("BatchNormalization", f"bn.{s}", value, *stats))
        maps[s] = net.conv(f"s1.{s}", y, 6, 6)
    _, outs = net.site("s1", maps["shared"], {t: maps[t] for t in TASKS}, masks["s1"])
    model = net.load({t: net.conv(f"end.{t}", outs[t], 6, 1) for t in TASKS})
    laid = same(model, choice)
    if choice == "merged":
        assert ops(laid.model) == {"Conv": 2 + 1 + 3, "BatchNormalization": 1, "Relu": 1}


@pytest.mark.parametrize("choice", ["merged", "split", "merged:8"])
def test_heads_that_flatten(choice: str) -> None:
    net, masks = Net(), random_masks("chain", 0.4, 2)
    x = {s: net.op("Relu", f"r.{s}", net.conv(f"s0.{s}", "image", 3, 6)) for s in (*TASKS, "shared")}
    _, outs = net.site("s0", x["shared"], {t: x[t] for t in TASKS}, masks["s0"])
    ends = {}
    for t in TASKS:
        y = net.op("Flatten", f"flat.{t}", net.op("GlobalAveragePool", f"gap.{t}", outs[t]))
        ends[t] = net.op("Gemm", f"fc.{t}", y, net.noise(f"fc.{t}.w", 4, 6), net.noise(f"fc.{t}.b", 4), transB=1)
    laid = same(net.load(ends), choice)
    if choice == "merged":
        assert ops(laid.model) == {"Conv": 1, "Relu": 1, "GlobalAveragePool": 1, "Flatten": 1, "Gemm": 3}


@pytest.mark.parametrize("choice", ["merged", "split", "merged:8"])
def test_squeeze_and_excite_and_other_channelwise_operators(choice: str) -> None:
    net, masks = Net(), random_masks("chain", 0.4, 2)
    x = {s: net.conv(f"s0.{s}", "image", 3, 6) for s in (*TASKS, "shared")}
    mixed, outs = net.site("s0", x["shared"], {t: x[t] for t in TASKS}, masks["s0"])
    maps = {**outs, "shared": mixed}
    for s, y in maps.items():
        y = net.op("PRelu", f"prelu.{s}", y, net.noise(f"slope.{s}", 6, 1, 1))
        gate = net.op(
            "HardSigmoid", f"hs.{s}", net.conv(f"se.{s}", net.op("GlobalAveragePool", f"gap.{s}", y), 6, 6, 1)
        )
        y = net.op("Mul", f"scale.{s}", y, gate)
        y = net.op("Resize", f"up.{s}", y, "", net.const("scales", np.array([1, 1, 2, 2], np.float32)), mode="nearest")
        maps[s] = net.conv(f"s1.{s}", y, 6, 6)
    _, outs = net.site("s1", maps["shared"], {t: maps[t] for t in TASKS}, masks["s1"])
    same(net.load({t: net.conv(f"end.{t}", outs[t], 6, 1) for t in TASKS}), choice)


@pytest.mark.parametrize("op", ["Identity", "Relu"])
def test_a_constant_in_a_mix_meets_its_padding(op: str) -> None:
    """A map that is a constant for one task: the mix is part constant, and zero padding must not see it."""
    net = Net(("a", "b"))
    one = net.op("Relu", "r", net.conv("c", "image", 3, 6))
    psi = net.op("Relu", "s", net.conv("d", "image", 3, 6))
    flat = net.const("flat", np.full((1, 6, 8, 8), 0.75, np.float32))
    mask = np.array([[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0]], bool)
    mixed, outs = net.site("s", psi, {"a": one, "b": flat}, mask)
    end = net.conv("end.b", net.conv("mixed", net.op(op, "x", mixed), 6, 4), 4, 1)
    model = net.load({"a": net.conv("end.a", outs["a"], 6, 1), "b": end})
    for choice in ("merged", "split"):
        same(model, choice)
