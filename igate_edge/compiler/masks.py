"""Other gates, or fewer tasks, for the same network: edits of a gated graph that return a new one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from ..errors import GraphError, InputError
from .graph import KEY, meta
from .lanes import dims, name_of
from .rules import channel_mask


def set_masks(model: ir.Model, masks: Mapping[str, np.ndarray]) -> ir.Model:
    """A copy whose sites have these gates: {site name: bool [T, C]}, tasks in metadata order; sites not named keep
    theirs.

    Raises InputError for an unknown site or a wrong shape, GraphError when the graph's selects do not match its
    metadata.
    """
    about = meta(model)
    sites = {site["name"]: site for site in about.get("sites", [])}
    tasks = [task["name"] for task in about["tasks"]]
    for name, mask in masks.items():
        if name not in sites:
            raise InputError(
                f"no gate site {name!r}", f"known: {', '.join(list(sites)[:8])}", "see the metadata's sites"
            )
        want = (len(tasks), int(sites[name]["channels"]))
        if np.shape(mask) != want:
            raise InputError(
                f"gates of site {name!r} have a wrong shape", f"{np.shape(mask)}, not {want}", "pass bool [T, C]"
            )
    copy = model.clone()
    for (name, task), node in _selects(copy, about).items():
        if name in masks:
            _replace_mask(copy, node, np.asarray(masks[name], bool)[tasks.index(task)])
    for name, mask in masks.items():
        rows = np.asarray(mask, bool)
        sites[name]["open"] = {
            task: "".join("01"[int(bit)] for bit in row) for task, row in zip(tasks, rows, strict=True)
        }
    copy.metadata_props[KEY] = json.dumps(about, sort_keys=True)
    return copy


def close_all(model: ir.Model) -> ir.Model:
    """A copy with all gates closed: what `prune` leaves of it is the plain shared net."""
    about = meta(model)
    return set_masks(
        model, {s["name"]: np.zeros((len(about["tasks"]), s["channels"]), bool) for s in about.get("sites", [])}
    )


def keep_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy that answers these tasks only, without the nodes and weights that they do not need; raises InputError."""
    about = meta(model)
    known = [task["name"] for task in about["tasks"]]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(
            f"unknown task {', '.join(map(repr, unknown))}", f"this model answers {', '.join(known)}", "name these"
        )
    copy = model.clone()
    graph = copy.graph
    kept = [value for value in graph.outputs if value.name in names or value.name not in known]
    for value in [value for value in graph.outputs if value not in kept]:
        graph.outputs.remove(value)
    passes.RemoveUnusedNodesPass()(copy)
    about["tasks"] = [task for task in about["tasks"] if task["name"] in names]
    for site in about.get("sites", []):
        site["open"] = {task: bits for task, bits in site["open"].items() if task in names}
    copy.metadata_props[KEY] = json.dumps(about, sort_keys=True)
    return copy


def _selects(model: ir.Model, about: Mapping[str, Any]) -> dict[tuple[str, str], ir.Node]:
    """(site, task) -> its Where: by the mask's name, else by order; contents must agree with the metadata."""
    wheres = [node for node in model.graph if channel_mask(node) is not None]
    wanted = [(site["name"], task) for site in about["sites"] for task in site["open"]]
    by_name: dict[str, list[ir.Node]] = {}
    for node in wheres:
        assert node.inputs[0] is not None
        by_name.setdefault(name_of(node.inputs[0]), []).append(node)
    found = {}
    for site, task in wanted:
        for name in (f"sites.{site}.mask_{task}", f"sites.{site.replace('.', '_')}.mask_{task}"):
            if len(by_name.get(name, ())) == 1:
                found[site, task] = by_name[name][0]
    if not found:
        if len(wheres) != len(wanted):
            raise GraphError(
                "the graph's selects do not match its gate sites",
                f"{len(wheres)} for {len(wanted)} masks",
                "export it again",
            )
        found = dict(zip(wanted, wheres, strict=True))
    claimed = {id(node) for node in found.values()}
    missing = [key for key in wanted if key not in found]
    if missing and any(id(node) not in claimed for node in wheres):
        evidence = f"no select of its own for site {missing[0][0]!r}, task {missing[0][1]!r}"
        raise GraphError("the graph's selects do not match its gate sites", evidence, "export it again")
    opened = {(site["name"], task): bits for site in about["sites"] for task, bits in site["open"].items()}
    for key, node in found.items():
        mask = channel_mask(node)
        assert mask is not None
        if "".join("01"[int(bit)] for bit in mask) != opened[key]:
            raise GraphError(
                "a select does not match the metadata", f"site {key[0]!r}, task {key[1]!r}", "export it again"
            )
    return found


def _replace_mask(model: ir.Model, node: ir.Node, mask: np.ndarray) -> None:
    old = node.inputs[0]
    assert old is not None
    rank = len(dims(node.outputs[0]))
    array, name = mask.reshape(1, -1, *[1] * (rank - 2)), name_of(old)
    if len(list(old.uses())) > 1:
        name = f"{node.name}.mask"
    else:
        del model.graph.initializers[name]
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.BOOL))
    value.const_value = ir.tensor(array, name=name)
    node.replace_input_with(0, value)
    model.graph.initializers[name] = value
