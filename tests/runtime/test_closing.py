"""One thread ends what another is using: nobody waits for ever, and the last word is the right one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import TracebackType

import numpy as np
import pytest
from robot import PATIENCE, Echo, numbered

from igate_edge.cli_serve import run_until
from igate_edge.errors import UnavailableError
from igate_edge.runtime.frame import Frame, Result
from igate_edge.runtime.pipeline import Pipeline
from igate_edge.runtime.sources import Video
from igate_edge.runtime.supervise import Supervised, stop_on_signals

IMAGE = np.full((1, 3, 4, 4), 9 / 255, np.float32)


class Unplugged:
    """A camera that fails even when it is closed; `hangs`: its driver never returns from its second frame."""

    def __init__(self, hangs: bool = False) -> None:
        self.asked, self.go, self._hangs = threading.Event(), threading.Event(), hangs

    def __iter__(self) -> Iterator[Frame]:
        yield numbered(1)
        self.asked.set()
        assert self.go.wait(PATIENCE)
        if not self._hangs:
            yield numbered(2)

    def close(self) -> None:
        if not self._hangs:
            raise OSError("no such device")


def test_a_source_that_cannot_be_closed_does_not_keep_the_pipeline_open() -> None:
    camera, pipeline = Unplugged(), Pipeline(Echo(), lambda result: None)
    runner = threading.Thread(target=pipeline.run, args=(camera,), daemon=True)
    runner.start()
    assert camera.asked.wait(PATIENCE)
    pipeline.close()
    camera.go.set()
    runner.join(PATIENCE)
    assert not runner.is_alive() and not any(thread.is_alive() for thread in pipeline._relay._threads)
    assert pipeline.counts.inside == 0 and pipeline.counts.events == {"source": 2}
    assert pipeline.complaints["source"] == "OSError: no such device"


def test_a_camera_that_hangs_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("igate_edge.cli_serve.LEAVE_S", 0.05)
    camera, ended, counts = Unplugged(hangs=True), threading.Event(), []
    with Pipeline(Echo(), lambda result: None) as pipeline:
        main = threading.Thread(target=lambda: counts.append(run_until(ended, pipeline, camera)), daemon=True)
        main.start()
        assert camera.asked.wait(PATIENCE)
        assert pipeline.drain(PATIENCE)
        ended.set()
        pipeline.stop()
        main.join(PATIENCE)
        assert not main.is_alive() and counts[0].answered == 1
    assert "left behind" in capsys.readouterr().err
    camera.go.set()


def test_what_a_camera_raises_reaches_the_one_who_runs_it() -> None:
    def broken() -> Iterator[Frame]:
        yield numbered(1)
        raise KeyboardInterrupt

    with Pipeline(Echo(), lambda result: None) as pipeline, pytest.raises(KeyboardInterrupt):
        run_until(threading.Event(), pipeline, broken())


def test_a_video_whose_decoder_hangs_is_closed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("igate_edge.runtime.sources.CLOSE_S", 0.01)
    video = object.__new__(Video)
    video._ended, video._lock = threading.Event(), threading.Lock()
    with video._lock:  # as `__next__` holds it while it decodes
        video.close()
    with pytest.raises(StopIteration):
        next(video)


def test_the_end_of_the_signals_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("igate_edge.runtime.supervise.STOP_S", 0.05)
    asked, go = threading.Event(), threading.Event()

    def stop() -> None:
        asked.set()
        go.wait(PATIENCE)

    with stop_on_signals(stop, [signal.SIGUSR1]):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked.wait(PATIENCE)
    assert not go.is_set()
    go.set()


def test_times_beyond_what_a_lock_can_wait() -> None:
    with Pipeline(Echo(), lambda result: None) as pipeline:
        pipeline.submit(numbered(1))
        assert pipeline.drain(float("inf")) and pipeline.drain(1e300)
        pipeline.close(timeout_s=float("inf"))
    other = Pipeline(Echo(), lambda result: None)
    other.close(timeout_s=float("nan"))
    assert not other.submit(numbered(1))


def test_an_engine_that_was_closed_meanwhile_is_no_hang() -> None:
    supervised = Supervised(Echo, hang_s=PATIENCE)
    worker = supervised._worker
    assert worker is not None
    supervised.close()
    worker.thread.join(PATIENCE)
    begun = time.monotonic()
    with pytest.raises(UnavailableError, match="closed"):
        worker.call(IMAGE, PATIENCE)
    assert time.monotonic() - begun < PATIENCE / 2
    with pytest.raises(UnavailableError, match="no engine at the moment: closed"):
        supervised.infer(IMAGE)


class Between:
    """A lock that runs something once after `armed` was set and its holder let it go."""

    def __init__(self, then: object) -> None:
        self._lock, self._then, self.armed = threading.Lock(), then, False

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.release()
        if self.armed and threading.current_thread().name == "igate supervisor":
            self.armed = False
            self._then()  # type: ignore[operator]


@pytest.mark.parametrize("end", ["closed", "opening the engine again"])
def test_a_late_ready_does_not_undo_what_happened_since(end: str) -> None:
    """Between the moment an engine is back and the moment that is said, it fails again, or all is closed."""

    class Weak(Echo):
        def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
            raise RuntimeError("device lost")

    happened, late = threading.Event(), list[threading.Thread]()

    def meanwhile() -> None:
        late.append(threading.current_thread())
        if end == "closed":
            supervised.close()
        else:
            supervised._pause = PATIENCE
            with contextlib.suppress(RuntimeError):
                supervised.infer(IMAGE)
        happened.set()

    supervised = Supervised(Weak, backoff_s=(0.001, 0.002))
    lock = supervised._lock = Between(meanwhile)  # type: ignore[assignment]
    lock.armed = True
    with pytest.raises(RuntimeError):
        supervised.infer(IMAGE)
    assert happened.wait(PATIENCE)
    late[0].join(PATIENCE)
    assert supervised.status.startswith(end)
    supervised.close()


def test_who_closes_second_waits_until_the_first_is_done() -> None:
    held, inside, order = threading.Event(), threading.Event(), list[str]()

    def sink(result: object) -> None:
        inside.set()
        assert held.wait(PATIENCE)
        order.append("answered")

    pipeline = Pipeline(Echo(), sink)
    assert pipeline.submit(numbered(1)) and inside.wait(PATIENCE)
    first = threading.Thread(target=lambda: pipeline.close(timeout_s=PATIENCE), daemon=True)
    first.start()
    while not pipeline._closed:
        time.sleep(0.001)
    second = threading.Thread(target=lambda: (pipeline.close(timeout_s=PATIENCE), order.append("closed")), daemon=True)
    second.start()
    second.join(0.05)
    assert second.is_alive() and not order
    held.set()
    for thread in (first, second):
        thread.join(PATIENCE)
    assert order == ["answered", "closed"] and pipeline.counts.answered == 1


class Unreadable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def test_an_error_without_words_is_counted_and_ends_nothing() -> None:
    def sink(result: Result) -> None:
        if result.sequence == 0 and not pipeline.counts.errors:
            raise Unreadable

    with Pipeline(Echo(), sink, mode="every") as pipeline:
        counts = pipeline.run(numbered(number) for number in range(1, 6))
    assert counts.errors == {"sink": 1} and counts.answered == 4 and pipeline.complaints["sink"] == "Unreadable"


def test_a_recorder_that_exits_loses_no_frame_from_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda what: None)

    class Exits:
        def add(self, frame: Frame, result: Result | None, error: str = "") -> None:
            if result is None:
                raise SystemExit(1)

    class Fails(Echo):
        def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
            raise RuntimeError("every frame")

    with Pipeline(Fails(), lambda result: None, mode="every", recorder=Exits()) as pipeline:
        counts = pipeline.run(numbered(number) for number in range(1, 9))
    assert counts.errors == {"infer": 8} and counts.inside == 0
    assert not any(thread.is_alive() for thread in pipeline._relay._threads)
