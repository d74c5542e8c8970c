"""Engines of TensorRT: an INT8 plan and its FP16 twin, each through all gates, timed in turn, the faster one kept.

Its logic is tested with stand-ins for TensorRT; not run on a device.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from . import builder_gates as gates
from .builder_parts import Session, Work, barriers, costs_of, networks, ranges_for
from .bundle import Bundle
from .compiler import graph, layout, lint, masks, quantize
from .compiler.half import half
from .engines import inspector
from .engines import onnxruntime as ort
from .engines import tensorrt as trt
from .errors import CheckFailed, GraphError
from .files import as_path
from .golden import GoldenResult
from .plaindata import plain_json
from .runtime import cache
from .runtime.preprocess import to_input

if TYPE_CHECKING:
    import onnx_ir as ir

    from .builder import Options

#: What a plan is tied to: another value of one of these, and it is not even opened.
TIED = ("version", "compute", "device", "driver")
#: Extra streams and builder levels that are tried while there is time, the plain ones first.
AUX_STREAMS, LEVELS = (0, 2), (3, 4)
#: Versions whose engines were reported to compute something else (cases T1), and where. The golden frames decide.
REPORTED_WRONG = {
    r"10\.11\.": "batches above 1, NVIDIA/TensorRT#4853",
    r"11\.1\.": "NVIDIA/TensorRT#4813, #4846, #4853",
    r"11\.2\.": "NVIDIA/TensorRT#4846",
}
_NAMES = {"int8": "INT8", "half": "FP16"}


class Plans(Protocol):
    """Whoever makes plans and opens them: `engines.tensorrt`, or a stand-in."""

    def probe(self) -> dict[str, Any]: ...

    def compile_plan(
        self,
        model: bytes,
        options: trt.PlanOptions,
        progress: trt.Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> trt.Plan: ...

    def open_plan(self, plan: bytes, plugins: tuple[Path, ...] = ()) -> Session: ...


@dataclass(frozen=True)
class _Form:
    """One precision of the network: its graph, its plan, the plan opened, and what the gates said."""

    precision: str
    model: bytes
    plan: trt.Plan
    session: Session
    results: list[GoldenResult]
    coverage: dict[str, Any]
    gates: list[dict[str, Any]]


@dataclass(frozen=True)
class TensorRT:
    """The backend "tensorrt" of `builder.open_engine`; see `builder_parts.Backend`.

    plans: what makes them (None: TensorRT itself). root: the folder that stands for "/" where the board is read.
    clock, sleep: seconds of the paced measurement.
    """

    plans: Plans | None = None
    progress: trt.Progress | None = None
    cancelled: Callable[[], bool] | None = None
    root: Path = Path("/")
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    @property
    def _plans(self) -> Any:
        return trt if self.plans is None else self.plans

    def probe(self) -> dict[str, Any]:
        """{"version", "compute", "device", "driver"}; raises UnavailableError with the reason and the fix."""
        found = self._plans.probe()
        return {name: found[name] for name in TIED if name in found}

    def surroundings(self, options: Options) -> dict[str, Any]:
        """The machine and, on a Jetson, board, L4T and power mode."""
        from .runtime import device

        return {**cache.fingerprint(), "board": device.fingerprint(self.root)}

    def limit(self, bundle: Bundle, options: Options) -> dict[str, Any]:
        """See `builder_gates.limit_of`."""
        from .runtime import device

        return gates.limit_of(bundle, options.max_ms, device.fingerprint(self.root))

    def open(self, payload: bytes, options: Options) -> Session:
        """The session of a plan."""
        return self._plans.open_plan(payload, _plugins(options))

    def check(
        self, bundle: Bundle, session: Session, precision: str, names: list[str]
    ) -> tuple[list[GoldenResult], list[str]]:
        """Golden frames of every task, no stale answers, and every row of a batch."""
        results = gates.golden(bundle, session.run, precision, names)
        problems = [str(result) for result in results if not result.passed]
        wrong = bool(problems)
        problems += gates.stale_answers(bundle, session, names)
        if not wrong:
            problems += gates.batch_rows(bundle, session, session.shape[0], precision, names)
        return results, problems

    def compile_(
        self, bundle: Bundle, options: Options, names: list[str], work: Work
    ) -> tuple[bytes, Session, dict[str, Any]]:
        """Both precisions through all gates, and the faster one; raises CheckFailed naming what does not pass.

        A failing INT8 plan is never replaced by FP16 in silence: that is asked for with precision "float". Only where
        the bundle itself says that its INT8 is no use is FP16 built alone.
        """
        with work.stage("layout"):
            gated, plain = networks(bundle)
            kept = masks.keep_outputs(gated, names)
            laid = layout.lay_out(kept, options.choice)
        with work.stage("calibrate"):
            ranges, notes = ranges_for(bundle, laid, options.calibration)
        with work.stage("quantise"):
            quantised = quantize.quantize(laid.model, ranges, dialect="trt")
        with work.stage("lint"):
            findings = _lint(quantised)
        with work.stage("cost"):
            costs = costs_of(laid.model, plain, names, kept)
        work.warnings += [*notes, *bundle.warnings, *_reported(str(self.probe()["version"]), options)]
        work.warnings += [f"pruning stopped at {item}: all its channels are kept" for item in barriers(laid.report)]
        wanted, reason = _wanted(bundle, options, names)
        built: list[_Form] = []
        try:
            for precision in wanted:
                model = half(quantised if precision == "int8" else laid.model)
                built.append(self._form(bundle, options, names, work, precision, model))
            kept_form, timing = built[0], dict[str, float]()
            if len(built) > 1:
                kept_form, reason, timing = self._faster(bundle, built, work)
            latency = self._time(bundle, options, work, kept_form, laid)
        except BaseException:
            for form in built:
                form.session.close()
            raise
        for form in built:
            if form is not kept_form:
                form.session.close()
        facts = {
            "precision": kept_form.precision,
            "reason": reason,
            "cost": costs,
            "pruning": plain_json(laid.report),
            "coverage": kept_form.coverage,
            "timing": timing,
            "golden": [result.as_json() for form in built for result in form.results],
            "lint": findings,
            "latency": latency,
            "gates": [gate for form in built for gate in form.gates] + [_gate("budget", kept_form.precision, [])],
        }
        return kept_form.plan.plan, kept_form.session, facts

    def _form(
        self, bundle: Bundle, options: Options, names: list[str], work: Work, precision: str, model: ir.Model
    ) -> _Form:
        """Build one precision and put it through the gates; raises CheckFailed with everything that is wrong."""
        data, name = graph.dump(model), _NAMES[precision]
        with work.stage(f"build {name}"):
            plan = self._compile(data, options, precision)
        work.warnings += [f"{name}: {line}" for line in plan.log]
        coverage, problems = _inspected(plan.layers, model, data, precision)
        passed = [_gate("layers", precision, problems)]
        if problems:
            fix = "build with precision='float' (FP16), or choose another lowering"
            raise CheckFailed(f"the {name} engine is not what was asked for", "; ".join(problems), fix)
        with work.stage("open"):
            session = self._plans.open_plan(plan.plan, _plugins(options))
        try:
            with work.stage("golden"):
                results, problems = self.check(bundle, session, precision, names)
            if problems:
                fix = "do not use this engine: try another version of TensorRT, or precision='float' (FP16)"
                raise CheckFailed(f"the {name} engine does not compute what was packaged", "; ".join(problems), fix)
        except BaseException:
            session.close()
            raise
        coverage["plan"] = {"peak_mb": plan.peak_mb, "seconds": plan.seconds, "chosen": plain_json(plan.chosen)}
        coverage["plan"] |= {"tried": plain_json(plan.tried), "session": plain_json(getattr(session, "facts", {}))}
        return _Form(precision, data, plan, session, results, coverage, [*passed, _gate("golden", precision, [])])

    def _compile(self, model: bytes, options: Options, precision: str) -> trt.Plan:
        """A plan, with the timings of earlier builds on this device; whatever is wrong with those, it is built."""
        folder = as_path(options.cache_dir) if options.cache_dir is not None else cache.default_dir()
        made_for = {name: str(value) for name, value in self.probe().items()}
        key = cache.cache_key({"timings": made_for, "around": self.surroundings(options)["board"]})
        known, _ = cache.load(folder, key, made_for, kind="timings")
        asked = trt.PlanOptions(
            precision=precision,
            workspace_mb=None if options.workspace_mb is None else int(options.workspace_mb),
            batch=None if options.batch == 1 else (1, options.batch, options.batch),
            aux_streams=AUX_STREAMS,
            levels=LEVELS,
            seconds=max(options.seconds, 1.0),
            timing_cache=b"" if known is None else known.payload,
            plugins=_plugins(options),
        )
        plan = self._plans.compile_plan(model, asked, self.progress, self.cancelled)
        if plan.timing_cache:
            cache.store(folder, key, plan.timing_cache, {"made_for": made_for}, kind="timings")
        return plan

    def _faster(self, bundle: Bundle, built: list[_Form], work: Work) -> tuple[_Form, str, dict[str, float]]:
        with work.stage("time"):
            first, second = built
            times = ort.ab_time(first.session, second.session, _image(bundle, first.session), clock=self.clock)
        winner = first if times.ratio < 1 else second
        words = (
            f"INT8 {times.a_ms:.2f} ms, FP16 {times.b_ms:.2f} ms, ratio {times.ratio:.2f} "
            f"({times.spread[0]:.2f}-{times.spread[1]:.2f}, {times.rounds} pairs)"
        )
        reason = f"INT8 is {'' if winner is first else 'not '}faster on this machine: {words}"
        if winner is second:
            work.warnings.append(f"INT8 is not used: {reason}")
        return winner, reason, {"int8_ms": times.a_ms, "float_ms": times.b_ms, "ratio": times.ratio}

    def _time(self, bundle: Bundle, options: Options, work: Work, form: _Form, laid: layout.Laid) -> dict[str, Any]:
        """Measured ms with clocks and power mode; raises CheckFailed where the budget is missed."""
        from .runtime import device

        limit = self.limit(bundle, options)
        before = device.read_state(self.root)
        with work.stage("latency"):
            image = _image(bundle, form.session)
            times = gates.measure(form.session.run, image, clock=self.clock, sleep=self.sleep)
        about = gates.conditions(before, device.read_state(self.root))
        missed = gates.over_budget(times, limit)
        if missed:
            notes = "; ".join(about["provisional"])
            evidence = f"{_NAMES[form.precision]}: {missed}" + (f" ({notes})" if notes else "")
            fix = "lock the clocks and take the power mode of the budget, or train for a smaller one"
            raise CheckFailed("the engine misses its budget", evidence, fix)
        return {
            "measured_ms": times.saturated_ms,
            "predicted_ms": None,
            "error": None,
            "error_bar": None,
            "table": "",
            "note": "; ".join(["no prediction for this board", *about["provisional"]]),
            "dearest": [],
            "lowering": ", ".join(sorted(set(laid.report["layers"].values()))) or "merged",
            "tuned": None,
            "paced": plain_json(times),
            "budget": limit,
            "conditions": about,
        }


def _wanted(bundle: Bundle, options: Options, names: list[str]) -> tuple[tuple[str, ...], str]:
    """The precisions to build, and why where it is one."""
    if options.precision != "auto":
        return ("int8" if options.precision == "int8" else "half",), "asked for"
    useless = [
        name
        for name, row in bundle.manifest["tolerances"].items()
        if name in names and row["packaged"] > row["limit"] and options.calibration is None
    ]
    if useless:
        return ("half",), f"INT8 of {', '.join(useless)} was no use when it was packaged"
    return ("int8", "half"), ""


def _lint(quantised: ir.Model) -> list[dict[str, Any]]:
    refused = lint.refusals(quantised)
    if refused:
        raise GraphError("TensorRT would not take this network", "; ".join(map(str, refused[:3])), refused[0].fix)
    return [{"dialect": "trt", **plain_json(item)} for item in lint.lint(quantised, "trt")]


def _reported(version: str, options: Options) -> list[str]:
    found = [where for pattern, where in REPORTED_WRONG.items() if re.match(pattern, f"{version}.")]
    if not found or (options.batch == 1 and found[0].startswith("batches")):
        return []
    return [f"engines of TensorRT {version} were reported to compute wrong results ({found[0]}): golden frames decide"]


def _inspected(layers: str, model: ir.Model, data: bytes, precision: str) -> tuple[dict[str, Any], list[str]]:
    """What the engine's layers compute in, and what must not be; an FP16 plan has nothing that must be INT8."""
    import onnx

    expected, others = inspector.expected(model)
    inspection = inspector.parse(layers)
    verdict = inspector.judge(inspection, expected, others)
    macs, _ = ort.conv_macs(onnx.shape_inference.infer_shapes(onnx.load_from_string(data)))
    done = sum(value for name, value in macs.items() if name in verdict.int8)
    coverage = {
        "int8_conv_macs_share": done / max(sum(macs.values()), 1),
        "convs": {name: "int8" if name in verdict.int8 else "float" for name in macs},
        "macs": macs,
        "layers": len(inspection.layers),
        "reformats": [*verdict.reformats, *verdict.other_reformats],
        "schema": inspection.schema,
    }
    return coverage, verdict.problems if precision == "int8" else []


def _gate(name: str, precision: str, problems: list[str]) -> dict[str, Any]:
    return {"gate": name, "precision": precision, "passed": not problems, "problems": problems}


def _plugins(options: Options) -> tuple[Path, ...]:
    return tuple(as_path(path) for path in options.plugins)


def _image(bundle: Bundle, session: Session) -> np.ndarray:
    """As many golden frames as a usual call has rows."""
    frames = bundle.golden["frame"]
    rows = session.shape[0]
    return np.concatenate([to_input(frames[row % len(frames)], bundle.preprocess) for row in range(rows)])
