"""Engines of TensorRT: an INT8 plan and its FP16 twin, each through all gates, timed in turn, the faster one kept.

Its logic is tested with stand-ins for TensorRT; not run on a device.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import builder_gates as gates
from . import builder_plugin as plugin
from .builder_forms import NAMES, Ask, Form, Maker, Plans, gate, image_of, plugins_of
from .builder_parts import Session, Work, barriers, costs_of, networks, ranges_for
from .bundle import Bundle
from .compiler import layout, lint, masks, quantize
from .compiler.half import half
from .engines import onnxruntime as ort
from .engines import tensorrt as trt
from .errors import CheckFailed, GraphError, UnavailableError
from .golden import GoldenResult
from .plaindata import plain_json
from .runtime import cache

if TYPE_CHECKING:
    import onnx_ir as ir

    from .builder import Options

#: What a plan is tied to: another value of one of these, and it is not even opened.
TIED = ("version", "compute", "device", "driver")
#: Versions whose engines were reported to compute something else (cases T1), and where. The golden frames decide.
REPORTED_WRONG = {
    r"10\.11\.": "batches above 1, NVIDIA/TensorRT#4853",
    r"11\.1\.": "NVIDIA/TensorRT#4813, #4846, #4853",
    r"11\.2\.": "NVIDIA/TensorRT#4846",
}


@dataclass(frozen=True)
class TensorRT:
    """The backend "tensorrt" of `builder.open_engine`; see `builder_parts.Backend`.

    plans: what makes them (None: TensorRT itself). root: the folder that stands for "/" where the board is read.
    kernels, libraries: folders of the plugin's kernels and libraries (None: the usual ones), see `builder_plugin.find`.
    clock, sleep: seconds of the paced measurement.
    """

    plans: Plans | None = None
    progress: trt.Progress | None = None
    cancelled: Callable[[], bool] | None = None
    root: Path = Path("/")
    kernels: Path | None = None
    libraries: Path | None = None
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
        """The machine and, on a Jetson, board, L4T and power mode; what the plugin would run on."""
        from .runtime import device

        kit = self._kit(options)
        builds = {} if isinstance(kit, str) else {"library": kit.sha256, "kernels": kit.kernels}
        return {**cache.fingerprint(), "board": device.fingerprint(self.root), "plugin": builds}

    @property
    def _maker(self) -> Maker:
        from .runtime import device

        board = device.fingerprint(self.root)
        return Maker(self._plans, self.progress, self.cancelled, self.probe(), board)

    def _kit(self, options: Options) -> plugin.Kit | str:
        return plugin.find(options, self.probe(), self.kernels, self.libraries)

    def limit(self, bundle: Bundle, options: Options) -> dict[str, Any]:
        """See `builder_gates.limit_of`."""
        from .runtime import device

        return gates.limit_of(bundle, options.max_ms, device.fingerprint(self.root))

    def open(self, payload: bytes, options: Options) -> Session:
        """The session of a plan, with the plugin's library loaded first where it has layers on it (cases T8)."""
        plan, needed = plugin.unseal(payload)
        more = [plugin.library(needed, options, self.libraries)] if needed else []
        return self._plans.open_plan(plan, plugins_of(options, more))

    def check(
        self, bundle: Bundle, session: Session, precision: str, names: list[str]
    ) -> tuple[list[GoldenResult], list[str]]:
        """Golden frames of every task, no stale answers, and every row of a batch."""
        return gates.check(bundle, session, precision, names)

    def _refuse_foreign(self) -> None:
        """Raise UnavailableError for a TensorRT without kernels for this board (cases T6)."""
        from .runtime.device import read_device
        from .runtime.device_software import read_software
        from .runtime.device_stack import unsupported

        version, made_for = str(self.probe()["version"]), read_software(self.root).tensorrt_cuda
        problem = unsupported(read_device(self.root), version, made_for)
        if problem:
            fix = "`igate doctor --strict` names the one that belongs here"
            raise UnavailableError("this TensorRT cannot build engines for this board", problem, fix)

    def compile_(
        self, bundle: Bundle, options: Options, names: list[str], work: Work
    ) -> tuple[bytes, Session, dict[str, Any]]:
        """Both precisions through all gates, and the faster one; raises CheckFailed naming what does not pass.

        A failing INT8 plan is never replaced by FP16 in silence: that is asked for with precision "float". Only where
        the bundle itself says that its INT8 is no use is FP16 built alone.
        """
        self._refuse_foreign()
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
        built: list[Form] = []
        ask, maker = Ask(bundle, options, names, work), self._maker
        plugged: dict[str, Any] = {"layers": [], "note": "not tried: only INT8 layers have kernels"}
        try:
            if "int8" in wanted:
                form, plugged = plugin.int8_form(maker, ask, quantised, self._kit(options), self.clock)
                built.append(form)
            if "half" in wanted:
                built.append(maker.form(ask, "half", half(laid.model)))
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
            "gates": [row for form in built for row in form.gates] + [gate("budget", kept_form.precision, [])],
            "plugin": plugged if kept_form.precision == "int8" else {**plugged, "layers": []},
        }
        kit = kept_form.kit
        payload = kept_form.plan.plan if kit is None else plugin.seal(kept_form.plan.plan, kit)
        return payload, kept_form.session, facts

    def _faster(self, bundle: Bundle, built: list[Form], work: Work) -> tuple[Form, str, dict[str, float]]:
        with work.stage("time"):
            first, second = built
            times = ort.ab_time(first.session, second.session, image_of(bundle, first.session), clock=self.clock)
        winner = first if times.ratio < 1 else second
        words = (
            f"INT8 {times.a_ms:.2f} ms, FP16 {times.b_ms:.2f} ms, ratio {times.ratio:.2f} "
            f"({times.spread[0]:.2f}-{times.spread[1]:.2f}, {times.rounds} pairs)"
        )
        reason = f"INT8 is {'' if winner is first else 'not '}faster on this machine: {words}"
        if winner is second:
            work.warnings.append(f"INT8 is not used: {reason}")
        return winner, reason, {"int8_ms": times.a_ms, "float_ms": times.b_ms, "ratio": times.ratio}

    def _time(self, bundle: Bundle, options: Options, work: Work, form: Form, laid: layout.Laid) -> dict[str, Any]:
        """Measured ms with clocks and power mode; raises CheckFailed where the budget is missed."""
        from .runtime import device

        limit = self.limit(bundle, options)
        before = device.read_state(self.root)
        with work.stage("latency"):
            image = image_of(bundle, form.session)
            times = gates.measure(form.session.run, image, clock=self.clock, sleep=self.sleep)
        about = gates.conditions(before, device.read_state(self.root))
        missed = gates.over_budget(times, limit)
        if missed:
            notes = "; ".join(about["provisional"])
            evidence = f"{NAMES[form.precision]}: {missed}" + (f" ({notes})" if notes else "")
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
