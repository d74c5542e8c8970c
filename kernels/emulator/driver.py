"""The emulated driver: a libcuda.so.1 of one Orin on this CPU, for unmodified launchers.

launcher = CtypesLauncher(str(driver.build()))      # or LD_LIBRARY_PATH=folder for what links with libcuda.so.1
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from igate_edge.files import os_errors, write_atomic
from igate_edge.runtime.cache import default_dir

from .. import source
from . import HERE, compile_with, compiler
from . import build as build_kernels

NAME = "libcuda.so.1"
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{NAME}")


def build(version: int = 12060, folder: Path | None = None) -> Path:
    """The driver of CUDA `version` (12060: 12.6) with all kernels of this package, from the cache or built there.

    Raises UnavailableError without g++.
    """
    kernels = build_kernels(source.text(), folder=folder)
    text = "".join(
        (HERE / name).read_text(encoding="utf-8") for name in ("driver.cpp", "driver.hpp", "unsupported.hpp")
    )
    key = hashlib.sha256("\0".join((text, str(kernels), str(version), *_FLAGS, compiler())).encode()).hexdigest()[:32]
    library = (folder or default_dir()) / "emulator" / f"driver-{key}" / NAME
    if library.exists():
        os.utime(library.parent)
        return library
    with os_errors(library.parent, "create"):
        library.parent.mkdir(parents=True, exist_ok=True)
    macros = (f"-DIGATE_DRIVER={version}", f'-DIGATE_SOURCE="{source.digest()}"')
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / NAME
        compile_with((*_FLAGS, *macros, str(HERE / "driver.cpp"), str(kernels), "-ldl"), made)
        write_atomic(library, made.read_bytes())
    return library
