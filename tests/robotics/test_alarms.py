"""From what goes wrong to the file: a real pipeline, monitor and flight recorder, wired as `igate serve` wires them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bags  # noqa: F401  (skips where the extra `bag` is missing)
import numpy as np
import pytest
import tinynet
from monitored import Clock
from robot import PATIENCE, Echo, Gated, Notes, numbered

from igate_edge import Engine
from igate_edge.bundle import Bundle
from igate_edge.robotics.recorder import Recorder
from igate_edge.robotics.replay import Recorded, read_recording
from igate_edge.runtime.drift import FEWEST
from igate_edge.runtime.frame import Frame, Result
from igate_edge.runtime.monitor import INSPECT_S, STREAK, Monitor
from igate_edge.runtime.pipeline import Pipeline
from igate_edge.runtime.supervise import Supervised


@contextlib.contextmanager
def watched(folder: Path, **settings: Any) -> Iterator[tuple[Monitor, Recorder, Clock]]:
    """A monitor whose alarms trigger a recorder; its clock stands still unless a test moves it."""
    clock = Clock()
    monitor = Monitor(clock=clock, load=clock.quiet, **settings)
    with Recorder(folder, 600.0) as recorder:  # nothing is forgotten, however slow the machine is
        monitor.on_alarm = recorder.trigger
        yield monitor, recorder, clock


def recorded(folder: Path, recorder: Recorder) -> tuple[str, list[Recorded]]:
    """Reason and frames of the one file that was written."""
    assert recorder.flush(PATIENCE) and recorder.problems == ()
    (path,) = folder.glob("flight_*.mcap")
    losses: list[str] = []
    about, frames = read_recording(path, losses)
    found = list(frames)
    assert losses == []
    return about["reason"], found


def test_deadlines_missed_in_a_row_write_a_file(tmp_path: Path) -> None:
    with watched(tmp_path, budget_ms=0.001) as (monitor, recorder, _):
        with Pipeline(Echo(), lambda result: None, mode="every", monitor=monitor, recorder=recorder) as pipeline:
            assert pipeline.run([numbered(number) for number in range(1, STREAK)]).answered == STREAK - 1
            assert recorder.flush(PATIENCE) and not list(tmp_path.iterdir()), "not yet a streak"
            pipeline.run([numbered(STREAK)])
        reason, found = recorded(tmp_path, recorder)
    assert reason == f"deadline: {STREAK} frames in a row took more than 0.001 ms"
    assert [int(one.frame.data.flat[0]) for one in found] == [1, 2, 3, 4, 5]
    assert all(np.allclose(one.outputs["far"], k + 1, rtol=1e-4) for k, one in enumerate(found, 1))


def test_a_camera_that_turns_dark_writes_a_file(tmp_path: Path, bundle: Path, cache: Path) -> None:
    reference = Bundle.read(bundle).manifest["reference"]
    usual = tinynet.frames(8)  # those of calibration
    dark = [(pixels * 0.1).astype(np.uint8) for pixels in usual] * 4
    stamps = iter(range(1, 1000))
    frames = {name: [Frame(p, stamp_ns=next(stamps)) for p in seen] for name, seen in (("as", usual), ("dark", dark))}
    with (
        Engine.open(bundle, precision="float", cache_dir=cache) as engine,
        watched(tmp_path, reference=reference) as (monitor, recorder, clock),
    ):

        def sink(result: Result) -> None:
            clock.now += INSPECT_S

        with Pipeline(engine, sink, mode="every", monitor=monitor, recorder=recorder) as pipeline:
            pipeline.run(frames["as"])
            drift = monitor.snapshot()["drift"]
            assert (drift["status"], drift["inspected"]) == ("low", FEWEST) and not list(tmp_path.iterdir())
            pipeline.run(frames["dark"])
        reason, found = recorded(tmp_path, recorder)
        assert monitor.verdict().level == "WARN" and monitor.snapshot()["drift"]["inspected"] == 40
    assert reason.startswith("drift: unlike the calibration frames") and "brightness" in reason
    assert len(found) > 8 and found[-1].frame.data.max() <= 25 < found[0].frame.data.max()
    assert set(found[0].outputs) == {"seg", "depth", "tag"}


def test_an_engine_that_fails_writes_a_file_with_the_frame_that_it_failed_on(tmp_path: Path) -> None:

    class Failing(Echo):
        def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
            if self.calls == 3:
                raise RuntimeError("the driver is gone")
            return super().infer(image)

    with (
        watched(tmp_path) as (monitor, recorder, _),
        Supervised(Failing) as engine,
        Pipeline(engine, lambda result: None, mode="every", monitor=monitor, recorder=recorder) as pipeline,
    ):
        pipeline.run([numbered(number) for number in (1, 2, 3)])  # all published before the next one fails
        counts = pipeline.run([numbered(4)])
        reason, found = recorded(tmp_path, recorder)
        assert counts.answered == 3 and counts.errors == {"infer": 1}
        assert monitor.snapshot()["counts"]["error/infer"] == 1 and monitor.verdict().level == "ERROR"
    assert reason == "error: infer" and [int(one.frame.data.flat[0]) for one in found] == [1, 2, 3, 4]


def test_what_the_pipeline_took_is_remembered_and_what_it_refused_is_counted(tmp_path: Path) -> None:
    """As `Recorder.add` says: dropped frames are in the file; refused ones, and those late on arrival, are not."""
    engine, notes, done = Gated(), Notes(), threading.Semaphore(0)
    with (
        Recorder(tmp_path) as recorder,
        Pipeline(engine, lambda _: done.release(), monitor=notes, recorder=recorder, max_age_ms=None) as pipeline,
    ):
        pipeline.submit(numbered(10))
        assert engine.entered.acquire(timeout=PATIENCE)
        for number in (20, 30, 40):
            assert pipeline.submit(numbered(number))
        notes.wait("dropped", 2)
        assert not pipeline.submit(replace(numbered(50), encoding="smell")), "refused"
        assert not pipeline.submit(numbered(15)), "late on arrival"
        engine.go.release(2)
        assert pipeline.drain(PATIENCE)
        counts = pipeline.counts
        recorder.trigger("look")
        _, found = recorded(tmp_path, recorder)
    assert (counts.answered, counts.dropped, counts.stale, counts.refused) == (2, 2, 1, {"encoding": 1})
    assert sorted(int(one.frame.data.flat[0]) for one in found) == [10, 20, 30, 40]
    assert {int(one.frame.data.flat[0]) for one in found if one.error.startswith("dropped before")} == {20, 30}


@pytest.mark.parametrize("event", ["stale", "dropped", "refused/encoding"])
def test_what_happens_every_day_is_no_alarm(tmp_path: Path, event: str) -> None:
    with watched(tmp_path, budget_ms=1e6) as (monitor, recorder, _):
        recorder.add(numbered(1), None)
        monitor.count(event)
        assert recorder.flush(PATIENCE) and not list(tmp_path.iterdir())
