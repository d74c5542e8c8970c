"""A sweep: nets at several budgets of time beside their rivals, trained alike, measured, and judged. Resumable.

The folder holds settings.json, one folder a seed with one a unit (see rivals.py), widths.json, and sweep.json: the
results. Kill it at any moment: finished stages are whole files, the running one goes on from its last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import os_errors, write_atomic
from .config import TrainConfig
from .goal import Goal, from_json
from .layout import load_json
from .loop import Progress
from .results_measure import measure
from .results_rows import collect_all, document
from .results_runs import write_runs
from .rivals import Shares, Table
from .stages import build_gated, time_budget

SETTINGS, RESULTS = "settings.json", "sweep.json"
#: Kinds of nets of a sweep: single-task nets with three times the compute and random gates are a paper's business.
KINDS = ("plain", "wide", "narrow", "ours", "grown")
#: Kinds of nets whose gates a search finds.
SEARCHED = ("ours", "fill", "random")
Say = Callable[[str], object]


@dataclass(frozen=True)
class Sweep:
    """What to compare. `steps`: of the plain net, which sets everybody's compute; `weights`: of the tasks' losses,
    None = measured first. Budgets, kinds of nets and seeds may be added to a sweep that was trained already.
    """

    data: str
    config: TrainConfig
    steps: int
    goals: tuple[Goal, ...]
    # Warm start and fork are shared: five budgets of ours cost 0.73 + 5 * 0.27 = 2.1 trainings of the plain net.
    shares: Shares = Shares(0.70, 0.03, 0.07)
    weights: dict[str, float] | None = None
    nets: tuple[str, ...] = KINDS
    seeds: tuple[int, ...] = (0,)

    def as_json(self) -> dict[str, Any]:
        """Plain types; `from_settings` is the way back."""
        own = {"config": self.config.as_json(), "goals": [goal.settings() for goal in self.goals]}
        return {**asdict(self), "data": str(Path(self.data).resolve()), **own}

    def tables(self, folder: Path, progress: Progress | None = None) -> list[Table]:
        """One table a seed."""
        made = []
        for seed in self.seeds:
            config, own = replace(self.config, seed=seed), folder / f"seed-{seed}"
            made.append(
                Table(self.data, own, config, self.steps, self.goals, self.shares, self.weights, self.nets, progress)
            )
        return made


def from_settings(data: Mapping[str, Any]) -> Sweep:
    """The sweep that `as_json` wrote. Raises InputError."""
    try:
        own: dict[str, Any] = {
            "config": TrainConfig.from_json(data["config"]),
            "goals": tuple(from_json(goal) for goal in data["goals"]),
            "shares": Shares(**data["shares"]),
            "nets": tuple(data["nets"]),
            "seeds": tuple(data["seeds"]),
        }
        if any(not isinstance(number, int) for number in (data["steps"], *own["seeds"])):
            raise TypeError("steps and seeds are whole numbers")
        if not isinstance(data["data"], str) or not isinstance(data["weights"], dict | None):
            raise TypeError("data is a folder, weights are a table")
        return Sweep(**{**data, **own})
    except (TypeError, KeyError, AttributeError) as error:
        text = f"{type(error).__name__} {error}"
        raise InputError("the sweep's settings cannot be read", text, "choose another folder") from error


def stored(folder: Path) -> Sweep | None:
    """The sweep in a folder, None without one. Raises InputError."""
    path = folder / SETTINGS
    return from_settings(load_json(path)) if path.exists() else None


def claim(folder: Path, sweep: Sweep) -> None:
    """Write which sweep a folder holds. Raises InputError when it holds one that was trained otherwise."""
    before, now = stored(folder), sweep.as_json()
    for name, then in before.as_json().items() if before else ():
        if name not in ("goals", "nets", "seeds") and then != now[name]:
            text = f"{name} was {then}, now {now[name]}"
            raise InputError(f"{folder} holds a sweep of other settings", text, "choose another --out")
    with os_errors(folder, "create"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SETTINGS, json.dumps(now, indent=1) + "\n")


def check_budgets(table: Table) -> None:
    """Raise BudgetError for a budget that a search is still to be made for, and that no gates meet."""
    if not any(kind in table.nets for kind in SEARCHED):
        return
    for goal in table.goals:
        unit = f"search-{goal.name}"
        if not table.done(unit):
            config = replace(table.config, **goal.settings())
            time_budget(config).check(build_gated(table.context(unit, config)))


def run(sweep: Sweep, folder: Path, *, say: Say, progress: Progress | None = None, rounds: int = 100) -> dict[str, Any]:
    """Train what is not trained yet, measure everything, and write and return the results document.

    Raises BudgetError for a budget that no gates meet, before anything is trained or written.
    """
    tables = sweep.tables(folder, progress)
    check_budgets(tables[0])
    claim(folder, sweep)
    if any(kind in sweep.nets for kind in ("wide", "narrow")):
        say("looking for the rivals' widths at each budget (measured once)")
    todo = [(table, unit) for table in tables for unit in table.units()]
    for number, (table, unit) in enumerate(todo, 1):
        if not table.done(unit):
            say(f"[{number}/{len(todo)}] {unit}, seed {table.config.seed}")
            table.run(unit)
    found = document(tables, collect_all(tables))
    measure(found, tables, rounds, say)
    for table in tables:
        write_runs(table, found["rows"])
    write_atomic(folder / RESULTS, json.dumps(found, indent=1) + "\n")
    return found
