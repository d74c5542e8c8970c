"""tensorrt-rtx acceptance (not TensorRT, not Orin): our graphs are taken, known bad ones never reach the builder."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import gatednets
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from igate_edge.bundle import Bundle
from igate_edge.compiler import calibrate, graph, lint, quantize
from igate_edge.compiler.half import half
from igate_edge.compiler.layout import lay_out
from igate_edge.engines import tensorrt_rtx as rtx
from igate_edge.errors import CheckFailed, GraphError, InputError, UnavailableError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tabletop.igate"


def _installed() -> bool:
    try:
        rtx.probe()
    except UnavailableError:
        return False
    return True


builds = pytest.mark.skipif(not _installed(), reason="TensorRT-RTX is not installed: pip install 'igate-edge[rtx]'")


def accepted(model: ir.Model) -> rtx.Acceptance:
    found = rtx.check(graph.dump(model))
    assert found.accepted, str(found)
    return found


def _net(tasks: int, granule: int, share: float = 0.3, width: int = 64) -> ir.Model:
    """Three gated layers of `width` channels, gates in groups of `granule` channels."""
    net = gatednets.Net([f"t{index}" for index in range(tasks)], size=16)
    rng = np.random.default_rng([tasks, granule])
    streams = [*net.tasks, "shared"]
    maps, channels = dict.fromkeys(streams, "image"), 3
    for site in ("s0", "s1", "s2"):
        for stream in streams:
            y = net.conv(f"{site}.{stream}", maps[stream], channels, width)
            maps[stream] = net.op("Relu", f"{site}.{stream}.relu", y)
        # The same channels for all tasks: no lowering then needs a Gather.
        mask = np.repeat(rng.random((1, width // granule)) < share, granule, axis=1).repeat(tasks, axis=0)
        mixed, outs = net.site(site, maps["shared"], {task: maps[task] for task in net.tasks}, mask)
        maps, channels = {**outs, "shared": mixed}, width
    return net.load({task: net.conv(f"head.{task}", maps[task], width, 2, 1) for task in net.tasks})


NETS = [
    (tasks, granule, choice)
    for tasks, granule in ((1, 16), (2, 1), (2, 32), (3, 1), (3, 8), (3, 16), (3, 32), (4, 16), (5, 8), (5, 32))
    for choice in ("merged", "split")
] + [(3, 8, "merged:32"), (4, 1, "mixed")]


@builds
@pytest.mark.parametrize(("tasks", "granule", "choice"), NETS)
def test_gated_nets_of_every_lowering_are_accepted(tasks: int, granule: int, choice: str) -> None:
    model = _net(tasks, granule)
    how = {"s0.shared": "split", "s1.shared": "merged", "s2.shared": "split"} if choice == "mixed" else choice
    laid = lay_out(model, how).model
    rng = np.random.default_rng(0)
    frames = [rng.random((1, 3, 16, 16), np.float32) for _ in range(3)]
    int8 = quantize.quantize(laid, calibrate.calibrate(laid, frames), "trt")
    assert accepted(half(int8)).layers > 0


@builds
def test_the_example_is_accepted_in_int8_and_fp16_and_rebuilds_to_the_same_bytes() -> None:
    from igate_edge import builder

    bundle = Bundle.read(EXAMPLE)
    laid = lay_out(builder.networks(bundle)[0], "merged")
    int8 = half(quantize.quantize(laid.model, builder.ranges_for(bundle, laid)[0], "trt"))
    first, again = accepted(int8), accepted(int8)
    assert first.plan_sha256 == again.plan_sha256 and first.plan_bytes > 1e5
    fp16 = accepted(half(laid.model))
    assert fp16.plan_sha256 != first.plan_sha256 and fp16.layers < first.layers


# --- what our lint refuses ---------------------------------------------------------------------------------


def _model(nodes: list, arrays: dict[str, np.ndarray]) -> bytes:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 16, 4, 4))
    out = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)]
    inits = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    made = helper.make_graph(nodes, "g", [image], out, inits)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("made.up", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=9).SerializeToString()


def _conv(scale=0.1, zero=0, kind=np.int8, axis: int | None = None, bias=None) -> bytes:
    """Q, DQ and a convolution with INT8 weights; `bias`: the type of a bias behind its own DequantizeLinear."""
    more = {} if axis is None else {"axis": axis}
    scale = np.asarray(scale, np.float32)
    arrays = {"s": scale, "z": np.full(scale.shape, zero, kind)}
    arrays |= {"w": np.full((16, 16, 1, 1), 100, np.int8), "ws": np.full(16, 0.01, np.float32)}
    arrays |= {"wz": np.zeros(16, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"], name="Q", **more),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"], name="DQ", **more),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], name="W", axis=0),
    ]
    inputs = ["x", "wd"]
    if bias is not None:
        arrays |= {"b": np.ones(16, bias), "bs": np.full(16, 0.001, np.float32)}
        nodes.append(helper.make_node("DequantizeLinear", ["b", "bs"], ["bd"], name="B", axis=0))
        inputs.append("bd")
    return _model([*nodes, helper.make_node("Conv", inputs, ["y"], name="conv")], arrays)


def _dynamic_scale() -> bytes:
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["s"], keepdims=0),
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"], name="Q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="DQ"),
    ]
    return _model(nodes, {"z": np.int8(0)})


def _mixed_types() -> bytes:
    cast = helper.make_node("Cast", ["image"], ["h"], to=TensorProto.FLOAT16)
    return _model([cast, helper.make_node("Add", ["image", "h"], ["y"], name="add")], {})


def _qlinear() -> bytes:
    arrays = {"s": np.float32(0.1), "z": np.int8(0), "w": np.ones((16, 16, 1, 1), np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        helper.make_node("QLinearConv", ["q", "s", "z", "w", "s", "z", "s", "z"], ["c"], name="conv"),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"]),
    ]
    return _model(nodes, arrays)


def _gather() -> bytes:
    node = helper.make_node("Gather", ["image", "i"], ["y"], name="pick", axis=1)
    return _model([node], {"i": np.arange(16)[::-1].copy()})


def _unknown() -> bytes:
    return _model([helper.make_node("Swish", ["image"], ["y"], name="act", domain="made.up")], {})


NEGATIVE = {
    "non-zero zero point": (lambda: _conv(zero=3), "IG101", "Q"),
    "UINT8": (lambda: _conv(kind=np.uint8), "IG102", "Q"),
    "negative scale": (lambda: _conv(scale=-0.1), "IG103", "Q"),
    "per-channel activation scale": (lambda: _conv(scale=np.full(16, 0.1), axis=1), "IG104", "Q"),
    "INT32 bias": (lambda: _conv(bias=np.int32), "IG106", "B"),
    "mixed types": (_mixed_types, "IG119", "add"),
    "QLinearConv": (_qlinear, "IG105", "conv"),
    "unknown operator": (_unknown, "IG107", "act"),
    "dynamic scale": (_dynamic_scale, "IG117", "Q"),
    "gather on channels": (_gather, "IG108", "pick"),
}


@pytest.mark.parametrize("case", sorted(NEGATIVE))
def test_known_bad_graphs_never_reach_a_builder(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, code, node = NEGATIVE[case]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a builder was started"))
    found = rtx.check(make())
    assert not found.accepted and found.by == "lint"
    assert (code, node) in {(one.code, one.node) for one in found.refusals}
    assert lint.CODES[code]
    with pytest.raises(CheckFailed, match=f"the graph is refused by lint: .*{code} at {node}"):
        found.require("the graph")


# --- what is no pass ---------------------------------------------------------------------------------------


def _answering(monkeypatch: pytest.MonkeyPatch, code: int, answer: dict | None, said: bytes = b"") -> rtx.Acceptance:
    """`check` of a good graph with another process in the builder's place."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        if answer is not None:
            Path(command[-1]).write_text(json.dumps(answer))
        return subprocess.CompletedProcess(command, code, b"", said)

    monkeypatch.setattr(rtx, "probe", lambda: {"version": "0"})
    monkeypatch.setattr(subprocess, "run", run)
    return rtx.check(_conv())


EMPTY = {"errors": [], "messages": [], "layers": 5, "plan_bytes": 0, "plan_sha256": ""}
DRIVER = "ERROR: CUDA initialization failure with error 35. Please check your CUDA installation"


def test_an_abort_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _answering(monkeypatch, -6, None, b"terminate called\nCuda Runtime (no driver): error 35\n")
    assert not found.accepted
    assert [str(one) for one in found.refusals] == [
        "ABORTED: the builder's process ended by signal 6: terminate called"
    ]


def test_an_answer_before_an_abort_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {**EMPTY, "plan_bytes": 9, "plan_sha256": "0" * 64}
    assert _answering(monkeypatch, 0, good).accepted
    assert not _answering(monkeypatch, -11, good).accepted


def test_a_missing_driver_is_neither_pass_nor_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _answering(monkeypatch, 0, {**EMPTY, "messages": [DRIVER]})
    assert not found.accepted and str(found.refusals[0]) == "NO_PLAN: the builder gave no plan and no reason"
    found = _answering(monkeypatch, 0, {**EMPTY, "messages": ["ERROR: layer c has no implementation", DRIVER]})
    assert str(found.refusals[0]) == "NO_PLAN: ERROR: layer c has no implementation"


def test_a_library_that_does_not_load_is_the_environments_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="does not load: OSError: libx.so"):
        _answering(monkeypatch, 3, None, b"OSError: libx.so\n")


def test_a_builder_that_hangs_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, float(str(options["timeout"])))

    monkeypatch.setattr(rtx, "probe", lambda: {"version": "0"})
    monkeypatch.setattr(subprocess, "run", run)
    assert str(rtx.check(_conv(), seconds=7).refusals[0]) == "TIMEOUT: no plan after 7 s"


def test_wrong_use() -> None:
    with pytest.raises(GraphError, match="not an ONNX model"):
        rtx.check(b"\xff\xff\xff")
    with pytest.raises(InputError, match=r"8\.7.*known: 7\.5, 8\.0, 8\.6"):
        rtx.check(_conv(), compute="8.7")


@pytest.mark.parametrize("model", [None, "model.onnx", b"", b"x" * 10, _conv()[:60], 5])
def test_what_is_no_model_never_reaches_a_builder(model: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(GraphError, match="not an ONNX model"):
        rtx.check(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [None, "300", 0, -1, float("nan"), float("inf"), True])
def test_a_time_limit_that_is_none(seconds: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(InputError, match="not a time limit"):
        rtx.check(_conv(), seconds=seconds)  # type: ignore[arg-type]


def test_another_build_of_the_package_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "tensorrt-rtx-cu12":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.7"

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", version)
    assert rtx.probe()["version"] == "1.7"


def test_the_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"igate-edge\[rtx\]"):
        rtx.check(_conv())


@builds
def test_what_the_parser_refuses_is_named_with_code_and_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint, "refusals", lambda model: [])
    found = rtx.check(_conv(zero=3))
    assert not found.accepted and found.by.startswith("TensorRT-RTX 1.")
    assert found.refusals[0].code == "INVALID_NODE" and "zero" in found.refusals[0].message.lower()
