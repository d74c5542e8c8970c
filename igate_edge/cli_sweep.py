"""`igate sweep`: accuracy against measured milliseconds, ours and the rivals; and the bundle of any net of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_console import Answer, say
from .cli_export import export_run
from .cli_train import KINDS, Bar, TrainArgs, data_info, find_data, settings
from .errors import InputError
from .files import write_atomic

if TYPE_CHECKING:
    from .reports.sweep import Point
    from .training.goal import Goal
    from .training.sweep import Sweep

PLOT = "sweep.png"
RATIOS, STEPS = "1.2,1.35,1.5,1.75,2", 2000


@dataclass(frozen=True)
class SweepArgs:
    """Options of `igate sweep`; None = not given. train: those that it has in common with `igate train`."""

    train: TrainArgs
    steps: int | None = None
    ratios: str | None = None
    ms: str | None = None
    seeds: str | None = None
    nets: str | None = None
    shares: str | None = None
    rounds: int = 100


def numbers(text: str, what: str) -> tuple[float, ...]:
    """ "1.2,1.5" as numbers; none of "".

    >>> numbers("1.2,1.5", "--ratios")
    (1.2, 1.5)
    """
    try:
        return tuple(float(part) for part in text.split(",") if text)
    except ValueError as error:
        raise InputError(f"{what} takes numbers between commas", repr(text), "for example 1.2,1.5,2") from error


def seeds(text: str) -> tuple[int, ...]:
    """ "0,1" as seeds, each once.

    >>> seeds("0,1,1")
    (0, 1)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("-?[0-9]{1,40}", part) for part in parts):
        raise InputError("--seeds takes whole numbers between commas", f"{text!r:.80}", "for example 0,1")
    return tuple(dict.fromkeys(map(int, parts)))


def sweep_run(args: SweepArgs) -> Answer:
    """Train and measure a sweep, or go on with it, and show what it found."""
    from .reports.sweep import sweep_grid
    from .training.sweep import RESULTS, check_budgets, run, stored

    before, folder = stored(args.train.out), args.train.out
    if before is not None and not args.train.resume:
        fix = "add --resume to go on with it, or choose another --out"
        raise InputError("this folder already holds a sweep", str(folder), fix)
    if before is None and args.train.resume:
        raise InputError("there is no sweep to go on with", f"{folder} has no settings.json", "drop --resume")
    sweep = asked(args, before)
    table = sweep.tables(folder)[0]
    check_budgets(table)  # before the rivals' widths are measured
    units = table.units()
    say(f"{len(units)} trainings for each of {len(sweep.seeds)} seed(s); stop any time, --resume goes on")
    with Bar() as bar:
        document = run(sweep, folder, say=say, progress=bar, rounds=args.rounds)
    lines = sentences(document)
    drawn = draw(document, folder / PLOT)
    files = [str(folder / RESULTS), *([str(folder / PLOT)] if drawn else [])]
    shown: list[Any] = [sweep_grid(document), "", *lines, "", f"results: {', '.join(files)}"]
    first = document["goals"][0]
    at = f"{first['ratio']:g}" if "ratio" in first else f"{first['ms']:g}ms"
    shown.append(f"next: igate sweep export {folder} --at {at} --out best.igate")
    return Answer({"sweep": str(folder), "files": files, "sentences": lines, **document}, shown)


def asked(args: SweepArgs, before: Sweep | None) -> Sweep:
    """The sweep that options ask for; without an option the one that stands in the folder, or the default."""
    from .training.config import TrainConfig
    from .training.goal import goals
    from .training.rivals import Shares
    from .training.sweep import Sweep

    data = find_data(args.train, {"data": before.data} if before else None)
    known = tuple(data_info(data).tasks)
    given = {name: value for name, value in settings(args.train, known).items() if name not in KINDS}
    weights = given.pop("weights", None)
    config = TrainConfig.from_json({**(before.config.as_json() if before else {}), **given})
    tasks = config.tasks or known
    strange = sorted(set(weights or ()) - set(tasks))
    if strange:
        raise InputError(f"a weight for no task: {', '.join(strange)}", f"tasks: {', '.join(tasks)}", "mend the name")
    default = goals(numbers(RATIOS, "--ratios"))
    changes: dict[str, Any] = {"data": str(data), "config": config}
    if args.ratios or args.ms:
        ratios, ms = numbers(args.ratios or "", "--ratios"), numbers(args.ms or "", "--ms")
        changes["goals"] = goals(ratios, ms)
    if args.seeds:
        changes["seeds"] = seeds(args.seeds)
    if args.nets:
        changes["nets"] = tuple(args.nets.split(","))
    if args.shares:
        shares = numbers(args.shares, "--shares")
        if len(shares) != 3:
            raise InputError("--shares takes three numbers", args.shares, "parts of warm start, fork and search")
        changes["shares"] = Shares(*shares)
    if args.steps:
        changes["steps"] = args.steps
    if weights:
        changes["weights"] = weights
    return replace(before or Sweep(str(data), config, STEPS, default), **changes)


def sentences(document: dict[str, Any]) -> list[str]:
    """What a sweep found: the winner at each budget, what a millisecond buys, what it cost."""
    from .reports.sweep import cost_line, millisecond_line, verdict_line, verdicts

    failed = [row for row in document["rows"] if "int8_refused" in row]
    refused = [f"{row['name']}, seed {row['seed']}, has no INT8 engine: {row['int8_refused']}" for row in failed]
    found = [*map(verdict_line, verdicts(document)), millisecond_line(document), cost_line(document), *refused]
    return [f"{line[0].upper()}{line[1:].rstrip('.')}." for line in found if line]


def draw(document: dict[str, Any], path: Path) -> bool:
    """Write the plot; without matplotlib say so and go on: the table holds the same."""
    from .reports.sweep_plot import sweep_png

    try:
        picture = sweep_png(document)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        say("no plot without matplotlib: pip install 'igate-edge[report]', then run the command again with --resume")
        return False
    write_atomic(path, picture)
    return True


def sweep_export(folder: Path, at: str, net: str | None, out: Path, seed: int | None, half_weights: bool) -> Answer:
    """Make a bundle of a sweep's net: the best within a budget, or the one that is named."""
    from .training.layout import load_json
    from .training.sweep import RESULTS, stored

    sweep = stored(folder)
    if sweep is None or not (folder / RESULTS).exists():
        raise InputError("no finished sweep", f"{folder} has no {RESULTS}", "run `igate sweep --out` with this folder")
    goal, document = parse_goal(at), load_json(folder / RESULTS)
    try:
        point = chosen(document, goal, net)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        evidence = f"{folder / RESULTS}: {type(error).__name__} {error}"
        raise InputError("the sweep's results cannot be read", evidence, "go on with the sweep: --resume") from error
    if seed is None:
        seed = max(point.by_seed, key=lambda number: point.by_seed[number])
    elif seed not in point.by_seed:
        known = ", ".join(map(str, point.by_seed))
        raise InputError(f"{point.name} has no seed {seed}", f"it has {known}", "choose one of these")
    say(f"{point.label}, seed {seed}: {point.ratio:.2f}x the plain net's time, delta {point.delta:+.1f} %")
    answer = export_run(folder / f"seed-{seed}" / point.name, out, Path(sweep.data), half_weights)
    about = {"net": point.name, "seed": seed, "ms": point.ms, "ratio": point.ratio, "delta": point.delta}
    return Answer({**answer.document, "sweep": about}, answer.shown)


def parse_goal(text: str) -> Goal:
    """ "1.5", "1.5x" or "4ms" as a budget.

    >>> parse_goal("1.5").text, parse_goal("4ms").text
    ('1.5x', '4 ms')
    """
    from .training.goal import Goal

    value = text.strip().lower()
    try:
        if value.endswith("ms"):
            return Goal(ms=float(value[:-2]))
        return Goal(ratio=float(value.removesuffix("x")))
    except ValueError as error:
        raise InputError("not a budget", repr(text), "write a ratio as 1.5, or milliseconds as 4ms") from error


def chosen(document: dict[str, Any], goal: Goal, net: str | None) -> Point:
    """The best net within a budget; with `net` (a row's name, or a kind such as "wide") the best of those."""
    from .reports.sweep import candidates, points

    found = points(document)
    if net is None:
        ranked = candidates(found, goal)
    else:
        ranked = [point for point in found if point.name == net]
        if not ranked:
            ranked = [p for p in sorted(found, key=lambda p: -p.delta) if p.kind == net and goal.holds(p.ms, p.ratio)]
    if ranked:
        return ranked[0]
    names = ", ".join(f"{point.name} ({point.ratio:.2f}x)" for point in found)
    raise InputError(f"no net {net or ''} within {goal.text}".replace("  ", " "), f"there are {names}", "name another")
