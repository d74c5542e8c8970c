"""The real pycuda and cuda.core, unmodified, on the emulated driver: each in a process that finds it as libcuda.

pycuda is built for this by `make test-pycuda`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from igate_edge.kernels.emulator import driver
from kernel_cases import needs_compiler

pytestmark = needs_compiler

PROGRAM = """
import ctypes, os, sys, warnings
sys.path.insert(0, sys.argv[2])
sys.setdlopenflags(os.RTLD_LAZY)  # of the driver there is only what launchers call
warnings.simplefilter("ignore")   # cuda.bindings 13 on a driver of 12.6
import numpy as np
from igate_edge.errors import CheckFailed, InputError
from igate_edge.kernels import device, launcher
from igate_edge.kernels.grouped_conv import GroupedConvPlan, reference
from igate_edge.kernels.launch import IgemmParams, TILES
from kernel_cases import Case
from kernel_images import cubin, ptx

def refused(call, error, words):
    try:
        call()
    except error as found:
        assert words in str(found), found
    else:
        raise AssertionError(words)

layer, x, skip = Case(40, 33, size=(2, 5, 6), skip=True).layer()
want = reference(layer, x, skip)
with launcher.open_launcher("ctypes") as plain, launcher.open_launcher(sys.argv[1]) as other:
    assert other.device == plain.device, (other.device, plain.device)
    assert "pycuda.autoinit" not in sys.modules
    for image in (cubin(), ptx()):
        for tile in TILES:
            plan = GroupedConvPlan.from_layer(layer, tile)
            got = [device.convolve(on, on.load(image), plan, x, skip) for on in (plain, other)]
            assert got[0].tobytes() == got[1].tobytes() == want.tobytes()
    module, stream = other.load(cubin()), other.stream()
    arrays = {"x": plan.source.pack(x), "skip": plan.target.pack(skip), "tables": plan.tables.data}
    y = np.zeros(plan.target.bytes, np.int8)
    with device.on_device(other, {**arrays, "y": y}) as places:
        launcher.run(module, plan.launch(**places), stream)
        other.synchronize()
        other.download(y, places["y"])
    assert plan.target.unpack(y).tobytes() == want.tobytes()
    refused(lambda: other.load(cubin(abi=8)), InputError, "too new for the driver")
    refused(lambda: other.load(cubin()[:-1]), InputError, "truncated")
    refused(lambda: other.load(cubin(digest="0" * 64)), CheckFailed, "failed to load the kernels")
    refused(lambda: module.launch("none", (1, 1, 1), (128, 1, 1), 0, []), InputError, "no kernel 'none'")
    refused(lambda: module.launch(TILES[0].kernel, (1, 1, 1), (128, 1, 1), 0, []), InputError, "takes one struct")
    module.launch(TILES[0].kernel, (1, 1, 1), (128, 1, 1), TILES[0].shared, [IgemmParams(tiles=64)])
    refused(other.synchronize, CheckFailed, "failed to run a kernel")
    print("the same bytes")
    sys.stdout.flush()
    os._exit(0)  # a context that failed cannot be left in order
"""


@pytest.mark.parametrize(("kind", "package"), [("pycuda", "pycuda"), ("cuda.core", "cuda.core")])
def test_it_gives_the_bytes_of_the_reference(kind: str, package: str) -> None:
    if importlib.util.find_spec(package.split(".")[0]) is None or importlib.util.find_spec(package) is None:
        how = "make test-pycuda" if kind == "pycuda" else "pip install 'igate-edge[cuda-core]'"
        pytest.skip(f"NOT TESTED: the launcher on {kind}, which is missing ({how})")
    folder = str(driver.build().parent)
    environment = {**os.environ, "LD_LIBRARY_PATH": folder}
    arguments = [sys.executable, "-c", PROGRAM, kind, str(Path(__file__).parent.parent)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (0, "the same bytes\n"), done.stderr[-3000:]
