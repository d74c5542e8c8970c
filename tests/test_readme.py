"""What the README shows is what the repository holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from igate_edge import cli
from igate_edge.reports.results_table import markdown

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_results_table_is_the_committed_data() -> None:
    shown = README.split("<!-- results -->")[1].split("<!-- /results -->")[0].strip()
    assert shown == markdown(json.loads((ROOT / "examples" / "results.json").read_text()))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"^igate ([a-z]+) ?", README, re.MULTILINE))))
def test_every_command_shown_exists(name: str) -> None:
    assert name in get_command(cli.app).commands


def test_the_loop_on_the_robot_runs_as_shown(tmp_path: Path) -> None:
    (program,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Pipeline(" in block)
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines and all(
        re.fullmatch(r"Result\(stamp_ns=\d+, .*semseg uint8 \[\d+, \d+\].* ms\)", line) for line in lines
    )


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", README))))
def test_every_make_target_shown_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_every_link_leads_somewhere(path: str) -> None:
    assert (ROOT / path).exists()
