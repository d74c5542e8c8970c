"""Loading and launching kernels on a device, whichever library talks to the driver: one small interface.

launcher = open_launcher()                     # "ctypes", "pycuda" or "cuda.core"
module = launcher.load(image)                  # bytes of a cubin or of PTX
module.launch(name, grid, block, shared, args) # args: ctypes values, one a parameter; a struct is passed by value

Importing this touches no driver; opening a launcher does. What is wrong with a call is said before it reaches the
driver: an image for another GPU or driver, a truncated one, an unknown kernel, sizes that do not fit.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from igate_edge.errors import CheckFailed, InputError, UnavailableError

from . import cubin
from .launch import KERNELS, Launch

_VERSION = re.compile(rb"^\.version (\d+)\.(\d+)", re.MULTILINE)
_TARGET = re.compile(rb"^\.target sm_(\d+)", re.MULTILINE)
#: The newest PTX that a CUDA 12.5 or 12.6 driver, JetPack 6, compiles.
_PTX_OF_12 = (8, 5)
_KINDS = {"ctypes": "launcher_ctypes", "pycuda": "launcher_pycuda", "cuda.core": "launcher_cuda_core"}
#: The most blocks that a grid has, (x, y, z).
_MOST_BLOCKS = (2**31 - 1, 65535, 65535)

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Device:
    """arch: 87 for sm_87. driver: its CUDA version, 12060 for 12.6. shared: most bytes of shared memory of a block."""

    name: str
    arch: int
    driver: int
    shared: int


class Module(Protocol):
    """A loaded image."""

    def launch(
        self, name: str, grid: Triple, block: Triple, shared: int, args: Sequence[Any], stream: Any = None
    ) -> None:
        """Start kernel `name`. shared: bytes of dynamic shared memory. stream: one of the launcher's, None: default."""


class Launcher(Protocol):
    """An open device, on its primary context, which frameworks share. Addresses are integers."""

    device: Device

    def load(self, image: bytes) -> Module:
        """Load a cubin or PTX; raises InputError for one that this device or its driver cannot take."""

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes."""

    def free(self, address: int) -> None:
        """Give memory back."""

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device."""

    def download(self, array: np.ndarray, address: int) -> None:
        """Copy from the device into a contiguous array; waits for what was launched on the default stream."""

    def stream(self) -> Any:
        """A new stream."""

    def synchronize(self) -> None:
        """Wait for everything; raises CheckFailed where a kernel failed."""

    def close(self) -> None:
        """Leave the context; closing twice is fine."""


def open_launcher(kind: str = "ctypes") -> Launcher:
    """The first device by the driver's own library through ctypes, by pycuda or by cuda.core (each an extra).

    Raises UnavailableError where the library, the driver or a device is missing.
    """
    if kind not in _KINDS:
        raise InputError(f"unknown launcher {kind!r:.40}", f"known: {', '.join(_KINDS)}", "use one of these")
    return importlib.import_module(f".{_KINDS[kind]}", __package__).open()


def run(module: Module, launch: Launch, stream: Any = None) -> None:
    """Start a plan's launch."""
    module.launch(launch.kernel, launch.grid, launch.block, launch.shared, [launch.params], stream)


def check_image(device: Device, image: bytes) -> None:
    """Raise InputError unless the device and its driver can load this cubin or PTX."""
    version, target = _VERSION.search(image[:4096]), _TARGET.search(image[:4096])
    if version is None or target is None:
        cubin.require(image, device.arch, device.driver)
        return
    needs = int(version[1]), int(version[2])
    if int(target[1]) > device.arch:
        evidence = f"made for sm_{int(target[1])}, the device is sm_{device.arch}"
        raise InputError("the PTX is for a newer GPU", evidence, "build it for this one")
    if device.driver < 13000 and needs > _PTX_OF_12:
        evidence = f"ISA {needs[0]}.{needs[1]}, a CUDA 12.6 driver reads up to 8.5"
        raise InputError("the PTX is too new for the driver", evidence, "build it with NVRTC 12.6")
    if not image.rstrip(b"\0\n").endswith(b"}"):
        raise InputError("the PTX is truncated", f"it ends with {image[-20:]!r}", "build it again")


def check_launch(device: Device, name: str, grid: Triple, block: Triple, shared: int, args: Sequence[Any]) -> None:
    """Raise InputError for a launch that the driver would refuse, or that would read beyond its parameters."""
    for what, sides in (("grid", grid), ("block", block)):
        if len(sides) != 3 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise InputError(f"not a {what}", f"{sides!r:.80}", "pass three positive integers")
    if any(side > most for side, most in zip(grid, _MOST_BLOCKS, strict=True)):
        raise InputError("the grid is too large", f"{grid}", f"stay within {_MOST_BLOCKS}: use smaller tensors")
    if block[0] * block[1] * block[2] > 1024:
        raise InputError("the block is too large", f"{block}", "a block has at most 1024 threads")
    if not 0 <= shared <= device.shared:
        raise InputError("too much shared memory", f"{shared} bytes of {device.shared}", "use a smaller tile")
    for value in args:
        if not isinstance(value, ctypes.Structure | ctypes._SimpleCData):
            fix = "pass ctypes values: c_void_p for addresses, c_int32, .., or a Structure"
            raise InputError("an argument has no size", f"{type(value).__name__}", fix)
    known = KERNELS.get(name)
    if known is None:
        return
    size = ctypes.sizeof(known.params)
    if len(args) != 1 or ctypes.sizeof(args[0]) != size:
        evidence = f"{[ctypes.sizeof(value) for value in args]} bytes"
        raise InputError(f"{name} takes one struct of {size} bytes", evidence, f"pass {known.params.__name__}")
    if block != (known.threads, 1, 1):
        raise InputError(f"{name} needs blocks of {known.threads} threads", f"{block}", "use the plan's launch")


def check_array(array: np.ndarray, writeable: bool = False) -> None:
    """Raise InputError unless the array's bytes can be copied as they lie."""
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise InputError("not an array of numbers", f"{type(array).__name__}", "pass a numpy array")
    if not array.flags.c_contiguous or (writeable and not array.flags.writeable):
        evidence = f"strides {array.strides} of {array.dtype} {list(array.shape)}, writeable {array.flags.writeable}"
        raise InputError("the array cannot be copied in one piece", evidence, "pass np.ascontiguousarray of it")


def missing_driver(why: object) -> UnavailableError:
    """What every launcher says where there is no driver."""
    fix = "run on a machine with an NVIDIA GPU and its driver; `--backend emulate` computes the same on a CPU"
    return UnavailableError("there is no CUDA driver", str(why), fix)


def failed(doing: str, why: object) -> CheckFailed:
    """What every launcher says where the driver reports an error."""
    return CheckFailed(f"the CUDA driver failed to {doing}", str(why), "compute-sanitizer names the line")


def no_kernel(name: str, why: object = "not in the image") -> InputError:
    """What every launcher says where an image lacks a kernel."""
    return InputError(f"there is no kernel {name!r:.60}", str(why), f"kernels of this package: {', '.join(KERNELS)}")
