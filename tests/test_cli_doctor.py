"""`igate doctor` on five boards: quiet where all fits, and for each mismatch the part, the reason and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import boards
import pytest
from igate_command import igate, refused

from igate_edge import cli_console, cli_doctor
from igate_edge.cli_doctor_jetson import MISMATCH, NOTE, Finding
from igate_edge.runtime.device_software import Interpreter

NANO, NX, AGX, THOR = boards.BOARDS
CUDA = "usr/local/cuda"
DPKG = "Package: tensorrt\nStatus: install ok installed\nVersion: {}\n"


def examine(root: Path, python: Interpreter, purpose: str = "build") -> tuple[cli_console.Answer, dict[str, Finding]]:
    answer = cli_doctor.doctor(True, purpose, root, python)
    return answer, {finding.part: finding for finding in answer.document["findings"]}


def shown(answer: cli_console.Answer, capsys: pytest.CaptureFixture[str]) -> str:
    cli_console._print_answer(answer, False)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", boards.BOARDS)
def test_a_board_on_which_all_fits(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer, found = examine(boards.build(tmp_path, name), boards.interpreter(name))
    # Whether this checkout has built its kernels is its own matter.
    assert {part for part, finding in found.items() if finding.verdict != "ok"} <= {"igate kernels"}
    assert answer.code == 0 and answer.document["ok"] and len(found) >= 11
    text = shown(answer, capsys)
    board = boards.BOARDS[name]
    for word in (board.model, f"L4T {answer.document['device'].l4t}", board.tensorrt, "not locked", MISMATCH):
        assert (word in text) == (word != MISMATCH)
    assert max(map(len, text.splitlines())) <= 120


def test_a_desktop_shows_no_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = cli_doctor.doctor(True, "build", boards.build(tmp_path, "desktop"))
    assert "findings" not in answer.document and answer.code in (0, 1)
    text = shown(answer, capsys)
    assert "This board" not in text and "not a Jetson: no board was checked" in text
    assert "rosbags" in text and "A desktop processor" in text and "avx_vnni" in text


def _r36(revision: str) -> str:
    return f"# R36 (release), REVISION: {revision}, GCID: 1, BOARD: generic\n"


def _xavier(root: Path) -> None:
    boards.put(root, "proc/device-tree/compatible", "nvidia,p3668-0000\0nvidia,tegra194\0")
    boards.put(root, "etc/nv_tegra_release", "# R35 (release), REVISION: 4.1, GCID: 1, BOARD: t186ref\n")


#: What is done to a board, then: the part that says so, words of its reason, words of its fix.
BROKEN: dict[str, tuple[str, Callable[[Path], object], str, str, str]] = {
    "JetPack 6.0": (
        NANO,
        lambda r: boards.put(r, "etc/nv_tegra_release", _r36("3.0")),
        "JetPack",
        "JetPack 6.0 brings TensorRT 8.6",
        "sudo apt dist-upgrade",
    ),
    "JetPack 7.0 on Orin": (
        NANO,
        lambda r: boards.put(r, "etc/nv_tegra_release", "# R38 (release), REVISION: 2.1, GCID: 1\n"),
        "JetPack",
        "not for this chip (tegra234)",
        "flash JetPack 6.2 or 7.2",
    ),
    "Xavier": (NANO, _xavier, "JetPack", "Xavier ends at JetPack 5", "--backend onnxruntime"),
    "no TensorRT": (
        NX,
        lambda r: boards.drop(r, "usr/lib/aarch64-linux-gnu"),
        "TensorRT",
        "no libnvinfer",
        "sudo apt install tensorrt python3-libnvinfer",
    ),
    "two TensorRTs": (
        NX,
        lambda r: boards.put(r, "usr/local/lib/libnvinfer.so.10.7.0", "elf"),
        "TensorRT",
        "two TensorRTs on one board",
        "ldconfig -p | grep nvinfer",
    ),
    "TensorRT and CUDA of JetPack 7 on 6": (
        NANO,
        lambda r: (
            boards.drop(r, "usr/lib/aarch64-linux-gnu"),
            boards.put(r, "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.13.3", "elf"),
            boards.put(r, "var/lib/dpkg/status", DPKG.format("10.13.3.9-1+cuda13.0")),
        ),
        "TensorRT",
        "no kernels for SM 87",
        "'tensorrt=10.3*'",
    ),
    "a library of other chips": (
        AGX,
        lambda r: boards.put(r, "usr/lib/aarch64-linux-gnu/libnvinfer_builder_resource_sm90.so.10.16.2", "elf"),
        "TensorRT library",
        "has kernels for SM 90 only",
        "--reinstall tensorrt",
    ),
    "no Python module": (
        THOR,
        lambda r: boards.drop(r, "usr/lib/python3.12"),
        "TensorRT in Python",
        "is not installed",
        "sudo apt install python3-libnvinfer",
    ),
    "another toolkit": (
        THOR,
        lambda r: boards.put(r, f"{CUDA}/version.json", '{"cuda": {"version": "12.6.68"}}'),
        "CUDA toolkit",
        "CUDA 12.6 is of another JetPack",
        "cuda-toolkit-13-0",
    ),
    "an image of another L4T": (
        NANO,
        lambda r: (boards.put(r, ".dockerenv", ""), boards.put(r, "proc/sys/kernel/osrelease", "5.10.120-tegra\n")),
        "container",
        "the image is of L4T 36, the host's kernel 5.10.120-tegra of L4T 35",
        "r35",
    ),
    "no swap but zram": (
        NANO,
        lambda r: boards.put(r, "proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 4000000 0 5\n"),
        "memory for a build",
        "zram takes from the same memory",
        "nvzramconfig; sudo fallocate -l 8G /swapfile",
    ),
    "a capped GPU": (
        AGX,
        lambda r: boards.put(r, "sys/class/devfreq/17000000.gpu/max_freq", 624_000_000),
        "power mode",
        "held to 624 MHz, mode MAXN allows 1300 MHz",
        "igate jetson power MAXN --apply",
    ),
    "a mask that waits for a reboot": (
        NX,
        lambda r: boards.put(r, "sys/devices/platform/gpu.0/tpc_pg_mask", "0xfc\n"),
        "power mode",
        "switches GPU clusters 0xf0 off, the kernel still has 0xfc",
        "sudo reboot",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_board_that_does_not_fit(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, damage, part, reason, fix = BROKEN[case]
    root = boards.build(tmp_path, name)
    damage(root)
    packages = {"cuda-bindings": boards.interpreter(name).packages["cuda-bindings"]}
    python = boards.interpreter(name, **({"packages": packages} if case == "no Python module" else {}))
    answer, found = examine(root, python)
    assert found[part].verdict == MISMATCH and reason in found[part].reason and fix in found[part].fix
    assert answer.code == 1 and answer.document["ok"] is False
    assert cli_doctor.doctor(False, "build", root, python).code == 0  # only --strict makes it an error
    text = shown(answer, capsys)
    assert f"MISMATCH: {part}: " in text and fix in text and "do not fit: see MISMATCH above" in text
    json.dumps(cli_console.plain_json(answer.document))


#: Another Python on a board of its own, then the same three.
PYTHONS = {
    "a venv that hides apt's module": (
        {"packages": {"cuda-bindings": "12.9.10"}, "system_site": False},
        "TensorRT in Python",
        "hides the system's packages",
        "include-system-site-packages",
    ),
    "another Python": (
        {"packages": {"cuda-bindings": "12.9.10"}, "python": "3.12.3"},
        "TensorRT in Python",
        "apt's module is for Python 3.10, this is 3.12",
        "/usr/bin/python3 -m venv --system-site-packages VENV",
    ),
    "a wheel beside apt's library": (
        {"packages": {"tensorrt": "10.7.0", "tensorrt-cu12": "10.7.0", "cuda-bindings": "12.9.10"}},
        "TensorRT in Python",
        "the module is of 10.7.0, the library of 10.3.0",
        "pip uninstall tensorrt tensorrt-cu12",
    ),
    "a wheel of CUDA 13": (
        {"packages": {"tensorrt": "10.13.3", "tensorrt-cu13": "10.13.3", "cuda-bindings": "12.9.10"}},
        "TensorRT wheel",
        "no kernels for SM 87",
        "pip uninstall tensorrt tensorrt-cu13",
    ),
    "a wheel without SM 87": (
        {"resources": tuple(f"libnvinfer_builder_resource_sm{sm}.so.10.3.0" for sm in (80, 86, 90))},
        "TensorRT wheel",
        "has kernels for SM 80, SM 86, SM 90 only",
        "pip uninstall tensorrt",
    ),
    "cuda-bindings of CUDA 13": (
        {"packages": {"tensorrt": "10.3.0", "cuda-bindings": "13.2.0"}},
        "CUDA from Python",
        "cuda-bindings 13.2.0 speaks CUDA 13, this board CUDA 12",
        "pip install 'cuda-bindings>=12.6,<13'",
    ),
    "nothing that reaches the GPU": (
        {"packages": {"tensorrt": "10.3.0"}},
        "CUDA from Python",
        "no package reaches the GPU's memory",
        "pip install 'cuda-bindings>=12.6,<13'",
    ),
    "an old driver": ({"driver_cuda": "12.2"}, "driver", "speaks CUDA 12.2", "nvidia-l4t-cuda"),
}


@pytest.mark.parametrize("case", PYTHONS)
def test_a_python_that_does_not_fit(tmp_path: Path, case: str) -> None:
    other, part, reason, fix = PYTHONS[case]
    answer, found = examine(boards.build(tmp_path, NANO), boards.interpreter(NANO, **other))
    assert found[part].verdict == MISMATCH and reason in found[part].reason and fix in found[part].fix
    assert answer.code == 1


def test_a_build_of_pycuda_matters_only_where_it_is_needed(tmp_path: Path) -> None:
    """With the right cuda-bindings, what a build of pycuda lacks is good to know; else it does not fit."""
    root = boards.build(tmp_path, NANO)
    boards.drop(root, f"{CUDA}/include/curand.h")
    plain = "/usr/bin:/bin"
    _, found = examine(root, boards.interpreter(NANO, path=plain))
    assert (found["nvcc"].verdict, found["headers for pycuda"].verdict) == (NOTE, NOTE)
    _, found = examine(root, boards.interpreter(NANO, path=plain, packages={"tensorrt": "10.3.0"}))
    assert (found["nvcc"].verdict, found["headers for pycuda"].verdict) == (MISMATCH, MISMATCH)
    assert "export PATH=/usr/local/cuda/bin:$PATH" in found["nvcc"].fix
    assert found["headers for pycuda"].fix == "sudo apt install libcurand-dev-12-6"
    packages = {"tensorrt": "10.3.0", "pycuda": "2026.1"}
    _, found = examine(root, boards.interpreter(NANO, path=plain, packages=packages))
    assert found["headers for pycuda"].verdict == "ok" and found["CUDA from Python"].found == "pycuda 2026.1"


def test_for_run_leaves_out_what_only_builds_need(tmp_path: Path) -> None:
    root = boards.build(tmp_path, NANO)
    boards.put(root, "proc/swaps", "Filename Type Size Used Priority\n")
    answer, found = examine(root, boards.interpreter(NANO), "run")
    assert answer.code == 0 and not {"memory for a build", "nvcc", "CUDA toolkit"} & set(found)
    assert examine(root, boards.interpreter(NANO))[0].code == 1
    refused(igate("doctor", "--for", "fun", "--json"), 2, "no such purpose: fun")


def test_in_a_container_the_missing_power_mode_is_unverified_and_no_mismatch(tmp_path: Path) -> None:
    root = boards.build(tmp_path, NANO)
    boards.put(root, ".dockerenv", "")
    boards.drop(root, "etc/nvpmodel.conf", "var/lib/nvpmodel", "usr/sbin/nvpmodel", "proc/device-tree")
    answer, found = examine(root, boards.interpreter(NANO))
    assert answer.code == 0 and found["container"].verdict == NOTE and "power mode" not in found
    assert "unverified" in found["container"].reason and "/etc/nvpmodel.conf:ro" in found["container"].fix


def test_an_unknown_release_and_no_release_are_said(tmp_path: Path) -> None:
    root = boards.build(tmp_path, THOR)
    boards.put(root, "etc/nv_tegra_release", "# R41 (release), REVISION: 1.0, GCID: 1\n")
    _, found = examine(root, boards.interpreter(THOR))
    assert found["JetPack"].verdict == NOTE and "L4T 41.1.0 is not in the table" in found["JetPack"].reason
    boards.drop(root, "etc/nv_tegra_release", "var/lib/dpkg/status")
    answer, found = examine(root, boards.interpreter(THOR))
    assert found["JetPack"].verdict == NOTE and answer.code == 0


def test_a_driver_that_does_not_answer_is_unverified(tmp_path: Path) -> None:
    _, found = examine(boards.build(tmp_path, AGX), boards.interpreter(AGX, driver_cuda=None))
    assert found["driver"].verdict == NOTE and "unverified" in found["driver"].reason


def test_what_has_one_fix_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("torch", "lightning", "mujoco-core")
    absent = [{"name": n, "version": None, "group": "train", "minimum": "2", "too_old": False} for n in names]
    monkeypatch.setattr(cli_doctor, "packages", lambda: absent)
    out = igate("doctor").out
    assert "optional: torch, lightning and mujoco-core (for igate train and export)" in out
    assert out.count("pip install 'igate-edge[train]'") == 1


def test_strict_fails_on_a_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = [{"name": "torch", "version": "2.1", "group": "train", "minimum": "2.6", "too_old": True}]
    monkeypatch.setattr(cli_doctor, "packages", lambda: old)
    assert igate("doctor").code == 0 and igate("doctor", "--strict").code == 1
