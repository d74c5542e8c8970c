"""`igate serve` as it is wired: alarms write recordings, drift and causes are said, and who hangs is not alive."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bags  # noqa: F401  (skips where the extra `bag` is missing)
import numpy as np
import pytest
import tinynet
from robot import PATIENCE, Echo, Gated, numbered

from igate_edge import cli_serve
from igate_edge.cli_serve import Health, ServeArgs, _alive, _said_every, serve
from igate_edge.engines.session import Closing
from igate_edge.errors import InputError, UnavailableError
from igate_edge.robotics.replay import read_recording
from igate_edge.runtime import device_state, monitor, supervise
from igate_edge.runtime.device_state import State
from igate_edge.runtime.engine import Engine
from igate_edge.runtime.exporters import JsonLines, prometheus
from igate_edge.runtime.pipeline import Pipeline
from igate_edge.runtime.supervise import Supervised

image = pytest.importorskip("PIL.Image", reason="NOT TESTED: Pillow is missing, pip install 'igate-edge[images]'")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinynet.packaged(tmp_path_factory.mktemp("serve") / "tiny.igate")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def served(bundle: Path, cache: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the service in this process on a folder of frames, `level` times as bright as those of calibration."""

    def run(count: int = 40, level: float = 1.0, **settings: Any) -> dict[str, Any]:
        folder = tmp_path / "pictures"
        folder.mkdir()
        for k, pixels in zip(range(count), itertools.cycle(tinynet.frames(8)), strict=False):
            image.fromarray((pixels * level).astype(np.uint8)).save(folder / f"{k:03d}.png")
        settings = {"source": str(folder), "port": 0, **settings}
        return serve(ServeArgs(bundle, backend="onnxruntime", cache=cache, **settings)).document

    return run


def reasons(document: Mapping[str, Any]) -> list[str]:
    """Why the recordings of a document were made; each holds frames."""
    found = []
    for path in document["recordings"]:
        about, frames = read_recording(path, [])
        assert list(frames)
        found.append(about["reason"])
    return found


def test_a_process_that_misses_its_deadlines_records_counts_and_writes_health_lines(
    bundle: Path, cache: Path, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines, records = tmp_path / "logs" / "health.jsonl", tmp_path / "records"
    command = [sys.executable, "-m", "igate_edge", "serve", str(bundle), "--backend", "onnxruntime", "--json"]
    command += ["--cache", str(cache), "--port", str(port), "--budget-ms", "0.001"]
    command += ["--record", str(records), "--jsonl", str(lines)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        text, until = "", time.monotonic() + 60
        # The drift score takes some seconds: two frames a second are looked at, eight give one.
        while "igate_drift_score" not in text and time.monotonic() < until and process.poll() is None:
            time.sleep(0.1)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                    text = answer.read().decode()
            except OSError:
                continue  # not yet up
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    said = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[:1] != "#"}
    assert said['igate_verdict{level="ERROR"}'] == 1 and said["igate_deadline_misses_total"] >= 5, text
    assert said["igate_drift_score"] >= 1, "a made-up scene is none of the calibration frames"
    document = json.loads(out)
    assert document["health"]["drift"]["status"] == "high" and document["health"]["deadline"]["longest_streak"] >= 5
    assert "deadline: 5 frames in a row took more than 0.001 ms" in reasons(document), err
    assert all(Path(path).parent == records for path in document["recordings"])
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert rows[-1]["frames"] == document["counts"]["answered"], "the last line is written once all frames are counted"
    assert rows[-1]["deadline"]["misses"] == document["health"]["deadline"]["misses"] and rows[-1]["time_ns"] > 0


def test_drift_and_its_feature_reach_what_is_said(
    served: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "INSPECT_S", 0.0)  # each frame is looked at, instead of two a second
    document = served(level=0.1, record=tmp_path / "records")
    drift = document["health"]["drift"]
    assert (drift["status"], drift["inspected"]) == ("high", 40) and drift["features"]["brightness"] >= 1
    assert any(hint.startswith("input: unlike the calibration") for hint in document["health"]["verdict"]["hints"])
    text = prometheus(document["health"])
    assert 'igate_hint{cause="input"} 1' in text and 'igate_drift_feature_score{feature="brightness"}' in text
    assert [reason.partition(":")[0] for reason in reasons(document)] == ["drift"]


def test_frames_like_those_of_calibration_are_no_drift(
    served: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "INSPECT_S", 0.0)
    document = served(record=tmp_path / "records", budget_ms=1e6)
    assert document["health"]["drift"]["status"] == "low" and document["recordings"] == []


def test_what_the_board_says_reaches_what_is_said(
    served: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = itertools.count(3)
    states = (State(throttle_events=number, temperatures={"gpu": 97.5}) for number in events)
    monkeypatch.setattr(device_state, "read_state", lambda: next(states))
    monkeypatch.setattr(monitor, "LOOK_S", 0.0)  # at every question, instead of twice a second
    document = served(count=10, budget_ms=0.001)
    health = document["health"]
    assert health["device"]["temperatures"] == {"gpu": 97.5} and health["device"]["throttle_events"] > 3
    assert any(hint.startswith("throttling: the board's counter") for hint in health["verdict"]["hints"])
    text = prometheus(health)
    assert 'igate_temperature_celsius{zone="gpu"} 97.5' in text and 'igate_hint{cause="throttling"} 1' in text


class _FailsOnce(Closing):
    """The real engine, whose tenth call fails as a lost driver does."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._calls = engine, 0
        self.preprocess, self.tasks = engine.preprocess, engine.tasks

    def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self._calls += 1
        if self._calls == 10:
            raise RuntimeError("the driver is gone")
        return self._engine.infer(image)

    def close(self) -> None:
        self._engine.close()


def test_an_engine_that_fails_is_counted_and_recorded(
    served: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Engine.open
    monkeypatch.setattr(Engine, "open", lambda *arguments, **more: _FailsOnce(opened(*arguments, **more)))
    document = served(record=tmp_path / "records")
    counts = document["health"]["counts"]
    assert document["counts"]["answered"] >= 9 and document["counts"]["errors"]["infer"] >= 1
    assert counts["error/infer"] >= 1 and "infer" in document["complaints"]
    assert reasons(document)[0] == "error: infer"


def test_an_engine_that_is_lost_for_good_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    now, opened = [0.0], threading.Event()

    class Lost(Echo):
        def __init__(self) -> None:
            super().__init__()
            if opened.is_set():
                raise UnavailableError("no device", "the driver is gone", "restart")
            opened.set()

        def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
            raise RuntimeError("the driver is gone")

    with (
        Supervised(Lost, backoff_s=(0.01, 0.01), clock=lambda: now[0]) as engine,
        Pipeline(engine, lambda result: None, mode="every") as pipeline,
    ):
        assert _alive(engine, pipeline)
        assert pipeline.run([numbered(1)]).errors == {"infer": 1}
        now[0] = supervise.DOWN_S - 1
        assert _alive(engine, pipeline), "it is being opened again"
        now[0] = supervise.DOWN_S + 1
        assert not _alive(engine, pipeline)


def test_a_pipeline_that_is_stuck_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_serve, "STUCK_S", 0.05)
    raw = Gated()
    with Supervised(lambda: raw, hang_s=PATIENCE) as engine, Pipeline(engine, lambda result: None) as pipeline:
        assert _alive(engine, pipeline)
        pipeline.submit(numbered(1))
        assert raw.entered.acquire(timeout=PATIENCE)
        until = time.monotonic() + PATIENCE
        while pipeline.stuck_s < 0.05 and time.monotonic() < until:
            time.sleep(0.005)
        assert engine.alive and not _alive(engine, pipeline)
        raw.go.release()
        assert pipeline.drain(PATIENCE) and _alive(engine, pipeline)


def test_the_watchdog_is_told_by_both(served: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not alive sends no WATCHDOG=1: what systemd sees of a service whose every look fails."""
    told: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("")  # the kernel chooses an abstract address
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + systemd.getsockname()[1:].decode())
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        monkeypatch.setattr(cli_serve, "STUCK_S", 0.0)  # even a pipeline that waits counts as stuck
        served(source="synthetic", seconds=1.5)
        systemd.setblocking(False)
        while True:
            try:
                told.append(systemd.recv(4096))
            except BlockingIOError:
                break
    assert b"READY=1" in told and b"WATCHDOG=1" not in told
    assert sum(text.startswith(b"STATUS=") for text in told) >= 2, told


def test_a_line_of_health_is_written_every_period(
    served: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_serve, "SAY_S", 0.02)
    path = tmp_path / "health.jsonl"
    document = served(source="synthetic", seconds=1.0, jsonl=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) >= 3 and [row["frames"] for row in rows] == sorted(row["frames"] for row in rows)
    assert rows[-1]["frames"] == document["counts"]["answered"] and "buckets" not in rows[-1]["stages"]["infer"]


class _Disk:
    """A file of lines on a disk that is full for a while."""

    def __init__(self, *full: bool) -> None:
        self._full, self.tried = iter(full), threading.Semaphore(0)

    def write(self, snapshot: Mapping[str, Any]) -> None:
        self.tried.release()
        if next(self._full, False):
            raise UnavailableError("cannot write x", "No space left on device", "free disk space")


def test_a_full_disk_is_said_once_and_lines_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    health = Health(monitor.Monitor(), _Disk(False, True, True, False, True))  # type: ignore[arg-type]
    for _ in range(5):
        health.write()
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        "no health line",
        "health lines are written again",
        "no health line",
    ]
    assert "No space left on device" in said[0]


def test_a_disk_that_stays_full_never_stops_the_lines() -> None:
    disk = _Disk(*[True] * 1000)
    with _said_every(0.01, monitor.Monitor(), disk):  # type: ignore[arg-type]
        assert all(disk.tried.acquire(timeout=PATIENCE) for _ in range(3))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_service_on_a_full_disk_answers_all_frames(bundle: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for k, pixels in enumerate(tinynet.frames(5)):
        image.fromarray(pixels).save(tmp_path / "pictures" / f"{k}.png")
    command = [sys.executable, "-m", "igate_edge", "serve", str(bundle), "--backend", "onnxruntime", "--json"]
    command += ["--cache", str(cache), "--port", "0", "--source", str(tmp_path / "pictures"), "--jsonl", "/dev/full"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout)["counts"]["answered"] == 5, done.stderr
    assert done.stderr.count("no health line: cannot write /dev/full: No space left on device") == 1


def test_lines_are_never_written_to_a_pipe_or_a_folder(served: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    reader = os.open(tmp_path / "pipe.jsonl", os.O_RDONLY | os.O_NONBLOCK)  # else opening it to write would wait
    try:
        with pytest.raises(InputError, match="not a place for lines of JSON: .*is a pipe"):
            served(jsonl=tmp_path / "pipe.jsonl")
    finally:
        os.close(reader)
    with pytest.raises(UnavailableError, match="give a file name, not a folder"):
        JsonLines(tmp_path)
