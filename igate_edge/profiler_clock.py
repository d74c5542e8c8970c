"""Whether the machine stood still while something was timed: a reference network, the core's share, clocks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .engines import onnxruntime as ort
from .errors import UnavailableError

#: A measurement is made again when the reference moved by more than this share of itself meanwhile,
MOST_MOVED = 0.06
#: when its two halves differ by more than this,
MOST_SPREAD = 0.06
#: or when the timed core was ours for less than this share of the time.
LEAST_SHARE = 0.5
#: Pauses in seconds before a measurement is made again.
PAUSES = (0.2, 1.0, 3.0, 5.0)
PULSE_RUNS = 40
#: What else runs on the machine only ever adds: this quantile of many runs is the time.
LOW = 0.2
#: Where Linux tells the clock of a core in kHz and the power mode; "performance" promises nothing, a limit does.
CLOCKS = {
    "governor": "cpufreq/scaling_governor",
    "clock_khz": "cpufreq/scaling_cur_freq",
    "clock_min_khz": "cpufreq/scaling_min_freq",
    "clock_max_khz": "cpufreq/scaling_max_freq",
}


@dataclass(frozen=True)
class Pulse:
    """The reference network just now: ms of a run, and the share of the time during which the core was ours."""

    ms: float
    share: float


@dataclass(frozen=True)
class Means:
    """How a profile reaches the machine. pulse: times the reference; nodes, whole: time a model by node, or models.

    nodes(model, runs) is `ort.node_times`; whole(models, runs) gives low-quantile ms of each, run in turn. close: gives
    back what is held.
    """

    pulse: Callable[[], Pulse]
    nodes: Callable[[bytes, int], list[ort.NodeTime]]
    whole: Callable[[list[bytes], int], list[float]]
    pause: Callable[[float], object] = time.sleep
    close: Callable[[], object] = lambda: None


class Session(Protocol):
    """An opened engine of any backend whose input is float32."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def run(self, image: np.ndarray) -> object: ...


def steady(measure: Callable[[], tuple[Any, float]], means: Means, what: str) -> tuple[Any, float, float]:
    """(result, spread, reference ms) of a measurement during which the machine stood still; else it is made again.

    measure: gives a result and the spread of its two halves. Raises UnavailableError with the last reason.
    """
    reason = ""
    for pause in (0.0, *PAUSES):
        if pause:
            means.pause(pause)
        before = means.pulse()
        result, spread = measure()
        after = means.pulse()
        share = min(before.share, after.share)
        if share < LEAST_SHARE:
            reason = f"the machine is under load: the timed core was ours for {share:.0%} of the time"
        elif abs(after.ms / before.ms - 1) > MOST_MOVED:
            reason = f"the clocks moved: the reference network took {before.ms:.2f}, then {after.ms:.2f} ms"
        elif spread > MOST_SPREAD:
            reason = f"two measurements of the same differ by {spread:.1%}, at most {MOST_SPREAD:.0%} are allowed"
        else:
            return result, spread, (before.ms + after.ms) / 2
    fix = "stop other programs, fix the clocks (governor, power mode), and go on with `igate profile --resume`"
    raise UnavailableError(f"the times of {what} are not steady", f"{reason}, {len(PAUSES) + 1} times", fix)


def on_this_machine(reference: bytes, threads: int) -> Means:
    """Means that time on this machine; the caller has pinned the process."""
    session, clock = ort.open(reference, threads), _clock(threads)

    def pulse() -> Pulse:
        start, used = time.perf_counter(), time.process_time()
        ms = beat(session, clock)
        share = (time.process_time() - used) / (time.perf_counter() - start)
        return Pulse(ms, min(share, 1.0))

    def whole(models: list[bytes], runs: int) -> list[float]:
        with contextlib.ExitStack() as stack:
            return in_turn([stack.enter_context(ort.open(model, threads)) for model in models], runs, clock)

    return Means(pulse, lambda model, runs: ort.node_times(model, runs, threads), whole, close=session.close)


def beat(session: Session, clock: Callable[[], float]) -> float:
    """Low-quantile ms of a network just now."""
    image, times = _noise(session), []
    for _ in range(PULSE_RUNS):
        begun = clock()
        session.run(image)
        times.append(clock() - begun)
    return float(np.quantile(times, LOW)) * 1e3


def _clock(threads: int) -> Callable[[], float]:
    """One thread is timed by its own clock, which stands still while another program has the core."""
    return time.thread_time if threads == 1 else time.perf_counter


def in_turn(sessions: Sequence[Session], runs: int, clock: Callable[[], float]) -> list[float]:
    """Low-quantile ms of networks run in turn: each finds its weights as cold as a robot's other work leaves them."""
    images = [_noise(session) for session in sessions]
    times = np.zeros((runs, len(sessions)))
    for row in range(-3, runs):
        for index, (session, image) in enumerate(zip(sessions, images, strict=True)):
            begun = clock()
            session.run(image)
            times[max(row, 0), index] = clock() - begun
    return [float(value) * 1e3 for value in np.quantile(times, LOW, axis=0)]


def _noise(session: Session) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(session.shape, np.float32)


def clocks(root: Path = Path("/sys")) -> dict[str, Any]:
    """Governor, clock and its limits, and the highest temperature; "unverified" where the system does not tell (L7)."""
    core = root / "devices/system/cpu/cpu0"
    found: dict[str, Any] = {name: _read(core / path) for name, path in CLOCKS.items()}
    degrees = [_read(path) for path in sorted((root / "class/thermal").glob("thermal_zone*/temp"))]
    known = [int(text) / 1e3 for text in degrees if text.lstrip("-").isdigit()]
    return {**found, "celsius": max(known) if known else "unverified"}


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip() or "unverified"
    except OSError:
        return "unverified"
