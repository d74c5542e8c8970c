"""Measures a latency table on this machine: operators within small networks, then whole networks as its anchors.

All times are taken relative to a reference network that is timed before and after: a machine that is slower for a
minute does not bend the table, and one that does not stand still is refused with the reason.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from . import __version__
from . import profiler_nets as nets
from .compiler import executed, graph, quantize
from .compiler.latency import LatencyTable
from .contract import is_number
from .engines import onnxruntime as ort
from .errors import InputError, UnavailableError
from .files import as_path, read_file, write_atomic
from .profiler_clock import Means, clocks, on_this_machine, steady
from .profiler_fit import Found, Whole, anchored, table_of
from .profiler_jobs import FIT, Job, jobs
from .runtime.cache import fingerprint
from .timing import pinned

PRECISIONS = ("int8", "float")
#: Runs of a network in each of its two halves, and of every whole network.
RUNS, QUICK_RUNS, WHOLE_RUNS = 12, 5, 40
#: Of the runs of a node, the fastest share that counts: what else runs on the machine only ever adds.
FAST = 0.4
#: Operators that ONNX Runtime calls by another name than the compiler.
SAME = {"NhwcMaxPool": "MaxPool", "QLinearConcat": "Concat", "FusedConv": "Conv", "Upsample": "Resize"}
CONVS = frozenset({"QLinearConv", "ConvInteger", "Conv"})
#: Bring the machine's means for a reference network's bytes.
Bring = Callable[[bytes, int], Means]


@dataclass(frozen=True)
class Asked:
    """What to measure: threads of an engine, "int8" or "float", quick (fewer sizes and runs: half the accuracy)."""

    threads: int = 1
    precision: str = "int8"
    quick: bool = False

    def __post_init__(self) -> None:
        ort.check_threads(self.threads)
        if self.precision not in PRECISIONS:
            raise InputError(f"unknown precision {self.precision!r}", f"known: {', '.join(PRECISIONS)}", "use one")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.threads > cores:
            evidence = f"{self.threads} threads asked for, {cores} core(s) free for this process"
            raise UnavailableError("more threads than cores cannot be timed", evidence, "ask for fewer threads")


def profile(
    path: str | os.PathLike[str],
    asked: Asked,
    *,
    resume: bool = False,
    watch: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, count: items,
    bring: Bring = on_this_machine,
) -> LatencyTable:
    """Measure the latency table of this machine and write it to `path`; what is done is kept in `path`.part meanwhile.

    resume: go on where a stopped measurement ended. watch: wraps the jobs to show progress. Raises UnavailableError
    when the machine does not stand still, InputError when a kept part was measured elsewhere.
    """
    target = as_path(path)
    if target.is_dir():
        raise InputError("not a place for a table", f"{target} is a folder", "give a file name")
    part = target.with_name(target.name + ".part")
    about = _about(asked)
    plan = {**about, "quick": asked.quick, "version": __version__}  # these decide which networks are measured
    done = _resumed(part, plan) if resume else {}
    todo = jobs(asked.precision, asked.quick)
    with pinned(asked.threads):
        means = bring(file_of(nets.residual((64, 64), 16), asked.precision), asked.threads)
        for job in watch(todo, len(todo)):
            if job.name not in done:
                done[job.name] = _measure(job.name, file_of(job.build(), asked.precision), asked, means)
                write_atomic(part, json.dumps({"about": plan, "jobs": done}))
        reference = float(np.median([item["reference"] for item in done.values()]))
        table = table_of(_found(todo, done, reference), **{**about, "date": _today()})
        table = anchored(table, _wholes(table, asked, means, reference))
    table.save(target)
    part.unlink(missing_ok=True)
    return table


def notes(table: LatencyTable) -> list[str]:
    """What a reader of a new table must know: one sentence each."""
    found = []
    if (os.cpu_count() or 1) == 1:
        found.append("one core only: the timed networks shared it with everything else that ran")
    if "unverified" in (table.device.get("governor"), table.device.get("clock_max_khz")):
        found.append("the system does not tell its clocks: nobody can check later that they were the same")
    return found


def int8(model: ir.Model) -> bytes:
    """A float network quantised with one range for all tensors: time does not depend on it."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return graph.dump(quantize.quantize(model, {value.name: (-1.0, 1.0) for value in values if value.name}, "ort"))


def file_of(model: ir.Model, precision: str) -> bytes:
    """What ONNX Runtime is given for a float network."""
    return int8(model) if precision == "int8" else graph.dump(model)


def _about(asked: Asked) -> dict[str, Any]:
    backend = {"name": "onnxruntime", **{key: str(value) for key, value in ort.probe().items()}}
    about = {"device": {**fingerprint(), **clocks()}, "backend": backend, "threads": asked.threads}
    return {**about, "precision": asked.precision, "fit": FIT if asked.precision == "int8" else {"cin": 1, "cout": 1}}


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _resumed(part: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Jobs of a stopped measurement; {} when there is none."""
    if not part.exists():
        return {}
    try:
        kept = json.loads(read_file(part))
        jobs_done, theirs = {name: _kept(job) for name, job in dict(kept["jobs"]).items()}, dict(kept["about"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        fix = "start again without --resume"
        raise InputError("the kept part cannot be read", f"{part.name}: {type(error).__name__}", fix) from error
    moving = set(clocks())
    for name, value in about.items():
        other = theirs.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            value, other = ({k: v for k, v in item.items() if k not in moving} for item in (value, other))
        if value != other:
            evidence = f"{part.name}: its {name} is another"
            raise InputError("the kept part was measured elsewhere", evidence, "start again without --resume")
    return jobs_done


def _kept(job: Any) -> dict[str, Any]:
    """A kept job, if it is what `_measure` gives; else raises ValueError, TypeError or KeyError."""
    times = [job["spread"], job["reference"], *(ms for _, _, _, ms in job["nodes"])]
    sizes = [size for op, read, made, _ in job["nodes"] for size in (read, made) if isinstance(op, str)]
    if not all(map(is_number, [*times, *sizes])) or len(sizes) != 2 * len(job["nodes"]) or job["reference"] <= 0:
        raise ValueError("a time is missing")
    return dict(job)


def _measure(name: str, data: bytes, asked: Asked, means: Means) -> dict[str, Any]:
    """Time one network: {"nodes": [[operator, elements, made, multiples of the reference]], "spread", "reference"}."""
    runs = QUICK_RUNS if asked.quick else RUNS

    def once() -> tuple[list[tuple[ort.NodeTime, float]], float]:
        first, second = (means.nodes(data, runs) for _ in range(2))
        both = np.array([[_fast(node.ms) for node in half] for half in (first, second)])
        totals = both.sum(1)
        return list(zip(first, both.mean(0).tolist(), strict=True)), float(abs(np.ptp(totals)) / totals.mean())

    timed, spread, reference = steady(once, means, f"the network {name!r}")
    nodes = [[SAME.get(node.op, node.op), _elements(node), node.made, ms / reference] for node, ms in timed]
    return {"nodes": nodes, "spread": spread, "reference": reference}


def _fast(ms: np.ndarray) -> float:
    return float(np.sort(ms)[: max(1, round(len(ms) * FAST))].mean())


def _elements(node: ort.NodeTime) -> int:
    return node.made if node.op in executed.CUTS else max(node.read, node.made)


def _found(todo: list[Job], done: Mapping[str, Any], reference: float) -> Found:
    """All jobs in ms of the machine's median state."""
    found = Found([], [], [])
    for job in todo:
        item = done[job.name]
        convs = [(made, ms * reference) for op, _, made, ms in item["nodes"] if op in CONVS]
        found.convs.extend(job.match(convs))
        found.ops.extend((op, size, ms * reference) for op, size, _, ms in item["nodes"] if op not in CONVS)
        found.spreads.append(item["spread"])
    return found


def _wholes(table: LatencyTable, asked: Asked, means: Means, reference: float) -> list[Whole]:
    """Whole networks of each lowering, timed in turn without the profiler."""
    models = [(lowering, build()) for lowering, build in nets.anchors(asked.quick)]
    files = [file_of(model, asked.precision) for _, model in models]

    def once() -> tuple[list[float], float]:
        first, second = (np.array(means.whole(files, WHOLE_RUNS)) for _ in range(2))
        return ((first + second) / 2).tolist(), float(np.median(abs(first - second) / first))

    times, _, now = steady(once, means, "the whole networks")
    wholes = []
    for (lowering, model), ms in zip(models, times, strict=True):
        run = executed.steps(model, asked.precision)
        wholes.append(Whole(lowering, ms / now * reference, len(run), sum(map(table.step_ms, run))))
    return wholes
