"""Stages in a row: one item in each, one waiting before each, and no hand-over between threads that can be saved.

An item that finds the next stage free is carried on by the thread that has it; only where another item already waits
for the stage that it leaves, that thread stays and hands it over. So a lone item wakes one thread, while under load
every stage has a thread of its own.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from .mailbox import Closed

Item = TypeVar("Item")


class Relay(Generic[Item]):
    """`put` items in; each goes through all `stages` in order, until one returns False.

    wait: a full place makes those who want it wait; otherwise what waits there is replaced, and goes to `lost` with the
    stage's name. failed: gets what a stage raised, BaseExceptions too. Both are called without a lock.

    >>> seen = []
    >>> relay = Relay({"double": lambda pair: not pair.append(2 * pair[0]), "keep": lambda pair: not seen.append(pair)})
    >>> relay.put([4])
    >>> relay.close(), seen
    ([], [[4, 8]])
    """

    def __init__(
        self,
        stages: Mapping[str, Callable[[Item], bool]],
        *,
        wait: bool = False,
        lost: Callable[[str, Item], object] = lambda name, item: None,
        failed: Callable[[str, Item, BaseException], object] = lambda name, item, error: None,
    ) -> None:
        self._names, self._works = tuple(stages), tuple(stages.values())
        self._wait, self._lost, self._failed = wait, lost, failed
        self._changed = threading.Condition()
        # 0.0 = nobody is in this stage; an item waits only before a stage that somebody is in.
        self._since = [0.0] * len(self._works)
        self._waiting: list[Item | None] = [None] * len(self._works)
        self._open, self._ended = True, False
        self._turns: queue.SimpleQueue[tuple[int, Item] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._live, name=f"igate stages {index}", daemon=True)
            for index in range(len(stages))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def stuck_s(self) -> float:
        """Seconds for which the slowest stage has had the same item; 0.0 when there is none."""
        begun = min((since for since in self._since if since), default=0.0)
        return time.monotonic() - begun if begun else 0.0

    def put(self, item: Item) -> None:
        """Hand in an item; raises Closed, also while it waits for room."""
        with self._changed:
            free, lost = self._enter(0, item)
            if free:
                self._turns.put((0, item))
        if lost is item:
            raise Closed
        if lost is not None:
            self._lost(self._names[0], lost)

    def close(self, drain: bool = True, timeout_s: float = 5.0) -> list[str]:
        """Take nothing more, let what is inside come out (`drain`) or lose it, end the threads.

        Returns the names of the stages that did not end within `timeout_s`. A stage that closes its own relay drains
        nothing: what is inside could not pass it.
        """
        deadline = time.monotonic() + timeout_s
        inside = threading.current_thread() in self._threads
        with self._changed:
            self._open = False
            self._changed.notify_all()
            if drain and not inside:
                self._changed.wait_for(lambda: not any(self._since), _seconds(timeout_s))
            self._ended = True
            left, self._waiting = self._waiting, [None] * len(self._waiting)
            self._changed.notify_all()
        for name, item in zip(self._names, left, strict=True):
            if item is not None:
                self._lost(name, item)
        for _ in self._threads:
            self._turns.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_seconds(max(0.1 if drain else 0.0, deadline - time.monotonic())))
        if inside:
            return []
        return [name for name, since in zip(self._names, self._since, strict=True) if since]

    def _enter(self, index: int, item: Item) -> tuple[bool, Item | None]:
        """Under the lock: whether the item may go into a stage at once, and the item that is lost by it, if any."""
        while True:
            if self._ended or (index == 0 and not self._open):
                return False, item
            if not self._since[index]:
                self._since[index] = time.monotonic()
                return True, None
            waits = self._waiting[index]
            if waits is None or not self._wait:
                self._waiting[index] = item
                return False, waits
            self._changed.wait()

    def _live(self) -> None:
        """The life of a thread: turns, each from one stage to wherever it can carry its item."""
        while (turn := self._turns.get()) is not None:
            # At the end it is None: what came out must not live on while this thread waits.
            while turn is not None:
                turn = self._step(*turn)

    def _step(self, index: int, item: Item) -> tuple[int, Item] | None:
        """Run one stage on an item; what this thread is to do next."""
        alive = self._work(index, item)
        with self._changed:
            on, lost = self._enter(index + 1, item) if alive and index + 1 < len(self._works) else (False, None)
            following, self._waiting[index] = self._waiting[index], None
            self._since[index] = time.monotonic() if following is not None else 0.0
            # Under the lock, so that it comes before the end that `close` puts there.
            if on and following is not None:
                self._turns.put((index + 1, item))
            self._changed.notify_all()
        if lost is not None:
            self._lost(self._names[index + 1], lost)
        if following is not None:
            return index, following
        return (index + 1, item) if on else None

    def _work(self, index: int, item: Item) -> bool:
        if self._ended:
            self._lost(self._names[index], item)
            return False
        try:
            return self._works[index](item)
        except BaseException as error:  # even a SystemExit must not end the thread unseen
            self._failed(self._names[index], item, error)
            return False


def _seconds(time_s: float) -> float:
    """No more than a lock can wait, and no less than nothing: also where the time is NaN."""
    return min(max(0.0, time_s), threading.TIMEOUT_MAX)
