"""Tables: the same numbers in the terminal and in HTML, honest about what is absent."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from igate_edge.contract import OutputSpec
from igate_edge.reports.grids import accuracy_grid, results_nets
from igate_edge.reports.tables import Grid, budget_line, count, flat, number, percent, size_of, times

SPECS = [OutputSpec("semseg", "semseg", 2), OutputSpec("depth", "depth", 1)]


def terminal(grid: Grid) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=120).print(grid.rich())
    return buffer.getvalue()


def test_html_escapes_every_cell_and_heading() -> None:
    text = Grid("<t>", ("<c>",), [("<x>&",)], note="<n>").html()
    assert "<t>" not in text and "<x>" not in text and "<n>" not in text and "<c>" not in text
    assert "&lt;x&gt;&amp;" in text


def test_the_terminal_shows_square_brackets_as_they_are() -> None:
    assert "pip install 'igate-edge[train]'" in terminal(Grid("", ("fix",), [("pip install 'igate-edge[train]'",)]))


def test_a_row_of_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError):
        Grid("", ("a", "b"), [("only one",)]).html()


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), "x"])
def test_absent_numbers_are_a_dash_everywhere(bad: object) -> None:
    assert number(bad) == percent(bad) == times(bad) == "-"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00123, "0.00123"), (12.345, "12.3"), (99.99, "100.0"), (1234567, "1,234,567"), (0, "0"), (-2.5, "-2.50")],
)
def test_numbers_keep_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_counts_and_sizes() -> None:
    assert (count(1_820_000_000), count(999), size_of(999)) == ("1.82 G", "999", "1.0 kB")


def test_accuracy_counts_gains_from_the_single_task_nets() -> None:
    results = {
        "float": {"semseg": {"miou": 0.44}, "depth": {"rmse": 0.9}},
        "rivals": {"single-task nets": {"semseg": {"miou": 0.40}, "depth": {"rmse": 1.0}}},
    }
    grid = accuracy_grid(SPECS, results_nets(results))
    # (0.44 / 0.40 - 1) and (1 - 0.9 / 1.0) are 10 % each.
    assert [list(row) for row in grid.rows] == [
        ["ours, float", "0.440", "0.900", "+10.0 %"],
        ["single-task nets", "0.400", "1.00", "reference"],
    ]
    assert grid.strong == {0}


def test_accuracy_without_a_task_says_so_instead_of_failing() -> None:
    grid = accuracy_grid(SPECS, {"ours, float": {"semseg": {"miou": 0.4}}})
    assert list(grid.rows[0]) == ["ours, float", "0.400", "-"]
    assert results_nets(None) == {}


def test_a_budget_of_time_is_a_sentence_and_others_stay_lists() -> None:
    found = {
        "kind": "Budget",
        "ms": 4.0,
        "ratio": None,
        "measured_ms": 3.9,
        "predicted_ms": 3.8,
        "device": {"cpu": "X"},
    }
    assert (
        budget_line(found)
        == f"{number(4.0)} ms: {number(3.9)} measured, {number(3.8)} predicted when it was trained, on X"
    )
    assert budget_line({"kind": "Budget", "ms": 4.0}) == f"{number(4.0)} ms"
    assert budget_line({"own_channels": 0.25}) == flat({"own_channels": 0.25})
    assert budget_line(None) == ""
