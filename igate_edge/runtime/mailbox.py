"""One place between two threads: whoever is late finds the newest, and nothing piles up."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Closed(Exception):
    """Nothing can be handed in any more, and nothing is left to be taken."""


class Mailbox(Generic[Item]):
    """Holds at most one item: `put` replaces it, `take` waits for one.

    >>> box = Mailbox()
    >>> box.put("old"), box.put("new"), box.take()
    (None, 'old', 'new')
    """

    def __init__(self) -> None:
        self._full = False
        self._item: Item | None = None
        self._open = True
        self._changed = threading.Condition()

    def put(self, item: Item) -> Item | None:
        """Leave an item; returns the one that nobody had taken. Raises Closed."""
        with self._changed:
            if not self._open:
                raise Closed
            replaced, self._item, self._full = self._item, item, True
            self._changed.notify_all()
            return replaced

    def take(self) -> Item:
        """The item, once there is one; raises Closed when there will be none any more."""
        with self._changed:
            while not self._full and self._open:
                self._changed.wait()
            if not self._full:
                raise Closed
            item, self._item, self._full = self._item, None, False
            return item  # type: ignore[return-value]

    def close(self) -> None:
        """Take nothing more; what is inside can still be taken."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
