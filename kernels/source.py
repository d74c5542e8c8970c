"""The CUDA sources as one text without includes: what nvcc, NVRTC and (for the emulator) g++ are given."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "cuda"
_INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)


def text(name: str = "igate.cu") -> str:
    """`cuda/NAME` with every `#include "..."` replaced by that file, each file once.

    >>> "#include" in text(), "igemm_s8_64x64" in text()
    (False, True)
    """
    return _inlined(name, set())


def digest(source: str | None = None) -> str:
    """SHA-256 of a source text (default: of all kernels), in hexadecimal: what built kernels are keyed by."""
    return hashlib.sha256((text() if source is None else source).encode()).hexdigest()


def _inlined(name: str, seen: set[str]) -> str:
    if name in seen:
        return ""
    seen.add(name)
    body = (FOLDER / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
    return _INCLUDE.sub(lambda found: _inlined(found[1], seen), body)
