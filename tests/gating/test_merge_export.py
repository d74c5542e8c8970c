"""Merged nets as ONNX: what the file says of itself, and that the compiler's merged lowering makes the same network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from export_nets import run
from gatednets import difference, ops
from gatednets import run as answers
from merged_nets import SIDE, build

from igate_edge.bundle import Bundle
from igate_edge.compiler import cost, graph
from igate_edge.compiler.layout import lay_out
from igate_edge.contract import Preprocess, check_sites
from igate_edge.errors import GraphError
from igate_edge.gating.export import export, to_onnx
from igate_edge.gating.merge import merge
from igate_edge.package import package
from igate_edge.plain import fill as noise

SIZE = Preprocess(SIDE, SIDE)


@pytest.mark.parametrize("kind", ["joint", "random"])
def test_the_compilers_merged_lowering_and_the_merged_module_are_one_network(kind: str) -> None:
    net = build("resnet", kind=kind, tie="stage").eval()
    merged = merge(net)
    lowered, made = lay_out(graph.load(to_onnx(net, SIZE)), "merged").model, graph.load(to_onnx(merged, SIZE))
    assert difference(answers(lowered), answers(made)) < 1e-5
    assert ops(lowered) == ops(made) and cost.count(lowered).macs == cost.count(made).macs
    plain = graph.load(to_onnx(merged.plain_twin().eval(), SIZE))
    if kind == "joint":
        assert ops(made) == ops(plain)
    else:
        assert ops(made) - ops(plain) == {"Conv": 1} and "skips.skip_layer1_add" in {node.name for node in made.graph}
    assert cost.count(made).macs > cost.count(plain).macs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "bottlenecks", "pyramid_net", "densenet_tiny"])
def test_they_agree_for_other_backbones(name: str) -> None:
    net = build(name, kind="joint", tie="stage").eval()
    lowered, made = lay_out(graph.load(to_onnx(net, SIZE)), "merged").model, graph.load(to_onnx(merge(net), SIZE))
    assert difference(answers(lowered), answers(made)) < 1e-5
    if name != "densenet_tiny":  # its concatenations are ordered differently
        assert ops(lowered) == ops(made)


@pytest.mark.parametrize(("mode", "form"), [("masked", "merged"), ("fill", "filled")])
def test_the_file_says_which_gates_and_which_rows(mode: str, form: str) -> None:
    net = build("resnet", kind="joint", tie="stage").eval()
    merged = merge(net, mode)
    model = graph.load(to_onnx(merged, SIZE))
    about = graph.meta(model)
    assert about["form"] == form
    gated = json.loads(json.dumps(net.sites_json()))
    assert [{k: v for k, v in site.items() if k != "rows"} for site in about["sites"]] == gated
    check_sites(about["sites"], graph.specs(model))
    for site in about["sites"]:
        own = site["open"]["depth"].count("1")
        assert sum(count for _, _, count in site["rows"]) == merged.widths()[site["name"]] == site["channels"] + 2 * own
        for task in ("shared", *net.task_names):
            channels = [first + k for who, first, count in site["rows"] if who == task for k in range(count)]
            wanted = "0" if task == "shared" else "1"
            assert channels == [k for k, bit in enumerate(site["open"]["depth"]) if bit == wanted]


def test_no_mask_is_left_in_the_file_and_onnx_runtime_agrees() -> None:
    net = build("resnet").eval()
    data, image = to_onnx(merge(net), SIZE), np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE))
    model = graph.load(data)
    assert "Mul" not in ops(model) and not any("mask" in name for name in model.graph.initializers)
    tensor = torch.from_numpy(image).float()
    with torch.no_grad():
        wanted = net(tensor)
    got = run(data, tensor)
    assert all(np.abs(got[k] - v.numpy()).max() < 1e-5 * v.abs().max() for k, v in wanted.items())


def test_a_merged_bundle_is_compared_with_its_plain_net(tmp_path: Path) -> None:
    merged = merge(build("resnet", kind="joint", tie="stage").eval())
    frames = list(np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8))
    bundle = export(merged, torch.rand(1, 3, SIDE, SIDE), tmp_path / "a.igate", calibration=frames)
    assert Bundle.read(tmp_path / "a.igate").manifest["form"] == "merged"
    plain, ours = graph.load(noise(bundle.plain)), graph.load(bundle.model)
    assert ops(plain) == ops(ours)
    stem = next(node for node in plain.graph if node.op_type == "Conv")
    assert stem.outputs[0].shape[1] == 8
    with pytest.raises(GraphError, match="does not say what its plain net is: form merged.*plain_twin"):
        package(bundle.model, tmp_path / "b.igate", calibration=frames, golden=frames)
