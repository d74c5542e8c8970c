"""Planted mistakes in the CUDA source of the grouped convolution: each must be caught by some of the cases.

What would survive here would survive in the kernel itself, so this is the test of the tests and of the emulator.
"""

from __future__ import annotations

import dataclasses

import pytest
from igate_edge.kernels import source
from igate_edge.kernels.emulator import SCHEDULES, Emulator
from igate_edge.kernels.launch import TILES
from kernel_cases import Case, needs_compiler, run

from igate_edge.errors import CheckFailed

pytestmark = needs_compiler

BARRIER = "__syncthreads();  // this step's stage has arrived for all, and nobody reads the one that is filled next"
FETCH = "if (ahead < steps) loader.fetch(p, at, ahead, shared + empty * S::kStageBytes);"
WAIT = "cp_async_wait<kStages - 2>();"
#: name -> replacements (old text, new text) in the source.
MUTANTS: dict[str, list[tuple[str, str]]] = {
    "wait one group short": [(WAIT, "cp_async_wait<kStages - 1>();")],
    "no barrier in the main loop": [(BARRIER, "")],
    "fetch before the barrier": [(FETCH, ""), (WAIT, FETCH + WAIT)],
    "no barrier before shared memory is reused": [
        ("__syncthreads();  // the last stages are read: their memory now takes the output tile", "")
    ],
    "no barrier before the output is stored": [("    });\n    __syncthreads();\n", "    });\n")],
    "no barrier after the skip has arrived": [("cp_async_wait<0>();\n        __syncthreads();", "cp_async_wait<0>();")],
    "skip not waited for": [("cp_async_wait<0>();", "")],
    "wrong buffer": [("empty = kStages - 1;", "empty = kStages - 2;")],
    "swapped halves of K": [("half * 2 + lane / 8 % 2", "half * 2 + 1 - lane / 8 % 2")],
    "swapped rows of A": [("i * 16 + lane % 16, half", "i * 16 + (lane + 8) % 16, half")],
    "one-sided swizzle": [
        ("b_rows + swizzled(row, half * 2 + lane / 8 % 2)", "b_rows + row * kRowBytes + (half * 2 + lane / 8 % 2) * 16")
    ],
    "no padding test": [("static_cast<u32>(x[i] + at.dx) < static_cast<u32>(p.width)", "true")],
    "signed bound": [("static_cast<u32>(y[i] + at.dy) < static_cast<u32>(p.height)", "y[i] + at.dy < p.height")],
    "no bound of the block table": [("index < branch.chunks ?", "true ?")],
    "no bound of the rows": [("pixel >= p.pixels || channel >= branch.rows", "pixel >= p.pixels")],
    "no bound of the pixels": [("pixel >= p.pixels || channel >= branch.rows", "channel >= branch.rows")],
    "truncated": [
        ("__float2int_rn(fminf(fmaxf(value, low), high))", "static_cast<s32>(fminf(fmaxf(value, low), high))")
    ],
    "neighbours' scales": [("two.first, two.second);\n        Pair", "one.first, one.second);\n        Pair")],
}
#: Few and small, but: padding, ragged ends, every number of K-steps modulo the three stages, a skip, a second tile.
PROBES = [
    *(Case(32, 16 * chunks, (1, 1), (1, 9, 8), pads=(0,) * 4) for chunks in (3, 4, 7, 12, 13, 17, 21)),
    Case(48, 24, size=(1, 5, 7)),
    Case(20, 40, size=(2, 9, 8), skip=True),
    Case(33, 17, floats=True, size=(1, 3, 5)),
]


def small(mutations: list[tuple[str, str]]) -> str:
    """The source of the 64x32 variant alone, with the replacements made; each must be possible exactly once."""
    text = source.text("igemm.cuh").split("// Small layers")[0]
    for old, new in mutations:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the source"
        text = text.replace(old, new)
    return text + "IGATE_KERNEL(igemm_s8_64x32, IgemmParams, 128, 6) { igemm::run<64, 32, 16, 32>(p); }\n"


def caught(emulator: Emulator) -> str:
    """The first of the probes, in all schedules, that fails; empty when none does."""
    for probe in PROBES:
        for schedule in SCHEDULES:
            for eager in (False, True):
                case = dataclasses.replace(probe, tile=TILES[0], schedule=schedule, eager=eager)
                try:
                    got, want = run(emulator, case)
                except CheckFailed as error:
                    return f"{case}: {error}"
                if not (got == want).all():
                    return f"{case}: {(got != want).sum()} values"
    return ""


def test_the_probes_pass_without_a_mistake() -> None:
    assert caught(Emulator.load(small([]), flags=("-O1",))) == ""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_caught(name: str) -> None:
    assert caught(Emulator.load(small(MUTANTS[name]), flags=("-O1",)))
