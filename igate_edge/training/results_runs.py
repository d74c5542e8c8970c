"""Every net of a comparison as a training run of its own, so that `igate export` makes a bundle of any of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files import write_atomic
from ..reports.nets import kind_of, net_name
from .rivals import Table
from .stages import time_budget


def write_runs(table: Table, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Write `result.json` beside each net's `final.safetensors`; returns the folders for `igate export`."""
    own = [row for row in rows if row["seed"] == table.config.seed]
    goals, folders = {goal.name: goal.text for goal in table.goals}, []
    for row in own:
        folder = table.folder / row["name"]
        done = json.loads((folder / "final.json").read_text())
        spent = {key.removeprefix("train_"): row[key] for key in ("train_steps", "train_seconds", "train_macs")}
        about = {
            "tasks": [task.spec.as_json() for task in table.tasks],
            "preprocess": table.config.preprocess().as_json(),
            "config": done["config"],
            "metrics": done["metrics"],
            "plain": None,
            "weights": table.balance().weights(),
            "hard": done.get("hard"),
            "budget": done.get("budget") or budget_of(table, row),
            "stages": {"all": {**spent, "metrics": done["metrics"]}},
            "rivals": {
                f"{net_name(r, goals, len(table.tasks))}, float": r["all_metrics"] for r in own if rival(row, r)
            },
        }
        write_atomic(folder / "result.json", json.dumps(about, indent=1) + "\n")
        folders.append(folder)
    return folders


def budget_of(table: Table, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The least budget of time that a net was made for, as a manifest has it; None for one that every table has."""
    goals = [goal for goal in table.goals if goal.name in row["budgets"]]
    return time_budget(replace(table.config, **goals[0].settings())).as_json() if goals else None


def rival(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `other` belongs beside `row` in a report: fixed rivals, and those made for the same budget.

    >>> rival({"name": "ours-134", "budgets": ["134"]}, {"name": "wide-40", "budgets": ["134", "150"]})
    True
    """
    if other is row or kind_of(other) == kind_of(row):
        return False
    return not other["budgets"] or bool(set(other["budgets"]) & set(row["budgets"]))
