"""Rendered frames: exact labels, the same bits whoever renders, and a folder that survives interruption."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from igate_edge.errors import DataError
from igate_edge.training import tabletop
from igate_edge.training.folder import SplitReader, read_info
from igate_edge.training.layout import write_info
from igate_edge.training.raycast import Camera, camera_rays
from igate_edge.training.tabletop_parts import CLASSES

pytest.importorskip("mujoco")
SIZE = (48, 64)


def _rays(camera: Camera) -> np.ndarray:
    rows, columns = np.divmod(np.arange(SIZE[0] * SIZE[1]), SIZE[1])
    return camera_rays(camera, SIZE, rows + 0.5, columns + 0.5)


def test_frame_has_the_promised_types() -> None:
    frame = tabletop.render(1, 0, SIZE)
    types = {name: (array.dtype.str.lstrip("<|"), array.shape) for name, array in frame.items()}
    assert types == {
        "image": ("u1", (48, 64, 3)),
        "semseg": ("u1", (48, 64)),
        "depth": ("f4", (48, 64)),
        "normals": ("f4", (48, 64, 3)),
        "edges": ("u1", (48, 64)),
        "instance": ("u2", (48, 64)),
    }
    assert frame["semseg"].max() < len(CLASSES) and set(np.unique(frame["edges"])) == {0, 1}
    assert frame["image"].std() > 10


def test_a_frame_depends_on_seed_and_index_alone() -> None:
    first = tabletop.render(3, 5, SIZE)
    tabletop.render(3, 4, SIZE)
    again = tabletop.render(3, 5, SIZE)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for other in (tabletop.render(3, 6, SIZE), tabletop.render(4, 5, SIZE)):
        assert not np.array_equal(first["depth"], other["depth"])


def test_labels_agree_with_each_other() -> None:
    for index in range(4):
        frame = tabletop.render(2, index, SIZE)
        known = frame["depth"] > 0
        length = np.linalg.norm(frame["normals"], axis=-1)
        assert np.allclose(length[known], 1, atol=1e-5) and not length[~known].any()
        assert not frame["instance"][~known].any() and frame["instance"][known].all()
        assert not frame["semseg"][~known].any()
        # One instance is of one class; visible surfaces face the camera along their own ray.
        for instance in np.unique(frame["instance"]):
            assert len(np.unique(frame["semseg"][frame["instance"] == instance])) == 1
        rays = _rays(Camera(np.zeros(3), np.eye(3), tabletop.FOVY)).reshape(*SIZE, 3)
        assert ((frame["normals"] * rays).sum(-1)[known] < 1e-5).all()


def test_sets_show_every_class() -> None:
    seen = {int(k) for index in range(12) for k in np.unique(tabletop.render(1, index, SIZE)["semseg"])}
    assert seen == set(range(len(CLASSES)))


def test_generate_keeps_finished_frames_and_goes_on(tmp_path, monkeypatch) -> None:
    drawn: list[int] = []
    true_render = tabletop.render

    def render(seed: int, index: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(index)
        return true_render(seed, index, size)

    monkeypatch.setattr(tabletop, "render", render)
    with pytest.raises(KeyboardInterrupt):
        tabletop.generate(tmp_path / "d", 3, 1, 7, SIZE, progress=False)
    assert drawn == [0, 1] and not read_info(tmp_path / "d").complete
    monkeypatch.setattr(tabletop, "render", true_render)
    info = tabletop.generate(tmp_path / "d", 3, 1, 7, SIZE, progress=False)
    assert info.complete and read_info(tmp_path / "d") == info
    monkeypatch.setattr(tabletop, "render", None)  # a finished set calls it no more
    assert tabletop.generate(tmp_path / "d", 3, 1, 7, SIZE, progress=False) == info
    val = SplitReader(info, "val")[0]
    assert np.array_equal(val["image"], true_render(7, tabletop.VAL_START, SIZE)["image"])


def test_generate_mends_a_lost_file(tmp_path) -> None:
    info = tabletop.generate(tmp_path, 2, 0, 7, SIZE, progress=False)
    lost = tmp_path / "train/depth/000001.png"
    before = lost.read_bytes()
    lost.unlink()
    tabletop.generate(tmp_path, 2, 0, 7, SIZE, progress=False)
    assert lost.read_bytes() == before and info.complete


def test_workers_do_not_change_a_bit(tmp_path) -> None:
    tabletop.generate(tmp_path / "one", 3, 0, 7, SIZE, progress=False)
    tabletop.generate(tmp_path / "two", 3, 0, 7, SIZE, workers=2, progress=False)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 1 + 3 * 6
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_generate_refuses_a_folder_with_other_contents(tmp_path) -> None:
    tabletop.generate(tmp_path / "d", 1, 0, 7, SIZE, progress=False)
    with pytest.raises(DataError, match=r"another data set.*\"seed\": 7.*\"seed\": 8"):
        tabletop.generate(tmp_path / "d", 1, 0, 8, SIZE, progress=False)
    (tmp_path / "own" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="train/ without data.json"):
        tabletop.generate(tmp_path / "own", 1, 0, 7, SIZE, progress=False)
    info = read_info(tmp_path / "d")
    write_info(replace(info, generator={}))  # a set made by hand
    with pytest.raises(DataError, match="another data set"):
        tabletop.generate(tmp_path / "d", 1, 0, 7, SIZE, progress=False)
    assert json.loads((tmp_path / "d" / "data.json").read_text())["generator"] == {}


@pytest.mark.parametrize(
    "wrong", [{"train": 0}, {"val": -1}, {"workers": 0}, {"seed": -1}, {"size": (4, 64)}], ids=lambda w: next(iter(w))
)
def test_generate_refuses_senseless_parameters(tmp_path, wrong) -> None:
    with pytest.raises(DataError, match="cannot generate"):
        tabletop.generate(tmp_path / "d", **{"train": 1, "val": 0, "size": SIZE, **wrong})
    assert not (tmp_path / "d").exists()


def test_render_refuses_senseless_parameters() -> None:
    for arguments in ((-1, 0, SIZE), (0, -1, SIZE), (0, 0, (7, 64))):
        with pytest.raises(DataError, match="cannot render"):
            tabletop.render(*arguments)
