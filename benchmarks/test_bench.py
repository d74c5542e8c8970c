"""The shipped bundle against its rivals: how much of it runs as INT8, and its time beside its rivals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from igate_edge.accuracy import int8_losses
from igate_edge.bench import BenchReport, bench
from igate_edge.builder import MIN_COVERAGE
from igate_edge.bundle import Bundle
from igate_edge.runtime.engine import Engine


def table(report: BenchReport) -> str:
    """Rows for people: ms, ratio to the plain net with its quartiles, share of INT8."""
    lines = [f"{report.device['cpu']}, {report.threads} thread(s), {report.rounds} rounds, pinned: {report.pinned}"]
    for row in report.rows:
        low, high = row.ratio_quartiles
        numbers = f"{row.ms:7.2f} ms  x{row.ratio:.2f} of plain ({low:.2f}-{high:.2f})  {row.macs / 1e6:7.1f} MMAC"
        lines.append(f"{row.label:32} {numbers}  INT8 {row.int8_share:.1%}  {row.note}")
    pair = report.separate_over_ours
    return "\n".join([*lines, f"separate / ours: {pair['ratio']:.2f} (spread {pair['spread']:.0%})"])


def test_int8_coverage_and_ratios(example: Path, benchmark: Any, figures: Callable[..., None]) -> None:
    report = benchmark.pedantic(lambda: bench(example, rounds=100), rounds=1)
    figures(table(report), report=report.as_json())
    ours = report.row("ours")
    assert ours.int8_share >= MIN_COVERAGE
    assert ours.meaningful and report.separate_over_ours["meaningful"], report.warnings
    slower = [row.ms for row in report.rows if row.name == "dense"]
    assert all(ours.ms < ms for ms in slower), "a pruned net must beat run-time gating"


def test_int8_is_within_1_percent_of_float(example: Path, seconds: Callable[..., float]) -> None:
    """What `igate export` measured on the held-out frames, as the bundle carries it; timed is its reading."""
    seconds(lambda: Bundle.read(example))
    bundle = Bundle.read(example)
    results = bundle.manifest["results"]
    for spec in bundle.tasks:
        assert results["float"][spec.name][spec.metric] > 0 and results["int8"][spec.name][spec.metric] > 0
    assert int8_losses(bundle.tasks, results) == []


def test_frame(
    example: Path, tmp_path: Path, frames: list, seconds: Callable[..., float], figures: Callable[..., None]
) -> None:
    """One camera frame through the engine, pre- and postprocessing included; the number is for the record."""
    with Engine.open(example, cache_dir=tmp_path) as engine:
        taken = seconds(lambda: engine(frames[0]), rounds=50)
        figures(f"{1e3 * taken:.2f} ms a frame, {engine.report.precision}")
    assert taken > 0
