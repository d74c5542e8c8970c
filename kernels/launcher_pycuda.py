"""The launcher on pycuda (extra `pycuda`), on the device's primary context: pycuda.autoinit is never imported."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from igate_edge.errors import InputError, UnavailableError

from . import launcher
from .launcher import Device, Triple

_FREE_SHARED = 48 * 1024


class PycudaModule:
    """A loaded image."""

    def __init__(self, owner: PycudaLauncher, image: bytes) -> None:
        self._owner = owner
        with owner.current("load the kernels"):
            self._module = owner.driver.module_from_buffer(image)

    def launch(
        self, name: str, grid: Triple, block: Triple, shared: int, args: Sequence[Any], stream: Any = None
    ) -> None:
        """See launcher.Module; stream: a pycuda.driver.Stream."""
        launcher.check_launch(self._owner.device, name, grid, block, shared, args)
        driver = self._owner.driver
        with self._owner.current(f"launch {name}"):
            try:
                function = self._module.get_function(name)
            except driver.LogicError as error:
                raise launcher.no_kernel(name, error) from error
            if shared > _FREE_SHARED:
                function.set_attribute(driver.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
            function(*map(_packed, args), grid=grid, block=block, shared=shared, stream=stream)


class PycudaLauncher:
    """An open device; see launcher.Launcher."""

    def __init__(self, ordinal: int = 0) -> None:
        try:
            import pycuda.driver as driver
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError):
                fix = "pip install 'igate-edge[pycuda]'"
                raise UnavailableError("pycuda is missing", str(error), fix) from error
            raise launcher.missing_driver(error) from error
        self.driver: Any = driver
        try:
            driver.init()
            device = driver.Device(ordinal)
            self._context = device.retain_primary_context()
        except driver.Error as error:
            raise launcher.missing_driver(error) from error
        self._open, self._held = True, dict[int, Any]()
        major, minor = device.compute_capability()
        most = device.get_attribute(driver.device_attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        self.device = Device(device.name(), 10 * major + minor, driver.get_driver_version(), most)

    @contextlib.contextmanager
    def current(self, doing: str) -> Iterator[None]:
        """The context is current inside; pycuda's errors become ours."""
        if not self._open:
            raise InputError("the launcher is closed", f"it was to {doing}", "open it again")
        self._context.push()
        try:
            yield
        except self.driver.Error as error:
            raise launcher.failed(doing, error) from error
        finally:
            self.driver.Context.pop()

    def load(self, image: bytes) -> PycudaModule:
        """See launcher.Launcher."""
        launcher.check_image(self.device, image)
        return PycudaModule(self, image)

    def allocate(self, size: int) -> int:
        """See launcher.Launcher."""
        with self.current(f"allocate {size} bytes"):
            place = self.driver.mem_alloc(size)
            self._held[int(place)] = place
        return int(place)

    def free(self, address: int) -> None:
        """See launcher.Launcher."""
        if address not in self._held:
            raise InputError("not memory of this launcher", f"{address:#x}", "pass what allocate gave, once")
        with self.current("free memory"):
            self._held.pop(address).free()

    def upload(self, address: int, array: np.ndarray) -> None:
        """See launcher.Launcher."""
        launcher.check_array(array)
        with self.current("copy to the device"):
            self.driver.memcpy_htod(address, array)

    def download(self, array: np.ndarray, address: int) -> None:
        """See launcher.Launcher."""
        launcher.check_array(array, writeable=True)
        with self.current("copy from the device"):
            self.driver.memcpy_dtoh(array, address)

    def stream(self) -> Any:
        """See launcher.Launcher."""
        with self.current("create a stream"):
            return self.driver.Stream()

    def synchronize(self) -> None:
        """See launcher.Launcher."""
        with self.current("run a kernel"):
            self.driver.Context.synchronize()

    def close(self) -> None:
        """See launcher.Launcher."""
        if self._open:
            with self.current("leave the context"):
                self._held.clear()
            self._open = False
            self._context.detach()

    def __enter__(self) -> PycudaLauncher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _packed(value: Any) -> Any:
    """A ctypes value as the numpy scalar of the same bytes, which is what pycuda packs by value."""
    if isinstance(value, ctypes.Structure):
        return np.frombuffer(bytes(value), np.dtype(("V", ctypes.sizeof(value))))[0]
    if isinstance(value, ctypes.c_void_p):
        return np.uintp(value.value or 0)
    return np.dtype(type(value)).type(value.value)


def open() -> PycudaLauncher:
    """The first device."""
    return PycudaLauncher()
