"""Every net of the results table as a training run of its own, so that `igate export` makes a bundle of any of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomic
from .rivals import Table

#: Row name -> what the report of an exported net calls it.
LABELS = {
    "single": "single-task nets",
    "plain": "plain shared net",
    "widened": "plain net widened",
    "random": "random gates",
}


def write_runs(table: Table, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Write `result.json` beside each multi-task net's `final.safetensors`; returns the folders for `igate export`."""
    own = [row for row in rows if row["seed"] == table.config.seed]
    folders = []
    for row in own:
        folder = table.folder / row["name"]
        if row["name"] == "single" or not (folder / "final.json").exists():
            continue
        done = json.loads((folder / "final.json").read_text())
        stage = {key: done[key] for key in ("steps", "seconds", "macs", "metrics")}
        about = {
            "tasks": [task.spec.as_json() for task in table.tasks],
            "preprocess": table.config.preprocess().as_json(),
            "config": done["config"],
            "metrics": done["metrics"],
            "plain": None,
            "weights": table.balance().weights(),
            "hard": done.get("hard"),
            "stages": {"all": {**stage, "steps": row["train_steps"], "seconds": row["train_seconds"]}},
            "rivals": {label(other): other["all_metrics"] for other in own if rival(row, other)},
        }
        write_atomic(folder / "result.json", json.dumps(about, indent=1) + "\n")
        folders.append(folder)
    return folders


def rival(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `other` belongs beside `row` in a report: fixed rivals, and those made for the same share."""
    share, others = (str(item["name"]).partition("-")[2] for item in (row, other))
    return other is not row and not str(other["name"]).startswith("ours") and others in ("", share)


def label(row: dict[str, Any]) -> str:
    """A row's name in words.

    >>> label({"name": "widened-25"})
    'plain net widened to the same MACs, float'
    """
    kind = str(row["name"]).partition("-")[0]
    return f"{LABELS[kind]}{' to the same MACs' if kind == 'widened' else ''}, float"
