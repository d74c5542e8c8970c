"""Which latency table is this machine's: its name, where measured ones are kept, and how a build finds it.

A table of TensorRT is a board's in one power mode, at one limit of the GPU's clock: a mode's name is a label only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .compiler.latency import TABLES, LatencyTable
from .errors import IgateError
from .runtime.cache import cpu_fields, default_dir, fingerprint

#: How the instruction sets of a processor are told in a table's name, widest INT8 first.
INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "i8mm", "asimddp", "avx512f", "avx2", "asimd")
#: Words of a processor's name that tell nothing.
_PLAIN = frozenset({"amd", "intel", "r", "tm", "cpu", "processor", "with", "core", "ghz", "unknown", "gen"})
#: What a board was like while it was timed; it may be otherwise when the table is used.
MOVING = ("gpu_hz", "emc_hz", "cpu_khz", "celsius", "capped", "locked")
UNKNOWN = "unverified"
#: What the GPU says of itself: name in a table, and in what `tensorrt.probe` gives.
GPU = {"gpu": "device", "compute": "compute", "driver": "driver"}


def table_name(threads: int, precision: str = "int8", cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of this machine's table: architecture, processor, INT8 instructions, threads; "-float" for float times.

    No host and no person is in it: two machines of one kind share a table.
    """
    fields, here = cpu_fields(cpuinfo), fingerprint(cpuinfo)
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    arch = {"x86_64": "x86", "AMD64": "x86"}.get(here["machine"], here["machine"])
    words = "".join(letter if letter.isalnum() else " " for letter in str(here["cpu"])).lower().split()
    model = [word for word in words if word not in _PLAIN and not word.endswith("core")][:2]
    simd = [name.replace("_", "-") for name in INSTRUCTIONS if name in flags][:1]
    return "-".join([arch, *model, *simd, f"{threads}t", *([] if precision == "int8" else [precision])])


def board(root: Path = Path("/")) -> tuple[dict[str, str], str]:
    """What makes times through TensorRT this board's, and TensorRT's version; root: the folder that stands for "/".

    runtime.device.fingerprint and {"gpu", "compute", "driver", "gpu_limit_hz": the highest clock allowed now}. Raises
    UnavailableError where TensorRT or a device is missing.
    """
    from .engines import tensorrt

    here = tensorrt.probe()
    return {**setting(root), **{name: here[key] for name, key in GPU.items()}}, here["version"]


def setting(root: Path = Path("/")) -> dict[str, str]:
    """What of `board` a user can set meanwhile, and what it stands on: all but the GPU's own names."""
    from .runtime.device import fingerprint as board_of
    from .runtime.device import read_state

    clocks = read_state(root).gpu_hz
    return {**board_of(root), "gpu_limit_hz": UNKNOWN if clocks is None else str(clocks[1])}


def moment(root: Path = Path("/")) -> dict[str, Any]:
    """MOVING of this board: clocks in Hz and kHz, whether locked, what holds it back; "unverified" if not told (L7)."""
    from .runtime.device import capped, read_state

    state = read_state(root)
    cooling = f"{', '.join(state.cooling)} held clocks back" if state.cooling else ""
    found = {
        "gpu_hz": state.gpu_hz[2] if state.gpu_hz else None,
        "emc_hz": state.emc_hz,
        "cpu_khz": state.cpu_khz[2] if state.cpu_khz else None,
        "celsius": max(state.temperatures.values(), default=None),
        "capped": capped(state) or cooling,
        "locked": state.locked,
    }
    return {name: UNKNOWN if value is None else value for name, value in found.items()}


def board_name(device: Mapping[str, Any], precision: str = "int8") -> str:
    """Name of a board's table of TensorRT: module, power mode, "trt"; "-float" for FP16 times.

    >>> board_name({"module": "Orin Nano 8GB developer kit (p3767-0005)", "power_mode": "25W", "gpu": "Orin"})
    'orin-nano-8gb-25w-trt'
    >>> board_name({"gpu": "NVIDIA GeForce RTX 4090"}, "float")
    'geforce-rtx-4090-trt-float'
    """
    module = str(device.get("module") or device.get("board") or device["gpu"]).split("(")[0]
    module = module.replace("developer kit", "").replace("NVIDIA", "")
    mode = device.get("power_mode", "mode unknown" if "soc" in device or "l4t" in device else "")
    words = "".join(letter if letter.isalnum() else " " for letter in f"{module} {mode}").lower().split()
    return "-".join([*words, "trt", *([] if precision == "int8" else [precision])])


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The most telling name under which two boards, as `board` gives them, are not the same; "" where none is."""
    names = (there.keys() | here.keys()) - set(MOVING)
    strange = [name for name in names if there.get(name) != here.get(name)]
    return min(strange, key=lambda name: (name not in ("module", "power_mode"), name), default="")


def foreign_board(table: LatencyTable, root: Path = Path("/")) -> str:
    """ "" when a table of TensorRT was measured on this board as it is set now, else why not: one sentence."""
    end = "its milliseconds are predictions only"
    theirs = table.device
    try:
        here, version = board(root)
    except IgateError as error:
        gpu = theirs.get("gpu", "a board")
        return f"the table is of the backend 'tensorrt' on {gpu}, and here {error.cause}: {end}"
    if ("soc" in here or "l4t" in here) and "power_mode" not in here:
        return f"nobody tells this board's power mode, which the table is of: {end}"
    if name := difference(theirs, here):
        was, now = (item.get(name, "unknown") for item in (theirs, here))
        return f"the table is of another board or setting ({name} {was!r}, here {now!r}): {end}"
    if table.backend.get("version") != version:
        return f"the table is of TensorRT {table.backend.get('version', '?')}, here is {version}: {end}"
    return ""


def own_folder() -> Path:
    """Where `igate profile` writes when nobody says: beside the cached engines."""
    return default_dir() / "tables"


def find(
    threads: int,
    precision: str = "int8",
    own: Path | None = None,
    backend: str = "onnxruntime",
    root: Path = Path("/"),
) -> tuple[LatencyTable | None, str]:
    """The table that was measured on this machine, its own before a shipped one; or None and why there is none.

    backend: "onnxruntime", or "tensorrt", whose tables are of one thread. root: the folder that stands for "/".
    """
    problems = list[str]()
    if backend == "tensorrt":
        try:
            name = board_name(board(root)[0], precision)
        except IgateError as error:
            return None, f"no latency table of a board: {error.cause}"
    else:
        name = table_name(threads, precision)
    for folder in (own or own_folder(), TABLES):
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        try:
            table = LatencyTable.load(path)
        except IgateError as error:
            problems.append(f"{path} cannot be used ({error.cause}: {error.evidence})")
            continue
        strange = table.foreign(root)
        if not strange and (table.threads, table.precision) == (threads, precision):
            return table, ""
        problems.append(strange or f"{path.name} is of {table.threads} thread(s), {table.precision}")
    command = "igate profile" + (" --backend tensorrt" if backend == "tensorrt" else "")
    command += f" --threads {threads}" if threads > 1 else ""
    command += "" if precision == "int8" else f" --precision {precision}"
    problems.append(f"no latency table of this machine for {threads} thread(s), {precision}: `{command}` measures one")
    return None, "; ".join(problems)
