"""Rivals' widths: the table proposes, a measurement decides, and both are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from igate_edge.training import widths
from igate_edge.training.config import TrainConfig, make_tasks
from igate_edge.training.goal import Goal
from igate_edge.training.widths import Fit, base_width, fits, narrower, wider

CONFIG = TrainConfig(tasks=("semseg", "depth", "normals"), width=32, size=(32, 32))
TASKS = make_tasks(CONFIG, {"semseg": ("a", "b"), "depth": (), "normals": ()})
GOALS = [Goal(ratio=1.34), Goal(ratio=1.7)]
#: What a width really takes, in ms; two widths are faster than one below them.
PLAIN_MS, STAIRS = 2.4, {38: 1.36, 40: 1.34, 42: 1.56, 44: 1.59, 46: 1.75, 48: 1.70}


def truth(width: float) -> float:
    return STAIRS.get(int(width), (width / 32) ** (1.4 if width > 32 else 1))


class Machine:
    """A latency table that is 4 % off, and a clock: graphs are just what they would be made of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[str] = []

        def graph(config: Any, tasks: Any, width: float | None = None, separate: bool = False) -> Any:
            ratio = truth(width or 32) * (len(TASKS) if separate else 1) * (0.9 if len(tasks) == 1 else 1.0)
            return SimpleNamespace(ratio=ratio)

        def times(graphs: dict[str, Any]) -> dict[str, tuple[float, float]]:
            self.measured += [name for name in graphs if name != "plain"]
            return {name: (PLAIN_MS * net.ratio, net.ratio) for name, net in graphs.items()}

        monkeypatch.setattr(widths, "_graph", graph)
        monkeypatch.setattr(widths, "times", times)

    def predict(self, model: Any) -> Any:
        return SimpleNamespace(ms=PLAIN_MS * (model.ratio if model.ratio == 1 else 1.04 * model.ratio))


def test_widths_run_up_and_down_in_twos() -> None:
    assert list(wider(CONFIG))[:2] == [34, 36] and list(wider(CONFIG))[-1] == 128
    assert list(narrower(CONFIG)) == list(range(30, 1, -2))
    odd = replace(CONFIG, width=5)
    assert list(wider(odd))[0] == 6 and list(narrower(odd)) == [4, 2]


def test_multipliers_run_in_twentieths_and_other_backbones_have_none(tmp_path: Path) -> None:
    mobile = TrainConfig(backbone="mobilenet_v2")
    assert base_width(mobile) == 1.0 and list(wider(mobile))[:2] == [1.05, 1.1] and list(narrower(mobile))[0] == 0.95
    lite = replace(CONFIG, backbone="efficientnet_lite0", width=None)
    assert base_width(lite) is None
    assert fits(lite, TASKS, GOALS, None, tmp_path / "w.json") == {"134": Fit(), "170": Fit()}  # type: ignore[arg-type]


def test_the_default_width_of_a_backbone_is_its_own() -> None:
    assert base_width(TrainConfig()) == 64


def test_the_widest_that_is_measured_within_the_budget_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, path = Machine(monkeypatch), tmp_path / "out" / "widths.json"
    found = fits(CONFIG, TASKS, GOALS, machine, path)  # type: ignore[arg-type]
    # Separate nets: three of width w take 3 * w / 32, so 14 takes 1.31 and 18 takes 1.69.
    assert found == {"134": Fit(wide=40, narrow=14), "170": Fit(wide=48, narrow=18)}
    assert "wide-52" not in machine.measured
    assert json.loads(path.read_text())["measured"]["wide-40"]["ratio"] == 1.34


def test_what_was_measured_is_kept_for_the_same_net_and_budgets_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, path = Machine(monkeypatch), tmp_path / "widths.json"

    def count(config: TrainConfig, goals: list[Goal]) -> int:
        machine.measured.clear()
        fits(config, TASKS, goals, machine, path)  # type: ignore[arg-type]
        return len(machine.measured)

    assert count(CONFIG, GOALS) > 0
    assert count(replace(CONFIG, seed=7, lr=1.0), GOALS) == 0
    assert count(CONFIG, GOALS[:1]) > 0
    assert count(replace(CONFIG, width=34), GOALS[:1]) > 0
    for cut in ('{"key": "', "[]", "5"):
        path.write_text(cut)
        assert count(CONFIG, GOALS[:1]) > 0, "what cannot be read is measured again"


def test_milliseconds_are_budgets_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fits(CONFIG, TASKS, [Goal(ms=PLAIN_MS * 1.34)], Machine(monkeypatch), tmp_path / "w")  # type: ignore[arg-type]
    assert list(found.values()) == [Fit(wide=40, narrow=14)]


def test_a_budget_that_no_separate_nets_meet_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    monkeypatch.setattr(widths, "narrower", lambda config: iter([30, 28]))
    found = fits(CONFIG, TASKS, GOALS[:1], machine, tmp_path / "widths.json")  # type: ignore[arg-type]
    assert found["134"] == Fit(wide=40, narrow=None)


@pytest.mark.slow
def test_engines_of_other_widths_are_timed_beside_the_plain_net() -> None:
    small = replace(CONFIG, width=8)
    graphs = {"plain": widths._graph(small, TASKS), "narrow-4": widths._graph(small, TASKS, 4, separate=True)}
    found = widths.times(graphs)
    assert found["plain"][1] == 1.0 and all(ms > 0 and ratio > 0 for ms, ratio in found.values())
