"""These run only when asked for, as they download wheels: `pytest tests/conformity`, or `-m tensorrt`."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked = any("conformity" in argument for argument in config.args) or "tensorrt" in config.option.markexpr
    return None if asked else True
