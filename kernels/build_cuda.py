"""Ahead-of-time build of the CUDA kernels, by NVRTC or nvcc: no GPU, no driver, no header.

NVRTC 12.6 makes cubins of ELF ABI 7, which JetPack 6 and 7 load, and the PTX of ISA 8.5 for whatever else is Ampere or
newer; CUDA 13 makes ABI 8 for JetPack 7 alone. One cubin holds all kernels, and the digest of its source (see
`stamped`), by which a launcher can tell that it belongs to this release.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from igate_edge.errors import CheckFailed, InputError, UnavailableError

from . import cubin, manifest, nvrtc, source
from .launch import KERNELS, TILES

#: PTX is for the oldest GPU that has what the kernels need; a driver compiles it for any newer one.
PTX_TARGET = "compute_80"
_STAMP = re.compile(rb"igate source ([0-9a-f]{64})\0")
_STAMP_PTX = re.compile(r"^// igate source ([0-9a-f]{64})$", re.MULTILINE)


@dataclass(frozen=True)
class Toolchain:
    """A compiler by its name in the budget; `compile`: (text, "sm_87" or "compute_80") -> cubin or PTX."""

    name: str
    compile: Callable[[str, str], bytes]


@dataclass(frozen=True)
class Compiled:
    """All kernels from one toolchain. ptx: "" where it makes none; shipped: else it is compiled for its budget only."""

    toolchain: str
    arch: int
    data: bytes
    ptx: str
    shipped: bool

    def describe(self) -> Iterator[tuple[manifest.Built, cubin.Resources]]:
        """For each kernel what the manifest says, and what the budget looks at."""
        abi, found = cubin.header(self.data).abi, cubin.inspect(self.data)
        shared = {tile.kernel: tile.shared for tile in TILES}
        for name, kernel in KERNELS.items():
            built = manifest.Built(
                name=f"{name}.abi{abi}",
                language="cuda",
                file=f"igate.sm_{self.arch}.abi{abi}.cubin",
                ptx=f"igate.{PTX_TARGET}.ptx" if self.ptx else "",
                entry=name,
                arch=f"sm_{self.arch}",
                abi=abi,
                toolchain=self.toolchain,
                source=source.digest(),
                sha256=manifest.digest(self.data),
                params=(("params", f"struct:{ctypes.sizeof(kernel.params)}"),),
                hidden=0,
                align=16,
                block=(kernel.threads, 1, 1),
                dynamic_shared=shared.get(name, 0),
                registers=found[name].registers,
                stack=found[name].stack,
                shared=found[name].shared,
                variant={},
            )
            yield built, found[name]


def stamped(text: str) -> str:
    """Source that leaves its own digest in what is compiled from it."""
    return f'{text}\nextern "C" __device__ const char igate_source[] = "igate source {source.digest(text)}";\n'


def stamp(image: bytes) -> str:
    """The source digest in a cubin, or in PTX that `compile_ptx` made; "" where there is none."""
    if found := _STAMP.search(image):
        return found[1].decode()
    line = _STAMP_PTX.search(image[:4096].decode(errors="replace"))
    return line[1] if line else ""


def compile_cubin(toolchain: Toolchain, arch: int, text: str) -> bytes:
    """A cubin of `text` for sm_`arch`; raises CheckFailed where the compiler fails."""
    return toolchain.compile(stamped(text), f"sm_{arch}")


def compile_ptx(toolchain: Toolchain, text: str) -> str:
    """PTX of `text` for every GPU since Ampere, its source's digest in a comment."""
    made = toolchain.compile(text, PTX_TARGET).rstrip(b"\0").decode()
    return f"// igate source {source.digest(text)}\n{made}"


def nvrtc_toolchain(release: int) -> Toolchain:
    """NVRTC of CUDA 12 or 13; raises UnavailableError where it is missing."""
    compiler = nvrtc.find(release)
    return Toolchain(compiler.name, compiler.compile)


def nvcc_toolchain() -> Toolchain:
    """The nvcc on the path; raises UnavailableError where it is missing."""
    found = shutil.which("nvcc")
    if found is None:
        raise UnavailableError("nvcc is missing", "not on the path", "install a CUDA toolkit")
    done = subprocess.run([found, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    if release is None:
        raise UnavailableError("nvcc does not run", (done.stderr or done.stdout)[-200:], "repair the CUDA toolkit")
    return Toolchain(f"nvcc {release[1]}", partial(_nvcc, found))


def _nvcc(path: str, text: str, target: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "igate.cu", Path(folder) / "made"
        given.write_text(text, encoding="utf-8")
        kind = "-cubin" if target.startswith("sm_") else "-ptx"
        command = [path, f"-arch={target}", kind, "-std=c++17", "-o", str(made), str(given)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise CheckFailed(f"nvcc cannot compile for {target}", done.stderr[-500:], "name another architecture")
        return made.read_bytes()


def toolchains() -> tuple[list[Toolchain], list[UnavailableError]]:
    """The compilers that are here, NVRTC 12 first, and why others are not."""
    found, lacking = [], []
    for make in (partial(nvrtc_toolchain, 12), partial(nvrtc_toolchain, 13), nvcc_toolchain):
        try:
            found.append(make())
        except UnavailableError as error:
            lacking.append(error)
    return found, lacking


def build(arch: int) -> Iterator[Compiled]:
    """Compile for sm_`arch` with every compiler that is here; the first one of each ABI is shipped.

    Raises UnavailableError where there is none.
    """
    found, lacking = toolchains()
    if not found:
        raise UnavailableError("the CUDA kernels cannot be built", "; ".join(e.cause for e in lacking), lacking[0].fix)
    text, abis = source.text(), set[int]()
    for toolchain in found:
        data = compile_cubin(toolchain, arch, text)
        abi = cubin.header(data).abi
        # Only what a CUDA 12 compiler writes can be read by drivers of JetPack 6.
        ptx = compile_ptx(toolchain, text) if abi == 7 and 7 not in abis else ""
        yield Compiled(toolchain.name, arch, data, ptx, abi not in abis)
        abis.add(abi)


def for_driver(arch: int, driver: int, text: str) -> tuple[bytes, str]:
    """(cubin, toolchain) by an NVRTC whose cubins a driver of that CUDA version loads.

    Raises UnavailableError where there is none.
    """
    reasons = []
    for release in (12, 13) if driver >= 13000 else (12,):
        try:
            toolchain = nvrtc_toolchain(release)
            data = compile_cubin(toolchain, arch, text)
            cubin.require(data, arch, driver, f"the cubin of {toolchain.name}")
        except (UnavailableError, CheckFailed, InputError) as error:
            reasons.append(f"{error.cause} ({error.evidence})")
            continue
        return data, toolchain.name
    raise UnavailableError("NVRTC cannot build the kernels here", "; ".join(reasons), "install NVRTC 12")
