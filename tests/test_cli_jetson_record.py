"""`igate jetson record` on a real engine of this machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tinynet
from igate_command import Result, igate, refused

from igate_edge.cli_jetson_record import verdict
from igate_edge.package import package
from igate_edge.runtime.device import PowerMode, State
from igate_edge.runtime.device_record import Record, parse

FRAMES = list(tinynet.frames(8))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("record") / "tiny.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    return path


def record(bundle: Path, *more: object) -> Result:
    base = ("jetson", "record", bundle, "--cache", bundle.parent / "cache", "--backend", "onnxruntime")
    return igate(*base, "--frames", 12, "--rate", 0, *more)


def test_a_record_is_written_and_compared(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    result = record(bundle, "--out", file)
    assert result.code == 0 and "p99" in result.out and f"record: {file}" in result.out, result.err
    made = parse(file.read_bytes())
    assert len(made.samples_ms) == 12 and min(made.samples_ms) > 0 and made.period_ms is None
    assert made.engine.backend == "onnxruntime" and len(made.engine.sha256) == 64 and made.engine.calibration
    assert made.engine.input == (1, 3, 16, 16) and made.engine.tasks == ("seg", "depth", "tag")
    assert made.versions["igate_edge"] and "provisional: " in result.out
    document = record(bundle, "--against", file, "--json").json
    assert document["compared"]["differences"] == [] and document["compared"]["p50_ratio"] > 0
    assert document["summary"]["frames"] == 12


def test_a_record_of_another_board_is_refused_unless_forced(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    record(bundle, "--out", file)
    document = json.loads(file.read_text())
    document["machine"]["cpu"] = "another"
    file.write_text(json.dumps(document))
    refused(record(bundle, "--against", file, "--json"), 2, "not comparable", "another")
    forced = record(bundle, "--against", file, "--force")
    assert forced.code == 0 and "not comparable: machine" in forced.out


def test_a_budget_that_is_missed_is_a_failed_check(bundle: Path) -> None:
    missed = record(bundle, "--budget-ms", 1e-6)
    assert missed.code == 1 and "FAIL p99" in missed.out
    assert "PASS p99" in record(bundle, "--budget-ms", 60_000).out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--budget-ms", 0), "not a budget"),
        (("--rate", "nan"), "--rate"),
        (("--rate", 1e-9), "not a pace"),
        (("--against", "/no/such/file"), "cannot read the earlier record"),
        (("--against", __file__), "not a benchmark record"),
    ],
)
def test_wrong_use_is_a_sentence(bundle: Path, more: tuple[object, ...], words: str) -> None:
    refused(record(bundle, *more, "--json"), 2, words)


def test_the_last_line_names_mode_and_lock(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    record(bundle, "--out", file)
    state = State(power_mode=PowerMode(2, "MAXN_SUPER"), locked=True)
    made: Record = dataclasses.replace(
        parse(file.read_bytes()), samples_ms=(7.9,) * 10, budget_ms=10.0, before=state, after=state
    )
    assert verdict(made) == ("PASS p99 7.90 ms <= 10.0 ms (headroom 21%) at MAXN_SUPER, clocks locked", True)
    line, held = verdict(dataclasses.replace(made, budget_ms=5.0, after=dataclasses.replace(state, locked=False)))
    assert line == "FAIL p99 7.90 ms > 5.00 ms at MAXN_SUPER, clocks not locked" and not held
    assert verdict(dataclasses.replace(made, budget_ms=None))[1]


def test_isaac_ros_files_are_written(bundle: Path, tmp_path: Path) -> None:
    result = igate("jetson", "isaac-ros", bundle, "--out", tmp_path / "isaac", "--camera", "640x480", "--json")
    assert result.code == 0 and all(Path(file).stat().st_size > 0 for file in result.json["files"]), result.out
    for camera in ("640", "640x", "٣x٣", "640x480x3", f"{'9' * 5000}x1"):
        refused(igate("jetson", "isaac-ros", bundle, "--camera", camera, "--json"), 2, "not a camera's size")
