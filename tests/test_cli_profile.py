"""`igate profile`: one command, one table; what goes wrong is one sentence with its exit code."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from igate_command import igate, refused
from profiled import Machine, few, installed

from igate_edge import cli_profile, devicetable, profiler, profiler_clock
from igate_edge.compiler.latency import LatencyTable

__all__ = ["few"]


@pytest.fixture
def machine(few: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The command measures this machine, with a small plan."""
    made = Machine()
    monkeypatch.setattr(profiler, "profile", functools.partial(profiler.profile, bring=made.bring))
    return made


def test_a_table_is_written_and_summed_up(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "t.json"
    shown = igate("profile", "--out", path)
    assert shown.code == 0 and str(path) in shown.out and "good to about" in shown.out
    assert LatencyTable.load(path).foreign() == ""
    result = igate("profile", "--out", path, "--quick", "--json")
    assert result.code == 0 and set(result.json) == {
        *("table", "device", "backend", "threads", "precision", "date", "step"),
        *("anchors", "overhead_ms", "error", "spread", "notes"),
    }


def test_by_default_the_table_is_where_builds_find_it(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert igate("profile", "--json").json["table"] == str(
        devicetable.own_folder() / f"{devicetable.table_name(1)}.json"
    )
    found, why = devicetable.find(1)
    assert why == "" and found is not None and (found.threads, found.precision) == (1, "int8")


def test_a_stopped_command_goes_on(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    machine.stop_after = 4
    stopped = igate("profile", "--out", path)
    assert stopped.code == 130 and not path.exists() and (tmp_path / "t.json.part").exists()
    machine.stop_after = None
    assert igate("profile", "--out", path, "--resume").code == 0
    assert path.exists() and not (tmp_path / "t.json.part").exists()


def test_bad_input_and_a_bad_machine_are_sentences(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.json"
    refused(igate("profile", "--out", path, "--precision", "int4", "--json"), 2, "int4", "int8, float")
    refused(igate("profile", "--out", "/proc/none/t.json", "--json"), 3, "/proc/none")
    machine.share = 0.2
    refused(igate("profile", "--out", path, "--json"), 3, "under load", "20%", "--resume")
    machine.share = 1.0
    (tmp_path / "t.json.part").write_text("{")
    refused(igate("profile", "--out", path, "--resume", "--json"), 2, "kept part", "without --resume")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    refused(igate("profile", "--out", path, "--threads", 2, "--json"), 3, "2 threads", "1 core(s)")
    assert not path.exists() and machine.calls == 2 * (len(profiler_clock.PAUSES) + 1), "only the loaded one measured"


def test_one_core_is_said(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    result = igate("profile", "--out", tmp_path / "t.json", "--json")
    assert any("one core only" in note for note in result.json["notes"])
    assert json.loads((tmp_path / "t.json").read_text())["device"]["cores"] == 1
    document = {**result.json, "notes": ["one core only: x"]}
    assert "note: one core only: x" in cli_profile._shown(document)


def test_a_boards_table_is_named_by_board_and_says_that_it_is_provisional(
    few: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = installed(monkeypatch)
    monkeypatch.setattr(profiler, "profile", functools.partial(profiler.profile, bring=board.bring))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shown = igate("profile", "--backend", "tensorrt")
    path = devicetable.own_folder() / "stand-in-trt.json"
    assert shown.code == 0 and f"latency table: {path}" in shown.out, shown.err
    for words in ("Stand-in, TensorRT 10.3.0, int8", "locked: unverified", "note: provisional: whether the clocks"):
        assert words in shown.out
    assert LatencyTable.load(path).foreign() == ""
    result = igate("profile", "--backend", "tensorrt", "--quick", "--out", tmp_path / "t.json", "--json")
    assert result.code == 0 and result.json["backend"]["name"] == "tensorrt" and result.json["notes"]


def test_tensorrt_is_never_replaced_in_silence(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    path = tmp_path / "new" / "t.json"
    refused(igate("profile", "--backend", "tensorrt", "--out", path, "--json"), 3, "TensorRT")
    refused(igate("profile", "--backend", "tensorrt", "--threads", 2, "--out", path, "--json"), 2, "threads", "GPU")
    refused(igate("profile", "--backend", "openvino", "--out", path, "--json"), 2, "openvino", "tensorrt")
    assert machine.calls == 0 and not path.parent.exists()
