"""The results table of the shipped example as Markdown: the README shows what `examples/results.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .nets import KINDS, goal_names, kind_of, net_name
from .sweep import OURS

HEADER = (
    *("net (INT8)", "seed", "mIoU", "depth RMSE m", "normals °", "delta %", "equal %"),
    *("time", "predicted ms", "MMAC", "useful MMAC", "train s"),
)


def markdown(document: Mapping[str, Any]) -> str:
    """Rows of a results document as a Markdown table, single-task nets first; `-` where nothing was measured.

    >>> row = {"name": "wide-40", "budgets": ["134"], "width": 40, "seed": 0, "macs": 2e6}
    >>> print(markdown({"rows": [row]}).splitlines()[-1])
    | plain net of width 40 | 0 | - | - | - | - | - | - | - | 2 | - | - |
    """
    order, goals = list(KINDS), goal_names(document)
    rows = sorted(document["rows"], key=lambda row: (_place(order, row), row.get("macs", 0), row["name"], row["seed"]))
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    return "\n".join(lines + [f"| {' | '.join(_cells(row, goals))} |" for row in rows])


def _place(order: list[str], row: Mapping[str, Any]) -> int:
    return order.index(kind_of(row)) if kind_of(row) in order else len(order)


def _cells(row: Mapping[str, Any], goals: Mapping[str, str]) -> list[str]:
    metrics = row.get("int8") or {}
    values = [_value(metrics, *pair) for pair in (("semseg", "miou"), ("depth", "rmse"), ("normals", "mean_angle"))]
    name = net_name(row, goals)
    return [
        f"**{name}**" if kind_of(row) in OURS else name,
        str(row["seed"]),
        *values,
        _number(row.get("int8_delta_mtl"), "+.1f"),
        _number(row.get("delta_mtl_equal_compute"), "+.1f"),
        _number(row.get("ms_ratio"), ".2f", "x"),
        _number(row.get("predicted_ms"), ".2f"),
        _number(row["macs"] / 1e6, ".0f"),
        _number(row["useful_macs"] / 1e6 if "useful_macs" in row else None, ".0f"),
        _number(row.get("train_seconds"), ".0f"),
    ]


def _value(metrics: Mapping[str, Mapping[str, float]], task: str, metric: str) -> str:
    return _number(metrics.get(task, {}).get(metric), {"miou": ".3f", "rmse": ".3f", "mean_angle": ".2f"}[metric])


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
