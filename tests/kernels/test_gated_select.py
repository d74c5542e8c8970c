from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from igate_edge.kernels import gated_select_op as op
from igate_edge.kernels.gated_select import gated_select, gated_select_reference, mix, on_grid
from torch import Tensor

from igate_edge.errors import InputError, UnavailableError
from igate_edge.gating.gate import is_open


def inputs(
    tasks: int, channels: int, dtype: torch.dtype = torch.float32, space: tuple[int, ...] = (3, 5)
) -> list[Tensor]:
    """psi, alpha, beta and the task maps."""
    torch.manual_seed(tasks * 100 + channels)
    shape = (2, channels, *space)
    maps = [torch.randn(shape).to(dtype) for _ in range(tasks + 1)]
    return [maps[0], torch.randn(tasks, channels), torch.randn(tasks, channels), *maps[1:]]


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("channels", [1, 3, 31, 33])
def test_every_channel_is_one_of_the_two_maps(tasks: int, channels: int) -> None:
    psi, alpha, beta, *phis = inputs(tasks, channels)
    outs, psi_next = gated_select(psi, phis, alpha, beta)
    for t in range(tasks):
        for c in range(channels):
            assert torch.equal(outs[t][:, c], (phis[t] if alpha[t, c] >= 0 else psi)[:, c])
    weights = beta.softmax(0)
    expected = sum(weights[t].view(1, -1, 1, 1) * outs[t] for t in range(tasks))
    torch.testing.assert_close(psi_next, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("space", [(), (7,), (3, 5), (2, 3, 4)])
def test_any_number_of_positions(space: tuple[int, ...]) -> None:
    psi, alpha, beta, *phis = inputs(2, 4, space=space)
    outs, psi_next = gated_select(psi, phis, alpha, beta)
    assert psi_next is not None
    assert [x.shape for x in (*outs, psi_next)] == [psi.shape] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_channel_that_is_closed_for_all_is_psi_bit_for_bit(dtype: torch.dtype) -> None:
    psi, _, beta, *phis = inputs(3, 33, dtype)
    closed = torch.arange(33) % 2 == 0
    alpha = torch.where(closed, -1.0, 1.0).expand(3, 33).clone()
    alpha[0] = -1.0
    outs, psi_next = gated_select(psi, phis, alpha, beta)
    assert psi_next is not None
    assert torch.equal(psi_next[:, closed], psi[:, closed])
    assert torch.equal(outs[0], psi)
    assert not torch.equal(psi_next[:, ~closed], psi[:, ~closed])


def test_half_types_select_exactly_and_round_the_mix_once() -> None:
    for dtype, step in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        psi, alpha, beta, *phis = inputs(3, 8, dtype)
        outs, psi_next = gated_select(psi, phis, alpha, beta)
        exact = sum(beta.softmax(0)[t].view(1, -1, 1, 1) * outs[t].float() for t in range(3))
        assert psi_next is not None and psi_next.dtype == dtype
        # Only the final rounding: half a unit in the last place of each value.
        assert ((psi_next.float() - exact).abs() <= step * exact.abs() + 1e-6).all()


def test_fixed_gates_are_a_bool_mask() -> None:
    psi, alpha, beta, *phis = inputs(3, 8)
    for one, other in zip(
        gated_select(psi, phis, alpha, beta), gated_select(psi, phis, is_open(alpha), beta), strict=True
    ):
        assert torch.equal(torch.stack(tuple(one)), torch.stack(tuple(other)))  # type: ignore[arg-type]


def test_without_a_reader_the_mix_is_not_made() -> None:
    psi, alpha, _, *phis = inputs(2, 4)
    assert gated_select(psi, phis, alpha, None)[1] is None


def test_gradcheck_of_the_maps_and_the_mix() -> None:
    psi, alpha, beta, *phis = (x.double() for x in inputs(3, 5))
    maps = [x.requires_grad_() for x in (psi, beta, *phis)]

    def flat(psi: Tensor, beta: Tensor, *phis: Tensor) -> tuple[Tensor, ...]:
        outs, psi_next = gated_select_reference(psi, phis, alpha, beta)
        assert psi_next is not None
        return (*outs, psi_next)

    assert torch.autograd.gradcheck(flat, maps)


def test_the_gate_gradient_is_the_straight_through_estimate() -> None:
    """With a soft, differentiable gate in place of the threshold autograd gives the same formula."""
    psi, alpha, beta, *phis = (x.double() for x in inputs(3, 5))
    alpha.requires_grad_()
    probe = torch.randn(4, *psi.shape, dtype=torch.double)
    outs, psi_next = gated_select(psi, phis, alpha, beta)
    assert psi_next is not None
    (torch.stack((*outs, psi_next)) * probe).sum().backward()
    got = alpha.grad
    alpha.grad = None
    soft = alpha.sigmoid()
    gate = is_open(alpha).double() + soft - soft.detach()
    chosen = [gate[t].view(1, -1, 1, 1) * (phis[t] - psi) + psi for t in range(3)]
    mixed = sum(beta.softmax(0)[t].view(1, -1, 1, 1) * chosen[t] for t in range(3))
    (torch.stack((*chosen, mixed)) * probe).sum().backward()
    torch.testing.assert_close(got, alpha.grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_selected_does_not_exist(bad: float) -> None:
    psi, alpha, beta, *phis = inputs(3, 6)
    alpha[:, 0] = 1.0  # psi is read by nobody in channel 0
    clean = [x.clone().requires_grad_() for x in (psi, alpha, beta, *phis)]
    for t in range(3):
        phis[t][:, ~is_open(alpha[t])] = bad
    psi[:, is_open(alpha).all(0)] = bad
    dirty = [x.clone().requires_grad_() for x in (psi, alpha, beta, *phis)]
    results = []
    for psi_, alpha_, beta_, *phis_ in (clean, dirty):
        outs, psi_next = gated_select(psi_, phis_, alpha_, beta_)
        assert psi_next is not None
        results.append(torch.stack((*outs, psi_next)))
        results[-1].square().sum().backward()
    assert torch.equal(results[0], results[1])
    for one, other in ((clean[i], dirty[i]) for i in (0, 2, 3, 4, 5)):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    # alpha compares both maps: positions where that is impossible count as 0, the others as ever.
    spoilt = ~is_open(alpha) | is_open(alpha).all(0)
    assert spoilt.any() and not spoilt.all()
    assert torch.equal(dirty[1].grad, torch.where(spoilt, 0, clean[1].grad))  # type: ignore[arg-type]


def test_an_output_that_no_loss_reads_sends_no_gradient() -> None:
    psi, alpha, beta, *phis = (x.requires_grad_() for x in inputs(2, 4))
    outs, _ = gated_select(psi, phis, alpha, beta)
    outs[0].sum().backward()
    assert phis[0].grad is not None and phis[1].grad is None and beta.grad is None


def test_fake_quantisation_rounds_every_map_and_the_mix_to_the_grid() -> None:
    psi, alpha, beta, *phis = inputs(3, 6)
    step = torch.tensor([2**-6])
    psi.view(-1)[0], alpha[:, 0] = 2.5 * 2**-6, -1.0  # a tie goes to even
    psi.view(-1)[1] = 99.0
    plain, _ = gated_select(psi, phis, alpha, beta)
    outs, psi_next = gated_select(psi, phis, alpha, beta, step=step)
    assert psi_next is not None
    for out, value in zip(outs, plain, strict=True):
        assert torch.equal(out, (value / step).round().clamp(-128, 127) * step)
    assert outs[0].view(-1)[:2].tolist() == [2 * 2**-6, 127 * 2**-6]
    exact = torch.where(is_open(alpha).any(0).view(1, -1, 1, 1), mix(outs, beta.softmax(0)), outs[0])
    assert torch.equal(psi_next, on_grid(exact, step))


def test_fake_quantisation_passes_gradients_straight_through_but_where_it_clips() -> None:
    psi, alpha, beta, *phis = (x.requires_grad_() for x in inputs(2, 3))
    step = torch.tensor([2**-6])  # clips beyond 127 / 64
    outs, psi_next = gated_select(psi, phis, alpha, beta, step=step)
    (outs[0].sum() + 3 * psi_next.sum()).backward()  # type: ignore[union-attr]
    gate, weights = is_open(alpha).view(2, 1, 3, 1, 1), beta.softmax(0).detach().view(2, 1, 3, 1, 1)
    chosen = torch.where(gate, torch.stack(phis), psi)
    held = (chosen.abs() <= 127 / 64) | ((chosen < 0) & (chosen >= -2))
    assert held.any() and not held.all()
    total = torch.where(held, torch.stack([1 + 3 * weights[0], 3 * weights[1]]), 0)
    torch.testing.assert_close(torch.stack([phi.grad for phi in phis]), torch.where(gate, total, 0))  # type: ignore[misc]
    torch.testing.assert_close(psi.grad, torch.where(gate, 0, total).sum(0))


def test_the_operator_keeps_the_rules_of_torch() -> None:
    """Schema, fake kernel, autograd and tracing, on the CPU: torch's own check."""
    psi, alpha, beta, *phis = (x.requires_grad_() for x in inputs(2, 3))
    for mix_logits, step in ((beta, None), (None, None), (beta, torch.tensor([0.02]))):
        checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_static")
        torch.library.opcheck(op.select, (psi, phis, alpha, mix_logits, step), test_utils=checks)


@pytest.mark.parametrize("given", ["012", "0", "2"])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_operator_on_the_cpu_is_the_reference(fixed: bool, given: str) -> None:
    """What an exported program runs where there is no GPU."""
    results = []
    for way in (gated_select_reference, lambda *args: split(op.select(*args, None))):
        psi, alpha, beta, *phis = (x.requires_grad_() for x in inputs(2, 4))
        outs, psi_next = way(psi, phis, is_open(alpha) if fixed else alpha, beta)
        maps = [*outs, psi_next]
        sum(maps[int(i)].square().sum() for i in given).backward()
        results.append([*maps, *(x.grad for x in (psi, alpha, beta, *phis))])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def split(maps: list[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    return tuple(maps[:-1]), maps[-1]


def test_an_exported_operator_runs_on_the_cpu() -> None:
    class Site(torch.nn.Module):
        def forward(self, psi: Tensor, phi: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
            outs, psi_next = split(op.select(psi, [phi, psi], alpha, beta, None))
            return outs[0] + outs[1] + psi_next

    psi, alpha, beta, phi, _ = inputs(2, 4)
    program = torch.export.export(Site(), (psi, phi, alpha, beta))
    assert "igate.gated_select" in str(program.graph)
    outs, psi_next = gated_select(psi, [phi, psi], alpha, beta)
    assert psi_next is not None
    assert torch.equal(program.module()(psi, phi, alpha, beta), outs[0] + outs[1] + psi_next)


def test_errors() -> None:
    psi, alpha, beta, *phis = inputs(2, 4)
    with pytest.raises(InputError, match="unknown mode 'cuda'.*known: auto, torch, triton"):
        gated_select(psi, phis, alpha, beta, mode="cuda")
    with pytest.raises(InputError, match="maps of gated_select differ in shape"):
        gated_select(psi, [phis[0], phis[1][:1]], alpha, beta)
    with pytest.raises(InputError, match=r"alpha .* wrong shape.*\[3, 4\].*pass \[2, 4\]"):
        gated_select(psi, phis, torch.zeros(3, 4), beta)
    with pytest.raises(InputError, match="beta of gated_select has the wrong shape"):
        gated_select(psi, phis, alpha, beta.T)
    with pytest.raises(InputError, match="maps of gated_select"):
        gated_select(psi, [], alpha, beta)
    with pytest.raises(InputError, match=r"not of one floating type.*torch.float32, torch.float16"):
        gated_select(psi, [phis[0].half(), phis[1]], alpha, beta)
    with pytest.raises(InputError, match=r"not of one floating type.*int32"):
        gated_select(psi.int(), [phi.int() for phi in phis], alpha, beta)
    with pytest.raises(InputError, match=r"alpha of gated_select has the wrong dtype.*int64"):
        gated_select(psi, phis, alpha.long(), beta)
    with pytest.raises(InputError, match=r"beta of gated_select has the wrong dtype.*bool"):
        gated_select(psi, phis, alpha, beta >= 0)
    with pytest.raises(InputError, match=r"different devices.*cpu and meta"):
        gated_select(psi, [phis[0], phis[1].to("meta")], alpha, beta)
    with pytest.raises(InputError, match=r"step .* wrong form.*float32 \[\].*shape \[1\]"):
        gated_select(psi, phis, alpha, beta, step=torch.tensor(0.5))


@pytest.mark.skipif(op.interpreted(), reason="Triton interprets, so it serves the CPU")
def test_triton_needs_a_gpu_and_says_so() -> None:
    psi, alpha, beta, *phis = inputs(2, 4)
    with pytest.raises(UnavailableError, match="cannot run in Triton: (the maps are on cpu|no module named triton)"):
        gated_select(psi, phis, alpha, beta, mode="triton")


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, igate_edge.kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
