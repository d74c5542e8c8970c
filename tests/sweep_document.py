"""A results document as a sweep writes it, with numbers that can be followed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from igate_edge.contract import OutputSpec

SPECS = (OutputSpec("semseg", "semseg", 2, ("floor", "box")), OutputSpec("depth", "depth", 1))
PLAIN_MS = 2.0
#: Row -> budgets, ratio to the plain net, delta of seed 0, delta of seed 1.
NETS: dict[str, tuple[list[str], float, float, float]] = {
    "plain": ([], 1.0, -4.0, -5.0),
    "wide-40": (["150"], 1.5, -3.5, -4.0),
    "wide-48": (["200"], 2.0, -6.0, -7.0),
    "narrow-12": (["150"], 1.4, -20.0, -22.0),
    "random-150": (["150"], 1.4, 9.0, 9.0),
    "ours-150": (["150"], 1.48, -3.0, -3.0),
    "ours-200": (["200"], 1.99, -1.0, -2.0),
}


def document(
    nets: Mapping[str, tuple[list[str], float, float, float]] = NETS, seeds: tuple[int, ...] = (0, 1)
) -> dict[str, Any]:
    """Every net in every seed."""
    rows = [_row(name, seed, *nets[name]) for seed in seeds for name in nets]
    return {
        "rows": rows,
        "tasks": [spec.as_json() for spec in SPECS],
        "steps": 100,
        "shares": {"base": 0.4, "fork": 0.06, "search": 0.08},
        "goals": [{"ratio": 1.5}, {"ratio": 2.0}],
        "machine": {"cpu": "Test CPU"},
    }


def _row(name: str, seed: int, budgets: list[str], ratio: float, first: float, second: float) -> dict[str, Any]:
    metrics = {"semseg": {"miou": 0.7}, "depth": {"rmse": 0.5}}
    width = name.partition("-")[2] if name.startswith(("wide", "narrow")) else "32"
    delta = (first, second)[seed]
    return {
        "name": name,
        "seed": seed,
        "budgets": budgets,
        "width": int(width),
        "metrics": metrics,
        "all_metrics": metrics,
        "int8": metrics,
        "delta_mtl": delta,
        "int8_delta_mtl": delta,
        "delta_to": "single",
        "delta_mtl_equal_compute": None,
        "macs": round(1e8 * ratio),
        "useful_macs": round(0.9e8 * ratio),
        "params": 1000,
        "predicted_ms": 2.0 * ratio,
        "ms": PLAIN_MS * ratio,
        "ms_ratio": ratio,
        "ms_ratio_interval": [ratio - 0.01, ratio + 0.01],
        "train_steps": 100,
        "train_seconds": 150.0 if name.startswith("ours") else 100.0,
        "train_macs": 1e12,
        "hard": None,
        "hard_by_stage": {},
        "widths": None,
    }
