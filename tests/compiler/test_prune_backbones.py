"""Pruned and laid out equal gated on all backbones, exported by torch once each, over random gate patterns of many
shapes and random lowerings.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from gatednets import TOLERANCE, convs, difference, live, ops

from igate_edge.compiler import graph
from igate_edge.compiler.layout import lay_out, layers
from igate_edge.compiler.prune import close_all, keep_outputs, prune, set_masks

torch = pytest.importorskip("torch")

#: backbone -> (constructor arguments, tasks, image size, patterns by default, patterns in the slow set)
BACKBONES = {
    "resnet18": ({"width": 4}, 2, 32, 20, 260),
    "resnet34": ({"width": 4}, 2, 32, 5, 80),
    "resnet50": ({"width": 4}, 2, 32, 5, 80),
    "efficientnet_lite0": ({"size": (32, 32)}, 2, 32, 5, 20),
    "mobilenet_v2": ({"width": 0.125}, 2, 32, 5, 60),
    "densenet_tiny": ({"growth": 4, "layers": 2}, 3, 32, 80, 250),
    "pyramid_net": ({"width": 4}, 3, 32, 80, 250),
}


def test_the_default_run_has_200_patterns_and_the_slow_one_1000() -> None:
    assert sum(row[3] for row in BACKBONES.values()) == 200
    assert sum(row[4] for row in BACKBONES.values()) == 1000


def export(name: str) -> ir.Model:
    """The backbone gated and exported, then given weights that differ between all branches."""
    from igate_edge import backbones
    from igate_edge.contract import Preprocess
    from igate_edge.gating.convert import interrogate
    from igate_edge.gating.export import to_onnx
    from igate_edge.training.tasks import Classification, Depth, Normals, SemanticSegmentation

    arguments, count, size, *_ = BACKBONES[name]
    torch.manual_seed(0)
    # A classification head reads the last map only: not for a net whose other outputs would then have dead rows.
    last = Normals("normals") if name == "pyramid_net" else Classification("tag", 4)
    tasks = [Depth("depth"), SemanticSegmentation("semseg", classes=3), last][:count]
    net = interrogate(getattr(backbones, name)(**arguments), tasks, example=torch.zeros(1, 3, size, size), tie="stage")
    model = graph.load(to_onnx(net, Preprocess(size, size)))
    rng = np.random.default_rng(0)
    for key, value in model.graph.initializers.items():
        if value.dtype == ir.DataType.FLOAT and key.startswith("branches."):
            array = value.const_value.numpy()
            scale = 0.1 if array.ndim == 1 else np.sqrt(2 / np.prod(array.shape[1:]))
            value.const_value = ir.tensor((rng.standard_normal(array.shape) * scale).astype(np.float32), name=key)
        elif key.startswith("sites.") and ".mix_" in key:
            assert value.const_value.numpy().dtype == np.float32
    return model


class Reference:
    """The gated graph in ONNX Runtime with its masks as inputs: one session for all patterns."""

    def __init__(self, model: ir.Model, image: np.ndarray) -> None:
        import onnx

        proto = onnx.load_from_string(graph.dump(model))
        self.masks = [t for t in proto.graph.initializer if ".mask_" in t.name]
        for tensor in self.masks:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
            proto.graph.initializer.remove(tensor)
        self.session, self.image = _session(proto.SerializeToString()), image

    def __call__(self, masks: dict[str, np.ndarray], tasks: list[str]) -> dict[str, np.ndarray]:
        feeds = {"image": self.image}
        wanted = {value.name for value in self.session.get_inputs()}
        for site, rows in masks.items():
            for task, row in zip(tasks, rows, strict=True):
                if f"sites.{site}.mask_{task}" in wanted:
                    feeds[f"sites.{site}.mask_{task}"] = row.reshape(1, -1, 1, 1)
        return dict(zip(tasks, self.session.run(tasks, feeds), strict=True))


def _session(data: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def patterns(sites: list[dict], tasks: int, count: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Per channel, per layer, tied over layers of one width, the same channels for all tasks, in blocks, nested."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        share, found, stage = rng.random(), {}, {}
        for site in sites:
            shape, layer = (tasks, site["channels"]), rng.random()
            if index % 6 == 1:  # whole branches and whole shared layers die
                share = rng.choice([0, layer, 1], p=[0.4, 0.3, 0.3])
            mask = rng.random(shape) < share
            if index % 6 == 2:
                mask = stage.setdefault(site["channels"], mask)
            elif index % 6 == 3:
                mask = np.tile(mask[:1], (tasks, 1))
            elif index % 6 == 4:
                mask = np.repeat(mask[:, ::4], 4, axis=1)[:, : shape[1]]
            elif index % 6 == 5:
                mask = np.sort(mask, axis=1)
            found[site["name"]] = mask
        yield found


def check(model: ir.Model, count: int, seed: int) -> None:
    about = graph.meta(model)
    tasks = [task["name"] for task in about["tasks"]]
    shape = tuple(model.graph.inputs[0].shape)
    image = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    reference, writers = Reference(model, image), _writers(model)
    weighted = [node for node in model.graph if node.op_type == "Conv"]
    encoder = {node.name for node in weighted if node.inputs[1].name.startswith("branches.")}
    for index, masks in enumerate(patterns(about["sites"], len(tasks), count, seed)):
        pruned = prune(set_masks(model, masks))
        outputs = _session(graph.dump(pruned.model)).run(tasks, {"image": image})
        assert difference(reference(masks, tasks), dict(zip(tasks, outputs, strict=True))) <= TOLERANCE
        assert not pruned.report["barriers"]
        assert not {"Where", "Mul"} & set(ops(pruned.model))
        # Live rows of the encoder are those of the formula, summed over the convolutions that end in a site.
        rows = sum(row["live"] for name, row in pruned.report["convs"].items() if name in encoder)
        assert rows == sum(len(writers[site]) * live(mask) for site, mask in masks.items())
        laid = lay_out(set_masks(model, masks), choice := _choice(model, index))
        found = _session(graph.dump(laid.model)).run(tasks, {"image": image})
        assert difference(reference(masks, tasks), dict(zip(tasks, found, strict=True))) <= TOLERANCE
        if choice == "merged":
            assert not {"Where", "Mul", "Slice", "Gather"} & set(ops(laid.model))


def _choice(model: ir.Model, index: int) -> str | dict[str, str]:
    """merged, split, and a lowering a layer at random, in turn."""
    if index % 3 < 2:
        return ("merged", "split")[index % 3]
    rng = np.random.default_rng(index)
    return {layer.name: str(rng.choice(["merged", "split", "merged:8"])) for layer in layers(model)}


def _check_joint(model: ir.Model) -> None:
    """The same gates for all tasks, tied as the sites say: merged has the plain net's operators, node for node."""
    about, rng = graph.meta(model), np.random.default_rng(2)
    stages: dict[str, np.ndarray] = {}
    masks = {}
    for site in about["sites"]:
        drawn = np.tile(rng.random((1, site["channels"])) < 0.3, (len(about["tasks"]), 1))
        masks[site["name"]] = stages.setdefault(site["tie"] or site["name"], drawn)
    laid = lay_out(set_masks(model, masks))
    assert ops(laid.model) == ops(lay_out(close_all(model)).model) and not laid.report["skips"]


def _writers(model: ir.Model) -> dict[str, list[str]]:
    """Site -> the layers of the shared branch whose channels it gates: the convolutions that reach it channel by
    channel.
    """
    found: dict[str, list[str]] = {}
    for node in model.graph:
        if node.op_type == "Where" and node.name.startswith("sites."):
            site = node.inputs[0].name.removeprefix("sites.").rsplit(".mask_", 1)[0]
            if site not in found:
                found[site] = []
                _follow(node.inputs[2], found[site])
    return found


def _follow(value: ir.Value | None, found: list[str]) -> None:
    node = value.producer() if value is not None else None
    if node is None or node.name.startswith("sites."):
        return
    if node.op_type == "Conv":
        found.append(node.name)
    else:
        for operand in node.inputs:
            _follow(operand, found)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone(name: str) -> None:
    model = export(name)
    _check_extremes(model)
    _check_joint(model)
    check(model, BACKBONES[name][3], seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_many_patterns(name: str) -> None:
    check(export(name), BACKBONES[name][4], seed=1)


def _check_extremes(model: ir.Model) -> None:
    """All closed: the shared branch and the heads. All open: the task branches and the heads. And nothing else."""
    about = graph.meta(model)
    tasks = [task["name"] for task in about["tasks"]]
    weights = {node.name: tuple(node.inputs[1].shape) for node in model.graph if node.op_type in ("Conv", "Gemm")}
    source = {node.name: node.inputs[1].name for node in model.graph if node.name in weights}
    shared = [
        shape
        for name, shape in weights.items()
        if not source[name].startswith("branches.") or ".shared." in source[name]
    ]
    own = [shape for name, shape in weights.items() if ".shared." not in source[name]]
    closed = prune(close_all(model))
    opened = prune(set_masks(model, {s["name"]: np.ones((len(tasks), s["channels"]), bool) for s in about["sites"]}))
    assert len(shared) < len(own)
    for pruned, expected in ((closed, shared), (opened, own)):
        assert convs(pruned.model) == sorted(expected)
        assert not {"Slice", "Gather", "Mul", "Where"} & set(ops(pruned.model))
        assert not any(node.name.endswith(".mix") for node in pruned.model.graph)
    single = [prune(keep_outputs(closed.model, [task])).model for task in tasks]
    heads = [shape for name, shape in weights.items() if not source[name].startswith("branches.")]
    assert sum(len(convs(net)) for net in single) == len(tasks) * (len(shared) - len(heads)) + len(heads)
    assert ops(opened.model)["Conv"] == sum(ops(net)["Conv"] for net in single)
