"""The stand-ins of TensorRT and CUDA, for the tests of the engines that drive them."""

from __future__ import annotations

import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import Behaviour, install


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> Behaviour:
    return install(monkeypatch, cuda)
