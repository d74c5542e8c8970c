"""The tables that the terminal and the report share: cost, time, golden checks, accuracy, own channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .tables import Grid, count, number, percent, signed_percent, times

if TYPE_CHECKING:
    from ..bench import BenchReport
    from ..contract import OutputSpec


COST_TITLE = "Cost per frame"
#: Metric -> how people write it, with its unit.
METRICS = {
    "miou": "mIoU",
    "rmse": "RMSE, m",
    "mean_angle": "mean angle, °",
    "f1": "F1",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
}


def caption(metric: str, value: str) -> str:
    """A metric with its value, as people say it.

    >>> caption("rmse", "0.25"), caption("mean_angle", "7"), caption("miou", "0.5")
    ('RMSE 0.25 m', 'mean angle 7°', 'mIoU 0.5')
    """
    name, _, unit = METRICS[metric].partition(", ")
    return f"{name} {value}{' ' * (unit.isalpha())}{unit}"


def stage_grid(stages: Sequence[tuple[str, int, Sequence[float]]], names: Sequence[str], title: str) -> Grid:
    """Share of channels that each task owns, by stage and over all; `stages`: what `sharing.stage_fractions` gives."""
    rows = [(stage, f"{channels:,}", *(percent(share) for share in own)) for stage, channels, own in stages]
    total = sum(channels for _, channels, _ in stages)
    means = [sum(channels * own[k] for _, channels, own in stages) / max(total, 1) for k in range(len(names))]
    rows.append(("all", f"{total:,}", *(percent(share) for share in means)))
    return Grid(title, ("stage", "channels", *names), rows, strong=frozenset({len(rows) - 1}))


def cost_grid(cost: dict[str, dict[str, int]], tasks: int) -> Grid:
    """MACs and parameters of ours and its rivals, with ratios to the plain shared net."""
    titles = {
        "ours": "this network, pruned",
        "plain": "plain shared net",
        "separate": f"{tasks} separate nets",
        "dense": "gated at run time",
    }
    base = cost["plain"]["macs"] or 1
    rows = [
        (
            title,
            count(cost[key]["macs"]),
            times(cost[key]["macs"] / base),
            count(cost[key].get("encoder_macs")),
            count(cost[key]["params"]),
        )
        for key, title in titles.items()
        if key in cost
    ]
    return Grid(COST_TITLE, ("net", "MACs", "to plain", "encoder MACs", "parameters"), rows, strong=frozenset({0}))


def golden_grid(results: list[dict[str, Any]]) -> Grid:
    """Golden checks: how far each task is from what was packaged, and the limit."""
    rows = [
        (
            r["task"],
            r["precision"],
            r["measure"],
            number(r["value"]),
            number(r["limit"]),
            "ok" if r["passed"] else "FAILED",
        )
        for r in results
    ]
    return Grid("Golden frames", ("task", "precision", "measure", "found", "limit", ""), rows, 3)


def bench_grid(report: BenchReport) -> Grid:
    """Cost and time of ours and its rivals; "to plain" is the median of ratios taken within one round."""
    rows = []
    for row in report.rows:
        low, high = row.ratio_interval
        ratio = times(row.ratio) if row.meaningful else "noise"
        sure = "-" if row.name == "plain" else f"{number(low)} - {number(high)}"
        share = percent(row.int8_share) if row.int8_share else "-"
        rows.append((row.label, count(row.macs), count(row.params), share, number(row.ms), ratio, sure))
    columns = ("net", "MACs", "params", "INT8", "ms", "to plain", "95 % interval")
    cpu = report.device.get("cpu", "this machine")
    threads = "one thread" if report.threads == 1 else f"{report.threads} threads"
    note = f"measured on {cpu}, {threads}, batch 1, medians of {report.rounds} interleaved rounds; ratios are paired"
    return Grid("Cost and time per frame", columns, rows, note=note, strong=frozenset({0}))


def separate_sentence(report: BenchReport, tasks: int) -> str:
    """How long separate nets take against ours, or that it could not be told."""
    pair = report.separate_over_ours
    low, high = (times(value) for value in pair["interval"])
    if not pair["meaningful"]:
        return f"{tasks} separate nets against ours: too noisy to tell (95 % interval {low} - {high})"
    return f"{tasks} separate nets take {times(pair['ratio'])} the time of ours (95 % interval {low} - {high})"


def results_nets(results: dict[str, Any] | None) -> dict[str, Any]:
    """Net -> metrics from a manifest's `results`, ours first.

    results: {"frames": n, "split": name, "float": metrics, "int8": metrics, "rivals": {net: metrics}}, where metrics
    are {task: {metric: value}}.
    """
    found = results or {}
    nets = {"ours, float": found.get("float"), "ours, INT8": found.get("int8"), **(found.get("rivals") or {})}
    return {name: value for name, value in nets.items() if isinstance(value, dict)}


def accuracy_grid(tasks: Sequence[OutputSpec], nets: dict[str, Any], title: str = "", note: str = "") -> Grid:
    """Main metric of every task for every net; arrows say which way is better.

    With a net whose name holds "single" a column tells each net's mean gain over it.
    """
    single = next((values for name, values in nets.items() if "single" in name), None)
    columns = ["net", *(f"{s.name}: {METRICS[s.metric]} {'↑' if s.higher_is_better else '↓'}" for s in tasks)]
    rows = [[name, *(number(_main(values or {}, spec)) for spec in tasks)] for name, values in nets.items()]
    if single is not None:
        columns.append("mean gain over single-task nets")
        for row, values in zip(rows, nets.values(), strict=True):
            row.append("reference" if values is single else signed_percent(_gain(values or {}, single, tasks)))
    ours = frozenset(k for k, name in enumerate(nets) if name.startswith("ours"))
    return Grid(title, columns, rows, note=note, strong=ours)


def _main(values: dict[str, Any], spec: OutputSpec) -> Any:
    value = values.get(spec.name)
    return value.get(spec.metric) if isinstance(value, dict) else value


def _gain(values: dict[str, Any], single: dict[str, Any], tasks: Sequence[OutputSpec]) -> float | None:
    from ..metrics import delta_mtl

    pairs = [(_main(values, spec), _main(single, spec)) for spec in tasks]
    if any(not isinstance(v, int | float) for pair in pairs for v in pair):
        return None
    return delta_mtl(values, single, tasks)
