"""Engines of ONNX Runtime: INT8 in its own dialect and float, both checked, timed in turn, the faster one kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import devicetable, golden
from .builder_parts import MIN_COVERAGE, Session, Work, barriers, costs_of, networks, ranges_for
from .buildreport import latency_of
from .bundle import Bundle
from .compiler import graph, layout, lint, masks, quantize
from .engines import onnxruntime as ort
from .errors import CheckFailed
from .plaindata import plain_json
from .runtime import cache
from .runtime.preprocess import to_input
from .tune import Tuned, tune

if TYPE_CHECKING:
    from .builder import Options


def probe() -> dict[str, Any]:
    """{"version", "provider"} of the installed ONNX Runtime; raises UnavailableError when there is none."""
    return ort.probe()


def surroundings(options: Options) -> dict[str, Any]:
    """The machine: its processor decides which precision is faster."""
    return cache.fingerprint()


def limit(bundle: Bundle, options: Options) -> dict[str, Any]:
    """None: `igate bench` judges a budget on this CPU."""
    return {}


def open(payload: bytes, options: Options) -> Session:
    """A session of an engine's ONNX bytes."""
    return ort.open(payload, threads=options.threads)


def check(
    bundle: Bundle, session: Session, precision: str, names: list[str]
) -> tuple[list[golden.GoldenResult], list[str]]:
    """The golden frames of every task, and those that fail."""
    results = golden.check(bundle, session.run, precision, names)
    return results, [str(result) for result in results if not result.passed]


def compile_(
    bundle: Bundle, options: Options, names: list[str], work: Work
) -> tuple[bytes, ort.Session, dict[str, Any]]:
    """Lay out, quantise, check and time; raises CheckFailed when an engine does not compute what was packaged."""
    with work.stage("layout"):
        gated, plain = networks(bundle)
        kept = masks.keep_outputs(gated, names)
    image = to_input(bundle.golden["frame"][0], bundle.preprocess)
    tuned = _tune(bundle, kept, image, options, work) if options.tune else None
    with work.stage("layout"):
        laid = layout.lay_out(kept, options.choice if tuned is None else tuned.choice)
        model = laid.model
    with work.stage("calibrate"):
        ranges, notes = ranges_for(bundle, laid, options.calibration)
    work.warnings += notes
    with work.stage("quantise"):
        quantised = quantize.quantize(model, ranges, dialect="ort")
    with work.stage("lint"):
        findings = _lint(model, quantised, ranges)
    with work.stage("cost"):
        costs = costs_of(model, plain, names, kept)
    models = {"int8": graph.dump(quantised), "float": graph.dump(model)}
    with work.stage("coverage"):
        coverage = ort.inspect(models["int8"])
    if options.precision == "int8":
        coverage.require(MIN_COVERAGE)
    work.warnings += bundle.warnings
    work.warnings += [f"pruning stopped at {item}: all its channels are kept" for item in barriers(laid.report)]
    sessions = {name: ort.open(data, threads=options.threads) for name, data in models.items()}
    try:
        precision, reason, results, timing = _choose(bundle, sessions, options, names, coverage, work)
    except BaseException:
        for session in sessions.values():
            session.close()
        raise
    sessions.pop("float" if precision == "int8" else "int8").close()
    with work.stage("latency"):
        latency = latency_of(laid, sessions[precision].run, image, precision, options.threads, tuned)
    facts = {
        "precision": precision,
        "reason": reason,
        "cost": costs,
        "pruning": plain_json(laid.report),
        "coverage": plain_json(coverage),
        "timing": timing,
        "golden": [result.as_json() for result in results],
        "lint": findings,
        "latency": latency,
    }
    return models[precision], sessions[precision], facts


def _tune(bundle: Bundle, model: Any, image: np.ndarray, options: Options, work: Work) -> Tuned:
    """The fastest lowering for INT8; without a table of this machine only the uniform ones are tried."""
    table, why = devicetable.find(options.threads)

    def quantised(laid: layout.Laid) -> bytes:
        return graph.dump(quantize.quantize(laid.model, ranges_for(bundle, laid, options.calibration)[0], "ort"))

    with work.stage("tune"):
        tuned = tune(model, quantised, image, table, threads=options.threads)
    if why:
        work.warnings.append(f"tuned without predictions: {why}")
    return tuned


def _choose(
    bundle: Bundle,
    sessions: dict[str, ort.Session],
    options: Options,
    names: list[str],
    coverage: ort.Coverage,
    work: Work,
) -> tuple[str, str, list[golden.GoldenResult], dict[str, float]]:
    """INT8 or float, why, the golden results of both, and the A/B times."""
    with work.stage("golden"):
        results = {name: golden.check(bundle, session.run, name, names) for name, session in sessions.items()}
    golden.require(results["float"], "the float engine")
    both = results["float"] + results["int8"]
    fails = [str(result) for result in results["int8"] if not result.passed]
    if options.precision == "float":
        return "float", "asked for", both, {}
    if fails and options.precision == "int8":
        fix = "use precision='float' here" + (
            "; or calibrate on more frames" if options.calibration is not None else ""
        )
        raise CheckFailed("the INT8 engine does not compute what was packaged", "; ".join(fails), fix)
    if options.precision == "int8":
        return "int8", "asked for", both, {}
    if fails:
        work.warnings.append(f"INT8 fell back to float: {'; '.join(fails)}")
        return "float", "INT8 fails its golden check on this machine", both, {}
    if coverage.int8_conv_macs_share < MIN_COVERAGE:
        share = f"only {coverage.int8_conv_macs_share:.1%} of the convolution MACs run as INT8 in ONNX Runtime"
        work.warnings.append(f"INT8 fell back to float: {share}, {MIN_COVERAGE:.0%} are asked for")
        return "float", share, both, {}
    with work.stage("time"):
        image = to_input(bundle.golden["frame"][0], bundle.preprocess)
        winner, why, times = ort.pick(sessions["int8"], sessions["float"], image)
    timing = {"int8_ms": times.a_ms, "float_ms": times.b_ms, "ratio": times.ratio}
    if winner == "float":
        work.warnings.append(f"INT8 fell back to float: {why}")
    return winner, why, both, timing


def _lint(model: Any, quantised: Any, ranges: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Findings in the engine's own dialect, and as information what TensorRT would say to its own."""
    found = [{"dialect": "ort", **plain_json(item)} for item in lint.lint(quantised, "ort")]
    other = quantize.quantize(model, ranges, dialect="trt")
    return found + [{"dialect": "trt", **plain_json(item)} for item in lint.lint(other, "trt")]
