"""One scale a family, whatever the layout; and INT8 that is exact in every layout."""

from __future__ import annotations

import int8_nets
import numpy as np
import onnx_ir as ir
import pytest
from gatednets import KINDS, TASKS, Net, constant_masks, gated, random_masks

from igate_edge.compiler import calibrate, groups, quantize
from igate_edge.compiler.layout import Laid, lay_out, layers
from igate_edge.compiler.ranges import by_family, of_layout


def frames(count: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.random((1, 3, 8, 8)).astype(np.float32) for _ in range(count)]


def table_of(laid: Laid) -> dict[str, tuple[float, float]]:
    return by_family(laid, calibrate.calibrate(laid.model, frames()))


def mixed(model: ir.Model, seed: int) -> dict[str, str]:
    rng = np.random.default_rng(seed)
    return {layer.name: str(rng.choice(["merged", "split", "merged:8"])) for layer in layers(model)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_ranges_of_the_merged_layout_fit_every_layout(kind: str, share: float) -> None:
    model = gated(kind, random_masks(kind, share, 4))
    table = table_of(lay_out(model))
    for choice in ("merged", "split", mixed(model, 1), mixed(model, 2)):
        laid = lay_out(model, choice)
        found, missing = of_layout(laid, table)
        assert missing == []
        source = groups.typed(laid.model)
        assert set(found) >= {value.name for node in source.graph for value in groups.activations(node.outputs)}
        for name, family in laid.origin.items():
            if family in table and name in found:
                assert found[name] == table[family]
        quantize.quantize(laid.model, found, "ort"), quantize.quantize(laid.model, found, "trt")


def test_a_family_spans_all_its_tensors() -> None:
    model = gated("chain", random_masks("chain", 0.4, 4))
    laid = lay_out(model, "split")
    ranges = calibrate.calibrate(laid.model, frames())
    table = by_family(laid, ranges)
    names = [name for name, family in laid.origin.items() if family == "s1.shared.relu" and name in ranges]
    assert len(names) > 2
    assert table["s1.shared.relu"] == (min(ranges[n][0] for n in names), max(ranges[n][1] for n in names))


def test_what_has_no_range_is_named() -> None:
    laid = lay_out(gated("chain", random_masks("chain", 0.4, 4)))
    table = table_of(laid)
    del table["s1.shared.relu"]
    assert of_layout(laid, table)[1] == ["s1.shared.relu"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["merged", "split", "mixed"])
def test_every_stored_tensor_is_within_one_step_of_exact_arithmetic(kind: str, choice: str) -> None:
    """Each tensor from the stored tensors before it, its weights as quantised: ONNX Runtime's bytes against floats."""
    model = gated(kind, random_masks(kind, 0.4, 6))
    table = table_of(lay_out(model))
    laid = lay_out(model, mixed(model, 3) if choice == "mixed" else choice)
    found, _ = of_layout(laid, table)
    image = frames(1)[0]
    steps = int8_nets.stored(quantize.quantize(laid.model, found, "ort"), image)
    exact = int8_nets.layer_steps(quantize.quantize(laid.model, found, "trt"), steps, image)
    sums = {groups.name_of(groups.site(n)) for n in laid.model.graph if n.op_type == "Add"}
    assert len(exact) >= 4
    for name, values in exact.items():
        difference = np.abs(values - steps[name])
        # TensorRT's form does not round the operand that a convolution makes for a sum: one rounding less.
        assert difference.max() <= (2 if name in sums else 1), name


@pytest.mark.parametrize("kind", ["chain", "residual", "inverted"])
def test_without_mixes_every_layout_gives_the_same_bytes(kind: str) -> None:
    """Gates open for all tasks from the second layer on: no mix is read, so a row's weights are the same everywhere."""
    masks = constant_masks(kind, True)
    masks["s0"] = random_masks(kind, 0.4, 6)["s0"]
    model = gated(kind, masks)
    table = table_of(lay_out(model))
    answers = []
    for choice in ("merged", "split", "merged:8", mixed(model, 1)):
        laid = lay_out(model, choice)
        found, _ = of_layout(laid, table)
        answers.append(int8_nets.run(quantize.quantize(laid.model, found, "ort"), frames(1)[0], optimise=False))
    for other in answers[1:]:
        assert all(np.array_equal(other[task], answers[0][task]) for task in TASKS)


@pytest.mark.parametrize("kind", ["chain", "residual", "inverted", "dense"])
def test_int8_is_as_close_to_float_merged_as_split(kind: str) -> None:
    model = gated(kind, random_masks(kind, 0.4, 6))
    table = table_of(lay_out(model))
    error = {}
    for choice in ("merged", "split"):
        laid = lay_out(model, choice)
        quantised = quantize.quantize(laid.model, of_layout(laid, table)[0], "ort")
        total = []
        for image in frames(4):
            exact, rough = int8_nets.run(laid.model, image), int8_nets.run(quantised, image)
            total += [np.abs(rough[t] - exact[t]).mean() / np.abs(exact[t]).mean() for t in TASKS]
        error[choice] = float(np.mean(total))
    assert error["merged"] <= 1.5 * error["split"] + 0.002
    assert error["merged"] < 0.06


def test_sums_of_maps_that_are_never_negative_are_not_either() -> None:
    """A mix or a skip behind a ReLU keeps zero point 0: with a signed one all its readers would be slower."""
    for choice in ("merged", "split"):
        laid = lay_out(gated("residual", random_masks("residual", 0.4, 6)), choice)
        again = lay_out(laid.model, choice).model
        for model in (laid.model, again):
            source = groups.typed(model)
            made = [node for node in source.graph if groups.is_sum(node)]
            assert made and all(node.name.endswith((".mix", ".skip")) for node in made)
            assert {node.outputs[0].name for node in made} <= groups.nonnegative(source)
            joined = groups.join(source)
            assert all(joined[node.inputs[0].name] == joined[node.outputs[0].name] for node in made)


def test_a_layer_that_somebody_called_skip_has_a_scale_of_its_own() -> None:
    net = Net(("a",))
    x = net.op("Relu", "r", net.conv("c", "image", 3, 4))
    model = net.load({"a": net.conv("end", net.conv("block.skip", x, 4, 4, 1), 4, 1)})
    joined = groups.join(groups.typed(lay_out(model).model))
    assert joined["r"] != joined["block.skip"]
