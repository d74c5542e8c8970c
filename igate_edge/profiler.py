"""Measures a latency table on this machine: operators within small networks, then whole networks as its anchors.

All times are taken relative to a reference network that is timed before and after: a machine that is slower for a
minute does not bend the table, and one that does not stand still is refused with the reason. Through TensorRT a table
is a board's in its power mode; that way was tested with stand-ins, not run on a device.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from . import __version__, devicetable
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

PRECISIONS, BACKENDS = ("int8", "float"), ("onnxruntime", "tensorrt")
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
    """What to measure: threads of an engine, "int8" or "float", quick (fewer sizes and runs: half the accuracy).

    backend: "onnxruntime", or "tensorrt", whose work is the GPU's: threads must be 1, float is FP16, and INT8 stands
    within FP16.
    """

    threads: int = 1
    precision: str = "int8"
    quick: bool = False
    backend: str = "onnxruntime"

    def __post_init__(self) -> None:
        ort.check_threads(self.threads)
        if self.precision not in PRECISIONS:
            raise InputError(f"unknown precision {self.precision!r}", f"known: {', '.join(PRECISIONS)}", "use one")
        if self.backend not in BACKENDS:
            raise InputError(f"no tables of backend {self.backend!r:.40}", f"known: {', '.join(BACKENDS)}", "use one")
        if self.backend == "tensorrt" and self.threads != 1:
            evidence = f"{self.threads} threads asked for, and TensorRT computes on the GPU"
            raise InputError("threads are ONNX Runtime's", evidence, "leave threads at 1")
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
    bring: Bring | None = None,
    root: Path = Path("/"),
) -> LatencyTable:
    """Measure the latency table of this machine and write it to `path`; what is done is kept in `path`.part meanwhile.

    resume: go on where a stopped measurement ended. watch: wraps the jobs to show progress. bring: the means to time
    (None: of `asked.backend`). root: the folder that stands for "/" where a board is read. Raises UnavailableError when
    the machine does not stand still, InputError when a kept part was measured elsewhere.
    """
    target = as_path(path)
    if target.is_dir():
        raise InputError("not a place for a table", f"{target} is a folder", "give a file name")
    part = target.with_name(target.name + ".part")
    about = _about(asked, root)
    plan = {**about, "quick": asked.quick, "version": __version__}  # these decide which networks are measured
    done = _resumed(part, plan) if resume else {}
    todo = jobs(_kinds(asked), asked.quick)
    with contextlib.ExitStack() as stack:
        if asked.backend == "onnxruntime":  # TensorRT's builder may use all cores
            stack.enter_context(pinned(asked.threads))
        means = (bring or _means(asked))(_file(nets.residual((64, 64), 16), asked), asked.threads)
        stack.callback(means.close)
        for job in watch(todo, len(todo)):
            if job.name not in done:
                done[job.name] = _measure(job.name, _file(job.build(), asked), asked, means)
                _still_set(about, asked, root)
                write_atomic(part, json.dumps({"about": plan, "jobs": done}))
        reference = float(np.median([item["reference"] for item in done.values()]))
        table = table_of(_found(todo, done, reference), **{**about, "date": _today()})
        table = anchored(table, _wholes(table, asked, means, reference))
        _still_set(about, asked, root)
    table.save(target)
    part.unlink(missing_ok=True)
    return table


def notes(table: LatencyTable) -> list[str]:
    """What a reader of a new table must know: one sentence each."""
    if table.backend["name"] == "tensorrt":
        return _board_notes(table.device)
    found = []
    if (os.cpu_count() or 1) == 1:
        found.append("one core only: the timed networks shared it with everything else that ran")
    if "unverified" in (table.device.get("governor"), table.device.get("clock_max_khz")):
        found.append("the system does not tell its clocks: nobody can check later that they were the same")
    return found


def _board_notes(device: Mapping[str, Any]) -> list[str]:
    locked = {True: "", False: "the clocks were not locked"}
    how = locked.get(device["locked"], "whether the clocks were locked is unverified")
    found = [f"provisional: {how} (`igate jetson lock` locks them)"] if how else []
    if device["capped"]:
        found.append(f"provisional: {device['capped']}")
    if "power_mode" not in device:
        found.append("nobody tells the power mode: on a Jetson the table counts as another board's")
    return found


def int8(model: ir.Model) -> bytes:
    """A float network quantised with one range for all tensors: time does not depend on it."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return graph.dump(quantize.quantize(model, {value.name: (-1.0, 1.0) for value in values if value.name}, "ort"))


def file_of(model: ir.Model, precision: str) -> bytes:
    """What ONNX Runtime is given for a float network."""
    return int8(model) if precision == "int8" else graph.dump(model)


def _file(model: ir.Model, asked: Asked) -> bytes:
    """What the means are given: TensorRT's make an engine of the float network themselves, to know its nodes."""
    return graph.dump(model) if asked.backend == "tensorrt" else file_of(model, asked.precision)


def _kinds(asked: Asked) -> str:
    """The precision whose kinds of convolution are told apart: TensorRT's kernels know no unsigned bytes."""
    return "float" if asked.backend == "tensorrt" else asked.precision


def _means(asked: Asked) -> Bring:
    if asked.backend == "onnxruntime":
        return on_this_machine
    from .profiler_tensorrt import on_this_board

    return lambda reference, _: on_this_board(reference, asked.precision)


def _about(asked: Asked, root: Path) -> dict[str, Any]:
    if asked.backend == "tensorrt":
        board, version = devicetable.board(root)
        device, backend = {**board, **devicetable.moment(root)}, {"name": "tensorrt", "version": version}
    else:
        device = {**fingerprint(), **clocks()}
        backend = {"name": "onnxruntime", **{key: str(value) for key, value in ort.probe().items()}}
    about = {"device": device, "backend": backend, "threads": asked.threads, "precision": asked.precision}
    return {**about, "fit": FIT if _kinds(asked) == "int8" else {"cin": 1, "cout": 1}}


def _still_set(about: dict[str, Any], asked: Asked, root: Path) -> None:
    """Refuse a board whose power mode or clocks were set otherwise meanwhile; take down what else changed."""
    if asked.backend != "tensorrt":
        return
    device, now = about["device"], devicetable.moment(root)
    here = {**{name: device[name] for name in devicetable.GPU}, **devicetable.setting(root)}
    name = devicetable.difference(device, here) or ("locked" if device["locked"] != now["locked"] else "")
    if name:
        evidence = f"{name} was {device.get(name, 'unknown')!r} and is {({**now, **here}).get(name, 'unknown')!r}"
        raise UnavailableError("the board was set otherwise meanwhile", evidence, "set it back, then use --resume")
    device.update(now, capped=device["capped"] or now["capped"])


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
    moving = {*clocks(), *devicetable.MOVING} - {"locked"}  # times of locked and free clocks do not mix
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
    files = [_file(model, asked) for _, model in models]

    def once() -> tuple[list[float], float]:
        first, second = (np.array(means.whole(files, WHOLE_RUNS)) for _ in range(2))
        return ((first + second) / 2).tolist(), float(np.median(abs(first - second) / first))

    times, _, now = steady(once, means, "the whole networks")
    wholes = []
    for (lowering, model), ms in zip(models, times, strict=True):
        run = executed.steps(model, table.runs_as)
        wholes.append(Whole(lowering, ms / now * reference, len(run), sum(map(table.step_ms, run))))
    return wholes
