"""One form of a network as a TensorRT engine: built with the timings of earlier builds, opened, through its gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from . import builder_gates as gates
from .builder_parts import Session, Work
from .bundle import Bundle
from .compiler import graph
from .engines import tensorrt as trt
from .errors import CheckFailed
from .files import as_path
from .golden import GoldenResult
from .plaindata import plain_json
from .runtime import cache
from .runtime.preprocess import to_input

if TYPE_CHECKING:
    import onnx_ir as ir

    from .builder import Options
    from .builder_plugin import Kit

#: Extra streams and builder levels that are tried while there is time, the plain ones first.
AUX_STREAMS, LEVELS = (0, 2), (3, 4)
NAMES = {"int8": "INT8", "half": "FP16"}


class Plans(Protocol):
    """Whoever makes plans and opens them: `engines.tensorrt`, or a stand-in."""

    def probe(self) -> dict[str, Any]: ...

    def compile_plan(
        self,
        model: bytes,
        options: trt.PlanOptions,
        progress: trt.Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> trt.Plan: ...

    def open_plan(self, plan: bytes, plugins: tuple[Path, ...] = ()) -> Session: ...


@dataclass(frozen=True)
class Ask:
    """What is built, and where its stages and warnings are noted down."""

    bundle: Bundle
    options: Options
    names: list[str]
    work: Work


@dataclass(frozen=True)
class How:
    """like: whose settings a plan takes, none other tried. kit: of its plugin layers. share: of the time for trying."""

    like: Form | None = None
    kit: Kit | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Form:
    """One form of the network: its graph, its plan, the plan opened, what the gates said. kit: of its plugin layers."""

    precision: str
    model: bytes
    plan: trt.Plan
    session: Session
    results: list[GoldenResult]
    coverage: dict[str, Any]
    gates: list[dict[str, Any]]
    kit: Kit | None = None


@dataclass(frozen=True)
class Maker:
    """Makes the forms of a build. made_for: `probe` of the backend; board: what timings are tied to beside that."""

    plans: Any
    progress: trt.Progress | None
    cancelled: Callable[[], bool] | None
    made_for: dict[str, Any]
    board: dict[str, str]

    def form(self, ask: Ask, precision: str, model: ir.Model, how: How | None = None) -> Form:
        """Build one form and put it through the gates; raises CheckFailed with everything that is wrong."""
        how = how or How()
        work, like, kit = ask.work, how.like, how.kit
        data, name = graph.dump(model), NAMES[precision] + ("+plugin" if kit else "")
        with work.stage(f"build {name}"):
            plan = self.compile(data, ask.options, precision, how)
        work.warnings += [f"{name}: {line}" for line in plan.log]
        coverage, problems = gates.layer_types(plan.layers, model, data if like is None else like.model, precision)
        passed = [gate("layers", precision, problems)]
        if problems:
            fix = "build with precision='float' (FP16), or choose another lowering"
            raise CheckFailed(f"the {name} engine is not what was asked for", "; ".join(problems), fix)
        with work.stage("open"):
            session = self.open(plan.plan, ask.options, kit)
        try:
            with work.stage("golden"):
                results, problems = gates.check(ask.bundle, session, precision, ask.names)
            if problems:
                fix = "do not use this engine: try another version of TensorRT, or precision='float' (FP16)"
                raise CheckFailed(f"the {name} engine does not compute what was packaged", "; ".join(problems), fix)
        except BaseException:
            session.close()
            raise
        coverage["plan"] = {"peak_mb": plan.peak_mb, "seconds": plan.seconds, "chosen": plain_json(plan.chosen)}
        coverage["plan"] |= {"tried": plain_json(plan.tried), "session": plain_json(getattr(session, "facts", {}))}
        passed.append(gate("golden", precision, []))
        return Form(precision, data, plan, session, results, coverage, passed, kit)

    def open(self, plan: bytes, options: Options, kit: Kit | None) -> Any:
        """The session of a plan; the plugin's library is loaded before it."""
        return self.plans.open_plan(plan, plugins_of(options, [kit.library] if kit else []))

    def compile(self, model: bytes, options: Options, precision: str, how: How) -> trt.Plan:
        """A plan, with the timings of earlier builds on this device; whatever is wrong with those, it is built."""
        folder = as_path(options.cache_dir) if options.cache_dir is not None else cache.default_dir()
        made_for = {name: str(value) for name, value in self.made_for.items()}
        key = cache.cache_key({"timings": made_for, "around": self.board})
        known, _ = cache.load(folder, key, made_for, kind="timings")
        chosen: dict[str, Any] = (
            how.like.plan.chosen if how.like is not None else {"workspace_mb": options.workspace_mb}
        )
        asked = trt.PlanOptions(
            precision=precision,
            workspace_mb=None if chosen["workspace_mb"] is None else int(chosen["workspace_mb"]),
            batch=None if options.batch == 1 else (1, options.batch, options.batch),
            aux_streams=AUX_STREAMS if how.like is None else (chosen["aux_streams"],),
            levels=LEVELS if how.like is None else (chosen["level"],),
            seconds=max(options.seconds * how.share, 1.0),
            timing_cache=b"" if known is None else known.payload,
            plugins=plugins_of(options, [how.kit.library] if how.kit else []),
        )
        plan: trt.Plan = self.plans.compile_plan(model, asked, self.progress, self.cancelled)
        if plan.timing_cache:
            cache.store(folder, key, plan.timing_cache, {"made_for": made_for}, kind="timings")
        return plan


def gate(name: str, precision: str, problems: list[str]) -> dict[str, Any]:
    """What a report says of one check."""
    return {"gate": name, "precision": precision, "passed": not problems, "problems": problems}


def plugins_of(options: Options, more: Iterable[Path] = ()) -> tuple[Path, ...]:
    """The libraries that were given, then others, each once."""
    return tuple(dict.fromkeys([*(as_path(path) for path in options.plugins), *more]))


def image_of(bundle: Bundle, session: Session) -> np.ndarray:
    """As many golden frames as a usual call has rows."""
    frames = bundle.golden["frame"]
    rows = session.shape[0]
    return np.concatenate([to_input(frames[row % len(frames)], bundle.preprocess) for row in range(rows)])
