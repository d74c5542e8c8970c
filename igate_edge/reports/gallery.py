"""Golden frames as a picture gallery: the image, its labels and what the engine answers, with legends."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..contract import OutputSpec
from ..metrics import make_metric
from .grids import caption
from .pictures import answer_lines, class_colour, colourise, depth_colours, depth_range, normal_map, png, ticks
from .tables import number, percent

#: Larger pictures are thinned to this width inside the page; the raw arrays come from `igate run`.
WIDEST = 320


@dataclass(frozen=True)
class Shown:
    """One golden frame, uint8 RGB [H,W,3]; per task its label (None = none stored), packaged float, engine output."""

    frame: np.ndarray
    label: dict[str, np.ndarray | None]
    float_out: dict[str, np.ndarray]
    engine_out: dict[str, np.ndarray]


def image_tag(picture: np.ndarray, text: str) -> str:
    """A picture as an inline PNG."""
    step = max(1, math.ceil(picture.shape[1] / WIDEST))
    data = base64.b64encode(png(picture[::step, ::step])).decode()
    return f'<img alt="{html.escape(text, quote=True)}" src="data:image/png;base64,{data}">'


def frame_metric(spec: OutputSpec, predicted: np.ndarray, label: np.ndarray) -> float:
    """The task's main metric on one frame."""
    metric = make_metric(spec)
    metric.update(predicted, label)
    return metric.compute()[spec.metric]


def agreement(spec: OutputSpec, a: np.ndarray, b: np.ndarray) -> str:
    """How far two decoded outputs of one task are apart, in words and in the task's own unit."""
    if spec.kind == "semseg":
        return f"{percent(float((a == b).mean()), 1)} of pixels as float"
    if spec.kind == "depth":
        return f"{number(float(np.abs(a - b).mean()), 2)} m from float"
    if spec.kind == "normals":
        cosine = np.clip((a * b).sum(-1), -1, 1)
        return f"{number(float(np.degrees(np.arccos(cosine)).mean()), 2)}° from float"
    return f"{number(float(np.abs(a - b).mean()), 2)} from float"


def _cell(spec: OutputSpec, values: np.ndarray | None, limits: tuple[float, float], text: str) -> str:
    if values is None:
        return '<div class="none">no label in the bundle</div>'
    if spec.dense:
        return image_tag(colourise(spec, values, limits), text)
    if values.ndim == 0:
        names = spec.classes or tuple(f"class {k}" for k in range(spec.channels))
        known = 0 <= int(values) < len(names)
        return f'<div class="words">{html.escape(names[int(values)]) if known else "not labelled"}</div>'
    lines = "<br>".join(f"{html.escape(name)} {percent(p)}" for name, p in answer_lines(spec, values))
    return f'<div class="words">{lines}</div>'


def _one(
    shown: Shown, index: int, tasks: Sequence[OutputSpec], limits: dict[str, tuple[float, float]], engine: str
) -> str:
    cells = [f"<div>{image_tag(shown.frame, f'golden frame {index}')}</div>"]
    unlabelled = all(label is None for label in shown.label.values())
    above = "float network" if unlabelled else "image and labels"
    below = [f'<div class="side">golden frame {index}<br>above: {above}<br>this row: {engine} engine</div>']
    for spec in tasks:
        label, scale = shown.label.get(spec.name), limits.get(spec.name, (0.0, 1.0))
        top = shown.float_out[spec.name] if unlabelled else label
        cells.append(f"<div>{_cell(spec, top, scale, f'{spec.name}, reference, frame {index}')}</div>")
        predicted = shown.engine_out[spec.name]
        parts = [agreement(spec, predicted, shown.float_out[spec.name])]
        if label is not None:
            parts.insert(0, caption(spec.metric, number(frame_metric(spec, predicted, label))))
        under = f'<div class="cap">{html.escape(", ".join(parts))}</div>'
        below.append(f"<div>{_cell(spec, predicted, scale, f'{spec.name}, {engine}, frame {index}')}{under}</div>")
    return f'<div class="frame" style="--n:{len(tasks) + 1}">{"".join(cells)}{"".join(below)}</div>'


def _depth_scale(limits: tuple[float, float]) -> str:
    colours = depth_colours()[:: max(1, 256 // 16)]
    stops = ", ".join("rgb({}, {}, {})".format(*c) for c in colours.tolist())
    marks = "".join(
        f'<span style="left:{100 * (tick - limits[0]) / (limits[1] - limits[0]):.1f}%">{tick:g}</span>'
        for tick in ticks(limits, 5)
    )
    return f'<div class="bar"><div style="background:linear-gradient(to right, {stops})"></div>{marks}</div>'


def _ball(size: int = 72) -> np.ndarray:
    """Normals of a ball seen by the camera: the legend of the normals' colours."""
    y, x = (np.mgrid[0:size, 0:size] - (size - 1) / 2) / (size / 2)
    inside = x**2 + y**2 < 1
    z = -np.sqrt(np.clip(1 - x**2 - y**2, 0, 1))
    picture = normal_map(np.stack([x, y, z], axis=-1))
    picture[~inside] = 255
    return picture


def _legends(tasks: Sequence[OutputSpec], shown: Sequence[Shown], limits: dict[str, tuple[float, float]]) -> str:
    parts = []
    for spec in tasks:
        title = f"<b>{html.escape(spec.name)}</b>"
        if spec.kind == "semseg":
            maps = [m for s in shown for m in (s.engine_out[spec.name], s.label.get(spec.name)) if m is not None]
            present = {int(v) for m in maps for v in np.unique(m)}
            names = spec.classes or tuple(f"class {k}" for k in range(spec.channels))
            entries = "".join(
                f'<span class="key"><i style="background:rgb{class_colour(k)}"></i>{html.escape(names[k])}</span>'
                for k in sorted(present)
                if k < len(names) and k != spec.ignore
            )
            parts.append(f"<div>{title}<br>{entries}</div>")
        elif spec.kind == "depth":
            parts.append(f"<div>{title}, metres{_depth_scale(limits[spec.name])}</div>")
        elif spec.kind == "normals":
            ball = image_tag(_ball(), "a ball as the camera sees it, coloured by its normals")
            words = "a ball seen by the camera; axes: x right, y down, z forward"
            parts.append(f'<div>{title}<div class="ball">{ball}<span>{words}</span></div></div>')
        elif spec.kind == "edges":
            parts.append(f"<div>{title}<br>dark = edge</div>")
    return f'<div class="legends">{"".join(parts)}</div>'


def gallery(tasks: Sequence[OutputSpec], shown: Sequence[Shown], engine: str = "INT8") -> str:
    """Legends, then one block per frame, as HTML; one depth scale for all frames of a task; `engine`: its precision."""
    limits = {}
    for spec in tasks:
        if spec.kind == "depth":
            maps: list[Any] = [
                m for s in shown for m in (s.engine_out[spec.name], s.label.get(spec.name)) if m is not None
            ]
            limits[spec.name] = depth_range(*maps)
    head = "".join(f"<div>{html.escape(name)}</div>" for name in ("image", *(spec.name for spec in tasks)))
    blocks = [_one(item, index, tasks, limits, engine) for index, item in enumerate(shown)]
    titles = f'<div class="frame heads" style="--n:{len(tasks) + 1}">{head}</div>'
    return _legends(tasks, shown, limits) + titles + "".join(blocks)
