"""Landing: rounded patterns are measured before they are trained, and the honest answer when none fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from staircase import table
from tiny_training import TINY, source
from torch_nets import TinyResNet, tasks

from igate_edge.compiler.latency import LatencyTable
from igate_edge.errors import BudgetError, InputError
from igate_edge.gating.budget import Budget
from igate_edge.gating.convert import InterroGateNet, interrogate
from igate_edge.gating.merge import MergedNet
from igate_edge.training import landing
from igate_edge.training.config import TrainConfig
from igate_edge.training.landing import Measured, land
from igate_edge.training.recipe import load_net, train
from igate_edge.training.stages import granule_of

Fake = Callable[[InterroGateNet], Measured]


@pytest.fixture(scope="module")
def net() -> InterroGateNet:
    return interrogate(TinyResNet(16), tasks(), granule=2, tie="stage")


@pytest.fixture(scope="module")
def budget(net: InterroGateNet) -> Budget:
    made = Budget(ratio=1.3, table=table(4))
    made.pricing(net)
    return made


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is taken for one of this machine."""
    monkeypatch.setattr(LatencyTable, "foreign", lambda self: "")


def opened(net: InterroGateNet) -> InterroGateNet:
    for alpha in net.gate_parameters():
        alpha.data.fill_(0.5)
    return net


def machine(budget: Budget, seen: list[float], error: Callable[[float], float]) -> Fake:
    """A machine whose engines take `error(ratio)` times what is predicted."""

    def measure(net: InterroGateNet) -> Measured:
        price = budget.price(net)
        found = Measured(price.ms * error(price.ratio), price.ratio * error(price.ratio), 0.001)
        seen.append(found.ratio)
        return found

    return measure


@pytest.mark.parametrize("error", [0.85, 1.0, 1.12])
def test_a_table_that_is_wrong_by_a_tenth_still_lands(net: InterroGateNet, budget: Budget, error: float) -> None:
    seen: list[float] = []
    found = land(opened(net), budget, None, machine(budget, seen, lambda _: error))
    assert found.landed and 0.95 * 1.3 <= found.measured_ratio <= 1.3 and found.builds == len(seen) <= 3  # type: ignore[operator]
    assert found.share == pytest.approx(found.measured_ratio / 1.3)  # type: ignore[operator]
    assert found.predicted_ratio == pytest.approx(budget.price(net).ratio) and found.note == ""


def test_an_error_that_depends_on_the_pattern_lands_too(net: InterroGateNet, budget: Budget) -> None:
    seen: list[float] = []
    found = land(opened(net), budget, None, machine(budget, seen, lambda ratio: 1 + 0.5 * (ratio - 1)))
    assert found.landed and len(seen) > 1


def test_a_machine_that_is_never_fast_enough_is_said(net: InterroGateNet, budget: Budget) -> None:
    def slow(_: InterroGateNet) -> Measured:
        return Measured(9.0, 1.4)

    with pytest.raises(BudgetError, match=r"fastest of \d engines takes 9 ms, 107.7% of the budget"):
        land(opened(net), budget, None, slow)


def test_nothing_is_landed_with_frozen_gates_or_no_builds(net: InterroGateNet, budget: Budget) -> None:
    for builds in (0, -1, 1.5, "2"):
        with pytest.raises(InputError, match="nothing can be landed"):
            land(opened(net), budget, None, machine(budget, [], lambda _: 1.0), builds)  # type: ignore[arg-type]
    frozen = interrogate(TinyResNet(8), tasks(), granule=2)
    frozen.freeze_gates()
    with pytest.raises(InputError, match="frozen gates: True"):
        land(frozen, budget)


def test_the_nearest_is_kept_when_none_lands(net: InterroGateNet, budget: Budget) -> None:
    """Engines come in two speeds: 80 % and 110 % of the budget."""

    def coarse(gated: InterroGateNet) -> Measured:
        ratio = 1.3 * (1.1 if budget.price(gated).ratio > 1.2 else 0.8)
        return Measured(ratio, ratio)

    found = land(opened(net), budget, None, coarse)
    assert not found.landed and found.share == pytest.approx(0.8) and "uses 80.0% of it" in found.note
    assert budget.price(net).ratio <= 1.2  # the net has that pattern


def test_a_foreign_table_predicts_only_and_says_so(
    net: InterroGateNet, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatencyTable, "foreign", lambda self: "of another machine: predictions only")

    def never(_: InterroGateNet) -> Measured:
        raise AssertionError

    found = land(opened(net), budget, None, never)
    assert found.landed and found.measured_ms is None and found.builds == 0
    assert "another machine" in found.note and 0.95 <= found.share <= 1


def test_engines_are_compared_in_interleaved_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines of each net; the ratio of their sums in each round."""
    opened_nets: list[bytes] = []

    class Session:
        def __init__(self, data: bytes, threads: int) -> None:
            opened_nets.append(data)
            self.run = data

        def close(self) -> None:
            opened_nets.remove(self.run)

    def interleave(runs: dict[str, Any], image: np.ndarray, rounds: int) -> dict[str, np.ndarray]:
        return {name: np.full(rounds, 3e-3 if data == b"ours" else 2e-3) for name, data in runs.items()}

    monkeypatch.setattr(landing.ort, "open", Session)
    monkeypatch.setattr(landing.timing, "interleave", interleave)
    found = landing.compare(b"ours", b"plain", np.zeros(1))
    assert (found.ms, found.ratio, found.interval) == (pytest.approx(3.0), pytest.approx(1.5), 0.0)
    assert opened_nets == []


TIMED = replace(TINY, backbone="pyramid_net", ratio=1.08, step=None, granule=1, search_steps=8)


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines take what the table says, and the table is coarse-grained for tiny nets."""
    monkeypatch.setattr(LatencyTable, "load", classmethod(lambda cls, where: table(4)))
    budget = Budget(ratio=1.08)
    monkeypatch.setattr(landing, "measured", lambda plain: machine(budget, [], lambda _: 1.0))


def test_a_run_under_a_budget_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    done = train(source(TIMED), tmp_path, TIMED)
    found = json.loads((tmp_path / "result.json").read_text())["budget"]
    assert found["kind"] == "Budget" and found["ratio"] == 1.08 and found["builds"] >= 1
    assert found["measured_ratio"] <= 1.08 and found["share"] == pytest.approx(found["measured_ratio"] / 1.08)
    assert found["predicted_ms"] > 0 and found["searched_ms"] > 0 and found["device"] == {"cpu": "none"}
    assert done.final.result["budget"] == found and found["landed"] == (found["share"] >= 0.95)
    frozen = json.loads((tmp_path / "frozen.json").read_text())
    assert frozen["budget"] == found and "flipped" not in frozen
    net, _ = load_net(tmp_path)
    assert (
        isinstance(net, MergedNet)
        and TrainConfig.from_json(json.loads((tmp_path / "config.json").read_text())).step == 4
    )


def test_an_unreachable_budget_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    for change, text in (({"ratio": 0.8}, "plain shared net takes"), ({"ratio": 50.0}, "never binds")):
        with pytest.raises(BudgetError, match=text):
            train(source(TIMED), tmp_path / "run", replace(TIMED, **change))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change", [{"ms": 3.0}, {"budget_kind": "hard"}, {"recipe": "paper"}, {"ratio": -1.0}, {"step": 0}]
)
def test_settings_that_ask_for_two_budgets_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(TIMED, **change)


def test_an_automatic_granule_fills_a_step_when_all_tasks_open_it() -> None:
    for step, count, wanted in ((16, 3, [4, 4, 8, 8, 8]), (32, 3, [4, 4, 8, 16, 16]), (16, 5, [4, 4, 4, 4, 4])):
        rule = granule_of(replace(TIMED, granule=0, step=step), count)
        assert callable(rule) and [rule(c) for c in (16, 32, 64, 128, 256)] == wanted
    assert granule_of(replace(TIMED, granule=6), 3) == 6
