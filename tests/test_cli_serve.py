"""`igate serve`: a real process on the synthetic camera, as systemd would run it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from igate_command import igate, refused
from robot import service_manager

from igate_edge.cli_serve import Latest, open_source
from igate_edge.errors import InputError, UnavailableError
from igate_edge.runtime.frame import Result

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tabletop.igate"


def _start(tmp_path: Path, *more: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "igate_edge", "serve", str(EXAMPLE), "--backend", "onnxruntime"]
    command += ["--cache", str(tmp_path / "cache"), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_service_tells_systemd_answers_and_drains_at_sigterm(tmp_path: Path) -> None:
    port, path = _free_port(), tmp_path / "notify"
    with service_manager(path, 60) as systemd:
        environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "400000"}
        latest = tmp_path / "run" / "latest.npz"
        process = _start(tmp_path, "--json", "--port", str(port), "--latest", str(latest), environment=environment)
        try:
            assert systemd.recv(4096) == b"READY=1"
            told = [systemd.recv(4096) for _ in range(6)]
            assert told.count(b"WATCHDOG=1") >= 2 and any(text.startswith(b"STATUS=") for text in told)
            until = time.monotonic() + 30
            while not latest.exists() and time.monotonic() < until:
                time.sleep(0.02)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                assert b"# TYPE" in answer.read()
            with np.load(latest) as arrays:
                assert arrays["task/semseg"].shape == (480, 640) and int(arrays["stamp_ns"]) > 0
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0, err
    document = json.loads(out)
    counts = document["counts"]
    assert counts["answered"] > 0 and counts["errors"] == {} and counts["refused"] == {}
    inside = counts["received"] - counts["answered"] - counts["dropped"] - counts["stale"]
    assert inside == 0, counts
    assert document["health"]["frames"] == counts["answered"] and document["complaints"] == {}


def _pictures(tmp_path: Path) -> Path:
    """A folder of five images."""
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(5):
        Image.fromarray(np.full((96, 128, 3), 40 * number, np.uint8)).save(pictures / f"{number}.png")
    return pictures


def test_a_folder_is_answered_frame_by_frame_and_the_service_ends(tmp_path: Path) -> None:
    pictures = _pictures(tmp_path)
    process = _start(
        tmp_path, "--json", "--port", "0", "--source", str(pictures), "--record", str(tmp_path / "records")
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["counts"]["answered"] == 5


def test_a_port_that_is_taken_is_said_before_an_engine_is_built(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = _start(tmp_path, "--port", port)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 3 and port in err and "opening" not in err, err
    assert not (tmp_path / "cache").exists()


def test_no_answer_at_all_is_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    process = _start(tmp_path, "--port", "0", "--source", str(tmp_path / "pictures"))
    out, err = process.communicate(timeout=60)
    assert process.returncode in (1, 2) and "broken.png" in out + err


@pytest.mark.parametrize("text", ["", "webcam", "v4l2://", "csi://front", "no/such/file.mp4"])
def test_a_text_that_names_no_source(text: str) -> None:
    with pytest.raises(InputError, match="not a source of frames.*synthetic, v4l2:///dev/video0"):
        open_source(text)


def test_a_camera_that_is_not_there_is_named() -> None:
    with pytest.raises((UnavailableError, InputError), match="csi|OpenCV|camera"):
        open_source("csi://0")


def _result(stamp: int) -> Result:
    return Result(
        stamp, "optical", "cam", 1, np.zeros((2, 2, 3), np.uint8), {"depth": np.full((2, 2), stamp, np.float32)}
    )


def test_the_newest_answer_replaces_the_last_one_whole(tmp_path: Path) -> None:
    latest = Latest(tmp_path / "new" / "latest.npz")
    for stamp in (1, 2):
        latest.put(_result(stamp))
        with np.load(tmp_path / "new" / "latest.npz") as arrays:
            assert int(arrays["stamp_ns"]) == stamp and str(arrays["frame_id"]) == "optical"
            assert (arrays["task/depth"] == stamp).all()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["latest.npz"]


def test_a_full_disk_leaves_the_last_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latest = Latest(tmp_path / "latest.npz")
    latest.put(_result(1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UnavailableError, match="No space left on device.*free disk space"):
        latest.put(_result(2))
    with np.load(tmp_path / "latest.npz") as arrays:
        assert int(arrays["stamp_ns"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["latest.npz"]


def test_answers_never_take_the_place_of_a_device_or_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    for place in (tmp_path / "pipe.npz", tmp_path):
        with pytest.raises(InputError, match="not a place for the answers"):
            Latest(place)
    assert (tmp_path / "pipe.npz").is_fifo()
    with pytest.raises(UnavailableError, match="File name too long"):
        Latest(tmp_path / ("x" * 300 + ".npz"))
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.npz"]


def test_what_a_killed_service_left_is_deleted_and_the_last_answers_stay(tmp_path: Path) -> None:
    path, old = tmp_path / "latest.npz", tmp_path / ".latest.npz.ab.tmp"
    Latest(path).put(_result(1))
    old.write_bytes(b"half")
    os.utime(old, (1, 1))
    Latest(path)
    assert [file.name for file in tmp_path.iterdir()] == ["latest.npz"]


@pytest.mark.parametrize("seconds", ["inf", "1e300"])
def test_a_time_that_no_clock_reaches_is_refused_at_once(tmp_path: Path, seconds: str) -> None:
    refused(igate("serve", EXAMPLE, "--port", "0", "--seconds", seconds, "--json"), 2, "not a time in seconds")


def test_a_full_disk_behind_stderr_ends_no_service(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "igate_edge", "serve", str(EXAMPLE), "--backend", "onnxruntime", "--json"]
    # A folder ends by itself once it is answered, however slow the machine is.
    command += ["--cache", str(tmp_path / "cache"), "--port", "0", "--source", str(_pictures(tmp_path))]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True, timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout)["counts"]["answered"] > 0
