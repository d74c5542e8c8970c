"""`igate train`: a data folder becomes a training run."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_console import Answer, messages, say
from .errors import DataError, InputError
from .files import read_file
from .reports.grids import accuracy_grid
from .reports.tables import percent

if TYPE_CHECKING:
    from .training.layout import DataInfo

#: Of the steps asked for in all, the parts of plain training, final training, search, and each task's fork.
PARTS = {"plain_steps": 5, "final_steps": 5, "search_steps": 1, "fork_steps": 1}
GOLDEN_FRAMES = 4
#: Kinds of budgets: a share of channels, time as a multiple of the plain net's, milliseconds.
KINDS = ("budget", "ratio", "ms")
#: Share of its budget of time beyond which a net is said to have missed it: more than timing's noise.
OVER = 1.02


@dataclass(frozen=True)
class TrainArgs:
    """Options of `igate train`; None = not given."""

    data: str | None
    out: Path
    tasks: tuple[str, ...]
    backbone: str | None
    width: float | None
    size: str | None
    budget: float | None
    steps: int | None
    seed: int | None
    frames: int | None
    resume: bool
    config: Path | None = None
    recipe: str | None = None
    balance: str | None = None
    weights: tuple[str, ...] = ()
    granule: int | None = None
    tie: str | None = None
    lr: float | None = None
    singles: bool = False
    ratio: float | None = None
    ms: float | None = None
    table: str | None = None
    final: str | None = None


def train_run(args: TrainArgs) -> Answer:
    """Train, or go on training, and leave a folder that `igate export` takes."""
    import torch

    from .compiler.latency import LatencyTable
    from .training.config import TrainConfig
    from .training.recipe import stored_run, summary, train

    stored, fresh = stored_run(args.out), not args.resume
    if stored is not None and fresh:
        fix = "add --resume to go on with it, or choose another --out"
        raise InputError("this folder already holds a training run", str(args.out), fix)
    if stored is None and args.resume:
        raise InputError("there is no training run to go on with", f"{args.out} has no config.json", "drop --resume")
    if args.table is not None:
        LatencyTable.load(args.table)  # before frames are generated, which takes minutes
    data = find_data(args, stored)
    info = data_info(data)
    asked = settings(args, tuple(info.tasks))
    if stored is not None:
        _same(stored["config"], asked)
    config = TrainConfig.from_json(asked if stored is None else stored["config"])
    say(f"training on {data} with {torch.get_num_threads()} thread(s); stop any time, --resume goes on")
    with Bar() as bar:
        done = train(data, args.out, config, resume=True, progress=bar)
    result = summary(done)
    shown: list[Any] = [
        accuracy_grid(
            done.specs,
            {"ours": result["metrics"], "plain shared net": result["plain"], **single_nets(result)},
        )
    ]
    owned = ", ".join(f"{name} {percent(share)}" for name, share in result["hard"].items())
    shown += [budget_text(result["budget"])] if result["budget"] else []
    shown += [f"channels of their own: {owned}", f"next: igate export {args.out} --out {args.out.name}.igate"]
    return Answer({"run": str(args.out), **result}, shown)


def settings(args: TrainArgs, known: tuple[str, ...]) -> dict[str, Any]:
    """What was given, as fields of TrainConfig: the --config file's, replaced by options. known: the data's tasks."""
    from .training.config import TrainConfig

    found, goal = {} if args.config is None else read_config(args.config), _goal(args)
    if goal.keys() & set(KINDS):  # one kind of budget replaces whatever kind the file has
        found = {key: value for key, value in found.items() if key not in KINDS}
    found |= goal
    if args.table is not None and not args.resume and not found.keys() & {"ratio", "ms"}:
        raise InputError("a latency table is for a budget of time", f"--table {args.table}", "add --ratio or --ms")
    if args.tasks:
        found["tasks"] = list(args.tasks)
    for name in ("backbone", "width", "seed", "recipe", "balance", "granule", "tie", "lr", "final"):
        if getattr(args, name) is not None:
            found[name] = getattr(args, name)
    if args.width is not None and args.width.is_integer():
        found["width"] = int(args.width)
    if args.size is not None:
        found["size"] = parse_size(args.size)
    if args.weights:
        given = [parse_weight(text) for text in args.weights]
        found["weights"] = dict(given)
        if len(given) > len(found["weights"]):
            raise InputError("a task has two weights", ", ".join(args.weights), "give one --weight a task")
    if args.steps is not None:
        found |= plan_steps(args.steps, len(found.get("tasks") or known))
    if args.singles:  # as many steps as the gated net has in its plain and final stages
        config = TrainConfig.from_json(found)
        found["single_steps"] = config.plain_steps + config.final_steps
    return found


def _goal(args: TrainArgs) -> dict[str, Any]:
    """The budget, if one is given, as fields of TrainConfig."""
    kinds: dict[str, Any] = {name: getattr(args, name) for name in KINDS if getattr(args, name) is not None}
    if len(kinds) > 1:
        evidence = " and ".join(f"--{name} {value}" for name, value in kinds.items())
        raise InputError("one budget at a time", evidence, "give one of --budget, --ratio and --ms")
    if args.table is not None:  # a file is found again from wherever the run goes on
        path = Path(args.table)
        kinds["table"] = str(path.resolve()) if path.exists() else args.table
    return kinds


def budget_text(budget: dict[str, Any]) -> str:
    """Where a trained net landed in its budget of time, in a sentence."""
    asked = f"{budget['ratio']:g}x the plain net" if budget["ratio"] is not None else f"{budget['ms']:g} ms"
    value = f"predicted {budget['predicted_ms']:.3g} ms ({budget['predicted_ratio']:.3f}x)"
    if budget["measured_ms"] is not None:
        value = f"measured {budget['measured_ms']:.3g} ms ({budget['measured_ratio']:.3f}x), {value}"
    note = f"; {budget['note']}" if budget["note"] else ""
    missed = "OVER THE BUDGET: " if budget["share"] > OVER else ""
    return f"{missed}budget {asked}: {value}, {budget['share']:.1%} of it{note}"


def read_config(path: Path) -> dict[str, Any]:
    """Settings from a JSON file: TrainConfig's fields, as a run's config.json has them. Raises InputError."""
    try:
        found = json.loads(read_file(path))
    except OSError as error:
        raise InputError(f"cannot read {path}", error.strerror or str(error), "check --config") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON", str(error), "mend it, or copy a run's config.json") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no settings", f"it is a {type(found).__name__}", "copy a run's config.json")
    return found


def parse_weight(text: str) -> tuple[str, float]:
    """ "depth=2" as a task and the weight of its loss.

    >>> parse_weight("depth=2")
    ('depth', 2.0)
    """
    name, _, value = text.partition("=")
    try:
        weight = float(value)
    except ValueError:
        weight = -1.0
    if not name or not 0 <= weight < math.inf:
        raise InputError("not a task's weight", repr(text), "write TASK=WEIGHT, for example depth=2")
    return name, weight


def single_nets(result: dict[str, Any]) -> dict[str, Any]:
    """The row of single-task nets in a table of nets, from a run's result; empty when they were not trained."""
    names = [task["name"] for task in result["tasks"]]
    found = {name: result["stages"].get(f"single-{name}", {}).get("metrics", {}).get(name) for name in names}
    return {"single-task nets": found} if all(found.values()) else {}


def plan_steps(total: int, tasks: int) -> dict[str, int]:
    """Share `total` optimiser steps among the recipe's stages; every stage gets at least one.

    >>> plan_steps(1400, 3)
    {'plain_steps': 500, 'final_steps': 500, 'search_steps': 100, 'fork_steps': 100}
    """
    units = sum(PARTS.values()) - 1 + tasks
    return {name: max(1, round(total * part / units)) for name, part in PARTS.items()}


def parse_size(text: str) -> tuple[int, int]:
    """ "128x96" (width x height, as people say it) as (height, width).

    >>> parse_size("128x96")
    (96, 128)
    """
    # ASCII digits, few: Python's own idea of a digit includes superscripts, and it refuses thousands of them.
    parts = re.fullmatch("0*([1-9][0-9]{0,8})x0*([1-9][0-9]{0,8})", text.lower())
    if parts is None:
        raise InputError("not an image size", f"{text!r:.80}", "write WIDTHxHEIGHT, for example 128x96")
    return int(parts[2]), int(parts[1])


def _same(stored: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to go on with other settings than the run was started with."""
    for key, value in json.loads(json.dumps(asked)).items():
        if stored.get(key) != value:
            evidence = f"{key} is {stored.get(key)} in the run, {value} was asked for"
            raise InputError(
                "--resume goes on with the settings of the run", evidence, "drop the option, or choose another --out"
            )


def find_data(args: TrainArgs, stored: dict[str, Any] | None) -> Path:
    """The data folder; generated first when the word "tabletop" was given."""
    if stored is not None and args.data is None and stored["data"]:
        return Path(stored["data"])
    if args.data is None:
        raise InputError(
            "no data to train on", "--data was not given", "pass --data DIR, or --data tabletop to generate frames"
        )
    if args.data != "tabletop":
        if args.frames is not None:
            raise InputError("--frames is for generated data", f"--data is {args.data}", "drop --frames")
        return Path(args.data)
    from .training.tabletop import generate

    size, count = parse_size(args.size or "128x96"), args.frames or 4000
    folder = Path("data") / f"tabletop-{size[1]}x{size[0]}-{count}"
    generate(folder, train=count, val=min(300, max(GOLDEN_FRAMES, count // 10)), size=size, workers=os.cpu_count() or 1)
    return folder


def data_info(data: Path) -> DataInfo:
    """What a data folder says it holds; raises DataError."""
    from .training.layout import read_info

    if not data.exists():
        raise DataError("no such data folder", str(data), "check the path, or pass --data tabletop to generate frames")
    return read_info(data)


class Bar:
    """Training progress on stderr: a bar on a terminal, else a line at each quarter of a stage."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = messages()
        columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[values]}"), console=self._console, transient=True)
        self._stage, self._said = "", -1
        self._task: Any = None

    def __enter__(self) -> Bar:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def __call__(self, stage: str, step: int, steps: int, values: dict[str, float]) -> None:
        text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        quarter = 4 * step // max(steps, 1)
        if stage != self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._stage, self._said = stage, -1
            self._task = self._bar.add_task(stage, total=steps, values="")
        if self._console.is_terminal and self._task is not None:
            self._bar.update(self._task, completed=step, values=text)
        elif quarter != self._said:
            say(f"{stage} {step}/{steps}: {text}")
        self._said = quarter
