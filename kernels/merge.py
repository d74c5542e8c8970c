"""The mix of a gated site as a kernel (merge_s8), for where it does not fold into the next convolution's weights.

plan = MergePlan.of(layout, shared, own, weights)
emulator.run(plan.launch(address(x), address(y), address(plan.tables.data)), [x, y, *plan.tables.each()])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from igate_edge.errors import InputError

from .exact import fmaf, to_int8
from .launch import Launch, MergeParams, per_element
from .memory import Tables, check_addresses
from .pack import BLOCK, BlockLayout


@dataclass(frozen=True)
class MergePlan:
    """Tables of one site. source: the tensor of all its live values; target: the mix, [images, C, height, width].

    shared [C], own [T, C]: where a channel's values stand in the source, -1 where there is none; weights [T, C].
    """

    source: BlockLayout
    target: BlockLayout
    shared: np.ndarray
    own: np.ndarray
    weights: np.ndarray
    tables: Tables

    @classmethod
    def of(cls, source: BlockLayout, shared: np.ndarray, own: np.ndarray, weights: np.ndarray) -> MergePlan:
        """Plan the mix of one site: psi' = sum over tasks of weights * (own value where there is one, else shared).

        All values share one scale. Raises InputError where the 16 channels of a block do not stand in one block of the
        source, each in its own place: such a mix folds into the weights that read it.
        """
        tasks, channels = own.shape
        if shared.shape != (channels,) or weights.shape != (tasks, channels) or weights.dtype != np.float32:
            evidence = f"shared {shared.shape}, own {own.shape}, weights {weights.dtype} {weights.shape}"
            raise InputError("not a site's tables", evidence, "pass shared [C], own [T, C], weights float32 [T, C]")
        if max(shared.max(), own.max()) >= source.channels or min(shared.min(), own.min()) < -1:
            raise InputError("a channel is out of range", f"the source has {source.channels}", "correct the tables")
        if ((own < 0).any(axis=0) & (shared < 0)).any():
            raise InputError("a channel has no value", "neither shared nor a task's own", "correct the tables")
        blocks = -(-channels // BLOCK)
        target = BlockLayout(source.images, channels, source.height, source.width, source.group)
        rows = np.full((1 + tasks, blocks * BLOCK), -1)
        rows[:, :channels] = np.concatenate([shared[None], own])
        sources = np.array(
            [[source.offset(_block(row)) for row in rows[:, b * BLOCK :][:, :BLOCK]] for b in range(blocks)]
        )
        bits = (rows[1:].reshape(tasks, blocks, BLOCK) >= 0) @ (1 << np.arange(BLOCK))
        wide = np.zeros((tasks, blocks * BLOCK), np.float32)
        wide[:, :channels] = weights
        tables: dict[str, np.ndarray] = {
            "sources": sources.astype(np.int32),
            "masks": np.ascontiguousarray(bits.T.astype(np.uint16)),
            "weights": np.ascontiguousarray(wide.reshape(tasks, blocks, BLOCK).transpose(1, 0, 2)),
            "targets": np.array([target.offset(block) for block in range(blocks)], np.int32),
        }
        return cls(source, target, shared, own, weights, Tables.of(tables))

    def launch(self, x: int, y: int, tables: int) -> Launch:
        """The launch for tensors and tables at these device addresses."""
        check_addresses(x=x, y=y, tables=tables)
        source, target = self.source, self.target
        plane = source.height * source.width
        pixels = source.images * plane
        params = MergeParams(
            x=x, y=y, **self.tables.addresses(tables), blocks=target.blocks, tasks=len(self.own), pixels=pixels,
            plane=plane, x_image=source.image, x_pixel=source.pixel, y_image=target.image, y_pixel=target.pixel,
        )  # fmt: skip
        return per_element("merge_s8", pixels * target.blocks, params)


def _block(row: np.ndarray) -> int:
    """The source block that holds these 16 channels, each in its own place; 0 where there are none."""
    known = np.flatnonzero(row >= 0)
    blocks = set((row[known] // BLOCK).tolist())
    if len(blocks) > 1 or (row[known] % BLOCK != known).any():
        fix = "fold the mix into the weights that read it"
        raise InputError("a site's values do not stand in blocks of 16", f"{row.tolist()}", fix)
    return blocks.pop() if blocks else 0


def reference(plan: MergePlan, x: np.ndarray) -> np.ndarray:
    """The definition: int8 x [N, all values, H, W] -> int8 [N, C, H, W]; one fused multiply-add a task, in order."""
    psi = x[:, np.maximum(plan.shared, 0)]
    total = np.zeros(psi.shape, np.float32)
    for own, weight in zip(plan.own, plan.weights, strict=True):
        taken = np.where((own >= 0).reshape(-1, 1, 1), x[:, np.maximum(own, 0)], psi)
        total = fmaf(taken.astype(np.float32), weight[:, None, None], total)
    return np.where((plan.own >= 0).any(axis=0).reshape(-1, 1, 1), to_int8(total), psi)
