"""The command line: fixed exit codes, one JSON document, and for bad input a sentence with cause, evidence and fix."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import tinynet
from igate_command import igate, refused
from PIL import Image
from typer.testing import CliRunner

from igate_edge import cli, cli_console
from igate_edge.bundle import Bundle, write_bundle
from igate_edge.errors import CheckFailed, ConvertError, UnavailableError
from igate_edge.package import package

COMMANDS = (
    "doctor",
    "inspect",
    "train",
    "export",
    "build",
    "verify",
    "bench",
    "run",
    "serve",
    "replay",
    "report",
    "demo",
)
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


# What every command does alike


def test_help_lists_every_command() -> None:
    result = igate("--help")
    assert result.code == 0
    assert all(command in result.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json_and_debug(command: str) -> None:
    result = igate(command, "--help")
    assert result.code == 0 and "--json" in result.out and "--debug" in result.out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom igate_edge.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'onnx', 'onnxruntime', 'PIL') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["inspect"], ["bench", "x", "--rounds", "1"], ["build", "x", "--what"]]
)
def test_wrong_use_is_exit_2_and_points_to_the_help(arguments: list[str]) -> None:
    result = igate(*arguments)
    assert result.code == 2 and result.out == "" and "--help" in result.err
    assert igate(*arguments, "--json").json["error"] == "InputError"


def test_version() -> None:
    assert igate("--version").out.startswith("igate_edge 0.")


def test_python_dash_m_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "igate_edge", "inspect", str(tmp_path / "none.igate"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and json.loads(done.stdout)["cause"] == "no such file"
    assert done.stderr == ""


def test_an_error_for_people_is_on_stderr_with_its_fix(tmp_path: Path) -> None:
    result = igate("verify", tmp_path / "none.igate")
    assert result.code == 2 and result.out == ""
    assert "no such bundle" in result.err and "fix   check the path." in result.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CheckFailed("a", "b", "c"), 1, "a"),
        (ConvertError("cannot trace", "node 7 branches on data", "rewrite it"), 2, "node 7"),
        (UnavailableError("a", "b", "c"), 3, "a"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 3, "free disk space"),
        (MemoryError(), 3, "not enough memory"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 3, "igate-edge[train]"),
        (ModuleNotFoundError("No module named 'av'", name="av"), 3, "igate-edge[video]"),
        (ModuleNotFoundError("No module named 'PIL'", name="PIL"), 3, "igate-edge[images]"),
        (RuntimeError("surprise"), 70, "--debug"),
        (BrokenProcessPool("a child died"), 3, "memory"),
    ],
)
def test_every_exception_ends_in_a_sentence_and_a_code(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("igate_edge.cli_doctor.doctor", fail)
    refused(igate("doctor", "--json"), code, words)
    shown = igate("doctor")
    assert shown.code == code and "Traceback" not in shown.err


def test_debug_shows_the_traceback_and_keeps_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr("igate_edge.cli_doctor.doctor", fail)
    result = igate("doctor", "--debug")
    assert result.code == 70 and "Traceback" in result.err and "surprise" in result.err


def test_a_reader_that_went_away_is_no_error(bundle: Path) -> None:
    command = f"{sys.executable} -m igate_edge inspect {bundle} --json | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "{" and done.stderr == ""


@pytest.mark.parametrize("arguments", ["--help", "inspect BUNDLE", "bench BUNDLE --rounds 3 --max-ms 1e-6 --json"])
def test_a_reader_that_went_away_changes_no_exit_code(bundle: Path, arguments: str) -> None:
    words = arguments.replace("BUNDLE", str(bundle))
    command = f"{sys.executable} -m igate_edge {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == ("--max-ms" in arguments), done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", ["--help", "doctor", "doctor --json", "inspect none --json", "nonsense --json"])
def test_output_that_cannot_be_written_is_a_sentence(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "igate_edge", *arguments.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == (2 if "no" in arguments else 3)
    assert "error" in done.stderr and "fix" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", ["inspect none", "nonsense", "run none --frames none"])
def test_a_full_disk_behind_stderr_leaves_the_exit_code(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "igate_edge", *arguments.split()]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.returncode == 2


def test_json_holds_no_nan_and_no_numpy() -> None:
    document = cli_console.plain_json({"a": float("nan"), "b": np.float32(0.5), "c": np.arange(2), 3: Path("x")})
    assert document == {"a": None, "b": 0.5, "c": [0, 1], "3": "x"}


# Commands on a good bundle


def test_doctor_reports_this_machine() -> None:
    result = igate("doctor", "--json")
    document = result.json
    assert result.code == (0 if document["ok"] else 3)
    versions = {item["name"]: item["version"] for item in document["packages"]}
    assert versions["numpy"] == np.__version__
    assert document["backends"]["onnxruntime"]["usable"] is True
    assert all(item["fix"] for item in document["missing"])
    assert "INT8 instructions" in igate("doctor").out


def test_doctor_names_the_command_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from igate_edge import cli_doctor

    absent = [{"name": "onnx", "version": None, "group": "core", "minimum": "1.17", "too_old": False}]
    absent.append({"name": "torch", "version": "2.1.0", "group": "train", "minimum": "2.6", "too_old": True})
    monkeypatch.setattr(cli_doctor, "packages", lambda: absent)
    result = igate("doctor", "--json")
    assert result.code == 3
    fixes = {item["what"]: item["fix"] for item in result.json["missing"]}
    assert fixes["onnx"] == "pip install 'onnx>=1.17'"
    assert fixes["torch 2.1.0 is older than 2.6"] == "pip install --upgrade 'igate-edge[train]'"
    assert "pip install --upgrade 'igate-edge[train]'" in igate("doctor").out


def test_inspect_tells_tasks_gates_cost_and_provenance(bundle: Path) -> None:
    document = igate("inspect", bundle, "--json").json
    assert [task["name"] for task in document["tasks"]] == ["seg", "depth", "tag"]
    masks = tinynet.masks_of(0.25, 8, 0)
    want = {t.name: sum(int(masks[s][t.name].sum()) for s in masks) / 16 for t in tinynet.TASKS}
    assert document["hard_fraction"] == pytest.approx(want)
    cost = document["cost"]
    # First layer of one net: 3 -> 8 channels, 3x3, 8x8 pixels; second: 8 -> 8; heads are extra.
    assert cost["plain"]["macs"] >= 3 * 8 * 9 * 64 + 8 * 8 * 9 * 64
    assert cost["plain"]["macs"] < cost["ours"]["macs"] < cost["separate"]["macs"]
    assert document["training"] == {"seed": 7}
    shown = igate("inspect", bundle)
    assert shown.code == 0 and "plain shared net" in shown.out and "seed" in shown.out


def test_inspect_takes_a_model_too(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(tinynet.gated_onnx())
    assert igate("inspect", path, "--json").json["kind"] == "onnx"
    assert igate("inspect", path).code == 0


def test_build_verify_and_bench(bundle: Path, tmp_path: Path) -> None:
    built = igate("build", bundle, "--cache", tmp_path, "--precision", "int8", "--json")
    assert built.code == 0 and built.json["precision"] == "int8" and built.json["cached"] is False
    assert "from the cache" in igate("build", bundle, "--cache", tmp_path, "--precision", "int8").out
    assert igate("verify", bundle, "--json").json["passed"] is True
    assert "PASSED" in igate("verify", bundle).out
    timed = igate("bench", bundle, "--rounds", 3, "--json")
    assert timed.code == 0 and timed.json["budget"]["missed"] == []
    assert {row["name"] for row in timed.json["rows"]} >= {"ours", "plain", "separate", "dense"}


def test_build_calibrates_on_the_users_frames(bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", np.stack(tinynet.frames(8, seed=5)))
    result = igate("build", bundle, "--cache", tmp_path / "c", "--calibration", tmp_path / "frames.npy", "--json")
    assert result.code == 0 and "calibrate" in result.json["seconds"]


def test_a_missed_budget_is_exit_1(bundle: Path) -> None:
    result = igate("bench", bundle, "--rounds", 3, "--max-ms", 1e-6, "--json")
    assert result.code == 1 and "allowed" in result.json["budget"]["missed"][0]
    assert "FAILED" in igate("bench", bundle, "--rounds", 3, "--max-ms", 1e-6).out


def test_an_altered_network_fails_verification_with_exit_1(bundle: Path, tmp_path: Path) -> None:
    from test_verify import altered

    broken = altered(bundle, tmp_path / "b.igate", "head.depth.conv.bias")
    result = igate("verify", broken, "--json")
    assert result.code == 1 and any("depth" in problem for problem in result.json["problems"])
    assert "FAILED" in igate("verify", broken).out


def test_run_writes_pictures_and_the_exact_arrays(bundle: Path, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = igate("run", bundle, image, "--out", out, "--cache", tmp_path / "c", "--precision", "float", "--json")
    assert result.code == 0 and result.json["frames"] == 1
    assert sorted(path.name for path in out.iterdir()) == ["photo.npz", "photo.png", "photo_depth.png", "photo_seg.png"]
    from igate_edge import Engine

    frame = np.asarray(Image.open(image))
    with Engine.open(bundle, precision="float", cache_dir=tmp_path / "c") as engine:
        expected = engine(frame)
    with np.load(out / "photo.npz", allow_pickle=False) as stored:
        assert set(stored) == set(expected)
        assert all(np.array_equal(stored[name], expected[name]) for name in expected)
    assert np.asarray(Image.open(out / "photo_seg.png")).shape == (20, 30, 3)


def test_run_takes_folders_and_keeps_names_apart(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        Image.fromarray(tinynet.frames(1)[0]).save(folder / name)
    result = igate("run", bundle, folder, "--out", tmp_path / "out", "--cache", tmp_path / "c", "--json")
    assert result.code == 0 and result.json["frames"] == 3
    assert len({path.stem for path in (tmp_path / "out").glob("*.npz")}) == 3
    limited = igate("run", bundle, folder, "--out", tmp_path / "o2", "--limit", 2, "--cache", tmp_path / "c", "--json")
    assert limited.json["frames"] == 2


def test_run_takes_a_video(bundle: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is an extra: pip install 'igate-edge[video]'")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in tinynet.frames(3, size=(32, 32)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    result = igate("run", bundle, path, "--out", tmp_path / "out", "--cache", tmp_path / "c", "--json")
    assert result.code == 0 and result.json["frames"] == 3
    film = tmp_path / "out" / "clip.mp4"
    assert str(film) in result.json["files"]
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        assert sum(1 for _ in container.decode(stream)) == 3 and float(stream.average_rate) == 10


def test_report_is_written_whole(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.html"
    result = igate("report", bundle, "--out", out, "--no-bench", "--cache", tmp_path / "c", "--json")
    assert result.code == 0 and result.json["report"] == str(out)
    assert out.read_text().rstrip().endswith("</html>")


def test_demo_shows_everything_and_says_where_to_look(bundle: Path, tmp_path: Path) -> None:
    result = igate("demo", "--bundle", bundle, "--out", tmp_path / "demo")
    assert result.code == 0, result.err
    assert (tmp_path / "demo" / "report.html").exists() and (tmp_path / "demo" / "frame3.png").exists()
    assert str(tmp_path / "demo" / "report.html") in result.out.replace("\n", "")
    assert "PASSED" in result.out and "separate" in result.out
    assert "Predicted for Jetson Orin" in (tmp_path / "demo" / "report.html").read_text()


def test_report_and_demo_show_an_engine_that_fell_back_to_float(bundle: Path, tmp_path: Path) -> None:
    stored = Bundle.read(bundle)
    shrunk = {name: (low / 20, high / 20) for name, (low, high) in stored.ranges.items()}
    bad, out = tmp_path / "bad.igate", tmp_path / "report.html"
    parts = {"model": stored.model, "plain": stored.plain, "golden": stored.golden}
    write_bundle(bad, stored.manifest, ranges=shrunk, **parts)
    result = igate("report", bad, "--out", out, "--no-bench", "--cache", tmp_path / "c")
    assert result.code == 0, result.err
    page = out.read_text()
    assert "this row: float engine" in page and "INT8 engine" not in page and "fell back to float" in page
    shown = igate("demo", "--bundle", bad, "--out", tmp_path / "demo")
    assert shown.code == 1 and "does NOT compute" in shown.out, "the demo verifies too, and INT8 is not as packaged"
    assert (tmp_path / "demo" / "report.html").exists()


def test_run_finds_the_engine_that_was_built_on_own_frames(bundle: Path, image: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", np.stack(tinynet.frames(8, seed=5)))
    own = ["--calibration", tmp_path / "frames.npy", "--cache", tmp_path / "c", "--precision", "int8"]
    assert igate("build", bundle, *own).code == 0
    assert igate("run", bundle, image, "--out", tmp_path / "o", *own).code == 0
    assert len(list((tmp_path / "c").glob("*.engine"))) == 1


def test_typer_can_drive_the_application_too(bundle: Path) -> None:
    result = CliRunner().invoke(cli.app, ["verify", str(bundle), "--json"])
    assert result.exit_code == 0 and '"passed": true' in result.output
