"""Benchmarks are tests of a promise: one that did not run, or whose times were not kept, fails."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import gpu
import machine
import numpy as np
import pytest

from igate_edge.errors import IgateError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tabletop.igate"
FIGURES = "igate figures"
#: Benchmarks that need a GPU which is not here, and why: not run, and said at the end.
NOT_HERE = pytest.StashKey[dict[str, str]]()
#: Engines run on one thread, so on an idle machine both tell the same; a budget is always held in wall time.
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("igate_edge")
    group.addoption("--bundle", default=str(EXAMPLE), help="the bundle that is held to its budget (default: example)")
    group.addoption("--rate", type=float, default=30.0, help="frames a second of the camera (default 30)")
    group.addoption("--seconds", type=float, default=10.0, help="longest time of one comparison (default 10)")
    group.addoption("--clock", choices=list(CLOCKS), default="wall", help="cpu: leave out what other programs take")
    group.addoption("--peers", action="store_true", help="also compare with Torch-Pruning and OpenVINO (extras)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "peers: needs the extras `peers` and `openvino`; runs with --peers")
    config.addinivalue_line("markers", 'gpu(what): needs a CUDA GPU that runs what: "gated_select" or "igemm"')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(1800))  # a small board takes its time
    unasked = [item for item in items if "peers" in item.keywords and not config.getoption("--peers")]
    unable = {item: why for item in items if (why := _no_gpu(item))}
    config.stash[NOT_HERE] = {item.name: why for item, why in unable.items()}
    if left := [*unasked, *(item for item in unable if item not in unasked)]:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def _no_gpu(item: pytest.Item) -> str:
    """Why this machine cannot run a benchmark of a GPU; "" where it can, and for every other benchmark."""
    mark = item.get_closest_marker("gpu")
    return gpu.missing(mark.args[0]) if mark is not None and mark.args else ""


@pytest.fixture
def cores() -> Iterator[int]:
    """All cores, as a robot has them: stages overlap, so a pipeline that is held to one core is no pipeline."""
    if not hasattr(os, "sched_setaffinity"):
        yield os.cpu_count() or 1
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield len(os.sched_getaffinity(0))
    os.sched_setaffinity(0, before)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """A benchmark that was skipped or that kept no times proves nothing, so it is a failure."""
    report = (yield).get_result()
    if not Path(item.path).is_relative_to(Path(__file__).parent):
        return
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"this benchmark did not run: {report.longrepr}"
    elif call.excinfo is not None and isinstance(call.excinfo.value, IgateError):
        report.longrepr = f"{type(call.excinfo.value).__name__}: {call.excinfo.value}"
    elif report.when == "call" and report.passed:
        fixture = getattr(item, "funcargs", {}).get("benchmark")
        if fixture is None or fixture.stats is None:
            report.outcome, report.longrepr = "failed", "nothing was measured: pytest-benchmark holds no times of it"


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info[machine.KEY] = machine.describe()


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(machine_info: dict[str, Any], compared_benchmark: dict[str, Any]) -> None:
    """Times of two machines are not compared; pytest ends before anything is run."""
    try:
        made = str(compared_benchmark.get("datetime", "an unknown time"))
        machine.refuse_foreign(machine_info, compared_benchmark.get("machine_info") or {}, made)
    except IgateError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The figures that the benchmarks found, passed or not, and what was not run for want of a GPU."""
    if unable := config.stash.get(NOT_HERE, {}):
        terminalreporter.section("not run, a GPU is needed", sep="-")
        for why in dict.fromkeys(unable.values()):
            names = ", ".join(name for name, reason in unable.items() if reason == why)
            terminalreporter.write_line(f"{why}: {names}")
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            lines = [text for name, text in report.user_properties if name == FIGURES]
            if lines and report.when == "call":
                terminalreporter.section(report.nodeid.split("/")[-1], sep="-")
                terminalreporter.write_line("\n".join(lines))


@pytest.fixture(scope="session", autouse=True)
def alone() -> Iterator[None]:
    """The whole run keeps to one core, the last: a process that moves between cores measures the moves."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def figures(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """`figures("text", name=value, ...)`: shown at the end of the run, and kept in the result file."""

    def note(text: str, **values: Any) -> None:
        request.node.user_properties.append((FIGURES, text))
        benchmark.extra_info.update(values)

    return note


@pytest.fixture
def seconds(benchmark: Any) -> Callable[..., float]:
    """Time a call over some rounds and return the median in seconds; fails when pytest-benchmark was switched off."""

    def measure(call: Callable[[], object], rounds: int = 5) -> float:
        benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=1)
        assert benchmark.stats is not None, "the benchmark was disabled, so nothing was measured"
        return float(benchmark.stats.stats.median)

    return measure


@pytest.fixture(scope="session")
def card() -> Iterator[gpu.Card]:
    """The GPU, with events and memory to flush its cache."""
    opened = gpu.Card(gpu.opened()[0])
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def roofline(card: gpu.Card) -> gpu.Roofline:
    """Measured once a run, on this card."""
    return card.roofline()


@pytest.fixture(scope="session")
def longest(request: pytest.FixtureRequest) -> float:
    """Seconds that one comparison may take."""
    return float(request.config.getoption("--seconds"))


@pytest.fixture(scope="session")
def clock(request: pytest.FixtureRequest) -> Callable[[], float]:
    """The clock of comparisons."""
    return CLOCKS[request.config.getoption("--clock")]


@pytest.fixture(scope="session")
def eighth(longest: float, clock: Callable[[], float]) -> Any:
    """See eighth.py; built and timed once a run."""
    from eighth import timed

    return timed(3 * longest, clock)


@pytest.fixture(scope="session")
def example(request: pytest.FixtureRequest) -> Path:
    """The bundle under test: the shipped one, a ResNet-18 layout at 96x128 with three tasks."""
    path = Path(request.config.getoption("--bundle"))
    assert path.is_file(), f"{path} is missing: train it with `make train-demo`"
    return path


@pytest.fixture(scope="session")
def frames() -> list[np.ndarray]:
    """32 calibration frames with structure: smooth slopes, a rectangle and noise, uint8 [128,128,3]."""
    rng, out = np.random.default_rng(0), []
    for _ in range(32):
        image = np.linspace(20, 140, 128)[None, :, None] * rng.uniform(0.5, 1.2, 3) + rng.normal(0, 8, (128, 128, 3))
        y, x = rng.integers(0, 64, 2)
        image[y : y + 50, x : x + 60] += rng.uniform(20, 100, 3)
        out.append(np.clip(image, 0, 255).astype(np.uint8))
    return out
