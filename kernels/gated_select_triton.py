"""Device code of gated_select in Triton: forward, backward and the reduction behind the backward; no torch in here.

A map is seen as a matrix of `rows` x `cols` in memory order: NCHW has one row per (image, channel) and positions as
columns; channels_last has one row per pixel and channels as columns. A program owns one block of each map: ROWS rows by
GROUPS x LANES columns. Loads are masked by gates that agree along LANES: they stay vector loads, and what no gate reads
is not loaded: whole planes in NCHW, runs of closed channels in channels_last. No atomics: sums over positions go
through partial sums in a fixed order.

What Triton's interpreter cannot do shapes the code: half types become float32 right after the load, gates are blocks
(never scalars), rounding to even is done by the magic number, and nothing here needs more than Triton 3.6.
"""

# mypy: disable-error-code="assignment,misc"
from __future__ import annotations

import triton
import triton.language as tl

#: 1.5 * 2^23: adding and taking it away rounds a float32 of magnitude below 2^22 to an integer, ties to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _gates(alpha, at, known, channels, TASKS: tl.constexpr, FIXED: tl.constexpr):
    """Per task whether the gate is open (gate.is_open), at the block's channels. FIXED: bytes, not logits."""
    gates = ()
    for t in tl.static_range(TASKS):
        if FIXED:
            gates = gates + (tl.load(alpha + t * channels + at, mask=known, other=0) != 0,)
        else:
            gates = gates + (tl.load(alpha + t * channels + at, mask=known, other=-1.0).to(tl.float32) >= 0,)
    return gates


@triton.jit
def _weights(beta, at, known, channels, TASKS: tl.constexpr):
    """Softmax over the tasks of beta, float32, at the block's channels."""
    rows = ()
    for t in tl.static_range(TASKS):
        rows = rows + (tl.load(beta + t * channels + at, mask=known, other=0.0).to(tl.float32),)
    top = rows[0]
    for t in tl.static_range(1, TASKS):
        top = tl.maximum(top, rows[t])
    parts, total = (), tl.zeros_like(top)
    for t in tl.static_range(TASKS):
        parts = parts + (tl.exp(rows[t] - top),)
        total += parts[t]
    scale = 1.0 / total
    weights = ()
    for t in tl.static_range(TASKS):
        weights = weights + (parts[t] * scale,)
    return weights


@triton.jit
def _place(rows, units, channels, LAST: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
           UNIT: tl.constexpr):  # fmt: skip
    """Offset of the block, offsets within it, which exist, the block's channels, and which of those exist.

    units: columns in units of UNIT, so that the compiler knows how rows are aligned.
    """
    cols = units * UNIT
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS)[:, None, None], _columns(GROUPS, LANES)
    left = tl.minimum(rows - first, ROWS).to(tl.int32)
    within = row * cols + col
    inside = (row < left) & (col < cols)
    if LAST:
        channel, known = col, col < cols
    else:
        channel, known = ((first % channels).to(tl.int32) + row) % channels, row < left
    return first * cols, within, inside, channel, known


@triton.jit
def _columns(GROUPS: tl.constexpr, LANES: tl.constexpr):
    """Columns of the program's block, [1, GROUPS, LANES]."""
    within = tl.arange(0, GROUPS)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :]
    return tl.program_id(1) * (GROUPS * LANES) + within


@triton.jit
def _parts(rows, units, LAST: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
           UNIT: tl.constexpr):  # fmt: skip
    """Where the block's sums over positions go in [parts, channels], and how many places there are in all."""
    if LAST:
        spot = tl.program_id(0).to(tl.int64) * (units * UNIT) + _columns(GROUPS, LANES)
        size = tl.num_programs(0).to(tl.int64) * (units * UNIT)
    else:
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None, None]
        spot = tl.program_id(1).to(tl.int64) * rows + row
        size = tl.num_programs(1).to(tl.int64) * rows
    return spot, size


@triton.jit
def _over_positions(x, LAST: tl.constexpr):
    """Sum of a block over its positions, in the shape of its channels."""
    if LAST:
        total = tl.sum(x, axis=0, keep_dims=True)
    else:
        total = tl.sum(tl.sum(x, axis=2, keep_dims=True), axis=1, keep_dims=True)
    return total


@triton.jit
def _reads(gate, LAST: tl.constexpr):
    """Where a map is to be loaded, the same for all LANES: where one of them reads it."""
    if LAST:  # as float32: with int32 Triton 3.9 leaves a byte of stack
        reads = tl.max(gate.to(tl.float32), axis=2, keep_dims=True) > 0
    else:
        reads = gate
    return reads


@triton.jit
def _on_grid(x, step):
    """x rounded to the INT8 grid -128..127 of this step; NaN stays NaN."""
    steps = tl.div_rn(x, step)
    steps = tl.where(steps > 127.0, 127.0, tl.where(steps < -128.0, -128.0, steps))
    return ((steps + _ROUND) - _ROUND) * step


@triton.jit
def select_forward(
    psi, phis, outs, psi_next, alpha, beta, step, rows, units, channels,
    TASKS: tl.constexpr, MIXED: tl.constexpr, FIXED: tl.constexpr, QUANTISED: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """outs[t] = phis[t] where gate t is open, else psi; psi_next = their softmax-weighted sum, or psi where all closed.

    psi, phis, outs, psi_next: maps of one type. alpha, beta: [TASKS, channels]. step: float32 [1], read if QUANTISED.
    psi_next and beta are read only if MIXED.
    """
    base, within, inside, channel, known = _place(rows, units, channels, LAST, ROWS, GROUPS, LANES, UNIT)
    gates = _gates(alpha, channel, known, channels, TASKS, FIXED)
    some, every = gates[0], gates[0]
    for t in tl.static_range(1, TASKS):
        some, every = some | gates[t], every & gates[t]
    if MIXED:
        weights = _weights(beta, channel, known, channels, TASKS)
    if QUANTISED:
        grid = tl.load(step + tl.arange(0, 1))[:, None, None]
    shared = tl.load(psi + base + within, mask=inside & _reads(~every, LAST), other=0.0)
    mixed = tl.zeros([ROWS, GROUPS, LANES], tl.float32)
    for t in tl.static_range(TASKS):
        own = tl.load(phis[t] + base + within, mask=inside & _reads(gates[t], LAST), other=0.0)
        chosen = tl.where(gates[t], own, shared)
        if QUANTISED:
            chosen = _on_grid(chosen.to(tl.float32), grid).to(chosen.dtype)
        tl.store(outs[t] + base + within, chosen, mask=inside)
        if MIXED:
            mixed += weights[t] * chosen.to(tl.float32)
    if MIXED:
        wide = tl.where(some, mixed, shared.to(tl.float32))
        if QUANTISED:
            wide = _on_grid(wide, grid)
        tl.store(psi_next + base + within, wide.to(shared.dtype), mask=inside)


@triton.jit
def select_backward(
    psi, phis, grads, grad_next, d_psi, d_phis, partial, alpha, beta, step, rows, units, channels,
    TASKS: tl.constexpr, GIVEN: tl.constexpr, MIXED: tl.constexpr, WANT_PHIS: tl.constexpr, WANT_PSI: tl.constexpr,
    WANT_ALPHA: tl.constexpr, WANT_BETA: tl.constexpr, FIXED: tl.constexpr, QUANTISED: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Gradients of the maps, and per block the sums over positions behind those of alpha and beta.

    grads, GIVEN: gradients of outs, and bit t set where there is one. grad_next: that of psi_next, read if MIXED.
    WANT_PHIS: bit t set where d_phis[t] is wanted. partial: float32 [2 TASKS, parts, channels]: of alpha, then of w.
    """
    base, within, inside, channel, known = _place(rows, units, channels, LAST, ROWS, GROUPS, LANES, UNIT)
    gates = _gates(alpha, channel, known, channels, TASKS, FIXED)
    every = gates[0]
    for t in tl.static_range(1, TASKS):
        every = every & gates[t]
    if MIXED:
        weights = _weights(beta, channel, known, channels, TASKS)
        into = tl.load(grad_next + base + within, mask=inside, other=0.0).to(tl.float32)
    if QUANTISED:
        grid = tl.load(step + tl.arange(0, 1))[:, None, None]
    if WANT_ALPHA:
        shared = tl.load(psi + base + within, mask=inside, other=0.0).to(tl.float32)
    elif WANT_BETA or QUANTISED:
        shared = tl.load(psi + base + within, mask=inside & _reads(~every, LAST), other=0.0).to(tl.float32)
    spot, parts = _parts(rows, units, LAST, ROWS, GROUPS, LANES, UNIT)
    left = tl.zeros([ROWS, GROUPS, LANES], tl.float32)
    for t in tl.static_range(TASKS):
        slope, reach = tl.zeros_like(spot).to(tl.float32), tl.zeros_like(spot).to(tl.float32)
        if MIXED or (GIVEN >> t) & 1:  # else no loss reads what this task's gate decides
            total = tl.zeros([ROWS, GROUPS, LANES], tl.float32)
            if (GIVEN >> t) & 1:
                total += tl.load(grads[t] + base + within, mask=inside, other=0.0).to(tl.float32)
            if MIXED:
                total += weights[t] * into
            if WANT_ALPHA:
                own = tl.load(phis[t] + base + within, mask=inside, other=0.0).to(tl.float32)
            elif WANT_BETA or QUANTISED:
                own = tl.load(phis[t] + base + within, mask=inside & _reads(gates[t], LAST), other=0.0).to(tl.float32)
            if WANT_ALPHA or WANT_BETA or QUANTISED:
                chosen = tl.where(gates[t], own, shared)
            if QUANTISED:
                steps = tl.div_rn(chosen, grid)
                total = tl.where((steps >= -128.0) & (steps <= 127.0), total, 0.0)
                chosen = _on_grid(chosen, grid).to(psi.dtype.element_ty).to(tl.float32)
            if (WANT_PHIS >> t) & 1:
                mine = tl.where(gates[t], total, 0.0)
                tl.store(d_phis[t] + base + within, mine.to(psi.dtype.element_ty), mask=inside)
            left += tl.where(gates[t], 0.0, total)
            if WANT_ALPHA:
                apart = own - shared
                slope = _over_positions(total * tl.where(tl.abs(apart) < float("inf"), apart, 0.0), LAST)
            if WANT_BETA:
                reach = _over_positions(into * chosen, LAST)
        if WANT_ALPHA:
            tl.store(partial + t * parts + spot, slope, mask=known)
        if WANT_BETA:
            tl.store(partial + (TASKS + t) * parts + spot, reach, mask=known)
    if WANT_PSI:
        tl.store(d_psi + base + within, left.to(psi.dtype.element_ty), mask=inside)


@triton.jit
def _column_sums(partial, parts, at, known, channels, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, parts, PARTS):
        row = first + tl.arange(0, PARTS)
        mask = (row < parts)[:, None] & known[None, :]
        total += tl.sum(tl.load(partial + row[:, None] * channels + at[None, :], mask=mask, other=0.0), axis=0)
    return total


@triton.jit
def select_reduce(
    partial, alpha, beta, d_alpha, d_beta, parts, channels,
    TASKS: tl.constexpr, WANT_ALPHA: tl.constexpr, WANT_BETA: tl.constexpr, FIXED: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """d_alpha and d_beta [TASKS, channels] from the partial sums [2 TASKS, parts, channels], in a fixed order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = at < channels
    size = tl.cast(parts, tl.int64) * channels  # the compiler makes an argument of 1 a constant, which has no `to`
    if WANT_ALPHA:
        for t in tl.static_range(TASKS):
            total = _column_sums(partial + t * size, parts, at, known, channels, BLOCK, PARTS)
            logit = tl.load(alpha + t * channels + at, mask=known, other=0.0).to(tl.float32)
            soft = 1.0 / (1.0 + tl.exp(-logit))
            result = total * soft * (1.0 - soft)
            tl.store(d_alpha + t * channels + at, result.to(d_alpha.dtype.element_ty), mask=known)
    if WANT_BETA:
        gates = _gates(alpha, at, known, channels, TASKS, FIXED)
        weights = _weights(beta, at, known, channels, TASKS)
        some = gates[0]
        for t in tl.static_range(1, TASKS):
            some = some | gates[t]
        sums, mean = (), tl.zeros([BLOCK], tl.float32)
        for t in tl.static_range(TASKS):
            total = _column_sums(partial + (TASKS + t) * size, parts, at, known, channels, BLOCK, PARTS)
            sums = sums + (tl.where(some, total, 0.0),)  # where all are closed the mix is psi, whatever the weights
            mean += weights[t] * sums[t]
        for t in tl.static_range(TASKS):
            result = weights[t] * (sums[t] - mean)
            tl.store(d_beta + t * channels + at, result.to(d_beta.dtype.element_ty), mask=known)
