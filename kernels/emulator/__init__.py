"""The deploy kernels on the CPU: their own CUDA source, built by g++ and run one fibre a thread (see emulator.hpp).

    emulator = Emulator.load()
    emulator.run(plan.launch(...), [x, y, tables])     # numpy arrays are the device memory

Built at first use (about five seconds) into the cache folder, keyed by source, flags and compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from igate_edge.errors import CheckFailed, InputError, UnavailableError
from igate_edge.files import os_errors, write_atomic
from igate_edge.runtime.cache import default_dir

from .. import source
from ..launch import Launch

HERE = Path(__file__).resolve().parent
#: No contraction: each named operation rounds once. No aliasing rules: CUDA code looks at bytes as vectors.
FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing")
#: Seconds after which a build that nobody used is deleted.
KEEP_S = 30 * 24 * 3600.0
#: Order in which threads advance: in step or one warp as far as it can go; the first one first, or the last one.
SCHEDULES = ("forward", "reversed", "greedy", "greedy-reversed")


class Emulator:
    """A built kernel library. One launch at a time in a process: further threads wait."""

    _lock = threading.Lock()

    def __init__(self, library: Path) -> None:
        self.path = library
        self._library = ctypes.CDLL(str(library))
        self._library.igate_emulator_error.restype = ctypes.c_char_p
        self.kernels = dict(self._listed())

    @classmethod
    def load(cls, text: str | None = None, flags: Sequence[str] = ()) -> Emulator:
        """Build (or find built) `text`, by default all kernels of this package. Raises UnavailableError without g++."""
        return _loaded(source.text() if text is None else text, tuple(flags))

    def run(
        self, launch: Launch, buffers: Sequence[np.ndarray], schedule: str = "forward", eager: bool = False
    ) -> None:
        """Run one launch to its end. `buffers`: every array it may touch; those that are not writeable are read-only.

        eager: asynchronous copies land when issued, else not before a wait asks for them. Raises CheckFailed with the
        thread and the reason for what hardware would call an illegal or misaligned address, or would never finish.
        """
        if schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {schedule!r}", f"known: {', '.join(SCHEDULES)}", "use one of these")
        params = bytes(launch.params)
        triple = ctypes.c_uint * 3
        with self._lock:
            for array in buffers:
                self._library.igate_emulator_map(_start(array), ctypes.c_size_t(array.nbytes), array.flags.writeable)
            try:
                failed = self._library.igate_emulator_launch(
                    launch.kernel.encode(), triple(*launch.grid), triple(*launch.block), ctypes.c_uint(launch.shared),
                    params, ctypes.c_uint(len(params)), SCHEDULES.index(schedule), int(eager),
                )  # fmt: skip
                why = self._library.igate_emulator_error().decode() if failed else ""
            finally:
                for array in buffers:
                    self._library.igate_emulator_unmap(_start(array))
        if failed:
            raise CheckFailed("a kernel failed on the emulator", why, "report it: a device would fail as well")

    def _listed(self) -> list[tuple[str, tuple[int, int]]]:
        """(kernel name, (threads a block, bytes of parameters)) of this build."""
        name, threads, size = ctypes.c_char_p(), ctypes.c_uint(), ctypes.c_uint()
        ends = ctypes.byref(name), ctypes.byref(threads), ctypes.byref(size)
        rows: list[tuple[str, tuple[int, int]]] = []
        while self._library.igate_emulator_kernel(ctypes.c_uint(len(rows)), *ends):
            rows.append(((name.value or b"").decode(), (threads.value, size.value)))
        return rows


def _start(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@lru_cache(maxsize=32)
def _loaded(text: str, flags: tuple[str, ...]) -> Emulator:
    return Emulator(build(text, flags))


@lru_cache(maxsize=1)
def compiler() -> str:
    """The first line of `g++ --version`; raises UnavailableError when there is no g++."""
    try:
        done = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError("g++ is missing", str(error), "install it: apt install g++") from error
    return done.stdout.splitlines()[0]


def build(text: str, flags: Sequence[str] = (), folder: Path | None = None) -> Path:
    """The shared library of kernel source `text`: from the cache, else built there. Raises UnavailableError."""
    folder = (folder or default_dir()) / "emulator"
    machine = "".join((HERE / name).read_text(encoding="utf-8") for name in ("emulator.hpp", "emulator.cpp"))
    library = folder / f"{_key(text, machine, *FLAGS, *flags)}.so"
    if library.exists():
        os.utime(library)  # its time is when it was last used
        return library
    with os_errors(folder, "create"):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        kernels, made = Path(scratch) / "kernels.cpp", Path(scratch) / "made.so"
        kernels.write_text(text, encoding="utf-8")
        hidden = ["-w", "-shared", "-include", str(HERE / "emulator.hpp")]
        compile_with([*FLAGS, *flags, *hidden, str(_machine(folder, flags)), str(kernels)], made)
        write_atomic(library, made.read_bytes())
    _forget_old(folder)
    return library


def _forget_old(folder: Path) -> None:
    """Delete what nobody used for a month; another process may do the same, so what is gone is fine."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > KEEP_S:
                path.unlink()


def _machine(folder: Path, flags: Sequence[str]) -> Path:
    """The object file of emulator.cpp, which all kernel sources share."""
    text = "".join((HERE / name).read_text(encoding="utf-8") for name in ("emulator.hpp", "emulator.cpp"))
    object_ = folder / f"{_key(text, *FLAGS, *flags)}.o"
    if not object_.exists():
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "made.o"
            compile_with([*FLAGS, *flags, "-c", str(HERE / "emulator.cpp")], made)
            write_atomic(object_, made.read_bytes())
    return object_


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((*parts, compiler())).encode()).hexdigest()[:32]


def compile_with(arguments: Sequence[str], made: Path) -> None:
    """Run g++ with these arguments; raises UnavailableError with its words where it fails."""
    done = subprocess.run(["g++", *arguments, "-o", str(made)], capture_output=True, text=True)
    if done.returncode != 0:
        raise UnavailableError("g++ cannot build the emulator", done.stderr[-500:], "use g++ 9 or later")
