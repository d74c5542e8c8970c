"""`data.json` of the own folder format: which tasks, classes, splits and units a data folder holds. No torch."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import read_file, write_atomic

SCHEMA = 1
INFO = "data.json"
#: Modality (also the key in a batch) -> kind of task. `image` is always there, `instance` is an extra.
KIND_OF = {
    "semseg": "semseg",
    "depth": "depth",
    "normals": "normals",
    "edges": "edges",
    "label": "classification",
    "labels": "multilabel",
}
EXTRAS = ("instance",)
NORMAL_FRAME = "optical: x right, y down, z forward"
#: Modalities that must name their classes, and the most an 8-bit label can hold beside 255.
_WITH_CLASSES = {"semseg": 255, "label": 65535, "labels": 65535}


@dataclass(frozen=True)
class DataInfo:
    """What a data folder holds, as its `data.json` says.

    `tasks`: modality -> class names, () where it has none; `splits`: name -> number of frames; `depth_scale`: metres
    per count of the depth PNG; `ignore`: void value of semseg PNGs (255 once read); `intrinsics`: fx, fy, cx, cy in
    pixels, or empty; `generator`: parameters of the program that made it.
    """

    path: Path
    tasks: dict[str, tuple[str, ...]]
    splits: dict[str, int]
    depth_scale: float = 0.001
    ignore: int = 255
    intrinsics: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    extras: tuple[str, ...] = ()
    generator: dict[str, Any] = field(default_factory=dict)
    complete: bool = True

    def as_json(self) -> dict[str, Any]:
        data = {key: value for key, value in asdict(self).items() if key != "path"}
        tasks = {
            name: {"kind": KIND_OF[name], **({"classes": list(classes)} if classes else {})}
            for name, classes in self.tasks.items()
        }
        data |= {"tasks": tasks, "extras": list(self.extras)}
        frame = {"normal_frame": NORMAL_FRAME} if "normals" in self.tasks else {}
        return {"schema": SCHEMA, **data, **frame}

    def frames_in(self, split: str) -> int:
        """Number of frames of a split; raises DataError when it is unknown or empty."""
        known = ", ".join(f"{name} ({count})" for name, count in self.splits.items()) or "none"
        if split not in self.splits:
            raise DataError(f"no split {split!r} in {self.path / INFO}", f"splits: {known}", "use one of these splits")
        if self.splits[split] < 1:
            raise DataError(f"the split {split!r} of {self.path} is empty", f"splits: {known}", "add frames to it")
        return self.splits[split]


@dataclass(frozen=True)
class HeldOut:
    """Frames that no network was trained on: `first` to `last` (not included) of a split, and how to call them."""

    split: str
    first: int
    last: int
    title: str


def held_out(info: DataInfo) -> HeldOut:
    """The split `val`; without one, the last tenth of `train`, at least one frame. Training and export ask here."""
    if info.splits.get("val"):
        return HeldOut("val", 0, info.splits["val"], "val")
    count = info.frames_in("train")
    return HeldOut("train", count - max(1, count // 10), count, "last tenth of train")


def write_info(info: DataInfo) -> None:
    """Write `data.json` into `info.path`, which must exist; raises UnavailableError when it cannot."""
    write_atomic(info.path / INFO, json.dumps(info.as_json(), indent=1, sort_keys=True) + "\n")


def read_info(folder: str | os.PathLike[str]) -> DataInfo:
    """Read and check `data.json` of a data folder; raises DataError that says what is wrong and how to mend it.

    Smallest one: `{"schema": 1, "tasks": {"depth": {"kind": "depth"}}, "splits": {"train": 10}}`.
    """
    path = Path(folder) / INFO
    data = _parse(path)
    schema = data.get("schema")
    if schema != SCHEMA:
        raise DataError(
            f"{path} is of another schema", f"schema {schema!r}, this version reads {SCHEMA}", '"schema": 1'
        )
    frame = data.get("normal_frame", NORMAL_FRAME)
    if not str(frame).startswith("optical"):
        fix = f"turn the normals to {NORMAL_FRAME}"
        raise DataError(f"{path} has normals in another frame", f"normal_frame {frame!r}", fix)
    extras = data.get("extras", [])
    if not isinstance(extras, list) or any(extra not in EXTRAS for extra in extras):
        raise DataError(f"unknown extras in {path}", repr(extras), f"known: {', '.join(EXTRAS)}")
    scale, ignore = data.get("depth_scale", 0.001), data.get("ignore", 255)
    if not _number(scale) or scale <= 0:
        raise DataError(f"bad depth_scale in {path}", repr(scale), "give metres per count, 0.001 for millimetres")
    if type(ignore) is not int or not 0 <= ignore <= 255:
        raise DataError(f"bad ignore value in {path}", repr(ignore), "give an integer 0..255; 255 is usual")
    seed = data.get("seed")
    return DataInfo(
        path=Path(folder),
        tasks=_tasks(path, data.get("tasks")),
        splits=_splits(path, data.get("splits")),
        depth_scale=float(scale),
        ignore=ignore,
        intrinsics=_intrinsics(path, data.get("intrinsics") or {}),
        seed=seed if isinstance(seed, int) else None,
        extras=tuple(extras),
        generator=data.get("generator") or {},
        complete=bool(data.get("complete", True)),
    )


def load_json(path: Path) -> Any:
    """Parse a JSON file; raises DataError for a missing, unreadable or broken one."""
    try:
        return json.loads(read_file(path))
    except FileNotFoundError as error:
        raise DataError(
            f"missing {path.name}", str(path), "write it: see the data format in the documentation"
        ) from error
    except PermissionError as error:
        raise DataError(f"no permission to read {path}", error.strerror or "", "change its rights") from error
    except OSError as error:
        raise DataError(f"cannot read {path}", error.strerror or str(error), "check the path") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"broken JSON in {path}", str(error), "mend the file at this place") from error


def kept(path: Path) -> dict[str, Any]:
    """What a file that can be made again holds; {} where there is none, or one that was cut or mixed up."""
    try:
        found = load_json(path)
    except DataError:
        return {}
    return found if isinstance(found, dict) else {}


def _parse(path: Path) -> dict[str, Any]:
    data = load_json(path)
    if not isinstance(data, dict):
        raise DataError(
            f"{path} is not a JSON object", f"it is a {type(data).__name__}", "write {...} with tasks and splits"
        )
    return data


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _tasks(path: Path, tasks: object) -> dict[str, tuple[str, ...]]:
    known = ", ".join(KIND_OF)
    if not isinstance(tasks, dict) or not tasks:
        raise DataError(f"{path} names no tasks", f"tasks is {tasks!r}", f"add some of: {known}")
    out: dict[str, tuple[str, ...]] = {}
    for name, entry in tasks.items():
        if name not in KIND_OF:
            raise DataError(f"unknown modality {name!r} in {path}", f"known: {known}", "rename it, or take it out")
        kind = entry.get("kind", KIND_OF[name]) if isinstance(entry, dict) else entry
        if not isinstance(entry, dict) or kind != KIND_OF[name]:
            raise DataError(f"wrong kind for {name!r} in {path}", repr(kind), f'write {{"kind": "{KIND_OF[name]}"}}')
        out[name] = _classes(path, name, entry.get("classes", ()))
    return out


def _classes(path: Path, name: str, classes: object) -> tuple[str, ...]:
    if name not in _WITH_CLASSES:
        return ()
    # A number is enough when the classes have no names.
    if type(classes) is int and 1 <= classes <= _WITH_CLASSES[name]:
        classes = [f"class {k}" for k in range(classes)]
    if not isinstance(classes, list) or not 1 <= len(classes) <= _WITH_CLASSES[name]:
        fix = "list the class names in the order of their numbers, or give how many there are"
        raise DataError(f"bad classes for {name!r} in {path}", repr(classes)[:80], fix)
    if len({*map(str, classes)}) != len(classes):
        raise DataError(f"two classes of {name!r} share a name in {path}", repr(classes)[:80], "name every class once")
    return tuple(map(str, classes))


def _splits(path: Path, splits: object) -> dict[str, int]:
    if not isinstance(splits, dict) or not splits:
        raise DataError(f"{path} names no splits", f"splits is {splits!r}", 'write {"train": 100, "val": 10}')
    for name, count in splits.items():
        if type(count) is not int or count < 0 or name != Path(name).name or name.startswith("."):
            raise DataError(f"bad split {name!r} in {path}", repr(count), "give a folder name and its number of frames")
    return dict(splits)


def _intrinsics(path: Path, values: object) -> dict[str, float]:
    if not isinstance(values, dict) or any(not _number(value) for value in values.values()):
        raise DataError(f"bad intrinsics in {path}", repr(values)[:80], "give finite fx, fy, cx, cy in pixels")
    if values and {*values} != {"fx", "fy", "cx", "cy"}:
        raise DataError(f"incomplete intrinsics in {path}", ", ".join(values), "give fx, fy, cx and cy, or none")
    return {key: float(value) for key, value in values.items()}
