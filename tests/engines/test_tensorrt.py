"""Building plans, on stand-ins for TensorRT and CUDA: candidates, memory, caches, progress; not what it does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import Behaviour, enumeration, install, make
from toy_onnx import model

from igate_edge.engines import tensorrt
from igate_edge.engines.tensorrt import BuildCancelled, Plan, PlanOptions, compile_plan, open_plan
from igate_edge.errors import CheckFailed, GraphError, InputError, UnavailableError

MEMORY = "Requested amount of GPU memory (838860800 bytes) could not be allocated. There may not be enough free memory."


def built(cuda: FakeCuda, options: PlanOptions | None = None, **more: Any) -> Plan:
    return compile_plan(model(), options, cuda=cuda, clock=cuda.clock, **more)


def told(trt: Behaviour, what: str) -> list[Any]:
    return [value for name, value in trt.seen if name == what]


@pytest.mark.parametrize(("version", "flags"), [("10.3.0", 2), ("10.16.0", 2), ("11.4.0", 1), ("12.0.0", 1)])
def test_one_path_for_every_version(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, version: str, flags: int) -> None:
    """Strongly typed and without a precision flag; the flag's bit is where the version has it."""
    trt = install(monkeypatch, cuda, version=version)
    plan = built(cuda)
    assert told(trt, "create_network") == [flags] and told(trt, "set_flag") == []
    assert json.loads(plan.layers)["Layers"] and plan.chosen == {
        "aux_streams": 0,
        "level": 3,
        "workspace_mb": 512,
        "ms": pytest.approx(4.0 + 3 * 0.5 + 0.01),
    }
    with open_plan(plan.plan, cuda=cuda, clock=cuda.clock) as session:
        found = session.run(np.ones((1, 3, 4, 4), np.float32))
    assert found["depth"].shape == (1, 1, 4, 4) and (found["depth"] == 48 + 1).all()
    assert not cuda.blocks and not cuda.live


def test_a_version_without_the_strongly_typed_flag(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    trt = Behaviour(version="13.0.0")
    module = make(cuda, trt)
    module.__dict__["NetworkDefinitionCreationFlag"] = enumeration("Flag", "OTHER")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    built(cuda)
    assert told(trt, "create_network") == [0]


@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "unknown"])
def test_old_versions_are_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, version: str
) -> None:
    install(monkeypatch, cuda, version=version)
    for call in (lambda: built(cuda), lambda: open_plan(b"", cuda=cuda), tensorrt.probe):
        with pytest.raises(UnavailableError, match=f"TensorRT is too old: version {version}; 10.3 and newer"):
            call()


def test_tensorrt_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError, match="TensorRT is missing.*python3-libnvinfer"):
        tensorrt.probe()


def test_importing_touches_neither_tensorrt_nor_cuda() -> None:
    program = (
        "import sys, igate_edge.engines.tensorrt, igate_edge.engines.tensorrt_build;"
        "print([name for name in sys.modules if name.split('.')[0] in ('tensorrt', 'cuda', 'pycuda', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_probe(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, trt: Behaviour) -> None:
    monkeypatch.setattr(tensorrt, "open_cuda", lambda: cuda)
    found = tensorrt.probe()
    assert found == {
        "version": "10.3.0",
        "compute": "8.7",
        "device": "Stand-in",
        "driver": "12.6",
        "cuda": "stand-in",
        "integrated": False,
        "memory_mb": 8192,
    }
    assert cuda.closed and cuda.depth == 0


def test_an_adapter_of_its_own_is_closed(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, trt: Behaviour) -> None:
    plan = built(cuda)
    own = FakeCuda()
    install(monkeypatch, own)
    monkeypatch.setattr(tensorrt, "open_cuda", lambda: own)
    open_plan(plan.plan, clock=own.clock).close()
    assert own.closed and not own.blocks
    own.closed = False
    with pytest.raises(CheckFailed):
        open_plan(b"not a plan")
    assert own.closed


def test_the_fastest_candidate_is_kept(cuda: FakeCuda, trt: Behaviour) -> None:
    trt.ms = lambda streams, level: {(0, 3): 4.0, (0, 5): 3.0, (2, 3): 2.5, (2, 5): 9.0}[streams, level]
    plan = built(cuda, PlanOptions(aux_streams=(0, 2), levels=(3, 5)))
    assert told(trt, "build") == [(0, 3), (0, 5), (2, 3), (2, 5)]
    assert (plan.chosen["aux_streams"], plan.chosen["level"]) == (2, 3)
    assert [round(one["ms"] - 1.51, 6) for one in plan.tried] == [4.0, 3.0, 2.5, 9.0]
    assert json.loads(plan.plan)["ms"] == 2.5


def test_the_time_limit_starts_no_candidate_that_would_end_late(cuda: FakeCuda, trt: Behaviour) -> None:
    def minute() -> None:
        cuda.now += 60

    trt.while_building = minute
    plan = built(cuda, PlanOptions(levels=(1, 2, 3, 4, 5), seconds=200.0))
    assert [one["level"] for one in plan.tried] == [1, 2, 3]
    assert any("2 of 5 candidates not tried" in line for line in plan.log)
    assert 180 <= plan.seconds < 200
    assert len(built(cuda, PlanOptions(levels=(1, 2), seconds=1.0)).tried) == 1, "one is always built"


def test_a_failed_candidate_is_named_and_the_other_kept(cuda: FakeCuda, trt: Behaviour) -> None:
    trt.builds = ["Could not find any implementation for node conv1"]
    plan = built(cuda, PlanOptions(levels=(3, 5)))
    assert "any implementation" in plan.tried[0]["error"] and "ms" not in plan.tried[0]
    assert plan.chosen["level"] == 5 and "ERROR: Could not find any implementation for node conv1" in plan.log


def test_no_candidate_can_be_built(cuda: FakeCuda, trt: Behaviour) -> None:
    trt.builds = ["Could not find any implementation for node conv1"]
    with pytest.raises(CheckFailed, match="could not build the engine: Could not find any implementation"):
        built(cuda)


def test_out_of_memory_halves_the_workspace_twice_at_most(cuda: FakeCuda, trt: Behaviour) -> None:
    """TensorRT calls it a missing implementation; its log tells what it was."""
    trt.builds = [MEMORY, MEMORY]
    plan = built(cuda, PlanOptions(workspace_mb=1000))
    assert told(trt, "workspace") == [1000, 500, 250] and plan.chosen["workspace_mb"] == 250
    trt.builds, trt.seen = [MEMORY] * 9, []
    with pytest.raises(CheckFailed, match="not enough memory to build the engine: Requested amount.*swap"):
        built(cuda, PlanOptions(workspace_mb=1000))
    assert len(told(trt, "build")) == 3
    trt.builds, trt.seen = [MEMORY] * 9, []
    with pytest.raises(CheckFailed, match="not enough memory"):
        built(cuda, PlanOptions(workspace_mb=64))
    assert len(told(trt, "build")) == 1, "a smaller workspace than that helps nobody"


def test_the_peak_of_memory(cuda: FakeCuda, trt: Behaviour) -> None:
    """A last look comes when the build has ended, and the stand-in keeps its 300 MiB."""
    before = cuda.free_bytes

    def take() -> None:
        cuda.free_bytes = before - 300 * 2**20

    trt.while_building = take
    assert built(cuda).peak_mb == 300.0
    cuda.refuse = {"memory": "not here"}
    with pytest.raises(CheckFailed, match="not here"):
        built(cuda)
    assert built(cuda, PlanOptions(workspace_mb=100)).peak_mb is None


class Recorder:
    def __init__(self) -> None:
        self.said: list[tuple[str, int, int]] = []

    def phase(self, name: str, done: int, total: int) -> None:
        self.said.append((name, done, total))


def test_progress_of_two_candidates(cuda: FakeCuda, trt: Behaviour) -> None:
    """Two nested phases of two steps: a quarter, a half, then the outer steps; each candidate is a half of all."""
    recorder = Recorder()
    built(cuda, PlanOptions(levels=(3, 5)), progress=recorder)
    assert [done for _, done, _ in recorder.said] == [125, 250, 250, 500, 625, 750, 750, 1000]
    assert recorder.said[0] == ("plan 1 of 2: Tactics", 125, 1000)


def test_cancel(cuda: FakeCuda, trt: Behaviour) -> None:
    recorder = Recorder()
    with pytest.raises(BuildCancelled, match="cancelled"):
        built(cuda, progress=recorder, cancelled=lambda: len(recorder.said) >= 2)
    assert len(recorder.said) == 2 and not cuda.blocks and not cuda.live and cuda.depth == 0
    with pytest.raises(BuildCancelled):
        built(cuda, cancelled=lambda: True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_is_raised_while_showing_progress_comes_back(
    cuda: FakeCuda, trt: Behaviour, error: type[BaseException]
) -> None:
    class Bad:
        def phase(self, name: str, done: int, total: int) -> None:
            raise error

    with pytest.raises(error):
        built(cuda, progress=Bad())
    assert cuda.depth == 0


def test_a_timing_cache_is_used_again(cuda: FakeCuda, trt: Behaviour) -> None:
    first = built(cuda)
    assert told(trt, "timing_cache") == [b""]
    built(cuda, PlanOptions(timing_cache=first.timing_cache))
    assert told(trt, "timing_cache")[1] == b"+"


def bad_caches(good: bytes) -> dict[str, bytes]:
    return {"truncated": good[:-1], "flipped": good[:-1] + b"-", "foreign": b"\0" * 80, "header": good[:20]}


@pytest.mark.parametrize("how", ["truncated", "flipped", "foreign", "header"])
def test_a_damaged_timing_cache_is_a_cold_build(cuda: FakeCuda, trt: Behaviour, how: str) -> None:
    bad = bad_caches(built(cuda).timing_cache)[how]
    trt.seen = []
    plan = built(cuda, PlanOptions(timing_cache=bad))
    assert told(trt, "timing_cache") == [b""] and any("timing cache is damaged" in line for line in plan.log)


def test_a_timing_cache_of_another_device_is_not_used(cuda: FakeCuda, trt: Behaviour) -> None:
    cache = built(cuda).timing_cache
    cuda.device = replace(cuda.device, compute="11.0")
    trt.seen = []
    built(cuda, PlanOptions(timing_cache=cache))
    assert told(trt, "timing_cache") == [b""]


@pytest.mark.parametrize("timing", ["none", "refused", "raises", "absent"])
def test_tensorrt_does_not_take_the_timing_cache(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, timing: str) -> None:
    install(monkeypatch, cuda)
    cache = built(cuda).timing_cache
    trt = install(monkeypatch, cuda, timing=timing)
    plan = built(cuda, PlanOptions(timing_cache=cache))
    assert any("timing cache was not taken" in line for line in plan.log) and plan.plan
    assert told(trt, "timing_cache") == [b"+", b""], "an empty one instead"


def test_a_graph_that_tensorrt_does_not_take(cuda: FakeCuda, trt: Behaviour) -> None:
    with pytest.raises(GraphError, match=r"does not take the graph: Conv 'conv1': not a model \(INVALID_GRAPH\)"):
        compile_plan(b"not onnx", cuda=cuda)


def test_plugins_are_loaded_before_the_build(cuda: FakeCuda, trt: Behaviour) -> None:
    trt.plugins, trt.needs = {"libigate.so": ["igate::Kernel"]}, "igate::Kernel"
    assert built(cuda, PlanOptions(plugins=(Path("/opt/libigate.so"),))).plan
    assert trt.seen[0] == ("load_library", "/opt/libigate.so")
    with pytest.raises(UnavailableError, match="libother.so: dlopen: no such file"):
        built(cuda, PlanOptions(plugins=(Path("/opt/libother.so"),)))


def test_a_plugin_is_loaded_once_for_all_builds_and_sessions(cuda: FakeCuda, trt: Behaviour) -> None:
    """TensorRT refuses to register a plugin twice; an INT8 build, its FP16 twin and the session are one process."""
    trt.plugins, trt.needs = {"libigate.so": ["igate::Kernel"]}, "igate::Kernel"
    options = PlanOptions(plugins=(Path("/opt/libigate.so"),))
    for plan in (built(cuda, options), built(cuda, options)):
        open_plan(plan.plan, options.plugins, cuda=cuda, clock=cuda.clock).close()
    assert told(trt, "load_library") == ["/opt/libigate.so"]


def test_another_library_with_the_same_plugin_is_refused(cuda: FakeCuda, trt: Behaviour) -> None:
    trt.plugins = {"libold.so": ["igate::Kernel"], "libnew.so": ["igate::Kernel"]}
    built(cuda, PlanOptions(plugins=(Path("/opt/libold.so"),)))
    with pytest.raises(UnavailableError, match="libnew.so: .*another library has registered its plugins"):
        built(cuda, PlanOptions(plugins=(Path("/opt/libnew.so"),)))


@pytest.mark.parametrize("wrong", [None, b"", "model.onnx", Path("model.onnx"), 7, bytearray(b"x")])
def test_what_is_no_bytes_is_refused_before_anything_starts(cuda: FakeCuda, trt: Behaviour, wrong: Any) -> None:
    with pytest.raises(InputError, match="this is no ONNX model"):
        compile_plan(wrong, cuda=cuda)
    with pytest.raises(InputError, match="this is no plan"):
        open_plan(wrong, cuda=cuda)
    assert not cuda.calls and not trt.seen


def test_a_batch_profile(cuda: FakeCuda, trt: Behaviour) -> None:
    plan = built(cuda, PlanOptions(batch=(1, 2, 4)))
    assert json.loads(plan.plan)["rows"] == [1, 2, 4]
    with open_plan(plan.plan, cuda=cuda, clock=cuda.clock) as session:
        assert session.batch == (1, 2, 4)
        assert session.run(np.ones((3, 3, 4, 4), np.float32))["semseg"].shape == (3, 2, 8, 8)
    assert json.loads(built(cuda, PlanOptions(batch=(1, 1, 1))).plan)["rows"] is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"precision": "fp8"}, "int8 or half"),
        ({"workspace_mb": 0}, "workspace_mb"),
        ({"batch": (2, 1, 4)}, "least <= usual <= most"),
        ({"batch": (0, 1, 1)}, "least <= usual <= most"),
        ({"aux_streams": ()}, "aux_streams"),
        ({"aux_streams": (-1,)}, "aux_streams"),
        ({"levels": (6,)}, "levels"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"seconds": "60"}, "seconds is a positive number, not '60'"),
        ({"precision": None}, "int8 or half, not None"),
        ({"precision": []}, "int8 or half"),
        ({"workspace_mb": "512"}, "workspace_mb is a positive number, not '512'"),
        ({"workspace_mb": True}, "workspace_mb"),
        ({"batch": (1, 2)}, "least <= usual <= most"),
        ({"batch": ()}, "least <= usual <= most"),
        ({"batch": 4}, "least <= usual <= most, not 4"),
        ({"aux_streams": None}, "aux_streams are numbers from 0, not None"),
        ({"aux_streams": 2}, "aux_streams"),
        ({"levels": ("3",)}, "levels"),
        ({"levels": ([],)}, "levels"),
        ({"timing_cache": None}, "timing_cache is bytes, not NoneType"),
        ({"plugins": "libigate.so"}, "plugins is a tuple of paths"),
        ({"plugins": (None,)}, "not a path"),
        ({"plugins": ("a\0b",)}, "not a path"),
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        PlanOptions(**wrong)
