"""The Triton kernels of gated_select, run by Triton's interpreter on the CPU, against the torch reference.

Triton decides when it is imported whether it interprets, so this file has a process of its own: `make test` runs
`TRITON_INTERPRET=1 pytest tests/kernels/test_gated_select_triton.py`.
"""

from __future__ import annotations

import functools
import itertools
import os

import pytest
import torch
from igate_edge.kernels import gated_select_op as op
from igate_edge.kernels.gated_select import gated_select
from torch import Tensor
from torch_nets import batch, gated

from igate_edge.errors import InputError
from igate_edge.gating import site

HOW = "run by `make test`: TRITON_INTERPRET=1 pytest tests/kernels/test_gated_select_triton.py"
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason=HOW)
pytest.importorskip("triton", reason="TRITON IS MISSING, its kernels are not tested: pip install 'igate-edge[triton]'")

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
#: Relative error of one rounding. The interpreter cuts bfloat16 off (a whole unit in the last place), a GPU rounds it.
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _is_interpreted() -> None:
    assert op.interpreted()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs per map, as on large maps."""
    monkeypatch.setattr(op, "BLOCK", {"forward": 64, "backward": 128, "reduce": 64})


class Case:
    """Inputs, and gradients to send back."""

    def __init__(
        self,
        tasks: int,
        shape: tuple[int, ...] = (2, 5, 7, 9),
        dtype: torch.dtype = torch.float32,
        layout: str = "nchw",
        mixed: bool = True,
        step: float | None = None,
    ) -> None:
        torch.manual_seed(tasks * 100 + sum(shape))
        maps = [torch.randn(shape).to(dtype) for _ in range(2 * tasks + 2)]
        if layout == "nhwc":
            maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
        self.psi, self.phis, self.grads = maps[0], maps[1 : tasks + 1], maps[tasks + 1 :]
        self.alpha = torch.randn(tasks, shape[1])
        self.beta = torch.randn(tasks, shape[1]) if mixed else None
        self.step = None if step is None else torch.tensor([step])

    def run(
        self,
        mode: str,
        wide: bool = False,
        given: str = "",
        still: str = "",
        fixed: bool = False,
    ) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        """Outputs (the maps, then the mix) and gradients by input name.

        wide: in float32. given: outputs that a loss reads, as digits (default: all). still: inputs without gradient.
        """
        named = {"psi": self.psi, "alpha": self.alpha, "beta": self.beta}
        named |= {f"phi{t}": phi for t, phi in enumerate(self.phis)}
        ins = {
            name: (x.float() if wide else x).detach().clone().requires_grad_(name not in still.split())
            for name, x in named.items()
            if x is not None
        }
        alpha = ins["alpha"].detach() >= 0 if fixed else ins["alpha"]
        phis = [ins[f"phi{t}"] for t in range(len(self.phis))]
        outs, psi_next = gated_select(ins["psi"], phis, alpha, ins.get("beta"), step=self.step, mode=mode)
        maps = [*outs] if psi_next is None else [*outs, psi_next]
        read = [i for i in range(len(maps)) if not given or str(i) in given]
        torch.autograd.backward([maps[i] for i in read], [self.grads[i].to(maps[i].dtype) for i in read])
        return maps, {name: x.grad for name, x in ins.items()}


def assert_same(case: Case, **options: object) -> None:
    """Forward and backward of both implementations agree: selection to the bit, sums to 1e-6 of their maximum."""
    dtype, tasks = case.psi.dtype, len(case.phis)
    wants, want_grads = case.run("torch", wide=dtype != torch.float32, **options)  # type: ignore[arg-type]
    maps, grads = case.run("triton", **options)  # type: ignore[arg-type]
    for t in range(tasks):
        assert torch.equal(maps[t], wants[t].to(dtype)), f"map {t}"
        assert maps[t].stride() == case.psi.stride()
    for got, want in zip(maps[tasks:], wants[tasks:], strict=True):
        assert_close(got, want, ROUNDING[dtype], "the mix")
    assert grads.keys() == want_grads.keys()
    # d(beta) is a difference of the sums dw: their size is what its rounding is relative to.
    sums = [(case.grads[-1] * out).float().sum([d for d in range(out.ndim) if d != 1]) for out in wants[:tasks]]
    scale = {"beta": torch.stack(sums).abs().max()}
    for name, want in want_grads.items():
        got = grads[name]
        assert (got is None) == (want is None), name
        if got is not None and want is not None:
            tiny = name in ("alpha", "beta")
            assert got.dtype == (torch.float32 if tiny else dtype)
            assert_close(got, want, 0.0 if tiny else ROUNDING[dtype], name, scale.get(name))


def assert_close(got: Tensor, want: Tensor, rounding: float, name: str, scale: Tensor | None = None) -> None:
    want = want.float()
    error = (got.float() - want).abs() - rounding * want.abs()
    assert error.max() <= 1e-6 * (want.abs().max() if scale is None else scale) + 1e-7, name


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 8])
def test_the_kernels_equal_the_reference(tasks: int, dtype: torch.dtype, layout: str) -> None:
    assert_same(Case(tasks, dtype=dtype, layout=layout))


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (2, 17, 1, 1), (1, 3, 2, 3, 5), (1, 33, 5, 3), (1, 2, 11, 13)])
def test_ragged_sizes_in_many_programs(shape: tuple[int, ...], small_blocks: None) -> None:
    assert_same(Case(2, shape))


@pytest.mark.parametrize("shape", [(2, 33, 3, 3), (1, 70, 3, 3), (1, 3, 11, 13)])
def test_ragged_channels_last_in_many_programs(shape: tuple[int, ...], small_blocks: None) -> None:
    assert_same(Case(2, shape, layout="nhwc"))


def test_channels_last_3d() -> None:
    case = Case(2, (2, 5, 2, 3, 4))
    last = functools.partial(Tensor.contiguous, memory_format=torch.channels_last_3d)
    case.psi, case.phis = last(case.psi), [last(phi) for phi in case.phis]
    assert_same(case)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("logit", [1.0, 0.0, -1e-30, -1.0])
def test_all_on_and_all_off(logit: float, layout: str) -> None:
    case = Case(3, layout=layout)
    case.alpha.fill_(logit)
    assert_same(case)
    maps, grads = case.run("triton")
    for t in range(3):
        assert torch.equal(maps[t], case.phis[t] if logit >= 0 else case.psi)
    assert torch.equal(maps[3], case.psi) == (logit < 0)
    # Where all are closed the mix is psi, whatever its weights: no rounding is left over.
    assert bool(grads["beta"].any()) == (logit >= 0)  # type: ignore[union-attr]


def test_a_nan_logit_is_closed() -> None:
    case = Case(2)
    case.alpha[:, 0] = torch.nan
    maps, _ = case.run("triton")
    assert torch.equal(maps[0][:, 0], case.psi[:, 0])


@pytest.mark.parametrize("layout", FORMATS)
def test_fixed_gates(layout: str) -> None:
    assert_same(Case(3, layout=layout), fixed=True)


def test_without_a_mix() -> None:
    assert_same(Case(3, mixed=False))


@pytest.mark.parametrize("given", ["0", "13", "012", "3"])
def test_an_output_that_no_loss_reads_sends_no_gradient(given: str) -> None:
    assert_same(Case(3), given=given)


@pytest.mark.parametrize("still", ["psi", "phi1", "alpha", "alpha beta", "beta", "psi phi0 phi1"])
def test_gradients_that_nobody_wants_are_not_made(still: str) -> None:
    assert_same(Case(2), still=still)


def test_fixed_gates_and_a_mix_that_learns_nothing() -> None:
    assert_same(Case(2), fixed=True, still="beta")


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("bad", "dtype"), [(torch.nan, torch.float32), (torch.inf, torch.float16)])
def test_what_is_not_selected_does_not_leak(bad: float, dtype: torch.dtype, layout: str) -> None:
    """Half types in channels_last are loaded in pairs: a closed channel beside an open one is there, and not used."""
    case = Case(3, layout=layout, dtype=dtype)
    case.alpha[:, 0] = 1.0  # nobody reads psi here
    clean, clean_grads = case.run("triton")
    opened = case.alpha >= 0
    for t in range(3):
        case.phis[t][:, ~opened[t]] = bad
    case.psi[:, opened.all(0)] = bad
    dirty, dirty_grads = case.run("triton")
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))
    for name in ("psi", "beta", "phi0", "phi1", "phi2"):
        assert torch.equal(clean_grads[name], dirty_grads[name]), name  # type: ignore[arg-type]
    # alpha compares both maps: positions where that is impossible count as 0, the others as ever.
    spoilt = ~opened | opened.all(0)
    assert spoilt.any() and not spoilt.all()
    assert torch.equal(dirty_grads["alpha"], torch.where(spoilt, 0, clean_grads["alpha"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", FORMATS)
def test_fake_quantisation(layout: str, dtype: torch.dtype) -> None:
    """On a grid that clips a good part of the values; a half's grid must be one that a half can hold."""
    case = Case(3, layout=layout, dtype=dtype, step=2**-7)
    if dtype == torch.float32:
        case.psi[0, 0, 0, 0] = 2.5 * 2**-7  # a tie goes to even
        case.alpha[:, 0] = -1.0
        assert_same(case)
        assert case.run("triton")[0][0][0, 0, 0, 0] == 2 * 2**-7
        return
    (wants, want_grads), (maps, grads) = case.run("torch"), case.run("triton")
    assert all(torch.equal(got, want) for got, want in zip(maps, wants, strict=True))
    for name, want in want_grads.items():  # the reference adds gradients in half precision
        torch.testing.assert_close(grads[name], want, rtol=4e-3, atol=4e-3)


def test_the_result_is_the_same_every_time(small_blocks: None) -> None:
    case = Case(3, (2, 7, 5, 7), layout="nhwc")
    (_, one), (_, other) = case.run("triton"), case.run("triton")
    assert all(torch.equal(one[name], other[name]) for name in one)  # type: ignore[arg-type]


def test_an_empty_batch() -> None:
    case = Case(2, (0, 3, 4, 4))
    maps, grads = case.run("triton")
    assert [tuple(x.shape) for x in maps] == [(0, 3, 4, 4)] * 3
    assert not grads["alpha"].any() and not grads["beta"].any()  # type: ignore[union-attr]


def test_a_gradient_of_another_layout() -> None:
    case = Case(2, layout="nhwc")
    case.grads = [torch.ones(()).expand(case.psi.shape), *[grad.contiguous() for grad in case.grads[1:]]]
    assert_same(case)


def test_rows_that_are_not_dense() -> None:
    case = Case(2)
    case.alpha, case.beta = torch.randn(5, 2).T, torch.randn(5, 2).T
    assert_same(case)


def test_the_operator_takes_layouts_that_it_was_not_traced_with() -> None:
    case, other = Case(2), Case(2)
    turned = case.psi.transpose(2, 3).contiguous().transpose(2, 3)
    args = [case.phis[0].contiguous(memory_format=torch.channels_last), case.phis[1]], case.alpha, case.beta, None
    for got, want in zip(op.select(turned, *args), other.run("torch")[0], strict=True):
        assert got.is_contiguous()
        torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-6)


def test_half_logits() -> None:
    case = Case(2)
    case.alpha, case.beta = case.alpha.half(), torch.randn(2, 5).half()
    (wants, want_grads), (maps, grads) = case.run("torch"), case.run("triton")
    assert all(torch.equal(got, want) for got, want in zip(maps[:2], wants[:2], strict=True))
    for name in ("alpha", "beta"):
        torch.testing.assert_close(grads[name], want_grads[name], rtol=2e-3, atol=2e-3)


def test_compiled_and_exported_programs_keep_the_operator() -> None:
    class Site(torch.nn.Module):
        def forward(self, psi: Tensor, phi: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
            outs, psi_next = gated_select(psi, [phi, psi], alpha, beta, mode="triton")
            assert psi_next is not None
            return outs[0] + outs[1] + psi_next

    case = Case(2)
    args = (case.psi, case.phis[0], case.alpha, case.beta)
    want = Site()(*args)  # type: ignore[arg-type]
    compiled = torch.compile(Site(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*args), want)
    program = torch.export.export(Site(), args)
    assert "igate.gated_select" in str(program.graph)
    assert torch.equal(program.module()(*args), want)


def test_a_gated_net_trains_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of a whole net: the losses and the gates' gradients of the Triton sites are those of the torch ones."""
    seen: dict[str, list[Tensor]] = {"torch": [], "triton": []}
    for mode, values in seen.items():
        monkeypatch.setattr(site, "gated_select", functools.partial(gated_select, mode=mode))
        torch.manual_seed(0)
        net = gated()
        optimiser = torch.optim.SGD(net.parameters(), 0.01)
        for _ in range(2):
            optimiser.zero_grad()
            loss = net.loss(batch())
            loss.backward()
            optimiser.step()
            values += [loss.detach(), *[p.grad.clone() for p in net.gate_parameters() if p.grad is not None]]
    assert len(seen["torch"]) > 2
    for want, got in zip(seen["torch"], seen["triton"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_errors_before_any_launch() -> None:
    case = Case(2)
    run = functools.partial(gated_select, mode="triton")
    turned = case.psi.transpose(2, 3)
    with pytest.raises(InputError, match=r"cannot run in Triton: strides .*make all maps contiguous"):
        run(turned, [phi.transpose(2, 3) for phi in case.phis], case.alpha, case.beta)
    with pytest.raises(InputError, match="strides"):
        run(case.psi, [case.phis[0], case.phis[1].contiguous(memory_format=torch.channels_last)], case.alpha, None)
    with pytest.raises(InputError, match=r"torch.float64.*use float32"):
        run(case.psi.double(), [phi.double() for phi in case.phis], case.alpha, case.beta)
    with pytest.raises(InputError, match=r"torch.float64"):
        run(case.psi, case.phis, case.alpha.double(), case.beta)
    with pytest.raises(InputError, match=r"9 tasks, the kernel is written for 1 to 8.*mode='torch'"):
        run(case.psi, [case.psi] * 9, torch.zeros(9, 5), None)
    with pytest.raises(InputError, match="different devices"):
        run(case.psi, case.phis, case.alpha.to("meta"), case.beta)


def test_geometry_covers_every_element_once() -> None:
    for (images, channels), space, last in itertools.product([(1, 1), (2, 5), (3, 70)], [(1,), (7, 7)], [0, 1]):
        x = torch.zeros(images, channels, *space)
        if last and len(space) == 2:
            x = x.contiguous(memory_format=torch.channels_last)
        shape = op.geometry(x, 64)
        assert shape.rows * shape.cols == x.numel()
        assert shape.block_rows * shape.groups * shape.lanes <= 64
        assert (
            shape.grid[0] * shape.block_rows >= shape.rows and shape.grid[1] * shape.groups * shape.lanes >= shape.cols
        )
