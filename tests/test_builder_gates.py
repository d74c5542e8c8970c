"""The gates one by one: answers of other frames, times of a camera, budgets of this board, clocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import standin_engine
import tinynet
from standin_engine import Clock

from igate_edge import builder_gates as gates
from igate_edge.builder import networks, ranges_for
from igate_edge.bundle import Bundle
from igate_edge.compiler import graph, layout, quantize
from igate_edge.compiler.half import half
from igate_edge.engines.tensorrt_batch import dynamic_batch
from igate_edge.package import package
from igate_edge.runtime.device import PowerMode, State

FRAMES = tinynet.frames(8)
NAMES = [spec.name for spec in tinynet.TASKS]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("gates") / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    return Bundle.read(path)


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> bytes:
    laid = layout.lay_out(networks(bundle)[0])
    return graph.dump(half(quantize.quantize(laid.model, ranges_for(bundle, laid)[0], dialect="trt")))


def session(model: bytes, alter: Any = None, rows: int = 1) -> standin_engine.Session:
    plans = standin_engine.StandIn(alter=alter)
    return standin_engine.Session(plans, model if rows == 1 else dynamic_batch(model), "int8", rows, alter is not None)


def test_a_sound_engine_has_nothing_stale_and_equal_rows(bundle: Bundle, model: bytes) -> None:
    with session(model, rows=4) as sound:
        assert gates.stale_answers(bundle, sound, NAMES) == []
        assert gates.batch_rows(bundle, sound, 4, "int8", NAMES) == []
        assert gates.batch_rows(bundle, sound, 1, "int8", NAMES) == []
        assert all(result.passed for result in gates.golden(bundle, sound.run, "int8", NAMES))


def test_one_stale_task_is_named_alone(bundle: Bundle, model: bytes) -> None:
    def late(one: standin_engine.Session, image: np.ndarray, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        old, one.last = one.last or answer, answer
        return {**answer, "tag": old["tag"]}

    (problem,) = gates.stale_answers(bundle, session(model, late), NAMES)
    assert "task 'tag'" in problem and "depends on the frame before it" in problem


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_ring_of_buffers_is_seen_however_many_there_are(bundle: Bundle, model: bytes, count: int) -> None:
    ring: list[dict[str, np.ndarray]] = [{} for _ in range(count)]

    def buffers(one: standin_engine.Session, image: np.ndarray, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        place = ring[one.calls % count]
        for name, array in answer.items():
            place.setdefault(name, np.empty_like(array))[...] = array
        return dict(place)

    problems = gates.stale_answers(bundle, session(model, buffers), NAMES)
    assert [f"task {name!r}: an answer changes when a later frame runs" for name in sorted(NAMES)] == problems


def test_an_output_that_is_not_written_again_shows_as_nan(bundle: Bundle, model: bytes) -> None:
    def lost(one: standin_engine.Session, image: np.ndarray, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if one.calls <= len(bundle.golden["frame"]):
            one.last[str(one.calls)] = answer["depth"]
            return answer
        return {**answer, "depth": one.last[str(2 * len(bundle.golden["frame"]) + 1 - one.calls)]}

    (problem,) = gates.stale_answers(bundle, session(model, lost), NAMES)
    assert "task 'depth'" in problem


def test_swapped_rows_are_seen_though_every_row_is_somebody_s_answer(bundle: Bundle, model: bytes) -> None:
    def swap(one: standin_engine.Session, image: np.ndarray, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array[::-1].copy() for name, array in answer.items()}

    problems = gates.batch_rows(bundle, session(model, swap, rows=2), 2, "int8", NAMES)
    assert problems and all(" of a batch of 2" in problem for problem in problems)


def test_a_row_within_the_golden_limit_but_unlike_its_twin_is_seen(bundle: Bundle, model: bytes) -> None:
    """Identical rows of one batch have one answer: a twentieth more metres in row 1 is inside the golden limit."""

    def drift(one: standin_engine.Session, image: np.ndarray, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        answer["depth"][1:2] += np.float32(0.01)
        return answer

    problems = gates.batch_rows(bundle, session(model, drift, rows=2), 2, "int8", NAMES)
    assert problems == ["row 1 of a batch of 2: task 'depth' differs from row 0, which holds its frame"]


def test_latency_is_the_whole_call_at_the_pace_of_the_camera() -> None:
    """Cost 1 ms in a loop, 2 ms after 10 ms of rest; every 50th frame 40 ms: late, and the next ones catch up."""
    clock, calls = Clock(), []

    def run(image: np.ndarray) -> None:
        calls.append(clock.now)
        rested = len(calls) > 1 and clock.now - calls[-2] > 0.010
        clock.now += 0.040 if len(calls) > 60 and len(calls) % 50 == 0 else 0.002 if rested else 0.001

    times = gates.measure(run, np.zeros(1), period_ms=33.0, frames=100, clock=clock, sleep=clock.sleep)
    assert times.saturated_ms == pytest.approx(1.0) and times.paced["median"] == pytest.approx(2.0)
    assert times.paced["max"] == pytest.approx(40.0) and times.misses == 2 and times.frames == 100


def budget(bundle: Bundle, **about: Any) -> Bundle:
    manifest = {**bundle.manifest, "budget": {"kind": "Budget", **about}}
    return Bundle(manifest, bundle.model, bundle.ranges, bundle.plain, bundle.golden, bundle.seal)


def test_a_budget_counts_on_the_board_it_is_of(bundle: Bundle) -> None:
    orin = {"board": "Orin Nano", "power_mode": "25W"}
    asked = budget(bundle, ms=8.0, predicted_ms=7.5, device=orin)
    assert gates.limit_of(asked, None, orin) == {"ms": 8.0, "source": "bundle", "predicted_ms": 7.5, "note": ""}
    for here in ({}, {**orin, "power_mode": "15W"}):
        found = gates.limit_of(asked, None, here)
        assert found["ms"] is None and "8.0 ms is one of Orin Nano, 25W, not of this machine" in found["note"]
    assert gates.limit_of(asked, 5.0, {})["ms"] == 5.0
    assert "judged by `igate bench`" in gates.limit_of(budget(bundle, ratio=1.3), None, orin)["note"]
    assert gates.limit_of(bundle, None, orin)["note"] == "no budget"


def test_missing_telemetry_is_unverified_and_a_capped_clock_is_told() -> None:
    """No statistics (cases L7), then MAXN with a cap at 624 MHz (cases L5), throttling and a changed mode."""
    assert gates.conditions(State(), State())["provisional"] == ["clocks: not known on this machine"]
    mode = PowerMode(0, "MAXN", 918_000_000)
    cap = State(mode, gpu_hz=(306_000_000, 624_000_000, 624_000_000), locked=False, throttle_events=4)
    notes = gates.conditions(State(PowerMode(1, "15W"), throttle_events=1), cap)["provisional"]
    assert notes[0] == "clocks are not locked" and "held to 624 MHz" in notes[1]
    assert notes[2:] == ["throttled 3 time(s) meanwhile", "the power mode changed meanwhile"]
    good = State(mode, gpu_hz=(918_000_000,) * 3, locked=True, throttle_events=4)
    assert gates.conditions(good, good)["provisional"] == []


def test_fp16_is_measured_in_the_terms_of_the_task(bundle: Bundle) -> None:
    stored = {name: bundle.golden[f"float/{name}"] for name in NAMES}
    turn = iter(range(10**6))

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        index = next(turn) % len(bundle.golden["frame"])
        return {name: array[index : index + 1].astype(np.float16) for name, array in stored.items()}

    results = gates.golden(bundle, run, "half", NAMES)
    assert all(result.passed and result.precision == "half" for result in results) and len(results) == 3
    stored["tag"] = np.roll(stored["tag"], 1, axis=1)
    assert [result.task for result in gates.golden(bundle, run, "half", NAMES) if not result.passed] == ["tag"]


def test_an_engine_without_a_task_fails_that_task(bundle: Bundle, model: bytes) -> None:
    def dropped(one: standin_engine.Session, image: np.ndarray, answer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array for name, array in answer.items() if name != "depth"}

    results = gates.golden(bundle, session(model, dropped).run, "half", NAMES)
    assert [result.task for result in results if not result.passed] == ["depth"]
