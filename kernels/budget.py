"""What compiled kernels may cost: registers, stack, memory and instructions, in a committed table.

A kernel must cost exactly what the table says; a change is made on purpose, by `python -m igate_edge.kernels.build
--update`, and shows in the diff. Whatever the table says, no kernel may spill or use a stack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igate_edge.errors import InputError
from igate_edge.files import read_file, write_atomic

from .cubin import Resources

#: The committed table: architecture -> toolchain -> kernel -> row.
FILE = Path(__file__).resolve().parent / "budget.json"
#: Instructions that are counted: memory of all kinds, tensor cores, barriers. LDL and STL are spills.
_COUNTED = ("LDG", "STG", "LDL", "STL", "LDS", "STS", "LDGSTS", "LDSM", "IMMA", "HMMA", "ATOM", "RED", "BAR")
_FORBIDDEN = ("LDL", "STL")


def row(found: Resources, dynamic_shared: int) -> dict[str, Any]:
    """A kernel's row of the table."""
    counted = {name: count for name, count in found.opcodes.items() if name.split(".")[0] in _COUNTED}
    shared = found.shared + dynamic_shared
    return {"registers": found.registers, "stack": found.stack, "shared": shared, "opcodes": counted}


def load(path: Path = FILE) -> dict[str, dict[str, dict[str, Any]]]:
    """The table; raises InputError if it cannot be read."""
    try:
        return json.loads(read_file(path))
    except (OSError, ValueError) as error:
        raise InputError("the kernels' budget cannot be read", f"{path}: {error}", "restore the file") from error


def faults(name: str, found: Mapping[str, Any], allowed: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with a kernel's row, one sentence each; `allowed`: its row of the table, None if it has none."""
    spills = [op for op in found["opcodes"] if op.split(".")[0] in _FORBIDDEN]
    lines = [f"{name} spills: {found['opcodes'][op]} {op}" for op in spills]
    if found["stack"]:
        lines.append(f"{name} uses {found['stack']} bytes of stack")
    if allowed is None:
        return [*lines, f"{name} has no budget"]
    for key in ("registers", "stack", "shared"):
        if found[key] != allowed[key]:
            lines.append(f"{name} has {key} {found[key]}, the budget says {allowed[key]}")
    for op in sorted(found["opcodes"].keys() | allowed["opcodes"].keys()):
        now, then = found["opcodes"].get(op, 0), allowed["opcodes"].get(op, 0)
        if now != then:
            lines.append(f"{name} has {now} {op}, the budget says {then}")
    return lines


def update(arch: str, rows: Mapping[str, Mapping[str, Any]], path: Path = FILE) -> None:
    """Replace the rows of these toolchains (toolchain -> kernel -> row) of an architecture; others stay."""
    table = load(path) if path.exists() else {}
    table[arch] = {**table.get(arch, {}), **{key: dict(value) for key, value in rows.items()}}
    write_atomic(path, json.dumps(table, indent=1, sort_keys=True) + "\n")
