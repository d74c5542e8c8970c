"""Benchmarks: paired and interleaved, so that the machine's mood does not decide; and honest about spread."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tinynet

from igate_edge.bench import bench, conditions
from igate_edge.engines import onnxruntime as ort
from igate_edge.errors import InputError
from igate_edge.package import package
from igate_edge.timing import MAX_SPREAD, interleave, ratio

FRAMES = tinynet.frames(8)


class Machine:
    """A clock and nets on it: each net costs its milliseconds times the machine's present slowness."""

    def __init__(self, slowness: np.ndarray | None = None) -> None:
        self.now, self.calls, self.order = 0.0, 0, []
        self.slowness = slowness

    def net(self, name: str, ms: float) -> object:
        def run(_: np.ndarray) -> None:
            factor = 1.0 if self.slowness is None else self.slowness[self.calls % len(self.slowness)]
            self.now += ms * factor / 1e3
            self.calls += 1
            self.order.append(name)

        return run

    def clock(self) -> float:
        return self.now


def test_a_slow_phase_of_the_machine_does_not_move_the_ratio() -> None:
    """Both arms get 25 % slower half-way: the ratio stays. One arm 8 % slower: the ratio shows 8 %."""
    for ours, want in ((10.0, 1.0), (10.8, 1.08)):
        machine = Machine(np.repeat((1.0, 1.25), 500))
        runs = {"ours": machine.net("ours", ours), "plain": machine.net("plain", 10.0)}
        times = interleave(runs, np.zeros(1), 400, machine.clock)
        pair = ratio(times["ours"], times["plain"])
        assert pair["ratio"] == pytest.approx(want, abs=1e-6) and pair["meaningful"]


def test_rounds_are_interleaved_and_turned() -> None:
    machine = Machine()
    times = interleave({name: machine.net(name, 1.0) for name in "abc"}, np.zeros(1), 6, machine.clock)
    assert {name: array.shape for name, array in times.items()} == dict.fromkeys("abc", (6,))
    rounds = ["".join(machine.order[-18 + 3 * index :][:3]) for index in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert {order[0] for order in rounds} == {"a", "b", "c"}
    followers = {pair for order in rounds for pair in zip(order, order[1:], strict=False)}
    assert len(followers) == 6, "every net follows every other"


def test_a_ratio_without_meaning_says_so() -> None:
    rng, one = np.random.default_rng(0), np.ones(1000)
    few = ratio(rng.uniform(0.8, 1.2, 20), one[:20])
    assert not few["meaningful"] and "means nothing: median between" in few["note"] and few["spread"] < MAX_SPREAD
    many = ratio(rng.uniform(0.8, 1.2, 1000), one)
    assert many["meaningful"] and many["note"] == "" and many["ratio"] == pytest.approx(1, abs=0.02)
    wild = ratio(rng.uniform(1, 4, 1000), one)
    assert not wild["meaningful"] and wild["spread"] == pytest.approx((3.25 - 1.75) / 2.5, abs=0.05)
    assert not ratio(np.array([1.0, 2.0, 3.0]), one[:3])["meaningful"]


def test_the_interval_of_the_median_holds_it_19_times_of_20() -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        low, high = ratio(rng.exponential(1, 100), np.ones(100))["interval"]
        held += low <= np.log(2) <= high
    assert held >= 940


def test_a_bench_of_a_gated_bundle_has_all_rivals(tmp_path: Path) -> None:
    path = tmp_path / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    cores = os.sched_getaffinity(0)
    report = bench(path, rounds=5)
    assert os.sched_getaffinity(0) == cores, "the process is released again"
    assert report.pinned
    assert [row.name for row in report.rows] == ["ours", "ours-float", "plain", "separate", "dense"]
    assert report.row("plain").ratio == 1 and report.row("plain").spread == 0
    assert all(row.ms > 0 and row.macs > 0 and row.params > 0 for row in report.rows)
    assert report.row("separate").macs > report.row("ours").macs > report.row("plain").macs
    assert report.row("dense").macs > report.row("ours").macs == report.row("ours-float").macs
    assert report.row("ours-float").int8_share == 0 and report.row("ours").int8_share >= 0.95
    for row in report.rows:
        assert row.meaningful is (row.note == "") and (row.note == "" or f"{row.label}: {row.note}" in report.warnings)
    assert json.loads(json.dumps(report.as_json()))["separate_over_ours"]["ratio"] > 0


def test_sessions_are_made_on_the_cores_they_are_pinned_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    free, seen, make = {3, 5}, [], ort.open
    held = set(free)

    def pin(_: int, cores: object) -> None:
        held.clear()
        held.update(cores)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(held))
    monkeypatch.setattr(os, "sched_setaffinity", pin)
    monkeypatch.setattr(ort, "open", lambda *a, **k: (seen.append(set(held)), make(*a, **k))[1])
    assert bench(path, rounds=3).pinned and held == free
    assert seen and all(cores == {5} for cores in seen)
    seen.clear()
    report = bench(path, rounds=3, threads=3)
    assert not report.pinned and any("could not be pinned to 3 core(s)" in text for text in report.warnings)
    assert all(cores == free for cores in seen)


def test_a_plain_bundle_has_no_gated_rival(tmp_path: Path) -> None:
    path = tmp_path / "p.igate"
    package(tinynet.gated_onnx(form="plain"), path, calibration=FRAMES, golden=FRAMES[:4])
    report = bench(path, rounds=3)
    assert [row.name for row in report.rows] == ["ours", "ours-float", "plain", "separate"]
    assert report.row("ours").macs == report.row("plain").macs


def test_too_few_rounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too few rounds"):
        bench(tmp_path / "a.igate", rounds=1)


def test_one_core_and_a_machine_under_load_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert conditions(0.9, 2) == []
    alone, busy = conditions(0.3, 1)
    assert alone.startswith("one core only") and "under load" in busy and "30%" in busy
    path = tmp_path / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    monkeypatch.setattr("igate_edge.bench.time.process_time", lambda: 0.0)
    assert any("under load" in text and "for 0% of the time" in text for text in bench(path, rounds=3).warnings)
