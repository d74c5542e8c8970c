"""Stages in a row: order, no item lost or doubled, no needless change of threads, and an end that always comes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
from robot import PATIENCE, Gate, through, wait_for

from igate_edge.runtime.mailbox import Closed
from igate_edge.runtime.relay import Relay


class Item:
    def __init__(self, number: int) -> None:
        self.number = number


def test_one_thread_carries_a_lone_item_through_all_stages() -> None:
    threads: list[int] = []
    done = threading.Semaphore(0)

    def note(item: int) -> bool:
        threads.append(threading.get_ident())
        return True

    relay = Relay[int]({"a": note, "b": note, "c": note, "d": lambda item: bool(done.release()) or True})
    for number in range(20):
        relay.put(number)
        assert done.acquire(timeout=PATIENCE)
    assert relay.close() == []
    assert all(len(set(threads[begin : begin + 3])) == 1 for begin in range(0, 60, 3))
    assert threading.get_ident() not in threads, "who puts an item in is not held up by its stages"


def test_stages_run_beside_each_other() -> None:
    both = threading.Barrier(2)
    meet = {"first": [2], "second": [1]}

    def stage(name: str) -> Callable[[int], bool]:
        def work(item: int) -> bool:
            if item in meet[name]:
                both.wait(PATIENCE)  # passes only while item 1 is in the second stage and item 2 in the first
            return True

        return work

    failed: list[BaseException] = []
    relay = Relay[int](
        {"first": stage("first"), "second": stage("second")}, wait=True, failed=lambda *what: failed.append(what[2])
    )
    relay.put(1)
    relay.put(2)
    assert relay.close(timeout_s=PATIENCE) == [] and not failed


def test_under_load_a_thread_stays_at_its_stage() -> None:
    """The engine, the slowest stage, need not wait for a thread to wake between two items."""
    held, threads, ended = Gate(), list[int](), list[int]()

    def slow(item: int) -> bool:
        threads.append(threading.get_ident())
        return held(item)

    relay = Relay[int]({"slow": slow, "end": lambda item: not ended.append(item)}, wait=True)
    relay.put(1)
    held.wait()
    for number in range(2, 6):
        relay.put(number)  # waits before the stage, so that it is there when the stage is left
        held.go()
        held.wait()
    held.go()
    assert relay.close(timeout_s=PATIENCE) == []
    assert len(set(threads)) == 1 and ended == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("wait", [True, False])
def test_order_is_kept_and_every_item_has_one_end(wait: bool) -> None:
    out, stopped, lost, failed = list[int](), list[int](), list[int](), list[int]()
    inside = [0, 0, 0]

    def stage(index: int) -> Callable[[int], bool]:
        def work(item: int) -> bool:
            inside[index] += 1
            assert inside[index] == 1, "two items in one stage"
            sum(range(item * 37 % 400))
            inside[index] -= 1
            if item % 97 == index:
                raise KeyError(item)
            if item % 89 == index:
                stopped.append(item)
            return item % 89 != index

        return work

    relay = Relay[int](
        {"a": stage(0), "b": stage(1), "c": stage(2), "end": lambda item: not out.append(item)},
        wait=wait,
        lost=lambda name, item: lost.append(item),
        failed=lambda name, item, error: failed.append(item),
    )
    for item in range(4000):
        relay.put(item)
    assert relay.close(timeout_s=PATIENCE) == []
    assert sorted(out + stopped + lost + failed) == list(range(4000))
    assert out == sorted(out)
    if wait:
        assert not lost and out == [item for item in range(4000) if item % 97 > 2 and item % 89 > 2]
    else:
        assert out[-1] == 3999, "the newest is never lost"


def test_the_newest_wins_where_nobody_waits() -> None:
    held, out, lost = Gate(), list[int](), list[tuple[str, int]]()
    relay = Relay[int](
        {"first": through, "held": held, "end": lambda item: not out.append(item)},
        lost=lambda name, item: lost.append((name, item)),
    )
    relay.put(1)
    held.wait()
    passed = threading.Semaphore(0)
    relay._works = (lambda item: bool(passed.release()) or True, *relay._works[1:])
    for item in (2, 3, 4):
        relay.put(item)
        assert passed.acquire(timeout=PATIENCE)
    assert wait_for(lambda: not relay._since[0]), "item 4 has not come to the second stage's place"
    held.go(2)
    assert relay.close(timeout_s=PATIENCE) == []
    assert out == [1, 4] and lost == [("held", 2), ("held", 3)]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
def test_what_a_stage_raises_ends_its_item_only(error: BaseException) -> None:
    failed: list[tuple[str, int, BaseException]] = []
    out: list[int] = []

    def stage(item: int) -> bool:
        if item == 1:
            raise error
        return True

    relay = Relay[int](
        {"a": through, "b": stage, "c": lambda item: not out.append(item)},
        wait=True,
        failed=lambda *what: failed.append(what),
    )
    for item in (0, 1, 2):
        relay.put(item)
    assert relay.close() == [] and out == [0, 2] and failed == [("b", 1, error)]


def test_close_without_draining_loses_what_waits() -> None:
    held, lost, out = Gate(), list[tuple[str, int]](), list[int]()
    relay = Relay[int](
        {"held": held, "end": lambda item: not out.append(item)}, lost=lambda name, item: lost.append((name, item))
    )
    relay.put(1)
    held.wait()
    relay.put(2)
    closer = threading.Thread(target=lambda: relay.close(drain=False, timeout_s=PATIENCE), daemon=True)
    closer.start()
    assert wait_for(lambda: relay._ended)
    held.go()
    closer.join(PATIENCE)
    assert not closer.is_alive() and not out and sorted(lost) == [("end", 1), ("held", 2)]
    with pytest.raises(Closed):
        relay.put(3)


def test_close_wakes_who_waits_for_room() -> None:
    held, refused = Gate(), threading.Event()
    relay = Relay[int]({"held": held}, wait=True)
    relay.put(1)
    held.wait()
    relay.put(2)

    def third() -> None:
        with pytest.raises(Closed):
            relay.put(3)
        refused.set()

    threading.Thread(target=third, daemon=True).start()
    closer = threading.Thread(target=lambda: relay.close(timeout_s=PATIENCE), daemon=True)
    closer.start()
    assert refused.wait(PATIENCE)
    held.go(2)
    closer.join(PATIENCE)
    assert not closer.is_alive()


def test_a_stage_that_is_stuck_is_named_and_what_it_brings_later_is_lost() -> None:
    held, lost = Gate(), threading.Event()
    what: list[tuple[str, int]] = []

    def lose(name: str, item: int) -> None:
        what.append((name, item))
        lost.set()

    relay = Relay[int]({"held": held, "end": through}, lost=lose)
    relay.put(7)
    held.wait()
    assert relay.stuck_s > 0
    assert relay.close(timeout_s=0.05) == ["held"]
    held.go()
    assert lost.wait(PATIENCE) and what == [("end", 7)]
    for thread in relay._threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in relay._threads) and relay.stuck_s == 0.0


def test_a_stage_may_close_its_relay() -> None:
    ended = threading.Event()
    relays: list[Relay[int]] = []

    def stage(item: int) -> bool:
        assert relays[0].close(timeout_s=PATIENCE) == []
        ended.set()
        return True

    relays.append(Relay[int]({"a": through, "b": stage}))
    relays[0].put(1)
    assert ended.wait(PATIENCE)
    for thread in relays[0]._threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in relays[0]._threads)


def test_what_came_out_is_held_by_nobody() -> None:
    done = threading.Semaphore(0)
    relay = Relay[Item]({"a": lambda item: True, "b": lambda item: True})
    last = Relay[Item]({"a": lambda item: bool(done.release()) or True})
    gc.disable()
    try:
        for each in (relay, last):
            item = Item(1)
            gone = weakref.ref(item)
            each.put(item)
            del item
            with each._changed:
                assert each._changed.wait_for(lambda each=each: not any(each._since), PATIENCE)  # type: ignore[misc]
            assert wait_for(lambda gone=gone: gone() is None)  # type: ignore[misc]
    finally:
        gc.enable()
    relay.close()
    last.close()
