"""Which tensors inside a network leave their INT8 range on given frames: asked when a drift score is high."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError
from .preprocess import to_input

if TYPE_CHECKING:
    from ..bundle import Bundle


def saturation(bundle: Bundle, frames: Iterable[np.ndarray]) -> dict[str, float]:
    """Tensor -> share (0..1) of its values outside the range that calibration saw; largest first.

    Runs the float network on the CPU with every tensor as an output: much slower than the engine, and what an INT8
    engine clips where its scales are the bundle's. frames: uint8 RGB [H,W,3]. Raises DataError when there is none.
    """
    return saturation_of_inputs(bundle, (to_input(frame, bundle.preprocess) for frame in frames))


def saturation_of_inputs(bundle: Bundle, inputs: Iterable[np.ndarray]) -> dict[str, float]:
    """`saturation` of the network's inputs themselves: float32 [1,3,height,width], as a pipeline's fit makes them."""
    from ..compiler import calibrate, graph, layout, ranges

    laid = layout.lay_out(graph.load(bundle.model))
    limits, _ = ranges.of_layout(laid, bundle.ranges)
    probe, count = calibrate._Probe(laid.model), 0
    found = dict.fromkeys((name for name in limits if name in {probe.input, *probe.names}), 0.0)
    for image in inputs:
        count += 1
        values = probe.tensors(image)
        for name in found:
            low, high = limits[name]
            # Rounding in another order is not clipping: what counts lies half an INT8 step outside.
            slack = max(abs(low), abs(high)) / 254
            found[name] += float(np.mean((values[name] < low - slack) | (values[name] > high + slack)))
    if not count:
        raise DataError("no frames to look at", "0 frames given", "pass frames of the robot's camera")
    return dict(sorted(((name, share / count) for name, share in found.items()), key=lambda item: -item[1]))
