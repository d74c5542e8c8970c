"""half: FP16 for what is not INT8, and for nothing else; the numbers stay what they were."""

from __future__ import annotations

import int8_nets
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from igate_edge.compiler import calibrate, lint, quantize
from igate_edge.compiler.half import half
from igate_edge.errors import InputError


def _int8(name: str) -> tuple[ir.Model, int8_nets.Net]:
    model, net = int8_nets.NETS[name]()
    return quantize.quantize(model, calibrate.calibrate(model, net.frames(4)), "trt"), net


def _halves(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph if node.outputs[0].dtype == ir.DataType.FLOAT16}


def _types(model: ir.Model) -> list[tuple]:
    return [(v.name, v.dtype, tuple(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


@pytest.mark.parametrize("name", sorted(int8_nets.NETS))
def test_a_float_model_computes_in_fp16_between_fp32_ends(name: str) -> None:
    model, net = int8_nets.NETS[name]()
    made = half(model)
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert {n.op_type for n in made.graph if n.outputs[0].dtype == ir.DataType.FLOAT} == {"Cast"}
    assert [one for one in lint.lint(made) if one.severity == "error"] == []
    assert [t[:2] for t in _types(made)] == [t[:2] for t in _types(model)]
    before, after = (int8_nets.run(m, net.frames(1, seed=5)[0], optimise=False) for m in (model, made))
    for task, array in before.items():
        # FP16 keeps 11 bits: layers of some hundred products stay within 2^-9 of the largest value.
        assert np.abs(after[task] - array).max() <= 2**-9 * np.abs(array).max(), task
        assert not np.array_equal(after[task], array) and after[task].dtype == np.float32


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet", {"Cast", "Resize", "Concat", "GlobalAveragePool", "Flatten"}),
        ("mobile", {"Cast", "GlobalAveragePool", "Flatten"}),
    ],
)
def test_what_fuses_into_int8_stays(name: str, expected: set[str]) -> None:
    source, net = _int8(name)
    made = half(source)
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert _halves(made) == expected
    # Q and DQ read and make what they did: TensorRT's fusions see the same pattern.
    for op in ("QuantizeLinear", "DequantizeLinear"):
        assert sum(n.op_type == op for n in made.graph) == sum(n.op_type == op for n in source.graph)
    for node in made.graph:
        if node.op_type in ("Conv", "Gemm"):
            makers = [value.producer().op_type for value in node.inputs[:2]]
            assert makers == ["DequantizeLinear"] * 2 and node.outputs[0].dtype == ir.DataType.FLOAT, node.name
    image = net.frames(1, seed=5)[0]
    before, after = (int8_nets.run(m, image, optimise=False) for m in (source, made))
    for task, array in before.items():
        # FP16 is finer than the INT8 grid around it, so at most a few steps change.
        assert np.abs(after[task] - array).max() <= 0.02 * np.abs(array).max(), task


def test_the_source_is_not_changed() -> None:
    model, _ = int8_nets.resnet()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    half(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_constant_beyond_fp16_keeps_its_node_in_fp32() -> None:
    net = int8_nets.Net(size=8)
    weight = np.full((4, 3, 1, 1), 70000.0)  # FP16 ends at 65504
    first = net.conv("image", 4, k=1, weight=weight, name="large")
    made = half(net.model(net.conv(first, 2, k=1, act=None, name="end")))
    kinds = {node.name: node.outputs[0].dtype for node in made.graph if node.op_type == "Conv"}
    assert sorted(kinds.values()) == [ir.DataType.FLOAT, ir.DataType.FLOAT16]
    assert all(np.isfinite(v.const_value.numpy()).all() for v in made.graph.initializers.values())


def test_a_task_that_another_layer_reads_keeps_its_name_and_type() -> None:
    net = int8_nets.Net(size=8)
    inner = net.act(net.conv("image", 4, act=None), "Sigmoid", name="inner")
    made = half(net.model(inner, net.act(inner, "Sigmoid", name="outer")))
    assert [(v.name, v.dtype) for v in made.graph.outputs] == [
        ("inner", ir.DataType.FLOAT),
        ("outer", ir.DataType.FLOAT),
    ]
    assert set(int8_nets.run(made, net.frames(1)[0])) == {"inner", "outer"}


def test_a_name_that_is_taken_is_not_taken_again() -> None:
    """A constant called like another's FP16 twin stays what it is."""
    net = int8_nets.Net(size=8)
    rng = np.random.default_rng(1)
    first = net.conv("image", 4, k=1, weight=rng.normal(size=(4, 3, 1, 1)), name="a")
    large = np.full((2, 4, 1, 1), 70000.0)  # beyond FP16: it stays, under its own name
    model = net.model(net.act(net.conv(first, 2, k=1, act=None, weight=large, name="b"), "Sigmoid", name="end"))
    frame = net.frames(1)[0]
    plain = int8_nets.run(half(model), frame)
    weights = {node.name: node.inputs[1] for node in model.graph if node.op_type == "Conv"}
    a, b = list(weights.values())
    model.graph.initializers.pop(b.name)
    b.name = f"{a.name}_half"
    model.graph.initializers[b.name] = b
    made = half(model)
    names = [value.name for node in made.graph for value in node.outputs] + list(made.graph.initializers)
    assert len(names) == len(set(names))
    for name, array in int8_nets.run(made, frame).items():
        assert np.array_equal(array, plain[name])


@pytest.mark.parametrize("wrong", [None, b"model", 5, "model.onnx"])
def test_what_is_no_model_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match="not a model"):
        half(wrong)  # type: ignore[arg-type]
