"""What /diagnostics says of a node: one status per concern, each with the sentence that a person would want."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

from igate_edge.robotics.messages import Status

OK, WARN, ERROR = 0, 1, 2
#: No image for this many periods, or for these seconds where the camera's rate is not known, is a fault.
LOST_PERIODS, LOST_S = 5.0, 2.0
#: Seconds for which a missed deadline and a refused image show.
SHOWN_S = 10.0


class Health:
    """Collects what happened to a node's inputs and topics. All methods may be called from any thread.

    clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._begun, self._last = clock(), -1.0
        self._counts: Counter[str] = Counter()
        self._refused, self._refused_at = "", -1.0
        self._incompatible: dict[str, str] = {}
        self._deadlines: dict[str, tuple[int, float]] = {}

    def begin(self) -> None:
        """The node was activated: from now on images are expected."""
        with self._lock:
            self._begun, self._last = self._clock(), -1.0

    def image(self) -> None:
        """An image arrived."""
        with self._lock:
            self._last = self._clock()
            self._counts["images"] += 1

    def unwatched(self) -> None:
        """An image arrived and nobody listens to any answer."""
        with self._lock:
            self._counts["unwatched"] += 1

    def refused(self, reason: str) -> None:
        """An image could not be taken."""
        with self._lock:
            self._counts["refused"] += 1
            self._refused, self._refused_at = reason, self._clock()

    def event(self, topic: str, kind: str, sentence: str) -> bool:
        """A QoS event of `topic`; true when it is news that belongs in the log."""
        with self._lock:
            if kind == "deadline":
                missed = self._deadlines.get(topic, (0, 0.0))[0]
                self._deadlines[topic] = missed + 1, self._clock()
                return False
            news = self._incompatible.get(topic) != sentence
            self._incompatible[topic] = sentence
            return news

    def counts(self) -> dict[str, int]:
        """images, unwatched, refused: since the node was made."""
        with self._lock:
            return dict(self._counts)

    def input_status(self, topic: str, publishers: int, fps: float) -> Status:
        """Whether images come; `publishers`: how many offer `topic`."""
        with self._lock:
            now, counts, refused = self._clock(), dict(self._counts), self._refused
            refused_now = self._refused_at >= self._last > 0
            refused_lately = bool(refused) and now - self._refused_at < SHOWN_S
            since = now - max(self._begun, self._last)
            incompatible = self._incompatible.get(topic, "")
        values = {"topic": topic, "publishers": str(publishers), "refused last": refused}
        values |= {name: str(counts.get(name, 0)) for name in ("images", "unwatched", "refused")}
        if since > (LOST_PERIODS / fps if fps > 0 else LOST_S):
            why = incompatible or ("nobody publishes it" if not publishers else "its publisher sends nothing")
            return Status(ERROR, "input", f"no image for {since:.1f} s on {topic}: {why}", values)
        if refused_now:
            return Status(ERROR, "input", f"the last image could not be taken: {refused}", values)
        if refused_lately:
            return Status(WARN, "input", f"{counts['refused']} images could not be taken, the last: {refused}", values)
        return Status(OK, "input", "images arrive", values)

    def qos_status(self) -> Status:
        """Subscribers and publishers that do not fit, and deadlines that were missed."""
        with self._lock:
            now, incompatible, deadlines = self._clock(), dict(self._incompatible), dict(self._deadlines)
        values = {f"{topic} incompatible": sentence for topic, sentence in incompatible.items()}
        values |= {f"{topic} deadlines missed": str(count) for topic, (count, _) in deadlines.items()}
        said = [f"{topic}: {sentence}" for topic, sentence in incompatible.items()]
        said += [f"{topic}: a deadline was missed" for topic, (_, at) in deadlines.items() if now - at < SHOWN_S]
        return Status(WARN if said else OK, "qos", "; ".join(said) or "every peer fits", values)


class Heartbeat:
    """Calls `beat` every `period_s` seconds on a thread of its own: no executor, loading or transition holds it up."""

    def __init__(self, beat: Callable[[], None], period_s: float) -> None:
        self._beat, self._period_s = beat, period_s
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="igate heartbeat", daemon=True)
        self._thread.start()

    def every(self, period_s: float) -> None:
        """The new period begins now."""
        with self._changed:
            self._period_s = period_s
            self._changed.notify_all()

    def close(self) -> None:
        """End after the beat that runs; twice is fine."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                woken = self._changed.wait(self._period_s)
                if self._closed:
                    return
            if not woken:
                self._beat()
