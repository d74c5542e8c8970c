"""Small files of /proc and /sys; a missing, empty or refusing one is None: telemetry never stops a robot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


def text(path: Path) -> str | None:
    """A small file's text without NULs and outer white space; None where it cannot be read or holds nothing.

    >>> text(Path("/no/such/file")) is None
    True
    """
    # A switched-off sensor answers a read with EAGAIN or EINVAL, a container with EACCES.
    with contextlib.suppress(OSError, ValueError):
        return path.read_bytes().decode(errors="replace").replace("\0", " ").strip() or None
    return None


def number(path: Path) -> int | None:
    """A file's one integer, decimal or 0x..., or None."""
    return integer(text(path))


def integer(word: str | None) -> int | None:
    """A word as an integer, decimal or 0x..., or None.

    >>> integer("0xfc"), integer("-1"), integer("007"), integer("off"), integer(None)
    (252, -1, 7, None, None)
    """
    with contextlib.suppress(ValueError, AttributeError):
        word = (word or "").strip().lower()
        return int(word, 16 if word.startswith("0x") else 10)
    return None


def folder(path: Path, pattern: str) -> list[Path]:
    """What a glob finds below a folder, sorted; nothing where the folder cannot be listed."""
    with contextlib.suppress(OSError):
        return sorted(path.glob(pattern))
    return []


def pairs(path: Path, separator: str = ":") -> Iterator[tuple[str, str]]:
    """The lines `name: value` of a file."""
    for line in (text(path) or "").splitlines():
        name, found, value = line.partition(separator)
        if found:
            yield name.strip(), value.strip()
