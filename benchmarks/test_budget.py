"""The bundle's engine meets the budget it was trained for: against the plain net, in one run, on this machine.

Both nets in turn, back to back and paced like a camera (`--rate`), at the median and the 99th percentile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import judging
import pytest
from timing import measure, paced

from igate_edge.builder import Options, open_engine
from igate_edge.bundle import Bundle
from igate_edge.compiler import calibrate, graph, quantize
from igate_edge.engines import onnxruntime as ort
from igate_edge.plain import fill
from igate_edge.runtime.cache import fingerprint
from igate_edge.runtime.preprocess import to_input

FRAMES = 300


def test_budget(
    example: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    longest: float,
    benchmark: Any,
    figures: Callable[..., None],
) -> None:
    budget = judging.read_budget(Bundle.read(example).manifest.get("budget"))
    bundle, engine, report = open_engine(example, Options(threads=budget.threads, cache_dir=tmp_path))
    image = to_input(bundle.golden["frame"][0], bundle.preprocess)
    plain = graph.load(fill(bundle.plain))
    rival = quantize.quantize(plain, calibrate.calibrate(plain, [image]), dialect="ort")
    with engine, ort.open(graph.dump(rival), threads=budget.threads) as other:
        judging.int8(ort.Coverage(**report.coverage), report.precision)
        runs = {"ours": engine.run, "plain": other.run}
        rate = float(request.config.getoption("--rate"))
        saturated = measure(runs, image, [("ours", "plain")], least=FRAMES, seconds=2 * longest)
        camera = paced(runs, image, rate, FRAMES)
        benchmark.pedantic(engine.run, (image,), rounds=50, warmup_rounds=3)
    ways = {"back to back": saturated, "paced": camera}
    limits = [f"{value:g} {unit}" for value, unit in ((budget.ratio, "of plain"), (budget.ms, "ms")) if value]
    figures(
        f"{example.name}, budget {' and '.join(limits)}, {rate:g} frames/s, {budget.threads} thread(s)",
        times_ms={f"{way}, {name}": [1e3 * t for t in times] for way, by in ways.items() for name, times in by.items()},
    )
    for way, times in ways.items():
        figures(judging.tails(way, times))
    for line in judging.meets_budget(budget, saturated, camera, fingerprint()):
        figures(line)
