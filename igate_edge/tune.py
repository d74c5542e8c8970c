"""Which lowering of the layers is fastest on this machine: candidates by predicted time, the best few by measured time.

Candidates: all layers one way (merged, merged and padded to the machine's step, split); merged up to a seam where the
maps change size and split behind it, and the reverse; every layer the way that its own operators are predicted to be
fastest. At most six are built and timed in turn, within a time limit; merged, the default, is always one of them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .compiler import layout
from .compiler.lanes import dims_or_none
from .compiler.latency import LatencyTable, Prediction
from .compiler.layout import Laid
from .engines import onnxruntime as ort
from .plaindata import plain_json
from .timing import interleave, pinned, ratio

Choice = str | dict[str, str]
Clock = Callable[[], float]
DEFAULT = "merged"
#: At most so many candidates are built and timed,
MOST_TIMED = 6
#: none that is predicted to take more than this much longer than the best,
HOPELESS = 1.3
#: and one replaces the default when it is faster by more than this.
LEAST_GAIN = 0.01
ROUNDS = 40
#: Channels that counts are padded to where no table tells the machine's step.
STEP = 16


@dataclass(frozen=True)
class Candidate:
    """A way to lower the layers: name for people, choice for lay_out, predicted ms (NaN without a table)."""

    name: str
    choice: Choice
    predicted_ms: float


@dataclass(frozen=True)
class Tuned:
    """The fastest choice. tried: per candidate name, predicted_ms, and where it was timed ms and ratio to merged."""

    name: str
    choice: Choice
    predicted_ms: float
    measured_ms: float
    tried: list[dict[str, Any]]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """JSON types; predictions that there are none of are None."""
        return dict(plain_json(dataclasses.asdict(self)))


def tune(
    model: ir.Model,
    quantised: Callable[[Laid], bytes],
    image: np.ndarray,
    table: LatencyTable | None,
    *,
    threads: int = 1,
    seconds: float = 60.0,
    rounds: int = ROUNDS,
    clock: Clock = time.perf_counter,
) -> Tuned:
    """Find the fastest lowering of a model's layers for INT8 on this machine.

    quantised: makes the INT8 file of a layout. table: of this machine, or None: then only the three uniform ways are
    timed. seconds: after these no further candidate is predicted or built; at least merged and one other are.
    """
    start = clock()

    def late(share: float) -> bool:
        return clock() - start > share * seconds

    found = candidates(model, table, lambda: late(0.5))
    runs: dict[str, Any] = {}
    with pinned(threads):
        for candidate in shortlist(found):
            if len(runs) >= 2 and late(0.8):
                break
            data = quantised(layout.lay_out(model, candidate.choice))
            runs[candidate.name] = ort.open(data, threads)
        try:
            times = interleave({name: session.run for name, session in runs.items()}, image, rounds, clock)
        finally:
            for session in runs.values():
                session.close()
    return _best(found, times, clock() - start)


def candidates(
    model: ir.Model, table: LatencyTable | None, late: Callable[[], bool] = lambda: False
) -> list[Candidate]:
    """All ways that are worth a prediction, the uniform ones first; none after `late` says so."""
    layers = layout.layers(model)
    step = table.step if table is not None else STEP
    uniform: list[tuple[str, str]] = [(DEFAULT, DEFAULT)]
    if any(layer.mergeable for layer in layers):
        uniform.append(("split", "split"))
    if any(layer.outputs % step for layer in layers):
        uniform.append((f"padded to {step}", f"{DEFAULT}:{step}"))
    if table is None:
        return [Candidate(name, choice, float("nan")) for name, choice in uniform]
    found, parts = list[Candidate](), dict[str, dict[str, float]]()
    for name, choice in uniform:
        laid = layout.lay_out(model, choice)
        found.append(Candidate(name, choice, predict(laid, table).ms))
        parts[choice] = by_layer(laid, table)
    for name, mixed in [*_greedy(layers, parts), *_seams(model, [layer for layer in layers if layer.mergeable])]:
        if late():
            break
        found.append(Candidate(name, mixed, predict(layout.lay_out(model, mixed), table).ms))
    return found


def shortlist(found: list[Candidate]) -> list[Candidate]:
    """What is timed: the default, then the best by prediction that are not hopeless; all where nothing is predicted."""
    first, rest = found[0], sorted(found[1:], key=lambda candidate: candidate.predicted_ms)
    best = min([candidate.predicted_ms for candidate in found])
    kept = [candidate for candidate in rest if not candidate.predicted_ms > HOPELESS * best]
    return [first, *kept][:MOST_TIMED]


def predict(laid: Laid, table: LatencyTable) -> Prediction:
    """Predicted time of a layout, by the anchor of the lowering that most of its layers have."""
    modes = [mode.partition(":")[0] for mode in laid.report["layers"].values()]
    return table.predict(laid.model, max(layout.LOWERINGS, key=modes.count))


def by_layer(laid: Laid, table: LatencyTable) -> dict[str, float]:
    """Predicted ms of each family's own operators: its convolutions and what they need to read and to join."""
    homes = {node.name: laid.origin.get(value.name or "", "") for node in laid.model.graph for value in node.outputs}
    found: dict[str, float] = {}
    for item in table.predict(laid.model).layers:
        home = homes.get(item.name, "")
        found[home] = found.get(home, 0.0) + item.ms
    return found


def _seams(model: ir.Model, layers: list[layout.Layer]) -> list[tuple[str, Choice]]:
    """Merged before and split from a change of the maps' size on, and the reverse."""
    sizes = {value.name: dims_or_none(value)[2:] for node in model.graph for value in node.outputs}
    places = [sizes.get(layer.name, ()) for layer in layers]
    seams = [index for index in range(1, len(layers)) if places[index] != places[index - 1]]
    found: list[tuple[str, Choice]] = []
    for seam in seams:
        for early, late in (layout.LOWERINGS, layout.LOWERINGS[::-1]):
            choice = {layer.name: early if index < seam else late for index, layer in enumerate(layers)}
            found.append((f"{early}, {late} from layer {seam + 1} of {len(layers)} on", choice))
    return found


def _greedy(layers: list[layout.Layer], parts: Mapping[str, Mapping[str, float]]) -> list[tuple[str, Choice]]:
    """Every layer the way that its own operators are fastest: of all ways, and of those that make no seam.

    parts: choice -> family -> ms.
    """
    whole = [choice for choice in parts if choice != "split"]
    found: list[tuple[str, Choice]] = []
    for name, allowed in (("each layer padded where faster", whole), ("each layer's best", list(parts))):
        best = {layer.name: min(allowed, key=lambda way: parts[way].get(layer.name, 0.0)) for layer in layers}
        if len(set(best.values())) > 1 and best not in [choice for _, choice in found]:
            found.append((name, best))
    return found


def _best(found: list[Candidate], times: dict[str, np.ndarray], seconds: float) -> Tuned:
    pairs = {name: ratio(values, times[DEFAULT]) for name, values in times.items()}
    fastest = min(pairs, key=lambda name: pairs[name]["ratio"])
    if not pairs[fastest]["meaningful"] or pairs[fastest]["ratio"] > 1 - LEAST_GAIN:
        fastest = DEFAULT
    tried = []
    for candidate in found:
        row: dict[str, Any] = {"name": candidate.name, "predicted_ms": candidate.predicted_ms}
        if candidate.name in times:
            row |= {"ms": float(np.median(times[candidate.name])) * 1e3, "ratio": pairs[candidate.name]["ratio"]}
        tried.append(row)
    winner = next(candidate for candidate in found if candidate.name == fastest)
    measured = float(np.median(times[fastest])) * 1e3
    return Tuned(fastest, winner.choice, winner.predicted_ms, measured, tried, round(seconds, 2))
