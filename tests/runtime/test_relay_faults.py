"""A relay whose callbacks fail or hang, that is interrupted, or closed at the worst moment: no item vanishes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from robot import PATIENCE, Gate, through, wait_for

from igate_edge.runtime.mailbox import Closed
from igate_edge.runtime.relay import Relay


@pytest.fixture
def uncaught(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """What callbacks raised on threads."""
    seen: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda what: seen.append(what.exc_value))
    return seen


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every hand-over between threads; a function in its place is called before the first one."""
    seen: list[Any] = []

    class Counted(queue.SimpleQueue):  # type: ignore[type-arg]
        def put(self, turn: Any, block: bool = True, timeout: float | None = None) -> None:
            if seen and callable(seen[0]):
                seen.pop(0)()
            if turn is not None:
                seen.append(turn)
            super().put(turn)

    monkeypatch.setattr(queue, "SimpleQueue", Counted)
    yield seen


def test_a_lone_item_is_handed_over_once(turns: list[Any]) -> None:
    done = threading.Semaphore(0)
    relay = Relay[int]({"a": through, "b": through, "c": lambda item: bool(done.release()) or True})
    for number in range(20):
        relay.put(number)
        assert done.acquire(timeout=PATIENCE) and wait_for(lambda: not any(relay._since))
    relay.close()
    assert len(turns) == 20


@pytest.mark.parametrize("by", ["put", "step"])
def test_a_close_at_the_worst_moment_loses_no_item(turns: list[Any], by: str) -> None:
    """Between the moment that a stage is taken and the one that its turn is given out."""
    ends: list[int] = []
    gate = Gate()
    stages = {"a": through} if by == "put" else {"a": gate, "b": through}
    last = list(stages)[-1]
    stages[last] = lambda item: not ends.append(item)
    relay = Relay[int](stages, lost=lambda name, item: ends.append(item))
    closer = threading.Thread(target=lambda: relay.close(drain=False, timeout_s=PATIENCE), daemon=True)

    def close() -> None:
        closer.start()
        closer.join(0.2)  # without the lock it would be through by now

    if by == "step":
        relay.put(1)
        gate.wait()
        relay.put(2)  # so that the first item is handed over
    turns.insert(0, close)
    if by == "put":
        relay.put(1)
    gate.go(2)
    for thread in (*relay._threads, closer):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert sorted(ends) == ([1] if by == "put" else [1, 2])


def test_how_long_a_stage_is_stuck_is_that_of_the_slowest() -> None:
    first, second = Gate(), Gate()
    relay = Relay[int]({"a": first, "b": second}, wait=True)
    begun = time.monotonic()
    relay.put(1)
    first.wait()
    first.go()
    second.wait()
    entered = time.monotonic()
    assert wait_for(lambda: time.monotonic() - entered > 0.05)
    relay.put(2)
    first.wait()
    assert 0.05 < relay.stuck_s <= time.monotonic() - begun, "item 2 has just begun, item 1 has not"
    first.go()  # item 2 waits for the second stage
    assert wait_for(lambda: relay._waiting[1] == 2)
    renewed = time.monotonic()
    second.go()
    second.wait()
    assert relay.stuck_s <= time.monotonic() - renewed, "the next item's time begins anew"
    second.go()
    assert relay.close(timeout_s=PATIENCE) == [] and relay.stuck_s == 0.0


def test_a_callback_that_hangs_is_seen() -> None:
    held, hangs = Gate(), Gate()
    relay = Relay[int]({"a": through, "b": held}, lost=lambda name, item: item == 2 and hangs())
    relay.put(1)
    held.wait()
    relay.put(2)
    assert wait_for(lambda: relay._waiting[1] == 2)
    relay.put(3)  # takes the place of 2, which the callback gets on the first stage's thread
    hangs.wait()
    held.go(2)
    assert wait_for(lambda: not relay._since[1]) and relay.stuck_s > 0
    assert relay.close(timeout_s=0.1) == ["a"]
    hangs.go()
    for thread in relay._threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1)])
def test_callbacks_that_raise_end_no_thread(error: BaseException, uncaught: list[BaseException | None]) -> None:
    out: list[int] = []

    def bad(*_: object) -> None:
        raise error

    def odd(item: int) -> bool:
        if item % 2:
            raise KeyError(item)
        return True

    relay = Relay[int]({"a": odd, "b": lambda item: not out.append(item)}, wait=True, failed=bad, lost=bad)
    for number in range(10):
        relay.put(number)
    assert relay.close(timeout_s=PATIENCE) == []
    assert out == [0, 2, 4, 6, 8] and uncaught == [error] * 5


def test_a_close_whose_callback_raises_still_ends_the_threads() -> None:
    held = Gate()

    def bad(*_: object) -> None:
        raise ValueError

    relay = Relay[int]({"a": held}, lost=bad)
    relay.put(1)
    held.wait()
    relay.put(2)
    with pytest.raises(ValueError):
        relay.close(drain=False, timeout_s=PATIENCE)
    held.go()
    for thread in relay._threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in relay._threads)


def test_a_stage_that_closes_names_another_that_is_stuck() -> None:
    held, found = Gate(), list[list[str]]()
    relays: list[Relay[int]] = []

    def ends(item: int) -> bool:
        found.append(relays[0].close(timeout_s=0.05))
        return True

    relays.append(Relay[int]({"a": held, "b": ends}))
    relays[0].put(1)
    held.wait()
    relays[0].put(2)
    held.go()
    held.wait()
    assert wait_for(lambda: bool(found)) and found == [["a"]]
    held.go()


def test_an_interrupted_wait_loses_the_item_once(monkeypatch: pytest.MonkeyPatch) -> None:
    held, lost = Gate(), list[tuple[str, int]]()
    relay = Relay[int]({"a": held}, wait=True, lost=lambda *what: lost.append(what))
    relay.put(1)
    held.wait()
    relay.put(2)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(relay._changed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            relay.put(3)
    held.go(2)
    assert lost == [("a", 3)] and relay.close(timeout_s=PATIENCE) == []


def test_the_same_object_may_wait_twice() -> None:
    held, lost, item = Gate(), list[object](), object()
    relay = Relay[object]({"a": held}, lost=lambda name, item: lost.append(item))
    for _ in range(3):
        relay.put(item)
    held.go(2)
    assert relay.close(timeout_s=PATIENCE) == [] and lost in ([item], [])


def test_an_item_that_waits_for_a_stage_inside_is_lost_at_the_end() -> None:
    held, lost = Gate(), list[tuple[str, int]]()
    relay = Relay[int]({"a": through, "b": held}, wait=True, lost=lambda *what: lost.append(what))
    for number in (1, 2, 3):
        relay.put(number)
    held.wait()
    assert wait_for(lambda: relay._waiting[1] == 2 and bool(relay._since[0]))
    assert relay.close(timeout_s=0.05) == ["b"]
    assert sorted(lost) == [("b", 2), ("b", 3)]
    held.go()


@pytest.mark.parametrize("seconds", [float("nan"), -1.0, 0.0])
def test_a_time_that_is_none_waits_for_nothing(seconds: float) -> None:
    held = Gate()
    relay = Relay[int]({"a": held})
    relay.put(1)
    held.wait()
    began = time.monotonic()
    assert relay.close(timeout_s=seconds) == ["a"]
    assert time.monotonic() - began < PATIENCE / 2
    with pytest.raises(Closed):
        relay.put(2)
    held.go()


def test_threads_do_not_keep_a_process_alive() -> None:
    relay = Relay[int]({"a": through, "b": through})
    assert len(relay._threads) == 2 and all(thread.daemon for thread in relay._threads)
    assert not relay.inside
    relay.close()
