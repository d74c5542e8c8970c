"""`igate build --check tensorrt-rtx` and `--onnx`: what they write, what they say, and their exit codes."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from igate_command import igate, refused

from igate_edge import acceptance
from igate_edge.bundle import Bundle
from igate_edge.compiler import lint
from igate_edge.engines import tensorrt_rtx
from igate_edge.errors import UnavailableError

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tabletop.igate"
TAKEN = tensorrt_rtx.Acceptance(True, "TensorRT-RTX 0", (), 5, 9, "0" * 64)
REFUSED = tensorrt_rtx.Acceptance(False, "TensorRT-RTX 0", (tensorrt_rtx.Refusal("INVALID_NODE", "conv", "bad"),))


def test_both_graphs_are_strongly_typed_and_clean() -> None:
    made = acceptance.models(Bundle.read(EXAMPLE))
    counts = {}
    for name, data in made.items():
        model = onnx.load_from_string(data)
        assert lint.refusals(ir.from_proto(model)) == []
        assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {1}
        counts[name] = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    assert counts["int8"] > 20 and counts["half"] == 0


@pytest.mark.parametrize(("second", "code"), [(TAKEN, 0), (REFUSED, 1)])
def test_either_refusal_is_exit_code_1(second: tensorrt_rtx.Acceptance, code: int, monkeypatch) -> None:
    answers = iter([TAKEN, second])
    monkeypatch.setattr(tensorrt_rtx, "probe", lambda: {"version": "0"})
    monkeypatch.setattr(tensorrt_rtx, "check", lambda data: next(answers))
    done = igate("build", EXAMPLE, "--check", "tensorrt-rtx", "--json")
    document = done.json
    assert done.code == code
    assert document["accepted"] is (code == 0) and document["int8"]["accepted"] is True
    assert document["half"]["accepted"] is (code == 0)


def test_a_refusal_is_said_with_code_and_node(monkeypatch) -> None:
    monkeypatch.setattr(tensorrt_rtx, "probe", lambda: {"version": "0"})
    monkeypatch.setattr(tensorrt_rtx, "check", lambda data: REFUSED)
    done = igate("build", EXAMPLE, "--check", "tensorrt-rtx")
    assert done.code == 1 and "refused by TensorRT-RTX 0: INVALID_NODE at conv: bad" in " ".join(done.out.split())


def test_the_graph_is_written_for_other_tools(tmp_path: Path) -> None:
    for precision, quantised in (("auto", True), ("float", False)):
        target = tmp_path / f"{precision}.onnx"
        done = igate("build", EXAMPLE, "--onnx", target, "--precision", precision)
        assert done.code == 0 and "graph for TensorRT" in done.out
        model = onnx.load(str(target))
        assert any(node.op_type == "QuantizeLinear" for node in model.graph.node) is quantised


def test_wrong_use(tmp_path: Path) -> None:
    refused(igate("build", EXAMPLE, "--check", "nothing", "--json"), 2, "known: tensorrt-rtx")
    copy = tmp_path / "copy.igate"
    copy.write_bytes(EXAMPLE.read_bytes())
    refused(igate("build", copy, "--onnx", copy, "--json"), 2, "would overwrite the bundle")
    assert copy.read_bytes() == EXAMPLE.read_bytes()


def test_the_missing_package_is_exit_code_3(monkeypatch) -> None:
    def missing() -> None:
        raise UnavailableError("TensorRT-RTX is missing", "no module", "pip install 'igate-edge[rtx]'")

    monkeypatch.setattr(tensorrt_rtx, "probe", missing)
    refused(igate("build", EXAMPLE, "--check", "tensorrt-rtx", "--json"), 3, "igate-edge[rtx]")
