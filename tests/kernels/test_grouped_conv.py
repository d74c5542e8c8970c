"""The grouped INT8 convolution, run from its CUDA source on the CPU, against exact integers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from igate_edge.kernels.emulator import SCHEDULES, Emulator
from igate_edge.kernels.grouped_conv import ConvLayer, GroupedConvPlan, reference
from igate_edge.kernels.launch import KERNELS, TILES
from igate_edge.kernels.memory import address, aligned, device_array
from kernel_cases import Case, cases, needs_compiler, run

from igate_edge.errors import CheckFailed, InputError

pytestmark = needs_compiler
CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=map(str, CASES))
def test_bit_for_bit(case: Case) -> None:
    got, want = run(Emulator.load(), case)
    np.testing.assert_array_equal(got, want)


def test_the_cases_are_the_ones_promised() -> None:
    assert len(CASES) >= 150
    assert {case.kernel[0] for case in CASES} == {1, 2, 3, 5, 7}
    assert {case.group for case in CASES} == {0, 16, 32}
    for tile in TILES:
        mine = [case for case in CASES if case.tile == tile]
        assert {case.schedule for case in mine} == set(SCHEDULES)
        assert {case.eager for case in mine} == {False, True}
        residues = set()
        for case in mine:
            plan = GroupedConvPlan.from_layer(case.layer()[0], tile)
            residues |= {branch.steps % 3 for branch in plan.branches}
        assert residues == {0, 1, 2}


def test_outputs_use_the_whole_range() -> None:
    got, _ = run(Emulator.load(), Case(64, 64, relu=False))
    assert got.min() == -128
    assert got.max() == 127
    assert len(np.unique(got)) > 200


def test_the_struct_of_parameters_is_the_kernels_own() -> None:
    import ctypes

    built = Emulator.load().kernels
    assert {name: (kernel.threads, ctypes.sizeof(kernel.params)) for name, kernel in KERNELS.items()} == built


def test_an_address_beyond_a_buffer_is_found() -> None:
    layer, _, _ = Case(16, 16).layer()
    plan = GroupedConvPlan.from_layer(layer, TILES[0])
    x, y = aligned(plan.source.bytes, np.int8), aligned(plan.target.bytes, np.int8)
    launch = plan.launch(address(x), address(y), address(plan.tables.data))
    with pytest.raises(CheckFailed, match="illegal address"):
        Emulator.load().run(launch, [x[:-16], y, *plan.tables.each()])


def test_what_no_branch_reads_is_not_touched() -> None:
    """The middle plane of x, whose weights are all zero, is no memory at all."""
    weight = np.random.default_rng(0).integers(-127, 128, (32, 48, 3, 3)).astype(np.int8)
    weight[:, 16:32] = 0
    layer = ConvLayer(weight, np.full(32, 0.01, np.float32), np.zeros(32, np.float32), (1, 6, 7), pads=(1,) * 4)
    plan = GroupedConvPlan.from_layer(layer, group=16)
    x = np.random.default_rng(1).integers(-128, 128, (1, 48, 6, 7)).astype(np.int8)
    source, target = device_array(plan.source.pack(x)), aligned(plan.target.bytes, np.int8)
    plane = plan.source.bytes // 3
    launch = plan.launch(address(source), address(target), address(plan.tables.data))
    Emulator.load().run(launch, [source[:plane], source[2 * plane :], target, *plan.tables.each()])
    np.testing.assert_array_equal(plan.target.unpack(target), reference(layer, x))


@pytest.mark.parametrize("name", ["x", "y", "tables"])
@pytest.mark.parametrize("address", [8, 0])
def test_an_unusable_address_is_refused_before_the_launch(name: str, address: int) -> None:
    plan = GroupedConvPlan.from_layer(Case(16, 16).layer()[0], TILES[0])
    with pytest.raises(InputError, match=f"{name} is not a usable address"):
        plan.launch(**{"x": 256, "y": 256, "tables": 256, name: address})


def test_a_skip_is_given_when_the_layer_adds_one_and_only_then() -> None:
    for skip in (True, False):
        plan = GroupedConvPlan.from_layer(Case(16, 16, skip=skip).layer()[0], TILES[0])
        with pytest.raises(InputError, match="a skip is missing, or not asked for"):
            plan.launch(256, 256, 256, 0 if skip else 256)


BAD = {
    "weights": ({"weight": np.zeros((4, 4, 3, 3), np.float32)}, "not the weights"),
    "rank": ({"weight": np.zeros((4, 4, 3), np.int8)}, "not the weights"),
    "empty": ({"weight": np.zeros((0, 4, 3, 3), np.int8)}, "not the weights"),
    "scale": ({"scale": np.zeros(4)}, "scale does not fit"),
    "bias": ({"bias": np.zeros(5, np.float32)}, "bias does not fit"),
    "nan": ({"scale": np.full(4, np.nan, np.float32)}, "scale does not fit"),
    "small": ({"size": (1, 2, 2)}, "without a result"),
    "stride": ({"stride": (0, 1)}, "without a result"),
    "far": ({"dilation": (20000, 1), "size": (1, 50000, 3)}, "reaches too far"),
    "low": ({"low": -129}, "not the steps"),
    "order": ({"low": 5, "high": 4}, "not the steps"),
    "skip": ({"skip_scale": float("inf")}, "not the steps"),
    "both": ({"floats": True, "skip_scale": 1.0}, "takes no skip"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_layer_is_refused(name: str) -> None:
    changed, message = BAD[name]
    good = {"weight": np.ones((4, 4, 3, 3), np.int8), "scale": np.ones(4, np.float32), "bias": np.ones(4, np.float32)}
    ConvLayer(**good, size=(1, 5, 5))
    with pytest.raises(InputError, match=message):
        ConvLayer(**{**good, "size": (1, 5, 5), **changed})


def test_a_sum_that_could_overflow_is_refused() -> None:
    weight = np.ones((1, 16 * 8192, 1, 1), np.int8)
    layer = ConvLayer(weight, np.ones(1, np.float32), np.zeros(1, np.float32), (1, 1, 1))
    with pytest.raises(InputError, match="overflow INT32"):
        GroupedConvPlan.from_layer(layer, TILES[0])


def test_no_undefined_behaviour() -> None:
    """A process of its own: the sanitizer ends it at the first finding."""
    script = (
        "from kernel_cases import cases, run; from igate_edge.kernels.emulator import Emulator\n"
        "emulator = Emulator.load(flags=('-fsanitize=undefined', '-fno-sanitize-recover=undefined'))\n"
        "for case in cases()[::9]:\n    got, want = run(emulator, case)\n    assert (got == want).all()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(__file__.rsplit('/', 2)[0])!r})\n{script}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_any_layer_bit_for_bit(seed: int) -> None:
    """Fifty layers a seed, drawn from everything that a layer may be."""
    rng = np.random.default_rng(seed)
    for _ in range(50):
        kernel = (int(rng.integers(1, 6)), int(rng.integers(1, 6)))
        dilation = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
        pads = tuple(rng.integers(0, 4, 4).tolist())
        least = [(side - 1) * d + 1 for side, d in zip(kernel, dilation, strict=True)]
        size = (int(rng.integers(1, 4)), *(low + int(rng.integers(0, 9)) for low in least))
        case = Case(
            int(rng.integers(1, 150)), int(rng.integers(1, 150)), kernel, size, tuple(rng.integers(1, 4, 2).tolist()),
            pads, dilation, int(rng.choice([0, 16, 32, 64])), TILES[rng.integers(3)], str(rng.choice(SCHEDULES)),
            bool(rng.integers(2)), skip=bool(rng.integers(2)), relu=bool(rng.integers(2)), keep=float(rng.random()),
        )  # fmt: skip
        got, want = run(Emulator.load(), case)
        np.testing.assert_array_equal(got, want, err_msg=str(case))
