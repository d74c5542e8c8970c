"""A line of NVIDIA's tegrastats, on Orin and Thor, as root and not: what a line does not say is None, never 0."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_CLOCK = re.compile(r"\b([A-Z][A-Z0-9]*)_FREQ (?:(\d+)%)?(?:@\[([\d,]+)\]|@(\d+))?(?=\s|$)")
_DEGREES = re.compile(r"\b([A-Za-z]+\d*)@(-?\d+(?:\.\d+)?)C(?:/(-?\d+(?:\.\d+)?)C)?")
_POWER = re.compile(r"\b([A-Z][A-Z0-9_]+) (\d+)mW/(\d+)mW(?:/(\d+)mW)?")
_MEMORY = re.compile(r"\b(RAM|SWAP) (\d+)/(\d+)MB(?: \([^)]*\))?")
_CORES = re.compile(r"\bCPU \[([^\]]*)\]")
_TIME = re.compile(r"^\d\d-\d\d-\d{4} \d\d:\d\d:\d\d")
#: A sensor without power reports -256.
_COLDEST = -200.0


@dataclass(frozen=True)
class Tegrastats:
    """One line. ram_mb, swap_mb: (used, total) MiB. cpu: (load 0 to 1, MHz) by core, None for one that is off.

    gpu_load, emc_load: 0 to 1. gpu_mhz: one clock by GPU cluster. temperatures: Celsius. rails_mw: (now, mean)
    milliwatts. rest: words that are none of these, as they stand. time: the line's own stamp.
    """

    time: str | None = None
    ram_mb: tuple[int, int] | None = None
    swap_mb: tuple[int, int] | None = None
    cpu: tuple[tuple[float, int | None] | None, ...] = ()
    gpu_load: float | None = None
    gpu_mhz: tuple[int, ...] = ()
    emc_load: float | None = None
    emc_mhz: int | None = None
    temperatures: dict[str, float] = field(default_factory=dict)
    rails_mw: dict[str, tuple[float, float]] = field(default_factory=dict)
    rest: str = ""


def parse_tegrastats(line: str) -> Tegrastats:
    """Read one line; raises nothing: a line of something else has only `rest`.

    >>> found = parse_tegrastats("RAM 2400/7620MB CPU [19%@729,off] GR3D_FREQ 10%@1300 tj@48.8C VDD_IN 5700mW/5600mW")
    >>> found.ram_mb, found.cpu, found.gpu_load, found.gpu_mhz, found.rails_mw
    ((2400, 7620), ((0.19, 729), None), 0.1, (1300,), {'VDD_IN': (5700.0, 5600.0)})
    """
    memory = {name: (int(used), int(total)) for name, used, total in _MEMORY.findall(line)}
    clocks = {name: (load, many or one) for name, load, many, one in _CLOCK.findall(line)}
    gpu_load, gpu_clocks = clocks.get("GR3D", ("", ""))
    emc_load, emc_clock = clocks.get("EMC", ("", ""))
    cores = _CORES.search(line)
    stamp = _TIME.match(line)
    rest = line
    for pattern in (_TIME, _MEMORY, _CORES, _CLOCK, _DEGREES, _POWER):
        rest = pattern.sub("", rest)
    return Tegrastats(
        time=stamp[0] if stamp else None,
        ram_mb=memory.get("RAM"),
        swap_mb=memory.get("SWAP"),
        cpu=tuple(_core(word) for word in cores[1].split(",")) if cores else (),
        gpu_load=int(gpu_load) / 100 if gpu_load else None,
        gpu_mhz=tuple(int(word) for word in gpu_clocks.split(",") if word),
        emc_load=int(emc_load) / 100 if emc_load else None,
        emc_mhz=int(emc_clock) if emc_clock.isdigit() else None,
        temperatures={name: float(now) for name, now, _ in _DEGREES.findall(line) if float(now) > _COLDEST},
        rails_mw={name: (float(now), float(mean)) for name, now, mean, _ in _POWER.findall(line)},
        rest=" ".join(rest.split()),
    )


def _core(word: str) -> tuple[float, int | None] | None:
    found = re.fullmatch(r"\s*(\d+)%(?:@(\d+))?\s*", word)
    return (int(found[1]) / 100, int(found[2]) if found[2] else None) if found else None
