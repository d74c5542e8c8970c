"""tensorrt_api on what of NVIDIA's is to be had: TensorRT-RTX's builder on a CPU, TensorRT itself where there is a GPU.

The first has the same Python API for parsing and building; what it accepts says nothing about TensorRT on a Jetson.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from toy_onnx import model

from igate_edge.engines import tensorrt
from igate_edge.engines.tensorrt import PlanOptions, compile_plan, open_plan
from igate_edge.engines.tensorrt_batch import dynamic_batch
from igate_edge.errors import UnavailableError

#: In a process of its own: that library may abort.
PROGRAM = """
import json, sys
import tensorrt_rtx
sys.modules["tensorrt"] = tensorrt_rtx
from igate_edge.engines import tensorrt_api as api
from igate_edge.engines.tensorrt_build import Watch, _Step
from igate_edge.engines.tensorrt_log import Log

class Shown:
    def __init__(self):
        self.done = []
    def phase(self, name, done, total):
        self.done.append(done)

found = {}
for path, batch in json.loads(sys.argv[1]):
    log = Log()
    logger = api.logger(log)
    parsed = api.parse(logger, open(path, "rb").read())
    assert not parsed.errors, parsed.errors
    config = api.configure(parsed, api.Settings(64, 0, 3, batch and tuple(batch)))
    taken, cache = api.use_timing_cache(config, b"")
    shown = Shown()
    step = _Step(Watch(shown, None, lambda: 0.0), 0, 1)
    monitor = api.watch(config, step.phases.start, step.stepped, step.phases.finish)
    plan = api.build(parsed, config)
    step.settle()
    found[path] = {"bytes": len(plan or b""), "done": shown.done, "taken": taken, "log": log.lines}
    stopped = _Step(Watch(None, lambda: True, lambda: 0.0), 0, 1)
    monitor = api.watch(config, stopped.phases.start, stopped.stepped, stopped.phases.finish)
    found[path]["stopped"] = api.build(parsed, config) is None
bad = api.parse(logger, b"not a model")
found["errors"] = bad.errors
print(json.dumps(found))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="NOT TESTED: tensorrt_api on TensorRT-RTX, which is missing",
)
def test_our_calls_on_the_builder_of_tensorrt_rtx(tmp_path: Path) -> None:
    """It parses, takes a batch profile and a workspace, reports progress, stops when told to, gives a plan."""
    (tmp_path / "one.onnx").write_bytes(model())
    (tmp_path / "many.onnx").write_bytes(dynamic_batch(model()))
    jobs = [(str(tmp_path / "one.onnx"), None), (str(tmp_path / "many.onnx"), (1, 2, 4))]
    command = [sys.executable, "-c", PROGRAM, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for path, _ in jobs:
        assert found[path]["bytes"] > 1000, found[path]["log"]
        assert found[path]["done"] == sorted(found[path]["done"]) and found[path]["done"][-1] > 500
        assert found[path]["stopped"]
    assert found["errors"]


def absent() -> str:
    """Why there is no TensorRT to run here, or ""."""
    try:
        tensorrt.probe()
    except UnavailableError as error:
        return str(error)
    return ""


@pytest.mark.gpu
@pytest.mark.skipif(bool(absent()), reason=f"NOT RUN on a device: {absent()}")
@pytest.mark.parametrize("memory", ["auto", "mapped", "copy"])
def test_on_a_device(memory: str) -> None:
    """A small float network, against ONNX Runtime: one image, a batch, frames in turn, layer by layer."""
    images = np.random.default_rng(0).standard_normal((4, 3, 4, 4)).astype(np.float32)
    reference = onnxruntime.InferenceSession(model(), providers=["CPUExecutionProvider"])
    want = [reference.run(["semseg", "depth"], {"image": images[row : row + 1]}) for row in range(4)]
    first = compile_plan(model(), PlanOptions(aux_streams=(0, 1), levels=(2, 3)))
    assert json.loads(first.layers) and first.chosen["ms"] > 0
    with open_plan(first.plan, memory=memory) as session:
        tickets = [session.submit(images[row : row + 1]) for row in range(4)]
        for ticket, (semseg, depth) in zip(tickets, want, strict=True):
            np.testing.assert_allclose(ticket.result()["semseg"], semseg, rtol=1e-2, atol=1e-2)
            np.testing.assert_allclose(ticket.result()["depth"], depth, rtol=1e-2, atol=1e-2)
        assert all(ms >= 0 for _, ms in session.layer_times(5)) and session.facts["gpu_ms"] > 0
    second = compile_plan(model(), PlanOptions(batch=(1, 2, 4), timing_cache=first.timing_cache))
    with open_plan(second.plan, memory=memory) as session:
        depth = session.run(images)["depth"]
        np.testing.assert_allclose(depth, np.concatenate([item[1] for item in want]), rtol=1e-2, atol=1e-2)
