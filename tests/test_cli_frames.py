"""`igate run` never destroys what it reads nor what it wrote; and it says at once which package is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tinynet
from igate_command import igate, refused
from PIL import Image

from igate_edge.cli_frames import FrameNames, open_frames
from igate_edge.contract import OutputSpec
from igate_edge.errors import DataError
from igate_edge.package import package

FRAMES = tinynet.frames(8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_results_never_overwrite_their_input(bundle: Path, tmp_path: Path) -> None:
    folder, linked = tmp_path / "in", tmp_path / "linked"
    folder.mkdir()
    linked.mkdir()
    for name in ("a.png", "a_seg.png"):
        Image.fromarray(FRAMES[0]).save(folder / name)
    (folder / "clip.mp4").write_bytes(b"0")
    (linked / "b.png").symlink_to(folder / "a.png")
    np.save(folder / "x.npy", FRAMES[0])
    before = contents(folder)
    for source in (folder, folder / "a.png", folder / "x.npy", folder / "*.png", linked / "b.png", linked):
        refused(igate("run", bundle, source, "--out", folder, "--json"), 2, "overwrite the input", "--out")
    assert contents(folder) == before


def test_a_video_is_not_overwritten_by_its_own_film(bundle: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is an extra: pip install 'igate-edge[video]'")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    before = path.read_bytes()
    refused(igate("run", bundle, path, "--out", tmp_path, "--json"), 2, "overwrite the input")
    assert path.read_bytes() == before


def test_a_video_without_frames_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av", reason="PyAV is an extra: pip install 'igate-edge[video]'")
    monkeypatch.setattr("igate_edge.cli_frames._pictures", lambda source: iter(()))
    with pytest.raises(DataError, match="the input holds no frame: .*x.png"):
        open_frames(tmp_path / "x.png")


def test_a_frame_called_like_anothers_mask_keeps_its_own_files(bundle: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a.png", "a_seg.png", "A.jpg"):
        Image.fromarray(FRAMES[0]).save(folder / name)
    result = igate("run", bundle, folder, "--out", out, "--cache", tmp_path / "c", "--json")
    files = result.json["files"]
    assert len(files) == len(set(files)) == 3 * 4
    assert {name.casefold() for name in contents(out)} == {Path(file).name.casefold() for file in files}
    assert {path.stem for path in out.glob("*.npz")} == {"A", "a_2", "a_seg_2"}, (
        "a_seg.png is the mask of A where letter case is ignored"
    )


def test_tasks_whose_names_look_alike_get_a_file_each() -> None:
    names = FrameNames([OutputSpec("x y", "depth", 1), OutputSpec("x/y", "depth", 1)])
    assert [names.free("f"), names.free("f"), names.free("F_x_y")] == ["f", "f_2", "F_x_y_3"]


def test_a_report_does_not_overwrite_its_bundle(bundle: Path) -> None:
    before = bundle.read_bytes()
    refused(igate("report", bundle, "--out", bundle, "--json"), 2, "overwrite the bundle")
    assert bundle.read_bytes() == before


def blocked(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`igate ARGUMENTS` in a fresh interpreter in which `module` cannot be imported."""
    code = f"import sys; sys.modules[{module!r}] = None\nfrom igate_edge.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def commands(bundle: Path, tmp_path: Path) -> list[list[object]]:
    np.save(tmp_path / "x.npy", FRAMES[0])
    out = tmp_path / "out"
    return [
        ["run", bundle, tmp_path / "x.npy", "--out", out / "run", "--cache", tmp_path / "c"],
        ["report", bundle, "--out", out / "report.html", "--no-bench", "--cache", tmp_path / "c"],
        ["demo", "--bundle", bundle, "--out", out / "demo"],
    ]


def test_without_pillow_run_report_and_demo_name_the_extra_before_they_begin(bundle: Path, tmp_path: Path) -> None:
    for command in commands(bundle, tmp_path):
        done = blocked("PIL", *command, "--json")
        assert done.returncode == 3, done.stdout + done.stderr
        assert json.loads(done.stdout)["fix"] == "pip install 'igate-edge[images]'"
        assert not (tmp_path / "out").exists() and not (tmp_path / "c").exists()


def test_run_report_and_demo_need_no_torch(bundle: Path, tmp_path: Path) -> None:
    for command in commands(bundle, tmp_path):
        done = blocked("torch", *command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert {"run", "report.html", "demo"} == {path.name for path in (tmp_path / "out").iterdir()}
