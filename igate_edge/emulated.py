"""`igate build --backend emulate`: the engine that a device would run, on this CPU; see engines/emulate.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import golden
from .bundle import Bundle
from .compiler import graph, layout, lint, masks, quantize
from .errors import CheckFailed, InputError
from .plaindata import plain_json

if TYPE_CHECKING:
    from .builder import Options, _Work
    from .engines.emulate import LayerReport


def probe() -> dict[str, Any]:
    """{"version", "provider"} of the emulator: its compiler's; raises UnavailableError without g++."""
    from .engines import emulate

    return emulate.probe()


def compile_(bundle: Bundle, options: Options, names: list[str], work: _Work) -> tuple[bytes, Any, dict[str, Any]]:
    """Lay out, quantise and check `bundle` on the deploy kernels; what `builder.open_engine` asks of every backend.

    Raises InputError for another precision than INT8, UnavailableError without g++, CheckFailed when the kernels do
    not compute what was packaged. A frame takes seconds.
    """
    from . import builder
    from .engines import emulate

    if options.precision == "float":
        raise InputError("the emulated kernels are INT8", "precision 'float' was asked for", "use precision='int8'")
    with work.stage("layout"):
        gated, plain = builder.networks(bundle)
        laid = layout.lay_out(masks.keep_outputs(gated, names), options.choice)
    with work.stage("calibrate"):
        ranges, notes = builder.ranges_for(bundle, laid, options.calibration)
    with work.stage("quantise"):
        quantised = quantize.quantize(laid.model, ranges, dialect="trt")
    with work.stage("lint"):
        findings = [{"dialect": "trt", **plain_json(item)} for item in lint.lint(quantised, "trt")]
    with work.stage("cost"):
        costs = builder.costs_of(laid.model, plain, names, masks.keep_outputs(gated, names))
    with work.stage("pack"):
        session = emulate.Session(quantised)
    with work.stage("golden"):
        results = golden.check(bundle, session.run, "int8", names)
    failed = [str(result) for result in results if not result.passed]
    if failed:
        fix = "calibrate on more frames" if options.calibration is not None else "export the bundle again"
        raise CheckFailed("the emulated kernels do not compute what was packaged", "; ".join(failed), fix)
    work.warnings += [*notes, *bundle.warnings]
    work.warnings.append("emulated: what the device's kernels compute, not how fast; nothing was timed")
    facts = {
        "precision": "int8",
        "reason": "the deploy kernels are INT8",
        "cost": costs,
        "pruning": plain_json(laid.report),
        "coverage": _coverage(session.layers),
        "timing": {},
        "golden": [result.as_json() for result in results],
        "lint": findings,
    }
    return graph.dump(quantised), session, facts


def _coverage(layers: Sequence[LayerReport]) -> dict[str, Any]:
    """Which steps are kernels, and the share of padding in what they multiply."""
    done, padded = sum(layer.macs for layer in layers), sum(layer.padded_macs for layer in layers)
    return {
        "layers": plain_json(list(layers)),
        "host": [layer.name for layer in layers if layer.kernel == "host"],
        "macs": done,
        "padded_macs": padded,
        "padding": round(1 - done / padded, 4) if padded else 0.0,
    }
