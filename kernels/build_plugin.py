"""Build the TensorRT plugin (plugin/): `python -m igate_edge.kernels.build_plugin`. Needs g++ and headers, no nvcc.

On a Jetson JetPack brings the headers: libnvinfer-headers-dev (NvInferRuntime.h) and cuda-cudart-dev-* or the CUDA
toolkit (cuda_runtime_api.h). `--machine aarch64` builds for a board on a PC by g++-aarch64-linux-gnu. The library is
made for one major version of TensorRT: build it again after an upgrade. A build that was made before is not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igate_edge.errors import CheckFailed, IgateError, InputError, UnavailableError
from igate_edge.files import as_path, os_errors, read_file, write_atomic
from igate_edge.runtime.cache import default_dir

SOURCE = Path(__file__).resolve().parent / "plugin"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
MACHINES = ("x86_64", "aarch64")
#: Header -> the package that brings it on a Jetson.
HEADERS = {
    "NvInferRuntime.h": "apt install libnvinfer-headers-dev (part of JetPack's tensorrt)",
    "cuda_runtime_api.h": "apt install cuda-cudart-dev-12-6 (JetPack 6; 13 on JetPack 7)",
}
#: TensorRT's plugins of the third generation came with 10; 8 and 9 have other interfaces.
OLDEST = 10
_VERSION = re.compile(r"#define (?:TRT|NV_TENSORRT)_(MAJOR|MINOR|PATCH)(?:_ENTERPRISE)? (\d+)")


@dataclass(frozen=True)
class Headers:
    """Folders to include and the version of TensorRT that they are of, as (10, 14, 1)."""

    folders: tuple[Path, ...]
    version: tuple[int, int, int]


@dataclass(frozen=True)
class Library:
    """A built plugin. sha256: of the file; it belongs into the key of every engine that uses it (cases T8)."""

    path: Path
    machine: str
    tensorrt: tuple[int, int, int]
    compiler: str
    sha256: str


def find_headers(machine: str = "", given: Sequence[Path] = (), root: Path = Path("/")) -> Headers:
    """The headers in the folders `given`, else where JetPack, Debian packages and CUDA put them below `root`.

    Raises UnavailableError that names each header that is missing and its package, InputError for TensorRT before 10.
    """
    places = [*given, *_usual(machine or platform.machine(), root)]
    found = {name: next((place for place in places if (place / name).is_file()), None) for name in HEADERS}
    missing = [name for name, place in found.items() if place is None]
    if missing:
        fix = "; ".join(HEADERS[name] for name in missing)
        evidence = f"not in {', '.join(map(str, places))}"
        raise UnavailableError(f"missing headers: {', '.join(missing)}", evidence, f"{fix}; or name --include FOLDER")
    folders = tuple(dict.fromkeys(place for place in found.values() if place is not None))
    return Headers(folders, _version(folders[0]))


def _usual(machine: str, root: Path) -> list[Path]:
    triplet = f"{machine}-linux-gnu"
    target = "aarch64-linux" if machine == "aarch64" else "x86_64-linux"
    cuda = sorted((root / "usr/local").glob("cuda*"), reverse=True)
    places = [root / "usr/include" / triplet, root / "usr/include", *((root / "opt").glob("tensorrt*/include"))]
    places += [*(root / "usr/local").glob("TensorRT*/include"), root / "usr/local/tensorrt/include"]
    return [*places, *(each / "targets" / target / "include" for each in cuda), *(each / "include" for each in cuda)]


def _version(folder: Path) -> tuple[int, int, int]:
    path = folder / "NvInferVersion.h"
    with os_errors(path, "read"):
        parts = {name: int(value) for name, value in _VERSION.findall(read_file(path).decode(errors="replace"))}
    if parts.keys() != {"MAJOR", "MINOR", "PATCH"}:
        raise InputError("TensorRT's headers name no version", f"{path}: {parts}", "repair the installation")
    version = parts["MAJOR"], parts["MINOR"], parts["PATCH"]
    if version[0] < OLDEST:
        evidence = f"{path}: {'.'.join(map(str, version))}"
        raise InputError("this TensorRT is too old for the plugin", evidence, "use JetPack 6 or later (TensorRT 10)")
    return version


def compiler(machine: str = "") -> str:
    """The path of the compiler for a machine ("": this one).

    Raises InputError (unknown machine), UnavailableError with the package to install.
    """
    if machine and machine not in MACHINES:
        raise InputError(f"unknown machine {machine!r:.40}", f"known: {', '.join(MACHINES)}", "name one of these")
    native = machine in ("", platform.machine())
    name = "g++" if native else f"{machine}-linux-gnu-g++"
    package = "g++" if native else f"g++-{machine.replace('_', '-')}-linux-gnu"
    path = shutil.which(name)
    if path is None:
        raise UnavailableError(f"{name} is missing", "not on the path", f"apt install {package}")
    return path


def build(
    headers: Headers, machine: str = "", flags: Sequence[str] = (), out: Path | None = None, cache: Path | None = None
) -> Library:
    """Build for `machine` ("x86_64", "aarch64"; default: this one) into `out`, default a folder of the user's cache.

    flags: beyond FLAGS. Raises UnavailableError without a compiler, CheckFailed with its words where it fails.
    """
    machine = machine or platform.machine()
    cxx = compiler(machine)
    said = _run([cxx, "--version"], "start").splitlines()[0]
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(SOURCE.iterdir()) if path.suffix in _SUFFIXES)
    parts = (text, machine, str(headers), said, *FLAGS, *flags)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    path = (default_dir() if cache is None else cache) / "plugin" / key / "libigate_kernel.so"
    if not path.exists():
        with os_errors(path.parent, "create"):
            path.parent.mkdir(parents=True, exist_ok=True)
        # A folder that the compiler searches anyway must not be named: its own headers would not find the system's.
        known = (Path("/usr/include"), Path("/usr/include") / f"{machine}-linux-gnu")
        folders = [f"-isystem{folder}" for folder in headers.folders if folder not in known]
        sources = [str(source) for source in sorted(SOURCE.glob("*.cpp"))]
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "made.so"
            _run([cxx, *FLAGS, *flags, *folders, "-shared", *sources, "-ldl", "-o", str(made)], "compile the plugin")
            write_atomic(path, made.read_bytes())
    with os_errors(path, "read"):
        data = read_file(path)
    if out is not None:
        write_atomic(out, data)
    return Library(out or path, machine, headers.version, said, hashlib.sha256(data).hexdigest())


_SUFFIXES = (".cpp", ".hpp")


def _run(command: Sequence[str], doing: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if done.returncode != 0:
        raise CheckFailed(f"{command[0]} cannot {doing}", done.stderr[:800], "report it with this compiler's version")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m igate_edge.kernels.build_plugin", description=__doc__)
    parser.add_argument("--out", help="file to write (default: in the cache folder; its path is printed)")
    parser.add_argument("--machine", default="", choices=("", *MACHINES), help="build for this one (default: here)")
    parser.add_argument("--include", action="append", default=[], help="folder with headers, before the usual ones")
    args = parser.parse_args(arguments)
    try:
        headers = find_headers(args.machine, [as_path(folder) for folder in args.include])
        made = build(headers, args.machine, out=as_path(args.out) if args.out else None)
    except IgateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    version = ".".join(map(str, made.tensorrt))
    print(f"{made.path}\nfor TensorRT {version} on {made.machine}, {made.compiler}, SHA-256 {made.sha256[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
