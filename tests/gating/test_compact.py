from __future__ import annotations

import copy
import itertools

import pytest
import torch
from igate_edge.kernels.gated_select import gated_select
from torch import Tensor, nn
from torch_nets import BACKBONES, Block, all_masks, batch, gated, random_masks, scatter, tasks

from igate_edge.gating.compact import fix_site, select_fixed
from igate_edge.gating.convert import InterroGateNet, interrogate

IMAGE = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def pair(net: InterroGateNet) -> tuple[InterroGateNet, InterroGateNet]:
    """(dense, compact): the same net in double, with free gates and with frozen ones."""
    dense = net.double()
    frozen = copy.deepcopy(dense)
    frozen.freeze_gates()
    return dense, frozen


def live_rows(net: InterroGateNet, stream: str) -> dict[str, Tensor]:
    """Site -> bool [C]: rows of a branch that somebody reads."""
    masks = net.gate_masks()
    if stream == "shared":
        return {name: ~mask.all(0) for name, mask in masks.items()}
    return {name: mask[net.task_names.index(stream)] for name, mask in masks.items()}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("chance", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("tie", ["none", "stage"])
def test_frozen_equals_dense(backbone: str, chance: float, tie: str) -> None:
    """Outputs and gradients in training and evaluation; in double, so that only a wrong row can differ."""
    net = gated(backbone, tie=tie)
    net.set_gates(random_masks(net, chance))
    dense, frozen = pair(net)
    image = IMAGE.double()
    for training in (True, False, True):
        outputs, expected = frozen.train(training)(image), dense.train(training)(image)
        for name in expected:
            torch.testing.assert_close(outputs[name], expected[name], rtol=1e-6, atol=1e-8)
    for module in (dense, frozen):
        torch.stack([value.square().mean() for value in module(image).values()]).sum().backward()
    expected_grads = {name: p.grad for name, p in dense.named_parameters() if ".alpha." not in name}
    for name, parameter in frozen.named_parameters():
        if ".alpha." in name:
            assert parameter.grad is None
            continue
        want = expected_grads[name]
        got = parameter.grad
        if want is not None or got is not None:
            zero = torch.zeros_like(parameter)
            torch.testing.assert_close(
                zero if got is None else got, zero if want is None else want, rtol=1e-6, atol=1e-8
            )


def test_frozen_equals_dense_in_float32() -> None:
    net = gated(granule=2)
    net.set_gates(random_masks(net))
    frozen = copy.deepcopy(net)
    frozen.freeze_gates()
    for training in (True, False):
        outputs, expected = frozen.train(training)(IMAGE), net.train(training)(IMAGE)
        for name in expected:
            torch.testing.assert_close(outputs[name], expected[name], rtol=1e-4, atol=1e-6 * 10)


def test_running_statistics_of_live_rows_are_the_dense_ones_and_dead_rows_rest() -> None:
    net = gated()
    net.set_gates(random_masks(net))
    before = {name: b.clone() for name, b in net.double().named_buffers()}
    dense, frozen = pair(net)
    dense.train()(IMAGE.double())
    frozen.train()(IMAGE.double())
    after = dict(dense.named_buffers())
    checked = 0
    for stream in [*net.task_names, "shared"]:
        for site, norm in (("stem", "bn"), ("layer1_conv1", "layer1.bn1"), ("layer2_add", "layer2.down.1")):
            key = f"branches.{stream}.{norm}.running_mean"
            rows = live_rows(frozen, stream)[site]
            got = frozen.get_buffer(key)
            torch.testing.assert_close(got[rows], after[key][rows])
            assert torch.equal(got[~rows], before[key][~rows])
            checked += int(rows.sum())
    assert checked > 20


@pytest.mark.parametrize("momentum", [0.1, None])
def test_cumulative_momentum(momentum: float | None) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU())
    net = interrogate(backbone, tasks(2), example=torch.zeros(1, 3, 32, 32))
    scatter(net)
    net.set_gates(random_masks(net))
    dense, frozen = pair(net)
    for _ in range(3):
        dense(IMAGE.double()), frozen(IMAGE.double())
    rows = live_rows(net, "shared")["0"]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        key = f"branches.shared.1.{name}"
        got, want = frozen.get_buffer(key), dense.get_buffer(key)
        torch.testing.assert_close(*((got[rows], want[rows]) if got.ndim else (got, want)))


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"affine": False}])
def test_norms_without_statistics_or_scale(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8, **options), nn.ReLU())
    net = interrogate(backbone, tasks(2), example=torch.zeros(1, 3, 32, 32))
    net.set_gates(random_masks(net))
    scatter(net)
    dense, frozen = pair(net)
    for training in (True, False):
        outputs, expected = frozen.train(training)(IMAGE.double()), dense.train(training)(IMAGE.double())
        for name, value in expected.items():
            torch.testing.assert_close(outputs[name], value)


def test_rows_computed_are_the_cost_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    """method.md section 4, invariant c: rows per layer / C = sum_t mean G_t + 1 - mean prod_t G_t, at most T."""
    net = gated()
    net.set_gates(random_masks(net, 0.5))
    net.freeze_gates()
    counts: list[int] = []
    plain = nn.functional.conv2d

    def spy(x: Tensor, weight: Tensor, *args: object) -> Tensor:
        counts.append(weight.shape[0])
        return plain(x, weight, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.functional, "conv2d", spy)
    net.heads = nn.ModuleDict({name: nn.Identity() for name in net.task_names})
    net(IMAGE)
    rows = 0.0
    for name, convs in (("stem", 1), ("layer1_conv1", 1), ("layer1_add", 1), ("layer2_conv1", 1), ("layer2_add", 2)):
        mask = net.gate_masks()[name].double()
        cost = mask.mean(1).sum() + 1 - mask.prod(0).mean()
        assert cost <= len(net.tasks)
        rows += convs * float(cost) * mask.shape[1]
    assert sum(counts) == round(rows)


def test_a_branch_without_an_open_gate_does_not_run_and_learns_nothing() -> None:
    net = gated()
    masks = random_masks(net)
    masks["layer1_conv1"][0] = False
    masks["layer1_conv1"][1:] = True
    masks["layer1_add"][:] = True
    net.set_gates(masks)
    net.freeze_gates()
    before = net.branches["semseg"].layer1.bn1.num_batches_tracked.clone()  # type: ignore[union-attr, operator]
    net.loss(batch()).backward()
    grads = {name for name, p in net.named_parameters() if p.grad is not None}
    assert "branches.semseg.layer1.conv1.weight" not in grads
    assert "branches.depth.layer1.conv1.weight" in grads
    assert torch.equal(net.branches["semseg"].layer1.bn1.num_batches_tracked, before)  # type: ignore[union-attr, arg-type]
    # Every task opened the whole block's output: the shared branch is not computed there, nor what only it reads.
    assert "branches.shared.layer1.conv2.weight" not in grads


def test_frozen_masks_survive_train_reload_and_copies() -> None:
    net = gated(tie="stage")
    net.set_gates(random_masks(net))
    net.eval().freeze_gates()
    masks, outputs = net.gate_masks(), net(IMAGE)
    for parameter in net.gate_parameters():
        parameter.data.neg_()
    fresh = gated(seed=3, tie="stage")
    fresh(IMAGE)  # builds what a load must renew
    fresh.load_state_dict(net.state_dict())
    for other in (net, copy.deepcopy(net), fresh):
        assert not any(p.requires_grad for p in other.gate_parameters())
        other.train().eval()
        for name, mask in other.gate_masks().items():
            assert torch.equal(mask, masks[name])
        for name, value in other(IMAGE).items():
            assert torch.equal(value, outputs[name])


def test_decisions_can_be_set_after_the_freeze() -> None:
    net = gated().eval()
    net.freeze_gates()
    first = net(IMAGE)
    net.set_gates(all_masks(net, False))
    second = net(IMAGE)
    reference = gated().eval()
    reference.set_gates(all_masks(reference, False))
    for name, value in reference(IMAGE).items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5)
        assert not torch.equal(first[name], second[name])


def test_a_copy_of_a_frozen_net_is_independent() -> None:
    net = gated().eval()
    net.set_gates(random_masks(net))
    net.freeze_gates()
    before = net(IMAGE)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    twin(IMAGE)
    for name, value in net(IMAGE).items():
        assert torch.equal(value, before[name])
        assert not torch.equal(twin(IMAGE)[name], value)


def test_subsets_of_tasks_stay_silent_when_frozen() -> None:
    net = gated()
    net.set_gates(random_masks(net))
    net.freeze_gates()
    net.loss(batch(keys=["depth"])).backward()
    touched = {name.split(".")[1] for name, p in net.named_parameters() if p.grad is not None and name[0] == "b"}
    assert touched == {"depth", "shared"}
    net.eval()
    torch.testing.assert_close(net(IMAGE, tasks=["depth"])["depth"], net(IMAGE)["depth"])


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_put_together_as_the_dense_select_does(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tasks_, channels = 1 + seed % 4, 1 + seed % 7
    mask = torch.rand(tasks_, channels, generator=generator) < (seed % 5) / 4
    maps = torch.randn(tasks_ + 1, 2, channels, 3, 2, generator=generator)
    beta = torch.randn(tasks_, channels, generator=generator)
    outs, psi_next = gated_select(maps[-1], list(maps[:-1]), mask, beta)
    site = fix_site(mask)
    rows = {s: maps[s] if live is None else maps[s].index_select(1, live) for s, live in enumerate(site.live)}
    for wanted in itertools.chain.from_iterable(
        itertools.combinations(range(tasks_ + 1), size) for size in range(1, tasks_ + 2)
    ):
        got = select_fixed(site, rows, wanted, lambda: beta.softmax(0))
        for stream in wanted:
            assert torch.equal(got[stream], psi_next if stream == tasks_ else outs[stream])  # type: ignore[arg-type]


def test_frozen_gates_stay_in_training() -> None:
    """cases.md M4: train(), steps and weight decay move neither frozen gates nor branches that nobody runs."""
    net = gated()
    net.set_gates({name: torch.zeros_like(mask) for name, mask in net.gate_masks().items()})
    net.freeze_gates()
    own = tuple(f"branches.{name}." for name in net.task_names)  # closed everywhere: nobody runs these
    held = {n: b.clone() for n, b in net.named_buffers() if ".frozen" in n or n.startswith(own)}
    logits = [p.clone() for p in net.gate_parameters()]
    moving = {name: b.clone() for name, b in net.named_buffers() if name.startswith("branches.shared")}
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        net.train().loss(batch()).backward()
        optimizer.step()
    now = dict(net.named_buffers())
    assert len(held) > 10 and all(torch.equal(now[name], value) for name, value in held.items())
    assert all(torch.equal(p, old) for p, old in zip(net.gate_parameters(), logits, strict=True))
    assert any(not torch.equal(now[name], value) for name, value in moving.items())  # what trains, trains


def test_frozen_statistics_do_not_move_in_evaluation() -> None:
    net = gated()
    net.set_gates(random_masks(net))
    net.freeze_gates()
    net.train().eval()
    before = {name: b.clone() for name, b in net.named_buffers()}
    net(IMAGE + 5.0)
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())


def test_pre_activation_and_group_norm_take_the_dense_path() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 8, 3, 2, 1), Block(8, 8)
            self.gn = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.ReLU())
            self.bn = nn.BatchNorm2d(8)

        def forward(self, image: Tensor) -> Tensor:
            x = self.block(self.stem(image))
            return x + self.gn(self.bn(x).relu())

    torch.manual_seed(0)
    net = interrogate(Net(), tasks(3), example=torch.zeros(1, 3, 32, 32))
    scatter(net)
    net.set_gates(random_masks(net))
    dense, frozen = pair(net)
    for training in (True, False):
        outputs, expected = frozen.train(training)(IMAGE.double()), dense.train(training)(IMAGE.double())
        for name, value in expected.items():
            torch.testing.assert_close(outputs[name], value)


def test_layers_replaced_after_the_conversion_run_their_own_forward() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = gated()
    for branch in net.branches.values():
        old = branch.layer1.bn2
        branch.layer1.bn2 = Doubled(old.num_features)  # type: ignore[union-attr]
        nn.utils.parametrizations.weight_norm(branch.layer2.conv1)  # type: ignore[arg-type, union-attr]
    net.set_gates(random_masks(net))
    dense, frozen = pair(net)
    outputs, expected = frozen.eval()(IMAGE.double()), dense.eval()(IMAGE.double())
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value)
