"""Whole nets through the packed deploy kernels on the CPU, against exact integers and the trt dialect in float."""

from __future__ import annotations

import json
from pathlib import Path

import gatednets
import int8_nets
import numpy as np
import onnx_ir as ir
import pytest
from igate_edge.kernels.grouped_conv import GroupedConvPlan
from igate_edge.kernels.launch import TILES
from kernel_cases import needs_compiler

from igate_edge import builder
from igate_edge.bundle import Bundle
from igate_edge.compiler import calibrate, graph, layout, quantize
from igate_edge.compiler.groups import constant
from igate_edge.engines import emulate
from igate_edge.engines.emulate_graph import ConvStep, program
from igate_edge.errors import GraphError, InputError
from igate_edge.runtime.preprocess import to_input

pytestmark = needs_compiler


def trt(model: ir.Model, frames: list[np.ndarray]) -> ir.Model:
    return quantize.quantize(model, calibrate.calibrate(model, frames), dialect="trt")


def noise(seed: int) -> np.ndarray:
    """A preprocessed image of the gated nets."""
    return np.random.default_rng(seed).random((1, 3, gatednets.SIZE, gatednets.SIZE)).astype(np.float32)


def merged(kind: str, seed: int, choice: str = "merged", width: int = 6, share: float = 0.4) -> tuple[ir.Model, list]:
    """A gated net with random masks, laid out and quantised, and frames for it."""
    masks = gatednets.random_masks(kind, share, seed, width)
    laid = layout.lay_out(gatednets.gated(kind, masks, width), choice)
    frames = [noise(index) for index in range(4)]
    return trt(laid.model, frames), frames


def agree(model: ir.Model, image: np.ndarray) -> dict[str, np.ndarray]:
    """Assert that kernels, integer reference and the trt dialect in float store the same bytes; returns them."""
    outputs, stored = emulate.Session(model).trace(image)
    again, expected = emulate.Session(model, kernels=False).trace(image)
    assert set(stored) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)
    for name, values in again.items():
        np.testing.assert_array_equal(outputs[name], values, err_msg=name)
    # The float graph as it is written, every layer from the bytes before it: sums in float32 may fall on the other
    # side of a tie, which no net here happens to do.
    steps = int8_nets.layer_steps(model, {name: array.astype(np.int64) for name, array in stored.items()}, image)
    assert steps
    for name, array in steps.items():
        np.testing.assert_array_equal(stored[name].reshape(array.shape), array, err_msg=name)
    return stored


@pytest.mark.parametrize("name", int8_nets.NETS)
def test_a_net_bit_for_bit_at_every_site(name: str) -> None:
    model, net = int8_nets.NETS[name]()
    quantised, image = trt(model, net.frames(2)), net.frames(1, seed=5)[0]
    stored = agree(quantised, image)
    assert any(np.abs(array).max() > 100 for array in stored.values())
    outputs, float_outputs = emulate.Session(quantised).run(image), int8_nets.run(quantised, image, optimise=False)
    assert gatednets.difference(float_outputs, outputs) < 1e-5


@pytest.mark.parametrize("choice", ["merged", "merged:16", "split"])
@pytest.mark.parametrize("kind", ["chain", "residual"])
def test_a_gated_net_in_any_layout_bit_for_bit(kind: str, choice: str) -> None:
    model, frames = merged(kind, seed=3, choice=choice)
    agree(model, frames[0])


def test_the_convolutions_of_a_net_run_as_kernels() -> None:
    model, net = int8_nets.resnet()
    session = emulate.Session(trt(model, net.frames(2)))
    kernels = {layer.name: layer.kernel for layer in session.layers}
    convs = [node.name for node in model.graph if node.op_type in ("Conv", "Gemm")]
    assert all(kernels[name].startswith("igemm_s8_") for name in convs)
    assert not any(kernel == "host" for name, kernel in kernels.items() if name.startswith(("add", "relu")))
    assert all(0 < layer.macs <= layer.padded_macs for layer in session.layers if layer.kernel != "host")


def test_a_merged_layer_is_one_launch_that_skips_its_zero_blocks() -> None:
    """Of 32 channels 16 are each task's own: 16 shared, 48 own and 16 mixed values; a branch reads 32."""
    masks = {site: np.zeros((3, count), bool) for site, count in gatednets.sites_of("chain", 32).items()}
    for mask in masks.values():
        mask[:, :16] = True
    laid = layout.lay_out(gatednets.gated("chain", masks, 32))
    model = trt(laid.model, [noise(0)])
    agree(model, noise(0))
    (step,) = [
        step
        for step in program(model).steps
        if isinstance(step, ConvStep) and step.layer.weight.shape == (64, 80, 3, 3)
    ]
    used = step.layer.weight.reshape(4, 16, 5, 16, 9).any(axis=(1, 3, 4))
    assert used.sum(axis=1).tolist() == [2, 2, 2, 2]
    plan = GroupedConvPlan.from_layer(step.layer, TILES[0])
    assert plan.macs == 16 * 9 * 8 * 256
    assert plan.tiles == sum(-(-branch.rows // 32) for branch in plan.branches)


def test_blocks_that_the_compiler_names_hold_all_weights() -> None:
    laid = layout.lay_out(gatednets.gated("residual", gatednets.random_masks("residual", 0.4, 1)))
    named = [node for node in laid.model.graph if "igate.blocks" in node.metadata_props]
    assert named
    for node in named:
        weight = constant(node.inputs[1])
        allowed = np.zeros(weight.shape[:2], bool)
        for block in json.loads(node.metadata_props["igate.blocks"]):
            rows = slice(*block["rows"])
            for columns in block["columns"]:
                allowed[rows, slice(*columns)] = True
        assert not weight[~allowed].any()


def test_bytes_of_a_file_open_as_the_model_does() -> None:
    model, net = int8_nets.mobile()
    quantised, image = trt(model, net.frames(2)), net.frames(1)[0]
    with emulate.open(graph.dump(quantised)) as session:
        outputs = session.run(image)
        want = emulate.Session(quantised).run(image)
        assert all((outputs[name] == want[name]).all() for name in want)
    with pytest.raises(InputError, match="closed"):
        session.run(image)


def test_what_is_no_image_or_no_model_is_refused() -> None:
    model, net = int8_nets.mobile()
    session = emulate.Session(trt(model, net.frames(2)))
    for bad in (np.zeros((1, 3, 16, 16)), np.zeros((1, 3, 16, 15), np.float32), None):
        with pytest.raises(InputError, match="does not fit the engine"):
            session.run(bad)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="not an ONNX model"):
        emulate.open(b"\xff\xffnothing")


@pytest.mark.slow
def test_the_shipped_network_bit_for_bit_at_every_site() -> None:
    bundle = Bundle.read(Path(__file__).parents[2] / "examples" / "tabletop.igate")
    laid = layout.lay_out(builder.networks(bundle)[0])
    model = quantize.quantize(laid.model, builder.ranges_for(bundle, laid)[0], dialect="trt")
    stored = agree(model, to_input(bundle.golden["frame"][0], bundle.preprocess))
    assert sum(array.size for array in stored.values()) > 500_000
