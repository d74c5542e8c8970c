"""A gated network small enough to read, written as ONNX by hand: what the robot-side tests compile without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from igate_edge.contract import OutputSpec, Preprocess
from igate_edge.package import package

TASKS = (
    OutputSpec("seg", "semseg", 3, ("floor", "cup", "hand")),
    OutputSpec("depth", "depth", 1),
    OutputSpec("tag", "classification", 4),
)
SIZE = 16
PREPROCESS = Preprocess(SIZE, SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


class _Net:
    """Nodes and initializers under construction."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def const(self, name: str, array: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def op(self, kind: str, inputs: list[str], name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def conv(self, x: str, name: str, cin: int, cout: int, kernel: int = 3, stride: int = 1) -> str:
        scale = np.sqrt(2 / (cin * kernel * kernel))
        shape = (cout, cin, kernel, kernel)
        weight = self.const(f"{name}.weight", (self.rng.standard_normal(shape) * scale).astype(np.float32))
        bias = self.const(f"{name}.bias", (self.rng.standard_normal(cout) * 0.1).astype(np.float32))
        pads = [kernel // 2] * 4
        return self.op("Conv", [x, weight, bias], name, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads)

    def site(
        self, name: str, psi: str, phis: dict[str, str], masks: dict[str, np.ndarray]
    ) -> tuple[str, dict[str, str]]:
        """Per task select(mask, own, shared); the shared stream goes on as a weighted sum."""
        channels = next(iter(masks.values())).size
        share = np.exp(self.rng.standard_normal((len(phis), channels)))
        share = (share / share.sum(0)).astype(np.float32)
        outs, total = {}, ""
        for index, (task, phi) in enumerate(phis.items()):
            mask = self.const(f"{name}.{task}.mask", masks[task].reshape(1, -1, 1, 1))
            outs[task] = self.op("Where", [mask, phi, psi], f"{name}.{task}.select")
            weight = self.const(f"{name}.{task}.share", share[index].reshape(1, -1, 1, 1))
            part = self.op("Mul", [outs[task], weight], f"{name}.{task}.part")
            total = self.op("Add", [total, part], f"{name}.{task}.sum") if total else part
        return total, outs


def masks_of(open_share: float, width: int, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Site -> task -> bool [C]; a share of 0 closes all, 1 opens all."""
    rng = np.random.default_rng(seed)
    return {s: {spec.name: rng.random(width) < open_share for spec in TASKS} for s in ("one", "two")}


def gated_onnx(open_share: float = 0.25, *, width: int = 8, seed: int = 0, form: str = "gated") -> bytes:
    """Two gated layers with a residual in the second, and a head per task; form "plain" has no gates at all."""
    net, names = _Net(seed), [spec.name for spec in TASKS]
    masks = masks_of(open_share, width, seed)
    psi, phis = "image", dict.fromkeys(names, "image")
    for site, cin, stride in (("one", 3, 2), ("two", width, 1)):

        def layer(stream: str, x: str, site: str = site, cin: int = cin, stride: int = stride) -> str:
            y = net.conv(x, f"{site}.{stream}.conv", cin, width, 3, stride)
            if cin == width:
                y = net.op("Add", [y, x], f"{site}.{stream}.add")
            return net.op("Relu", [y], f"{site}.{stream}.relu")

        shared = layer("shared", psi)
        if form == "gated":
            psi, phis = net.site(site, shared, {t: layer(t, phis[t]) for t in names}, masks[site])
        else:
            psi, phis = shared, dict.fromkeys(names, shared)
    outputs = [_head(net, spec, phis[spec.name], width) for spec in TASKS]
    sites = [
        {
            "name": s,
            "channels": width,
            "granule": 1,
            "tie": None,
            "open": {t: "".join("01"[int(b)] for b in m) for t, m in by.items()},
        }
        for s, by in masks.items()
    ]
    return _model(net, outputs, {"form": form, "sites": sites if form == "gated" else []})


def _head(net: _Net, spec: OutputSpec, x: str, width: int) -> onnx.ValueInfoProto:
    if spec.dense:
        y = net.conv(x, f"head.{spec.name}.conv", width, spec.channels, 1)
        shape = [1, spec.channels, SIZE // 2, SIZE // 2]
    else:
        pooled = net.op("GlobalAveragePool", [x], f"head.{spec.name}.pool")
        flat = net.op("Flatten", [pooled], f"head.{spec.name}.flat", axis=1)
        weight = net.const(
            f"head.{spec.name}.weight", net.rng.standard_normal((spec.channels, width)).astype(np.float32)
        )
        bias = net.const(f"head.{spec.name}.bias", np.zeros(spec.channels, np.float32))
        y, shape = net.op("Gemm", [flat, weight, bias], f"head.{spec.name}.fc", transB=1), [1, spec.channels]
    net.nodes[-1].output[0] = spec.name
    assert y
    return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, shape)


def _model(net: _Net, outputs: list[onnx.ValueInfoProto], meta: dict) -> bytes:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIZE, SIZE])
    graph = helper.make_graph(net.nodes, "tiny", [image], outputs, net.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    meta = {"schema": 1, "tasks": [spec.as_json() for spec in TASKS], "preprocess": PREPROCESS.as_json(), **meta}
    helper.set_model_props(model, {"igate": json.dumps(meta)})
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def frames(count: int, seed: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> list[np.ndarray]:
    """Frames with some structure: a bright rectangle on a noisy slope."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        slope = np.linspace(20, 120, size[1])[None, :, None] * rng.uniform(0.5, 1.0, 3)
        image = slope + rng.normal(0, 10, (*size, 3))
        y, x = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
        image[y : y + size[0] // 2, x : x + size[1] // 2] += rng.uniform(40, 120, 3)
        out.append(np.clip(image, 0, 255).astype(np.uint8))
    return out


def packaged(path: Path) -> Path:
    """The tiny network as a bundle at `path`: eight frames to calibrate with, four of them golden."""
    calibration = frames(8)
    package(gated_onnx(), path, calibration=calibration, golden=calibration[:4])
    return path
