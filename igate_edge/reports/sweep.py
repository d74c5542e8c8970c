"""What a sweep found, in words and as a table: the best net at each budget, and what a millisecond buys. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..contract import OutputSpec
from ..training.goal import Goal, from_json
from .grids import METRICS
from .nets import KINDS, goal_names, kind_of, net_name
from .tables import Grid, count, number, sentence_list, times

#: Rows that answer no budget: a control, and nets that were given more compute than the others.
NO_CANDIDATES = ("random", "single")
OURS = ("ours", "fill", "grown")


@dataclass(frozen=True)
class Point:
    """One net of a sweep, measured in INT8 and averaged over its seeds.

    ratio: to the plain net's time in the same run; ms: that ratio times the plain net's mean milliseconds. delta: mean
    relative gain in %; by_seed: the same for each seed. row: a row of the document (the first seed's).
    """

    name: str
    kind: str
    label: str
    ms: float
    ratio: float
    delta: float
    by_seed: Mapping[int, float]
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """The best net within a budget, and the best of another family (None: there is none)."""

    goal: Goal
    limit_ms: float
    best: Point
    second: Point | None

    @property
    def margin(self) -> float:
        """How far the best is ahead, in points of delta."""
        return self.best.delta - self.second.delta if self.second else 0.0

    @property
    def agreed(self) -> bool:
        """Whether there are two seeds or more, and the best is ahead in each of them."""
        both = self.best.by_seed.keys() & self.second.by_seed.keys() if self.second else set[int]()
        ahead = [self.best.by_seed[seed] > self.second.by_seed[seed] for seed in both] if self.second else []
        return len(ahead) > 1 and all(ahead)


def points(document: Mapping[str, Any]) -> list[Point]:
    """The measured nets of a document, in order of kind and time; what was refused in INT8 is left out."""
    goals, tasks = goal_names(document), len(document["tasks"])
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in document["rows"]:
        if "ms_ratio" in row and "int8_delta_mtl" in row:
            groups.setdefault(row["name"], []).append(row)
    plain = _mean([row["ms"] for row in groups.get("plain", [])])
    found = []
    for name, rows in groups.items():
        ratio, deltas = _mean([row["ms_ratio"] for row in rows]), {row["seed"]: row["int8_delta_mtl"] for row in rows}
        label = net_name(rows[0], goals, tasks)
        found.append(
            Point(name, kind_of(rows[0]), label, ratio * plain, ratio, _mean(deltas.values()), deltas, rows[0])
        )
    order = list(KINDS)
    return sorted(found, key=lambda point: (order.index(point.kind), point.ms))


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def candidates(found: Sequence[Point], goal: Goal) -> list[Point]:
    """The nets that may be chosen at a budget, best first."""
    return sorted(
        (p for p in found if p.kind not in NO_CANDIDATES and (p.kind == "plain" or goal.holds(p.ms, p.ratio))),
        key=lambda p: -p.delta,
    )


def front(found: Sequence[Point]) -> list[Point]:
    """The nets that no other one beats in both time and delta, fast to slow."""
    best: list[Point] = []
    for point in sorted((p for p in found if p.kind not in NO_CANDIDATES), key=lambda p: (p.ms, -p.delta)):
        if not best or point.delta > best[-1].delta:
            best.append(point)
    return best


def family(point: Point) -> str:
    """What competes as one: all ways of making our merged net are ours."""
    return "ours" if point.kind in OURS else point.kind


def verdicts(document: Mapping[str, Any]) -> list[Verdict]:
    """The best net at each budget of a document; [] when nothing was measured."""
    found, answers = points(document), []
    plain = next((point.ms for point in found if point.kind == "plain"), 0.0)
    for goal in map(from_json, document["goals"]):
        ranked = candidates(found, goal)
        if ranked:
            second = next((point for point in ranked if family(point) != family(ranked[0])), None)
            answers.append(Verdict(goal, goal.limit(plain), ranked[0], second))
    return answers


def verdict_line(verdict: Verdict) -> str:
    """The winner at a budget in a sentence."""
    best, second = verdict.best, verdict.second
    budget = f"At {verdict.goal.text}" + (f" ({number(verdict.limit_ms)} ms)" if verdict.goal.ratio else "")
    line = f"{budget}: {best.label}, {number(best.ms)} ms, delta {best.delta:+.1f} %"
    if second is None:
        return line
    seeds = len(best.by_seed.keys() & second.by_seed.keys())
    sure = "one seed" if seeds < 2 else f"in each of {seeds} seeds" if verdict.agreed else f"{seeds} seeds disagree"
    return f"{line}; {verdict.margin:.1f} ahead of {second.label} ({number(second.ms)} ms; {sure})"


def slope(found: Sequence[Point], kind: str) -> float | None:
    """Points of delta that a millisecond more than the plain net's buys with nets of a kind: least squares through it.

    >>> row = {"name": "x"}
    >>> plain = Point("plain", "plain", "", 2.0, 1.0, -4.0, {}, row)
    >>> slope([plain, Point("wide-40", "wide", "", 3.0, 1.5, -3.0, {}, row)], "wide")
    1.0
    """
    plain = next((point for point in found if point.kind == "plain"), None)
    more = [p for p in found if p.kind == kind and plain is not None and p.ms > plain.ms]
    if plain is None or not more:
        return None
    square = sum((p.ms - plain.ms) ** 2 for p in more)
    return sum((p.ms - plain.ms) * (p.delta - plain.delta) for p in more) / square


def millisecond_line(document: Mapping[str, Any]) -> str:
    """What one millisecond buys, in a sentence; "" when nothing was measured."""
    found = points(document)
    words = {"ours": "ours", "fill": "ours filled", "grown": "ours grown", "wide": "the plain net widened"}
    words |= {"pruned": "Torch-Pruning", "narrow": "separate nets narrowed"}
    parts = [f"{value:+.1f} with {words[kind]}" for kind in words if (value := slope(found, kind)) is not None]
    plain = next((point for point in found if point.kind == "plain"), None)
    if plain is None or not parts:
        return ""
    return f"1 ms more than the plain net's {number(plain.ms)} ms buys, in points of delta: {sentence_list(parts)}"


def cost_line(document: Mapping[str, Any]) -> str:
    """What all nets of ours took to train, in trainings of the plain net, and one of them in seconds to its seconds."""
    rows = [row for row in document["rows"] if row["seed"] == document["rows"][0]["seed"]]
    plain = next((row for row in rows if row["name"] == "plain"), None)
    ours = [row for row in rows if kind_of(row) == "ours"]
    if plain is None or not ours:
        return ""
    shares = document["shares"]
    each = 1 - shares["base"] - shares["fork"]
    whole = shares["base"] + shares["fork"] + each * len(ours)
    ratios = [row["train_seconds"] / max(plain["train_seconds"], 1e-9) for row in ours]
    return (
        f"ours at {len(ours)} budgets took the compute of {whole:.1f} trainings of the plain net; each counts as one, "
        f"in seconds {min(ratios):.1f} to {max(ratios):.1f} times the plain net's"
    )


def sweep_grid(document: Mapping[str, Any]) -> Grid:
    """All measured nets of a sweep: time, delta, each task's metric, cost to run and to train."""
    specs = [OutputSpec.from_json(spec) for spec in document["tasks"]]
    found = points(document)
    winners = {verdict.best.name for verdict in verdicts(document)}
    seconds = next((p.row["train_seconds"] for p in found if p.kind == "plain"), 0.0)
    cells: list[Callable[[Point], str]] = [
        lambda p: p.label,
        lambda p: number(p.ms),
        lambda p: times(p.ratio),
        lambda p: number(p.row["predicted_ms"]),
        lambda p: f"{p.delta:+.1f} %",
        *((lambda p, s=spec: number(p.row["int8"][s.name][s.metric])) for spec in specs),
        lambda p: count(p.row["macs"]),
        lambda p: count(p.row["useful_macs"]),
        lambda p: count(p.row["params"]),
        lambda p: times(p.row["train_seconds"] / seconds if seconds else None),
    ]
    metrics = [f"{spec.name}: {METRICS[spec.metric]}" for spec in specs]
    columns = ("net", "ms", "to plain", "predicted", "delta", *metrics, "MACs", "useful", "params", "training to plain")
    rows = [[cell(point) for cell in cells] for point in found]
    seeds = sorted({row["seed"] for row in document["rows"]})
    to = {"single": "single-task nets with the whole compute each", "plain": "the plain shared net"}
    against = to.get(document["rows"][0]["delta_to"], "") if document["rows"] else ""
    note = f"INT8, one thread; delta: mean gain over {against}; mean of seeds {', '.join(map(str, seeds))}"
    if len(seeds) > 1:
        note += ", tasks' metrics of the first"
    strong = frozenset(k for k, point in enumerate(found) if point.name in winners)
    return Grid("Sweep", columns, rows, note=note, strong=strong)
