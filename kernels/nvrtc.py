"""NVIDIA's run-time compiler through ctypes: CUDA text -> cubin or PTX. No GPU, no driver and no toolkit needed."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from igate_edge.errors import CheckFailed, UnavailableError

#: CUDA release -> where the wheel keeps its library, below the folder of the package `nvidia`.
_WHEELS = {12: ("nvidia-cuda-nvrtc-cu12", "cuda_nvrtc/lib"), 13: ("nvidia-cuda-nvrtc", "cu13/lib")}
_TO_FETCH = {"cubin": ("nvrtcGetCUBINSize", "nvrtcGetCUBIN"), "ptx": ("nvrtcGetPTXSize", "nvrtcGetPTX")}


@dataclass(frozen=True)
class Nvrtc:
    """A loaded compiler; `version` is (12, 6) for the one of CUDA 12.6."""

    library: ctypes.CDLL
    version: tuple[int, int]

    @property
    def name(self) -> str:
        """As in manifests and budgets."""
        return "nvrtc " + ".".join(map(str, self.version))

    def compile(self, text: str, target: str) -> bytes:
        """Compile for `target`: "sm_87" gives a cubin, "compute_80" PTX. Raises CheckFailed with the compiler's log."""
        program = ctypes.c_void_p()
        options = [f"--gpu-architecture={target}", "--std=c++17"]
        created = self.library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"igate.cu", 0, None, None)
        self._check(created, "take the source")
        try:
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self.library.nvrtcCompileProgram(program, len(options), array) != 0:
                log = self._fetch(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0\n")
                evidence = log.decode(errors="replace")[-500:]
                raise CheckFailed(f"{self.name} cannot compile for {target}", evidence, "name another architecture")
            return self._fetch(program, *_TO_FETCH["cubin" if target.startswith("sm_") else "ptx"])
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _fetch(self, program: ctypes.c_void_p, size: str, get: str) -> bytes:
        count = ctypes.c_size_t()
        self._check(getattr(self.library, size)(program, ctypes.byref(count)), size)
        buffer = ctypes.create_string_buffer(count.value)
        self._check(getattr(self.library, get)(program, buffer), get)
        return buffer.raw

    def _check(self, code: int, doing: str) -> None:
        if code != 0:
            raise CheckFailed(f"{self.name} failed", f"error {code}, {doing}", "install it again")


@lru_cache(maxsize=4)
def find(release: int) -> Nvrtc:
    """The compiler of CUDA 12 or 13: from its wheel, else the system's; raises UnavailableError without one."""
    wheel = _WHEELS[release][0]
    for path in _places(release):
        try:
            for part in Path(path).parent.glob(f"libnvrtc-builtins.so.{release}.*"):
                ctypes.CDLL(str(part))  # looked up by name later, not always beside the library
            library = ctypes.CDLL(path)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0 and major.value == release:
            return Nvrtc(library, (major.value, minor.value))
    evidence = f"no libnvrtc.so.{release} of a wheel or of the system"
    raise UnavailableError(f"NVRTC {release} is missing", evidence, f"pip install {wheel}, or 'igate-edge[build]'")


def _places(release: int) -> Iterator[str]:
    name, folder = f"libnvrtc.so.{release}", _WHEELS[release][1]
    spec = importlib.util.find_spec("nvidia")
    for root in [] if spec is None else spec.submodule_search_locations or []:
        if (path := Path(root) / folder / name).exists():
            yield str(path)
    yield f"/usr/local/cuda/lib64/{name}"
    yield name
