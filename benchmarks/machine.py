"""Which machine measured: kept in every result file, and the reason why results of two machines are not compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igate_edge.engines import onnxruntime as ort
from igate_edge.errors import InputError
from igate_edge.profiler_clock import clocks
from igate_edge.runtime import device
from igate_edge.runtime.cache import fingerprint

#: Where the result file of pytest-benchmark keeps it.
KEY = "igate"
#: Of what the system tells of its clocks, what stays between runs: the clock of a moment and the temperature do not.
LIMITS = ("governor", "clock_min_khz", "clock_max_khz")


def describe(root: Path = Path("/sys")) -> dict[str, Any]:
    """The machine: fingerprint and clock limits ("unverified" where the system does not tell), and the runtime."""
    return {"machine": {**fingerprint(), **limits(root), **board(root.parent)}, "runtime": ort.probe()}


def board(root: Path = Path("/")) -> dict[str, Any]:
    """A Jetson's board, L4T and power mode, and the clocks it really may have: a mode's name is a label only. {} else.

    What cannot be read is "unverified", which is no match for a number.
    """
    found, state = device.fingerprint(root), device.read_state(root)
    if not found:
        return {}
    locked = "unverified" if state.locked is None else state.locked
    real = "unverified" if state.gpu_hz is None else state.gpu_hz[1]
    return {"power_mode": "unverified", **found, "gpu_limit_hz": real, "clocks_locked": locked}


def limits(root: Path) -> dict[str, Any]:
    """Governor and clock limits of a processor; a name like "performance" promises nothing, a limit does (cases L5)."""
    found = clocks(root)
    return {name: found[name] for name in LIMITS}


def differences(here: Mapping[str, Any], there: Any) -> list[str]:
    """In which fields of `here` two machines differ, one phrase each; an absent description differs in everything.

    >>> differences({"cpu": "a", "cores": 2}, {"cpu": "a", "cores": 4})
    ['cores: 2 here, 4 there']
    """
    if not isinstance(there, Mapping) or not there:
        return ["there is no description of the other machine"]
    return [
        f"{name}: {value} here, {there.get(name, 'unknown')} there"
        for name, value in here.items()
        if there.get(name) != value
    ]


def refuse_foreign(here: Mapping[str, Any], there: Mapping[str, Any], made: str) -> None:
    """Raise InputError unless two machine_info entries of pytest-benchmark describe one machine. made: when."""
    own, other = (dict(info.get(KEY) or {}).get("machine") for info in (here, there))
    if not own:
        raise InputError("this machine was not described", "no fingerprint of this run", "run `pytest benchmarks/`")
    differing = differences(own, other)
    if differing:
        fix = "compare runs of one machine, or compare the ratios that both runs print"
        raise InputError(f"the saved run of {made} is of another machine", "; ".join(differing), fix)
