"""What a launch is, for every launcher alike: kernel name, grid, block, shared memory and one struct of parameters.

Each kernel takes ONE parameter, a struct by value; the classes below are those structs, field by field as in cuda/.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

Pointer, Int, Float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


@dataclass(frozen=True)
class Launch:
    """One kernel launch; `bytes(params)` is the kernel's one parameter. shared: bytes of dynamic shared memory."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    params: ctypes.Structure


class IgemmParams(ctypes.Structure):
    """Of igemm_s8_*: see igemm.cuh."""

    _fields_ = (
        *[(name, Pointer) for name in ("x", "weights", "chunks", "branches", "tiles", "blocks", "affine", "skip", "y")],
        *[(name, Int) for name in ("height", "width", "out_width", "out_plane", "pixels")],
        *[(name, Int) for name in ("stride_y", "stride_x", "pad_y", "pad_x")],
        *[(name, Int) for name in ("x_image", "x_pixel", "y_image", "y_pixel")],
        *[(name, Float) for name in ("low", "high", "skip_scale")],
        ("floats", Int),
    )


class MergeParams(ctypes.Structure):
    """Of merge_s8: see merge.cuh."""

    _fields_ = (
        *[(name, Pointer) for name in ("x", "y", "sources", "masks", "weights", "targets")],
        *[(name, Int) for name in ("blocks", "tasks", "pixels", "plane")],
        *[(name, Int) for name in ("x_image", "x_pixel", "y_image", "y_pixel")],
    )


class PreprocessParams(ctypes.Structure):
    """Of preprocess_s8: see image.cuh."""

    _fields_ = (
        *[(name, Pointer) for name in ("frame", "chroma", "rows", "columns", "chroma_rows", "chroma_columns", "y")],
        *[(name, Int) for name in ("height", "width", "frame_row", "chroma_row", "vector", "fold")],
        ("scale", Float * 3),
        ("bias", Float * 3),
        ("matrix", Float * 9),
        ("luma", Float),
        ("pad", Int * 3),
    )


class UpsampleParams(ctypes.Structure):
    """Of argmax_upsample, depth_upsample and normals_upsample: see image.cuh."""

    _fields_ = (
        *[(name, Pointer) for name in ("x", "y", "rows", "columns")],
        *[(name, Int) for name in ("height", "width", "x_width", "x_pixel", "channels", "x_plane")],
        *[(name, Float) for name in ("scale", "low", "high")],
    )


@dataclass(frozen=True)
class Kernel:
    """A kernel of the library: threads a block and its struct of parameters."""

    threads: int
    params: type[ctypes.Structure]


@dataclass(frozen=True)
class Tile:
    """A variant of igemm_s8: pixels and output channels of a block."""

    pixels: int
    channels: int

    @property
    def kernel(self) -> str:
        return f"igemm_s8_{self.pixels}x{self.channels}"

    @property
    def shared(self) -> int:
        """Bytes of shared memory: three stages of 64 bytes a row."""
        return 3 * 64 * (self.pixels + self.channels)


THREADS = 128
TILES = (Tile(64, 32), Tile(64, 64), Tile(128, 64))
UPSAMPLES = {"semseg": "argmax_upsample", "depth": "depth_upsample", "normals": "normals_upsample"}
#: Every kernel of cuda/igate.cu; all blocks have 128 threads, only igemm_s8_* take dynamic shared memory (Tile.shared).
KERNELS: dict[str, Kernel] = {
    **{tile.kernel: Kernel(THREADS, IgemmParams) for tile in TILES},
    **{name: Kernel(THREADS, UpsampleParams) for name in UPSAMPLES.values()},
    "merge_s8": Kernel(THREADS, MergeParams),
    "preprocess_s8": Kernel(THREADS, PreprocessParams),
}


def per_element(kernel: str, elements: int, params: ctypes.Structure) -> Launch:
    """A launch with one thread an element."""
    return Launch(kernel, (-(-elements // THREADS), 1, 1), (THREADS, 1, 1), 0, params)
