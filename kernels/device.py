"""The deploy kernels on a device: which image of them to load there, and layers run from host arrays.

An image is a cubin of this release that the device and its driver take; else NVRTC compiles the source once, into a
cache keyed by source, architecture and driver; else the driver compiles the PTX. Whatever is not the first is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igate_edge.errors import CheckFailed, IgateError, InputError
from igate_edge.files import read_file, write_atomic
from igate_edge.runtime.cache import default_dir

from . import build_cuda, cubin, launcher, manifest, source
from .grouped_conv import GroupedConvPlan
from .launch import Launch
from .launcher import Device, Launcher, Module

FALLBACK = "the layers run as the engine's own convolutions"


@dataclass(frozen=True)
class Loaded:
    """Kernels on a device. origin: "cubin", "nvrtc", "cache" or "ptx"."""

    module: Module
    origin: str


def load_kernels(on: Launcher, folder: Path = manifest.FOLDER, cache: Path | None = None) -> Loaded | None:
    """The best image that loads. None, with a RuntimeWarning that says why, where none does: then `FALLBACK` holds.

    folder: what `python -m igate_edge.kernels.build` wrote. cache: for what NVRTC compiles, default: the user's.
    """
    text = source.text()
    reasons = []
    kept = (default_dir() if cache is None else cache) / "kernels" / f"{_key(text, on.device)}.cubin"
    for origin, image in (
        ("cubin", lambda: shipped_cubin(folder, on.device, text)),
        ("cache", lambda: _kept(kept, text)),
        ("nvrtc", lambda: _compiled(kept, on.device, text)),
        ("ptx", lambda: shipped_ptx(folder, text)),
    ):
        try:
            module = on.load(image())
        except IgateError as error:
            reasons.append(f"{origin}: {error.cause} ({error.evidence})")
            continue
        if origin in ("nvrtc", "ptx"):
            warnings.warn(f"kernels for {on.device.name} from {origin}; {reasons[0]}", RuntimeWarning, stacklevel=2)
        return Loaded(module, origin)
    warnings.warn(f"no kernels on {on.device.name}: {FALLBACK}; {'; '.join(reasons)}", RuntimeWarning, stacklevel=2)
    return None


def shipped_cubin(folder: Path, device: Device, text: str) -> bytes:
    """The built cubin of this source for the device and its driver; raises IgateError where there is none."""
    rows = [kernel for kernel in manifest.load(folder).values() if kernel.language == "cuda"]
    fix = "build the kernels: python -m igate_edge.kernels.build"
    fit = [kernel for kernel in rows if kernel.arch == f"sm_{device.arch}" and kernel.source == source.digest(text)]
    for kernel in sorted(fit, key=lambda kernel: -kernel.abi):
        if kernel.abi > 7 and device.driver < 13000:
            continue
        data = manifest.read(kernel, folder)
        cubin.require(data, device.arch, device.driver, kernel.file)
        return data
    have = sorted({f"{kernel.arch} ABI {kernel.abi} of source {kernel.source[:8]}" for kernel in rows})
    wanted = f"sm_{device.arch}, driver {device.driver}, source {source.digest(text)[:8]}"
    raise InputError("no built cubin fits", f"wanted {wanted}, there are {', '.join(have) or 'none'}", fix)


def shipped_ptx(folder: Path, text: str) -> bytes:
    """The built PTX of this source; raises IgateError where there is none."""
    fix = "build the kernels: python -m igate_edge.kernels.build"
    for name in sorted({kernel.ptx for kernel in manifest.load(folder).values() if kernel.language == "cuda"} - {""}):
        try:
            data = read_file(folder / name)
        except OSError as error:
            raise InputError("the PTX is missing", f"cannot read {folder / name}", fix) from error
        if build_cuda.stamp(data) == source.digest(text):
            return data
    raise InputError("no built PTX fits", f"none of source {source.digest(text)[:8]}", fix)


def _key(text: str, device: Device) -> str:
    return f"{source.digest(text)[:32]}-sm_{device.arch}-{device.driver}"


def _kept(path: Path, text: str) -> bytes:
    """What NVRTC compiled before: SHA-256, then the cubin."""
    try:
        data = read_file(path)
    except OSError as error:
        raise InputError("nothing was compiled here before", f"{path.name}", "") from error
    whole = manifest.digest(data[64:]) == data[:64].decode(errors="replace")
    if not whole or build_cuda.stamp(data) != source.digest(text):
        raise InputError("a compiled cubin was altered", f"{path}", "it is compiled again")
    return data[64:]


def _compiled(path: Path, device: Device, text: str) -> bytes:
    data, _ = build_cuda.for_driver(device.arch, device.driver, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, manifest.digest(data).encode() + data)
    return data


@contextmanager
def on_device(on: Launcher, arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, int]]:
    """Addresses of copies of the arrays, which are freed at the end."""
    places: dict[str, int] = {}
    try:
        for name, array in arrays.items():
            launcher.check_array(array)
            places[name] = on.allocate(array.nbytes)
            on.upload(places[name], array)
        yield places
    finally:
        for place in places.values():
            try:
                on.free(place)
            except CheckFailed:
                continue  # a kernel that failed took the context with it; its own error is on the way


def run(
    on: Launcher, module: Module, launch: Callable[..., Launch], arrays: Mapping[str, np.ndarray], y: np.ndarray
) -> np.ndarray:
    """Copy `arrays` (by the names of the plan's `launch` arguments) there, run, and copy the result back into `y`."""
    with on_device(on, {**arrays, "y": y}) as places:
        launcher.run(module, launch(**places))
        on.synchronize()
        on.download(y, places["y"])
    return y


def convolve(
    on: Launcher, module: Module, plan: GroupedConvPlan, x: np.ndarray, skip: np.ndarray | None = None
) -> np.ndarray:
    """A layer on int8 x [N, I, H, W] -> int8 (or float32) [N, O, h, w]; skip: int8 of the result's shape.

    Raises InputError, before anything is launched, for arrays of another type or shape, or a skip that does not fit.
    """
    layer, target = plan.layer, plan.target
    arrays = {"x": plan.source.pack(_int8("x", x)), "tables": plan.tables.data}
    if skip is not None:
        arrays["skip"] = target.pack(_int8("skip", skip))
    empty = np.zeros(target.bytes, np.float32 if layer.floats else np.int8)
    return target.unpack(run(on, module, plan.launch, arrays, empty))


def _int8(name: str, array: np.ndarray) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype != np.int8:
        seen = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{name} is not an INT8 tensor", f"{seen}", "pass int8 [N, C, H, W], quantised by its scale")
    return array
