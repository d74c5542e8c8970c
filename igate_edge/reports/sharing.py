"""The sharing map: for every layer and task, which channels the task owns and which it takes from the shared stream."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .pictures import class_colour

LABEL, STRIP, SIDE, ROW_GAP, HEAD, BAND = 210, 640, 200, 7, 30, 7
SHARED = "#e4e4e8"


@dataclass(frozen=True)
class Layer:
    """One gate site: `open[task]` is a string of 0 and 1, one a channel; 1 = the task has its own channel."""

    name: str
    channels: int
    open: dict[str, str]
    tie: str = ""

    def fraction(self, task: str) -> float:
        """Share of this layer's channels that `task` owns."""
        return self.open[task].count("1") / self.channels if self.channels else 0.0

    def codes(self) -> list[str]:
        """One gate code a channel, shared channels first; "101" = owned by the first and the third task."""
        return sorted(
            ("".join(bits) for bits in zip(*self.open.values(), strict=True)), key=lambda c: (c.count("1"), c)
        )


def layers(sites: Sequence[dict[str, Any]], tasks: Sequence[str]) -> list[Layer]:
    """Gate sites as written in the model's metadata (`sites` of the manifest), in execution order.

    >>> layers([{"name": "stem", "channels": 4, "open": {"depth": "0110"}}], ["depth"])[0].fraction("depth")
    0.5
    """
    return [
        Layer(
            str(site["name"]),
            int(site["channels"]),
            {task: str(site.get("open", {}).get(task, "0" * int(site["channels"]))) for task in tasks},
            str(site.get("tie") or ""),
        )
        for site in sites
    ]


def task_colour(index: int) -> str:
    """The colour that stands for a task in every picture of the report."""
    return "#{:02x}{:02x}{:02x}".format(*class_colour((1, 4, 3, 2, 9, 7, 6, 10)[index % 8]))


def runs(bits: Sequence[str]) -> list[tuple[str, int, int]]:
    """Equal neighbours joined: (value, start, length).

    >>> runs("0011")
    [('0', 0, 2), ('1', 2, 2)]
    """
    found, start = [], 0
    for value, group in groupby(bits):
        length = len(list(group))
        found.append((value, start, length))
        start += length
    return found


def _row(layer: Layer, top: int, tasks: Sequence[str]) -> list[str]:
    """One layer: a band a task; channels in the order of their gate code, so that what tasks share stands together."""
    codes, scale = layer.codes(), STRIP / max(layer.channels, 1)
    middle = top + BAND * len(tasks) / 2 + 4
    parts = [
        f'<text x="{LABEL - 12}" y="{middle}" text-anchor="end" class="n">{html.escape(layer.name)}</text>',
        f'<rect x="{LABEL}" y="{top}" width="{STRIP}" height="{BAND * len(tasks)}" fill="{SHARED}"/>',
    ]
    for number, task in enumerate(tasks):
        y = top + BAND * number
        share = layer.fraction(task)
        for bit, start, length in runs([code[number] for code in codes]):
            if bit == "1":
                tip = html.escape(f"{layer.name}, {task}: {share:.0%} of {layer.channels} channels its own")
                parts.append(
                    f'<rect x="{LABEL + start * scale:.2f}" y="{y}" width="{length * scale:.2f}" height="{BAND - 1}" '
                    f'fill="{task_colour(number)}"><title>{tip}</title></rect>'
                )
    numbers = " / ".join(f"{layer.fraction(task):.0%}" for task in tasks)
    parts.append(f'<text x="{LABEL + STRIP + 12}" y="{middle}" class="v">{layer.channels} ch: {numbers}</text>')
    return parts


def sharing_svg(map_layers: Sequence[Layer], tasks: Sequence[str]) -> str:
    """The sharing map as inline SVG that scales with the page; an empty string when nothing is gated."""
    if not map_layers:
        return ""
    step = BAND * len(tasks) + ROW_GAP
    width, height = LABEL + STRIP + SIDE, HEAD + step * len(map_layers)
    parts = [
        f'<svg class="map" viewBox="0 0 {width} {height}" role="img" aria-label="sharing map" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    entries = [(SHARED, "shared"), *((task_colour(k), f"{task}'s own") for k, task in enumerate(tasks))]
    x = float(LABEL)
    for colour, text in entries:
        parts.append(f'<rect x="{x:.0f}" y="4" width="11" height="11" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16:.0f}" y="14" class="v">{html.escape(text)}</text>')
        x += 36 + 7.0 * len(text)
    for number, layer in enumerate(map_layers):
        parts += _row(layer, HEAD + step * number, tasks)
    return "\n".join([*parts, "</svg>"])


def stage_of(name: str) -> str:
    """The stage a site belongs to, from its name: "layer3.1.relu2" -> "layer3"; a bare name is its own stage."""
    return name.split(".", 1)[0].split("_", 1)[0] or name


def stage_fractions(map_layers: Sequence[Layer], tasks: Sequence[str]) -> list[tuple[str, int, list[float]]]:
    """(stage, channels, share owned by each task), in execution order; channels of a stage's sites are pooled.

    >>> pair = layers([{"name": "a.1", "channels": 2, "open": {"t": "11"}}, {"name": "a.2", "channels": 2}], ["t"])
    >>> stage_fractions(pair, ["t"])
    [('a', 4, [0.5])]
    """
    stages: dict[str, list[Layer]] = {}
    for layer in map_layers:
        stages.setdefault(stage_of(layer.name), []).append(layer)
    result = []
    for stage, members in stages.items():
        total = sum(m.channels for m in members)
        result.append((stage, total, [sum(m.open[t].count("1") for m in members) / max(total, 1) for t in tasks]))
    return result
