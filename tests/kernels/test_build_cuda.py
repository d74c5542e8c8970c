"""The CUDA kernels compiled for Orin with no GPU: both ABIs, the digest in them, their budget, and real cubins run."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from igate_edge.kernels import budget, build, build_cuda, cubin, device, manifest, nvrtc, source
from igate_edge.kernels.emulator import driver
from igate_edge.kernels.grouped_conv import GroupedConvPlan, reference
from igate_edge.kernels.launch import KERNELS, TILES
from igate_edge.kernels.launcher_ctypes import CtypesLauncher
from kernel_cases import Case

from igate_edge.errors import CheckFailed, InputError, UnavailableError

IGEMM = [tile.kernel for tile in TILES]
#: What igemm_s8_* must be made of: tensor core, ldmatrix, cp.async and stores of 16 bytes.
REQUIRED = ("IMMA.16832.S8.S8", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "STG.E.128")
SMALL = 'extern "C" __global__ void k(int* y) { *y = 1; }'


def nvrtc_tables() -> dict[str, dict[str, Any]]:
    return {name: rows for name, rows in budget.load()["sm_87"].items() if name.startswith(("nvrtc", "nvcc"))}


@pytest.fixture(scope="module")
def compiled() -> list[build_cuda.Compiled]:
    found, lacking = build_cuda.toolchains()
    for error in lacking:
        warnings.warn(f"NOT TESTED: {error}", RuntimeWarning, stacklevel=1)
    if not found:
        pytest.skip("NOT TESTED: the CUDA kernels are not compiled, pip install 'igate-edge[build]'")
    return list(build_cuda.build(87))


def of_abi(compiled: list[build_cuda.Compiled], abi: int) -> build_cuda.Compiled:
    fit = [one for one in compiled if one.shipped and cubin.header(one.data).abi == abi]
    if not fit:
        pytest.skip(f"NOT TESTED: no compiler here makes ABI {abi}, pip install 'igate-edge[build]'")
    return fit[0]


def test_the_table_has_every_kernel_of_both_abis_without_spills_and_with_tensor_cores() -> None:
    tables = nvrtc_tables()
    assert {"nvrtc 12.6", "nvrtc 13.0"} <= tables.keys()
    for toolchain, rows in tables.items():
        abi = 7 if " 12." in toolchain else 8
        assert rows.keys() == {f"{name}.abi{abi}" for name in KERNELS}
        for name, row in rows.items():
            assert budget.faults(name, row, row) == []
            if name.split(".")[0] in IGEMM:
                assert all(row["opcodes"].get(op, 0) > 0 for op in REQUIRED), (toolchain, name)
        assert rows[f"igemm_s8_64x64.abi{abi}"]["registers"] <= 96
        assert [rows[f"{tile.kernel}.abi{abi}"]["shared"] for tile in TILES] == [tile.shared for tile in TILES]


def test_the_budget_of_every_compiler_here_holds(compiled: list[build_cuda.Compiled]) -> None:
    try:
        for name in ("cuobjdump", "nvdisasm"):
            cubin.tool(name)
    except UnavailableError as error:
        pytest.skip(f"NOT TESTED: the budget of the CUDA kernels, {error}")
    rows: dict[str, dict[str, Any]] = {}
    for one in compiled:
        if one.toolchain not in nvrtc_tables():
            warnings.warn(f"NOT TESTED: there is no budget for {one.toolchain}", RuntimeWarning, stacklevel=1)
            continue
        for made, found in one.describe():
            rows.setdefault(one.toolchain, {})[made.name] = budget.row(found, made.dynamic_shared)
            assert made.params == (("params", f"struct:{source_size(made.entry)}"),) and made.block == (128, 1, 1)
    build.check("sm_87", rows)


def source_size(kernel: str) -> int:
    """Bytes of a kernel's struct as g++ lays it out: what the emulator lists, not what Python believes."""
    from igate_edge.kernels.emulator import Emulator

    return Emulator.load().kernels[kernel][1]


def test_the_two_abis_are_told_apart(compiled: list[build_cuda.Compiled]) -> None:
    old, new = of_abi(compiled, 7), of_abi(compiled, 8)
    assert (cubin.header(old.data), cubin.header(new.data)) == (cubin.Header(87, 7), cubin.Header(87, 8))
    cubin.require(old.data, 87, 12060)
    cubin.require(new.data, 87, 13000)
    with pytest.raises(InputError, match=r"ELF ABI 8 needs a CUDA 13 driver \(JetPack 7\), this is 12.6"):
        cubin.require(new.data, 87, 12060)
    for one in (old, new):
        assert build_cuda.stamp(one.data) == source.digest()
    assert build_cuda.stamp(old.ptx.encode()) == source.digest() and new.ptx == ""
    assert ".version 8.5" in old.ptx and ".target sm_80" in old.ptx


@pytest.mark.skipif(shutil.which("g++") is None, reason="NOT TESTED: g++ is missing")
def test_real_cubins_and_ptx_run_on_the_emulated_driver(compiled: list[build_cuda.Compiled]) -> None:
    old = of_abi(compiled, 7)
    made, x, _ = Case(20, 17, size=(1, 4, 5)).layer()
    plan, want = GroupedConvPlan.from_layer(made), reference(made, x)
    with CtypesLauncher(str(driver.build())) as orin:
        for image in (old.data, old.ptx.encode()):
            assert np.array_equal(device.convolve(orin, orin.load(image), plan, x), want)
        for cut in (64, len(old.data) // 2, len(old.data) - 1):
            with pytest.raises(InputError, match="truncated|no cubin"):
                orin.load(old.data[:cut])
        with pytest.raises(InputError, match="too new for the driver"):
            orin.load(of_abi(compiled, 8).data)


@pytest.mark.skipif(shutil.which("g++") is None, reason="NOT TESTED: g++ is missing")
def test_nvrtc_on_the_device_compiles_into_the_cache(compiled: list[build_cuda.Compiled], tmp_path: Path) -> None:
    of_abi(compiled, 7)
    with CtypesLauncher(str(driver.build())) as orin, pytest.warns(RuntimeWarning, match="from nvrtc"):
        loaded = device.load_kernels(orin, tmp_path, tmp_path)
        assert loaded is not None and loaded.origin == "nvrtc"
        again = device.load_kernels(orin, tmp_path, tmp_path)
        assert again is not None and again.origin == "cache"


def test_what_is_built_is_small_enough_for_the_wheel(compiled: list[build_cuda.Compiled]) -> None:
    assert sum(len(one.data) + len(one.ptx) for one in compiled if one.shipped) < 2_000_000


def test_a_compiler_s_own_words_are_told() -> None:
    try:
        compiler = nvrtc.find(12)
    except UnavailableError:
        pytest.skip("NOT TESTED: NVRTC 12 is missing, pip install 'igate-edge[build]'")
    with pytest.raises(CheckFailed, match=r"nvrtc 12.6 cannot compile for sm_87: .*identifier \"no\" is undefined"):
        compiler.compile('extern "C" __global__ void k() { no; }', "sm_87")
    with pytest.raises(CheckFailed, match="cannot compile for sm_1"):
        compiler.compile(SMALL, "sm_1")


def test_without_a_compiler_the_build_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvrtc.find.cache_clear()
    monkeypatch.setattr(nvrtc, "_places", lambda release: iter([str(tmp_path / f"libnvrtc.so.{release}")]))
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        with pytest.raises(
            UnavailableError, match="cannot be built: NVRTC 12 is missing; NVRTC 13 is missing; nvcc is"
        ):
            list(build_cuda.build(87))
        with pytest.raises(UnavailableError, match="NVRTC cannot build the kernels here: NVRTC 12 is missing"):
            build_cuda.for_driver(87, 12060, SMALL)
        assert build.main(["--only", "cuda", "--out", str(tmp_path)]) == 3
        with pytest.raises(UnavailableError):
            manifest.load(tmp_path)
    finally:
        nvrtc.find.cache_clear()
