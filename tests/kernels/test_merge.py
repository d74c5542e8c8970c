"""The mix kernel on the CPU against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from igate_edge.kernels.emulator import Emulator
from igate_edge.kernels.memory import address, aligned, device_array
from igate_edge.kernels.merge import MergePlan, reference
from igate_edge.kernels.pack import BlockLayout
from kernel_cases import needs_compiler

from igate_edge.errors import InputError


def site(tasks: int, channels: int, group: int = 0, share: float = 0.5, seed: int = 0) -> tuple[MergePlan, np.ndarray]:
    """A site [shared | own blocks of each task]: every task has some whole blocks, some channels in them its own."""
    rng = np.random.default_rng([seed, tasks, channels])
    blocks = -(-channels // 16)
    shared, own, next_block = np.arange(channels), np.full((tasks, channels), -1), blocks
    for t in range(tasks):
        for block in np.flatnonzero(rng.random(blocks) < share).tolist():
            for channel in range(16 * block, min(16 * block + 16, channels)):
                if rng.random() < 0.7:
                    own[t, channel] = 16 * next_block + channel % 16
            next_block += 1
    weights = rng.dirichlet(np.ones(tasks), channels).T.astype(np.float32)
    source = BlockLayout(2, 16 * next_block, 3, 5, group)
    x = rng.integers(-128, 128, (2, source.channels, 3, 5)).astype(np.int8)
    return MergePlan.of(source, shared, own, np.ascontiguousarray(weights)), x


@needs_compiler
@pytest.mark.parametrize("group", [0, 16, 32])
@pytest.mark.parametrize(("tasks", "channels"), [(1, 16), (2, 40), (3, 64), (5, 17), (8, 33)])
def test_bit_for_bit(tasks: int, channels: int, group: int) -> None:
    plan, x = site(tasks, channels, group)
    source, target = device_array(plan.source.pack(x)), aligned(plan.target.bytes, np.int8)
    source.setflags(write=False)
    launch = plan.launch(address(source), address(target), address(plan.tables.data))
    Emulator.load().run(launch, [source, target, *plan.tables.each()])
    np.testing.assert_array_equal(plan.target.unpack(target), reference(plan, x))


def test_the_reference_is_the_formula() -> None:
    plan, x = site(3, 24)
    psi, result = x[:, :24].astype(np.float64), reference(plan, x)
    taken = [np.where((own >= 0)[:, None, None], x[:, np.maximum(own, 0)], psi) for own in plan.own]
    mix = sum(w[:, None, None] * phi for w, phi in zip(plan.weights.astype(np.float64), taken, strict=True))
    assert np.abs(result - mix).max() <= 0.5 + 1e-4
    closed = (plan.own < 0).all(axis=0)
    assert closed.any()
    np.testing.assert_array_equal(result[:, closed], x[:, :24][:, closed])


@needs_compiler
def test_blocks_that_nobody_selects_are_not_loaded() -> None:
    """All tasks own all channels: psi's blocks may be illegal memory."""
    channels = np.arange(16)
    source = BlockLayout(1, 48, 2, 2, 16)
    weights = np.full((2, 16), 0.5, np.float32)
    plan = MergePlan.of(source, channels, np.stack([channels + 16, channels + 32]), weights)
    x = np.random.default_rng(0).integers(-128, 128, (1, 48, 2, 2)).astype(np.int8)
    memory, target = device_array(source.pack(x)), aligned(plan.target.bytes, np.int8)
    launch = plan.launch(address(memory), address(target), address(plan.tables.data))
    Emulator.load().run(launch, [memory[64:], target, *plan.tables.each()])
    np.testing.assert_array_equal(plan.target.unpack(target), reference(plan, x))


BAD = {
    "shapes": (np.arange(8), np.full((2, 16), -1), "not a site's tables"),
    "range": (np.arange(16) + 40, np.full((2, 16), -1), "out of range"),
    "below": (np.arange(16) - 2, np.full((2, 16), -1), "out of range"),
    "nothing": (np.full(16, -1), np.full((2, 16), -1), "has no value"),
    "places": (np.arange(16) + 1, np.full((2, 16), -1), "do not stand in blocks"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_site_is_refused(name: str) -> None:
    shared, own, message = BAD[name]
    with pytest.raises(InputError, match=message):
        MergePlan.of(BlockLayout(1, 48, 2, 2), shared, own, np.full((2, 16), 0.5, np.float32))
