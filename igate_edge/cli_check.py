"""`igate build --check` and `--onnx`: the graph for TensorRT, shown to a builder or written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cli_console import Answer, say
from .errors import InputError
from .files import write_atomic

CHECKS = ("tensorrt-rtx",)


def check_bundle(path: Path, check: str | None, onnx: Path | None, precision: str) -> Answer:
    """Write the graph of `precision` (auto: INT8), then ask the builder; exit code 1 when it refuses either graph."""
    from .acceptance import accept, models
    from .bundle import Bundle

    if check is not None and check not in CHECKS:
        raise InputError(f"unknown check {check!r:.40}", f"known: {', '.join(CHECKS)}", "use --check tensorrt-rtx")
    document: dict[str, Any] = {"bundle": str(path)}
    shown: list[str] = []
    if onnx is not None:
        if onnx.resolve() == path.resolve():
            raise InputError("the graph would overwrite the bundle", str(onnx), "pass another --onnx")
        data = models(Bundle.read(path))["half" if precision == "float" else "int8"]
        write_atomic(onnx, data)
        document |= {"onnx": str(onnx), "bytes": len(data)}
        shown.append(f"graph for TensorRT: {onnx} ({len(data) / 2**20:.1f} MiB)")
    code = 0
    if check is not None:
        say("asking TensorRT-RTX")
        report = accept(path)
        document |= report.as_json()
        shown += [f"INT8: {report.int8}", f"FP16: {report.half}"]
        code = 0 if report.accepted else 1
    return Answer(document, shown, code)
