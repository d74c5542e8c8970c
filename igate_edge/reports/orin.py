"""What a bundle's network should take on an Orin: PREDICTED from a machine model, measured on no Jetson.

The model is that of `kernels.orin` (a layer's tiles on the multiprocessors, its bytes through the memory) summed over
the layers of the INT8 graph, one after the other, each with the gap between two nodes of a CUDA graph. What has no
INT8 kernel moves its FP16 bytes once. Assumed: clocks at the power mode's maximum, batch 1, nothing else running.
The range is what other software on the same machine could do: from kernels that reach 80 % of the slower of
arithmetic and memory, 2 us between nodes, to kernels that reach 40 %, launched one by one at 10 us each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..compiler import groups
from ..compiler.half import check_model
from ..engines.emulate import plan_of
from ..engines.emulate_graph import ConvStep, HostStep, program
from .tables import Grid

GAP_US, BEST_GAP_US, WORST_GAP_US = 3.0, 2.0, 10.0
BEST_SHARE, WORST_SHARE = 0.8, 0.4
#: Operators that only name a tensor anew: nothing is launched for them.
_FREE = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class OrinTime:
    """Predicted milliseconds of one frame: the likely time and the range around it. launches: nodes of the graph."""

    machine: str
    low_ms: float
    ms: float
    high_ms: float
    launches: int


def predict(model: ir.Model) -> tuple[OrinTime, ...]:
    """One prediction a module, of an INT8 graph in the `trt` dialect (before `compiler.half`).

    Raises InputError (no model), GraphError for a graph that the INT8 kernels cannot be packed for.
    """
    from igate_edge.kernels.orin import MACHINES
    from igate_edge.kernels.orin import predict as layer_time

    check_model(model)
    steps = program(model).steps
    plans = [plan_of(step.layer) for step in steps if isinstance(step, ConvStep)]
    moved = [_bytes(s.node) for s in steps if isinstance(s, HostStep) and s.node.op_type not in _FREE]
    found = []
    for machine in MACHINES:
        layers = [layer_time(plan, machine) for plan in plans]
        copies = sum(moved) / machine.gigabytes / 1e3
        nodes = len(plans) + len(moved)
        bound = sum(layer.bound_us for layer in layers) + copies
        likely = sum(layer.us for layer in layers) + copies + nodes * GAP_US
        low = bound / BEST_SHARE + nodes * BEST_GAP_US
        high = max(bound / WORST_SHARE, likely) + nodes * WORST_GAP_US
        found.append(OrinTime(machine.name, min(low, likely) / 1e3, likely / 1e3, high / 1e3, nodes))
    return tuple(found)


def _bytes(node: ir.Node) -> int:
    """FP16 bytes that a node reads and writes."""
    values = [*groups.activations(node.inputs), *node.outputs]
    return 2 * sum(int(np.prod(value.shape.numpy())) for value in values if value.shape is not None)


def grid(times: tuple[OrinTime, ...]) -> Grid:
    """The predictions as a table that says what they are."""
    rows = [(t.machine, f"{t.ms:.2f}", f"{t.low_ms:.2f} to {t.high_ms:.2f}", str(t.launches)) for t in times]
    note = (
        "Predicted, not measured: a model of the machine (multiprocessors, clocks, memory), with our kernels for every "
        "convolution. The range runs from kernels at 80 % of that machine's limits, 2 us between nodes, to 40 % and "
        "10 us. jetson/bringup.sh measures it on a board."
    )
    return Grid("Predicted for Jetson Orin", ("module", "ms, predicted", "range", "launches"), rows, 1, note=note)
