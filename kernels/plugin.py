"""A layer's launch as fields of the TensorRT plugin `igate::Kernel` (plugin/): the one description that a node carries.

fields = plugin.from_plan(GroupedConvPlan.from_layer(layer, group=32), plugin.Image.built())
node attributes = fields.attributes()

The plugin knows no kernel of ours: image, name, grid, arguments, tables, shapes and formats all come from here.
"""

from __future__ import annotations

import base64
import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from igate_edge.errors import InputError
from igate_edge.files import as_path

from . import device, manifest, source
from .grouped_conv import GroupedConvPlan
from .launch import Launch, Pointer
from .launcher import Device

NAME, VERSION, NAMESPACE = "Kernel", "1", "igate"
#: TensorRT's own numbers: DataType.INT8, TensorFormat.CHW32.
INT8, CHW32 = 2, 5
#: Channels of a plane of TensorRT's CHW32, the INT8 format of its convolutions; a plan for the plugin has this group.
GROUP = 32
TABLES, CONSTANT = -1, -1
#: What a pointer is made of while a launch is only described: which buffer in the high bits, the place in it below.
_SHIFT = 40

Side = tuple[int, int, int, int]


@dataclass(frozen=True)
class Image:
    """A cubin or PTX, and what its manifest says of each kernel in it, by the name inside the image."""

    data: bytes
    kernels: Mapping[str, manifest.Built]

    @classmethod
    def built(cls, arch: int = 87, driver: int = 12060, folder: Path = manifest.FOLDER) -> Image:
        """What was built ahead of time for sm_`arch` and a driver of that CUDA version (12060: 12.6).

        Raises UnavailableError where nothing was built, InputError where nothing fits or a file was altered.
        """
        folder = as_path(folder)
        data = device.shipped_cubin(folder, Device("", arch, driver, 0), source.text())
        rows = [kernel for kernel in manifest.load(folder).values() if kernel.sha256 == manifest.digest(data)]
        return cls(data, {kernel.entry: kernel for kernel in rows})


@dataclass(frozen=True)
class PluginFields:
    """All that one plugin node says.

    params: bytes of the arguments, zero where pointers go; arguments: where each one starts. pointers: (place in
    params, source, offset), source a tensor's index (inputs, then the output) or TABLES. inputs: the shapes that the
    launch was made for; output: per side (input, side, add, divide) for floor((side + add) / divide), or (CONSTANT,
    value, 0, 1). tensors: (DataType, TensorFormat) of inputs and output.
    """

    kernel: str
    image: bytes
    params: bytes
    tables: bytes
    arguments: tuple[int, ...]
    pointers: tuple[tuple[int, int, int], ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[Side, ...]
    tensors: tuple[tuple[int, int], ...]

    def attributes(self) -> dict[str, str | list[int]]:
        """The fields as attributes of an ONNX node: numbers, and text, which bytes become in base64."""
        return {
            "kernel": self.kernel,
            "image": _text(self.image),
            "params": _text(self.params),
            "tables": _text(self.tables),
            "arguments": list(self.arguments),
            "pointers": [number for pointer in self.pointers for number in pointer],
            "grid": list(self.grid),
            "block": list(self.block),
            "shared": [self.shared],
            "inputs": [number for shape in self.inputs for number in (len(shape), *shape)],
            "output": [number for side in self.output for number in side],
            "tensors": [number for tensor in self.tensors for number in tensor],
        }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def from_plan(plan: GroupedConvPlan, image: Image) -> PluginFields:
    """The fields of one convolution between INT8 tensors in CHW32. Raises InputError for another kind of plan.

    The plan's launch must be what the image's manifest says of the kernel: name, threads, shared memory, arguments.
    """
    layer, x, y = plan.layer, plan.source, plan.target
    if x.group != GROUP or y.group != GROUP or layer.floats:
        evidence = f"planes of {x.group} and {y.group} channels, float result: {layer.floats}"
        raise InputError("this plan is not for the plugin", evidence, f"plan an INT8 result with group={GROUP}")
    inputs = [(x.images, x.channels, x.height, x.width)]
    if layer.skip_scale is not None:
        inputs.append((y.images, y.channels, y.height, y.width))
    (top, left, bottom, right), (down, across) = layer.pads, layer.stride
    rules: tuple[Side, ...] = (
        (0, 0, 0, 1),
        (CONSTANT, y.channels, 0, 1),
        (0, 2, top + bottom - layer.reach[0] - 1 + down, down),
        (0, 3, left + right - layer.reach[1] - 1 + across, across),
    )

    def launch(tensors: Sequence[int], tables: int) -> Launch:
        return plan.launch(tensors[0], tensors[-1], tables, tensors[1] if len(tensors) > 2 else 0)

    return describe(launch, image, plan.tables.data.tobytes(), inputs, rules)


def describe(
    launch: Callable[[Sequence[int], int], Launch],
    image: Image,
    tables: bytes,
    inputs: Sequence[tuple[int, ...]],
    output: tuple[Side, ...],
) -> PluginFields:
    """The fields of any launch of INT8 tensors in CHW32 with one struct of arguments.

    launch: (addresses of inputs and output, address of the tables) -> the launch. Raises InputError where it is not the
    launch that the image's manifest describes.
    """
    buffers = [(1 + index) << _SHIFT for index in range(len(inputs) + 2)]
    made = launch(buffers[:-1], buffers[-1])
    _check(made, image)
    params, pointers = bytearray(bytes(made.params)), []
    for name, kind in (field[:2] for field in type(made.params)._fields_):  # type: ignore[misc]
        address = getattr(made.params, name)
        if kind is not Pointer or not address:
            continue
        number, offset = (address >> _SHIFT) - 1, address & ((1 << _SHIFT) - 1)
        place = getattr(type(made.params), name).offset
        pointers.append((place, TABLES if number == len(inputs) + 1 else number, offset))
        params[place : place + 8] = bytes(8)
    return PluginFields(
        kernel=made.kernel, image=image.data, params=bytes(params), tables=tables, arguments=(0,),
        pointers=tuple(pointers), grid=made.grid, block=made.block, shared=made.shared, inputs=tuple(inputs),
        output=output, tensors=((INT8, CHW32),) * (len(inputs) + 1),
    )  # fmt: skip


def _check(launch: Launch, image: Image) -> None:
    fix = "build the kernels of this release: python -m igate_edge.kernels.build"
    built = image.kernels.get(launch.kernel)
    if built is None:
        known = ", ".join(sorted(image.kernels)) or "none"
        raise InputError("the image lacks a kernel", f"{launch.kernel}, there are: {known}", fix)
    params = (("params", f"struct:{ctypes.sizeof(launch.params)}"),)
    wanted, said = (
        (params, 0, launch.block, launch.shared),
        (built.params, built.hidden, built.block, built.dynamic_shared),
    )
    if wanted != said:
        raise InputError(f"{launch.kernel} takes another launch", f"planned {wanted}, built for {said}", fix)
