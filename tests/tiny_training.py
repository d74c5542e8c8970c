"""Training on tiny frames, and a training step that dies: what the tests of training share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from igate_edge.training import loop
from igate_edge.training.config import TrainConfig
from igate_edge.training.loop import Log
from igate_edge.training.source import Source, from_arrays
from igate_edge.training.step import train_step

TINY = TrainConfig(
    tasks=("semseg", "depth"),
    width=4,
    granule=1,
    size=(32, 32),
    batch=4,
    plain_steps=6,
    fork_steps=3,
    search_steps=30,
    final_steps=5,
    head_width=4,
    balance="gradnorm",
    log_every=1,
    checkpoint_every=2,
)
AVAILABLE = {"semseg": ("floor", "box", "ball"), "depth": (), "normals": ()}


def arrays(count: int, seed: int) -> dict[str, np.ndarray]:
    """Frames whose labels can be read off the colour."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    normals = np.zeros((count, 32, 32, 3), np.int8)
    normals[..., 2] = -127
    return {
        "image": image,
        "semseg": (image[..., 0] // 86).astype(np.uint8),
        "depth": (0.5 + image[..., 1] / 100).astype(np.float16),
        "normals": normals,
    }


def source(config: TrainConfig = TINY) -> Source:
    names = config.tasks or tuple(AVAILABLE)
    train, val = ({k: v for k, v in arrays(n, n).items() if k in ("image", *names)} for n in (16, 8))
    return from_arrays(train, val, {name: AVAILABLE[name] for name in names}, config)


class Killed(BaseException):
    """Stands for a signal: nothing in the product may catch it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Make the `count`-th training step from now on die before it starts."""
    left = [count]
    step: Callable[..., object] = train_step

    def dying(*args: object, **kwargs: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", dying)


def curve(folder: Path) -> list[tuple[str, int, float]]:
    return [(row["stage"], row["step"], row["total"]) for row in Log(folder / "log.jsonl").lines()]
