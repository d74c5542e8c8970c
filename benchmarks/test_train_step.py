"""What a training step costs: gated, gated with frozen gates, and merged, each against the plain net's step.

Forward, backward and update of a batch of 8 frames, one thread, steps in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import judging
import numpy as np
import pytest
import subjects
import torch
from timing import Clock, measure, ms

from igate_edge.gating.merge import merge
from igate_edge.training.balance import Balance
from igate_edge.training.step import Optim, make_optimizers, memory_format, to_device, train_step

WIDTH, SIZE, BATCH = 32, (64, 64), 8
#: The merged net of 1/8 of the channels is as wide as this plain one.
WIDER = 40
MOST_OF_WIDER = 1.25
MOST_GATED = 6.0
ROUNDS = 20


def batch() -> dict[str, torch.Tensor]:
    """Frames and labels of noise."""
    made = torch.Generator().manual_seed(0)
    normals = torch.randn(BATCH, 3, *SIZE, generator=made)
    return {
        "image": torch.from_numpy(subjects.image(SIZE, BATCH)),
        "semseg": torch.randint(0, 12, (BATCH, *SIZE), generator=made),
        "depth": torch.rand(BATCH, *SIZE, generator=made) + 0.5,
        "normals": torch.nn.functional.normalize(normals, dim=1),
    }


def step_of(net: Any) -> Callable[[np.ndarray], object]:
    """One step of a net's training as a call."""
    net.train()
    form = memory_format(net)
    net.to(memory_format=form)
    balance = Balance({task.name: 1.0 for task in net.tasks})
    optimizers, frames = make_optimizers(net, balance, Optim()), to_device(batch(), torch.device("cpu"), form)
    return lambda _: train_step(net, frames, optimizers, balance)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_train_step(longest: float, clock: Clock, benchmark: Any, figures: Callable[..., None]) -> None:
    gated, frozen = (subjects.gated_net(WIDTH, SIZE) for _ in range(2))
    masks = subjects.joint(subjects.gated(WIDTH, SIZE), 1 / 8)
    frozen.set_gates({name: torch.from_numpy(mask) for name, mask in masks.items()})
    frozen.freeze_gates()
    nets = {
        "plain": subjects.plain_net(WIDTH, SIZE),
        "wider": subjects.plain_net(WIDER, SIZE),
        "gated": gated,
        "frozen": frozen,
        "merged": merge(frozen, "masked"),
    }
    runs = {name: step_of(net) for name, net in nets.items()}
    pairs = [("merged", "wider"), ("gated", "plain")]
    times = measure(runs, np.zeros(1), pairs, least=ROUNDS, seconds=2 * longest, clock=clock)
    benchmark.pedantic(runs["merged"], (None,), rounds=10, warmup_rounds=1)
    for name in runs:
        pair = judging.known_ratio(f"a step of the {name} net over a plain one", times[name], times["plain"], ROUNDS)
        figures(f"{name:7} {ms(times[name]):6.1f} ms a step, x{pair['ratio']:.2f} of plain", **{name: pair["ratio"]})
    fix = "look at what the merged step does besides its convolutions: gating/merge.py"
    judging.at_most(
        "merged step / step of a plain net as wide", times["merged"], times["wider"], MOST_OF_WIDER, fix, ROUNDS
    )
    fix = "look for branches that run although nobody reads them: gating/execute.py"
    judging.at_most("gated step / plain step", times["gated"], times["plain"], MOST_GATED, fix, ROUNDS)
    judging.at_most("merged step / gated step with frozen gates", times["merged"], times["frozen"], 1.0, fix, ROUNDS)
