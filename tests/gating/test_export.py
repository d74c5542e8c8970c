"""torch -> ONNX: same numbers, stable names and bytes, a network left as it was, and refusals that say why."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import export_nets
import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from export_nets import SIZE, SMALL, Grouped, about, agree, gated, image, plain, run, tasks, tiny
from torch import nn

from igate_edge.backbones import BACKBONES, resnet18
from igate_edge.bundle import Bundle
from igate_edge.contract import OutputSpec, Preprocess
from igate_edge.errors import ConvertError, InputError
from igate_edge.gating import onnx_graph
from igate_edge.gating.budget import HardFraction
from igate_edge.gating.convert import PlainNet, interrogate
from igate_edge.gating.export import export, to_onnx
from igate_edge.training.tasks import Classification, Depth, MultiLabel


@cache
def example_net() -> tuple[nn.Module, bytes]:
    net = gated(resnet18(width=4), granule=2, tie="stage")
    return net, to_onnx(net, SIZE)


LONG = {"resnet34", "resnet50"}  # long to export; the other blocks of their kind are short


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in [*BACKBONES, "grouped"]]
)
def test_gated_onnx_equals_the_network(name):
    if name == "resnet18":
        net, data = example_net()
    else:
        net = gated(Grouped() if name == "grouped" else BACKBONES[name](**SMALL[name]))
        data = to_onnx(net, SIZE)
    agree(net, data)
    selects = [node for node in onnx.load_from_string(data).graph.node if node.op_type == "Where"]
    assert len(selects) == 2 * len(net.sites)


def test_plain_onnx_equals_the_network():
    net = plain(resnet18(width=4))
    data = to_onnx(net, SIZE)
    agree(net, data)
    assert about(data)["form"] == "plain" and about(data)["sites"] == []
    convolutions = [node for node in onnx.load_from_string(data).graph.node if node.op_type == "Conv"]
    assert len(convolutions) == (1 + 2 * 8 + 3) + 2 * (4 + 1 + 1)  # backbone; heads: four laterals, smooth, out


def test_vector_tasks():
    torch.manual_seed(0)
    net = PlainNet(tiny(), [Classification("scene", 4), MultiLabel("seen", 3)]).eval()
    data = to_onnx(net, SIZE)
    agree(net, data)
    assert {name: value.shape for name, value in run(data, image()).items()} == {"scene": (1, 4), "seen": (1, 3)}


def test_metadata_states_tasks_preprocessing_and_every_gate():
    net, data = example_net()
    found = about(data)
    assert (found["schema"], found["form"]) == (1, "gated")
    assert [OutputSpec.from_json(task) for task in found["tasks"]] == [task.spec for task in net.tasks]
    assert Preprocess.from_json(found["preprocess"]) == SIZE
    assert [site["name"] for site in found["sites"]] == list(net.sites)
    for site in found["sites"]:
        rows = net.gate_masks()[site["name"]].int().tolist()
        assert site["open"] == {
            name: "".join(map(str, row)) for name, row in zip(["semseg", "depth"], rows, strict=True)
        }
        assert site["channels"] == len(rows[0]) and site["granule"] == 2
    ties = [site["tie"] for site in found["sites"] if site["tie"]]
    assert ties and all(ties.count(tie) > 1 and tie in net.sites for tie in ties)


def test_every_select_has_a_mask_of_its_own_named_after_site_and_task():
    """Also where masks are equal or tied: the compiler edits one without touching another."""
    net, data = example_net()
    graph = onnx.load_from_string(data).graph
    masks = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer if i.data_type == onnx.TensorProto.BOOL}
    used = [node.input[0] for node in graph.node if node.op_type == "Where"]
    assert sorted(used) == sorted(masks)
    for name, site in net.gate_masks().items():
        for task, row in zip(["semseg", "depth"], site.numpy(), strict=True):
            assert np.array_equal(masks[f"sites.{name}.mask_{task}"], row[None, :, None, None])


def test_freshly_forked_branches_stay_apart():
    """All branches have equal weights here: an exporter that merges equal nodes would leave one of them."""
    torch.manual_seed(0)
    net = interrogate(tiny(), tasks(), example=torch.zeros(1, 3, 32, 48))
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.startswith("branches.") and "shared" not in name:
                part = name.split(".")
                part[1] = "shared"
                tensor.copy_(net.state_dict()[".".join(part)])
    graph = onnx.load_from_string(to_onnx(net, SIZE)).graph
    assert sum(node.op_type == "Conv" for node in graph.node) == (2 + 1) * 2 + 2 * 2  # backbone, then smooth and out


def test_nodes_are_named_after_their_modules():
    graph = onnx.load_from_string(example_net()[1]).graph
    names = {node.name for node in graph.node if node.op_type == "Conv"}
    assert {"branches.shared.conv1", "branches.semseg.layer1.0.conv1", "branches.depth.layer4.1.conv2"} <= names
    assert {"heads.semseg.out", "heads.depth.out"} <= names
    assert len({node.name for node in graph.node}) == len(graph.node)


def test_file_is_plain_onnx_of_opset_18_without_norms_or_traces():
    model = onnx.load_from_string(example_net()[1])
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.ir_version <= 10
    assert {node.op_type for node in model.graph.node} <= {"Conv", "Relu", "Where", "Mul", "Add", "MaxPool", "Resize"}
    assert all(i.data_location == onnx.TensorProto.DEFAULT for i in model.graph.initializer)
    assert [p.key for p in model.metadata_props] == ["igate"]
    texts = [node.doc_string for node in model.graph.node] + [
        p.value for n in model.graph.node for p in n.metadata_props
    ]
    assert not any(texts) and not model.graph.doc_string
    (source,) = model.graph.input
    assert (source.name, [d.dim_value for d in source.type.tensor_type.shape.dim]) == ("image", [1, 3, 32, 48])


def digest(net: nn.Module) -> str:
    total = hashlib.sha256()
    for name, value in net.state_dict().items():
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()


def test_export_is_pure():
    net = gated(tiny()).train()
    net.heads["depth"].eval()
    before = (digest(net), [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()])
    state = torch.get_rng_state()
    first, second = to_onnx(net, SIZE), to_onnx(net, SIZE)
    assert first == second
    after = (digest(net), [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()])
    assert after == before and torch.equal(torch.get_rng_state(), state)
    net.loss({"image": image(), "depth": torch.ones(1, 32, 48)}).backward()


@pytest.mark.slow
def test_bytes_are_the_same_in_another_process():
    code = (
        "import hashlib, export_nets as nets; from igate_edge.gating.export import to_onnx;"
        "print(hashlib.sha256(to_onnx(nets.gated(nets.tiny()), nets.SIZE)).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(export_nets.__file__).parent,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout


def test_nothing_is_printed(capfd):
    to_onnx(plain(tiny()), SIZE)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_any_task_name_is_an_output_name():
    """Each of these is the exporter's own name for a value, a node or a module."""
    names = ["conv2d", "relu", "add", "linear", "where", "x", "conv2d_1", "val_0", "upsample_nearest2d"]
    torch.manual_seed(0)
    net = PlainNet(tiny(), [Depth(name, head_width=8) for name in names]).eval()
    data = to_onnx(net, SIZE)
    agree(net, data)
    assert list(run(data, image())) == names


def test_task_names_that_clash_are_refused():
    with pytest.raises(InputError, match="a task is called 'image'.*Fix: rename the task"):
        to_onnx(plain(tiny(), ("image", "other")), SIZE)
    net = plain(tiny())
    net.tasks = [net.tasks[0], net.tasks[0]]
    with pytest.raises(InputError, match="task names must differ"):
        to_onnx(net, SIZE)


def test_a_file_that_computes_something_else_is_refused(monkeypatch):
    tracer = onnx_graph.trace

    def wrong(view: nn.Module, example: torch.Tensor):
        model = tracer(view, example)
        weight = model.graph.initializers["heads.depth.out.bias"]
        weight.const_value = onnx_ir.tensor(weight.const_value.numpy() + 1)
        return model

    monkeypatch.setattr(onnx_graph, "trace", wrong)
    with pytest.raises(ConvertError, match="task 'depth' differs after export: by"):
        to_onnx(plain(tiny()), SIZE)


def test_a_diverged_network_is_refused():
    net = plain(tiny())
    nn.init.constant_(net.heads["depth"].out.bias, float("nan"))
    with pytest.raises(ConvertError, match="task 'depth' is not finite"):
        to_onnx(net, SIZE)


def test_more_than_two_gigabytes_are_refused_before_any_work():
    """A weight without storage that claims 2.1 GB."""
    net = plain(tiny())
    net.register_parameter("huge", nn.Parameter(torch.empty(525_000_000, device="meta")))
    with pytest.raises(InputError, match="too large for one ONNX file: 2.10 GB of at most 2 GB"):
        to_onnx(net, SIZE)


def test_an_example_of_another_size_is_refused():
    with pytest.raises(
        InputError, match=r"another size than the preprocessing: \[1, 3, 32, 32\], not \[1, 3, 32, 48\]"
    ):
        to_onnx(plain(tiny()), SIZE, example=torch.zeros(1, 3, 32, 32))


def test_a_network_without_tasks_is_refused():
    with pytest.raises(InputError, match="this network states no tasks: it is a Sequential"):
        to_onnx(tiny(), SIZE)


def test_export_writes_a_bundle(tmp_path):
    frames = list(np.random.default_rng(0).integers(0, 256, (8, 40, 60, 3), dtype=np.uint8))
    net, path = plain(tiny()), tmp_path / "plain.igate"
    export(net, image(), path, preprocess=SIZE, calibration=frames, budget=HardFraction(0.25), provenance={"steps": 3})
    bundle = Bundle.read(path)
    assert bundle.manifest["budget"] == {"kind": "HardFraction", **dataclasses.asdict(HardFraction(0.25))}
    assert bundle.manifest["training"] == {"steps": 3}
    assert (bundle.manifest["form"], bundle.manifest["calibration"]["count"]) == ("plain", 8)
    assert bundle.golden["frame"].shape == (4, 32, 48, 3)


def test_an_example_that_is_no_image_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"not one image: shape \[3, 32, 48\]"):
        export(plain(tiny()), image()[0], tmp_path / "x.igate", calibration=[])
    assert not list(tmp_path.iterdir())
