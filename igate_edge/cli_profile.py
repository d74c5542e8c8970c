"""`igate profile`: this machine's latency table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cli_console import Answer, progress, say
from .compiler.latency import LatencyTable
from .files import make_folder
from .reports.tables import percent


def profile_machine(
    out: Path | None, threads: int, precision: str, quick: bool, resume: bool, backend: str = "onnxruntime"
) -> Answer:
    """Measure a table, write it, and say what a prediction by it is worth."""
    from .devicetable import board, board_name, own_folder, table_name
    from .profiler import Asked, notes, profile

    asked = Asked(threads, precision, quick, backend)
    name = board_name(board()[0], precision) if backend == "tensorrt" else table_name(threads, precision)
    if out is None:
        out = own_folder() / f"{name}.json"
    make_folder(out.parent)
    if backend == "tensorrt":
        say(f"building and timing networks through TensorRT for {name}: leave the board alone (predicted: an hour)")
    else:
        say(f"timing operators on this machine, {threads} thread(s), {precision}: leave it alone for two minutes")
    table = profile(out, asked, resume=resume, watch=lambda items, count: progress(items, "timing", count))
    document = {"table": str(out), **_summary(table), "notes": notes(table)}
    return Answer(document, _shown(document))


def _summary(table: LatencyTable) -> dict[str, Any]:
    keys = ("device", "backend", "threads", "precision", "date", "step", "anchors", "overhead_ms", "error", "spread")
    return {key: getattr(table, key) for key in keys}


def _shown(document: dict[str, Any]) -> list[str]:
    backend = document["backend"]
    where, clock = (_board if backend["name"] == "tensorrt" else _machine)(document)
    anchors = ", ".join(f"{name} {value:.3f}" for name, value in document["anchors"].items())
    return [
        f"latency table: {document['table']}",
        f"{where}, {document['precision']}, {document['date']}",
        clock,
        f"spread of repeated times {percent(document['spread'], 1)}; whole networks / sum of operators: {anchors}",
        f"predictions are good to about {percent(document['error'], 1)} on networks like the product's own",
        *(f"note: {note}" for note in document["notes"]),
    ]


def _machine(document: dict[str, Any]) -> tuple[str, str]:
    device, backend = document["device"], document["backend"]
    what = f"{device['cpu']}, {backend['name']} {backend['version']}, {document['threads']} thread(s)"
    return what, f"clock: {device['clock_khz']} kHz of {device['clock_max_khz']}, governor {device['governor']}"


def _board(document: dict[str, Any]) -> tuple[str, str]:
    device, backend = document["device"], document["backend"]
    mode = f", power mode {device['power_mode']}" if "power_mode" in device else ""
    what = f"{device.get('module', device['gpu'])}{mode}, TensorRT {backend['version']}"
    return what, f"GPU clock: {device['gpu_hz']} of {device['gpu_limit_hz']} Hz, locked: {device['locked']}"
