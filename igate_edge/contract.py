"""What a network promises to its users: its input, and one output per task. For training, compiler and runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any

from .errors import InputError

#: Kinds of task, with the metric that judges each and whether more is better.
KINDS: dict[str, tuple[str, bool]] = {
    "semseg": ("miou", True),
    "depth": ("rmse", False),
    "normals": ("mean_angle", False),
    "edges": ("f1", True),
    "classification": ("accuracy", True),
    "multilabel": ("balanced_accuracy", True),
}
#: Channels that a kind always has; the others have one a class.
_CHANNELS = {"depth": 1, "normals": 3, "edges": 1}
MAX_CHANNELS = 65536
MAX_SIDE = 16384  # pixels
MAX_NAME = 200
#: Means and spreads of pixels 0..1 beyond these leave nothing of a float32 image.
MAX_MEAN, MIN_STD, MAX_STD = 1e4, 1e-4, 1e4


@dataclass(frozen=True)
class OutputSpec:
    """One task's output: `name` is also the ONNX output's name.

    Raw network output, float32: semseg logits [1,K,h,w]; depth natural log of metres [1,1,h,w]; normals [1,3,h,w], any
    length, optical frame (x right, y down, z forward); edges logit [1,1,h,w]; classification, multilabel logits [1,K].
    Raises InputError for a field of a wrong type or value, whoever wrote it: a file may say anything.
    """

    name: str
    kind: str
    channels: int
    classes: tuple[str, ...] = ()
    units: str = ""
    ignore: int = 255
    target: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise InputError(
                f"unknown task kind {self.kind!r:.60}", f"known: {', '.join(KINDS)}", "use one of these kinds"
            )
        if not _is_name(self.name):
            raise InputError(
                "a task has no usable name", f"{self.name!r:.60}", f"use 1 to {MAX_NAME} printable characters"
            )
        object.__setattr__(self, "channels", _whole(f"channels of task {self.name!r}", self.channels, 1, MAX_CHANNELS))
        object.__setattr__(self, "ignore", _whole(f"ignore of task {self.name!r}", self.ignore, -(2**31), 2**31 - 1))
        if self.channels != _CHANNELS.get(self.kind, self.channels):
            evidence = f"{self.channels} channels, {self.kind} has {_CHANNELS[self.kind]}"
            raise InputError(f"task {self.name!r} has another number of channels than its kind", evidence, "correct it")
        if not isinstance(self.units, str) or not isinstance(self.target, str):
            evidence = f"{self.units!r:.60}, {self.target!r:.60}"
            raise InputError(f"units or target of task {self.name!r} is no text", evidence, "pass strings")
        if not isinstance(self.classes, tuple) or not all(map(_is_name, self.classes)):
            evidence = f"{self.classes!r:.60}"
            raise InputError(f"the classes of task {self.name!r} are no names", evidence, "pass a tuple of strings")
        if self.classes and len(self.classes) != self.channels:
            raise InputError(
                f"task {self.name!r} names {len(self.classes)} classes for {self.channels} channels",
                ", ".join(self.classes[:8]),
                "name every class once",
            )

    @property
    def metric(self) -> str:
        """Name of the metric that judges this task."""
        return KINDS[self.kind][0]

    @property
    def higher_is_better(self) -> bool:
        return KINDS[self.kind][1]

    @property
    def dense(self) -> bool:
        """True when the output is an image, False when it is one vector a frame."""
        return self.kind not in ("classification", "multilabel")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OutputSpec:
        """The way back from `as_json`; raises InputError for anything else."""
        given = _fields(data, "task", ("name", "kind", "channels"), ("classes", "units", "ignore", "target"))
        if isinstance(given.get("classes"), list):
            given["classes"] = tuple(given["classes"])
        return cls(**given)


@dataclass(frozen=True)
class Preprocess:
    """How a uint8 RGB frame becomes the network's input: x = (resize(frame) / 255 - mean) / std.

    x is float32 [1,3,height,width]. Raises InputError for a size or a number that gives no image.
    """

    height: int
    width: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            object.__setattr__(self, name, _whole(f"the input's {name}", getattr(self, name), 1, MAX_SIDE))
        object.__setattr__(self, "mean", _three("mean", self.mean, -MAX_MEAN, MAX_MEAN))
        object.__setattr__(self, "std", _three("std", self.std, MIN_STD, MAX_STD))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocess:
        """The way back from `as_json`; raises InputError for anything else."""
        return cls(**_fields(data, "preprocess", ("height", "width", "mean", "std"), ()))


def check_sites(sites: Any, tasks: Sequence[OutputSpec]) -> None:
    """Raise InputError unless `sites` are gate sites of these tasks, as a file may claim them.

    Each is {"name", "channels", "open": {task: one "0" or "1" a channel}}, and perhaps "granule" and "tie"; in a merged
    network also "rows", its physical channels in runs [task, "shared" or "", first channel, count].
    """
    if not isinstance(sites, list):
        raise InputError("the gate sites are no list", f"{sites!r:.60}", "write a list")
    names = set()
    for site in sites:
        given = _fields(site, "a gate site", ("name", "channels", "open"), ("granule", "tie", "rows"))
        name, bits = given["name"], given["open"]
        if not _is_name(name) or name in names or not isinstance(given.get("tie"), str | None):
            raise InputError("a gate site has no name of its own", f"{name!r:.60}", "name every site once")
        names.add(name)
        channels = _whole(f"channels of gate site {name!r}", given["channels"], 1, MAX_CHANNELS)
        _whole(f"granule of gate site {name!r}", given.get("granule", 1), 1, MAX_CHANNELS)
        if not isinstance(bits, Mapping) or set(bits) != {spec.name for spec in tasks}:
            raise InputError(f"gate site {name!r} has other tasks than the network", f"{bits!r:.80}", "export it again")
        _check_rows(name, given.get("rows", []), {*bits, "shared", ""})
        for task, row in bits.items():
            if not isinstance(row, str) or len(row) != channels or set(row) - {"0", "1"}:
                evidence = f"{name!r}, task {task!r}: {row!r:.40} for {channels} channels"
                raise InputError("the gates do not fit their site", evidence, "write one 0 or 1 a channel")


def _check_rows(site: str, runs: Any, owners: set[str]) -> None:
    """Runs of physical channels: [owner, first channel, count]."""
    for run in runs if isinstance(runs, list) else [None]:
        if not isinstance(run, list) or len(run) != 3 or not isinstance(run[0], str) or run[0] not in owners:
            evidence = f"{site!r}: {run!r:.60}"
            raise InputError("the physical channels of a gate site cannot be read", evidence, "export it again")
        _whole(f"a channel of gate site {site!r}", run[1], 0, MAX_CHANNELS)
        _whole(f"channels of gate site {site!r}", run[2], 1, MAX_CHANNELS)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= MAX_NAME


def _whole(what: str, value: Any, low: int, high: int) -> int:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not low <= int(value) <= high:
        raise InputError(f"{what} is not usable", f"{value!r:.60}", f"use a whole number from {low} to {high}")
    return int(value)


def _three(what: str, values: Any, low: float, high: float) -> tuple[float, float, float]:
    good = isinstance(values, list | tuple) and len(values) == 3
    if not good or not all(is_number(value) and low <= value <= high for value in values):
        raise InputError(
            f"{what} of the preprocessing is not usable",
            f"{values!r:.80}",
            f"use three numbers from {low:g} to {high:g}",
        )
    return float(values[0]), float(values[1]), float(values[2])


def is_number(value: Any) -> bool:
    """True for a finite number that is no truth value."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _fields(data: Any, what: str, needed: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a JSON object of ours: all that are needed, and none that is unknown."""
    if not isinstance(data, Mapping):
        raise InputError(f"{what} is no JSON object", f"{data!r:.60}", "write what as_json gives")
    missing = [name for name in needed if name not in data]
    unknown = sorted(str(name) for name in data if name not in (*needed, *optional))
    if missing or unknown:
        evidence = f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown[:5]) or 'none'}"
        raise InputError(f"{what} has other fields than it should", evidence, "write what as_json gives")
    return dict(data)
