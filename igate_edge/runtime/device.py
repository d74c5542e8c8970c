"""Which machine this is: board, module, L4T and JetPack, memory. Whatever the system does not tell is None.

All readers take `root`, the folder that stands for "/", and work in containers and off a Jetson too. Formats are the
documented ones; they were tested on directory trees written in that grammar, not run on a device.
"""

from __future__ import annotations

import contextlib
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from .device_power import PowerMode, power_mode, power_modes
from .device_state import State, capped, read_state
from .device_sysfs import folder, integer, pairs, text
from .device_tegrastats import Tegrastats, parse_tegrastats

__all__ = [
    "Device",
    "PowerMode",
    "State",
    "Tegrastats",
    "capped",
    "fingerprint",
    "jetpack_of",
    "package_versions",
    "parse_tegrastats",
    "power_mode",
    "power_modes",
    "read_device",
    "read_state",
    "swap_used_mb",
]

#: Compute capability by the name of the system on chip.
SM = {"tegra234": 87, "tegra264": 110, "tegra194": 72}
MODULES = {
    "p3701-0000": "AGX Orin 32GB developer kit",
    "p3701-0004": "AGX Orin 32GB",
    "p3701-0005": "AGX Orin 64GB",
    "p3701-0008": "AGX Orin Industrial",
    "p3767-0000": "Orin NX 16GB",
    "p3767-0001": "Orin NX 8GB",
    "p3767-0003": "Orin Nano 8GB",
    "p3767-0004": "Orin Nano 4GB",
    "p3767-0005": "Orin Nano 8GB developer kit",
    "p3834-0008": "Thor T5000",
}
#: The JetPack of an L4T release, most exact first.
JETPACKS = (
    ("39.0", "7.2"),
    ("39.2", "7.2"),
    ("38.4", "7.1"),
    ("38.2", "7.0"),
    ("36.5", "6.2.2"),
    ("36.4.7", "6.2.1"),
    ("36.4.4", "6.2.1"),
    ("36.4.3", "6.2"),
    ("36.4.0", "6.1"),
    ("36.3", "6.0"),
    ("35", "5.1"),
)
#: GPU devices in /sys that name their chip; a container sees them where it sees no device tree.
_GPU_OF = {"17000000.ga10b": "tegra234", "17000000.gpu": "tegra234", "gpu-gpc-0": "tegra264"}


@dataclass(frozen=True)
class Device:
    """A machine; a Jetson where `soc` or `l4t` is known.

    board: the device tree's model. module: name and part number. soc: "tegra234". sm: compute capability as 87.
    l4t: "36.4.3". jetpack: "6.2". memory_mb, swap_mb (files and partitions), zram_mb (compressed memory): MiB.
    container: running in one. kernel: release. machine: architecture.
    """

    board: str | None = None
    module: str | None = None
    soc: str | None = None
    sm: int | None = None
    l4t: str | None = None
    jetpack: str | None = None
    memory_mb: int | None = None
    swap_mb: int | None = None
    zram_mb: int | None = None
    container: bool = False
    kernel: str | None = None
    machine: str | None = None

    @property
    def jetson(self) -> bool:
        """Whether this is a Jetson."""
        return self.soc is not None or self.l4t is not None


def read_device(root: Path = Path("/")) -> Device:
    """Read what machine this is; raises nothing.

    >>> read_device(Path("/no/such/root")).board is None
    True
    """
    tree = next((path for path in _trees(root) if text(path / "compatible")), root / "proc/device-tree")
    compatible = (text(tree / "compatible") or "").split()
    soc = _soc(root, compatible)
    l4t = _l4t(root)
    swap, zram = _swaps(root)
    memory = integer(dict(pairs(root / "proc/meminfo")).get("MemTotal", "").removesuffix("kB"))
    machine = text(root / "proc/sys/kernel/arch") or ("aarch64" if soc or l4t else platform.machine() or None)
    return Device(
        board=text(tree / "model") if soc else None,
        module=_module(compatible),
        soc=soc,
        sm=SM.get(soc or ""),
        l4t=l4t,
        jetpack=jetpack_of(l4t),
        memory_mb=None if memory is None else memory // 1024,
        swap_mb=swap,
        zram_mb=zram,
        container=_container(root),
        kernel=text(root / "proc/sys/kernel/osrelease"),
        machine=machine,
    )


def fingerprint(root: Path = Path("/")) -> dict[str, str]:
    """What an engine built on this board depends on beside its software: board, L4T and power mode. {} off a Jetson.

    Holds what was chosen, never a clock of the moment: a warm board must find the engine that a cold one built.
    """
    device = read_device(root)
    if not device.jetson:
        return {}
    mode = power_mode(root)
    found = {"board": device.board, "module": device.module, "soc": device.soc, "l4t": device.l4t}
    if mode is not None:
        found |= {"power_mode": mode.name, "tpc_mask": mode.tpc_mask or None}
        found["gpu_max_hz"] = None if mode.gpu_max_hz is None else str(mode.gpu_max_hz)
    return {name: value for name, value in found.items() if value is not None}


def jetpack_of(l4t: str | None) -> str | None:
    """The JetPack of an L4T release; None for one that is not known.

    >>> jetpack_of("36.4.3"), jetpack_of("36.4.4"), jetpack_of("38.2.1"), jetpack_of("36.40.1"), jetpack_of(None)
    ('6.2', '6.2.1', '7.0', None, None)
    """
    return next((jetpack for start, jetpack in JETPACKS if f"{l4t}.".startswith(f"{start}.")), None)


def package_versions(names: tuple[str, ...], root: Path = Path("/")) -> dict[str, str]:
    """Versions of installed Debian packages, straight from dpkg's own list; absent ones are left out."""
    try:
        status = (root / "var/lib/dpkg/status").read_text(errors="replace")
    except OSError:
        return {}
    found = {}
    for name in names:
        block = re.search(rf"^Package: {re.escape(name)}\n(?:.+\n)*", status, re.MULTILINE)
        version = re.search(r"^Version: (\S+)", block[0], re.MULTILINE) if block else None
        if block and version and re.search(r"^Status: .*\binstalled$", block[0], re.MULTILINE):
            found[name] = version[1]
    return found


def _trees(root: Path) -> tuple[Path, Path]:
    return root / "proc/device-tree", root / "sys/firmware/devicetree/base"


def _soc(root: Path, compatible: list[str]) -> str | None:
    named = [word.removeprefix("nvidia,") for word in compatible if re.fullmatch(r"nvidia,tegra\d+", word)]
    seen = [_GPU_OF[path.name] for path in folder(root / "sys/class/devfreq", "*") if path.name in _GPU_OF]
    return next(iter(named + seen), None)


def _module(compatible: list[str]) -> str | None:
    for word in compatible:
        # The part number may be followed by a carrier's: nvidia,p3768-0000+p3767-0005.
        for part in re.findall(r"p\d{4}-\d{4}", word):
            if part in MODULES:
                return f"{MODULES[part]} ({part})"
    parts = re.findall(r"p\d{4}-\d{4}", " ".join(compatible))
    return parts[-1] if parts else None


def _l4t(root: Path) -> str | None:
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text(root / "etc/nv_tegra_release") or "")
    if found:
        return f"{found[1]}.{found[2].rstrip('.')}"
    packaged = package_versions(("nvidia-l4t-core",), root).get("nvidia-l4t-core", "")
    return packaged.split("-")[0] or None


def _swaps(root: Path) -> tuple[int | None, int | None]:
    """MiB of swap on disk and in compressed memory."""
    rows = _swap_rows(root)
    if rows is None:
        return None, None
    sizes = [sum(size for zram, size, _ in rows if zram is kind) // 1024 for kind in (False, True)]
    return sizes[0], sizes[1]


def swap_used_mb(root: Path = Path("/")) -> int | None:
    """MiB in use of all swap, compressed memory too."""
    rows = _swap_rows(root)
    return None if rows is None else sum(used for _, _, used in rows) // 1024


def _swap_rows(root: Path) -> list[tuple[bool, int, int]] | None:
    """(in compressed memory, size, used) of each swap in KiB."""
    lines = (text(root / "proc/swaps") or "").splitlines()
    rows = []
    for words in (line.split() for line in lines[1:]):
        with contextlib.suppress(IndexError, ValueError):
            rows.append(("zram" in words[0], int(words[-3]), int(words[-2])))
    return rows if lines else None


def _container(root: Path) -> bool:
    marks = (root / ".dockerenv", root / "run/.containerenv", root / "run/systemd/container")
    if any(mark.exists() for mark in marks):
        return True
    return bool(re.search(r"docker|kubepods|containerd|libpod|lxc", text(root / "proc/1/cgroup") or ""))
