"""igate_edge: several perception tasks in one INT8 engine.

Importing this package loads none of torch, onnxruntime or a GPU driver: each public name is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "interrogate": "gating.convert",
    "export": "gating.export",
    "Budget": "gating.budget",
    "LatencyTable": "compiler.latency",
    "land": "training.landing",
    "merge": "gating.merge",
    "SparsityHinge": "gating.budget",
    "HardFraction": "gating.budget",
    "L1Gates": "gating.budget",
    "fix_fraction": "gating.budget",
    "SemanticSegmentation": "training.tasks",
    "Depth": "training.tasks",
    "Normals": "training.tasks",
    "Edges": "training.tasks",
    "Classification": "training.tasks",
    "MultiLabel": "training.tasks",
    "build": "builder",
    "Engine": "runtime.engine",
    "Pipeline": "runtime.pipeline",
    "Frame": "runtime.frame",
    "Monitor": "runtime.monitor",
    "Bundle": "bundle",
    "IgateError": "errors",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from .builder import build as build
    from .bundle import Bundle as Bundle
    from .compiler.latency import LatencyTable as LatencyTable
    from .errors import IgateError as IgateError
    from .gating.budget import Budget as Budget
    from .gating.budget import HardFraction as HardFraction
    from .gating.budget import L1Gates as L1Gates
    from .gating.budget import SparsityHinge as SparsityHinge
    from .gating.budget import fix_fraction as fix_fraction
    from .gating.convert import interrogate as interrogate
    from .gating.export import export as export
    from .gating.merge import merge as merge
    from .runtime.engine import Engine as Engine
    from .runtime.frame import Frame as Frame
    from .runtime.monitor import Monitor as Monitor
    from .runtime.pipeline import Pipeline as Pipeline
    from .training.landing import land as land
    from .training.tasks import Classification as Classification
    from .training.tasks import Depth as Depth
    from .training.tasks import Edges as Edges
    from .training.tasks import MultiLabel as MultiLabel
    from .training.tasks import Normals as Normals
    from .training.tasks import SemanticSegmentation as SemanticSegmentation


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'igate_edge' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
