"""Keep answering when an engine hangs or raises: open it again with growing pauses, and say so. Stop on signals."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from ..contract import OutputSpec, Preprocess, is_number
from ..engines.session import Closing
from ..errors import InputError, UnavailableError
from .pipeline import Answering

#: Engines that hung and were left behind, each with a thread and its memory: after so many only a new process helps.
MAX_LEFT = 3
#: An engine that answered for so long starts with short pauses again.
STEADY_S = 60.0
#: Seconds that the end of `stop_on_signals` waits for a `stop` that is still running.
STOP_S = 5.0
#: The longest time in seconds that may be set.
DAY_S = 86_400.0
#: Seconds without an engine after which only a new process helps: opening it may hang as well.
DOWN_S = 300.0


class Opened(Answering, Protocol):
    """An engine that can be closed, as `Engine.open` gives."""

    def close(self) -> None: ...


class _Worker:
    """One engine and the one thread that runs it, so that a call which never returns can be left behind."""

    def __init__(self, engine: Opened) -> None:
        self.engine = engine
        self._changed = threading.Condition()
        self._image: np.ndarray | None = None
        self._answer: tuple[dict[str, np.ndarray] | None, BaseException | None] | None = None
        self._ended = False
        self.thread = threading.Thread(target=self._run, name="igate engine", daemon=True)
        self.thread.start()

    def call(self, image: np.ndarray, limit_s: float) -> dict[str, np.ndarray] | None:
        """The engine's answer, None when there is none within `limit_s`; raises what the engine raised."""
        with self._changed:
            if self._ended:  # closed by another thread since the caller looked: nobody would answer
                raise UnavailableError("the engine is closed", "close() was called meanwhile", "open another one")
            self._image, self._answer = image, None
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._answer is not None, limit_s):
                return None
            assert self._answer is not None
            (answer, error), self._answer = self._answer, None
        if error is not None:
            raise error
        return answer

    def end(self) -> None:
        """Close the engine once the call that runs, if any, is over; waits for nothing."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._image is not None or self._ended)
                if self._image is None:  # what was handed in before the end is still answered
                    break
                image, self._image = self._image, None
            assert image is not None
            try:
                answer: Any = (self.engine.infer(image), None)
            except BaseException as error:
                answer = (None, error)
            with self._changed:
                self._answer = answer
                self._changed.notify_all()
            # Kept here, an error holds the frames of its whole traceback.
            del answer, image
        with contextlib.suppress(Exception):
            self.engine.close()


class Supervised(Closing):
    """An engine that is opened again, in the background, when it hangs or raises; use it like the engine itself.

    open: makes an engine (`lambda: Engine.open(path)`); called at once, what it then raises is passed on. hang_s: an
    answer that takes longer counts as a hang. backoff_s: the first and the longest pause before an engine is opened
    again; it doubles with every failure, and is short again once an engine answered for STEADY_S. on_change: gets every
    new `status`, on the thread that noticed. While there is no engine `infer` raises UnavailableError with the reason.
    An InputError (a wrong image) says nothing about the engine and is only passed on. A hung call cannot be ended, only
    left behind: with MAX_LEFT of them, or DOWN_S without an engine, `alive` is False and a watchdog should restart the
    process.
    """

    def __init__(
        self,
        open: Callable[[], Opened],
        *,
        hang_s: float = 5.0,
        backoff_s: tuple[float, float] = (0.5, 30.0),
        on_change: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        pair = backoff_s if isinstance(backoff_s, tuple | list) and len(backoff_s) == 2 else (0, 0)
        if not all(is_number(time) and 0 < time <= DAY_S for time in (hang_s, *pair)) or pair[0] > pair[1]:
            evidence = f"hang_s {hang_s!r:.30}, backoff_s {backoff_s!r:.30}"
            raise InputError("not times of a supervisor", evidence, "give seconds above 0, the shorter pause first")
        self._open, self._hang_s, self._backoff_s = open, hang_s, backoff_s
        self._on_change, self._clock = on_change, clock
        self._lock = threading.Lock()
        self._calls = threading.Lock()
        self._stop = threading.Event()
        self._pause = backoff_s[0]
        self._left: list[threading.Thread] = []
        self.restarts = 0
        self._worker: _Worker | None = _Worker(open())
        self._since = clock()
        self.status = "ready"
        self.preprocess: Preprocess = self._worker.engine.preprocess
        self.tasks: tuple[OutputSpec, ...] = self._worker.engine.tasks

    @property
    def alive(self) -> bool:
        """False when only a new process helps."""
        down = self._worker is None and not self._stop.is_set() and self._clock() - self._since > DOWN_S
        return not down and not self._full()

    def _full(self) -> bool:
        return sum(thread.is_alive() for thread in self._left) >= MAX_LEFT

    def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """As the engine's own, one call at a time; raises UnavailableError while there is no engine."""
        with self._calls:
            worker = self._worker
            if worker is None:
                raise UnavailableError("there is no engine at the moment", self.status, "wait, or look at its reason")
            try:
                answer = worker.call(image, self._hang_s)
            except InputError:
                raise
            except Exception as error:
                self._replace(worker, f"{type(error).__name__}: {error}")
                raise
            if answer is None:
                self._left.append(worker.thread)
                reason = f"the engine did not answer within {self._hang_s:g} s"
                self._replace(worker, reason)
                raise UnavailableError("the engine hangs", reason, "it is opened again; look at `status`")
            if self._clock() - self._since >= STEADY_S:
                self._pause = self._backoff_s[0]
            return answer

    def _replace(self, worker: _Worker, reason: str) -> None:
        with self._lock:
            self._worker, self._since = None, self._clock()
            self._left = [thread for thread in self._left if thread.is_alive()]
            full = self._full()
            status = f"opening the engine again: {reason}"
            if full:
                status = f"given up, {MAX_LEFT} engines hang: {reason}; restart the process"
            stopped = not self._set(status)
        worker.end()
        if stopped:
            return
        self._tell(status)
        if full:
            return
        threading.Thread(target=self._reopen, name="igate supervisor", daemon=True).start()

    def _reopen(self) -> None:
        while not self._stop.wait(self._pause):
            self._pause = min(self._pause * 2, self._backoff_s[1])
            try:
                worker = self._opened()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                status = f"the engine cannot be opened, next try in {self._pause:g} s: {reason}"
                with self._lock:
                    told = self._set(status)
                if told:
                    self._tell(status)
                continue
            with self._lock:
                if self._stop.is_set():
                    worker.end()
                    return
                self._worker, self._since = worker, self._clock()
                self.restarts += 1
                self._set("ready")
            self._tell("ready")
            return

    def _opened(self) -> _Worker:
        engine = self._open()
        if (engine.preprocess, engine.tasks) != (self.preprocess, self.tasks):
            engine.close()
            fix = "restart the program: its topics and sizes are those of the old bundle"
            raise InputError("the bundle was replaced by one with another input or other tasks", "", fix)
        return _Worker(engine)

    def _set(self, status: str) -> bool:
        """Under the lock, with the change itself: a thread that comes late must not undo what happened since."""
        if self._stop.is_set():
            return False
        self.status = status
        return True

    def _tell(self, status: str) -> None:
        if self._on_change is not None:
            with contextlib.suppress(Exception):
                self._on_change(status)

    def close(self) -> None:
        """Close the engine and open no other; a call that runs ends first. Closing twice is fine."""
        self._stop.set()
        with self._lock:
            worker, self._worker = self._worker, None
            self.status = "closed"
        if worker is not None:
            worker.end()


@contextlib.contextmanager
def stop_on_signals(
    stop: Callable[[], object], signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT)
) -> Iterator[None]:
    """Call `stop` once, on a thread of its own, when the process gets one of `signals`; main thread only.

    `with stop_on_signals(pipeline.stop): pipeline.run(camera)` ends the loop, answers what is inside, and goes on after
    the `with`. A second signal does what it did before: it ends a process that hangs. Raises InputError elsewhere.
    """
    if threading.current_thread() is not threading.main_thread():
        raise InputError("signals can only be handled in the main thread", "", "enter this in the main thread")
    reader, writer = os.pipe()
    before = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, _: Any) -> None:
        # Nothing but a write: the main thread may hold any lock at this moment.
        for each, old in before.items():
            signal.signal(each, old if old is not None else signal.SIG_DFL)
        os.write(writer, b"x")

    def wait() -> None:
        if os.read(reader, 1) == b"x":
            stop()

    thread = threading.Thread(target=wait, name="igate signals", daemon=True)
    thread.start()
    try:
        for number in signals:
            signal.signal(number, handle)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)
        os.close(writer)
        thread.join(STOP_S)
        if not thread.is_alive():  # else `stop` hangs, and the process must end all the same
            os.close(reader)


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """No pauses by the garbage collector inside: what lives is taken out of its sight, and it is switched off.

    The pipeline makes no cycles, so nothing piles up; a sink that makes some should call `gc.collect` now and then.
    Process-wide, so a program decides on it and not the pipeline. Afterwards all is as before.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
