"""Files that are either whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import InputError, UnavailableError


def as_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path; raises InputError for whatever cannot name a file: another type, bytes, a NUL character.

    >>> as_path("a/b").name
    'b'
    """
    good = isinstance(path, str) or (isinstance(path, os.PathLike) and isinstance(os.fspath(path), str))
    if not good or "\0" in os.fspath(path):
        raise InputError("not a path", f"got {path!r:.80}", "pass a string or a pathlib.Path")
    return Path(path)


@contextlib.contextmanager
def os_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError into a sentence that names the path, the reason and what to do."""
    fixes = {
        errno.EACCES: "choose a folder you may write to, or change its permissions",
        errno.EPERM: "choose a folder you may write to, or change its permissions",
        errno.EROFS: "choose a folder on a writable disk",
        errno.ENOSPC: "free disk space, then run the command again: nothing was lost",
        errno.EDQUOT: "free disk space, then run the command again: nothing was lost",
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "check the path: a part of it is a file",
        errno.EISDIR: "give a file name, not a folder",
    }
    try:
        yield
    except OSError as error:
        fix = fixes.get(error.errno or 0, "check the path and the disk")
        raise UnavailableError(f"cannot {doing} {path}", error.strerror or str(error), fix) from error


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on success sync it and rename it over `path`, on any error delete it.

    Raises UnavailableError (no permission, full disk, missing folder); what stood at `path` then stays as it was.

    >>> import tempfile; from pathlib import Path
    >>> target = Path(tempfile.mkdtemp()) / "a.bin"
    >>> with atomic_writer(target) as file: _ = file.write(b"whole")
    >>> target.read_bytes()
    b'whole'
    """
    path = as_path(path)
    with os_errors(path, "write"):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` to `path` in one step; raises UnavailableError and leaves the old file on any failure."""
    with atomic_writer(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
