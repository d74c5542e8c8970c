"""`build(..., backend="emulate")`: a bundle on the device's kernels, without a device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinynet
from igate_edge.kernels import emulator
from kernel_cases import needs_compiler

from igate_edge import Engine, cli_doctor
from igate_edge.builder import build
from igate_edge.bundle import Bundle, write_bundle
from igate_edge.cli_engine import build_shown
from igate_edge.errors import CheckFailed, InputError, UnavailableError
from igate_edge.package import package

FRAMES = tinynet.frames(6)


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emulated") / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    return path


@needs_compiler
def test_a_bundle_runs_on_the_emulated_kernels(bundle_path: Path, tmp_path: Path) -> None:
    report = build(bundle_path, backend="emulate", cache_dir=tmp_path)
    assert (report.backend, report.precision, report.path, report.timing) == ("emulate", "int8", "", {})
    assert "g++" in report.version
    assert [item["task"] for item in report.golden] == [spec.name for spec in tinynet.TASKS]
    assert all(item["passed"] for item in report.golden)
    assert any(layer["kernel"].startswith("igemm_s8_") for layer in report.coverage["layers"])
    assert 0 < report.coverage["macs"] <= report.coverage["padded_macs"]
    assert any("nothing was timed" in warning for warning in report.warnings)
    assert not list(tmp_path.glob("*.engine")), "what takes the device's place is not kept as an engine"
    assert json.loads(json.dumps(report.as_json())) == report.as_json()
    launches = [layer for layer in report.coverage["layers"] if layer["kernel"] != "host"]
    assert f"kernels: {len(launches)} launches" in "\n".join(map(str, build_shown(report)))


@needs_compiler
def test_an_engine_answers_frames_as_the_default_backend_does(bundle_path: Path, tmp_path: Path) -> None:
    with (
        Engine.open(bundle_path, "emulate", cache_dir=tmp_path) as ours,
        Engine.open(bundle_path, precision="int8", cache_dir=tmp_path) as other,
    ):
        got, want = ours(FRAMES[0]), other(FRAMES[0])
    assert {name: (array.shape, array.dtype) for name, array in got.items()} == {
        name: (array.shape, array.dtype) for name, array in want.items()
    }
    assert np.mean(got["seg"] != want["seg"]) < 0.02
    # The two dialects round in different places, and depth is an exponential.
    assert np.mean(np.abs(got["depth"] / want["depth"] - 1)) < 0.03


@needs_compiler
def test_another_network_than_packaged_is_refused(bundle_path: Path, tmp_path: Path) -> None:
    """The stored INT8 outputs are replaced: the kernels no longer compute what was packaged."""
    bundle = Bundle.read(bundle_path)
    moved = {name: bundle.golden[name] + np.float32(1) for name in ("int8/depth", "float/depth")}
    path, golden = tmp_path / "other.igate", {**bundle.golden, **moved}
    members = {"model": bundle.model, "ranges": bundle.ranges, "plain": bundle.plain}
    write_bundle(path, dict(bundle.manifest), golden=golden, **members)
    with pytest.raises(CheckFailed, match="do not compute what was packaged.*'depth'"):
        build(path, backend="emulate")


def test_float_kernels_do_not_exist(bundle_path: Path) -> None:
    with pytest.raises(InputError, match="the emulated kernels are INT8"):
        build(bundle_path, backend="emulate", precision="float")


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PATH", str(tmp_path))
    for cached in (emulator.compiler, emulator._loaded):
        cached.cache_clear()
    yield
    emulator.compiler.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_it_says_what_to_install(bundle_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"g\+\+ is missing.*apt install"):
        build(bundle_path, backend="emulate")
    assert not cli_doctor.backends()["emulate"]["usable"]
    (problem,) = [p for p in cli_doctor.doctor().document["missing"] if "backend emulate" in p["what"]]
    assert not problem["required"]
    assert problem["fix"].endswith("apt install g++")
