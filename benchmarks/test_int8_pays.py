"""INT8 against float on the bundle's network: as a whole, and layer by layer where it runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import judging
import subjects
from timing import Clock, layer_us, measure

from igate_edge.builder import networks
from igate_edge.bundle import Bundle
from igate_edge.engines import onnxruntime as ort
from igate_edge.runtime.preprocess import to_input

#: What an engine that ran its losing layers in float could gain at best.
MOST_LOST = 0.10


def test_int8_pays(example: Path, longest: float, clock: Clock, benchmark: Any, figures: Callable[..., None]) -> None:
    bundle = Bundle.read(example)
    image = to_input(bundle.golden["frame"][0], bundle.preprocess)
    net = subjects.build(networks(bundle)[0], "merged")
    judging.int8(ort.inspect(net.int8))
    with ort.open(net.floats) as floats:
        times = measure(
            {"int8": net.run, "float": floats.run}, image, [("int8", "float")], seconds=longest, clock=clock
        )
    benchmark.pedantic(net.run, (image,), rounds=20, warmup_rounds=2)
    fix = "use precision='float' on this machine"
    pair = judging.at_most("INT8 / float, whole net", times["int8"], times["float"], 1.0, fix)
    figures(f"INT8 / float, whole net: {pair['ratio']:.2f}", int8_over_float=pair["ratio"])


def test_int8_pays_layer_by_layer(example: Path, benchmark: Any, figures: Callable[..., None]) -> None:
    bundle = Bundle.read(example)
    image = to_input(bundle.golden["frame"][0], bundle.preprocess)
    net = subjects.build(networks(bundle)[0], "merged")
    seen = layer_us({"int8": net.int8, "float": net.floats}, image)
    benchmark.pedantic(net.run, (image,), rounds=20, warmup_rounds=2)
    layers = subjects.layers(net.model, seen["int8"], seen["float"])
    judging.all_layers(layers, subjects.conv_macs(net.model))
    losers = judging.int8_pays(layers, MOST_LOST)
    total = [sum(pair[which] for pair in layers.values()) for which in (0, 1)]
    figures(f"{len(layers)} layers: INT8 {total[0]:.0f} us, float {total[1]:.0f} us; INT8 loses in {len(losers)}")
    figures("\n".join(losers), layers=layers)
