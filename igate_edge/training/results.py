"""Train and tabulate the example and its rivals: `python -m igate_edge.training.results --data DIR --out DIR`.

Every net is a unit: cached, resumable, run with all it needs by --only NAME, or all of them by --jobs processes. The
table holds what is done so far; --measure adds milliseconds (interleaved, against the plain net) and INT8 metrics.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckFailed, IgateError
from ..files import write_atomic
from ..gating.budget import TABLE
from .config import TrainConfig
from .goal import goals
from .results_rows import collect_all, document
from .results_runs import write_runs
from .rivals import DEFAULT, NETS, Shares, Table

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
                print(f"{unit:18} {'done' if tables[0].done(unit) else 'to do':6} after {', '.join(needs) or '-'}")
        elif args.only:
            for table in tables:
                for unit in args.only:
                    table.run(unit)
        elif args.measure:
            from .results_measure import measure

            whole = json.loads(Path(args.table).read_text())
            measure(whole, tables, args.rounds)
            _write(args, whole, tables)
        else:
            if args.jobs:
                given = sys.argv[1:] if argv is None else argv
                _run_all(tables, args, [*given, "--data", str(args.data)])
            _write(args, document(tables, collect_all(tables)), tables)
    except IgateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _write(args: argparse.Namespace, whole: dict[str, Any], tables: list[Table]) -> None:
    for table in tables:
        write_runs(table, whole["rows"])
    write_atomic(args.table, json.dumps(whole, indent=1) + "\n")
    print(render(whole["rows"]))


def numbers(text: str) -> list[float]:
    """ "1.34,1.7" as numbers.

    >>> numbers("1.34,1.7")
    [1.34, 1.7]
    """
    return [float(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Words between commas."""
    return text.split(",")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m igate_edge.training.results", description=__doc__)
    add = parser.add_argument
    add("--data", help="data folder with semseg, depth and normals; default: generated tabletop frames")
    add("--out", required=True, type=Path, help="folder for networks and logs")
    add("--table", default="examples/results.json", help="the table, as JSON")
    add("--steps", type=int, default=2000, help="steps of the plain net: sets everybody's compute")
    add("--width", type=int, default=32, help="width of the ResNet-18 layout")
    add("--size", default="96x128", help="height x width in pixels")
    add("--batch", type=int, default=16)
    add("--lr", type=float, default=2e-3)
    add("--granule", type=int, default=0, help="channels per gate; 0: by layer")
    add("--tie", default="stage", choices=("stage", "none"))
    add("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0], help="for example 0,1")
    add("--ratios", type=numbers, default=[1.34, 1.7], help="budgets as multiples of the plain net's time")
    add("--nets", type=names, default=list(DEFAULT), help=f"kinds of nets, of {','.join(NETS)}")
    add("--shares", type=numbers, default=list(asdict(Shares()).values()), help="compute of warm start, fork, search")
    add("--weights", type=numbers, help="loss weights of semseg, depth, normals; else measured")
    add("--latency", default=TABLE, help="latency table: its name, or a file of `igate profile`")
    add("--only", type=names, help="run these units alone, with what they need")
    add("--list", action="store_true", help="list the units")
    add("--jobs", type=int, default=2, help="processes; 0 = only write the table")
    add("--rounds", type=int, default=200, help="timing rounds of --measure")
    add("--threads", type=int, default=1, help="threads of each process")
    add("--measure", action="store_true", help="export every net, time it and evaluate it in INT8")
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
        table=args.latency,
    )
    weights = None if args.weights is None else dict(zip(TASKS, args.weights, strict=True))
    folder, shares, kinds = args.out / f"seed-{seed}", Shares(*args.shares), tuple(args.nets)
    table = Table(str(args.data), folder, config, args.steps, goals(tuple(args.ratios)), shares, weights, kinds)
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


def render(rows: list[dict[str, Any]]) -> str:
    """The table for a terminal."""
    lines = [f"{'net':12} seed   mIoU   RMSE  angle  delta%   int8%  ratio  pred.  GMAC useful  hard"]
    for row in rows:
        values = [f"{value:.4g}" for task in row["metrics"].values() for value in task.values()]
        hard = " ".join(f"{value:.2f}" for value in (row["hard"] or {}).values())
        deltas = [row["delta_mtl"], row.get("int8_delta_mtl")]
        gains = " ".join("      -" if delta is None else f"{delta:+7.2f}" for delta in deltas)
        ratio = f"{row['ms_ratio']:6.3f}" if "ms_ratio" in row else "     -"
        line = f"{row['name']:12} {row['seed']:4} " + " ".join(f"{value:>6}" for value in values)
        cost = f"{row['predicted_ms']:6.2f} {row['macs'] / 1e9:5.3f}  {row['useful_macs'] / 1e9:5.3f}"
        lines.append(f"{line} {gains} {ratio} {cost}  {hard}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
