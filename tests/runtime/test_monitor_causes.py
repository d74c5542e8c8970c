"""Each cause of late frames is provoked, and named alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from monitored import Clock, causes, feed

from igate_edge.runtime.device_power import PowerMode
from igate_edge.runtime.device_state import State
from igate_edge.runtime.monitor import Monitor
from igate_edge.runtime.monitor_causes import Load, other_share, read_load

MHZ = 1_000_000
FULL = (306 * MHZ, 918 * MHZ, 918 * MHZ)


def late(first: State, then: State) -> Monitor:
    """A monitor whose frames take twice their budget once the board's state has changed."""
    clock, states = Clock(), [first]
    monitor = Monitor(10.0, clock=clock, load=clock.quiet, state=lambda: states[0])
    feed(monitor, clock, *[5.0] * 40, infer=3.0)
    assert monitor.verdict().level == "OK" and causes(monitor) == []
    states[0] = then
    feed(monitor, clock, *[20.0] * 40, infer=18.0)
    assert monitor.verdict().level == "ERROR"
    return monitor


@pytest.mark.parametrize(
    ("first", "then", "cause", "words"),
    [
        (State(throttle_events=7), State(throttle_events=9), "throttling", "rose by 2"),
        (State(cooling={"gpu": 0}), State(cooling={"gpu": 2}), "throttling", "gpu stepped in"),
        (State(gpu_hz=FULL), State(gpu_hz=(306 * MHZ, 918 * MHZ, 510 * MHZ)), "clock", "GPU runs at 510 MHz"),
        (State(cpu_khz=(1, 2000000, 2000000)), State(cpu_khz=(1, 2000000, 900000)), "clock", "CPU runs at 900 MHz"),
        (State(gpu_load=0.2), State(gpu_load=0.99), "load", "the GPU is busy 99%"),
    ],
)
def test_what_the_board_tells_is_named(first: State, then: State, cause: str, words: str) -> None:
    monitor = late(first, then)
    assert causes(monitor) == [cause] and words in monitor.verdict().hints[0]


def test_a_mode_that_promises_more_than_the_driver_allows() -> None:
    """MAXN by name, capped at 624 MHz (cases L5): the mode's own cap is the reference."""
    capped = (306 * MHZ, 624 * MHZ, 624 * MHZ)
    maxn = PowerMode(id=0, name="MAXN", gpu_max_hz=918 * MHZ, emc_max_hz=None, cpu_max_khz=None, tpc_mask="")
    assert causes(late(State(), State(power_mode=maxn, gpu_hz=capped))) == ["clock"]
    assert causes(late(State(), State(gpu_hz=capped))) == []


def test_a_board_that_tells_nothing_is_blamed_for_nothing() -> None:
    """Cases L7: in a container statistics are missing or come and go."""
    assert causes(late(State(), State())) == []
    assert causes(late(State(throttle_events=3), State())) == []
    assert causes(late(State(), State(throttle_events=3, cooling={"gpu": 1}))) == []


def test_older_frames_are_named() -> None:
    clock = Clock()
    monitor = Monitor(10.0, clock=clock, load=clock.quiet)
    feed(monitor, clock, *[5.0] * 100, age=20.0)
    assert monitor.verdict().level == "OK"
    feed(monitor, clock, *[5.0] * 40, age=85.0)
    verdict = monitor.verdict()
    assert verdict.level == "WARN" and causes(monitor) == ["capture"]
    assert verdict.hints[0] == "capture: frames are 85 ms old on arrival, 20 ms at the start"


def test_no_cause_is_named_while_all_is_well() -> None:
    clock, states = Clock(), [State(throttle_events=1)]
    monitor = Monitor(10.0, clock=clock, load=clock.quiet, state=lambda: states[0])
    states[0] = State(throttle_events=9)
    feed(monitor, clock, *[5.0] * 40)
    assert monitor.verdict().level == "OK" and monitor.verdict().hints == ()


BURN = """
import time
while True:
    start = time.process_time()
    while time.process_time() - start < 0.5: pass
    print("burnt", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin processes")
def test_another_program_on_our_core_is_named() -> None:
    """Real load: a program that burns the one core this process may use."""
    before, clock = os.sched_getaffinity(0), Clock()
    os.sched_setaffinity(0, {min(before)})
    other = subprocess.Popen([sys.executable, "-c", BURN], stdout=subprocess.PIPE)
    try:
        monitor = Monitor(10.0, clock=clock)
        assert other.stdout is not None and other.stdout.readline() == b"burnt\n"
        feed(monitor, clock, *[20.0] * 40)
        assert causes(monitor) == ["load"], monitor.verdict()
        assert "of the cores that this one may use" in monitor.verdict().hints[0]
    finally:
        other.kill()
        other.communicate()
        os.sched_setaffinity(0, before)


def test_our_own_work_is_not_others() -> None:
    assert other_share(Load(2, 0.0, 0.0, 0.0), Load(2, 20.0, 10.0, 10.0)) == 0.0
    assert other_share(Load(2, 0.0, 0.0, 0.0), Load(2, 20.0, 15.0, 5.0)) == 0.5
    assert other_share(None, Load(2, 20.0, 15.0, 5.0)) is None
    same = Load(2, 20.0, 15.0, 5.0)
    assert other_share(same, same) is None


def test_only_cores_that_we_may_use_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_load(tmp_path) is None
    (tmp_path / "proc").mkdir()
    lines = ["cpu 9 9 9 9 9 9 9 9 0 0", "cpu0 100 0 50 800 30 10 10 0 5 5", "cpu1 0 0 0 1000 0 0 0 0 0 0", "intr 5"]
    (tmp_path / "proc" / "stat").write_text("\n".join(lines))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    load, ticks = read_load(tmp_path), os.sysconf("SC_CLK_TCK")
    assert load is not None
    # Idle and waiting for disks are no work: 1000 - 800 - 30.
    assert (load.cores, load.total, load.busy) == (1, 1000 / ticks, 170 / ticks)
