"""The results table's second half: every net exported, packaged, evaluated in INT8, and timed against the plain net."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .. import bench
from ..accuracy import accuracy
from ..errors import CheckFailed
from ..files import write_atomic
from ..gating.export import to_onnx
from ..metrics import delta_mtl
from ..package import package
from ..runtime.engine import Engine
from ..runtime.preprocess import to_input
from .checkpoint import load_tensors
from .config import TrainConfig
from .folder import open_split
from .recipe import restore
from .rivals import Table

CALIBRATION_FRAMES, GOLDEN_FRAMES = 64, 4


def onnx_of(table: Table, path: Path) -> bytes:
    """The ONNX bytes of one stage file's network, kept beside it until the network changes."""
    target, meta = path.with_suffix(".onnx"), load_tensors(path)[1]
    mark = path.with_suffix(".onnx.key")
    if target.exists() and mark.exists() and mark.read_text() == meta["key"]:
        return target.read_bytes()
    config = TrainConfig.from_json(meta["result"]["config"])
    data = to_onnx(restore(config, table.tasks, path), config.preprocess())
    write_atomic(target, data)
    write_atomic(mark, meta["key"])
    return data


def measure(
    path: Path, tables: Sequence[Table], paths: Callable[[Table], dict[str, list[Path]]], rounds: int = 200
) -> None:
    """Add `int8`, `int8_delta_mtl`, `ms`, `ms_ratio` and `ms_ratio_interval` to the rows of the table at `path`.

    All nets of a seed are timed in turn in one process, INT8, one thread; a ratio is the median over rounds of a net's
    time over the plain net's in the same round. A row of several nets takes the sum of their times. A net whose INT8
    engine is refused gets `int8_refused`, the reason, and no other column.
    """
    whole = json.loads(path.read_text())
    for table in tables:
        rows = {row["name"]: row for row in whole["rows"] if row["seed"] == table.config.seed}
        bundles = {name: [_bundle(table, file) for file in files] for name, files in paths(table).items()}
        specs = [task.spec for task in table.tasks]
        for name, row in rows.items():
            values: dict[str, Any] = {}
            try:
                for bundle in bundles[name]:
                    values |= accuracy(bundle, _frames(table, "val"), "int8")
            except CheckFailed as error:
                row["int8_refused"] = str(error)
                del bundles[name]
                continue
            row["int8"] = {s.name: {s.metric: values[s.name][s.metric]} for s in specs}
            if "single" in rows:
                row["int8_delta_mtl"] = delta_mtl(row["int8"], rows["single"]["metrics"], specs)
        for name, found in _times(table, bundles, rounds).items():
            if name in rows:
                rows[name].update(found)
        write_atomic(path, json.dumps(whole, indent=1) + "\n")


def _bundle(table: Table, file: Path) -> Path:
    """The bundle of one network, made anew only when the network changed."""
    target, mark, data = file.with_suffix(".igate"), file.with_suffix(".igate.key"), onnx_of(table, file)
    key = file.with_suffix(".onnx.key").read_text()
    if not (target.exists() and mark.exists() and mark.read_text() == key):
        images = [frame["image"] for frame in islice(_frames(table, "train"), CALIBRATION_FRAMES)]
        golden = [frame["image"] for frame in islice(_frames(table, "val"), GOLDEN_FRAMES)]
        package(data, target, calibration=images, golden=golden)
        write_atomic(mark, key)
    return target


def _frames(table: Table, split: str) -> Iterator[dict[str, Any]]:
    return iter(open_split(table.data, split, table.config.tasks))


def _run(engines: Sequence[Engine], image: np.ndarray) -> None:
    for engine in engines:
        engine.infer(image)


def _times(table: Table, bundles: Mapping[str, list[Path]], rounds: int) -> dict[str, dict[str, Any]]:
    image = to_input(next(_frames(table, "val"))["image"], table.config.preprocess())
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        runs: dict[str, Callable[[np.ndarray], object]] = {}
        for name, paths in bundles.items():
            opened = [Engine.open(path, precision="int8", cache_dir=cache) for path in paths]
            runs[name] = partial(_run, [stack.enter_context(engine) for engine in opened])
        times = bench.interleave(runs, image, rounds)
    found: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        found[name] = {"ms": float(np.median(seconds) * 1e3)}
        if "plain" in times:
            pair = bench.ratio(seconds, times["plain"])
            found[name] |= {"ms_ratio": pair["ratio"], "ms_ratio_interval": list(pair["interval"])}
    return found
