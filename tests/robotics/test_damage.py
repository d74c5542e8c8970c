"""Bags cut anywhere: what is whole is handed out, bit by bit as it was and in its order, and every loss is named."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path
from unittest.mock import Mock

import bags
import numpy as np
import pytest
from zstandard import ZstdCompressor

from igate_edge.errors import DataError, IgateError, UnavailableError
from igate_edge.robotics import sqlite_pages, storage
from igate_edge.robotics.bag import BagSource
from igate_edge.robotics.messages import image_message
from igate_edge.robotics.sqlite_pages import CutBase
from igate_edge.robotics.typestore import IMAGE, serialise


def noise(*shape: int) -> list[np.ndarray]:
    """Images that no compression makes smaller, so that a cut falls among them; the same in every test and order."""
    return list(np.random.default_rng(7).integers(0, 255, (*shape, 3), np.uint8))


FRAMES = noise(24, 40, 60)
KINDS = [("sqlite3", 60), ("sqlite3", 40), ("sqlite3", 18), ("mcap", 60), ("packed mcap", 60)]
TOPICS = "CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT, type TEXT, serialization_format TEXT, qos TEXT)"
MESSAGES = "CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, data BLOB)"


def offsets(size: int, count: int) -> list[int]:
    return [0, size - 1, *sorted(int(at) for at in np.random.default_rng(8).integers(1, size - 1, count - 2))]


def frames_of(path: Path, originals: list[np.ndarray]) -> int:
    """How many frames come out of a bag that may be cut; fails unless they are the first ones and a loss is named."""
    try:
        source = BagSource(path)
    except DataError as error:
        assert error.cause and error.evidence and error.fix
        return 0
    frames = list(source)
    assert not source.refused and len(frames) <= len(originals), source.refused
    for number, (frame, image) in enumerate(zip(frames, originals, strict=False)):
        assert np.array_equal(frame.data, image), f"frame {number} of {len(frames)} is another one"
    assert source.losses or len(frames) == len(originals), f"{len(originals) - len(frames)} frames are lost in silence"
    return len(frames)


def base(path: Path, images: list[np.ndarray], page: int = 4096, journal: str = "DELETE") -> sqlite3.Connection:
    """An sqlite bag of one topic, still open."""
    made = sqlite3.connect(path, isolation_level=None)
    for statement in (f"PRAGMA page_size = {page}", f"PRAGMA journal_mode = {journal}", TOPICS, MESSAGES):
        made.execute(statement)
    made.execute("CREATE INDEX timestamp_idx ON messages (timestamp ASC)")
    made.execute(f"INSERT INTO topics VALUES(1, '/c/image', '{IMAGE}', 'cdr', '{'-' * 3000}')")
    record(made, images, 1)
    return made


def record(made: sqlite3.Connection, images: list[np.ndarray], first: int) -> None:
    for stamp, image in enumerate(images, first):
        data = serialise(image_message(image, "rgb8", stamp))
        made.execute("INSERT INTO messages (topic_id, timestamp, data) VALUES(1, ?, ?)", (stamp, data))


def claiming(data: bytes, pages: int) -> bytes:
    """The sqlite file as one that says it has so many pages."""
    return data[:28] + pages.to_bytes(4, "big") + data[32:]


@pytest.mark.parametrize(("kind", "side"), KINDS)
def test_a_bag_cut_at_100_places_gives_whole_frames_and_names_the_loss(tmp_path: Path, kind: str, side: int) -> None:
    """A row of sqlite with 60 columns has a page behind its own, with 40 half of two, with 18 it shares a page."""
    whole, images = tmp_path / "in.mcap", [image[:, :side] for image in FRAMES]
    bags.camera_bag(whole, images, pack=kind == "packed mcap")
    if kind == "sqlite3":
        (whole,) = bags.convert(whole, tmp_path / "lite", "sqlite3").glob("*.db3")
    data, path, counts = whole.read_bytes(), tmp_path / f"cut{whole.suffix}", []
    for size in offsets(len(data), 100):
        path.write_bytes(data[:size])
        counts.append((size, frames_of(path, images)))
        # Texts of definitions come first, zstd hands out blocks of 128 kB, and each image has a camera_info.
        room = 140_000 if kind == "packed mcap" else 48_000
        assert counts[-1][1] >= min((size - room) // (120 * side + 1500), 22), size
    assert [count for _, count in sorted(counts)] == sorted(count for _, count in counts)


@pytest.mark.parametrize("pack", [False, True])
def test_an_mcap_cut_in_the_length_of_a_record_keeps_the_records_before_it(tmp_path: Path, pack: bool) -> None:
    """Also one whose next record is longer than all that is left of its chunk."""
    bags.camera_bag(tmp_path / "in.mcap", FRAMES)
    path, data = tmp_path / "cut.mcap", (tmp_path / "in.mcap").read_bytes()
    start = data.index(FRAMES[5].tobytes())  # CDR and the record's head are some 100 bytes before
    for size in range(start - 120, start + 1):
        path.write_bytes(data[:size])
        assert frames_of(path, FRAMES) == 5, size
    images = [np.zeros((2, 2, 3), np.uint8), *noise(1, 200, 300)]
    bags.camera_bag(tmp_path / "big.mcap", images, pack=pack)
    data = (tmp_path / "big.mcap").read_bytes()
    path.write_bytes(data[:170_000] if pack else data[: data.index(images[1].tobytes()) + 1000])
    assert frames_of(path, images) == 1


@pytest.mark.parametrize("page", [512, 1024, 65536])
def test_pages_of_every_size_and_rows_behind_many_pages(tmp_path: Path, page: int) -> None:
    """Small pages: the page that leads to all rows is written again at the end, and is the first that a cut takes."""
    images = noise(400, 8, 8)
    base(tmp_path / "in.db3", images, page).close()
    data, path = (tmp_path / "in.db3").read_bytes(), tmp_path / "cut.db3"
    for size in [len(data) * 3 // 4, *offsets(len(data), 12)]:
        path.write_bytes(data[:size])
        # Tables and index have a page each, and a page of 64 kB holds half of all rows.
        assert frames_of(path, images) >= 400 * (size - 5 * page) / len(data) * 0.9 - 10, size
    path.write_bytes(data)
    assert frames_of(path, images) == 400


@pytest.mark.parametrize("holes", [None, OSError(errno.EINVAL, "refused")], ids=["holes told", "holes refused"])
def test_no_count_of_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holes: OSError | None) -> None:
    """A bag without one is cut in its last page; holes: what a file system answers that cannot tell them."""
    monkeypatch.setattr(sqlite_pages.os, "lseek", Mock(side_effect=holes or os.lseek))
    images = [image[:20, :36] for image in FRAMES]
    base(tmp_path / "in.db3", images).close()
    data, path = bytearray((tmp_path / "in.db3").read_bytes()), tmp_path / "cut.db3"
    data[92:96] = bytes(4)  # as if a library from before 2010 had written last
    for size in offsets(len(data), 20):
        if size % 4096:
            path.write_bytes(data[:size])
            assert frames_of(path, images) >= (size - 20_000) // 4096


def test_pages_in_the_journal_are_no_loss_and_a_cut_one_is(tmp_path: Path) -> None:
    """A recorder that was killed: some pages are in the file, the others in NAME-wal."""
    with contextlib.closing(base(tmp_path / "in.db3", FRAMES[:12], journal="WAL")) as made:
        made.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        record(made, FRAMES[12:], 13)
        for name in ("in.db3", "in.db3-wal"):
            shutil.copy(tmp_path / name, tmp_path / name.replace("in", "killed"))
    path, journal = tmp_path / "killed.db3", tmp_path / "killed.db3-wal"
    main, later = path.read_bytes(), journal.read_bytes()

    def restore(cut_main: int, cut_journal: int) -> int:
        (tmp_path / "killed.db3-shm").unlink(missing_ok=True)
        path.write_bytes(main[:cut_main])
        journal.write_bytes(later[:cut_journal])
        return frames_of(path, FRAMES)

    assert restore(len(main), len(later)) == 24 and sqlite_pages.cut(path) == ""
    assert 12 <= restore(len(main), len(later) - 5000) < 24
    # Its first 20 kB are older pages that rows of the journal go on from.
    assert 0 < restore(len(main) - 6000, len(later)) <= 12
    for size in offsets(len(main), 20):
        restore(size, len(later))


@pytest.mark.parametrize("again", [False, True])
def test_deleted_rows_do_not_come_back(tmp_path: Path, again: bool) -> None:
    """again: rows that came later stand in the place of those that were deleted, before the others."""
    images = noise(60, 20, 36)
    made = base(tmp_path / "in.db3", images[:40])
    made.execute("PRAGMA secure_delete = OFF")
    made.execute("DELETE FROM messages WHERE id <= 20")
    record(made, images[40:] if again else [], 41)
    made.close()
    data, path, most = (tmp_path / "in.db3").read_bytes(), tmp_path / "cut.db3", 0
    for size in offsets(len(data), 30):
        path.write_bytes(data[:size])
        try:
            source = BagSource(path)
        except DataError:
            continue
        frames = list(source)
        stamps = [frame.stamp_ns for frame in frames]
        assert stamps == sorted(set(stamps)) and min(stamps, default=21) > 20 and source.losses
        assert all(np.array_equal(frame.data, images[frame.stamp_ns - 1]) for frame in frames)
        most = max(most, len(frames))
    assert most >= (35 if again else 15)


def packed(folder: Path, kind: str, listed: bool) -> Path:
    """The file of a bag, its metadata deleted unless `listed`."""
    bags.camera_bag(folder / "in.mcap", FRAMES)
    bag = bags.convert(folder / "in.mcap", folder / "bag", *kind.split())
    if not listed:
        (bag / "metadata.yaml").unlink()
    (file,) = (path for path in bag.iterdir() if path.name != "metadata.yaml")
    return file


@pytest.mark.parametrize("listed", [True, False], ids=["metadata", "no metadata"])
@pytest.mark.parametrize("kind", bags.PACKED)
def test_a_compressed_bag_cut_anywhere_gives_what_lies_before_the_cut(tmp_path: Path, kind: str, listed: bool) -> None:
    file = packed(tmp_path, kind, listed)
    data = file.read_bytes()
    assert frames_of(file.parent, FRAMES) == frames_of(file, FRAMES) == 24
    for size in offsets(len(data), 12):
        file.write_bytes(data[:size])
        frames_of(file.parent, FRAMES)
    file.write_bytes(data[: len(data) * 9 // 10])
    # zstd hands out whole blocks: 128 kB where a file was packed.
    assert frames_of(file.parent, FRAMES) >= (0 if "file" in kind else 18)


@pytest.mark.parametrize("kind", ["mcap file", "sqlite3 file"])
def test_a_file_cut_behind_several_blocks_gives_their_frames(tmp_path: Path, kind: str) -> None:
    images = noise(20, 64, 128)
    bags.camera_bag(tmp_path / "in.mcap", images)
    (file,) = bags.convert(tmp_path / "in.mcap", tmp_path / "bag", *kind.split()).glob("*.zstd")
    file.write_bytes(file.read_bytes()[:400_000])
    source = BagSource(file.parent)
    assert len(list(source)) >= 9 and frames_of(file.parent, images) >= 9
    assert "the compressed data end too early" in source.losses[0] and "what follows is lost" in source.losses[-1]


def test_one_damaged_message_of_a_compressed_bag_costs_only_itself(tmp_path: Path) -> None:
    file = packed(tmp_path, "sqlite3 message", True)
    with sqlite3.connect(file) as made:
        made.execute("UPDATE messages SET data = substr(data, 1, 700) WHERE id = 5")
    made.close()
    source = BagSource(file.parent)
    assert [int(np.array_equal(frame.data, FRAMES[2])) for frame in source] == [0] * 23
    assert len(source.losses) == 1 and "1 compressed message(s) are left out" in source.losses[0]


def test_a_damaged_checksum_hands_out_nothing_of_its_file(tmp_path: Path) -> None:
    bags.camera_bag(tmp_path / "in.mcap", FRAMES)
    data = bytearray(ZstdCompressor(write_checksum=True).compress((tmp_path / "in.mcap").read_bytes()))
    data[20_000] ^= 1  # among bytes that could not be made smaller, and stand there as they are
    (tmp_path / "in.mcap.zstd").write_bytes(data)
    with pytest.raises(DataError, match="its checksum is wrong"):
        BagSource(tmp_path / "in.mcap.zstd")


def test_a_recorder_killed_while_it_compressed_left_both_files(tmp_path: Path) -> None:
    """bag_0 is packed, of bag_1 only a part is, bag_2 was not even begun."""
    (folder := tmp_path / "bag").mkdir()
    for part in range(2):
        bags.camera_bag(folder / f"bag_{part}.mcap", FRAMES[part * 12 : part * 12 + 12])
        (folder / f"bag_{part}.mcap.zstd").write_bytes(
            ZstdCompressor().compress((folder / f"bag_{part}.mcap").read_bytes())[: 1000 if part else None]
        )
    (folder / "bag_0.mcap").unlink()
    (folder / "bag_2.mcap").touch()
    assert frames_of(folder, FRAMES) == 24
    source = BagSource(folder)
    assert len(list(source)) == 24 and "bag_2.mcap is lost as a whole: not a bag" in source.losses[0]
    for file in folder.glob("bag_[01]*"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="no file of the bag can be read"):
        BagSource(folder)


def test_another_compression_is_a_sentence(tmp_path: Path) -> None:
    file = packed(tmp_path, "mcap file", True)
    meta = file.parent / "metadata.yaml"
    meta.write_text(meta.read_text().replace("zstd", "lz4"))
    with pytest.raises(DataError, match="compressed in another way than zstd"):
        BagSource(file.parent)


def zeros(head: bytes, size: int, sized: bool = False) -> bytes:
    """A small zstd stream of `head` and zeros up to `size` bytes."""
    packer = ZstdCompressor(level=1).compressobj(size=size if sized else -1)
    parts, block = [packer.compress(head)], bytes(1 << 20)
    for left in range(size - len(head), 0, -len(block)):
        parts.append(packer.compress(block[:left]))
    return b"".join([*parts, packer.flush()])


@pytest.mark.parametrize("suffix", [".mcap", ".db3"])
def test_a_file_that_is_a_bomb_takes_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    (disk := tmp_path / "disk").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    path, losses = tmp_path / f"bomb{suffix}.zstd", list[str]()
    bags.camera_bag(tmp_path / "in.mcap", FRAMES[:2])
    base(tmp_path / "in.db3", FRAMES[:2]).close()
    path.write_bytes(zeros((tmp_path / f"in{suffix}").read_bytes(), 400_000_000))
    assert path.stat().st_size < 100_000
    with storage._Packed(path).unpacked(losses) as part:
        assert part.path.parent.parent == disk and part.path.stat().st_size == storage.MIN_ROOM
    assert list(disk.iterdir()) == [] and "unpacks to more than 64 MiB" in losses[0]
    monkeypatch.setattr(storage, "MIN_ROOM", 1 << 20)
    monkeypatch.setattr(storage, "MAX_RATIO", 1)
    source = BagSource(path)
    assert len(list(source)) == 2 and "more than 1 MiB, which is the limit for a file of its" in source.losses[0]
    monkeypatch.setattr(storage.shutil, "disk_usage", Mock(return_value=Mock(free=1 << 19)))
    assert len(list(source)) == 2
    assert f"half of the free disk of {disk}: free space there, or let TMPDIR" in source.losses[0]
    assert list(disk.iterdir()) == []
    monkeypatch.setattr(tempfile, "tempdir", str(disk / "absent"))
    with pytest.raises(UnavailableError, match=r"cannot unpack .*bomb"):
        BagSource(path)


@pytest.mark.parametrize("sized", [True, False])
def test_a_message_that_is_a_bomb_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sized: bool) -> None:
    monkeypatch.setattr(storage, "MAX_CHUNK", 1 << 22)
    made = base(tmp_path / "in.db3", FRAMES[:1])
    made.execute("INSERT INTO messages VALUES(9, 1, 9, ?)", (zeros(b"\0\1\0\0", 60_000_000, sized),))
    made.close()
    source = BagSource(tmp_path / "in.db3")
    assert len(list(source)) == 1 and "it unpacks to more than 4 MiB" in source.losses[0]


@pytest.mark.parametrize("table", ["messages", "topics"])
def test_rows_that_share_their_bytes_take_no_time(tmp_path: Path, table: str) -> None:
    """The rows of one leaf all go on at the same page: in a real bag no two rows share a byte."""
    made = base(tmp_path / "in.db3", noise(1, 200, 300) if table == "messages" else FRAMES[:1])
    made.execute("UPDATE topics SET qos = ?", ("-" * (100_000 if table == "topics" else 9),))
    (root,) = made.execute(f"SELECT rootpage FROM sqlite_master WHERE name = '{table}'").fetchone()
    made.close()
    data = bytearray((tmp_path / "in.db3").read_bytes())
    leaf = (root - 1) * 4096
    cell = int.from_bytes(data[leaf + 8 : leaf + 10], "big")
    local = bytes(data[leaf + cell : leaf + 4096])
    fits = (4096 - 300) // len(local)
    assert data[leaf] == 0x0D and local[3] == 1 and fits >= 2, "three bytes of length, then the key"
    for key in range(fits):
        at = 4096 - (key + 1) * len(local)
        data[leaf + at : leaf + at + len(local)] = local[:3] + bytes([key + 1]) + local[4:]
        for place in (key, fits + key):  # each is pointed to twice
            data[leaf + 8 + 2 * place : leaf + 10 + 2 * place] = at.to_bytes(2, "big")
    data[leaf + 3 : leaf + 5] = (2 * fits).to_bytes(2, "big")
    (tmp_path / "cut.db3").write_bytes(claiming(data, len(data) // 4096 + 1))
    found = CutBase(tmp_path / "cut.db3")
    assert found.topics == {1: ("/c/image", IMAGE)}
    rows = list(found.rows([1]))
    assert sum(row[2] is not None for row in rows) == 1 and len(rows) == (fits if table == "messages" else 1)


def test_one_row_that_says_it_is_longer_than_the_file_costs_only_itself(tmp_path: Path) -> None:
    base(tmp_path / "in.db3", images := noise(3, 100, 100)).close()
    data, size = (tmp_path / "in.db3").read_bytes(), len(serialise(image_message(images[1], "rgb8", 2)))

    def head(size: int) -> bytes:  # of the second row: length, key, types
        length, kind = (bytes([n >> 14 | 128, n >> 7 & 127 | 128, n & 127]) for n in (size + 8, 2 * size + 12))
        return length + b"\2\7\0\x09\1" + kind

    assert data.count(head(size)) == 1
    data = data.replace(head(size), head(size + 200 * 4092))  # so many pages more: as much of it is in the leaf
    (tmp_path / "cut.db3").write_bytes(claiming(data, len(data) // 4096 + 1))
    assert [row[2] is None for row in CutBase(tmp_path / "cut.db3").rows([1])] == [False, True, False]


def test_names_that_are_too_long_are_a_sentence_or_read(tmp_path: Path) -> None:
    base(tmp_path / "in.db3", FRAMES).close()
    path = tmp_path / ("a" * 248 + ".db3")  # no file can be named NAME-wal
    for least, size in ((24, None), (10, -20_000)):
        path.write_bytes((tmp_path / "in.db3").read_bytes()[:size])
        assert frames_of(path, FRAMES) >= least
    with pytest.raises(IgateError):
        BagSource(tmp_path / ("a" * 300))


def test_a_cut_file_with_holes_is_read_past_them(tmp_path: Path) -> None:
    base(path := tmp_path / "cut.db3", FRAMES).close()
    path.write_bytes(claiming(path.read_bytes(), 2**32 - 2))
    try:
        with path.open("r+b") as file:
            file.truncate(1 << 42)  # takes no disk
            os.lseek(file.fileno(), 1 << 41, getattr(os, "SEEK_DATA"))  # noqa: B009
        pytest.skip("this file system does not tell its holes")
    except (OSError, AttributeError) as error:
        if getattr(error, "errno", 0) != errno.ENXIO:
            pytest.skip(f"no file with holes here: {error}")
    assert frames_of(path, FRAMES) == 24


def test_the_page_of_the_lock_byte_is_never_missing(tmp_path: Path) -> None:
    base(path := tmp_path / "in.db3", FRAMES[:1], page=65536).close()
    path.write_bytes(claiming(path.read_bytes(), last := (1 << 30) // 65536 + 2))
    os.truncate(path, 1 << 30)
    path.with_name("in.db3-wal").write_bytes(bytes(32) + last.to_bytes(4, "big") * 2 + bytes(16 + 65536))
    assert sqlite_pages.cut(path) == ""


@pytest.mark.parametrize("seed", range(40))
def test_a_cut_sqlite_bag_with_any_bytes_in_it_ends_in_a_sentence(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base(tmp_path / "in.db3", FRAMES[:6]).close()
    data = np.frombuffer((tmp_path / "in.db3").read_bytes(), np.uint8)[: -int(rng.integers(1, 9000))].copy()
    heads = (np.arange(100, len(data)) % 4096) < 600  # where pages say what they hold
    places = rng.choice(np.flatnonzero(heads) + 100, 60)
    data[places] = rng.integers(0, 256, 60)
    (tmp_path / "cut.db3").write_bytes(data.tobytes())
    try:
        source = BagSource(tmp_path / "cut.db3")
    except DataError as error:
        assert error.cause and error.evidence
        return
    list(source)
    assert source.losses
