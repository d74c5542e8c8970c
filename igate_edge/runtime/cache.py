"""Built engines on disk, found by what they are made of, and used only when every byte is as it was written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import canonical_json
from ..errors import UnavailableError
from ..files import write_atomic

#: How many engines a cache folder keeps: those used last.
KEEP = 32
_MAGIC = b"igate-engine-1\n"
_HEAD = struct.Struct("<32sQ")


@dataclass(frozen=True)
class Entry:
    """A cached engine: `payload` is what the backend opens, `meta` is what was known when it was built."""

    payload: bytes
    meta: dict[str, Any]


def default_dir() -> Path:
    """Where engines are cached when nobody says: the platform's cache folder (XDG base directory rule)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "igate_edge"


def cache_key(parts: dict[str, Any]) -> str:
    """SHA-256 of everything an engine depends on: digests of graph, weights and scales, options, versions, device.

    Never a path or a name: a moved bundle finds its engine, a changed one does not.

    >>> cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1}) != cache_key({"a": 1, "b": 3})
    True
    """
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def cpu_fields(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Lower-case names and values of the first processor that Linux lists; empty where there is no such file."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip().lower(), value.strip())
    return fields


def fingerprint(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """What this machine is, as far as an engine built on it cares: architecture, processor, instruction sets, cores."""
    fields = cpu_fields(cpuinfo)
    flags = " ".join(sorted((fields.get("flags") or fields.get("features") or "").split()))
    model = fields.get("model name") or f"{fields.get('cpu implementer', '')} {fields.get('cpu part', '')}".strip()
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": model or platform.processor() or "unknown",
        "instructions": hashlib.sha256(flags.encode()).hexdigest()[:16],
        "cores": os.cpu_count() or 1,
    }


def load(folder: Path, key: str) -> tuple[Entry | None, str]:
    """Return (entry, "") or (None, why not); the reason is "" when there simply is no entry."""
    path = _path(folder, key)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"cached engine {path.name} cannot be read ({error.strerror})"
    start = len(_MAGIC) + _HEAD.size
    if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
        return None, f"cached engine {path.name} is not one of ours or is cut short"
    digest, length = _HEAD.unpack(data[len(_MAGIC) : start])
    body = memoryview(data)[start:]
    if length > len(body) or hashlib.sha256(data[start - 8 :]).digest() != digest:
        return None, f"cached engine {path.name} does not match its own checksum"
    try:
        meta = json.loads(bytes(body[:length]))
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or meta.get("key") != key:
        return None, f"cached engine {path.name} was built for something else"
    with contextlib.suppress(OSError):
        os.utime(path)  # its time is when it was last used
    return Entry(bytes(body[length:]), meta), ""


def store(folder: Path, key: str, payload: bytes, meta: dict[str, Any]) -> str:
    """Write an entry in one step; returns "" or why it could not be kept. Not being able to cache is never an error."""
    head = canonical_json({**meta, "key": key})
    length = struct.pack("<Q", len(head))
    digest = hashlib.sha256(length + head + payload).digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(_path(folder, key), _MAGIC + digest + length + head + payload)
        _forget_old(folder)
    except (OSError, UnavailableError) as error:
        return f"the engine was not cached, so every start builds it again: {error}"
    return ""


def _forget_old(folder: Path) -> None:
    """Delete all but the KEEP engines used last; another process may do the same, so what is gone is fine."""
    times = {}
    for path in folder.glob("*.engine"):
        with contextlib.suppress(OSError):
            times[path] = path.stat().st_mtime_ns
    for path in sorted(times, key=lambda item: times[item], reverse=True)[KEEP:]:
        with contextlib.suppress(OSError):
            path.unlink()


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.engine"
