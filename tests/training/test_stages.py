"""Stages and the folder they live in: what is gone on with, what is refused, and budgets that gates cannot meet."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import AVAILABLE, TINY, Killed, arrays, curve, kill_at, source

from igate_edge.errors import BudgetError, CheckFailed, DataError, InputError
from igate_edge.training import loop
from igate_edge.training.balance import Balance, make_balance
from igate_edge.training.checkpoint import load_newest, save_tensors
from igate_edge.training.config import TrainConfig, make_tasks
from igate_edge.training.loop import Log, Run, fit
from igate_edge.training.recipe import stored_run, train
from igate_edge.training.source import from_arrays
from igate_edge.training.stages import Context, Done, build_gated, build_plain, freeze, penalty, plain
from igate_edge.training.step import train_step

PLAIN = replace(TINY, backbone="pyramid_net", plain_steps=5)


def context(folder: Path, config: TrainConfig = PLAIN) -> Context:
    return Context(config, make_tasks(config, AVAILABLE), source(config), folder)


def train_plain(ctx: Context, lr: float) -> Done:
    weights = Balance({"semseg": 1.0, "depth": 1.0})
    return plain(ctx, "plain", weights, steps=5, lr=lr)


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            train_plain(context(tmp_path / "cut"), 2e-3)
    assert loop.checkpoint_path(tmp_path / "cut", "plain").exists()
    train_plain(context(tmp_path / "cut"), 1e-1)
    train_plain(context(tmp_path / "fresh"), 1e-1)
    assert curve(tmp_path / "cut") == curve(tmp_path / "fresh")
    assert (tmp_path / "cut/plain.safetensors").exists()


def test_a_folder_of_another_run_is_refused_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_at(monkeypatch, 3)
    with pytest.raises(Killed):
        train(source(PLAIN), tmp_path, PLAIN)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = from_arrays(*({k: v for k, v in arrays(n, 5).items() if k != "normals"} for n in (16, 8)), *_rest())
    for resume in (True, False):
        with pytest.raises(InputError, match="run of other settings: lr was 0.002, now 0.01"):
            train(source(PLAIN), tmp_path, replace(PLAIN, lr=1e-2), resume=resume)
        with pytest.raises(InputError, match="run on other frames"):
            train(other, tmp_path, PLAIN, resume=resume)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    found = stored_run(tmp_path)
    assert found is not None and found["fingerprint"] == source(PLAIN).fingerprint


def _rest() -> tuple[dict[str, tuple[str, ...]], TrainConfig]:
    return {name: AVAILABLE[name] for name in ("semseg", "depth")}, PLAIN


def nan_at(monkeypatch: pytest.MonkeyPatch, step_of_nan: int, *, in_loss: bool) -> None:
    def broken(net: torch.nn.Module, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        seen = train_step(net, *args, **kwargs)  # type: ignore[arg-type]
        if args[-1] == step_of_nan:
            next(net.parameters()).data.fill_(float("nan"))
        return {**seen, "total": seen["total"] * float("nan")} if in_loss and args[-1] >= step_of_nan else seen  # type: ignore

    monkeypatch.setattr(loop, "train_step", broken)


@pytest.mark.parametrize("in_loss", [True, False])
def test_no_checkpoint_holds_a_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_loss: bool) -> None:
    ctx = context(tmp_path)
    run = Run("plain", 9, log_every=100, checkpoint_every=2)
    nan_at(monkeypatch, 2, in_loss=in_loss)
    with pytest.raises(CheckFailed, match="not finite: step 3 of plain"):
        fit(build_plain(ctx), ctx.source.train(4, 0), run, Balance({"semseg": 1.0, "depth": 1.0}), tmp_path)
    found = load_newest(loop.checkpoint_path(tmp_path, "plain"))
    assert found is not None and found[1]["step"] == 2
    assert all(bool(torch.isfinite(value).all()) for value in found[0].values())


def test_the_last_step_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan_at(monkeypatch, 4, in_loss=False)
    with pytest.raises(CheckFailed, match="weights are not finite: step 4"):
        train_plain(context(tmp_path), 1e-3)
    assert not (tmp_path / "plain.safetensors").exists()


def test_rare_classes_weigh_more_when_asked_for() -> None:
    labels = np.zeros((4, 8, 8), np.uint8)
    labels[0, :4, :4] = 1  # 16 of 256 pixels: 1 / sqrt of its frequency is sqrt(15) times that of class 0
    frames = {"image": np.zeros((4, 8, 8, 3), np.uint8), "semseg": labels}
    for wanted in (False, True):
        config = replace(TINY, tasks=("semseg",), class_weights=wanted)
        found = from_arrays(frames, frames, {"semseg": ("floor", "box")}, config)
        (task,) = make_tasks(config, found.available, found.class_weights)
        weights = task.class_weights  # type: ignore[attr-defined]
        assert (weights is not None) == wanted
        if wanted:
            assert weights[1] / weights[0] == pytest.approx(15**0.5)


def test_steps_without_a_label_are_counted(tmp_path: Path) -> None:
    ctx = context(tmp_path)
    batch_at = ctx.source.train(4, 0)

    def some(step: int) -> dict[str, torch.Tensor]:
        batch = dict(batch_at(step))
        if step == 1:
            del batch["depth"]
        if step in (1, 2, 4):
            batch["semseg"] = torch.full_like(batch["semseg"], 255)
        return batch

    run = Run("plain", 6, log_every=3)
    fit(build_plain(ctx), some, run, make_balance("fixed", {"semseg": 1.0, "depth": 1.0}), tmp_path)
    rows = [row.get("skipped") for row in Log(tmp_path / "log.jsonl").lines()]
    assert rows == [None, {"semseg": 2, "depth": 1}, {"semseg": 1}]  # lines of steps 0, 3 and 5


def test_a_task_without_any_label_in_an_epoch_is_an_error(tmp_path: Path) -> None:
    train_frames, val = ({k: v for k, v in arrays(n, n).items() if k != "normals"} for n in (8, 4))
    train_frames["depth"] = np.zeros_like(train_frames["depth"])
    ctx = replace(context(tmp_path), source=from_arrays(train_frames, val, *_rest()))
    with pytest.raises(DataError, match="no label of depth: 4 steps, none with a valid label"):
        train_plain(ctx, 1e-3)  # 8 frames in batches of 4: two epochs are 4 steps


def searched(folder: Path, config: TrainConfig) -> tuple[Context, Done]:
    """A search that left its logits anywhere."""
    ctx = context(folder, config)
    net = build_gated(ctx)
    torch.manual_seed(1)
    for parameter in net.gate_parameters():
        parameter.data.normal_(0.3)
    save_tensors(folder / "search.safetensors", net.state_dict(), {})
    return ctx, Done("search", folder / "search.safetensors", "key", {})


@pytest.mark.parametrize("budget", [0.10, 0.25, 0.50])
def test_frozen_gates_are_within_two_points_of_the_request(tmp_path: Path, budget: float) -> None:
    ctx, done = searched(tmp_path, replace(TINY, budget=budget))
    result = freeze(ctx, done).result
    assert all(abs(share - budget) <= 0.02 for share in result["hard"].values())
    assert all(share > budget + 0.02 for share in result["searched"].values())


def test_a_budget_that_whole_gates_cannot_meet(tmp_path: Path) -> None:
    config = replace(PLAIN, granule=64, tie="none", budget=0.03)  # 9 sites, each with one gate: steps of 11 points
    with pytest.raises(BudgetError, match=r"semseg cannot own 3% of the channels.*allow 0.0%.*granule"):
        freeze(*searched(tmp_path, config))
    assert not (tmp_path / "frozen.safetensors").exists()
    with pytest.raises(BudgetError, match="cannot own 3%"):  # known before anything is trained or written
        train(source(config), tmp_path / "new", config)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["hinge", "l1"])
def test_other_budgets_freeze_what_the_search_found(tmp_path: Path, kind: str) -> None:
    ctx, done = searched(tmp_path, replace(PLAIN, budget_kind=kind))
    result = freeze(ctx, done).result
    assert result["hard"] == result["searched"] and result["flipped"] == {}


def test_single_task_nets_are_trained_when_asked_for(tmp_path: Path) -> None:
    config = replace(PLAIN, plain_steps=1, fork_steps=1, search_steps=1, final_steps=1, single_steps=2, granule=1)
    train(source(config), tmp_path, config)
    stages = json.loads((tmp_path / "result.json").read_text())["stages"]
    assert stages["single-depth"]["steps"] == 2 and set(stages["single-semseg"]["metrics"]) == {"semseg"}


def test_a_negative_total_stops_nothing_and_the_budget_is_logged_apart(tmp_path: Path) -> None:
    """Cases M7: an uncertainty-weighted total may fall below 0; the last step is kept, metrics choose networks."""
    config = replace(PLAIN, granule=1, log_every=1, search_steps=3)
    ctx, small = context(tmp_path, config), {"semseg": 1e-6, "depth": 1e-6}
    balance = make_balance("uncertainty", small)
    balance.log_variance.data.fill_(-2.0)  # type: ignore[union-attr, operator]
    fit(
        build_gated(ctx),
        ctx.source.train(4, 0),
        Run("search", 3, log_every=1),
        balance,
        tmp_path,
        penalty=penalty(config),
    )
    rows = Log(tmp_path / "log.jsonl").lines()
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert -4.1 < row["total"] < -3.8 and row["penalty"] >= 0  # two tasks at -2 each
    assert rows[-1]["penalty"] == pytest.approx(0.75, abs=0.2)  # open gates, 75 points above the budget
