"""Peers at equal measured milliseconds: each is made as wide as the time of ours allows, and what that buys is noted.

Ours is the net of eighth.py. A peer that cannot be brought to within 5 % of ours is no comparison, and fails. Accuracy
after equal training is the business of `igate sweep` and of the results table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import judging
import numpy as np
import pytest
import subjects
from eighth import SIZE, WIDTH, WIDTHS, Eighth
from subjects import Built
from timing import Clock, measure, ms

from igate_edge import golden
from igate_edge.builder import build
from igate_edge.bundle import Bundle
from igate_edge.compiler import graph
from igate_edge.contract import Preprocess
from igate_edge.engines import onnxruntime as ort
from igate_edge.gating.export import to_onnx
from igate_edge.runtime import cache
from igate_edge.runtime.preprocess import to_input

EQUAL = 0.05
#: A merged net is a plain one of its widths, so it must take no longer than that.
MOST_OF_TWIN = 1.05
Made = Callable[[float], list[Built]]
#: Parameter, nets, and the ratio of their time to that of ours.
Found = tuple[float, list[Built], dict[str, Any]]


def at_equal_ms(eighth: Eighth, clock: Clock, make: Made, low: float, high: float) -> Found:
    """The parameter in [low, high], in which time rises, whose nets together take what ours takes: seven bisections."""
    ours, tried = eighth.nets["ours"], list[Found]()
    for _ in range(7):
        middle = float(np.sqrt(low * high))
        parts = make(middle)
        runs = {"peer": subjects.together(parts), "ours": ours.run}
        times = measure(runs, subjects.image(SIZE), [("peer", "ours")], seconds=2.0, clock=clock)
        pair = judging.known_ratio("peer / ours", times["peer"], times["ours"])
        tried.append((middle, parts, pair))
        low, high = (middle, high) if pair["ratio"] < 1 else (low, middle)
        if abs(pair["ratio"] - 1) < 0.01:
            break
    return min(tried, key=lambda found: abs(found[2]["ratio"] - 1))


def judge(name: str, found: Found, eighth: Eighth, figures: Callable[..., None]) -> None:
    """Note what the peer has at equal time, and fail when the time is not equal."""
    (value, parts, pair), ours = found, eighth.nets["ours"]
    macs = sum(part.macs for part in parts)
    text = f"{name} {value:.3g}: x{pair['ratio']:.3f} of ours, {macs / 1e6:.0f} MMAC"
    text += f" (ours {ours.useful / 1e6:.0f} useful, {ours.macs / 1e6:.0f} with zero blocks)"
    figures(text, parameter=value, ratio=pair["ratio"], macs=macs)
    judging.equal_time(f"{name} at equal ms", pair, EQUAL)


def test_plain_net_widened(eighth: Eighth, clock: Clock, benchmark: Any, figures: Callable[..., None]) -> None:
    """Of all dense nets the ones whose channel counts are multiples of 16: they are the fastest for their MACs."""
    eighth.keep(benchmark, "ours")
    plain = eighth.nets["plain"].macs

    def make(macs: float) -> list[Built]:
        return [subjects.build(subjects.dense(int(macs), SIZE))]

    found = at_equal_ms(eighth, clock, make, plain, 3 * plain)
    judge("plain net widened, MACs asked", found, eighth, figures)


def test_ours_is_as_fast_as_its_plain_twin(
    eighth: Eighth, longest: float, clock: Clock, benchmark: Any, figures: Callable[..., None]
) -> None:
    """The plain net of the very widths of ours."""
    eighth.keep(benchmark, "ours")
    twin = subjects.build(subjects.staged(WIDTHS, SIZE))
    runs = {"ours": eighth.nets["ours"].run, "twin": twin.run}
    times = measure(runs, subjects.image(SIZE), [("ours", "twin")], seconds=longest, clock=clock)
    fix = "look for operators that the plain net has not: benchmarks/test_joint.py"
    pair = judging.at_most("ours / plain net of its widths", times["ours"], times["twin"], MOST_OF_TWIN, fix)
    figures(f"ours / plain net of its widths {pair['ratio']:.3f}", ratio=pair["ratio"])


def test_separate_nets_narrowed(eighth: Eighth, clock: Clock, benchmark: Any, figures: Callable[..., None]) -> None:
    eighth.keep(benchmark, "ours")

    plain = eighth.nets["plain"].macs

    def make(macs: float) -> list[Built]:
        return [subjects.build(model) for model in subjects.singles(subjects.dense(int(macs), SIZE))]

    found = at_equal_ms(eighth, clock, make, plain / 6, plain)
    judge("three separate nets narrowed, MACs asked of each with all heads", found, eighth, figures)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["plain", "separate"])
def test_torch_pruning(kind: str, eighth: Eighth, clock: Clock, benchmark: Any, figures: Callable[..., None]) -> None:
    """A net too slow, pruned until it takes what ours takes: a plain one of twice the width, or three separate ones."""
    from igate_edge.training.peers import prune

    eighth.keep(benchmark, "ours")
    start = subjects.plain_net(2 * WIDTH if kind == "plain" else WIDTH, SIZE)

    def make(kept: float) -> list[Built]:
        pruned = graph.load(to_onnx(prune(start, 1 - kept), Preprocess(*SIZE)))
        return [subjects.build(part) for part in ([pruned] if kind == "plain" else subjects.singles(pruned))]

    judge(f"Torch-Pruning, {kind}, share kept", at_equal_ms(eighth, clock, make, 0.1, 1.0), eighth, figures)


@pytest.mark.peers
def test_openvino(
    example: Path, tmp_path: Path, longest: float, clock: Clock, benchmark: Any, figures: Callable[..., None]
) -> None:
    """The same INT8 file in another runtime: in INT8, with the bundle's golden answers; times side by side."""
    from igate_edge.engines import openvino

    bundle, key = Bundle.read(example), build(example, precision="int8", cache_dir=tmp_path).key
    entry, _ = cache.load(tmp_path, key)
    assert entry is not None
    data = entry.payload
    share = judging.int8(openvino.inspect(data))
    image = to_input(bundle.golden["frame"][0], bundle.preprocess)
    with openvino.open(data) as other, ort.open(data) as ours:
        golden.require(golden.check(bundle, other.run, "int8"), "OpenVINO")
        runs = {"ours": ours.run, "openvino": other.run}
        times = measure(runs, image, [("ours", "openvino")], seconds=longest, clock=clock)
        benchmark.pedantic(other.run, (image,), rounds=20, warmup_rounds=2)
    pair = judging.known_ratio("ONNX Runtime / OpenVINO", times["ours"], times["openvino"])
    seen = {name: ms(times[name]) for name in times}
    figures(
        f"the bundle in ONNX Runtime {seen['ours']:.2f} ms, in OpenVINO {openvino.probe()['version']} "
        f"{seen['openvino']:.2f} ms (x{pair['ratio']:.2f}), {share:.1%} of its convolutions in INT8",
        **seen,
    )
