"""`igate inspect`: what a bundle or an ONNX model holds, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_console import Answer
from .errors import InputError
from .reports.grids import cost_grid, stage_grid
from .reports.sharing import layers, stage_fractions
from .reports.tables import Grid, budget_line, flat, number, size_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from .contract import OutputSpec, Preprocess


def inspect_file(path: Path) -> Answer:
    """Everything a bundle or a model.onnx states about itself. Raises BundleError or GraphError."""
    if not path.exists():
        raise InputError("no such file", str(path), "check the path")
    if path.is_dir():
        raise InputError("this is a folder", str(path), "pass a bundle (NAME.igate) or a model.onnx")
    if path.suffix.lower() == ".onnx":
        return _onnx(path)
    return _bundle(path)


def _onnx(path: Path) -> Answer:
    from .compiler import graph, layout, masks

    model = graph.load(path)
    meta = graph.meta(model)
    plain = layout.lay_out(masks.close_all(model)).model if meta.get("form") == "gated" else model
    document = {
        "file": str(path),
        "kind": "onnx",
        "bytes": path.stat().st_size,
        "form": meta.get("form"),
        **_network(model, plain, list(graph.specs(model)), graph.preprocess(model), meta.get("sites", [])),
    }
    return Answer(document, _shown(document))


def _bundle(path: Path) -> Answer:
    from .builder import networks
    from .bundle import Bundle

    bundle = Bundle.read(path)
    manifest = bundle.manifest
    document = {
        "file": str(path),
        "kind": "bundle",
        "bytes": path.stat().st_size,
        "seal": bundle.seal,
        "created_by": manifest.get("created_by"),
        "form": manifest.get("form"),
        **_network(*networks(bundle), list(bundle.tasks), bundle.preprocess, manifest.get("gates") or []),
        "budget": manifest.get("budget"),
        "calibration": manifest.get("calibration"),
        "tolerances": manifest.get("tolerances"),
        "training": manifest.get("training"),
        "results": manifest.get("results"),
        "warnings": bundle.warnings,
        "golden_frames": len(bundle.golden["frame"]),
    }
    return Answer(document, _shown(document))


def _network(
    model: ir.Model, plain: ir.Model, tasks: list[OutputSpec], preprocess: Preprocess, sites: list[dict[str, Any]]
) -> dict[str, Any]:
    from .builder import costs_of
    from .compiler import layout

    names = [spec.name for spec in tasks]
    found = layers(sites, names)
    total = sum(layer.channels for layer in found)
    return {
        "tasks": [spec.as_json() for spec in tasks],
        "preprocess": preprocess.as_json(),
        "hard_fraction": {
            name: sum(layer.open[name].count("1") for layer in found) / total if total else 0.0 for name in names
        },
        "stages": [
            {"stage": stage, "channels": channels, "own": dict(zip(names, own, strict=True))}
            for stage, channels, own in stage_fractions(found, names)
        ],
        "sites": [
            {
                "name": layer.name,
                "channels": layer.channels,
                "tie": layer.tie or None,
                "own": {name: layer.fraction(name) for name in names},
            }
            for layer in found
        ],
        "cost": costs_of(layout.lay_out(model).model, plain, names),
    }


def _shown(document: dict[str, Any]) -> list[Any]:
    size = document["preprocess"]
    words = [f"{document['form']} network", size_of(document["bytes"]), f"input {size['width']}x{size['height']} RGB"]
    head = f"{document['file']}: {', '.join(words)}"
    rows = [(t["name"], t["kind"], t["channels"], t["units"] or "-", _classes(t)) for t in document["tasks"]]
    shown: list[Any] = [head, "", Grid("Tasks", ("task", "kind", "channels", "units", "classes"), rows, 5)]
    if document["stages"]:
        names = [task["name"] for task in document["tasks"]]
        stages = [(s["stage"], s["channels"], list(s["own"].values())) for s in document["stages"]]
        shown += ["", stage_grid(stages, names, "Channels a task owns (the rest is shared)")]
    shown += ["", cost_grid(document["cost"], len(document["tasks"]))]
    facts = [
        ("preprocessing", f"(rgb / 255 - mean) / std, mean {_triple(size['mean'])}, std {_triple(size['std'])}"),
        *((key.replace("_", " "), flat(document.get(key))) for key in ("created_by", "calibration")),
        ("budget", budget_line(document.get("budget"))),
        ("seal", flat(document.get("seal"))),
        ("golden frames", str(document.get("golden_frames", ""))),
        *((key.replace("_", " "), flat(value)) for key, value in (document.get("training") or {}).items()),
    ]
    facts = [(key, value) for key, value in facts if value]
    notes = [f"note: {warning}" for warning in document.get("warnings", ())]
    return [*shown, "", Grid("Provenance", ("", ""), facts, 2), *notes]


def _classes(task: dict[str, Any]) -> str:
    names = list(task["classes"])
    return ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "") or "-"


def _triple(values: Any) -> str:
    return " ".join(number(v) for v in values)
