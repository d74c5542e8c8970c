"""Packaging: a bundle holds what the network answers, and refuses frames that prove nothing."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import tinynet

from igate_edge.bundle import Bundle
from igate_edge.compiler import families, graph, layout, prune
from igate_edge.engines import onnxruntime as ort
from igate_edge.errors import DataError, InputError
from igate_edge.package import package
from igate_edge.runtime.preprocess import to_input

FRAMES = tinynet.frames(12)
GOLDEN = tinynet.frames(4, seed=9, size=(24, 20))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    path = tmp_path_factory.mktemp("package") / "a.igate"
    facts = {"labels": {"tag": np.arange(4)}, "results": {"seg": {"miou": 0.5}}, "budget": {"ratio": 1.3}}
    bundle = package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=GOLDEN, **facts)
    return bundle, path


def test_it_reads_back(packed: tuple[Bundle, Path]) -> None:
    bundle, path = packed
    read = Bundle.read(path)
    assert read.seal == bundle.seal and read.model == tinynet.gated_onnx()
    assert read.tasks == tinynet.TASKS and read.preprocess == tinynet.PREPROCESS
    manifest = read.manifest
    assert (manifest["form"], manifest["opset"], manifest["budget"]) == ("gated", 18, {"ratio": 1.3})
    assert manifest["results"] == {"seg": {"miou": 0.5}}
    assert [site["name"] for site in manifest["gates"]] == ["one", "two"]
    assert read.golden["label/tag"].tolist() == [0, 1, 2, 3]


def test_calibration_is_recorded(packed: tuple[Bundle, Path]) -> None:
    digest = hashlib.sha256()
    for frame in FRAMES:
        digest.update(to_input(frame, tinynet.PREPROCESS).tobytes())
    want = {"count": len(FRAMES), "sha256": digest.hexdigest(), "method": "minmax", "warnings": []}
    assert packed[0].manifest["calibration"] == want


def test_golden_float_outputs_are_those_of_the_gated_net(packed: tuple[Bundle, Path]) -> None:
    bundle = packed[0]
    assert bundle.golden["frame"].shape == (4, tinynet.SIZE, tinynet.SIZE, 3)
    session = ort.open(bundle.model, optimise=False)
    for index, frame in enumerate(bundle.golden["frame"]):
        for name, array in session.run(to_input(frame, bundle.preprocess)).items():
            stored = bundle.golden[f"float/{name}"][index]
            assert np.abs(array[0] - stored).max() <= 1e-5 * np.abs(stored).max()
    session.close()


def test_int8_differs_a_little_and_the_tolerance_says_how_much(packed: tuple[Bundle, Path]) -> None:
    bundle = packed[0]
    for spec in bundle.tasks:
        tolerance = bundle.manifest["tolerances"][spec.name]
        assert (bundle.golden[f"int8/{spec.name}"] != bundle.golden[f"float/{spec.name}"]).any()
        assert 0 <= tolerance["packaged"] < tolerance["limit"] < 10


def test_the_plain_net_has_shapes_but_no_weights(packed: tuple[Bundle, Path]) -> None:
    plain = onnx.load_from_string(packed[0].plain)
    assert sum(node.op_type == "Conv" for node in plain.graph.node) == 2 + 2, "two layers, two dense heads"
    assert not {"Where", "Mul"} & {node.op_type for node in plain.graph.node}
    assert sum(len(tensor.raw_data) for tensor in plain.graph.initializer) < 100
    assert len(packed[0].plain) < 12_000


def test_a_plain_model_is_its_own_plain_net(tmp_path: Path) -> None:
    bundle = package(tinynet.gated_onnx(form="plain"), tmp_path / "p.igate", calibration=FRAMES, golden=GOLDEN)
    assert bundle.manifest["form"] == "plain" and bundle.manifest["gates"] == []
    ops = [[node.op_type for node in onnx.load_from_string(data).graph.node] for data in (bundle.plain, bundle.model)]
    assert ops[0] == ops[1]


def test_the_same_content_gives_the_same_bytes(packed: tuple[Bundle, Path], tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.igate", "b.igate")]
    for path in paths:
        package(tinynet.gated_onnx(), path, calibration=iter(FRAMES), golden=GOLDEN)
    assert paths[0].read_bytes() == paths[1].read_bytes() != packed[1].read_bytes()


def test_frames_that_prove_nothing_are_refused(tmp_path: Path) -> None:
    cases = [
        ({"golden": GOLDEN[:3]}, DataError, "at least 4 golden frames are needed: 3 given, 3 of them distinct"),
        ({"golden": [GOLDEN[0]] * 6}, DataError, "6 given, 1 of them distinct"),
        ({"golden": [frame.astype(np.float32) for frame in GOLDEN]}, InputError, "must be uint8"),
        ({"calibration": []}, DataError, ""),
        ({"calibration": [np.full((8, 8, 3), np.nan, np.float32)]}, InputError, "must be uint8"),
        ({"labels": {"smell": np.zeros(4)}}, DataError, "unknown task 'smell': tasks: depth, seg, tag"),
        ({"labels": {"tag": np.zeros(3)}}, DataError, "3 for 4 golden frames"),
    ]
    for changes, error, words in cases:
        arguments = {"calibration": FRAMES, "golden": GOLDEN, **changes}
        with pytest.raises(error) as caught:
            package(tinynet.gated_onnx(), tmp_path / "a.igate", **arguments)
        assert words in str(caught.value) and caught.value.fix
    assert not os.listdir(tmp_path)


def test_pruning_is_what_the_golden_outputs_come_from(packed: tuple[Bundle, Path]) -> None:
    pruned = prune.prune(graph.load(packed[0].model)).model
    assert set(packed[0].ranges) <= {value.name for node in pruned.graph for value in node.outputs} | {"image"}


def test_a_task_that_ignores_the_image_is_refused(tmp_path: Path) -> None:
    proto = onnx.load_from_string(tinynet.gated_onnx())
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "head.depth.conv.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(weight), weight.name))
    with pytest.raises(DataError, match="task 'depth' does not depend on the image"):
        package(proto.SerializeToString(), tmp_path / "a.igate", calibration=FRAMES, golden=GOLDEN)
    assert not os.listdir(tmp_path)


def test_ranges_are_those_of_the_plain_nets_values(packed: tuple[Bundle, Path]) -> None:
    """One scale for all versions of a value: as many ranges as the plain net has values, none for a branch."""
    model = graph.load(packed[0].model)
    laid = layout.lay_out(model)
    assert set(packed[0].ranges) == set(laid.origin.values()) <= set(families.families(model).of.values())
    assert "one.shared.relu" in packed[0].ranges
    assert not any(name.startswith("one.seg.") for name in packed[0].ranges)
