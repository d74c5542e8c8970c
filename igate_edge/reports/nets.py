"""What readers call the nets of a comparison. Row names are short ("wide-40"); documents say what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Kind of row -> its name, in the order of a table; {} is the number of single-task nets, {width} their width.
KINDS = {
    "single": "{tasks} single-task nets (the whole compute each)",
    "third": "{tasks} single-task nets",
    "narrow": "{tasks} single-task nets of width {width}",
    "plain": "plain shared net",
    "wide": "plain net of width {width}",
    "pruned": "plain net of width {width}, Torch-Pruning to {goal}",
    "random": "random gates at {goal}",
    "grown": "ours at {goal}, grown without a search",
    "fill": "ours at {goal}, filled",
    "ours": "ours at {goal}",
}


def kind_of(row: Mapping[str, Any]) -> str:
    """The first word of a row's name.

    >>> kind_of({"name": "wide-40"})
    'wide'
    """
    return str(row["name"]).partition("-")[0]


def net_name(row: Mapping[str, Any], goals: Mapping[str, str], tasks: int = 3) -> str:
    """A row in words; `goals`: name of a budget -> how people write it. Rows of another kind of table keep their names.

    >>> net_name({"name": "ours-134", "budgets": ["134"], "width": 32}, {"134": "1.34x"})
    'ours at 1.34x'
    """
    if kind_of(row) not in KINDS or "budgets" not in row:
        return str(row["name"])
    goal = next((goals[name] for name in row["budgets"] if name in goals), "?")
    return KINDS[kind_of(row)].format(tasks=tasks, width=row["width"], goal=goal)


def goal_names(document: Mapping[str, Any]) -> dict[str, str]:
    """Name of a budget -> how people write it, of a results document.

    >>> goal_names({"goals": [{"ratio": 1.34}, {"ms": 4.0}]})
    {'134': '1.34x', '4ms': '4 ms'}
    """
    from ..training.goal import from_json

    return {goal.name: goal.text for goal in map(from_json, document.get("goals") or [])}
