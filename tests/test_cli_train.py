"""`igate train` and `igate export`: from a data folder to a bundle, resumable, and strict about what it is given."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from igate_command import igate, refused

pytest.importorskip("torch", reason="training needs the extra: pip install 'igate-edge[train]'")

from igate_edge.bundle import Bundle
from igate_edge.cli_export import nearest
from igate_edge.cli_train import TrainArgs, budget_text, parse_size, plan_steps, settings
from igate_edge.errors import InputError
from igate_edge.plain import fill
from igate_edge.training.folder import write_frame
from igate_edge.training.layout import DataInfo, write_info

SIZE = 32
TINY = ("--backbone", "pyramid_net", "--size", f"{SIZE}x{SIZE}", "--steps", 10, "--budget", 0.25)


def write_data(folder: Path, label: int = 1, held: int = 4) -> Path:
    """12 and `held` frames with a bright square that is class `label` and nearer than the rest."""
    info = DataInfo(folder, {"semseg": ("floor", "box"), "depth": ()}, {"train": 12, "val": held})
    folder.mkdir(parents=True)
    write_info(info)
    rng = np.random.default_rng(0)
    for split, count in info.splits.items():
        for index in range(count):
            image = rng.integers(0, 80, (SIZE, SIZE, 3), np.uint8)
            classes, metres = np.zeros((SIZE, SIZE), np.uint8), np.full((SIZE, SIZE), 2.0, np.float32)
            y, x = rng.integers(0, SIZE // 2, 2)
            image[y : y + 16, x : x + 16] += 150
            classes[y : y + 16, x : x + 16] = label
            metres[y : y + 16, x : x + 16] = 1.0
            write_frame(info, split, index, {"image": image, "semseg": classes, "depth": metres})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("train") / "data")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "run"
    result = igate(
        "train", "--data", data, "--out", out, *TINY, "--seed", 3, "--singles", "--weight", "depth=2", "--json"
    )
    assert result.code == 0, result.err
    config = result.json["config"]
    assert config["weights"] == {"depth": 2.0} and config["single_steps"] == 2 * config["plain_steps"]
    assert config["seed"] == 3 and set(result.json["metrics"]) == {"semseg", "depth"}
    return out


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    out = trained.parent / "new" / "model.igate"
    result = igate("export", trained, "--out", out, "--half-weights")
    assert result.code == 0, result.err
    assert "ours, INT8" in result.out and "Accuracy on held-out frames (val, 4 frames)" in result.out
    assert "single-task nets, float" in result.out and "mean gain" in result.out
    return out


def test_a_run_becomes_a_bundle_that_verifies(exported: Path) -> None:
    assert igate("verify", exported).code == 0
    manifest, golden = Bundle.read(exported).manifest, Bundle.read(exported).golden
    assert manifest["form"] == "merged" and sum(count for *_, count in manifest["gates"][0]["rows"]) > 0
    assert manifest["training"]["seed"] == 3 and manifest["budget"] == {"own_channels": 0.25}
    results = manifest["results"]
    assert results["split"] == "val" and results["frames"] == 4
    assert set(results["float"]) == set(results["int8"]) == {"semseg", "depth"}
    assert golden["label/semseg"].shape == (4, SIZE, SIZE) and set(np.unique(golden["label/semseg"])) == {0, 1}
    assert str(exported.parent.parent) not in json.dumps(manifest), "no path of this machine travels in a bundle"


def test_float_results_are_those_that_training_measured(trained: Path, exported: Path) -> None:
    results = Bundle.read(exported).manifest["results"]
    measured = json.loads((trained / "result.json").read_text())["metrics"]
    # Half weights and labels read back from 16-bit millimetres are the difference.
    assert results["float"]["depth"]["rmse"] == pytest.approx(measured["depth"]["rmse"], rel=5e-3)
    assert results["float"]["semseg"]["miou"] == pytest.approx(measured["semseg"]["miou"], abs=5e-3)


def test_a_second_run_in_the_same_folder_is_refused_and_nothing_changes(data: Path, trained: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    refused(igate("train", "--data", data, "--out", trained, *TINY, "--json"), 2, "already holds", "--resume")
    assert {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before


def test_resume_needs_no_option_again_and_finds_everything_done(trained: Path) -> None:
    before = (trained / "final.safetensors").read_bytes()
    result = igate("train", "--out", trained, "--resume", "--json")
    assert result.code == 0 and result.json["config"]["backbone"] == "pyramid_net"
    assert (trained / "final.safetensors").read_bytes() == before


def test_resume_with_other_settings_is_refused(trained: Path, tmp_path: Path) -> None:
    refused(igate("train", "--out", trained, "--resume", "--seed", 8, "--json"), 2, "seed is 3", "8 was asked")
    refused(igate("train", "--out", tmp_path / "none", "--resume", "--json"), 2, "no training run", "drop --resume")


def test_resume_on_other_frames_is_refused_and_nothing_changes(trained: Path, data: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    other = write_data(tmp_path / "other", label=0)
    refused(igate("train", "--data", other, "--out", trained, "--resume", "--json"), 2, "other frames", str(data))
    assert {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()} == before
    moved = shutil.copytree(data, tmp_path / "moved")
    assert igate("train", "--data", moved, "--out", shutil.copytree(trained, tmp_path / "run"), "--resume").code == 0
    assert json.loads((tmp_path / "run" / "source.json").read_text())["data"] == str(moved)


def arguments(**given: object) -> TrainArgs:
    empty: dict[str, object] = dict.fromkeys(field.name for field in fields(TrainArgs))
    return TrainArgs(**{**empty, "tasks": (), "weights": (), "singles": False, "resume": False, **given})  # type: ignore


def test_options_replace_the_settings_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"lr": 0.1, "tie": "none", "plain_steps": 7, "final_steps": 4}))
    found = settings(arguments(config=tmp_path / "c.json", lr=0.5, recipe="paper", width=8.0, singles=True), ("depth",))
    assert (found["lr"], found["tie"], found["recipe"], found["width"], found["single_steps"]) == (
        0.5,
        "none",
        "paper",
        8,
        11,
    )
    assert settings(arguments(width=0.5, granule=0, balance="fixed"), ()) == {
        "width": 0.5,
        "granule": 0,
        "balance": "fixed",
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weight", "depth"], ["'depth'", "TASK=WEIGHT"]),
        (["--weight", "depth=-1"], ["'depth=-1'"]),
        (["--weight", "dept=1"], ["a weight for no task: dept"]),
        (["--recipe", "nice"], ["unknown recipe 'nice'", "forked, paper"]),
        (["--config", "none.json"], ["cannot read none.json"]),
        (["--backbone", "densenet_tiny", "--width", "8"], ["densenet_tiny takes no width"]),
        (
            ["--backbone", "pyramid_net", "--budget", "0.03", "--granule", "64", "--tie", "none"],
            ["cannot own 3%", "granule"],
        ),
        (["--task", "nonsense"], ["nonsense", "semseg", "depth"]),
        (["--budget", "1.5"], ["budget", "1.5"]),
        (["--budget", "-0.1"], ["budget", "-0.1"]),
        (["--backbone", "resnet9000"], ["resnet9000", "resnet18"]),
        (["--size", "big"], ["'big'", "WIDTHxHEIGHT"]),
        (["--width", "nan"], ["resnet18", "got nan"]),
        (["--width", "inf"], ["resnet18", "got inf"]),
        (["--seed", str(2**70)], ["seed is out of range"]),
        (["--weight", "depth=1", "--weight", "depth=2"], ["two weights", "depth=2"]),
        (["--frames", "100"], ["--frames", "generated"]),
    ],
)
def test_settings_that_cannot_be_met(data: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
    refused(igate("train", "--data", data, "--out", tmp_path / "o", *options, "--json"), 2, *words)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_data_that_cannot_be_used(tmp_path: Path) -> None:
    out = tmp_path / "o"
    refused(igate("train", "--out", out, "--json"), 2, "--data", "tabletop")
    refused(igate("train", "--data", tmp_path / "none", "--out", out, "--json"), 2, "no such data folder")
    (tmp_path / "empty").mkdir()
    refused(igate("train", "--data", tmp_path / "empty", "--out", out, "--json"), 2, "data.json")
    wrong = write_data(tmp_path / "wrong", label=7)
    refused(igate("train", "--data", wrong, "--out", out, *TINY, "--json"), 2, "out of range", "value 7")


def test_exporting_what_is_no_run(trained: Path, tmp_path: Path) -> None:
    refused(igate("export", tmp_path, "--json"), 2, "no trained network")
    for number, text in enumerate(("{", "[]", "{}")):
        shutil.copytree(trained, tmp_path / str(number))
        (tmp_path / str(number) / "result.json").write_text(text)
        refused(igate("export", tmp_path / str(number), "--json"), 2, "result cannot be read", "result.json")
    small = write_data(tmp_path / "small", held=3)
    refused(igate("export", trained, "--data", small, "--json"), 2, "too few held-out frames", "3 frames", "4 are")
    (tmp_path / "0" / "config.json").write_text("[]")
    refused(igate("train", "--resume", "--out", tmp_path / "0", "--json"), 2, "settings cannot be read", "a list")
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    (moved / "source.json").write_text('{"data": "/nowhere"}')
    refused(igate("export", moved, "--out", tmp_path / "x.igate", "--json"), 2, "no such data folder")
    assert not (tmp_path / "x.igate").exists()


def test_a_full_disk_keeps_the_old_bundle(
    trained: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "model.igate"
    shutil.copy(exported, out)
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    bundle = Bundle.read(exported)
    monkeypatch.setattr("igate_edge.gating.export.to_onnx", lambda *_, **__: bundle.model)
    monkeypatch.setattr("igate_edge.gating.export.plain_onnx", lambda *_: fill(bundle.plain))
    refused(igate("export", trained, "--out", out, "--json"), 3, "No space left")
    assert out.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["model.igate"]


def test_a_table_that_is_not_there_is_said_before_frames_are_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--data", "tabletop", "--frames", "30", "--out", "run", "--ms", "2", "--table", "orin.json"]
    refused(igate("train", *options, "--json"), 2, "no latency table 'orin.json'")
    assert not list(tmp_path.iterdir())


def test_no_permission_for_the_run(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(igate("train", "--data", data, "--out", tmp_path / "file" / "run", *TINY, "--json"), 3, "Not a directory")


def test_steps_are_shared_and_none_is_lost() -> None:
    for tasks in (1, 2, 4):
        plan = plan_steps(1000, tasks)
        total = plan["plain_steps"] + plan["final_steps"] + plan["search_steps"] + tasks * plan["fork_steps"]
        assert abs(total - 1000) <= 2 + tasks
    assert min(plan_steps(1, 3).values()) == 1


@pytest.mark.parametrize(
    "text", ["", "128", "128x", "x96", "0x96", "-1x5", "12.5x8", "1x2x3", "²x2", "3x" + "9" * 5000]
)
def test_a_size_is_two_positive_numbers(text: str) -> None:
    with pytest.raises(InputError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_nearest_takes_values_and_never_mixes_them() -> None:
    label = np.array([[0, 255], [7, 3]], np.uint8)
    assert nearest(label, (4, 4)).tolist() == [[0, 0, 255, 255]] * 2 + [[7, 7, 3, 3]] * 2
    assert nearest(label, (2, 2)).tolist() == label.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [4, 7, 10, 13])
def test_a_killed_run_resumes_to_the_same_network(data: Path, trained: Path, tmp_path: Path, seconds: int) -> None:
    out = tmp_path / "run"
    options = ["--data", data, "--out", out, *TINY, "--seed", 3, "--json"]
    command = [sys.executable, "-m", "igate_edge", "train", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    assert not list(out.glob("*.tmp")) or all(path.name.startswith(".") for path in out.glob("*.tmp"))
    again = ["--out", out, "--resume"] if (out / "config.json").exists() else options
    assert igate("train", *again).code == 0
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (out, trained))
    assert ours["metrics"] == theirs["metrics"] and ours["hard"] == theirs["hard"]


def test_one_budget_replaces_another_kind_in_a_file_of_settings(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"ratio": 1.5, "table": "x86", "seed": 4}))
    assert settings(arguments(config=config), ()) == {"ratio": 1.5, "table": "x86", "seed": 4}
    assert settings(arguments(config=config, ms=3.0), ()) == {"ms": 3.0, "table": "x86", "seed": 4}
    assert settings(arguments(config=config, budget=0.1), ()) == {"budget": 0.1, "table": "x86", "seed": 4}
    table = tmp_path / "table.json"
    table.write_text("{}")
    given = os.path.relpath(table)
    assert settings(arguments(ratio=1.2, table=given), ()) == {"ratio": 1.2, "table": str(table.resolve())}
    with pytest.raises(InputError, match=r"one budget at a time: --budget 0.1 and --ratio 1.5"):
        settings(arguments(budget=0.1, ratio=1.5), ())
    with pytest.raises(InputError, match="a latency table is for a budget of time: --table orin"):
        settings(arguments(table="orin"), ())


def test_where_a_budget_landed_is_said_in_a_sentence() -> None:
    found = {"ratio": 1.3, "ms": None, "predicted_ms": 3.1, "predicted_ratio": 1.25, "share": 0.98, "note": ""}
    text = budget_text({**found, "measured_ms": 3.2, "measured_ratio": 1.274})
    assert text == "budget 1.3x the plain net: measured 3.2 ms (1.274x), predicted 3.1 ms (1.250x), 98.0% of it"
    foreign = {**found, "ratio": None, "ms": 3.2, "measured_ms": None, "note": "the table is of another machine"}
    assert budget_text(foreign) == (
        "budget 3.2 ms: predicted 3.1 ms (1.250x), 98.0% of it; the table is of another machine"
    )
    over = budget_text({**found, "measured_ms": 8.0, "measured_ratio": 3.2, "share": 7.22})
    assert over.startswith("OVER THE BUDGET: budget 1.3x the plain net: ") and over.endswith("722.0% of it")
