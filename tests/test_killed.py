"""Killed at the worst moment, between writing and renaming: what stood there is whole, and the next run succeeds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tinynet

from igate_edge.builder import build
from igate_edge.bundle import Bundle
from igate_edge.package import package

FRAMES = tinynet.frames(8)
#: Kills its own process, as the system would, in place of the first rename.
KILL = "import os, signal, sys\nos.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"


def killed(code: str, *arguments: object) -> None:
    command = [sys.executable, "-c", KILL + code, *map(str, arguments)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def leftovers(folder: Path) -> list[str]:
    """Files in `folder` whose names are no temporary ones of ours; there is exactly one of those."""
    names = sorted(path.name for path in folder.iterdir())
    assert sum(name.startswith(".") and name.endswith(".tmp") for name in names) == 1, names
    return [name for name in names if not name.startswith(".")]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    return path


def test_a_killed_build_leaves_no_engine_and_the_next_one_succeeds(bundle: Path, tmp_path: Path) -> None:
    before, cache = bundle.read_bytes(), tmp_path / "cache"
    code = "from igate_edge import build; build(sys.argv[1], precision='float', cache_dir=sys.argv[2])"
    killed(code, bundle, cache)
    assert leftovers(cache) == [] and bundle.read_bytes() == before
    assert not build(bundle, precision="float", cache_dir=cache).cached
    assert build(bundle, precision="float", cache_dir=cache).cached


def test_a_killed_export_keeps_the_old_bundle_and_the_next_one_succeeds(bundle: Path, tmp_path: Path) -> None:
    before, seal = bundle.read_bytes(), Bundle.read(bundle).seal
    code = (
        "import tinynet; from igate_edge.package import package; frames = tinynet.frames(8)\n"
        "package(tinynet.gated_onnx(seed=1), sys.argv[1], calibration=frames, golden=frames[:4])"
    )
    killed(code, bundle)
    assert bundle.read_bytes() == before and leftovers(tmp_path) == ["a.igate"]
    package(tinynet.gated_onnx(seed=1), bundle, calibration=FRAMES, golden=FRAMES[:4])
    assert Bundle.read(bundle).seal != seal
