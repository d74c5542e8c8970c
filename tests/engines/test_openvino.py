"""The second runtime: the same INT8 file, run in INT8, with ONNX Runtime's answers."""

from __future__ import annotations

import subprocess
import sys

import int8_nets
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from igate_edge.compiler import calibrate, quantize
from igate_edge.engines import onnxruntime as ort
from igate_edge.engines import openvino as engine
from igate_edge.errors import CheckFailed, GraphError, InputError, UnavailableError


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


@pytest.fixture(scope="module")
def runtime():
    return pytest.importorskip("openvino", reason="extra `openvino` is not installed")


def _residual() -> tuple[ir.Model, int8_nets.Net]:
    """A signed image, signed values that a convolution reads, a residual add, and an answer in float."""
    net = int8_nets.Net(channels=3, size=16)
    x = net.conv("image", 16)
    y = net.conv(net.conv(x, 16), 16, act=None)
    return net.model(net.conv(net.conv(net.add(y, x, act=None), 16), 4, k=1, act=None, name="task")), net


@pytest.fixture(scope="module")
def int8(runtime) -> tuple[bytes, bytes, int8_nets.Net]:
    """The INT8 file, the float file, and the net that makes frames."""
    model, net = _residual()
    ranges = calibrate.calibrate(model, net.frames(4))
    return _bytes(quantize.quantize(model, ranges, "ort")), _bytes(model), net


def test_a_missing_runtime_is_named_and_import_loads_none() -> None:
    code = (
        "import sys; from igate_edge.engines import openvino as e; assert 'openvino' not in sys.modules\n"
        "sys.modules['openvino'] = None\n"
        "try: e.probe()\n"
        "except Exception as error: print(type(error).__name__, error.exit_code, '[openvino]' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [UnavailableError.__name__, "3", "True"]


def test_probe_names_the_version(runtime) -> None:
    assert engine.probe() == {"version": runtime.__version__, "provider": "CPU"}


def test_the_int8_file_runs_in_int8(int8) -> None:
    data, floats, _ = int8
    assert any(t.data_type == onnx.TensorProto.UINT8 and t.dims for t in onnx.load_from_string(data).graph.initializer)
    coverage = engine.inspect(data)
    # The last convolution is an integer product that is scaled to float; OpenVINO computes it in float.
    assert [name for name, kind in coverage.convs.items() if kind == "float"] == ["task"]
    assert coverage.int8_conv_macs_share == 1 - coverage.macs["task"] / sum(coverage.macs.values()) > 0.95
    assert coverage.op_counts["Convolution"] == len(coverage.convs) == 5
    assert coverage.macs == ort.inspect(data).macs
    with pytest.raises(CheckFailed, match=r"0\.0% of the MACs"):
        engine.inspect(floats).require(0.95)


def test_answers_are_those_of_onnx_runtime(int8) -> None:
    data, floats, net = int8
    exact = ort.open(data, optimise=False)
    with engine.open(data) as session, engine.open(floats) as plain:
        assert (session.input, session.shape, session.outputs) == ("image", (1, 3, 16, 16), ["task"])
        for image in net.frames(4, seed=7):
            wanted, real = exact.run(image)["task"], ort.open(floats).run(image)["task"]
            assert np.allclose(plain.run(image)["task"], real, atol=1e-5 * np.abs(real).max())
            # Signed activations saturate in INT16 pairs on CPUs without VNNI, so the files agree only roughly there.
            assert np.abs(session.run(image)["task"] - wanted).mean() <= 0.1 * np.abs(wanted).mean()


def test_restated_weights_are_the_same_numbers(int8) -> None:
    data, _, net = int8
    again, image = engine.signed_weights(data), net.frames(1, seed=3)[0]
    assert again != data
    assert np.array_equal(ort.open(again, 1, False).run(image)["task"], ort.open(data, 1, False).run(image)["task"])
    assert engine.signed_weights(again) == again


def test_a_result_belongs_to_the_caller(int8) -> None:
    data, _, net = int8
    one, other = net.frames(2, seed=1)
    with engine.open(data) as session:
        first = session.run(one)["task"]
        kept = first.copy()
        session.run(other)
        assert np.array_equal(first, kept)


def test_what_does_not_fit_is_refused(int8) -> None:
    data, _, _ = int8
    with pytest.raises(InputError, match="threads"):
        engine.open(data, threads=0)
    with pytest.raises(GraphError, match="not an ONNX model"):
        engine.open(b"\x00nonsense")
    session = engine.open(data)
    with pytest.raises(InputError, match=r"float32 \(1, 3, 16, 16\) expected, uint8"):
        session.run(np.zeros((1, 3, 16, 16), np.uint8))
    session.close()
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run(np.zeros((1, 3, 16, 16), np.float32))
