"""Building the plugin: headers found where JetPack puts them, what is missing named, one build for one version."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import plugin_kit
import pytest
from igate_edge.kernels import build_plugin, manifest, plugin
from igate_edge.kernels.build_plugin import Headers, build, find_headers, main
from kernel_cases import needs_compiler

from igate_edge.errors import CheckFailed, InputError, UnavailableError

OTHER = "aarch64" if platform.machine() == "x86_64" else "x86_64"


def _tree(root: Path, *files: str, version: str = "#define TRT_MAJOR_ENTERPRISE 10") -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    for path in root.rglob("NvInferRuntime.h"):
        rest = "\n#define TRT_MINOR_ENTERPRISE 3\n#define TRT_PATCH_ENTERPRISE 0\n#define NV_TENSORRT_MAJOR 10\n"
        (path.parent / "NvInferVersion.h").write_text(version + rest)
    return root


def test_headers_are_found_where_jetpack_puts_them(tmp_path: Path) -> None:
    files = ("usr/include/aarch64-linux-gnu/NvInferRuntime.h", "usr/local/cuda-12.6/targets/aarch64-linux/include/{}")
    found = find_headers("aarch64", root=_tree(tmp_path, files[0], files[1].format("cuda_runtime_api.h")))
    assert found.version == (10, 3, 0)
    folders = [str(folder.relative_to(tmp_path)) for folder in found.folders]
    assert folders == ["usr/include/aarch64-linux-gnu", "usr/local/cuda-12.6/targets/aarch64-linux/include"]


def test_the_folders_given_come_first(tmp_path: Path) -> None:
    names = ("NvInferRuntime.h", "cuda_runtime_api.h")
    _tree(tmp_path, *(f"usr/include/{name}" for name in names), *(f"own/{name}" for name in names))
    assert find_headers("aarch64", [tmp_path / "own"], tmp_path).folders == (tmp_path / "own",)


@pytest.mark.parametrize("there", ["NvInferRuntime.h", "cuda_runtime_api.h", ""])
def test_what_is_missing_is_named_with_its_package(there: str, tmp_path: Path) -> None:
    _tree(tmp_path, *([f"usr/include/{there}"] if there else []))
    with pytest.raises(UnavailableError) as caught:
        find_headers("aarch64", root=tmp_path)
    for name, package in build_plugin.HEADERS.items():
        assert (name in caught.value.cause) == (name != there)
        assert (package in caught.value.fix) == (name != there)


@pytest.mark.parametrize("name", ["TRT_MAJOR_ENTERPRISE 8", "NV_TENSORRT_MAJOR 9"])
def test_a_tensorrt_before_10_is_refused(name: str, tmp_path: Path) -> None:
    """TensorRT 8 wrote its version under the other name; the last one in the file counts there."""
    root = _tree(tmp_path, "usr/include/NvInferRuntime.h", "usr/include/cuda_runtime_api.h")
    text = f"#define {name}\n#define NV_TENSORRT_MINOR 6\n#define NV_TENSORRT_PATCH 1\n"
    (root / "usr/include/NvInferVersion.h").write_text(text)
    with pytest.raises(InputError, match="too old for the plugin.*use JetPack 6"):
        find_headers("aarch64", root=root)
    (root / "usr/include/NvInferVersion.h").write_text("")
    with pytest.raises(InputError, match="name no version"):
        find_headers("aarch64", root=root)


@needs_compiler
def test_a_build_is_kept_and_belongs_to_its_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plugin_kit.library()
    assert first.tensorrt == (10, 14, 1)
    assert first.machine == platform.machine()
    assert "g++" in first.compiler
    ran: list[object] = []
    run = build_plugin._run
    monkeypatch.setattr(build_plugin, "_run", lambda command, doing: ran.append(doing) or run(command, doing))
    out = tmp_path / "own.so"
    again = build(plugin_kit.headers(), out=out)
    assert ran == ["start"], "what was built before is not built again"
    assert again.path == out
    assert again.sha256 == first.sha256 == manifest.digest(out.read_bytes())
    exported = subprocess.run(["nm", "-D", "--defined-only", str(out)], capture_output=True, text=True).stdout
    assert {"getCreators", "setLoggerFinder"} <= {line.split()[-1] for line in exported.splitlines()}
    needed = subprocess.run(["readelf", "-d", str(out)], capture_output=True, text=True).stdout
    assert not any(name in needed for name in ("libnvinfer", "libcuda", "libcudart")), "nothing to link on a device"


@needs_compiler
def test_headers_that_do_not_compile_are_said(tmp_path: Path) -> None:
    _tree(tmp_path, "NvInferRuntime.h", "cuda_runtime_api.h")
    with pytest.raises(CheckFailed, match=r"(?s)cannot compile the plugin: .*nvinfer1"):
        build(Headers((tmp_path,), (10, 3, 0)), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"g\+\+ is missing.*apt install g\+\+"):
        build_plugin.compiler()
    with pytest.raises(UnavailableError, match=f"apt install g\\+\\+-{OTHER.replace('_', '-')}-linux-gnu"):
        build_plugin.compiler(OTHER)
    with pytest.raises(InputError, match="unknown machine 'riscv64'"):
        build(Headers((tmp_path,), (10, 3, 0)), "riscv64")


@needs_compiler
def test_the_command_says_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "libigate_kernel.so"
    words = [word for folder in plugin_kit.headers().folders for word in ("--include", str(folder))]
    assert main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(out)
    assert said[1].startswith(f"for TensorRT 10.14.1 on {platform.machine()}, g++")
    assert main([*words, "--out", str(tmp_path / "no" / "such" / "folder.so")]) == 3
    assert "cannot write" in capsys.readouterr().err


@needs_compiler
def test_a_kernel_of_several_arguments_gets_each(tmp_path: Path) -> None:
    """As Triton's kernels take them: addresses and numbers one by one, more shared memory than is free."""
    source = Path(__file__).parent / "test_plugin_driver.cpp"
    words = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-DSIZES=8,4,8,8,2"]
    subprocess.run(["g++", *words, str(source), "-o", str(tmp_path / "libcuda.so.1")], check=True)
    params = bytes(8) + (123456).to_bytes(4, "little") + bytes(4) + bytes(16) + (777).to_bytes(2, "little")
    fields = plugin.PluginFields(
        kernel="several", image=b"\x7fELF and more", params=params, tables=bytes(16) + b"\x21" + bytes(15),
        arguments=(0, 8, 16, 24, 32), pointers=((0, 0, 3), (16, 1, 0), (24, plugin.TABLES, 16)), grid=(7, 2, 3),
        block=(32, 2, 1), shared=50000, inputs=((1, 32, 2, 2),), output=((0, 1, -31, 1), (0, 2, 3, 2)),
        tensors=((2, 5), (2, 5)),
    )  # fmt: skip
    file = plugin_kit.write_fields(tmp_path / "fields", fields.attributes())
    (tmp_path / "x").write_bytes(bytes([10, 11, 12, 13]) * 32)
    (tmp_path / "y").write_bytes(b"M" * 64)
    said = plugin_kit.run("", (), file, "enqueue", tmp_path / "y", tmp_path / "x", cuda=tmp_path)
    launch = "launch 7 2 3 32 2 1 50000 stream 1 extra 0 13 123456 77 33 777"
    assert sorted(line for line in said if line.startswith("launch")) == [launch] * 3
    # Two contexts of one layer share all, another layer with the same image shares that.
    assert [said.count(line) for line in ("load ELF ", "find several", "set 8 50000", "unload")] == [1, 2, 2, 1]
    shape = next(line for line in plugin_kit.run("", (), file, "describe") if line.startswith("shape"))
    assert shape == "shape 0 1 2"
