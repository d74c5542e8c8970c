"""What importing costs: the robot side loads without torch, the package itself without anything heavy."""

from __future__ import annotations

import pkgutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import igate_edge

HEAVY = ("torch", "triton", "onnxruntime", "onnx", "cuda", "pycuda", "tensorrt", "lightning", "numpy", "PIL")
TORCH_SIDE = ("igate_edge.gating", "igate_edge.training", "igate_edge.backbones", "igate_edge.kernels.gated_select")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules() -> list[str]:
    names = [m.name for m in pkgutil.walk_packages(igate_edge.__path__, "igate_edge.")]
    kernels = Path(igate_edge.__file__).parent.parent / "kernels"
    names += [f"igate_edge.kernels.{m.name}" for m in pkgutil.iter_modules([str(kernels)])]
    return [name for name in names if name.split(".")[-1] not in ("__main__",)]


def test_import_is_light() -> None:
    loaded = python(f"import igate_edge, sys; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_import_takes_at_most_0_3_s() -> None:
    """A promise of the package (design section 4), taken as the median of five fresh interpreters."""
    code = "import time; t = time.perf_counter(); import igate_edge; print(time.perf_counter() - t)"
    assert statistics.median(float(python(code)) for _ in range(5)) <= 0.3


def test_robot_side_imports_with_torch_blocked() -> None:
    robot = [name for name in modules() if not name.startswith(TORCH_SIDE)]
    assert "igate_edge.bundle" in robot and "igate_edge.cli" in robot
    absent = ("torch", "triton", "lightning", "cuda", "pycuda", "tensorrt", "mujoco", "PIL")
    blocked = f"import importlib, sys\nfor m in {absent!r}: sys.modules[m] = None\n"
    python(blocked + f"for m in {robot!r}: importlib.import_module(m)")


@pytest.mark.parametrize("name", sorted(set(igate_edge.__all__) - {"__version__"}))
def test_every_public_name_exists(name: str) -> None:
    assert getattr(igate_edge, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = igate_edge.nonsense
