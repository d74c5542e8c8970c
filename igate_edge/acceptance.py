"""A bundle's graphs as TensorRT would get them, and what a real NVIDIA builder, which runs nothing here, says."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from .builder_parts import quantised_for_tensorrt
from .bundle import Bundle
from .compiler import graph
from .compiler.half import half
from .engines import tensorrt_rtx


@dataclass(frozen=True)
class Report:
    """What TensorRT-RTX said of the INT8 graph and of its FP16 twin; seal: the bundle's."""

    bundle: str
    seal: str
    int8: tensorrt_rtx.Acceptance
    half: tensorrt_rtx.Acceptance

    @property
    def accepted(self) -> bool:
        return self.int8.accepted and self.half.accepted

    def as_json(self) -> dict[str, Any]:
        return {"accepted": self.accepted, **asdict(self)}


def models(bundle: Bundle, choice: str = "merged") -> dict[str, bytes]:
    """{"int8", "half"}: ONNX bytes of both precisions in the `trt` dialect, the rest in FP16; see `compiler.half`.

    choice: the lowering of the layers. Raises BundleError, GraphError, InputError.
    """
    laid, quantised = quantised_for_tensorrt(bundle, choice)
    return {"int8": graph.dump(half(quantised)), "half": graph.dump(half(laid.model))}


def accept(path: str | os.PathLike[str], choice: str = "merged") -> Report:
    """Show both graphs of the bundle at `path` to TensorRT-RTX: accepted means that it parses and builds them there.

    Nothing is run, and nothing is said about TensorRT on a Jetson. Raises BundleError, UnavailableError (extra `rtx`).
    """
    bundle = Bundle.read(path)
    tensorrt_rtx.probe()
    found = {name: tensorrt_rtx.check(data) for name, data in models(bundle, choice).items()}
    return Report(os.path.basename(os.fspath(path)), bundle.seal, found["int8"], found["half"])
