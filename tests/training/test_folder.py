"""The own folder format: what is written is read back, and every way to get it wrong is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from igate_edge.errors import DataError, UnavailableError
from igate_edge.training import folder as module
from igate_edge.training.folder import DataInfo, load_arrays, open_split, read_info, write_frame, write_info

CLASSES = ("floor", "box", "cup")
SHAPE = (6, 8)


def _frame(rng: np.random.Generator) -> dict[str, np.ndarray]:
    normals = rng.normal(size=(*SHAPE, 3))
    normals[..., 2] = -np.abs(normals[..., 2]) - 0.5
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return {
        "image": rng.integers(0, 256, (*SHAPE, 3), np.uint8),
        "semseg": rng.integers(0, 3, SHAPE).astype(np.uint8),
        "depth": rng.uniform(0.3, 5, SHAPE).astype(np.float32),
        "normals": normals.astype(np.float32),
        "edges": rng.integers(0, 2, SHAPE).astype(np.uint8),
        "instance": rng.integers(0, 60000, SHAPE).astype(np.uint16),
    }


@pytest.fixture
def made(tmp_path: Path) -> tuple[DataInfo, list[dict[str, np.ndarray]]]:
    """Three train frames and one val frame of every modality."""
    info = DataInfo(
        path=tmp_path / "set",
        tasks={"semseg": CLASSES, "depth": (), "normals": (), "edges": (), "label": ("a", "b"), "labels": CLASSES},
        splits={"train": 3, "val": 1},
        intrinsics={"fx": 8.0, "fy": 8.0, "cx": 4.0, "cy": 3.0},
        seed=5,
        extras=("instance",),
    )
    info.path.mkdir()
    write_info(info)
    rng = np.random.default_rng(0)
    frames = [_frame(rng) for _ in range(4)]
    frames[0]["semseg"][0, 0] = frames[0]["edges"][0, 1] = 255
    frames[0]["depth"][0, :4] = (0, np.nan, np.inf, 70.0)
    frames[0]["normals"][0, 0] = 0
    for k, frame in enumerate(frames):
        write_frame(info, "train" if k < 3 else "val", k % 3, frame)
    labels: dict[str, Any] = {
        "000000": {"label": 1, "labels": [0, 1, None]},
        "000001": {"label": None, "labels": [1, 1, 1]},
        "000002": {"label": -1},
    }
    (info.path / "train" / "labels.json").write_text(json.dumps(labels))
    (info.path / "val" / "labels.json").write_text(json.dumps({"000000": {"label": 0, "labels": [0, 0, 0]}}))
    return info, frames


def _edit(info: DataInfo, **changes: Any) -> None:
    path = info.path / "data.json"
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({key: value for key, value in data.items() if value != "absent"}))


def _save(info: DataInfo, name: str, array: np.ndarray) -> Path:
    path = info.path / "train" / name / "000001.png"
    Image.fromarray(array).save(path)
    return path


def test_round_trip(made) -> None:
    info, frames = made
    assert read_info(info.path) == info
    reader = open_split(info.path, "train")
    assert len(reader) == 3
    for got, put in zip(reader, frames[:3], strict=True):
        for name in ("image", "semseg", "edges", "instance"):
            assert got[name].dtype == put[name].dtype and np.array_equal(got[name], put[name])
        known = np.isfinite(put["depth"]) & (put["depth"] > 0) & (put["depth"] < 65.5)
        assert np.abs(got["depth"] - put["depth"])[known].max() <= 0.5e-3 + 1e-6 and not got["depth"][~known].any()
        # Half a step of 1/127 in each of three components.
        assert np.abs(got["normals"] - put["normals"]).max() < np.sqrt(3) * 0.5 / 127 + 1e-6
        assert got["normals"].dtype == got["depth"].dtype == np.float32
    first, second, third = reader
    assert (first["label"], second["label"], third["label"]) == (1, -1, -1)
    assert np.array_equal(first["labels"], [0, 1, np.nan], equal_nan=True)
    assert second["labels"].tolist() == [1, 1, 1] and np.isnan(third["labels"]).all()
    assert not first["normals"][0, 0].any()


def test_a_folder_written_by_hand(tmp_path) -> None:
    (tmp_path / "train" / "image").mkdir(parents=True)
    (tmp_path / "train" / "depth").mkdir()
    Image.fromarray(np.zeros((*SHAPE, 3), np.uint8)).save(tmp_path / "train/image/000000.jpg")
    Image.fromarray(np.full(SHAPE, 5000, np.uint16)).save(tmp_path / "train/depth/000000.png")
    text = '{"schema": 1, "tasks": {"depth": {"kind": "depth"}}, "splits": {"train": 1}, "depth_scale": 0.0002}'
    (tmp_path / "data.json").write_text(text)
    (frame,) = open_split(tmp_path, "train")
    assert np.allclose(frame["depth"], 1.0) and set(frame) == {"image", "depth"}


def test_classes_may_be_a_number_and_labels_bare_values(made) -> None:
    info, _ = made
    _edit(info, tasks={"label": {"kind": "classification", "classes": 2}})
    (info.path / "train" / "labels.json").write_text('{"000000": 1, "000001": 0, "000002": null}')
    assert read_info(info.path).tasks == {"label": ("class 0", "class 1")}
    assert [int(frame["label"]) for frame in open_split(info.path, "train")] == [1, 0, -1]


def test_another_ignore_value_is_read_as_255(made) -> None:
    info, frames = made
    _edit(info, ignore=0)
    want = np.where(frames[1]["semseg"] == 0, 255, frames[1]["semseg"])
    frame = open_split(info.path, "train")[1]
    assert np.array_equal(frame["semseg"], want) and np.array_equal(frame["edges"], frames[1]["edges"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "another schema: schema 2"),
        ({"schema": "absent"}, "another schema: schema None"),
        ({"tasks": {}}, "names no tasks"),
        ({"tasks": ["depth"]}, "names no tasks"),
        ({"tasks": {"flow": {"kind": "flow"}}}, "unknown modality 'flow'.*known: semseg, depth"),
        ({"tasks": {"depth": {"kind": "normals"}}}, "wrong kind for 'depth'.*'normals'"),
        ({"tasks": {"depth": "depth"}}, "wrong kind for 'depth'"),
        ({"tasks": {"semseg": {"kind": "semseg"}}}, "bad classes for 'semseg'"),
        ({"tasks": {"semseg": {"classes": ["a", "a"]}}}, "share a name"),
        ({"tasks": {"semseg": {"classes": 256}}}, "bad classes"),
        ({"tasks": {"semseg": {"classes": True}}}, "bad classes"),
        ({"splits": {}}, "names no splits"),
        ({"splits": {"train": -1}}, "bad split 'train'.*-1"),
        ({"splits": {"train": 2.0}}, "bad split"),
        ({"splits": {"../etc": 2}}, "bad split '../etc'"),
        ({"splits": {".hidden": 2}}, "bad split '.hidden'"),
        ({"depth_scale": 0}, "bad depth_scale.*: 0"),
        ({"depth_scale": float("nan")}, "bad depth_scale.*nan"),
        ({"depth_scale": "mm"}, "bad depth_scale"),
        ({"ignore": 256}, "bad ignore"),
        ({"ignore": True}, "bad ignore"),
        ({"normal_frame": "world"}, "another frame.*'world'"),
        ({"extras": ["flow"]}, "unknown extras"),
        ({"intrinsics": {"fx": 1.0}}, "incomplete intrinsics"),
        ({"intrinsics": {"fx": float("inf"), "fy": 1, "cx": 1, "cy": 1}}, "bad intrinsics"),
        ({"complete": False}, "not complete.*interrupted"),
    ],
)
def test_wrong_data_json(made, changes, message) -> None:
    info, _ = made
    _edit(info, **changes)
    with pytest.raises(DataError, match=message):
        open_split(info.path, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "broken JSON"),
        ('{"schema": 1,', "broken JSON.*line 1"),
        ("[]", "not a JSON object"),
        ("\xff", "broken JSON"),
    ],
)
def test_broken_data_json(tmp_path, text, message) -> None:
    (tmp_path / "data.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_info(tmp_path)


def test_missing_or_forbidden_data_json(tmp_path, monkeypatch) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match=r"missing data\.json"):
            read_info(place)
    (tmp_path / "data.json").mkdir()
    with pytest.raises(DataError, match="cannot read"):
        read_info(tmp_path)

    def forbidden(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(DataError, match=r"no permission to read .*data\.json"):
        read_info(tmp_path)


def test_splits_and_modalities_are_checked(made) -> None:
    info, _ = made
    with pytest.raises(DataError, match=r"no split 'test'.*train \(3\), val \(1\)"):
        open_split(info.path, "test")
    with pytest.raises(DataError, match="unknown modality 'flow'"):
        open_split(info.path, "train", ("flow",))
    write_info(replace(info, tasks={"depth": ()}, splits={"train": 3, "val": 0}))
    with pytest.raises(DataError, match="known modality 'semseg' is not in"):
        open_split(info.path, "train", ("semseg",))
    with pytest.raises(DataError, match="split 'val' of .* is empty"):
        open_split(info.path, "val")
    with pytest.raises(IndexError):
        open_split(info.path, "train")[3]


@pytest.mark.parametrize("name", ["image", "semseg", "depth", "normals", "edges", "instance"])
def test_a_missing_or_cut_file_is_named(made, name) -> None:
    info, _ = made
    path = info.path / "train" / name / "000001.png"
    path.write_bytes(path.read_bytes()[:50])
    reader = open_split(info.path, "train")
    assert reader[0]["image"].shape == (*SHAPE, 3)
    with pytest.raises(DataError, match=rf"corrupt .*{name}/000001\.png"):
        reader[1]
    path.unlink()
    with pytest.raises(DataError, match=rf"missing file .*{name}/000001\.png: .*3 frames in 'train'"):
        reader[1]


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "semseg",
            np.full(SHAPE, 3, np.uint8),
            "semseg label out of range in .*000001.png: value 3 on 48 pixels; 3 classes",
        ),
        ("edges", np.full(SHAPE, 2, np.uint8), "edges label out of range .*value 2"),
        ("semseg", np.zeros((5, 8), np.uint8), "differ in size: 5x8 against 6x8"),
        ("depth", np.ones((6, 9), np.uint16), "differ in size: 6x9 against 6x8"),
        ("semseg", np.zeros((*SHAPE, 3), np.uint8), "semseg label .* is not 8-bit with one channel: it is mode RGB"),
        ("semseg", np.zeros(SHAPE, np.uint16), "semseg label .*: it is 16-bit"),
        ("depth", np.ones(SHAPE, np.uint8), "depth label .* is not 16-bit"),
        ("instance", np.ones(SHAPE, np.uint8), "instance label .* is not 16-bit"),
        ("normals", np.zeros(SHAPE, np.uint8), "normals label .* is not 8-bit RGB"),
        ("normals", np.full((*SHAPE, 3), 140, np.uint8), "not unit vectors: median length 0.16"),
        ("image", np.zeros(SHAPE, np.uint16), "image is not 8-bit"),
    ],
)
def test_a_wrong_label_is_named(made, name, array, message) -> None:
    info, _ = made
    _save(info, name, array)
    with pytest.raises(DataError, match=message):
        open_split(info.path, "train")[1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"label": 2, "labels": [0, 0, 0]}, "label out of range for frame 000001 .*2; 2 classes"),
        ({"label": 1.0, "labels": [0, 0, 0]}, "label out of range"),
        ({"label": float("nan"), "labels": [0, 0, 0]}, "label out of range.*nan"),
        ({"label": True, "labels": [0, 0, 0]}, "label out of range"),
        ({"label": 1, "labels": [0, 0]}, "bad labels for frame 000001.*3 classes"),
        ({"label": 1, "labels": [0, 0, 0.5]}, "bad labels"),
        ({"label": 1, "labels": [0, 0, float("nan")]}, "bad labels"),
        ({"label": 1, "labels": 1}, "bad labels"),
    ],
)
def test_wrong_labels_json(made, value, message) -> None:
    info, _ = made
    path = info.path / "train" / "labels.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "000001": value}))
    with pytest.raises(DataError, match=message):
        open_split(info.path, "train")[1]


def test_absent_labels_are_named(made) -> None:
    info, _ = made
    path = info.path / "train" / "labels.json"
    path.write_text('{"0": 1}')
    with pytest.raises(DataError, match="no label for frame 000000"):
        open_split(info.path, "train")[0]
    path.write_text("[1]")
    with pytest.raises(DataError, match=r"labels\.json is not a JSON object"):
        open_split(info.path, "train")
    path.unlink()
    with pytest.raises(DataError, match=r"missing labels\.json"):
        open_split(info.path, "train")
    assert len(load_arrays(info.path, "train", ("depth",))["depth"]) == 3  # not asked for, not read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"semseg": np.zeros(SHAPE, np.int64)}, "'semseg' has type int64"),
        ({"image": np.zeros((*SHAPE, 3))}, "'image' has type float64"),
        ({"depth": np.zeros((*SHAPE, 1))}, "'depth' has 3 dimensions"),
        ({"depth": np.zeros((5, 8))}, "'depth' of frame 9 differs in size"),
        ({"normals": np.full((*SHAPE, 3), np.nan)}, "normals are not finite"),
        ({"edges": None}, "frame 9 has no 'edges'"),
    ],
)
def test_write_frame_refuses_what_cannot_be_read_back(made, change, message) -> None:
    info, frames = made
    frame = {name: array for name, array in {**frames[0], **change}.items() if array is not None}
    with pytest.raises(DataError, match=message):
        write_frame(info, "train", 9, frame)
    assert not (info.path / "train" / "image" / "000009.png").exists()


def test_write_frame_where_no_folder_can_be_made(made) -> None:
    info, frames = made
    (info.path / "test").write_text("a file")
    with pytest.raises(UnavailableError, match="cannot create"):
        write_frame(info, "test", 0, frames[0])


def test_load_arrays_is_compact_and_cached(made, monkeypatch) -> None:
    info, frames = made
    arrays = load_arrays(info.path, "train")
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "image": "uint8", "semseg": "uint8", "depth": "float16", "normals": "int8", "edges": "uint8",
        "label": "int64", "labels": "float32",
    }  # fmt: skip
    assert np.array_equal(arrays["image"][2], frames[2]["image"])
    assert np.abs(arrays["depth"][1] - frames[1]["depth"]).max() < 0.003  # float16 below 8 m: steps of 0.004
    # Rounded, normalised and rounded again: a step at most.
    assert np.abs(arrays["normals"][1] - frames[1]["normals"] * 127).max() <= 1.6
    assert (info.path / ".train.npz").is_file()
    monkeypatch.setattr(module, "read_image", None)  # a cached set opens no image
    again = load_arrays(info.path, "train")
    assert all(np.array_equal(arrays[name], again[name], equal_nan=name == "labels") for name in arrays)


def test_the_cache_follows_the_files_and_survives_damage(made) -> None:
    info, _ = made
    load_arrays(info.path, "train")
    sizes = set()
    for value in (2, 1):  # files of equal size: the time of change tells
        sizes.add(_save(info, "semseg", np.full(SHAPE, value, np.uint8)).stat().st_size)
        assert (load_arrays(info.path, "train")["semseg"][1] == value).all()
    assert len(sizes) == 1
    stored = info.path / ".train.npz"
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 0xFF
    for broken in (bytes(data), bytes(data[:100]), b"", b"PK"):
        stored.write_bytes(broken)
        assert (load_arrays(info.path, "train")["semseg"][1] == 1).all()
    assert set(load_arrays(info.path, "train", ("depth",))) == {"image", "depth"}
    stored.unlink()
    load_arrays(info.path, "train", cache=False)
    assert not stored.exists()


def test_a_folder_that_cannot_hold_the_cache_is_read_all_the_same(made) -> None:
    info, _ = made
    (info.path / ".train.npz").mkdir()
    assert len(load_arrays(info.path, "train")["image"]) == 3


def test_load_arrays_refuses_mixed_sizes(made) -> None:
    info, _ = made
    write_info(replace(info, tasks={"depth": ()}, extras=()))
    _save(info, "image", np.zeros((5, 8, 3), np.uint8))
    _save(info, "depth", np.ones((5, 8), np.uint16))
    with pytest.raises(DataError, match=r"differ in size: frame 1 is \(5, 8\), frame 0 \(6, 8\)"):
        load_arrays(info.path, "train")


def test_load_arrays_refuses_more_than_memory(made, monkeypatch) -> None:
    info, _ = made
    monkeypatch.setattr(module.os, "sysconf", lambda name: 1)
    with pytest.raises(DataError, match="does not fit into memory"):
        load_arrays(info.path, "train")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("semseg", np.full(SHAPE, 255, np.uint8)),
        ("edges", np.full(SHAPE, 255, np.uint8)),
        ("depth", np.zeros(SHAPE, np.uint16)),
        ("normals", np.full((*SHAPE, 3), 128, np.uint8)),
    ],
)
def test_a_task_without_any_label_is_refused(made, name, array) -> None:
    info, _ = made
    for k in range(3):
        Image.fromarray(array).save(info.path / "train" / name / f"{k:06d}.png")
    with pytest.raises(DataError, match=f"no valid {name!r} label"):
        load_arrays(info.path, "train")


def test_normals_that_point_away_are_refused(made) -> None:
    info, frames = made
    for k in range(3):
        write_frame(info, "train", k, {**frames[k], "normals": -frames[k]["normals"]})
    with pytest.raises(DataError, match="point away from the camera: 100% of pixels"):
        load_arrays(info.path, "train")
