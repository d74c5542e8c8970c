"""The part of `igate doctor` for Jetson boards: what belongs together, what does not, and the command that mends it.

Rules are taken from documents and from reports of others; none was run on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .runtime.device import Device, State, capped
from .runtime.device_power import tpc_mask_now
from .runtime.device_software import Interpreter, Software, resource_sms, short, version_tuple
from .runtime.device_stack import OLDEST_TENSORRT, Stack, stack_of, unsupported
from .runtime.device_sysfs import integer

OK, NOTE, MISMATCH = "ok", "note", "MISMATCH"
#: MiB of memory and swap on disk together that the builder needs (8 GB boards: 4 GB of swap or more).
BUILD_MB = 11_264
_VENV = "python3 -m venv --system-site-packages VENV"


@dataclass(frozen=True)
class Finding:
    """One part of a board. verdict: OK, NOTE (works; good to know) or MISMATCH. needed_for: "run" or "build"."""

    part: str
    found: str
    wanted: str = ""
    verdict: str = OK
    reason: str = ""
    fix: str = ""
    needed_for: str = "run"


@dataclass(frozen=True)
class Facts:
    """All that the rules look at."""

    device: Device
    state: State
    software: Software
    interpreter: Interpreter
    root: Path = Path("/")
    kernels: Path | None = None

    @property
    def stack(self) -> Stack | None:
        return stack_of(self.device)


def examine(facts: Facts, purpose: str = "build") -> list[Finding]:
    """Every rule's finding; purpose "run" leaves out what only building needs."""
    rules: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
        _jetpack,
        _container,
        _tensorrt,
        _module,
        _kernels_of_tensorrt,
        _python,
        _cuda,
        _driver,
        _bindings,
        _nvcc,
        _headers,
        _memory,
        _deploy_kernels,
        _power,
    )
    return [found for rule in rules for found in rule(facts) if purpose == "build" or found.needed_for == "run"]


def _jetpack(facts: Facts) -> Iterator[Finding]:
    device, stack = facts.device, facts.stack
    found = f"{device.jetpack or 'unknown'} (L4T {device.l4t or 'unknown'})"
    wanted = "6.1, 6.2 or 7"
    if device.l4t is None:
        reason = "nothing tells which L4T this is, so nothing can be compared with it"
        fix = "docker run -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro ..." if device.container else ""
        yield Finding("JetPack", found, wanted, NOTE, reason, fix or "apt-cache show nvidia-l4t-core")
    elif stack is None:
        reason = f"L4T {device.l4t} is not in the table: what a build makes is judged by its golden frames alone"
        yield Finding("JetPack", found, wanted, NOTE, reason, "pip install --upgrade igate-edge")
    elif device.soc == "tegra194":
        reason = "Xavier ends at JetPack 5, whose TensorRT is too old: here the backend is onnxruntime"
        yield Finding("JetPack", found, wanted, MISMATCH, reason, "igate build BUNDLE --backend onnxruntime")
    elif version_tuple(stack.tensorrt) < OLDEST_TENSORRT:
        reason = f"JetPack {stack.jetpack} brings TensorRT {stack.tensorrt}; 10.3 or later is needed"
        upgrade = "sudo sed -i 's/r36.3/r36.4/' /etc/apt/sources.list.d/nvidia-l4t-apt-source.list"
        apt = f"{upgrade} && sudo apt update && sudo apt dist-upgrade"
        yield Finding("JetPack", found, wanted, MISMATCH, reason, apt if stack.l4t == "36.3" else "flash JetPack 6.2")
    elif device.soc is not None and device.soc not in stack.socs:
        reason = f"JetPack {stack.jetpack} is not for this chip ({device.soc})"
        yield Finding("JetPack", found, wanted, MISMATCH, reason, "flash JetPack 6.2 or 7.2")
    else:
        yield Finding("JetPack", found, wanted)


def _container(facts: Facts) -> Iterator[Finding]:
    device = facts.device
    if not device.container:
        return
    kernels = {"5.10": "35", "5.15": "36"}
    host = next((l4t for start, l4t in kernels.items() if (device.kernel or "").startswith(f"{start}.")), None)
    image = (device.l4t or "").split(".")[0]
    if host and image and host != image:
        reason = f"the image is of L4T {image}, the host's kernel {device.kernel} of L4T {host}: its driver may not fit"
        yield Finding("container", f"L4T {image}", f"L4T {host}", MISMATCH, reason, f"use an image of r{host}")
        return
    reason = "TensorRT and CUDA are the image's, the driver is the host's"
    fix = "docker run --runtime nvidia ..."
    if facts.state.power_mode is None:
        reason += "; the power mode cannot be seen, so times are kept as unverified"
        fix += " -v /etc/nvpmodel.conf:/etc/nvpmodel.conf:ro -v /var/lib/nvpmodel:/var/lib/nvpmodel:ro"
    yield Finding("container", "yes", "", NOTE, reason, fix)


def _tensorrt(facts: Facts) -> Iterator[Finding]:
    wheels = [v for name, v in facts.interpreter.packages.items() if name.startswith("tensorrt-cu")]
    versions, stack = facts.software.tensorrt or tuple(wheels[:1]), facts.stack
    newer = f" or {stack.newer}" if stack and stack.newer and stack.newer_module in (facts.device.module or "") else ""
    wanted = f"{stack.tensorrt}{newer}" if stack else ""
    if not versions:
        apt = "sudo apt install tensorrt python3-libnvinfer"
        fix = "start from an image that has it, as l4t-tensorrt or l4t-jetpack" if facts.device.container else apt
        reason = "no libnvinfer is installed"
        yield Finding("TensorRT", "absent", wanted, MISMATCH, reason, fix)
        return
    found = " and ".join(versions)
    reason = unsupported(facts.device, versions[-1], facts.software.tensorrt_cuda)
    fix = f"sudo apt install --reinstall --allow-downgrades 'tensorrt={stack.tensorrt}*'" if stack else "see JetPack"
    if len(versions) > 1:
        reason = f"two TensorRTs on one board: an engine of one does not open with the other ({found})"
        fix = "find them with `ldconfig -p | grep nvinfer; dpkg -l | grep nvinfer` and remove all but JetPack's"
    yield Finding("TensorRT", found, wanted, MISMATCH if reason else OK, reason, fix if reason else "")


def _module(facts: Facts) -> Iterator[Finding]:
    """The Python module of TensorRT: that of apt, seen from where we run."""
    python, software = facts.interpreter, facts.software
    version, library = python.packages.get("tensorrt"), software.tensorrt[-1] if software.tensorrt else ""
    part, wanted = "TensorRT in Python", short(library)
    if version is not None:
        if not library or short(version) == short(library):
            yield Finding(part, version, wanted)
            return
        names = " ".join(sorted(name for name in python.packages if name.startswith("tensorrt")))
        reason = f"the module is of {version}, the library of {library}: an engine of one does not open with the other"
        yield Finding(part, version, wanted, MISMATCH, reason, f"pip uninstall {names}, then {_VENV}")
    elif not software.module_pythons:
        fix = "sudo apt install python3-libnvinfer"
        yield Finding(part, "absent", wanted, MISMATCH, "apt's module of TensorRT is not installed", fix)
    elif python.venv and not python.system_site:
        reason = "this virtual environment hides the system's packages, and TensorRT's module is one; pip has none"
        change = "s/(include-system-site-packages = )false/\\1true/"
        fix = f"sed -Ei '{change}' {python.venv}/pyvenv.cfg   (new ones: {_VENV})"
        yield Finding(part, "hidden by the venv", wanted, MISMATCH, reason, fix)
    else:
        yield Finding(part, "absent", wanted, MISMATCH, *_other_python(facts))


def _other_python(facts: Facts) -> tuple[str, str]:
    served, here = facts.software.module_pythons, short(facts.interpreter.python)
    if here in served or "3" in served:
        return "the module is installed but this Python does not find it", f"/usr/bin/{_VENV}"
    return f"apt's module is for Python {' and '.join(served)}, this is {here}", f"/usr/bin/{_VENV}"


def _kernels_of_tensorrt(facts: Facts) -> Iterator[Finding]:
    """A wheel or another board's library may hold no kernels for this chip, which shows late or as nonsense."""
    sm, packages = facts.device.sm, facts.interpreter.packages
    for where, names in (("wheel", facts.interpreter.resources), ("library", facts.software.resources)):
        sms = resource_sms(names)
        if sm is not None and sms and sm not in sms:
            found = ", ".join(f"SM {have}" for have in sms)
            reason = f"the TensorRT {where} has kernels for {found} only"
            fix = _uninstall(packages) if where == "wheel" else "sudo apt install --reinstall tensorrt"
            yield Finding(f"TensorRT {where}", found, f"SM {sm}", MISMATCH, reason, fix)
            return
    for cuda in ("12", "13"):
        wheel = next((packages[name] for name in packages if name.startswith(f"tensorrt-cu{cuda}")), None)
        reason = unsupported(facts.device, wheel, cuda) if wheel else ""
        if wheel and reason:
            wanted = facts.stack.tensorrt if facts.stack else ""
            fix = _uninstall(packages)
            yield Finding("TensorRT wheel", f"{wheel} (CUDA {cuda})", wanted, MISMATCH, reason, fix)


def _uninstall(packages: dict[str, str]) -> str:
    names = sorted(name for name in packages if name.startswith("tensorrt"))
    return f"pip uninstall {' '.join(names) or 'tensorrt'}; apt's python3-libnvinfer is the one for this board"


def _python(facts: Facts) -> Iterator[Finding]:
    here, stack = facts.interpreter.python, facts.stack
    if stack is None:
        return
    other = short(here) != stack.python and "tensorrt" not in facts.interpreter.packages
    reason = f"JetPack's Python packages are made for Python {stack.python}" if other else ""
    yield Finding("Python", here, stack.python, MISMATCH if other else OK, reason, f"/usr/bin/{_VENV}" if other else "")


def _cuda(facts: Facts) -> Iterator[Finding]:
    found, stack = facts.software.cuda, facts.stack
    wanted = stack.cuda if stack else ""
    if found is None:
        reason = "no toolkit: only needed to compile on the board"
        yield Finding("CUDA toolkit", "absent", wanted, NOTE, reason, "sudo apt install cuda-toolkit", "build")
    elif stack and short(found) != stack.cuda:
        reason = f"CUDA {short(found)} is of another JetPack: JetPack {stack.jetpack} has CUDA {stack.cuda}"
        fix = f"sudo apt install cuda-toolkit-{stack.cuda.replace('.', '-')}, then point /usr/local/cuda to it"
        yield Finding("CUDA toolkit", found, wanted, MISMATCH, reason, fix, "build")
    else:
        yield Finding("CUDA toolkit", found, wanted, needed_for="build")


def _driver(facts: Facts) -> Iterator[Finding]:
    speaks, stack = facts.interpreter.driver_cuda, facts.stack
    found = f"{facts.software.driver or 'version unknown'}{f', speaks CUDA {speaks}' if speaks else ''}"
    wanted = f"CUDA {stack.cuda}" if stack else ""
    if speaks is None:
        reason = "libcuda does not answer from here, so what the driver speaks is unverified"
        fix = "docker run --runtime nvidia ..." if facts.device.container else "ldconfig -p | grep libcuda"
        yield Finding("driver", found, wanted, NOTE, reason, fix)
    elif stack and version_tuple(speaks) < version_tuple(stack.cuda):
        reason = f"the driver speaks CUDA {speaks}, JetPack {stack.jetpack} builds with {stack.cuda}"
        fix = "sudo apt update && sudo apt install --reinstall nvidia-l4t-cuda nvidia-l4t-core, then reboot"
        yield Finding("driver", found, wanted, MISMATCH, reason, fix)
    else:
        yield Finding("driver", found, wanted)


def _bindings(facts: Facts) -> Iterator[Finding]:
    packages, stack = facts.interpreter.packages, facts.stack
    found = packages.get("cuda-bindings")
    major = version_tuple(stack.cuda)[0] if stack else 12
    lowest, wanted = ("12.6", "12.6 to 12.9") if major == 12 else (str(major), str(major))
    fix = f"pip install 'cuda-bindings>={lowest},<{major + 1}'"
    if found is None and "pycuda" in packages:
        yield Finding("CUDA from Python", f"pycuda {packages['pycuda']}")
    elif found is None:
        reason = "no package reaches the GPU's memory from Python"
        yield Finding("CUDA from Python", "absent", f"cuda-bindings {wanted}", MISMATCH, reason, fix)
    elif stack and version_tuple(found)[0] != major:
        reason = f"cuda-bindings {found} speaks CUDA {version_tuple(found)[0]}, this board CUDA {major}"
        yield Finding("CUDA from Python", f"cuda-bindings {found}", wanted, MISMATCH, reason, fix)
    else:
        yield Finding("CUDA from Python", f"cuda-bindings {found}", wanted)


def _nvcc(facts: Facts) -> Iterator[Finding]:
    nvcc = facts.software.nvcc
    if nvcc is None:
        return
    folder = nvcc.rsplit("/", 1)[0]
    if folder in [entry.rstrip("/") for entry in facts.interpreter.path.split(":")]:
        yield Finding("nvcc", nvcc, "on PATH", needed_for="build")
        return
    reason = "installed but not on PATH: a build of pycuda then fails after minutes with `cuda.h: No such file`"
    fix = f"export PATH={folder}:$PATH CUDA_ROOT=/usr/local/cuda CPATH=/usr/local/cuda/include"
    yield Finding("nvcc", nvcc, "on PATH", _if_pycuda(facts), reason, fix, "build")


def _headers(facts: Facts) -> Iterator[Finding]:
    missing, packages = facts.software.missing_headers, facts.interpreter.packages
    if not missing or "pycuda" in packages:
        yield Finding("headers for pycuda", "there" if not missing else "built already", needed_for="build")
        return
    stack = facts.stack
    suffix = f"-{stack.cuda.replace('.', '-')}" if stack else ""
    names = {"cuda.h": f"cuda-cudart-dev{suffix}", "curand.h": f"libcurand-dev{suffix}"}
    reason = f"{' and '.join(missing)} missing: pycuda has no wheel and cannot be built here"
    fix = f"sudo apt install {' '.join(names[name] for name in missing)}"
    absent = f"{' and '.join(missing)} missing"
    yield Finding("headers for pycuda", absent, "cuda.h, curand.h", _if_pycuda(facts), reason, fix, "build")


def _if_pycuda(facts: Facts) -> str:
    """What hinders a build of pycuda is a mismatch only where no cuda-bindings of the right major does its work."""
    return MISMATCH if any(finding.verdict == MISMATCH for finding in _bindings(facts)) else NOTE


def _memory(facts: Facts) -> Iterator[Finding]:
    device = facts.device
    if device.memory_mb is None:
        return
    swap, zram = device.swap_mb or 0, device.zram_mb or 0
    sizes = {"": device.memory_mb, " swap": swap, " zram": zram}
    found = ", ".join(f"{size / 1024:.1f} GiB{kind}" for kind, size in sizes.items() if size or kind == " swap")
    wanted = f"{BUILD_MB / 1024:.0f} GiB in all"
    if device.memory_mb + swap >= BUILD_MB:
        yield Finding("memory for a build", found, wanted, needed_for="build")
        return
    reason = "TensorRT's builder needs more than the engine, and zram takes from the same memory"
    zram_off = "sudo systemctl disable --now nvzramconfig; " if zram else ""
    made = " && ".join(f"sudo {step} /swapfile" for step in ("fallocate -l 8G", "chmod 600", "mkswap", "swapon"))
    fix = f"{'on the host: ' if device.container else ''}{zram_off}{made}"
    yield Finding("memory for a build", found, wanted, MISMATCH, reason, fix, "build")


def _deploy_kernels(facts: Facts) -> Iterator[Finding]:
    from igate_edge.errors import IgateError
    from igate_edge.kernels import manifest

    sm = facts.device.sm
    if sm is None:
        return
    fix = "python -m igate_edge.kernels.build"
    try:
        rows = manifest.load(facts.kernels or manifest.FOLDER).values()
    except IgateError:
        reason = "not built: the layers run as TensorRT's own convolutions"
        yield Finding("igate kernels", "none", f"SM {sm}", NOTE, reason, fix)
        return
    have = sorted({row.arch.removeprefix("sm_") for row in rows})
    found = ", ".join(f"SM {arch}" for arch in have)
    other = f"built for {found} only: on this chip they are compiled from source at first use"
    reason = "" if str(sm) in have else other
    yield Finding("igate kernels", found, f"SM {sm}", NOTE if reason else OK, reason, fix if reason else "")


def _power(facts: Facts) -> Iterator[Finding]:
    mode = facts.state.power_mode
    if mode is None:
        if not facts.device.container:
            reason = "nvpmodel does not tell, so times are kept as unverified"
            yield Finding("power mode", "unverified", "", NOTE, reason, "sudo nvpmodel -q")
        return
    now = tpc_mask_now(facts.root)
    wanted = integer(mode.tpc_mask)
    reason, fix = capped(facts.state), f"sudo igate jetson power {mode.name} --apply"
    if now is not None and wanted is not None and now != wanted:
        reason = f"mode {mode.name} switches GPU clusters {wanted:#x} off, the kernel still has {now:#x}"
        fix = "sudo reboot"
    yield Finding("power mode", mode.name, "", MISMATCH if reason else OK, reason, fix if reason else "")
