"""The monitor: levels against a budget, deadlines and streaks, silence, errors, alarms; from any thread."""

from __future__ import annotations

import json
import threading

import pytest
from monitored import Clock, feed, result

from igate_edge.errors import InputError
from igate_edge.runtime.monitor import ERROR_S, STALE_S, STREAK, Monitor


@pytest.fixture
def clock() -> Clock:
    return Clock()


def monitor_of(clock: Clock, budget_ms: float | None = 10.0, **options: object) -> Monitor:
    return Monitor(budget_ms, clock=clock, load=clock.quiet, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("totals", "level", "words"),
    [
        ([5.0] * 200, "OK", "p99 5.0 ms is 50% of the budget of 10 ms over 200 frames"),
        ([7.9] * 200, "OK", "79%"),
        ([8.1] * 200, "WARN", "81%"),
        ([5.0] * 199 + [11.0], "WARN", "1 missed it"),
        ([5.0] * 198 + [11.0] * 2, "ERROR", "2 missed it"),
        ([11.0] * 200, "ERROR", "110%"),
        ([float("nan")] * 3, "OK", "no frame was timed yet"),
    ],
)
def test_the_level_follows_the_budget(clock: Clock, totals: list[float], level: str, words: str) -> None:
    monitor = monitor_of(clock)
    feed(monitor, clock, *totals)
    verdict = monitor.verdict()
    assert verdict.level == level and words in verdict.sentence and verdict.hints == ()


def test_the_window_slides(clock: Clock) -> None:
    monitor = monitor_of(clock, window=64)
    feed(monitor, clock, *[30.0] * 64)
    assert monitor.verdict().level == "ERROR"
    feed(monitor, clock, *[5.0] * 63)
    assert monitor.verdict().level == "ERROR"
    feed(monitor, clock, 5.0)
    assert monitor.verdict().level == "OK"
    assert monitor.snapshot()["deadline"] == {"misses": 64, "streak": 0, "longest_streak": 64}


def test_misses_and_streaks(clock: Clock) -> None:
    monitor = monitor_of(clock)
    feed(monitor, clock, 11.0, 11.0, 10.0, 11.0, 11.0, 11.0)
    assert monitor.snapshot()["deadline"] == {"misses": 5, "streak": 3, "longest_streak": 3}
    feed(monitor, clock, 9.0)
    assert monitor.snapshot()["deadline"] == {"misses": 5, "streak": 0, "longest_streak": 3}


def test_silence_is_stale(clock: Clock) -> None:
    """No frames and no error (cases R9): within five periods, or two seconds where no period is known."""
    for period, limit in ((100.0, 0.5), (None, STALE_S)):
        monitor = monitor_of(clock, period_ms=period)
        assert monitor.verdict().level == "STALE"
        feed(monitor, clock, 5.0, 5.0)
        clock.now += 0.99 * limit
        assert monitor.verdict().level == "OK"
        clock.now += 0.02 * limit
        verdict = monitor.verdict()
        assert verdict.level == "STALE" and verdict.sentence.startswith("no frame was answered for")
        feed(monitor, clock, 5.0)
        assert monitor.verdict().level == "OK"


def test_an_error_shows_for_a_while_and_raises_an_alarm(clock: Clock) -> None:
    monitor, alarms = monitor_of(clock), list[str]()
    monitor.on_alarm = alarms.append
    feed(monitor, clock, 5.0)
    monitor.count("dropped", 3)
    assert monitor.verdict().level == "OK" and alarms == []
    monitor.count("error/infer")
    verdict = monitor.verdict()
    assert verdict.level == "ERROR" and verdict.sentence == "an error in infer, 0 s ago" and alarms == ["error: infer"]
    clock.now += ERROR_S + 0.1
    feed(monitor, clock, 5.0)
    assert monitor.verdict().level == "OK"
    assert monitor.snapshot()["counts"] == {"dropped": 3, "error/infer": 1}


def test_a_streak_raises_one_alarm_outside_the_lock(clock: Clock) -> None:
    monitor, alarms = monitor_of(clock), list[tuple[str, int]]()
    monitor.on_alarm = lambda reason: alarms.append((reason, monitor.snapshot()["deadline"]["streak"]))
    feed(monitor, clock, *[11.0] * (STREAK - 1), 5.0, *[11.0] * (2 * STREAK))
    assert alarms == [("deadline: 5 frames in a row took more than 10 ms", STREAK)]


def test_an_alarm_that_fails_stops_nothing(clock: Clock) -> None:
    def full(reason: str) -> None:
        raise OSError("no space left")

    monitor = monitor_of(clock)
    monitor.on_alarm = full
    feed(monitor, clock, *[11.0] * STREAK)
    monitor.count("error")
    assert monitor.snapshot()["counts"] == {"error": 1, "alarm_failed": 2}


def test_without_a_budget_a_slower_engine_is_noticed(clock: Clock) -> None:
    monitor = monitor_of(clock, None)
    feed(monitor, clock, *[3.0] * 100, infer=2.0)
    assert monitor.verdict().level == "OK" and "no budget" in monitor.verdict().sentence
    feed(monitor, clock, *[6.0] * 40, infer=4.0)
    verdict = monitor.verdict()
    assert verdict.level == "WARN" and "inference takes 4.00 ms, 2.00 ms at the start" in verdict.sentence


def test_a_snapshot_is_json_from_the_first_moment_on(clock: Clock) -> None:
    monitor = monitor_of(clock)
    json.dumps(monitor.snapshot(), allow_nan=False)
    for age in (float("nan"), 12.0):
        feed(monitor, clock, 5.0, age=age, infer=2.0, **{"post/depth": 0.3})
    seen = json.loads(json.dumps(monitor.snapshot(), allow_nan=False))
    assert seen["frames"] == 2 and seen["fps"] == pytest.approx(1 / 0.033)
    assert {name: stage["count"] for name, stage in seen["stages"].items()} == {
        "end_to_end": 2,
        "age": 1,
        "infer": 2,
        "post/depth": 2,
    }
    assert seen["window"] == {"frames": 2, "p50": 5.0, "p99": 5.0, "max": 5.0}
    assert seen["drift"]["status"] == "unknown" and "no reference" in monitor.concerns()["input"][1]


def test_threads_lose_no_count() -> None:
    monitor, start = Monitor(10.0), threading.Barrier(8)

    def work() -> None:
        start.wait()
        for index in range(250):
            monitor.frame(result(11.0 if index % 2 else 5.0, infer=1.0))
            monitor.count("received")
            if index % 50 == 0:
                monitor.verdict()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = monitor.snapshot()
    assert (seen["frames"], seen["counts"], seen["deadline"]["misses"]) == (2000, {"received": 2000}, 1000)
    assert seen["stages"]["infer"]["count"] == 2000


def test_nothing_grows_with_the_frames(clock: Clock) -> None:
    monitor = monitor_of(clock, window=64)
    for _ in range(5000):
        clock.now += 0.033
        monitor.frame(result(5.0, age=3.0, infer=1.0))
    held = [monitor._recent, *monitor._start.values(), *monitor._last.values(), monitor._looks]
    assert max(map(len, held)) <= 64 and len(monitor._stages) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget_ms": 0.0}, "not a budget"),
        ({"budget_ms": float("nan")}, "not a budget"),
        ({"period_ms": -1.0}, "not a period"),
        ({"window": 2}, "not a window"),
        ({"reference": {"version": 99}}, "reference statistics cannot be read"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Monitor(**options)  # type: ignore[arg-type]


def test_a_board_that_cannot_be_read_silences_nothing() -> None:
    def broken() -> None:
        raise OSError("sysfs")

    clock = Clock()
    for fault in ({"state": broken}, {"load": broken}):
        monitor = Monitor(10.0, **{"load": clock.quiet, "clock": clock, **fault})  # type: ignore[arg-type]
        feed(monitor, clock, 1.0)
        assert monitor.verdict().level == "OK"
        assert monitor.snapshot()["counts"] == {"look_failed": 1}
        clock.now += 1
        assert monitor.snapshot()["counts"] == {"look_failed": 2}


@pytest.mark.parametrize(("event", "n"), [(None, 1), (b"error", 1), ("error", None), ("error", 1.5), ("error", True)])
def test_what_is_no_event_is_refused(event: str, n: int) -> None:
    monitor = Monitor()
    with pytest.raises(InputError, match="not an event"):
        monitor.count(event, n)
    assert monitor.snapshot()["counts"] == {}


@pytest.mark.parametrize("settings", [{"budget_ms": "5"}, {"period_ms": []}, {"window": 10**9}, {"window": None}])
def test_settings_of_other_types(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="not a (budget|period|window)"):
        Monitor(**settings)  # type: ignore[arg-type]
