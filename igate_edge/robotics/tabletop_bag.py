"""A small bag with known labels: one tabletop scene seen by a moving camera. `python -m` this file OUT.mcap.

Needs the extra `train` (MuJoCo) to render and `bag` to write.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..contract import OutputSpec
from ..errors import DataError, IgateError
from ..frames import pillow
from ..metrics import make_metric
from ..runtime.frame import Camera
from .bag import BagWriter
from .messages import CameraInfoMessage, CompressedImageMessage, ImageMessage, image_message, to_array, topics_of
from .storage import Storage
from .typestore import deserialise

IMAGE, INFO, TRUTH = "/camera/image_raw/compressed", "/camera/camera_info", "/truth"
#: Label images of the generator and how a bag holds them.
LABELS = {"semseg": "mono8", "depth": "32FC1", "normals": "32FC3", "edges": "mono8"}
#: The first stamp; any will do, but one that a viewer shows as a date is easier to look at.
START_NS = 1_700_000_000 * 10**9
FRAME_ID = "camera_optical_frame"


def frames(seconds: float, rate: float, seed: int, size: tuple[int, int]) -> Iterator[dict[str, np.ndarray]]:
    """Images and labels as `training.tabletop.render` gives them, `rate` a second, of one scene."""
    from ..training.tabletop import TabletopScene

    scene, count = TabletopScene.sample(seed, 0), max(1, round(seconds * rate))
    for index in range(count):
        camera = _moved(scene.camera, index / max(rate * seconds, 1))
        yield replace(scene, camera=camera, grain_seed=scene.grain_seed + index).render(size)


def _moved(camera: Any, phase: float) -> Any:
    """The camera on its way around what it looks at: to both sides and up and down once while `phase` goes 0..1."""
    from ..training.tabletop_parts import turn

    goal = camera.pos + 0.8 * camera.rot[:, 2]
    swing = turn(2, 0.45 * np.sin(2 * np.pi * phase))
    offset = swing @ (camera.pos - goal) * (1 + 0.12 * np.sin(4 * np.pi * phase))
    return replace(camera, pos=goal + offset, rot=swing @ camera.rot)


def write_bag(
    path: Path, seconds: float = 20.0, rate: float = 10.0, seed: int = 7, size: tuple[int, int] = (96, 128)
) -> int:
    """Write images (PNG, so that nothing is lost), camera_info and labels with the same stamps; returns the frames.

    Raises UnavailableError (MuJoCo, Pillow, rosbags, disk) and DataError for a bag without a frame.
    """
    from ..training.raycast import intrinsics
    from ..training.tabletop import FOVY

    if not (seconds > 0 and rate > 0 and seconds * rate <= 100_000):
        raise DataError("no such bag", f"{seconds} s at {rate} frames a second", "give both above 0")
    lens = intrinsics(size, FOVY)
    # ROS counts from the middle of the first pixel, the generator from its corner.
    k = (lens["fx"], 0.0, lens["cx"] - 0.5, 0.0, lens["fy"], lens["cy"] - 0.5, 0.0, 0.0, 1.0)
    camera, count = Camera(size[1], size[0], k), 0
    with BagWriter(path, compress=True) as bag:
        for count, frame in enumerate(frames(seconds, rate, seed, size), 1):
            stamp = START_NS + round((count - 1) * 1e9 / rate)
            buffer = io.BytesIO()
            pillow().Image.fromarray(frame["image"]).save(buffer, "PNG")
            image = CompressedImageMessage("rgb8; png compressed bgr8", buffer.getvalue(), stamp, FRAME_ID)
            bag.write(IMAGE, image)
            bag.write(INFO, CameraInfoMessage(camera, stamp, FRAME_ID))
            for name, encoding in LABELS.items():
                bag.write(f"{TRUTH}/{name}", image_message(frame[name], encoding, stamp, FRAME_ID))
    return count


def score(truth: Path, results: Path, specs: Sequence[OutputSpec], prefix: str = "/camera/igate") -> dict[str, Any]:
    """Metrics of a results bag against the labels of the bag it was made from: task -> metric -> value.

    Frames are matched by stamp. Raises DataError when a label has no answer, or neither bag has any.
    """
    topics = {spec.name: f"{prefix}/{topic}" for spec, topic in zip(specs, topics_of(specs).values(), strict=True)}
    labels = {spec.name: f"{TRUTH}/{spec.target or spec.name}" for spec in specs if spec.dense}
    found = {}
    for spec in specs:
        if spec.name in labels:
            pairs = _paired(_images(truth, labels[spec.name]), _images(results, topics[spec.name]), spec.name)
            metric = make_metric(spec)
            for label, answer in pairs:
                metric.update(answer, label)
            found[spec.name] = metric.compute()
    return found


def _images(path: Path, topic: str) -> dict[int, np.ndarray]:
    losses: list[str] = []
    messages = (deserialise(record.data, record.kind) for record in Storage(path).read({topic}, losses))
    images = {one.stamp_ns: to_array(one) for one in messages if isinstance(one, ImageMessage)}
    if losses or not images:
        raise DataError(f"no whole set of images on {topic}", f"{path}: {'; '.join(losses)}", "make the bag again")
    return images


def _paired(
    labels: Mapping[int, np.ndarray], answers: Mapping[int, np.ndarray], name: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    if set(labels) != set(answers):
        evidence = f"{len(labels)} labels, {len(answers)} answers, {len(set(labels) & set(answers))} stamps in both"
        raise DataError(f"task {name!r}: answers and labels have other stamps", evidence, "answer the whole bag")
    return [(label, answers[stamp]) for stamp, label in labels.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="tabletop_bag", description=str(__doc__).splitlines()[0])
    parser.add_argument("bag", type=Path, help="the bag to write, or with --score the bag with the labels")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=10.0, help="frames a second")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--score", type=Path, metavar="RESULTS", help="compare a results bag with the labels")
    parser.add_argument("--bundle", type=Path, help="with --score: whose results they are")
    given = parser.parse_args(arguments)
    try:
        if given.score is None:
            count = write_bag(given.bag, given.seconds, given.rate, given.seed)
            print(f"{given.bag}: {count} frames, {given.bag.stat().st_size:,} bytes")
            return 0
        from ..bundle import Bundle

        specs = Bundle.read(given.bundle).tasks
        for name, values in score(given.bag, given.score, specs).items():
            spec = next(spec for spec in specs if spec.name == name)
            print(f"{name}: {spec.metric} {values[spec.metric]:.4f}")
    except IgateError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
