"""Whether a camera still shows what a bundle was calibrated on: statistics of frames and answers against stored ones.

Measured: an image's brightness, contrast, clipping, sharpness, noise, colours and order of channels at the network's
size; the shares of classes and of depths in the answers; and the share of values outside the calibrated INT8 range of
the network's input and of the outputs that decoding keeps (depth, edges, multilabel). The tensors in between:
`drift_tensors`, on demand.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..contract import OutputSpec, Preprocess, is_number
from ..errors import DataError, InputError
from .postprocess import MAX_LOG_DEPTH
from .preprocess import check_frame, resize

VERSION = 1
#: Inspected frames that a score looks back on, and the fewest that give one.
WINDOW, FEWEST = 32, 8
#: A score of 1: the window's mean is this many of its standard errors away from the reference.
LIMIT = 4.0
#: Frames that a reference needs: below, a spread is a guess.
MIN_FRAMES = 4
#: Smallest spread that is believed, by a feature's name up to its slash: few frames may look alike by chance.
FLOORS = {
    "brightness": 0.05,
    "contrast": 0.05,
    "clipping": 0.01,
    "sharpness": 0.1,
    "noise": 0.1,
    "colour": 0.03,
    "colourfulness": 0.1,
    "channel-order": 0.1,
    "classes": 0.03,
    "depth": 0.03,
    "saturation": 0.005,
}
#: Features of which less than usual is no drift.
_ONE_SIDED = ("classes", "depth", "saturation", "clipping", "channel-order")
#: Edges of the depth histogram in logarithms of metres: 5 cm to 100 m, and all that lies beyond at its ends.
_DEPTHS = np.linspace(math.log(0.05), math.log(100.0), 40)
#: The colour histogram: logarithms of red over green, and of blue over green, from -1 to 1 in as many bins.
_HUES, _COLOURS = 8, "colours"
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
#: Network pixels above which an image is looked at in 9 tiles, and a tile's side.
_WHOLE, _TILE = 128 * 128, 40


@dataclass(frozen=True)
class Score:
    """value: 1 and above is drift, NaN unknown; parts: feature -> its own score; worst first."""

    value: float
    parts: dict[str, float]

    @property
    def status(self) -> str:
        """ "unknown", "low" or "high"."""
        if math.isnan(self.value):
            return "unknown"
        return "high" if self.value >= 1 else "low"

    def sentence(self) -> str:
        """Which features left the reference, in words; "" when none did."""
        far = [f"{name} x{value:.1f}" for name, value in self.parts.items() if value >= 1]
        return f"unlike the calibration frames (1 is the limit): {', '.join(far[:4])}" if far else ""


class Drift:
    """The scores of the last WINDOW inspected frames against a reference; the caller holds a lock for `add`."""

    def __init__(self, reference: Mapping[str, Any] | None) -> None:
        self.reference = None if reference is None else check_reference(reference)
        self.inspected = 0
        self._values: deque[dict[str, float]] = deque(maxlen=WINDOW)

    def measure(self, image: np.ndarray, outputs: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Features of one frame; raises InputError for no image. Empty without a reference."""
        if self.reference is None:
            return {}
        return {**image_features(image, self.reference), **output_features(outputs, self.reference)}

    def add(self, values: dict[str, float]) -> None:
        """Take one frame's features into the window."""
        self.inspected += 1
        self._values.append(values)

    def latest(self, prefix: str) -> dict[str, float]:
        """Mean over the window of the features whose name begins so, without the prefix."""
        names = {name for values in self._values for name in values if name.startswith(prefix)}
        found = {name: [values[name] for values in self._values if name in values] for name in sorted(names)}
        return {name[len(prefix) :]: float(np.mean(values)) for name, values in found.items()}

    def score(self) -> Score:
        """Distance of the window's means from the reference; NaN below FEWEST frames or without a reference."""
        if self.reference is None or len(self._values) < FEWEST:
            return Score(math.nan, {})
        parts = {}
        for name, known in self.reference["features"].items():
            values = [values[name] for values in self._values if name in values]
            if len(values) >= FEWEST:
                parts[name] = _distance(name, values, known["mean"], known["std"], self.reference["frames"])
        parts = dict(sorted(parts.items(), key=lambda item: -item[1]))
        return Score(next(iter(parts.values()), math.nan), parts)


def _distance(name: str, values: Sequence[float], mean: float, std: float, frames: int) -> float:
    """The mean's distance in standard errors, over LIMIT; frames of one unchanged scene count as one frame."""
    family = name.partition("/")[0]
    std = max(std, FLOORS[family])
    spread = min(float(np.var(values)) / std**2, 1.0)
    independent = 1 + (len(values) - 1) * spread
    shift = float(np.mean(values)) - mean
    if family in _ONE_SIDED:
        shift = max(shift, 0.0)
    return abs(shift) / (std * math.sqrt(1 / independent + 1 / frames)) / LIMIT


def reference_statistics(
    frames: Iterable[np.ndarray],
    outputs: Iterable[Mapping[str, np.ndarray]],
    specs: Sequence[OutputSpec],
    preprocess: Preprocess,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """What `Drift` compares with, as plain JSON, from frames that the network was calibrated on.

    frames: uint8 RGB [H,W,3]; outputs: their decoded answers, in the same order; both may be generators. ranges: tensor
    -> (low, high) of calibration; of it the input's "image" and the tasks' own are used. Raises DataError for fewer
    than MIN_FRAMES frames and InputError for what is no frame.
    """
    skeleton: dict[str, Any] = {
        "version": VERSION,
        "size": [preprocess.height, preprocess.width],
        "tasks": {spec.name: [spec.kind, spec.channels] for spec in specs},
        "limits": _limits(specs, preprocess, ranges or {}),
    }
    rows, shares, colours = [], [], []
    for frame, answer in zip(frames, outputs, strict=True):
        rows.append({**image_features(frame, skeleton), **_saturations(answer, skeleton)})
        shares.append(_distributions(answer, skeleton))
        colours.append(_colours(_tiles(frame, *skeleton["size"])))
    if len(rows) < MIN_FRAMES:
        fix = "pass more frames of the robot's camera"
        raise DataError("too few frames for reference statistics", f"{len(rows)} of at least {MIN_FRAMES}", fix)
    usual = {name: np.mean([share[name] for share in shares], axis=0) for name in shares[0]}
    for row, share in zip(rows, shares, strict=True):
        row |= {name: distance(share[name], usual[name]) for name in usual}
    usual[_COLOURS] = np.mean(colours, axis=0)
    for row, colour in zip(rows, colours, strict=True):
        row["channel-order"] = _swapped(colour, usual[_COLOURS])
    features = {
        name: {"mean": _short(np.mean(values)), "std": _short(np.std(values, ddof=1))}
        for name in rows[0]
        for values in ([row[name] for row in rows],)
    }
    usual_lists = {name: [_short(value) for value in array] for name, array in usual.items()}
    return {**skeleton, "frames": len(rows), "features": features, "usual": usual_lists}


def _short(value: Any) -> float:
    """Six digits: enough for a statistic, and the same on processors that sum in another order."""
    return float(f"{value:.6g}")


def _limits(
    specs: Sequence[OutputSpec], preprocess: Preprocess, ranges: Mapping[str, tuple[float, float]]
) -> dict[str, list[float]]:
    """INT8 limits by tensor: [low, high] of a raw output, and low and high of the three channels of "image" in 0..255.

    Half a step inside the range: what lies beyond is clipped, or stands at the end.
    """
    found = {}
    if "image" in ranges:
        low, high = ranges["image"]
        scales = list(zip(preprocess.std, preprocess.mean, strict=True))
        found["image"] = [_short((edge * std + mean) * 255) for edge in (low, high) for std, mean in scales]
    for spec in specs:
        if spec.name in ranges and spec.kind in ("depth", "edges", "multilabel"):
            low, high = ranges[spec.name]
            step = max(abs(low), abs(high)) / 127
            found[spec.name] = [_short(low + step / 2) if low < 0 else _short(low), _short(high - step / 2)]
    return found


def image_features(image: np.ndarray, reference: Mapping[str, Any]) -> dict[str, float]:
    """Statistics of a uint8 RGB image [H,W,3] as the network sees it, natural logarithms of levels in 0..255."""
    tiles = _tiles(check_frame(image), *reference["size"])
    light = np.tensordot(tiles, _LUMA, (1, 0))
    red, green, blue = (math.log(float(channel) + 1) for channel in tiles.mean((2, 3)).mean(0))
    # Not ptp over the channels: numpy takes ten times as long over a short first axis.
    most = np.maximum(np.maximum(tiles[:, 0], tiles[:, 1]), tiles[:, 2])
    least = np.minimum(np.minimum(tiles[:, 0], tiles[:, 1]), tiles[:, 2])
    found = {
        "brightness": math.log(float(light.mean()) + 1),
        "contrast": math.log(float(light.std()) + 1),
        "clipping": float(np.mean((tiles < 0.5) | (tiles > 254.5))),
        "colour/red-green": red - green,
        "colour/blue-green": blue - green,
        "colour/red-blue": red - blue,
        "colourfulness": math.log(float((most - least).mean()) + 1),
    }
    if min(light.shape[1:]) >= 3:
        found |= _texture(light)
    if _COLOURS in reference.get("usual", ()):
        found["channel-order"] = _swapped(_colours(tiles), np.asarray(reference["usual"][_COLOURS]))
    limits = reference["limits"].get("image")
    if limits is not None:
        low, high = np.array(limits, np.float32).reshape(2, 3, 1, 1)
        found["saturation/image"] = float(np.mean((tiles < low - 0.5) | (tiles > high + 0.5)))
    return found


def _colours(tiles: np.ndarray) -> np.ndarray:
    """Shares of pixels by hue: [_HUES * _HUES], red over green first."""
    # 8 levels more, so that the noise of dark pixels is no colour.
    red, green, blue = np.log(tiles[:, :, ::2, ::2] + 8).transpose(1, 0, 2, 3)
    bins = [np.clip((ratio + 1) * (_HUES / 2), 0, _HUES - 1).astype(np.intp) for ratio in (red - green, blue - green)]
    counts = np.bincount((bins[0] * _HUES + bins[1]).ravel(), minlength=_HUES * _HUES)
    return counts / counts.sum()


def _swapped(colours: np.ndarray, usual: np.ndarray) -> float:
    """How much better the usual colours explain an image with red and blue exchanged, in nats a pixel."""
    logs = np.log(usual + 1e-4).reshape(_HUES, _HUES)
    return float(colours @ (logs.T - logs).ravel())


def _texture(light: np.ndarray) -> dict[str, float]:
    """Sharpness: the Laplacian's variance over the image's; noise: the median of a mask that structure cancels in."""
    across = light[:, :, :-2] - 2 * light[:, :, 1:-1] + light[:, :, 2:]
    down = light[:, :-2] - 2 * light[:, 1:-1] + light[:, 2:]
    laplacian = across[:, 1:-1] + down[:, :, 1:-1]
    mask = across[:, :-2] - 2 * across[:, 1:-1] + across[:, 2:]
    # The mask's weights have a root of squares of 6; 1.4826 medians are a standard deviation.
    noise = float(np.median(np.abs(mask))) * 1.4826 / 6
    sharpness = math.log((float(laplacian.var()) + 1) / (float(light.var()) + 1))
    return {"sharpness": sharpness, "noise": math.log(noise + 0.5)}


def _tiles(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """float32 [T,3,h,w]: the image at network size, of a large one nine tiles spread over it."""
    planes = image.transpose(2, 0, 1)
    if height * width <= _WHOLE:
        return np.ascontiguousarray(resize(planes, (height, width)))[None]
    size = min(_TILE, height), min(_TILE, width)
    parts = []
    for row in np.linspace(0, height - size[0], 3).astype(int):
        for column in np.linspace(0, width - size[1], 3).astype(int):
            y, x = image.shape[0] / height, image.shape[1] / width
            top, left = round(row * y), round(column * x)
            bottom, right = max(round((row + size[0]) * y), top + 1), max(round((column + size[1]) * x), left + 1)
            parts.append(resize(planes[:, top:bottom, left:right], size))
    return np.stack(parts)


def output_features(outputs: Mapping[str, np.ndarray], reference: Mapping[str, Any]) -> dict[str, float]:
    """Distances of decoded answers to the usual distributions (0..1), and shares outside the INT8 range."""
    found = _saturations(outputs, reference)
    for name, shares in _distributions(outputs, reference).items():
        if name in reference["usual"]:
            found[name] = distance(shares, np.asarray(reference["usual"][name]))
    return found


def _distributions(outputs: Mapping[str, np.ndarray], reference: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Shares of classes, and of depths by `_DEPTHS`, of the tasks that have them; empty answers are left out."""
    found = {}
    for task, (kind, channels) in reference["tasks"].items():
        values = _thin(outputs[task]) if task in outputs else np.empty(0)
        if kind == "semseg":
            counts = np.bincount(values.astype(np.intp).ravel(), minlength=channels)[:channels]
            name = f"classes/{task}"
        elif kind == "classification":
            counts, name = values.astype(np.float64), f"classes/{task}"
        elif kind == "depth":
            logs = np.log(values[np.isfinite(values) & (values > 0)])
            counts, name = np.histogram(np.clip(logs, _DEPTHS[0], _DEPTHS[-1]), _DEPTHS)[0], f"depth/{task}"
        else:
            continue
        if counts.sum() > 0:
            found[name] = counts / counts.sum()
    return found


def _saturations(outputs: Mapping[str, np.ndarray], reference: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for task, limits in reference["limits"].items():
        if task not in outputs:
            continue
        kind = reference["tasks"][task][0]
        values = _thin(outputs[task]).astype(np.float64)
        values = values[np.isfinite(values)]
        if kind == "depth":
            raw = np.log(np.maximum(values, math.exp(-MAX_LOG_DEPTH)))
        else:
            sure = np.clip(values, 1e-7, 1 - 1e-7)
            raw = np.log(sure / (1 - sure))
        if raw.size:
            found[f"saturation/{task}"] = float(np.mean((raw < limits[0]) | (raw > limits[1])))
    return found


def _thin(array: np.ndarray) -> np.ndarray:
    """Of an image some 48 rows and columns, or up to twice that; a vector as it is."""
    if array.ndim < 2:
        return array
    return array[:: max(array.shape[0] // 48, 1), :: max(array.shape[1] // 48, 1)]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Jensen-Shannon distance of two distributions, 0 (equal) to 1 (nothing in common).

    >>> distance(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    1.0
    """
    middle = (one + other) / 2
    parts = [np.sum(side[side > 0] * np.log2(side[side > 0] / middle[side > 0])) for side in (one, other)]
    return math.sqrt(min(max(float(sum(parts)) / 2, 0.0), 1.0))


def check_reference(data: Any) -> dict[str, Any]:
    """Return a manifest's "reference" when it is one that `reference_statistics` wrote; else raise InputError."""
    try:
        good = data["version"] == VERSION and len(data["size"]) == 2 and all(0 < side <= 65536 for side in data["size"])
        good = good and isinstance(data["frames"], int) and data["frames"] >= MIN_FRAMES
        for name, known in data["features"].items():
            numbers = is_number(known["mean"]) and is_number(known["std"])
            good = good and name.partition("/")[0] in FLOORS and numbers and known["std"] >= 0
        for name, shares in data["usual"].items():
            kind, channels = ("", _HUES**2) if name == _COLOURS else data["tasks"][name.partition("/")[2]]
            length = len(_DEPTHS) - 1 if kind == "depth" else channels
            good = good and len(shares) == length and all(is_number(share) and share >= 0 for share in shares)
        for name, limits in data["limits"].items():
            known = name == "image" or name in data["tasks"]
            good = good and known and len(limits) == (6 if name == "image" else 2) and all(map(is_number, limits))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        fix = f"pass manifest['reference'] of a bundle that this version wrote (statistics version {VERSION})"
        raise InputError("the reference statistics cannot be read", f"{data!r:.80}", fix)
    return dict(data)
