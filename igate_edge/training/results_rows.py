"""Rows of a comparison: what each trained net of a table achieved, costs to train and costs to run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..compiler import cost, graph
from ..compiler.layout import lay_out
from ..contract import OutputSpec
from ..files import write_atomic
from ..gating.export import to_onnx
from ..metrics import delta_mtl
from ..reports.sharing import layers, stage_fractions
from .checkpoint import load_tensors
from .config import TrainConfig
from .layout import kept
from .recipe import restore
from .rivals import BY_WIDTH, Table


def paths(table: Table) -> dict[str, Path]:
    """Row name -> the file of its network, for the rows that are done."""
    return {name: table.folder / name / "final.safetensors" for name in table.rows() if table.done(name)}


def onnx_of(table: Table, path: Path) -> bytes:
    """The ONNX bytes of one stage file's network, kept beside it until the network changes."""
    target, meta = path.with_suffix(".onnx"), load_tensors(path)[1]
    mark = path.with_suffix(".onnx.key")
    if target.exists() and mark.exists() and mark.read_text() == meta["key"]:
        return target.read_bytes()
    config = TrainConfig.from_json(meta["result"]["config"])
    data = to_onnx(restore(config, table.tasks, path), config.preprocess())
    write_atomic(target, data)
    write_atomic(mark, meta["key"])
    return data


def collect_all(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Rows of all seeds, compared with the same kind of net: single-task nets only where every seed has them."""
    reference = "single" if all("single" in paths(table) for table in tables) else "plain"
    return [row for table in tables for row in collect(table, reference)]


def collect(table: Table, reference: str) -> list[dict[str, Any]]:
    """Rows of one seed: those nets that are done.

    `delta_mtl` is the mean relative gain in % over `reference`: "single", single-task nets that had the whole compute
    each, or "plain", the plain net; `delta_to` says which; `delta_mtl_equal_compute` is against single-task nets that
    had an equal part of it. `budgets`: names of the budgets that a net was made for. `macs` are those that run,
    `useful_macs` leaves out blocks of zeros. `predicted_ms`: by the latency table.
    """
    specs, found, rows = [task.spec for task in table.tasks], paths(table), []
    results = {name: json.loads(path.with_suffix(".json").read_text()) for name, path in found.items()}
    metrics = {name: result["metrics"] for name, result in results.items()}
    for name, path in found.items():
        result, model = results[name], lay_out(graph.load(onnx_of(table, path))).model
        counted, price = cost.count(model), table.latency.predict(model)
        rows.append(
            {
                "name": name,
                "seed": table.config.seed,
                "budgets": budgets_of(table, name),
                "width": result["config"]["width"],
                "metrics": {s.name: {s.metric: metrics[name][s.name][s.metric]} for s in specs},
                "all_metrics": metrics[name],
                "delta_mtl": _delta(metrics[name], metrics.get(reference), specs),
                "delta_to": reference,
                "delta_mtl_equal_compute": _delta(metrics[name], metrics.get("third"), specs),
                "hard": result.get("hard"),
                "hard_by_stage": by_stage(result.get("gates", {})),
                "widths": result.get("widths"),
                "macs": counted.macs,
                "useful_macs": cost.useful(model),
                "params": counted.params,
                "predicted_ms": price.ms,
                **spent(table, name),
            }
        )
    return rows


def budgets_of(table: Table, name: str) -> list[str]:
    """Names of the budgets that a row was made for; empty for the nets that every table has."""
    kind, _, which = name.partition("-")
    if kind in BY_WIDTH:
        return [budget for budget, fit in table.fits.items() if str(getattr(fit, kind)) == which]
    return [which] if which else []


def _delta(metrics: Mapping[str, Any], reference: Mapping[str, Any] | None, specs: list[OutputSpec]) -> float | None:
    return None if reference is None else delta_mtl(metrics, reference, specs)


def spent(table: Table, name: str) -> dict[str, Any]:
    """Steps, seconds and multiply-accumulates of training, with all that a row's network was made from.

    The search for the loss weights is left out: every multi-task net has it in common.
    """
    units = {unit for unit in _closure(table, name) if unit != "balance"}
    files = [file for unit in units for file in sorted((table.folder / unit).glob("*.json"))]
    stages = [row for row in map(kept, files) if "macs" in row and "steps" in row]
    return {
        "train_steps": sum(row["steps"] for row in stages),
        "train_seconds": round(sum(row["seconds"] for row in stages), 1),
        "train_macs": sum(row["macs"] for row in stages),
    }


def _closure(table: Table, unit: str) -> set[str]:
    return {unit}.union(*(_closure(table, need) for need in table.needs(unit)))


def by_stage(gates: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, float]]:
    """Stage, as the report's sharing map groups sites -> task -> share of open channels.

    >>> by_stage({"layer1_0_conv1": {"d": "1100"}, "layer1_0_add": {"d": "0000"}})
    {'layer1': {'d': 0.25}}
    """
    tasks = list(next(iter(gates.values()), {}))
    sites = [{"name": site, "channels": len(next(iter(rows.values()))), "open": rows} for site, rows in gates.items()]
    found = stage_fractions(layers(sites, tasks), tasks)
    return {stage: dict(zip(tasks, shares, strict=True)) for stage, _, shares in found}


def document(tables: list[Table], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole comparison as JSON, without any path of this machine."""
    table = tables[0]
    balances = [t.folder / "balance" / "balance.json" for t in tables]
    return {
        "rows": rows,
        "tasks": [task.spec.as_json() for task in table.tasks],
        "config": table.config.as_json(),
        "steps": table.steps,
        "shares": asdict(table.shares),
        "goals": [goal.settings() for goal in table.goals],
        "weights": [t.balance().weights() for t in tables if t.weights is not None or t.done("balance")],
        "balance": [json.loads(path.read_text()) for path in balances if path.exists()],
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }
