"""The kernels: packing and the time that the machine model predicts for an Orin; on a CUDA GPU the times they take.

Nothing here ran on an Orin: every time of one is predicted (kernels/orin.py) and says so. The part for a GPU (gpu.py)
has not run on one yet; without a GPU it is left out and the end of the run says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gpu
import gpu_rivals
import judging
import numpy as np
import pytest
from igate_edge.kernels import device
from igate_edge.kernels.grouped_conv import ConvLayer, GroupedConvPlan, reference
from igate_edge.kernels.orin import MACHINES, predict

#: Of what the tiles multiply, at most this share may be padding.
MOST_PADDING = 0.4
#: Images, channels, height and width of a site in training.
SITE = (16, 128, 60, 80)


@dataclass(frozen=True)
class Layer:
    """A merged 3x3 layer: shared channels in and out, and for each task own ones, of which only it reads its own."""

    size: tuple[int, int]
    shared: tuple[int, int]
    own: tuple[int, int]
    tasks: int

    @property
    def rows(self) -> list[slice]:
        """The output channels of each branch: the shared ones, then each task's own."""
        ends = [0, *(self.shared[1] + task * self.own[1] for task in range(self.tasks + 1))]
        return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]

    def packed(self) -> ConvLayer:
        (shared_in, _), (own_in, _) = self.shared, self.own
        weight = np.zeros((self.rows[-1].stop, shared_in + self.tasks * own_in, 3, 3), np.int8)
        weight[:, :shared_in] = 1
        for task, rows in enumerate(self.rows[1:]):
            weight[rows, shared_in + task * own_in : shared_in + (task + 1) * own_in] = 1
        ends = np.ones(len(weight), np.float32)
        return ConvLayer(weight, ends, ends, (1, *self.size), pads=(1, 1, 1, 1))


LAYERS = {
    "A": Layer((60, 80), (48, 64), (16, 32), 4),
    "B": Layer((30, 40), (96, 96), (32, 32), 4),
    "C": Layer((15, 20), (192, 160), (64, 48), 4),
    "D": Layer((120, 160), (32, 32), (16, 16), 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer(name: str, benchmark: Any, figures: Callable[..., None]) -> None:
    layer = LAYERS[name].packed()
    dense = 9 * int(np.prod(layer.weight.shape[:2])) * int(np.prod(layer.out_size))
    plan = benchmark.pedantic(GroupedConvPlan.from_layer, (layer,), rounds=3, warmup_rounds=1)
    padding = 1 - plan.macs / plan.padded_macs
    figures(
        f"layer {name}: {plan.macs / 1e6:.0f} M multiply-adds ({dense / 1e6:.0f} M dense), {padding:.0%} padding, "
        f"{plan.tiles} tiles of {plan.tile.pixels}x{plan.tile.channels}",
        **{f"padding_{name}": padding, f"tiles_{name}": plan.tiles},
    )
    for machine in MACHINES:
        one = predict(plan, machine)
        figures(
            f"  predicted, {machine.name}: {one.us:.1f} us, {one.bound_us / one.us:.0%} of its bound "
            f"({one.waves:.1f} waves)",
            **{f"predicted_us_{name}_{machine.name}": one.us},
        )
        assert one.us >= one.bound_us
    assert padding <= MOST_PADDING, f"{padding:.0%} of layer {name} is padding"
    assert plan.macs < dense, "the zero blocks of the merged layout are skipped"


def note(
    figures: Callable[..., None], what: str, times: dict[str, np.ndarray], work: gpu.Work, roofline: gpu.Roofline
) -> None:
    """Show every competitor's line, and keep its median and 95th percentile; all are held to the kernel's own work."""
    for name, ms in times.items():
        middle, late = (float(np.percentile(ms, q)) for q in (50, 95))
        figures(f"  {gpu.describe(name, ms, work, roofline)}", **{f"ms {what} {name}": (middle, late)})


def head(card: gpu.Card, roofline: gpu.Roofline, what: str) -> str:
    """Which card, and where its bounds come from."""
    peak = "no INT8 peak is known" if roofline.tops is None else f"{roofline.tops:.0f} INT8 TOPS by its properties"
    return f"{what} on {card.on.device.name}: a copy moves {roofline.gigabytes:.0f} GB/s (measured), {peak}"


@pytest.mark.gpu("gated_select")
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("tasks", [2, 4])
def test_gated_select_on_a_gpu(
    tasks: int,
    backward: bool,
    benchmark: Any,
    figures: Callable[..., None],
    card: gpu.Card,
    roofline: gpu.Roofline,
) -> None:
    calls, gates = gpu_rivals.select_calls(tasks, SITE, backward)
    work = gpu.select_work(gates, 2 * int(np.prod(SITE)) // SITE[1], backward)
    benchmark.pedantic(lambda: (calls["igate"](), card.on.synchronize()), rounds=5, warmup_rounds=1)
    figures(head(card, roofline, f"gated_select, {tasks} tasks, {'forward and backward' if backward else 'forward'}"))
    for flushed in (True, False):
        what = "L2 flushed" if flushed else "L2 warm"
        figures(f" {what}")
        times = card.times(calls, flushed)
        note(figures, what, times, work, roofline)
        if flushed:
            fix = "use mode='torch' on this card"
            judging.at_most("igate / eager", times["igate"] / 1e3, times["eager"] / 1e3, 1.0, fix)


@pytest.mark.gpu("igemm")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_a_gpu(
    name: str, benchmark: Any, figures: Callable[..., None], card: gpu.Card, roofline: gpu.Roofline
) -> None:
    layer, rows = LAYERS[name].packed(), LAYERS[name].rows
    on, module, _ = gpu.opened()
    assert module is not None
    plan, branches = GroupedConvPlan.from_layer(layer), gpu.branch_plans(layer, rows)
    work = gpu.conv_work(plan)
    x = np.random.default_rng(0).integers(-1, 2, (1, layer.weight.shape[1], *layer.size[1:])).astype(np.int8)
    assert np.array_equal(device.convolve(on, module, plan, x), reference(layer, x)), "the kernel computes wrongly here"
    figures(head(card, roofline, f"layer {name}, one launch against {len(branches)}"))
    with (
        gpu.convolutions(on, module, [plan], x) as grouped,
        gpu.convolutions(on, module, branches, x) as separate,
    ):
        calls: dict[str, Callable[[], object]] = {"grouped": grouped, "a launch a branch": separate}
        if why := gpu.missing("gated_select"):
            figures(f" no cuDNN beside it: {why}")
        else:
            calls["cuDNN, float16, a branch each"] = gpu_rivals.torch_branches(layer, rows, x)
        benchmark.pedantic(lambda: (grouped(), on.synchronize()), rounds=5, warmup_rounds=1)
        for flushed in (True, False):
            what = "L2 flushed" if flushed else "L2 warm"
            figures(f" {what}")
            times = card.times(calls, flushed)
            note(figures, what, times, work, roofline)
            if flushed:
                fix, (ours, theirs) = "let the engine's own convolutions run this layer", list(times.values())[:2]
                judging.at_most("grouped / a launch a branch", ours / 1e3, theirs / 1e3, 1.0, fix)
