"""What a robot's perception is doing now: times of every stage, a verdict against the budget, and likely causes."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..contract import is_number
from ..errors import InputError
from .drift import Drift
from .histogram import Histogram
from .monitor_causes import Load, Look, as_json, clocks, low_clock, other_load, other_share, read_load, throttling

if TYPE_CHECKING:
    from .device import State
    from .frame import Result

#: Frames that a verdict may look back on: all of them are looked through for every verdict.
MOST_WINDOW = 1_000_000
#: Levels of a verdict with their numbers in diagnostic_msgs/DiagnosticStatus.
LEVELS = {"OK": 0, "WARN": 1, "ERROR": 2, "STALE": 3}
#: p99 from this share of the budget on is a warning.
WARN_SHARE = 0.8
#: More than one missed deadline, and more than this share of the window, is an error.
MISS_SHARE = 0.001
#: Frames in a row that miss their deadline before an alarm is raised.
STREAK = 5
#: Without a frame for this many periods (or seconds, where no period is known) the answers are stale.
STALE_PERIODS, STALE_S = 5.0, 2.0
#: Seconds for which an error shows in the verdict.
ERROR_S = 10.0
#: Seconds between two looks at the board, and between two images that are looked at for drift.
LOOK_S, INSPECT_S = 0.5, 0.5
#: Looks that are kept: events are counted since the oldest; and those over which other programs' load is averaged.
LOOKS, LOAD_LOOKS = 16, 8
#: A drift score that was high is news again once it fell below this.
DRIFT_ENDS = 0.8
#: Frames that set what is normal at the start, and those that are compared with them.
START, RECENT = 64, 32
#: A stage grew when its median rose by this factor and by this many milliseconds.
GREW, GREW_MS = 1.5, {"age": 10.0, "infer": 0.5}


@dataclass(frozen=True)
class Verdict:
    """level: "OK", "WARN", "ERROR" or "STALE"; sentence: why, in words; hints: likely causes.

    A hint begins with its cause: "throttling:", "clock:", "capture:", "input:" or "load:".
    """

    level: str
    sentence: str
    hints: tuple[str, ...] = ()


class Monitor:
    """Collects times, counts and images' statistics of one pipeline; all methods may be called from any thread.

    budget_ms: what `end_to_end` may take; a frame above it missed its deadline. period_ms: the camera's period.
    window: frames that the verdict looks back on. reference: the bundle's manifest["reference"], else drift is unknown.
    state: reads the board (`runtime.device.read_state`); called at most twice a second, never from `frame`; where it
    raises, the board is unknown and "look_failed" is counted. clock: seconds. `on_alarm(reason)` is called, on the
    thread that noticed and outside any lock, when STREAK deadlines in a row were missed, when drift becomes high, and
    on an event "error" or "error/...". Raises InputError for numbers that are no budget, period or window, and for a
    reference that cannot be read.

    >>> monitor = Monitor(budget_ms=10.0)
    >>> monitor.verdict()
    Verdict(level='STALE', sentence='no frame was answered yet', hints=())
    """

    def __init__(
        self,
        budget_ms: float | None = None,
        *,
        period_ms: float | None = None,
        window: int = 512,
        reference: Mapping[str, Any] | None = None,
        state: Callable[[], State] | None = None,
        load: Callable[[], Load | None] = read_load,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("budget", budget_ms), ("period", period_ms)):
            if value is not None and not (is_number(value) and value > 0):
                raise InputError(f"not a {name} in milliseconds", f"{value!r:.40}", "pass a number above 0, or None")
        if not isinstance(window, int) or not 8 <= window <= MOST_WINDOW:
            fix = f"pass a whole number of frames, 8 to {MOST_WINDOW:,}"
            raise InputError("not a window", f"{window!r:.40}", fix)
        self.budget_ms, self.period_ms, self.window = budget_ms, period_ms, window
        self.on_alarm: Callable[[str], object] | None = None
        self._state, self._load, self._clock = state, load, clock
        self._lock = threading.Lock()
        self._stages: dict[str, Histogram] = {}
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=window)  # time, end to end, infer
        self._start: dict[str, list[float]] = {name: [] for name in GREW_MS}
        self._last: dict[str, deque[float]] = {name: deque(maxlen=RECENT) for name in GREW_MS}
        self._counts: Counter[str] = Counter()
        self._misses = self._streak = self._longest = 0
        self._error_at, self._error = -math.inf, ""
        self._drift = Drift(reference)
        self._next_inspect, self._drifted = -math.inf, False
        self._begun, self._frames = clock(), 0
        self._highest: dict[str, float] = {}
        # The oldest of the looks is what the newest is compared with.
        self._looks: deque[Look] = deque(maxlen=LOOKS)
        self._look()

    def frame(self, result: Result) -> None:
        """Count one answered frame and its milliseconds by stage (see Result.ms); takes some microseconds."""
        now, alarm = self._clock(), ""
        total, infer = result.ms.get("end_to_end", math.nan), result.ms.get("infer", math.nan)
        with self._lock:
            for name, ms in result.ms.items():
                stage = self._stages.get(name)
                if stage is None:
                    stage = self._stages[name] = Histogram()
                stage.add(ms)
            for name, start in self._start.items():
                ms = result.ms.get(name, math.nan)
                if ms == ms:
                    (start if len(start) < START else self._last[name]).append(ms)
            self._recent.append((now, total, infer))
            self._frames += 1
            if self.budget_ms is not None and total > self.budget_ms:
                self._misses += 1
                self._streak += 1
                self._longest = max(self._longest, self._streak)
                if self._streak == STREAK:
                    alarm = f"deadline: {STREAK} frames in a row took more than {self.budget_ms:g} ms"
            else:
                self._streak = 0
        self._raise(alarm)

    def count(self, event: str, n: int = 1) -> None:
        """Count `n` events: "received", "dropped", "stale", "refused/REASON", "error/KIND", or any other name."""
        if not isinstance(event, str) or type(n) is not int:
            raise InputError("not an event", f"{event!r:.40}, {n!r:.40} times", "pass a name and a whole number")
        error = event == "error" or event.startswith("error/")
        with self._lock:
            self._counts[event] += n
            if error and n > 0:
                self._error_at, self._error = self._clock(), event
        self._raise(f"error: {event.partition('/')[2] or 'of the pipeline'}" if error and n > 0 else "")

    def inspect(self, image: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
        """Compare an image (uint8 RGB [H,W,3]) and its decoded outputs with the reference, at most twice a second.

        Takes about a millisecond then, and no time otherwise; raises InputError for what is no image.
        """
        if self._drift.reference is None:
            return
        now = self._clock()
        with self._lock:
            if now < self._next_inspect:
                return
            self._next_inspect = now + INSPECT_S
        values = self._drift.measure(image, outputs)
        alarm = ""
        with self._lock:
            self._drift.add(values)
            score = self._drift.score()
            if score.value >= 1 and not self._drifted:
                alarm = f"drift: {score.sentence()}"
            # Once high it must fall well below the limit before it can be news again.
            self._drifted = score.value >= (DRIFT_ENDS if self._drifted else 1)
        self._raise(alarm)

    def verdict(self) -> Verdict:
        """How the last `window` frames stand against the budget, and why; the worst concern decides the level."""
        self._look()
        with self._lock:
            return self._judge(self._clock())

    def concerns(self) -> dict[str, tuple[str, str]]:
        """{"frames", "latency", "errors", "input"}: (level, sentence); their worst is the verdict's level."""
        with self._lock:
            return self._concerns(self._clock())

    def snapshot(self) -> dict[str, Any]:
        """Everything as JSON values, None where unknown.

        Keys: uptime_s, frames, fps, budget_ms, period_ms, verdict, stages (per stage: Histogram.summary and
        cumulative "buckets"), window (frames, p50, p99, max of end_to_end), deadline, counts, drift, device.
        """
        self._look()
        with self._lock:
            now = self._clock()
            verdict, score, look = self._judge(now), self._drift.score(), self._looks[-1]
            totals = self._totals()
            drift = {
                "status": score.status,
                "score": score.value if score.value == score.value else None,
                "features": score.parts,
                "outside_range": self._drift.latest("saturation/"),
                "inspected": self._drift.inspected,
            }
            device: dict[str, Any] = {**as_json(look.state), "other_load": self._other()}
            return {
                "uptime_s": now - self._begun,
                "frames": self._frames,
                "fps": self._fps(),
                "budget_ms": self.budget_ms,
                "period_ms": self.period_ms,
                "verdict": {"level": verdict.level, "sentence": verdict.sentence, "hints": list(verdict.hints)},
                "stages": {
                    name: {**stage.summary(), "buckets": stage.cumulative()} for name, stage in self._stages.items()
                },
                "window": _window(totals),
                "deadline": {"misses": self._misses, "streak": self._streak, "longest_streak": self._longest},
                "counts": dict(self._counts),
                "drift": drift,
                "device": device,
            }

    def _judge(self, now: float) -> Verdict:
        concerns = self._concerns(now)
        worst = sorted(concerns.values(), key=lambda concern: -LEVELS[concern[0]])
        level = worst[0][0]
        if level == "OK":
            return Verdict("OK", concerns["latency"][1])
        said = "; ".join(sentence for concern, sentence in worst if concern != "OK")
        return Verdict(level, said, () if not self._frames else self._hints())

    def _concerns(self, now: float) -> dict[str, tuple[str, str]]:
        return {
            "frames": self._arrivals(now),
            "latency": self._latency(),
            "errors": self._errors(now),
            "input": self._input(),
        }

    def _arrivals(self, now: float) -> tuple[str, str]:
        if not self._recent:
            return "STALE", "no frame was answered yet"
        limit = STALE_S if self.period_ms is None else STALE_PERIODS * self.period_ms / 1e3
        silent = now - self._recent[-1][0]
        if silent > limit:
            return "STALE", f"no frame was answered for {silent:.1f} s"
        grown = self._grown("age")
        if grown is not None:
            return "WARN", f"frames are {grown[1]:.0f} ms old when they arrive, {grown[0]:.0f} ms at the start"
        fps = self._fps()
        return "OK", f"{fps:.1f} frames a second" if fps is not None else "frames arrive"

    def _latency(self) -> tuple[str, str]:
        totals = self._totals()
        if not totals.size:
            return "OK", "no frame was timed yet"
        p99, frames = float(np.percentile(totals, 99)), len(totals)
        if self.budget_ms is None:
            grown = self._grown("infer")
            if grown is not None:
                return "WARN", f"inference takes {grown[1]:.2f} ms, {grown[0]:.2f} ms at the start"
            return "OK", f"p99 {p99:.1f} ms over {frames} frames; no budget is set"
        share, missed = p99 / self.budget_ms, int((totals > self.budget_ms).sum())
        said = f"p99 {p99:.1f} ms is {share:.0%} of the budget of {self.budget_ms:g} ms over {frames} frames"
        if missed:
            said += f", {missed} missed it"
        if share > 1 or (missed > 1 and missed > MISS_SHARE * frames):
            return "ERROR", said
        return ("WARN" if share >= WARN_SHARE or missed else "OK"), said

    def _errors(self, now: float) -> tuple[str, str]:
        if now - self._error_at > ERROR_S:
            return "OK", "none"
        where = self._error.partition("/")[2]
        return "ERROR", f"an error{' in ' + where if where else ''}, {now - self._error_at:.0f} s ago"

    def _input(self) -> tuple[str, str]:
        score = self._drift.score()
        if score.status == "high":
            return "WARN", f"the input is {score.sentence()}"
        if score.status == "low":
            return "OK", f"drift score {score.value:.2f}, the limit is 1"
        why = "too few frames yet" if self._drift.reference else "the bundle holds no reference statistics"
        return "OK", f"drift is unknown: {why}"

    def _hints(self) -> tuple[str, ...]:
        first, last = self._looks[0], self._looks[-1]
        age, score = self._grown("age"), self._drift.score()
        found = [
            throttling(first.state, last.state),
            low_clock(last.state, self._highest),
            f"capture: frames are {age[1]:.0f} ms old on arrival, {age[0]:.0f} ms at the start" if age else "",
            f"input: {score.sentence()}" if score.status == "high" else "",
            other_load(self._other(), last.state, self._infer_share()),
        ]
        return tuple(hint for hint in found if hint)

    def _look(self) -> None:
        """Read the board and the processor's accounts, at most once in LOOK_S, outside the lock: files are slow."""
        now = self._clock()
        with self._lock:
            if self._looks and now - self._looks[-1].at < LOOK_S:
                return
        state = load = None
        try:
            state = self._state() if self._state is not None else None
            load = self._load()
        except Exception:  # a board's file that nobody foresaw must not silence verdict, watchdog and scrapes
            with self._lock:
                self._counts["look_failed"] += 1
        look = Look(now, state, load)
        with self._lock:
            self._looks.append(look)
            for name, (current, _) in clocks(look.state).items():
                self._highest[name] = max(self._highest.get(name, 0.0), current)

    def _other(self) -> float | None:
        """Other programs' share of our cores over the last few looks."""
        recent = list(self._looks)[-LOAD_LOOKS:]
        return other_share(recent[0].load, recent[-1].load)

    def _infer_share(self) -> float | None:
        if len(self._recent) < 2 or self._recent[-1][0] <= self._recent[0][0]:
            return None
        spent = sum(infer for _, _, infer in list(self._recent)[1:] if infer == infer)
        return min(spent / 1e3 / (self._recent[-1][0] - self._recent[0][0]), 1.0)

    def _fps(self) -> float | None:
        if len(self._recent) < 2 or self._recent[-1][0] <= self._recent[0][0]:
            return None
        return (len(self._recent) - 1) / (self._recent[-1][0] - self._recent[0][0])

    def _totals(self) -> np.ndarray:
        totals = np.array([total for _, total, _ in self._recent])
        return totals[np.isfinite(totals)] if totals.size else totals

    def _grown(self, stage: str) -> tuple[float, float] | None:
        """(median at the start, median now) of a stage that takes longer than it did, else None."""
        start, last = self._start[stage], self._last[stage]
        if len(last) < RECENT:
            return None
        before, now = statistics.median(start), statistics.median(last)
        return (before, now) if now > GREW * before and now - before > GREW_MS[stage] else None

    def _raise(self, reason: str) -> None:
        if not reason or self.on_alarm is None:
            return
        try:
            self.on_alarm(reason)
        except Exception:  # a recorder on a full disk must not stop the pipeline that reports it
            with self._lock:
                self._counts["alarm_failed"] += 1


def budget_ms(manifest: Mapping[str, Any]) -> float | None:
    """A bundle's own budget where it is one of milliseconds: a ratio says nothing about one frame.

    >>> budget_ms({"budget": {"kind": "Budget", "ms": 4}}), budget_ms({"budget": {"ratio": 1.3}}), budget_ms({})
    (4.0, None, None)
    """
    budget = manifest.get("budget")
    value: Any = budget.get("ms") if isinstance(budget, Mapping) else None
    return float(value) if is_number(value) and value > 0 else None


def _window(totals: np.ndarray) -> dict[str, Any]:
    values = {"p50": 50, "p99": 99, "max": 100}
    return {"frames": len(totals)} | {
        name: float(np.percentile(totals, share)) if len(totals) else None for name, share in values.items()
    }
