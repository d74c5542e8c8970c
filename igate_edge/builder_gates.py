"""What an engine must pass before its first frame: every task, every row, no answer of an earlier frame, its time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .builder_parts import Session
from .bundle import Bundle
from .engines import inspector
from .engines import onnxruntime as ort
from .golden import MEASURES, GoldenResult, gap, run_frames
from .golden import check as check_golden
from .plaindata import plain_json
from .runtime.preprocess import to_input

if TYPE_CHECKING:
    import onnx_ir as ir

#: One engine answers equal frames equally: this share of the smallest limit of a task's kind is what may differ.
SAME = 0.1
#: Frames a second of a camera where nobody says; a budget is judged at that pace, not in a tight loop.
RATE_HZ = 30.0
#: Paced frames that are timed, back-to-back frames, and those before that are not.
PACED, SATURATED, WARM_UP = 100, 50, 10


def golden(
    bundle: Bundle, run: Callable[[np.ndarray], Mapping[str, np.ndarray]], precision: str, names: Sequence[str]
) -> list[GoldenResult]:
    """The golden frames of every task; precision "int8" against the stored INT8 answers, "half" against the float ones.

    FP16 rounds: it is measured in the terms of the task, with the smallest limit that INT8 gets.
    """
    if precision != "half":
        return check_golden(bundle, run, precision, names)
    outputs = run_frames(run, bundle.golden["frame"], bundle.preprocess)
    size = bundle.preprocess.height, bundle.preprocess.width
    results = []
    for spec in (spec for spec in bundle.tasks if spec.name in names):
        measure, limit, _ = MEASURES[spec.kind]
        value = gap(spec, outputs.get(spec.name, np.empty(0)), bundle.golden[f"float/{spec.name}"], size)
        results.append(GoldenResult(spec.name, precision, measure, value, limit))
    return results


def check(
    bundle: Bundle, session: Session, precision: str, names: Sequence[str]
) -> tuple[list[GoldenResult], list[str]]:
    """Golden frames of every task, no stale answers, and every row of a batch: results, and what is wrong."""
    results = golden(bundle, session.run, precision, names)
    problems = [str(result) for result in results if not result.passed]
    wrong = bool(problems)
    problems += stale_answers(bundle, session, names)
    if not wrong:
        problems += batch_rows(bundle, session, session.shape[0], precision, names)
    return results, problems


def layer_types(layers: str, model: ir.Model, data: bytes, precision: str) -> tuple[dict[str, Any], list[str]]:
    """What the engine's layers compute in, and what must not be; an FP16 plan has nothing that must be INT8.

    layers: the inspector's JSON. data: the network's file without layers on the plugin, for their MACs; they are named
    as their calls are. Copies of INT8 tensors beside a layer on the plugin are its own: it takes one format only.
    """
    import onnx.inliner

    calls = [node.name or "" for node in model.graph if node.op_identifier() in model.functions]
    plugged = [node.name or "" for node in model.graph if (node.domain, node.op_type) == inspector.PLUGIN]
    inspection = inspector.parse(layers)
    verdict = inspector.judge(inspection, *inspector.expected(model))
    own = [name for name in verdict.reformats if not set(re.split(r"[\s+|,\[\](){}]+", name)).isdisjoint(plugged)]
    verdict = replace(verdict, reformats=tuple(name for name in verdict.reformats if name not in own))
    flat = onnx.inliner.inline_local_functions(onnx.load_from_string(data))
    counted, _ = ort.conv_macs(onnx.shape_inference.infer_shapes(flat))
    macs = {_caller(name, [*calls, *plugged]): value for name, value in counted.items()}
    int8 = {_caller(name, calls) for name in verdict.int8}
    coverage = {
        "int8_conv_macs_share": sum(value for name, value in macs.items() if name in int8) / max(sum(macs.values()), 1),
        "convs": {name: "int8" if name in int8 else "float" for name in macs},
        "macs": macs,
        "layers": len(inspection.layers),
        "reformats": [*own, *verdict.reformats, *verdict.other_reformats],
        "schema": inspection.schema,
    }
    return coverage, verdict.problems if precision == "int8" else []


def _caller(name: str, calls: Iterable[str]) -> str:
    """The call that a node CALL/NODE was inlined from, else the node's own name."""
    return max((call for call in calls if name.startswith(f"{call}/")), key=len, default=name)


def batch_rows(bundle: Bundle, session: Session, rows: int, precision: str, names: Sequence[str]) -> list[str]:
    """What is wrong with single rows of a full batch, one sentence each: every row is a frame of its own.

    Twice: identical rows, which must have identical answers, and the golden frames one a row, which must have theirs
    whatever row they are in (cases T1). Each row goes through the golden check alone.
    """
    if rows < 2:
        return []
    frames = bundle.golden["frame"]
    problems: dict[str, None] = {}
    for shift in range(len(frames)):
        for kind, picked in (
            ("identical", [shift] * rows),
            ("mixed", [(shift + n) % len(frames) for n in range(rows)]),
        ):
            image = np.concatenate([to_input(frames[index], bundle.preprocess) for index in picked])
            answers = session.run(image)
            for row, index in enumerate(picked):
                alone = {name: np.array(answers[name][row : row + 1]) for name in names if name in answers}
                for result in golden(_one_frame(bundle, index), _answered(alone), precision, names):
                    if not result.passed:
                        problems[f"row {row} of a batch of {rows}: {result}"] = None
            if kind == "identical":
                problems |= dict.fromkeys(_unequal_rows(bundle, answers, rows, names))
    return list(problems)


def _answered(answer: dict[str, np.ndarray]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    return lambda image: answer


def _one_frame(bundle: Bundle, index: int) -> Bundle:
    arrays = {name: array[index : index + 1] for name, array in bundle.golden.items()}
    return Bundle(bundle.manifest, bundle.model, bundle.ranges, bundle.plain, arrays, bundle.seal)


def _unequal_rows(bundle: Bundle, answers: Mapping[str, np.ndarray], rows: int, names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        first = np.asarray(answers[name][:1])
        for row in range(1, rows):
            if not _same(bundle, name, np.asarray(answers[name][row : row + 1]), first):
                found.append(f"row {row} of a batch of {rows}: task {name!r} differs from row 0, which holds its frame")
    return found


def _same(bundle: Bundle, name: str, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two answers of one engine to one frame agree, in the terms of the task."""
    spec = next(spec for spec in bundle.tasks if spec.name == name)
    size = bundle.preprocess.height, bundle.preprocess.width
    return gap(spec, a, b, size) <= SAME * MEASURES[spec.kind][1]


def stale_answers(bundle: Bundle, session: Session, names: Sequence[str]) -> list[str]:
    """Tasks whose answer is, or may become, that of another frame; one sentence each.

    The golden frames go forwards and backwards: a frame's answer must not depend on the one before it, different
    frames must not get one answer bit by bit, and an answer handed out must outlive the next frame. Arrays are filled
    with NaN once read, so that a buffer that is not written again shows (cases R5, R8).
    """
    images = [to_input(frame, bundle.preprocess) for frame in bundle.golden["frame"]]
    passes: list[dict[int, dict[str, np.ndarray]]] = []
    changed: set[str] = set()
    for order in (range(len(images)), reversed(range(len(images)))):
        held = {}
        copies = {}
        for index in order:
            answer = session.run(images[index])
            held[index] = {name: np.asarray(answer[name]) for name in names}
            copies[index] = {name: np.array(answer[name]) for name in names}
        given = [(name, held[index][name], copies[index][name]) for index in held for name in names]
        changed |= {name for name, array, copy in given if not np.array_equal(array, copy, equal_nan=True)}
        for array in (array for _, array, _ in given if array.flags.writeable):
            array.fill(np.nan)
        passes.append(copies)
    problems = [f"task {name!r}: an answer changes when a later frame runs" for name in sorted(changed)]
    for name in names:
        there, back = ({index: answer[name] for index, answer in one.items()} for one in passes)
        problems += _stale(bundle, name, there, back)
    return problems


def _stale(bundle: Bundle, name: str, there: dict[int, np.ndarray], back: dict[int, np.ndarray]) -> list[str]:
    stored = bundle.golden[f"float/{name}"]
    for index in there:
        if not _same(bundle, name, there[index], back[index]) or not _close(there[index], back[index]):
            return [f"task {name!r}: the answer to golden frame {index} depends on the frame before it"]
        other = (index + 1) % len(there)
        if np.array_equal(there[index], there[other]) and not np.array_equal(stored[index], stored[other]):
            return [f"task {name!r}: golden frames {index} and {other} get one answer, bit by bit"]
    return []


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    """Raw answers of one engine to one frame: the same kernels, so no more apart than FP16 can tell."""
    return bool(np.isfinite(a).all() and np.abs(a - b).max() <= 2e-3 * max(float(np.abs(b).max()), 1e-12))


@dataclass(frozen=True)
class Times:
    """Milliseconds of whole calls, copies and waiting included: back to back, and at a camera's pace.

    saturated_ms: median back to back. paced: {"median", "p90", "p99", "p99.9", "max"} of frames that came every
    `period_ms`. misses: paced frames that took longer than the period.
    """

    saturated_ms: float
    paced: dict[str, float]
    period_ms: float
    frames: int
    misses: int


def measure(
    run: Callable[[np.ndarray], object],
    image: np.ndarray,
    *,
    period_ms: float | None = None,
    frames: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Times:
    """Time an engine back to back and at a camera's pace: between frames clocks may fall (cases L1, L2).

    period_ms: of the camera, None: RATE_HZ. frames: None: PACED. clock, sleep: seconds.
    """
    period_ms, frames = period_ms or 1e3 / RATE_HZ, frames or PACED
    for _ in range(WARM_UP):
        run(image)
    saturated = [_call(run, image, clock) for _ in range(min(frames, SATURATED))]
    paced, due = [], clock()
    for _ in range(frames):
        due = max(due + period_ms / 1e3, clock())
        while (left := due - clock()) > 0:
            sleep(left)
        paced.append(_call(run, image, clock))
    points = np.percentile(paced, (50, 90, 99, 99.9, 100))
    named = dict(zip(("median", "p90", "p99", "p99.9", "max"), map(float, points), strict=True))
    late = sum(ms > period_ms for ms in paced)
    return Times(float(np.median(saturated)), named, period_ms, frames, late)


def _call(run: Callable[[np.ndarray], object], image: np.ndarray, clock: Callable[[], float]) -> float:
    start = clock()
    run(image)
    return (clock() - start) * 1e3


def limit_of(bundle: Bundle, max_ms: float | None, board: Mapping[str, str]) -> dict[str, Any]:
    """The time that a build must hold: {"ms" (None: nothing to hold), "source", "predicted_ms", "note"}.

    max_ms wins; else the bundle's budget where it is in milliseconds of this board. A budget of another device, or a
    ratio to the plain shared net, says nothing about this engine's milliseconds: the note says so.
    """
    about = bundle.manifest.get("budget")
    budget = about if isinstance(about, dict) and about.get("kind") == "Budget" else {}
    found = {"ms": max_ms, "source": "max_ms", "predicted_ms": budget.get("predicted_ms"), "note": ""}
    if max_ms is not None:
        return found
    found["source"] = "bundle"
    told = budget.get("device")
    device = told if isinstance(told, dict) else {}
    there = {name: device.get(name) for name in ("board", "module", "power_mode") if device.get(name)}
    here = {name: board.get(name) for name in there}
    if budget.get("ms") is None:
        ratio = budget.get("ratio")
        found["note"] = f"a budget of {ratio} times the plain net is judged by `igate bench`" if ratio else "no budget"
    elif not there or there != here:
        of = ", ".join(map(str, there.values())) or budget.get("table") or "another device"
        found["note"] = f"the bundle's budget of {budget['ms']} ms is one of {of}, not of this machine"
    else:
        found["ms"] = float(budget["ms"])
    return found


def over_budget(times: Times, limit: Mapping[str, Any]) -> str:
    """Why the measured time does not hold the limit, "" where it does or there is none: p99 at a camera's pace."""
    p99 = times.paced["p99"]
    if limit["ms"] is None or p99 <= limit["ms"]:
        return ""
    predicted = f", {limit['predicted_ms']:.3g} ms were predicted" if limit["predicted_ms"] else ""
    return f"p99 of {times.frames} paced frames is {p99:.3g} ms, {limit['ms']:.3g} ms are allowed{predicted}"


def conditions(before: Any, after: Any) -> dict[str, Any]:
    """Clocks, power mode and heat around a measurement, and what makes its milliseconds provisional (cases L5, L7).

    before, after: `runtime.device.State`. {"before", "after", "provisional": [sentences]}; what is not known is said,
    never taken for good.
    """
    from .runtime.device import capped

    notes = []
    if after.locked is None:
        notes.append("clocks: not known on this machine")
    elif not after.locked:
        notes.append("clocks are not locked")
    reason = capped(after)
    if reason:
        notes.append(str(reason))
    events = (before.throttle_events, after.throttle_events)
    if None not in events and events[1] > events[0]:
        notes.append(f"throttled {events[1] - events[0]} time(s) meanwhile")
    if before.power_mode != after.power_mode:
        notes.append("the power mode changed meanwhile")
    return {"before": plain_json(before), "after": plain_json(after), "provisional": notes}
