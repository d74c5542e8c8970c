"""How much memory the Triton kernels of gated_select touch, read off the addresses that they load from and store to.

u: the elements of one feature map. A site of T tasks has T + 1 maps in and T + 1 maps out: at most 2T + 2 u forward.
Backward reads those T + 1 maps and T + 1 gradients and writes T + 1 gradients: 3T + 3 u. Triton's interpreter gives the
addresses, so this file runs like test_gated_select_triton.py.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from igate_edge.kernels import gated_select_op as op
from torch import Tensor

HOW = "run by `make test`: TRITON_INTERPRET=1 pytest tests/kernels/test_gated_select_traffic.py"
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason=HOW)
pytest.importorskip("triton", reason="TRITON IS MISSING, its kernels are not tested: pip install 'igate-edge[triton]'")

TASKS, SHAPE = 3, (2, 6, 16, 16)
U = int(np.prod(SHAPE))


class Trace:
    """Stands in for the interpreter's memory: counts the elements that each address is loaded and stored."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.loaded: Counter[int] = Counter()
        self.stored: Counter[int] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def load(self, addresses: Any, mask: Any, other: Any, kind: Any) -> Any:
        self.loaded.update(np.broadcast_to(addresses, np.shape(addresses))[np.asarray(mask, bool)].ravel().tolist())
        return self._memory.load(addresses, mask, other, kind)

    def store(self, addresses: Any, values: Any, mask: Any) -> Any:
        self.stored.update(np.asarray(addresses)[np.asarray(mask, bool)].ravel().tolist())
        return self._memory.store(addresses, values, mask)

    def elements(self, counted: Counter[int], x: Tensor) -> int:
        """Accesses to a map; fails where an element of it is touched twice."""
        found = [counted.pop(address, 0) for address in range(x.data_ptr(), x.data_ptr() + x.nbytes, x.element_size())]
        assert max(found) <= 1, "an element was touched twice"
        return sum(found)


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    from triton.runtime import interpreter

    trace = Trace(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", trace)
    return trace


def maps(count: int, layout: torch.memory_format, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(SHAPE).to(dtype).contiguous(memory_format=layout) for _ in range(count)]


def logits(pattern: Mapping[int, str]) -> Tensor:
    """Gates by task: "1" is open."""
    return torch.tensor([[1.0 if bit == "1" else -1.0 for bit in pattern[t]] for t in range(TASKS)])


#: Two channels are closed for all, one is open for all; per task and channel. Pairs agree: see `_reads` of the kernel.
GATES = logits({0: "001111", 1: "000011", 2: "001111"})
PLANE = U // SHAPE[1]

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


@TYPES
@LAYOUTS
def test_forward_reads_what_is_selected_and_writes_every_map_once(
    layout: torch.memory_format, dtype: torch.dtype, trace: Trace
) -> None:
    psi, *phis = maps(TASKS + 1, layout, dtype)
    outs = op.select(psi, phis, GATES, torch.zeros(TASKS, SHAPE[1]), None)
    opened = GATES >= 0
    total = 0
    for t in range(TASKS):
        read = trace.elements(trace.loaded, phis[t])
        assert read == int(opened[t].sum()) * PLANE
        total += read
    read = trace.elements(trace.loaded, psi)
    assert read == int((~opened.all(0)).sum()) * PLANE
    assert [trace.elements(trace.stored, out) for out in outs] == [U] * (TASKS + 1)
    assert total + read <= (TASKS + 1) * U and not trace.stored
    # What is left are gates and mix logits: 2T per channel that a program sees.
    blocks = np.prod(op.geometry(psi, op.BLOCK["forward"]).grid)
    assert sum(trace.loaded.values()) <= 2 * TASKS * SHAPE[0] * SHAPE[1] * blocks


@TYPES
@LAYOUTS
def test_backward_touches_three_t_plus_three_maps(
    layout: torch.memory_format, dtype: torch.dtype, trace: Trace
) -> None:
    psi, *rest = maps(2 * TASKS + 2, layout, dtype)
    phis, grads, beta = rest[:TASKS], rest[TASKS:], torch.zeros(TASKS, SHAPE[1])
    d_psi, d_alpha, d_beta, *d_phis = op.select_backward(grads, psi, phis, GATES, beta, None, [True] * (TASKS + 3))
    read = [trace.elements(trace.loaded, x) for x in (psi, *phis, *grads)]
    written = [trace.elements(trace.stored, x) for x in (d_psi, *d_phis)]
    assert read == [U] * (2 * TASKS + 2) and written == [U] * (TASKS + 1)
    assert sum(read) + sum(written) == (3 * TASKS + 3) * U
    for x in (d_alpha, d_beta):
        assert trace.elements(trace.stored, x) == TASKS * SHAPE[1]
    # What is left are the partial sums: written once, read once.
    parts = 2 * TASKS * op.geometry(psi, op.BLOCK["backward"]).parts * SHAPE[1]
    assert sum(trace.stored.values()) == parts == len(trace.stored)
    assert all(trace.loaded[address] == 1 for address in trace.stored)


def test_backward_of_fixed_gates_reads_no_map_that_no_gate_reads(trace: Trace) -> None:
    """Without a gradient of alpha what was not selected is not needed."""
    psi, *rest = maps(2 * TASKS + 2, torch.contiguous_format, torch.float32)
    phis, grads, beta = rest[:TASKS], rest[TASKS:], torch.zeros(TASKS, SHAPE[1])
    opened, wanted = GATES >= 0, [True, False, True, *[True] * TASKS]
    op.select_backward(grads, psi, phis, opened, beta, None, wanted)
    for t in range(TASKS):
        assert trace.elements(trace.loaded, phis[t]) == int(opened[t].sum()) * PLANE
    assert trace.elements(trace.loaded, psi) == int((~opened.all(0)).sum()) * PLANE


def test_without_a_mix_and_gates_to_learn_the_backward_reads_gradients_only(trace: Trace) -> None:
    psi, *rest = maps(2 * TASKS + 1, torch.contiguous_format, torch.float32)
    phis, grads = rest[:TASKS], rest[TASKS:]
    op.select_backward(grads, psi, phis, GATES >= 0, None, None, [True, False, False, *[True] * TASKS])
    assert [trace.elements(trace.loaded, x) for x in (psi, *phis)] == [0] * (TASKS + 1)
    assert [trace.elements(trace.loaded, x) for x in grads] == [U] * TASKS
