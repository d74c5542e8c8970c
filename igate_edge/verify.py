"""Does this bundle still compute what was packaged? Every byte, both precisions, every task; no cache involved."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import golden
from .builder import Options, networks, open_engine, ranges_for
from .bundle import Bundle
from .compiler import graph, layout, lint, quantize
from .engines import onnxruntime as ort
from .errors import CheckFailed, InputError, UnavailableError
from .plaindata import plain_json


@dataclass(frozen=True)
class VerifyReport:
    """members: name -> {"size", "sha256"}, all matched. golden: one dict a task and precision. lint: of the INT8 graph.

    problems: one sentence for each thing that failed; `passed` when there is none.
    """

    bundle: str
    seal: str
    members: dict[str, dict[str, Any]]
    golden: list[dict[str, Any]]
    lint: list[dict[str, Any]]
    warnings: list[str]
    problems: list[str]
    passed: bool

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def verify(
    path: str | os.PathLike[str],
    *,
    threads: int = 1,
    backend: str = "onnxruntime",
    cache_dir: str | os.PathLike[str] | None = None,
) -> VerifyReport:
    """Check the bundle at `path`: all bytes, golden frames in float and INT8 per task, and the lint of the INT8 graph.

    backend: "tensorrt" asks the engine of this device instead, built where the cache at `cache_dir` has none, through
    all gates of a build.
    Raises BundleError when a byte is wrong; what the network computes wrongly is in the report. The command line turns
    passed == False into exit code 1.
    """
    if backend not in ("onnxruntime", "tensorrt", "auto"):
        known = "known: onnxruntime, tensorrt, auto"
        raise InputError(f"backend {backend!r} verifies nothing", known, "use one of these")
    if backend == "tensorrt" or (backend == "auto" and _tensorrt_usable()):
        return _device_engine(path, threads, cache_dir)
    bundle = Bundle.read(path)
    laid = layout.lay_out(networks(bundle)[0])
    ranges, warnings = ranges_for(bundle, laid)
    warnings += bundle.warnings
    quantised = quantize.quantize(laid.model, ranges, dialect="ort")
    results = []
    for precision, model in (("float", laid.model), ("int8", quantised)):
        session = ort.open(graph.dump(model), threads=threads)
        results += golden.check(bundle, session.run, precision)
        session.close()
    findings = [plain_json(item) for item in lint.lint(quantised, "ort")]
    problems = [str(result) for result in results if not result.passed]
    problems += [
        f"{item['code']} at {item['node']}: {item['message']}" for item in findings if item["severity"] == "error"
    ]
    return VerifyReport(
        bundle=Path(path).name,
        seal=bundle.seal,
        members=bundle.manifest["members"],
        golden=[result.as_json() for result in results],
        lint=findings,
        warnings=warnings,
        problems=problems,
        passed=not problems,
    )


def _tensorrt_usable() -> bool:
    from .engines import tensorrt

    try:
        tensorrt.probe()
    except UnavailableError:
        return False
    return True


def _device_engine(
    path: str | os.PathLike[str], threads: int, cache_dir: str | os.PathLike[str] | None
) -> VerifyReport:
    """What the engine of TensorRT computes on this device; a gate that it does not pass is a problem, not an error."""
    bundle = Bundle.read(path)
    name, members = Path(path).name, bundle.manifest["members"]
    try:
        _, session, report = open_engine(path, Options("tensorrt", threads, cache_dir=cache_dir))
    except CheckFailed as error:
        return VerifyReport(name, bundle.seal, members, [], [], bundle.warnings, [str(error)], False)
    session.close()
    return VerifyReport(name, bundle.seal, members, report.golden, report.lint, report.warnings, [], True)
