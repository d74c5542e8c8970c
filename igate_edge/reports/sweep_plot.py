"""A sweep as a picture: accuracy against measured milliseconds, ours and its rivals, with the Pareto front."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..training.goal import from_json
from .sweep import Point, front, millisecond_line, points

#: Kind -> colour, marker, line, and what the line is called.
STYLES = {
    "ours": ("#c2410c", "o", "-", "ours"),
    "fill": ("#ea9a66", "o", "--", "ours, filled"),
    "grown": ("#b3478c", "o", ":", "ours, grown without a search"),
    "wide": ("#2f5f9e", "s", "-", "plain net, widened"),
    "narrow": ("#5b8c5a", "^", "-", "separate nets, narrowed"),
    "pruned": ("#7a6f2f", "P", "-", "plain net, pruned"),
    "third": ("#5b8c5a", "v", "", "separate nets"),
    "random": ("#9aa0a6", "x", "", "random gates"),
    "plain": ("#202124", "D", "", "plain shared net"),
}
INK, SOFT, LINE = "#202124", "#5f6368", "#e2e2e6"


def sweep_png(document: Mapping[str, Any]) -> bytes:
    """The plot as a PNG file's bytes. Needs matplotlib (the extra `report`)."""
    from matplotlib.figure import Figure

    found = [point for point in points(document) if point.kind in STYLES]
    floor = lowest_shown(found)
    figure = Figure(figsize=(9, 5.6), dpi=150, facecolor="white")
    axes = figure.add_axes((0.085, 0.115, 0.69, 0.70))
    _frame(axes)
    _budgets(axes, document, found)
    _front(axes, front(found))
    for kind in STYLES:
        own = [point for point in found if point.kind == kind]
        _kind(axes, kind, [point for point in own if point.delta >= floor])
        _below(axes, kind, [point for point in own if point.delta < floor], floor)
    if any(point.delta < floor for point in found):
        axes.set_ylim(bottom=floor)
    _names(axes, [point for point in found if point.delta >= floor])
    single = bool(document["rows"]) and document["rows"][0]["delta_to"] == "single"
    against = f"single-task nets ({len(document['tasks'])}x the compute)" if single else "the plain shared net"
    axes.set_xlabel("measured INT8 time, ms a frame (one thread, batch 1)", color=SOFT, fontsize=9)
    axes.set_ylabel(f"mean gain over {against}, %", color=SOFT, fontsize=9)
    _title(figure, document)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "igate_edge"})
    return buffer.getvalue()


def lowest_shown(found: Sequence[Point]) -> float:
    """Where the picture ends below: separate nets may lie so far down that they would press all others together."""
    near = [point.delta for point in found if point.kind not in ("narrow", "third")] or [0.0]
    return min(near) - max(0.7 * (max(near) - min(near)), 2.0)


def _frame(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(colors=SOFT, labelsize=8.5, length=0, pad=5)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)


def _budgets(axes: Any, document: Mapping[str, Any], found: Sequence[Point]) -> None:
    plain = next((point.ms for point in found if point.kind == "plain"), None)
    for goal in map(from_json, document["goals"] if plain else []):
        x = goal.limit(plain or 0.0)
        axes.axvline(x, color="#c8cacf", linewidth=0.9, linestyle=(0, (2, 3)), zorder=0.5)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(goal.text, (x, 1), (0, 4), ha="center", color=SOFT, fontsize=8.5, **place)


def _front(axes: Any, best: Sequence[Point]) -> None:
    """The Pareto front as a broad, pale staircase, out to the right edge."""
    if best:
        right = max(axes.get_xlim()[1], best[-1].ms * 1.04)
        xs, ys = [point.ms for point in best] + [right], [point.delta for point in best] + [best[-1].delta]
        axes.step(xs, ys, where="post", color="#fbe3c4", linewidth=7, solid_capstyle="round", zorder=1)


def _kind(axes: Any, kind: str, own: Sequence[Point]) -> None:
    """Means as a line, each seed as a small dot."""
    colour, marker, line, _ = STYLES[kind]
    for point in own if any(len(p.by_seed) > 1 for p in own) else []:
        values = list(point.by_seed.values())
        axes.plot([point.ms] * 2, [min(values), max(values)], color=colour, linewidth=1, alpha=0.45, zorder=2)
        axes.scatter([point.ms] * len(values), values, s=9, color=colour, alpha=0.6, linewidths=0, zorder=2)
    edge = {} if marker == "x" else {"markeredgecolor": "white", "markeredgewidth": 1.2}
    xs, ys = [point.ms for point in own], [point.delta for point in own]
    style = {"color": colour, "marker": marker, "linestyle": line or "none", "linewidth": 1.9, "markersize": 8}
    axes.plot(xs, ys, zorder=4 if kind in ("ours", "plain") else 3, **style, **edge)


def _below(axes: Any, kind: str, own: Sequence[Point], floor: float) -> None:
    """Nets below the picture: an arrow down at its edge, with the number."""
    colour, _, _, name = STYLES[kind]
    style = {"color": colour, "fontsize": 8, "ha": "center", "va": "bottom", "textcoords": "offset points"}
    for number, point in enumerate(own):
        axes.annotate("", (point.ms, floor), (0, 16), arrowprops={"arrowstyle": "-|>", "color": colour}, **style)
        text = f"{point.delta:+.1f}" if number else f"{name}\n{point.delta:+.1f}"
        axes.annotate(text, (point.ms, floor), (0, 18), **style)


def _names(axes: Any, found: Sequence[Point]) -> None:
    """Each kind's name beside its slowest net, in the right margin, moved apart where two would touch."""
    ends = {p.kind: p for p in found}  # points are in order of time: the last of a kind stays
    if plain := ends.pop("plain", None):
        style = {"color": INK, "fontsize": 9.5, "textcoords": "offset points", "ha": "left", "va": "top"}
        axes.annotate(STYLES["plain"][3], (plain.ms, plain.delta), (9, -7), **style)
    low, high = axes.get_ylim()
    gap, wanted = (high - low) * 0.05, sorted(ends.values(), key=lambda point: point.delta)
    heights = [point.delta for point in wanted]
    for k in range(1, len(heights)):
        heights[k] = max(heights[k], heights[k - 1] + gap)
    over = max(0.0, (heights[-1] if heights else 0.0) - high)
    for k in reversed(range(len(heights))):  # what was pushed above the frame comes back down
        top = high if k == len(heights) - 1 else heights[k + 1] - gap
        heights[k] = min(heights[k], top) if over else heights[k]
    for point, height in zip(wanted, heights, strict=True):
        colour, _, _, name = STYLES[point.kind]
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.4, "shrinkA": 2, "shrinkB": 6}
        target = {"xycoords": "data", "textcoords": ("axes fraction", "data"), "arrowprops": line}
        bold = "bold" if point.kind == "ours" else "normal"
        axes.annotate(
            name,
            (point.ms, point.delta),
            (1.02, height),
            color=colour,
            fontsize=9.5,
            va="center",
            weight=bold,
            **target,
        )


def _title(figure: Any, document: Mapping[str, Any]) -> None:
    seeds = len({row["seed"] for row in document["rows"]})
    words = {1: "one seed: a point of difference means nothing"}.get(seeds, f"mean of {seeds} seeds, each a small dot")
    text = "\n".join(textwrap.wrap(f"{millisecond_line(document)}.", 96))
    figure.text(0.085, 0.955, text, color=INK, fontsize=10.5, weight="bold", va="top", linespacing=1.35)
    place = {"color": SOFT, "fontsize": 8, "va": "bottom"}
    machine = str(document.get("machine", {}).get("cpu", ""))
    note = f"equal training compute for all; {words}; pale band: Pareto front"
    figure.text(0.085, 0.012, f"{note}{'; ' if machine else ''}{machine}", **place)
