"""What belongs together on a Jetson: JetPack, TensorRT, CUDA, Python; and pairs that cannot work, as documented."""

from __future__ import annotations

from dataclasses import dataclass

from .device import Device
from .device_software import version_tuple

ORIN, THOR = "tegra234", "tegra264"


@dataclass(frozen=True)
class Stack:
    """A JetPack's parts. tensorrt: its own release; newer: a later one that is documented to work on `newer_module`."""

    jetpack: str
    l4t: str
    tensorrt: str
    cuda: str
    python: str
    socs: tuple[str, ...]
    newer: str = ""
    newer_module: str = ""


#: By L4T, most exact first. Of JetPack 6.0 only that its TensorRT is of generation 8 matters.
STACKS = (
    Stack("5", "35", "8.5", "11.4", "3.8", (ORIN, "tegra194")),
    Stack("6.0", "36.3", "8.6", "12.2", "3.10", (ORIN,)),
    Stack("6.1/6.2", "36", "10.3", "12.6", "3.10", (ORIN,)),
    Stack("7.0/7.1", "38", "10.13", "13.0", "3.12", (THOR,)),
    Stack("7.2", "39", "10.16", "13.2", "3.12", (ORIN, THOR), "11.4", "AGX Orin"),
)
#: Generations of TensorRT that the product builds engines with.
OLDEST_TENSORRT = (10, 3)


def stack_of(device: Device) -> Stack | None:
    """The parts that belong to a board's L4T; None for one that is not known."""
    return next((stack for stack in STACKS if f"{device.l4t}.".startswith(f"{stack.l4t}.")), None)


def unsupported(device: Device, tensorrt: str, cuda: str | None = None) -> str:
    """Why this TensorRT, made for this CUDA, cannot build engines on the board; "" where it can, or nobody knows.

    >>> unsupported(Device(soc="tegra234", sm=87, l4t="39.2.0"), "10.13.3", "13.0")
    'TensorRT 10.13 for CUDA 13 has no kernels for SM 87: CUDA 13 came to this chip with TensorRT 10.16'
    >>> unsupported(Device(soc="tegra234", sm=87, l4t="36.4.3"), "10.3.0", "12.6")
    ''
    """
    version, stack = version_tuple(tensorrt)[:2], stack_of(device)
    name = ".".join(map(str, version))
    major = (version_tuple(cuda or "") or (0,))[0]
    if not version:
        return ""
    if version < OLDEST_TENSORRT:
        return f"TensorRT {name} is too old: 10.3 or later is needed, which JetPack 6.1 and later bring"
    if device.soc == ORIN and major >= 13 and version < (10, 16):
        return (
            f"TensorRT {name} for CUDA {major} has no kernels for SM 87: CUDA 13 came to this chip with TensorRT 10.16"
        )
    if stack is None:
        return ""
    if major and major != version_tuple(stack.cuda)[0]:
        return f"TensorRT {name} is made for CUDA {major}, and JetPack {stack.jetpack} has CUDA {stack.cuda}"
    if version == version_tuple(stack.tensorrt) or (stack.newer and _newer(device, stack, version)):
        return ""
    return f"TensorRT {name} is of another JetPack: JetPack {stack.jetpack} has TensorRT {stack.tensorrt}"


def _newer(device: Device, stack: Stack, version: tuple[int, ...]) -> bool:
    fits = stack.newer_module in (device.module or "")
    return fits and version >= version_tuple(stack.newer) and version[0] == version_tuple(stack.newer)[0]
