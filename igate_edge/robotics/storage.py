"""The messages of a rosbag2 as they lie on disk: mcap or sqlite3, a file or a folder, whole or damaged."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from ..files import as_path, os_errors
from .typestore import require_bag

_MAGIC = {".mcap": b"\x89MCAP0\r\n", ".db3": b"SQLite format 3\0"}
METADATA = "metadata.yaml"
#: Bytes of a metadata.yaml that are believed: a bag of 1,000 files has fewer, and YAML takes half a minute for them.
MAX_METADATA = 1 << 20
#: Bytes that one value of an sqlite bag may have, however it is made.
MAX_VALUE = 1 << 29
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
        self._parts = self._find()
        self.topics: dict[str, str] = {}
        self.losses: list[str] = []
        for part in self._parts:
            self.topics |= part.topics(self.losses)

    def read(self, topics: Collection[str] | None, losses: list[str]) -> Iterator[Record]:
        """Messages of `topics` (None = all) in the order of their recording, as far as they are whole.

        Adds a sentence to `losses` for each damage met.
        """
        for part in self._parts:
            yield from part.read(topics, losses)

    def _find(self) -> list[_Part]:
        path = self.path
        if path.is_dir():
            return self._folder(path)
        if not path.is_file():
            raise DataError("no such bag", str(path), "pass a file NAME.mcap or NAME.db3, or a rosbag2 folder")
        return [_part(path)]

    def _folder(self, path: Path) -> list[_Part]:
        about = _metadata(path / METADATA)
        if about.get("compression_mode"):
            return [_Packed(path)]
        listed = about.get("relative_file_paths")
        names = [Path(name).name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
        files = [path / name for name in names if _is_file(path / name)]
        if not files:
            files = sorted((file for file in path.iterdir() if file.suffix in _MAGIC and file.is_file()), key=_natural)
            self.notes.append(f"{METADATA} is missing or unreadable: read {len(files)} file(s) of {path.name} by name")
        elif len(files) < len(names):
            absent = ", ".join(sorted({*names} - {file.name for file in files}))
            self.notes.append(f"{METADATA} names files that are not there: {absent}")
        if not files:
            raise DataError("no bag in this folder", str(path), "pass a rosbag2 folder: it holds *.mcap or *.db3")
        return [_part(file) for file in files]


def _is_file(path: Path) -> bool:
    """Also False for a name that no file can have: too long, or with a NUL."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


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
    with os_errors(path, "read"), path.open("rb") as file:
        head = file.read(16)
    magic = _MAGIC.get(path.suffix)
    if magic is None or not head.startswith(magic):
        fix = "pass NAME.mcap or NAME.db3 of ROS 2; a bag of ROS 1 becomes one with `rosbags-convert`"
        raise DataError("not a bag of ROS 2", f"{path} starts with {head[:8]!r}", fix)
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


class _Mcap(_Part):
    def topics(self, losses: list[str]) -> dict[str, str]:
        from mcap.reader import SeekingReader

        from .mcap_records import MAX_RECORD

        with contextlib.suppress(Exception), self.path.open("rb") as file:
            summary = SeekingReader(file, record_size_limit=MAX_RECORD).get_summary()
            if summary is not None and summary.channels:
                return {channel.topic: summary.schemas[channel.schema_id].name for channel in summary.channels.values()}
        return super().topics(losses)  # no index, or none that can be read

    def read(self, topics: Collection[str] | None, losses: list[str]) -> Iterator[Record]:
        from .mcap_records import read_mcap

        for topic, kind, log_ns, data in read_mcap(self.path, losses):
            if topics is None or topic in topics:
                yield Record(topic, kind, log_ns, data)


class _Sqlite(_Part):
    def topics(self, losses: list[str]) -> dict[str, str]:
        try:
            with self._open() as base:
                found = base.execute("SELECT name, type FROM topics")
                return {name: kind for name, kind in found if isinstance(name, str) and isinstance(kind, str)}
        except sqlite3.DatabaseError as error:
            evidence = f"{self.path}: {error}"
            raise DataError(
                "the bag's list of topics is damaged", evidence, "try `sqlite3 NAME.db3 .recover`"
            ) from error

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        base = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            if hasattr(base, "setlimit"):  # from Python 3.11 on
                base.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)
            base.execute("PRAGMA writable_schema=ON")  # else a file that was cut is refused as a whole
            made = dict(base.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' AND rootpage > 0"))
            for table in ("topics", "messages"):
                # A view may have rows without end, made up as they are read.
                if not isinstance(made.get(table), str) or _COMPUTED.search(made[table]):
                    raise sqlite3.DatabaseError(f"{table} is no table of recorded values")
            yield base
        finally:
            base.close()

    def read(self, topics: Collection[str] | None, losses: list[str]) -> Iterator[Record]:
        count = wrong = 0
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
    """A folder whose files or messages are compressed one by one: rosbags unpacks them."""

    def topics(self, losses: list[str]) -> dict[str, str]:
        with self._open() as reader:
            return {connection.topic: connection.msgtype for connection in reader.connections}

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        from rosbags.rosbag2 import Reader

        reader = Reader(self.path)
        try:
            reader.open()
        except Exception as error:
            fix = "unpack its files with `zstd -d`, then pass one of them"
            raise DataError("the compressed bag cannot be opened", f"{self.path}: {error}", fix) from error
        try:
            yield reader
        finally:
            reader.close()

    def read(self, topics: Collection[str] | None, losses: list[str]) -> Iterator[Record]:
        count = 0
        with self._open() as reader:
            wanted = [one for one in reader.connections if topics is None or one.topic in topics]
            messages = iter(reader.messages(wanted) if wanted else ())
            while True:
                try:
                    connection, log_ns, data = next(messages)
                except StopIteration:
                    return
                except Exception as error:  # zstd's, apsw's and rosbags' own
                    losses.append(f"{self.path.name}: damaged after {count} messages ({error}); what follows is lost")
                    return
                count += 1
                yield Record(connection.topic, connection.msgtype, log_ns, bytes(data))
