"""What the builders of all backends have in common: the bundle's networks, its INT8 ranges, costs; the protocols."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .bundle import Bundle
from .compiler import calibrate, cost, graph, layout, masks, quantize
from .compiler.ranges import by_family, of_layout
from .errors import BundleError, IgateError
from .plain import fill
from .plaindata import plain_json
from .runtime.preprocess import to_input

if TYPE_CHECKING:
    from .builder import Options
    from .golden import GoldenResult

#: Share of convolution MACs that must run as INT8 before an engine may be called INT8.
MIN_COVERAGE = 0.95


class Session(Protocol):
    """An opened engine of any backend: one input, outputs by name."""

    input: str
    shape: tuple[int, ...]
    outputs: list[str]

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Raw outputs by name for a preprocessed image, arrays that the caller owns."""
        ...

    def close(self) -> None:
        """Free the engine; closing twice is fine."""
        ...


class Backend(Protocol):
    """What `builder.open_engine` asks of a backend whose engines are cached."""

    def probe(self) -> dict[str, Any]:
        """{"version", ...} of what runs engines here: part of every key, and of an entry's header."""
        ...

    def surroundings(self, options: Options) -> dict[str, Any]:
        """What an engine depends on beside that: the machine, its power mode. Part of every key."""
        ...

    def limit(self, bundle: Bundle, options: Options) -> dict[str, Any]:
        """The time that an engine must hold; {} where a build judges none. Part of every key."""
        ...

    def compile_(
        self, bundle: Bundle, options: Options, names: list[str], work: Work
    ) -> tuple[bytes, Session, dict[str, Any]]:
        """The checked engine's bytes, its session and what `BuildReport` is to say; raises CheckFailed."""
        ...

    def open(self, payload: bytes, options: Options) -> Session:
        """Open the bytes of an engine that `compile_` gave."""
        ...

    def check(
        self, bundle: Bundle, session: Session, precision: str, names: list[str]
    ) -> tuple[list[GoldenResult], list[str]]:
        """What is asked of an engine before its first frame, also of a cached one: results, and what is wrong."""
        ...


@dataclass
class Work:
    """What a build collects on its way."""

    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 4)


def ranges_for(
    bundle: Bundle, laid: layout.Laid, calibration: Sequence[np.ndarray] | None = None
) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """INT8 ranges of a layout, and warnings: from own frames, else the bundle's families, else its golden frames.

    The last is for a bundle of another compiler version, whose values had other names.
    """
    notes: list[str] = []
    frames: Sequence[np.ndarray] | None = calibration
    if frames is None:
        ranges, strange = of_layout(laid, bundle.ranges)
        if not strange:
            return ranges, notes
        frames = list(bundle.golden["frame"])
        notes.append(f"the bundle's INT8 ranges do not fit this version ({strange[0]}): made from its golden frames")
    inputs = (to_input(frame, bundle.preprocess) for frame in frames)
    seen = calibrate.observe(laid.model, inputs, bundle.manifest["calibration"]["method"])
    return of_layout(laid, by_family(laid, seen.ranges))[0], notes + list(seen.warnings)


def quantised_for_tensorrt(bundle: Bundle, choice: str = "merged") -> tuple[layout.Laid, Any]:
    """The bundle's network laid out by `choice`, and its INT8 form in the `trt` dialect, before `compiler.half`."""
    laid = layout.lay_out(networks(bundle)[0], choice)
    return laid, quantize.quantize(laid.model, ranges_for(bundle, laid)[0], "trt")


def networks(bundle: Bundle) -> tuple[Any, Any]:
    """The bundle's model, checked to be the one its manifest describes, and its plain shared net with weights of 0.

    Raises BundleError or GraphError.
    """
    again = "export the bundle again"
    model = graph.load(bundle.model)
    if tuple(graph.specs(model)) != bundle.tasks or graph.preprocess(model) != bundle.preprocess:
        evidence = "tasks or preprocessing of manifest.json are not those of model.onnx"
        raise BundleError("the bundle's members do not fit together", evidence, again)
    try:
        plain = graph.load(fill(bundle.plain, None))
        masks.keep_outputs(plain, [spec.name for spec in bundle.tasks])
    except IgateError as error:
        raise BundleError("the bundle's plain.onnx is not usable", str(error), again) from error
    return model, plain


def costs_of(ours: Any, plain: Any, names: Sequence[str], dense: Any = None) -> dict[str, dict[str, int]]:
    """MACs and parameters of ours, the plain shared net, T separate nets and, where a gated net is given, that.

    encoder_macs: those without the tasks' heads.
    """
    nets = {
        "ours": [ours],
        "plain": [masks.keep_outputs(plain, names)],
        "separate": [masks.keep_outputs(plain, [name]) for name in names],
    }
    if dense is not None and graph.meta(dense)["form"] == "gated":
        nets["dense"] = [dense]
    table = {}
    for name, models in nets.items():
        items = [cost.count(model) for model in models]
        macs, params, heads = (
            sum(values) for values in zip(*((c.macs, c.params, c.head_macs) for c in items), strict=True)
        )
        table[name] = {"macs": int(macs), "params": int(params), "encoder_macs": int(macs - heads)}
    return table


def barriers(report: Any) -> list[str]:
    """The operators at which the channel analysis stopped, as text."""
    listed = plain_json(report).get("barriers", [])
    return [" ".join(map(str, item)) if isinstance(item, list | tuple) else str(item) for item in listed]
