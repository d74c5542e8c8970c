"""The TensorRT plugin: built for x86 and aarch64, and driven by a host as TensorRT would, on the emulated driver.

Checked against TensorRT 10.14's headers; no TensorRT runs here.
"""

from __future__ import annotations

import base64
from ctypes.util import find_library
from dataclasses import replace
from pathlib import Path

import kernel_images
import numpy as np
import plugin_kit
import pytest
from igate_edge.kernels import manifest, plugin, source
from igate_edge.kernels.grouped_conv import GroupedConvPlan, reference
from igate_edge.kernels.launch import KERNELS, TILES
from igate_edge.kernels.pack import BlockLayout
from kernel_cases import Case, needs_compiler

from igate_edge.errors import InputError, UnavailableError

NATIVE = ("", ())
WAYS = {
    "native": NATIVE,
    "aarch64": ("aarch64", ()),
    "sanitised": ("", plugin_kit.SANITISED),
}
each_way = pytest.mark.parametrize("way", WAYS)
CASES = {
    "skip": Case(70, 36, size=(1, 7, 9), group=32, skip=True, tile=TILES[1]),
    "stride": Case(40, 33, size=(2, 8, 11), stride=(2, 2), group=32, keep=0.5, tile=TILES[2]),
    "stem": Case(16, 3, (5, 3), size=(1, 9, 12), pads=(2, 1, 1, 1), dilation=(1, 2), group=32, tile=TILES[0]),
}


def _fields(case: Case) -> plugin.PluginFields:
    return plugin.from_plan(GroupedConvPlan.from_layer(case.layer()[0], case.tile, case.group), plugin_kit.image())


def _filled(layout: BlockLayout, array: np.ndarray) -> np.ndarray:
    """The array's bytes with anything in the channels that fill the last plane up: TensorRT promises nothing there."""
    wide = replace(layout, channels=layout.planes * layout.pixel)
    rest = np.random.default_rng(0).integers(-128, 128, (layout.images, wide.channels, layout.height, layout.width))
    rest[:, : layout.channels] = array
    return wide.pack(rest.astype(np.int8))


def _enqueue(way: tuple[str, tuple[str, ...]], case: Case, folder: Path, *more: str) -> tuple[list[str], np.ndarray]:
    """What the host said, and the output [N, O, h, w] it got; before, every byte of it is 77."""
    layer, x, skip = case.layer()
    plan = GroupedConvPlan.from_layer(layer, case.tile, case.group)
    attributes = plugin.from_plan(plan, plugin_kit.image()).attributes()
    fields = plugin_kit.write_fields(folder / "fields", attributes)
    made, given = folder / "y", [folder / "x", folder / "skip"][: 1 if skip is None else 2]
    made.write_bytes(b"M" * plan.target.bytes)
    for path, layout, array in zip(given, (plan.source, plan.target), (x, skip), strict=False):
        path.write_bytes(_filled(layout, array).tobytes())
    said = plugin_kit.run(*way, fields, "enqueue", made, *given, *more, cuda=plugin_kit.driver_for(way[0]))
    return said, plan.target.unpack(np.frombuffer(made.read_bytes(), np.int8))


@needs_compiler
@each_way
def test_tensorrt_learns_what_it_asks_for(way: str, tmp_path: Path) -> None:
    case = CASES["stride"]
    fields = plugin_kit.write_fields(tmp_path / "fields", _fields(case).attributes())
    said = dict(line.split(" ", 1) for line in plugin_kit.run(*WAYS[way], fields, "describe"))
    numbers = {"arguments", "pointers", "grid", "block", "shared", "inputs", "output", "tensors"}
    forms = [f"{name}#" if name in numbers else name for name in _fields(case).attributes()]
    assert said["creator"] == "PLUGIN CREATOR_V3ONE 1 igate::Kernel 1"
    assert said["fields"].split() == forms
    kinds = "PLUGIN 1, PLUGIN_V3ONE_CORE 1, PLUGIN_V3ONE_BUILD 1, PLUGIN_V3ONE_RUNTIME 1"
    assert said["plugin"] == f"{kinds} igate::Kernel 1"
    layer = case.layer()[0]
    assert said["shape"] == " ".join(map(str, (0, 2, 40, *layer.out_size)))
    # Only INT8 (2) in CHW32 (5), at the input and at the output.
    assert said["formats"].split() == ["0:2/5", "1:2/5"]
    assert said["type"] == "1 1 4", "another type is refused and nothing is written"
    assert said["configure"] == "0 1 1", "its own shape; another batch; one input too many"
    assert said["outputs"] == "1 workspace 0 tactics 0"
    assert said["timing"].startswith("igemm_s8_128x64.")
    assert said["serialised"] == "1 11 11", "the same fields from it, from one made of them, and from a clone"


@needs_compiler
@each_way
@pytest.mark.parametrize("name", CASES)
def test_enqueue_gives_the_bytes_of_the_reference(way: str, name: str, tmp_path: Path) -> None:
    said, got = _enqueue(WAYS[way], CASES[name], tmp_path)
    assert said == ["created 1", *["attached 1"] * 3, "shape change 0", *["enqueue 0 waited 0"] * 3]
    assert got.tobytes() == reference(*CASES[name].layer()).tobytes()


@needs_compiler
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("shape", "input 0 has another shape than the launch was made for"),
        ("address", "a tensor has no aligned address"),
    ],
)
@pytest.mark.parametrize("way", ["native", "sanitised"])
def test_a_launch_that_would_read_elsewhere_is_refused(way: str, wrong: str, words: str, tmp_path: Path) -> None:
    said, got = _enqueue(WAYS[way], CASES["skip"], tmp_path, "--", wrong)
    assert f"log 1 igate::Kernel: {words}" in said
    assert "enqueue 1 waited 0" in said
    assert "enqueue 0 waited 0" not in said
    assert (got == 77).all()


@needs_compiler
@pytest.mark.parametrize("way", ["native", "sanitised"])
def test_without_a_context_or_a_driver_it_says_so(way: str, tmp_path: Path) -> None:
    said, _ = _enqueue(WAYS[way], CASES["stem"], tmp_path, "--", "context")
    assert said[1:] == ["log 1 igate::Kernel: no CUDA context is current in this thread", "attached 0"]
    if find_library("cuda") is not None:
        pytest.skip("NOT TESTED: what the plugin says without a CUDA driver, for this machine has one")
    fields = plugin_kit.write_fields(tmp_path / "fields", _fields(CASES["stem"]).attributes())
    said = plugin_kit.run(*WAYS[way], fields, "enqueue", tmp_path / "y", "--", "silent", cuda=tmp_path)
    assert said[:2] == ["created 1", "attached 0"]
    assert said[2].startswith("stderr igate::Kernel: no CUDA driver: libcuda.so.1")


@needs_compiler
def test_an_image_of_other_kernels_is_refused_by_the_driver(tmp_path: Path) -> None:
    attributes = _fields(CASES["stem"]).attributes()
    data = kernel_images.cubin(digest="0" * 64)
    other = {**attributes, "image": base64.b64encode(data).decode()}
    fields = plugin_kit.write_fields(tmp_path / "fields", other)
    said = plugin_kit.run(*NATIVE, fields, "enqueue", tmp_path / "y", cuda=plugin_kit.driver_for())
    assert said[1].startswith("log 1 igate::Kernel: cannot load the kernel's image: CUDA_ERROR_INVALID_SOURCE (300)")
    fields = plugin_kit.write_fields(tmp_path / "fields", {**attributes, "kernel": "igemm_s8_1x1"})
    said = plugin_kit.run(*NATIVE, fields, "enqueue", tmp_path / "y", cuda=plugin_kit.driver_for())
    assert said[1].startswith("log 1 igate::Kernel: cannot find kernel igemm_s8_1x1: CUDA_ERROR_NOT_FOUND")
    assert said[2] == "attached 0"


def _bad() -> dict[str, tuple[dict[str, object], str]]:
    good = _fields(CASES["skip"]).attributes()
    size = len(base64.b64decode(str(good["params"])))
    return {
        "no kernel": ({"kernel": ""}, "the kernel has no name"),
        "cut image": ({"image": str(good["image"])[:-1]}, "field image is cut off"),
        "odd text": ({"params": "####"}, "field params is not base64"),
        "no image": ({"image": "AAAA"}, "neither a cubin nor PTX"),
        "grid": ({"grid": [0, 1, 1]}, "the grid has an impossible side"),
        "short grid": ({"grid": [1, 1]}, "grid, block and shared memory are no launch"),
        "threads": ({"block": [1024, 2, 1]}, "more than 1024 threads"),
        "shared": ({"shared": []}, "field shared is not one number"),
        "pointer": ({"pointers": [size - 4, 0, 0]}, "a pointer lies outside of the arguments"),
        "negative": ({"pointers": [-8, 0, 0]}, "a pointer lies outside of the arguments"),
        "unaligned": ({"pointers": [4, 0, 0]}, "a pointer lies outside of the arguments"),
        "source": ({"pointers": [0, 3, 0]}, "a pointer has no source"),
        "cut pointer": ({"pointers": [0, 0]}, "field pointers is cut off"),
        "table": ({"pointers": [0, -1, 1 << 30]}, "beyond its tables"),
        "argument": ({"arguments": [size]}, "outside of the arguments' bytes"),
        "order": ({"arguments": [8, 0]}, "outside of the arguments' bytes"),
        "inputs": ({"inputs": [4, 1, 2]}, "field inputs is cut off"),
        "rank": ({"inputs": [-1]}, "field inputs is cut off"),
        "tensors": ({"tensors": [2, 5]}, "types and formats do not fit"),
        "side": ({"output": [0, 4, 0, 1]}, "a side follows no side of its input"),
        "divide": ({"output": [0, 1, 0, 0]}, "a side follows no side of its input"),
        "no input": ({"output": [7, 0, 0, 1]}, "a side follows no input"),
        "empty": ({"output": [-1, 0, 0, 1]}, "the output has an empty side"),
        "flat": ({"output": []}, "the output has no shape"),
        "type": ({"grid": "1,1,1"}, "field grid has another type"),
    }


@needs_compiler
@pytest.mark.parametrize("what", _bad())
def test_fields_that_are_no_launch_are_refused(what: str, tmp_path: Path) -> None:
    changed, words = _bad()[what]
    attributes = {**_fields(CASES["skip"]).attributes(), **changed}
    fields = plugin_kit.write_fields(tmp_path / "fields", attributes)  # type: ignore[arg-type]
    said = plugin_kit.run("", plugin_kit.SANITISED, fields, "describe")
    assert len(said) == 2, said
    assert said[0].startswith("log 1 igate::Kernel: node: ")
    assert words in said[0]
    assert said[1] == "created 0"


@needs_compiler
def test_a_missing_field_is_named(tmp_path: Path) -> None:
    attributes = _fields(CASES["skip"]).attributes()
    del attributes["grid"]
    said = plugin_kit.run("", (), plugin_kit.write_fields(tmp_path / "fields", attributes), "describe")
    assert said == ["log 1 igate::Kernel: node: field grid is missing", "created 0"]


@needs_compiler
def test_the_timing_cache_tells_launches_apart(tmp_path: Path) -> None:
    ids = set()
    attributes = _fields(CASES["skip"]).attributes()
    for changed in ({}, {"grid": [1, 1, 1]}, {"tables": str(attributes["tables"])[:-8] + "AAAAAAA="}):
        fields = plugin_kit.write_fields(tmp_path / "fields", {**attributes, **changed})
        said = plugin_kit.run("", (), fields, "describe")
        ids.add(next(line for line in said if line.startswith("timing")))
    assert len(ids) == 3


def test_a_plan_becomes_one_struct_with_holes_for_addresses() -> None:
    case = CASES["skip"]
    plan = GroupedConvPlan.from_layer(case.layer()[0], case.tile, case.group)
    fields = plugin.from_plan(plan, plugin_kit.image())
    places = {name: getattr(KERNELS[fields.kernel].params, name).offset for name in ("x", "skip", "y")}
    assert [places["x"], 0, 0] in [list(pointer) for pointer in fields.pointers]
    assert [places["skip"], 1, 0] in [list(pointer) for pointer in fields.pointers]
    assert [places["y"], 2, 0] in [list(pointer) for pointer in fields.pointers]
    tables = [offset for _, source, offset in fields.pointers if source == plugin.TABLES]
    assert sorted(tables) == sorted(start for start, _ in plan.tables.parts.values())
    assert all(fields.params[place : place + 8] == bytes(8) for place, _, _ in fields.pointers)
    launch = plan.launch(1 << 8, 2 << 8, 3 << 8, 4 << 8)
    filled = bytearray(fields.params)
    for place, tensor, offset in fields.pointers:
        base = {0: 1 << 8, 1: 4 << 8, 2: 2 << 8, plugin.TABLES: 3 << 8}[tensor]
        filled[place : place + 8] = (base + offset).to_bytes(8, "little")
    assert bytes(filled) == bytes(launch.params)


@pytest.mark.parametrize("changed", [{"group": 0}, {"group": 16}, {"floats": True}])
def test_another_layout_than_tensorrts_is_refused(changed: dict[str, object]) -> None:
    case = replace(Case(32, 32, group=32), **changed)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not for the plugin"):
        _fields(case)


def test_a_kernel_of_another_build_is_refused() -> None:
    good, case = plugin_kit.image(), CASES["stem"]
    plan = GroupedConvPlan.from_layer(case.layer()[0], case.tile, case.group)
    rows = dict(good.kernels)
    with pytest.raises(InputError, match="the image lacks a kernel: igemm_s8_64x32, there are: none"):
        plugin.from_plan(plan, plugin.Image(good.data, {}))
    for change in ({"dynamic_shared": 1}, {"block": (64, 1, 1)}, {"hidden": 2}, {"params": (("params", "struct:8"),)}):
        rows[plan.tile.kernel] = replace(good.kernels[plan.tile.kernel], **change)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="takes another launch"):
            plugin.from_plan(plan, plugin.Image(good.data, rows))


def test_the_image_is_the_one_that_was_built(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="no kernels were built"):
        plugin.Image.built(folder=tmp_path)
    made = plugin_kit.image()
    (tmp_path / "igate.cubin").write_bytes(made.data)
    digest = source.digest()
    manifest.write(tmp_path, [replace(row, file="igate.cubin", source=digest) for row in made.kernels.values()])
    found = plugin.Image.built(folder=tmp_path)
    assert found.data == made.data
    assert found.kernels.keys() == made.kernels.keys()
    with pytest.raises(InputError, match="no built cubin fits"):
        plugin.Image.built(arch=90, folder=tmp_path)
