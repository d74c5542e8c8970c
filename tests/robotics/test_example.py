"""The example runs as it stands, with fewer seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bags
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_bag_to_bag(tmp_path: Path) -> None:
    pytest.importorskip("mujoco", reason="NOT TESTED: MuJoCo is missing, pip install 'igate-edge[train]'")
    place = {**os.environ, "PYTHON": sys.executable, "HOME": str(tmp_path)}
    script = [str(ROOT / "examples" / "bag_to_bag.sh"), str(tmp_path / "made"), "0.5"]
    done = subprocess.run(script, capture_output=True, text=True, env=place, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 frame(s) of /camera/image_raw/compressed: /camera/igate/..." in done.stdout
    assert (
        len({bags.stamp(one) for topic, _, one in bags.decoded(tmp_path / "made" / "results.mcap") if "depth" in topic})
        == 5
    )
    lines = done.stdout.splitlines()[-3:]
    assert [line.split()[:2] for line in lines] == [
        ["semseg:", "miou"],
        ["depth:", "rmse"],
        ["normals:", "mean_angle"],
    ]
