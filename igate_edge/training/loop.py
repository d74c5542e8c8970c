"""The training loop: one stage of the recipe, resumable at any step to the same loss curve.

A plain loop, not a Trainer: checkpoints stay free of pickle, and a batch depends on (seed, step) alone. The state of
torch's generator is not kept: a network with dropout resumes to another curve.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..errors import CheckFailed, DataError
from ..files import os_errors, write_atomic
from .balance import Balance
from .checkpoint import load_newest, pack, previous, save_rotating, unpack
from .step import Batch, Optim, Penalty, make_optimizers, set_lr, train_step
from .tasks import Task

BatchAt = Callable[[int], Batch]
Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Run:
    """One stage: its name, length, rates, and how often it writes a log line and a checkpoint (in steps).

    `key` names all settings and data that make the stage: a checkpoint of another key is not gone on with. `epoch`:
    steps that show every frame, 0 = not known.
    """

    stage: str
    steps: int
    optim: Optim = Optim()
    log_every: int = 20
    checkpoint_every: int = 200
    key: str = ""
    epoch: int = 0


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

    With `resume`, goes on from the newest whole checkpoint of this stage and key in `folder`. Raises CheckFailed when a
    loss or a weight is no longer finite, DataError when a task has no label in two epochs, CheckpointError when the
    checkpoint is another network's. Log lines count the steps since the last line that had no label of a task.
    """
    optimizers = make_optimizers(net, balance, run.optim)
    path, log = checkpoint_path(folder, run.stage), Log(folder / "log.jsonl")
    found = load_newest(path) if resume else None
    start, spent, macs = 0, 0.0, 0.0
    if found is not None and found[1].get("key", "") == run.key:
        unpack(found[0], net, balance, optimizers)
        start, spent, macs = int(found[1]["step"]), float(found[1]["seconds"]), float(found[1]["macs"])
    log.rewind(run.stage, start)
    net.train()
    if not macs and run.steps:
        macs = step_macs(net, batch_at(0))
    begun, labels = time.monotonic() - spent, Labels(net.tasks, 2 * run.epoch)
    for step in range(start, run.steps):
        set_lr(optimizers, step, run.steps, run.optim.warmup)
        batch, last = batch_at(step), step == run.steps - 1
        seen = train_step(net, batch, optimizers, balance, penalty and penalty(step / run.steps), step)
        labels.see(batch)
        keep = (step + 1) % run.checkpoint_every == 0 and not last
        if step % run.log_every == 0 or last or keep:
            values = _finite(run, step, seen)
        if step % run.log_every == 0 or last:
            log.add({"stage": run.stage, "step": step, **values, **labels.skipped(), **_hard(net)})
            if progress is not None:
                progress(run.stage, step + 1, run.steps, values)
        if keep or last:
            state = pack(net, balance, optimizers)
            _finite_state(run, step, state)
        if keep:
            meta = {"stage": run.stage, "step": step + 1, "seconds": time.monotonic() - begun, "macs": macs}
            save_rotating(path, state, meta | {"key": run.key})
    return Fitted(run.steps, time.monotonic() - begun, macs * run.steps)


class Labels:
    """Counts the steps whose batch holds no label of a task (cases M1: such a step teaches the task nothing)."""

    def __init__(self, tasks: Sequence[Task], window: int) -> None:
        self._tasks, self._window, self._steps, self._logged = tasks, window, 0, 0
        self._seen: dict[str, Any] = dict.fromkeys((task.name for task in tasks), 0)
        self._before, self._start = dict(self._seen), dict(self._seen)

    def see(self, batch: Batch) -> None:
        """Count one step's batch. Raises DataError at the end of a window in which a task never had a label."""
        self._steps += 1
        for task in self._tasks:
            if task.target in batch:  # added up where the batch is: no step waits for the device
                self._seen[task.name] = self._seen[task.name] + task.labelled(batch[task.target]).any()
        if self._window and self._steps % self._window == 0:
            self.check()

    def check(self) -> None:
        """Raise DataError when a task had no label since the last check."""
        never = [name for name, count in self._seen.items() if int(count) == int(self._start[name])]
        if never:
            evidence = f"{self._steps} steps, none with a valid label"
            raise DataError(f"no label of {', '.join(never)}", evidence, "label some frames, or leave the task out")
        self._start = dict(self._seen)

    def skipped(self) -> dict[str, dict[str, int]]:
        """Task -> steps without a label since the last call; empty when there were none."""
        steps, self._logged = self._steps - self._logged, self._steps
        found = {name: steps - int(count) + int(self._before[name]) for name, count in self._seen.items()}
        self._before = dict(self._seen)
        left_out = {name: count for name, count in found.items() if count}
        return {"skipped": left_out} if left_out else {}


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


def _finite_state(run: Run, step: int, state: Mapping[str, torch.Tensor]) -> None:
    """A finite loss may still leave weights that are not: look before a file replaces the last good one."""
    broken = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
    if broken:
        evidence = f"step {step} of {run.stage}: {len(broken)} tensors, first {broken[0]}"
        raise CheckFailed("the weights are not finite", evidence, "lower the learning rate, or look at the labels")
