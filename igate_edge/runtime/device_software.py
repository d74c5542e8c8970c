"""Which TensorRT, CUDA, driver and Python packages are here, found by looking at files: nothing heavy is imported."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .device import package_versions
from .device_sysfs import folder, text

#: Distributions that reach the GPU from Python.
PACKAGES = (
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu12-bindings",
    "tensorrt-cu12-libs",
    "tensorrt-cu13",
    "tensorrt-cu13-bindings",
    "tensorrt-cu13-libs",
    "cuda-bindings",
    "pycuda",
)
#: What pycuda's own build includes.
HEADERS = ("cuda.h", "curand.h")
CUDA = "usr/local/cuda"
_LIBRARY = re.compile(r"libnvinfer\.so\.(\d+\.\d+(?:\.\d+)*)")
_LIBRARIES = ("usr/lib/*-linux-gnu", "usr/lib64", "usr/local/lib", "usr/local/tensorrt*/lib", "opt/tensorrt*/lib")
_RESOURCE = "libnvinfer_builder_resource"


@dataclass(frozen=True)
class Software:
    """What the system has installed.

    tensorrt: versions of libnvinfer found, lowest first. tensorrt_cuda: the CUDA its package was made for.
    module_pythons: the Pythons that apt's TensorRT module serves. cuda: version of the toolkit. nvcc: where it lies.
    missing_headers: of HEADERS. driver: version of the kernel module. resources: TensorRT's files of kernels.
    """

    tensorrt: tuple[str, ...] = ()
    tensorrt_cuda: str | None = None
    module_pythons: tuple[str, ...] = ()
    cuda: str | None = None
    nvcc: str | None = None
    missing_headers: tuple[str, ...] = ()
    driver: str | None = None
    resources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Interpreter:
    """The Python that runs: version, virtual environment (None outside one), PATH, and packages of PACKAGES it finds.

    system_site: whether it sees the system's packages. driver_cuda: the CUDA that the driver says it speaks.
    resources: kernel files of a TensorRT wheel.
    """

    python: str
    venv: str | None = None
    system_site: bool = True
    path: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    driver_cuda: str | None = None
    resources: tuple[str, ...] = ()


def read_software(root: Path = Path("/")) -> Software:
    """Look below `root`; raises nothing.

    >>> read_software(Path("/no/such/root")) == Software(missing_headers=HEADERS)
    True
    """
    files = [path for place in _LIBRARIES for path in folder(root, f"{place}/libnvinfer*.so*")]
    found = {match[1] for path in files if (match := _LIBRARY.fullmatch(path.name))}
    packaged = package_versions(("tensorrt", "python3-libnvinfer", "libnvinfer10"), root)
    made_for = [match[1] for version in packaged.values() if (match := re.search(r"\+cuda(\d+\.\d+)", version))]
    modules = folder(root, "usr/lib/python3*/dist-packages/tensorrt")
    nvcc = next(iter(folder(root, f"{CUDA}/bin/nvcc") or folder(root, "usr/bin/nvcc")), None)
    driver = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", (text(root / "proc/driver/nvidia/version") or "") + " ")
    return Software(
        tensorrt=tuple(sorted(found, key=version_tuple)),
        tensorrt_cuda=made_for[0] if made_for else None,
        module_pythons=tuple(path.parent.parent.name.removeprefix("python") for path in modules),
        cuda=_toolkit(root),
        nvcc=None if nvcc is None else f"/{nvcc.relative_to(root)}",
        missing_headers=tuple(name for name in HEADERS if not _header(root, name)),
        driver=driver[1] if driver else None,
        resources=tuple(path.name for path in files if path.name.startswith(_RESOURCE)),
    )


def this_interpreter() -> Interpreter:
    """What only the running process can tell."""
    venv = sys.prefix if sys.prefix != sys.base_prefix else None
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    wheel = importlib.util.find_spec("tensorrt_libs")
    places = list(wheel.submodule_search_locations or ()) if wheel else []
    return Interpreter(
        python=platform.python_version(),
        venv=venv,
        system_site=venv is None or _sees_system(Path(venv)),
        path=os.environ.get("PATH", ""),
        packages=found,
        driver_cuda=_driver_cuda(),
        resources=tuple(path.name for place in places for path in folder(Path(place), f"{_RESOURCE}*")),
    )


def version_tuple(version: str) -> tuple[int, ...]:
    """The leading numbers of a version.

    >>> version_tuple("10.16.2.1-1+cuda13.2"), version_tuple("none")
    ((10, 16, 2, 1), ())
    """
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def short(version: str) -> str:
    """Major and minor of a version.

    >>> short("12.6.68")
    '12.6'
    """
    return ".".join(map(str, version_tuple(version)[:2]))


def resource_sms(names: tuple[str, ...]) -> tuple[int, ...]:
    """Compute capabilities for which a TensorRT brings kernels, where it keeps them in a file each; else empty.

    >>> resource_sms(("libnvinfer_builder_resource_sm86.so.10.13.0", "libnvinfer_builder_resource_sm110.so.10.13.0"))
    (86, 110)
    """
    return tuple(sorted({int(match[1]) for name in names if (match := re.search(r"_sm(\d+)\.so", name))}))


def _toolkit(root: Path) -> str | None:
    try:
        found = json.loads(text(root / CUDA / "version.json") or "")["cuda"]["version"]
    except (ValueError, LookupError, TypeError, RecursionError):
        old = re.search(r"CUDA Version (\S+)", text(root / CUDA / "version.txt") or "")
        return old[1] if old else None
    return str(found)


def _header(root: Path, name: str) -> bool:
    places = (f"{CUDA}/include", f"{CUDA}/targets/*/include", "usr/include")
    return any(folder(root, f"{place}/{name}") for place in places)


def _sees_system(venv: Path) -> bool:
    found = re.search(r"^include-system-site-packages\s*=\s*(\w+)", text(venv / "pyvenv.cfg") or "", re.MULTILINE)
    return found is not None and found[1].lower() == "true"


def _driver_cuda() -> str | None:
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
