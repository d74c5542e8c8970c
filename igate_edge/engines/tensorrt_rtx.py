"""Does a real NVIDIA builder take our graph? TensorRT-RTX answers that on any x86 CPU, and only that.

Accepted by TensorRT-RTX is not "runs on TensorRT": it fuses otherwise, knows no SM 8.7 and no plugins, and without a
GPU nothing is run or timed. What it shows is that a graph parses, types agree and a plan can be built. Our own lint
speaks first: what TensorRT is known to refuse or to misread never reaches the builder.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compiler import lint
from ..errors import CheckFailed, GraphError, InputError, UnavailableError
from ..files import os_errors

PACKAGE = "tensorrt-rtx-cu13"
#: The nearest to an Orin's 8.7 that TensorRT-RTX knows: Ampere, with the same INT8 instruction.
COMPUTE = "8.6"
COMPUTES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
SECONDS = 300.0
#: What it says because there is no GPU here; such a line is neither a reason nor a pass.
_NO_DRIVER = re.compile(r"cuda.*(driver|error 35|initiali[sz]ation)|no cuda-capable|libcuda", re.IGNORECASE)


@dataclass(frozen=True)
class Refusal:
    """Why a graph was refused. code: of our lint (IG...), or the parser's (as INVALID_NODE), or ABORTED, NO_PLAN."""

    code: str
    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.code} at {self.node}: {self.message}" if self.node else f"{self.code}: {self.message}"


@dataclass(frozen=True)
class Acceptance:
    """What the builder made of a graph. by: "TensorRT-RTX VERSION" or "lint", which came first.

    layers: of the parsed network; plan_bytes, plan_sha256: of the plan, which equal runs make byte by byte.
    """

    accepted: bool
    by: str
    refusals: tuple[Refusal, ...] = ()
    layers: int = 0
    plan_bytes: int = 0
    plan_sha256: str = ""

    def require(self, what: str) -> None:
        """Raise CheckFailed, naming every refusal, unless the graph was accepted."""
        if not self.accepted:
            evidence = "; ".join(map(str, self.refusals[:8]))
            raise CheckFailed(f"{what} is refused by {self.by}", evidence, "change the network where it is named")

    def __str__(self) -> str:
        if self.accepted:
            size = f"{self.layers} layers, plan of {self.plan_bytes / 2**20:.1f} MiB"
            return f"accepted by {self.by} ({size}; not run: this says nothing about TensorRT on a Jetson)"
        return f"refused by {self.by}: {'; '.join(map(str, self.refusals))}"


def probe() -> dict[str, Any]:
    """{"version", "use"} of the installed package, which is not loaded; raises UnavailableError when there is none."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        fix = f"pip install 'igate-edge[rtx]' (Linux on x86; the package is {PACKAGE})"
        raise UnavailableError("TensorRT-RTX is missing", "no module tensorrt_rtx", fix)
    for name in (PACKAGE, "tensorrt-rtx-cu12", "tensorrt-rtx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return {"version": importlib.metadata.version(name), "use": "acceptance check only"}
    return {"version": "of unknown version", "use": "acceptance check only"}


def check(model: bytes, compute: str = COMPUTE, seconds: float = SECONDS) -> Acceptance:
    """Lint an ONNX file's bytes, then parse and build it in a process of its own; see Acceptance.

    compute: compute capability to build for, as "8.6". A process that aborts, takes longer than `seconds`, or makes no
    plan counts as a refusal. Raises GraphError (not ONNX), InputError (unknown compute capability), UnavailableError
    (package missing or unusable).
    """
    if compute not in COMPUTES:
        raise InputError(f"unknown compute capability {compute!r:.20}", f"known: {', '.join(COMPUTES)}", "use 8.6")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < 1e6:
        raise InputError("not a time limit", f"{seconds!r:.40} given", "pass seconds, above 0")
    found = lint.refusals(_parsed(model))
    if found:
        return Acceptance(False, "lint", tuple(Refusal(one.code, one.node, one.message) for one in found))
    by = f"TensorRT-RTX {probe()['version']}"
    with os_errors(Path(tempfile.gettempdir()), "write to"), tempfile.TemporaryDirectory() as folder:
        file, answer = Path(folder) / "model.onnx", Path(folder) / "answer.json"
        file.write_bytes(model)
        command = [sys.executable, "-m", f"{__package__}.tensorrt_rtx_worker", str(file), compute, str(answer)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return Acceptance(False, by, (Refusal("TIMEOUT", "", f"no plan after {seconds:.0f} s"),))
        said = _telling((done.stderr + b"\n" + done.stdout).decode(errors="replace").splitlines())
        if done.returncode or not answer.exists():
            return Acceptance(False, by, (_died(done.returncode, said),))
        return _judge(json.loads(answer.read_text()), by)


def _parsed(model: bytes) -> Any:
    import onnx_ir as ir
    from onnx import ModelProto

    try:
        proto = ModelProto.FromString(model)
        if not proto.graph.node:
            raise ValueError("a graph without nodes")
        return ir.from_proto(proto)
    except Exception as error:  # protobuf and onnx_ir have classes of their own
        evidence = " ".join(str(error).split())[:200] or type(error).__name__
        raise GraphError("not an ONNX model", evidence, "pass the bytes of a model.onnx") from error


def _telling(lines: list[str]) -> list[str]:
    """Lines that say something about the graph."""
    return [line.strip() for line in lines if line.strip() and not _NO_DRIVER.search(line)]


def _died(code: int, said: list[str]) -> Refusal:
    if code == 3:
        raise UnavailableError(
            "TensorRT-RTX does not load", said[-1] if said else "", f"pip install --force-reinstall {PACKAGE}"
        )
    what = f"the builder's process ended by signal {-code}" if code < 0 else f"the builder's process ended with {code}"
    return Refusal("ABORTED", "", f"{what}: {said[-1][:300]}" if said else what)


def _judge(answer: dict[str, Any], by: str) -> Acceptance:
    """A pass needs a plan and no error; everything else is a refusal."""
    refusals = [Refusal(item["code"], item["node"], item["message"]) for item in answer["errors"]]
    layers, size = int(answer["layers"]), int(answer["plan_bytes"])
    if not refusals and not (layers and size):
        said = _telling(answer["messages"])
        refusals = [Refusal("NO_PLAN", "", said[-1][:300] if said else "the builder gave no plan and no reason")]
    if refusals:
        return Acceptance(False, by, tuple(refusals), layers)
    return Acceptance(True, by, (), layers, size, answer["plan_sha256"])
