"""Why a robot's frames are late, as far as the board and the processor's accounts tell."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .device import State

#: A clock below this share of its reference is a cause.
CLOCK_SHARE = 0.9
#: Other programs' share of the cores that this process may use, or of the GPU, from which on they are a cause.
OTHER_SHARE = 0.25


@dataclass(frozen=True)
class Load:
    """Seconds of processor time since some moment: on all cores this process may use, busy, and its own."""

    cores: int
    total: float
    busy: float
    own: float


@dataclass(frozen=True)
class Look:
    """What was read of the board and the processor at one moment of the monitor's clock."""

    at: float
    state: State | None
    load: Load | None


def read_load(root: Path = Path("/")) -> Load | None:
    """The kernel's accounts of the cores this process may run on; None where it keeps none (no Linux)."""
    try:
        text = (root / "proc/stat").read_text()
        mine = os.sched_getaffinity(0)
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return None
    total = busy = 0.0
    cores = 0
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        if not name.startswith("cpu") or not name[3:].isdigit() or int(name[3:]) not in mine:
            continue
        # user nice system idle iowait irq softirq steal; guests are in user already.
        fields = [int(value) for value in rest.split()[:8]]
        cores, total = cores + 1, total + sum(fields)
        busy += sum(fields) - sum(fields[3:5])
    return Load(cores, total / ticks, busy / ticks, time.process_time()) if cores else None


def other_share(before: Load | None, after: Load | None) -> float | None:
    """Share of the cores (0..1) that other programs took between two readings; None where nobody can tell.

    >>> other_share(Load(2, 0.0, 0.0, 0.0), Load(2, 20.0, 15.0, 5.0))
    0.5
    """
    if before is None or after is None or after.total - before.total <= 0:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return min(max(others / (after.total - before.total), 0.0), 1.0)


def throttling(first: State | None, last: State | None) -> str:
    """A sentence when the throttling counter rose between two looks, or a throttling device stepped in, else ""."""
    if first is None or last is None:
        return ""
    before, after = first.throttle_events, last.throttle_events
    if before is not None and after is not None and after > before:
        return f"throttling: the board's counter of throttling events rose by {after - before}"
    stepped = [name for name, step in last.cooling.items() if step > first.cooling.get(name, step)]
    return f"throttling: {', '.join(stepped)} stepped in against heat" if stepped else ""


def low_clock(state: State | None, highest: Mapping[str, float]) -> str:
    """A sentence when the GPU or the CPU runs below CLOCK_SHARE of its reference, else "".

    highest: {"GPU" or "CPU": the highest Hz of `clocks` seen so far}; the GPU's mode may promise more.
    """
    for name, (current, promised) in clocks(state).items():
        reference = max(highest.get(name, 0.0), promised)
        if current < CLOCK_SHARE * reference:
            return f"clock: the {name} runs at {current / 1e6:.0f} MHz, its reference is {reference / 1e6:.0f} MHz"
    return ""


def clocks(state: State | None) -> dict[str, tuple[float, float]]:
    """{"GPU" or "CPU": (current, promised)} in Hz; promised: the power mode's cap, or else the highest allowed clock.

    A CPU promises nothing: its idle cores run slowly, so it is held against what was seen of it before.
    """
    found = {}
    if state is not None and state.gpu_hz is not None:
        _, most, current = state.gpu_hz
        # A mode's name promises its cap, whatever the driver allows now (cases L5).
        cap = (state.power_mode.gpu_max_hz if state.power_mode is not None else None) or 0
        found["GPU"] = (float(current), float(max(most, cap)))
    if state is not None and state.cpu_khz is not None:
        found["CPU"] = (state.cpu_khz[2] * 1e3, 0.0)
    return found


def other_load(cores: float | None, state: State | None, infer_share: float | None) -> str:
    """A sentence when other programs take OTHER_SHARE of the cores or of the GPU, else "".

    infer_share: share of the time (0..1) that this process was inside inference.
    """
    if cores is not None and cores >= OTHER_SHARE:
        return f"load: other programs take {cores:.0%} of the cores that this one may use"
    gpu = getattr(state, "gpu_load", None)
    if gpu is not None and infer_share is not None and gpu - infer_share >= OTHER_SHARE:
        return f"load: the GPU is busy {gpu:.0%} of the time, inference accounts for at most {infer_share:.0%}"
    return ""


def as_json(state: State | None) -> dict[str, Any]:
    """What exporters show of a board; absent values are left out, never 0."""
    if state is None:
        return {}
    mode = state.power_mode
    shown: dict[str, Any] = {
        "power_mode": mode.name if mode is not None else None,
        "gpu_hz": state.gpu_hz[2] if state.gpu_hz is not None else None,
        "cpu_hz": state.cpu_khz[2] * 1000 if state.cpu_khz is not None else None,
        "emc_hz": state.emc_hz,
        "gpu_load": state.gpu_load,
        "locked": state.locked,
        "throttle_events": state.throttle_events,
        "temperatures": dict(state.temperatures) or None,
        "rails_mw": dict(state.rails_mw) or None,
    }
    return {name: value for name, value in shown.items() if value is not None}
