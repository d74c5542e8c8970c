"""The launcher that needs nothing but the driver: libcuda.so.1 through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from igate_edge.errors import InputError

from . import launcher
from .launcher import Device, Triple

_ARCH_MAJOR, _ARCH_MINOR, _MOST_SHARED, _FREE_SHARED = 75, 76, 97, 48 * 1024
_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NO_DEVICE, _NOT_FOUND = 100, 500
_Handle, _Address = ctypes.c_void_p, ctypes.c_uint64


class Driver:
    """The library; a call raises CheckFailed with the driver's own words."""

    def __init__(self, library: str) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise launcher.missing_driver(error) from error

    def call(self, name: str, *arguments: Any, doing: str = "") -> None:
        """Call and raise for whatever is not success."""
        if (code := self.code(name, *arguments)) != 0:
            raise launcher.failed(doing or name, self.text(code))

    def code(self, name: str, *arguments: Any) -> int:
        """Call and return the driver's code."""
        return int(getattr(self._library, name)(*arguments))

    def text(self, code: int) -> str:
        """An error's name and sentence."""
        parts = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            self.code(function, code, ctypes.byref(text))
            parts.append((text.value or b"?").decode(errors="replace"))
        return f"{parts[0]} ({code}): {parts[1]}"


class CtypesModule:
    """A loaded image."""

    def __init__(self, owner: CtypesLauncher, image: bytes) -> None:
        self._owner, self._handle = owner, _Handle()
        self._functions: dict[str, tuple[Any, int]] = {}  # handle, bytes of shared memory that were asked for
        data = ctypes.create_string_buffer(image)  # PTX must end with a zero
        owner.call("cuModuleLoadData", ctypes.byref(self._handle), data, doing="load the kernels")

    def launch(
        self, name: str, grid: Triple, block: Triple, shared: int, args: Sequence[Any], stream: Any = None
    ) -> None:
        """See launcher.Module."""
        launcher.check_launch(self._owner.device, name, grid, block, shared, args)
        function = self._function(name, shared)
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(value) for value in args))
        self._owner.call(
            "cuLaunchKernel", function, *map(ctypes.c_uint, (*grid, *block, shared)), stream, pointers, None,
            doing=f"launch {name}",
        )  # fmt: skip

    def _function(self, name: str, shared: int) -> Any:
        if name not in self._functions:
            function = _Handle()
            code = self._owner.code("cuModuleGetFunction", ctypes.byref(function), self._handle, name.encode())
            if code == _NOT_FOUND:
                raise launcher.no_kernel(name)
            if code != 0:
                raise launcher.failed(f"find {name}", self._owner.driver.text(code))
            self._functions[name] = function, _FREE_SHARED
        function, asked = self._functions[name]
        if shared > asked:
            self._owner.call("cuFuncSetAttribute", function, _DYNAMIC_SHARED, shared, doing="reserve shared memory")
            self._functions[name] = function, shared
        return function


class CtypesLauncher:
    """An open device; see launcher.Launcher. `library`: the driver's file, by default as the system finds it."""

    def __init__(self, library: str = "libcuda.so.1", ordinal: int = 0) -> None:
        self.driver = Driver(library)
        if (code := self.driver.code("cuInit", 0)) != 0:
            raise launcher.missing_driver(self.driver.text(code))
        count, device = ctypes.c_int(), ctypes.c_int()
        self.driver.call("cuDeviceGetCount", ctypes.byref(count), doing="count devices")
        if not 0 <= ordinal < count.value:
            evidence = f"device {ordinal} of {count.value}"
            raise InputError("there is no such device", evidence, f"pass 0 to {count.value - 1}")
        self.driver.call("cuDeviceGet", ctypes.byref(device), ordinal, doing="open the device")
        self._ordinal, self._context = device, _Handle()
        self.device = self._describe()
        self.driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device, doing="open the device")

    def _describe(self) -> Device:
        name, version = ctypes.create_string_buffer(128), ctypes.c_int()
        self.driver.call("cuDeviceGetName", name, len(name), self._ordinal)
        self.driver.call("cuDriverGetVersion", ctypes.byref(version))
        values = []
        for which in (_ARCH_MAJOR, _ARCH_MINOR, _MOST_SHARED):
            value = ctypes.c_int()
            self.driver.call("cuDeviceGetAttribute", ctypes.byref(value), which, self._ordinal)
            values.append(value.value)
        return Device(name.value.decode(errors="replace"), 10 * values[0] + values[1], version.value, values[2])

    def code(self, name: str, *arguments: Any) -> int:
        """A driver call in this context; threads may change, and others may have set theirs."""
        if not self._context:
            raise InputError("the launcher is closed", f"{name} was called after close", "open it again")
        self.driver.call("cuCtxPushCurrent_v2", self._context, doing="enter the context")
        try:
            return self.driver.code(name, *arguments)
        finally:
            self.driver.call("cuCtxPopCurrent_v2", ctypes.byref(_Handle()), doing="leave the context")

    def call(self, name: str, *arguments: Any, doing: str) -> None:
        """`code`, and CheckFailed for whatever is not success."""
        if (code := self.code(name, *arguments)) != 0:
            raise launcher.failed(doing, self.driver.text(code))

    def load(self, image: bytes) -> CtypesModule:
        """See launcher.Launcher."""
        launcher.check_image(self.device, image)
        return CtypesModule(self, image)

    def allocate(self, size: int) -> int:
        """See launcher.Launcher."""
        place = _Address()
        self.call("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(size), doing=f"allocate {size} bytes")
        return place.value

    def free(self, address: int) -> None:
        """See launcher.Launcher."""
        self.call("cuMemFree_v2", _Address(address), doing="free memory")

    def upload(self, address: int, array: np.ndarray) -> None:
        """See launcher.Launcher."""
        launcher.check_array(array)
        size = ctypes.c_size_t(array.nbytes)
        self.call("cuMemcpyHtoD_v2", _Address(address), _Handle(array.ctypes.data), size, doing="copy to the device")

    def download(self, array: np.ndarray, address: int) -> None:
        """See launcher.Launcher."""
        launcher.check_array(array, writeable=True)
        size = ctypes.c_size_t(array.nbytes)
        self.call("cuMemcpyDtoH_v2", _Handle(array.ctypes.data), _Address(address), size, doing="copy from the device")

    def stream(self) -> Any:
        """See launcher.Launcher; it lives as long as the context."""
        handle = _Handle()
        self.call("cuStreamCreate", ctypes.byref(handle), 1, doing="create a stream")  # 1: beside the default stream
        return handle

    def synchronize(self) -> None:
        """See launcher.Launcher."""
        self.call("cuCtxSynchronize", doing="run a kernel")

    def close(self) -> None:
        """See launcher.Launcher."""
        if self._context:
            self._context = _Handle()
            self.driver.code("cuDevicePrimaryCtxRelease_v2", self._ordinal)

    def __enter__(self) -> CtypesLauncher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open() -> CtypesLauncher:
    """The first device of the system's driver."""
    return CtypesLauncher()
