"""One tiny bundle for all tests of bags."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinynet

from igate_edge.package import package


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, frames = tmp_path_factory.mktemp("robotics") / "tiny.igate", tinynet.frames(8)
    package(tinynet.gated_onnx(), path, calibration=frames, golden=frames[:4])
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")
