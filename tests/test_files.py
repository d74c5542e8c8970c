"""Files are whole or absent, whatever stops the writer; what an earlier writer left goes away."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from igate_edge.errors import UnavailableError
from igate_edge.files import STALE_S, atomic_writer, check_writable, write_atomic


def test_a_file_is_replaced_in_one_step_and_nothing_else_remains(tmp_path: Path) -> None:
    for data in (b"old", "new"):
        write_atomic(tmp_path / "a.bin", data)
    assert (tmp_path / "a.bin").read_text() == "new" and os.listdir(tmp_path) == ["a.bin"]


def test_the_mode_is_what_the_umask_says_and_the_umask_is_never_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")
            write_atomic(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~0o027


def test_only_old_temporaries_of_the_same_file_are_deleted(tmp_path: Path) -> None:
    names = [".a.bin.0123.tmp", ".a.bin.4567.tmp", ".b.bin.0123.tmp", "a.bin.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    for name in (names[0], *names[2:]):
        os.utime(tmp_path / name, (time.time() - STALE_S - 60,) * 2)
    write_atomic(tmp_path / "a.bin", b"whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], "a.bin"])


def test_an_error_of_the_caller_stays_what_it_is(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    with pytest.raises(FileNotFoundError, match="other"), atomic_writer(tmp_path / "a") as file:
        file.write(b"new")
        (tmp_path / "other").read_bytes()
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_full_disk_at_any_write_is_a_sentence(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full (Linux)")
    write_atomic(tmp_path / "a", b"old")
    with (
        pytest.raises(UnavailableError, match="cannot write .*a: No space left"),
        atomic_writer(tmp_path / "a") as file,
    ):
        with open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), file.fileno())
        file.write(bytes(1 << 20))
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_the_folder_is_synced_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (kinds.append(stat.S_IFMT(os.fstat(fd).st_mode)), sync(fd))[1])
    write_atomic(tmp_path / "a", b"x")
    assert kinds == [stat.S_IFREG, stat.S_IFDIR]


def test_a_name_that_is_too_long_is_a_sentence(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 300)
    for write in (lambda: write_atomic(place, b"x"), lambda: check_writable(place)):
        with pytest.raises(UnavailableError, match="File name too long"):
            write()


def test_writing_is_tried_without_a_trace(tmp_path: Path) -> None:
    place = tmp_path / "kept.bin"
    write_atomic(place, b"old")
    check_writable(place)
    check_writable(tmp_path / "new.bin")
    assert place.read_bytes() == b"old" and os.listdir(tmp_path) == ["kept.bin"]
    with pytest.raises(UnavailableError, match="no/such"):
        check_writable(tmp_path / "no/such/file")
