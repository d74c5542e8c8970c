"""Gated graph -> static graph: dead filters, empty branches, selects and needless mixes are gone; the outputs are the
same.

Every number (see `channels`) that is live gets one physical channel, in the node that first makes it. The pass is
deterministic, and the model given is not altered.
"""

from __future__ import annotations

import onnx_ir as ir

from .layout import Laid, Layout
from .masks import close_all, keep_outputs, set_masks

__all__ = ["close_all", "keep_outputs", "prune", "set_masks"]


def prune(model: ir.Model) -> Laid:
    """Remove what no output depends on, channel by channel, and leave the layers as they are: one convolution a live
    version, nothing stacked. `layout.lay_out` makes faster forms.

    Takes any model of `graph.load`, gated or not; a second pass changes nothing.
    """
    return Layout(model, "split", 1, stack=False).run()
