"""A builder's phases as one number, and what its log tells."""

from __future__ import annotations

import pytest

from igate_edge.engines.tensorrt_log import KEEP, Log
from igate_edge.engines.tensorrt_progress import Eta, Phases


def test_phases_never_go_back() -> None:
    phases = Phases()
    phases.start("build", "", 2)
    phases.step("build", 0)
    assert (phases.now, phases.fraction) == ("build", 0.5)
    phases.start("tactics", "build", 4)
    phases.step("tactics", 1)
    assert (phases.now, phases.fraction) == ("tactics", 0.75)
    phases.finish("tactics")
    assert (phases.now, phases.fraction) == ("build", 0.75)
    phases.finish("build")
    phases.start("serialise", "", 10)
    assert phases.fraction == 0.75


def test_phases_that_contradict_themselves() -> None:
    phases = Phases()
    assert (phases.now, phases.fraction) == ("", 0.0)
    phases.step("unknown", 3)
    phases.finish("unknown")
    phases.start("a", "b", 0)
    phases.start("b", "a", 2)
    phases.step("a", 9)
    assert 0 <= phases.fraction <= 1


def test_nobody_knows_the_time_left_at_the_start() -> None:
    said: list[tuple[object, ...]] = []
    now = iter([10.0, 12.0, 14.0])
    eta = Eta(lambda *what: said.append(what), lambda: next(now))
    eta.phase("parse", 0, 1000)
    eta.phase("tactics", 500, 1000)
    assert said == [("parse", 2.0, None), ("tactics", 4.0, 4.0)]


@pytest.mark.parametrize(
    "line",
    [
        "Requested amount of GPU memory (838860800 bytes) could not be allocated.",
        "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
        "Tactic Device request: 800MB Available: 526MB. Device memory is insufficient to use tactic.",
        "OutOfMemory: no further information",
    ],
)
def test_memory_is_named(line: str) -> None:
    log = Log()
    log("INFO", "[MemUsageChange] Init CUDA: memory allocation 1 MiB")
    log("WARNING", line)
    log("ERROR", "Could not find any implementation for node conv1")
    assert log.memory == line and log.last == "Could not find any implementation for node conv1"
    assert not log.plugin and not log.foreign


def test_a_missing_plugin_is_named() -> None:
    log = Log()
    log("ERROR", "IPluginV3 creator not found in registry")
    assert log.plugin == "IPluginV3 creator not found in registry"
    log("ERROR", "3: getPluginCreator could not find plugin: igate_Kernel version: 1")
    assert log.plugin == "igate_Kernel version 1"


def test_a_missing_plugin_in_the_words_of_tensorrt_10() -> None:
    log = Log()
    log("ERROR", "IPluginRegistry::getCreator: Error Code 4: API Usage Error (Cannot find plugin: Kernel, version: 1, ")
    assert log.plugin == "Kernel version 1"


@pytest.mark.parametrize(
    "line",
    [
        "Version tag does not match. Note: Current Version: 0, Serialized Engine Version: 232",
        "The engine plan file is not compatible with this version of TensorRT, expecting 10.3.0.26 got 10.7.0.23",
        "The engine plan file is generated on an incompatible device, expecting compute 8.7 got compute 8.6",
    ],
)
def test_a_foreign_plan_is_named(line: str) -> None:
    log = Log()
    log("ERROR", line)
    assert log.foreign == line and not log.memory


def test_the_log_is_bounded_and_says_things_once() -> None:
    log = Log()
    assert log.last == "TensorRT gave no reason" and log.lines == ()
    for number in range(3 * KEEP):
        log("WARNING", f"tactic {number // 3}\n is slow")
    assert len(log.lines) == KEEP and log.lines[0] == "WARNING: tactic 0 is slow"
    log("ERROR", "no")
    assert len(log.lines) == KEEP and log.lines[-1] == "ERROR: no"
