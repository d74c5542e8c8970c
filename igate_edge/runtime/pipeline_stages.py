"""What a pipeline's stages do to one frame: RGB and the network's input, decoded answers. No threads here."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..contract import OutputSpec, Preprocess
from . import encodings
from .camera import cropped, scaled
from .frame import Camera, Frame, Result
from .postprocess import decode, invalid_depth
from .preprocess import Fit, fit_of, resize_frame, to_canvas, to_picture

MODES = ("latest", "every")
#: A frame that claims to be older than this, or younger than nothing, has stamps of another clock: its age is unknown.
MAX_AGE_MS = 3_600_000.0


@dataclass(eq=False)
class Job:
    """A frame on its way; every stage adds its part."""

    frame: Frame
    arrived_ns: int
    ms: dict[str, float] = field(default_factory=dict)
    fit: Fit | None = None
    image: np.ndarray | None = None
    camera: Camera | None = None
    input: np.ndarray | None = None
    raw: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    buffers: dict[str, np.ndarray] | None = None
    result: Result | None = None


class Look:
    """How a pipeline looks at frames, and the arrays that borrowed results take turns in.

    shared: a recorder keeps the arrays as well, so nobody may write them.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        fit: str,
        at: str,
        depth_range: tuple[float, float] | None,
        borrowed: bool,
        shared: bool,
    ) -> None:
        self.preprocess, self.fit, self.small = preprocess, fit, at == "network"
        self.depth_range, self.borrowed, self.shared = depth_range, borrowed, shared
        self._free: deque[dict[str, np.ndarray]] = deque()

    def lend(self, job: Job) -> dict[str, np.ndarray]:
        """Arrays by task of a result that was published or dropped; none at first."""
        if not self.borrowed:
            return {}
        try:
            job.buffers = self._free.pop()
        except IndexError:
            job.buffers = {}
        return job.buffers

    def give_back(self, job: Job) -> None:
        """Nobody reads the job's answers any more. As many sets exist as results can be under way: three."""
        buffers, job.buffers = job.buffers, None
        if buffers is not None:
            self._free.append(buffers)


def known_age(frame: Frame) -> float:
    """Milliseconds between the picture and its arrival; NaN where stamps and clock do not belong together."""
    age = frame.age_ms
    return age if 0 <= age <= MAX_AGE_MS else math.nan


def age_ms(job: Job) -> float:
    """How old the picture is now, as far as it is known."""
    here = (time.monotonic_ns() - job.arrived_ns) / 1e6
    age = known_age(job.frame)
    return here if math.isnan(age) else here + age


def preprocess_stage(job: Job, look: Look) -> str:
    """Set image, input and camera; a sentence when the camera's intrinsics are those of other images."""
    start = time.perf_counter()
    frame = job.frame
    rgb = encodings.to_rgb(frame)
    size = rgb.shape[:2]
    job.fit = fit = fit_of(look.fit, (size[0], size[1]), look.preprocess)
    top, left, height, width = fit.window
    window = rgb[top : top + height, left : left + width]
    planes = resize_frame(window, fit.place[2:])
    job.input = to_canvas(planes, fit, look.preprocess)
    job.image = to_picture(planes) if look.small else np.ascontiguousarray(window)
    sentence = ""
    if (camera := frame.camera) is not None:
        if (camera.height, camera.width) == size:
            camera = camera if (height, width) == size else cropped(camera, left, top, width, height)
            job.camera = scaled(camera, fit.place[3], fit.place[2]) if look.small else camera
        else:
            sentence = f"intrinsics of {camera.width}x{camera.height} came with a frame of {size[1]}x{size[0]}"
    age = known_age(frame)
    job.ms = {} if math.isnan(age) else {"age": age}
    job.ms["preprocess"] = (time.perf_counter() - start) * 1e3
    if look.shared:
        job.image = _read_only(job.image)
    return sentence


def post_stage(job: Job, look: Look, tasks: Sequence[OutputSpec]) -> None:
    """Set the decoded answers of `tasks`."""
    assert job.fit is not None and job.image is not None
    size, part = (job.image.shape[0], job.image.shape[1]), job.fit.part
    buffers = look.lend(job)
    for spec in tasks:
        start = time.perf_counter()
        answer = decode(spec, job.raw[spec.name], size, part, buffers.get(spec.name))
        if look.borrowed:
            buffers[spec.name] = answer
        if spec.kind == "depth" and look.depth_range is not None:
            invalid_depth(answer, *look.depth_range)
        job.outputs[spec.name] = _read_only(answer) if look.shared else answer
        job.ms[f"post/{spec.name}"] = (time.perf_counter() - start) * 1e3
    job.raw = {}


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
