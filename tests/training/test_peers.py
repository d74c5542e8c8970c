"""Torch-Pruning as a rival: pruned to a cost, trained on through the stages, and found again from its file."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from export_nets import run
from tiny_training import TINY, source

from igate_edge.errors import BudgetError, InputError, UnavailableError
from igate_edge.gating.convert import PlainNet
from igate_edge.gating.export import to_onnx
from igate_edge.training import peers
from igate_edge.training.balance import Balance
from igate_edge.training.config import make_tasks
from igate_edge.training.stages import Context, build_plain, plain

CONFIG = replace(TINY, width=8, head_width=16)


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("torch_pruning", reason="extra `peers` is not installed")


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    frames = source(CONFIG)
    return Context(CONFIG, make_tasks(CONFIG, frames.available, frames.class_weights), frames, tmp_path)


def test_a_missing_library_is_named_and_import_loads_none() -> None:
    code = (
        "import sys; from igate_edge.training import peers; assert 'torch_pruning' not in sys.modules\n"
        "sys.modules['torch_pruning'] = None\n"
        "try: peers._load()\n"
        "except Exception as error: print(type(error).__name__, '[peers]' in str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [UnavailableError.__name__, "True"]


def test_macs_are_those_of_one_frame() -> None:
    frames = source(CONFIG)
    task = make_tasks(CONFIG, frames.available, frames.class_weights)[1]
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU())
    net = PlainNet(backbone, [task], example=torch.zeros(1, 3, 32, 32))
    # 3x3 from 3 to 8, the head's 3x3 from 8 to 16 and its 1x1 to 1, at 16x16 each.
    assert peers.macs(net) == 16 * 16 * (9 * 3 * 8 + 9 * 8 * 16 + 16)


def test_pruning_meets_a_cost_and_leaves_the_net_alone(ctx: Context) -> None:
    net = build_plain(ctx)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    smaller = peers.prune_to(net, 0.6 * peers.macs(net), step=2)
    assert 0.4 * peers.macs(net) < peers.macs(smaller) <= 0.6 * peers.macs(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    counts = peers.widths(smaller)
    assert [counts[f"heads.{name}.out"] for name in ("semseg", "depth")] == [3, 1]
    assert all(count % 2 == 0 for name, count in counts.items() if not name.endswith(".out"))
    assert peers.prune_to(net, 2 * peers.macs(net)).state_dict().keys() == before.keys()
    image = torch.randn(1, 3, 32, 32)
    data = to_onnx(smaller, CONFIG.preprocess(), example=image)
    with torch.no_grad():
        wanted = smaller.eval()(image)
    for name, value in run(data, image).items():
        assert np.abs(value - wanted[name].numpy()).max() <= 1e-4 * wanted[name].abs().max()


def test_the_cost_may_be_anything_and_an_impossible_one_is_refused(ctx: Context) -> None:
    net = build_plain(ctx)
    smaller = peers.prune_to(net, 60.0, cost=lambda probe: float(sum(peers.widths(probe).values())) / 10, step=2)
    assert sum(peers.widths(smaller).values()) <= 600 < sum(peers.widths(net).values())
    with pytest.raises(BudgetError, match="pruning does not reach the target"):
        peers.prune_to(net, 1.0)
    with pytest.raises(InputError, match="share of channels"):
        peers.prune(net, 1.5)


def test_a_pruned_net_trains_on_and_is_found_again(ctx: Context) -> None:
    balance = Balance({"semseg": 1.0, "depth": 1.0})
    start = plain(ctx, "base", balance, steps=3, lr=1e-3)
    target = 0.7 * peers.macs(build_plain(ctx))
    settings = {"target": target, "steps": 3, "lr": 1e-3}
    done = peers.pruned(ctx, start, balance, name="pruned", step=2, **settings)
    assert done.result["form"] == "pruned" and set(done.result["metrics"]) == {"semseg", "depth"}
    net = peers.restore(ctx, done.path)
    assert peers.widths(net) == done.result["widths"] and peers.macs(net) <= target
    assert all(torch.equal(value, done.state()[name]) for name, value in net.state_dict().items())
    assert not net.training
    assert peers.pruned(ctx, start, balance, name="pruned", step=2, **settings).key == done.key
    assert peers.pruned(ctx, start, balance, name="pruned", step=1, **settings).key != done.key
    with pytest.raises(InputError, match="do not fit"):
        peers.shrink(build_plain(ctx, ctx.tasks[:1]), done.state())


def test_one_task_is_pruned_alone(ctx: Context) -> None:
    task, balance = [ctx.tasks[1]], Balance({"depth": 1.0})
    start = plain(ctx, "single", balance, steps=2, lr=1e-3, tasks=task)
    target = 0.7 * peers.macs(build_plain(ctx, task))
    done = peers.pruned(ctx, start, balance, name="narrow", target=target, steps=2, lr=1e-3, step=2, tasks=task)
    assert list(peers.restore(ctx, done.path, task).heads) == ["depth"]
