"""How the benchmarks measure: interleaved until the ratio is known, and paced like a camera."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from igate_edge.timing import interleave, ratio

Run = Callable[[np.ndarray], object]
Times = dict[str, np.ndarray]
#: Seconds since some moment.
Clock = Callable[[], float]
#: A comparison goes on until the median ratio is known (95 %) to within this share of it.
TIGHT = 0.02
_BLOCK = 25


def measure(
    runs: Mapping[str, Run],
    image: np.ndarray,
    pairs: Sequence[tuple[str, str]],
    *,
    least: int = 50,
    seconds: float = 10.0,
    clock: Clock = time.perf_counter,
) -> Times:
    """Seconds of every net in interleaved rounds, float64 [rounds].

    pairs: names whose ratio is to be known. Ends after `least` rounds when every ratio is TIGHT, else when `seconds`
    are over: whether that was enough is for the judge to say.
    """
    start, block, blocks = clock(), min(least, _BLOCK), list[Times]()
    while True:
        blocks.append(interleave(runs, image, block, clock))
        times = {name: np.concatenate([block[name] for block in blocks]) for name in runs}
        rounds = len(blocks) * block
        if rounds >= least and (all(tight(times[a], times[b]) for a, b in pairs) or clock() - start > seconds):
            return times


def tight(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the median of the ratios a / b is known to within TIGHT of it."""
    pair = ratio(a, b)
    least, most = pair["interval"]
    return bool(most - least <= TIGHT * pair["ratio"])


def paced(
    runs: Mapping[str, Run],
    image: np.ndarray,
    rate: float,
    frames: int,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> Times:
    """Seconds of every net on frames that come at `rate` a second, float64 [frames]; one net a frame, in turn.

    A processor that waits for a frame lowers its clock, and the next frame pays for it (cases L2). A frame that comes
    while the last one is computed waits, and its own time is what counts.
    """
    names, times = list(runs), {name: np.zeros(frames) for name in runs}
    for name in names:
        runs[name](image)
    due = clock()
    for index in range(frames * len(names)):
        due = max(due + 1 / rate, clock())
        while clock() < due:
            sleep(max(due - clock(), 0.0))
        name, start = names[index % len(names)], clock()
        runs[name](image)
        times[name][index // len(names)] = clock() - start
    return times


def ms(seconds: np.ndarray, quantile: float = 50) -> float:
    """A percentile in milliseconds."""
    return float(np.percentile(seconds, quantile) * 1e3)


def layer_us(models: Mapping[str, bytes], image: np.ndarray, rounds: int = 30) -> dict[str, dict[str, float]]:
    """Median microseconds of every node of ONNX Runtime's optimised graphs, {model: {node: us}}, models in turn.

    A node's name is the stored one, or that of a value it makes, with what the optimiser appended.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, data in models.items():
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 4
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / name)
            sessions[name] = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        for _ in range(rounds):
            for session in sessions.values():
                session.run(None, {session.get_inputs()[0].name: image})
        return {name: _nodes(Path(session.end_profiling())) for name, session in sessions.items()}


def _nodes(profile: Path) -> dict[str, float]:
    taken: dict[str, list[float]] = defaultdict(list)
    events: list[dict[str, Any]] = json.loads(profile.read_text())
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken[event["name"].removesuffix("_kernel_time")].append(float(event["dur"]))
    return {name: float(np.median(values)) for name, values in taken.items()}
