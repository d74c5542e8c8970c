"""Cached engines: found by content, used only when whole, never the reason for a crash."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from igate_edge.runtime import cache

KEY = cache.cache_key({"model": "abc"})


def test_round_trip_and_absence(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    assert cache.load(folder, KEY) == (None, "")
    assert cache.store(folder, KEY, b"engine", {"a": [1, 2.5]}) == ""
    entry, reason = cache.load(folder, KEY)
    assert entry is not None and entry.payload == b"engine" and entry.meta == {"a": [1, 2.5], "key": KEY} and not reason
    assert os.listdir(folder) == [f"{KEY}.engine"]


def test_a_damaged_entry_is_never_loaded(tmp_path: Path) -> None:
    cache.store(tmp_path, KEY, b"engine" * 20, {"a": 1})
    path = tmp_path / f"{KEY}.engine"
    good, rng = path.read_bytes(), random.Random(0)
    damaged = [good[:at] for at in range(0, len(good), 7)] + [good + b"x", b"", b"junk" * 30]
    for _ in range(200):
        at = rng.randrange(len(good))
        damaged.append(good[:at] + bytes([good[at] ^ rng.randrange(1, 256)]) + good[at + 1 :])
    for data in damaged:
        path.write_bytes(data)
        entry, reason = cache.load(tmp_path, KEY)
        assert entry is None and path.name in reason


def test_the_header_is_judged_before_the_engine_is_read(tmp_path: Path) -> None:
    """A plan of another TensorRT is refused whatever its bytes are: here they are not even whole."""
    here = {"version": "10.3.0", "compute": "8.7"}
    cache.store(tmp_path, KEY, b"engine" * 20, {"made_for": here})
    assert cache.load(tmp_path, KEY, here)[0] is not None and cache.load(tmp_path, KEY)[0] is not None
    path = tmp_path / f"{KEY}.engine"
    path.write_bytes(path.read_bytes()[:-40])
    for change, words in (({"version": "10.3.1"}, "version 10.3.0, here 10.3.1"), ({"sms": "8"}, "sms None, here 8")):
        entry, reason = cache.load(tmp_path, KEY, {**here, **change})
        assert entry is None and f"built elsewhere ({words})" in reason
    assert "does not match its own checksum" in cache.load(tmp_path, KEY, here)[1]


def test_a_header_that_claims_to_be_huge_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / f"{KEY}.engine"
    for length in (2**62, 2**63 - 1, cache.MAX_HEADER + 1):
        path.write_bytes(cache._MAGIC + cache._HEAD.pack(b"x" * 32, length) + b"{}")
        assert "does not match its own checksum" in cache.load(tmp_path, KEY)[1]


def test_entries_of_one_network_are_found_the_newest_first(tmp_path: Path) -> None:
    keys = [cache.cache_key({"mode": mode}) for mode in ("15W", "25W", "MAXN", "other net")]
    for number, key in enumerate(keys):
        cache.store(tmp_path, key, b"engine", {"slot": "b" if number == 3 else "a"})
        os.utime(tmp_path / f"{key}.engine", (1000 + number, 1000 + number))
    (tmp_path / "junk.engine").write_bytes(b"junk")
    assert cache.alike(tmp_path, "a", keys[2]) == [keys[1], keys[0]]
    assert cache.alike(tmp_path / "absent", "a", "") == []


FULL = """
import resource, signal, sys
from pathlib import Path
from igate_edge.runtime import cache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
print(cache.store(Path(sys.argv[1]), sys.argv[2], b"new" * 5000, {}))
"""


def test_a_full_disk_keeps_the_old_engine_and_says_so(tmp_path: Path) -> None:
    cache.store(tmp_path, KEY, b"old", {})
    command = [sys.executable, "-c", FULL, str(tmp_path), KEY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("the engine was not cached, so every start builds it again"), done.stderr
    entry, _ = cache.load(tmp_path, KEY)
    assert entry is not None and entry.payload == b"old" and os.listdir(tmp_path) == [f"{KEY}.engine"]


def test_only_the_engines_used_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEEP", 3)
    keys = [cache.cache_key({"model": str(number)}) for number in range(5)]
    for number, key in enumerate(keys[:3]):
        cache.store(tmp_path, key, b"engine", {})
        os.utime(tmp_path / f"{key}.engine", (1000 + number, 1000 + number))
    assert cache.load(tmp_path, keys[0])[0] is not None, "using it makes it new"
    (tmp_path / "notes.txt").write_text("not ours")
    cache.store(tmp_path, keys[3], b"engine", {})
    assert sorted(os.listdir(tmp_path)) == sorted([*(f"{keys[k]}.engine" for k in (0, 2, 3)), "notes.txt"])


def test_an_entry_under_another_key_is_not_used(tmp_path: Path) -> None:
    cache.store(tmp_path, KEY, b"engine", {})
    other = cache.cache_key({"model": "abd"})
    (tmp_path / f"{KEY}.engine").rename(tmp_path / f"{other}.engine")
    entry, reason = cache.load(tmp_path, other)
    assert entry is None and "built for something else" in reason


def test_a_folder_that_cannot_be_written_is_a_sentence_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    problem = cache.store(tmp_path / "file", KEY, b"engine", {})
    assert problem.startswith("the engine was not cached")
    (tmp_path / f"{KEY}.engine").mkdir()
    assert "not cached" in cache.store(tmp_path, KEY, b"engine", {})
    assert "cannot be read" in cache.load(tmp_path, KEY)[1]


def test_the_key_depends_on_content_only() -> None:
    parts = {
        "model": "m",
        "scales": "s",
        "options": {"threads": 1},
        "backend": {"version": "1.0"},
        "device": {"cpu": "x"},
    }
    keys = {cache.cache_key(parts)}
    for name in parts:
        keys.add(cache.cache_key({**parts, name: "changed"}))
    assert len(keys) == 1 + len(parts)
    assert cache.cache_key(dict(reversed(parts.items()))) == cache.cache_key(parts)


def test_default_folder_follows_the_platform_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_dir() == tmp_path / "igate_edge"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative/dir"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.default_dir() == tmp_path / "home" / ".cache" / "igate_edge"


def test_fingerprint_names_the_processor(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor : 0\nmodel name : Fast CPU 9\nflags : sse avx vnni\n\nprocessor : 1\nmodel name : other\n"
    )
    first = cache.fingerprint(info)
    assert first["cpu"] == "Fast CPU 9"
    info.write_text("model name : Fast CPU 9\nflags : vnni avx sse\n")
    assert cache.fingerprint(info) == first
    info.write_text("model name : Fast CPU 9\nflags : sse avx\n")
    assert cache.fingerprint(info) != first
    info.write_text("CPU implementer : 0x41\nCPU part : 0xd42\nFeatures : asimd dotprod\n")
    assert cache.fingerprint(info)["cpu"] == "0x41 0xd42"
    assert cache.fingerprint(tmp_path / "absent")["machine"]
