"""The process in which TensorRT-RTX parses and builds one model: an abort in there is that model's refusal.

python -m igate_edge.engines.tensorrt_rtx_worker MODEL.onnx 8.6 ANSWER.json
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

#: Exit code when the package itself cannot be loaded.
UNUSABLE = 3


def build(model: bytes, compute: str) -> dict[str, Any]:
    """Errors of the parser, messages of warning and worse, layers, and the plan's size and SHA-256."""
    import tensorrt_rtx as trt

    messages: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING:
                messages.append(f"{severity.name}: {text}")

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    answer: dict[str, Any] = {"errors": [], "messages": messages, "layers": 0, "plan_bytes": 0, "plan_sha256": ""}
    parsed = parser.parse(model)
    answer["layers"] = int(network.num_layers)
    if not parsed:
        answer["errors"] = [
            {"code": e.code().name, "node": f"{e.node_name()} ({e.node_operator()})", "message": e.desc()}
            for e in map(parser.get_error, range(parser.num_errors))
        ]
        return answer
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{compute.replace('.', '')}"), 0)
    plan = builder.build_serialized_network(network, config)
    if plan is not None:
        view = memoryview(plan)
        answer.update(plan_bytes=view.nbytes, plan_sha256=hashlib.sha256(view).hexdigest())
    return answer


def main(model: str, compute: str, answer: str) -> int:
    try:
        import tensorrt_rtx  # noqa: F401
    except Exception as error:  # a missing library is an ImportError or an OSError, by its loader
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return UNUSABLE
    Path(answer).write_text(json.dumps(build(Path(model).read_bytes(), compute)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
