"""Files that are either whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError, UnavailableError

#: Seconds after which a temporary file is one that a killed process left.
STALE_S = 3600.0


def as_path(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path; raises InputError for what cannot name a file: another type, bytes, a NUL, half a character.

    >>> as_path("a/b").name
    'b'
    """
    good = isinstance(path, str) or (isinstance(path, os.PathLike) and isinstance(os.fspath(path), str))
    if not good or "\0" in os.fspath(path) or not _encodes(os.fspath(path)):
        raise InputError("not a path", f"got {path!r:.80}", "pass a string or a pathlib.Path")
    return Path(path)


def _encodes(name: str) -> bool:
    try:
        return bool(os.fsencode(name)) or not name
    except UnicodeEncodeError:
        return False


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
        errno.EEXIST: "a file of this name is in the way: choose another folder",
        errno.EISDIR: "give a file name, not a folder",
    }
    try:
        yield
    except OSError as error:
        fix = fixes.get(error.errno or 0, "check the path and the disk")
        raise UnavailableError(f"cannot {doing} {path}", error.strerror or str(error), fix) from error


def read_file(path: Path) -> bytes:
    """All bytes of a regular file; an OSError for anything else: a pipe would wait for a writer, a device has no end.

    >>> read_file(Path(os.devnull))
    Traceback (most recent call last):
    OSError: [Errno 22] not a regular file: '/dev/null'
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


class _Target(io.FileIO):
    """A new file whose failing writes are sentences; other errors of the code that writes stay what they are."""

    def __init__(self, temporary: Path, target: Path) -> None:
        self.target = target
        super().__init__(temporary, "xb")

    def write(self, data: Any, /) -> int:
        with os_errors(self.target, "write"):
            return super().write(data)


def _begin(path: Path) -> tuple[Path, _Target]:
    """A new file beside `path`, opened; what a killed process left there long ago is deleted."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    with os_errors(path, "write"):  # a name may be too long to be asked about
        if path.exists() and not path.is_file() and not path.is_dir():
            # A rename would put a file in the place of a device: as root even of /dev/null.
            raise InputError("not a place for a file", f"{path} is a device, a pipe or a socket", "give a file name")
        _remove_stale(path)
        return temporary, _Target(temporary, path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise what `atomic_writer` would when it opens its file, without touching what stands at `path`."""
    path = as_path(path)
    temporary, raw = _begin(path)
    raw.close()
    with os_errors(path, "write"):
        temporary.unlink()


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str], sync: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on success sync it and rename it over `path`, on any error delete it.

    sync=False: for a file that is written anew all the time and need not outlive a power cut. A process killed
    meanwhile leaves `.NAME.*.tmp`, which a write of the same file deletes when it is an hour old. Raises
    UnavailableError (no permission, full disk, missing folder) and InputError (`path` is a device or a pipe); what
    stood at `path` then stays as it was.

    >>> import tempfile; from pathlib import Path
    >>> target = Path(tempfile.mkdtemp()) / "a.bin"
    >>> with atomic_writer(target) as file: _ = file.write(b"whole")
    >>> target.read_bytes()
    b'whole'
    """
    path = as_path(path)
    temporary, raw = _begin(path)
    try:
        file = io.BufferedWriter(raw)
        yield file
        file.flush()
        with os_errors(path, "write"):
            if sync:
                os.fsync(raw.fileno())
            file.close()
            os.replace(temporary, path)
    except BaseException:
        # Closed below its buffer: what could not be written must not be tried again.
        raw.close()
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if sync:
        _sync_folder(path.parent)


def _remove_stale(path: Path) -> None:
    start, names = f".{path.name}.", list[str]()
    with contextlib.suppress(OSError):
        names = os.listdir(path.parent)
    for old in (path.parent / name for name in names if name.startswith(start) and name.endswith(".tmp")):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE_S:
                old.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can: the file itself is whole either way."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` to `path` in one step; raises UnavailableError and leaves the old file on any failure."""
    with atomic_writer(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def make_folder(folder: Path) -> Path:
    """Create `folder` and its parents where they are absent; raises UnavailableError with the reason."""
    with os_errors(folder, "create the folder"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
