"""The messages of a rosbag2 as they lie on disk: mcap or sqlite3, a file or a folder, plain or compressed, whole or
damaged."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import sqlite3
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import DataError
from ..files import as_path, os_errors
from .mcap_records import MAX_CHUNK, MAX_RECORD, read_mcap
from .sqlite_pages import CutBase, cut, is_file, torn_journal
from .typestore import require_bag

_MAGIC = {".mcap": b"\x89MCAP0\r\n", ".db3": b"SQLite format 3\0"}
_ZSTD, _ZSTD_MAGIC = ".zstd", b"\x28\xb5\x2f\xfd"
METADATA = "metadata.yaml"
#: Bytes of a metadata.yaml that are believed: a bag of 1,000 files has fewer, and YAML takes half a minute for them.
MAX_METADATA = 1 << 20
#: Bytes that one value of an sqlite bag may have, however it is made.
MAX_VALUE = 1 << 29
#: A compressed file may unpack to so many times its size, or to MIN_ROOM, and to half of the free disk.
MAX_RATIO, MIN_ROOM = 200, 1 << 26
_MORE_DISK = "free space there, or let TMPDIR name a folder on another disk"
_BLOCK, _PIECE = 1 << 14, 1 << 20
#: A column that is computed is no recording, and may be of any size.
_COMPUTED = re.compile(r"\bAS\s*\(", re.IGNORECASE)


class Record(NamedTuple):
    """One message: `log_ns` is when it was recorded, `data` its CDR bytes."""

    topic: str
    kind: str
    log_ns: int
    data: bytes


class Storage:
    """A bag that was found: `topics` (name -> type) and its messages; nothing stays open between two reads.

    losses: damage met while its topics were looked for; each `read` tells its own.
    Raises UnavailableError without the extra `bag`, DataError for what is no bag of ROS 2.
    """

    def __init__(self, path: Any) -> None:
        self.path = as_path(path)
        require_bag()
        self.notes: list[str] = []
        self.topics: dict[str, str] = {}
        self.losses: list[str] = []
        self._parts: list[_Part] = []
        self._unread: list[str] = []
        with os_errors(self.path, "read"):
            files = self._find()
        for file in files:
            try:
                with os_errors(file, "read"):
                    part = _part(file)
                    self.topics |= part.topics(self.losses)
                self._parts.append(part)
            except DataError as error:
                if len(files) == 1:
                    raise
                self._unread.append(f"{file.name} is lost as a whole: {error.cause} ({error.evidence})")
        if not self._parts:
            raise DataError("no file of the bag can be read", "; ".join(self._unread), "take another copy of it")
        self.losses += self._unread

    def read(self, topics: Collection[str] | None, losses: list[str]) -> Iterator[Record]:
        """Messages of `topics` (None = all) in the order of their recording, as far as they are whole.

        Adds a sentence to `losses` for each damage met.
        """
        losses += self._unread
        for part in self._parts:
            packed: list[str] = []
            for record in _told(part, topics, losses):
                if record.data.startswith(_ZSTD_MAGIC):  # no CDR starts so: its first byte is 0
                    try:
                        record = record._replace(data=_unzstd(record.data))  # noqa: PLW2901
                    except Exception as error:  # cut, damaged, or too much
                        packed.append(str(error))
                        continue
                yield record
            if packed:
                losses.append(
                    f"{part.path.name}: {len(packed)} compressed message(s) are left out, the first one: {packed[0]}"
                )

    def _find(self) -> list[Path]:
        path = self.path
        if path.is_dir():
            return self._folder(path)
        if not path.is_file():
            raise DataError("no such bag", str(path), "pass a file NAME.mcap or NAME.db3, or a rosbag2 folder")
        return [path]

    def _folder(self, path: Path) -> list[Path]:
        about = _metadata(path / METADATA)
        mode, form = about.get("compression_mode"), about.get("compression_format")
        if mode and str(mode).lower() != "none" and form and form != "zstd":
            evidence = f"{path}: compression format {form!r:.40}"
            raise DataError(
                "the bag is compressed in another way than zstd", evidence, "unpack it with `ros2 bag convert`"
            )
        listed = about.get("relative_file_paths")
        names = [Path(name).name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
        files = [path / name for name in names if is_file(path / name)]
        if not files:
            found = {file for file in path.iterdir() if _storage(file) in _MAGIC and file.is_file()}
            # A recorder that was killed while it compressed a file left both.
            files = sorted(
                (file for file in found if file.suffix in _MAGIC or file.with_suffix("") not in found), key=_natural
            )
            self.notes.append(f"{METADATA} is missing or unreadable: read {len(files)} file(s) of {path.name} by name")
        elif len(files) < len(names):
            absent = ", ".join(sorted({*names} - {file.name for file in files}))
            self.notes.append(f"{METADATA} names files that are not there: {absent}")
        if not files:
            raise DataError("no bag in this folder", str(path), "pass a rosbag2 folder: it holds *.mcap or *.db3")
        return files


def _storage(path: Path) -> str:
    """Suffix of the file, or of that which it is when unpacked.

    >>> _storage(Path("a/bag_0.db3.zstd"))
    '.db3'
    """
    return Path(path.stem).suffix if path.suffix == _ZSTD else path.suffix


def _natural(path: Path) -> list[Any]:
    """Sort key under which bag_10 follows bag_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _metadata(path: Path) -> dict[str, Any]:
    """What a recorder wrote when it ended; {} when it did not come to that."""
    from ruamel.yaml import YAML

    with contextlib.suppress(Exception):  # a hostile text ends in anything from ValueError to RecursionError
        if not path.is_file() or path.stat().st_size > MAX_METADATA:
            return {}
        found = YAML(typ="safe").load(path.read_text("utf8"))
        about = found.get("rosbag2_bagfile_information") if isinstance(found, dict) else None
        return about if isinstance(about, dict) else {}
    return {}


def _part(path: Path) -> _Part:
    with path.open("rb") as file:
        head = file.read(16)
    packed = path.suffix == _ZSTD
    magic = _MAGIC.get(_storage(path))
    if magic is None or not head.startswith(_ZSTD_MAGIC if packed else magic):
        fix = "pass NAME.mcap or NAME.db3 of ROS 2; a bag of ROS 1 becomes one with `rosbags-convert`"
        raise DataError("not a bag of ROS 2", f"{path} starts with {head[:8]!r}", fix)
    if packed:
        return _Packed(path)
    return _Mcap(path) if path.suffix == ".mcap" else _Sqlite(path)


class _Part(ABC):
    """One file of a bag."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def topics(self, losses: list[str]) -> dict[str, str]:
        """All topics that can still be read: by default those of the messages."""
        return {record.topic: record.kind for record in self.read(None, losses)}

    @abstractmethod
    def read(self, topics: Collection[str] | None, losses: list[str]) -> Iterator[Record]: ...


def _told(part: _Part, topics: Collection[str] | None, losses: list[str]) -> Iterator[Record]:
    """What `part` reads; a disk that fails meanwhile is a sentence."""
    with os_errors(part.path, "read"):
        yield from part.read(topics, losses)


class _Mcap(_Part):
    def topics(self, losses: list[str]) -> dict[str, str]:
        from mcap.reader import SeekingReader

        with contextlib.suppress(Exception), self.path.open("rb") as file:
            summary = SeekingReader(file, record_size_limit=MAX_RECORD).get_summary()
            if summary is not None and summary.channels:
                return {channel.topic: summary.schemas[channel.schema_id].name for channel in summary.channels.values()}
        return super().topics(losses)  # no index, or none that can be read

    def read(self, topics: Collection[str] | None, losses: list[str]) -> Iterator[Record]:
        for topic, kind, log_ns, data in read_mcap(self.path, losses):
            if topics is None or topic in topics:
                yield Record(topic, kind, log_ns, data)


class _Sqlite(_Part):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._where = cut(path)
        self._base: CutBase | None = None

    def _cut(self) -> CutBase:
        """Looked through once, and only when it is needed."""
        self._base = self._base or CutBase(self.path)
        return self._base

    def topics(self, losses: list[str]) -> dict[str, str]:
        fix = "try `sqlite3 NAME.db3 .recover`"
        try:
            if self._where:
                found = dict(self._cut().topics.values())
                if not found:
                    raise sqlite3.DatabaseError(f"{self._where}, and no topic is named before that")
                losses.append(f"{self.path.name}: {self._where}")
                return found
            with self._open() as base:
                rows = base.execute("SELECT name, type FROM topics")
                return {name: kind for name, kind in rows if isinstance(name, str) and isinstance(kind, str)}
        except sqlite3.DatabaseError as error:
            raise DataError("the bag's list of topics is damaged", f"{self.path}: {error}", fix) from error

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        base = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            if hasattr(base, "setlimit"):  # from Python 3.11 on
                base.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)
            base.execute("PRAGMA writable_schema=ON")  # else one damaged line of the schema refuses the whole file
            made = dict(base.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' AND rootpage > 0"))
            for table in ("topics", "messages"):
                # A view may have rows without end, made up as they are read.
                if not isinstance(made.get(table), str) or _COMPUTED.search(made[table]):
                    raise sqlite3.DatabaseError(f"{table} is no table of recorded values")
            yield base
        finally:
            base.close()

    def _read_cut(self, topics: Collection[str] | None, losses: list[str]) -> Iterator[Record]:
        """Not through SQLite, which takes zeros for what is missing."""
        base = self._cut()
        wanted = {key: topic for key, topic in base.topics.items() if topics is None or topic[0] in topics}
        count = torn = 0
        for key, log_ns, data in base.rows(wanted):
            if data is None or log_ns < 0:
                torn += 1
                continue
            count += 1
            yield Record(*wanted[key], log_ns, data)
        also = f" and {torn} more in part" if torn else ""
        losses.append(f"{self.path.name}: {self._where}: {count} message(s) are whole{also}; what follows is lost")

    def read(self, topics: Collection[str] | None, losses: list[str]) -> Iterator[Record]:
        if self._where:
            yield from self._read_cut(topics, losses)
            return
        count = wrong = 0
        if torn_journal(self.path):
            losses.append(f"{self.path.name}: its journal {self.path.name}-wal was cut; its last messages may be lost")
        try:
            with self._open() as base:
                topic_rows = base.execute("SELECT id, name, type FROM topics")
                names = {
                    key: (name, kind)
                    for key, name, kind in topic_rows
                    if isinstance(name, str) and isinstance(kind, str)
                }
                # By row, not by time: the index of times may be what was lost, and rows lie as they were recorded.
                for key, log_ns, data in base.execute("SELECT topic_id, timestamp, data FROM messages ORDER BY id"):
                    count += 1
                    if key not in names or (topics is not None and names[key][0] not in topics):
                        continue
                    if not isinstance(data, bytes) or not isinstance(log_ns, int) or log_ns < 0:
                        wrong += 1
                        continue
                    yield Record(*names[key], log_ns, data)
        except sqlite3.DatabaseError as error:
            losses.append(f"{self.path.name}: damaged after {count} messages ({error}); what follows is lost")
        if wrong:
            losses.append(f"{self.path.name}: {wrong} row(s) without bytes or time of recording are left out")


class _Packed(_Part):
    """A file that was compressed as a whole: it is unpacked to a temporary folder, up to its damage."""

    def topics(self, losses: list[str]) -> dict[str, str]:
        with self.unpacked(losses) as part:
            return part.topics(losses)

    def read(self, topics: Collection[str] | None, losses: list[str]) -> Iterator[Record]:
        with self.unpacked(losses) as part:
            yield from part.read(topics, losses)

    @contextlib.contextmanager
    def unpacked(self, losses: list[str]) -> Iterator[_Part]:
        """The file in it, to be read inside `with`."""
        with os_errors(self.path, "unpack"), tempfile.TemporaryDirectory(prefix="igate-bag-") as folder:
            path = Path(folder, self.path.stem)
            free, most = shutil.disk_usage(folder).free // 2, max(self.path.stat().st_size * MAX_RATIO, MIN_ROOM)
            limit = "which is the limit for a file of its size"
            if free < most:
                limit = f"half of the free disk of {path.parent.parent}: {_MORE_DISK}"
            with os_errors(path, "unpack"):
                loss = _unzstd_file(self.path, path, min(most, free), limit)
            if loss:
                losses.append(f"{self.path.name}: {loss}; what follows is lost")
            try:
                part = _part(path)
            except DataError as error:
                evidence = f"{self.path}: {loss or error.evidence}"
                fix = _MORE_DISK if limit in loss and free < most else "take another copy of it"
                raise DataError("the compressed file holds no bag", evidence, fix) from error
            yield part


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """What `file` unpacks to, in pieces of up to 1 MiB; EOFError where it was cut, others where it is damaged."""
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdDecompressor
    else:
        from backports.zstd import ZstdDecompressor

    decoder, rest = ZstdDecompressor(), b""
    while True:
        if decoder.eof:  # a file may consist of several streams
            rest, decoder = decoder.unused_data or file.read(_BLOCK), ZstdDecompressor()
            if not rest:
                return
        elif decoder.needs_input:
            rest = rest or file.read(_BLOCK)
            if not rest:
                raise EOFError("the compressed data end too early")
        piece, rest = decoder.decompress(rest, _PIECE), b""
        if piece:
            yield piece


def _unzstd(data: bytes) -> bytes:
    """The message in `data`; any error for one that was cut, is damaged, or too long."""
    parts, size = [], 0
    for piece in _pieces(io.BytesIO(data)):
        parts.append(piece)
        size += len(piece)
        if size > MAX_CHUNK:
            raise ValueError(f"it unpacks to more than {MAX_CHUNK >> 20} MiB")
    return b"".join(parts)


def _unzstd_file(source: Path, target: Path, room: int, limit: str) -> str:
    """Unpack up to `room` bytes, as far as `source` is whole; says what is missing, "" for nothing.

    limit: what `room` is, in words.
    """
    size = 0
    with source.open("rb") as packed, target.open("xb") as file:
        try:
            for piece in _pieces(packed):
                file.write(piece[: room - file.tell()])
                size += len(piece)
                if size > room:
                    return f"it unpacks to more than {room >> 20} MiB, {limit}"
        except OSError:
            raise
        except Exception as error:
            where = f"byte {file.tell():,} of what is packed in it ({error})"
            if "checksum" not in str(error):  # else a wrong byte may stand anywhere before
                return f"damaged at {where}"
            file.truncate(0)
            return f"its checksum is wrong: {where}"
    return ""
