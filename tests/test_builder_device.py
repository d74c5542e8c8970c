"""Builder, compile_plan, open_plan, gates, cache and rollback together, on stand-ins for `tensorrt` and CUDA alone.

The stand-ins keep the order of calls, buffers and statuses; what a plan computes is ONNX Runtime's. Not a device.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
import standin_engine
import tinynet
from fake_cuda import FakeCuda
from test_builder_plugin import CALLS, Place

from igate_edge.builder import Options, open_engine
from igate_edge.buildreport import BuildReport
from igate_edge.engines import onnxruntime as ort
from igate_edge.engines import tensorrt
from igate_edge.engines.tensorrt_batch import dynamic_batch
from igate_edge.errors import CheckFailed
from igate_edge.package import package
from igate_edge.runtime.preprocess import to_input

FRAMES = tinynet.frames(8)
#: Milliseconds of a layer: TensorRT's own, on the plugin, and that one call which gains nothing there.
OWN_MS, PLUGIN_MS, SLOW_MS = 0.4, 0.1, 0.9


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    return path


class Device:
    """Both stand-ins, and the files that were built on them. wrong: a task that plans built now compute wrongly."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda = FakeCuda()
        self.trt = fake_tensorrt.install(monkeypatch, self.cuda, layers=self.layers)
        self.trt.plugins["libigate_kernel.so"] = ["Kernel"]
        self.files: dict[str, bytes] = {}
        self.called, self.wrong = b"", ""
        self.answers: dict[tuple[str, bytes], list[np.ndarray]] = {}
        monkeypatch.setattr(tensorrt, "open_cuda", FakeCuda)  # of `probe`, which closes it
        monkeypatch.setattr(fake_tensorrt._Context, "_compute", self.computing())
        build = fake_tensorrt._Builder.build_serialized_network

        def building(builder: Any, network: Any, config: Any) -> Any:
            self.trt.needs = "Kernel" if standin_engine.plugged(network.model) else ""
            return build(builder, network, config)

        monkeypatch.setattr(fake_tensorrt._Builder, "build_serialized_network", building)

    def layers(self, model: bytes) -> list[dict[str, Any]]:
        """What a built engine of this file would list, and how long each layer takes."""
        rows, on = standin_engine.inspector_rows(model), standin_engine.plugged(model)
        self.called = model if standin_engine.called(model) and not on else self.called
        name = hashlib.sha256(model).hexdigest()
        self.files[name] = standin_engine.restored(model, self.called) if on else model
        for row in rows:
            conv, plugin = row["LayerType"] == "CaskConvolution", row["LayerType"] == "PluginV3"
            own = OWN_MS if row.get("Weights", {}).get("Type") == "Int8" else 2 * OWN_MS
            row["ms"] = own if conv else 0.01 if not plugin else SLOW_MS if row["Name"] == CALLS[2] else PLUGIN_MS
        rows[0].update(File=name, Wrong=self.wrong)
        return rows

    def computing(self) -> Any:
        toy = fake_tensorrt._Context._compute

        def compute(context: Any, rows: int, *more: Any) -> None:
            toy(context, rows, *more)  # with what it asserts
            plan = context._engine._plan
            name, wrong = plan["layers"][0]["File"], plan["layers"][0]["Wrong"]
            image = np.array(context._view(plan["inputs"][0][0], rows))
            key = f"{name}{rows}", image.tobytes()
            if key not in self.answers:
                model = self.files[name] if plan["rows"] is None else dynamic_batch(self.files[name])
                session = ort._session(model, 1, False)
                self.answers[key] = session.run(None, {session.get_inputs()[0].name: image})
            for (output, _, _), answer in zip(plan["outputs"], self.answers[key], strict=True):
                context._view(output, rows)[...] = np.roll(answer, 1, axis=1) + 0.5 if output == wrong else answer

        return compute

    def sleep(self, seconds: float) -> None:
        self.cuda.now += seconds

    def plans(self) -> Any:
        at = {"cuda": self.cuda, "clock": self.cuda.clock}
        calls = {name: partial(getattr(tensorrt, name), **at) for name in ("compile_plan", "open_plan")}
        return SimpleNamespace(probe=tensorrt.probe, **calls)

    def opened(self, bundle: Path, place: Place, rollback: bool = False, **options: Any) -> tuple[Any, BuildReport]:
        backend = place.backend(self.plans(), self.cuda.clock, self.sleep)
        asked = Options("tensorrt", cache_dir=place.folder / "cache", **options)
        _, session, report = open_engine(bundle, asked, backend=backend, rollback=rollback)
        return session, report

    def left(self) -> list[Any]:
        return [*self.cuda.blocks, *self.cuda.live]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_from_a_bundle_to_an_engine_and_back_to_it(bundle: Path, place: Place, device: Device) -> None:
    """INT8, all on the plugin, those that gain, FP16; then from the cache; then a wrong one, rolled back."""
    session, report = device.opened(bundle, place)
    assert (report.version, report.precision, report.cached) == ("10.3.0", "int8", False)
    assert report.plugin["layers"] == list(CALLS[:2]) and report.plugin["engine"]["ratio"] < 1
    assert report.plugin["times"][CALLS[2]]["plugin_ms"] == pytest.approx(SLOW_MS)
    assert report.coverage["int8_conv_macs_share"] == 1.0 and report.coverage["plan"]["session"]["graph"] is True
    assert all(result["passed"] for result in report.golden) and len(report.golden) == 2 * len(tinynet.TASKS)
    assert report.latency["paced"]["paced"]["p99"] > 0 and report.latency["measured_ms"] < report.timing["float_ms"]
    image = to_input(FRAMES[5], tinynet.PREPROCESS)
    answer = session.run(image)
    assert {name: array.shape[0] for name, array in answer.items()} == {spec.name: 1 for spec in tinynet.TASKS}
    session.close()
    assert not device.left(), "buffers, streams or graphs of the engines that lost"

    builds = len(device.files)
    device.trt.creators.clear()  # as in another process
    device.trt.seen.clear()
    session, again = device.opened(bundle, place)
    assert again.cached and again.plugin == report.plugin and len(device.files) == builds
    assert device.trt.seen[0] == ("load_library", str(place.library)), "the plugin comes before the engine"
    assert all(np.array_equal(session.run(image)[name], array) for name, array in answer.items())
    session.close()

    device.wrong = "depth"
    with pytest.raises(CheckFailed, match="'depth' \\(int8\\) is NOT as packaged.*the engine built before stays"):
        device.opened(bundle, place, max_ms=50.0)
    device.trt.creators.clear()
    device.trt.seen.clear()
    session, rolled = device.opened(bundle, place, max_ms=50.0, rollback=True)
    assert rolled.key == report.key and "'depth' (int8) is NOT as packaged" in rolled.rolled_back
    assert ("load_library", str(place.library)) in device.trt.seen
    assert all(np.array_equal(session.run(image)[name], array) for name, array in answer.items())
    session.close()
    assert not device.left() and len(list((place.folder / "cache").glob("*.engine"))) == 1


def test_a_batch_of_three_is_checked_row_by_row(bundle: Path, place: Place, device: Device) -> None:
    session, report = device.opened(bundle, place, batch=3, precision="int8")
    assert report.batch == 3 and session.batch == (1, 3, 3) and "one image a call" in report.plugin["note"]
    images = np.concatenate([to_input(frame, tinynet.PREPROCESS) for frame in FRAMES[:3]])
    together, alone = session.run(images), session.run(images[2:])
    assert all(np.allclose(together[name][2:], alone[name], atol=1e-5) for name in alone)
    session.close()
    assert not device.left()
