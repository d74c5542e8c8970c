"""A benchmark record: what it holds, when it is provisional, and what it may be compared with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import boards
import pytest

from igate_edge.errors import InputError
from igate_edge.runtime import device_record
from igate_edge.runtime.device_record import EngineFacts, Record, differences, parse, provisional, summary, take

ENGINE = EngineFacts(
    "ab" * 32, "tensorrt", "10.3.0", "int8", ("seg",), (1, 3, 96, 128), {"level": 3}, "cd" * 32, "mapped", True, 0
)
GPU = "sys/class/devfreq/17000000.gpu"


class Clock:
    """Seconds that pass only while something works or sleeps; a frame costs `frame_s`."""

    def __init__(self, frame_s: float) -> None:
        self.now, self.frame_s, self.slept, self.runs = 0.0, frame_s, list[float](), 0

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.runs += 1
        self.now += self.frame_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def lock(root: Path) -> None:
    boards.put(root, f"{GPU}/min_freq", (root / f"{GPU}/max_freq").read_text())
    boards.put(root, f"{GPU}/cur_freq", (root / f"{GPU}/max_freq").read_text())
    for word in ("min", "cur"):
        for core in root.glob("sys/devices/system/cpu/cpu*/cpufreq"):
            (core / f"scaling_{word}_freq").write_text("1344000\n")
    boards.put(root, "sys/kernel/debug/bpmp/debug/clk/emc/mrq_rate_locked", 1)


def made(root: Path, clock: Clock | None = None, **other: object) -> Record:
    clock = clock or Clock(0.004)
    options: dict[str, object] = {"frames": 10, "warm_up": 2, "budget_ms": 5.0, "root": root} | other
    about: dict[str, object] = {"machine": {"cpu": "A"}, "versions": {"cuda": "12.6"}}
    return take(clock.run, ENGINE, clock=clock, sleep=clock.sleep, **about, **options)  # type: ignore[arg-type]


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    root = boards.build(tmp_path / "nano", "orin-nano-super")
    lock(root)
    return root


def test_a_record_holds_samples_and_conditions(nano: Path) -> None:
    clock = Clock(0.004)
    record = made(nano, clock)
    assert clock.runs == 12 and record.samples_ms == pytest.approx([4.0] * 10)
    found = summary(record)
    assert found["p50"] == pytest.approx(4.0) and found["misses"] == 0 and found["jitter"] == pytest.approx(0)
    # VDD_IN is 5 V * 1140 mA = 5700 mW; 4 ms of it are 22.8 mJ.
    assert found["mean_mw"] == 5700.0 and found["energy_mj"] == pytest.approx(22.8)
    assert record.device.l4t == "36.4.3" and record.swap_used_mb == 0 and provisional(record) == []


def test_paced_frames_wait_for_their_turn_and_late_ones_do_not(nano: Path) -> None:
    clock = Clock(0.004)
    record = made(nano, clock, period_ms=10.0)
    assert clock.slept == pytest.approx([0.006] * 9)
    assert summary(record)["energy_mj"] == pytest.approx(57.0)  # 10 ms of 5700 mW: idle time is drawn too
    late = Clock(0.025)
    assert made(nano, late, period_ms=10.0).period_ms == 10.0 and late.slept == []


def test_a_late_waking_does_not_move_the_frames_after_it(nano: Path) -> None:
    clock = Clock(0.004)

    def oversleep(seconds: float) -> None:
        clock.sleep(seconds)
        clock.now += 0.001

    about = {"machine": {}, "versions": {}, "frames": 4, "warm_up": 0, "period_ms": 10.0, "root": nano}
    take(clock.run, ENGINE, clock=clock, sleep=oversleep, **about)  # type: ignore[arg-type]
    assert clock.slept == pytest.approx([0.006, 0.005, 0.005])


def test_percentiles_and_misses_are_of_the_samples(nano: Path) -> None:
    record = dataclasses.replace(made(nano), samples_ms=tuple(float(n) for n in range(1, 102)), budget_ms=100.0)
    found = summary(record)
    assert (found["p50"], found["p90"], found["p99"], found["max"], found["misses"]) == (51, 91, 100, 101, 1)
    assert found["jitter"] == 49 and summary(dataclasses.replace(record, budget_ms=None))["misses"] is None


def test_the_hottest_moment_is_kept(nano: Path) -> None:
    clock, zone = Clock(0.3), "sys/class/thermal/thermal_zone0/temp"

    def run() -> None:
        clock.run()
        boards.put(nano, zone, 85_000 if clock.runs == 8 else 50_000)

    record = take(run, ENGINE, machine={}, versions={}, frames=10, warm_up=2, root=nano, clock=clock)
    assert record.hottest["cpu"] == 85.0 and record.after.temperatures["cpu"] == 50.0


def test_events_meanwhile_make_it_provisional(nano: Path) -> None:
    clock = Clock(0.004)

    def run() -> None:
        clock.run()
        boards.put(nano, "sys/class/hwmon/hwmon1/oc1_event_cnt", clock.runs // 5)

    record = take(run, ENGINE, machine={}, versions={}, frames=10, warm_up=0, root=nano, clock=clock)
    assert summary(record)["throttled"] == 2 and provisional(record) == ["2 over-current event(s) meanwhile"]


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        (f"{GPU}/min_freq", "306000000", "clocks were not locked"),
        ("sys/kernel/debug/bpmp/debug/clk/emc/mrq_rate_locked", "", "is unverified"),
        ("sys/class/thermal/cooling_device1/cur_state", "1", "gpu-throttle-alert held clocks back"),
    ],
)
def test_what_is_not_verified_is_provisional(nano: Path, path: str, content: str, words: str) -> None:
    boards.put(nano, path, content)
    (reason,) = provisional(made(nano))
    assert words in reason


def test_a_desktop_is_always_provisional_and_compared_by_its_processor(tmp_path: Path) -> None:
    record = made(boards.build(tmp_path, "desktop"))
    assert "unverified" in provisional(record)[0] and summary(record)["energy_mj"] is None
    assert differences(record, record) == []
    other = dataclasses.replace(record, machine={"cpu": "B"})
    assert differences(record, other) == ["machine: {'cpu': 'A'} here, {'cpu': 'B'} there"]


def test_a_capped_board_of_the_same_mode_is_not_comparable(tmp_path: Path) -> None:
    """Case L5: both say MAXN, one may run at 624 MHz only."""
    records = []
    for top in (1_300_500_000, 624_000_000):
        root = boards.build(tmp_path / str(top), "agx-orin")
        boards.put(root, f"{GPU}/max_freq", top)
        lock(root)
        records.append(made(root))
    assert differences(*records) == ["gpu_max_hz: 1300500000 here, 624000000 there"]
    assert provisional(records[1]) == ["the GPU is held to 624 MHz, mode MAXN allows 1300 MHz"]
    with pytest.raises(InputError, match="not comparable: gpu_max_hz"):
        device_record.require_comparable(*records)
    assert device_record.require_comparable(*records, force=True) == differences(*records)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"engine": dataclasses.replace(ENGINE, version="10.16.2")}, "backend_version"),
        ({"engine": dataclasses.replace(ENGINE, flags={"level": 5})}, "flags"),
        ({"period_ms": 33.0}, "paced"),
    ],
)
def test_other_engines_and_paces_are_not_comparable(nano: Path, change: dict[str, object], name: str) -> None:
    record = made(nano)
    (found,) = differences(record, dataclasses.replace(record, **change))  # type: ignore[arg-type]
    assert found.startswith(f"{name}: ") and differences(record, record) == []


def test_another_mode_and_what_neither_knows_are_not_comparable(nano: Path) -> None:
    record = made(nano)
    boards.put(nano, "var/lib/nvpmodel/status", "pmode:0000 fmode:fanNull\n")
    assert "power_mode: 25W here, 15W there" in differences(record, made(nano))
    boards.drop(nano, "var/lib/nvpmodel", "usr/sbin/nvpmodel")
    blind = made(nano)
    assert "power_mode: unverified in both" in differences(blind, blind)


@pytest.mark.parametrize("name", boards.NAMES)
def test_json_gives_the_same_record_back(tmp_path: Path, name: str) -> None:
    record = made(boards.build(tmp_path, name))
    text = json.dumps(record.as_json(), allow_nan=False)
    assert parse(text) == record and differences(parse(text), record) == []


@pytest.mark.parametrize(
    "change",
    [
        {"samples_ms": []},
        {"samples_ms": ["a"]},
        {"samples_ms": [float("nan")]},
        {"samples_ms": [-1.0]},
        {"before": None},
        {"device": []},
        {"engine": {}},
        {"after": {"power_mode": 3}},
        {"schema": 2},
    ],
)
def test_a_damaged_record_is_refused(nano: Path, change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        parse(json.dumps({**made(nano).as_json(), **change}))


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", b"\xff", "[" * 100_000])
def test_what_is_no_record_is_refused(text: str | bytes) -> None:
    with pytest.raises(InputError):
        parse(text)


def test_no_frames_are_no_record(nano: Path) -> None:
    with pytest.raises(InputError, match="needs frames"):
        made(nano, frames=0)


@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["period_ms", "budget_ms"])
def test_a_pace_or_budget_that_is_none_is_refused(nano: Path, name: str, ms: float) -> None:
    with pytest.raises(InputError, match="not a (pace|budget)"):
        made(nano, **{name: ms})
