"""The examples run as they stand, with fewer steps."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from igate_edge import Bundle
from igate_edge.training.landing import Measured

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_own_backbone(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "own_backbone.py"))["main"]
    main(str(tmp_path / "own.igate"), search=2, steps=4, measure=lambda net: Measured(1.0, 0.98 * 1.2))
    bundle = Bundle.read(tmp_path / "own.igate")
    opened = [share for site in bundle.manifest["gates"] for share in site["open"].values()]
    assert bundle.manifest["form"] == "merged"
    assert {task["name"] for task in bundle.manifest["tasks"]} == {"semseg", "depth"}
    assert any("1" in share for share in opened) and any("0" in share for share in opened), "some gates are open"
    said = capsys.readouterr().out
    # On another machine than the table's nothing is measured, and the share is the predicted one.
    assert re.search(r"the engine takes (9[5-9]|100)% of the budget", said) and "engine runs in" in said
