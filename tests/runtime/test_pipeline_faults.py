"""Faults of cameras, engines, sinks and disks: no crash, no stale or torn frame, and each is counted and named."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from robot import PATIENCE, Echo, Gated, Notes, check_whole, numbered

from igate_edge.errors import InputError
from igate_edge.runtime.camera import pinhole
from igate_edge.runtime.frame import Frame, Result
from igate_edge.runtime.pipeline import Pipeline


def feed(pipeline: Pipeline, frames: list[Frame]) -> list[bool]:
    """One at a time, so that none takes another's place."""
    taken = []
    for frame in frames:
        taken.append(pipeline.submit(frame))
        assert pipeline.drain(PATIENCE)
    return taken


def at(number: int, stamp_ns: int) -> Frame:
    return dataclasses.replace(numbered(number), stamp_ns=stamp_ns)


def test_a_stalled_camera_costs_nothing_and_the_loop_can_be_ended() -> None:
    stalled, seen, notes = threading.Event(), [], Notes()

    class Camera:
        def __init__(self) -> None:
            self.closed = threading.Event()

        def __iter__(self) -> Iterator[Frame]:
            yield numbered(1)
            stalled.set()
            assert self.closed.wait(PATIENCE)

        def close(self) -> None:
            self.closed.set()

    with Pipeline(Echo(), seen.append, monitor=notes) as pipeline:
        runner = threading.Thread(daemon=True, target=pipeline.run, args=(Camera(),))
        runner.start()
        notes.wait("frame")
        assert stalled.wait(PATIENCE) and runner.is_alive()
        assert pipeline.stuck_s == 0.0, "the pipeline itself is well"
        pipeline.stop()
        runner.join(PATIENCE)
        assert not runner.is_alive() and not pipeline.counts.events
    assert [check_whole(result) for result in seen] == [1]


def test_late_and_repeated_frames_are_stale() -> None:
    seen: list[Result] = []
    with Pipeline(Echo(), seen.append) as pipeline:
        assert feed(pipeline, [numbered(n) for n in (10, 30, 20, 30, 31)]) == [True, True, False, False, True]
        counts, words = pipeline.counts, pipeline.complaints["stale"]
    assert [check_whole(result) for result in seen] == [10, 30, 31]
    assert (counts.stale, counts.received, counts.inside) == (2, 5, 0) and "the same stamp again" in words


def test_a_clock_that_is_set_back_is_named_and_followed() -> None:
    seen: list[Result] = []
    second = 1_000_000_000
    with Pipeline(Echo(), seen.append) as pipeline:
        assert all(feed(pipeline, [at(1, 500 * second), at(2, 5 * second), at(3, 6 * second)]))
        assert not pipeline.submit(at(4, 5 * second))
        counts, words = pipeline.counts, pipeline.complaints["clock"]
    assert [result.stamp_ns // second for result in seen] == [500, 5, 6]
    assert counts.events == {"clock": 1} and counts.stale == 1 and "jumped back by 495.0 s" in words


def test_an_arrival_by_another_clock_is_not_believed() -> None:
    seen: list[Result] = []
    with Pipeline(Echo(), seen.append) as pipeline:
        feed(pipeline, [dataclasses.replace(numbered(1), received_ns=2**62), numbered(2)])
    assert [check_whole(result) for result in seen] == [1, 2]
    assert all(0 < result.ms["end_to_end"] < 1e5 for result in seen)


def test_each_camera_has_its_own_clock() -> None:
    seen: list[Result] = []
    frames = [dataclasses.replace(at(n, stamp), source=name) for n, stamp, name in ((1, 900, "a"), (2, 300, "b"))]
    with Pipeline(Echo(), seen.append) as pipeline:
        assert feed(pipeline, frames) == [True, True]


def test_size_and_encoding_change_in_mid_stream() -> None:
    seen: list[Result] = []
    frames = [numbered(1), numbered(2, (10, 4)), numbered(3, (10, 4))]
    grey = Frame(np.full((10, 4), 4, np.uint8), "mono8", stamp_ns=1_004_000_000)
    with Pipeline(Echo(), seen.append, borrowed=True) as pipeline:
        feed(pipeline, [*frames, grey])
        counts, words = pipeline.counts, pipeline.complaints
    assert [result.image.shape for result in seen] == [(6, 8, 3), (10, 4, 3), (10, 4, 3), (10, 4, 3)]
    assert counts.answered == 4 and counts.events == {"size": 1, "encoding": 1}
    assert "from 8x6 to 4x10" in words["size"] and "from rgb8 to mono8" in words["encoding"]


def test_intrinsics_of_other_images_are_left_out_and_named() -> None:
    seen: list[Result] = []
    with Pipeline(Echo(), seen.append) as pipeline:
        feed(pipeline, [numbered(1, camera=pinhole(80, 60)), numbered(2, camera=pinhole(8, 6))])
        assert pipeline.counts.events == {"camera_info": 1}
        assert "80x60 came with a frame of 8x6" in pipeline.complaints["camera_info"]
    assert seen[0].camera is None and seen[1].camera == pinhole(8, 6)


@pytest.mark.parametrize(
    ("data", "encoding", "reason", "words"),
    [
        (np.zeros((5, 8), np.uint8), "nv12", "size", "whole frames"),
        (np.zeros((6, 8), np.uint8), "rgb8", "size", "no such shape"),
        (np.zeros((0, 8, 3), np.uint8), "rgb8", "size", "empty"),
        (np.zeros(17, np.uint8), "yuv422", "size", "cut"),
        (np.full((6, 8, 3), np.nan, np.float32), "rgb8", "type", "144 of its values are NaN"),
        (np.zeros((6, 8, 3), np.float64), "rgb8", "type", "float64"),
        (None, "rgb8", "type", "NoneType"),
        (np.zeros((6, 8, 3), np.uint8), "8UC3", "encoding", "'8UC3'"),
        (np.zeros((6, 8, 3), np.uint8), "", "encoding", "name one of rgb8"),
        (np.zeros((6, 8, 3), np.uint8), None, "encoding", "None"),
    ],
)
def test_truncated_and_nan_data_are_refused(data: object, encoding: object, reason: str, words: str) -> None:
    seen: list[Result] = []
    bad = Frame(data, encoding, stamp_ns=1_002_000_000)  # type: ignore[arg-type]
    notes = Notes()
    with Pipeline(Echo(), seen.append, monitor=notes) as pipeline:
        assert feed(pipeline, [numbered(1), bad, numbered(3)]) == [True, False, True]
        assert pipeline.counts.refused == {reason: 1} and words in pipeline.complaints[reason]
    assert [check_whole(result) for result in seen] == [1, 3] and notes.events[f"refused/{reason}"] == 1


def test_what_is_no_frame_is_refused() -> None:
    with Pipeline(Echo(), print) as pipeline:
        for wrong in (None, np.zeros((6, 8, 3), np.uint8), dataclasses.replace(numbered(1), stamp_ns=1.5)):
            assert not pipeline.submit(wrong)  # type: ignore[arg-type]
        assert pipeline.counts.refused == {"type": 3}


def test_an_engine_that_raises_costs_its_frames_only() -> None:
    class Weak(Echo):
        def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
            answer = super().infer(image)
            if self.calls % 3 == 2:
                raise RuntimeError("device lost")
            return answer

    seen, notes = [], Notes()
    with Pipeline(Weak(), seen.append, monitor=notes) as pipeline:
        feed(pipeline, [numbered(n) for n in range(1, 7)])
        counts, words = pipeline.counts, pipeline.complaints["infer"]
    assert [check_whole(result) for result in seen] == [1, 3, 4, 6]
    assert counts.errors == {"infer": 2} and words == "RuntimeError: device lost" and notes.events["error/infer"] == 2


def test_an_answer_without_a_task_is_an_error_of_that_frame() -> None:
    class Forgetful(Echo):
        def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
            answer = super().infer(image)
            return answer if self.calls != 1 else {"far": answer["far"]}

    seen: list[Result] = []
    with Pipeline(Forgetful(), seen.append, borrowed=True) as pipeline:
        feed(pipeline, [numbered(1), numbered(2)])
        assert pipeline.counts.errors == {"post": 1} and "'kind'" in pipeline.complaints["post"]
    assert [check_whole(result) for result in seen] == [2]


def test_a_sink_that_blocks_gets_the_newest_next() -> None:
    go, inside, seen, notes = threading.Event(), threading.Event(), [], Notes()

    def sink(result: Result) -> None:
        inside.set()
        assert go.wait(PATIENCE)
        seen.append(check_whole(result))

    with Pipeline(Echo(), sink, monitor=notes, max_age_ms=None) as pipeline:
        pipeline.submit(numbered(1))
        assert inside.wait(PATIENCE)
        for number in range(2, 60):
            pipeline.submit(numbered(number))
        notes.wait("dropped", 57)  # nothing piles up: one frame waits
        assert pipeline.stuck_s > 0, "a watchdog sees it"
        go.set()
        assert pipeline.drain(PATIENCE) and pipeline.stuck_s == 0
    assert seen == [1, 59]


def test_what_waited_too_long_is_never_published() -> None:
    """The sink blocks and the camera falls silent: the frame that waits is old when the sink comes back."""
    go, inside, seen = threading.Event(), threading.Event(), []

    def sink(result: Result) -> None:
        seen.append(check_whole(result))
        inside.set()
        assert go.wait(PATIENCE)

    with Pipeline(Echo(), sink, max_age_ms=5000) as pipeline:
        pipeline.submit(numbered(1))
        assert inside.wait(PATIENCE)
        pipeline.submit(dataclasses.replace(numbered(2), age_ms=4980.0))  # 20 ms are left
        assert not pipeline.drain(0.05)
        go.set()
        assert pipeline.drain(PATIENCE)
        # Old when it came; and one whose stamps are of another clock, which say nothing about its age.
        feed(pipeline, [dataclasses.replace(numbered(n), age_ms=age) for n, age in ((3, 6000.0), (4, 1e15))])
        counts, words = pipeline.counts, pipeline.complaints["stale"]
    assert seen == [1, 4] and (counts.stale, counts.dropped) == (2, 0) and "5000 ms are allowed" in words


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="NOT TESTED: no /dev/full here, a disk that is always full")
def test_a_full_disk_is_named() -> None:
    written: list[int] = []

    def sink(result: Result) -> None:
        with open("/dev/full" if result.sequence == 0 and not written else os.devnull, "wb", buffering=0) as file:
            written.append(check_whole(result))
            file.write(result.image.tobytes())

    with Pipeline(Echo(), sink) as pipeline:
        feed(pipeline, [numbered(1), numbered(2)])
        assert pipeline.counts.errors == {"sink": 1} and "No space left on device" in pipeline.complaints["sink"]
        assert pipeline.counts.answered == 1
    assert written == [1, 2]


def test_monitor_and_recorder_cost_no_frame_when_they_raise() -> None:
    class Broken:
        def frame(self, result: Result) -> None:
            raise OSError("metrics are gone")

        inspect = count = frame

        def add(self, frame: Frame, result: Result | None, error: str = "") -> None:
            raise OSError("no space")

    seen, broken = [], Broken()
    with Pipeline(Echo(), seen.append, monitor=broken, recorder=broken) as pipeline:  # type: ignore[arg-type]
        feed(pipeline, [numbered(1), numbered(2)])
        counts, words = pipeline.counts, pipeline.complaints
    assert [check_whole(result) for result in seen] == [1, 2] and counts.answered == 2 and not counts.errors
    assert counts.events["monitor"] >= 2 and counts.events["recorder"] == 2 and "no space" in words["recorder"]


def test_a_sink_cannot_end_its_thread() -> None:
    def sink(result: Result) -> None:
        raise SystemExit(3)

    with Pipeline(Echo(), sink) as pipeline:
        feed(pipeline, [numbered(1), numbered(2)])
        assert pipeline.counts.errors == {"sink": 2} and pipeline.complaints["sink"] == "SystemExit: 3"


def test_a_source_may_fail_now_and_then_but_not_for_ever() -> None:
    class Camera:
        def __init__(self, faults: set[int]) -> None:
            self.number, self.faults, self.closed = 0, faults, False

        def __iter__(self) -> Camera:
            return self

        def __next__(self) -> Frame:
            self.number += 1
            if self.number in self.faults:
                raise OSError("cable")
            if self.number > 9:
                raise StopIteration
            return numbered(self.number)

        def close(self) -> None:
            self.closed = True

    seen: list[Result] = []
    with Pipeline(Echo(), seen.append, mode="every") as pipeline:
        shaky, dead = Camera({2, 3, 6}), Camera({4, 5, 6})
        assert pipeline.run(shaky).events == {"source": 3} and shaky.closed
        with pytest.raises(OSError, match="cable"):
            pipeline.run(dead)
        assert dead.closed and pipeline.complaints["source"] == "OSError: cable"
    assert [check_whole(result) for result in seen] == [1, 4, 5, 7, 8, 9, 1, 2, 3]


def test_close_answers_what_is_inside_or_drops_it() -> None:
    for drain, answered in ((True, 1), (False, 0)):
        engine, seen = Gated(), []
        pipeline = Pipeline(engine, seen.append)
        pipeline.submit(numbered(1))
        assert engine.entered.acquire(timeout=PATIENCE)
        closer = threading.Thread(daemon=True, target=pipeline.close, args=(drain,))
        closer.start()
        engine.go.release()
        closer.join(PATIENCE)
        assert not closer.is_alive() and not pipeline.submit(numbered(2))
        assert pipeline.counts.inside == 0 and pipeline.counts.answered + pipeline.counts.dropped == 1
        if drain:
            assert len(seen) == answered
        pipeline.close()
    assert not engine.closed, "the engine is its owner's"


def test_close_leaves_a_stuck_stage_behind_and_says_so() -> None:
    engine = Gated()
    pipeline = Pipeline(engine, print)
    pipeline.submit(numbered(1))
    assert engine.entered.acquire(timeout=PATIENCE)
    pipeline.close(timeout_s=0.05)
    counts = pipeline.counts
    assert counts.events["left"] >= 1 and "did not end within 0.05 s" in pipeline.complaints["left"]
    engine.go.release()
    assert pipeline.drain(PATIENCE)


def test_a_sink_may_close_its_own_pipeline() -> None:
    done = threading.Event()

    def sink(result: Result) -> None:
        pipeline.close()
        done.set()

    pipeline = Pipeline(Echo(), sink)
    pipeline.submit(numbered(1))
    assert done.wait(PATIENCE) and pipeline.drain(PATIENCE) and not pipeline.counts.errors


def test_no_frame_is_torn_or_mixed_while_everything_goes_wrong_at_once() -> None:
    """500 frames of changing sizes and encodings, some broken, an engine and a sink that fail at random."""
    random = np.random.default_rng(5)

    class Weak(Echo):
        def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
            if self.calls % 11 == 10:
                self.calls += 1
                raise RuntimeError("device lost")
            return super().infer(image)

    seen: list[int] = []

    def sink(result: Result) -> None:
        seen.append(check_whole(result))
        if len(seen) % 7 == 0:
            raise OSError("pipe")

    with Pipeline(Weak(), sink, borrowed=True, max_age_ms=None) as pipeline:
        for index in range(500):
            number = index % 250
            size = [(6, 8), (12, 10), (4, 4)][random.integers(3)]
            frame = numbered(number, size, source=f"camera{index // 250}")
            if random.random() < 0.1:
                frame = dataclasses.replace(frame, data=frame.data[:, :-1, :2])
            elif random.random() < 0.3:
                frame = dataclasses.replace(frame, data=frame.data[..., 0], encoding="mono8")
            buffer = frame.data.copy()
            pipeline.submit(dataclasses.replace(frame, data=buffer))
            buffer[...] = 255
            if index % 10 == 0:
                assert pipeline.drain(PATIENCE)
        assert pipeline.drain(PATIENCE)
        counts = pipeline.counts
    assert counts.received == 500 and counts.inside == 0
    assert counts.refused["size"] > 20 and counts.errors["infer"] > 2 and counts.errors["sink"] > 2
    assert counts.answered + counts.errors["sink"] == len(seen)


@pytest.mark.parametrize(
    "settings",
    [
        {"sink": None},
        {"mode": None},
        {"fit": []},
        {"tasks": 5},
        {"tasks": [[]]},
        {"tasks": "far"},
        {"max_age_ms": "x"},
        {"max_age_ms": float("nan")},
        {"depth_range": (1.0, float("nan"))},
        {"depth_range": (2.0, 1.0)},
        {"depth_range": "ab"},
    ],
)
def test_settings_that_are_none_are_refused(settings: dict[str, object]) -> None:
    before = threading.active_count()
    with pytest.raises(InputError):
        Pipeline(Echo(), **{"sink": print, **settings})  # type: ignore[arg-type]
    assert threading.active_count() == before


def test_what_is_no_source_is_refused() -> None:
    with Pipeline(Echo(), print) as pipeline, pytest.raises(InputError, match="not a source of frames"):
        pipeline.run(None)  # type: ignore[arg-type]
