"""Stages in a row: one item in each, one waiting before each, and no hand-over between threads that can be saved.

An item that finds the next stage free is carried on by the thread that has it; only where another item already waits
for the stage that it leaves, that thread stays and hands it over. So a lone item wakes one thread, while under load
every stage has a thread of its own.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from .mailbox import Closed

Item = TypeVar("Item")


class Relay(Generic[Item]):
    """`put` items in; each goes through all `stages` in order, until one returns False.

    wait: a full place makes those who want it wait; otherwise what waits there is replaced, and goes to `lost` with the
    stage's name. failed: gets what a stage raised, BaseExceptions too. Both are called without a lock; what they raise
    themselves on a thread of the relay goes to threading.excepthook.

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
        self._since, self._who = [0.0] * len(self._works), [0] * len(self._works)
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

    @property
    def inside(self) -> bool:
        """Whether the caller is one of the relay's own threads."""
        return threading.current_thread() in self._threads

    def put(self, item: Item) -> None:
        """Hand in an item; raises Closed, also while it waits for room. What ends the wait otherwise loses the item."""
        try:
            with self._changed:
                on, lost = self._enter(0, item)
                if on:
                    self._turns.put((0, item))
        except _Interrupted as end:
            self._lost(self._names[0], item)
            raise end.error from None
        if lost is not None:
            self._lost(self._names[0], lost)

    def close(self, drain: bool = True, timeout_s: float = 5.0) -> list[str]:
        """Take nothing more, let what is inside come out (`drain`) or lose it, end the threads.

        Returns the names of the stages that did not end within `timeout_s`, but for the one that calls: a stage that
        closes its own relay drains nothing, as what is inside could not pass it.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._open = False
            self._changed.notify_all()
            try:
                if drain and not self.inside:
                    self._changed.wait_for(lambda: not any(self._since), within(timeout_s))
            finally:  # also when Ctrl-C ends the wait
                self._ended = True
                left, self._waiting = self._waiting, [None] * len(self._waiting)
                self._changed.notify_all()
                for _ in self._threads:
                    self._turns.put(None)
        for name, item in zip(self._names, left, strict=True):
            if item is not None:
                self._lost(name, item)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(within(max(0.1 if drain else 0.0, deadline - time.monotonic())))
        own = threading.get_ident()
        stages = zip(self._names, self._since, self._who, strict=True)
        return [name for name, since, who in stages if since and who != own]

    def _enter(self, index: int, item: Item) -> tuple[bool, Item | None]:
        """Under the lock: whether the item may go into a stage at once, and the item that it replaces, if any."""
        while True:
            if self._ended or (index == 0 and not self._open):
                raise Closed
            if not self._since[index]:
                self._since[index] = time.monotonic()
                return True, None
            waits = self._waiting[index]
            if waits is None or not self._wait:
                self._waiting[index] = item
                return False, waits
            try:
                self._changed.wait()
            except BaseException as error:  # Ctrl-C: here, and only here, it is known that the item is nowhere yet
                raise _Interrupted(error) from None

    def _live(self) -> None:
        """The life of a thread: turns, each from one stage to wherever it can carry its item."""
        while (turn := self._turns.get()) is not None:
            # At the end it is None: what came out must not live on while this thread waits.
            while turn is not None:
                turn = self._step(*turn)

    def _step(self, index: int, item: Item) -> tuple[int, Item] | None:
        """Run one stage on an item; what this thread is to do next."""
        self._who[index] = threading.get_ident()
        alive, on, lost = self._work(index, item), False, None
        with self._changed:
            if alive and index + 1 < len(self._works):
                try:
                    on, lost = self._enter(index + 1, item)
                except Closed:
                    lost = item
            if lost is None:
                return self._leave(index, item, on)
        # The stage is not left meanwhile: a callback that hangs is seen.
        self._call(self._lost, self._names[index + 1], lost)
        with self._changed:
            return self._leave(index, item, on)

    def _leave(self, index: int, item: Item, on: bool) -> tuple[int, Item] | None:
        """Under the lock: free a stage, or stay for what waits there and hand over the item that may go on."""
        following, self._waiting[index] = self._waiting[index], None
        self._since[index] = time.monotonic() if following is not None else 0.0
        # Under the lock, so that it comes before the end that `close` puts there.
        if on and following is not None:
            self._turns.put((index + 1, item))
        self._changed.notify_all()
        if following is not None:
            return index, following
        return (index + 1, item) if on else None

    def _work(self, index: int, item: Item) -> bool:
        if self._ended:
            self._call(self._lost, self._names[index], item)
            return False
        try:
            return self._works[index](item)
        except BaseException as error:  # even a SystemExit must not end the thread unseen
            self._call(self._failed, self._names[index], item, error)
            return False

    @staticmethod
    def _call(callback: Callable[..., object], *what: object) -> None:
        """A callback's own error is shown as a thread's, but the thread lives on."""
        try:
            callback(*what)
        except BaseException:
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


class _Interrupted(BaseException):
    """The wait for room was ended by something else, which is raised in its place."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def within(time_s: float) -> float:
    """No more than a lock can wait, and no less than nothing: also where the time is NaN."""
    return min(max(0.0, time_s), threading.TIMEOUT_MAX)
