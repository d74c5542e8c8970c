"""Hours of a robot in minutes of a bench: a supervised engine, pipeline, monitor, flight recorder and exporters at
camera rate, and nothing may grow.

    python benchmarks/soak.py --minutes 10 --out soak.json

Once a second or so it reads this process's memory, descriptors, threads and Python objects, and how long frames took.
Exit code 1 when one of them grew, or when a frame is not accounted for.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import machine
import numpy as np

from igate_edge import Engine
from igate_edge.bundle import Bundle
from igate_edge.errors import CheckFailed, IgateError
from igate_edge.files import write_atomic
from igate_edge.robotics.recorder import Recorder
from igate_edge.runtime.device import read_state
from igate_edge.runtime.exporters import JsonLines, diagnostics, serve
from igate_edge.runtime.frame import Frame, Result
from igate_edge.runtime.monitor import Monitor
from igate_edge.runtime.pipeline import Pipeline
from igate_edge.runtime.preprocess import resize
from igate_edge.runtime.supervise import Supervised

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tabletop.igate"
#: Share of a run at its start that is left out: buffers and windows fill then.
WARM_UP = 0.4
#: What may be left of growth, fitted over the rest: noise of the allocator, of files that come and go.
RSS_MB, DESCRIPTORS, THREADS, BLOCKS = 8.0, 0.5, 0.5, 1000.0
#: The last third's p99 may be so many times the first third's, or so many ms more: medians over the looks.
P99_TIMES, P99_MS = 1.5, 5.0
MIN_SAMPLES = 10
#: What the flight recorder keeps: full long before WARM_UP is over.
RING_S, RING_MB, FLIGHTS_MB = 1.0, 64.0, 32.0


@dataclass(frozen=True)
class Sample:
    """One look at this process. blocks: Python's memory blocks. p50, p99: ms from arrival to published, since the last
    look; None when no frame came."""

    seconds: float
    rss_mb: float
    descriptors: int
    threads: int
    blocks: int
    frames: int
    p50: float | None
    p99: float | None


class Sink:
    """Takes results, and notes what no robot may see: a stamp twice or out of order."""

    def __init__(self, also: Callable[[Result], None] | None) -> None:
        self.answered, self.disorder, self._also, self._last = 0, 0, also, -1
        self._times: list[float] = []
        self._lock = threading.Lock()

    def __call__(self, result: Result) -> None:
        with self._lock:
            self.answered += 1
            self.disorder += result.stamp_ns <= self._last
            self._last = result.stamp_ns
            self._times.append(result.ms["end_to_end"])
        if self._also is not None:
            self._also(result)

    def times(self) -> list[float]:
        """Milliseconds since the last call."""
        with self._lock:
            times, self._times = self._times, []
        return times


def look(start: float, sink: Sink) -> tuple[float, ...]:
    """This process's accounts (Linux), in the order of Sample's fields; NaN for None."""
    gc.collect()
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    times = sink.times()
    p50, p99 = np.percentile(times, (50, 99)) if times else (np.nan, np.nan)
    held = len(os.listdir("/proc/self/fd")), threading.active_count(), sys.getallocatedblocks()
    return (time.monotonic() - start, rss, *held, len(times), float(p50), float(p99))


def soak(
    bundle: Path,
    seconds: float,
    *,
    rate: float = 30.0,
    size: tuple[int, int] = (240, 320),
    also: Callable[[Result], None] | None = None,
) -> dict[str, Any]:
    """Run frames of `size` at `rate` a second; returns {"samples": [...], "counts": {...}, "snapshot": {...}}.

    also: is given every result, beside the sink that counts.
    """
    read, sink = Bundle.read(bundle), Sink(also)
    images = _images(read, size)
    monitor = Monitor(
        1e3 / rate, period_ms=1e3 / rate, reference=read.manifest.get("reference"), state=read_state, window=256
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = stack.enter_context(Supervised(lambda: Engine.open(bundle, cache_dir=folder)))
        log = stack.enter_context(JsonLines(folder / "log.jsonl", max_bytes=1 << 20))
        recorder = stack.enter_context(Recorder(folder / "flights", RING_S, FLIGHTS_MB, ring_mb=RING_MB))
        monitor.on_alarm = recorder.trigger
        server = stack.enter_context(serve(monitor, 0))
        with Pipeline(engine, sink, monitor=monitor, recorder=recorder) as pipeline:
            gc.freeze()
            samples = _run(pipeline, images, seconds, rate, lambda start: _observe(start, sink, monitor, log, server))
            pipeline.drain(10.0)
            counts = {**asdict(pipeline.counts), "seen": sink.answered, "disorder": sink.disorder}
        recorder.flush(10.0)
        flights = len(list(recorder.folder.glob("flight_*.mcap")))
        gc.unfreeze()
    snapshot = monitor.snapshot()
    for stage in snapshot["stages"].values():
        del stage["buckets"]
    about = {"seconds": seconds, "rate": rate, "size": size, "flights": flights}
    return {**about, "samples": samples, "counts": counts, "snapshot": snapshot}


def _observe(start: float, sink: Sink, monitor: Monitor, log: JsonLines, server: Any) -> tuple[float, ...]:
    """Use every exporter as a robot does, then look."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
        answer.read()
    diagnostics(monitor)
    log.write(monitor.snapshot())
    return look(start, sink)


def _run(
    pipeline: Pipeline,
    images: Sequence[np.ndarray],
    seconds: float,
    rate: float,
    observe: Callable[[float], tuple[float, ...]],
) -> list[Sample]:
    """Submit frames when they are due, and look at this process from another thread meanwhile."""
    over, start, every = threading.Event(), time.monotonic(), max(seconds / 120, min(1.0, seconds / 20))
    # Made beforehand: a list of samples would be found to grow.
    rows, count = np.zeros((round(seconds / every) + 2, len(fields(Sample)))), iter(range(10**9))

    def watch() -> None:
        while not over.wait(every):
            rows[next(count)] = observe(start)

    watcher = threading.Thread(target=watch, name="soak watch")
    watcher.start()
    try:
        for index in range(round(seconds * rate)):
            if (wait := start + index / rate - time.monotonic()) > 0:
                time.sleep(wait)
            pixels = images[index % len(images)]
            pipeline.submit(Frame(pixels, stamp_ns=index + 1, frame_id="camera", age_ms=1.0))
    finally:
        over.set()
        watcher.join()
    return [_sample(row) for row in rows[: next(count)].tolist()]


def _sample(row: Sequence[float]) -> Sample:
    seconds, rss, descriptors, threads, blocks, frames, *times = row
    p50, p99 = (None if np.isnan(ms) else ms for ms in times)
    return Sample(seconds, rss, int(descriptors), int(threads), int(blocks), int(frames), p50, p99)


def _images(bundle: Bundle, size: tuple[int, int]) -> list[np.ndarray]:
    """Golden frames at the camera's size."""
    frames = (resize(frame.transpose(2, 0, 1), size) for frame in bundle.golden["frame"])
    return [np.ascontiguousarray(np.rint(frame).astype(np.uint8).transpose(1, 2, 0)) for frame in frames]


def judge(samples: Sequence[Sample], counts: Mapping[str, Any]) -> dict[str, float]:
    """Growth over the run in the terms of each figure; raises CheckFailed that names all that grew or was lost."""
    if len(samples) < MIN_SAMPLES:
        evidence = f"{len(samples)} of at least {MIN_SAMPLES} samples"
        raise CheckFailed("the soak was not watched", evidence, "let it run longer")
    kept = [sample for sample in samples if sample.seconds >= WARM_UP * samples[-1].seconds]
    limits = {"rss_mb": RSS_MB, "descriptors": DESCRIPTORS, "threads": THREADS, "blocks": BLOCKS}
    grown = {name: growth(kept, name) for name in limits}
    third = max(len(kept) // 3, 1)
    first, last = (_median(part) for part in (kept[:third], kept[-third:]))
    grown |= {"p99_first_ms": first, "p99_last_ms": last}
    ended = sum(counts[name] for name in ("answered", "dropped", "stale"))
    ended += sum(counts["refused"].values()) + sum(counts["errors"].values())
    grown["lost"] = counts["received"] - ended
    bad = [
        f"{name} grew by {grown[name]:.3g}, {most:g} is allowed" for name, most in limits.items() if grown[name] > most
    ]
    if not np.isfinite(last):
        bad.append("no frame came out at the end")
    elif not last <= max(P99_TIMES * first, first + P99_MS):
        bad.append(f"p99 rose from {first:.1f} to {last:.1f} ms")
    if grown["lost"] or counts["answered"] != counts["seen"] or not counts["answered"]:
        bad.append(f"frames were lost: {dict(counts)}")
    if counts["errors"] or counts["refused"] or counts["disorder"]:
        bad.append(f"frames failed or came out of order: {dict(counts)}")
    if bad:
        raise CheckFailed("the soak failed", "; ".join(bad), "run it longer to see the slope, then look for the cause")
    return grown


def _median(samples: Sequence[Sample]) -> float:
    """Of the p99 of the looks between which frames came."""
    return float(np.median([sample.p99 for sample in samples if sample.p99 is not None] or [np.inf]))


def growth(samples: Sequence[Sample], name: str) -> float:
    """Rise of a figure from the first to the last sample, by a line of least squares.

    >>> growth([Sample(float(k), 10.0 + 2 * k, 5, 3, 0, 30, 1.0, 2.0) for k in range(4)], "rss_mb")
    6.0
    """
    times = np.array([sample.seconds for sample in samples])
    slope = np.polyfit(times - times[0], [getattr(sample, name) for sample in samples], 1)[0]
    return round(float(slope * (times[-1] - times[0])), 6)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="pipeline, monitor and exporters at camera rate; nothing may grow")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--bundle", type=Path, default=EXAMPLE)
    parser.add_argument("--rate", type=float, default=30.0, help="frames a second (default 30)")
    parser.add_argument("--size", default="320x240", help="the camera's, WIDTHxHEIGHT (default 320x240)")
    parser.add_argument("--out", type=Path, help="write samples and verdict there as JSON")
    given = parser.parse_args(arguments)
    width, height = (int(part) for part in given.size.split("x"))
    try:
        record = soak(given.bundle, 60 * given.minutes, rate=given.rate, size=(height, width))
        code, verdict = 0, ""
        try:
            grown = judge(record["samples"], record["counts"])
            print("; ".join(f"{name} {value:.3g}" for name, value in grown.items()))
            record["growth"] = grown
        except CheckFailed as error:
            code, verdict = error.exit_code, str(error)
        record |= {"passed": not code, "failure": verdict, **machine.describe()}
        record["samples"] = [asdict(sample) for sample in record["samples"]]
        if given.out is not None:
            write_atomic(given.out, json.dumps(record, indent=1) + "\n")
    except IgateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    times = record["snapshot"]["stages"]["end_to_end"]
    print(f"{record['counts']}; end to end p50 {times['p50']:.2f}, p99 {times['p99']:.2f}, max {times['max']:.2f} ms")
    print(verdict or f"soak passed: {given.minutes:g} minutes, nothing grew, no frame was lost")
    return code


if __name__ == "__main__":
    sys.exit(main())
