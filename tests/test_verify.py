"""Verification: passes what was packaged, names the task that no longer computes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinynet
from onnx import numpy_helper

from igate_edge.builder import build
from igate_edge.bundle import MEMBERS, Bundle, write_bundle
from igate_edge.compiler import calibrate
from igate_edge.errors import BundleError
from igate_edge.package import package
from igate_edge.verify import verify

FRAMES = tinynet.frames(8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    return path


def test_a_good_bundle_passes(path: Path) -> None:
    report = verify(path)
    assert report.passed and not report.problems
    assert set(report.members) == set(MEMBERS[1:])
    assert [(item["task"], item["precision"]) for item in report.golden] == [
        (spec.name, precision) for precision in ("float", "int8") for spec in tinynet.TASKS
    ]
    assert json.loads(json.dumps(report.as_json())) == report.as_json()


def altered(path: Path, target: Path, name: str) -> Path:
    bundle = Bundle.read(path)
    proto = onnx.load_from_string(bundle.model)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.3), name))
    model = proto.SerializeToString()
    write_bundle(target, bundle.manifest, model=model, ranges=bundle.ranges, plain=bundle.plain, golden=bundle.golden)
    return target


@pytest.mark.parametrize(("name", "task"), [("head.depth.conv.bias", "depth"), ("head.tag.bias", "tag")])
def test_an_altered_head_is_found_and_only_its_task_blamed(path: Path, tmp_path: Path, name: str, task: str) -> None:
    shift = altered(path, tmp_path / "b.igate", name)
    if task == "tag":  # one bias alone: a softmax does not see all of them move together
        shift = tmp_path / "c.igate"
        bundle = Bundle.read(path)
        proto = onnx.load_from_string(bundle.model)
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.array([2, 0, 0, 0], np.float32), name))
        parts = {"ranges": bundle.ranges, "plain": bundle.plain, "golden": bundle.golden}
        write_bundle(shift, bundle.manifest, model=proto.SerializeToString(), **parts)
    report = verify(shift)
    failed = {(item["task"], item["precision"]) for item in report.golden if not item["passed"]}
    assert not report.passed and failed == {(task, "float"), (task, "int8")}
    assert len(report.problems) == 2 and all(f"task {task!r}" in problem for problem in report.problems)


def test_an_altered_shared_layer_is_found(path: Path, tmp_path: Path) -> None:
    assert not verify(altered(path, tmp_path / "b.igate", "one.shared.conv.weight")).passed


def test_a_wrong_byte_is_a_bundle_error(path: Path, tmp_path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "b.igate").write_bytes(data)
    with pytest.raises(BundleError, match="altered"):
        verify(tmp_path / "b.igate")


def test_members_that_do_not_fit_each_other_are_refused(path: Path, tmp_path: Path) -> None:
    bundle = Bundle.read(path)
    parts = {"model": bundle.model, "ranges": bundle.ranges, "plain": bundle.plain, "golden": bundle.golden}
    tasks = [dict(task) for task in bundle.manifest["tasks"]]
    tasks[0]["classes"] = list(reversed(tasks[0]["classes"]))
    write_bundle(tmp_path / "a.igate", {**bundle.manifest, "tasks": tasks}, **parts)
    write_bundle(tmp_path / "b.igate", bundle.manifest, **{**parts, "plain": b"\xff\xffgarbage"})
    for name, words in (("a.igate", "not those of model.onnx"), ("b.igate", "plain.onnx is not usable")):
        with pytest.raises(BundleError, match=words):
            verify(tmp_path / name)


def test_broken_int8_is_not_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges 20 times too small saturate everything: packaged with a warning, built in float, and no INT8 passes."""
    observe = calibrate.observe

    def shrunk(*arguments: object) -> object:
        seen = observe(*arguments)
        return replace(seen, ranges={name: (low / 20, high / 20) for name, (low, high) in seen.ranges.items()})

    monkeypatch.setattr(calibrate, "observe", shrunk)
    path = tmp_path / "bad.igate"
    bundle = package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    assert any("is no use" in warning for warning in bundle.warnings)
    report = verify(path)
    assert not report.passed and all("(int8)" in problem for problem in report.problems)
    built = build(path, cache_dir=tmp_path)
    assert built.precision == "float" and any("is no use" in warning for warning in built.warnings)
