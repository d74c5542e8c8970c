"""What a robot pays around the engine: pipeline and monitor against calling the engine bare, on the same frames."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import judging
import numpy as np
from timing import ms

from igate_edge import Engine
from igate_edge.bundle import Bundle
from igate_edge.runtime.drift import reference_statistics
from igate_edge.runtime.frame import Frame, Result
from igate_edge.runtime.monitor import Monitor
from igate_edge.runtime.pipeline import Pipeline
from igate_edge.runtime.preprocess import to_input

#: What a frame may cost more than the bare engine, as a share of inference.
SHARE = 0.05
#: What the hand-overs between threads may add to the time from submit to result: a tenth of a camera's period.
LATENCY_MS = 3.3
BLOCKS, FRAMES, PAIRS = 80, 25, 400
#: What importing all that a robot's loop needs may take, numpy included.
IMPORT_S = 0.3
RUNTIME = "runtime.engine", "runtime.pipeline", "runtime.monitor", "runtime.sources", "runtime.supervise"


def test_importing_the_runtime_takes_at_most_0_3_s(benchmark: Any, figures: Callable[..., None]) -> None:
    """The median of fresh interpreters; what Python itself takes to start is not in it."""
    names = ", ".join(f"igate_edge.{name}" for name in RUNTIME)
    program = f"import time; t = time.perf_counter(); import {names}; print(time.perf_counter() - t)"

    def one() -> float:
        return float(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)

    one()  # byte code is written once
    taken = benchmark.pedantic(lambda: sorted(one() for _ in range(9)), rounds=1)
    figures(f"import of the runtime {taken[4]:.2f} s, {taken[0]:.2f} to {taken[-1]:.2f}", import_s=taken[4])
    assert taken[4] <= IMPORT_S


def test_pipeline_and_monitor_cost_at_most_5_percent_of_inference(
    example: Path, tmp_path: Path, cores: int, benchmark: Any, figures: Callable[..., None]
) -> None:
    """Sustained: frames back to back. The latency of one frame alone is for the record, and held to LATENCY_MS."""
    bundle = Bundle.read(example)
    frame = bundle.golden["frame"][0].copy()
    with Engine.open(example, cache_dir=tmp_path) as engine:
        reference = bundle.manifest.get("reference") or _reference(bundle, engine)
        monitor = Monitor(33.0, period_ms=33.0, reference=reference)
        times = benchmark.pedantic(lambda: _sustained(engine, monitor, frame), rounds=1)
        alone = _alone(engine, monitor, frame)
    share = float(np.median((times["pipeline"] - times["bare"]) / times["infer"]))
    added = float(np.median(alone["pipeline"] - alone["bare"]))
    figures(
        f"sustained on {cores} cores: {ms(times['pipeline']):.2f} ms a frame, bare {ms(times['bare']):.2f} ms, "
        f"inference {ms(times['infer']):.2f} ms: {share:+.1%} of inference; "
        f"one frame alone waits {1e3 * added:.2f} ms longer ({added / float(np.median(times['infer'])):.0%} of it)",
        share=share,
        added_ms=1e3 * added,
    )
    assert monitor.snapshot()["drift"]["inspected"] > 0, "the monitor did not look at any frame"
    allowed = times["bare"] + SHARE * times["infer"]
    what = f"a frame's time in pipeline and monitor over the bare engine's and {SHARE:.0%} of inference"
    judging.at_most(what, times["pipeline"], allowed, 1.0, "see runtime/pipeline.py and monitor.py", BLOCKS)
    judging.at_most(
        "a frame's latency over the bare engine's and what hand-overs may take",
        alone["pipeline"],
        alone["bare"] + LATENCY_MS / 1e3,
        1.0,
        "see runtime/relay.py",
    )


def _sustained(engine: Engine, monitor: Monitor, frame: np.ndarray) -> dict[str, np.ndarray]:
    """Seconds a frame, in interleaved blocks of FRAMES frames."""
    image, stamp = to_input(frame, engine.preprocess), iter(range(1, 10**9))
    times: dict[str, list[float]] = {"pipeline": [], "bare": [], "infer": []}
    with Pipeline(engine, lambda result: None, mode="every", monitor=monitor) as pipeline:
        runs: dict[str, Callable[[], object]] = {
            "pipeline": lambda: pipeline.run(Frame(frame, stamp_ns=next(stamp)) for _ in range(FRAMES)),
            "bare": lambda: [engine(frame) for _ in range(FRAMES)],
            "infer": lambda: [engine.infer(image) for _ in range(FRAMES)],
        }
        for block in range(BLOCKS + 1):
            for name in list(runs) if block % 2 else reversed(runs):
                start = time.perf_counter()
                runs[name]()
                times[name].append((time.perf_counter() - start) / FRAMES)
        assert pipeline.counts.answered == (BLOCKS + 1) * FRAMES
    return {name: np.array(taken[1:]) for name, taken in times.items()}


def _alone(engine: Engine, monitor: Monitor, frame: np.ndarray) -> dict[str, np.ndarray]:
    """Seconds from submit to result of single frames, each beside a bare call."""
    done, times = threading.Semaphore(0), {"pipeline": list[float](), "bare": list[float]()}

    def sink(result: Result) -> None:
        done.release()

    with Pipeline(engine, sink, mode="every", monitor=monitor) as pipeline:

        def through(stamp: int) -> None:
            pipeline.submit(Frame(frame, stamp_ns=stamp))
            done.acquire()

        for stamp in range(1, PAIRS + 1):
            for name, call in {"pipeline": lambda stamp=stamp: through(stamp), "bare": lambda: engine(frame)}.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: np.array(taken) for name, taken in times.items()}


def _reference(bundle: Bundle, engine: Engine) -> dict[str, Any]:
    """For a bundle without statistics: those of its golden frames, so that drift is measured as well."""
    frames = list(bundle.golden["frame"])
    return reference_statistics(frames, map(engine, frames), engine.tasks, engine.preprocess, bundle.ranges)
