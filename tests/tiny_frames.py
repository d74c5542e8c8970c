"""A comparison on tiny nets: settings, a latency table that was not measured here (so that no test measures time to
land on a budget), and widths of the rivals that are not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from staircase import table as staircase

from igate_edge.files import write_atomic
from igate_edge.training.config import TrainConfig
from igate_edge.training.goal import Goal
from igate_edge.training.rivals import Table
from igate_edge.training.widths import fits_key

CONFIG = TrainConfig(tasks=("semseg", "depth", "normals"), width=8, size=(32, 32), batch=2, granule=4, label_stride=2)
WEIGHTS = {"semseg": 1.0, "depth": 2.0, "normals": 4.0}
BUDGET = Goal(ratio=1.25)
FITS: dict[str, dict[str, float]] = {BUDGET.name: {"wide": 10, "narrow": 6}}


def write_latency(folder: Path) -> str:
    """A latency table of another device with steps of 8 channels, as a file."""
    path = folder / "staircase.json"
    staircase(step=8).save(path)
    return str(path)


def write_widths(table: Table, fits: Mapping[str, Mapping[str, float]] = FITS) -> None:
    """What a measurement of the rivals' widths would leave."""
    key = fits_key(table.config, table.tasks, table.goals)
    table.folder.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(table.folder.parent / "widths.json", json.dumps({"key": key, "fits": fits}))
