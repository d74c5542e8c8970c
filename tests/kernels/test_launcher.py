"""The ctypes launcher, unmodified, on the emulated driver: bytes of the reference without a GPU; what is refused."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from igate_edge.kernels import device, launcher, merge
from igate_edge.kernels.emulator import driver
from igate_edge.kernels.grouped_conv import ConvLayer, GroupedConvPlan, reference
from igate_edge.kernels.launch import TILES, IgemmParams
from igate_edge.kernels.launcher_ctypes import CtypesLauncher
from igate_edge.kernels.pack import BlockLayout
from kernel_cases import Case, needs_compiler
from kernel_images import cubin, ptx

from igate_edge.errors import CheckFailed, InputError, UnavailableError

pytestmark = needs_compiler


@pytest.fixture
def orin() -> Iterator[CtypesLauncher]:
    """JetPack 6: a driver of CUDA 12.6."""
    with CtypesLauncher(str(driver.build())) as opened:
        yield opened


def layer() -> tuple[GroupedConvPlan, np.ndarray, np.ndarray]:
    made, x, _ = Case(20, 17, size=(1, 4, 5)).layer()
    return GroupedConvPlan.from_layer(made, TILES[0]), x, reference(made, x)


def test_the_device(orin: CtypesLauncher) -> None:
    assert orin.device == launcher.Device("Orin (emulated)", 87, 12060, 163 * 1024)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("image", [cubin(), ptx()], ids=["cubin", "ptx"])
def test_a_layer_gives_the_bytes_of_the_reference(orin: CtypesLauncher, tile: Any, image: bytes) -> None:
    made, x, skip = Case(33, 40, size=(2, 5, 6), skip=True).layer()
    plan = GroupedConvPlan.from_layer(made, tile)
    assert np.array_equal(device.convolve(orin, orin.load(image), plan, x, skip), reference(made, x, skip))


def test_float_results_and_other_kernels(orin: CtypesLauncher) -> None:
    module = orin.load(cubin())
    made, x, _ = Case(20, 17, floats=True, size=(1, 4, 5)).layer()
    assert np.array_equal(device.convolve(orin, module, GroupedConvPlan.from_layer(made), x), reference(made, x))
    shared, own = np.arange(16), np.full((2, 16), -1)
    own[0, 3:9] = np.arange(16, 32)[3:9]
    plan = merge.MergePlan.of(BlockLayout(1, 32, 3, 5), shared, own, np.full((2, 16), 0.5, np.float32))
    values = np.random.default_rng(0).integers(-128, 128, (1, 32, 3, 5)).astype(np.int8)
    arrays = {"x": plan.source.pack(values), "tables": plan.tables.data}
    got = device.run(orin, module, plan.launch, arrays, np.zeros(plan.target.bytes, np.int8))
    assert np.array_equal(plan.target.unpack(got), merge.reference(plan, values))


def test_a_stream_of_its_own(orin: CtypesLauncher) -> None:
    plan, x, want = layer()
    module, stream, y = orin.load(cubin()), orin.stream(), np.zeros(plan.target.bytes, np.int8)
    arrays = {"x": plan.source.pack(x), "tables": plan.tables.data, "y": y}
    with device.on_device(orin, arrays) as places:
        launcher.run(module, plan.launch(**places), stream)
        orin.synchronize()
        orin.download(y, places["y"])
    assert np.array_equal(plan.target.unpack(y), want)


def test_images_for_another_driver_or_gpu_or_cut_off_are_refused(orin: CtypesLauncher) -> None:
    whole = cubin()
    for image, sentence in (
        (cubin(abi=8), r"too new for the driver: ELF ABI 8 needs a CUDA 13 driver \(JetPack 7\), this is 12.6"),
        (cubin(arch=90), "for another GPU: built for sm_90, the device is sm_87"),
        (whole[:-1], f"truncated: {len(whole) - 1} bytes of at least {len(whole)}"),
        (b"", "no cubin: 0 bytes"),
        (ptx("9.0"), "PTX is too new for the driver: ISA 9.0"),
        (ptx(target="sm_90"), "PTX is for a newer GPU"),
        (ptx()[:-20], "PTX is truncated"),
    ):
        with pytest.raises(InputError, match=sentence):
            orin.load(image)


def test_the_emulated_driver_itself_refuses_what_a_driver_refuses(orin: CtypesLauncher) -> None:
    def code(image: bytes) -> str:
        handle = ctypes.c_void_p()
        given = ctypes.create_string_buffer(image)
        return orin.driver.text(orin.code("cuModuleLoadData", ctypes.byref(handle), given)).split(" ")[0]

    assert code(cubin()) == "CUDA_SUCCESS"
    assert code(cubin(abi=8)) == code(cubin(arch=86)) == "CUDA_ERROR_NO_BINARY_FOR_GPU"
    assert code(ptx("8.8")) == "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"
    assert code(b"nothing") == "CUDA_ERROR_INVALID_IMAGE"
    with pytest.raises(CheckFailed, match=r"failed to load the kernels: CUDA_ERROR_INVALID_SOURCE \(300\)"):
        orin.load(cubin(digest="0" * 64))


def test_a_driver_of_jetpack_7_takes_both_abis() -> None:
    with CtypesLauncher(str(driver.build(13000))) as thor:
        assert thor.device.driver == 13000
        plan, x, want = layer()
        for abi in (7, 8):
            assert np.array_equal(device.convolve(thor, thor.load(cubin(abi)), plan, x), want)


def test_bad_launches_are_refused_before_the_driver_sees_them(orin: CtypesLauncher) -> None:
    module, params, name = orin.load(cubin(kernels=["igemm_s8_64x32"])), IgemmParams(), "igemm_s8_64x32"
    block, grid = (128, 1, 1), (1, 1, 1)
    for arguments, sentence in (
        ((name, (0, 1, 1), block, 0, [params]), "not a grid"),
        ((name, (1, 70000, 1), block, 0, [params]), "grid is too large"),
        ((name, grid, (64, 1, 1), 0, [params]), "needs blocks of 128 threads"),
        ((name, grid, (32, 64, 1), 0, [params]), "block is too large"),
        ((name, grid, block, 200_000, [params]), "too much shared memory: 200000 bytes of 166912"),
        ((name, grid, block, 0, [1]), "an argument has no size: int"),
        ((name, grid, block, 0, [ctypes.c_int32(1)]), "takes one struct of 144 bytes"),
        ((name, grid, block, 0, []), "pass IgemmParams"),
        (("merge_s9", grid, block, 0, []), "there is no kernel 'merge_s9': not in the image"),
        (("merge_s8", grid, block, 0, [merge.MergeParams()]), "there is no kernel 'merge_s8'"),
    ):
        with pytest.raises(InputError, match=sentence):
            module.launch(*arguments)
    orin.synchronize()


def test_a_kernel_that_fails_is_told_and_the_next_context_is_clean(orin: CtypesLauncher) -> None:
    params = IgemmParams(tiles=64)
    orin.load(cubin()).launch("igemm_s8_64x32", (1, 1, 1), (128, 1, 1), TILES[0].shared, [params])
    with pytest.raises(CheckFailed, match=r"failed to run a kernel: CUDA_ERROR_ILLEGAL_ADDRESS.*illegal address"):
        orin.synchronize()
    orin.close()
    with pytest.raises(InputError, match="launcher is closed"):
        orin.allocate(16)
    with CtypesLauncher(str(driver.build())) as again:
        again.synchronize()


def test_bad_tensors_are_refused_before_a_launch(orin: CtypesLauncher) -> None:
    module = orin.load(cubin())
    plan, x, _ = layer()
    places = {"x": 4096, "y": 4096, "tables": 4096}
    for change, sentence in (
        (lambda: device.convolve(orin, module, plan, x.astype(np.float32)), "x is not an INT8 tensor: float32"),
        (lambda: device.convolve(orin, module, plan, x.tolist()), "x is not an INT8 tensor: list"),
        (lambda: device.convolve(orin, module, plan, x[:, :-1]), "does not fit its layout"),
        (lambda: device.convolve(orin, module, plan, x, x), "does not fit its layout"),
        (lambda: plan.launch(**{**places, "x": 4100}), "x is not a usable address: 0x1004"),
        (lambda: plan.launch(**{**places, "y": 0}), "y is not a usable address"),
        (lambda: plan.launch(**places, skip=4096), "a skip is missing, or not asked for"),
        (lambda: orin.upload(4096, np.zeros((4, 4), np.int8).T[::2]), "cannot be copied in one piece"),
        (lambda: orin.download(plan.tables.data, 4096), "cannot be copied in one piece"),
        (lambda: ConvLayer(x[0].astype(np.int16), x, x, (1, 1, 1)), "not the weights of an INT8 convolution"),
        (lambda: dataclasses.replace(plan.layer, size=(1, 0, 4)), "convolution without a result"),
    ):
        with pytest.raises(InputError, match=sentence):
            change()


def test_no_memory_is_left_behind(orin: CtypesLauncher) -> None:
    plan, x, _ = layer()
    freed: list[int] = []
    given: list[int] = []
    allocate, free = orin.allocate, orin.free
    orin.allocate = lambda size: given.append(allocate(size)) or given[-1]  # type: ignore[method-assign,func-returns-value]
    orin.free = lambda place: (freed.append(place), free(place))[0]  # type: ignore[method-assign,func-returns-value]
    device.convolve(orin, orin.load(cubin()), plan, x)
    assert sorted(given) == sorted(freed) and len(given) == 3
    with pytest.raises(CheckFailed, match="failed to free memory"):
        free(given[0])


def test_without_a_driver_or_a_launcher_the_reason_is_said(orin: CtypesLauncher) -> None:
    with pytest.raises(UnavailableError, match=r"there is no CUDA driver: .*libnothing.*--backend emulate"):
        CtypesLauncher("libnothing.so.1")
    with pytest.raises(InputError, match=r"unknown launcher 'cupy': known: ctypes, pycuda, cuda.core"):
        launcher.open_launcher("cupy")
    with pytest.raises(InputError, match="no such device: device 1 of 1"):
        CtypesLauncher(orin.driver._library._name, 1)


IMPORTS = """
import importlib, pkgutil, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "ctypes.dlopen" else None)
import igate_edge
from igate_edge import kernels
heavy = ("_triton", "gated_select")
for found in pkgutil.walk_packages(kernels.__path__, "igate_edge.kernels."):
    if not any(word in found.name for word in heavy):
        importlib.import_module(found.name)
maps = open("/proc/self/maps").read()
assert "libcuda" not in maps and "libnvrtc" not in maps, maps
assert not [name for name in opened if "cuda" in name or "nvrtc" in name], opened
assert not {"pycuda", "cuda", "torch"} & set(sys.modules)
from igate_edge.kernels import launcher
for kind in ("ctypes", "pycuda", "cuda.core"):
    try:
        launcher.open_launcher(kind)
    except Exception as error:
        print(type(error).__name__, error)
assert any("libcuda" in name for name in opened), "the hook sees what ctypes opens"
"""


def test_importing_touches_no_driver_and_opening_says_what_is_missing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    if not lines[0].startswith("UnavailableError there is no CUDA driver"):
        pytest.skip(f"there is a driver here: {lines}")
    assert len(lines) == 3 and all(line.startswith("UnavailableError") for line in lines), lines
