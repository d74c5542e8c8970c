"""The .igate file: what is written reads back, and nothing else is accepted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from igate_edge.bundle import FORMAT, MAX_MANIFEST_BYTES, MEMBERS, Bundle, canonical_json, write_bundle
from igate_edge.contract import OutputSpec, Preprocess
from igate_edge.errors import BundleError, InputError, UnavailableError

TASKS = (OutputSpec("seg", "semseg", 3), OutputSpec("tag", "classification", 2))


def content(frames: int = 4) -> dict:
    """A small but complete bundle's content; the reader does not look inside the ONNX members."""
    rng = np.random.default_rng(0)
    shapes = {"seg": (frames, 3, 2, 2), "tag": (frames, 2)}
    golden = {"frame": rng.integers(0, 256, (frames, 8, 8, 3), np.uint8)}
    for name, shape in shapes.items():
        golden[f"float/{name}"] = rng.standard_normal(shape).astype(np.float32)
        golden[f"int8/{name}"] = golden[f"float/{name}"] + np.float32(0.01)
    manifest = {
        "tasks": [spec.as_json() for spec in TASKS],
        "preprocess": Preprocess(8, 8).as_json(),
        "form": "plain",
        "calibration": {"count": 8, "method": "minmax", "sha256": "0" * 64},
        "tolerances": {spec.name: {"limit": 0.02} for spec in TASKS},
    }
    ranges = {"image": (-1.0, 1.0), "x/y:0": (0.0, 1 / 3)}
    return {
        "manifest": manifest,
        "model": bytes(range(256)) * 16,
        "plain": b"plain net",
        "ranges": ranges,
        "golden": golden,
    }


def write(path: Path, **changes: object) -> Bundle:
    parts = {**content(), **changes}
    return write_bundle(path, parts.pop("manifest"), **parts)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("bundle") / "good.igate"
    write(path)
    return path.read_bytes()


def members(data: bytes) -> list[bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [archive.read(name) for name in MEMBERS]


def as_zip(items: list[tuple[str, bytes]], comment: bytes = b"", method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip as the standard library writes it, with these members in this order (a name may come twice)."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in items:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, method)
        archive.comment = comment
    return out.getvalue()


def refused(path: Path, data: bytes, words: str | None = None) -> BundleError:
    path.write_bytes(data)
    with pytest.raises(BundleError, match=words) as caught:
        Bundle.read(path)
    assert caught.value.cause and caught.value.evidence and caught.value.fix
    return caught.value


def flips(good: bytes, path: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        at = rng.randrange(len(good))
        data = bytearray(good)
        data[at] ^= rng.randrange(1, 256)
        refused(path, bytes(data))


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.igate"
    written, read, parts = write(path), Bundle.read(path), content()
    assert (read.model, read.plain, read.ranges) == (parts["model"], parts["plain"], parts["ranges"])
    assert read.tasks == TASKS and read.preprocess == Preprocess(8, 8)
    assert read.golden.keys() == parts["golden"].keys()
    assert all(np.array_equal(read.golden[name], parts["golden"][name]) for name in read.golden)
    assert set(read.golden) >= {"int8/seg", "int8/tag"}
    assert (written.seal, written.manifest) == (read.seal, read.manifest)
    assert read.manifest["format"] == FORMAT and read.manifest["created_by"].startswith("igate_edge ")


def test_same_content_gives_the_same_bytes(tmp_path: Path, good: bytes) -> None:
    parts = content()
    reordered = {name: parts["golden"][name] for name in reversed(parts["golden"])}
    write(tmp_path / "a.igate", golden=reordered)
    assert (tmp_path / "a.igate").read_bytes() == good


def test_ordinary_zip_tools_can_list_it(good: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        assert tuple(archive.namelist()) == MEMBERS
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


def test_any_flipped_byte_is_refused(tmp_path: Path, good: bytes) -> None:
    flips(good, tmp_path / "a.igate", 500, seed=1)


@pytest.mark.slow
def test_ten_thousand_flips_are_refused(tmp_path: Path, good: bytes) -> None:
    flips(good, tmp_path / "a.igate", 10_000, seed=2)


def test_every_byte_of_the_zip_structure_counts(tmp_path: Path, good: bytes) -> None:
    tail_at = good.index(b"PK\1\2")
    for at in [*range(30 + len(MEMBERS[0])), *range(tail_at, len(good))]:
        refused(tmp_path / "a.igate", good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])


def test_truncation_is_refused_at_100_offsets(tmp_path: Path, good: bytes) -> None:
    for at in {0, len(good) - 1, *np.linspace(0, len(good) - 1, 100).astype(int).tolist()}:
        refused(tmp_path / "a.igate", good[:at])
    refused(tmp_path / "a.igate", good[:-1], "truncated")
    refused(tmp_path / "a.igate", b"", "not a bundle: a.igate is empty")


def test_added_bytes_are_refused(tmp_path: Path, good: bytes) -> None:
    refused(tmp_path / "a.igate", good + b"\0", "altered")
    refused(tmp_path / "a.igate", b"\0" + good, "not a bundle")


def test_swapped_and_extra_and_duplicate_members_are_refused(tmp_path: Path, good: bytes) -> None:
    path, data = tmp_path / "a.igate", members(good)
    comment = good[-(64 + 13) :]
    items = list(zip(MEMBERS, data, strict=True))
    swapped = [items[0], (MEMBERS[1], data[3]), items[2], (MEMBERS[3], data[1]), items[4]]
    refused(path, as_zip(swapped, comment))
    refused(path, as_zip([items[0], items[3], items[2], items[1], items[4]], comment))
    refused(path, as_zip([*items, ("extra.txt", b"hello")], comment))
    refused(path, as_zip(items[:-1], comment))
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = as_zip([*items, items[1]], comment)
    refused(path, twice)
    refused(path, as_zip([(f"m{i}", b"") for i in range(10_000)]), "not a bundle")
    refused(path, as_zip(items + [(f"m{i}", b"") for i in range(10_000)]))
    refused(path, as_zip(items, comment, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..\\x", "model.onnx\0", "CON", "a" * 60_000])
def test_names_that_leave_the_archive_are_refused(tmp_path: Path, good: bytes, name: str) -> None:
    data = members(good)
    items = [(MEMBERS[0], data[0]), (name, data[1]), *zip(MEMBERS[2:], data[2:], strict=True)]
    refused(tmp_path / "a.igate", as_zip(items, good[-(64 + 13) :]))
    assert os.listdir(tmp_path) == ["a.igate"]


def patched(data: bytes, **fields: object) -> bytes:
    """The bundle with its manifest changed and everything that depends on it written again: a consistent lie."""
    parts = members(data)
    manifest = {**json.loads(parts[0]), **fields}
    return rebuilt([canonical_json(manifest), *parts[1:]])


def rebuilt(parts: list[bytes]) -> bytes:
    seal = b"igate-sha256:" + hashlib.sha256(parts[0]).hexdigest().encode()
    out = bytearray(as_zip(list(zip(MEMBERS, parts, strict=True)), seal))
    at, end = 0, out.index(b"PK\1\2")
    for part, name in zip(parts, MEMBERS, strict=True):  # version 10 and no attributes, as the writer has it
        out[at + 4 : at + 6] = struct.pack("<H", 10)
        at += 30 + len(name) + len(part)
        out[end + 4 : end + 8], out[end + 36 : end + 42] = struct.pack("<2H", 10, 10), bytes(6)
        end += 46 + len(name)
    return bytes(out)


def test_the_helper_that_lies_consistently_gives_a_valid_bundle_when_it_tells_the_truth(
    tmp_path: Path, good: bytes
) -> None:
    assert patched(good) == good


def test_lying_sizes_are_refused(tmp_path: Path, good: bytes) -> None:
    sizes = json.loads(members(good)[0])["members"]
    for lie in (0, 1, -1, sizes["model.onnx"]["size"] + 1, 2**31, 2**62, 2**63 - 1, 1.5, True, None, "9", [9]):
        wrong = {**sizes, "model.onnx": {**sizes["model.onnx"], "size": lie}}
        refused(tmp_path / "a.igate", patched(good, members=wrong))
    moved = {name: dict(entry) for name, entry in sizes.items()}
    moved["model.onnx"]["size"] -= 1
    moved["plain.onnx"]["size"] += 1
    refused(tmp_path / "a.igate", patched(good, members=moved), "altered")


def test_small_file_that_claims_much_is_refused_with_little_memory(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "a.igate"
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 10, 0, 0, 0, 0x21, 0, 2**32 - 1, 2**32 - 1, len(MEMBERS[0]), 0)
    golden = struct.pack("<Q", 2**62) + b"{}"
    parts = members(good)
    nested = b"[" * (MAX_MANIFEST_BYTES - 10)
    hostile = [
        b"PK\3\4" + struct.pack("<Q", 2**62)[:6],
        local + MEMBERS[0].encode(),
        rebuilt([nested, *parts[1:]]),
        rebuilt([b'{"a":' * 100_000, *parts[1:]]),
        rebuilt([b"[" + b"[]," * (MAX_MANIFEST_BYTES // 4) + b"0]", *parts[1:]]),
        rebuilt([b'{"schema":' + b"9" * 5000 + b"}", *parts[1:]]),
        rehashed(parts, {4: golden}),
        rehashed(parts, {4: struct.pack("<Q", 2**63 - 1)}),
        rehashed(parts, {2: struct.pack("<Q", 100_000_000) + b"{" * 1000}),
    ]
    refused(path, b"warm up: imports are not part of the measurement")
    for data in hostile:
        tracemalloc.start()
        refused(path, data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 * len(data) + 400_000, (data[:60], peak)


def test_reading_takes_memory_near_the_file_size(tmp_path: Path) -> None:
    path = tmp_path / "a.igate"
    write(path, model=bytes(20_000_000))
    tracemalloc.start()
    bundle = Bundle.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(bundle.model) == 20_000_000 and peak < 1.1 * path.stat().st_size


def rehashed(parts: list[bytes], changes: dict[int, bytes]) -> bytes:
    """Members changed and the manifest's digests brought up to date."""
    parts = [changes.get(index, part) for index, part in enumerate(parts)]
    manifest = json.loads(parts[0])
    manifest["members"] = {
        name: {"sha256": hashlib.sha256(part).hexdigest(), "size": len(part)}
        for name, part in zip(MEMBERS[1:], parts[1:], strict=True)
    }
    return rebuilt([canonical_json(manifest), *parts[1:]])


def test_newer_schema_says_so(tmp_path: Path, good: bytes) -> None:
    error = refused(
        tmp_path / "a.igate", patched(good, schema=2, created_by="igate_edge 9.0"), "written by a newer igate_edge"
    )
    assert "schema 2" in error.evidence and "igate_edge 9.0" in error.evidence and "upgrade" in error.fix
    for schema in (0, -1, True, 1.0, "1", None):
        refused(tmp_path / "a.igate", patched(good, schema=schema), "altered")


def test_a_manifest_that_is_not_canonical_is_refused(tmp_path: Path, good: bytes) -> None:
    parts = members(good)
    spaced = json.dumps(json.loads(parts[0]), sort_keys=True).encode()
    for head in (
        spaced,
        parts[0][:-1] + b',"x":NaN}',
        parts[0][:-1] + b',"x":1e999}',
        parts[0].replace(b'"size"', b'"size":1,"size"'),
    ):
        refused(tmp_path / "a.igate", rebuilt([head, *parts[1:]]), "altered|not a bundle")
    refused(tmp_path / "a.igate", rebuilt([b"[]", *parts[1:]]), "not a bundle")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": []}, "tasks are absent"),
        ({"tasks": [TASKS[0].as_json()] * 2}, "named twice"),
        ({"tasks": [{**TASKS[0].as_json(), "kind": "smell"}]}, "incomplete"),
        ({"tasks": "seg"}, "incomplete"),
        ({"preprocess": {"height": 8}}, "incomplete"),
        ({"preprocess": Preprocess(9, 8).as_json()}, "golden frames of 9x8x3"),
        ({"preprocess": {**Preprocess(8, 8).as_json(), "height": 2**40}}, "not usable"),
        ({"preprocess": {**Preprocess(8, 8).as_json(), "std": [1.0, 0.0, 1.0]}}, "not usable"),
        ({"gates": [{"name": "s", "channels": 2, "open": {"seg": "01", "tag": "0"}}]}, "gates do not fit"),
        ({"gates": "x"}, "no list"),
        ({"training": [1]}, "of another type"),
        ({"results": {"float": 5}}, "of another type"),
        ({"results": {"rivals": {"plain": {"seg": {"miou": "high"}}}}}, "of another type"),
        ({"opset": None}, "of another type"),
        ({"tolerances": {}}, "incomplete"),
        ({"calibration": None}, "incomplete"),
        ({"form": "molten"}, "form or the calibration is not known"),
        ({"tolerances": {"seg": {"limit": 0.1}, "tag": {"limit": -1}}}, "not a positive number"),
    ],
)
def test_consistent_but_senseless_manifests_are_refused(tmp_path: Path, good: bytes, changes: dict, words: str) -> None:
    refused(tmp_path / "a.igate", patched(good, **changes), words)


def test_senseless_golden_members_are_refused_when_written(tmp_path: Path) -> None:
    golden, path = content()["golden"], tmp_path / "a.igate"
    cases = {
        "only 3 golden frames": content(3)["golden"],
        "float output of task 'seg' is absent": {name: a for name, a in golden.items() if name != "float/seg"},
        "is not finite": {**golden, "int8/tag": np.full_like(golden["int8/tag"], np.nan)},
        "of another type": {**golden, "int8/tag": golden["int8/tag"].astype(np.float64)},
        "differ in shape": {**golden, "int8/seg": np.zeros((4, 3, 1, 1), np.float32)},
        "labels of task 'seg' are uint8": {**golden, "label/seg": np.zeros((4, 9, 9), np.uint8)},
        "labels of task 'tag' are": {**golden, "label/tag": np.zeros((4, 2), np.int64)},
        "cannot be stored": {**golden, "label/tag": np.array(["a"] * 4)},
    }
    for words, arrays in cases.items():
        with pytest.raises(BundleError, match=words):
            write(path, golden=arrays)
    for pair in ((1.0, 0.0), (0.0, float("nan")), (0.0, float("inf"))):
        with pytest.raises(BundleError, match="bad activation range"):
            write(path, ranges={"x": pair})
    for ranges in ({"x": ("low", "high")}, None):
        with pytest.raises(BundleError, match="cannot be stored"):
            write(path, ranges=ranges)
    with pytest.raises(BundleError, match="not plain JSON"):
        write(path, manifest={**content()["manifest"], "x": float("nan")})
    assert not os.listdir(tmp_path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular"),
        (tmp_path / "no", "no such"),
    ):
        with pytest.raises(BundleError, match=words):
            Bundle.read(path)
    for wrong in (None, 0, b"a.igate", "a\0b", "a\ud800"):
        with pytest.raises(InputError, match="not a path"):
            Bundle.read(wrong)  # type: ignore[arg-type]


def test_an_ordinary_zip_and_a_pickle_are_not_bundles(tmp_path: Path) -> None:
    refused(tmp_path / "a.igate", as_zip([("data.pkl", b"x")]), "does not begin with manifest.json")
    refused(tmp_path / "a.igate", b"\x80\x04\x95junk", "not a bundle")


def test_failed_write_leaves_the_old_bundle(tmp_path: Path, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.igate"
    path.write_bytes(good)

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UnavailableError, match="No space left"):
        write(path, model=b"other")
    assert path.read_bytes() == good and os.listdir(tmp_path) == ["a.igate"]
