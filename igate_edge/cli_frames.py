"""Frames in, pictures out: what `igate run` reads (images, folders, arrays, videos) and writes."""

from __future__ import annotations

import contextlib
import glob
import io
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contract import OutputSpec
from .errors import DataError, InputError, UnavailableError
from .files import atomic_writer, os_errors, write_atomic

if TYPE_CHECKING:
    import numpy as np

VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v")
ARRAYS = (".npy",)


@dataclass(frozen=True)
class Frames:
    """Frames of one input: (name, uint8 RGB [H,W,3]) one at a time; `count` is None when a video does not say.

    `rate`: frames a second of a video, None for images.
    """

    count: int | None
    items: Iterator[tuple[str, np.ndarray]]
    rate: float | None = None


def open_frames(source: Path) -> Frames:
    """Frames of an image, a folder of images (sorted by name), a .npy array [N,H,W,3] uint8, or a video.

    Raises DataError (nothing there, empty, not readable, NaN) or UnavailableError (a video without the extra `video`).
    """
    from .frames import SUFFIXES

    suffix = source.suffix.lower()
    if source.exists() and not source.is_dir() and not source.is_file():
        raise DataError("not a file of frames", f"{source} is not a regular file", "pass an image, a video or a folder")
    if source.is_dir():
        entries = sum(path.suffix.lower() in SUFFIXES for path in source.iterdir())
        return Frames(entries, _first(source, _pictures(source)))
    if source.exists() and suffix in VIDEOS:
        return _video(source)
    if source.exists() and suffix in ARRAYS:
        array = read_array(source)
        return Frames(len(array), ((f"{source.stem}_{k:06d}", frame) for k, frame in enumerate(array)))
    if source.exists() and suffix not in SUFFIXES:
        kinds = f"an image ({' '.join(SUFFIXES)}), a folder, a video ({' '.join(VIDEOS)}) or a .npy array"
        raise DataError("this kind of input is not known", f"{source.name} ends with {suffix!r}", f"pass {kinds}")
    return Frames(1, _first(source, _pictures(source)))


def _first(source: Path, items: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The same items, the first one read now: an empty folder or a broken image is known before an engine is built."""
    head = next(items, None)
    if head is None:
        raise DataError("the input holds no frame", str(source), "check the file with a viewer or a video player")
    return chain([head], items)


def refuse_own_input(source: Path, out: Path) -> None:
    """Raise InputError when the results of `source` would be written among the frames that are read."""
    # A link is followed too: its file must stay, and so must the link.
    read = list(source.iterdir()) if source.is_dir() else [source, *map(Path, glob.glob(str(source), recursive=True))]
    folders = {folder for file in read for folder in (file.parent.resolve(), file.resolve().parent)}
    if out.resolve() in folders:
        raise InputError("the results would overwrite the input", f"{out} holds {source.name}", "pass another --out")


def _pictures(source: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Images under names without suffix."""
    from .frames import read_frames

    for file, image in read_frames(source):
        yield Path(file).stem, image


def read_array(path: Path) -> np.ndarray:
    """A .npy file as uint8 [N,H,W,3]; one frame [H,W,3] counts as N = 1. NaN, another type or shape is a DataError."""
    import numpy as np

    try:
        with os_errors(path, "read"):
            array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError("not a .npy array", f"{path}: {error}", "write it with numpy.save, without objects") from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        index = np.argwhere(~np.isfinite(array))[0].tolist()
        raise DataError("a frame holds NaN or infinity", f"{path} at index {index}", "repair or drop this frame")
    if array.dtype != np.uint8:
        fix = "save uint8 in 0..255; scaling and normalising happen inside"
        raise DataError("frames must be uint8", f"{path} holds {array.dtype} {list(array.shape)}", fix)
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[3] != 3 or not array.size:
        fix = "save [N,H,W,3]: channels last, RGB order"
        raise DataError("frames must have shape [N,H,W,3]", f"{path} holds {list(array.shape)}", fix)
    return array


def _video(source: Path) -> Frames:
    try:
        import av
    except ModuleNotFoundError as error:
        fix = "pip install 'igate-edge[video]', or turn the video into images first"
        raise UnavailableError("reading a video needs PyAV", f"{source.name}: {error}", fix) from error
    try:
        with av.open(str(source)) as container:
            if not container.streams.video:
                raise DataError("the file holds no video", str(source), "pass a file with a video stream")
            stream = container.streams.video[0]
            count, rate = stream.frames or None, float(stream.average_rate or 30)
    except av.error.FFmpegError as error:
        raise DataError(
            "the video cannot be read", f"{source}: {error}", "check the file with a video player"
        ) from error
    return Frames(count, _first(source, _decode_video(source)), rate)


def _decode_video(source: Path) -> Iterator[tuple[str, np.ndarray]]:
    import av

    try:
        with av.open(str(source)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                yield f"{source.stem}_{number:06d}", frame.to_ndarray(format="rgb24")
    except av.error.FFmpegError as error:
        raise DataError(
            "the video cannot be decoded", f"{source}: {error}", "check the file with a video player"
        ) from error


@contextlib.contextmanager
def video_writer(path: Path, rate: float | None) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that adds a picture uint8 [H,W,3] to an MP4 at `path`, written whole or not at all.

    The first picture sets the size; others are cut or filled with white to it. `rate` None: nothing is written.
    """
    if rate is None:
        yield lambda picture: None
        return
    import av
    import numpy as np

    with atomic_writer(path) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=Fraction(rate).limit_denominator(1000))
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}

        def add(picture: np.ndarray) -> None:
            if not stream.width:
                stream.height, stream.width = (n + n % 2 for n in picture.shape[:2])
            page = np.full((stream.height, stream.width, 3), 255, np.uint8)
            part = picture[: stream.height, : stream.width]
            page[: part.shape[0], : part.shape[1]] = part
            container.mux(stream.encode(av.VideoFrame.from_ndarray(page, format="rgb24")))

        yield add
        container.mux(stream.encode(None))


def depth_limits(tasks: Sequence[OutputSpec], maps: dict[str, list[np.ndarray]]) -> dict[str, tuple[float, float]]:
    """One display range in metres per depth task, from `maps` (decoded), so that all pictures of a run share it."""
    from .reports.pictures import depth_range

    return {spec.name: depth_range(*maps[spec.name]) for spec in tasks if spec.kind == "depth"}


def panels(
    frame: np.ndarray, tasks: Sequence[OutputSpec], outputs: dict[str, Any], limits: dict[str, tuple[float, float]]
) -> list[Any]:
    """The frame and one panel per task, each with its legend or scale."""
    from .reports.pictures import Panel, answer_picture, colourise, legend_of

    result = [Panel("image", frame)]
    for spec in tasks:
        values = outputs[spec.name]
        if not spec.dense:
            result.append(Panel(spec.name, answer_picture(spec, values, frame.shape[:2])))
            continue
        picture = colourise(spec, values, limits.get(spec.name, (0.0, 1.0)))
        legend = legend_of(spec, values) if spec.kind == "semseg" else ()
        result.append(Panel(spec.name, picture, legend, limits.get(spec.name)))
    return result


def frame_files(name: str, tasks: Sequence[OutputSpec]) -> dict[str, str]:
    """File names of one frame: per dense task its picture, then "sheet" and "arrays" under keys that no task has.

    >>> list(frame_files("a", [OutputSpec("x y", "depth", 1), OutputSpec("x/y", "depth", 1)]).values())
    ['a_x_y.png', 'a_x_y_2.png', 'a.png', 'a.npz']
    """
    taken: set[str] = set()
    files = {}
    for spec in (spec for spec in tasks if spec.dense):
        part = free_name(file_name(spec.name), lambda text: text.casefold() in taken)
        taken.add(part.casefold())
        files[f"task {spec.name}"] = f"{name}_{part}.png"
    return {**files, "sheet": f"{name}.png", "arrays": f"{name}.npz"}


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """`name`, or name_2, name_3, ...: the first that is not taken."""
    return next(text for text in chain([name], (f"{name}_{k}" for k in count(2))) if not is_taken(text))


class FrameNames:
    """Names of frames whose files do not meet, whatever the inputs are called; also where letter case is ignored."""

    def __init__(self, tasks: Sequence[OutputSpec]) -> None:
        self._tasks = tasks
        self._taken: set[str] = set()

    def free(self, name: str) -> str:
        """`name` when all its files are still free, else the first free of name_2, name_3, ..."""
        name = free_name(name, lambda text: not self._taken.isdisjoint(self._files(text)))
        self._taken.update(self._files(name))
        return name

    def _files(self, name: str) -> set[str]:
        return {file.casefold() for file in frame_files(name, self._tasks).values()}


def write_frame(
    out: Path,
    name: str,
    frame: np.ndarray,
    tasks: Sequence[OutputSpec],
    outputs: dict[str, np.ndarray],
    limits: dict[str, tuple[float, float]],
) -> tuple[list[Path], np.ndarray]:
    """Write NAME_TASK.png per dense task, NAME.png (side by side) and NAME.npz (the outputs themselves) into `out`.

    Returns the paths, each written whole or not at all, and the side-by-side picture.
    Raises UnavailableError (no permission, full disk).
    """
    from .reports.pictures import png, side_by_side

    shown = panels(frame, tasks, outputs, limits)
    names, sheet = frame_files(name, tasks), side_by_side(shown)
    files = {
        out / names[f"task {spec.name}"]: png(panel.picture)
        for spec, panel in zip(tasks, shown[1:], strict=True)
        if spec.dense
    }
    files |= {out / names["sheet"]: png(sheet), out / names["arrays"]: _npz(outputs)}
    for path, data in files.items():
        write_atomic(path, data)
    return list(files), sheet


def _npz(outputs: dict[str, np.ndarray]) -> bytes:
    """As numpy.savez_compressed, which cannot store an array named "file"."""
    import numpy as np

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, value in outputs.items():
            with archive.open(f"{key}.npy", "w") as member:
                np.lib.format.write_array(member, np.ascontiguousarray(value), allow_pickle=False)
    return buffer.getvalue()


def file_name(task: str) -> str:
    """A task's name as a part of a file name.

    >>> file_name("lane/left 1")
    'lane_left_1'
    """
    return re.sub(r"[^\w.-]", "_", task)
