"""Boards as directory trees: the small files that their systems show, written here in the documented grammar.

Nothing in them was copied from a board. A test builds one with `build(root, NAME)` and changes what it is about with
`put` and `drop`.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from igate_edge.runtime.device_software import Interpreter

_PARAMS = """# Power modes of this board. Each is written as in this example:
# < POWER_MODEL ID=9 NAME=EXAMPLE >
# GPU MAX_FREQ 1
< PARAM TYPE=FILE NAME=CPU_ONLINE >
CORE_0 /sys/devices/system/cpu/cpu0/online
CORE_1 /sys/devices/system/cpu/cpu1/online

<PARAM TYPE=FILE NAME=TPC_POWER_GATING >
TPC_PG_MASK /sys/devices/platform/gpu.0/tpc_pg_mask

< PARAM TYPE=FILE NAME=GPU >
MIN_FREQ /sys/class/devfreq/{gpu}/min_freq
MAX_FREQ /sys/class/devfreq/{gpu}/max_freq

< PARAM TYPE=FILE NAME=CPU_A78_0 >
MAX_FREQ /sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq

< PARAM TYPE=CLOCK NAME=EMC >
MAX_FREQ emc
"""
#: Stand-ins of the vendor's tools: real programs that keep the state in files and note how they were called.
_NVPMODEL = """#!/bin/sh
echo "nvpmodel $*" >> "{root}/calls"
case "$1" in
-m) printf 'pmode:%04d fmode:fanNull\\n' "$2" > "{root}/var/lib/nvpmodel/status" ;;
-q) echo "NVPM WARN: fan mode is not set!"; echo "NV Power Mode: {name}"; echo {id} ;;
esac
"""
_CLOCKS = """#!/bin/sh
echo "jetson_clocks $*" >> "{root}/calls"
[ $# = 0 ] || exit 0
for max in "{root}"/sys/class/devfreq/*/max_freq; do
  cp "$max" "${{max%max_freq}}min_freq"; cp "$max" "${{max%max_freq}}cur_freq"
done
for max in "{root}"/sys/devices/system/cpu/cpu*/cpufreq/scaling_max_freq; do
  cp "$max" "${{max%max_freq}}min_freq"; cp "$max" "${{max%max_freq}}cur_freq"
done
mkdir -p "{root}/sys/kernel/debug/bpmp/debug/clk/emc"
echo 1 > "{root}/sys/kernel/debug/bpmp/debug/clk/emc/mrq_rate_locked"
"""


@dataclass(frozen=True)
class Mode:
    """A mode of nvpmodel.conf; -1 is no limit."""

    id: int
    name: str
    gpu_hz: int
    emc_hz: int = -1
    cpu_khz: int = -1
    tpc_mask: int = 0
    cores: int = 2


@dataclass(frozen=True)
class Board:
    """What a tree is made of. gpu: its folder in devfreq, with (min, max, now) and all clocks in Hz."""

    model: str
    compatible: str
    release: str
    kernel: str
    memory_kb: int
    swap_kb: int
    gpu: str
    clocks: tuple[int, int, int]
    steps: tuple[int, ...]
    modes: tuple[Mode, ...]
    mode: int
    default: int
    tensorrt: str
    cuda: str
    python: str
    driver: str
    rails: dict[str, tuple[int, int]] = field(default_factory=dict)
    zram: int = 6


_JP6 = {"tensorrt": "10.3.0", "cuda": "12.6.68", "python": "3.10", "driver": "540.4.0", "kernel": "5.15.148-tegra"}
BOARDS = {
    "orin-nano-super": Board(
        model="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        compatible="nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234",
        release="# R36 (release), REVISION: 4.3, GCID: 12345678, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8",
        memory_kb=7_803_000,
        swap_kb=8_388_604,
        gpu="17000000.gpu",
        clocks=(306_000_000, 918_000_000, 306_000_000),
        steps=(306_000_000, 612_000_000, 918_000_000, 1_020_000_000),
        modes=(
            Mode(0, "15W", 612_000_000, 2_133_000_000, 1_497_600),
            Mode(1, "25W", 918_000_000, 3_199_000_000, 1_344_000),
            Mode(2, "MAXN_SUPER", -1),
            Mode(3, "7W", 408_000_000, 2_133_000_000, 960_000, 252, 1),
        ),
        mode=1,
        default=1,
        rails={"VDD_IN": (5000, 1140), "VDD_CPU_GPU_CV": (5000, 166), "VDD_SOC": (5000, 320)},
        **_JP6,
    ),
    "orin-nx-16": Board(
        model="NVIDIA Jetson Orin NX Engineering Reference Developer Kit Super",
        compatible="nvidia,p3768-0000+p3767-0000-super\0nvidia,p3767-0000\0nvidia,tegra234",
        release="# R36 (release), REVISION: 4.4, GCID: 12345678, BOARD: generic, EABI: aarch64, DATE: Mon Jun 16",
        memory_kb=15_980_000,
        swap_kb=0,
        gpu="17000000.gpu",
        clocks=(306_000_000, 408_000_000, 306_000_000),
        steps=(306_000_000, 408_000_000, 612_000_000, 918_000_000, 1_173_000_000),
        modes=(
            Mode(0, "MAXN_SUPER", -1),
            Mode(1, "10W", 612_000_000, 2_133_000_000, 1_190_400, 254, 1),
            Mode(2, "15W", 612_000_000, 2_133_000_000, 1_420_800, 252),
            Mode(3, "25W", 408_000_000, 3_199_000_000, 1_497_600, 240),
            Mode(4, "40W", 1_173_000_000, 3_199_000_000, 1_497_600, 240),
        ),
        mode=3,
        default=4,
        rails={"VDD_IN": (5000, 1800), "VDD_CPU_GPU_CV": (5000, 400), "VDD_SOC": (5000, 420)},
        zram=8,
        **_JP6,
    ),
    "agx-orin": Board(
        model="Jetson AGX Orin",
        compatible="nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234",
        release="# R39 (release), REVISION: 2.0, GCID: 12345678, BOARD: generic, EABI: aarch64, DATE: Tue Jun  2",
        kernel="6.8.12-tegra",
        memory_kb=64_300_000,
        swap_kb=0,
        gpu="17000000.gpu",
        clocks=(306_000_000, 1_300_500_000, 306_000_000),
        steps=(306_000_000, 828_750_000, 1_300_500_000),
        modes=(
            Mode(0, "MAXN", -1),
            Mode(1, "MODE_15W", 420_750_000, 2_133_000_000, 1_113_600, 126, 1),
            Mode(2, "MODE_30W", 624_750_000, 3_199_000_000, 1_728_000, 64),
            Mode(3, "MODE_50W", 828_750_000, 3_199_000_000, 1_497_600),
        ),
        mode=0,
        default=2,
        tensorrt="10.16.2",
        cuda="13.2.20",
        python="3.12",
        driver="595.45.04",
        rails={"VDD_GPU_SOC": (20000, 200), "VDD_CPU_CV": (20000, 40), "VIN_SYS_5V0": (5000, 700)},
        zram=0,
    ),
    "thor": Board(
        model="NVIDIA Jetson AGX Thor Developer Kit",
        compatible="nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264",
        release="# R38 (release), REVISION: 2.1, GCID: 12345678, BOARD: generic, EABI: aarch64, DATE: Tue Sep  9",
        kernel="6.8.12-tegra",
        memory_kb=128_700_000,
        swap_kb=0,
        gpu="gpu-gpc-0",
        clocks=(315_000_000, 1_386_000_000, 315_000_000),
        steps=(315_000_000, 1_386_000_000, 1_575_000_000),
        modes=(Mode(0, "MAXN", -1), Mode(1, "120W", 1_386_000_000, 4_266_000_000, 2_601_000)),
        mode=1,
        default=1,
        tensorrt="10.13.3",
        cuda="13.0.48",
        python="3.12",
        driver="580.00",
        zram=0,
    ),
}
NAMES = (*BOARDS, "desktop")


def put(root: Path, path: str, content: str | int, mode: int = 0o644) -> Path:
    """Write one file of the tree."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"{content}\n" if isinstance(content, int) else content)
    target.chmod(mode)
    return target


def drop(root: Path, *paths: str) -> None:
    """Take files or folders out of the tree."""
    for path in paths:
        target = root / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()


def build(root: Path, name: str) -> Path:
    """The tree of a board of NAMES below `root`, which it returns."""
    if name == "desktop":
        return _desktop(root)
    board = BOARDS[name]
    put(root, "proc/device-tree/model", board.model + "\0")
    put(root, "proc/device-tree/compatible", board.compatible + "\0")
    put(
        root,
        "etc/nv_tegra_release",
        f"{board.release} UTC 2025\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
    )
    _system(root, board.kernel, board.memory_kb, board.swap_kb, board.zram)
    put(root, "proc/sys/kernel/arch", "aarch64\n")
    put(
        root,
        "proc/driver/nvidia/version",
        f"NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  {board.driver}\n",
    )
    _power(root, board)
    _clocks(root, board)
    _sensors(root, board)
    _software(root, board)
    return root


def _system(root: Path, kernel: str, memory_kb: int, swap_kb: int, zram: int) -> None:
    put(root, "proc/sys/kernel/osrelease", kernel + "\n")
    put(root, "proc/meminfo", f"MemTotal:       {memory_kb} kB\nMemFree:         100000 kB\n")
    swaps = [f"/swapfile file {swap_kb} 0 -2"] if swap_kb else []
    swaps += [f"/dev/zram{n} partition {memory_kb // 2 // zram} 0 5" for n in range(zram)]
    head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority"
    put(root, "proc/swaps", "\n".join([head, *swaps]) + "\n")
    put(root, "proc/1/cgroup", "0::/init.scope\n")


def _power(root: Path, board: Board) -> None:
    blocks = []
    for mode in board.modes:
        cores = "".join(f"CPU_ONLINE CORE_{n} {int(n < mode.cores)}\n" for n in range(2))
        mask = f"TPC_POWER_GATING TPC_PG_MASK {mode.tpc_mask}\n"
        limits = f"GPU MAX_FREQ {mode.gpu_hz}\nCPU_A78_0 MAX_FREQ {mode.cpu_khz}\nEMC MAX_FREQ {mode.emc_hz}\n"
        blocks.append(f"< POWER_MODEL ID={mode.id} NAME={mode.name} >\n{cores}{mask}GPU MIN_FREQ 0\n{limits}")
    conf = _PARAMS.format(gpu=board.gpu) + "\n".join(blocks) + f"\n< PM_CONFIG DEFAULT={board.default} >\n"
    put(root, "etc/nvpmodel.conf", conf)
    put(root, "var/lib/nvpmodel/status", f"pmode:{board.mode:04d} fmode:fanNull\n")
    name = next(mode.name for mode in board.modes if mode.id == board.mode)
    put(root, "usr/sbin/nvpmodel", _NVPMODEL.format(root=root, name=name, id=board.mode), 0o755)
    put(root, "usr/bin/jetson_clocks", _CLOCKS.format(root=root), 0o755)


def _clocks(root: Path, board: Board) -> None:
    gpu = f"sys/class/devfreq/{board.gpu}"
    for word, value in zip(("min", "max", "cur"), board.clocks, strict=True):
        put(root, f"{gpu}/{word}_freq", value)
    put(root, f"{gpu}/available_frequencies", " ".join(map(str, board.steps)) + "\n")
    put(root, f"{gpu}/governor", "nvhost_podgov\n")
    put(root, "sys/class/devfreq/15340000.vic/max_freq", 1)
    set_mode = next(mode for mode in board.modes if mode.id == board.mode)
    put(root, "sys/devices/platform/gpu.0/tpc_pg_mask", f"{set_mode.tpc_mask:#x}\n")
    put(root, "sys/devices/platform/gpu.0/load", 125)
    for core in range(2):
        where = f"sys/devices/system/cpu/cpu{core}"
        put(root, f"{where}/online", int(core < set_mode.cores))
        if core < set_mode.cores:
            for word, value in (("min", 729_600), ("max", 1_344_000), ("cur", 1_113_600)):
                put(root, f"{where}/cpufreq/scaling_{word}_freq", value)


def _sensors(root: Path, board: Board) -> None:
    zones = {"cpu-thermal": 46_500, "gpu-thermal": 48_187, "cv0-thermal": -256_000, "tj-thermal": 48_781}
    for number, (kind, milli) in enumerate(zones.items()):
        put(root, f"sys/class/thermal/thermal_zone{number}/type", kind + "\n")
        put(root, f"sys/class/thermal/thermal_zone{number}/temp", milli)
    for number, (kind, step) in enumerate({"pwm-fan": 3, "gpu-throttle-alert": 0}.items()):
        put(root, f"sys/class/thermal/cooling_device{number}/type", kind + "\n")
        put(root, f"sys/class/thermal/cooling_device{number}/cur_state", step)
    put(root, "sys/class/hwmon/hwmon1/name", "soctherm_oc\n")
    for number, count in ((1, 0), (2, 4), (3, 0)):
        put(root, f"sys/class/hwmon/hwmon1/oc{number}_event_cnt", count)
    put(root, "sys/class/hwmon/hwmon2/name", "pwmfan\n")
    put(root, "sys/class/hwmon/hwmon2/pwm1", 102)
    monitor = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    for channel, (label, (millivolt, milliampere)) in enumerate(board.rails.items(), 1):
        put(root, f"{monitor}/in{channel}_label", label + "\n")
        put(root, f"{monitor}/in{channel}_input", millivolt)
        put(root, f"{monitor}/curr{channel}_input", milliampere)
    if board.rails:
        put(root, f"{monitor}/in7_label", "sum of shunt voltages\n")
        put(root, f"{monitor}/in7_input", 99)


def _software(root: Path, board: Board) -> None:
    """TensorRT from apt with its Python module, and the CUDA toolkit with all headers."""
    release = board.release.split(" (")[0].strip("# R") + "." + board.release.split("REVISION: ")[1].split(",")[0]
    cuda = ".".join(board.cuda.split(".")[:2])
    packages = {
        "nvidia-l4t-core": f"{release}-20250107174145",
        "tensorrt": f"{board.tensorrt}.30-1+cuda{cuda}",
        "python3-libnvinfer": f"{board.tensorrt}.30-1+cuda{cuda}",
    }
    blocks = [f"Package: {n}\nStatus: install ok installed\nVersion: {v}\n" for n, v in packages.items()]
    put(root, "var/lib/dpkg/status", "\n".join(blocks))
    put(root, f"usr/lib/aarch64-linux-gnu/libnvinfer.so.{board.tensorrt}", "elf")
    put(root, f"usr/lib/python{board.python}/dist-packages/tensorrt/__init__.py", "")
    put(root, "usr/local/cuda/version.json", f'{{"cuda": {{"name": "CUDA SDK", "version": "{board.cuda}"}}}}')
    put(root, "usr/local/cuda/bin/nvcc", "#!/bin/sh\n", 0o755)
    for header in ("cuda.h", "curand.h"):
        put(root, f"usr/local/cuda/include/{header}", "")


def _desktop(root: Path) -> Path:
    _system(root, "6.8.0-45-generic", 32_600_000, 2_097_148, 0)
    put(root, "proc/sys/kernel/arch", "x86_64\n")
    put(root, "proc/cpuinfo", "processor\t: 0\nmodel name\t: A desktop processor\nflags\t\t: avx2 avx_vnni\n")
    for word, value in (("min", 800_000), ("max", 4_900_000), ("cur", 1_200_000)):
        put(root, f"sys/devices/system/cpu/cpu0/cpufreq/scaling_{word}_freq", value)
    put(root, "sys/class/thermal/thermal_zone0/type", "x86_pkg_temp\n")
    put(root, "sys/class/thermal/thermal_zone0/temp", 41_000)
    put(root, "sys/class/thermal/cooling_device0/type", "Processor\n")
    put(root, "sys/class/thermal/cooling_device0/cur_state", 0)
    return root


def interpreter(name: str, **other: object) -> Interpreter:
    """A Python that fits the board: a venv with the system's packages, apt's TensorRT, the right cuda-bindings."""
    board = BOARDS[name]
    cuda = ".".join(board.cuda.split(".")[:2])
    fitting = Interpreter(
        python=f"{board.python}.12",
        venv="/opt/igate",
        system_site=True,
        path="/usr/local/cuda/bin:/usr/bin:/bin",
        packages={"tensorrt": board.tensorrt, "cuda-bindings": "12.9.10" if cuda < "13" else "13.2.0"},
        driver_cuda=cuda,
    )
    return dataclasses.replace(fitting, **other)  # type: ignore[arg-type]
