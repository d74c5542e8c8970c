"""A benchmark that can be judged later: the samples, on what board, in which mode, how hot, and of which engine."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import InputError
from ..plaindata import plain_json
from .device import Device, PowerMode, State, capped, read_device, read_state, swap_used_mb
from .device_state import total_mw

SCHEMA = 1
#: Seconds between two looks at temperatures and power while samples are taken.
LOOK_S = 0.5
#: The slowest camera, or deadline, that anybody means, ms.
LONGEST_MS = 60_000.0
T = TypeVar("T")


@dataclass(frozen=True)
class EngineFacts:
    """What was timed. sha256: of the engine file. input: [N,C,H,W]. calibration: digest of the frames that set ranges.

    flags: build options by name. memory, graph, aux_streams: how it ran, None where the backend has no such thing.
    """

    sha256: str
    backend: str
    version: str
    precision: str
    tasks: tuple[str, ...]
    input: tuple[int, ...]
    flags: dict[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    memory: str | None = None
    graph: bool | None = None
    aux_streams: int | None = None


@dataclass(frozen=True)
class Record:
    """One measurement. samples_ms: every frame in order, warm_up frames before them left out.

    versions: of cuda, driver, igate_edge, git; None where unknown. machine: the processor, as `cache.fingerprint`.
    hottest: Celsius by zone while it ran. input_mw: readings of the module's power. period_ms: the camera's pace, None
    for back to back. budget_ms: the deadline of a frame. clock: what timed. taken: UTC, ISO 8601.
    """

    taken: str
    device: Device
    machine: dict[str, Any]
    versions: dict[str, str | None]
    engine: EngineFacts
    before: State
    after: State
    samples_ms: tuple[float, ...]
    warm_up: int
    hottest: dict[str, float] = field(default_factory=dict)
    input_mw: tuple[float, ...] = ()
    period_ms: float | None = None
    budget_ms: float | None = None
    swap_used_mb: int | None = None
    clock: str = "perf_counter"
    schema: int = SCHEMA

    def as_json(self) -> dict[str, Any]:
        """Everything, with what follows from it: "summary", "provisional" and "fingerprint"."""
        derived = {"summary": summary(self), "provisional": provisional(self), "fingerprint": fingerprint(self)}
        return plain_json({**dataclasses.asdict(self), **derived})


def take(
    run: Callable[[], object],
    engine: EngineFacts,
    *,
    machine: Mapping[str, Any],
    versions: Mapping[str, str | None],
    frames: int = 300,
    warm_up: int = 30,
    period_ms: float | None = None,
    budget_ms: float | None = None,
    root: Path = Path("/"),
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> Record:
    """Time `run`, which must end when the answer is there, and keep the conditions. clock: seconds.

    A late frame starts the next one at once, as a camera's newest frame does. Raises InputError for no frames, and for
    a pace or budget that is none.
    """
    if frames < 1 or warm_up < 0:
        raise InputError("a record needs frames", f"{frames} frames, {warm_up} to warm up", "give 1 or more")
    for what, ms in (("pace", period_ms), ("budget", budget_ms)):
        if ms is not None and not 0 < ms <= LONGEST_MS:
            raise InputError(f"not a {what}", f"{ms} ms a frame", f"give more than 0, up to {LONGEST_MS:.0f} ms")
    for _ in range(warm_up):
        run()
    before, looked = read_state(root), clock()
    hottest, power, samples = dict(before.temperatures), [total_mw(before.rails_mw)], list[float]()
    due = clock()
    for _ in range(frames):
        if period_ms is not None:
            if (wait := due - clock()) > 0:
                sleep(wait)
            due = max(due + period_ms / 1e3, clock())
        start = clock()
        run()
        end = clock()
        samples.append((end - start) * 1e3)
        if end - looked >= LOOK_S:
            seen, looked = read_state(root), end
            hottest, power = _hotter(hottest, seen.temperatures), [*power, total_mw(seen.rails_mw)]
    after = read_state(root)
    return Record(
        taken=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        device=read_device(root),
        machine=dict(machine),
        versions=dict(versions),
        engine=engine,
        before=before,
        after=after,
        samples_ms=tuple(samples),
        warm_up=warm_up,
        hottest=_hotter(hottest, after.temperatures),
        input_mw=tuple(value for value in (*power, total_mw(after.rails_mw)) if value is not None),
        period_ms=period_ms,
        budget_ms=budget_ms,
        swap_used_mb=swap_used_mb(root),
        clock=getattr(clock, "__name__", "a clock"),
    )


def _hotter(first: dict[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {zone: max(first.get(zone, -math.inf), second.get(zone, -math.inf)) for zone in {**first, **second}}


def summary(record: Record) -> dict[str, Any]:
    """Percentiles in ms, jitter (p99 - p50), misses of the budget, throttle events meanwhile, power and energy.

    energy_mj: millijoules of the module for each frame, idle time between paced frames included.
    """
    times = np.array(record.samples_ms)
    found = {f"p{q:g}": float(np.percentile(times, q)) for q in (50, 90, 99, 99.9)}
    events = (record.before.throttle_events, record.after.throttle_events)
    mean_mw = float(np.mean(record.input_mw)) if record.input_mw else None
    frame_ms = float(times.mean()) if record.period_ms is None else max(record.period_ms, float(times.mean()))
    return {
        "frames": len(times),
        **found,
        "max": float(times.max()),
        "mean": float(times.mean()),
        "jitter": found["p99"] - found["p50"],
        "misses": None if record.budget_ms is None else int((times > record.budget_ms).sum()),
        "throttled": None if events[0] is None or events[1] is None else events[1] - events[0],
        "mean_mw": mean_mw,
        "max_mw": max(record.input_mw, default=None),
        "energy_mj": None if mean_mw is None else mean_mw * frame_ms / 1e3,
    }


def provisional(record: Record) -> list[str]:
    """Why the times say nothing final: one sentence each; empty only where clocks were locked and held.

    What cannot be read counts as not verified, never as good.
    """
    before, after = record.before, record.after
    locked = {True: "", False: "the clocks were not locked", None: "whether the clocks were locked is unverified"}
    states = [locked[state.locked] for state in (before, after)]
    reasons = [next(filter(None, states), ""), capped(after) or capped(before)]
    events = summary(record)["throttled"]
    reasons.append(f"{events} over-current event(s) meanwhile" if events else "")
    reasons.append(f"{', '.join(after.cooling)} held clocks back" if after.cooling else "")
    reasons.append("" if before.power_mode == after.power_mode else "the power mode changed meanwhile")
    return [reason for reason in reasons if reason]


def fingerprint(record: Record) -> dict[str, Any]:
    """What two records must share to be compared. Clock limits are the real ones: a mode's name is only a label."""
    device, state, engine = record.device, record.after, record.engine
    mode = state.power_mode
    found: dict[str, Any] = {
        "backend": engine.backend,
        "backend_version": engine.version,
        "precision": engine.precision,
        "input": list(engine.input),
        "tasks": list(engine.tasks),
        "flags": engine.flags,
        "paced": record.period_ms,
    }
    if not device.jetson:
        return {**found, "machine": record.machine}
    return {
        **found,
        "board": device.board,
        "module": device.module,
        "l4t": device.l4t,
        "power_mode": mode.name if mode else None,
        "tpc_mask": mode.tpc_mask if mode else None,
        "gpu_max_hz": state.gpu_hz[1] if state.gpu_hz else None,
        "cpu_max_khz": state.cpu_khz[1] if state.cpu_khz else None,
        "locked": state.locked,
    }


def differences(here: Record, there: Record) -> list[str]:
    """Why two records are not comparable, one phrase each; what one of them does not know is one too."""
    ours, theirs = plain_json(fingerprint(here)), plain_json(fingerprint(there))
    found = []
    for name in {**ours, **theirs}:
        mine, other = ours.get(name), theirs.get(name)
        if mine != other:
            found.append(f"{name}: {mine} here, {other} there")
        elif mine is None and name != "paced":
            found.append(f"{name}: unverified in both")
    return found


def require_comparable(here: Record, there: Record, force: bool = False) -> list[str]:
    """The differences of two records; InputError when there are any, unless forced."""
    found = differences(here, there)
    if found and not force:
        fix = "measure both on one board in one mode with locked clocks, or say that you know better (force)"
        raise InputError(f"the record of {there.taken} is not comparable", "; ".join(found), fix)
    return found


def parse(data: bytes | str) -> Record:
    """A record from its JSON; InputError for anything else, or a newer schema."""
    try:
        value = json.loads(data)
        schema = value["schema"]
        if schema != SCHEMA:
            evidence = f"schema {schema!r:.40}, this igate_edge knows {SCHEMA}"
            raise InputError("a benchmark record of another schema", evidence, "pip install --upgrade igate-edge")
        states = {name: _state(value[name]) for name in ("before", "after")}
        made = {"device": _make(Device, value["device"]), "engine": _make(EngineFacts, value["engine"])}
        record = _make(Record, {**value, **states, **made})
        if not record.samples_ms or not all(math.isfinite(sample) and sample >= 0 for sample in record.samples_ms):
            raise ValueError("its samples are no times")
        record.as_json()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        evidence = f"{type(error).__name__}: {error}"[:200]
        raise InputError("not a benchmark record", evidence, "pass a file that `igate jetson record` wrote") from error
    return record


def _state(value: Mapping[str, Any]) -> State:
    mode = value["power_mode"]
    return _make(State, {**value, "power_mode": None if mode is None else _make(PowerMode, mode)})


def _make(kind: type[T], value: Mapping[str, Any]) -> T:
    """A dataclass from a JSON object: lists become tuples, names of a later version are left out."""
    known = {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items() if name in known}
    return kind(**given)
