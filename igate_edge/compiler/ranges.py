"""Calibrated ranges by family: one INT8 scale for all versions of a value, so that any layout finds its scales."""

from __future__ import annotations

from collections.abc import Mapping

from . import groups
from .groups import Range
from .layout import Laid


def by_family(laid: Laid, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """(low, high) of every family, over all its tensors; `ranges`: those of the layout's tensors."""
    table: dict[str, Range] = {}
    for name, family in laid.origin.items():
        if family and name in ranges:
            table[family] = _wider(table.get(family), ranges[name])
    return table


def of_layout(laid: Laid, table: Mapping[str, Range]) -> tuple[dict[str, Range], list[str]]:
    """Ranges of all float tensors of a layout from those of the families, and the names of tensors without one.

    A tensor that only holds values of others, or sums of them, and that another layout does without takes theirs.
    """
    found: dict[str, Range] = {}
    missing: list[str] = []
    source = groups.typed(laid.model)
    for value in source.graph.inputs:
        family = laid.origin.get(groups.name_of(value), "")
        if family in table:
            found[groups.name_of(value)] = table[family]
    for node in source.graph:
        data = [found.get(groups.name_of(value)) for value in groups.activations(node.inputs)]
        for value in groups.activations(node.outputs):
            name = groups.name_of(value)
            known: Range | None = table.get(laid.origin.get(name, ""))
            if known is None and data and (groups.moves(node) or groups.averages(node) or groups.is_sum(node)):
                for limits in data:
                    known = None if limits is None else _wider(known, limits)
            if known is None:
                missing.append(name)
            else:
                found[name] = known
    return found, missing


def _wider(one: Range | None, other: Range) -> Range:
    return other if one is None else (min(one[0], other[0]), max(one[1], other[1]))
