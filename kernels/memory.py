"""Host memory laid out and aligned as device memory is, and checks of device addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from igate_edge.errors import InputError

ALIGNMENT = 256  # of what a driver allocates; the kernels themselves need 16


def aligned(size: int, dtype: type = np.uint8) -> np.ndarray:
    """`size` zeroed elements that start at a multiple of 256 bytes.

    >>> aligned(3, np.float32).ctypes.data % 256
    0
    """
    count = size * np.dtype(dtype).itemsize
    raw = np.zeros(count + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count].view(dtype)


def device_array(array: np.ndarray) -> np.ndarray:
    """A flat copy of `array` in aligned memory."""
    copy = aligned(array.size, array.dtype.type)
    copy[:] = array.reshape(-1)
    return copy


def address(array: np.ndarray) -> int:
    """Where the array's memory starts: on the emulator, its device address."""
    return int(array.ctypes.data)


def check_addresses(**addresses: int) -> None:
    """Raise InputError for an address that is null or not a multiple of 16."""
    for name, place in addresses.items():
        if place == 0 or place % 16:
            raise InputError(f"{name} is not a usable address", f"{place:#x}", "align it to 16 bytes")


@dataclass(frozen=True)
class Tables:
    """Read-only tables of a plan in one uint8 buffer, to be copied to the device once; parts: (start, bytes)."""

    data: np.ndarray
    parts: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Tables:
        """Copy `arrays` into one buffer, each at a multiple of 256 bytes."""
        parts, size = {}, 0
        for name, array in arrays.items():
            parts[name] = (size, array.nbytes)
            size += -(-max(array.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        data = aligned(size)
        for name, array in arrays.items():
            data[parts[name][0] : sum(parts[name])] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        data.setflags(write=False)
        return cls(data, parts)

    def addresses(self, base: int) -> dict[str, int]:
        """Where each table lies when the buffer lies at `base`."""
        return {name: base + start for name, (start, _) in self.parts.items()}

    def each(self) -> list[np.ndarray]:
        """The tables one by one: so mapped by the emulator, a kernel that reads beyond one of them is found out."""
        return [self.data[start : start + size] for start, size in self.parts.values()]
