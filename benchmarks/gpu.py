"""The kernels timed on a CUDA GPU: events of the driver, L2 flushed or warm, and the roofline of that card.

No GPU has run this yet: it was driven on the emulated driver only (tests/test_benchmark_kernels.py), whose times mean
nothing. The roofline: bandwidth as this card copies (measured), INT8 peak from its properties (multiprocessors, clock,
operations a clock of its architecture), since no GEMM library comes with the driver.
"""

from __future__ import annotations

import ctypes
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from igate_edge.kernels import device, launcher_ctypes
from igate_edge.kernels.grouped_conv import ConvLayer, GroupedConvPlan
from igate_edge.kernels.launcher import Module, run
from igate_edge.kernels.launcher_ctypes import CtypesLauncher

from igate_edge.errors import IgateError

#: Dense INT8 operations, two a multiply-add, per clock and multiprocessor (NVIDIA's figures of each architecture).
OPERATIONS = {75: 2048, 80: 4096, 86: 2048, 87: 4096, 89: 2048, 90: 8192}
WARM_UP, ROUNDS = 20, 200
_CLOCK_KHZ, _MULTIPROCESSORS, _L2_BYTES = 13, 16, 38  # CUdevice_attribute
_LEAST_FLUSH = 2**20

Calls = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Work:
    """What a call must do at least. bytes: read and written once; operations: INT8, two a multiply-add."""

    bytes: int
    operations: int = 0


@dataclass(frozen=True)
class Roofline:
    """A card's bounds. gigabytes: 1e9 bytes a second; tops: 1e12 operations a second, None where none is known."""

    gigabytes: float
    tops: float | None

    def bound_ms(self, work: Work) -> float:
        """The least time of the work; of its memory traffic alone where no peak is known.

        >>> Roofline(100.0, 10.0).bound_ms(Work(10**8, 10**9)), Roofline(100.0, 10.0).bound_ms(Work(10**6, 10**11))
        (1.0, 10.0)
        """
        return max(work.bytes / self.gigabytes / 1e6, work.operations / self.tops / 1e9 if self.tops else 0.0)


def peak_tops(arch: int, multiprocessors: int, khz: int) -> float | None:
    """INT8 peak by device properties, 1e12 operations a second; None for an architecture that is not listed.

    >>> round(peak_tops(87, 8, 918000), 1)
    30.1
    """
    each = OPERATIONS.get(arch)
    return None if each is None else multiprocessors * khz * each / 1e9


def flush_bytes(l2: int) -> int:
    """Memory that is written to drive everything else out of an L2 cache of that size."""
    return max(4 * l2, _LEAST_FLUSH)


def describe(name: str, ms: np.ndarray, work: Work, roofline: Roofline) -> str:
    """One line: median, 95th percentile, achieved rates and the share of the roofline at the median."""
    middle, late = (float(np.percentile(ms, q)) for q in (50, 95))
    tops = f", {work.operations / middle / 1e9:.3g} TOPS" if work.operations else ""
    rates = f"{work.bytes / middle / 1e6:.3g} GB/s{tops}"
    share = f"{roofline.bound_ms(work) / middle:.0%} of the roofline"
    return f"{name}: {1e3 * middle:.1f} us, p95 {1e3 * late:.1f} us, {rates}, {share}"


def select_work(gates: np.ndarray, plane: int, backward: bool) -> Work:
    """Of gated_select with a mix, gates bool [T, C]. plane: bytes of one channel in all images.

    Forward reads each task's open planes, and psi's where some gate is closed, and writes T + 1 maps. Backward reads
    T + 1 maps and T + 1 gradients and writes T + 1 gradients.
    """
    tasks, channels = gates.shape
    planes = int(gates.sum()) + int((~gates.all(0)).sum()) + (tasks + 1) * channels
    return Work(plane * (planes + (3 * tasks + 3) * channels * backward))


def conv_work(plan: GroupedConvPlan) -> Work:
    """Of a grouped convolution: x, y and the tables once, and the multiply-adds that are not padding."""
    wide = 4 if plan.layer.floats else 1
    return Work(plan.source.bytes + wide * plan.target.bytes + plan.tables.data.nbytes, 2 * plan.macs)


def branch_plans(layer: ConvLayer, rows: Sequence[slice]) -> list[GroupedConvPlan]:
    """The same layer as a plan for each branch, all on the same x, each with its own y."""
    parts = ((layer.weight[each], layer.scale[each], layer.bias[each]) for each in rows)
    return [
        GroupedConvPlan.from_layer(replace(layer, weight=weight, scale=scale, bias=bias))
        for weight, scale, bias in parts
    ]


class Card:
    """An open GPU with two events and memory to flush its L2. Everything runs on the default stream, as torch does."""

    def __init__(self, on: CtypesLauncher) -> None:
        self.on = on
        self._events = ctypes.c_void_p(), ctypes.c_void_p()
        for event in self._events:
            on.call("cuEventCreate", ctypes.byref(event), 0, doing="create an event")
        self._flush_bytes = flush_bytes(self._attribute(_L2_BYTES))
        self._flush_at = on.allocate(self._flush_bytes)

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self.on.call("cuDeviceGetAttribute", ctypes.byref(value), which, 0, doing="describe the device")
        return value.value

    def flush(self) -> None:
        """Write all of a buffer that L2 cannot hold; it also keeps the GPU busy while the host queues what is timed."""
        size, place = ctypes.c_size_t(self._flush_bytes), ctypes.c_uint64(self._flush_at)
        self.on.call("cuMemsetD8_v2", place, ctypes.c_ubyte(0), size, doing="flush the L2 cache")

    def times(self, calls: Calls, flushed: bool, rounds: int = ROUNDS, warm_up: int = WARM_UP) -> dict[str, np.ndarray]:
        """Milliseconds between two events around each call, float64 [rounds], the calls in turn.

        flushed: L2 holds nothing of theirs; else each runs once more, untimed, right before.
        """
        times = {name: np.zeros(rounds) for name in calls}
        for index in range(-warm_up, rounds):
            for name, call in calls.items():
                self.flush()
                if not flushed:
                    call()
                taken = self._between(call)
                if index >= 0:
                    times[name][index] = taken
        return times

    def _between(self, call: Callable[[], object]) -> float:
        start, end = self._events
        self.on.call("cuEventRecord", start, None, doing="record an event")
        call()
        self.on.call("cuEventRecord", end, None, doing="record an event")
        self.on.synchronize()
        ms = ctypes.c_float()
        self.on.call("cuEventElapsedTime", ctypes.byref(ms), start, end, doing="read the events")
        return float(ms.value)

    def roofline(self, size: int = 2**28, rounds: int = 20) -> Roofline:
        """Bandwidth of a copy of `size` bytes, read and written, the best of the rounds; peak by properties."""
        places = [self.on.allocate(size) for _ in range(2)]

        def copy() -> None:
            to, source = (ctypes.c_uint64(place) for place in places)
            self.on.call("cuMemcpyDtoD_v2", to, source, ctypes.c_size_t(size), doing="copy on the device")

        try:
            best = float(self.times({"copy": copy}, True, rounds, 2)["copy"].min())
        finally:
            for place in places:
                self.on.free(place)
        peak = peak_tops(self.on.device.arch, self._attribute(_MULTIPROCESSORS), self._attribute(_CLOCK_KHZ))
        return Roofline(2 * size / best / 1e6, peak)

    def close(self) -> None:
        """Give memory and events back; the launcher stays open."""
        self.on.free(self._flush_at)
        for event in self._events:
            self.on.call("cuEventDestroy_v2", event, doing="destroy an event")


@contextmanager
def convolutions(
    on: CtypesLauncher, module: Module, plans: Sequence[GroupedConvPlan], x: np.ndarray
) -> Iterator[Callable[[], None]]:
    """A call that launches the plans one after the other on the same x, which with all tables is copied there once."""
    arrays = {"x": plans[0].source.pack(x)}
    for index, plan in enumerate(plans):
        arrays[f"tables{index}"] = plan.tables.data
        arrays[f"y{index}"] = np.zeros(plan.target.bytes, np.float32 if plan.layer.floats else np.int8)
    with device.on_device(on, arrays) as places:
        launches = [
            plan.launch(places["x"], places[f"y{index}"], places[f"tables{index}"]) for index, plan in enumerate(plans)
        ]

        def call() -> None:
            for launch in launches:
                run(module, launch)

        yield call


@cache
def opened() -> tuple[CtypesLauncher, Module | None, str]:
    """The first GPU, its kernel image or None, and why there is none; raises IgateError where there is no GPU."""
    on = launcher_ctypes.open()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = device.load_kernels(on)
    return on, None if loaded is None else loaded.module, "; ".join(str(one.message) for one in said)


def missing(what: str) -> str:
    """Why benchmarks of "gated_select" or "igemm" cannot run here; "" where they can."""
    try:
        _, module, why = opened()
    except IgateError as error:
        return f"{error.cause} ({error.evidence})"
    if what == "igemm":
        return "" if module is not None else why
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return "" if importlib.util.find_spec("triton") else "no module named triton"
