"""How the kernels are timed on a GPU: the arithmetic, the rivals, and the launches on the emulated driver."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import gpu_rivals
import judging
import numpy as np
import pytest
import test_kernels as benchmarked
import torch
from igate_edge.kernels import device
from igate_edge.kernels.emulator import driver
from igate_edge.kernels.grouped_conv import GroupedConvPlan, reference
from igate_edge.kernels.launcher_ctypes import CtypesLauncher
from kernel_cases import needs_compiler
from kernel_images import cubin

from igate_edge.errors import UnavailableError

TINY = benchmarked.Layer((3, 5), (16, 16), (16, 16), 2)


def test_the_bound_is_the_larger_of_memory_and_arithmetic() -> None:
    line = gpu.Roofline(gigabytes=200.0, tops=50.0)
    assert line.bound_ms(gpu.Work(10**6)) == pytest.approx(10**6 / 200e9 * 1e3)
    assert line.bound_ms(gpu.Work(10**6, 10**9)) == pytest.approx(10**9 / 50e12 * 1e3)
    assert gpu.Roofline(200.0, None).bound_ms(gpu.Work(10**6, 10**9)) == line.bound_ms(gpu.Work(10**6))


def test_a_line_tells_median_tail_rates_and_share() -> None:
    ms = np.array([0.1] * 90 + [0.4] * 10)
    text = gpu.describe("x", ms, gpu.Work(4 * 10**6, 2 * 10**9), gpu.Roofline(80.0, 100.0))
    assert text == "x: 100.0 us, p95 400.0 us, 40 GB/s, 20 TOPS, 50% of the roofline"
    assert "TOPS" not in gpu.describe("x", ms, gpu.Work(1), gpu.Roofline(80.0, 100.0))


def test_the_peak_is_that_of_the_architecture() -> None:
    assert gpu.peak_tops(87, 16, 1_300_000) == pytest.approx(16 * 1.3e9 * 4096 / 1e12)
    assert gpu.peak_tops(80, 108, 1_410_000) == pytest.approx(624, rel=0.01)
    assert gpu.peak_tops(999, 8, 10**6) is None


def test_the_flush_is_larger_than_the_cache() -> None:
    assert gpu.flush_bytes(50 * 2**20) == 200 * 2**20 and gpu.flush_bytes(0) == 2**20


@pytest.mark.parametrize(
    ("gates", "forward"),
    [
        ([[0, 0], [0, 0]], 2 + 6),  # psi of both channels, and three maps written
        ([[1, 1], [1, 1]], 4 + 6),  # psi is not read
        ([[1, 0], [0, 0]], 1 + 2 + 6),
        ([[1, 0], [1, 0]], 2 + 1 + 6),
    ],
)
def test_the_traffic_of_a_site_follows_its_gates(gates: list[list[int]], forward: int) -> None:
    opened = np.array(gates, bool)
    assert gpu.select_work(opened, 10, backward=False) == gpu.Work(10 * forward)
    assert gpu.select_work(opened, 10, backward=True) == gpu.Work(10 * (forward + 9 * 2))


def test_the_work_of_a_layer_is_that_of_its_tensors_and_blocks() -> None:
    plan = GroupedConvPlan.from_layer(TINY.packed())
    work = gpu.conv_work(plan)
    assert work.operations == 2 * 15 * 9 * 16 * 16 * (1 + 2 + 2)  # a shared block reads one, each own one two
    assert work.bytes == 2 * 15 * 48 + plan.tables.data.nbytes
    branches = gpu.branch_plans(TINY.packed(), TINY.rows)
    assert sum(branch.macs for branch in branches) == plan.macs


@pytest.mark.parametrize("backward", [False, True])
def test_the_rivals_compute_the_same_site(backward: bool) -> None:
    calls, gates = gpu_rivals.select_calls(3, (2, 8, 3, 3), backward, "cpu", torch.float32)
    assert gates.shape == (3, 8) and gates.any() and not gates.all()
    ours = calls["igate"]()
    for name in ("reference", "eager"):  # what torch compiles is `eager`
        for got, want in zip(calls[name](), ours, strict=True):
            assert torch.allclose(got, want, atol=1e-5), name
    assert set(calls) == {"igate", "reference", "eager", "compiled"}


def test_the_separate_convolutions_compute_the_same_layer() -> None:
    layer = TINY.packed()
    x = np.random.default_rng(0).integers(-1, 2, (1, 48, 3, 5)).astype(np.int8)
    parts = gpu_rivals.torch_branches(layer, TINY.rows, x, "cpu", torch.float32)()
    sums = torch.cat(parts, 1).numpy()
    assert np.array_equal(np.clip(sums + 1, -128, 127).astype(np.int8), reference(layer, x))


@pytest.fixture
def orin() -> Iterator[CtypesLauncher]:
    with CtypesLauncher(str(driver.build())) as opened:
        yield opened


@needs_compiler
def test_launches_are_timed_between_events_with_and_without_a_flush(
    orin: CtypesLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, layer, card = orin.load(cubin()), TINY.packed(), gpu.Card(orin)
    x = np.random.default_rng(0).integers(-1, 2, (1, 48, 3, 5)).astype(np.int8)
    order: list[str] = []
    flush = card.flush
    monkeypatch.setattr(card, "flush", lambda: (order.append("flush"), flush()))
    plans = [GroupedConvPlan.from_layer(layer)]
    with (
        gpu.convolutions(orin, module, plans, x) as grouped,
        gpu.convolutions(orin, module, gpu.branch_plans(layer, TINY.rows), x) as separate,
    ):
        calls = {"a": lambda: (order.append("a"), grouped()), "b": lambda: (order.append("b"), separate())}
        times = card.times(calls, True, rounds=3, warm_up=1)
        assert order == ["flush", "a", "flush", "b"] * 4
        order.clear()
        warm = card.times(calls, False, rounds=1, warm_up=0)
        assert order == ["flush", "a", "a", "flush", "b", "b"]
    assert [len(ms) for ms in (*times.values(), *warm.values())] == [3, 3, 1, 1]
    assert all((ms > 0).all() for ms in (*times.values(), *warm.values()))
    assert np.array_equal(device.convolve(orin, module, plans[0], x), reference(layer, x))
    card.close()


@needs_compiler
def test_the_launches_of_a_comparison_write_every_branch(orin: CtypesLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = TINY.packed(), np.ones((1, 48, 3, 5), np.int8)
    plans, places = gpu.branch_plans(layer, TINY.rows), {}
    on_device = device.on_device

    class Kept:
        def __init__(self, on: CtypesLauncher, arrays: dict[str, np.ndarray]) -> None:
            self._held = on_device(on, arrays)

        def __enter__(self) -> dict[str, int]:
            places.update(self._held.__enter__())
            return places

        def __exit__(self, *error: Any) -> None:
            self._held.__exit__(*error)

    monkeypatch.setattr(device, "on_device", Kept)
    want = reference(layer, x)
    with gpu.convolutions(orin, orin.load(cubin()), plans, x) as call:
        call()
        for index, (plan, rows) in enumerate(zip(plans, TINY.rows, strict=True)):
            got = np.zeros(plan.target.bytes, np.int8)
            orin.download(got, places[f"y{index}"])
            assert np.array_equal(plan.target.unpack(got), want[:, rows])


@needs_compiler
def test_the_roofline_is_a_measured_copy_and_the_peak_of_the_device(orin: CtypesLauncher) -> None:
    card = gpu.Card(orin)
    line = card.roofline(size=2**16, rounds=3)
    assert line.gigabytes > 0 and line.tops == pytest.approx(8 * 0.918e9 * 4096 / 1e12)
    card.close()


def test_without_a_gpu_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> CtypesLauncher:
        raise UnavailableError("there is no CUDA driver", "libcuda.so.1 is missing", "")

    gpu.opened.cache_clear()
    monkeypatch.setattr(gpu.launcher_ctypes, "open", none)
    for what in ("igemm", "gated_select"):
        assert gpu.missing(what) == "there is no CUDA driver (libcuda.so.1 is missing)"


@needs_compiler
def test_with_a_gpu_but_no_image_the_reason_is_given(orin: CtypesLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.opened.cache_clear()
    monkeypatch.setattr(gpu.launcher_ctypes, "open", lambda: orin)
    monkeypatch.setattr(device, "load_kernels", lambda on: device.warnings.warn("no kernels: why") or None)
    assert gpu.missing("igemm") == "no kernels: why"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.missing("gated_select").endswith("sees no CUDA device")
    gpu.opened.cache_clear()
    monkeypatch.setattr(device, "load_kernels", lambda on: device.Loaded(on.load(cubin()), "cubin"))
    assert gpu.missing("igemm") == ""
    gpu.opened.cache_clear()


class Benchmark:
    """Stands in for pytest-benchmark."""

    def pedantic(self, call: Callable[[], object], rounds: int, warmup_rounds: int) -> None:
        call()


@pytest.fixture
def driven(orin: CtypesLauncher, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the benchmarks take, with a few rounds on the emulated driver; their judge only writes down what it got."""
    seen: dict[str, Any] = {"lines": [], "kept": {}, "judged": []}

    def figures(text: str, **values: Any) -> None:
        seen["lines"].append(text)
        seen["kept"].update(values)

    monkeypatch.setattr(judging, "at_most", lambda what, a, b, limit, fix: seen["judged"].append((what, len(a), limit)))
    monkeypatch.setattr(gpu, "opened", lambda: (orin, orin.load(cubin()), ""))
    monkeypatch.setattr(gpu, "missing", lambda what: f"no {what}" if what == "gated_select" else "")
    card = gpu.Card(orin)
    monkeypatch.setattr(card, "times", partial(card.times, rounds=3, warm_up=0))
    seen["call"] = {"figures": figures, "card": card, "roofline": gpu.Roofline(68.0, 20.0), "benchmark": Benchmark()}
    yield seen
    card.close()


@needs_compiler
def test_the_benchmark_of_a_layer_runs_and_judges(driven: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmarked.LAYERS, "tiny", TINY)
    benchmarked.test_a_layer_on_a_gpu("tiny", **driven["call"])
    assert driven["judged"] == [("grouped / a launch a branch", 3, 1.0)]
    assert driven["lines"][:3] == [
        "layer tiny, one launch against 3 on Orin (emulated): a copy moves 68 GB/s (measured), "
        "20 INT8 TOPS by its properties",
        " no cuDNN beside it: no gated_select",
        " L2 flushed",
    ]
    assert {f"ms {l2} {name}" for l2 in ("L2 flushed", "L2 warm") for name in ("grouped", "a launch a branch")} == set(
        driven["kept"]
    )


@needs_compiler
def test_a_kernel_that_computes_wrongly_is_not_timed(driven: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmarked.LAYERS, "tiny", TINY)
    monkeypatch.setattr(benchmarked, "reference", lambda layer, x: reference(layer, x) + np.int8(1))
    with pytest.raises(AssertionError, match="computes wrongly"):
        benchmarked.test_a_layer_on_a_gpu("tiny", **driven["call"])
    assert not driven["kept"]


@needs_compiler
@pytest.mark.parametrize("backward", [False, True])
def test_the_benchmark_of_a_site_runs_and_judges(
    backward: bool, driven: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    select_calls = gpu_rivals.select_calls

    def here(tasks: int, shape: tuple[int, int, int, int], backward: bool) -> tuple[gpu_rivals.Calls, np.ndarray]:
        calls, gates = select_calls(tasks, shape, backward, "cpu", torch.float32)
        return {name: call for name, call in calls.items() if name != "compiled"}, gates

    monkeypatch.setattr(gpu_rivals, "select_calls", here)
    monkeypatch.setattr(benchmarked, "SITE", (1, 8, 2, 2))
    benchmarked.test_gated_select_on_a_gpu(2, backward, **driven["call"])
    assert driven["judged"] == [("igate / eager", 3, 1.0)] and len(driven["kept"]) == 2 * 3
    assert ("forward and backward" in driven["lines"][0]) == backward


def test_a_benchmark_that_needs_a_gpu_is_told_of_and_not_failed(tmp_path: Path) -> None:
    """But one that a GPU can run and that did not run fails, as every other."""
    folder = Path(gpu.__file__).parent
    (tmp_path / "conftest.py").symlink_to(folder / "conftest.py")
    (tmp_path / "test_x.py").write_text(
        "import gpu, pytest\n"
        "gpu.missing = lambda what: 'no GPU for ' + what if what == 'igemm' else ''\n"
        "@pytest.mark.gpu('igemm')\ndef test_layer(benchmark):\n    assert False\n"
        "@pytest.mark.gpu('gated_select')\ndef test_site(benchmark):\n    pytest.skip('not today')\n"
        "def test_good(benchmark):\n    benchmark.pedantic(int, rounds=5)\n"
    )
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    alone |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone, check=False)
    assert done.returncode == 1 and "1 failed, 1 passed, 1 deselected" in done.stdout, done.stdout
    assert "no GPU for igemm: test_layer" in done.stdout and "this benchmark did not run" in done.stdout
