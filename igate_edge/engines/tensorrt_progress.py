"""How far a build is: the builder's nested phases as one number, and the time that is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Phase:
    parent: str
    steps: int
    done: int = 0


class Phases:
    """Phases as IProgressMonitor reports them, from any thread.

    >>> phases = Phases()
    >>> phases.start("build", "", 2)
    >>> phases.step("build", 0)
    >>> phases.start("tactics", "build", 4)
    >>> phases.step("tactics", 0)
    >>> phases.now, phases.fraction   # one of two steps, and a quarter of the second one
    ('tactics', 0.625)
    """

    def __init__(self) -> None:
        self._lock, self._open, self._most = threading.Lock(), dict[str, _Phase](), 0.0

    def start(self, name: str, parent: str, steps: int) -> None:
        """A phase of `steps` steps begins, inside `parent` or at the top ("")."""
        with self._lock:
            self._open[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, index: int) -> None:
        """Step `index`, from 0, of a phase is done."""
        with self._lock:
            if name in self._open:
                self._open[name].done = min(index + 1, self._open[name].steps)

    def finish(self, name: str) -> None:
        """A phase ended, whether or not all of its steps were reported."""
        with self._lock:
            self._open.pop(name, None)

    @property
    def now(self) -> str:
        """The phase that began last and has not ended, or ""."""
        with self._lock:
            return next(reversed(self._open), "")

    @property
    def fraction(self) -> float:
        """From 0 to 1, never less than before."""
        with self._lock:
            tops = [self._part(name) for name, phase in self._open.items() if phase.parent not in self._open]
            self._most = max([self._most, *tops])
            return self._most

    def _part(self, name: str, depth: int = 0) -> float:
        phase = self._open[name]
        inside = [other for other, one in self._open.items() if one.parent == name and other != name]
        share = max((self._part(other, depth + 1) for other in inside), default=0.0) if depth < 16 else 0.0
        return min((phase.done + share) / phase.steps, 1.0)


class Eta:
    """A Progress that tells `show` (phase, seconds so far, seconds left or None while nobody can know).

    >>> now = iter([0.0, 30.0])
    >>> Eta(print, lambda: next(now)).phase("tactics", 250, 1000)
    tactics 30.0 90.0
    """

    def __init__(
        self, show: Callable[[str, float, float | None], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._show, self._clock, self._began = show, clock, clock()

    def phase(self, name: str, done: int, total: int) -> None:
        """See tensorrt.Progress."""
        elapsed = self._clock() - self._began
        self._show(name, elapsed, elapsed * (total - done) / done if done > 0 else None)
