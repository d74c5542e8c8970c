"""The arithmetic that the references are made of."""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np
from igate_edge.kernels.exact import fmaf, to_int8


def test_fmaf_rounds_once_as_the_c_library_does() -> None:
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    library.fmaf.restype, library.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(4000).astype(np.float32) for _ in range(2))
    c = (-a * b * rng.choice([1, 1 + 2**-20, 0.5, 2**-24, 2**30], 4000)).astype(np.float32)
    want = [library.fmaf(*row) for row in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    np.testing.assert_array_equal(fmaf(a, b, c), np.array(want, np.float32))
    twice = (a * b + c).astype(np.float32)
    assert (twice != fmaf(a, b, c)).any(), "these inputs tell one rounding from two"


def test_ties_go_to_even_and_ends_saturate() -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 200, -200, 126.6], np.float32)
    assert to_int8(values).tolist() == [0, 2, 2, 0, -2, 127, -128, 127]
    assert to_int8(values, 0, 6).tolist() == [0, 2, 2, 0, 0, 6, 0, 6]
