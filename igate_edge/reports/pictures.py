"""Pictures of frames and task outputs: class masks, depth with a metre scale, normals, edges, and panels side by side.

Colours are computed in OKLab (B. Ottosson, 2020), a space in which equal distances look equally different.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..contract import OutputSpec
from ..errors import InputError
from ..frames import pillow

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

INVALID = (226, 226, 230)
INK = (32, 33, 36)


def _oklab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """OKLab float64 [...,3] to linear sRGB [...,3], not clipped."""
    cone = lab @ np.array(
        [[1.0, 1.0, 1.0], [0.3963377774, -0.1055613458, -0.0894841775], [0.2158037573, -0.0638541728, -1.2914855480]]
    )
    return cone**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )


def _to_bytes(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0.0, 1.0)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(curved * 255).astype(np.uint8)


def _lch(lightness: Any, chroma: Any, hue_degrees: Any) -> np.ndarray:
    lightness, chroma, hue = np.broadcast_arrays(lightness, chroma, np.radians(hue_degrees))
    return np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)


@functools.lru_cache(maxsize=1)
def palette() -> np.ndarray:
    """40 class colours, uint8 [40,3], all readable on white; the first is grey, as class 0 is mostly background.

    Each next colour is the one farthest from all before it (in OKLab), so the first k are a good choice for k classes.

    >>> palette().shape
    (40, 3)
    """
    grid = _lch(
        np.linspace(0.40, 0.80, 6)[:, None, None],
        np.array([0.075, 0.12, 0.165])[None, :, None],
        np.arange(0, 360, 10)[None, None, :],
    ).reshape(-1, 3)
    linear = _oklab_to_rgb(grid)
    grid = grid[((linear >= 0) & (linear <= 1)).all(axis=1)]
    chosen = [np.array([0.70, 0.0, 0.0]), *_lch([0.58], [0.14], [255.0])]
    # White and the colour of invalid pixels count as taken, so that nothing comes near them.
    taken = [np.array([1.0, 0.0, 0.0]), np.array([0.91, 0.0, 0.0]), *chosen]
    nearest = np.min([np.linalg.norm(grid - colour, axis=1) for colour in taken], axis=0)
    while len(chosen) < 40:
        # Dark colours are kept for long class lists: a table in dark red drowns the cups on it.
        best = int(np.where((grid[:, 0] < 0.54) & (len(chosen) < 12), 0.0, nearest).argmax())
        chosen.append(grid[best])
        nearest = np.minimum(nearest, np.linalg.norm(grid - grid[best], axis=1))
    return _to_bytes(_oklab_to_rgb(np.array(chosen)))


@functools.lru_cache(maxsize=1)
def depth_colours() -> np.ndarray:
    """256 colours from near (yellow) to far (dark blue), uint8 [256,3]; lightness falls evenly, so it reads in grey."""
    position = np.linspace(0.0, 1.0, 256)
    lightness, hue = 0.94 - 0.69 * position, 98 + 187 * position
    low, high = np.zeros(256), np.full(256, 0.16)
    for _ in range(20):  # the strongest chroma that a screen can show, by bisection
        middle = (low + high) / 2
        linear = _oklab_to_rgb(_lch(lightness, middle, hue))
        inside = ((linear >= 0) & (linear <= 1)).all(axis=1)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    smooth = np.convolve(np.pad(low, 24, mode="edge"), np.ones(49) / 49, mode="valid")
    return _to_bytes(_oklab_to_rgb(_lch(lightness, 0.97 * smooth, hue)))


def class_colour(index: int) -> tuple[int, int, int]:
    """Colour of a class; classes beyond 40 repeat."""
    red, green, blue = palette()[index % len(palette())]
    return int(red), int(green), int(blue)


def class_mask(labels: np.ndarray, ignore: int = 255) -> np.ndarray:
    """Class numbers [H,W] as colours, uint8 [H,W,3]; `ignore` becomes light grey.

    >>> class_mask(np.array([[0, 255]], np.uint8))[0, 1].tolist()
    [226, 226, 230]
    """
    table = palette()
    picture = table[labels.astype(np.int64) % len(table)]
    picture[labels == ignore] = INVALID
    return picture


def valid_depth(metres: np.ndarray) -> np.ndarray:
    """True where a depth is usable: finite and above 0."""
    return np.isfinite(metres) & (metres > 0)


def depth_range(*maps: np.ndarray) -> tuple[float, float]:
    """A display range in metres that covers 98 % of the valid pixels of all `maps`; (0, 1) when none is valid."""
    values = np.concatenate([np.asarray(m, np.float32)[valid_depth(m)].ravel() for m in maps] or [np.empty(0)])
    if not values.size:
        return 0.0, 1.0
    near, far = (float(v) for v in np.percentile(values, [1, 99]))
    if far - near < 0.02 * max(far, 1e-6):
        far, near = far * 1.05, near * 0.95
    return near, far


def depth_map(metres: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Depth in metres [H,W] as colours between `limits` (near, far), uint8 [H,W,3]; invalid pixels are light grey."""
    near, far = limits
    valid = valid_depth(metres)
    position = (np.where(valid, metres, near) - near) / max(far - near, 1e-9)
    picture = depth_colours()[np.rint(np.clip(position, 0, 1) * 255).astype(np.int64)]
    picture[~valid] = INVALID
    return picture


def normal_map(normals: np.ndarray) -> np.ndarray:
    """Unit normals [H,W,3] (optical frame: x right, y down, z forward) as (n + 1) / 2; zero vectors are light grey."""
    picture = np.rint((np.clip(np.nan_to_num(normals), -1, 1) + 1) * 127.5).astype(np.uint8)
    picture[~(np.abs(np.nan_to_num(normals)).sum(axis=-1) > 0)] = INVALID
    return picture


def edge_map(probability: np.ndarray) -> np.ndarray:
    """Edge probability [H,W] (or a 0/1 label with 255 = ignore) as dark ink on white, uint8 [H,W,3]."""
    value = probability.astype(np.float32)
    picture = np.rint(255 * (1 - np.clip(np.nan_to_num(value), 0, 1)[..., None] * np.ones(3))).astype(np.uint8)
    picture[(value == 255) | ~np.isfinite(value)] = INVALID
    return picture


def colourise(spec: OutputSpec, values: np.ndarray, limits: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """Any dense task's decoded output or label as uint8 [H,W,3]; `limits` in metres for depth."""
    if spec.kind == "semseg":
        return class_mask(values, spec.ignore)
    if spec.kind == "depth":
        return depth_map(values, limits)
    if spec.kind == "normals":
        return normal_map(values)
    if spec.kind == "edges":
        return edge_map(values)
    raise InputError(f"{spec.kind} has no picture", f"task {spec.name!r} gives one vector a frame", "show it as a list")


def answer_lines(spec: OutputSpec, values: np.ndarray, most: int = 5) -> list[tuple[str, float]]:
    """(class, probability), best first; of a multi-label output those above 0.5, but at least one."""
    values = np.nan_to_num(np.asarray(values, np.float32).ravel())
    order = np.argsort(-values, kind="stable")[:most]
    if spec.kind == "multilabel":
        order = order[values[order] >= 0.5] if (values[order] >= 0.5).any() else order[:1]
    names = spec.classes or tuple(f"class {k}" for k in range(spec.channels))
    return [(names[k], float(values[k])) for k in order]


def png(picture: np.ndarray) -> bytes:
    """uint8 [H,W,3] or [H,W] as a PNG file's bytes."""
    buffer = io.BytesIO()
    pillow().Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", optimize=picture.size < 1 << 20)
    return buffer.getvalue()


def enlarge(picture: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel repeated `factor` times both ways: crisp, nothing invented."""
    return np.repeat(np.repeat(picture, factor, axis=0), factor, axis=1)


@dataclass(frozen=True)
class Panel:
    """One picture with a title and, below it, either a class legend, a depth scale in metres, or nothing."""

    title: str
    picture: np.ndarray
    legend: tuple[tuple[str, tuple[int, int, int]], ...] = ()
    limits: tuple[float, float] | None = None


def legend_of(spec: OutputSpec, *maps: np.ndarray) -> tuple[tuple[str, tuple[int, int, int]], ...]:
    """(name, colour) of every class that occurs in `maps`, in class order."""
    present = np.unique(np.concatenate([np.unique(m) for m in maps])) if maps else np.arange(spec.channels)
    names = spec.classes or tuple(f"class {k}" for k in range(spec.channels))
    return tuple((names[k], class_colour(k)) for k in (int(v) for v in present) if k < len(names) and k != spec.ignore)


def _font(size: int) -> FreeTypeFont | ImageFont:
    return pillow().ImageFont.load_default(size)


def ticks(limits: tuple[float, float], count: int = 4) -> list[float]:
    """Round numbers inside `limits`, about `count` of them."""
    near, far = limits
    rough = max(far - near, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(near / step - 1e-9)
    return [round(step * k, 6) for k in range(first, int(math.floor(far / step + 1e-9)) + 1)]


def _draw_scale(draw: Any, left: int, top: int, width: int, limits: tuple[float, float]) -> None:
    colours = depth_colours()
    for x in range(width):
        draw.line(
            [(left + x, top), (left + x, top + 9)], fill=tuple(int(v) for v in colours[x * 255 // max(width - 1, 1)])
        )
    for tick in ticks(limits):
        x = left + round((tick - limits[0]) / max(limits[1] - limits[0], 1e-9) * (width - 1))
        draw.line([(x, top + 10), (x, top + 13)], fill=INK)
        anchor = "lt" if x < left + 14 else "rt" if x > left + width - 14 else "mt"
        draw.text((x, top + 15), f"{tick:g}", fill=INK, font=_font(11), anchor=anchor)
    draw.text((left + width, top - 4), "metres", fill=INK, font=_font(10), anchor="rb")


def _legend_rows(legend: Sequence[tuple[str, tuple[int, int, int]]], width: int) -> list[list[tuple[int, str, Any]]]:
    """Legend entries broken into rows of at most `width` pixels: (x, name, colour)."""
    font, rows, x = _font(11), [[]], 0  # type: ignore[var-annotated]
    for name, colour in legend:
        needed = 15 + int(font.getlength(name)) + 10
        if x and x + needed > width:
            rows.append([])
            x = 0
        rows[-1].append((x, name, colour))
        x += needed
    return rows


def side_by_side(panels: Sequence[Panel], height: int = 240) -> np.ndarray:
    """Panels in a row on white, each enlarged (or thinned) by a whole factor to about `height` pixels: uint8 [h,w,3].

    Titles stand above, class legends and depth scales below.
    """
    modules = pillow()
    tallest = max(p.picture.shape[0] for p in panels)
    thin, factor = max(1, round(tallest / (2 * height))), max(1, round(height / tallest))
    shown = [enlarge(p.picture[::thin, ::thin], factor) for p in panels]
    widths = [max(s.shape[1], 120) for s in shown]
    rows = [_legend_rows(p.legend, w) if p.legend else [] for p, w in zip(panels, widths, strict=True)]
    below = max(16 * max(len(r) for r in rows), 34 if any(p.limits for p in panels) else 0)
    gap, title = 12, 24
    sheet = modules.Image.new(
        "RGB",
        (sum(widths) + gap * (len(panels) + 1), title + max(s.shape[0] for s in shown) + below + gap + 6),
        "white",
    )
    draw = modules.ImageDraw.Draw(sheet)
    left = gap
    for panel, picture, width, lines in zip(panels, shown, widths, rows, strict=True):
        draw.text((left, title - 6), panel.title, fill=INK, font=_font(13), anchor="ls")
        sheet.paste(modules.Image.fromarray(picture), (left, title))
        top = title + picture.shape[0] + 8
        if panel.limits:
            _draw_scale(draw, left, top + 4, picture.shape[1], panel.limits)
        for number, line in enumerate(lines):
            for x, name, colour in line:
                y = top + 16 * number
                draw.rectangle([left + x, y, left + x + 10, y + 10], fill=colour)
                draw.text((left + x + 15, y + 5), name, fill=INK, font=_font(11), anchor="lm")
        left += width + gap
    return np.asarray(sheet)


def answer_picture(spec: OutputSpec, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A vector output drawn as named bars, uint8 [H,W,3] of `size` (H, W)."""
    modules = pillow()
    height, width = max(size[0], 80), max(size[1], 120)
    sheet = modules.Image.new("RGB", (width, height), "white")
    draw = modules.ImageDraw.Draw(sheet)
    for number, (name, probability) in enumerate(answer_lines(spec, values, most=max(1, height // 22))):
        top = 22 * number + 2
        draw.rectangle([0, top + 13, int(probability * (width - 1)), top + 17], fill=class_colour(1))
        draw.text((0, top), f"{name} {probability:.0%}", fill=INK, font=_font(11))
    return np.asarray(sheet)
