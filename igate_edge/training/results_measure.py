"""A comparison's second half: every net exported, packaged, evaluated in INT8, and timed against the plain net."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .. import timing
from ..accuracy import accuracy
from ..errors import CheckFailed
from ..files import write_atomic
from ..metrics import delta_mtl
from ..package import package
from ..runtime.cache import fingerprint
from ..runtime.engine import Engine
from ..runtime.preprocess import to_input
from .folder import open_split
from .layout import held_out, kept, read_info
from .results_rows import onnx_of, paths
from .rivals import Table

CALIBRATION_FRAMES, GOLDEN_FRAMES = 64, 4
#: Changes when bundles are made in another way, so that none of the old ones is measured.
PACKAGED = "merged"
Say = Callable[[str], object]


def measure(document: dict[str, Any], tables: Sequence[Table], rounds: int = 200, say: Say = print) -> None:
    """Add `int8`, `int8_delta_mtl`, `ms`, `ms_ratio` and `ms_ratio_interval` to the rows of a document, in place.

    All nets of a seed are timed in turn in one process, INT8, one thread; a ratio is the median over rounds of a net's
    time over the plain net's in the same round. A net whose INT8 engine is refused gets `int8_refused`, the reason, and
    no other column.
    """
    for table in tables:
        rows = {row["name"]: row for row in document["rows"] if row["seed"] == table.config.seed}
        specs, bundles = [task.spec for task in table.tasks], dict[str, Path]()
        for name, file in paths(table).items():
            say(f"seed {table.config.seed}: {name} in INT8")
            row, bundle = rows[name], _bundle(table, file)
            try:
                values = _int8(table, file, bundle)
            except CheckFailed as error:
                row["int8_refused"] = str(error)
                continue
            bundles[name] = bundle
            row["int8"] = {s.name: {s.metric: values[s.name][s.metric]} for s in specs}
            if row["delta_to"] in rows:
                row["int8_delta_mtl"] = delta_mtl(row["int8"], rows[row["delta_to"]]["metrics"], specs)
        say(f"seed {table.config.seed}: timing {len(bundles)} nets in turn")
        for name, found in _times(table, bundles, rounds).items():
            rows[name].update(found)
    document["machine"] |= {key: value for key, value in fingerprint().items() if key in ("machine", "cpu", "cores")}


def _bundle(table: Table, file: Path) -> Path:
    """The bundle of one network, made anew only when the network changed."""
    target, mark, data = file.with_suffix(".igate"), file.with_suffix(".igate.key"), onnx_of(table, file)
    key = f"{file.with_suffix('.onnx.key').read_text()} {PACKAGED}"
    if not (target.exists() and mark.exists() and mark.read_text() == key):
        images = [frame["image"] for frame in islice(_frames(table, "train"), CALIBRATION_FRAMES)]
        golden = [frame["image"] for frame in islice(_held(table), GOLDEN_FRAMES)]
        plain = onnx_of(table, table.folder / "base" / "base.safetensors")
        package(data, target, calibration=images, golden=golden, plain=plain)
        write_atomic(mark, key)
    return target


def _int8(table: Table, file: Path, bundle: Path) -> dict[str, Any]:
    """Metrics of the INT8 engine on the held-out frames, measured anew only when the network changed."""
    target, key = file.with_suffix(".int8.json"), file.with_suffix(".igate.key").read_text()
    stored = kept(target)
    if stored.get("key") != key:
        stored = {"key": key, "metrics": accuracy(bundle, _held(table), "int8")}
        write_atomic(target, json.dumps(stored, indent=1) + "\n")
    return stored["metrics"]


def _frames(table: Table, split: str) -> Iterator[dict[str, Any]]:
    return iter(open_split(table.data, split, tuple(task.target for task in table.tasks)))


def _held(table: Table) -> Iterator[dict[str, Any]]:
    """The frames that training did not see."""
    rule = held_out(read_info(table.data))
    return islice(_frames(table, rule.split), rule.first, rule.last)


def _times(table: Table, bundles: Mapping[str, Path], rounds: int) -> dict[str, dict[str, Any]]:
    if not bundles:
        return {}
    image = to_input(next(_held(table))["image"], table.config.preprocess())
    with timing.pinned(1), ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        runs: dict[str, Callable[[np.ndarray], object]] = {}
        for name, path in bundles.items():
            runs[name] = stack.enter_context(Engine.open(path, precision="int8", cache_dir=cache)).infer
        times = timing.interleave(runs, image, rounds)
    found: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        found[name] = {"ms": float(np.median(seconds) * 1e3)}
        if "plain" in times:
            pair = timing.ratio(seconds, times["plain"])
            found[name] |= {"ms_ratio": pair["ratio"], "ms_ratio_interval": list(pair["interval"])}
    return found
