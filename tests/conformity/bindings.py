"""The real TensorRT bindings of three versions, without TensorRT: fetched, given empty libraries, stubbed.

The wheels hold the Python classes only; every class and name is there to look at, and nothing can be built or run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igate_edge.runtime.cache import default_dir

ROOT = Path(__file__).resolve().parents[2]
#: Package and version: JetPack 6, JetPack 7.2 and the newest with wheels.
VERSIONS = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.16.0.72": "tensorrt-cu12-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
_PLATFORMS = ("manylinux_2_17_x86_64", "manylinux_2_28_x86_64")
_FETCH_SECONDS = 240
#: What stubgen gets wrong: (pattern, replacement), each with its reason.
_REPAIRS = (
    # a default before a parameter without one
    (re.compile(r"(def add_scale_nd\(.*channel_axis: [\w.]+)\)"), r"\1 = ...)"),
    # the module has a DataType of this name, which hides Python's
    (re.compile(r"(?<=[ \[])bool\b"), "builtins.bool"),
    # names of older pybind11 that are no types
    (re.compile(r"(?<=: )buffer\b"), "typing_extensions.Buffer"),
    (re.compile(r"\bcapsule\b"), "typing_extensions.CapsuleType"),
)


class Unreachable(Exception):
    """The check cannot run here; says why."""


@dataclass(frozen=True)
class Bindings:
    """One version. wheel: folder with the real package; libraries: for LD_LIBRARY_PATH; stubs: for MYPYPATH."""

    version: str
    wheel: Path
    libraries: Path
    stubs: Path


def fetch(version: str, base: Path | None = None) -> Bindings:
    """The bindings of a version for this interpreter, from the cache or downloaded. Raises Unreachable."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folder = (base or default_dir()) / "tensorrt-bindings" / f"{version}-{python}"
    found = Bindings(version, folder / "wheel", folder / "libraries", folder / "stubs")
    if not (folder / "ready").exists():
        for tool in ("gcc", "nm", "readelf"):
            if shutil.which(tool) is None:
                raise Unreachable(f"{tool} is missing: install gcc and binutils")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _unpack(_download(version, python, folder), found.wheel)
        _link_empty_libraries(found)
        _make_stubs(found)
        (folder / "ready").touch()
    return found


def _download(version: str, python: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python[2:]]
    command += ["--abi", python, "--abi", "none", "--dest", str(folder)]
    command += [part for platform in _PLATFORMS for part in ("--platform", platform)]
    command.append(f"{VERSIONS[version]}=={version}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"no wheel of {version} after {_FETCH_SECONDS} s") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
        raise Unreachable(f"no wheel of {VERSIONS[version]} {version} for {python}: {said[-1][:200]}")
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    wheel.unlink()


def _lines(*command: str | Path) -> list[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )


def _link_empty_libraries(found: Bindings) -> None:
    """Libraries of the names that the bindings ask for, whose nine functions all return nothing."""
    binary = found.wheel / "tensorrt_bindings" / "tensorrt.so"
    needed = re.findall(r"\(NEEDED\).*\[(libnv[^]]+)\]", "\n".join(_lines("readelf", "-d", binary)))
    wanted = [line.split()[-1] for line in _lines("nm", "-D", "--undefined-only", binary) if line.strip()]
    functions = [name for name in wanted if re.match(r"(create|get|init)\w+$", name)]
    found.libraries.mkdir()
    source = found.libraries / "empty.c"
    source.write_text(
        "".join(f"{'int' if 'Version' in name else 'void*'} {name}(void){{return 0;}}\n" for name in functions)
    )
    for name in needed:
        _lines("gcc", "-shared", "-fPIC", "-o", found.libraries / name, source, f"-Wl,-soname,{name}")


def run(found: Bindings, *command: str, input: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program of this environment in which the real bindings can be imported as tensorrt_bindings."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(found.libraries), "PYTHONPATH": str(found.wheel)}
    return subprocess.run(command, input=input, capture_output=True, text=True, env=environment, check=False)


def check(found: Bindings, file: Path, name: str) -> dict[str, Any]:
    """{"errors", "names"} of a file, as the module `name`, against the stubs: see names.py."""
    command = [sys.executable, str(Path(__file__).with_name("names.py")), str(file), name, "tensorrt"]
    environment = {**os.environ, "MYPYPATH": str(found.stubs)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"mypy itself failed: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _make_stubs(found: Bindings) -> None:
    program = "from mypy.stubgen import main; main()"
    where = ("-m", "tensorrt_bindings.tensorrt", "-o", str(found.stubs))
    made = run(found, sys.executable, "-c", program, *where)
    raw = found.stubs / "tensorrt_bindings" / "tensorrt.pyi"
    if made.returncode != 0 or not raw.exists():
        raise Unreachable(f"stubgen made nothing of {found.version}: {(made.stderr or made.stdout)[-200:]}")
    text = raw.read_text()
    for pattern, replacement in _REPAIRS:
        text = pattern.sub(replacement, text)
    # The package adds its version in Python.
    (found.stubs / "tensorrt.pyi").write_text(f"import builtins\nimport typing_extensions\n{text}\n__version__: str\n")
    shutil.rmtree(raw.parent)
