"""One builder at a time: a lock in the cache folder that the system itself releases when its holder dies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def building(folder: Path, key: str, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the right to build the engine `key` of a cache folder; yields False where there are no locks.

    Another process (or thread) that builds the same engine is waited for; `waiting` is called once before that. The
    lock belongs to an open file (flock), so a killed builder gives it up by dying, whatever it leaves on the disk. A
    folder that cannot be written, or a file system without locks, is no reason not to build: then nothing is held.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with building(folder, "key") as held: print(held, os.listdir(folder))
    True ['.key.lock']
    >>> os.listdir(folder)
    []
    """
    path, new = folder / f".{key}.lock", not folder.exists()
    handle = _acquire(path, waiting)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            # Deleted while it is still held: whoever waits for it sees that its file is gone and takes a new one.
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(handle)
        if new:  # a build that failed leaves nothing, not even its folder; one that holds an entry stays
            with contextlib.suppress(OSError):
                folder.rmdir()


def _acquire(path: Path, waiting: Callable[[], None] | None) -> int | None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return None
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # another builder failed and took its empty folder away
            continue
        except OSError:
            return None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                    waiting = None
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _same(path, handle):
                return handle
        except OSError:
            os.close(handle)
            return None
        except BaseException:  # interrupted while waiting
            os.close(handle)
            raise
        os.close(handle)


def _same(path: Path, handle: int) -> bool:
    """True when the locked file is still the one at `path`: its last holder may have deleted it meanwhile."""
    try:
        there, ours = path.stat(), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
