"""Milliseconds of a network before it is built: measured times of its operators on one machine, added up.

A table is one JSON object, written by `igate profile`. All times are milliseconds of one call on `threads` threads:

  format, version   "igate latency table", 1
  device            what the machine is (runtime.cache.fingerprint; of TensorRT devicetable.board) and how its clocks
                    and power mode stood
  backend           {"name", "version", ...}: the runtime that was timed, "onnxruntime" or "tensorrt"
  threads, precision, date, step     1; "int8" or "float" (TensorRT: with FP16 around, FP16 alone); ISO day; channels
                    of the machine's step (16)
  fit               {"cin", "cout"}: counts that are multiples of these run in the "unsigned" grids, others in "loose"
  conv              "3x3 unsigned" -> {"pixels", "cin", "cout": axes, "ms": [pixels][cin][cout] (null: not measured),
                    "tail": share of the next step that r = 1..step-1 channels above a multiple of it cost}.
                    Kinds: unsigned, loose, signed (input may be negative), output (INT32 result), depthwise (cin 1),
                    float (also TensorRT's in either precision)
  stride            "3x3", "depthwise" -> time at stride 2 / time at stride 1 of as many output pixels
  ops               operator -> {"elements": the larger of read and made, "ms"}
  overhead_ms       what a node costs besides its own time; may be below 0 where timing a node costs more than that
  anchors           {"merged", "split"}: measured / summed time of a whole network lowered so
  error             the largest of the mean errors on the anchor networks: the error bar of a prediction
  spread            median relative difference of points that were measured twice

>>> table = LatencyTable.load("x86-epyc-avx2-1t")
>>> table.conv_ms((3, 3), 1, (32, 32), 64, 61) > table.conv_ms((3, 3), 1, (32, 32), 64, 64)
True
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import InputError, UnavailableError
from ..files import as_path, read_file, write_atomic
from . import executed

FORMAT, VERSION = "igate latency table", 1
TABLES = Path(__file__).parent.parent / "tables"
#: No operator takes less than this: a nanosecond would do, but slopes are divided by it.
LEAST_MS = 1e-5
#: No time, count or factor of a real table is larger; products of a few of these are still finite.
LARGEST = 1e12
#: Kinds of convolution that stand in for one that a table lacks, nearest first.
STAND_INS = ("unsigned", "signed", "loose", "float", "output")
#: Operator whose time stands in for one that a table lacks.
ANY_OP = "Mul"
LOWERINGS = ("merged", "split")


@dataclass(frozen=True)
class Grid:
    """Times at all combinations of three axes, float64 [pixels, cin, cout] in ms; linear between and beyond them."""

    pixels: np.ndarray
    cin: np.ndarray
    cout: np.ndarray
    ms: np.ndarray
    tail: np.ndarray

    def at(self, pixels: float, cin: float, cout: int, step: int) -> float:
        """Time of any size; a ragged cout costs its measured share of the step from the multiple below it."""
        line = _along(self.cin, _along(self.pixels, self.ms, pixels), cin)
        whole, rest = divmod(cout, step)
        low = float(_along(self.cout, line, whole * step))
        if not rest:
            return low
        share = self.tail[rest - 1] if len(self.tail) else rest / step
        return low + (float(_along(self.cout, line, (whole + 1) * step)) - low) * float(share)


def _along(axis: np.ndarray, values: np.ndarray, at: float) -> np.ndarray:
    """Interpolate the first axis of `values` linearly; beyond its ends the nearest piece goes on."""
    if len(axis) == 1:
        return values[0] * (at / axis[0])
    left = int(np.clip(np.searchsorted(axis, at, side="right") - 1, 0, len(axis) - 2))
    share = (at - axis[left]) / (axis[left + 1] - axis[left])
    return values[left] + (values[left + 1] - values[left]) * share


@dataclass(frozen=True)
class LayerTime:
    """One operator of the network that runs: source node, operator and predicted ms."""

    name: str
    op: str
    ms: float


@dataclass(frozen=True)
class Prediction:
    """ms of a call, host to host; error: the table's stated error bar as a fraction; layers add up to ms."""

    ms: float
    error: float
    layers: list[LayerTime]


@dataclass(frozen=True)
class LatencyTable:
    """Operator times of one device, backend, thread count and precision; see the module's text for the JSON."""

    device: dict[str, Any]
    backend: dict[str, Any]
    threads: int
    precision: str
    date: str
    step: int
    fit: dict[str, int]
    conv: dict[str, Grid]
    ops: dict[str, tuple[np.ndarray, np.ndarray]]
    stride: dict[str, float] = field(default_factory=dict)
    overhead_ms: float = 0.0
    anchors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOWERINGS, 1.0))
    error: float = 0.1
    spread: float = 0.0
    name: str = ""

    @classmethod
    def load(cls, where: str | os.PathLike[str]) -> LatencyTable:
        """Read a table: a file, or the name of one that is shipped (`bundled()` lists them).

        Raises InputError for what is not a whole table of this version, UnavailableError when it cannot be read.
        """
        path = as_path(where)
        if not path.exists() and len(path.parts) == 1:
            shipped = TABLES / f"{path.name.removesuffix('.json')}.json"
            if not shipped.is_file():
                known = ", ".join(bundled()) or "none"
                raise InputError(f"no latency table {path.name!r}", f"shipped: {known}", "give a file, or one of these")
            path = shipped
        try:
            data = read_file(path)
        except OSError as error:
            fix = "measure one with `igate profile`"
            raise UnavailableError(f"cannot read {path}", error.strerror or str(error), fix) from error
        try:
            return dataclasses.replace(from_json(json.loads(data)), name=path.stem)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            detail = f"{path.name}: {type(error).__name__} {error}"[:200]
            raise InputError("not a latency table", detail, "measure one with `igate profile`") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON in one step."""
        write_atomic(as_path(path), json.dumps(self.as_json(), indent=None, separators=(",", ":")) + "\n")

    def as_json(self) -> dict[str, Any]:
        """The document that `load` reads."""
        document: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        for key in ("device", "backend", "threads", "precision", "date", "step", "fit"):
            document[key] = getattr(self, key)
        document["conv"] = {key: _grid_json(grid) for key, grid in self.conv.items()}
        document["stride"] = self.stride
        document["ops"] = {
            name: {"elements": n.tolist(), "ms": np.round(ms, 6).tolist()} for name, (n, ms) in self.ops.items()
        }
        for key in ("overhead_ms", "anchors", "error", "spread"):
            document[key] = getattr(self, key)
        return document

    def conv_ms(
        self,
        kernel: tuple[int, int],
        stride: int,
        out_hw: tuple[int, int],
        cin: int,
        cout: int,
        groups: int = 1,
        kind: str = "unsigned",
    ) -> float:
        """Time of one convolution of these counts in all groups together; ragged counts cost what was measured.

        kind: "unsigned" (its input is never negative, as after a Relu), "signed", or "output" (a network's last one).
        """
        counts = (*kernel, stride, *out_hw, cin, cout, groups)
        if not all(isinstance(n, Integral) and 1 <= n <= LARGEST for n in counts) or cin % groups or cout % groups:
            sizes = f"kernel {kernel}, stride {stride}, {out_hw} out, {cin} -> {cout} channels, {groups} groups"
            raise InputError("not a convolution", sizes, "give counts from 1 that the groups divide")
        pixels = out_hw[0] * out_hw[1]
        one, many = (cin // groups, cout // groups), groups
        if groups > 1 and one == (1, 1):
            kind, one, many = "depthwise", (1, groups), 1
        elif kind == "unsigned" and (one[0] % self.fit["cin"] or one[1] % self.fit["cout"]):
            kind = "loose"
        key, scale = self._grid(kernel, kind)
        ms = self.conv[key].at(pixels, one[0] * scale, one[1], self.step) * many
        if kind == "depthwise":
            ms *= scale
        if stride > 1:
            ms *= self.stride.get(kind if kind == "depthwise" else key.split()[0], 1.0)
        return max(ms, LEAST_MS)

    def _grid(self, kernel: tuple[int, int], kind: str) -> tuple[str, float]:
        """The grid to read and by what to multiply cin: of this kernel, else of the one nearest in size."""
        kinds = [kind] if kind == "depthwise" else [kind, *STAND_INS]
        for name in kinds:
            sizes = [key.split()[0] for key in self.conv if key.split()[1] == name]
            if sizes:
                area = kernel[0] * kernel[1]
                best = min(sizes, key=lambda size: abs(math.log(_area(size) / area)))
                return f"{best} {name}", area / _area(best)
        raise InputError(f"the latency table has no {kind} convolutions", self.name, "measure it with `igate profile`")

    def op_ms(self, op: str, elements_in: int, elements_out: int) -> float:
        """Time of an operator that is no convolution, by the larger of the elements that it reads and makes."""
        elements, ms = self.ops[op] if op in self.ops else self.ops[ANY_OP]
        return max(float(_along(elements, ms, max(elements_in, elements_out))), LEAST_MS)

    def predict(self, model: ir.Model, lowering: str = "merged") -> Prediction:
        """Time of a static float graph once it is quantised and built; lowering picks the anchor, merged or split."""
        if lowering not in list(self.anchors):
            known = ", ".join(self.anchors)
            raise InputError(f"unknown lowering {lowering!r:.60}", f"known: {known}", "use one of these")
        factor = self.anchors[lowering]
        layers = [
            LayerTime(step.name, step.op, max((self.step_ms(step) + self.overhead_ms) * factor, LEAST_MS))
            for step in executed.steps(model, self.runs_as)
        ]
        return Prediction(sum(layer.ms for layer in layers), self.error, layers)

    @property
    def runs_as(self) -> str:
        """What `executed.steps` is asked for: TensorRT runs either precision as a float session runs."""
        return "float" if self.backend.get("name") == "tensorrt" else self.precision

    def step_ms(self, step: executed.Step) -> float:
        """Time of one operator that runs, without overhead and anchor."""
        conv = step.conv
        if conv is None:
            return self.op_ms(step.op, step.elements_in, step.elements_out)
        return self.conv_ms(conv.kernel, conv.stride, conv.out_hw, conv.cin, conv.cout, conv.groups, conv.path)

    def foreign(self, root: Path = Path("/")) -> str:
        """ "" when the table was measured here, else why it is for prediction only: one sentence.

        root: the folder that stands for "/" where a board is read.
        """
        from ..devicetable import foreign_board
        from ..engines import onnxruntime as ort
        from ..runtime.cache import fingerprint

        if self.backend.get("name") == "tensorrt":
            return foreign_board(self, root)
        if self.backend.get("name") != "onnxruntime":
            return f"the table is of the backend {self.backend.get('name')!r}: its milliseconds are predictions only"
        here = fingerprint()
        strange = [key for key, value in here.items() if self.device.get(key) != value]
        if strange:
            theirs, ours = (str(item.get(strange[0])) for item in (self.device, here))
            what = f"{strange[0]} {theirs!r}, here {ours!r}"
            if strange[0] == "instructions":  # a hash of their names: nothing for a reader
                what = f"the same {here.get('cpu', 'processor')} by name, with other instructions"
            return f"the table is of another machine ({what}): its milliseconds are predictions only"
        version = str(ort.probe()["version"])
        if self.backend.get("version") != version:
            theirs = self.backend.get("version", "?")
            return f"the table is of ONNX Runtime {theirs}, here is {version}: its milliseconds are predictions only"
        return ""


def explain(prediction: Prediction, most: int = 5) -> list[str]:
    """The layers that take most of the time, all operators of a source node together: "conv1 0.21 ms (9 %)"."""
    layers: dict[str, float] = {}
    for layer in prediction.layers:
        layers[layer.name] = layers.get(layer.name, 0.0) + layer.ms
    dearest = sorted(layers.items(), key=lambda item: -item[1])[:most]
    return [f"{name} {ms:.2f} ms ({100 * ms / prediction.ms:.0f} %)" for name, ms in dearest]


def bundled() -> list[str]:
    """Names of the tables that are shipped."""
    return sorted(path.stem for path in TABLES.glob("*.json"))


def _area(size: str) -> int:
    return math.prod(map(int, size.split("x")))


def _grid_json(grid: Grid) -> dict[str, Any]:
    axes = {axis: getattr(grid, axis).tolist() for axis in ("pixels", "cin", "cout")}
    return {**axes, "ms": np.round(grid.ms, 6).tolist(), "tail": np.round(grid.tail, 4).tolist()}


def from_json(document: Mapping[str, Any]) -> LatencyTable:
    """A table from its document; raises ValueError, TypeError or KeyError for what is not one."""
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise ValueError("no latency table")
    if document.get("version") != VERSION:
        raise ValueError(f"version {document.get('version')!r}, known: {VERSION}")
    step, threads = _count(document["step"]), _count(document["threads"])
    if document["precision"] not in ("int8", "float"):
        raise ValueError("precision out of range")
    conv = {str(key): _grid_from(key, item, step) for key, item in _items(document["conv"])}
    ops = {str(name): (_axis(item["elements"]), _axis_ms(item)) for name, item in _items(document["ops"])}
    if ANY_OP not in ops or not conv:
        raise ValueError("no convolutions or no elementwise operator")
    anchors = _scales(document["anchors"])
    if not set(LOWERINGS) <= set(anchors):
        raise ValueError("an anchor is missing")
    return LatencyTable(
        device=dict(document["device"]),
        backend=dict(document["backend"]),
        threads=threads,
        precision=str(document["precision"]),
        date=str(document["date"]),
        step=step,
        fit={key: _count(document["fit"][key]) for key in ("cin", "cout")},
        conv=conv,
        ops=ops,
        stride=_scales(document["stride"]),
        overhead_ms=_number(document["overhead_ms"]),
        anchors=anchors,
        error=_share(document["error"]),
        spread=_share(document["spread"]),
    )


def _items(item: Any) -> Iterable[tuple[Any, Any]]:
    if not isinstance(item, Mapping):
        raise TypeError(f"no object: {item!r:.40}")
    return item.items()


def _scales(item: Any) -> dict[str, float]:
    return {str(key): _number(value, above=0.0) for key, value in _items(item)}


def _number(value: Any, above: float = -LARGEST) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= LARGEST:
        raise ValueError(f"not a usable number: {value!r:.40}")
    return float(value)


def _count(value: Any) -> int:
    count = int(_number(value, above=0.0))
    if count != value:
        raise ValueError(f"not a count: {value!r:.40}")
    return count


def _share(value: Any) -> float:
    share = _number(value)
    if share < 0:
        raise ValueError(f"a share below 0: {share}")
    return share


def _axis(values: Any) -> np.ndarray:
    axis = np.array([_number(value, above=0.5) for value in values])
    if not len(axis) or (np.diff(axis) <= 0).any():
        raise ValueError("an axis must rise")
    return axis


def _axis_ms(item: Mapping[str, Any]) -> np.ndarray:
    ms = np.array([_number(value, above=0.0) for value in item["ms"]])
    if len(ms) != len(item["elements"]):
        raise ValueError("an operator has as many times as sizes")
    return ms


def _grid_from(key: str, item: Mapping[str, Any], step: int) -> Grid:
    if not re.fullmatch("[1-9][0-9]{0,3}x[1-9][0-9]{0,3} [a-z]+", str(key)):
        raise ValueError(f"{key!r} names no kernel and kind")
    pixels, cin, cout = axes = [_axis(item[axis]) for axis in ("pixels", "cin", "cout")]
    ms = np.array(item["ms"], np.float64)
    tail = np.array([_number(value) for value in item["tail"]])
    if ms.shape != tuple(map(len, axes)) or len(tail) not in (0, step - 1):
        raise ValueError(f"{key!r} has times for other axes, or a tail of another step")
    return Grid(pixels, cin, cout, fill(pixels, ms), tail)


def fill(pixels: np.ndarray, ms: np.ndarray) -> np.ndarray:
    """Times that were not measured (NaN): as many pixels more take as many times longer than the size below."""
    if np.isnan(ms[0]).any() or (ms <= 0).any() or (ms > LARGEST).any():
        raise ValueError("the times of the smallest size must all be there and above 0, none without end")
    full = ms.copy()
    for index in range(1, len(pixels)):
        longer = full[index - 1] * (pixels[index] / pixels[index - 1])
        full[index] = np.where(np.isnan(full[index]), longer, full[index])
    return full
