"""What a compiled kernel says about itself: architecture, ABI, resources and instructions. No driver, no GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from igate_edge.errors import CheckFailed, InputError, UnavailableError

_CUDA = 190  # e_machine of an NVIDIA GPU
_RESOURCES = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_FUNCTION = re.compile(r"^\.text\.([\w$]+):", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Header:
    """`arch`: 87 for sm_87. `abi`: 7 loads in CUDA 12 and 13 drivers (JetPack 6 and 7), 8 in CUDA 13 drivers only."""

    arch: int
    abi: int


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers a thread, bytes of stack, static shared and local memory, and SASS opcode -> count."""

    registers: int
    stack: int
    shared: int
    local: int
    opcodes: dict[str, int]


def header(data: bytes, name: str = "the cubin") -> Header:
    """Read an ELF header; raises InputError for whatever is no whole cubin."""
    fix = "build it again: python -m igate_edge.kernels.build"
    if data[:4] != b"\x7fELF" or len(data) < 64:
        raise InputError(f"{name} is no cubin", f"{len(data)} bytes, starts with {data[:4]!r}", fix)
    (machine,) = struct.unpack_from("<H", data, 18)
    if data[4:6] != b"\x02\x01" or machine != _CUDA:
        raise InputError(f"{name} is no cubin", f"an ELF file for machine {machine}", fix)
    (segments, sections, flags, _, size, count, section, sections_count) = struct.unpack_from("<QQIHHHHH", data, 32)
    end = max(segments + size * count, sections + section * sections_count)
    if end > len(data):
        raise InputError(f"{name} is truncated", f"{len(data)} bytes of at least {end}", fix)
    abi = data[8]
    return Header((flags >> 8) & 0xFF if abi >= 8 else flags & 0xFF, abi)


def require(data: bytes, arch: int, driver: int, name: str = "the cubin") -> None:
    """Raise InputError with the reason unless a driver of CUDA version `driver` (12060: 12.6) can load the cubin."""
    found = header(data, name)
    if found.arch != arch:
        evidence = f"built for sm_{found.arch}, the device is sm_{arch}"
        raise InputError(f"{name} is for another GPU", evidence, "build it for this one")
    if found.abi > 7 and driver < 13000:
        evidence = (
            f"ELF ABI {found.abi} needs a CUDA 13 driver (JetPack 7), this is {driver // 1000}.{driver % 1000 // 10}"
        )
        raise InputError(f"{name} is too new for the driver", evidence, "take the build of NVRTC 12.6 or of Triton")


def tool(name: str) -> Path:
    """cuobjdump, nvdisasm or ptxas: of a CUDA toolkit on the path, or of Triton, whose wheel carries them."""
    found = shutil.which(name)
    if found is not None:
        return Path(found)
    spec = importlib.util.find_spec("triton")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        path = Path(folder) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return path
    fix = "pip install 'igate-edge[triton]', whose wheel has it, or put a CUDA toolkit's bin folder on the path"
    raise UnavailableError(f"the tool {name} is missing", "neither on the path nor in Triton", fix)


def inspect(data: bytes) -> dict[str, Resources]:
    """Resources by kernel name, read by cuobjdump and nvdisasm; raises UnavailableError without these tools."""
    header(data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(data)
        usage, sass = _run("cuobjdump", "-res-usage", path), _run("nvdisasm", "-c", path)
    starts = [*_FUNCTION.finditer(sass)]
    ends = [start.start() for start in starts[1:]] + [len(sass)]
    code = {start[1]: sass[start.end() : end] for start, end in zip(starts, ends, strict=True)}
    kernels = {}
    for name, *numbers in _RESOURCES.findall(usage):
        registers, stack, shared, local = map(int, numbers)
        opcodes = dict(sorted(Counter(_INSTRUCTION.findall(code.get(name, ""))).items()))
        kernels[name] = Resources(registers, stack, shared, local, opcodes)
    return kernels


def _run(name: str, option: str, path: Path) -> str:
    done = subprocess.run([tool(name), option, path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CheckFailed(f"{name} cannot read the cubin", done.stderr.strip()[:200], "build it again")
    return done.stdout
