"""What a board does right now: clocks, lock, temperatures, throttling, power. Absent is None or missing, never 0."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from .device_power import PowerMode, power_mode
from .device_sysfs import folder, number, text

#: A clock counts as at its limit within this share: counters of the hardware round.
NEAR = 0.01
#: Degrees that a sensor without power reports (-256 on Jetson), or a broken one.
COLDEST, HOTTEST = -200.0, 300.0
_GPU = re.compile(r"\d+\.(gpu|ga10b|gv11b|gp10b|gm20b)|gpu-gpc-0")
_EMC = "sys/kernel/debug/bpmp/debug/clk/emc"


@dataclass(frozen=True)
class State:
    """One reading. Triples are (lowest allowed, highest allowed, now).

    gpu_hz: Hz. cpu_khz: kHz, over all cores that are on. emc_hz: memory clock (needs root). gpu_load: 0 to 1. locked:
    GPU, CPU and memory clocks all fixed; False as soon as one is not, None while one cannot be read. temperatures:
    Celsius by zone. throttle_events: over-current events since boot. cooling: steps by which each throttling device
    holds back now. rails_mw: milliwatts by rail. fan: 0 to 1. gpu_top_hz: the fastest clock the hardware has.
    """

    power_mode: PowerMode | None = None
    gpu_hz: tuple[int, int, int] | None = None
    cpu_khz: tuple[int, int, int] | None = None
    emc_hz: int | None = None
    gpu_load: float | None = None
    locked: bool | None = None
    temperatures: dict[str, float] = field(default_factory=dict)
    throttle_events: int | None = None
    rails_mw: dict[str, float] = field(default_factory=dict)
    fan: float | None = None
    cooling: dict[str, int] = field(default_factory=dict)
    gpu_top_hz: int | None = None
    emc_locked: bool | None = None


def read_state(root: Path = Path("/")) -> State:
    """Everything the system tells of this moment; costs a few milliseconds and raises nothing.

    >>> read_state(Path("/no/such/root")) == State()
    True
    """
    gpu = _gpu_folder(root)
    gpu_hz = _triple(gpu, "{}_freq") if gpu else None
    cores = _cores(root)
    override = number(root / _EMC / "mrq_rate_locked")
    emc_locked = None if override is None else override != 0
    cpu_khz = (min(c[0] for c in cores), max(c[1] for c in cores), min(c[2] for c in cores)) if cores else None
    return State(
        power_mode=power_mode(root),
        gpu_hz=gpu_hz,
        cpu_khz=cpu_khz,
        emc_hz=number(root / _EMC / "rate"),
        gpu_load=_load(root, gpu),
        locked=_locked(gpu_hz, cores, emc_locked),
        temperatures=_temperatures(root),
        throttle_events=_throttle_events(root),
        rails_mw=_rails(root),
        fan=_fan(root),
        cooling=_cooling(root),
        gpu_top_hz=_top(gpu),
        emc_locked=emc_locked,
    )


def capped(state: State) -> str:
    """Why the GPU cannot reach what its mode promises, as one sentence; "" where it can or nobody tells.

    >>> capped(State(PowerMode(0, "MAXN"), gpu_hz=(1, 624_000_000, 1), gpu_top_hz=918_000_000))
    'the GPU is held to 624 MHz, mode MAXN allows 918 MHz'
    """
    mode = state.power_mode
    allowed = (mode.gpu_max_hz or state.gpu_top_hz) if mode else None
    if mode is None or allowed is None or state.gpu_hz is None:
        return ""
    allowed = min(allowed, state.gpu_top_hz or allowed)
    if state.gpu_hz[1] >= allowed * (1 - NEAR):
        return ""
    return f"the GPU is held to {state.gpu_hz[1] / 1e6:.0f} MHz, mode {mode.name} allows {allowed / 1e6:.0f} MHz"


def _gpu_folder(root: Path) -> Path | None:
    found = [path for path in folder(root / "sys/class/devfreq", "*") if _GPU.fullmatch(path.name)]
    return found[0] if found else None


def _triple(where: Path, pattern: str) -> tuple[int, int, int] | None:
    low, high, now = (number(where / pattern.format(word)) for word in ("min", "max", "cur"))
    return None if low is None or high is None or now is None else (low, high, now)


def _cores(root: Path) -> list[tuple[int, int, int]]:
    """Clock limits and clock of each core that is on; one whose clocks cannot be read is left out."""
    cores = folder(root / "sys/devices/system/cpu", "cpu[0-9]*")
    running = [core for core in cores if number(core / "online") != 0]
    return [clocks for core in running if (clocks := _triple(core / "cpufreq", "scaling_{}_freq")) is not None]


def _fixed(clocks: tuple[int, int, int]) -> bool:
    low, high, now = clocks
    return low == high and abs(now - high) <= NEAR * high


def _locked(gpu: tuple[int, int, int] | None, cores: list[tuple[int, int, int]], emc: bool | None) -> bool | None:
    parts = [None if gpu is None else _fixed(gpu), all(map(_fixed, cores)) if cores else None, emc]
    if gpu is None and emc is None:
        return None  # no Jetson: its CPU alone says nothing
    if False in parts:
        return False
    return None if None in parts else True


def _load(root: Path, gpu: Path | None) -> float | None:
    places = [root / "sys/devices/platform/gpu.0/load", *([gpu / "device/load"] if gpu else [])]
    loads = [value / 1000 for value in map(number, places) if value is not None and 0 <= value <= 1000]
    return loads[0] if loads else None


def _temperatures(root: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for zone in folder(root / "sys/class/thermal", "thermal_zone*"):
        kind, milli = text(zone / "type"), number(zone / "temp")
        if kind and milli is not None and COLDEST < milli / 1000 < HOTTEST:
            name = kind.removesuffix("-thermal")
            found[name] = max(milli / 1000, found.get(name, COLDEST))
    return found


def _throttle_events(root: Path) -> int | None:
    counts = [number(path) for path in folder(root / "sys/class/hwmon", "hwmon*/oc*_event_cnt")]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _cooling(root: Path) -> dict[str, int]:
    """Devices that hold clocks back at this moment; a fan cools without holding anything back."""
    found: dict[str, int] = {}
    for device in folder(root / "sys/class/thermal", "cooling_device*"):
        kind, step = text(device / "type"), number(device / "cur_state")
        if kind and step and "fan" not in kind.lower():
            found[kind] = max(step, found.get(kind, 0))
    return found


def _rails(root: Path) -> dict[str, float]:
    """Power of each labelled channel; channel 7 is the sum of shunts, and NC is not connected."""
    found: dict[str, float] = {}
    for monitor in folder(root / "sys/bus/i2c/drivers/ina3221", "*/hwmon/hwmon*"):
        for channel in (1, 2, 3):
            label = text(monitor / f"in{channel}_label")
            millivolt, milliampere = number(monitor / f"in{channel}_input"), number(monitor / f"curr{channel}_input")
            if label and label != "NC" and millivolt is not None and milliampere is not None:
                found[label] = millivolt * milliampere / 1000
    return found


def total_mw(rails: dict[str, float]) -> float | None:
    """What the module draws: VDD_IN where a board has it (Nano, NX), else the sum of its rails, without the carrier.

    >>> total_mw({"VDD_IN": 5700.0, "VDD_SOC": 1600.0}), total_mw({"VDD_GPU_SOC": 3000.0, "VDD_CPU_CV": 500.0})
    (5700.0, 3500.0)
    """
    return rails.get("VDD_IN", sum(rails.values())) if rails else None


def _fan(root: Path) -> float | None:
    for monitor in folder(root / "sys/class/hwmon", "hwmon*"):
        if text(monitor / "name") == "pwmfan" and (duty := number(monitor / "pwm1")) is not None:
            return duty / 255
    return None


def _top(gpu: Path | None) -> int | None:
    words = (text(gpu / "available_frequencies") or "").split() if gpu else []
    return max((int(word) for word in words if word.isdigit()), default=None)
