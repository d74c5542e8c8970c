"""What is installed, found in trees, and which pairs are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import boards
import pytest

from igate_edge.runtime import device_software
from igate_edge.runtime.device import Device
from igate_edge.runtime.device_software import HEADERS, Software, read_software, resource_sms, this_interpreter
from igate_edge.runtime.device_stack import stack_of, unsupported

NANO = Device(module="Orin Nano 8GB (p3767-0003)", soc="tegra234", sm=87, l4t="36.4.3")
AGX = Device(module="AGX Orin 64GB (p3701-0005)", soc="tegra234", sm=87, l4t="39.2.0")
NX = Device(module="Orin NX 16GB (p3767-0000)", soc="tegra234", sm=87, l4t="39.2.0")
THOR = Device(module="Thor T5000 (p3834-0008)", soc="tegra264", sm=110, l4t="38.4.0")


@pytest.mark.parametrize("name", boards.BOARDS)
def test_software_of_a_board(tmp_path: Path, name: str) -> None:
    board = boards.BOARDS[name]
    found = read_software(boards.build(tmp_path, name))
    assert found.tensorrt == (board.tensorrt,) and found.cuda == board.cuda and found.driver == board.driver
    assert found.module_pythons == (board.python,) and board.cuda.startswith(str(found.tensorrt_cuda))
    assert found.nvcc == "/usr/local/cuda/bin/nvcc" and found.missing_headers == ()


def test_a_desktop_without_nvidia_has_none(tmp_path: Path) -> None:
    assert read_software(boards.build(tmp_path, "desktop")) == Software(missing_headers=HEADERS)


def test_two_tensorrts_and_missing_parts_are_seen(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nano-super")
    boards.put(root, "usr/local/lib/libnvinfer.so.10.13.3", "elf")
    boards.put(root, "usr/lib/aarch64-linux-gnu/libnvinfer.so.10", "a link")
    boards.put(root, "usr/lib/aarch64-linux-gnu/libnvinfer_plugin.so.10.3.0", "elf")
    boards.put(root, "usr/lib/aarch64-linux-gnu/libnvinfer_builder_resource_sm86.so.10.3.0", "elf")
    boards.drop(root, "usr/local/cuda/include/curand.h", "usr/local/cuda/version.json")
    boards.put(root, "usr/local/cuda/version.txt", "CUDA Version 11.4.315\n")
    found = read_software(root)
    assert found.tensorrt == ("10.3.0", "10.13.3") and found.missing_headers == ("curand.h",)
    assert found.cuda == "11.4.315" and resource_sms(found.resources) == (86,)


@pytest.mark.parametrize("text", ["", "[]", '{"cuda": 3}', '{"cuda": {}}', "{"])
def test_a_version_file_that_is_none(tmp_path: Path, text: str) -> None:
    boards.put(tmp_path, "usr/local/cuda/version.json", text)
    assert read_software(tmp_path).cuda is None


@pytest.mark.parametrize("flags", [(), ("--system-site-packages",)])
def test_a_venv_says_whether_it_sees_the_systems_packages(tmp_path: Path, flags: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", *flags, tmp_path], check=True)
    code = "from igate_edge.runtime.device_software import this_interpreter as t; print(t().venv, t().system_site)"
    seen = {"PYTHONPATH": str(Path(device_software.__file__).resolve().parents[2])}
    done = subprocess.run(
        [tmp_path / "bin/python", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=seen,
    )
    assert done.stdout.split() == [str(tmp_path), str(bool(flags))], done.stderr


def test_this_interpreter_tells_of_itself() -> None:
    found = this_interpreter()
    assert found.python.startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert (found.venv is None) == (sys.prefix == sys.base_prefix)


@pytest.mark.parametrize(
    ("device", "tensorrt", "cuda", "words"),
    [
        (NANO, "10.3.0", "12.6", ""),
        (NANO, "10.3.0.30-1+cuda12.5", "12.5", ""),
        (NANO, "10.13.3", "13.0", "no kernels for SM 87"),  # case T6
        (NX, "10.13.3", "13.0", "no kernels for SM 87"),
        (NANO, "10.7.0", "12.6", "is of another JetPack: JetPack 6.1/6.2 has TensorRT 10.3"),
        (NANO, "10.16.2", "13.2", "made for CUDA 13, and JetPack 6.1/6.2 has CUDA 12.6"),
        (NANO, "8.6.2", "12.2", "too old"),
        (AGX, "10.16.2", "13.2", ""),
        (AGX, "11.4.1", "13.2", ""),
        (NX, "11.4.1", "13.2", "is of another JetPack"),
        (AGX, "11.2.0", "13.2", "is of another JetPack"),
        (AGX, "12.0.0", "13.2", "is of another JetPack"),
        (THOR, "10.13.3", "13.0", ""),
        (THOR, "10.3.0", "12.6", "made for CUDA 12"),
        (Device(l4t="40.1.0", soc="tegra264"), "11.9.0", "13.5", ""),
        (NANO, "", None, ""),
    ],
)
def test_which_tensorrt_a_board_can_use(device: Device, tensorrt: str, cuda: str | None, words: str) -> None:
    found = unsupported(device, tensorrt, cuda)
    assert words in found and bool(found) == bool(words)


def test_the_stack_follows_the_l4t() -> None:
    names = {release: stack_of(Device(l4t=release)) for release in ("35.4.1", "36.3.0", "36.5.0", "38.2.1", "39.0.0")}
    assert [stack.jetpack for stack in names.values() if stack] == ["5", "6.0", "6.1/6.2", "7.0/7.1", "7.2"]
    assert stack_of(Device(l4t="360.1")) is None and stack_of(Device()) is None
