"""The adapters of cuda_memory: unmodified libraries on the emulated driver; what that driver lacks, on a stand-in."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from kernel_cases import needs_compiler

from igate_edge.engines import cuda_memory, cuda_memory_bindings, cuda_memory_pycuda
from igate_edge.engines.cuda_memory import Device, open_cuda
from igate_edge.errors import CheckFailed, InputError, UnavailableError

PROGRAM = """
import os, sys, threading, warnings
sys.setdlopenflags(os.RTLD_LAZY)  # of the driver there is only what launchers call
warnings.simplefilter("ignore")   # cuda.bindings 13 on a driver of 12.6
import numpy as np
from igate_edge.engines.cuda_memory import open_cuda
from igate_edge.errors import CheckFailed, InputError

cuda = open_cuda(sys.argv[1])
assert cuda.name == sys.argv[1] and "pycuda.autoinit" not in sys.modules
assert (cuda.device.compute, cuda.device.driver) == ("8.7", "12.6"), cuda.device

def copy_there_and_back(value):
    sent = np.arange(value, value + 64, dtype=np.uint8)
    got = np.zeros_like(sent)
    with cuda.current():
        with cuda.current():
            address, stream, began, ended = cuda.allocate(64), cuda.stream(), cuda.event(), cuda.event()
        assert cuda.stream_handle(stream) != 0
        cuda.record(began, stream)
        cuda.upload(address, sent, stream)
        cuda.download(got, address, stream)
        cuda.record(ended, stream)
        cuda.wait(ended)
        assert cuda.elapsed(began, ended) >= 0
        cuda.free(address)
        cuda.free_event(began)
        cuda.free_event(ended)
        cuda.free_stream(stream)
    assert (got == sent).all()

copy_there_and_back(1)
thread = threading.Thread(target=copy_there_and_back, args=(7,))  # nothing is current there before
thread.start()
thread.join()
with cuda.current():
    free, total = cuda.memory()
    assert 0 < free <= total
    try:
        cuda.allocate(2**50)
    except CheckFailed as error:
        assert "no memory to allocate 1125899906842624 bytes" in str(error), error
    else:
        raise AssertionError("a petabyte")
cuda.close()
cuda.close()
try:
    with cuda.current():
        raise AssertionError("open")
except InputError as error:
    assert "closed" in str(error)
print("copied")
"""


@needs_compiler
@pytest.mark.parametrize(("kind", "package"), [("cuda-bindings", "cuda.bindings"), ("pycuda", "pycuda")])
def test_the_real_library_on_the_emulated_driver(kind: str, package: str) -> None:
    from igate_edge.kernels.emulator import driver

    if importlib.util.find_spec(package.split(".")[0]) is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"NOT TESTED: cuda_memory on {kind}, which is missing")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver.build().parent)}
    command = [sys.executable, "-c", PROGRAM, kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (0, "copied\n"), done.stderr[-3000:]


class Driver(types.ModuleType):
    """A stand-in for cuda.bindings.driver: every call is noted and succeeds, unless it is in `fail`."""

    CU_MEMHOSTALLOC_DEVICEMAP = 2

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.calls: list[tuple[Any, ...]] = []
        self.fail: dict[str, str] = {}
        self.kept = [(ctypes.c_uint8 * 64)() for _ in range(4)]
        attributes = {
            f"CU_DEVICE_ATTRIBUTE_{name}": name
            for name in ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "INTEGRATED")
        }
        self.CUdevice_attribute = types.SimpleNamespace(**attributes)
        self.CUstream_flags = types.SimpleNamespace(CU_STREAM_NON_BLOCKING=types.SimpleNamespace(value=1))
        self.CUstreamCaptureMode = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*values: Any) -> tuple[Any, ...]:
            self.calls.append((name, *values))
            if name in self.fail:
                return (Error(self.fail[name]), None)
            return (0, *self.answer(name, values))

        return call

    def answer(self, name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
        known: dict[str, tuple[Any, ...]] = {
            "cuDeviceGetName": (b"Orin\0\0\0",),
            "cuDriverGetVersion": (13020,),
            "cuDeviceGetAttribute": ({"COMPUTE_CAPABILITY_MAJOR": 8, "COMPUTE_CAPABILITY_MINOR": 7}.get(values[0], 1),)
            if values
            else (),
            "cuMemHostAlloc": (ctypes.addressof(self.kept[0]),),
            "cuMemHostGetDevicePointer": (0x7000,),
            "cuMemGetInfo": (100, 200),
        }
        return known.get(name, (f"result of {name}",))

    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


class Error(int):
    """A CUresult that is not zero."""

    def __new__(cls, name: str) -> Error:
        made = super().__new__(cls, 1)
        made.name = name  # type: ignore[attr-defined]
        return made


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found, package = Driver(), types.ModuleType("cuda.bindings")
    package.driver = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    return found


def test_the_primary_context_is_retained_pushed_popped_and_released(driver: Driver) -> None:
    cuda = open_cuda("cuda-bindings")
    assert cuda.device == Device("Orin", "8.7", "13.2", True)
    assert driver.names()[-1] == "cuDevicePrimaryCtxRetain" and "cuCtxCreate" not in driver.names()
    driver.calls.clear()
    with pytest.raises(KeyError), cuda.current():
        assert cuda.memory() == (100, 200)
        raise KeyError
    assert driver.names() == ["cuCtxPushCurrent", "cuMemGetInfo", "cuCtxPopCurrent"]
    driver.calls.clear()
    cuda.close()
    cuda.close()
    assert driver.names() == ["cuDevicePrimaryCtxRelease"]


def test_mapped_host_memory(driver: Driver) -> None:
    cuda = open_cuda("cuda-bindings")
    block = cuda.host(64, mapped=True)
    assert ("cuMemHostAlloc", 64, 2) in driver.calls and block.device == 0x7000
    block.array[:] = 7
    assert bytes(driver.kept[0]) == b"\7" * 64, "the array is the memory itself"
    cuda.free_host(block)
    assert driver.calls[-1] == ("cuMemFreeHost", block.handle)
    assert cuda.host(64, mapped=False).device == 0 and ("cuMemHostAlloc", 64, 0) in driver.calls
    driver.fail = {"cuMemHostGetDevicePointer": "CUDA_ERROR_INVALID_VALUE"}
    with pytest.raises(CheckFailed, match="failed to map host memory: CUDA_ERROR_INVALID_VALUE"):
        cuda.host(64, mapped=True)
    assert driver.names()[-1] == "cuMemFreeHost"


def test_a_graph(driver: Driver) -> None:
    cuda = open_cuda("cuda-bindings")
    stream = cuda.stream()
    driver.calls.clear()
    cuda.begin_capture(stream)
    graph = cuda.end_capture(stream)
    cuda.launch(graph, stream)
    cuda.free_graph(graph)
    assert driver.calls == [
        ("cuStreamBeginCapture", stream, "thread"),
        ("cuStreamEndCapture", stream),
        ("cuGraphInstantiate", "result of cuStreamEndCapture", 0),
        ("cuGraphDestroy", "result of cuStreamEndCapture"),
        ("cuGraphLaunch", graph, stream),
        ("cuGraphExecDestroy", graph),
    ]
    driver.fail = {"cuGraphInstantiate": "CUDA_ERROR_NOT_SUPPORTED"}
    with pytest.raises(CheckFailed, match="make a graph ready"):
        cuda.end_capture(stream)
    assert driver.names()[-1] == "cuGraphDestroy"


def test_every_failure_says_what_was_being_done(driver: Driver) -> None:
    cuda = open_cuda("cuda-bindings")
    stream, event, data = cuda.stream(), cuda.event(), np.zeros(4, np.uint8)
    calls: dict[str, tuple[Any, str]] = {
        "cuMemAlloc": (lambda: cuda.allocate(4), "no memory to allocate 4 bytes on the device"),
        "cuMemFree": (lambda: cuda.free(1), "free device memory"),
        "cuMemHostAlloc": (lambda: cuda.host(4, False), "no memory to lock 4 bytes"),
        "cuMemFreeHost": (lambda: cuda.free_host(cuda_memory.Host(data, 0, 1)), "free host memory"),
        "cuStreamCreate": (cuda.stream, "make a stream"),
        "cuStreamDestroy": (lambda: cuda.free_stream(stream), "free a stream"),
        "cuMemcpyHtoDAsync": (lambda: cuda.upload(1, data, stream), "copy to the device"),
        "cuMemcpyDtoHAsync": (lambda: cuda.download(data, 1, stream), "copy from the device"),
        "cuEventCreate": (cuda.event, "make an event"),
        "cuEventRecord": (lambda: cuda.record(event, stream), "record an event"),
        "cuEventSynchronize": (lambda: cuda.wait(event), "finish the engine's work"),
        "cuEventElapsedTime": (lambda: cuda.elapsed(event, event), "read a time"),
        "cuEventDestroy": (lambda: cuda.free_event(event), "free an event"),
        "cuStreamBeginCapture": (lambda: cuda.begin_capture(stream), "begin a graph"),
        "cuStreamEndCapture": (lambda: cuda.end_capture(stream), "end a graph"),
        "cuGraphLaunch": (lambda: cuda.launch(1, stream), "launch a graph"),
        "cuGraphExecDestroy": (lambda: cuda.free_graph(1), "free a graph"),
        "cuMemGetInfo": (cuda.memory, "read the free memory"),
    }
    for name, (call, words) in calls.items():
        driver.fail = {name: "CUDA_ERROR_OUT_OF_MEMORY" if "Alloc" in name else "CUDA_ERROR_ILLEGAL_ADDRESS"}
        with pytest.raises(CheckFailed, match=words):
            call()


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="NOT TESTED: names of cuda-bindings, missing")
def test_the_stand_in_is_called_as_the_real_library_is() -> None:
    """Every name that the adapter uses is there, and takes as many values."""
    from cuda.bindings import driver as real

    source = inspect.getsource(cuda_memory_bindings)
    names = set(re.findall(r"driver\.(cu[A-Z]\w+)", source))
    assert len(names) > 25 and all(hasattr(real, name) for name in names)
    modes = real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, real.CUstream_flags.CU_STREAM_NON_BLOCKING
    assert [int(mode.value) for mode in modes] == [1, 1] and real.CU_MEMHOSTALLOC_DEVICEMAP == 2
    takes = {name: len(inspect.signature(getattr(real, name)).parameters) for name in names}
    assert {name: takes[name] for name in ("cuMemHostAlloc", "cuGraphInstantiate", "cuMemcpyHtoDAsync")} == {
        "cuMemHostAlloc": 2,
        "cuGraphInstantiate": 2,
        "cuMemcpyHtoDAsync": 4,
    }


class Pycuda(types.ModuleType):
    """A stand-in for pycuda.driver, of what the emulated driver does not have: page-locked memory."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.calls: list[str] = []
        context = types.SimpleNamespace(push=lambda: self.note("push"), detach=lambda: self.note("detach"))
        self.Context = types.SimpleNamespace(pop=lambda: self.note("pop"))
        self.device_attribute = types.SimpleNamespace(INTEGRATED=1)
        self.host_alloc_flags = types.SimpleNamespace(DEVICEMAP=2)
        self.found = types.SimpleNamespace(
            name=lambda: "Orin",
            compute_capability=lambda: (8, 7),
            get_attribute=lambda which: which,
            retain_primary_context=lambda: context,
        )

    def note(self, call: str) -> None:
        self.calls.append(call)

    def init(self) -> None:
        self.note("init")

    def Device(self, ordinal: int) -> Any:
        if ordinal:
            raise self.Error("cuDeviceGet failed: invalid device ordinal")
        return self.found

    def get_driver_version(self) -> int:
        return 12060

    def pagelocked_empty(self, size: int, dtype: Any, mem_flags: int) -> Any:
        if size > 64:
            raise self.Error("cuMemHostAlloc failed: out of memory")
        self.note(f"pagelocked {size} {mem_flags}")
        return np.zeros(size, np.uint8).view(Locked)


class Locked(np.ndarray):
    @property
    def base(self) -> Any:
        return types.SimpleNamespace(get_device_pointer=lambda: 0x7000, free=lambda: None)


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> Pycuda:
    found, package = Pycuda(), types.ModuleType("pycuda")
    package.driver = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", found)
    return found


def test_pycuda_maps_host_memory_and_has_no_graphs(pycuda: Pycuda) -> None:
    cuda = open_cuda("pycuda")
    assert cuda.device == Device("Orin", "8.7", "12.6", True)
    with cuda.current():
        block = cuda.host(64, mapped=True)
        assert block.device == 0x7000 and block.array.shape == (64,) and "pagelocked 64 2" in pycuda.calls
        assert cuda.host(64, mapped=False).device == 0 and "pagelocked 64 0" in pycuda.calls
        cuda.free_host(block)
        with pytest.raises(CheckFailed, match="no memory to lock 65 bytes"):
            cuda.host(65, mapped=False)
        with pytest.raises(UnavailableError, match="no CUDA graphs"):
            cuda.begin_capture(None)
    cuda.close()
    cuda.close()
    assert pycuda.calls.count("push") == pycuda.calls.count("pop") == 2 and pycuda.calls.count("detach") == 1
    with pytest.raises(UnavailableError, match="invalid device ordinal"):
        open_cuda("pycuda", 3)


def test_both_adapters_have_every_call_of_the_protocol() -> None:
    wanted = {name for name in vars(cuda_memory.Cuda) if not name.startswith("_")}
    assert len(wanted) == 21
    for adapter in (cuda_memory_bindings.BindingsCuda, cuda_memory_pycuda.PycudaCuda, FakeCuda):
        for name in wanted:
            ours = list(inspect.signature(getattr(adapter, name)).parameters)
            assert ours == list(inspect.signature(getattr(cuda_memory.Cuda, name)).parameters), (adapter, name)


def test_no_adapter_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "pycuda", "pycuda.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError, match=r"cuda-bindings is missing.*pycuda is missing.*<13' for JetPack 6"):
        open_cuda()
    with pytest.raises(InputError, match="known: cuda-bindings, pycuda"):
        open_cuda("cupy")


def test_no_driver(driver: Driver) -> None:
    driver.fail = {"cuInit": "CUDA_ERROR_NO_DEVICE"}
    with pytest.raises(UnavailableError, match=r"no CUDA device here: cuda-bindings: .*CUDA_ERROR_NO_DEVICE.*runtime"):
        open_cuda("cuda-bindings")


@pytest.mark.parametrize(
    ("integrated", "text", "want"),
    [
        (False, "MemAvailable: 9000 kB\n", 5000),
        (True, "MemTotal: 99 kB\nMemAvailable: 9000 kB\n", 9000 * 1024),
        (True, "MemAvailable: 1 kB\n", 5000),
        (True, "MemTotal: 99 kB\n", 5000),
        (True, None, 5000),
    ],
)
def test_available_memory(tmp_path: Path, integrated: bool, text: str | None, want: int) -> None:
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    cuda = FakeCuda(device=Device("x", "8.7", "12.6", integrated), free_bytes=5000)
    with cuda.current():
        assert cuda_memory.available_memory(cuda, tmp_path / "meminfo") == want


@pytest.mark.parametrize("kind", [None, 5, [], "cupy", "", b"pycuda"])
def test_an_adapter_that_is_none(kind: object) -> None:
    with pytest.raises(InputError, match="unknown CUDA adapter .*known: cuda-bindings, pycuda"):
        open_cuda(kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("ordinal", [None, -1, "0", 1.0, True, 2**40])
def test_a_device_number_that_is_none(ordinal: object) -> None:
    with pytest.raises(InputError, match="not a device's number"):
        open_cuda("auto", ordinal)  # type: ignore[arg-type]
