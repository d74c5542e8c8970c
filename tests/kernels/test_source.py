"""The kernel sources as compilers and the wheel get them."""

from __future__ import annotations

from pathlib import Path

import pytest
from igate_edge.kernels import source


def test_the_source_is_one_text_without_headers() -> None:
    text = source.text()
    assert "#include" not in text
    assert "#pragma once" not in text
    assert source.digest() == source.digest(text) != source.digest(text + " ")
    assert text.count("struct IgemmParams") == 1


def test_the_wheel_carries_every_source() -> None:
    root = Path(source.FOLDER).parent
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((root.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["igate_edge.kernels"]
    carried = {path for pattern in patterns for path in root.glob(pattern)}
    there = {path for folder in ("cuda", "emulator") for path in (root / folder).iterdir() if path.is_file()}
    assert {path for path in there if path.suffix != ".py"} <= carried
    assert "igate_edge.kernels.emulator" in project["tool"]["setuptools"]["packages"]
