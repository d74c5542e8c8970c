"""A plan as a session, on stand-ins for TensorRT and CUDA: the order of calls, never what a device does."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import Behaviour

from igate_edge.engines.tensorrt import open_plan
from igate_edge.engines.tensorrt_session import Session
from igate_edge.errors import CheckFailed, GraphError, InputError

IMAGE = ("image", [1, 3, 4, 4], "FLOAT")
OUTPUTS = [("semseg", [1, 2, 8, 8], "UINT8"), ("depth", [1, 1, 4, 4], "FLOAT")]


def plan(**changes: object) -> bytes:
    known = {"version": "10.3.0", "inputs": [IMAGE], "outputs": OUTPUTS, "rows": None, "ms": 4.0, "streams": 0}
    return json.dumps({**known, **changes}).encode()


def image(value: float, rows: int = 1) -> np.ndarray:
    """The toy answers 48 * value + the output's number."""
    return np.full((rows, 3, 4, 4), value, np.float32)


def expected(value: float) -> dict[str, np.ndarray]:
    total = 3 * 4 * 4 * value
    return {"semseg": np.full((1, 2, 8, 8), total, np.uint8), "depth": np.full((1, 1, 4, 4), total + 1, np.float32)}


def same(found: dict[str, np.ndarray], value: float) -> bool:
    want = expected(value)
    return found.keys() == want.keys() and all(np.array_equal(found[name], want[name]) for name in want)


def opened(cuda: FakeCuda, data: bytes | None = None, **options: object) -> Session:
    return open_plan(plan() if data is None else data, cuda=cuda, clock=cuda.clock, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", ["auto", "mapped", "copy"])
@pytest.mark.parametrize("graph", [True, False])
def test_it_answers_and_leaves_nothing_behind(cuda: FakeCuda, trt: Behaviour, memory: str, graph: bool) -> None:
    with opened(cuda, memory=memory, graph=graph) as session:
        assert (session.input, session.shape, session.dtype) == ("image", (1, 3, 4, 4), np.float32)
        assert session.outputs == ["semseg", "depth"]
        for value in (1.0, 2.0, 1.0):
            assert same(session.run(image(value)), value)
        assert session.facts["memory"] == {"auto": "mapped"}.get(memory, memory)
        assert session.facts["graph"] is graph
        assert session.facts["gpu_ms"] >= 4.0
    session.close()
    assert not cuda.blocks and not cuda.live and cuda.depth == 0
    assert not cuda.closed, "an adapter that was passed in stays open"
    with pytest.raises(InputError, match="closed"):
        session.run(image(0.0))


def test_addresses_are_bound_once(cuda: FakeCuda, trt: Behaviour) -> None:
    with opened(cuda, memory="copy") as session:
        before = [call for call in trt.seen if call[0] == "bind"]
        assert len(before) == 3 * 2, "three tensors in two slots"
        for _ in range(5):
            session.run(image(1.0))
        assert [call for call in trt.seen if call[0] == "bind"] == before


def test_the_faster_memory_wins(cuda: FakeCuda, trt: Behaviour) -> None:
    """Three copies of 0.5 ms against what reading mapped memory costs the device."""
    with opened(cuda, graph=False) as session:
        assert session.facts["memory"] == "mapped"
        assert session.facts["memory_ms"] == pytest.approx({"mapped": 4.2, "copy": 4.2 + 3 * 0.5})
    trt.mapped_ms = 2.0
    with opened(cuda, graph=False) as session:
        assert session.facts["memory"] == "copy"
        assert session.facts["memory_ms"] == pytest.approx({"mapped": 6.2, "copy": 5.7})


def test_memory_that_cannot_be_mapped(cuda: FakeCuda, trt: Behaviour) -> None:
    cuda.refuse = {"host mapped": "no unified addressing"}
    with opened(cuda) as session:
        assert session.facts["memory"] == "copy" and "unified addressing" in session.facts["memory_reason"]
    with pytest.raises(CheckFailed, match="unified addressing"):
        opened(cuda, memory="mapped")
    assert not cuda.blocks and not cuda.live


def test_a_call_with_a_graph_is_one_launch(cuda: FakeCuda, trt: Behaviour) -> None:
    with opened(cuda, memory="copy") as session:
        assert session.facts["graph"] and session.facts["graph_ms"] == pytest.approx({"graph": 5.51, "plain": 5.7})
        assert session.facts["enqueue_ms"] == pytest.approx(0.01)
        cuda.calls.clear()
        session.run(image(1.0))
        assert cuda.calls == ["launch", "record", "wait"]


def test_a_call_without_a_graph(cuda: FakeCuda, trt: Behaviour) -> None:
    with opened(cuda, memory="copy", graph=False) as session:
        assert session.facts["graph_reason"] == "not asked for"
        cuda.calls.clear()
        session.run(image(1.0))
        assert cuda.calls == ["upload", "enqueue", "download", "download", "record", "wait"]


def test_a_graph_that_is_not_faster_is_not_used(cuda: FakeCuda, trt: Behaviour) -> None:
    cuda.graph_ms = 0.4
    with opened(cuda) as session:
        assert (
            not session.facts["graph"] and "not faster: graph 4.400 ms, plain 4.200 ms" in session.facts["graph_reason"]
        )
        cuda.calls.clear()
        assert same(session.run(image(2.0)), 2.0) and "launch" not in cuda.calls


@pytest.mark.parametrize("call", ["begin_capture", "end_capture"])
def test_no_graph_is_a_reason_and_no_failure(cuda: FakeCuda, trt: Behaviour, call: str) -> None:
    cuda.refuse = {call: "a plugin synchronises"}
    with opened(cuda) as session:
        assert not session.facts["graph"] and "a plugin synchronises" in session.facts["graph_reason"]
        assert same(session.run(image(3.0)), 3.0)


def test_tensorrt_refuses_inside_a_capture(cuda: FakeCuda, trt: Behaviour) -> None:
    """enqueue answers False only while a stream is noting; the stream must not stay in that state."""
    trt.enqueue = lambda: cuda.calls[-1] not in ("begin_capture",)
    with opened(cuda, memory="mapped") as session:
        assert not session.facts["graph"] and "refused to start a call" in session.facts["graph_reason"]
        assert same(session.run(image(3.0)), 3.0)
    assert not cuda.live


def test_a_refused_launch_is_an_error_and_no_output(cuda: FakeCuda, trt: Behaviour) -> None:
    with opened(cuda, graph=False) as session:
        trt.enqueue = lambda: False
        with pytest.raises(CheckFailed, match="refused to start a call"):
            session.run(image(1.0))
        trt.enqueue = lambda: True
        assert same(session.run(image(2.0)), 2.0)


@pytest.mark.parametrize("memory", ["mapped", "copy"])
@pytest.mark.parametrize(("output", "where"), [("depth", slice(None)), ("semseg", slice(5, 6))])
def test_outputs_that_are_not_written_are_seen(
    cuda: FakeCuda, trt: Behaviour, memory: str, output: str, where: slice
) -> None:
    trt.unwritten = {output: where}
    with pytest.raises(CheckFailed, match=f"does not write all of its outputs: {output}"):
        opened(cuda, memory=memory)
    assert not cuda.blocks and not cuda.live


def test_nothing_is_read_before_its_event(cuda: FakeCuda, trt: Behaviour) -> None:
    """The stand-in computes when it is waited for: whoever reads earlier gets the frame before."""
    with opened(cuda) as session:
        session.run(image(1.0))
        cuda.calls.clear()
        ticket = session.submit(image(2.0))
        assert "wait" not in cuda.calls, "submit does not wait"
        assert same(ticket.result(), 2.0)


def test_two_calls_are_in_flight_and_a_third_settles_the_first(cuda: FakeCuda, trt: Behaviour) -> None:
    with opened(cuda) as session:
        cuda.calls.clear()
        first, second = session.submit(image(1.0)), session.submit(image(2.0))
        assert "wait" not in cuda.calls
        third = session.submit(image(3.0))
        assert cuda.calls.count("wait") == 1
        assert all(same(ticket.result(), value) for ticket, value in ((third, 3.0), (first, 1.0), (second, 2.0)))
        assert first.result() is first.result() and trt.overlaps == 0


def test_results_are_the_callers_own(cuda: FakeCuda, trt: Behaviour) -> None:
    with opened(cuda) as session:
        source = image(1.0)
        ticket = session.submit(source)
        source[:] = 9.0
        kept = ticket.result()
        for value in (2.0, 3.0, 4.0):
            session.run(image(value))
        assert same(kept, 1.0)


def test_close_settles_what_is_in_flight(cuda: FakeCuda, trt: Behaviour) -> None:
    session = opened(cuda)
    ticket = session.submit(image(2.0))
    session.close()
    assert same(ticket.result(), 2.0)


def test_a_call_that_fails_on_the_device_fails_in_its_ticket(cuda: FakeCuda, trt: Behaviour) -> None:
    session = opened(cuda)
    ticket = session.submit(image(2.0))
    cuda.refuse = {"wait": "illegal address"}
    for _ in range(2):
        with pytest.raises(CheckFailed, match="illegal address"):
            ticket.result()
    session.close()


def test_eight_threads_share_a_session(cuda: FakeCuda, trt: Behaviour) -> None:
    wrong: list[object] = []
    with opened(cuda) as session:
        gate = threading.Barrier(8)

        def work(number: int) -> None:
            gate.wait()
            for step in range(20):
                value = float((number * 20 + step) % 5)
                if not same(session.run(image(value)), value):
                    wrong.append((number, step))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and trt.overlaps == 0


def test_the_context_is_left_in_every_thread(cuda: FakeCuda, trt: Behaviour) -> None:
    with opened(cuda) as session:
        seen: list[object] = []
        thread = threading.Thread(target=lambda: seen.extend([session.run(image(1.0)), cuda.depth]))
        thread.start()
        thread.join()
        assert same(seen[0], 1.0) and seen[1] == cuda.depth == 0  # type: ignore[arg-type]


def test_layer_times(cuda: FakeCuda, trt: Behaviour) -> None:
    with opened(cuda) as session:
        held = len(cuda.blocks)
        assert session.layer_times(10) == [("conv1", 1.5), ("conv2", 0.5)]
        assert len(cuda.blocks) == held and same(session.run(image(1.0)), 1.0)
        with pytest.raises(InputError, match="runs"):
            session.layer_times(0)


def batched() -> bytes:
    inputs = [("image", [-1, 3, 4, 4], "FLOAT")]
    return plan(inputs=inputs, outputs=[("depth", [-1, 1, 4, 4], "FLOAT")], rows=[1, 2, 4])


def test_a_batch_profile(cuda: FakeCuda, trt: Behaviour) -> None:
    with opened(cuda, batched()) as session:
        assert session.shape == (2, 3, 4, 4) and session.batch == (1, 2, 4)
        for rows in (1, 2, 3, 4, 2):
            values = np.arange(rows, dtype=np.float32)
            found = session.run(image(1.0, rows) * values.reshape(-1, 1, 1, 1))["depth"]
            assert found.shape == (rows, 1, 4, 4) and np.array_equal(found[:, 0, 0, 0], 48 * values)
        with pytest.raises(InputError, match="pass 1 to 4"):
            session.run(image(1.0, 5))


def test_another_batch_ends_a_graph_and_its_own_brings_it_back(cuda: FakeCuda, trt: Behaviour) -> None:
    """A graph is never replayed after its context was changed: that is undefined, and the stand-in refuses it."""
    with opened(cuda, batched()) as session:
        assert session.facts["graph"]

        def launches(rows: int) -> int:
            before = cuda.calls.count("launch")
            answer = [session.run(image(1.0, rows)) for _ in range(2)][-1]  # one in each slot
            assert answer["depth"].shape == (rows, 1, 4, 4) and (answer["depth"] == 48).all()
            return cuda.calls.count("launch") - before

        assert [launches(rows) for rows in (2, 1, 1, 2, 2, 2)] == [2, 0, 0, 0, 2, 2]


def test_a_session_without_a_graph_never_gets_one(cuda: FakeCuda, trt: Behaviour) -> None:
    with opened(cuda, batched(), graph=False) as session:
        cuda.calls.clear()
        for rows in (2, 2, 1, 1, 2, 2, 2, 2):
            session.run(image(1.0, rows))
        assert not {"begin_capture", "launch"} & set(cuda.calls)


@pytest.mark.parametrize("runs", [0, -1, None, "50", 1.5, True])
def test_a_number_of_runs_that_is_none(cuda: FakeCuda, trt: Behaviour, runs: object) -> None:
    with opened(cuda) as session, pytest.raises(InputError, match="runs must be a whole number"):
        session.layer_times(runs)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory", ["mapped", "copy"])
def test_an_output_without_a_batch_is_whole(cuda: FakeCuda, trt: Behaviour, memory: str) -> None:
    with opened(
        cuda, plan(outputs=[("depth", [1, 1, 4, 4], "FLOAT"), ("table", [5, 2], "FLOAT")]), memory=memory
    ) as it:
        assert it.run(image(1.0))["table"].tolist() == [[49.0, 49.0]] * 5


def test_a_lost_device_does_not_keep_close_from_ending(cuda: FakeCuda, trt: Behaviour) -> None:
    session = opened(cuda)
    cuda.lost = True
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run(image(0.0))


@pytest.mark.parametrize("wrong", [np.zeros((1, 3, 4, 5), np.float32), np.zeros((1, 3, 4, 4)), [[1.0]], None])
def test_images_that_do_not_fit(cuda: FakeCuda, trt: Behaviour, wrong: object) -> None:
    for data in (plan(), batched()):
        with opened(cuda, data) as session, pytest.raises(InputError, match="does not fit the engine"):
            session.run(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"version": "10.7.0"}, CheckFailed, "built elsewhere: Version tag does not match.*build it again"),
        ({"inputs": [IMAGE, ("other", [1], "FLOAT")]}, GraphError, "one input"),
        ({"outputs": [("boxes", [1, -1, 4], "FLOAT")]}, GraphError, "depend on data: boxes"),
        ({"outputs": [("depth", [1, 1], "BF16")]}, CheckFailed, "depth: BF16"),
        ({"needs": "igate::Kernel"}, CheckFailed, "needs a plugin that is not loaded: igate::Kernel version 1"),
    ],
)
def test_plans_that_are_refused(
    cuda: FakeCuda, trt: Behaviour, changes: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        opened(cuda, plan(**changes))
    assert not cuda.blocks and not cuda.live


def test_a_truncated_plan(cuda: FakeCuda, trt: Behaviour) -> None:
    with pytest.raises(CheckFailed, match="Magic tag"):
        opened(cuda, plan()[:-5])


def test_no_memory_for_a_context(cuda: FakeCuda, trt: Behaviour) -> None:
    trt.no_context = True
    with pytest.raises(CheckFailed, match="no execution context"):
        opened(cuda)


def test_a_plugin_is_loaded_before_the_plan(cuda: FakeCuda, trt: Behaviour) -> None:
    trt.plugins = {"libigate.so": ["igate::Kernel"]}
    with opened(cuda, plan(needs="igate::Kernel"), plugins=[Path("/opt/libigate.so")]) as session:
        assert same(session.run(image(1.0)), 1.0)
    assert trt.seen[0] == ("load_library", "/opt/libigate.so")


@pytest.mark.parametrize("memory", ["managed", None, [], 1])
def test_an_unknown_memory_policy(cuda: FakeCuda, trt: Behaviour, memory: object) -> None:
    with pytest.raises(InputError, match="known: auto, mapped, copy"):
        opened(cuda, memory=memory)


@pytest.mark.parametrize(
    ("plugins", "words"), [(None, "NoneType given"), ("lib.so", "str given"), ([None], "not a path"), (["\0"], "not a")]
)
def test_plugins_that_are_no_paths(cuda: FakeCuda, trt: Behaviour, plugins: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        opened(cuda, plugins=plugins)
    assert not trt.seen
