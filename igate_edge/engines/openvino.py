"""OpenVINO on the CPU (extra `openvino`): a second runtime for the very file that ONNX Runtime takes.

`openvino` is imported on first use. Its ONNX reader runs a convolution as INT8 only where the stored weights are signed
bytes of zero point 0, so `open` restates unsigned weights of zero point 128 that way: the same numbers, nothing else is
changed. Measured on an AVX2 CPU without VNNI, OpenVINO 2026.4: all convolutions run as INT8 but the tasks' last ones;
signed activations meet saturating INT16 sums there, so answers are further from float than ONNX Runtime's.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import GraphError, UnavailableError
from .onnxruntime import Coverage, check_threads, conv_macs
from .session import Closing, check_image, closed

if TYPE_CHECKING:
    import onnx

DEVICE = "CPU"


def _load() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UnavailableError("OpenVINO is missing", str(error), "pip install 'igate-edge[openvino]'") from error
    return openvino


def probe() -> dict[str, Any]:
    """{"version", "provider"} of the installed OpenVINO; raises UnavailableError when there is none."""
    return {"version": str(_load().__version__), "provider": DEVICE}


def open(model: bytes, threads: int = 1) -> Session:
    """A ready session of an ONNX file's bytes on `threads` CPU threads.

    Float arithmetic stays float32. Raises GraphError (not a model that OpenVINO takes), InputError (threads < 1),
    UnavailableError.
    """
    return Session(_compile(model, threads))


def _compile(model: bytes, threads: int) -> Any:
    runtime = _load()
    check_threads(threads)
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    try:
        core = runtime.Core()
        return core.compile_model(core.read_model(signed_weights(model)), DEVICE, settings)
    except Exception as error:  # OpenVINO raises RuntimeError for everything
        text = " ".join(str(error).split())[:300]
        raise GraphError("OpenVINO does not take this model", text, "use the default engine, onnxruntime") from error


class Session(Closing):
    """One opened model; the interface of `engines.onnxruntime.Session`. Calls from several threads wait for each other.

    The caller owns the results.
    """

    def __init__(self, compiled: Any) -> None:
        if len(compiled.inputs) != 1:
            evidence = f"{len(compiled.inputs)} inputs"
            raise GraphError("the model needs one input of static shape", evidence, "export with a static batch of 1")
        self.input = str(compiled.inputs[0].get_any_name())
        self.shape: tuple[int, ...] = tuple(compiled.inputs[0].get_shape())
        self.outputs = [str(item.get_any_name()) for item in compiled.outputs]
        self._request: Any = compiled.create_infer_request()
        self._lock = threading.Lock()

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Raw outputs by name for a preprocessed image, float32 of the input's shape; else raises InputError."""
        check_image(image, self.shape)
        with self._lock:
            if self._request is None:
                raise closed()
            values = self._request.infer({0: image})
            # Its buffers are written again by the next call.
            return {name: np.array(values[index]) for index, name in enumerate(self.outputs)}

    def close(self) -> None:
        """Free the session; closing twice is fine."""
        with self._lock:
            self._request = None


def inspect(model: bytes) -> Coverage:
    """Which convolutions OpenVINO runs as INT8, as the kernels say that it chose; see `onnxruntime.Coverage`."""
    import onnx

    integer, counts = set[str](), dict[str, int]()
    for node in _compile(model, 1).get_runtime_model().get_ops():
        about = {name: str(value.astype(str)) for name, value in node.get_rt_info().items() if hasattr(value, "astype")}
        kind = about.get("layerType", node.get_type_name())
        counts[kind] = counts.get(kind, 0) + 1
        if about.get("primitiveType", "").lower().endswith("i8"):
            integer.update(about.get("originalLayersNames", "").split(","))
    macs, _ = conv_macs(onnx.shape_inference.infer_shapes(onnx.load_from_string(model)))
    kinds = {name: "int8" if name in integer else "float" for name in macs}
    total, done = sum(macs.values()), sum(macs[name] for name, kind in kinds.items() if kind == "int8")
    return Coverage(done / total if total else 1.0, kinds, macs, dict(sorted(counts.items())))


def signed_weights(model: bytes) -> bytes:
    """The same model with stored weights of uint8, zero point 128, as int8, zero point 0: exactly the same numbers."""
    import onnx
    from onnx.numpy_helper import from_array, to_array

    try:
        proto = onnx.load_from_string(model)
    except Exception as error:  # protobuf's DecodeError is a class of its own in every version
        raise GraphError("not an ONNX model", " ".join(str(error).split())[:200], "export it again") from error
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    made: dict[str, onnx.TensorProto] = {}
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[0] not in stored:
            continue
        weight, zero = (to_array(stored[name]) for name in (node.input[0], node.input[2]))
        if weight.dtype == np.uint8 and (zero == 128).all():
            names = [f"{node.input[0]}.int8", f"{node.input[0]}.int8_zero"]
            made[names[0]] = from_array((weight.astype(np.int16) - 128).astype(np.int8), names[0])
            made[names[1]] = from_array(np.zeros_like(zero, np.int8), names[1])
            node.input[0], node.input[2] = names
    proto.graph.initializer.extend(made.values())
    return proto.SerializeToString(deterministic=True)
