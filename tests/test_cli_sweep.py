"""`igate sweep` and `igate sweep export`: options, refusals, and the net that a budget chooses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from igate_command import igate, refused
from sweep_document import document

pytest.importorskip("torch", reason="training needs the extra: pip install 'igate-edge[train]'")

from test_cli_train import write_data
from tiny_frames import write_latency

from igate_edge.bundle import Bundle
from igate_edge.cli_sweep import SweepArgs, asked, chosen, draw, parse_goal, sentences
from igate_edge.cli_train import TrainArgs
from igate_edge.errors import InputError
from igate_edge.training.goal import Goal
from igate_edge.training.rivals import Shares
from igate_edge.training.sweep import KINDS, RESULTS, claim


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("sweep") / "data")


def options(data: Path | None, out: Path, resume: bool = False, **more: object) -> SweepArgs:
    path = str(data) if data else None
    return SweepArgs(
        TrainArgs(path, out, (), None, None, None, None, None, None, None, resume, weights=("depth=2",)), **more
    )


def test_options_become_a_sweep(data: Path, tmp_path: Path) -> None:
    default = asked(options(data, tmp_path), None)
    assert [goal.ratio for goal in default.goals] == [1.2, 1.35, 1.5, 1.75, 2.0]
    assert default.nets == KINDS and default.seeds == (0,) and default.weights == {"depth": 2.0}
    given = options(data, tmp_path, steps=9, ms="4,3", seeds="0,1", nets="plain,ours", shares="0.3,0.1,0.1")
    made = asked(given, None)
    assert made.goals == (Goal(ms=3.0), Goal(ms=4.0)) and made.seeds == (0, 1) and made.nets == ("plain", "ours")
    assert made.shares == Shares(0.3, 0.1, 0.1) and made.steps == 9
    assert asked(options(None, tmp_path, resume=True), made) == made
    added = asked(options(None, tmp_path, resume=True, ms="3,4,5"), made)
    assert [goal.ms for goal in added.goals] == [3, 4, 5] and added.steps == 9


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--ratios", "1.2,x"), ("--ratios takes numbers", "1.2,x")),
        (("--ratios", "0.8"), ("ratio above 1",)),
        (("--ratios", "1.5", "--ms", "3"), ("give one kind",)),
        (("--shares", "0.5,0.1"), ("--shares takes three numbers",)),
        (("--shares", "0.9,0.1,0.1"), ("sum below 1",)),
        (("--nets", "plain,magic"), ("unknown nets magic", "narrow")),
        (("--shares", "nan,0.1,0.1"), ("sum below 1",)),
        (("--seeds", "nan"), ("--seeds takes whole numbers", "nan")),
        (("--seeds", "0.5"), ("--seeds takes whole numbers", "0.5")),
        (("--seeds", "1" * 30), ("the seed is out of range",)),
        (("--weight", "dpeth=2"), ("a weight for no task: dpeth", "depth")),
        (("--nets", "ours,wide", "--ms", "1e-4"), ("the budget cannot be met", "less than the heads alone")),
    ],
)
def test_wrong_options_are_sentences(
    data: Path, tmp_path: Path, given: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(igate("sweep", "--data", data, "--out", tmp_path / "s", *given, "--json"), 2, *words)


def test_no_data_and_no_sweep_to_go_on_with(data: Path, tmp_path: Path) -> None:
    refused(igate("sweep", "--out", tmp_path, "--json"), 2, "no data to train on")
    refused(igate("sweep", "--out", tmp_path, "--resume", "--json"), 2, "no sweep to go on with")
    claim(tmp_path / "s", asked(options(data, tmp_path), None))
    refused(igate("sweep", "--data", data, "--out", tmp_path / "s", "--json"), 2, "already holds a sweep", "--resume")
    refused(igate("sweep", "export", tmp_path / "s", "--at", "1.5", "--json"), 2, "no finished sweep")


def test_a_runs_settings_may_hold_a_budget_of_their_own(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"ratio": 1.5, "lr": 0.25}))
    config = asked(SweepArgs(replace(options(data, tmp_path).train, config=path)), None).config
    assert config.lr == 0.25 and config.ratio is None


@pytest.mark.parametrize(
    "text", ['{"rows": [{"na', "[]", "{}", '{"goals": [], "tasks": [], "rows": [{"ms_ratio": 1, "int8_delta_mtl": 1}]}']
)
def test_results_that_cannot_be_read_are_a_sentence(data: Path, tmp_path: Path, text: str) -> None:
    claim(tmp_path, asked(options(data, tmp_path), None))
    (tmp_path / RESULTS).write_text(text)
    refused(igate("sweep", "export", tmp_path, "--at", "1.5", "--json"), 2, RESULTS)
    assert (tmp_path / RESULTS).read_text() == text


def test_a_budget_chooses_its_best_net_and_a_name_any_net() -> None:
    found = document()
    assert chosen(found, parse_goal("1.5x"), None).name == "ours-150"
    assert chosen(found, parse_goal("4ms"), None).name == "ours-200"
    assert chosen(found, parse_goal("1.7"), "wide").name == "wide-40"
    assert chosen(found, parse_goal("1.5"), "narrow-12").name == "narrow-12"
    assert chosen(found, parse_goal("1.1"), None).name == "plain"
    with pytest.raises(InputError, match="no net wide within 1.2x: there are narrow-12 .1.40x."):
        chosen(found, parse_goal("1.2"), "wide")
    with pytest.raises(InputError, match="write a ratio as 1.5"):
        parse_goal("fast")


def test_what_is_said_holds_winners_a_millisecond_and_refusals() -> None:
    found = document()
    found["rows"][1]["int8_refused"] = "it answers noise."
    lines = sentences(found)
    assert lines[0].startswith("At 1.5x") and lines[1].startswith("At 2x") and "1 ms more" in lines[2]
    assert lines[-1] == "Wide-40, seed 0, has no INT8 engine: it answers noise."
    assert all(line.endswith(".") and not line.endswith("..") for line in lines)


def test_the_plot_is_a_file_or_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'igate-edge[report]'")
    assert draw(document(), tmp_path / "a.png") and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not draw(document(), tmp_path / "b.png") and not (tmp_path / "b.png").exists()
    assert "pip install 'igate-edge[report]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_command(data: Path, tmp_path: Path) -> None:
    """Rivals' widths, search, landing, measuring, the plot, going on, and bundles of ours and of a rival."""
    out, common, settings = tmp_path / "out", ("--out", tmp_path / "out", "--rounds", 5, "--json"), tmp_path / "c.json"
    settings.write_text(json.dumps({"table": write_latency(tmp_path), "granule": 4, "batch": 4}))
    first = ("--config", settings, "--width", 8, "--size", "32x32", "--steps", 40, "--weight", "depth=2")
    first += ("--weight", "semseg=1", "--nets", "plain,wide,ours,third")
    result = igate("sweep", "--data", data, *first, "--ratios", "1.2", *common)
    assert result.code == 0, result.err
    kinds = {row["name"].partition("-")[0] for row in result.json["rows"]}
    assert kinds == {"plain", "wide", "ours", "third"} and "[1/" in result.err
    again = igate("sweep", "--resume", *common)
    assert again.code == 0, again.err
    assert [row["metrics"] for row in again.json["rows"]] == [row["metrics"] for row in result.json["rows"]]
    measured = [row["name"] for row in again.json["rows"] if "ms_ratio" in row]  # INT8 may be refused after few steps
    for net in measured:
        bundle = tmp_path / f"{net}.igate"
        exported = igate("sweep", "export", out, "--at", "1.2", "--net", net, "--out", bundle, "--json")
        assert exported.code == 0, exported.err
        assert exported.json["sweep"]["net"] == net and igate("verify", bundle).code == 0
        assert str(tmp_path) not in json.dumps(Bundle.read(bundle).manifest)
