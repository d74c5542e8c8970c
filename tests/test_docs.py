"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib

import pytest
from test_import import modules


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    if name.endswith("_triton"):
        pytest.importorskip("triton", reason="NOT TESTED: Triton is missing, pip install 'igate-edge[triton]'")
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failed == 0
