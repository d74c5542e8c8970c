"""Where frames come from: images, videos, a camera, a made-up camera, or a program that pushes them.

A source is an iterable of frames with `close`, which another thread may call: the iteration then ends. `owned = True`
says that nobody writes a frame's pixels any more, so a pipeline need not copy them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..contract import is_number
from ..engines.session import Closing
from ..errors import DataError, IgateError, InputError, UnavailableError
from ..files import as_path
from .camera import pinhole
from .encodings import MAX_PIXELS
from .frame import Camera, Frame
from .mailbox import Closed, Mailbox

#: Seconds that closing a camera waits for the frame in hand.
CLOSE_S = 1.0
#: A picture is at most so many seconds old, or its stamp is none of the system's clocks.
OLDEST_S = 60.0


class _Source(Closing, ABC):
    """What sources share: they are their own iterator, and end when they are closed."""

    owned = True

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._begun: float | None = None

    def __iter__(self) -> Iterator[Frame]:
        return self

    @abstractmethod
    def __next__(self) -> Frame: ...

    def close(self) -> None:
        """End the iteration, from any thread; closing twice is fine."""
        self._ended.set()

    def _pace(self, seconds: float) -> None:
        """Sleep until so long after the first call; raises StopIteration when closed meanwhile.

        The first one, since engines may be built between a source's making and its use.
        """
        if self._begun is None:
            self._begun = time.monotonic()
        if self._ended.wait(max(self._begun + seconds - time.monotonic(), 0.0)):
            raise StopIteration


class Folder(_Source):
    """Images of a folder (by name), of a pattern or one file, as rgb8; stamps are 1/rate_hz apart, from 1/rate_hz on.

    paced: as fast as a camera of that rate, else as fast as they are asked for. An unreadable image raises DataError;
    the next call goes on with the next image. Raises DataError at once for a missing path or an empty folder.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        rate_hz: float = 30.0,
        paced: bool = False,
        frame_id: str = "camera",
        camera: Camera | None = None,
    ) -> None:
        from ..frames import list_images, read_image

        super().__init__()
        self._files, self._read = list_images(as_path(path)), read_image
        self._period, self._paced = 1.0 / _rate(rate_hz), paced
        self._like = Frame(np.empty(0), "rgb8", 0, frame_id, str(path), camera)
        self._next = 0

    def __len__(self) -> int:
        return len(self._files)

    def __next__(self) -> Frame:
        if self._next >= len(self._files) or self._ended.is_set():
            raise StopIteration
        index, self._next = self._next, self._next + 1
        if self._paced:
            self._pace(index * self._period)
        pixels = self._read(self._files[index])
        stamp = round((index + 1) * self._period * 1e9)
        return replace(self._like, data=pixels, stamp_ns=stamp, received_ns=time.monotonic_ns())


class Video(_Source):
    """Frames of a video file as rgb8, by PyAV (extra `video`); stamps are the video's own times plus one nanosecond.

    live: the file is a camera (see `v4l2`): where its driver stamps by the system's clocks, as V4L2 does, `age_ms` is
    how long the frame lay in the driver and the stamp the time of day before that; else the time at which it came.
    Raises DataError (no file, no video in it, damage: then after the frames before it) and UnavailableError (no PyAV,
    no such camera).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,
        options: Mapping[str, str] | None = None,
        live: bool = False,
        frame_id: str = "camera",
        camera: Camera | None = None,
    ) -> None:
        super().__init__()
        try:
            import av
        except ModuleNotFoundError as error:
            what, other = ("this camera", "") if live else ("reading a video", ", or turn the video into images first")
            fix = f"pip install 'igate-edge[video]'{other}"
            raise UnavailableError(f"{what} needs PyAV", f"{path}: {error}", fix) from error
        self._path, self._live = str(as_path(path)), live
        self._failures = (av.error.FFmpegError, OSError, UnicodeEncodeError)
        self._like = Frame(np.empty(0), "rgb8", 0, frame_id, self._path, camera)
        self._lock = threading.Lock()
        try:
            self._file: Any = av.open(self._path, format=format, options=dict(options or {}))
            if not self._file.streams.video:
                self._file.close()
                raise DataError("the file holds no video", self._path, "pass a file with a video stream")
        except self._failures as error:
            raise self._damaged(error) from error
        self._frames = self._file.decode(video=0)

    def __next__(self) -> Frame:
        with self._lock:  # the file is not closed while a frame is decoded
            if self._ended.is_set():
                raise StopIteration
            try:
                picture = next(self._frames)
                pixels = picture.to_ndarray(format="rgb24")
            except self._failures as error:
                self._ended.set()
                raise self._damaged(error) from error
        time_base, age = picture.time_base or 0, math.nan
        if self._live:
            if picture.pts is not None:
                age = _age_ms(float(picture.pts * time_base))
            stamp = time.time_ns() - (0 if math.isnan(age) else round(age * 1e6))
        else:
            stamp = round((picture.pts or 0) * time_base * 10**9) + 1
        return replace(self._like, data=pixels, stamp_ns=stamp, received_ns=time.monotonic_ns(), age_ms=age)

    def _damaged(self, error: Exception) -> IgateError:
        if self._live:
            fix = "look at its cable, and at `v4l2-ctl --list-devices`"
            return UnavailableError("the camera cannot be read", f"{self._path}: {error}", fix)
        return DataError("the video cannot be read", f"{self._path}: {error}", "check the file with a video player")

    def close(self) -> None:
        """End after the frame that is being decoded, and close the file; a camera that hangs is left open."""
        self._ended.set()
        if self._lock.acquire(timeout=CLOSE_S):
            try:
                self._file.close()
            finally:
                self._lock.release()


class Synthetic(_Source):
    """A camera that needs no hardware: a slope of grey with a moving square, at `rate_hz`, with the faults of a camera.

    frames: how many, None = endless. jitter_ms: standard deviation of a frame's delay after its stamp. drop_share: of
    frames (0..1) that never arrive. paced: in real time, else as fast as they are asked for. seed: same seed, same
    pixels, delays and drops. Stamps begin at `stamp_ns` and are whole periods apart; a lost frame leaves its gap.

    >>> [frame.stamp_ns for frame in Synthetic(8, 6, rate_hz=100, frames=2, paced=False)]
    [1000000000, 1010000000]
    """

    def __init__(
        self,
        width: int = 640,
        height: int = 480,
        *,
        rate_hz: float = 30.0,
        frames: int | None = None,
        jitter_ms: float = 0.0,
        drop_share: float = 0.0,
        seed: int = 0,
        paced: bool = True,
        stamp_ns: int = 1_000_000_000,
        frame_id: str = "camera",
    ) -> None:
        super().__init__()
        good = is_number(jitter_ms) and is_number(drop_share) and jitter_ms >= 0 and 0 <= drop_share < 1
        for count in (width, height, seed, stamp_ns, 0 if frames is None else frames):
            good = good and type(count) is int and count >= 0
        if not good or not 0 < width * height <= MAX_PIXELS:
            evidence = f"{width!r:.20}x{height!r:.20}, frames {frames!r:.20}, jitter {jitter_ms!r:.20} ms"
            evidence += f", drops {drop_share!r:.20}, seed {seed!r:.20}, stamp {stamp_ns!r:.20}"
            fix = f"give 1 to {MAX_PIXELS:,} pixels, whole numbers, jitter from 0, drops from 0 to below 1"
            raise InputError("not a camera", evidence, fix)
        self._random = np.random.default_rng(seed)
        self._period_ns, self._first, self._paced = round(1e9 / _rate(rate_hz)), stamp_ns, paced
        self._jitter_ms, self._drop_share = jitter_ms, drop_share
        slope = np.linspace(40, 200, width)[None, :, None] * np.linspace(0.6, 1.0, height)[:, None, None]
        self._scene = np.clip(slope + self._random.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
        self._like = Frame(self._scene, "rgb8", 0, frame_id, "synthetic", pinhole(width, height))
        self._numbers = itertools.count() if frames is None else iter(range(frames))

    def __next__(self) -> Frame:
        for number in self._numbers:
            late_ms = abs(self._random.normal(0, self._jitter_ms)) if self._jitter_ms else 0.0
            if self._ended.is_set():
                break
            if self._drop_share and self._random.random() < self._drop_share:
                continue
            if self._paced:
                self._pace(number * self._period_ns / 1e9 + late_ms / 1e3)
            stamp, now = self._first + number * self._period_ns, time.monotonic_ns()
            return replace(self._like, data=self.picture(number), stamp_ns=stamp, received_ns=now, age_ms=late_ms)
        raise StopIteration

    def picture(self, number: int) -> np.ndarray:
        """The pixels of frame `number`, uint8 RGB: what a test compares with."""
        pixels = self._scene.copy()
        height, width = pixels.shape[:2]
        side = max(1, min(height, width) // 4)
        left, top = (number * 7) % max(1, width - side), (number * 5) % max(1, height - side)
        pixels[top : top + side, left : left + side] = (220, 60, number % 256)
        return pixels


class Push(_Source):
    """Frames that a callback pushes, for a loop that runs `pipeline.run(source)`; the newest one wins.

    Where no loop is wanted, call `Pipeline.submit` instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self._box: Mailbox[Frame] = Mailbox()
        self._replaced = 0

    @property
    def replaced(self) -> int:
        """Frames that a newer one replaced before they were asked for."""
        return self._replaced

    def push(self, frame: Frame, *, owned: bool = False) -> bool:
        """Hand in a frame, copied unless `owned`; False once the source is closed. Never waits."""
        if not isinstance(frame, Frame):
            raise InputError("not a frame", f"got {frame!r:.60}", "push a runtime.frame.Frame")
        try:
            pixels = frame.data if owned else np.array(frame.data, order="C")
            if self._box.put(replace(frame, data=pixels)) is not None:
                self._replaced += 1
        except Closed:
            return False
        return True

    def __next__(self) -> Frame:
        try:
            return self._box.take()
        except Closed:
            raise StopIteration from None

    def close(self) -> None:
        super().close()
        self._box.close()


class Capture(_Source):
    """A camera by OpenCV: a device's number, or a GStreamer pipeline of `sources_gstreamer`; bgr8 frames.

    Stamps are the time of day at which a frame was fetched, and its age is unknown. Not run on a device. OpenCV of the
    package index has no GStreamer: on a Jetson use the system's python3-opencv. Raises UnavailableError (no OpenCV, no
    camera).
    """

    def __init__(self, device: int | str, *, frame_id: str = "camera", camera: Camera | None = None) -> None:
        super().__init__()
        try:
            import cv2
        except ImportError as error:
            fix = "apt install python3-opencv, and make the environment with --system-site-packages"
            raise UnavailableError("this camera needs OpenCV", str(error), fix) from error
        self._like = Frame(np.empty(0), "bgr8", 0, frame_id, str(device), camera)
        self._lock = threading.Lock()
        how = cv2.CAP_GSTREAMER if isinstance(device, str) else cv2.CAP_ANY
        self._camera: Any = cv2.VideoCapture(device, how)
        if not self._camera.isOpened():
            fix = "try the pipeline with gst-launch-1.0; `cv2.getBuildInformation()` says whether GStreamer is in it"
            raise UnavailableError("the camera cannot be opened", f"{device}", fix)

    def __next__(self) -> Frame:
        with self._lock:
            if self._ended.is_set():
                raise StopIteration
            good, pixels = self._camera.read()
        if not good:
            fix = "look at its cable and its driver"
            raise UnavailableError("the camera gave no frame", str(self._like.source), fix)
        return replace(self._like, data=pixels, stamp_ns=time.time_ns(), received_ns=time.monotonic_ns())

    def close(self) -> None:
        """End after the frame that is being fetched, and free the camera; one that hangs is left open."""
        self._ended.set()
        if self._lock.acquire(timeout=CLOSE_S):
            try:
                with contextlib.suppress(Exception):
                    self._camera.release()
            finally:
                self._lock.release()


def _age_ms(stamp_s: float) -> float:
    """Milliseconds since a stamp in seconds of the monotonic clock (V4L2's usual one) or of the day; NaN for others."""
    for now in (time.monotonic(), time.time()):
        if 0 <= now - stamp_s <= OLDEST_S:
            return (now - stamp_s) * 1e3
    return math.nan


def _rate(rate_hz: float) -> float:
    if not is_number(rate_hz) or not 1e-6 <= rate_hz < 1e6:
        raise InputError("not a rate", f"{rate_hz!r:.40} frames a second", "give a number from 0.000001 to a million")
    return float(rate_hz)
