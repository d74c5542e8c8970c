"""Which image a device gets: the built cubin, else NVRTC's once, else PTX, else the fallback path, said aloud."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from igate_edge.kernels import build_cuda, device, manifest, source
from igate_edge.kernels.emulator import driver
from igate_edge.kernels.grouped_conv import GroupedConvPlan, reference
from igate_edge.kernels.launch import KERNELS
from igate_edge.kernels.launcher_ctypes import CtypesLauncher
from kernel_cases import Case, needs_compiler
from kernel_images import cubin, ptx

from igate_edge.errors import UnavailableError

pytestmark = needs_compiler


@pytest.fixture
def orin() -> Iterator[CtypesLauncher]:
    with CtypesLauncher(str(driver.build())) as opened:
        yield opened


def built(folder: Path, *abis: int, digest: str = "", arch: str = "sm_87", with_ptx: bool = True) -> None:
    """A folder as the build leaves it, with stand-ins."""
    rows = []
    for abi in abis:
        data, file = cubin(abi, digest=digest or None), f"igate.{arch}.abi{abi}.cubin"
        (folder / file).write_bytes(data)
        for name, kernel in KERNELS.items():
            size = ctypes.sizeof(kernel.params)
            rows.append(
                manifest.Built(
                    f"{name}.abi{abi}", "cuda", file, "igate.ptx" if with_ptx else "", name, arch, abi, "t",
                    digest or source.digest(), manifest.digest(data), (("params", f"struct:{size}"),), 0, 16,
                    (kernel.threads, 1, 1), 0, 1, 0, 0, {},
                )
            )  # fmt: skip
    (folder / "igate.ptx").write_bytes(ptx())
    manifest.write(folder, rows)


@pytest.fixture
def no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(arch: int, driver: int, text: str) -> tuple[bytes, str]:
        raise UnavailableError("NVRTC cannot build the kernels here", "NVRTC 12 is missing", "")

    monkeypatch.setattr(build_cuda, "for_driver", missing)


def works(orin: CtypesLauncher, loaded: device.Loaded | None) -> str:
    assert loaded is not None
    layer, x, _ = Case(16, 16, (1, 1), (1, 2, 3), pads=(0, 0, 0, 0)).layer()
    got = device.convolve(orin, loaded.module, GroupedConvPlan.from_layer(layer), x)
    assert np.array_equal(got, reference(layer, x))
    return loaded.origin


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("version", "abi"), [(12060, 7), (13000, 8)])
def test_the_built_cubin_of_the_newest_abi_that_the_driver_takes(tmp_path: Path, version: int, abi: int) -> None:
    built(tmp_path, 7, 8)
    with CtypesLauncher(str(driver.build(version))) as opened:
        assert works(opened, device.load_kernels(opened, tmp_path, tmp_path)) == "cubin"
        data = device.shipped_cubin(tmp_path, opened.device, source.text())
    assert data == (tmp_path / f"igate.sm_87.abi{abi}.cubin").read_bytes()


def test_without_one_nvrtc_compiles_once(orin: CtypesLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compiled(arch: int, driver: int, text: str) -> tuple[bytes, str]:
        asked.append((arch, driver, text))
        return cubin(), "nvrtc 12.6"

    monkeypatch.setattr(build_cuda, "for_driver", compiled)
    built(tmp_path, 8)
    with pytest.warns(RuntimeWarning, match="from nvrtc; cubin: no built cubin fits .*there are sm_87 ABI 8"):
        assert works(orin, device.load_kernels(orin, tmp_path, tmp_path)) == "nvrtc"
    assert asked == [(87, 12060, source.text())]
    (kept,) = (tmp_path / "kernels").iterdir()
    assert source.digest()[:32] in kept.name and kept.name.endswith("sm_87-12060.cubin")
    assert works(orin, device.load_kernels(orin, tmp_path, tmp_path)) == "cache"
    whole = kept.read_bytes()
    for damage in (whole[:-1], whole[:100], b"", whole[:-1] + b"!"):
        kept.write_bytes(damage)
        with pytest.warns(RuntimeWarning, match="from nvrtc"):
            assert works(orin, device.load_kernels(orin, tmp_path, tmp_path)) == "nvrtc"
        assert kept.read_bytes() == whole
    assert len(asked) == 5


def test_a_cubin_of_another_source_or_gpu_is_passed_over(orin: CtypesLauncher, tmp_path: Path, no_nvrtc: None) -> None:
    built(tmp_path, 7, digest="1" * 64)
    with pytest.warns(RuntimeWarning, match="from ptx; cubin: no built cubin fits .* of source 11111111"):
        assert works(orin, device.load_kernels(orin, tmp_path, tmp_path)) == "ptx"
    built(tmp_path, 7, arch="sm_90")
    with pytest.warns(RuntimeWarning, match="from ptx; .*there are sm_90 ABI 7"):
        assert works(orin, device.load_kernels(orin, tmp_path, tmp_path)) == "ptx"


def test_a_damaged_cubin_is_passed_over(orin: CtypesLauncher, tmp_path: Path, no_nvrtc: None) -> None:
    built(tmp_path, 7)
    path = tmp_path / "igate.sm_87.abi7.cubin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match="from ptx; cubin: the cubin of .* was altered or cut off"):
        assert works(orin, device.load_kernels(orin, tmp_path, tmp_path)) == "ptx"


def test_where_nothing_loads_the_fallback_is_said(orin: CtypesLauncher, tmp_path: Path, no_nvrtc: None) -> None:
    said = f"no kernels on Orin .emulated.: {device.FALLBACK}; cubin: no kernels were built .*nvrtc: NVRTC .*ptx: "
    with pytest.warns(RuntimeWarning, match=said):
        assert device.load_kernels(orin, tmp_path, tmp_path) is None
    built(tmp_path, 8, with_ptx=False)
    with pytest.warns(RuntimeWarning, match=r"ptx: no built PTX fits"):
        assert device.load_kernels(orin, tmp_path, tmp_path) is None
    built(tmp_path, 8)
    (tmp_path / "igate.ptx").write_bytes(ptx(digest="2" * 64))
    with pytest.warns(RuntimeWarning, match=r"ptx: no built PTX fits"):
        assert device.load_kernels(orin, tmp_path, tmp_path) is None


def test_the_cache_is_keyed_by_source_and_driver(orin: CtypesLauncher) -> None:
    text, one = source.text(), orin.device
    other = dataclasses.replace(one, driver=13000)
    assert len({device._key(text, one), device._key(text + " ", one), device._key(text, other)}) == 3
