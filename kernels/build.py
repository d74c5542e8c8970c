"""Build the kernels ahead of time: `python -m igate_edge.kernels.build`. Needs compilers, but no GPU and no driver.

Leaves cubins, PTX and a manifest (see manifest.py) where the wheel takes them from, and compares what the kernels cost
with the committed budget (see budget.py). A source that lacks its compiler is named and left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from igate_edge.errors import CheckFailed, IgateError, UnavailableError
from igate_edge.files import as_path, write_atomic

from . import budget, build_cuda, build_triton, manifest
from .cubin import Resources

#: What a source yields per kernel: manifest entry, whether it is shipped (else it is compiled for its budget only),
#: resources, cubin, and PTX or "".
Item = tuple[manifest.Built, bool, Resources, bytes, str]


def _triton(arch: int) -> Iterator[Item]:
    for compiled in build_triton.build(arch):
        built, found = compiled.describe()
        yield built, compiled.variant.shipped, found, compiled.data, compiled.ptx


def _cuda(arch: int) -> Iterator[Item]:
    for compiled in build_cuda.build(arch):
        for built, found in compiled.describe():
            yield built, compiled.shipped, found, compiled.data, compiled.ptx


#: Name -> generator of the kernels for an architecture; it raises UnavailableError where its compiler is missing.
SOURCES: dict[str, Callable[[int], Iterator[Item]]] = {"triton": _triton, "cuda": _cuda}


def run(folder: Path, arch: int = 87, sources: Sequence[str] = tuple(SOURCES)) -> dict[str, dict[str, dict[str, Any]]]:
    """Build the named sources for sm_`arch` into a folder; returns the budget rows: toolchain -> kernel -> row.

    Raises UnavailableError where not one of them could be built.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kernels: list[manifest.Built] = []
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    lacking: list[UnavailableError] = []
    for name in sources:
        try:
            for built, shipped, found, data, ptx in SOURCES[name](arch):
                rows.setdefault(built.toolchain, {})[built.name] = budget.row(found, built.dynamic_shared)
                print(f"{built.name:36} {built.registers:4} registers {len(data):7} bytes  {built.toolchain}")
                if shipped:
                    kernels.append(built)
                    write_atomic(folder / built.file, data)
                    if ptx:
                        write_atomic(folder / built.ptx, ptx)
        except UnavailableError as error:
            lacking.append(error)
            print(f"left out: {error}", file=sys.stderr)
    if not kernels:
        raise lacking[0] if lacking else UnavailableError("nothing to build", "no source named", "name one")
    manifest.write(folder, kernels)
    return rows


def check(arch: str, rows: dict[str, dict[str, dict[str, Any]]], path: Path = budget.FILE) -> None:
    """Raise CheckFailed unless every kernel costs what the committed table says of this architecture, if it does."""
    table = budget.load(path).get(arch)
    if table is None:
        print(f"no budget for {arch}: nothing to compare with", file=sys.stderr)
        return
    lines = []
    for toolchain, found in rows.items():
        if toolchain not in table:
            lines.append(f"no budget for {toolchain} (there is one for {', '.join(sorted(table)) or 'nothing'})")
            continue
        for name, row in found.items():
            lines += budget.faults(name, row, table[toolchain].get(name))
    if lines:
        fix = "change the kernel, or accept the new costs: python -m igate_edge.kernels.build --update"
        raise CheckFailed("kernels cost something else than budgeted", "; ".join(lines), fix)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m igate_edge.kernels.build", description=__doc__)
    parser.add_argument("--out", default=manifest.FOLDER, help="folder for cubins and manifest (default: the package)")
    parser.add_argument("--arch", type=int, default=87, help="compute capability, 87 for Orin")
    parser.add_argument("--only", choices=sorted(SOURCES), action="append", help="build this source alone")
    parser.add_argument("--budget", default=budget.FILE, help="the committed table")
    parser.add_argument("--update", action="store_true", help="accept today's costs as the committed budget")
    args = parser.parse_args(arguments)
    try:
        folder, table, arch = as_path(args.out), as_path(args.budget), f"sm_{args.arch}"
        rows = run(folder, args.arch, args.only or tuple(SOURCES))
        if args.update:
            budget.update(arch, rows, table)
        else:
            check(arch, rows, table)
    except IgateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{len(manifest.load(folder))} kernels for {arch} in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
