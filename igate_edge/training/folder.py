"""The own folder format: write, read and check labelled frames as NumPy arrays. No torch.

`data.json` + `{split}/{image,semseg,depth,normals,edges,instance}/000000.png`. image: 8-bit RGB PNG or JPEG; semseg:
8-bit, 255 ignored; depth: 16-bit millimetres, 0 invalid; normals: 8-bit RGB, (v - 128) / 127, (128, 128, 128) invalid;
edges: 8-bit 0/1, 255 ignored; instance: 16-bit. Labels of whole frames stand in `{split}/labels.json`: `{"000000": 3}`
for classification (-1 or null ignored), `{"000000": [0, 1, null]}` for multilabel, and
`{"000000": {"label": 3, "labels": [0, 1]}}` for both.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError, UnavailableError
from ..files import atomic_writer, os_errors, write_atomic
from ..frames import read_16bit, read_frames, read_ids, read_image, read_rgb_label
from .layout import EXTRAS, INFO, KIND_OF, DataInfo, load_json, read_info, write_info

__all__ = [
    "DataInfo",
    "SplitReader",
    "load_arrays",
    "modalities_of",
    "open_split",
    "read_frames",
    "read_image",
    "read_info",
    "write_frame",
    "write_info",
]
_VECTORS = ("label", "labels")
_IMAGE_NAMES = (".png", ".jpg", ".jpeg")


def modalities_of(info: DataInfo) -> tuple[str, ...]:
    """Every modality a folder stores as one file a frame; the image comes last, so that it marks a whole frame."""
    return (*(name for name in info.tasks if name not in _VECTORS), *info.extras, "image")


def write_frame(info: DataInfo, split: str, index: int, frame: Mapping[str, np.ndarray]) -> None:
    """Write one frame's files into `info.path`, each whole or not at all, the image last.

    `frame` holds image uint8 [H,W,3] and what `info` lists of: semseg, edges uint8 [H,W]; depth float [H,W] metres
    (NaN, inf, <= 0 and beyond 16 bits become invalid); normals float [H,W,3] (zero = invalid); instance uint16 [H,W].
    Raises DataError for a missing array or a wrong shape or type, UnavailableError when the disk refuses.
    """
    for name in modalities_of(info):
        if name not in frame:
            raise DataError(f"frame {index} has no {name!r}", f"it has {', '.join(frame)}", f"add {name!r}")
        path = info.path / split / name / f"{index:06d}.png"
        packed = _pack(name, np.asarray(frame[name]), info.depth_scale)
        if packed.shape[:2] != np.asarray(frame["image"]).shape[:2]:
            raise DataError(f"{name!r} of frame {index} differs in size", f"{packed.shape[:2]}", "give one size")
        with os_errors(path.parent, "create"):
            path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(packed).save(buffer, "PNG", compress_level=4)
        write_atomic(path, buffer.getvalue())


def _pack(name: str, array: np.ndarray, depth_scale: float) -> np.ndarray:
    wanted = {"image": np.uint8, "semseg": np.uint8, "edges": np.uint8, "instance": np.uint16}
    if array.ndim != (3 if name in ("image", "normals") else 2):
        raise DataError(f"{name!r} has {array.ndim} dimensions", str(array.shape), "give [H,W] or [H,W,3]")
    if name == "depth":
        with np.errstate(invalid="ignore", over="ignore"):
            counts = np.rint(array.astype(np.float64) / depth_scale)
            return np.where((counts > 0) & (counts < 65536), counts, 0).astype(np.uint16)
    if name == "normals":
        if not np.isfinite(array).all():
            raise DataError("normals are not finite", "NaN or inf found", "write zero vectors where there is none")
        return (np.rint(array * 127) + 128).clip(0, 255).astype(np.uint8)
    if array.dtype != wanted[name]:
        raise DataError(f"{name!r} has type {array.dtype}", f"needs {np.dtype(wanted[name])}", "convert it first")
    return array


class SplitReader:
    """Frames of one split, read and checked one at a time: `len(reader)`, `reader[index]`, iteration.

    `modalities` beside the image default to all that `data.json` names. As in `write_frame`; normals unit float32;
    label int64 (-1 ignored), labels float32 [K] (NaN ignored).
    Raises DataError naming the file for whatever is missing, corrupt, of another size, or out of range.
    """

    def __init__(self, info: DataInfo, split: str, modalities: tuple[str, ...] | None = None) -> None:
        self.info, self.split, self.names = info, split, _chosen(info, modalities)
        self._count = info.frames_in(split)
        self._table = _table(info, split) if set(self.names) & set(_VECTORS) else {}

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(self._count))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._count:
            raise IndexError(f"frame {index} of {self._count}")
        image_path = _image_path(self.info, self.split, index)
        out: dict[str, Any] = {"image": read_image(image_path)}
        for name in self.names:
            if name in _VECTORS:
                out[name] = _vector(self.info, self.split, name, index, self._table)
                continue
            path = self.info.path / self.split / name / f"{index:06d}.png"
            if not path.is_file():
                raise _missing(self.info, self.split, path)
            out[name] = _unpack(self.info, name, path)
            if out[name].shape[:2] != out["image"].shape[:2]:
                sizes = "{}x{} against {}x{}".format(*out[name].shape[:2], *out["image"].shape[:2])
                fix = "scale the label with nearest neighbour to the image's size"
                raise DataError(f"{path} and {image_path} differ in size", f"{sizes} (height x width)", fix)
        return out


def open_split(folder: str | os.PathLike[str], split: str, modalities: tuple[str, ...] | None = None) -> SplitReader:
    """Open a split of a data folder for reading; raises DataError as `read_info` does, and for an interrupted set."""
    return SplitReader(_open(folder), split, modalities)


def _open(folder: str | os.PathLike[str]) -> DataInfo:
    info = read_info(folder)
    if not info.complete:
        fix = "run the same command again: it goes on where it stopped"
        raise DataError(f"the data folder {info.path} is not complete", "its generation was interrupted", fix)
    return info


def _chosen(info: DataInfo, modalities: tuple[str, ...] | None) -> tuple[str, ...]:
    present = (*info.tasks, *info.extras)
    for name in modalities or ():
        if name not in present and name != "image":
            known = "known" if name in (*KIND_OF, *EXTRAS) else "unknown"
            raise DataError(
                f"{known} modality {name!r} is not in {info.path}", f"it has {', '.join(present)}", "drop it"
            )
    return present if modalities is None else tuple(name for name in modalities if name != "image")


def _missing(info: DataInfo, split: str, path: Path) -> DataError:
    evidence = f"{INFO} says {info.splits[split]} frames in {split!r}, numbered from 000000"
    return DataError(f"missing file {path}", evidence, "add it, or correct the split's size")


def _image_path(info: DataInfo, split: str, index: int) -> Path:
    stem = info.path / split / "image" / f"{index:06d}"
    for suffix in _IMAGE_NAMES:
        if stem.with_suffix(suffix).is_file():
            return stem.with_suffix(suffix)
    raise _missing(info, split, stem.with_suffix(".png"))


def _unpack(info: DataInfo, name: str, path: Path) -> np.ndarray:
    if name == "depth":
        return read_16bit(path, name).astype(np.float32) * np.float32(info.depth_scale)
    if name == "instance":
        return read_16bit(path, name)
    if name == "normals":
        return _unit(path, read_rgb_label(path, name))
    ids = read_ids(path, name)
    limit, ignore = (len(info.tasks[name]), info.ignore) if name == "semseg" else (2, 255)
    wrong = ids[(ids >= limit) & (ids != ignore)]
    if wrong.size:
        value = int(wrong[0])
        evidence = f"value {value} on {int((wrong == value).sum())} pixels; {limit} classes are 0..{limit - 1}"
        raise DataError(f"{name} label out of range in {path}", evidence, f"map it to a class or to {ignore}")
    return np.where(ids == ignore, np.uint8(255), ids)


def _unit(path: Path, packed: np.ndarray) -> np.ndarray:
    vectors = (packed.astype(np.float32) - 128) / 127
    vectors[(packed == 128).all(-1)] = 0
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    known = length[..., 0] > 0
    if known.any() and (np.abs(length[..., 0][known] - 1) > 0.2).mean() > 0.1:
        evidence = f"median length {float(np.median(length[..., 0][known])):.2f} of (v - 128) / 127"
        raise DataError(f"normals in {path} are not unit vectors", evidence, "write v = round(127 n) + 128")
    return vectors / np.maximum(length, 1e-6)


def _table(info: DataInfo, split: str) -> dict[str, Any]:
    path = info.path / split / "labels.json"
    table = load_json(path)
    if not isinstance(table, dict):
        raise DataError(f"{path} is not a JSON object", f"it is a {type(table).__name__}", 'write {"000000": 3}')
    return table


def _vector(info: DataInfo, split: str, name: str, index: int, table: dict[str, Any]) -> Any:
    path, key, classes = info.path / split / "labels.json", f"{index:06d}", len(info.tasks[name])
    if key not in table:
        raise DataError(f"no label for frame {key} in {path}", f"{len(table)} labels there", "add it (null: unknown)")
    value = table[key]
    if isinstance(value, dict):
        value = value.get(name)
    if name == "label":
        value = -1 if value is None else value
        if type(value) is not int or not -1 <= value < classes:
            evidence = f"{value!r}; {classes} classes are 0..{classes - 1}"
            raise DataError(f"label out of range for frame {key} in {path}", evidence, "give a class number or null")
        return np.int64(value)
    values = [None] * classes if value is None else value
    if not isinstance(values, list) or len(values) != classes or any(v not in (0, 1, None) for v in values):
        evidence = f"{value!r}"[:80] + f"; {classes} classes"
        raise DataError(f"bad labels for frame {key} in {path}", evidence, "give one of 0, 1 or null for every class")
    return np.array([np.nan if v is None else v for v in values], np.float32)


def load_arrays(
    folder: str | os.PathLike[str], split: str, modalities: tuple[str, ...] | None = None, *, cache: bool = True
) -> dict[str, np.ndarray]:
    """Load a whole split into memory, checked: the image and the named modalities (default: all tasks, no extras).

    Returns image uint8 [N,H,W,3], semseg and edges uint8 [N,H,W] (255 ignored), depth float16 [N,H,W] metres (0
    invalid), normals int8 [N,H,W,3] (127 n, zero invalid), label int64 [N], labels float32 [N,K]: 10 bytes a pixel.
    Keeps the result in one file, `.{split}.npz`, that is remade when any file of the split changes; a folder that
    cannot be written to is read anew each time. Raises DataError as `SplitReader` does, for frames of different sizes,
    for a task without a single valid label, and for normals that point away from the camera.
    """
    info = _open(folder)
    reader = SplitReader(info, split, tuple(info.tasks) if modalities is None else modalities)
    stored, key = info.path / f".{split}.npz", _fingerprint(info, split, reader.names)
    arrays = _from_cache(stored, key, reader.names) if cache else None
    if arrays is not None:
        return arrays
    arrays = _empty(reader)
    for index, frame in enumerate(reader):
        if frame["image"].shape != arrays["image"].shape[1:]:
            evidence = f"frame {index} is {frame['image'].shape[:2]}, frame 0 {arrays['image'].shape[1:3]}"
            raise DataError(f"frames of {info.path / split} differ in size", evidence, "scale them to one size")
        for name, value in frame.items():
            arrays[name][index] = compact(name, value)
    _check_labels(info, split, arrays)
    if cache:
        _to_cache(stored, key, arrays)
    return arrays


def _empty(reader: SplitReader) -> dict[str, np.ndarray]:
    """Room for a whole split, or a DataError before the machine runs out of memory half-way."""
    first = {name: compact(name, value) for name, value in reader[0].items()}
    need = len(reader) * sum(array.nbytes for array in first.values())
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > 0.8 * have:
        evidence = f"{need / 1e9:.1f} GB for {len(reader)} frames; the machine has {have / 1e9:.1f} GB"
        fix = "train on the folder itself (FrameDataset(folder)), or scale the frames down"
        raise DataError(f"{reader.info.path / reader.split} does not fit into memory", evidence, fix)
    return {name: np.empty((len(reader), *array.shape), array.dtype) for name, array in first.items()}


def compact(name: str, value: Any) -> np.ndarray:
    """One label as `load_arrays` keeps it: depth float16, normals int8, the rest as it is."""
    if name == "depth":
        return value.astype(np.float16)
    return np.rint(value * 127).astype(np.int8) if name == "normals" else np.asarray(value)


def _check_labels(info: DataInfo, split: str, arrays: dict[str, np.ndarray]) -> None:
    """A task whose labels are all void would train on nothing for a whole epoch, silently."""
    valid = {
        "semseg": lambda a: (a != 255).any(),
        "depth": lambda a: (a > 0).any(),
        "normals": lambda a: a.any(),
        "edges": lambda a: (a == 1).any(),
        "label": lambda a: (a >= 0).any(),
        "labels": lambda a: np.isfinite(a).any(),
    }
    for name, array in arrays.items():
        if name in valid and not valid[name](array):
            hint = "edges are marked 1, not 255" if name == "edges" else "check how the labels were written"
            raise DataError(f"no valid {name!r} label in {info.path / split}", f"{len(array)} frames read", hint)
    if "normals" in arrays:
        away = (arrays["normals"][..., 2] > 0).sum() / max(arrays["normals"].any(-1).sum(), 1)
        if away > 0.9:
            fix = "negate z (and y where it points up): x right, y down, z forward"
            raise DataError(f"normals in {info.path / split} point away from the camera", f"{away:.0%} of pixels", fix)


def _fingerprint(info: DataInfo, split: str, names: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr((info.as_json(), names)).encode())
    for name in (*names, "image", "labels.json"):
        place = info.path / split / name
        with os_errors(place, "read"):
            files = sorted(os.scandir(place), key=lambda entry: entry.name) if place.is_dir() else []
            stats = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in files]
        if place.is_file():
            stats.append((name, place.stat().st_size, place.stat().st_mtime_ns))
        digest.update(repr(stats).encode())
    return digest.hexdigest()


def _from_cache(path: Path, key: str, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    """The stored arrays, or None when there are none, they are stale, or damaged: all three mean read again."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            return {name: stored[name] for name in ("image", *names)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _to_cache(path: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    try:
        with atomic_writer(path) as file:
            np.savez(file, key=np.array(key), **arrays)  # type: ignore[arg-type]
    except UnavailableError:
        return  # a read-only or full disk costs the next call some seconds, nothing else
