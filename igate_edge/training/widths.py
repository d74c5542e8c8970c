"""The rivals' widths at a budget: plain nets widened to it, and single-task nets narrowed until all together meet it.

Time does not depend on weights, so both are found on nets with noise as weights before anything is trained: the latency
table proposes, a measurement (INT8, one thread, batch 1, interleaved with the plain net) decides.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import backbones, timing
from ..compiler import graph
from ..engines import onnxruntime as ort
from ..files import write_atomic
from ..gating.convert import PlainNet
from ..gating.export import to_onnx
from ..gating.separate import SeparateNets
from ..runtime.cache import fingerprint
from .config import WIDTHS, TrainConfig, digest, make_backbone
from .goal import Goal
from .layout import kept
from .tasks import Task

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..compiler.latency import LatencyTable

ROUNDS = 60
#: Widths that are measured for each budget: the widest ones whose predicted time is at most this share above it.
TRIED, ABOVE = 5, 0.06
#: Widths are looked at up to this multiple of the plain net's.
WIDEST = 4


@dataclass(frozen=True)
class Fit:
    """Widths that meet a budget; None where the backbone has one size only, or no width is fast enough."""

    wide: float | None = None
    narrow: float | None = None


def base_width(config: TrainConfig) -> float | None:
    """The width of the plain net: the config's, or the backbone's own; None for a backbone of one size."""
    if config.backbone not in WIDTHS:
        return None
    if config.width is not None:
        return config.width
    make: Any = backbones.BACKBONES[config.backbone]
    return inspect.signature(make).parameters["width"].default


def wider(config: TrainConfig) -> Iterator[float]:
    """Even widths above the plain net's (a multiplier: steps of 0.05), narrow to wide."""
    base, step = base_width(config) or 0, _step(config)
    most = min(WIDEST * base, WIDTHS[config.backbone][2])
    yield from (value for k in range(1, 10_000) if base < (value := _rounded(base, step, k)) <= most)


def narrower(config: TrainConfig) -> Iterator[float]:
    """Even widths below the plain net's (a multiplier: steps of 0.05), wide to narrow."""
    base, step = base_width(config) or 0, _step(config)
    least = max(WIDTHS[config.backbone][1], step)
    count = int(base / step) + 1
    yield from (value for k in range(count) if least <= (value := _rounded(base, step, -k)) < base)


def _step(config: TrainConfig) -> float:
    return 2 if WIDTHS[config.backbone][1] >= 1 else 0.05


def _rounded(base: float, step: float, k: int) -> float:
    value = step * (base // step + k)
    return round(value, 4) if step < 1 else int(value)


def fits(
    config: TrainConfig, tasks: Sequence[Task], goals: Sequence[Goal], table: LatencyTable, path: Path
) -> dict[str, Fit]:
    """Budget name -> the rivals' widths; kept in `path` for these budgets, this kind of net and this machine."""
    key = fits_key(config, tasks, goals)
    stored = kept(path)
    if stored.get("key") != key:
        stored = {"key": key, **_measured(config, tasks, goals, table)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(stored, indent=1) + "\n")
    return {name: Fit(**fit) for name, fit in stored["fits"].items()}


def fits_key(config: TrainConfig, tasks: Sequence[Task], goals: Sequence[Goal]) -> str:
    """A name for all that the widths depend on, this machine's processor among it."""
    net = (config.backbone, base_width(config), config.size, config.head_width, [task.name for task in tasks])
    return digest(net, [goal.name for goal in goals], fingerprint()["cpu"])


def _measured(config: TrainConfig, tasks: Sequence[Task], goals: Sequence[Goal], table: LatencyTable) -> dict[str, Any]:
    if base_width(config) is None:
        return {"fits": {goal.name: asdict(Fit()) for goal in goals}, "measured": {}}
    plain = _graph(config, tasks)
    (plain_ms, _), expected = times({"plain": plain})["plain"], table.predict(plain).ms
    limits = [goal.limit(plain_ms) / plain_ms for goal in goals]  # as ratios, whatever was asked for
    up, down = dict[float, float](), dict[float, float]()
    for width in wider(config):
        up[width] = table.predict(_graph(config, tasks, width)).ms / expected
        if up[width] > 1.3 * max(limits):  # a wider net may be faster, but not by this much
            break
    for width in narrower(config):
        down[width] = len(tasks) * table.predict(_graph(config, tasks[:1], width)).ms / expected
        if down[width] < 0.7 * min(limits):
            break
    tried = {f"wide-{w}": _graph(config, tasks, w) for w in _proposed(up, limits)}
    tried |= {f"narrow-{w}": _graph(config, tasks, w, separate=True) for w in _proposed(down, limits)}
    found = times({"plain": plain, **tried})
    fit = {goal.name: asdict(Fit(widest(goal, found, "wide"), widest(goal, found, "narrow"))) for goal in goals}
    return {"fits": fit, "measured": {name: {"ms": ms, "ratio": ratio} for name, (ms, ratio) in found.items()}}


def _graph(config: TrainConfig, tasks: Sequence[Task], width: float | None = None, separate: bool = False) -> ir.Model:
    """The float graph of an untrained plain net, or of single-task nets side by side."""
    own = config if width is None else replace(config, width=width)
    example = torch.zeros(1, 3, *own.size)
    nets = [PlainNet(make_backbone(own), part, example) for part in ([[t] for t in tasks] if separate else [tasks])]
    return graph.load(to_onnx(SeparateNets(nets) if separate else nets[0], own.preprocess()))


def _proposed(predicted: Mapping[float, float], limits: Sequence[float]) -> list[float]:
    """For each limit the widest few that should meet it."""
    widths = sorted(predicted, reverse=True)
    return sorted({w for limit in limits for w in [w for w in widths if predicted[w] <= limit * (1 + ABOVE)][:TRIED]})


def widest(goal: Goal, measured: Mapping[str, tuple[float, float]], kind: str) -> float | None:
    """The widest net of a kind whose measured time is within a budget: of two that are, it has the most MACs.

    >>> widest(Goal(ratio=1.5), {"wide-38": (3.4, 1.4), "wide-40": (3.3, 1.36), "wide-42": (3.9, 1.6)}, "wide")
    40
    """
    names = [name for name, time in measured.items() if name.startswith(f"{kind}-") and goal.holds(*time)]
    numbers = [float(name.partition("-")[2]) for name in names]
    return max((int(n) if n.is_integer() else n for n in numbers), default=None)


def times(graphs: Mapping[str, ir.Model]) -> dict[str, tuple[float, float]]:
    """Name -> (median milliseconds, ratio to "plain") of INT8 engines with ranges from noise, interleaved."""
    model = next(iter(graphs.values()))
    frames = timing.noise(graph.preprocess(model))
    with timing.pinned(1), ExitStack() as stack:
        runs: dict[str, Any] = {}
        for name, net in graphs.items():
            engine = graph.dump(timing.noise_int8(net, frames))
            runs[name] = stack.enter_context(closing(ort.open(engine, threads=1))).run
        seconds = timing.interleave(runs, frames[0], ROUNDS)
    plain = seconds["plain"]
    return {name: (float(np.median(t) * 1e3), float(timing.ratio(t, plain)["ratio"])) for name, t in seconds.items()}
