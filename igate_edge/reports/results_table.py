"""The results table of the shipped example as Markdown: the README shows what `examples/results.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Row name -> what a reader calls the net.
NAMES = {
    "single": "three single-task nets, the whole compute each",
    "single-third": "three single-task nets, a third of it each",
    "plain": "plain shared net",
    "widened": "plain net, widened to the MACs of ours at {} %",
    "random": "random gates, same counts as ours at {} %",
    "ours": "**ours, {} % own channels**",
}
HEADER = ("net (INT8)", "mIoU", "depth RMSE m", "normals °", "delta %", "equal %", "own channels", "MMAC", "time")


def markdown(document: Mapping[str, Any]) -> str:
    """Rows of a results document as a Markdown table, single-task nets first; `-` where nothing was measured.

    >>> row = {"name": "ours-10", "seed": 0, "int8_delta_mtl": 1.0, "macs": 2e6, "hard": {"depth": 0.1}}
    >>> print(markdown({"rows": [row]}).splitlines()[-1])
    | **ours, 10 % own channels** | - | - | - | +1.0 | - | 0.10 | 2 | - |
    """
    rows = sorted(document["rows"], key=lambda row: (list(NAMES).index(_kind(row)), _share(row), row["seed"]))
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    return "\n".join(lines + [f"| {' | '.join(_cells(row))} |" for row in rows])


def _kind(row: Mapping[str, Any]) -> str:
    name = str(row["name"])
    return name if name in NAMES else name.partition("-")[0]


def _share(row: Mapping[str, Any]) -> int:
    share = str(row["name"]).partition("-")[2]
    return int(share) if share.isdigit() else 0


def _cells(row: Mapping[str, Any]) -> list[str]:
    metrics = row.get("int8") or {}
    values = [_value(metrics, *pair) for pair in (("semseg", "miou"), ("depth", "rmse"), ("normals", "mean_angle"))]
    hard = " / ".join(f"{share:.2f}" for share in (row.get("hard") or {}).values()) or "-"
    ratio = row.get("ms_ratio")
    return [
        NAMES[_kind(row)].format(_share(row)),
        *values,
        _delta(row.get("int8_delta_mtl")),
        _delta(row.get("delta_mtl_equal_compute")),
        hard,
        f"{row['macs'] / 1e6:.0f}",
        "-" if ratio is None else f"{ratio:.2f}x",
    ]


def _value(metrics: Mapping[str, Mapping[str, float]], task: str, metric: str) -> str:
    found = metrics.get(task, {}).get(metric)
    digits = {"miou": 3, "rmse": 3, "mean_angle": 2}[metric]
    return "-" if found is None else f"{found:.{digits}f}"


def _delta(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"
