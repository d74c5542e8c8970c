"""The emulator itself: its tensor core against the published tables, and what it finds wrong with a kernel."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
from igate_edge.kernels import source
from igate_edge.kernels.emulator import SCHEDULES, Emulator, build
from igate_edge.kernels.launch import Launch
from igate_edge.kernels.memory import address, aligned, device_array
from kernel_cases import needs_compiler

from igate_edge.errors import CheckFailed, InputError, UnavailableError

#: A few kernels of one warp or more, each with one mistake, or with a single instruction to look at.
PROBES = """
struct Probe { const u32* a; const u32* b; u32* out; };
IGATE_KERNEL(probe_mma, Probe, 32, 1) {
    u32 a[4]; s32 acc[4];
    for (s32 i = 0; i < 4; ++i) a[i] = load(p.a + threadIdx.x * 4 + i);
    for (s32 i = 0; i < 4; ++i) acc[i] = load((const s32*)p.out + threadIdx.x * 4 + i);
    mma_s8(acc, a, load(p.b + threadIdx.x * 2), load(p.b + threadIdx.x * 2 + 1));
    for (s32 i = 0; i < 4; ++i) store((s32*)p.out + threadIdx.x * 4 + i, acc[i]);
}
IGATE_KERNEL(probe_ldmatrix, Probe, 32, 1) {
    IGATE_SHARED(shared);
    for (s32 i = threadIdx.x; i < 128; i += 32) ((u32*)shared)[i] = load(p.a + i);
    __syncthreads();
    u32 to[4];
    ldmatrix_x4(to, shared + threadIdx.x * 16);
    for (s32 i = 0; i < 4; ++i) store(p.out + threadIdx.x * 4 + i, to[i]);
}
IGATE_KERNEL(probe_alone, Probe, 32, 1) {
    u32 to[4]; IGATE_SHARED(shared);
    if (threadIdx.x < 16) ldmatrix_x4(to, shared);
}
IGATE_KERNEL(probe_mixed, Probe, 32, 1) {
    u32 to[4]; s32 acc[4]; IGATE_SHARED(shared);
    if (threadIdx.x < 16) ldmatrix_x4(to, shared); else mma_s8(acc, to, 0, 0);
}
IGATE_KERNEL(probe_misaligned, Probe, 32, 1) { cp_async16(shared_start(), (const s8*)p.a + 8, true); }
IGATE_KERNEL(probe_misplaced, Probe, 32, 1) { cp_async16(shared_start() + 8, p.a, true); }
IGATE_KERNEL(probe_outside, Probe, 32, 1) { cp_async16(shared_start() + 512, p.a, true); }
IGATE_KERNEL(probe_overrun, Probe, 32, 1) { shared_start()[512] = 1; }
IGATE_KERNEL(probe_read_only, Probe, 32, 1) { store((u32*)p.a, 1u); }
IGATE_KERNEL(probe_beyond, Probe, 32, 1) { store(p.out, load(p.b + 64)); }
IGATE_KERNEL(probe_async, Probe, 32, 1) {
    cp_async16(shared_start() + threadIdx.x * 16, p.a + threadIdx.x * 4, true);
    cp_async_commit();
    store(p.out + threadIdx.x * 2, ((u32*)shared_start())[threadIdx.x * 4]);
    cp_async_wait<0>();
    store(p.out + threadIdx.x * 2 + 1, ((u32*)shared_start())[threadIdx.x * 4]);
}
"""


class Probe(ctypes.Structure):
    _fields_ = (("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("out", ctypes.c_void_p))


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    helper = "IGATE_DEVICE s8* shared_start() { IGATE_SHARED(shared); return shared; }\n"
    return Emulator.load(source.text("device.cuh") + helper + PROBES, flags=("-O1",))


def launch(emulator: Emulator, name: str, a: np.ndarray, b: np.ndarray, out: np.ndarray, **how: object) -> None:
    params = Probe(address(a), address(b), address(out))
    emulator.run(Launch(f"probe_{name}", (1, 1, 1), (32, 1, 1), 512, params), [a, b, out], **how)  # type: ignore[arg-type]


def words(seed: int, count: int) -> np.ndarray:
    array = device_array(np.random.default_rng(seed).integers(0, 2**32, count).astype(np.uint32))
    array.setflags(write=False)
    return array


@needs_compiler
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mma_is_the_instruction_of_the_isa(emulator: Emulator, schedule: str) -> None:
    """m16n8k32 of 8-bit integers, fragments as the formulas of the PTX ISA 8.5 give them (section 9.7.14.5.8)."""
    a, b = words(1, 128), words(2, 64)
    out = device_array(np.random.default_rng(3).integers(-(2**20), 2**20, 128).astype(np.int32))
    full_a, full_b, full_c = np.zeros((16, 32), int), np.zeros((32, 8), int), np.zeros((16, 8), int)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i, value in enumerate(a[4 * lane : 4 * lane + 4].view(np.int8).tolist()):
            row = group if i < 4 or 8 <= i < 12 else group + 8
            full_a[row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)] = value
        for i, value in enumerate(b[2 * lane : 2 * lane + 2].view(np.int8).tolist()):
            full_b[thread * 4 + (i & 3) + (16 if i >= 4 else 0), group] = value
        for i in range(4):
            full_c[group if i < 2 else group + 8, thread * 2 + (i & 1)] = out[4 * lane + i]
    want = full_c + full_a @ full_b
    launch(emulator, "mma", a, b, out, schedule=schedule)
    for lane in range(32):
        for i in range(4):
            row, column = (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)
            assert out[4 * lane + i] == want[row, column]


@needs_compiler
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ldmatrix_hands_row_l4_of_each_matrix_to_lane_l(emulator: Emulator, schedule: str) -> None:
    a, out = words(4, 128), aligned(128, np.uint32)
    launch(emulator, "ldmatrix", a, words(5, 64), out, schedule=schedule)
    matrices = a.reshape(4, 8, 4)  # matrix, row, 4-byte word
    want = [[matrices[m, lane // 4, lane % 4] for m in range(4)] for lane in range(32)]
    np.testing.assert_array_equal(out.reshape(32, 4), want)


@needs_compiler
@pytest.mark.parametrize("eager", [False, True])
def test_an_asynchronous_copy_lands_at_the_wait_or_at_once(emulator: Emulator, eager: bool) -> None:
    a, out = words(6, 128), aligned(64, np.uint32)
    launch(emulator, "async", a, words(7, 64), out, eager=eager)
    early, late = out.reshape(32, 2).T
    np.testing.assert_array_equal(late, a[::4])
    np.testing.assert_array_equal(early, a[::4] if eager else np.full(32, 0x5A5A5A5A))


FOUND = {
    "alone": "waits for lanes that never come",
    "mixed": "meet in different instructions",
    "misaligned": "misaligned address",
    "misplaced": "misaligned offset 8",
    "outside": "shared memory offset 512 of 512",
    "overrun": "wrote beyond its shared memory",
    "read_only": "a write to a read-only buffer",
    "beyond": "illegal address: 256 bytes into a buffer of 256",
}


@needs_compiler
@pytest.mark.parametrize("name", FOUND)
def test_a_mistake_is_named_and_the_emulator_goes_on(emulator: Emulator, name: str) -> None:
    a, b, out = words(8, 128), words(9, 64), aligned(128, np.uint32)
    with pytest.raises(CheckFailed, match=FOUND[name]):
        launch(emulator, name, a, b, out)
    launch(emulator, "ldmatrix", a, b, out)
    assert out.any()


@needs_compiler
def test_a_launch_that_does_not_fit_is_refused(emulator: Emulator) -> None:
    a, b, out = words(8, 128), words(9, 64), aligned(128, np.uint32)
    params = Probe(address(a), address(b), address(out))
    for wrong, message in (
        (Launch("nothing", (1, 1, 1), (32, 1, 1), 0, params), "no kernel nothing"),
        (Launch("probe_mma", (1, 1, 1), (64, 1, 1), 0, params), "needs a block of 32"),
        (Launch("probe_mma", (1, 1, 1), (32, 1, 1), 0, ctypes.c_int64(0)), "takes 24 bytes, 8 given"),  # type: ignore[arg-type]
        (Launch("probe_mma", (1, 1, 1), (32, 1, 1), 200 * 1024, params), "more shared memory"),
    ):
        with pytest.raises(CheckFailed, match=message):
            emulator.run(wrong, [a, b, out])
    with pytest.raises(InputError, match="unknown schedule"):
        emulator.run(Launch("probe_mma", (1, 1, 1), (32, 1, 1), 0, params), [a, b, out], schedule="random")


@needs_compiler
def test_a_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(UnavailableError, match="cannot build the emulator.*nonsense"):
        Emulator.load("nonsense")


@needs_compiler
def test_a_build_is_found_again_and_forgotten_after_a_month(tmp_path: Path) -> None:
    text = source.text("device.cuh")
    first = build(text, ("-O0",), tmp_path)
    made = first.stat().st_mtime_ns
    old = first.with_name("old.so")
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    os.utime(first, (1, 1))
    assert build(text, ("-O0",), tmp_path) == first
    assert first.stat().st_mtime_ns >= made
    other = build(text, ("-O0", "-g"), tmp_path)
    assert other != first
    assert first.exists()
    assert not old.exists()
