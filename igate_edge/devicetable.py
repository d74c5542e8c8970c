"""Which latency table is this machine's: its name, where measured ones are kept, and how a build finds it."""

from __future__ import annotations

from pathlib import Path

from .compiler.latency import TABLES, LatencyTable
from .errors import IgateError
from .runtime.cache import cpu_fields, default_dir, fingerprint

#: How the instruction sets of a processor are told in a table's name, widest INT8 first.
INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "i8mm", "asimddp", "avx512f", "avx2", "asimd")
#: Words of a processor's name that tell nothing.
_PLAIN = frozenset({"amd", "intel", "r", "tm", "cpu", "processor", "with", "core", "ghz", "unknown", "gen"})


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


def own_folder() -> Path:
    """Where `igate profile` writes when nobody says: beside the cached engines."""
    return default_dir() / "tables"


def find(threads: int, precision: str = "int8", own: Path | None = None) -> tuple[LatencyTable | None, str]:
    """The table that was measured on this machine, its own before a shipped one; or None and why there is none."""
    name, problems = table_name(threads, precision), list[str]()
    for folder in (own or own_folder(), TABLES):
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        try:
            table = LatencyTable.load(path)
        except IgateError as error:
            problems.append(f"{path} cannot be used ({error.cause}: {error.evidence})")
            continue
        strange = table.foreign()
        if not strange and (table.threads, table.precision) == (threads, precision):
            return table, ""
        problems.append(strange or f"{path.name} is of {table.threads} thread(s), {table.precision}")
    command = "igate profile" + (f" --threads {threads}" if threads > 1 else "")
    command += "" if precision == "int8" else f" --precision {precision}"
    problems.append(f"no latency table of this machine for {threads} thread(s), {precision}: `{command}` measures one")
    return None, "; ".join(problems)
