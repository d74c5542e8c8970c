"""The report of a bundle: one HTML file with what it predicts, costs and shares, and what fell back and why."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contract import OutputSpec
from ..errors import GraphError, InputError
from ..files import make_folder, write_atomic
from .gallery import Shown, gallery
from .grids import (
    METRICS,
    accuracy_grid,
    bench_grid,
    cost_grid,
    golden_grid,
    results_nets,
    separate_sentence,
    stage_grid,
)
from .page import bullets, facts, page, paragraph
from .sharing import Layer, layers, sharing_svg, stage_fractions
from .tables import Grid, budget_line, count, flat, number, percent, sentence_list, size_of, times

if TYPE_CHECKING:
    import numpy as np

    from ..bench import BenchReport, BenchRow
    from ..builder import BuildReport
    from ..bundle import Bundle
    from ..verify import VerifyReport

BENCH_ROUNDS = 40


@dataclass(frozen=True)
class Written:
    """Where the report lies, and its first sentence."""

    path: Path
    headline: str


@dataclass(frozen=True)
class Evidence:
    """All that a report is made of; `bench` is None when nothing was timed, `orin` when nothing is predicted."""

    name: str
    size: int
    bundle: Bundle
    build: BuildReport
    verify: VerifyReport
    bench: BenchReport | None
    shown: Sequence[Shown]
    orin: Grid | None = None


def make_report(
    bundle_path: Path,
    out: Path,
    *,
    measure: bool = True,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Written:
    """Build, verify and (with `measure`) time a bundle, then write its report to `out`, whole or not at all."""
    from ..bench import bench
    from ..builder import build
    from ..bundle import Bundle
    from ..frames import pillow
    from ..verify import verify

    pillow()
    if out.resolve() == bundle_path.resolve():
        raise InputError("the report would overwrite the bundle", str(out), "pass another --out")
    bundle = Bundle.read(bundle_path)
    say(f"building {bundle_path.name}")
    built = build(bundle_path, cache_dir=cache)
    say("checking the golden frames")
    checked = verify(bundle_path)
    timed = None
    if measure:
        say("timing against the rivals")
        timed = bench(bundle_path, BENCH_ROUNDS)
    evidence = Evidence(
        bundle_path.name,
        bundle_path.stat().st_size,
        bundle,
        built,
        checked,
        timed,
        golden_shown(bundle_path, bundle, built.precision, cache),
        predicted(bundle),
    )
    return write_report(evidence, out)


def predicted(bundle: Bundle) -> Grid | None:
    """Predicted times on Orin modules; None for a network that the INT8 kernels cannot be packed for."""
    from ..builder_parts import quantised_for_tensorrt
    from .orin import grid, predict

    try:
        return grid(predict(quantised_for_tensorrt(bundle)[1]))
    except GraphError:
        return None


def write_report(evidence: Evidence, out: Path) -> Written:
    """Write the HTML of `evidence`; when that is not possible raise UnavailableError and leave what was there."""
    text, first = render(evidence)
    make_folder(out.parent)
    write_atomic(out, text)
    return Written(out, first)


def golden_shown(path: Path, bundle: Bundle, precision: str, cache: Path | None = None) -> list[Shown]:
    """Golden frames with labels, packaged float outputs, and what this machine's engine of `precision` answers."""
    from ..runtime.engine import Engine
    from ..runtime.postprocess import decode

    frames = bundle.golden["frame"]
    size = bundle.preprocess.height, bundle.preprocess.width
    result = []
    with Engine.open(path, precision=precision, cache_dir=cache) as engine:
        for index, frame in enumerate(frames):
            label: dict[str, np.ndarray | None] = {}
            for spec in bundle.tasks:
                stored = bundle.golden.get(f"label/{spec.name}")
                label[spec.name] = None if stored is None else _channels_last(spec, stored[index])
            floats = {s.name: decode(s, bundle.golden[f"float/{s.name}"][index], size) for s in bundle.tasks}
            result.append(Shown(frame, label, floats, engine(frame)))
    return result


def _channels_last(spec: OutputSpec, label: np.ndarray) -> np.ndarray:
    """Labels of normals may be stored [3,H,W], as training batches hold them."""
    return label.transpose(1, 2, 0) if spec.kind == "normals" and label.shape[0] == 3 != label.shape[-1] else label


def headline(evidence: Evidence) -> str:
    """The one sentence to remember: what it answers, at what time, against what."""
    names = sentence_list([spec.name for spec in evidence.bundle.tasks])
    count_of = f"{len(evidence.bundle.tasks)} separate nets"
    if evidence.bench is None:
        cost = evidence.build.cost
        plain, separate = (cost["ours"]["macs"] / max(cost[k]["macs"], 1) for k in ("plain", "separate"))
        relation = f"{times(plain)} the MACs of the plain shared net, {times(separate)} those of {count_of}"
        return f"One pass answers {names}: {relation}"
    precision, row, pair = _timed(evidence.bench, evidence.build.precision)
    parts = []
    if row.meaningful:
        parts.append(f"{times(row.ratio)} the plain shared net's time")
    if pair["meaningful"]:
        faster = pair["ratio"] >= 1
        parts.append(f"{times(pair['ratio'])} as fast as {count_of}" if faster else f"slower than {count_of}")
    return f"One pass answers {names} in {number(row.ms)} ms ({precision}){': ' if parts else ''}{', '.join(parts)}"


def _word(precision: str) -> str:
    return "INT8" if precision == "int8" else precision


def _timed(bench: BenchReport, precision: str) -> tuple[str, BenchRow, dict[str, Any]]:
    """The engine that this machine runs: precision, row, and the ratio to separate nets (measured in INT8 only)."""
    if precision == "int8":
        return _word(precision), bench.row("ours"), bench.separate_over_ours
    return _word(precision), bench.row("ours-float"), {"ratio": float("nan"), "meaningful": False}


def render(evidence: Evidence) -> tuple[str, str]:
    """(HTML text, headline)."""
    bundle, build = evidence.bundle, evidence.build
    names = [spec.name for spec in bundle.tasks]
    found = layers(bundle.manifest.get("gates") or [], names)
    first = headline(evidence)
    size = f"{bundle.preprocess.width}x{bundle.preprocess.height}"
    machine = build.device.get("cpu", "an unknown CPU")
    kicker = f"igate_edge report: {evidence.name}, {size_of(evidence.size)}, input {size}, engine of {machine}"
    sections = [
        ("Predictions on the golden frames", gallery(bundle.tasks, evidence.shown, _word(build.precision))),
        ("Cost", _cost(evidence)),
        ("Accuracy", _accuracy(evidence)),
        ("What is shared", _sharing(found, names)),
        ("Checks", _checks(evidence)),
        ("What fell back, and why", _fallbacks(evidence)),
        ("Provenance", _provenance(evidence)),
        ("How to read this", bullets(_notes(evidence))),
    ]
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    footer = f"Written {now} by igate_edge; bundle {bundle.seal[:16]}"
    return page(
        f"{evidence.name}: igate_edge report", kicker, first, facts(_figures(evidence)), sections, footer
    ), first


def _figures(evidence: Evidence) -> list[tuple[str, str]]:
    build, bench = evidence.build, evidence.bench
    items = []
    if bench is not None:
        precision, row, pair = _timed(bench, build.precision)
        items.append((f"{number(row.ms)} ms", f"a frame, {precision}"))
        if row.meaningful:
            items.append((times(row.ratio), "the plain shared net's time"))
        if pair["meaningful"]:
            items.append((times(pair["ratio"]), f"as fast as {len(build.tasks)} separate nets"))
    ours_cost, plain = build.cost["ours"], build.cost["plain"]
    items.append((times(ours_cost["macs"] / max(plain["macs"], 1)), "the plain shared net's MACs"))
    items.append((count(ours_cost["params"]), "parameters"))
    share = build.coverage.get("int8_conv_macs_share")
    if share is not None and build.precision == "int8":
        items.append((percent(share, 1), "of conv MACs in INT8"))
    return items


def _cost(evidence: Evidence) -> str:
    predicted = evidence.orin.html() if evidence.orin is not None else ""
    if evidence.bench is not None:
        sentence = separate_sentence(evidence.bench, len(evidence.build.tasks))
        return bench_grid(evidence.bench).html() + paragraph(f"{sentence}.") + predicted
    costs = cost_grid(evidence.build.cost, len(evidence.build.tasks)).html()
    return costs + paragraph("Not timed.", "note") + predicted


def golden_accuracy(evidence: Evidence) -> Grid | None:
    """Metrics on the golden frames alone, for a bundle that carries labels but no results."""
    from ..metrics import make_metric

    rows = []
    for spec in evidence.bundle.tasks:
        pairs = [(s.float_out[spec.name], s.engine_out[spec.name], s.label.get(spec.name)) for s in evidence.shown]
        row = [spec.name, METRICS[spec.metric]]
        for which in (0, 1):
            metric = make_metric(spec)
            for *outputs, label in pairs:
                if label is not None:
                    metric.update(outputs[which], label)
            row.append(number(metric.compute()[spec.metric]))
        rows.append(row)
    if all(row[2] == "-" for row in rows):
        return None
    note = f"only the {len(evidence.shown)} golden frames: a sign of life, not an evaluation"
    columns = ("task", "metric", "float, as packaged", f"engine, {_word(evidence.build.precision)}")
    return Grid("", columns, rows, 2, note=note)


def _accuracy(evidence: Evidence) -> str:
    results = evidence.bundle.manifest.get("results") or {}
    nets = results_nets(results)
    split = results.get("split", "held-out")
    note = f"{results.get('frames', '?')} frames of the {split} split, pixels pooled over the set"
    grid = accuracy_grid(evidence.bundle.tasks, nets, note=note) if nets else golden_accuracy(evidence)
    if grid is None:
        return paragraph("The bundle holds neither results nor labels, so nothing can be said about accuracy.")
    return grid.html()


def _sharing(found: Sequence[Layer], names: Sequence[str]) -> str:
    if not found:
        return paragraph("This network has no gates: every channel is shared by all tasks.")
    words = (
        "One row a layer, one band a task. Grey channels are computed once for all tasks; coloured ones belong to that "
        "task alone. Channels are ordered by who owns them; the numbers are each task's own share."
    )
    grid = stage_grid(stage_fractions(found, names), names, "Own channels by stage")
    return f'{paragraph(words)}<div class="scroll">{sharing_svg(found, names)}</div>{grid.html()}'


def _checks(evidence: Evidence) -> str:
    passed = "every byte matches its SHA-256 and every golden check passed"
    verdict = passed if evidence.verify.passed else f"FAILED: {'; '.join(evidence.verify.problems)}"
    return paragraph(f"{verdict[0].upper()}{verdict[1:]}.") + golden_grid(evidence.verify.golden).html()


def _fallbacks(evidence: Evidence) -> str:
    build = evidence.build
    lines = [f"The engine of this machine is {build.precision}: {build.reason}."]
    warnings = [*build.warnings, *evidence.verify.warnings, *(evidence.bench.warnings if evidence.bench else [])]
    warnings = [text for text in dict.fromkeys(warnings) if build.reason not in text]
    lines += [warning[0].upper() + warning[1:] + "." * (not warning.endswith(".")) for warning in warnings]
    if not warnings:
        lines.append("Nothing else fell back.")
    return bullets(lines) + _lint(build.lint)


def _lint(findings: Sequence[dict[str, Any]]) -> str:
    """Warnings and errors of both dialects, one row a code."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for item in findings:
        if item.get("severity") in ("error", "warning"):
            key = (str(item.get("dialect", "ort")), str(item["severity"]), str(item["code"]))
            groups.setdefault(key, []).append(item)
    if not groups:
        return ""
    rows = []
    for (dialect, severity, code), items in groups.items():
        first = items[0]
        rows.append((dialect, severity, code, str(first["message"]), str(first.get("fix") or ""), str(len(items))))
    columns = ("dialect", "severity", "code", "first message", "fix", "nodes")
    note = "ort: the graph this engine runs. trt: what TensorRT's form of the same network would meet."
    return Grid("Lint of the INT8 graphs", columns, rows, 5, note=note).html()


def _provenance(evidence: Evidence) -> str:
    manifest = evidence.bundle.manifest
    rows = [
        ("made by", str(manifest.get("created_by", ""))),
        ("identity", evidence.bundle.seal),
        ("form", f"{manifest.get('form', '')}, ONNX opset {manifest.get('opset', '')}"),
        ("calibration", flat(manifest.get("calibration"))),
        ("budget", budget_line(manifest.get("budget"))),
        ("engine", f"{evidence.build.backend} {evidence.build.version}, {evidence.build.threads} thread(s)"),
        ("machine", flat(evidence.build.device)),
    ]
    training = manifest.get("training") or {}
    rows += [(f"training: {key}".replace("_", " "), flat(value)) for key, value in training.items()]
    return Grid("", ("", ""), [row for row in rows if row[1]], 2).html()


def _notes(evidence: Evidence) -> list[str]:
    notes = [
        "MACs are a cost of arithmetic, not of time: narrow and ragged layers take longer than their MACs say.",
        "Plain and separate nets have this network's layout and noise as weights, since time does not depend on them.",
        "The golden check compares with what was packaged; INT8 differs a little between processors, within its limit.",
        "No time here was measured on a Jetson: where one is named, its times are predicted.",
        "The gating method is reconstructed from its paper; where that is silent, the choices are this project's own.",
    ]
    if evidence.bench is not None:
        rounds = evidence.bench.rounds
        notes.insert(
            0, f"Times are measured: all nets take turns for {rounds} rounds in one process; ratios pair equal rounds."
        )
    return notes
