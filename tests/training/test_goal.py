"""Budgets of time as tables name them."""

from __future__ import annotations

import json

import pytest

from igate_edge.errors import InputError
from igate_edge.training.goal import SLACK, Goal, from_json, goals


def test_names_limits_and_the_way_back() -> None:
    both = [Goal(ratio=1.34), Goal(ms=4.5)]
    assert [goal.name for goal in both] == ["134", "4.5ms"] and [goal.text for goal in both] == ["1.34x", "4.5 ms"]
    assert [goal.limit(2.0) for goal in both] == [1.34 * 2, 4.5]
    assert [from_json(json.loads(json.dumps(goal.settings()))) for goal in both] == both


@pytest.mark.parametrize(("ratio", "held"), [(1.5, True), (1.5 * (1 + SLACK), True), (1.5 * (1 + SLACK) + 1e-6, False)])
def test_a_budget_holds_up_to_the_slack(ratio: float, held: bool) -> None:
    assert Goal(ratio=1.5).holds(99.0, ratio) is held
    assert Goal(ms=1.5).holds(ratio, 99.0) is held


def test_budgets_come_once_and_in_order() -> None:
    assert [goal.ratio for goal in goals((1.7, 1.2, 1.7))] == [1.2, 1.7]
    assert [goal.ms for goal in goals(ms=(5, 4))] == [4, 5]
    assert len(goals((1.5, 1.5 + 1e-9))) == 1, "two budgets of one name would share a folder"


@pytest.mark.parametrize("wrong", [{}, {"ratio": 1.2, "ms": 3}, {"ratio": 1.0}, {"ms": 0}, {"ratio": float("nan")}])
def test_nonsense_is_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        Goal(**wrong)


def test_two_kinds_of_budgets_or_none_are_refused() -> None:
    for arguments in [((1.2,), (3,)), ((), ())]:
        with pytest.raises(InputError, match="give one kind"):
            goals(*arguments)
