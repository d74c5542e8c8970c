"""Bags of ROS 2 without ROS: frames out of rosbag2 (mcap, sqlite3), results into a bag that Foxglove opens."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..engines.session import Closing
from ..errors import DataError, InputError
from ..files import STALE_S, as_path, os_errors
from ..runtime.frame import Camera, Frame
from .messages import CameraInfoMessage, CompressedImageMessage, ImageMessage, LabelInfoMessage, Message, to_frame
from .storage import Storage
from .typestore import CAMERA_INFO, COMPRESSED, IMAGE, TYPES, deserialise, require_bag, serialise, typestore

#: Encodings of depth cameras, which publish a camera_info too: no picture, unless their topic was named.
DEPTH = ("16UC1", "32FC1")
#: Messages that are looked at to find a camera's intrinsics before its first frame is handed out.
MOST_AHEAD = 2000


class BagSource(Closing):
    """Frames of a bag's cameras in the order of their recording, whatever their stamps say; may be iterated again.

    topics: image topics to read (None = the cameras: image topics beside a camera_info, or all when none has one).
    After an iteration `losses` names what the bag's damage cost, `refused` counts unusable messages by reason, and
    `notes` says what else to know: topics left out, stamps that repeat or go back. Raises UnavailableError without
    the extra `bag`, DataError for no bag, no images or no such topic.
    """

    def __init__(self, path: str | os.PathLike[str], topics: Sequence[str] | None = None) -> None:
        self._storage = Storage(path)
        self.path = self._storage.path
        self.losses: list[str] = []
        self.refused: Counter[str] = Counter()
        self._stamps: Counter[str] = Counter()
        self._left_out: list[str] = []
        self._named = bool(topics)
        self.topics: tuple[str, ...] = self._chosen(topics)

    @property
    def notes(self) -> list[str]:
        """Sentences about this bag that are no loss."""
        counted = [f"{count} frame(s) {what}: each was processed all the same" for what, count in self._stamps.items()]
        return [*self._storage.notes, *self._left_out, *counted]

    def _chosen(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        images = {name for name, kind in self._storage.topics.items() if kind in (IMAGE, COMPRESSED)}
        there = ", ".join(sorted(images)) or "none"
        unknown = [topic for topic in asked or () if topic not in images]
        if unknown:
            raise DataError(f"the bag has no image topic {unknown[0]!r:.80}", f"image topics: {there}", "choose these")
        if not images:
            found = self._storage.losses or sorted(set(self._storage.topics.values())) or ["no message"]
            evidence = f"{self.path}: {', '.join(found)}"
            raise DataError("the bag holds no images", evidence, f"record {IMAGE} or {COMPRESSED}")
        if asked:
            return tuple(dict.fromkeys(asked))
        cameras = {topic for topic in images if self._storage.topics.get(info_topic(topic)) == CAMERA_INFO} or images
        twice = {topic for topic in cameras if topic.endswith("/compressed") and raw_topic(topic) in cameras}
        for topic in sorted(images - cameras):
            self._left_out.append(f"left out {topic}: no camera_info beside it; name it with --topic to use it")
        for topic in sorted(twice):
            self._left_out.append(f"left out {topic}: the same images raw are used")
        return tuple(sorted(cameras - twice))

    def __iter__(self) -> Iterator[Frame]:
        return (frame for _, frame in self.timed())

    def timed(self) -> Iterator[tuple[int, Frame]]:
        """(time of recording in ns, frame) of each image that can be used."""
        self.losses, self.refused, self._stamps = [], Counter(), Counter()
        infos = {info_topic(topic) for topic in self.topics} & set(self._storage.topics)
        cameras = self._first_cameras(infos)
        newest: dict[str, int] = {}
        seen: set[tuple[str, int]] = set()
        for topic, kind, log_ns, data in self._storage.read({*self.topics, *infos}, self.losses):
            try:
                message = deserialise(data, kind)
                if isinstance(message, CameraInfoMessage):
                    cameras |= _calibrated(topic, message)
                    continue
                if not isinstance(message, ImageMessage | CompressedImageMessage):
                    continue
                frame = to_frame(message, topic, cameras.get(info_topic(topic)), log_ns)
                if frame.encoding in DEPTH and not self._named:
                    fix = "name it with --topic if it is a grey picture"
                    raise DataError(f"{frame.encoding} is a depth image's encoding", f"stamp {frame.stamp_ns}", fix)
            except InputError as error:
                self.refused[f"{topic}: {error.cause.split(' (stamp')[0]}"] += 1
                continue
            if (topic, frame.stamp_ns) in seen:
                self._stamps[f"of {topic} with a stamp that was there before"] += 1
            elif frame.stamp_ns < newest.get(topic, frame.stamp_ns):
                self._stamps[f"of {topic} with a stamp older than the one before"] += 1
            seen.add((topic, frame.stamp_ns))
            newest[topic] = frame.stamp_ns
            yield log_ns, frame

    def _first_cameras(self, infos: set[str]) -> dict[str, Camera]:
        """The first intrinsics of each camera: a recorder often writes an image before its camera_info."""
        found: dict[str, Camera] = {}
        for number, (topic, kind, _, data) in enumerate(self._storage.read({*self.topics, *infos}, [])):
            if len(found) == len(infos) or number > MOST_AHEAD:
                break
            if topic in infos and topic not in found:
                with contextlib.suppress(InputError):
                    message = deserialise(data, kind)
                    found |= _calibrated(topic, message)
        return found


def _calibrated(topic: str, message: Message) -> dict[str, Camera]:
    """{} for a camera that was not calibrated: its matrix is zero."""
    return {topic: message.camera} if isinstance(message, CameraInfoMessage) and any(message.camera.k) else {}


def raw_topic(topic: str) -> str:
    """The topic of the images that a `.../compressed` topic has in another form; any other as it is."""
    return topic.removesuffix("/compressed")


def info_topic(topic: str) -> str:
    """Where the camera_info of an image topic is published, by ROS's convention.

    >>> info_topic("/front/image_raw/compressed")
    '/front/camera_info'
    """
    return raw_topic(topic).rpartition("/")[0] + "/camera_info"


def result_prefixes(topics: Sequence[str], name: str = "igate") -> dict[str, str]:
    """Image topic -> prefix of its results' topics: beside the image, below it where two would meet.

    >>> result_prefixes(["/front/image_raw", "/rear/image_raw/compressed"])
    {'/front/image_raw': '/front/igate', '/rear/image_raw/compressed': '/rear/igate'}
    >>> result_prefixes(["/left", "/right"])
    {'/left': '/left/igate', '/right': '/right/igate'}
    """
    parents = {topic: raw_topic(topic).rpartition("/")[0] for topic in topics}
    alone = len(set(parents.values())) == len(parents)
    return {topic: f"{parents[topic] if alone else topic}/{name}" for topic in topics}


class BagWriter(Closing):
    """Messages into a new bag: NAME.mcap is one file, any other name a rosbag2 folder; it is whole or absent.

    compress: zstd, chunk by chunk, as rosbag2 itself does. In a `with` block an error inside leaves nothing; `close`
    puts the finished bag into its place, a file there is replaced. Raises UnavailableError (extra `bag`, disk) and
    InputError (a folder stands there already).
    """

    def __init__(self, path: str | os.PathLike[str], compress: bool = False) -> None:
        require_bag()
        from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer

        self.path = as_path(path)
        self._single = self.path.suffix == ".mcap"
        with os_errors(self.path, "write"):
            if self.path.is_dir() or (self.path.exists() and not (self._single and self.path.is_file())):
                raise InputError("something stands in the bag's place", str(self.path), "choose another name")
        remove_left_overs(self.path.parent, self.path.name)
        self._work = self.path.parent / f".{self.path.name}.{secrets.token_hex(4)}.tmp"
        self._topics: dict[tuple[str, str], Any] = {}
        self._writer: Any = Writer(self._work / self.path.stem, version=8, storage_plugin=StoragePlugin.MCAP)
        if compress:
            self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        with os_errors(self.path, "write"), self._undone():
            self._work.mkdir()
            self._writer.open()

    def write(self, topic: str, message: Message, log_ns: int | None = None) -> None:
        """Add a message; log_ns: time of recording, by default its stamp (needed for a message without one)."""
        data = serialise(message)
        recorded = getattr(message, "stamp_ns", 0) if log_ns is None else log_ns
        self.write_raw(topic, TYPES[type(message)], recorded, data, isinstance(message, LabelInfoMessage))

    def write_raw(self, topic: str, kind: str, log_ns: int, data: bytes, latched: bool = False) -> None:
        """Add a message that is CDR already."""
        if not isinstance(topic, str) or not topic or not isinstance(log_ns, int) or not 0 <= log_ns < 2**64:
            evidence = f"topic {topic!r:.60}, time of recording {log_ns!r:.40}"
            raise InputError("no message of a bag", evidence, "give a name, and nanoseconds from 0 on")
        if self._writer is None:
            raise InputError("the bag is closed", f"a message for {topic} came after close()", "write before")
        with os_errors(self.path, "write"), self._undone():
            connection = self._topics.get((topic, kind))
            if connection is None:
                connection = self._writer.add_connection(
                    topic, kind, typestore=typestore(), offered_qos_profiles=_latched() if latched else ()
                )
                self._topics[topic, kind] = connection
            self._writer.write(connection, log_ns, data)

    def close(self) -> None:
        writer = self._writer
        if writer is None:
            return
        with os_errors(self.path, "write"), self._undone():
            writer.close()
            made = self._work / self.path.stem
            bag = made / f"{made.name}.mcap"
            with bag.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(bag if self._single else made, self.path)
        self.abort()

    def abort(self) -> None:
        """Drop what was written; nothing stays. After `close` it does nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(Exception):
                writer.abort()
            shutil.rmtree(self._work, ignore_errors=True)

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def remove_left_overs(folder: Path, name: str) -> None:
    """Delete what killed processes left of bags whose name begins so: nothing but them, and nothing still written."""
    with contextlib.suppress(OSError):
        for old in list(folder.iterdir()):
            ours = old.name.startswith(f".{name}") and old.name.endswith(".tmp") and old.is_dir()
            if ours and time.time() - old.stat().st_mtime > STALE_S:
                shutil.rmtree(old, ignore_errors=True)


def _latched() -> list[Any]:
    """The quality of service of a message that late subscribers still get."""
    from rosbags.interfaces import (
        Qos,
        QosDurability,
        QosHistory,
        QosLiveliness,
        QosReliability,
        QosTime,
    )

    never = QosTime(0, 0)
    return [
        Qos(
            QosHistory.KEEP_LAST,
            1,
            QosReliability.RELIABLE,
            QosDurability.TRANSIENT_LOCAL,
            never,
            never,
            QosLiveliness.SYSTEM_DEFAULT,
            never,
            False,
        )
    ]
