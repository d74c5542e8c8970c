"""Which frames are held out: one rule for training and for what a bundle reports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from igate_edge.cli_export import _Frames
from igate_edge.contract import OutputSpec, Preprocess
from igate_edge.training.config import TrainConfig
from igate_edge.training.folder import write_frame
from igate_edge.training.layout import DataInfo, HeldOut, held_out, write_info
from igate_edge.training.source import open_source

CONFIG = TrainConfig(tasks=("depth",), size=(32, 32), batch=2)


def write_data(folder: Path, **splits: int) -> Path:
    """Frames whose grey level is their number."""
    info = DataInfo(folder, {"depth": ()}, splits)
    folder.mkdir()
    write_info(info)
    for split, count in splits.items():
        for index in range(count):
            image = np.full((32, 32, 3), index, np.uint8)
            write_frame(info, split, index, {"image": image, "depth": np.ones((32, 32), np.float32)})
    return folder


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": 20, "val": 3}, HeldOut("val", 0, 3, "val")),
        ({"train": 29}, HeldOut("train", 27, 29, "last tenth of train")),
        ({"train": 4, "val": 0}, HeldOut("train", 3, 4, "last tenth of train")),
    ],
)
def test_the_rule(splits: dict[str, int], expected: HeldOut) -> None:
    assert held_out(DataInfo(Path("d"), {"depth": ()}, splits)) == expected


def test_a_bundle_is_measured_on_the_frames_that_training_left_out(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d", train=40)
    source = open_source(data, CONFIG)
    left_out = [round(float(x) * 0.25 * 255 + 0.5 * 255) for batch in source.val() for x in batch["image"][:, 0, 0, 0]]
    frames = _Frames(data, [OutputSpec("depth", "depth", 1, target="depth")], Preprocess(32, 32))
    assert source.frames == 36 and left_out == [36, 37, 38, 39]
    assert [int(frame["image"][0, 0, 0]) for frame in frames.held] == left_out
    assert [int(frame["image"][0, 0, 0]) for frame in frames.golden] == left_out
    assert max(int(image[0, 0, 0]) for image in frames.calibration) == 35
    assert frames.title == "last tenth of train"
