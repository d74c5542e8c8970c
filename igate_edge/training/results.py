"""Train and tabulate the example and its rivals: `python -m igate_edge.training.results --data DIR --out DIR`.

Every net is a unit: cached, resumable, run alone with --only NAME or all of them by --jobs processes. The table holds
what is done so far; --measure adds milliseconds (interleaved, against the plain net) and INT8 metrics.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..contract import OutputSpec
from ..errors import CheckFailed, IgateError
from ..files import write_atomic
from ..metrics import delta_mtl
from ..reports.sharing import layers, stage_fractions
from .config import TrainConfig
from .results_runs import write_runs
from .rivals import Shares, Table

TASKS = ("semseg", "depth", "normals")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        args.data = args.data or _generate(args)
        tables = [_table(args, seed) for seed in args.seeds]
        if args.list:
            for unit, needs in tables[0].units().items():
                print(f"{unit:16} {'done' if tables[0].done(unit) else 'to do':6} after {', '.join(needs) or '-'}")
        elif args.only:
            tables[0].run(args.only)
        elif args.measure:
            from .results_measure import measure

            measure(Path(args.table), tables, _paths, args.rounds)
        else:
            if args.jobs:
                given = sys.argv[1:] if argv is None else argv
                _run_all(tables, args, [*given, "--data", str(args.data)])
            rows = [row for table in tables for row in collect(table)]
            for table in tables:
                write_runs(table, rows)
            write_atomic(args.table, json.dumps(_about(tables, rows), indent=1) + "\n")
            print(render(rows))
    except IgateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m igate_edge.training.results", description=__doc__)
    parser.add_argument("--data", help="data folder with semseg, depth and normals; default: generated tabletop frames")
    parser.add_argument("--out", required=True, type=Path, help="folder for networks and logs")
    parser.add_argument("--table", default="examples/results.json", help="the table, as JSON")
    parser.add_argument("--steps", type=int, default=3000, help="steps of the plain net: sets everybody's compute")
    parser.add_argument("--width", type=int, default=32, help="width of the ResNet-18 layout")
    parser.add_argument("--size", default="96x128", help="height x width in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--granule", type=int, default=0, help="channels per gate; 0 = an eighth of a layer, at least 4"
    )
    parser.add_argument("--tie", default="stage", choices=("stage", "none"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.10, 0.25, 0.50])
    parser.add_argument("--shares", type=float, nargs=3, default=[0.35, 0.12, 0.18], help="warm start, fork, search")
    parser.add_argument("--weights", type=float, nargs=3, help="loss weights of semseg, depth, normals; else measured")
    parser.add_argument("--only", help="run this unit alone (first seed)")
    parser.add_argument("--list", action="store_true", help="list the units")
    parser.add_argument("--jobs", type=int, default=2, help="processes; 0 = only write the table")
    parser.add_argument("--rounds", type=int, default=200, help="timing rounds of --measure")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--measure", action="store_true", help="export every net, time it and evaluate it in INT8")
    return parser


def _generate(args: argparse.Namespace) -> Path:
    """The example's frames, rendered on first use."""
    from .tabletop import generate

    height, width = (int(part) for part in args.size.split("x"))
    folder = Path("data") / f"tabletop-{width}x{height}-4000"
    generate(folder, train=4000, val=300, seed=1, size=(height, width), workers=max(args.jobs, 1))
    return folder


def _table(args: argparse.Namespace, seed: int) -> Table:
    height, width = (int(part) for part in args.size.split("x"))
    config = TrainConfig(
        tasks=TASKS,
        width=args.width,
        size=(height, width),
        batch=args.batch,
        lr=args.lr,
        granule=args.granule,
        tie=args.tie,
        seed=seed,
        label_stride=2,
    )
    weights = None if args.weights is None else dict(zip(TASKS, args.weights, strict=True))
    folder = args.out / f"seed-{seed}"
    table = Table(str(args.data), folder, config, args.steps, Shares(*args.shares), tuple(args.fractions), weights)
    return replace(table, progress=_line) if args.only else table


def _line(stage: str, step: int, steps: int, values: Mapping[str, float]) -> None:
    if step % 100 < 20 or step == steps:
        text = " ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(time.strftime("%H:%M:%S"), stage, f"{step}/{steps}", text, flush=True)


def _run_all(tables: list[Table], args: argparse.Namespace, argv: list[str]) -> None:
    """Run all units of all seeds, each as a process of its own, in dependency order, --jobs at a time."""
    waiting = {(table.config.seed, unit): table for table in tables for unit in table.units() if not table.done(unit)}
    running: dict[tuple[int, str], subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    while (waiting or running) and not failed:
        ready = [k for k, table in waiting.items() if all(table.done(need) for need in table.units()[k[1]])]
        for key in ready[: args.jobs - len(running)]:
            running[key] = _start(waiting.pop(key), key, argv)
        time.sleep(0.5)
        for key, process in list(running.items()):
            if process.poll() is not None:
                running.pop(key)
                print(time.strftime("%H:%M:%S"), *key, "done" if process.returncode == 0 else "FAILED", flush=True)
                failed += [f"{key[1]} (seed {key[0]})"] * (process.returncode != 0)
    for process in running.values():
        process.wait()
    if failed:
        raise CheckFailed(f"{failed[0]} failed", f"see {args.out}/seed-*/<unit>/output.txt", "run the command again")


def _start(table: Table, key: tuple[int, str], argv: list[str]) -> subprocess.Popen[bytes]:
    folder = table.folder / key[1]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "igate_edge.training.results", *argv, "--seeds", str(key[0]), "--only", key[1]]
    print(time.strftime("%H:%M:%S"), *key, "started", flush=True)
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)


def _paths(table: Table) -> dict[str, list[Path]]:
    """Row name -> the files of its networks: one, or one a task."""
    names = [unit for unit in table.units() if unit.partition("-")[0] in ("plain", "widened", "ours", "random")]
    found = {name: [table.folder / name / "final.safetensors"] for name in names if table.done(name)}
    for row, unit in (("single-third", "third"), ("single", "single")):
        units = [f"{unit}-{task}" for task in TASKS]
        if all(table.done(name) for name in units):
            found = {row: [table.folder / name / "final.safetensors" for name in units]} | found
    return found


def collect(table: Table) -> list[dict[str, Any]]:
    """Rows of one seed: those units that are done.

    `delta_mtl` is against single-task nets that had the whole compute each, `delta_mtl_equal_compute` against those
    that had a third of it each.
    """
    from ..compiler import cost, graph, prune
    from .results_measure import onnx_of

    specs = [task.spec for task in table.tasks]
    rows = []
    references: dict[str, Any] = {}
    for name, paths in _paths(table).items():
        results = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
        metrics = {task: values for result in results for task, values in result["metrics"].items()}
        references |= {name: metrics} if name.startswith("single") else {}
        config = results[0]["config"]
        costs = [cost.count(prune.prune(graph.load(onnx_of(table, path))).model) for path in paths]
        rows.append(
            {
                "name": name,
                "seed": table.config.seed,
                "width": config["width"],
                "metrics": {s.name: {s.metric: metrics[s.name][s.metric]} for s in specs},
                "all_metrics": metrics,
                "delta_mtl": _delta(metrics, references.get("single"), specs),
                "delta_mtl_equal_compute": _delta(metrics, references.get("single-third"), specs),
                "hard": results[0].get("hard"),
                "hard_by_stage": by_stage(results[0].get("gates", {})),
                "macs": sum(c.macs for c in costs),
                "params": sum(c.params for c in costs),
                **spent(table, name, paths),
            }
        )
    return rows


def _delta(metrics: Mapping[str, Any], single: Mapping[str, Any] | None, specs: list[OutputSpec]) -> float | None:
    return None if single is None else delta_mtl(metrics, single, specs)


def spent(table: Table, name: str, paths: list[Path]) -> dict[str, Any]:
    """Steps, seconds and multiply-accumulates of training, with all that a row's networks were made from."""
    shared = {"plain": ["base"], "ours": ["base", "fork"], "random": ["base", "fork"]}
    kind, _, which = name.partition("-")
    folders = [path.parent for path in paths] + [table.folder / unit for unit in shared.get(kind, [])]
    if kind == "ours":
        folders.append(table.folder / f"search-{which}")
    rows = [json.loads(file.read_text()) for folder in folders for file in sorted(folder.glob("*.json"))]
    stages = [row for row in rows if "macs" in row]
    return {
        "train_steps": sum(row["steps"] for row in stages),
        "train_seconds": round(sum(row["seconds"] for row in stages), 1),
        "train_macs": sum(row["macs"] for row in stages),
    }


def by_stage(gates: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, float]]:
    """Stage, as the report's sharing map groups sites -> task -> share of open channels.

    >>> by_stage({"layer1_0_conv1": {"d": "1100"}, "layer1_0_add": {"d": "0000"}})
    {'layer1': {'d': 0.25}}
    """
    tasks = list(next(iter(gates.values()), {}))
    sites = [{"name": site, "channels": len(next(iter(rows.values()))), "open": rows} for site, rows in gates.items()]
    found = stage_fractions(layers(sites, tasks), tasks)
    return {stage: dict(zip(tasks, shares, strict=True)) for stage, _, shares in found}


def _about(tables: list[Table], rows: list[dict[str, Any]]) -> dict[str, Any]:
    table = tables[0]
    balances = [t.folder / "balance" / "balance.json" for t in tables]
    return {
        "rows": rows,
        "config": table.config.as_json(),
        "steps": table.steps,
        "shares": {"base": table.shares.base, "fork": table.shares.fork, "search": table.shares.search},
        "weights": [t.balance().weights() for t in tables if t.weights is not None or t.done("balance")],
        "balance": [json.loads(path.read_text()) for path in balances if path.exists()],
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads()},
    }


def render(rows: list[dict[str, Any]]) -> str:
    """The table for a terminal."""
    lines = [f"{'net':12} seed   mIoU   RMSE  angle  delta%  equal%  GMAC  hard"]
    for row in rows:
        values = [f"{value:.4g}" for task in row["metrics"].values() for value in task.values()]
        hard = " ".join(f"{value:.2f}" for value in (row["hard"] or {}).values())
        deltas = [row["delta_mtl"], row["delta_mtl_equal_compute"]]
        gains = " ".join("      -" if delta is None else f"{delta:+7.2f}" for delta in deltas)
        line = f"{row['name']:12} {row['seed']:4} " + " ".join(f"{value:>6}" for value in values)
        lines.append(f"{line} {gains} {row['macs'] / 1e9:5.3f}  {hard}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
