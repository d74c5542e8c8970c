"""What is whole in an sqlite bag that was cut, read page by page: SQLite itself takes zeros for the end of a torn page,
and finds no row at all once the page that leads to the others was lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..errors import DataError
from ..files import os_errors

_HEAD, _LEAF, _BLOCK = 100, 0x0D, 1 << 20
_WAL_HEAD, _FRAME_HEAD = 32, 24
#: No page of the file that SQLite locks by this byte holds data, nor does a journal name it.
_LOCK_BYTE = 1 << 30
#: Bytes of the longest row that is taken for a topic.
_MAX_TOPIC = 1 << 20
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8, 8: 0, 9: 0}
_TEXT = {1: "utf-8", 2: "utf-16-le", 3: "utf-16-be"}


class Shape(NamedTuple):
    """Of an sqlite file. page, size: bytes of a page and of the file; usable: bytes of a page that hold data; meant:
    pages that the file says it has, whole: those that are there to their last byte; free: first of the list of free
    pages and their number; encoding: of its texts."""

    page: int
    usable: int
    size: int
    meant: int
    free: tuple[int, int]
    encoding: str

    @property
    def whole(self) -> int:
        return min(self.size // self.page, self.meant)


def shape(path: Path) -> Shape | None:
    """None for a file without the header of SQLite, or one that is shorter than it."""
    with path.open("rb") as file:
        head, size = file.read(_HEAD), os.fstat(file.fileno()).st_size
    page = {1: 65536}.get(_number(head, 16, 2), _number(head, 16, 2))
    if len(head) < _HEAD or page < 512 or page & (page - 1) or page - head[20] < 480:
        return None
    # Only then did the last writer know of the number; else the file's length is all there is.
    counted = _number(head, 28, 4) if head[24:28] == head[92:96] else 0
    free = _number(head, 32, 4), _number(head, 36, 4)
    return Shape(page, page - head[20], size, counted or -(-size // page), free, _TEXT.get(head[59], "utf-8"))


def cut(path: Path) -> str:
    """Where the file at `path` ends before its last page, in words; "" for one whose pages are all there.

    Pages that stand in the journal NAME-wal beside it, not yet in the file, are there too.
    """
    found = shape(path)
    if found is None:
        return ""
    meant, journal = _journal(path, found)
    whole = min(found.size // found.page, meant)
    if whole + sum(whole < page <= meant for page in {*journal, _LOCK_BYTE // found.page + 1}) >= meant:
        return ""
    return f"it ends at byte {found.size:,} of {meant * found.page:,}"


def torn_journal(path: Path) -> bool:
    """True where the journal NAME-wal ends in the middle of a page."""
    found, journal = shape(path), _wal(path)
    size = journal.stat().st_size if is_file(journal) else 0
    return found is not None and size > 0 and (size < _WAL_HEAD or (size - _WAL_HEAD) % (_FRAME_HEAD + found.page) > 0)


def is_file(path: Path) -> bool:
    """Also False for a name that no file can have: too long, or with a NUL."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _journal(path: Path, found: Shape) -> tuple[int, set[int]]:
    """(pages of the bag as the last commit in its journal says, pages that the journal holds)."""
    meant, pages, waiting = found.meant, set[int](), set[int]()
    if not is_file(_wal(path)):
        return meant, pages
    with os_errors(_wal(path), "read"), _wal(path).open("rb") as file:
        salt = file.read(_WAL_HEAD)[16:24]
        while len(head := file.read(_FRAME_HEAD)) == _FRAME_HEAD and head[8:16] == salt and any(head[:4]):
            if len(file.read(found.page)) < found.page:
                break
            waiting.add(_number(head, 0, 4))
            if committed := _number(head, 4, 4):
                meant, pages = committed, pages | waiting
                waiting = set()
    return meant, pages


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "big")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, where the next begins); IndexError at the end of `data`."""
    value = 0
    for place in range(at, at + 8):
        value = value << 7 | data[place] & 0x7F
        if data[place] < 0x80:
            return value, place + 1
    value = value << 8 | data[at + 8]
    return value - ((value >> 63) << 64), at + 9


class _Cell(NamedTuple):
    """A row: its bytes in the leaf, all its bytes, the page where the others begin (0: none), its columns' types."""

    key: int
    local: bytes
    size: int
    more: int
    types: list[int]
    starts: list[int]

    def integer(self, column: int) -> int:
        kind, start = self.types[column], self.starts[column]
        if kind in (8, 9):
            return kind - 8
        return int.from_bytes(self.local[start : start + _INTEGERS[kind]], "big", signed=True)

    @property
    def is_message(self) -> bool:
        """Of the table messages: key, topic, time of recording, bytes. No other table of a bag has such rows."""
        head, data = self.types[:3], self.types[3:]
        blob = len(data) == 1 and data[0] >= 12 and data[0] % 2 == 0
        return blob and head[0] == 0 and head[1] in _INTEGERS and head[2] in _INTEGERS

    @property
    def is_topic(self) -> bool:
        """May be of the table topics: key, name, type, serialisation, and what later versions add."""
        return len(self.types) >= 4 and self.types[0] == 0 and all(kind >= 13 and kind % 2 for kind in self.types[1:4])


class CutBase:
    """The rows of a cut sqlite bag whose every page is there. topics: key -> (name, type).

    Looks once through the file and keeps nothing open. Raises DataError where deleted rows cannot be told from others.
    """

    def __init__(self, path: Path) -> None:
        found = shape(path)
        if found is None:
            raise DataError("the file has no header of SQLite", str(path), "take another copy of the bag")
        self.path, self.shape = path, found
        self.topics: dict[int, tuple[str, str]] = {}
        leaves: list[tuple[int, int]] = []
        left = found.size  # no row's bytes are another's: all together they fit into the file
        with path.open("rb", buffering=0) as file:
            self._free = self._free_pages(file)
            for number, page in self._leaves(file):
                first = next((cell for cell in self._cells(page) if cell.is_message or cell.is_topic), None)
                if first is None:
                    continue
                if first.is_message:
                    leaves.append((first.key, number))
                else:
                    left = self._add_topics(file, page, left)
        self._order = np.array([number for _, number in sorted(leaves)], np.int64)

    def rows(self, wanted: Collection[int]) -> Iterator[tuple[int, int, bytes | None]]:
        """(topic's key, time of recording, data) in the order of keys; data None for one of which a page is missing."""
        last, left = None, self.shape.size
        with self.path.open("rb", buffering=0) as file:
            for number in self._order:
                for cell in self._cells(self._page(file, int(number))):
                    if not cell.is_message or cell.integer(1) not in wanted or (last is not None and cell.key <= last):
                        continue
                    data, read = self._payload(file, cell, left)
                    left -= read
                    last = last if data is None else cell.key  # a damaged row's key may be any number
                    yield cell.integer(1), cell.integer(2), None if data is None else data[cell.starts[3] :]

    def _add_topics(self, file: BinaryIO, page: bytes, left: int) -> int:
        """Reads up to `left` bytes of rows, returns how many of these remain."""
        for cell in self._cells(page):
            if not cell.is_topic or cell.size > _MAX_TOPIC or cell.key in self.topics:
                continue
            data, read = self._payload(file, cell, left)
            left -= read
            if data is None:
                continue
            texts = [
                data[start : start + (kind - 13) // 2].decode(self.shape.encoding, "replace")
                for kind, start in zip(cell.types[1:4], cell.starts[1:4], strict=True)
            ]
            if texts[2] == "cdr":  # a table of message definitions has rows of texts too
                self.topics[cell.key] = texts[0], texts[1]
        return left

    def _page(self, file: BinaryIO, number: int) -> bytes:
        file.seek((number - 1) * self.shape.page)
        return file.read(self.shape.page)

    def _free_pages(self, file: BinaryIO) -> set[int]:
        """Pages whose rows were deleted, but still stand there."""
        free: set[int] = set()
        trunk, count = self.shape.free
        while trunk and count:
            if trunk > self.shape.whole or trunk in free or len(free) > count:
                fix = "try `sqlite3 NAME.db3 .recover`"
                raise DataError("the list of deleted rows was cut off", f"{self.path}: page {trunk}", fix)
            page = self._page(file, trunk)
            listed = min(_number(page, 4, 4), self.shape.page // 4 - 2)
            free |= {trunk} | {_number(page, 8 + 4 * place, 4) for place in range(listed)}
            trunk = _number(page, 0, 4)
        return free

    def _leaves(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """(number, bytes) of each whole page that holds rows; the first one, SQLite's own, is left out."""
        page, end = self.shape.page, self.shape.whole * self.shape.page
        start = page
        while (start := _data_from(file, start, page)) < end:
            file.seek(start)
            block = file.read(min(max(_BLOCK, page), end - start))
            for at in range(0, len(block) - page + 1, page):
                number = (start + at) // page + 1
                if block[at] == _LEAF and number not in self._free:
                    yield number, block[at : at + page]
            whole = len(block) // page * page
            if not whole:  # it became shorter meanwhile
                return
            start += whole

    def _cells(self, page: bytes) -> Iterator[_Cell]:
        """The rows of a leaf, as far as they make sense; each one once, however often it is pointed to."""
        usable = self.shape.usable
        most, least = usable - 35, (usable - 12) * 32 // 255 - 23
        places = range(min(_number(page, 3, 2), usable // 6))
        for pointer in dict.fromkeys(_number(page, 8 + 2 * place, 2) for place in places):
            try:
                size, at = _varint(page, pointer)
                key, at = _varint(page, at)
                here = size
                if size > most:
                    here = least + (size - least) % (usable - 4)
                    here = here if here <= most else least
                local = page[at : at + here]
                more = _number(page, at + here, 4) if here < size else 0
                types, starts = _columns(local)
            except IndexError:
                continue
            lengths = [_length(kind) for kind in types]
            if len(local) == here and starts and starts[-1] + lengths[-1] == size:
                yield _Cell(key, local, size, more, types, starts)

    def _payload(self, file: BinaryIO, cell: _Cell, most: int) -> tuple[bytes | None, int]:
        """(all bytes of a row, how many were read); None for one longer than `most`, and unless each page is there and
        the last one says that it is."""
        parts, left, number = [cell.local], cell.size - len(cell.local), cell.more
        if cell.size > most:
            return None, 0
        while left > 0 and 1 < number <= self.shape.whole and number not in self._free:
            page = self._page(file, number)
            parts.append(page[4 : min(4 + left, self.shape.usable)])
            left -= len(parts[-1])
            number = _number(page, 0, 4)
            if len(page) < self.shape.page:
                break
        data = b"".join(parts)
        return data if left == number == 0 else None, len(data)


def _length(kind: int) -> int:
    """Bytes of a value of this type."""
    if kind >= 12:
        return (kind - 12) // 2
    return 8 if kind == 7 else _INTEGERS.get(kind, 0)


def _columns(local: bytes) -> tuple[list[int], list[int]]:
    """Types of a row's values, and where each begins."""
    end, at = _varint(local, 0)
    types, starts, start = list[int](), list[int](), end
    while at < min(end, 64):
        kind, at = _varint(local, at)
        types.append(kind)
        starts.append(start)
        start += _length(kind)
    return types, starts


def _data_from(file: BinaryIO, start: int, page: int) -> int:
    """The page at `start`, or the next one that takes room on the disk: a file with holes may be of any size."""
    if not hasattr(os, "SEEK_DATA"):
        return start
    try:
        found = os.lseek(file.fileno(), start, os.SEEK_DATA)
    except OSError as error:
        # ENXIO: nothing but a hole up to the end; any other: this file system does not tell.
        return 1 << 62 if error.errno == errno.ENXIO else start
    return max(start, found // page * page)
