"""A monitor's figures for others: Prometheus text on localhost, rows of a ROS DiagnosticArray, lines of JSON."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..engines.session import Closing
from ..errors import InputError, UnavailableError
from ..files import as_path, os_errors
from .monitor import LEVELS, Monitor

#: Labels and value of each line of a metric.
Rows = Iterable[tuple[Mapping[str, str], Any]]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Bytes after which a JSON-lines file starts anew; the one before is kept beside it.
MAX_LINES_BYTES = 64 << 20


def prometheus(snapshot: Mapping[str, Any]) -> str:
    """A monitor's snapshot in Prometheus' text format 0.0.4: seconds, hertz and shares; unknown values are left out.

    >>> print(prometheus(Monitor().snapshot()).splitlines()[1])
    # TYPE igate_up gauge
    """
    out = io.StringIO()
    level = snapshot["verdict"]["level"]
    _write(out, "igate_up", "gauge", "1 while the monitor answers.", [({}, 1)])
    _write(out, "igate_frames_total", "counter", "Frames answered.", [({}, snapshot["frames"])])
    _write(out, "igate_frames_per_second", "gauge", "Over the verdict's window.", [({}, snapshot["fps"])])
    levels = [({"level": name}, int(name == level)) for name in LEVELS]
    _write(out, "igate_verdict", "gauge", "1 at the level of the verdict.", levels)
    hints = [({"cause": hint.partition(":")[0]}, 1) for hint in snapshot["verdict"]["hints"]]
    _write(out, "igate_hint", "gauge", "1 for each likely cause.", hints)
    for name in ("budget", "period"):
        _write(out, f"igate_{name}_seconds", "gauge", f"The {name} that was set.", [({}, _s(snapshot[f"{name}_ms"]))])
    _stages(out, snapshot["stages"])
    deadline = snapshot["deadline"]
    _write(out, "igate_deadline_misses_total", "counter", "Frames above the budget.", [({}, deadline["misses"])])
    _write(out, "igate_deadline_streak", "gauge", "Missed in a row, now.", [({}, deadline["streak"])])
    longest: Rows = [({}, deadline["longest_streak"])]
    _write(out, "igate_deadline_longest_streak", "gauge", "Most missed in a row.", longest)
    events = [({"event": name}, number) for name, number in sorted(snapshot["counts"].items())]
    _write(out, "igate_events_total", "counter", "Events by name.", events)
    _drift(out, snapshot["drift"])
    _device(out, snapshot["device"])
    return out.getvalue()


def _stages(out: io.StringIO, stages: Mapping[str, Any]) -> None:
    name = "igate_stage_seconds"
    if stages:
        out.write(f"# HELP {name} Time of a stage.\n# TYPE {name} histogram\n")
    for stage, figures in stages.items():
        for edge, seen in (*figures["buckets"], [math.inf, figures["count"]]):
            _line(out, f"{name}_bucket", {"stage": stage, "le": _number(edge / 1e3)}, seen)
        _line(out, f"{name}_sum", {"stage": stage}, figures["sum"] / 1e3)
        _line(out, f"{name}_count", {"stage": stage}, figures["count"])
    for share in ("p50", "p90", "p99", "p99.9", "max"):
        rows = [({"stage": stage}, _s(figures[share])) for stage, figures in stages.items()]
        title = f"igate_stage_{share.replace('.', '_')}_seconds"
        _write(out, title, "gauge", "Over all frames, to 5 %." if share != "max" else "Longest time.", rows)


def _drift(out: io.StringIO, drift: Mapping[str, Any]) -> None:
    _write(out, "igate_drift_score", "gauge", "1 and above: unlike the calibration frames.", [({}, drift["score"])])
    parts = [({"feature": name}, value) for name, value in drift["features"].items()]
    _write(out, "igate_drift_feature_score", "gauge", "The score of each feature.", parts)
    outside = [({"tensor": name}, value) for name, value in drift["outside_range"].items()]
    _write(out, "igate_outside_range_ratio", "gauge", "Share of values outside the calibrated range.", outside)


def _device(out: io.StringIO, device: Mapping[str, Any]) -> None:
    clocks = [({"clock": name}, device.get(f"{name}_hz")) for name in ("gpu", "cpu", "emc")]
    _write(out, "igate_clock_hertz", "gauge", "Clocks now.", clocks)
    _write(out, "igate_gpu_load_ratio", "gauge", "GPU load, 0 to 1.", [({}, device.get("gpu_load"))])
    others: Rows = [({}, device.get("other_load"))]
    _write(out, "igate_other_load_ratio", "gauge", "Share of our cores that other programs take.", others)
    throttled: Rows = [({}, device.get("throttle_events"))]
    _write(out, "igate_throttle_events_total", "counter", "Throttling events since boot.", throttled)
    temperatures = [({"zone": name}, value) for name, value in device.get("temperatures", {}).items()]
    _write(out, "igate_temperature_celsius", "gauge", "By thermal zone.", temperatures)
    rails = [({"rail": name}, value / 1e3) for name, value in device.get("rails_mw", {}).items()]
    _write(out, "igate_power_watts", "gauge", "By power rail.", rails)


def _write(out: io.StringIO, name: str, kind: str, about: str, rows: Rows) -> None:
    """One metric; nothing of it when no row has a value."""
    known = [(labels, value) for labels, value in rows if value is not None]
    if known:
        out.write(f"# HELP {name} {about}\n# TYPE {name} {kind}\n")
    for labels, value in known:
        _line(out, name, labels, value)


def _line(out: io.StringIO, name: str, labels: Mapping[str, str], value: float) -> None:
    escaped = {key: _escape(text) for key, text in labels.items()}
    inside = ",".join(f'{key}="{text}"' for key, text in escaped.items())
    out.write(f"{name}{{{inside}}} {_number(value)}\n" if inside else f"{name} {_number(value)}\n")


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    return "+Inf" if value == math.inf else f"{value:.10g}"


def _s(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3


class _Handler(BaseHTTPRequestHandler):
    """GET /metrics; bound to the monitor by `serve`."""

    monitor: Monitor
    #: A client that stops in mid-request must not hold its thread for ever.
    timeout = 5

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "only /metrics is here")
            return
        body = prometheus(self.monitor.snapshot()).encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in mid-answer is no news either; socketserver would print a traceback."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Server(Closing):
    """The running exporter of `serve`; `port` is the one that was taken."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self._server: ThreadingHTTPServer | None = server
        self.port = int(server.server_address[1])
        self._thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="igate-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the port; closing twice is fine."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self._thread.join()


def serve(monitor: Monitor, port: int = 9464) -> Server:
    """Answer http://127.0.0.1:PORT/metrics until closed; port 0 takes a free one. Never visible from outside.

    Raises InputError for what is no port and UnavailableError when it is taken.
    """
    if type(port) is not int or not 0 <= port <= 65535:
        raise InputError("not a port", f"{port!r:.40}", "pass a whole number from 0 to 65535")
    handler = type("Handler", (_Handler,), {"monitor": monitor})
    try:
        server = _Quiet(("127.0.0.1", port), handler)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnavailableError(f"cannot serve metrics on port {port}", reason, "choose another port, or 0") from error
    server.daemon_threads = True
    return Server(server)


def diagnostics(monitor: Monitor) -> list[tuple[int, str, str, dict[str, str]]]:
    """(level, name, message, values) of each diagnostic_msgs/DiagnosticStatus: the verdict, then one row a concern.

    Levels are OK 0, WARN 1, ERROR 2, STALE 3; all values are strings, as in diagnostic_msgs/KeyValue.
    """
    seen = monitor.snapshot()
    verdict, concerns = seen["verdict"], monitor.concerns()
    rows = [(LEVELS[verdict["level"]], "perception", verdict["sentence"], _hint_values(verdict["hints"]))]
    times = {
        f"{stage} {share}": _ms(figures[share])
        for stage, figures in seen["stages"].items()
        for share in ("p50", "p99", "max")
    }
    values: dict[str, dict[str, str]] = {
        "frames": {"answered": str(seen["frames"]), "fps": _text(seen["fps"])}
        | {name: str(number) for name, number in sorted(seen["counts"].items())},
        "latency": {"budget": _ms(seen["budget_ms"])}
        | {name: str(number) for name, number in seen["deadline"].items()}
        | times,
        "errors": {name: str(n) for name, n in sorted(seen["counts"].items()) if name.partition("/")[0] == "error"},
        "input": {"score": _text(seen["drift"]["score"])}
        | {name: _text(value) for name, value in seen["drift"]["features"].items()}
        | {f"outside range, {name}": _text(value) for name, value in seen["drift"]["outside_range"].items()},
    }
    rows += [(LEVELS[level], f"perception: {name}", said, values[name]) for name, (level, said) in concerns.items()]
    return [*rows, _device_row(seen)]


def _hint_values(hints: Iterable[str]) -> dict[str, str]:
    return {cause: said.strip() for cause, _, said in (hint.partition(":") for hint in hints)}


def _device_row(seen: Mapping[str, Any]) -> tuple[int, str, str, dict[str, str]]:
    values: dict[str, str] = {}
    for name, value in seen["device"].items():
        if isinstance(value, Mapping):
            values |= {f"{name}/{part}": _text(number) for part, number in value.items()}
        elif value is not None:
            values[name] = _text(value)
    causes = [hint for hint in seen["verdict"]["hints"] if hint.startswith(("throttling", "clock", "load"))]
    said = "; ".join(causes) or ("no cause of delay seen" if values else "nothing can be read here")
    return LEVELS["WARN" if causes else "OK"], "perception: device", said, values


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _ms(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f} ms"


class JsonLines(Closing):
    """Appends one line of JSON a call to `path`; at MAX_LINES_BYTES the file moves to PATH.1 and starts anew.

    Raises UnavailableError when the file cannot be written, InputError for a pipe: its reader could stop the robot. No
    line is ever left half written.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int = MAX_LINES_BYTES) -> None:
        self._path, self._most, self._lock = as_path(path), max_bytes, threading.Lock()
        with os_errors(self._path, "write"):
            if self._path.is_fifo():
                raise InputError("not a place for lines of JSON", f"{self._path} is a pipe", "give a name NAME.jsonl")
            self._file: Any = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def write(self, snapshot: Mapping[str, Any]) -> None:
        """Append a snapshot without its buckets, with the wall clock's "time_ns"."""
        stages = {
            name: {key: value for key, value in figures.items() if key != "buckets"}
            for name, figures in snapshot["stages"].items()
        }
        row = {"time_ns": time.time_ns(), **snapshot, "stages": stages}
        line = json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._lock, os_errors(self._path, "write"):
            if self._file is None:
                raise InputError("the file of JSON lines is closed", str(self._path), "write before close()")
            start = self._file.tell()
            if start and start + len(line) > self._most:
                # In this order: when a step fails the old file is still open, and the next line tries again.
                os.replace(self._path, self._path.with_name(f"{self._path.name}.1"))
                fresh = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
                self._file.close()
                self._file, start = fresh, 0
            if self._file.write(line) != len(line):
                self._file.truncate(start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            file.close()
