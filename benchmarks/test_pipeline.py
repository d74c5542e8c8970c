"""What the pipeline itself costs: its hand-over to another thread, and its work on pixels at 640x480."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from igate_edge.runtime.encodings import ENCODINGS, to_rgb
from igate_edge.runtime.engine import Engine
from igate_edge.runtime.frame import Frame, Result
from igate_edge.runtime.pipeline import Pipeline
from igate_edge.runtime.postprocess import decode

#: Copying the frame, one hand-over and bookkeeping.
MEDIAN_MS, P99_MS = 0.5, 3.0
SIZE = (480, 640)
FRAMES = 300


def scene(rng: np.random.Generator) -> np.ndarray:
    """uint8 [480,640,3] with structure, as a camera's."""
    slope = np.linspace(20, 200, SIZE[1])[None, :, None] * np.linspace(0.5, 1, SIZE[0])[:, None, None]
    return np.clip(slope + rng.normal(0, 8, (*SIZE, 3)), 0, 255).astype(np.uint8)


def own_ms(result: Result) -> float:
    """From arrival to the sink, without the stages' work."""
    work = ("preprocess", "infer", *(name for name in result.ms if name.startswith("post/")))
    return result.ms["end_to_end"] - sum(result.ms[name] for name in work)


def test_hand_overs(
    example: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    seconds: Callable[..., float],
    figures: Callable[..., None],
) -> None:
    """Frame by frame, so that no frame waits for another: what is left over is the pipeline's own.

    The 99th percentile is other programs' as well: with `--clock cpu` it is shown and not held.
    """
    frame, own, infer = Frame(scene(np.random.default_rng(0)), stamp_ns=1), list[float](), list[float]()

    def sink(result: Result) -> None:
        own.append(own_ms(result))
        infer.append(result.ms["infer"])

    with Engine.open(example, cache_dir=tmp_path) as engine, Pipeline(engine, sink, mode="every") as pipeline:

        def one() -> None:
            pipeline.submit(frame)
            assert pipeline.drain(10)

        seconds(one, rounds=FRAMES)
        counts = pipeline.counts
    median, p99 = (float(value) for value in np.percentile(own, (50, 99)))
    figures(f"own {median:.2f} ms, p99 {p99:.2f} ms; inference {np.median(infer):.2f} ms", own_ms=own, infer_ms=infer)
    assert counts.answered == counts.received and not counts.errors
    assert median <= MEDIAN_MS
    assert p99 <= P99_MS or request.config.getoption("--clock") == "cpu"


def test_all_of_a_frame_but_its_inference(
    example: Path, tmp_path: Path, seconds: Callable[..., float], figures: Callable[..., None]
) -> None:
    """Preprocess, postprocess and hand-overs of all tasks, at the network's size and at the frame's."""
    frame = Frame(scene(np.random.default_rng(0)), stamp_ns=1)
    with Engine.open(example, cache_dir=tmp_path) as engine:
        for at in ("frame", "network"):
            rest: list[float] = []

            def sink(result: Result, rest: list[float] = rest) -> None:
                rest.append(result.ms["end_to_end"] - result.ms["infer"])

            with Pipeline(engine, sink, mode="every", at=at, borrowed=True) as pipeline:

                def one(pipeline: Pipeline = pipeline) -> None:
                    pipeline.submit(frame)
                    assert pipeline.drain(10)

                if at == "network":
                    seconds(one, rounds=FRAMES)
                else:
                    for _ in range(FRAMES // 3):
                        one()
            median, p99 = (float(value) for value in np.percentile(rest, (50, 99)))
            figures(
                f"at the {at}'s size: {median:.2f} ms, p99 {p99:.2f} ms beside inference", **{f"rest_{at}_ms": rest}
            )
    assert median <= 3.0, "all that a node does but inference, at the network's size"


@pytest.mark.parametrize(
    "encoding", [name for name in ENCODINGS if name not in ("rgb8", "8UC1", "16UC1", "uyvy", "yuyv")]
)
def test_conversion(encoding: str, seconds: Callable[..., float], figures: Callable[..., None]) -> None:
    kind, channels = ENCODINGS[encoding]
    shape = (SIZE[0] * 3 // 2, SIZE[1]) if channels == 0 else SIZE if channels == 1 else (*SIZE, channels)
    data = np.random.default_rng(0).integers(0, np.iinfo(kind).max, shape, kind)
    taken = seconds(lambda: to_rgb(Frame(data, encoding)), rounds=20)
    figures(f"{encoding}: {1e3 * taken:.2f} ms for {SIZE[1]}x{SIZE[0]}")
    assert 0 < taken < 0.05


def test_decoding(example: Path, seconds: Callable[..., float], figures: Callable[..., None]) -> None:
    from igate_edge.bundle import Bundle

    bundle = Bundle.read(example)
    raw = {spec.name: bundle.golden[f"float/{spec.name}"][0] for spec in bundle.tasks}
    taken = seconds(lambda: [decode(spec, raw[spec.name], SIZE) for spec in bundle.tasks], rounds=20)
    figures(f"all tasks at {SIZE[1]}x{SIZE[0]}: {1e3 * taken:.2f} ms")
    assert taken > 0
