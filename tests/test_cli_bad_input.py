"""Bad input to the command line: a sentence with cause, evidence and fix, code 2 or 3, and nothing half written."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tinynet
from igate_command import igate, refused
from PIL import Image

from igate_edge.bundle import MEMBERS
from igate_edge.package import package

FRAMES = tinynet.frames(8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4], provenance={"seed": 7})
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(tinynet.frames(1, size=(20, 30))[0]).save(path)
    return path


# Bad input: bundles


def test_not_a_bundle(tmp_path: Path) -> None:
    path = tmp_path / "x.igate"
    path.write_bytes(b"GIF89a" * 10)
    for command in ("inspect", "build", "verify", "bench", "report"):
        refused(igate(command, path, "--json"), 2, "not a bundle", "x.igate", "igate export")


def test_a_truncated_bundle(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.igate"
    path.write_bytes(bundle.read_bytes()[:-100])
    refused(igate("inspect", path, "--json"), 2, "cut.igate")


def test_a_newer_schema(bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.igate"
    data = bundle.read_bytes()
    head = 30 + len(MEMBERS[0])
    size = int.from_bytes(data[18:22], "little")
    manifest = data[head : head + size].replace(b'"schema":1,', b'"schema":2,')
    path.write_bytes(data[:head] + manifest + data[head + size :])
    refused(igate("inspect", path, "--json"), 2, "newer", "schema 2", "upgrade")


def test_an_onnx_file_without_task_metadata(tmp_path: Path) -> None:
    import onnx

    proto = onnx.load_from_string(tinynet.gated_onnx())
    del proto.metadata_props[:]
    path = tmp_path / "bare.onnx"
    path.write_bytes(proto.SerializeToString())
    refused(igate("inspect", path, "--json"), 2, "metadata")


def test_no_such_bundle_and_a_folder(tmp_path: Path) -> None:
    refused(igate("build", tmp_path / "none.igate", "--json"), 2, "none.igate")
    refused(igate("inspect", tmp_path, "--json"), 2, "folder")
    refused(igate("build", tmp_path, "--json"), 2, "not a regular file")


def test_unknown_backend_and_precision(bundle: Path) -> None:
    refused(igate("build", bundle, "--backend", "abacus", "--json"), 2, "abacus", "onnxruntime")
    refused(igate("build", bundle, "--precision", "int4", "--json"), 2, "int4")


def test_the_demo_without_its_example(tmp_path: Path) -> None:
    refused(igate("demo", "--bundle", tmp_path / "none.igate", "--json"), 2, "none.igate", "checkout")


# Bad input: frames


def test_an_empty_folder(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    refused(igate("run", bundle, folder, "--out", tmp_path / "o", "--json"), 2, "empty", "put images there")
    assert not (tmp_path / "o").exists(), "nothing is made for nothing"


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((1, 8, 8, 3), np.nan, np.float32), ["NaN"]),
        (np.zeros((1, 8, 8, 3), np.float32), ["uint8", "float32"]),
        (np.zeros((1, 3, 8, 8), np.uint8), ["[N,H,W,3]", "[1, 3, 8, 8]"]),
        (np.zeros((0, 8, 8, 3), np.uint8), ["[N,H,W,3]"]),
        (np.array([{"a": 1}]), [".npy"]),
    ],
)
def test_arrays_that_are_no_frames(bundle: Path, tmp_path: Path, array: np.ndarray, words: list[str]) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    refused(igate("run", bundle, tmp_path / "x.npy", "--out", tmp_path / "o", "--json"), 2, "x.npy", *words)
    refused(igate("build", bundle, "--calibration", tmp_path / "x.npy", "--json"), 2, "x.npy", *words)


def test_a_broken_image_is_named_and_earlier_results_stay(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(tinynet.frames(1)[0]).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n nonsense")
    refused(igate("run", bundle, folder, "--out", tmp_path / "o", "--cache", tmp_path / "c", "--json"), 2, "b.png")
    assert (tmp_path / "o" / "a.npz").exists()


def test_unknown_kinds_of_input(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    refused(igate("run", bundle, tmp_path / "x.txt", "--json"), 2, ".txt", ".png")
    refused(igate("run", bundle, tmp_path / "none.png", "--json"), 2, "none.png")


def test_a_video_without_pyav_names_the_extra(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.mp4").write_bytes(b"0")
    monkeypatch.setitem(sys.modules, "av", None)
    refused(igate("run", bundle, tmp_path / "x.mp4", "--json"), 3, "PyAV", "igate-edge[video]")


@pytest.mark.parametrize("name", ["x.png", "x.npy", "x.mp4"])
def test_a_pipe_is_refused_and_not_waited_for(bundle: Path, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    refused(igate("run", bundle, tmp_path / name, "--json"), 2, name, "not a regular file")
    refused(igate("build", bundle, "--calibration", tmp_path / name, "--json"), 2, name, "not a regular file")


def test_a_pipe_for_a_model_or_among_pictures(bundle: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.onnx")
    os.mkfifo(tmp_path / "x.png")
    refused(igate("inspect", tmp_path / "x.onnx", "--json"), 2, "x.onnx", "not a regular file")
    refused(igate("run", bundle, tmp_path, "--json"), 2, "x.png", "not a regular file")


# Bad input: arguments


@pytest.mark.parametrize("arguments", [["run", "a.igate", ""], ["run", "a", "b", "--out="], ["demo", "--out", ""]])
def test_an_empty_argument_is_not_the_current_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(igate(*arguments, "--json"), 2, "an argument is empty", arguments[0])
    assert not list(tmp_path.iterdir())


def test_a_wrong_argument_is_shown_with_what_was_typed() -> None:
    refused(igate("build", "x", "--threads", "many", "--json"), 2, "--threads", "many", "igate build --help")
    refused(igate("inspekt", "--json"), 2, "No such command 'inspekt'", "did you mean 'inspect'?")


@pytest.mark.parametrize("option", ["--max-ratio", "--max-ms"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0"])
def test_a_limit_that_would_always_or_never_pass(bundle: Path, option: str, value: str) -> None:
    refused(igate("bench", bundle, option, value, "--rounds", 3, "--json"), 2, "not a limit", option)


# Bad input: the disk


def test_a_device_is_not_replaced_by_a_file(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "pipe.html"
    os.mkfifo(place)
    command = ("report", bundle, "--out", place, "--no-bench", "--cache", tmp_path / "c", "--json")
    refused(igate(*command), 2, "pipe.html", "device, a pipe")
    assert place.is_fifo() and not list(tmp_path.glob(".*"))


def test_no_write_permission(bundle: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    out = tmp_path / "secret"
    refused(igate("run", bundle, image, "--out", out, "--json"), 3, "Permission denied", "secret", "permissions")
    refused(
        igate("report", bundle, "--out", out / "r.html", "--no-bench", "--cache", tmp_path / "c", "--json"),
        3,
        "Permission denied",
        "secret",
    )


def test_a_folder_under_a_file(bundle: Path, image: Path) -> None:
    refused(igate("run", bundle, image, "--out", image / "x", "--json"), 3, "Not a directory", "photo.png")


def test_a_full_disk_leaves_no_half_file(
    bundle: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o"
    assert igate("run", bundle, image, "--out", out, "--cache", tmp_path / "c").code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(
        igate("run", bundle, image, "--out", out, "--cache", tmp_path / "c", "--json"), 3, "No space left", "free disk"
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
