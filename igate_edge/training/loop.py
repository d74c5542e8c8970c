"""The training loop: one stage of the recipe, resumable at any step to the same loss curve.

A plain loop, not a Trainer: checkpoints stay free of pickle, and a batch depends on (seed, step) alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..errors import CheckFailed
from ..files import os_errors, write_atomic
from .balance import Balance
from .checkpoint import load_newest, pack, previous, save_rotating, unpack
from .step import Batch, Optim, Penalty, make_optimizers, set_lr, train_step

BatchAt = Callable[[int], Batch]
Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Run:
    """One stage: its name, length, rates, and how often it writes a log line and a checkpoint (in steps)."""

    stage: str
    steps: int
    optim: Optim = Optim()
    log_every: int = 20
    checkpoint_every: int = 200


@dataclass(frozen=True)
class Fitted:
    """What a stage took: steps, seconds over all its sessions, multiply-accumulates forward and backward."""

    steps: int
    seconds: float
    macs: float


class Log:
    """`log.jsonl` of an output folder: one JSON object a line; lines after the step resumed from are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """Every whole line; a line cut by a kill is left out."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def rewind(self, stage: str, step: int) -> None:
        """Forget lines of `stage` at `step` or later."""
        kept = [row for row in self.lines() if row["stage"] != stage or row["step"] < step]
        write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def add(self, row: dict[str, Any]) -> None:
        with os_errors(self.path, "write"), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def fit(
    net: Any,
    batch_at: BatchAt,
    run: Run,
    balance: Balance,
    folder: Path,
    *,
    penalty: Callable[[float], Penalty] | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Fitted:
    """Train `net` in place for `run.steps` steps. `penalty`: share of the stage done (0..1) -> penalty of a net.

    With `resume`, goes on from the newest whole checkpoint of this stage in `folder`. Raises CheckFailed when the loss
    is no longer finite, CheckpointError when the checkpoint is another network's.
    """
    optimizers = make_optimizers(net, balance, run.optim)
    path, log = checkpoint_path(folder, run.stage), Log(folder / "log.jsonl")
    found = load_newest(path) if resume else None
    start, spent, macs = 0, 0.0, 0.0
    if found is not None:
        unpack(found[0], net, balance, optimizers)
        start, spent, macs = int(found[1]["step"]), float(found[1]["seconds"]), float(found[1]["macs"])
    log.rewind(run.stage, start)
    net.train()
    if not macs and run.steps:
        macs = step_macs(net, batch_at(0))
    begun = time.monotonic() - spent
    for step in range(start, run.steps):
        set_lr(optimizers, step, run.steps, run.optim.warmup)
        seen = train_step(net, batch_at(step), optimizers, balance, penalty and penalty(step / run.steps), step)
        if step % run.log_every == 0 or step == run.steps - 1:
            values = _finite(run, step, seen)
            log.add({"stage": run.stage, "step": step, **values, **_hard(net)})
            if progress is not None:
                progress(run.stage, step + 1, run.steps, values)
        if (step + 1) % run.checkpoint_every == 0 and step + 1 < run.steps:
            meta = {"stage": run.stage, "step": step + 1, "seconds": time.monotonic() - begun, "macs": macs}
            save_rotating(path, pack(net, balance, optimizers), meta)
    return Fitted(run.steps, time.monotonic() - begun, macs * run.steps)


def checkpoint_path(folder: Path, stage: str) -> Path:
    """Where a stage keeps what it needs to go on."""
    return folder / f"{stage}.checkpoint.safetensors"


def drop_checkpoints(folder: Path, stage: str) -> None:
    """Remove a finished stage's checkpoints: its result file replaces them."""
    path = checkpoint_path(folder, stage)
    for file in (path, previous(path)):
        file.unlink(missing_ok=True)


def step_macs(net: Any, batch: Batch) -> float:
    """Multiply-accumulates of one training step on this batch, forward and backward, as executed; `net` stays as is."""
    few = {key: value[:2] for key, value in batch.items()}
    copy = deepcopy(net)
    with FlopCounterMode(display=False) as counter:
        losses = list(copy.losses(few).values())
        torch.stack(losses).sum().backward()
    return counter.get_total_flops() / 2 * len(batch["image"]) / len(few["image"])


def _hard(net: Any) -> dict[str, Any]:
    return {"hard": net.hard_fractions()} if hasattr(net, "hard_fractions") else {}


def _finite(run: Run, step: int, seen: dict[str, torch.Tensor]) -> dict[str, float]:
    values = {name: float(value) for name, value in seen.items()}
    if not all(math.isfinite(value) for value in values.values()):
        evidence = f"step {step} of {run.stage}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items())
        raise CheckFailed("the loss is not finite", evidence, "lower the learning rate, or look at the labels")
    return values
