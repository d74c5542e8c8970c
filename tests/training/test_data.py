"""Torch batches: one preprocessing, seeded augmentation, exact resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from igate_edge.contract import Preprocess
from igate_edge.errors import DataError
from igate_edge.runtime.preprocess import to_input
from igate_edge.training.data import FrameDataset
from igate_edge.training.folder import DataInfo, load_arrays, write_frame, write_info

COUNT, HEIGHT, WIDTH = 5, 6, 8
SCALED = Preprocess(HEIGHT, WIDTH, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(COUNT, HEIGHT, WIDTH, 3)) - (0, 0, 3)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[:, 0, 0] = 0
    return {
        "image": rng.integers(0, 256, (COUNT, HEIGHT, WIDTH, 3), np.uint8),
        "semseg": rng.integers(0, 3, (COUNT, HEIGHT, WIDTH)).astype(np.uint8),
        "depth": rng.uniform(0.3, 5, (COUNT, HEIGHT, WIDTH)).astype(np.float16),
        "normals": np.rint(normals * 127).astype(np.int8),
        "edges": rng.integers(0, 2, (COUNT, HEIGHT, WIDTH)).astype(np.uint8),
        "label": np.arange(COUNT) - 1,
        "labels": np.where(rng.random((COUNT, 2)) < 0.3, np.nan, 1).astype(np.float32),
    }


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(torch.nan_to_num(a[k], -9), torch.nan_to_num(b[k], -9)) for k in a)


def test_batch_has_the_promised_types(arrays) -> None:
    batch = FrameDataset(arrays).batch([0, 3])
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "image": (torch.float32, (2, 3, 6, 8)),
        "semseg": (torch.uint8, (2, 6, 8)),
        "depth": (torch.float32, (2, 6, 8)),
        "normals": (torch.float32, (2, 3, 6, 8)),
        "edges": (torch.uint8, (2, 6, 8)),
        "label": (torch.int64, (2,)),
        "labels": (torch.float32, (2, 2)),
    }
    length = batch["normals"].norm(dim=1)
    assert not length[:, 0, 0].any() and torch.allclose(length[:, 1:], torch.ones(()))
    assert batch["label"].tolist() == [-1, 2]
    assert np.array_equal(batch["depth"][1].numpy(), arrays["depth"][3].astype(np.float32))


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (9, 5), (3, 4)])
def test_image_is_what_the_runtime_would_feed(arrays, size) -> None:
    """Cases Q10: one preprocessing for training, calibration and runtime."""
    preprocess = Preprocess(*size, SCALED.mean, SCALED.std)
    batch = FrameDataset(arrays, preprocess=preprocess).batch(range(COUNT))
    for k in range(COUNT):
        want = to_input(arrays["image"][k], preprocess)
        assert np.abs(batch["image"][k : k + 1].numpy() - want).max() < 1e-5
    assert batch["semseg"].shape == (COUNT, HEIGHT, WIDTH)


def test_flip_mirrors_every_map_and_negates_x(arrays) -> None:
    plain, augmented = FrameDataset(arrays), FrameDataset(arrays, augment=True)
    kinds = set()
    for epoch in range(4):
        got, want = augmented.batch(range(COUNT), epoch), plain.batch(range(COUNT))
        for k in range(COUNT):
            flipped = not torch.equal(got["semseg"][k], want["semseg"][k])
            kinds.add(flipped)
            for name in ("semseg", "depth", "edges"):
                assert torch.equal(got[name][k], want[name][k].flip(-1) if flipped else want[name][k])
            normals = want["normals"][k].flip(-1) * torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
            assert torch.equal(got["normals"][k], normals if flipped else want["normals"][k])
            # Colours are jittered, not shuffled: the image goes along with its labels.
            image = want["image"][k].flip(-1) if flipped else want["image"][k]
            close = torch.corrcoef(torch.stack([got["image"][k].flatten(), image.flatten()]))[0, 1]
            assert close > 0.8
    assert kinds == {True, False}


def test_augmentation_leaves_the_arrays_alone(arrays) -> None:
    before = {name: array.copy() for name, array in arrays.items()}
    FrameDataset(arrays, augment=True).batch(range(COUNT))
    assert all(np.array_equal(before[name], arrays[name], equal_nan=name == "labels") for name in arrays)


def test_jitter_stays_in_range_and_varies(arrays) -> None:
    data = FrameDataset(arrays, augment=True)
    images = [data.batch([0], epoch)["image"] for epoch in range(6)]
    assert all(image.min() >= 0 and image.max() <= 1 for image in images)
    assert len({round(float(image.mean()), 4) for image in images}) == 6
    assert torch.equal(images[2], data.batch([0], 2)["image"])
    assert not torch.equal(images[2], FrameDataset(arrays, augment=True, seed=1).batch([0], 2)["image"])


def test_frames_of_a_batch_are_augmented_each_on_its_own(arrays) -> None:
    arrays["image"][:] = arrays["image"][0]
    images = FrameDataset(arrays, tasks=[], augment=True).batch(range(COUNT))["image"]
    assert len({round(float(image.mean()), 4) for image in images}) == COUNT


def test_a_frame_is_augmented_alike_whoever_asks(arrays) -> None:
    data = FrameDataset(arrays, augment=True, seed=3)
    data.set_epoch(2)
    whole = data.batch(range(COUNT), 2)
    for workers in (0, 2):
        loader = DataLoader(data, batch_size=2, num_workers=workers)
        parts = list(loader)
        joined = {name: torch.cat([part[name] for part in parts]) for name in whole}
        assert _same(joined, whole)


def test_an_epoch_shows_every_frame_once(arrays) -> None:
    data = FrameDataset(arrays, tasks=["label"], seed=1)
    labels = torch.cat([data.batch_at(step, 2)["label"] for step in range(10)]) + 1  # 20 frames: four epochs of five
    epochs = labels.view(4, COUNT).tolist()
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_batches_larger_than_the_set_run_across_epochs(arrays) -> None:
    labels = FrameDataset(arrays, tasks=["label"]).batch_at(0, 12)["label"]
    assert sorted(torch.bincount(labels + 1).tolist()) == [2, 2, 2, 3, 3]  # 12 = two epochs of five and two frames


def test_a_restart_repeats_the_stream_exactly(arrays) -> None:
    data, again, other = (FrameDataset(arrays, preprocess=SCALED, seed=seed, augment=True) for seed in (4, 4, 5))
    whole, rest = [data.batch_at(step, 2) for step in range(7)], [again.batch_at(step, 2) for step in range(4, 7)]
    assert all(_same(a, b) for a, b in zip(whole[4:], rest, strict=True))
    assert not _same(whole[0], other.batch_at(0, 2))


def test_evaluation_sees_every_frame_in_order(arrays) -> None:
    parts = list(FrameDataset(arrays).in_order(2))
    assert [len(part["image"]) for part in parts] == [2, 2, 1]
    assert torch.cat([part["label"] for part in parts]).tolist() == [-1, 0, 1, 2, 3]


def test_a_folder_and_its_arrays_give_the_same_batches(arrays, tmp_path: Path) -> None:
    tasks = {"semseg": ("a", "b", "c"), "depth": (), "normals": (), "edges": ()}
    info = DataInfo(tmp_path, tasks, {"train": COUNT})
    write_info(info)
    for k in range(COUNT):
        frame = {name: arrays[name][k] for name in ("image", "semseg", "depth", "edges")}
        write_frame(info, "train", k, {**frame, "normals": arrays["normals"][k] / 127})
    one, two = FrameDataset(tmp_path, augment=True), FrameDataset(load_arrays(tmp_path, "train"), augment=True)
    assert len(one) == len(two) == COUNT and one.preprocess == Preprocess(HEIGHT, WIDTH)
    assert _same(one.batch_at(3, 2), two.batch_at(3, 2)) and _same(one[4], two[4])
    assert set(FrameDataset(tmp_path, tasks=["depth"])[0]) == {"image", "depth"}
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(tmp_path / "train/image/000001.png")
    with pytest.raises(DataError, match="differ in size"):
        FrameDataset(tmp_path, tasks=[]).batch([0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "lack image"),
        ({"image": np.zeros((COUNT, HEIGHT, WIDTH, 3), np.float32)}, "'image' must be uint8.*float32"),
        ({"image": np.zeros((COUNT, 3, HEIGHT, WIDTH), np.uint8)}, "wrong shape"),
        ({"image": np.zeros((0, HEIGHT, WIDTH, 3), np.uint8)}, "wrong shape"),
        ({"semseg": np.zeros((COUNT, HEIGHT, WIDTH), np.int64)}, "'semseg' must be uint8"),
        ({"depth": np.zeros((COUNT, HEIGHT, 9))}, "'depth' has a wrong shape"),
        ({"depth": np.zeros((COUNT - 1, HEIGHT, WIDTH))}, "'depth' has a wrong shape"),
        ({"normals": np.zeros((COUNT, 3, HEIGHT, WIDTH))}, "'normals' has a wrong shape"),
        ({"label": np.zeros((COUNT, 1), int)}, "'label' has a wrong shape"),
    ],
)
def test_wrong_arrays_are_named(arrays, change, message) -> None:
    wrong = {name: array for name, array in {**arrays, **change}.items() if array is not None}
    with pytest.raises(DataError, match=message):
        FrameDataset(wrong)


def test_a_task_that_is_not_there_is_named(arrays) -> None:
    with pytest.raises(DataError, match="lack flow.*they hold image"):
        FrameDataset(arrays, tasks=["flow"])
    with pytest.raises(IndexError):
        FrameDataset(arrays)[COUNT]
