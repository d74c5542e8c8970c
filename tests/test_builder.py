"""Building: checked before use, found again by content, falls back with a reason, never loads what is damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinynet
from onnx import numpy_helper

from igate_edge import Engine
from igate_edge.builder import Options, build, open_engine
from igate_edge.bundle import Bundle, write_bundle
from igate_edge.compiler import graph
from igate_edge.compiler.layout import layers
from igate_edge.engines import onnxruntime as ort
from igate_edge.errors import BundleError, CheckFailed, InputError
from igate_edge.package import package

FRAMES = tinynet.frames(12)


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("build") / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    return path


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.engine"))


def test_report_is_complete(bundle_path: Path, tmp_path: Path) -> None:
    report = build(bundle_path, cache_dir=tmp_path)
    assert report.precision in ("int8", "float") and report.reason and not report.cached
    assert {"read", "layout", "quantise", "cost", "golden", "time"} <= set(report.seconds)
    assert {(item["task"], item["precision"]) for item in report.golden} == {
        (spec.name, precision) for spec in tinynet.TASKS for precision in ("float", "int8")
    }
    assert all(item["passed"] for item in report.golden)
    assert report.timing["int8_ms"] > 0 and report.timing["float_ms"] > 0
    assert report.coverage["int8_conv_macs_share"] >= 0.95
    assert json.loads(json.dumps(report.as_json())) == report.as_json()
    assert entries(tmp_path) == [Path(report.path)] and report.key in report.path


def test_costs_by_arithmetic(bundle_path: Path, tmp_path: Path) -> None:
    report = build(bundle_path, cache_dir=tmp_path, precision="int8")
    assert report.cost["plain"]["encoder_macs"] == report.cost["plain"]["macs"], "no weight is called heads.x here"
    area, width = 8 * 8, 8
    layers = area * width * 9 * (3 + width)
    heads = {"seg": area * width * 3, "depth": area * width, "tag": width * 4}
    assert report.cost["plain"]["macs"] == layers + sum(heads.values())
    assert report.cost["separate"]["macs"] == 3 * layers + sum(heads.values())
    assert report.cost["plain"]["macs"] < report.cost["ours"]["macs"] < report.cost["dense"]["macs"]
    assert report.cost["plain"]["params"] == 8 * 27 + 8 + 8 * 72 + 8 + (8 * 3 + 3) + (8 + 1) + (8 * 4 + 4)


def test_second_build_comes_from_the_cache_and_says_so(bundle_path: Path, tmp_path: Path) -> None:
    first = build(bundle_path, cache_dir=tmp_path, precision="int8")
    moved = tmp_path / "elsewhere" / "other-name.igate"
    moved.parent.mkdir()
    shutil.copy(bundle_path, moved)
    second = build(moved, cache_dir=tmp_path, precision="int8")
    assert second.cached and second.key == first.key and second.bundle == "other-name.igate"
    assert len(entries(tmp_path)) == 1


def rewritten(path: Path, target: Path, **changes: object) -> Path:
    """The same bundle with some members replaced and every digest made right again."""
    bundle = Bundle.read(path)
    parts = {"model": bundle.model, "ranges": bundle.ranges, "plain": bundle.plain, "golden": bundle.golden, **changes}
    write_bundle(target, bundle.manifest, **parts)
    return target


def scaled_weights(model: bytes, factor: float, name: str) -> bytes:
    proto = onnx.load_from_string(model)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    return proto.SerializeToString()


def test_every_change_of_content_changes_the_key(bundle_path: Path, tmp_path: Path) -> None:
    bundle = Bundle.read(bundle_path)
    keys = [build(bundle_path, cache_dir=tmp_path, precision="int8").key]
    weight = scaled_weights(bundle.model, 1.0000002, "head.seg.conv.weight")
    keys.append(
        build(rewritten(bundle_path, tmp_path / "w.igate", model=weight), cache_dir=tmp_path, precision="int8").key
    )
    ranges = {name: (low, high * 1.0001) for name, (low, high) in bundle.ranges.items()}
    scales = rewritten(bundle_path, tmp_path / "s.igate", ranges=ranges)
    keys.append(build(scales, cache_dir=tmp_path, precision="int8").key)
    keys.append(build(bundle_path, cache_dir=tmp_path, precision="float").key)
    keys.append(build(bundle_path, cache_dir=tmp_path, precision="int8", threads=2).key)
    keys.append(build(bundle_path, cache_dir=tmp_path, precision="int8", calibration=FRAMES).key)
    assert len(set(keys)) == len(keys) == len(entries(tmp_path))


def test_backend_version_and_device_change_the_key(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from igate_edge.runtime import cache

    first = build(bundle_path, cache_dir=tmp_path, precision="int8").key
    known, device = ort.probe(), cache.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(ort, "probe", lambda: {**known, "version": known["version"] + "1"})
        assert build(bundle_path, cache_dir=tmp_path, precision="int8").key != first
    monkeypatch.setattr(cache, "fingerprint", lambda: {**device, "cpu": "another"})
    assert build(bundle_path, cache_dir=tmp_path, precision="int8").key != first


def test_a_damaged_cache_entry_is_built_again_with_the_reason(bundle_path: Path, tmp_path: Path) -> None:
    first = build(bundle_path, cache_dir=tmp_path, precision="int8")
    path = Path(first.path)
    good = path.read_bytes()
    for data in (good[: len(good) // 2], b"", good[:-1] + bytes([good[-1] ^ 1])):
        path.write_bytes(data)
        again = build(bundle_path, cache_dir=tmp_path, precision="int8")
        assert not again.cached and any("built again" in warning for warning in again.warnings)
        assert path.read_bytes()[-100:] == good[-100:]
    assert build(bundle_path, cache_dir=tmp_path, precision="int8").cached


def test_a_cached_engine_that_computes_something_else_is_built_again(bundle_path: Path, tmp_path: Path) -> None:
    from igate_edge.runtime import cache

    first = build(bundle_path, cache_dir=tmp_path, precision="float")
    entry, _ = cache.load(tmp_path, first.key)
    assert entry is not None
    other = onnx.load_from_string(entry.payload)
    for tensor in (t for t in other.graph.initializer if t.data_type == onnx.TensorProto.FLOAT):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 0, tensor.name))
    cache.store(tmp_path, first.key, other.SerializeToString(), entry.meta)
    again = build(bundle_path, cache_dir=tmp_path, precision="float")
    assert not again.cached and any("fails its golden check" in warning for warning in again.warnings)
    cache.store(tmp_path, first.key, b"not an engine", entry.meta)
    again = build(bundle_path, cache_dir=tmp_path, precision="float")
    assert not again.cached and any("does not open" in warning for warning in again.warnings)
    cache.store(tmp_path, first.key, entry.payload, {**entry.meta, "report": {"from": "an older version"}})
    assert not build(bundle_path, cache_dir=tmp_path, precision="float").cached


@pytest.mark.parametrize("name", ["one.shared.conv.weight", "head.seg.conv.weight", "head.depth.conv.bias"])
def test_altered_weights_with_honest_digests_fail_the_golden_check(
    bundle_path: Path, tmp_path: Path, name: str
) -> None:
    model = scaled_weights(Bundle.read(bundle_path).model, 1.5, name)
    altered = rewritten(bundle_path, tmp_path / "altered.igate", model=model)
    for precision in ("auto", "int8", "float"):
        with pytest.raises(CheckFailed, match="does not compute what was packaged"):
            build(altered, cache_dir=tmp_path / "cache", precision=precision)
    assert not (tmp_path / "cache").exists(), "nothing unchecked is cached"


def test_int8_slower_than_float_falls_back_with_the_reason(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def picks(winner: str) -> object:
        timing = ort.compare([(3.0, 2.0)] if winner == "float" else [(1.0, 2.0)])
        return lambda *_: (winner, "INT8 3.00 ms, float 2.00 ms", timing)

    monkeypatch.setattr(ort, "pick", picks("float"))
    slow = build(bundle_path, cache_dir=tmp_path / "a")
    assert slow.precision == "float" and slow.reason == "INT8 3.00 ms, float 2.00 ms" and slow.timing["ratio"] == 1.5
    assert slow.warnings == ["INT8 fell back to float: INT8 3.00 ms, float 2.00 ms"]
    monkeypatch.setattr(ort, "pick", picks("int8"))
    fast = build(bundle_path, cache_dir=tmp_path / "b")
    assert fast.precision == "int8" and fast.timing["ratio"] == 0.5 and not fast.warnings


def test_wrong_int8_falls_back_or_fails_as_asked(bundle_path: Path, tmp_path: Path) -> None:
    bundle = Bundle.read(bundle_path)
    shrunk = {name: (low / 20, high / 20) for name, (low, high) in bundle.ranges.items()}
    bad = rewritten(bundle_path, tmp_path / "bad.igate", ranges=shrunk)
    report = build(bad, cache_dir=tmp_path)
    assert report.precision == "float" and "golden check" in report.reason
    with pytest.raises(CheckFailed, match="the INT8 engine does not compute"):
        build(bad, cache_dir=tmp_path, precision="int8")


def test_too_little_int8_is_never_called_int8(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = ort.Coverage(0.5, {"a": "float", "b": "int8"}, {"a": 1, "b": 1}, {})
    monkeypatch.setattr(ort, "inspect", lambda model: half)
    with pytest.raises(CheckFailed, match="50.0% of the MACs, 95.0% asked; in float: a"):
        build(bundle_path, cache_dir=tmp_path, precision="int8")
    report = build(bundle_path, cache_dir=tmp_path)
    assert report.precision == "float" and "only 50.0% of the convolution MACs" in report.reason
    assert any("fell back to float: only 50.0%" in warning for warning in report.warnings)
    assert build(bundle_path, cache_dir=tmp_path, precision="float").precision == "float"


def test_a_failing_build_closes_its_sessions(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, close = [], ort.Session.close
    monkeypatch.setattr(ort.Session, "close", lambda self: (closed.append(self), close(self))[1])
    bundle = Bundle.read(bundle_path)
    shrunk = {name: (low / 20, high / 20) for name, (low, high) in bundle.ranges.items()}
    with pytest.raises(CheckFailed):
        build(rewritten(bundle_path, tmp_path / "b.igate", ranges=shrunk), cache_dir=tmp_path, precision="int8")
    assert len(closed) == 2


def test_a_manifest_that_describes_another_network_is_refused(bundle_path: Path, tmp_path: Path) -> None:
    bundle = Bundle.read(bundle_path)
    build(bundle_path, cache_dir=tmp_path, precision="float")
    parts = {"model": bundle.model, "ranges": bundle.ranges, "plain": bundle.plain, "golden": bundle.golden}
    tasks = [dict(task) for task in bundle.manifest["tasks"]]
    tasks[0]["classes"] = list(reversed(tasks[0]["classes"]))
    shift = {**bundle.manifest["preprocess"], "mean": [0.4, 0.5, 0.5]}
    for change in ({"tasks": tasks}, {"preprocess": shift}):
        write_bundle(tmp_path / "other.igate", {**bundle.manifest, **change}, **parts)
        with pytest.raises(BundleError, match="tasks or preprocessing of manifest.json are not those of model.onnx"):
            build(tmp_path / "other.igate", cache_dir=tmp_path, precision="float")
    broken = rewritten(bundle_path, tmp_path / "plain.igate", plain=b"\xff\xffgarbage")
    with pytest.raises(BundleError, match="plain.onnx is not usable"):
        build(broken, cache_dir=tmp_path, precision="float")


def test_the_engine_of_own_frames_is_found_again(bundle_path: Path, tmp_path: Path) -> None:
    own = tinynet.frames(8, seed=7)
    first = build(bundle_path, cache_dir=tmp_path, precision="int8", calibration=own)
    for frames, cached in ((own, True), (None, False)):
        with Engine.open(bundle_path, precision="int8", cache_dir=tmp_path, calibration=frames) as engine:
            assert engine.report.cached is cached and (engine.report.key == first.key) is cached


def test_an_unwritable_cache_is_a_warning(bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    report = build(bundle_path, cache_dir=tmp_path / "file", precision="int8")
    assert report.path == "" and any("not cached" in warning for warning in report.warnings)


def test_two_processes_may_build_at_once(bundle_path: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from igate_edge import build\n"
        "print(build(sys.argv[1], cache_dir=sys.argv[2], precision='int8').cached)"
    )
    command = [sys.executable, "-c", code, str(bundle_path), str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    ended = [process.communicate() for process in running]
    assert [errors.decode() for _, errors in ended] == [""] * 3
    assert sorted(printed.decode().strip() for printed, _ in ended) == ["False", "True", "True"], "built once"
    assert build(bundle_path, cache_dir=tmp_path, precision="int8").cached
    assert len(os.listdir(tmp_path)) == 1


def test_wrong_use_is_refused(bundle_path: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ({"backend": "magic"}, "unknown backend 'magic'"),
        ({"precision": "fp4"}, "unknown precision 'fp4'"),
        ({"threads": 0}, "threads must be"),
    ):
        with pytest.raises(InputError, match=words):
            build(bundle_path, cache_dir=tmp_path, **arguments)
    with pytest.raises(BundleError, match="no such bundle"):
        build(tmp_path / "none.igate")


def test_ranges_of_another_compiler_version_are_made_again(bundle_path: Path, tmp_path: Path) -> None:
    bundle = Bundle.read(bundle_path)
    other = {f"{name}.renamed": pair for name, pair in bundle.ranges.items()}
    renamed = rewritten(bundle_path, tmp_path / "r.igate", ranges=other)
    report = build(renamed, cache_dir=tmp_path, precision="int8")
    assert any("do not fit this version" in warning for warning in report.warnings)
    assert all(item["passed"] for item in report.golden)


def test_every_layout_passes_with_the_bundles_own_ranges(bundle_path: Path, tmp_path: Path) -> None:
    first, *_ = layers(graph.load(Bundle.read(bundle_path).model))
    keys = []
    for choice in ("merged", "split", "merged:8", {first.name: "split"}):
        report = build(bundle_path, cache_dir=tmp_path, precision="int8", choice=choice)
        assert all(item["passed"] for item in report.golden) and not report.cached
        assert not any("do not fit this version" in warning for warning in report.warnings)
        wanted = choice.get(first.name, "merged") if isinstance(choice, dict) else choice.partition(":")[0]
        assert report.pruning["layers"][first.name] == wanted
        keys.append(report.key)
    assert len(set(keys)) == len(keys)
    assert build(bundle_path, cache_dir=tmp_path, precision="int8", choice={first.name: "split"}).cached
    assert build(bundle_path, cache_dir=tmp_path, precision="int8").key == keys[0]


def test_a_layout_that_does_not_exist_is_refused(bundle_path: Path, tmp_path: Path) -> None:
    for choice, words in (("dense", "unknown lowering 'dense'"), ({"x": "split"}, "no layer"), (["split"], "table")):
        with pytest.raises(InputError, match=words):
            build(bundle_path, cache_dir=tmp_path, choice=choice)
    assert entries(tmp_path) == []


def test_some_of_the_tasks_use_the_ranges_of_all(bundle_path: Path, tmp_path: Path) -> None:
    for choice in ("merged", "split"):
        options = Options(cache_dir=tmp_path, precision="int8", tasks=["depth"], choice=choice)
        _, session, report = open_engine(bundle_path, options)
        session.close()
        assert [item["task"] for item in report.golden] == ["depth"] * 2 and all(i["passed"] for i in report.golden)
        assert not any("do not fit this version" in warning for warning in report.warnings)
