"""What the ahead-of-time build leaves beside its cubins: one JSON that says all a launcher must know of each kernel."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igate_edge.errors import InputError, UnavailableError
from igate_edge.files import read_file, write_atomic

#: Where the build writes by default and the wheel carries them: beside this file.
FOLDER = Path(__file__).resolve().parent / "built"
NAME = "manifest.json"
SCHEMA = 1
_FIX = "build the kernels: python -m igate_edge.kernels.build"


@dataclass(frozen=True)
class Built:
    """One kernel for one architecture.

    `file`, `ptx`: names in the manifest's folder, ptx "" where there is none. `entry`: name inside the cubin. `source`:
    SHA-256 of what it was compiled from. `params`: (name, type) in launch order with the `hidden` last ones, which get
    0; types are "pointer", "i32", "i64" or "struct:BYTES". `align`: bytes that every pointer is a multiple of. `block`:
    threads. `dynamic_shared`: bytes to pass at launch. `variant`: what was fixed when it was compiled.
    """

    name: str
    language: str
    file: str
    ptx: str
    entry: str
    arch: str
    abi: int
    toolchain: str
    source: str
    sha256: str
    params: tuple[tuple[str, str], ...]
    hidden: int
    align: int
    block: tuple[int, int, int]
    dynamic_shared: int
    registers: int
    stack: int
    shared: int
    variant: dict[str, Any]


def digest(*parts: str | bytes) -> str:
    """SHA-256 of texts or bytes in order, in hexadecimal.

    >>> digest("a")[:8]
    'ca978112'
    """
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()


def write(folder: Path, kernels: Sequence[Built]) -> None:
    """Write the manifest; the files that it names are there already."""
    rows = [dataclasses.asdict(kernel) for kernel in sorted(kernels, key=lambda kernel: kernel.name)]
    write_atomic(folder / NAME, json.dumps({"schema": SCHEMA, "kernels": rows}, indent=1) + "\n")


def load(folder: Path = FOLDER) -> dict[str, Built]:
    """Kernels by name. Raises UnavailableError where nothing was built and InputError for a damaged manifest."""
    path = folder / NAME
    try:
        value = json.loads(read_file(path))
    except OSError as error:
        raise UnavailableError("no kernels were built ahead of time", f"cannot read {path}", _FIX) from error
    except ValueError as error:
        raise InputError("the kernels' manifest is damaged", f"{path}: {error}", _FIX) from error
    if not isinstance(value, Mapping) or value.get("schema") != SCHEMA:
        schema = value.get("schema") if isinstance(value, Mapping) else None
        raise InputError("the kernels' manifest is of another version", f"schema {schema}, not {SCHEMA}", _FIX)
    try:
        kernels = [_built(row) for row in value["kernels"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("the kernels' manifest is damaged", f"{path}: {error!r:.120}", _FIX) from error
    return {kernel.name: kernel for kernel in kernels}


def _built(row: Mapping[str, Any]) -> Built:
    params = tuple((str(name), str(kind)) for name, kind in row["params"])
    x, y, z = row["block"]
    return Built(**{**row, "params": params, "block": (int(x), int(y), int(z))})


def read(kernel: Built, folder: Path = FOLDER) -> bytes:
    """The cubin of a kernel; raises InputError unless it is the very one that was built."""
    path = folder / kernel.file
    try:
        data = read_file(path)
    except OSError as error:
        raise InputError(f"the cubin of {kernel.name} is missing", f"cannot read {path}", _FIX) from error
    if digest(data) != kernel.sha256:
        evidence = f"{path} has {len(data)} bytes and another SHA-256 than the manifest says"
        raise InputError(f"the cubin of {kernel.name} was altered or cut off", evidence, _FIX)
    return data
