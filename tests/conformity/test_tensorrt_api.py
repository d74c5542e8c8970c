"""engines/tensorrt_api.py against the real bindings of 10.3, 10.16 and 11.4: types, names, and what can run of it.

A pass means "type-checked against these versions", nothing more: no network is parsed and no engine is built here.
"""

from __future__ import annotations

import json
import sys
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from conformity import bindings
from fake_cuda import FakeCuda
from fake_tensorrt import Behaviour, make

pytestmark = pytest.mark.tensorrt

FILE = bindings.ROOT / "igate_edge" / "engines" / "tensorrt_api.py"
NAME = "igate_edge.engines.tensorrt_api"

#: Asks the real package for names, [[class, attribute], ...] on stdin; prints those that it does not have.
LOOK_UP = """
import functools, json, sys
import tensorrt_bindings
missing = []
for owner, attribute in json.load(sys.stdin):
    try:
        getattr(functools.reduce(getattr, owner.split(".")[1:], tensorrt_bindings), attribute)
    except AttributeError:
        missing.append(f"{owner}.{attribute}")
print(json.dumps(missing))
"""

#: Runs what needs no library behind the bindings: our subclasses of their classes, and the refusals.
RUN = """
import sys, types
import tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
from igate_edge.engines import tensorrt_api as api
from igate_edge.errors import UnavailableError

said = []
logger = api.logger(lambda severity, text: said.append((severity, text)))
logger.log(tensorrt_bindings.ILogger.WARNING, "slow")
assert said == [("WARNING", "slow")], said
config = types.SimpleNamespace()
api.watch(config, lambda *all: said.append(all), lambda *all: said.append(all) or False, lambda *all: said.append(all))
monitor = config.progress_monitor
assert isinstance(monitor, tensorrt_bindings.IProgressMonitor)
monitor.phase_start("build", None, 2)
assert monitor.step_complete("build", 0) is False
monitor.phase_finish("build")
assert said[1:] == [("build", "", 2), ("build", 0), ("build",)], said
running = types.SimpleNamespace()
profiler = api.profile(running, lambda *all: said.append(all))
assert isinstance(running.profiler, tensorrt_bindings.IProfiler)
profiler.report_layer_time("conv1", 1.5)
assert said[-1] == ("conv1", 1.5)
assert api._sizes(tensorrt_bindings.Dims([2, 3, 4])) == (2, 3, 4)
for call in (api.parse, api.load):
    try:
        call(logger, b"")
    except UnavailableError as error:
        assert "cannot start here" in str(error), error
    else:
        raise AssertionError("there is no library behind these bindings")
print(api.version())
"""


@pytest.fixture(scope="module", params=bindings.VERSIONS)
def found(request: pytest.FixtureRequest) -> bindings.Bindings:
    try:
        return bindings.fetch(request.param)
    except bindings.Unreachable as error:
        pytest.skip(f"NOT CHECKED against TensorRT {request.param}: {error}")


def missing(found: bindings.Bindings, names: list[Any]) -> list[str]:
    done = bindings.run(found, sys.executable, "-c", LOOK_UP, input=json.dumps(names))
    assert done.returncode == 0, done.stderr
    answer: list[str] = json.loads(done.stdout)
    return answer


def test_types_and_names(found: bindings.Bindings) -> None:
    answer = bindings.check(found, FILE, NAME)
    assert answer["errors"] == []
    assert len(answer["names"]) > 60, "mypy saw through to the calls"
    assert {"tensorrt.IPluginRegistry", "tensorrt.ILogger.Severity"} <= {owner for owner, _ in answer["names"]}
    assert missing(found, answer["names"]) == []


WRONG = """

def wrong(config: trt.IBuilderConfig) -> None:
    import tensorrt as trt

    config.set_flag(trt.BuilderFlag.INT8)
    config.set_memory_limit(trt.MemoryPoolType.WORKSPACE, 1)
    config.set_memory_pool_limit("WORKSPACE", 1)
"""


def test_wrong_calls_are_caught(found: bindings.Bindings, tmp_path: Path) -> None:
    """BuilderFlag.INT8 is there up to 10.16 and gone in 11; the others are wrong in all."""
    copy = tmp_path / "tensorrt_api.py"
    copy.write_text(FILE.read_text() + WRONG)
    answer = bindings.check(found, copy, NAME)
    words, gone = ["set_memory_limit", "incompatible type"], ["tensorrt.IBuilderConfig.set_memory_limit"]
    if found.version.startswith("11."):
        words.insert(0, 'no attribute "INT8"')
        gone.insert(0, "tensorrt.BuilderFlag.INT8")
    assert len(answer["errors"]) == len(words)
    assert all(word in error for word, error in zip(words, answer["errors"], strict=True))
    assert missing(found, answer["names"]) == gone


def test_our_classes_on_the_real_bindings(found: bindings.Bindings) -> None:
    done = bindings.run(found, sys.executable, "-c", RUN)
    assert (done.returncode, done.stdout.strip()) == (0, found.version), done.stderr[-3000:]


def test_the_stand_in_has_no_name_of_its_own(found: bindings.Bindings) -> None:
    """What tests/fake_tensorrt.py offers exists in the real bindings too; BuilderFlag is a matter of version."""
    module = make(FakeCuda(), Behaviour(version=found.version))
    names = []
    for name, thing in vars(module).items():
        if name.startswith("_"):
            continue
        names.append(["tensorrt", name])
        if isinstance(thing, type):
            names += [
                [f"tensorrt.{name}", inner] for inner in dir(thing) if inner not in dir(IntEnum) and inner[0] != "_"
            ]
    assert len(names) > 60 and missing(found, names) == []
