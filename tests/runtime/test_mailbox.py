"""One place: the newest wins; closing wakes everybody."""

from __future__ import annotations

import threading

import pytest
from robot import PATIENCE

from igate_edge.runtime.mailbox import Closed, Mailbox


def test_none_is_an_item_too() -> None:
    box: Mailbox[object] = Mailbox()
    assert box.put(None) is None and box.take() is None


def test_nothing_is_lost_or_doubled_between_threads() -> None:
    box: Mailbox[int] = Mailbox()
    taken: list[int] = []
    replaced: list[int] = []

    def take() -> None:
        with pytest.raises(Closed):
            while True:
                taken.append(box.take())

    taker = threading.Thread(daemon=True, target=take)
    taker.start()
    for number in range(5000):
        old = box.put(number)
        if old is not None:
            replaced.append(old)
    box.close()
    taker.join(PATIENCE)
    assert taken == sorted(taken) and sorted(taken + replaced) == list(range(5000)) and taken[-1] == 4999


def test_close_wakes_who_waits() -> None:
    box: Mailbox[int] = Mailbox()
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(Closed):
            box.take()
        ended.set()

    threading.Thread(daemon=True, target=wait).start()
    box.close()
    assert ended.wait(PATIENCE)
    with pytest.raises(Closed):
        box.put(3)


def test_what_is_kept_at_the_close_can_be_taken() -> None:
    box: Mailbox[int] = Mailbox()
    box.put(1)
    box.close()
    assert box.take() == 1
    with pytest.raises(Closed):
        box.take()
