"""Verification: passes what was packaged, names the task that no longer computes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinynet
from onnx import numpy_helper

from igate_edge.bundle import MEMBERS, Bundle, write_bundle
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
