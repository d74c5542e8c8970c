"""The recipe on tiny frames: every stage, resume after a kill to the same numbers, gates that meet their budget."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_training import AVAILABLE, TINY, Killed, curve, kill_at, source

from igate_edge.errors import CheckFailed, DataError, InputError
from igate_edge.training import loop, recipe
from igate_edge.training.balance import make_balance
from igate_edge.training.checkpoint import load_tensors
from igate_edge.training.config import TrainConfig, make_tasks
from igate_edge.training.loop import Run, fit
from igate_edge.training.source import open_source, thin
from igate_edge.training.stages import Done, auto_granule, build_plain
from igate_edge.training.step import Optim, evaluate, make_optimizers, set_lr, train_step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> recipe.Trained:
    """One uninterrupted run; tests only read it."""
    return recipe.train(source(), tmp_path_factory.mktemp("whole"), TINY)


def test_whole_recipe_meets_its_budget_and_comes_back(whole: recipe.Trained) -> None:
    done, tmp_path = whole, whole.folder
    assert curve(tmp_path)[-1][:2] == ("final", 4)
    for name, share in done.final.result["hard"].items():
        assert share == pytest.approx(0.25, abs=0.02), name
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["metrics"] == done.final.result["metrics"] and again["tasks"][0]["classes"] == ["floor", "box", "ball"]
    net, preprocess = recipe.load_net(tmp_path)
    assert (preprocess.height, preprocess.width) == (32, 32) and not net.training
    tasks = make_tasks(TINY, AVAILABLE)
    assert evaluate(net, tasks, source().val()) == done.final.result["metrics"]
    plain, _ = recipe.load_net(tmp_path, "plain")
    assert evaluate(plain, tasks, source().val()) == done.plain.result["metrics"]
    assert set(again["stages"]) == {"plain", "fork-semseg", "fork-depth", "search", "final"}


def test_finished_stages_are_not_trained_again(
    whole: recipe.Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    kill_at(monkeypatch, 0)
    assert recipe.train(source(), tmp_path, TINY).final.result == whole.final.result
    longer = replace(TINY, final_steps=6)
    ctx = recipe.Context(longer, make_tasks(longer, AVAILABLE), source(longer), tmp_path)
    with pytest.raises(Killed):  # more final steps: all else is kept, only that stage starts again
        recipe.forked(ctx)
    assert curve(tmp_path) == [row for row in curve(whole.folder) if row[0] != "final"]
    with pytest.raises(Killed):
        recipe.train(source(), tmp_path, TINY, resume=False)


@pytest.mark.parametrize("step", [1, 8, 27, 45])
def test_killed_and_resumed_is_the_uninterrupted_run(
    whole: recipe.Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            recipe.train(source(), tmp_path / "cut", TINY)
    before = {
        path.name: path.read_bytes() for path in (tmp_path / "cut").glob("*.safetensors") if "check" not in path.name
    }
    resumed = recipe.train(source(), tmp_path / "cut", TINY)
    for name, data in before.items():
        assert (tmp_path / "cut" / name).read_bytes() == data
    expected, got = curve(whole.folder), curve(tmp_path / "cut")
    assert [row[:2] for row in got] == [row[:2] for row in expected]
    assert [row[2] for row in got] == pytest.approx([row[2] for row in expected], abs=1e-6)
    assert resumed.final.result["gates"] == whole.final.result["gates"]
    assert not list((tmp_path / "cut").glob("*checkpoint*")) and not list((tmp_path / "cut").glob(".*tmp"))


def test_a_broken_checkpoint_falls_back_and_a_broken_result_is_made_again(
    whole: recipe.Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            recipe.train(source(), tmp_path / "cut", TINY)
    newest = loop.checkpoint_path(tmp_path / "cut", "plain")
    newest.write_bytes(newest.read_bytes()[:1000])
    assert recipe.train(source(), tmp_path / "cut", TINY).final.result["gates"] == whole.final.result["gates"]
    assert curve(tmp_path / "cut") == curve(whole.folder)
    search = tmp_path / "cut" / "search.safetensors"
    search.write_bytes(search.read_bytes()[:-1])
    recipe.train(source(), tmp_path / "cut", TINY)
    assert load_tensors(search)[1]["stage"] == "search"


def test_papers_recipe_moves_its_gates(tmp_path: Path) -> None:
    config = replace(TINY, recipe="paper", balance="fixed", plain_steps=2, search_steps=10, final_steps=30)
    done = recipe.train(source(config), tmp_path, config)
    assert done.final.name == "frozen" and set(done.final.result["metrics"]) == {"semseg", "depth"}
    assert (tmp_path / "single-semseg.safetensors").exists()
    net, _ = recipe.load_net(tmp_path)
    assert net.hard_fractions() == done.final.result["hard"]  # type: ignore[union-attr]
    assert all(share < 0.6 for share in done.final.result["hard"].values())  # all gates are open at first
    kinds = [type(o).__name__ for o in make_optimizers(net, make_balance("fixed", {"a": 1.0}), config.optim(0.1))]
    assert kinds == ["AdamW"]  # frozen gates move no more
    fresh = recipe.build_gated(recipe.Context(config, make_tasks(config, AVAILABLE), source(config), tmp_path))
    both = make_optimizers(fresh, make_balance("fixed", {"a": 1.0}), replace(config, gate_lr=0.1).optim(0.1))
    assert [type(o).__name__ for o in both] == ["AdamW", "SGD"] and both[1].param_groups[0]["lr"] == 0.1


def test_measured_balance_writes_what_it_compared(tmp_path: Path) -> None:
    config = replace(TINY, balance="measure", balance_steps=2, plain_steps=2)
    ctx = recipe.Context(config, make_tasks(config, AVAILABLE), source(config), tmp_path)
    chosen = recipe.first_balance(ctx).weights()
    table = json.loads((tmp_path / "balance.json").read_text())
    assert set(table["candidates"]) == {"fixed", "gradnorm", "uncertainty", "2x-semseg", "2x-depth"}
    best = max(table["candidates"], key=lambda name: table["candidates"][name]["score"])
    assert best == table["best"] and chosen == pytest.approx(table["candidates"][best]["weights"])


def test_absent_task_is_not_moved() -> None:
    """Cases M3: momentum and decay must not move the head of a task that has no label in the batch."""
    config = replace(TINY, tasks=("semseg", "depth"))
    ctx = recipe.Context(config, make_tasks(config, AVAILABLE), source(config), Path())
    net, balance = build_plain(ctx), make_balance("gradnorm", {"semseg": 1.0, "depth": 1.0})
    optimizers, batch = make_optimizers(net, balance, Optim()), source().train(4, 0)(0)
    train_step(net, batch, optimizers, balance)
    before = {name: p.detach().clone() for name, p in net.heads["depth"].named_parameters()}
    train_step(net, {k: v for k, v in batch.items() if k != "depth"}, optimizers, balance, step=1)
    assert all(torch.equal(p, before[name]) for name, p in net.heads["depth"].named_parameters())
    moved = dict(net.heads["semseg"].named_parameters())["out.weight"].grad
    assert moved is not None


def test_groups_rates_and_schedule() -> None:
    config = TINY
    ctx = recipe.Context(config, make_tasks(config, AVAILABLE), source(config), Path())
    net = recipe.build_gated(ctx)
    (adam,) = make_optimizers(net, make_balance("uncertainty", {"a": 1.0}), config.optim(2e-3))
    groups = [(g["base_lr"], g["weight_decay"]) for g in adam.param_groups]
    assert groups == [(2e-3, 1e-2), (2e-3, 0.0), (0.01, 0.0), (0.01, 0.0), (0.02, 0.0)]
    count = sum(len(g["params"]) for g in adam.param_groups)
    assert count == len(list(net.parameters())) + 1
    assert set_lr([adam], 0, 100, 4) == 1 / 5
    assert set_lr([adam], 4, 100, 4) == 1
    assert set_lr([adam], 52, 100, 4) == pytest.approx(0.5)
    assert [g["lr"] for g in adam.param_groups] == pytest.approx([1e-3, 1e-3, 5e-3, 0.01, 0.02])


def test_diverging_loss_is_reported(tmp_path: Path) -> None:
    config = replace(TINY, tasks=("depth",))
    ctx = recipe.Context(config, make_tasks(config, AVAILABLE), source(config), tmp_path)
    net = build_plain(ctx)
    with torch.no_grad():
        net.heads["depth"].out.bias.fill_(float("nan"))
    run = Run("plain", 3, log_every=1)
    with pytest.raises(CheckFailed, match="not finite: step 0 of plain.*lower the learning rate"):
        fit(net, source(config).train(4, 0), run, make_balance("fixed", {"depth": 1.0}), tmp_path)


def test_thinned_labels_take_every_corner_in_turn() -> None:
    label = torch.arange(16).view(1, 4, 4)
    corners = [int(thin({"image": label, "depth": label}, 2, step)["depth"][0, 0, 0]) for step in range(4)]
    assert corners == [0, 1, 4, 5]
    batch = thin({"image": label, "label": torch.tensor([3])}, 2, 0)
    assert batch["image"] is label and batch["label"].tolist() == [3]


def test_config_round_trip_and_wrong_settings() -> None:
    assert TrainConfig.from_json(json.loads(json.dumps(TINY.as_json()))) == TINY
    with pytest.raises(InputError, match="unknown setting stepz"):
        TrainConfig.from_json({"stepz": 3})
    with pytest.raises(InputError, match="unknown backbone 'vgg'"):
        TrainConfig(backbone="vgg")
    with pytest.raises(InputError, match="share of channels: 1.5"):
        TrainConfig(budget=1.5)
    with pytest.raises(InputError, match="no task edges: it has semseg"):
        make_tasks(TrainConfig(tasks=("edges",)), AVAILABLE)
    with pytest.raises(InputError, match="no trained network"):
        recipe.load_net(Path("nowhere"))


def test_unknown_task_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('{"schema": 1, "tasks": {"depth": {"kind": "depth"}}, "splits": {"train": 1}}')
    with pytest.raises(DataError, match="no task semseg: .* has depth"):
        open_source(tmp_path, replace(TINY, tasks=("semseg",)))


def test_granule_is_an_eighth_and_at_least_four() -> None:
    assert [auto_granule(c) for c in (8, 32, 64, 128, 256)] == [4, 4, 8, 16, 32]


def test_a_file_that_is_not_of_the_run_does_no_harm_to_its_summary(tmp_path: Path) -> None:
    for name, text in (("notes.json", "{"), ("list.json", "[1]"), ("plain.json", '{"macs": 1, "steps": 2}')):
        (tmp_path / name).write_text(text)
    done = Done("final", tmp_path / "final.safetensors", "", {"hard": {}})
    assert recipe.summary(recipe.Trained(tmp_path, TINY, (), done, done))["stages"] == {
        "plain": {"steps": 2, "macs": 1}
    }
