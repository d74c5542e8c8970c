"""Other gates for a network: all of a site's selects are found, or nothing is changed."""

from __future__ import annotations

import json

import onnx
import pytest
import tinynet

from igate_edge.compiler import graph, prune
from igate_edge.errors import GraphError


def renamed(old: str, new: str) -> bytes:
    """The tiny net with one mask under another name."""
    proto = onnx.load_from_string(tinynet.gated_onnx())
    for tensor in proto.graph.initializer:
        tensor.name = new if tensor.name == old else tensor.name
    for node in proto.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
    return proto.SerializeToString()


def test_selects_without_names_are_found_by_their_order() -> None:
    closed = prune.close_all(graph.load(tinynet.gated_onnx()))
    assert all("1" not in bits for site in graph.meta(closed)["sites"] for bits in site["open"].values())
    assert json.dumps(graph.meta(prune.prune(closed).model)["sites"]).count("1" * 8) == 0


def test_a_select_that_is_not_found_stops_everything() -> None:
    """One mask has the exporter's name, the others have not: their gates would stay open without a word."""
    model = graph.load(renamed("one.seg.mask", "sites.one.mask_seg"))
    with pytest.raises(GraphError, match="no select of its own for site 'one', task 'depth'"):
        prune.close_all(model)
