"""The plugin for tests: TensorRT's headers from a wheel, a host in place of TensorRT, both for x86 and for aarch64."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from igate_edge.kernels import build_plugin, emulator, manifest, plugin, source
from igate_edge.kernels.emulator import driver
from igate_edge.kernels.launch import KERNELS, TILES
from kernel_images import cubin

from igate_edge.runtime.cache import default_dir

#: TensorRT 10.14.1's headers, Apache-2.0; nothing else of the wheel is used.
WHEEL = "kernel-lens==2.0.1"
SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
HOST = Path(__file__).resolve().parent / "kernels" / "test_plugin_host.cpp"
#: What AddressSanitizer says of the emulator's fibres: stacks of their own, which it was not told of.
_FIBRES = re.compile("__asan_handle_no_return|False positive error reports may follow|sanitizers/issues/189")
SANITISED = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def image() -> plugin.Image:
    """A stand-in cubin that the emulated driver takes, with the manifest rows of a real one."""
    data, shared = cubin(), {tile.kernel: tile.shared for tile in TILES}
    rows = {}
    for name, kernel in KERNELS.items():
        rows[name] = manifest.Built(
            name=name, language="cuda", file="", ptx="", entry=name, arch="sm_87", abi=7, toolchain="", source="",
            sha256=manifest.digest(data), params=(("params", f"struct:{ctypes.sizeof(kernel.params)}"),), hidden=0,
            align=16, block=(kernel.threads, 1, 1), dynamic_shared=shared.get(name, 0), registers=0, stack=0, shared=0,
            variant={},
        )  # fmt: skip
    return plugin.Image(data, rows)


@lru_cache(maxsize=1)
def headers() -> build_plugin.Headers:
    """TensorRT's from the wheel, fetched once, and CUDA's from Triton's package; skips loudly where there are none."""
    folder = default_dir() / "headers" / SHA256[:16]
    if not (folder / "NvInferRuntime.h").is_file():
        _fetch(folder)
    cuda = Path(sysconfig.get_path("purelib")) / "triton" / "backends" / "nvidia" / "include"
    try:
        return build_plugin.find_headers(given=[folder, cuda])
    except build_plugin.UnavailableError as error:
        pytest.skip(f"NOT TESTED: the TensorRT plugin, {error}")


def _fetch(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or len(found) != 1:
            pytest.skip(f"NOT TESTED: the TensorRT plugin, {WHEEL} cannot be had: {done.stderr[-300:]}")
        assert hashlib.sha256(found[0].read_bytes()).hexdigest() == SHA256, f"{WHEEL} is another file than before"
        unpacked = Path(scratch) / "headers"
        with zipfile.ZipFile(found[0]) as archive:
            for name in archive.namelist():
                if name.startswith("kernel_lens/include/tensorrt/") and name.endswith(".h"):
                    archive.extract(name, unpacked)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=folder.parent))
        shutil.copytree(unpacked / "kernel_lens/include/tensorrt", staged / "all")
        if not folder.exists():
            (staged / "all").rename(folder)
        shutil.rmtree(staged)


@lru_cache(maxsize=8)
def library(machine: str = "", flags: tuple[str, ...] = ()) -> build_plugin.Library:
    """The plugin, built or found built; skips loudly without the compiler."""
    try:
        return build_plugin.build(headers(), machine, flags)
    except build_plugin.UnavailableError as error:
        pytest.skip(f"NOT TESTED: the TensorRT plugin on {machine or 'this machine'}, {error}")


@lru_cache(maxsize=8)
def host(machine: str = "", flags: tuple[str, ...] = ()) -> Path:
    """The host program."""
    library(machine, flags)
    cxx, words = build_plugin.compiler(machine), ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *flags]
    key = manifest.digest(HOST.read_bytes(), cxx, str(headers()), *words)[:32]
    path = default_dir() / "plugin" / f"host-{key}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / "host"
            folders = [f"-isystem{folder}" for folder in headers().folders]
            subprocess.run([cxx, *words, *folders, str(HOST), "-ldl", "-o", str(made)], check=True)
            made.rename(path)
    return path


def driver_for(machine: str = "") -> Path:
    """A folder with the emulated libcuda.so.1 for a machine."""
    if machine in ("", platform.machine()):
        return driver.build().parent
    cxx, text = build_plugin.compiler(machine), source.text()
    files = [emulator.HERE / name for name in ("emulator.cpp", "emulator.hpp", "driver.cpp", "driver.hpp")]
    key = manifest.digest(text, cxx, *(file.read_bytes() for file in files))[:32]
    folder = default_dir() / "emulator" / f"driver-{machine}-{key}"
    if (folder / driver.NAME).exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        kernels, made = Path(scratch) / "kernels.cpp", Path(scratch) / driver.NAME
        kernels.write_text(text)
        library = Path(scratch) / "kernels.so"
        words = ["-w", "-shared", "-Wl,-soname,kernels.so", "-include", str(emulator.HERE / "emulator.hpp")]
        subprocess.run([cxx, *emulator.FLAGS, *words, str(files[0]), str(kernels), "-o", str(library)], check=True)
        macros = ["-DIGATE_DRIVER=12060", f'-DIGATE_SOURCE="{source.digest()}"']
        words = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-Wl,-soname,{driver.NAME}", "-Wl,-rpath,$ORIGIN"]
        subprocess.run([cxx, *words, *macros, str(files[2]), str(library), "-ldl", "-o", str(made)], check=True)
        folder.mkdir(parents=True, exist_ok=True)
        for file in (library, made):
            shutil.copy(file, folder / f"{file.name}.tmp")
            (folder / f"{file.name}.tmp").rename(folder / file.name)
    return folder


def write_fields(path: Path, attributes: dict[str, str | list[int]]) -> Path:
    """The attributes of a node as the fields that a parser makes of them, for the host."""
    parts = []
    for name, value in attributes.items():
        data = value.encode() if isinstance(value, str) else np.array(value, np.int32).tobytes()
        parts += [struct.pack("<I", len(name)), name.encode()]
        parts += [struct.pack("<II", not isinstance(value, str), len(value)), data]
    path.write_bytes(b"".join(parts))
    return path


def run(machine: str, flags: tuple[str, ...], *words: str | Path, cuda: Path | None = None) -> list[str]:
    """The lines that the host prints; `cuda`: folder of the driver that the plugin finds."""
    command = [str(host(machine, flags)), str(library(machine, flags).path), *map(str, words)]
    env = {**os.environ, "LD_LIBRARY_PATH": str(cuda or ""), "ASAN_OPTIONS": "detect_leaks=1"}
    if machine not in ("", platform.machine()):
        qemu = shutil.which(f"qemu-{machine}-static") or shutil.which(f"qemu-{machine}")
        if qemu is None:
            pytest.skip(f"NOT TESTED: the TensorRT plugin on {machine}, qemu is missing (apt install qemu-user-static)")
        found = f"LD_LIBRARY_PATH={cuda or ''}"
        command = [qemu, "-L", f"/usr/{machine}-linux-gnu", "-E", found, *command]
        env.pop("LD_LIBRARY_PATH")
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    errors = [line for line in done.stderr.splitlines() if not _FIBRES.search(line)]
    return [*done.stdout.splitlines(), *(f"stderr {line}" for line in errors)]
