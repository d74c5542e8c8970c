"""ONNX bytes + real frames -> a bundle: lay out, calibrate, quantise, record the answers, write the file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .bundle import MIN_GOLDEN, Bundle, canonical_json, write_bundle
from .compiler import calibrate, graph, layout, masks, quantize, ranges
from .contract import OutputSpec, Preprocess
from .engines import onnxruntime as ort
from .errors import DataError, GraphError
from .golden import run_frames, tolerances, too_far
from .plain import weightless
from .runtime.drift import MIN_FRAMES, reference_statistics
from .runtime.postprocess import decode
from .runtime.preprocess import to_input, to_network_size

#: Calibration frames, evenly spread, whose statistics a monitor compares live frames with.
REFERENCE_FRAMES = 64


def package(
    onnx_bytes: bytes,
    path: str | os.PathLike[str],
    *,
    calibration: Iterable[np.ndarray],
    golden: Sequence[np.ndarray],
    labels: Mapping[str, np.ndarray] | None = None,
    budget: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    results: dict[str, Any] | None = None,
    method: str = "minmax",
    plain: bytes | None = None,
) -> Bundle:
    """Write the bundle of a network in any ONNX form; returns it as it reads back.

    calibration: uint8 RGB frames [H,W,3] of any size from the robot's own camera; they set the INT8 ranges and the
    statistics that live frames are held against (`runtime.drift`), and are not stored. golden: at least 4 such frames;
    they are stored at network size with the outputs. labels: task name -> labels of the golden frames, [N,...]. budget,
    provenance and results are plain JSON for the manifest. plain: ONNX of the plain shared net that a merged or filled
    network came from; the other forms say it themselves. Raises DataError (frames, or a task that ignores them),
    GraphError (model), UnavailableError (cannot write); an existing file then stays as it was.
    """
    model = graph.load(onnx_bytes)
    specs, preprocess = list(graph.specs(model)), graph.preprocess(model)
    reference = plain_net(onnx_bytes if plain is None else plain)
    frames = golden_frames(golden, preprocess)
    kept = _labels(labels or {}, specs, len(frames))
    laid = layout.lay_out(model)
    small: list[np.ndarray] = []
    seen = calibrate.observe(laid.model, _inputs(calibration, preprocess, small), method)
    families = ranges.by_family(laid, seen.ranges)
    floats = _answers(graph.dump(laid.model), frames, preprocess)
    quantised = quantize.quantize(laid.model, ranges.of_layout(laid, families)[0], dialect="ort")
    # The reference is run without fusions: fused integer kernels round differently from one processor to the next.
    int8_bytes = graph.dump(quantised)
    int8s = _answers(int8_bytes, frames, preprocess)
    _all_see_the_image(floats)
    table, meta = tolerances(specs, floats, int8s, (preprocess.height, preprocess.width)), graph.meta(model)
    manifest = {
        "tasks": [spec.as_json() for spec in specs],
        "preprocess": preprocess.as_json(),
        "form": meta["form"],
        "opset": model.opset_imports[""],
        "gates": meta.get("sites", []),
        "budget": budget,
        "training": provenance,
        "results": results,
        "calibration": {"count": seen.frames, "sha256": seen.sha256, "method": seen.method}
        | {"warnings": list(seen.warnings)},
        "tolerances": table,
        "reference": _reference(int8_bytes, [*small, *(frames if len(small) < MIN_FRAMES else [])], specs, families),
        "warnings": too_far(table),
    }
    arrays = {"frame": frames, **{f"label/{name}": array for name, array in kept.items()}}
    arrays |= {f"float/{name}": array for name, array in floats.items()}
    arrays |= {f"int8/{name}": array for name, array in int8s.items()}
    return write_bundle(path, manifest, model=onnx_bytes, ranges=families, plain=reference, golden=arrays)


def with_reference(bundle: Bundle, path: str | os.PathLike[str], frames: Sequence[np.ndarray]) -> Bundle:
    """Write `bundle` at `path` with the statistics of other frames, and all else as it is; returns what was written.

    frames: uint8 RGB [H,W,3], at least 4: what the robot's camera shows when all is well. For bundles without
    statistics, and for a camera that was changed on purpose. Raises as `package` does.
    """
    laid = layout.lay_out(graph.load(bundle.model))
    quantised = quantize.quantize(laid.model, ranges.of_layout(laid, bundle.ranges)[0], dialect="ort")
    small = [to_network_size(frame, bundle.preprocess) for frame in frames]
    reference = _reference(graph.dump(quantised), small, bundle.tasks, bundle.ranges)
    parts: dict[str, Any] = {"ranges": bundle.ranges, "plain": bundle.plain, "golden": bundle.golden}
    return write_bundle(path, {**bundle.manifest, "reference": reference}, model=bundle.model, **parts)


def _inputs(frames: Iterable[np.ndarray], preprocess: Preprocess, small: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Preprocessed frames, while `small` fills with the same frames at network size: an iterator comes only once."""
    for frame in frames:
        small.append(to_network_size(frame, preprocess))
        yield to_input(frame, preprocess)


def _reference(
    model: bytes, frames: Sequence[np.ndarray], specs: Sequence[OutputSpec], limits: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """Statistics of up to REFERENCE_FRAMES of the frames and of the model's answers to them."""
    picked = [frames[k] for k in np.unique(np.linspace(0, len(frames) - 1, REFERENCE_FRAMES).round().astype(int))]
    preprocess = graph.preprocess(graph.load(model))
    size = preprocess.height, preprocess.width
    with ort.open(model, threads=1, optimise=False) as session:
        raw = (session.run(to_input(frame, preprocess)) for frame in picked)
        decoded = ({spec.name: decode(spec, outputs[spec.name], size) for spec in specs} for outputs in raw)
        return reference_statistics(picked, decoded, specs, preprocess, limits)


def golden_frames(frames: Sequence[np.ndarray], preprocess: Preprocess) -> np.ndarray:
    """Check and resize golden frames: uint8 [N,height,width,3]; raises DataError for fewer than 4 different frames."""
    stack = np.array([to_network_size(frame, preprocess) for frame in frames], np.uint8)
    distinct = len({frame.tobytes() for frame in stack})
    if distinct < MIN_GOLDEN:
        evidence = f"{len(stack)} given, {distinct} of them distinct"
        raise DataError(
            f"at least {MIN_GOLDEN} golden frames are needed", evidence, "pass real, different frames of the camera"
        )
    return stack


def _all_see_the_image(outputs: Mapping[str, np.ndarray]) -> None:
    """Raise DataError for a task whose answers to different frames agree to the last bit."""
    for name, array in outputs.items():
        if (array == array[:1]).all():
            fix = "check that its head is connected to the backbone and was trained"
            raise DataError(f"task {name!r} does not depend on the image", f"one answer to {len(array)} frames", fix)


def plain_net(onnx_bytes: bytes) -> bytes:
    """The plain shared net of a model, without weights: all gates closed, then laid out. Raises GraphError."""
    model = graph.load(onnx_bytes)
    form = graph.meta(model)["form"]
    if form in ("merged", "filled"):
        fix = "pass the plain net's ONNX too (MergedNet.plain_twin)"
        raise GraphError("a merged network does not say what its plain net is", f"form {form}", fix)
    if form == "gated":
        model = layout.lay_out(masks.close_all(model)).model
    about = {name: value for name, value in graph.meta(model).items() if name != "sites"}
    model.metadata_props[graph.KEY] = canonical_json({**about, "form": "plain"}).decode()
    return weightless(graph.dump(model))


def _answers(model: bytes, frames: np.ndarray, preprocess: Preprocess) -> dict[str, np.ndarray]:
    session = ort.open(model, threads=1, optimise=False)
    try:
        return run_frames(session.run, frames, preprocess)
    finally:
        session.close()


def _labels(labels: Mapping[str, np.ndarray], specs: Sequence[OutputSpec], count: int) -> dict[str, np.ndarray]:
    known = {spec.name for spec in specs}
    for name, array in labels.items():
        if name not in known:
            raise DataError(
                f"labels of an unknown task {name!r}", f"tasks: {', '.join(sorted(known))}", "use a task's name"
            )
        if len(array) != count:
            raise DataError(
                f"labels of task {name!r} do not fit", f"{len(array)} for {count} golden frames", "pass one a frame"
            )
    return {name: np.asarray(array) for name, array in labels.items()}
