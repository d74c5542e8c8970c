"""Exporters: Prometheus text by the official parser, over HTTP on localhost only; diagnostics; lines of JSON."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from monitored import Clock, feed

from igate_edge.errors import InputError, UnavailableError
from igate_edge.runtime.device_state import State
from igate_edge.runtime.exporters import CONTENT_TYPE, JsonLines, diagnostics, prometheus, serve
from igate_edge.runtime.monitor import Monitor

parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client, which reads it back, is missing")


@pytest.fixture
def monitor() -> Monitor:
    clock = Clock()
    board = State(gpu_hz=(1, 918000000, 500000000), throttle_events=4, temperatures={"gpu": 61.5}, gpu_load=0.1)
    made = Monitor(10.0, period_ms=33.0, clock=clock, load=clock.quiet, state=lambda: board)
    feed(made, clock, *[2.0] * 90, *[12.0] * 10, infer=1.5)
    made.count("dropped", 3)
    made.count('odd "name"\\\n')
    return made


def parsed(text: str) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Sample name -> labels -> value, as the official parser reads it."""
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in parser.text_string_to_metric_families(text):
        assert family.documentation and family.type in ("gauge", "counter", "histogram")
        for sample in family.samples:
            rows = found.setdefault(sample.name, {})
            labels = frozenset(sample.labels.items())
            assert labels not in rows, f"{sample.name} {sample.labels} comes twice"
            rows[labels] = sample.value
    return found


def test_the_official_parser_reads_it_back(monitor: Monitor) -> None:
    found = parsed(prometheus(monitor.snapshot()))
    nothing = frozenset[tuple[str, str]]()
    assert found["igate_frames_total"][nothing] == 100 and found["igate_budget_seconds"][nothing] == 0.01
    assert found["igate_deadline_misses_total"][nothing] == 10
    assert found["igate_verdict"][frozenset({("level", "ERROR")})] == 1 and sum(found["igate_verdict"].values()) == 1
    assert found["igate_events_total"] == {
        frozenset({("event", "dropped")}): 3,
        frozenset({("event", 'odd "name"\\\n')}): 1,
    }
    assert found["igate_clock_hertz"] == {frozenset({("clock", "gpu")}): 5e8}
    assert found["igate_hint"] == {frozenset({("cause", "clock")}): 1}
    assert found["igate_temperature_celsius"] == {frozenset({("zone", "gpu")}): 61.5}
    assert "igate_drift_score" not in found and "igate_power_watts" not in found  # unknown is not 0


def test_buckets_are_cumulative_and_end_with_all(monitor: Monitor) -> None:
    found = parsed(prometheus(monitor.snapshot()))
    buckets = {
        float(dict(labels)["le"]): value
        for labels, value in found["igate_stage_seconds_bucket"].items()
        if dict(labels)["stage"] == "end_to_end"
    }
    ordered = [buckets[edge] for edge in sorted(buckets)]
    assert ordered == sorted(ordered) and buckets[float("inf")] == 100
    assert buckets[0.002] == 90 and max(count for edge, count in buckets.items() if edge < 0.012) == 90
    whole = frozenset({("stage", "end_to_end")})
    assert found["igate_stage_seconds_count"][whole] == 100
    assert found["igate_stage_seconds_sum"][whole] == pytest.approx(0.3)
    assert found["igate_stage_p99_seconds"][whole] == pytest.approx(0.012, rel=0.05)


def test_a_new_monitor_can_be_scraped() -> None:
    clock = Clock()
    found = parsed(prometheus(Monitor(clock=clock, load=clock.quiet).snapshot()))
    assert found["igate_verdict"][frozenset({("level", "STALE")})] == 1 and "igate_budget_seconds" not in found


def test_it_is_served_on_localhost_until_closed(monitor: Monitor) -> None:
    with serve(monitor, 0) as server:
        url = f"http://127.0.0.1:{server.port}"
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"] == CONTENT_TYPE
            assert parsed(answer.read().decode())["igate_frames_total"]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/", timeout=10)
        assert server._server is not None and server._server.server_address[0] == "127.0.0.1"
        with pytest.raises(UnavailableError, match=f"cannot serve metrics on port {server.port}"):
            serve(monitor, server.port)
    server.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/metrics", timeout=10)
    for wrong in (70000, -1, "80"):
        with pytest.raises(InputError, match="not a port"):
            serve(monitor, wrong)  # type: ignore[arg-type]


def test_diagnostics_have_a_row_a_concern(monitor: Monitor) -> None:
    rows = diagnostics(monitor)
    assert [name for _, name, _, _ in rows] == [
        "perception",
        "perception: frames",
        "perception: latency",
        "perception: errors",
        "perception: input",
        "perception: device",
    ]
    levels = {name: level for level, name, _, _ in rows}
    assert levels["perception"] == levels["perception: latency"] == 2 and levels["perception: frames"] == 0
    assert levels["perception: device"] == 1
    values = {name: row for _, name, _, row in rows}
    assert "GPU runs at 500 MHz" in values["perception"]["clock"]
    assert float(values["perception: latency"]["infer p50"].removesuffix(" ms")) == pytest.approx(1.5, rel=0.05)
    assert values["perception: latency"]["misses"] == "10" and values["perception: frames"]["dropped"] == "3"
    assert values["perception: device"]["temperatures/gpu"] == "61.5"
    assert values["perception: input"]["score"] == "unknown"
    assert all(isinstance(text, str) for row in values.values() for text in row.values())


def test_lines_of_json_are_whole_and_bounded(monitor: Monitor, tmp_path: Path) -> None:
    path, snapshot = tmp_path / "log.jsonl", monitor.snapshot()
    with JsonLines(path) as lines:
        lines.write(snapshot)
    size = path.stat().st_size
    with JsonLines(path, max_bytes=3 * size) as lines:
        for _ in range(4):
            lines.write(snapshot)
    rows = [json.loads(line) for file in (tmp_path / "log.jsonl.1", path) for line in file.read_text().splitlines()]
    assert len(rows) == 5 and all(file.stat().st_size <= 3.1 * size for file in tmp_path.iterdir())
    assert rows[0]["frames"] == 100 and "buckets" not in rows[0]["stages"]["infer"]
    assert [row["time_ns"] for row in rows] == sorted(row["time_ns"] for row in rows)
    lines.close()
    with pytest.raises(InputError, match="closed"):
        lines.write(snapshot)
    with pytest.raises(UnavailableError, match="cannot write"):
        JsonLines(tmp_path / "absent" / "log.jsonl")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_said(monitor: Monitor) -> None:
    lines = JsonLines("/dev/full")
    with pytest.raises(UnavailableError, match=os.strerror(errno.ENOSPC)):
        lines.write(monitor.snapshot())
    lines.close()


def test_a_client_that_goes_away_leaves_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:

    answered = threading.Event()

    class Slow(Monitor):
        def snapshot(self) -> dict[str, Any]:
            client.close()  # with a reset, before anything was answered
            try:
                return super().snapshot()
            finally:
                answered.set()

    with serve(Slow(), 0) as server:
        client = socket.create_connection(("127.0.0.1", server.port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert answered.wait(20)
        for thread in threading.enumerate():
            if "process_request" in thread.name:
                thread.join(20)
    assert capsys.readouterr().err == ""


def test_a_file_that_cannot_move_away_is_tried_again(tmp_path: Path) -> None:
    path, way = tmp_path / "health.jsonl", tmp_path / "health.jsonl.1"
    snapshot = Monitor().snapshot()
    with JsonLines(path, max_bytes=1) as lines:
        lines.write(snapshot)
        (way / "full").mkdir(parents=True)
        for _ in range(2):
            with pytest.raises(UnavailableError, match="cannot write"):
                lines.write(snapshot)
        (way / "full").rmdir()
        way.rmdir()
        lines.write(snapshot)
    assert len(path.read_text().splitlines()) == len(way.read_text().splitlines()) == 1
