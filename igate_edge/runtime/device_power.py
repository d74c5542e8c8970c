"""Power modes of a Jetson: what nvpmodel.conf defines and which one is set. Ids differ by board, so names count."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .device_sysfs import integer, number, text

CONF = "etc/nvpmodel.conf"
STATUS = "var/lib/nvpmodel/status"
TOOL = "usr/sbin/nvpmodel"

_TAG = re.compile(r"<\s*(PARAM|POWER_MODEL|PM_CONFIG)\b([^>]*)>")
_PAIR = re.compile(r"(\w+)=(\S+)")


@dataclass(frozen=True)
class PowerMode:
    """A power mode by its name; None where the mode sets no limit, or nobody tells.

    gpu_max_hz, emc_max_hz: Hz. cpu_max_khz: kHz of the fastest cluster. tpc_mask: which GPU clusters are switched off,
    as the file writes it; "" where it does not say. A name is a label only: two boards' "15W" differ.
    """

    id: int | None
    name: str
    gpu_max_hz: int | None = None
    emc_max_hz: int | None = None
    cpu_max_khz: int | None = None
    tpc_mask: str = ""
    cpus_online: int | None = None
    default: bool = False


@dataclass(frozen=True)
class Conf:
    """nvpmodel.conf: the modes by id, and the files that hold each setting, as {(parameter, argument): path}."""

    modes: tuple[PowerMode, ...] = ()
    files: tuple[tuple[tuple[str, str], str], ...] = ()


def parse_conf(content: str) -> Conf:
    """The modes of an nvpmodel.conf; lines that do not fit its grammar are skipped.

    >>> parse_conf("< POWER_MODEL ID=1 NAME=25W >\\nGPU MAX_FREQ 918000000\\n").modes[0].gpu_max_hz
    918000000
    """
    settings: dict[int, tuple[str, list[tuple[str, str, int]]]] = {}
    files: dict[tuple[str, str], str] = {}
    default, current, param = None, None, ""
    for tag, values, words in _lines(content):
        if tag == "PARAM":
            param, current = values.get("NAME", ""), None
        elif tag == "POWER_MODEL":
            current, param = integer(values.get("ID")), ""
            if current is not None:
                settings[current] = (values.get("NAME", f"mode {current}"), [])
        elif tag == "PM_CONFIG":
            default, current, param = integer(values.get("DEFAULT")), None, ""
        elif param and len(words) == 2:
            files[param, words[0]] = words[1]
        elif current is not None and len(words) == 3 and (value := integer(words[2])) is not None:
            settings[current][1].append((words[0], words[1], value))
    modes = [_mode(number, name, rows, number == default) for number, (name, rows) in sorted(settings.items())]
    return Conf(tuple(modes), tuple(files.items()))


def _lines(content: str) -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """(tag, its values, []) or ("", {}, words) of each line; the header's comments hold example tags."""
    for line in content.splitlines():
        line = line.split("#", 1)[0].strip()
        if found := _TAG.match(line):
            yield found[1], dict(_PAIR.findall(found[2])), []
        elif line:
            yield "", {}, line.split()


def _mode(number: int, name: str, rows: list[tuple[str, str, int]], default: bool) -> PowerMode:
    def limit(prefix: str) -> int | None:
        found = [value for param, key, value in rows if param.startswith(prefix) and key == "MAX_FREQ" and value > 0]
        return max(found, default=None)

    # A cluster without a limit (-1) may run as fast as it can, whatever the other is held to.
    unlimited = any(param.startswith("CPU") and key == "MAX_FREQ" and value < 0 for param, key, value in rows)
    masks = [str(value) for _, key, value in rows if key == "TPC_PG_MASK"]
    online = [value for param, _, value in rows if param == "CPU_ONLINE"]
    return PowerMode(
        id=number,
        name=name,
        gpu_max_hz=limit("GPU"),
        emc_max_hz=limit("EMC"),
        cpu_max_khz=None if unlimited else limit("CPU"),
        tpc_mask=masks[-1] if masks else "",
        cpus_online=sum(value > 0 for value in online) if online else None,
        default=default,
    )


def read_conf(root: Path = Path("/")) -> Conf:
    """The board's nvpmodel.conf; empty where there is none."""
    return parse_conf(text(root / CONF) or "")


def power_modes(root: Path = Path("/")) -> tuple[PowerMode, ...]:
    """All power modes of this board, by id; empty off a Jetson and in a container that does not mount the file."""
    return read_conf(root).modes


def parse_query(output: str) -> tuple[int | None, str]:
    """(id, name) in what `nvpmodel -q` prints; warnings before and between are skipped.

    >>> parse_query("NVPM WARN: fan mode is not set!\\nNV Power Mode: 15W\\n0\\n")
    (0, '15W')
    """
    name = re.search(r"^NV Power Mode:\s*(\S+)\s*$", output, re.MULTILINE)
    number = re.search(r"^\s*(\d+)\s*$", output[name.end() :] if name else "", re.MULTILINE)
    return (int(number[1]) if number else None), (name[1] if name else "")


def power_mode(root: Path = Path("/")) -> PowerMode | None:
    """The mode that is set, from nvpmodel's status file or else from the tool itself; None where neither tells."""
    found = re.search(r"\bpmode:(\d+)", text(root / STATUS) or "")
    set_id, name = (int(found[1]), "") if found else parse_query(_query(root))
    for mode in power_modes(root):
        if mode.id == set_id or (set_id is None and name and mode.name == name):
            return mode
    if set_id is None and not name:
        return None
    return PowerMode(set_id, name or f"mode {set_id}")


def _query(root: Path) -> str:
    if not (root / TOOL).is_file():
        return ""
    try:
        return subprocess.run([root / TOOL, "-q"], capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""


def tpc_mask_now(root: Path = Path("/"), conf: Conf | None = None) -> int | None:
    """The mask of switched-off GPU clusters that the kernel works with; it follows the mode only after a reboot."""
    files = dict((conf or read_conf(root)).files)
    path = next((path for (_, key), path in files.items() if key == "TPC_PG_MASK"), "")
    return number(root / path.lstrip("/")) if path else None
