"""A benchmark that was skipped or switched off must not look like one that passed (cases L6)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parent.parent / "benchmarks" / "conftest.py"
TEST = """
def test_fast(seconds):
    assert seconds(lambda: None) < 1
"""


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--benchmark-disable"], 1), (["--benchmark-skip"], 1)])
def test_only_a_measured_benchmark_passes(tmp_path: Path, flags: list[str], code: int) -> None:
    shutil.copy(CONFTEST, tmp_path / "conftest.py")
    (tmp_path / "test_x.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), *flags]
    # pytest-benchmark switches itself off under xdist, whose workers it knows by these variables.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone)
    assert done.returncode == code, done.stdout
    assert code == 0 or "did not run" in done.stdout or "nothing was measured" in done.stdout
