"""Bundle -> engine of this machine: lay out, quantise, check, time INT8 against float, keep the winner in the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, devicetable, emulated, golden
from .buildreport import BuildReport, latency_of
from .bundle import Bundle
from .compiler import calibrate, cost, graph, layout, lint, masks, quantize
from .compiler.ranges import by_family, of_layout
from .engines import onnxruntime as ort
from .errors import BundleError, CheckFailed, IgateError, InputError
from .files import as_path
from .plain import fill
from .plaindata import plain_json
from .runtime import cache
from .runtime.preprocess import to_input
from .tune import Tuned, tune

PRECISIONS = ("auto", "int8", "float")
#: emulate: the device's own kernels on this CPU, for looking at what they compute; never cached, never timed.
BACKENDS = ("onnxruntime", "emulate")
#: Share of convolution MACs that must run as INT8 before an engine may be called INT8.
MIN_COVERAGE = 0.95


@dataclass
class _Work:
    """What a build collects on its way."""

    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 4)


@dataclass(frozen=True)
class Options:
    """How to build: threads a frame, precision ("auto" measures), tasks (None = all), calibration (own frames).

    choice: the lowering of the layers, see `compiler.layout.lay_out`; tune: find the fastest instead, see `tune`.
    """

    backend: str = "onnxruntime"
    threads: int = 1
    precision: str = "auto"
    cache_dir: str | os.PathLike[str] | None = None
    calibration: Sequence[np.ndarray] | None = None
    tasks: Sequence[str] | None = None
    choice: str | Mapping[str, str] = "merged"
    tune: bool = False

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(f"unknown backend {self.backend!r}", f"known: {', '.join(BACKENDS)}", "use one of these")
        if self.precision not in PRECISIONS:
            raise InputError(
                f"unknown precision {self.precision!r}", f"known: {', '.join(PRECISIONS)}", "use one of these"
            )
        ort.check_threads(self.threads)
        layout.check_choice(self.choice)
        if self.tune and (self.precision == "float" or self.backend != "onnxruntime"):
            evidence = f"precision {self.precision!r}, backend {self.backend!r}"
            raise InputError("only INT8 engines of ONNX Runtime are tuned", evidence, "leave out tune")
        if isinstance(self.tasks, str) or not isinstance(self.tasks, Sequence | None):
            raise InputError("tasks must be a list of names", f"got {self.tasks!r:.60}", "pass tasks=['NAME']")
        if not isinstance(self.calibration, Sequence | np.ndarray | None) or isinstance(self.calibration, str):
            evidence = f"got {type(self.calibration).__name__}"
            raise InputError("calibration must be a list of frames", evidence, "pass uint8 RGB frames [H,W,3]")


def build(
    path: str | os.PathLike[str],
    backend: str = "onnxruntime",
    *,
    threads: int = 1,
    precision: str = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    calibration: Sequence[np.ndarray] | None = None,
    choice: str | Mapping[str, str] = "merged",
    tune: bool = False,
) -> BuildReport:
    """Build the engine of the bundle at `path` for this machine, or find it in the cache; check it either way.

    precision "auto" keeps INT8 only where it is faster than float in a measured A/B and passes its golden check.
    calibration: uint8 RGB frames that replace the bundle's INT8 ranges. choice: the lowering of the layers, see
    `compiler.layout.lay_out`; tune: spend up to a minute to find the fastest one for INT8. Raises BundleError,
    InputError, DataError, or CheckFailed when the engine does not compute what was packaged.
    """
    options = Options(backend, threads, precision, cache_dir, calibration, choice=choice, tune=tune)
    _, session, report = open_engine(path, options)
    session.close()
    return report


def open_engine(path: str | os.PathLike[str], options: Options) -> tuple[Bundle, ort.Session, BuildReport]:
    """Bundle, checked session and report: from the cache when an intact entry passes its golden check, else built."""
    work = _Work()
    with work.stage("read"):
        bundle = Bundle.read(path)
    names = _tasks(bundle, options.tasks)
    folder = as_path(options.cache_dir) if options.cache_dir is not None else cache.default_dir()
    key = cache.cache_key(_key_parts(bundle, options, names))
    emulate = options.backend == "emulate"
    entry, reason = (None, "") if emulate else cache.load(folder, key)
    if entry is not None:
        session, report, reason = _from_cache(bundle, entry, options, names)
        if session is not None and report is not None:
            # The same content under another name finds this entry, so what depends on the place is filled in here.
            where = str(folder / f"{key}.engine")
            return bundle, session, dataclasses.replace(report, cached=True, bundle=Path(path).name, path=where)
    if reason:
        work.warnings.append(f"{reason}: built again")
    with work.stage("total"):
        engine, session, facts = (emulated.compile_ if emulate else _compile)(bundle, options, names, work)
    report = BuildReport(
        bundle=Path(path).name,
        seal=bundle.seal,
        form=str(bundle.manifest.get("form", "")),
        backend=options.backend,
        version=str((emulated if emulate else ort).probe()["version"]),
        threads=options.threads,
        tasks=names,
        cached=False,
        key=key,
        path="" if emulate else str(folder / f"{key}.engine"),
        seconds=work.seconds,
        warnings=work.warnings,
        device=cache.fingerprint(),
        **facts,
    )
    problem = "" if emulate else cache.store(folder, key, engine, {"report": report.as_json()})
    if problem:
        report = dataclasses.replace(report, path="", warnings=[*report.warnings, problem])
    return bundle, session, report


def _tasks(bundle: Bundle, wanted: Sequence[str] | None) -> list[str]:
    known = [spec.name for spec in bundle.tasks]
    unknown = [name for name in wanted or () if name not in known]
    if unknown or (wanted is not None and not wanted):
        evidence = f"{unknown or 'none'} asked for, the bundle has {', '.join(known)}"
        raise InputError("unknown task" if unknown else "no task asked for", evidence, "ask for tasks of the bundle")
    return [name for name in known if wanted is None or name in wanted]


def _key_parts(bundle: Bundle, options: Options, names: list[str]) -> dict[str, Any]:
    members = bundle.manifest["members"]
    frames = None
    if options.calibration is not None:
        frames = hashlib.sha256()
        for frame in options.calibration:
            frames.update(repr((np.shape(frame), str(np.asarray(frame).dtype))).encode() + np.asarray(frame).tobytes())
    return {
        "model": members["model.onnx"]["sha256"],
        # Of the manifest, what a build reads: the same network under other names is not the same engine.
        "tasks": bundle.manifest["tasks"],
        "preprocess": bundle.manifest["preprocess"],
        "plain": members["plain.onnx"]["sha256"],
        "scales": members["ranges.safetensors"]["sha256"] if frames is None else frames.hexdigest(),
        "options": {
            "threads": options.threads,
            "precision": options.precision,
            "tasks": names,
            "choice": options.choice if isinstance(options.choice, str) else dict(sorted(options.choice.items())),
            "tune": options.tune,
        },
        "compiler": __version__,
        "backend": {name: str(value) for name, value in ort.probe().items()},
        "device": cache.fingerprint(),
    }


def _from_cache(
    bundle: Bundle, entry: cache.Entry, options: Options, names: list[str]
) -> tuple[ort.Session | None, BuildReport | None, str]:
    """Session and report of a cached engine, or the reason why it cannot be used."""
    try:
        report = BuildReport(**entry.meta["report"])
        session = ort.open(entry.payload, threads=options.threads)
        results = golden.check(bundle, session.run, report.precision, names)
    except Exception as error:  # whatever is wrong with an old entry, the bundle can replace it
        return None, None, f"the cached engine does not open ({type(error).__name__}: {str(error)[:200]})"
    if all(result.passed for result in results):
        return session, dataclasses.replace(report, golden=[result.as_json() for result in results]), ""
    session.close()
    return None, None, f"the cached engine fails its golden check ({'; '.join(map(str, results))})"


def _compile(
    bundle: Bundle, options: Options, names: list[str], work: _Work
) -> tuple[bytes, ort.Session, dict[str, Any]]:
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


def _tune(bundle: Bundle, model: Any, image: np.ndarray, options: Options, work: _Work) -> Tuned:
    """The fastest lowering for INT8; without a table of this machine only the uniform ones are tried."""
    table, why = devicetable.find(options.threads)

    def quantised(laid: layout.Laid) -> bytes:
        return graph.dump(quantize.quantize(laid.model, ranges_for(bundle, laid, options.calibration)[0], "ort"))

    with work.stage("tune"):
        tuned = tune(model, quantised, image, table, threads=options.threads)
    if why:
        work.warnings.append(f"tuned without predictions: {why}")
    return tuned


def ranges_for(
    bundle: Bundle, laid: layout.Laid, calibration: Sequence[np.ndarray] | None = None
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """INT8 ranges of a layout, and warnings: from own frames, else the bundle's families, else its golden frames.

    The last is for a bundle of another compiler version, whose values had other names.
    """
    notes: list[str] = []
    frames: Sequence[np.ndarray] | None = calibration
    if frames is None:
        ranges, strange = of_layout(laid, bundle.ranges)
        if not strange:
            return ranges, notes
        frames = list(bundle.golden["frame"])
        notes.append(f"the bundle's INT8 ranges do not fit this version ({strange[0]}): made from its golden frames")
    inputs = (to_input(frame, bundle.preprocess) for frame in frames)
    seen = calibrate.observe(laid.model, inputs, bundle.manifest["calibration"]["method"])
    return of_layout(laid, by_family(laid, seen.ranges))[0], notes + list(seen.warnings)


def _choose(
    bundle: Bundle,
    sessions: dict[str, ort.Session],
    options: Options,
    names: list[str],
    coverage: ort.Coverage,
    work: _Work,
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


def networks(bundle: Bundle) -> tuple[Any, Any]:
    """The bundle's model, checked to be the one its manifest describes, and its plain shared net with weights of 0.

    Raises BundleError or GraphError.
    """
    again = "export the bundle again"
    model = graph.load(bundle.model)
    if tuple(graph.specs(model)) != bundle.tasks or graph.preprocess(model) != bundle.preprocess:
        evidence = "tasks or preprocessing of manifest.json are not those of model.onnx"
        raise BundleError("the bundle's members do not fit together", evidence, again)
    try:
        plain = graph.load(fill(bundle.plain, None))
        masks.keep_outputs(plain, [spec.name for spec in bundle.tasks])
    except IgateError as error:
        raise BundleError("the bundle's plain.onnx is not usable", str(error), again) from error
    return model, plain


def costs_of(ours: Any, plain: Any, names: Sequence[str], dense: Any = None) -> dict[str, dict[str, int]]:
    """MACs and parameters of ours, the plain shared net, T separate nets and, where a gated net is given, that.

    encoder_macs: those without the tasks' heads.
    """
    nets = {
        "ours": [ours],
        "plain": [masks.keep_outputs(plain, names)],
        "separate": [masks.keep_outputs(plain, [name]) for name in names],
    }
    if dense is not None and graph.meta(dense)["form"] == "gated":
        nets["dense"] = [dense]
    table = {}
    for name, models in nets.items():
        items = [cost.count(model) for model in models]
        macs, params, heads = (
            sum(values) for values in zip(*((c.macs, c.params, c.head_macs) for c in items), strict=True)
        )
        table[name] = {"macs": int(macs), "params": int(params), "encoder_macs": int(macs - heads)}
    return table


def barriers(report: Any) -> list[str]:
    """The operators at which the channel analysis stopped, as text."""
    listed = plain_json(report).get("barriers", [])
    return [" ".join(map(str, item)) if isinstance(item, list | tuple) else str(item) for item in listed]
