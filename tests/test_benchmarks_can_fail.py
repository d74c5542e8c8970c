"""Every benchmark can fail: slow engine, float engine, missing statistics, wrong device, skipped, foreign history.

What decides lives in benchmarks/judging.py and machine.py; it is driven here with made-up times and stubs. How pytest
is made to fail (cases L6) is seen from outside, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import judging
import machine
import numpy as np
import pytest
import timing

from igate_edge.engines.onnxruntime import Coverage
from igate_edge.errors import CheckFailed, InputError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
HERE = {"system": "Linux", "machine": "x86_64", "cpu": "A", "instructions": "0123", "cores": 2}
RNG = np.random.default_rng(0)
#: A machine that is 25 % slower in half of the rounds, and a little uneven in all.
SLOWNESS = np.where(np.arange(300) < 150, 1.0, 1.25) * RNG.normal(1, 0.01, 300)
PLAIN = 0.004 * SLOWNESS


def engine(times: float) -> np.ndarray:
    """Seconds of an engine that takes so many times the plain net's time."""
    return times * PLAIN * RNG.normal(1, 0.005, 300)


def budget(**values: object) -> dict[str, object]:
    return {"kind": "Budget", "ratio": 1.3, "ms": None, "device": HERE, "threads": 1} | values


def meet(entry: object, ours: np.ndarray | None, plain: np.ndarray | None = PLAIN, here: dict = HERE) -> list[str]:
    times = {"ours": ours, "plain": plain}
    return judging.meets_budget(judging.read_budget(entry), times, times, here)


class Device:
    """A clock, and nets on it whose cost doubles after 10 ms of idling."""

    def __init__(self) -> None:
        self.now = self.busy_until = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def net(self, seconds: float) -> Callable[[np.ndarray], object]:
        def run(_: np.ndarray) -> None:
            self.now += seconds * (2 if self.now - self.busy_until > 0.01 else 1)
            self.busy_until = self.now

        return run


# --- the budget ---


def test_an_engine_within_its_budget_passes() -> None:
    lines = meet(budget(), engine(1.27))
    assert "back to back: x1.27" in " ".join(lines) and "paced: x1.27" in " ".join(lines)


def test_a_slow_engine_misses_its_budget_and_is_told_why() -> None:
    with pytest.raises(
        CheckFailed, match=r"plain net's is 1\.4\d\d, at most 1\.300 is allowed.*Fix: train and land"
    ) as e:
        meet(budget(), engine(1.4))
    assert "ms against" in e.value.evidence and "300 rounds" in e.value.evidence


def test_eight_per_cent_too_slow_is_seen_through_a_machine_that_changes_by_25() -> None:
    with pytest.raises(CheckFailed, match="at most 1.300 is allowed"):
        meet(budget(), engine(1.3 * 1.08))


def test_an_engine_with_a_slow_tail_misses_at_the_99th_percentile() -> None:
    ours = engine(1.27)
    ours[::20] *= 2
    with pytest.raises(CheckFailed, match="at p99, the engine's time over the plain net's"):
        meet(budget(), ours)


@pytest.mark.parametrize("broken", [None, [], np.ones(20), np.full(300, np.nan), np.zeros(300), np.ones((300, 2))])
def test_missing_statistics_fail(broken: object) -> None:
    with pytest.raises(CheckFailed, match="statistics of ours, back to back are missing"):
        meet(budget(), broken)
    with pytest.raises(CheckFailed, match="statistics of plain, back to back are missing"):
        meet(budget(), engine(1.2), broken)


def test_too_few_frames_for_a_99th_percentile_fail() -> None:
    with pytest.raises(CheckFailed, match="100 usable times of at least 200"):
        meet(budget(), engine(1.2)[:100], PLAIN[:100])


def test_a_machine_too_noisy_to_tell_fails() -> None:
    with pytest.raises(CheckFailed, match="cannot be told on this machine now.*nothing else using its cores"):
        meet(budget(), PLAIN * RNG.uniform(0.5, 2.5, 300))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (None, "carries no budget in time: the manifest has none"),
        ({"kind": "HardFraction", "target": 0.25}, "of kind 'HardFraction', which is no time"),
        (budget(ratio=None), "states no time"),
        (budget(ratio=float("nan")), "no number: ratio is nan"),
        (budget(ratio=-1), "no number: ratio is -1"),
        (budget(ratio=None, ms="4"), "no number: ms is '4'"),
    ],
)
def test_a_bundle_without_a_budget_fails(entry: object, words: str) -> None:
    with pytest.raises(CheckFailed, match=words):
        meet(entry, engine(1.0))


def test_ms_are_held_on_their_own_device_only() -> None:
    assert meet(budget(ratio=None, ms=5.8), engine(1.27))
    with pytest.raises(CheckFailed, match=r"misses its budget of 5 ms"):
        meet(budget(ratio=None, ms=5.0), engine(1.27))
    other = HERE | {"cpu": "B"}
    lines = meet(budget(ms=5.0, device=other), engine(1.27))
    assert lines[-1] == "ms are not held here: cpu: A here, B there"


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (HERE | {"cpu": "B"}, "cpu: A here, B there"),
        (HERE | {"instructions": "ffff"}, "instructions: 0123 here, ffff there"),
        ({"cpu": "A"}, "cores: 2 here, unknown there"),
        ("A", "no description"),
        (None, "no description"),
    ],
)
def test_a_mislabelled_device_is_not_taken_for_this_one(label: object, words: str) -> None:
    with pytest.raises(CheckFailed, match=f"says nothing about this machine: .*{words}"):
        meet(budget(ratio=None, ms=9.0, device=label), engine(1.0))


def test_a_clock_that_drops_between_frames_is_seen_by_the_paced_run() -> None:
    device = Device()
    runs = {"ours": device.net(0.005), "plain": device.net(0.004)}
    image = np.zeros(1)
    quick = timing.measure(runs, image, [], least=50, clock=device.clock)
    slow = timing.paced(runs, image, 30, 50, device.clock, device.sleep)
    assert np.allclose(quick["ours"], 0.005) and np.allclose(slow["ours"], 0.010) and np.allclose(slow["plain"], 0.008)
    assert device.now == pytest.approx(100 / 30, rel=0.25)


def test_measuring_goes_on_until_the_ratio_is_known_or_time_is_over() -> None:
    device = Device()
    runs = {"a": device.net(0.002), "b": device.net(0.001)}
    assert len(timing.measure(runs, np.zeros(1), [("a", "b")], least=50, clock=device.clock)["a"]) == 50
    rng, wild = np.random.default_rng(0), Device()

    def uneven(_: np.ndarray) -> None:
        wild.now += rng.uniform(0.001, 0.009)

    times = timing.measure({"a": uneven, "b": uneven}, np.zeros(1), [("a", "b")], seconds=3.0, clock=wild.clock)
    assert wild.now >= 3.0 and len(times["a"]) > 200


# --- an engine that runs in float ---


@pytest.mark.parametrize(
    ("coverage", "precision", "words"),
    [
        (Coverage(0.0, {"c": "float"}, {"c": 9}, {}), "int8", "too few convolutions run as INT8: 0.0%"),
        (Coverage(1.0, {"c": "int8"}, {"c": 9}, {}), "float", "does not run in INT8: it was built in float"),
        (Coverage(1.0, {}, {}, {}), "int8", "statistics of the INT8 coverage are missing"),
        (None, "int8", "statistics of the INT8 coverage are missing"),
    ],
)
def test_an_engine_that_runs_in_float_fails(coverage: Coverage | None, precision: str, words: str) -> None:
    assert judging.int8(Coverage(0.97, {"c": "int8"}, {"c": 9}, {})) == 0.97
    with pytest.raises(CheckFailed, match=words):
        judging.int8(coverage, precision)


def test_int8_that_is_not_faster_fails() -> None:
    with pytest.raises(CheckFailed, match=r"INT8 / float is 1\.02\d, at most 1\.000 is allowed"):
        judging.at_most("INT8 / float", engine(1.02), PLAIN, 1.0, "use float")


def test_layers_that_lose_in_int8_fail_when_it_is_too_much() -> None:
    layers = {"a": (100.0, 200.0), "b": (30.0, 25.0)}
    assert judging.int8_pays(layers, 0.1) == ["b: INT8 30 us, float 25 us"]
    with pytest.raises(CheckFailed, match=r"does not pay in these layers: 5 of 130 us \(4%, at most 3%\); b: INT8 30"):
        judging.int8_pays(layers, 0.03)
    for broken in ({}, {"a": (0.0, 1.0)}, {"a": (float("nan"), 1.0)}):
        with pytest.raises(CheckFailed, match="statistics of the layers are missing"):
            judging.int8_pays(broken, 0.1)
    judging.all_layers({"a": 1}, {"a": 99, "b": 1})
    with pytest.raises(CheckFailed, match="90.0% of the MACs, 98% asked; not found: b"):
        judging.all_layers({"a": 1}, {"a": 90, "b": 10})


# --- the other figures ---


def test_ratios_that_are_too_low_or_of_other_rounds_fail() -> None:
    assert judging.at_least("separate / ours", engine(1.8), PLAIN, 1.7, "fix")["ratio"] == pytest.approx(1.8, rel=0.01)
    with pytest.raises(CheckFailed, match=r"separate / ours is 1\.6\d\d, at least 1\.700 is asked"):
        judging.at_least("separate / ours", engine(1.6), PLAIN, 1.7, "fix")
    with pytest.raises(CheckFailed, match="300 and 299 rounds"):
        judging.at_most("a / b", engine(1.0), PLAIN[1:], 9.0, "fix")


def test_a_latency_model_that_is_off_fails() -> None:
    real = np.linspace(2, 8, 20)
    near = real * np.tile([0.98, 1.02], 10)
    assert np.abs(judging.predictions(near, real, "", mean=0.03, most=0.1)).max() == pytest.approx(0.02)
    with pytest.raises(CheckFailed, match=r"mean error 5\.0% \(at most 3%\)"):
        judging.predictions(1.05 * real, real, "", mean=0.03, most=0.1)
    one = near.copy()
    one[3] *= 1.12
    with pytest.raises(CheckFailed, match="does not predict this machine"):
        judging.predictions(one, real, "", mean=0.03, most=0.1)
    # One factor for all nets is what another machine may differ by, the shape is not.
    assert judging.predictions(3 * near, real, "another machine", mean=0.03, most=0.1)
    with pytest.raises(CheckFailed, match="does not predict this machine"):
        judging.predictions(np.full(20, 5.0), real, "another machine", mean=0.14, most=0.3)
    for guess, seen in (([], []), ([1.0], [1.0]), ([1.0, 2.0], [1.0, float("nan")]), ([1.0, 2.0], [1.0])):
        with pytest.raises(CheckFailed, match="statistics of the latency model are missing"):
            judging.predictions(guess, seen, "", mean=0.03, most=0.1)
    with pytest.raises(CheckFailed, match="cannot be told"):
        judging.steady("a net", PLAIN * RNG.uniform(0.5, 2.5, 300))


def test_a_merged_net_with_operators_of_its_own_fails() -> None:
    plain = {"Conv": 9, "Relu": 8}
    judging.same_operators(dict(plain), plain)
    with pytest.raises(CheckFailed, match="is not a plain one: Conv 12 for 9; Gather 1 for 0"):
        judging.same_operators({"Conv": 12, "Gather": 1, "Relu": 8}, plain)
    with pytest.raises(CheckFailed, match="statistics of the graph are missing"):
        judging.same_operators({}, {})


def test_a_batch_whose_rows_differ_fails() -> None:
    frame = np.ones((1, 3, 4, 4), np.float32)

    def right(rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"depth": rows.mean(1, keepdims=True)}

    def wrong(rows: np.ndarray) -> dict[str, np.ndarray]:
        answer = right(rows)
        answer["depth"][2] += 0.1
        return answer

    judging.same_rows(right, {1: right, 4: right}, frame)
    with pytest.raises(CheckFailed, match="'depth', batch 4: up to 0.1"):
        judging.same_rows(right, {1: right, 4: wrong}, frame)


def test_a_peer_that_is_not_at_equal_time_fails() -> None:
    judging.equal_time("peer", {"ratio": 1.04}, 0.05)
    with pytest.raises(CheckFailed, match=r"no such net was found: x1\.100"):
        judging.equal_time("peer", {"ratio": 1.1}, 0.05)


# --- machines ---


def test_a_run_of_another_machine_is_refused_with_the_field() -> None:
    mine = {machine.KEY: {"machine": HERE}}
    machine.refuse_foreign(mine, {machine.KEY: {"machine": dict(HERE)}}, "today")
    with pytest.raises(InputError, match="saved run of today is of another machine: cores: 2 here, 4 there"):
        machine.refuse_foreign(mine, {machine.KEY: {"machine": HERE | {"cores": 4}}}, "today")
    with pytest.raises(InputError, match="no description of the other machine"):
        machine.refuse_foreign(mine, {"cpu": "A"}, "today")
    with pytest.raises(InputError, match="this machine was not described"):
        machine.refuse_foreign({}, mine, "today")


def test_clock_limits_are_part_of_the_machine_and_absent_ones_unverified(tmp_path: Path) -> None:
    assert set(machine.limits(tmp_path).values()) == {"unverified"}
    core = tmp_path / "devices" / "system" / "cpu" / "cpu0" / "cpufreq"
    core.mkdir(parents=True)
    (core / "scaling_max_freq").write_text("624000\n")
    (core / "scaling_governor").write_text("performance\n")
    capped = machine.limits(tmp_path)
    assert capped == {"governor": "performance", "clock_min_khz": "unverified", "clock_max_khz": "624000"}
    assert machine.differences(capped | {"clock_max_khz": "2000000"}, capped) == [
        "clock_max_khz: 2000000 here, 624000 there"
    ]


# --- pytest, from outside ---

GOOD = "import time\ndef test_x(seconds):\n    assert seconds(lambda: time.sleep(0.001)) < 1\n"


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run one file of benchmarks with the real conftest: `outside(text, *flags)`."""
    (tmp_path / "conftest.py").symlink_to(BENCHMARKS / "conftest.py")
    # pytest-benchmark switches itself off under xdist, whose workers it knows by these variables.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    alone |= {"PYTHONPATH": str(BENCHMARKS), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(text: str, *flags: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "test_x.py").write_text(text)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
        command += ["--rootdir", str(tmp_path), str(tmp_path), "--benchmark-storage", str(tmp_path / "kept"), *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone, check=False)

    yield run


MANY = (
    GOOD
    + """
import judging, numpy as np, pytest

def test_without_times():
    pass

def test_with_unused_times(benchmark):
    pass

def test_skipped(benchmark):
    pytest.skip("not today")

def test_missed(benchmark, figures):
    benchmark.pedantic(int, rounds=5)
    figures("ours 1.5 of plain")
    judging.at_most("ours / plain", np.full(60, 1.5), np.ones(60), 1.3, "train again")
"""
)


def test_only_a_measured_benchmark_passes(outside) -> None:
    done = outside(MANY)
    assert done.returncode == 1 and "4 failed, 1 passed" in done.stdout, done.stdout
    # pytest's summary repeats each sentence, whole where it knows the machine as a CI's.
    failures, _, _ = done.stdout.partition("short test summary info")
    assert failures.count("nothing was measured: pytest-benchmark holds no times of it") == 2
    assert "this benchmark did not run" in done.stdout
    sentence = "CheckFailed: ours / plain is 1.500, at most 1.300 is allowed: median known to 1.500"
    assert sentence in done.stdout and "Traceback" not in done.stdout and "ours 1.5 of plain" in done.stdout


@pytest.mark.parametrize(
    ("flag", "words"), [("disable", "nothing was measured"), ("skip", "this benchmark did not run")]
)
def test_benchmarks_that_are_switched_off_fail(outside, flag: str, words: str) -> None:
    done = outside(GOOD, f"--benchmark-{flag}")
    assert done.returncode == 1 and words in done.stdout, done.stdout


def test_history_of_another_machine_is_refused_and_of_this_one_compared(outside, tmp_path: Path) -> None:
    assert outside(GOOD, "--benchmark-save=mine").returncode == 0
    saved = next((tmp_path / "kept").rglob("*_mine.json"))
    document = json.loads(saved.read_text())
    assert set(HERE) < set(document["machine_info"]["igate"]["machine"])
    assert document["machine_info"]["igate"]["runtime"]["version"]
    same = outside(GOOD, "--benchmark-compare")
    assert same.returncode == 0 and "(NOW)" in same.stdout
    document["machine_info"]["igate"]["machine"]["cpu"] = "another"
    saved.write_text(json.dumps(document))
    foreign = outside(GOOD, "--benchmark-compare")
    assert foreign.returncode != 0 and "passed" not in foreign.stdout
    assert "is of another machine: cpu: " in foreign.stdout + foreign.stderr and "another there" in foreign.stderr


def test_every_benchmark_of_the_issue_is_there() -> None:
    names = {path.stem.removeprefix("test_") for path in BENCHMARKS.glob("test_*.py")}
    wanted = {
        "budget",
        "latency_model",
        "int8_pays",
        "equal_macs",
        "joint",
        "batch",
        "build_time",
        "train_step",
        "peers",
    }
    assert wanted <= names
