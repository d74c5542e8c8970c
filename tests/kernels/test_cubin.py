"""Headers of cubins, made by hand: what nvcc 13 (ABI 8) and ptxas 12.9 (ABI 7) write, and what is refused."""

from __future__ import annotations

import struct

import pytest
from igate_edge.kernels import cubin

from igate_edge.errors import InputError


def elf(abi: int = 7, arch: int = 87, machine: int = 190, size: int = 256) -> bytes:
    """A header whose program table starts at 64 with one entry of 56 bytes and whose section table ends at 248."""
    flags = (arch << 8 | 4) if abi == 8 else (arch << 16 | 5 << 8 | arch)
    head = b"\x7fELF\x02\x01\x01\x33" + bytes([abi]) + bytes(7)
    head += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 120, flags, 64, 56, 1, 64, 2, 1)
    return head + bytes(size - len(head))


@pytest.mark.parametrize("abi", [7, 8])
@pytest.mark.parametrize("arch", [80, 87, 90])
def test_architecture_and_abi(abi: int, arch: int) -> None:
    assert cubin.header(elf(abi, arch)) == cubin.Header(arch, abi)


def test_what_is_no_whole_cubin_is_refused() -> None:
    for data, sentence in (
        (b"", r"is no cubin: 0 bytes, starts with b''"),
        (b"\x7fELF", "is no cubin"),
        (b"MZ" + bytes(100), r"starts with b'MZ"),
        (elf(machine=62), "an ELF file for machine 62"),
        (elf(size=247), "truncated: 247 bytes of at least 248"),
        (elf()[:100], "truncated: 100 bytes"),
    ):
        with pytest.raises(InputError, match=sentence):
            cubin.header(data)


def test_a_driver_of_jetpack_6_refuses_a_cubin_of_cuda_13() -> None:
    cubin.require(elf(7), 87, 12060)
    cubin.require(elf(7), 87, 13000)
    cubin.require(elf(8), 87, 13000)
    with pytest.raises(InputError, match=r"too new for the driver: ELF ABI 8 needs a CUDA 13 driver .*this is 12.6"):
        cubin.require(elf(8), 87, 12060)


def test_a_cubin_of_another_gpu_is_refused() -> None:
    with pytest.raises(InputError, match="for another GPU: built for sm_90, the device is sm_87"):
        cubin.require(elf(7, 90), 87, 13000)
