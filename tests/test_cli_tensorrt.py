"""`igate build` and `verify` with --backend tensorrt on a stand-in: exit codes, what is printed, Ctrl-C."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import standin_engine
import tinynet
from igate_command import igate, refused
from igate_edge.kernels import manifest

from igate_edge import builder_gates, cli_engine
from igate_edge.engines import tensorrt
from igate_edge.package import package

FRAMES = tinynet.frames(8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    return path


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> standin_engine.StandIn:
    found = standin_engine.StandIn()
    for name in ("probe", "compile_plan", "open_plan"):
        monkeypatch.setattr(tensorrt, name, getattr(found, name))
    monkeypatch.setattr(builder_gates, "PACED", 2)
    monkeypatch.setattr(manifest, "FOLDER", Path("/no/kernels"))
    return found


def test_build_takes_the_options_of_a_device(bundle: Path, tmp_path: Path, plans: standin_engine.StandIn) -> None:
    options = ("--batch", 2, "--time-limit", 60, "--workspace-mb", 128, "--max-ms", 500, "--json")
    answer = igate("build", bundle, "--backend", "tensorrt", "--cache", tmp_path, *options)
    assert answer.code == 0 and answer.json["backend"] == "tensorrt" and answer.json["batch"] == 2
    asked = plans.builds[0]
    assert (asked.batch, asked.seconds, asked.workspace_mb) == ((1, 2, 2), 60.0, 128)


def test_an_engine_that_fails_a_gate_is_exit_code_1(
    bundle: Path, tmp_path: Path, plans: standin_engine.StandIn
) -> None:
    plans.alter = standin_engine.one_task("depth")
    build = ("build", bundle, "--backend", "tensorrt", "--cache", tmp_path, "--precision", "int8")
    refused(igate(*build, "--json"), 1, "task 'depth' (int8) is NOT as packaged")
    verified = igate("verify", bundle, "--backend", "tensorrt", "--cache", tmp_path, "--json")
    assert verified.code == 1 and "'depth'" in verified.json["problems"][0]
    plans.alter = None
    assert igate("verify", bundle, "--backend", "tensorrt", "--cache", tmp_path).code == 0
    refused(igate("verify", bundle, "--backend", "emulate", "--json"), 2, "verifies nothing")


def test_phases_are_one_line_each_and_one_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(cli_engine, "say", said.append)
    lines = cli_engine.PhaseLines()
    for name, elapsed, left in (
        ("parsing", 0.0, None),
        ("parsing", 1.0, None),
        ("tactics", 2.0, 30.0),
        ("tactics", 6.9, 20.0),
        ("tactics", 7.1, 19.0),
    ):
        lines(name, elapsed, left)
    assert said == ["parsing, 0 s", "tactics, 2 s, about 30 s left", "tactics, 7 s, about 19 s left"]


def test_ctrl_c_stops_a_build_that_never_looks_at_signals(
    bundle: Path, tmp_path: Path, plans: standin_engine.StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder only asks `cancelled`, from a thread that hears no signal; the command ends with 130."""
    asked = threading.Event()

    def slow(model: bytes, options: Any, progress: Any = None, cancelled: Any = None) -> Any:
        signal.raise_signal(signal.SIGINT)
        for _ in range(1000):
            if cancelled():
                asked.set()
                raise tensorrt.BuildCancelled("the build was stopped", "Ctrl-C", "start it again")
            threading.Event().wait(0.02)
        raise AssertionError("nobody stopped it")

    monkeypatch.setattr(tensorrt, "compile_plan", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        answer = igate("build", bundle, "--backend", "tensorrt", "--cache", tmp_path / "new")
    finally:
        signal.signal(signal.SIGINT, before)
    assert answer.code == 130 and asked.is_set() and not (tmp_path / "new").exists()
