"""A sweep: what its folder holds, how it goes on, and what may be added to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_frames import BUDGET, CONFIG, WEIGHTS, write_latency

from igate_edge.errors import BudgetError, InputError
from igate_edge.training import sweep
from igate_edge.training.goal import Goal
from igate_edge.training.results_runs import budget_of
from igate_edge.training.sweep import KINDS, RESULTS, SETTINGS, Sweep, claim, from_settings, stored
from igate_edge.training.tabletop import generate

SMALL = Sweep("somewhere", CONFIG, 6, (BUDGET,), weights=WEIGHTS, seeds=(0, 1))


def test_settings_come_back(tmp_path: Path) -> None:
    assert stored(tmp_path) is None
    claim(tmp_path / "s", SMALL)
    assert stored(tmp_path / "s") == replace(SMALL, data=str(Path("somewhere").resolve()))
    by_ms = replace(SMALL, goals=(Goal(ms=3.0),))
    assert from_settings(json.loads(json.dumps(by_ms.as_json()))).goals == by_ms.goals


def test_budgets_nets_and_seeds_may_be_added_and_nothing_else(tmp_path: Path) -> None:
    claim(tmp_path, SMALL)
    more = replace(SMALL, goals=(BUDGET, Goal(ratio=2.0)), seeds=(0, 1, 2), nets=("plain", "ours", "fill"))
    claim(tmp_path, more)
    for other in (
        replace(SMALL, steps=7),
        replace(SMALL, weights=None),
        replace(SMALL, config=replace(CONFIG, lr=1.0)),
    ):
        with pytest.raises(InputError, match="holds a sweep of other settings: .* was"):
            claim(tmp_path, other)
    assert stored(tmp_path) == replace(more, data=str(Path("somewhere").resolve()))


def test_settings_that_cannot_be_read_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text('{"steps": 3}')
    with pytest.raises(InputError, match="the sweep's settings cannot be read: KeyError 'config'"):
        stored(tmp_path)
    for wrong in ({"goals": [1.5]}, {"steps": "many"}, {"seeds": ["a"]}, {"data": 5}, {"weights": [1]}):
        (tmp_path / SETTINGS).write_text(json.dumps({**SMALL.as_json(), **wrong}))
        with pytest.raises(InputError, match="the sweep's settings cannot be read"):
            stored(tmp_path)


def test_one_table_a_seed(tmp_path: Path) -> None:
    tables = SMALL.tables(tmp_path)
    assert [table.config.seed for table in tables] == [0, 1]
    assert [table.folder.name for table in tables] == ["seed-0", "seed-1"]
    assert {table.nets for table in tables} == {KINDS}


def test_a_sweep_trains_once_measures_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path / "data", train=6, val=4, size=(32, 32), progress=False)
    config, out, said = replace(CONFIG, table=write_latency(tmp_path)), tmp_path / "out", list[str]()
    first = replace(SMALL, data=str(tmp_path / "data"), config=config, nets=("plain",), seeds=(0,))
    steps: list[str] = []
    document = sweep.run(first, out, say=said.append, progress=lambda stage, *_: steps.append(stage), rounds=3)
    assert said[0] == "[1/2] base, seed 0" and {"base", "final"} <= set(steps)
    (row,) = document["rows"]
    assert row["name"] == "plain" and row["delta_to"] == "plain" and row["delta_mtl"] == pytest.approx(0)
    if "int8_refused" not in row:  # a net of few steps answers next to noise, and its engine may be refused
        assert row["ms_ratio"] == pytest.approx(1) and set(row["int8"]) == set(CONFIG.tasks)
    assert json.loads((out / RESULTS).read_text()) == json.loads(json.dumps(document))
    assert json.loads((out / "seed-0" / "plain" / "result.json").read_text())["budget"] is None
    monkeypatch.setattr("igate_edge.training.stages.fit", None)
    again = sweep.run(first, out, say=said.append, rounds=3)
    assert again["rows"][0].get("int8") == row.get("int8") and again["rows"][0]["metrics"] == row["metrics"]
    with pytest.raises(TypeError):  # other seeds are trained, and training is switched off here
        sweep.run(replace(first, seeds=(0, 1)), out, say=said.append, rounds=3)


@pytest.mark.parametrize(
    ("goal", "words"), [(Goal(ms=1e-4), "less than the heads alone"), (Goal(ratio=50.0), "never binds")]
)
def test_an_unreachable_budget_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goal: Goal, words: str
) -> None:
    generate(tmp_path / "data", train=6, val=4, size=(32, 32), progress=False)
    monkeypatch.setattr("igate_edge.training.stages.fit", None)
    config, out = replace(CONFIG, table=write_latency(tmp_path)), tmp_path / "out"
    asked = replace(SMALL, data=str(tmp_path / "data"), config=config, nets=("plain", "ours"), goals=(goal,))
    with pytest.raises(BudgetError, match=words):
        sweep.run(asked, out, say=lambda text: None)
    assert not out.exists()


def test_a_rival_has_the_budget_that_it_was_made_for(tmp_path: Path) -> None:
    config, goals = replace(CONFIG, table=write_latency(tmp_path)), (BUDGET, Goal(ratio=2.0))
    (table,) = replace(SMALL, config=config, goals=goals, seeds=(0,)).tables(tmp_path)
    found = budget_of(table, {"budgets": ["200", BUDGET.name]})
    assert found is not None and (found["kind"], found["ratio"], found["ms"]) == ("Budget", BUDGET.ratio, None)
    assert budget_of(table, {"budgets": []}) is None


def test_five_budgets_of_ours_cost_about_two_trainings() -> None:
    shares = SMALL.shares
    shared = shares.base + shares.fork
    assert shared + 5 * (1 - shared) == pytest.approx(2.08)
