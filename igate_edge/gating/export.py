"""A trained network -> ONNX bytes (norms folded, masks and mixes as constants) -> a bundle.

Export is pure: the network is copied first, and the same network gives the same bytes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..contract import OutputSpec, Preprocess
from ..errors import ConvertError, InputError
from . import onnx_graph
from .budget import Budget
from .merge import MergedNet

if TYPE_CHECKING:
    from ..bundle import Bundle

MAX_BYTES = 2_000_000_000  # one protobuf message holds less than 2 GiB
TOLERANCE = 1e-4  # of an output's largest magnitude


def export(
    net: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    preprocess: Preprocess | None = None,
    calibration: Sequence[np.ndarray] | None = None,
    golden: Sequence[np.ndarray] | None = None,
    budget: Any = None,
    provenance: Mapping[str, Any] | None = None,
    half_weights: bool = False,
) -> Bundle:
    """Export a network (of `interrogate`, `merge`, or a PlainNet) into the bundle at `path`, and return the bundle.

    `example`: float32 [1,3,H,W], a preprocessed image; every ONNX output is compared with the network's on it.
    `preprocess`: default rgb / 255 at the example's size. `calibration` and `golden`: uint8 [h,w,3] RGB frames;
    golden frames (default: the first 4 for calibration) prove on the robot that the engine computes what was trained.
    `budget`: the budget object that training used, or a mapping; it and `provenance` go into the manifest as they are.
    Raises InputError, ConvertError and DataError; nothing is written then.
    """
    from ..package import package

    if example.dim() != 4 or example.shape[:2] != (1, 3):
        raise InputError(
            "the example is not one image", f"shape {list(example.shape)}", "pass float32 [1, 3, height, width]"
        )
    preprocess = preprocess or Preprocess(int(example.shape[2]), int(example.shape[3]))
    data = to_onnx(net, preprocess, example=example, half_weights=half_weights)
    frames = list(calibration or [])
    return package(
        data,
        Path(path),
        calibration=frames,
        golden=list(golden) if golden is not None else frames[:4],
        budget=_plain_budget(budget),
        provenance=None if provenance is None else dict(provenance),
        plain=plain_onnx(net, preprocess),
    )


def plain_onnx(net: nn.Module, preprocess: Preprocess) -> bytes | None:
    """ONNX of the plain shared net that a merged net is compared with, with weights of noise; None for other nets."""
    return to_onnx(net.plain_twin(), preprocess) if isinstance(net, MergedNet) else None


def _plain_budget(budget: Any) -> dict[str, Any] | None:
    if isinstance(budget, Budget):
        return budget.as_json()
    if dataclasses.is_dataclass(budget) and not isinstance(budget, type):
        return {"kind": type(budget).__name__, **dataclasses.asdict(budget)}
    return None if budget is None else dict(budget)


def to_onnx(
    net: nn.Module, preprocess: Preprocess, *, example: Tensor | None = None, half_weights: bool = False
) -> bytes:
    """Export a network to ONNX: opset 18, input "image" float32 [1,3,H,W], one output a task, no external data.

    `example` [1,3,H,W] is the image of the comparison with the network (default: noise, the same every time).
    `half_weights` rounds weights of 1024 elements or more to float16 and stores them so: half the file.
    Raises InputError (task names, sizes, 2 GB) and ConvertError (untraceable, data-dependent, or not equal to the net).
    """
    import onnx_ir as ir

    specs = [task.spec for task in _tasks(net)]
    _check_names([spec.name for spec in specs])
    _check_size(net)
    example = _example(preprocess) if example is None else example
    size = (preprocess.height, preprocess.width)
    if tuple(example.shape) != (1, 3, *size):
        raise InputError(
            "the example has another size than the preprocessing",
            f"{list(example.shape)}, not [1, 3, {size[0]}, {size[1]}]",
            "use one size for both",
        )
    example = example.detach().to("cpu", torch.float32)
    with torch.no_grad():
        wanted = copy.deepcopy(net).cpu().eval()(example)
        view = cast("Any", net).export_view().cpu().eval()
        _compare("folding norms", specs, [wanted[spec.name] for spec in specs], view(example))
        if half_weights:
            onnx_graph.round_to_half(view)
        reference = view(example)
        model = onnx_graph.trace(view, example)
    onnx_graph.rename(model, [spec.name for spec in specs])
    if half_weights:
        onnx_graph.store_half(model)
    onnx_graph.strip(model)
    model.metadata_props["igate"] = _describe(net, specs, preprocess)
    data = ir.to_proto(model).SerializeToString(deterministic=True)
    _verify(data, specs, example, reference)
    return data


def _tasks(net: nn.Module) -> Sequence[Any]:
    tasks = getattr(net, "tasks", None)
    if tasks is None or not hasattr(net, "export_view"):
        raise InputError(
            "this network states no tasks",
            f"it is a {type(net).__name__}",
            "pass the result of interrogate or a PlainNet",
        )
    return list(tasks.values()) if isinstance(tasks, Mapping) else list(tasks)


def _example(preprocess: Preprocess) -> Tensor:
    """Noise in the range of preprocessed pixels."""
    noise = torch.rand(1, 3, preprocess.height, preprocess.width, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (noise - mean) / std


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name == onnx_graph.INPUT:
            raise InputError(f"a task is called {name!r}", "the network's input has that name", "rename the task")
        if not name or names.count(name) > 1:
            raise InputError("task names must differ", f"{', '.join(map(repr, names))}", "give every task its own name")


def _check_size(net: nn.Module) -> None:
    """Refuse before anything is copied or written: an ONNX file holds less than 2 GB."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in (*net.parameters(), *net.buffers()))
    if total > MAX_BYTES:
        raise InputError(
            "the network is too large for one ONNX file",
            f"{total / 1e9:.2f} GB of at most 2 GB",
            "use a narrower backbone",
        )


def _compare(stage: str, specs: Sequence[OutputSpec], wanted: Sequence[Any], got: Sequence[Any]) -> None:
    """Raise ConvertError unless every task agrees within TOLERANCE of its largest magnitude."""
    for spec, one, other in zip(specs, wanted, got, strict=True):
        left, right = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if left.shape != right.shape:
            raise ConvertError(
                f"task {spec.name!r} has another shape after {stage}",
                f"{left.shape} became {right.shape}",
                "report this network",
            )
        if not np.isfinite(left).all():
            raise ConvertError(
                f"task {spec.name!r} is not finite",
                "NaN or infinity on the example",
                "export a net whose training did not diverge",
            )
        error, scale = np.abs(left - right).max(initial=0.0), np.abs(left).max(initial=0.0)
        if not error <= TOLERANCE * scale + 1e-7:
            raise ConvertError(
                f"task {spec.name!r} differs after {stage}",
                f"by {error:.3g} at magnitude {scale:.3g}",
                "check that the backbone is deterministic and keeps no state between calls in eval mode",
            )


def _describe(net: nn.Module, specs: Sequence[OutputSpec], preprocess: Preprocess) -> str:
    """What the compiler and the runtime must know, as the JSON of the metadata key "igate"."""
    sites = cast("Any", net).sites_json() if hasattr(net, "sites_json") else []
    about = {
        "schema": 1,
        "form": getattr(net, "form", "gated" if sites else "plain"),
        "tasks": [spec.as_json() for spec in specs],
        "preprocess": preprocess.as_json(),
        "sites": sites,
    }
    return json.dumps(about, sort_keys=True)


def _verify(data: bytes, specs: Sequence[OutputSpec], example: Tensor, reference: Sequence[Tensor]) -> None:
    """The file is valid ONNX of the opset asked for, and ONNX Runtime's outputs are the network's."""
    import onnx
    import onnxruntime

    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets != {"": onnx_graph.OPSET}:
        raise ConvertError(
            "the exporter wrote another opset", f"{opsets}, not {onnx_graph.OPSET}", "install torch 2.6 or newer"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    outputs = session.run([spec.name for spec in specs], {onnx_graph.INPUT: example.numpy()})
    _compare("export", specs, list(reference), outputs)
