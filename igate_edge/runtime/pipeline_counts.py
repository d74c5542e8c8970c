"""What became of every frame of a pipeline: counted once, named, told to the monitor."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .frame import Result


class Watching(Protocol):
    """What a pipeline tells a monitor (`runtime.monitor.Monitor`)."""

    def frame(self, result: Result) -> None: ...
    def count(self, event: str, n: int = 1) -> None: ...
    def inspect(self, image: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None: ...


@dataclass(frozen=True)
class Counts:
    """What became of all frames: received = answered + dropped + stale + refused + errors + `inside`.

    dropped: a newer frame took their place. stale: not newer than one that was seen before, or older than `max_age_ms`.
    refused: by reason ("encoding", "type", "size"). errors: by stage ("submit", "preprocess", "infer", "post", "sink").
    events: what cost no frame: "size", "encoding" (the camera changed it), "clock" (its stamps jumped back),
    "camera_info" (of another size than the frame), "source", "monitor", "recorder" (they raised), "left" (a thread that
    did not end).
    """

    received: int = 0
    answered: int = 0
    dropped: int = 0
    stale: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)

    @property
    def inside(self) -> int:
        """Frames that were taken and have neither been answered nor lost."""
        lost = self.dropped + self.stale + sum(self.refused.values()) + sum(self.errors.values())
        return self.received - self.answered - lost


def sentence(error: BaseException) -> str:
    """An error's type and words; the type alone where it has none that can be read."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


class Tally:
    """Counters of several threads; `wait` sleeps until all frames came to an end."""

    def __init__(self, monitor: Watching | None) -> None:
        self._monitor = monitor
        self._plain: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._complaints: dict[str, str] = {}
        self._inside = 0
        self._changed = threading.Condition()

    def received(self) -> None:
        with self._changed:
            self._plain["received"] += 1
            self._inside += 1
        self._tell("received")

    def answered(self) -> None:
        self._end(self._plain, "answered")

    def dropped(self) -> None:
        self._end(self._plain, "dropped")
        self._tell("dropped")

    def stale(self, sentence: str) -> None:
        self._end(self._plain, "stale", sentence)
        self._tell("stale")

    def refused(self, reason: str, sentence: str) -> None:
        self._end(self._refused, reason, sentence)
        self._tell(f"refused/{reason}")

    def error(self, stage: str, sentence: str) -> None:
        self._end(self._errors, stage, sentence)
        self._tell(f"error/{stage}")

    def event(self, name: str, sentence: str) -> None:
        """Something that cost no frame."""
        with self._changed:
            self._events[name] += 1
            self._complaints[name] = sentence
        if name != "monitor":
            self._tell(name)

    def _end(self, counter: Counter[str], name: str, sentence: str = "") -> None:
        with self._changed:
            counter[name] += 1
            if sentence:
                self._complaints[name] = sentence
            self._inside -= 1
            if not self._inside:
                self._changed.notify_all()

    def _tell(self, event: str) -> None:
        if self._monitor is not None:
            try:
                self._monitor.count(event)
            except Exception as error:  # a monitor's fault must not cost a frame
                self.event("monitor", sentence(error))

    def counts(self) -> Counts:
        with self._changed:
            named = dict(self._refused), dict(self._errors), dict(self._events)
            plain = self._plain
            return Counts(plain["received"], plain["answered"], plain["dropped"], plain["stale"], *named)

    def complaints(self) -> dict[str, str]:
        with self._changed:
            return dict(self._complaints)

    def wait(self, timeout_s: float | None, until: Callable[[], bool] = lambda: False) -> bool:
        """True once nothing is inside; False after `timeout_s` or when `until` holds (see `wake`)."""
        if timeout_s is not None and not timeout_s <= threading.TIMEOUT_MAX:
            timeout_s = None  # longer than a lock can wait: for ever
        with self._changed:
            self._changed.wait_for(lambda: not self._inside or until(), timeout_s)
            return not self._inside

    def wake(self) -> None:
        """Let waiting threads look at their `until` again."""
        with self._changed:
            self._changed.notify_all()
