"""Built engines on disk, found by what they are made of, and used only when every byte is as it was written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..bundle import canonical_json
from ..errors import UnavailableError
from ..files import write_atomic

#: How many engines a cache folder keeps: those used last.
KEEP = 32
_MAGIC = b"igate-engine-2\n"
#: SHA-256 of the header, its length. The header holds the digest and the size of what the backend opens.
_HEAD = struct.Struct("<32sQ")
#: No header is larger: a length that says otherwise is damage, and nothing is allocated for it.
MAX_HEADER = 1 << 24


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


def load(
    folder: Path, key: str, made_for: Mapping[str, Any] | None = None, kind: str = "engine"
) -> tuple[Entry | None, str]:
    """Return (entry, "") or (None, why not); the reason is "" when there simply is no entry.

    made_for: what runs engines here, compared with the entry's own `made_for` before a byte of the engine is read; an
    engine of another version or device is a reason, never an entry. kind: the file's suffix; only engines are counted
    against KEEP.
    """
    path = _path(folder, key, kind)
    try:
        with path.open("rb") as file:
            meta, reason = _header(file, path.name)
            if meta is not None:
                reason = _foreign(meta, key, made_for, path.name)
            if meta is None or reason:
                return None, reason
            payload = file.read()
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"cached engine {path.name} cannot be read ({error.strerror})"
    about = meta.pop("payload", None)
    if about != {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}:
        return None, f"cached engine {path.name} does not match its own checksum"
    with contextlib.suppress(OSError):
        os.utime(path)  # its time is when it was last used
    return Entry(payload, meta), ""


def _header(file: BinaryIO, name: str) -> tuple[dict[str, Any] | None, str]:
    """The checked header of an open entry, or why it cannot be believed; the engine behind it is not read."""
    start = file.read(len(_MAGIC) + _HEAD.size)
    if start[: len(_MAGIC)] != _MAGIC or len(start) < len(_MAGIC) + _HEAD.size:
        return None, f"cached engine {name} is not one of ours or is cut short"
    digest, length = _HEAD.unpack(start[len(_MAGIC) :])
    left = os.fstat(file.fileno()).st_size - file.tell()
    head = file.read(length) if length <= min(left, MAX_HEADER) else b""
    if len(head) != length or hashlib.sha256(head).digest() != digest:
        return None, f"cached engine {name} does not match its own checksum"
    try:
        meta = json.loads(head)
    except (ValueError, RecursionError):
        meta = None
    return (meta, "") if isinstance(meta, dict) else (None, f"cached engine {name} was built for something else")


def _foreign(meta: dict[str, Any], key: str, made_for: Mapping[str, Any] | None, name: str) -> str:
    """Why an entry is none of ours: another key, or made for another version or device than the one here."""
    if meta.get("key") != key:
        return f"cached engine {name} was built for something else"
    stored = meta.get("made_for")
    if made_for is None or stored == made_for:
        return ""
    known = stored if isinstance(stored, dict) else {}
    other = [
        f"{part} {known.get(part)}, here {made_for.get(part)}"
        for part in sorted({*known, *made_for})
        if known.get(part) != made_for.get(part)
    ]
    return f"cached engine {name} was built elsewhere ({'; '.join(other)})"


def alike(folder: Path, slot: str, besides: str) -> list[str]:
    """Keys of intact-looking entries with this `slot` in their header, the one used last first; `besides` left out.

    A slot names what an engine computes, whatever runs it: the same network built under another power mode has it too.
    """
    found: list[tuple[int, str]] = []
    for path in folder.glob("*.engine"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            meta, _ = _header(file, path.name)
            if meta is not None and meta.get("slot") == slot and path.stem != besides:
                found.append((path.stat().st_mtime_ns, path.stem))
    return [key for _, key in sorted(found, reverse=True)]


def store(folder: Path, key: str, payload: bytes, meta: dict[str, Any], kind: str = "engine") -> str:
    """Write an entry in one step; returns "" or why it could not be kept. Not being able to cache is never an error.

    What stood there is replaced only by a whole new entry: store what has passed its checks, nothing else.
    """
    about = {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    head = canonical_json({**meta, "key": key, "payload": about})
    start = _MAGIC + _HEAD.pack(hashlib.sha256(head).digest(), len(head))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(_path(folder, key, kind), start + head + payload)
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


def _path(folder: Path, key: str, kind: str = "engine") -> Path:
    return folder / f"{key}.{kind}"
