"""The way a GPU goes, up to the launch: Triton's just-in-time compiler takes the operator's own calls, without a GPU.

The driver is a stand-in that names a target; `warmup` compiles and does not launch. What the kernels compute is tested
by the interpreter, in test_gated_select_triton.py.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from igate_edge.kernels import gated_select_op as op

triton = pytest.importorskip("triton", reason="TRITON IS MISSING: pip install 'igate-edge[triton]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process", allow_module_level=True)


class NoDriver:
    """As much of a driver as compiling for a target asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Kernels that were compiled, by name, instead of being launched."""
    from igate_edge.kernels import gated_select_triton as device
    from triton.runtime import driver

    found: dict[str, list[Any]] = {}
    before = driver._active
    driver.set_active(NoDriver())
    for name in ("select_forward", "select_backward", "select_reduce"):
        kernel = getattr(device, name)

        def warm(*args: Any, _run: Any = kernel.run, _name: str = name, warmup: bool, **kwargs: Any) -> Any:
            found.setdefault(_name, []).append(_run(*args, warmup=True, **kwargs))

        monkeypatch.setattr(kernel, "run", warm)
    monkeypatch.setattr(op, "runs_triton", lambda x: True)
    yield found  # type: ignore[misc]
    driver._active = before


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_operator_compiles_for_a_gpu(compiled: dict[str, list[Any]]) -> None:
    psi, *phis = (torch.zeros(2, 16, 8, 8, dtype=torch.float16).requires_grad_() for _ in range(3))
    alpha, beta = (torch.zeros(2, 16).requires_grad_() for _ in range(2))
    sum(x.sum() for x in op.select(psi, phis, alpha, beta, None)).backward()
    assert {name: len(kernels) for name, kernels in compiled.items()} == {
        "select_forward": 1,
        "select_backward": 1,
        "select_reduce": 1,
    }
    # Planes of 64 halves lie at multiples of 16 bytes: T + 1 vector loads and as many stores.
    ptx = compiled["select_forward"][0].asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == 3 and ptx.count("st.global.v4.b32") == 3
    # Fixed gates, no mix, one loss: other constants, holes in the tuples.
    op.select(psi, phis, alpha.detach() >= 0, None, None)[1].sum().backward()
    assert len(compiled["select_forward"]) == len(compiled["select_backward"]) == 2
    assert len(compiled["select_reduce"]) == 1


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 5, 7)])
def test_sizes_of_one_compile_too(shape: tuple[int, ...], compiled: dict[str, list[Any]]) -> None:
    """The just-in-time compiler makes constants of arguments that are 1."""
    psi, phi = (torch.zeros(shape).requires_grad_() for _ in range(2))
    alpha, beta = (torch.zeros(1, shape[1]).requires_grad_() for _ in range(2))
    sum(x.sum() for x in op.select(psi, [phi], alpha, beta, None)).backward()
    assert compiled.keys() == {"select_forward", "select_backward", "select_reduce"}
