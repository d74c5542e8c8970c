"""Images that the emulated driver takes: a stand-in cubin made by hand, so that no compiler of NVIDIA's is needed."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from igate_edge.kernels import source
from igate_edge.kernels.launch import KERNELS


def cubin(abi: int = 7, arch: int = 87, digest: str | None = None, kernels: Sequence[str] = tuple(KERNELS)) -> bytes:
    """An ELF header, names of code sections and the source's digest, with one program header and a section table."""
    flags = (arch << 8 | 4) if abi == 8 else (arch << 16 | 5 << 8 | arch)
    names = b"".join(b".text." + name.encode() + b"\0" for name in kernels)
    body = names + b"igate source " + (digest or source.digest()).encode() + b"\0"
    body += bytes(-len(body) % 8)
    head = b"\x7fELF\x02\x01\x01\x33" + bytes([abi]) + bytes(7)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 64, 120 + len(body), flags, 64, 56, 1, 64, 2, 1)
    return head + bytes(56) + body + bytes(128)


def ptx(version: str = "8.5", target: str = "sm_80", digest: str | None = None) -> bytes:
    """PTX that names all kernels."""
    entries = "".join(f".visible .entry {name}(\n)\n{{\nret;\n}}\n" for name in KERNELS)
    return f"// igate source {digest or source.digest()}\n.version {version}\n.target {target}\n{entries}".encode()
