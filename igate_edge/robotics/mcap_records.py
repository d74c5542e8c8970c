"""Messages of an mcap file in file order, up to the damage where there is one, also out of a chunk that was cut."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Bytes that one chunk may unpack to: a damaged length must not decide how much memory is taken.
MAX_CHUNK = 1 << 28
#: Bytes of the longest record that is read: a file with holes may be of any size and take no disk.
MAX_RECORD = 1 << 29
_CHUNK_OPCODE, _CHUNK_HEAD = 0x06, struct.Struct("<QQQII")
_TOO_LONG = f"a record there is longer than the file, or than {MAX_RECORD >> 20} MiB"
_RECORD_HEAD = struct.Struct("<BQ")


def read_mcap(path: Path, losses: list[str]) -> Iterator[tuple[str, str, int, bytes]]:
    """(topic, type, log time in ns, data) of each CDR message; adds a sentence to `losses` for each damage.

    A chunk whose checksum is wrong is left out, and reading goes on behind it; a file that was cut ends at its last
    whole message.
    """
    from mcap.records import Chunk, DataEnd
    from mcap.stream_reader import StreamReader

    size, good, ended = path.stat().st_size, 0, False
    tables: dict[str, dict[int, Any]] = {"schemas": {}, "channels": {}}
    with path.open("rb") as file:
        records = StreamReader(file, emit_chunks=True, record_size_limit=min(size, MAX_RECORD)).records
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except Exception as error:  # the end of the file, or whatever a wrong length leads to
                reason = _reason(error)
                break
            good, ended = file.tell(), ended or isinstance(record, DataEnd)
            inside = [record]
            if isinstance(record, Chunk):
                try:
                    inside, ending = _whole_chunk(record)
                    if ending:
                        losses.append(f"{path.name}: the chunk before byte {good:,} is damaged at its end ({ending})")
                except Exception as error:
                    losses.append(
                        f"{path.name}: the chunk before byte {good:,} is damaged ({_reason(error)}) and left out"
                    )
                    continue
            yield from _messages(inside, tables)
        if ended:
            losses.append(f"{path.name}: the index at its end is damaged ({reason}); all messages were read")
            return
        file.seek(good)
        if file.read(1) == bytes([_CHUNK_OPCODE]):
            file.seek(good)
            yield from _messages(_cut_chunk(file.read(min(size - good, MAX_CHUNK))), tables)
        losses.append(f"{path.name}: damaged at byte {good:,} of {size:,} ({reason}); what follows is lost")


def _reason(error: Exception) -> str:
    ends = "the file ends there"
    known = {"EndOfFile": ends, "error": ends, "RecordLengthLimitExceeded": _TOO_LONG}  # error: struct's
    return known.get(type(error).__name__, f"{type(error).__name__}: {error}"[:120])


def _messages(records: Any, tables: dict[str, dict[int, Any]]) -> Iterator[tuple[str, str, int, bytes]]:
    from mcap.records import Channel, Message, Schema

    for record in records:
        if isinstance(record, Schema):
            tables["schemas"][record.id] = record
        elif isinstance(record, Channel):
            tables["channels"][record.id] = record
        elif isinstance(record, Message):
            channel = tables["channels"].get(record.channel_id)
            schema = tables["schemas"].get(channel.schema_id) if channel is not None else None
            if channel is not None and schema is not None and channel.message_encoding == "cdr":
                yield channel.topic, schema.name, record.log_time, record.data


def _whole_chunk(chunk: Any) -> tuple[list[Any], str]:
    """All records of a chunk, see _records; raises ValueError when it does not hold what its header says."""
    data = _unpack(chunk.data, chunk.compression, chunk.uncompressed_size)
    if len(data) != chunk.uncompressed_size:
        raise ValueError(f"{len(data)} bytes instead of {chunk.uncompressed_size}")
    if chunk.uncompressed_crc and zlib.crc32(data) != chunk.uncompressed_crc:
        raise ValueError("wrong checksum")
    return _records(data)


def _cut_chunk(rest: bytes) -> list[Any]:
    """The whole records at the start of a chunk of which only `rest` is there; [] for anything else."""
    start = _RECORD_HEAD.size
    if len(rest) < start + _CHUNK_HEAD.size or rest[0] != _CHUNK_OPCODE:
        return []
    *_, size, _crc, length = _CHUNK_HEAD.unpack_from(rest, start)
    name = start + _CHUNK_HEAD.size
    compression = rest[name : name + length]
    try:
        data = _unpack(rest[name + length + 8 :], compression.decode(), size)
    except Exception:  # nothing in it can be unpacked
        return []
    return _records(data)[0]


def _unpack(data: bytes, compression: str, size: int) -> bytes:
    """Up to `size` bytes, fewer when `data` was cut."""
    if not 0 <= size <= MAX_CHUNK:
        raise ValueError(f"it claims to unpack to {size} bytes")
    if compression == "zstd":
        import zstandard

        with zstandard.ZstdDecompressor().stream_reader(data) as stream:
            return stream.read(size)
    if compression == "lz4":
        import lz4.frame

        return lz4.frame.LZ4FrameDecompressor().decompress(data, max_length=size)
    if compression:
        raise ValueError(f"unknown compression {compression!r:.20}")
    return data[:size]


def _records(data: bytes) -> tuple[list[Any], str]:
    """(whole records that stand one after the other in `data`, why there are no more: "" at its end)."""
    from mcap.exceptions import EndOfFile
    from mcap.stream_reader import StreamReader

    end = 0
    while end + _RECORD_HEAD.size <= len(data):
        _, length = _RECORD_HEAD.unpack_from(data, end)
        if length > len(data) - end - _RECORD_HEAD.size:
            break
        end += _RECORD_HEAD.size + length
    found: list[Any] = []
    # emit_chunks: a chunk inside a chunk is against the format, and would be unpacked to whatever size it claims.
    reader = StreamReader(io.BytesIO(data[:end]), skip_magic=True, emit_chunks=True, record_size_limit=max(end, 1))
    try:
        for record in reader.records:
            found.append(record)  # noqa: PERF402 - what came before an error is kept
    except EndOfFile:
        return found, "" if end == len(data) else "a record there is longer than the chunk"
    except Exception as error:
        return found, _reason(error)
    return found, ""
