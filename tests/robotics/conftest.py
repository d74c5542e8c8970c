"""One tiny bundle for all tests of bags."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinynet


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinynet.packaged(tmp_path_factory.mktemp("robotics") / "tiny.igate")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")
