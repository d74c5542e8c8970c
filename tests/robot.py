"""What tests of the robot side share: an engine whose answer names its frame, and a monitor that can be waited for."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from igate_edge.contract import OutputSpec, Preprocess
from igate_edge.runtime.frame import Frame, Result

#: Seconds after which a test gives up; only a failing one waits so long.
PATIENCE = 20.0


def numbered(number: int, size: tuple[int, int] = (6, 8), **fields: object) -> Frame:
    """A frame whose pixels all are `number` (0..255), stamped as many milliseconds after the first second."""
    pixels = np.full((*size, 3), number, np.uint8)
    return Frame(pixels, stamp_ns=1_000_000_000 + number * 1_000_000, **fields)  # type: ignore[arg-type]


class Echo:
    """An engine that says which frame it saw: the depth of frame `n` is n + 1 metres everywhere."""

    def __init__(self, preprocess: Preprocess = Preprocess(4, 4)) -> None:  # noqa: B008  frozen
        self.preprocess = preprocess
        self.tasks = (OutputSpec("far", "depth", 1), OutputSpec("kind", "semseg", 3))
        self.calls = 0
        self.closed = False

    def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self.calls += 1
        number = image[:, :1, :2, :2] * 255
        return {"far": np.log(number + 1), "kind": np.concatenate([number * 0, number, number - 0.5], axis=1)}

    def close(self) -> None:
        self.closed = True


class Gated(Echo):
    """Waits in every call until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self.entered.release()
        assert self.go.acquire(timeout=PATIENCE)
        return super().infer(image)


class Notes:
    """A monitor that remembers what it is told; `wait` sleeps until an event came so often."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.results: list[Result] = []
        self._changed = threading.Condition()

    def frame(self, result: Result) -> None:
        with self._changed:
            self.results.append(result)
            self.events["frame"] += 1
            self._changed.notify_all()

    def count(self, event: str, n: int = 1) -> None:
        with self._changed:
            self.events[event] += n
            self._changed.notify_all()

    def inspect(self, image: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
        assert image.dtype == np.uint8 and set(outputs) <= {"far", "kind"}

    def wait(self, event: str, times: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.events[event] >= times, PATIENCE), (event, self.events)


def check_whole(result: Result) -> int:
    """The frame's number; fails unless image, every answer and the stamp are all of that one frame."""
    number = int(result.image.flat[0])
    assert (result.image == number).all(), "a torn image"
    assert result.stamp_ns == 1_000_000_000 + number * 1_000_000, "a stamp of another frame"
    if "far" in result.outputs:
        np.testing.assert_allclose(result.outputs["far"], number + 1, rtol=1e-4, err_msg="an answer of another frame")
    if "kind" in result.outputs:
        assert (result.outputs["kind"] == (number > 0)).all()
    return number


class Gate:
    """A stage, or a callback, that stands still with each item until it is let go."""

    def __init__(self) -> None:
        self._came, self._go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, *_: object) -> bool:
        self._came.release()
        assert self._go.acquire(timeout=PATIENCE)
        return True

    def wait(self) -> None:
        assert self._came.acquire(timeout=PATIENCE)

    def go(self, times: int = 1) -> None:
        self._go.release(times)


def through(item: object) -> bool:
    """A stage that lets everything pass."""
    return True


def wait_for(condition: Callable[[], bool]) -> bool:
    """True once it holds, which nothing announces."""
    ended = threading.Event()
    return any(condition() or ended.wait(PATIENCE / 1000) for _ in range(1000))


@contextlib.contextmanager
def service_manager(path: Path, patience_s: float = PATIENCE) -> Iterator[socket.socket]:
    """What `NOTIFY_SOCKET` names: systemd's side of its protocol."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(patience_s)
        yield manager
