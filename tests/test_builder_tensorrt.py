"""The backend "tensorrt" on a stand-in: both precisions, every gate, the cache, and the engine built before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import boards
import pytest
import standin_engine
import tinynet
from igate_edge.kernels import manifest
from standin_engine import HERE, StandIn

from igate_edge import builder_gates
from igate_edge.builder import Options, build, open_engine
from igate_edge.builder_tensorrt import TensorRT
from igate_edge.buildreport import BuildReport
from igate_edge.bundle import Bundle, write_bundle
from igate_edge.cli_engine import build_shown
from igate_edge.engines import tensorrt
from igate_edge.errors import CheckFailed, GraphError, InputError, UnavailableError
from igate_edge.package import package
from igate_edge.runtime import cache
from igate_edge.runtime.engine import Engine
from igate_edge.verify import verify

#: No kernels are built there: the plugin is not tried, see test_builder_plugin.py.
NOWHERE = Path("/no/kernels")
FRAMES = tinynet.frames(8)


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trt") / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    return path


def made(
    path: Path, folder: Path, plans: StandIn, root: Path = Path("/no/board"), rollback: bool = False, **options: Any
) -> BuildReport:
    backend = TensorRT(plans, root=root, kernels=NOWHERE, clock=plans.clock, sleep=plans.clock.sleep)
    asked = Options("tensorrt", cache_dir=folder, **options)
    _, session, report = open_engine(path, asked, backend=backend, rollback=rollback)
    session.close()
    return report


def installed(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A stand-in where TensorRT would be; it is paced by the real clock, so for fewer frames."""
    plans = StandIn()
    for name in ("probe", "compile_plan", "open_plan"):
        monkeypatch.setattr(tensorrt, name, getattr(plans, name))
    monkeypatch.setattr(builder_gates, "PACED", 2)
    monkeypatch.setattr(manifest, "FOLDER", NOWHERE)
    return plans


def engines(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.engine"))}


def test_both_precisions_are_built_checked_and_timed_and_the_faster_one_is_named(
    bundle_path: Path, tmp_path: Path
) -> None:
    plans = StandIn()
    report = made(bundle_path, tmp_path, plans)
    assert [asked.precision for asked in plans.builds] == ["int8", "half"]
    assert (report.backend, report.version, report.precision, report.cached) == ("tensorrt", "10.3.0", "int8", False)
    assert report.timing == pytest.approx({"int8_ms": 1.0, "float_ms": 2.0, "ratio": 0.5})
    assert "INT8 is faster on this machine: INT8 1.00 ms, FP16 2.00 ms" in report.reason
    assert {(item["task"], item["precision"], item["passed"]) for item in report.golden} == {
        (spec.name, precision, True) for spec in tinynet.TASKS for precision in ("int8", "half")
    }
    assert report.coverage["int8_conv_macs_share"] == 1.0 and report.coverage["plan"]["peak_mb"] == 12.5
    assert [gate["gate"] for gate in report.gates] == ["layers", "golden"] * 2 + ["budget"]
    assert json.loads(json.dumps(report.as_json())) == report.as_json()
    assert all(session.closed for session in plans.opened)
    shown = "\n".join(map(str, build_shown(report)))
    assert "int8 engine for tensorrt 10.3.0" in shown and "p99 1.00 ms of 100 frames; no budget" in shown


def test_fp16_wins_where_int8_gains_nothing(bundle_path: Path, tmp_path: Path) -> None:
    report = made(bundle_path, tmp_path, StandIn(cost_ms=lambda precision, idle: 3.0 if precision == "int8" else 2.0))
    assert report.precision == "half" and "INT8 is not faster" in report.reason
    assert any(warning.startswith("INT8 is not used") for warning in report.warnings)


def test_a_precision_that_was_asked_for_is_built_alone(bundle_path: Path, tmp_path: Path) -> None:
    for asked, named in (("int8", "int8"), ("float", "half")):
        plans = StandIn()
        report = made(bundle_path, tmp_path, plans, precision=asked)
        assert [one.precision for one in plans.builds] == [named] == [report.precision] and report.timing == {}


def test_the_second_start_builds_nothing_and_checks_again(bundle_path: Path, tmp_path: Path) -> None:
    made(bundle_path, tmp_path, StandIn(), batch=3)
    plans = StandIn()
    report = made(bundle_path, tmp_path, plans, batch=3)
    assert report.cached and plans.builds == [] and plans.opened[0].calls > 3 * len(FRAMES[:4])


WRONG = {
    "task": (StandIn(alter=standin_engine.one_task("depth")), {}, "task 'depth' (int8) is NOT as packaged"),
    "row": (StandIn(alter=standin_engine.one_row(2)), {"batch": 3}, "row 2 of a batch of 3"),
    "scale": (StandIn(model=standin_engine.scaled("two.shared.conv.w", 1.5)), {}, "NOT as packaged"),
    "late": (StandIn(alter=standin_engine.previous_answer), {}, "depends on the frame before it"),
    "buffer": (StandIn(alter=standin_engine.one_buffer), {}, "an answer changes when a later frame runs"),
    "frozen": (StandIn(alter=standin_engine.first_answer), {}, "get one answer, bit by bit"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_engine_is_refused_and_the_old_one_kept(bundle_path: Path, tmp_path: Path, name: str) -> None:
    plans, options, words = WRONG[name]
    plans.opened.clear()
    good = made(bundle_path, tmp_path, StandIn(), precision="int8", **options)
    before = engines(tmp_path)
    asked = {"precision": "int8", "max_ms": 50.0, **options}  # another key: it has to be built
    with pytest.raises(CheckFailed) as caught:
        made(bundle_path, tmp_path, plans, **asked)
    assert words in str(caught.value) and f"the engine built before stays: {good.path}" in str(caught.value)
    assert engines(tmp_path) == before and all(session.closed for session in plans.opened)


def test_only_the_altered_row_and_task_are_named(bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed) as caught:
        made(bundle_path, tmp_path, StandIn(alter=standin_engine.one_row(2)), precision="int8", batch=4)
    assert "row 2 of" in str(caught.value) and not any(f"row {row} of" in str(caught.value) for row in (0, 1, 3))
    with pytest.raises(CheckFailed) as caught:
        made(bundle_path, tmp_path, StandIn(alter=standin_engine.one_task("seg")), precision="int8")
    assert "'seg'" in str(caught.value) and "'depth'" not in str(caught.value)
    assert not engines(tmp_path)


def test_an_fp16_twin_that_is_wrong_is_refused_too(bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="the FP16 engine does not compute what was packaged: .*'tag' \\(half\\)"):
        made(bundle_path, tmp_path, StandIn(alter=standin_engine.one_task("tag"), altered=("half",)))


def test_a_robot_starts_on_the_engine_built_before_and_says_why(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the power mode asks for a new engine, and that one is wrong."""
    board = {"power_mode": "15W"}
    monkeypatch.setattr("igate_edge.runtime.device.fingerprint", lambda root: dict(board))
    good = made(bundle_path, tmp_path, StandIn(), precision="int8")
    assert made(bundle_path, tmp_path, StandIn(), precision="int8").cached
    board["power_mode"] = "MAXN"

    report = made(
        bundle_path, tmp_path, StandIn(alter=standin_engine.one_task("depth")), precision="int8", rollback=True
    )
    assert report.key == good.key and report.cached and "NOT as packaged" in report.rolled_back
    assert report.warnings[0].startswith("rolled back to the engine built before")
    assert "ROLLED BACK" in "\n".join(map(str, build_shown(report)))
    assert len(engines(tmp_path)) == 1
    healed = made(bundle_path, tmp_path, StandIn(), precision="int8", rollback=True)
    assert not healed.cached and healed.key != good.key and healed.rolled_back == "" and len(engines(tmp_path)) == 2


def test_without_an_engine_built_before_a_robot_does_not_start(bundle_path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="does not compute what was packaged"):
        made(bundle_path, tmp_path, StandIn(alter=standin_engine.one_task("depth")), rollback=True)


def test_another_version_driver_or_chip_asks_for_an_engine_of_its_own(bundle_path: Path, tmp_path: Path) -> None:
    keys = [made(bundle_path, tmp_path, StandIn(), precision="int8").key]
    for change in ({"version": "10.3.1"}, {"compute": "8.6"}, {"driver": "12.8"}, {"device": "Orin, half the SMs"}):
        keys.append(made(bundle_path, tmp_path, StandIn({**HERE, **change}), precision="int8").key)
    assert made(bundle_path, tmp_path, StandIn({**HERE, "memory_mb": 1}), precision="int8").key == keys[0]
    plugin = tmp_path / "libigate.so"
    for data in (b"one build", b"another"):
        plugin.write_bytes(data)
        keys.append(made(bundle_path, tmp_path, StandIn(), precision="int8", plugins=[plugin]).key)
    assert len(set(keys)) == len(keys)


def test_an_engine_of_another_version_under_this_key_is_rebuilt_never_opened(bundle_path: Path, tmp_path: Path) -> None:
    first = made(bundle_path, tmp_path, StandIn(), precision="int8")
    entry, _ = cache.load(tmp_path, first.key)
    assert entry is not None
    older = {**entry.meta, "made_for": {**entry.meta["made_for"], "version": "10.2.0"}}
    cache.store(tmp_path, first.key, entry.payload, older)
    plans = StandIn()
    again = made(bundle_path, tmp_path, plans, precision="int8")
    assert not again.cached and len(plans.opened) == 1, "the foreign plan was opened"
    assert any("built elsewhere (version 10.2.0, here 10.3.0): built again" in text for text in again.warnings)


def test_a_float_layer_and_reformats_reject_int8_by_name(bundle_path: Path, tmp_path: Path) -> None:
    def spoil(rows: list[dict[str, Any]]) -> None:
        layer = next(row for row in rows if row["Name"].endswith("+ two.shared.conv"))
        layer["Inputs"][0]["Format/Datatype"], layer["Weights"]["Type"] = "Float", "Float"
        for index in range(3):
            rows.append(standin_engine.row(f"Reformatting CopyNode for Input Tensor {index} to head", [], "Int8",
                                           "Int8", "Reformat"))  # fmt: skip

    for version in ("10.3.0", "11.4.0"):
        with pytest.raises(CheckFailed, match="INT8 engine is not what was asked for") as caught:
            made(bundle_path, tmp_path, StandIn({**HERE, "version": version}, spoil=spoil))
        assert "two.shared.conv is not INT8: reads float, weights float" in caught.value.evidence
        assert caught.value.evidence.count("unexpected reformat") == 3 and caught.value.exit_code == 1
    assert made(bundle_path, tmp_path, StandIn(spoil=lambda rows: None), precision="float").precision == "half"


def test_a_budget_is_judged_on_the_finished_engine_at_a_camera_s_pace(bundle_path: Path, tmp_path: Path) -> None:
    """The device needs 1 ms in a tight loop and 3 ms after 10 ms of rest (cases L2): 2 ms are not held."""
    plans = StandIn(cost_ms=lambda precision, idle: 3.0 if idle > 10 else 1.0)
    with pytest.raises(CheckFailed, match="misses its budget.*p99 of 100 paced frames is 3 ms, 2 ms are allowed"):
        made(bundle_path, tmp_path, plans, precision="int8", max_ms=2.0)
    assert not engines(tmp_path) and all(session.closed for session in plans.opened)
    report = made(bundle_path, tmp_path, plans, precision="int8", max_ms=4.0)
    assert report.latency["measured_ms"] == pytest.approx(1.0)
    assert report.latency["paced"]["paced"]["p99"] == pytest.approx(3.0)
    assert report.latency["budget"]["ms"] == 4.0 and report.latency["conditions"]["provisional"]


def test_predicted_and_measured_stand_side_by_side(bundle_path: Path, tmp_path: Path) -> None:
    """A table that summed to 8 ms does not save an engine of 11 ms (cases L3)."""
    bundle = Bundle.read(bundle_path)
    parts = {"model": bundle.model, "ranges": bundle.ranges, "plain": bundle.plain, "golden": bundle.golden}
    budget = {"kind": "Budget", "ms": 10.0, "predicted_ms": 8.0, "device": {"cpu": "x"}}
    write_bundle(tmp_path / "b.igate", {**bundle.manifest, "budget": budget}, **parts)
    slow = StandIn(cost_ms=lambda precision, idle: 11.0)
    with pytest.raises(CheckFailed, match="is 11 ms, 10 ms are allowed, 8 ms were predicted"):
        made(tmp_path / "b.igate", tmp_path, slow, precision="int8", max_ms=10.0)
    report = made(tmp_path / "b.igate", tmp_path, slow, precision="int8")
    assert report.latency["budget"]["ms"] is None and "not of this machine" in report.latency["budget"]["note"]


def test_timings_of_earlier_builds_are_used_and_bad_ones_ignored(bundle_path: Path, tmp_path: Path) -> None:
    plans = StandIn()
    made(bundle_path, tmp_path, plans)
    assert [asked.timing_cache for asked in plans.builds] == [b"", b"timings"]
    (path,) = tmp_path.glob("*.timings")
    good = path.read_bytes()
    for number, data in enumerate((good[:-1], b"", good.replace(b"timings", b"timinga"))):
        path.write_bytes(data)
        again = StandIn()
        made(bundle_path, tmp_path, again, precision="int8", max_ms=100.0 + number)
        assert again.builds[0].timing_cache == b""
    elsewhere = StandIn({**HERE, "version": "11.4.0"})
    made(bundle_path, tmp_path, elsewhere, precision="int8")
    assert elsewhere.builds[0].timing_cache == b""


def test_versions_with_a_bad_name_are_told(bundle_path: Path, tmp_path: Path) -> None:
    def told(version: str, **options: Any) -> bool:
        report = made(bundle_path, tmp_path, StandIn({**HERE, "version": version}), precision="int8", **options)
        return any("were reported to compute wrong results" in warning for warning in report.warnings)

    assert told("11.1.0.12") and not told("11.10.0") and not told("10.11.0") and told("10.11.0", batch=2)


def test_int8_that_was_no_use_when_packaged_is_not_built(bundle_path: Path, tmp_path: Path) -> None:
    bundle = Bundle.read(bundle_path)
    parts = {"model": bundle.model, "ranges": bundle.ranges, "plain": bundle.plain, "golden": bundle.golden}
    table = {name: dict(row) for name, row in bundle.manifest["tolerances"].items()}
    table["depth"]["packaged"] = 9.0
    write_bundle(tmp_path / "b.igate", {**bundle.manifest, "tolerances": table}, **parts)
    report = made(tmp_path / "b.igate", tmp_path, StandIn())
    assert report.precision == "half" and report.reason == "INT8 of depth was no use when it was packaged"


def test_a_tensorrt_of_another_jetpack_is_refused_before_anything_is_built(bundle_path: Path, tmp_path: Path) -> None:
    """Case T6: made for CUDA 13, it installs on an Orin and has no kernels for its SM 8.7."""
    root = boards.build(tmp_path / "orin", "agx-orin")
    packages = (root / "var/lib/dpkg/status").read_text().replace("10.16.2", "10.13.3")
    boards.put(root, "var/lib/dpkg/status", packages)
    plans = StandIn()
    plans.here["version"] = "10.13.3"
    with pytest.raises(UnavailableError, match="no kernels for SM 87.*igate doctor --strict"):
        made(bundle_path, tmp_path / "cache", plans, root)
    assert plans.builds == []
    plans.here["version"] = "10.16.2"
    assert made(bundle_path, tmp_path / "cache", plans, root).precision == "int8" and plans.builds


def test_what_tensorrt_would_refuse_never_reaches_it(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from igate_edge.compiler import lint

    finding = lint.Finding("IG101", "error", "x", "zero point 3", "use 0")
    monkeypatch.setattr(lint, "refusals", lambda model: [finding])
    plans = StandIn()
    with pytest.raises(GraphError, match="TensorRT would not take this network: IG101"):
        made(bundle_path, tmp_path, plans)
    assert plans.builds == []


def test_a_cancelled_build_leaves_nothing_and_is_no_rollback(bundle_path: Path, tmp_path: Path) -> None:
    made(bundle_path, tmp_path, StandIn(), precision="int8")
    before = sorted(path.name for path in tmp_path.iterdir())

    class Cancelled(StandIn):
        def compile_plan(self, *arguments: Any, **options: Any) -> Any:
            raise tensorrt.BuildCancelled("the build was stopped", "", "")

    with pytest.raises(tensorrt.BuildCancelled):
        made(bundle_path, tmp_path, Cancelled(), precision="int8", max_ms=50.0, rollback=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_auto_takes_tensorrt_where_it_is_usable(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> dict[str, Any]:
        raise UnavailableError("TensorRT is missing", "No module named 'tensorrt'", "apt install python3-libnvinfer")

    monkeypatch.setattr(tensorrt, "probe", absent)
    with Engine.open(bundle_path, "auto", precision="int8", cache_dir=tmp_path) as engine:
        assert engine.report.backend == "onnxruntime"
        assert "TensorRT does not: TensorRT is missing: No module named 'tensorrt'" in engine.report.warnings[0]
    with pytest.raises(UnavailableError, match="TensorRT is missing"):
        Engine.open(bundle_path, "tensorrt", cache_dir=tmp_path)
    assert verify(bundle_path, backend="auto").passed
    plans = installed(monkeypatch)
    report = build(bundle_path, "auto", precision="int8", cache_dir=tmp_path)
    assert report.backend == "tensorrt" and not report.warnings
    checked = verify(bundle_path, backend="tensorrt", cache_dir=tmp_path)
    assert checked.passed and {item["precision"] for item in checked.golden} == {"int8", "half"}
    plans.alter = standin_engine.one_task("depth")
    wrong = verify(bundle_path, backend="tensorrt", cache_dir=tmp_path / "new")
    assert not wrong.passed and "'depth'" in wrong.problems[0]


def test_an_engine_for_a_batch_takes_one_row_to_all(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from igate_edge.runtime.preprocess import to_input

    plans = installed(monkeypatch)
    with Engine.open(bundle_path, "tensorrt", precision="int8", cache_dir=tmp_path, batch=3) as engine:
        images = [to_input(frame, engine.preprocess) for frame in FRAMES[:3]]
        together = engine.infer(np.concatenate(images))
        for row, image in enumerate(images):
            alone = engine.infer(image)
            assert all(np.allclose(together[name][row], alone[name][0], atol=1e-5) for name in alone)
        with pytest.raises(InputError, match="infer takes"):
            engine.infer(np.concatenate([*images, images[0]]))
    assert plans.builds[0].batch == (1, 3, 3)


def test_wrong_options_are_refused() -> None:
    for change, words in (
        ({"batch": 0}, "batch must be a number"),
        ({"max_ms": float("nan")}, "max_ms must be a number above 0"),
        ({"seconds": -1}, "seconds must be"),
        ({"workspace_mb": 0}, "workspace_mb must be"),
    ):
        with pytest.raises(InputError, match=words):
            Options("tensorrt", **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="only engines of TensorRT have batch"):
        Options(batch=2)
    assert dataclasses.replace(Options("auto", batch=2), backend="tensorrt").batch == 2
