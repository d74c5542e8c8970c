"""What travels through a robot's perception: a camera's frame in, a result with the same stamp out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Camera:
    """Intrinsics of a pinhole camera for images of `width` x `height` pixels, as sensor_msgs/CameraInfo has them.

    k: 3x3 row-major [fx 0 cx 0 fy cy 0 0 1], pixels. d: distortion of `model`, empty once rectified. r: rectifying
    rotation, 3x3 row-major. p: projection of the rectified image, 3x4 row-major.
    """

    width: int
    height: int
    k: tuple[float, ...]
    d: tuple[float, ...] = ()
    model: str = "plumb_bob"
    r: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    p: tuple[float, ...] = ()


@dataclass(frozen=True)
class Frame:
    """One image as a camera or a bag delivered it.

    data: the pixels; uint8 [H,W,3] where encoding is "rgb8", else as `runtime.encodings` says. stamp_ns: when it was
    taken, of whatever clock the source has (ROS time); kept, never replaced. received_ns: `time.monotonic_ns()` at
    arrival. age_ms: how old it already was at arrival, NaN where nobody can tell. source: the camera's name or topic.
    """

    data: np.ndarray
    encoding: str = "rgb8"
    stamp_ns: int = 0
    frame_id: str = ""
    source: str = ""
    camera: Camera | None = None
    received_ns: int = 0
    age_ms: float = float("nan")


@dataclass(frozen=True, repr=False)
class Result:
    """What the engine answered for one frame; stamp_ns, frame_id and source are the frame's own.

    image: uint8 RGB [H,W,3] that was looked at. outputs: task name -> decoded array at that size (see
    `runtime.postprocess.decode`). camera: intrinsics of `image`. ms: milliseconds of each stage: "age", "preprocess",
    "infer", "post/TASK", "publish", "end_to_end" (from arrival to published). sequence counts the frames that were
    answered. The arrays are the receiver's own unless `borrowed`: then they change with the next frame.
    """

    stamp_ns: int
    frame_id: str
    source: str
    sequence: int
    image: np.ndarray
    outputs: dict[str, np.ndarray]
    camera: Camera | None = None
    ms: dict[str, float] = field(default_factory=dict)
    borrowed: bool = False

    def __repr__(self) -> str:
        answers = [f"{name} {array.dtype} {list(array.shape)}" for name, array in self.outputs.items()]
        took = [f"{self.ms['end_to_end']:.1f} ms"] if "end_to_end" in self.ms else []
        header = f"stamp_ns={self.stamp_ns}", f"frame_id={self.frame_id!r}", f"sequence={self.sequence}"
        return f"Result({', '.join([*header, *answers, *took])})"
