"""What the README shows is what the repository holds."""

from __future__ import annotations

import json
import re
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


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z-]+)", README))))
def test_every_make_target_shown_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_every_link_leads_somewhere(path: str) -> None:
    assert (ROOT / path).exists()
