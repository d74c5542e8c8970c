"""Real processes: two on one bundle at a time, and one that is told to end while it writes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import bags
import numpy as np
import pytest
import tinynet

FRAMES = tinynet.frames(6, size=(16, 24))
#: `igate` with a real signal to itself from inside the n-th message that it writes.
ENDED = """
import os, signal, sys
from igate_edge.robotics import bag
write, left = bag.BagWriter.write, [4]
def counted(self, *message):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGTERM)
    write(self, *message)
bag.BagWriter.write = counted
from igate_edge.__main__ import main
main()
"""


def start(bundle: Path, cache: Path, into: Path, out: Path, program: tuple[str, ...] = ("-m", "igate_edge")):
    options = ["--bag", into, "--out", out, "--cache", cache, "--precision", "float", "--json"]
    command = [sys.executable, *program, "run", bundle, *options]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_on_one_bundle_and_one_cold_cache_answer_alike(tmp_path: Path, bundle: Path) -> None:
    bags.camera_bag(tmp_path / "in.mcap", FRAMES)
    outs = [tmp_path / "a.mcap", tmp_path / "b.mcap"]
    running = [start(bundle, tmp_path / "cache", tmp_path / "in.mcap", out) for out in outs]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    first, second = (
        {
            (topic, log_ns): message
            for topic, log_ns, message in bags.decoded(out)
            if "image" in type(message).__name__.lower()
        }
        for out in outs
    )
    assert len(first) == 2 * len(FRAMES) and first.keys() == second.keys()
    assert all(np.array_equal(bags.pixels(first[key]), bags.pixels(second[key])) for key in first)
    left = [
        path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix in (".tmp", ".part")
    ]
    assert not left


@pytest.mark.parametrize("name", ["out.mcap", "out"])
def test_a_terminated_run_leaves_no_half_bag_and_what_was_there(
    tmp_path: Path, bundle: Path, cache: Path, name: str
) -> None:
    bags.camera_bag(tmp_path / "in.mcap", FRAMES)
    folder = tmp_path / "made"
    if name == "out.mcap":
        folder.mkdir()
        (folder / name).write_bytes(b"an older one")
    process = start(bundle, cache, tmp_path / "in.mcap", folder / name, ("-c", ENDED))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, out + err
    assert "stopped" in err and "Traceback" not in err and not out
    left = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert left == ({name: b"an older one"} if name == "out.mcap" else {})
