"""`igate profile`: one command, one table; what goes wrong is one sentence with its exit code."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from igate_command import igate, refused
from profiled import Machine, few

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
