"""Where short trainings land in their budgets of time: `python -m igate_edge.training.landings --data DIR --out DIR`.

Two small backbones, several budgets and seeds: each is searched, rounded, landed and trained for a few steps, then its
finished engine is measured anew, beside the plain net. Kill it at any moment: what is done is kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..compiler import graph
from ..errors import IgateError
from ..files import write_atomic
from ..gating.budget import LANDING, TABLE
from ..gating.export import to_onnx
from ..timing import noise
from .balance import Balance
from .config import TrainConfig, make_tasks
from .folder import load_arrays, read_info
from .landing import compare, int8
from .recipe import fork, restore
from .source import Source, from_arrays
from .stages import Context, Done, freeze, merged, plain, search

TASKS = ("semseg", "depth", "normals")
WEIGHTS = {"semseg": 2.0, "depth": 1.0, "normals": 1.0}
BACKBONES: dict[str, float] = {"resnet18": 32, "mobilenet_v2": 0.5}
RATIOS = (1.15, 1.25, 1.4, 1.55, 1.7)
SEEDS = (0, 1)
FRAMES, HELD_OUT = 400, 32
UNSURE = "the machine was busy while the finished engine was measured"
STEPS = {"plain_steps": 60, "fork_steps": 20, "search_steps": 60, "final_steps": 20}


@dataclass(frozen=True)
class Unit:
    """One training: backbone, seed and budget."""

    backbone: str
    seed: int
    ratio: float

    @property
    def name(self) -> str:
        return f"{self.backbone}-{self.seed}-{100 * self.ratio:.0f}"

    def config(self, table: str) -> TrainConfig:
        """Settings: small frames and few steps, as the time of an engine is all that matters."""
        width = BACKBONES[self.backbone]
        small: dict[str, Any] = {"size": (64, 64), "batch": 4, "head_width": 16, "checkpoint_every": 20, **STEPS}
        own: dict[str, Any] = {"backbone": self.backbone, "width": width, "seed": self.seed, "ratio": self.ratio}
        return TrainConfig(tasks=TASKS, weights=WEIGHTS, balance="fixed", table=table, **small, **own)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure what is not done yet, write landings.json, print the table; 0 when 18 of 20 landed."""
    parser = argparse.ArgumentParser(prog="python -m igate_edge.training.landings", description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="data folder with semseg, depth and normals")
    parser.add_argument("--out", required=True, type=Path, help="folder for networks and results")
    parser.add_argument("--table", default=TABLE, help="latency table: a file, or a shipped one's name")
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    args = parser.parse_args(argv)
    try:
        units = [Unit(*parts) for parts in itertools.product(args.backbones, args.seeds, args.ratios)]
        rows = [row(unit, args.data, args.out, args.table) for unit in units]
    except IgateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    write_atomic(args.out / "landings.json", json.dumps(rows, indent=1) + "\n")
    count = sum(one["lands"] for one in rows)
    print(f"{count} of {len(rows)} finished engines take {LANDING:.0%} to 100% of their budget")
    return 0 if count >= 0.9 * len(rows) else 1


def row(unit: Unit, data: Path, out: Path, table: str) -> dict[str, Any]:
    """One training's result, from its file when it is there; printed as a line."""
    path = out / unit.name / "row.json"
    if path.exists():
        found = json.loads(path.read_text())
    else:
        found = run(unit, frames(data, unit.config(table)), out, table)
        write_atomic(path, json.dumps(found, indent=1) + "\n")
    parts = (f"{key} {found[key]:7.1%}" for key in ("searched", "predicted", "landed", "share"))
    print(f"{unit.name:24}", *parts, "" if found["lands"] else "missed", found["note"], flush=True)
    return found


def run(unit: Unit, source: Source, out: Path, table: str) -> dict[str, Any]:
    """Search, round, land, train, and measure the finished engine; budgets share the plain net and its forks."""
    config = unit.config(table)
    tasks = make_tasks(config, source.available, source.class_weights)
    warm = Context(config, tasks, source, out / f"{unit.backbone}-{unit.seed}-warm")
    balance = Balance(WEIGHTS)
    base = plain(warm, "plain", balance, steps=config.plain_steps, lr=config.lr)
    ctx = replace(warm, folder=out / unit.name)
    searched = search(ctx, base, fork(warm, base), balance, name="search", steps=config.search_steps)
    frozen = freeze(ctx, searched)
    last = merged(ctx, frozen, balance, mode="masked", steps=config.final_steps, lr=config.lr, name="final")
    budget = frozen.result["budget"]
    ours, reference = (engine(config, tasks, done) for done in (last, base))
    found = compare(ours, reference, noise(config.preprocess())[0])
    share = found.ratio / unit.ratio
    return {
        "name": unit.name,
        "searched": budget["searched_share"],
        "predicted": budget["predicted_ms"] / budget["limit_ms"],
        "landed": budget["share"],
        "share": share,
        "lands": LANDING <= share <= 1,
        "interval": found.interval,
        "builds": budget["builds"],
        "note": budget["note"] or (UNSURE if found.interval > 0.02 else ""),
    }


def engine(config: TrainConfig, tasks: Sequence[Any], done: Done) -> bytes:
    """The INT8 engine of a trained stage."""
    size = config.preprocess()
    return int8(graph.load(to_onnx(restore(config, tasks, done.path), size)), noise(size))


def frames(data: Path, config: TrainConfig) -> Source:
    """A few frames of a data folder."""
    info = read_info(data)
    parts = {}
    for split, count in (("train", FRAMES), ("val", HELD_OUT)):
        arrays = load_arrays(data, split, TASKS)
        parts[split] = {name: array[:count].copy() for name, array in arrays.items()}
    return from_arrays(parts["train"], parts["val"], {name: info.tasks[name] for name in TASKS}, config)


if __name__ == "__main__":
    sys.exit(main())
