"""The default engine: what it takes and refuses, threads, INT8 coverage, and the INT8-or-float choice."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading

import int8_nets
import numpy as np
import onnx_ir as ir
import pytest

from igate_edge.compiler import calibrate, quantize
from igate_edge.engines import onnxruntime as engine
from igate_edge.errors import CheckFailed, GraphError, InputError, UnavailableError


def _bytes(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


@pytest.fixture(scope="module")
def small() -> tuple[bytes, int8_nets.Net]:
    net = int8_nets.Net(channels=3, size=8)
    return _bytes(net.model(net.conv(net.conv("image", 4), 2, act=None, name="task"))), net


def test_probe_names_the_version() -> None:
    import onnxruntime

    assert engine.probe() == {"version": onnxruntime.__version__, "provider": "CPUExecutionProvider"}


def test_import_loads_no_runtime_and_a_missing_one_is_named() -> None:
    code = (
        "import sys; from igate_edge.engines import onnxruntime as e; assert 'onnxruntime' not in sys.modules\n"
        "sys.modules['onnxruntime'] = None\n"
        "try: e.probe()\n"
        "except Exception as error: print(type(error).__name__, error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [UnavailableError.__name__, "3"]


def test_run_answers_by_name_and_equals_onnxruntime(small) -> None:
    data, net = small
    image = net.frames(1)[0]
    expected = int8_nets.run(ir.from_proto(__import__("onnx").load_from_string(data)), image)
    with engine.open(data) as session:
        found = session.run(image)
        plain = engine.open(data, threads=2, optimise=False).run(image)
    assert list(found) == ["task"]
    assert np.array_equal(found["task"], expected["task"])
    assert np.allclose(plain["task"], expected["task"], atol=1e-5)


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (np.zeros((1, 3, 8, 9), np.float32), r"float32 \(1, 3, 8, 9\) given"),
        (np.zeros((3, 8, 8), np.float32), r"float32 \(3, 8, 8\) given"),
        (np.zeros((1, 3, 8, 8), np.float64), "float64"),
        (np.zeros((1, 3, 8, 8), np.uint8), "uint8"),
        ([[0.0]], "list given"),
    ],
)
def test_images_that_do_not_fit_are_refused(small, image, seen: str) -> None:
    with (
        engine.open(small[0]) as session,
        pytest.raises(InputError, match=rf"float32 \(1, 3, 8, 8\) expected, .*{seen}"),
    ):
        session.run(image)


def test_close_is_final_and_may_come_twice(small) -> None:
    data, net = small
    session = engine.open(data)
    session.close()
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run(net.frames(1)[0])


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x08\x07" * 50])
def test_bytes_that_are_no_model_are_refused(data: bytes) -> None:
    with pytest.raises(GraphError, match="does not take this model"):
        engine.open(data)


def test_dynamic_inputs_and_wrong_threads_are_refused(small) -> None:
    net = int8_nets.Net(channels=3, size=8)
    net.shape[0] = "n"
    with pytest.raises(GraphError, match="one input of static shape: image \\['n', 3, 8, 8\\]"):
        engine.open(_bytes(net.model(net.conv("image", 2))))
    with pytest.raises(InputError, match="threads"):
        engine.open(small[0], threads=0)


def test_eight_threads_share_one_session(small) -> None:
    """Distinct inputs at the same time give what they give one after another."""
    data, net = small
    frames = net.frames(8)
    with engine.open(data) as session:
        expected = [session.run(frame)["task"] for frame in frames]
        wrong: list[int] = []
        start = threading.Barrier(8)

        def work(index: int) -> None:
            start.wait()
            for _ in range(50):
                if not np.array_equal(session.run(frames[index])["task"], expected[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len({array.tobytes() for array in expected}) == 8


def test_results_belong_to_the_caller(small) -> None:
    data, net = small
    with engine.open(data) as session:
        first = session.run(net.frames(1)[0])["task"]
        kept = first.copy()
        session.run(net.frames(1, seed=5)[0])
    assert np.array_equal(first, kept)
    first[:] = 0.0


@pytest.mark.parametrize("name", sorted(int8_nets.NETS))
def test_all_convolutions_run_as_int8_in_the_ort_dialect(name: str) -> None:
    model, net = int8_nets.NETS[name]()
    ranges = calibrate.calibrate(model, net.frames(4))
    coverage = engine.inspect(_bytes(quantize.quantize(model, ranges, "ort")))
    assert coverage.int8_conv_macs_share == 1.0
    assert set(coverage.convs.values()) == {"int8"}
    coverage.require(0.95)
    convs = sum(node.op_type == "Conv" for node in model.graph)
    used = {node for node in _live(model) if node.op_type == "Conv"}
    integer = sum(coverage.op_counts.get(op, 0) for op in engine.INT8_CONVS)
    assert len(used) == integer <= convs
    assert not set(coverage.op_counts) & {"Conv", "FusedConv", "NhwcFusedConv"}


def _live(model: ir.Model) -> set[ir.Node]:
    todo, seen = [value.producer() for value in model.graph.outputs], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(value.producer() for value in node.inputs if value is not None)
    return seen


def test_coverage_counts_macs_and_names_what_is_float() -> None:
    net = int8_nets.Net(channels=3, size=8)
    model = net.model(net.conv(net.conv("image", 4), 2, k=1, act=None))
    floats = engine.inspect(_bytes(model))
    assert sorted(floats.macs.values()) == [4 * 2 * 8 * 8, 3 * 3 * 3 * 4 * 8 * 8]
    assert floats.int8_conv_macs_share == 0.0
    with pytest.raises(CheckFailed, match=r"0\.0% of the MACs, 95\.0% asked; in float: conv0, conv2"):
        floats.require(0.95)
    trt = engine.inspect(_bytes(quantize.quantize(model, calibrate.calibrate(model, net.frames(2)), "trt")))
    assert trt.int8_conv_macs_share < 0.95
    with pytest.raises(CheckFailed, match="use precision='float'"):
        trt.require(0.95)


def test_float_bias_still_becomes_an_integer_convolution() -> None:
    net = int8_nets.Net(channels=3, size=8)
    model = net.model(net.conv(net.conv("image", 8, bias=np.full(8, 0.3)), 4, act=None, k=1))
    data = _bytes(quantize.quantize(model, calibrate.calibrate(model, net.frames(2)), "ort"))
    assert engine.inspect(data).op_counts["QLinearConv"] == 1
    assert engine.inspect(data).op_counts["ConvInteger"] == 1


def test_nothing_is_written_to_stderr(small) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nimport int8_nets, onnx_ir as ir\n"
        "from igate_edge.compiler import calibrate, quantize\nfrom igate_edge.engines import onnxruntime as e\n"
        "model, net = int8_nets.mobile()\n"
        "data = ir.to_proto(quantize.quantize(model, calibrate.calibrate(model, net.frames(2)))).SerializeToString()\n"
        "e.inspect(data); e.open(data).run(net.frames(1)[0])\n"
    )
    folder = int8_nets.__file__.rsplit("/", 1)[0]
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@dataclasses.dataclass
class _Stub:
    """A runner that logs its calls and moves a clock of its own: `now` of the log's owner."""

    seconds: float
    log: list[str]
    name: str
    now: float = 0.0

    def run(self, image: np.ndarray) -> None:
        self.log.append(self.name)
        self.now += self.seconds

    def clock(self) -> float:
        return self.now


def test_a_slow_int8_engine_loses_and_the_reason_is_told(small) -> None:
    data, net = small
    image, slow = net.frames(1)[0], _Stub(0.02, [], "a")
    winner, reason, timing = engine.pick(slow, data, image, rounds=4, clock=slow.clock)
    assert winner == "float"
    assert reason.startswith("INT8 is not faster on this machine: INT8 20.00 ms, float 0.00 ms")
    assert "4 pairs" in reason
    assert timing.ratio > 1
    winner, reason, _ = engine.pick(data, slow, image, rounds=4, clock=slow.clock)
    assert (winner, reason[:14]) == ("int8", "INT8 is faster")


def test_runs_are_interleaved_and_take_turns_to_be_first(small) -> None:
    log: list[str] = []
    image = small[1].frames(1)[0]
    engine.ab_time(_Stub(0, log, "a"), _Stub(0, log, "b"), image, rounds=3, warmup=1)
    assert "".join(log) == "ab" + "ab" + "ba" + "ab"
    with pytest.raises(InputError, match="rounds"):
        engine.ab_time(_Stub(0, log, "a"), _Stub(0, log, "b"), image, rounds=0)


def test_a_slower_machine_moves_both_arms_a_slower_arm_the_ratio() -> None:
    base = [(2.0, 4.0)] * 10
    drifting = [(2.0 * f, 4.0 * f) for f in np.linspace(1.0, 1.25, 10)]
    slower = [(2.0 * 1.08, 4.0)] * 10
    assert engine.compare(base).ratio == pytest.approx(0.5)
    assert engine.compare(drifting).ratio == pytest.approx(0.5)
    assert engine.compare(slower).ratio == pytest.approx(0.5 * 1.08)
    noisy = engine.compare([(1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (4.0, 1.0), (5.0, 1.0)])
    assert (noisy.ratio, noisy.spread, noisy.rounds) == (3.0, (2.0, 4.0), 5)
