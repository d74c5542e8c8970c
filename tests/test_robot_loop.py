"""The loop that a robotics engineer copies runs as it stands, on the shipped bundle and the made-up camera."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from igate_edge.runtime.sources import Synthetic

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize("name", ["main", "service"])
def test_robot_loop(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    loop = runpy.run_path(str(EXAMPLES / "robot_loop.py"))
    camera = Synthetic(160, 120, rate_hz=100, frames=12, jitter_ms=1, drop_share=0.1)
    counts = loop[name](EXAMPLES / "tabletop.igate", camera)
    assert counts.answered >= 1 and counts.inside == 0 and not counts.errors and not counts.refused
    assert counts.received == counts.answered + counts.dropped + counts.stale
    said = capsys.readouterr().out
    assert "m away; inference" in said and ("Verdict(" in said) == (name == "service")
