"""The kernels' arithmetic in numpy, bit for bit: what their references are made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def fmaf(a: ArrayLike, b: ArrayLike, c: ArrayLike) -> np.ndarray:
    """float32 a * b + c, rounded once, as a fused multiply-add does it.

    >>> bool(fmaf(np.float32(1 + 2**-12), np.float32(1 + 2**-12), np.float32(-1)) == np.float32(2**-11 + 2**-24))
    True
    """
    wide = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32)  # 48 bits: exact
    more = np.broadcast_to(np.asarray(c, np.float32).astype(np.float64), np.broadcast_shapes(wide.shape, np.shape(c)))
    total = np.asarray(wide + more)
    back = total - wide
    lost = (wide - (total - back)) + (more - back)  # exactly what the float64 sum dropped
    # Rounded to odd, the sum may be rounded once more without harm.
    even = (total.view(np.int64) & 1) == 0
    total = np.where((lost != 0) & even, np.nextafter(total, np.copysign(np.inf, lost)), total)
    return total.astype(np.float32)


def to_int8(values: np.ndarray, low: float = -128, high: float = 127) -> np.ndarray:
    """Nearest whole numbers, ties to even, within [low, high]."""
    return np.rint(np.clip(values, np.float32(low), np.float32(high))).astype(np.int8)
