"""The launcher on NVIDIA's cuda.core (extra `cuda-core`), on the device's primary context.

cuda.core passes no struct by value, which is what these kernels take: it opens, loads and allocates; the launch itself
is one call of cuda.bindings, on which it stands.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from igate_edge.errors import UnavailableError

from . import launcher
from .launcher import Triple

_FREE_SHARED = 48 * 1024


class CudaCoreModule:
    """A loaded image."""

    def __init__(self, owner: CudaCoreLauncher, image: bytes) -> None:
        self._owner = owner
        make = owner.core.ObjectCode.from_ptx if b".version " in image[:4096] else owner.core.ObjectCode.from_cubin
        try:
            self._code = make(image)
            _ = self._code.handle  # loads; else it would wait for the first launch
        except Exception as error:  # cuda.core's errors have no public class
            raise launcher.failed("load the kernels", error) from error
        self._functions: dict[str, Any] = {}

    def launch(
        self, name: str, grid: Triple, block: Triple, shared: int, args: Sequence[Any], stream: Any = None
    ) -> None:
        """See launcher.Module; stream: a cuda.core Stream."""
        owner = self._owner
        launcher.check_launch(owner.device, name, grid, block, shared, args)
        driver = owner.driver
        owner.enter()
        if name not in self._functions:
            try:
                kernel = self._code.get_kernel(name)
            except Exception as error:
                raise launcher.no_kernel(name, error) from error
            handle = driver.CUkernel(int(kernel.handle))
            self._functions[name] = owner.take(f"find {name}", driver.cuKernelGetFunction(handle))
        function = self._functions[name]
        if shared > _FREE_SHARED:
            which = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            owner.take("reserve shared memory", driver.cuFuncSetAttribute(function, which, shared))
        pointers = (ctypes.c_void_p * len(args))(*(ctypes.addressof(value) for value in args))
        queue = driver.CUstream(0 if stream is None else int(stream.handle))
        place = ctypes.addressof(pointers)
        owner.take(f"launch {name}", driver.cuLaunchKernel(function, *grid, *block, shared, queue, place, 0))


class CudaCoreLauncher:
    """An open device; see launcher.Launcher."""

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda import core
            from cuda.bindings import driver
        except ImportError as error:
            raise UnavailableError("cuda.core is missing", str(error), "pip install 'igate-edge[cuda-core]'") from error
        self.core: Any = core
        self.driver: Any = driver
        try:
            self._device = core.Device(ordinal)
            self._device.set_current()
        except Exception as error:  # no library, no device: each has a class of its own
            raise launcher.missing_driver(error) from error
        arch = self._device.compute_capability
        most = self._device.properties.max_shared_memory_per_block_optin
        version = self.take("read its version", driver.cuDriverGetVersion())
        self.device = launcher.Device(self._device.name, 10 * arch.major + arch.minor, version, most)

    def enter(self) -> None:
        """Make the primary context current in this thread."""
        self._device.set_current()

    def take(self, doing: str, result: Sequence[Any]) -> Any:
        """The value of a driver call, which gives (error, value)."""
        if int(result[0]) != 0:
            raise launcher.failed(doing, result[0])
        return result[1] if len(result) > 1 else None

    def load(self, image: bytes) -> CudaCoreModule:
        """See launcher.Launcher."""
        launcher.check_image(self.device, image)
        self.enter()
        return CudaCoreModule(self, image)

    def allocate(self, size: int) -> int:
        """See launcher.Launcher."""
        self.enter()
        return int(self.take(f"allocate {size} bytes", self.driver.cuMemAlloc(size)))

    def free(self, address: int) -> None:
        """See launcher.Launcher."""
        self.enter()
        self.take("free memory", self.driver.cuMemFree(address))

    def upload(self, address: int, array: np.ndarray) -> None:
        """See launcher.Launcher."""
        launcher.check_array(array)
        self.enter()
        self.take("copy to the device", self.driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes))

    def download(self, array: np.ndarray, address: int) -> None:
        """See launcher.Launcher."""
        launcher.check_array(array, writeable=True)
        self.enter()
        self.take("copy from the device", self.driver.cuMemcpyDtoH(array.ctypes.data, address, array.nbytes))

    def stream(self) -> Any:
        """See launcher.Launcher."""
        self.enter()
        return self._device.create_stream()

    def synchronize(self) -> None:
        """See launcher.Launcher."""
        self.enter()
        self.take("run a kernel", self.driver.cuCtxSynchronize())

    def close(self) -> None:
        """Nothing to leave: cuda.core keeps the primary context for the process."""

    def __enter__(self) -> CudaCoreLauncher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open() -> CudaCoreLauncher:
    """The first device."""
    return CudaCoreLauncher()
