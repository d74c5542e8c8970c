"""Where frames come from: files, videos, a made-up camera, a callback; and cameras' settings as text."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from robot import PATIENCE, Echo, numbered

from igate_edge.errors import DataError, InputError, UnavailableError
from igate_edge.runtime import sources_gstreamer
from igate_edge.runtime.frame import Result
from igate_edge.runtime.pipeline import Pipeline
from igate_edge.runtime.sources import OLDEST_S, Capture, Folder, Push, Synthetic, Video

image = pytest.importorskip("PIL.Image", reason="NOT TESTED: Pillow is missing, pip install 'igate-edge[images]'")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (2, 0, 1):
        image.fromarray(np.full((4, 6, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_folder(folder: Path) -> None:
    with Folder(folder, rate_hz=10, frame_id="optical") as source:
        frames = list(source)
    assert len(source) == 3 and [int(frame.data.flat[0]) for frame in frames] == [0, 1, 2]
    assert [frame.stamp_ns for frame in frames] == [100_000_000, 200_000_000, 300_000_000]
    assert {(f.encoding, f.frame_id, f.source, f.data.shape) for f in frames} == {
        ("rgb8", "optical", str(folder), (4, 6, 3))
    }


def test_a_broken_image_is_named_and_the_next_one_comes(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"\x89PNG broken")
    source = Folder(folder)
    assert next(source).data.flat[0] == 0
    with pytest.raises(DataError, match=r"corrupt image .*1\.png"):
        next(source)
    assert [int(frame.data.flat[0]) for frame in source] == [2]
    for wrong in (folder / "none", folder / "*.jpg"):
        with pytest.raises(DataError):
            Folder(wrong)
    with pytest.raises(InputError, match="not a rate"):
        Folder(folder, rate_hz=0)


def test_a_closed_source_ends_even_while_it_waits(folder: Path) -> None:
    for source in (Folder(folder, rate_hz=0.001, paced=True), Synthetic(8, 6, rate_hz=0.001), Push()):
        if not isinstance(source, Push):
            next(source)
        ended = threading.Event()
        thread = threading.Thread(daemon=True, target=lambda source=source, ended=ended: (list(source), ended.set()))
        thread.start()
        source.close()
        assert ended.wait(PATIENCE)
        source.close()
        assert list(source) == []


@pytest.fixture
def video(tmp_path: Path) -> Path:
    av = pytest.importorskip("av", reason="NOT TESTED: PyAV is missing, pip install 'igate-edge[video]'")
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(10):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, np.uint8), format="rgb24")
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    return path


def test_video(video: Path) -> None:
    with Video(video) as source:
        frames = list(source)
    assert len(frames) == 10 and all(frame.data.shape == (48, 64, 3) for frame in frames)
    assert np.diff([frame.stamp_ns for frame in frames]).tolist() == [40_000_000] * 9 and frames[0].stamp_ns > 0
    assert all(abs(float(frame.data.mean()) - 20 * number) < 6 for number, frame in enumerate(frames))
    assert not np.shares_memory(frames[0].data, frames[1].data)


def test_what_is_no_video_and_one_that_is_cut(video: Path, tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_bytes(b"no video at all")
    for wrong in ("b.mp4", "none.mp4"):
        with pytest.raises(DataError, match="the video cannot be read"):
            Video(tmp_path / wrong)
    source = Video(video)
    next(source)
    source.close()
    assert list(source) == []


def test_a_live_video_has_the_time_of_day_and_a_file_has_its_own(video: Path) -> None:
    before, begun = time.time_ns(), time.monotonic_ns()
    with Video(video, live=True) as source:
        stamps = [(frame.stamp_ns, frame.received_ns) for frame in source]
    assert [stamp for stamp, _ in stamps] == sorted(stamp for stamp, _ in stamps)
    # Where the machine was started less than a minute ago, the file's times pass for the clock's: older, never newer.
    assert before - OLDEST_S * 1e9 <= stamps[0][0] and stamps[-1][0] <= time.time_ns()
    assert begun <= stamps[0][1] <= stamps[-1][1] <= time.monotonic_ns()
    with Video(video) as source:
        frames = list(source)
    assert all(math.isnan(frame.age_ms) for frame in frames) and frames[-1].stamp_ns < 1_000_000_000


class _Driver:
    """PyAV before a camera: pictures of given stamps, in microseconds as the V4L2 reader of FFmpeg gives them."""

    def __init__(self, *stamps_s: float | None) -> None:
        self.error = SimpleNamespace(FFmpegError=ValueError)
        self.streams = SimpleNamespace(video=["a camera"])
        self.stamps, self.asked = stamps_s, {}

    def open(self, name: str, **asked: object) -> _Driver:
        self.asked = {"name": name, **asked}
        return self

    def decode(self, video: int) -> Iterator[SimpleNamespace]:
        for stamp in self.stamps:
            pts = None if stamp is None else round(stamp * 1e6)
            pixels = np.zeros((4, 6, 3), np.uint8)
            yield SimpleNamespace(pts=pts, time_base=Fraction(1, 10**6), to_ndarray=lambda format, p=pixels: p)

    def close(self) -> None: ...


def test_a_frame_that_lay_in_the_driver_is_as_old_as_its_stamp_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """V4L2 stamps by the monotonic clock, or by the time of day where a driver is told to; other stamps say nothing."""
    here, day = time.monotonic(), time.time()
    apart = 0.05 + time.monotonic() - here
    odd = (here + 30, here - OLDEST_S - 1, day + 30, day - OLDEST_S - 1, None)
    driver = _Driver(here - 0.25, day - 0.5, *odd)
    monkeypatch.setitem(sys.modules, "av", driver)
    with Video(**sources_gstreamer.v4l2()) as source:
        frames = list(source)
    late_ms = (time.monotonic() - here) * 1e3 + 50  # what this test itself took; the two clocks may drift
    assert driver.asked["name"] == "/dev/video0" and driver.asked["format"] == "v4l2"
    for frame, age in zip(frames, (250.0, 500.0), strict=False):
        assert age - 50 <= frame.age_ms <= age + late_ms
        assert abs(frame.stamp_ns / 1e9 - (day - age / 1e3)) < apart, "the stamp is when the picture was taken"
    assert len(frames) == 7 and all(math.isnan(frame.age_ms) for frame in frames[2:])
    assert all(day <= frame.stamp_ns / 1e9 <= time.time() for frame in frames[2:])


def test_a_pipeline_does_not_publish_what_lay_in_the_driver_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    here, seen = time.monotonic(), list[Result]()
    monkeypatch.setitem(sys.modules, "av", _Driver(here - 30.0, here))
    with Pipeline(Echo(), seen.append, max_age_ms=20_000.0) as pipeline:
        source = Video(**sources_gstreamer.v4l2())
        assert pipeline.submit(next(source)) and pipeline.drain(PATIENCE)
        assert pipeline.counts.stale == 1 and seen == []
        assert pipeline.submit(next(source)) and pipeline.drain(PATIENCE)
    assert len(seen) == 1 and 0 <= seen[0].ms["age"] < 20_000


class _Opencv:
    """cv2 with one camera that shows red: blue, green, red in memory, as OpenCV has them."""

    CAP_GSTREAMER, CAP_ANY = 1800, 0

    def __init__(self, opens: bool = True) -> None:
        self.opens, self.asked, self.left, self.released = opens, list[object](), 2, 0

    def VideoCapture(self, device: object, how: int) -> _Opencv:  # noqa: N802  (OpenCV's own name)
        self.asked += [device, how]
        return self

    def isOpened(self) -> bool:  # noqa: N802
        return self.opens

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return (True, np.full((4, 6, 3), (0, 0, 255), np.uint8)) if self.left >= 0 else (False, None)

    def release(self) -> None:
        self.released += 1


def test_a_red_scene_before_opencv_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    opencv, seen = _Opencv(), list[Result]()
    monkeypatch.setitem(sys.modules, "cv2", opencv)
    before, begun = time.time_ns(), time.monotonic_ns()
    source = Capture(0, frame_id="optical")
    with Pipeline(Echo(), seen.append, mode="every") as pipeline:
        frames = [next(source), next(source)]
        assert all(pipeline.submit(frame) for frame in frames) and pipeline.drain(PATIENCE)
        with pytest.raises(UnavailableError, match="the camera gave no frame"):
            next(source)
    assert [(result.image == (255, 0, 0)).all() for result in seen] == [True, True]
    assert before <= frames[0].stamp_ns <= frames[1].stamp_ns <= time.time_ns()
    assert begun <= frames[0].received_ns <= frames[1].received_ns <= time.monotonic_ns()
    assert {(f.encoding, f.frame_id, f.source) for f in frames} == {("bgr8", "optical", "0")}
    source.close()
    assert opencv.released == 1 and list(source) == [] and opencv.asked == [0, opencv.CAP_ANY]


def test_a_pipeline_text_is_opened_by_gstreamer(monkeypatch: pytest.MonkeyPatch) -> None:
    opencv = _Opencv(opens=False)
    monkeypatch.setitem(sys.modules, "cv2", opencv)
    with pytest.raises(UnavailableError, match="the camera cannot be opened: nvarguscamerasrc"):
        Capture(sources_gstreamer.csi())
    assert opencv.asked == [sources_gstreamer.csi(), opencv.CAP_GSTREAMER]


def test_video_without_pyav_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UnavailableError, match=r"^this camera needs PyAV: .*igate-edge\[video\]'\.$"):
        Video("/dev/video0", live=True)
    with pytest.raises(UnavailableError, match=r"needs PyAV: .*igate-edge\[video\]"):
        Video(tmp_path / "a.mp4")


def test_synthetic_is_the_same_for_the_same_seed() -> None:
    def frames(seed: int) -> list[tuple[int, float, bytes]]:
        source = Synthetic(32, 24, frames=30, jitter_ms=3, drop_share=0.3, seed=seed, paced=False)
        return [(frame.stamp_ns, frame.age_ms, frame.data.tobytes()) for frame in source]

    one, again, other = frames(1), frames(1), frames(2)
    assert one == again and one != other and 10 < len(one) < 30
    period = round(1e9 / 30)
    numbers = [(stamp - 1_000_000_000) / period for stamp, _, _ in one]
    assert all(number == int(number) for number in numbers) and len(set(numbers)) == len(one)
    assert min(age for _, age, _ in one) >= 0 and np.std([age for _, age, _ in one]) > 0.5


def test_synthetic_keeps_its_rate_and_its_pixels() -> None:
    begun = time.monotonic()
    source = Synthetic(32, 24, rate_hz=100, frames=6)
    frames = list(source)
    assert time.monotonic() - begun >= 0.05  # 5 periods, however slow the machine
    for number, frame in enumerate(frames):
        assert np.array_equal(frame.data, source.picture(number)) and frame.camera is not None
    kept = frames[1].data.copy()
    frames[0].data[...] = 0
    assert np.array_equal(frames[1].data, kept), "each frame has pixels of its own"
    for wrong in ({"width": 0}, {"drop_share": 1.0}, {"jitter_ms": -1}):
        with pytest.raises(InputError, match="not a camera"):
            Synthetic(**wrong)  # type: ignore[arg-type]


def test_a_camera_begins_with_its_first_frame_however_long_the_engine_took(folder: Path) -> None:
    for source in (Synthetic(8, 6, rate_hz=20), Folder(folder, rate_hz=20, paced=True)):
        time.sleep(0.15)
        begun = time.monotonic()
        for _ in range(3):
            next(source)
        assert time.monotonic() - begun >= 0.095, "frames that were due before anybody asked came all at once"


def test_push_keeps_the_newest_and_copies() -> None:
    source, buffer = Push(), numbered(1)
    assert source.push(buffer)
    buffer.data[...] = 9
    assert source.push(numbered(2)) and source.push(buffer) and source.replaced == 2
    buffer.data[...] = 0
    assert next(source).data.flat[0] == 9
    source.close()
    assert not source.push(numbered(3)) and list(source) == []


def test_camera_settings_are_pipelines() -> None:
    assert sources_gstreamer.csi(1, 1920, 1080, 60, flip=2) == (
        "nvarguscamerasrc sensor-id=1 ! "
        "video/x-raw(memory:NVMM),format=NV12,width=1920,height=1080,framerate=60/1 ! "
        "nvvidconv flip-method=2 ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR ! "
        "appsink drop=true max-buffers=1 sync=false"
    )
    assert sources_gstreamer.usb("/dev/video2", pixels="mjpeg") == (
        "v4l2src device=/dev/video2 ! image/jpeg,width=640,height=480,framerate=30/1 ! jpegdec ! "
        "videoconvert ! video/x-raw,format=BGR ! appsink drop=true max-buffers=1 sync=false"
    )
    assert "jpegdec" not in sources_gstreamer.usb() and "format=YUY2" in sources_gstreamer.usb()
    assert sources_gstreamer.rtsp("rtsp://10.0.0.5:554/a?b=1", hardware=False) == (
        'rtspsrc location="rtsp://10.0.0.5:554/a?b=1" latency=50 drop-on-latency=true ! rtph264depay ! h264parse ! '
        "avdec_h264 ! videoconvert ! video/x-raw,format=BGR ! appsink drop=true max-buffers=1 sync=false"
    )
    assert "nvv4l2decoder ! nvvidconv" in sources_gstreamer.rtsp("rtsp://cam/1")
    settings = sources_gstreamer.v4l2("/dev/v4l/by-id/usb-cam_1-video-index0", 1280, 720, 15, "mjpeg")
    assert settings["options"] == {"video_size": "1280x720", "framerate": "15", "input_format": "mjpeg"}
    assert settings["format"] == "v4l2" and settings["live"]


def test_text_that_would_be_read_as_more_pipeline_is_refused() -> None:
    for device in ("/dev/video0 ! filesink location=/etc/x", "video0", "/dev/../etc/passwd", 3):
        with pytest.raises(InputError, match="not a camera's device"):
            sources_gstreamer.usb(device)  # type: ignore[arg-type]
    for url in ('rtsp://a" ! filesink', "http://a/b", "rtsp://a b", None):
        with pytest.raises(InputError, match="not an address of a camera"):
            sources_gstreamer.rtsp(url)  # type: ignore[arg-type]
    for call, words in (
        (lambda: sources_gstreamer.csi(-1), "sensor"),
        (lambda: sources_gstreamer.csi(width=0), "width"),
        (lambda: sources_gstreamer.usb(rate_hz=2.5), "rate_hz"),  # type: ignore[arg-type]
        (lambda: sources_gstreamer.usb(pixels="rgb"), "pixel format"),
        (lambda: sources_gstreamer.csi(flip=8), "flip"),
    ):
        with pytest.raises(InputError, match=f"not a camera's {words}"):
            call()


def test_a_camera_without_opencv_or_without_a_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(UnavailableError, match="this camera needs OpenCV"):
        Capture(0)


@pytest.mark.parametrize(
    "settings",
    [
        {"width": 10**9, "height": 10**9},
        {"width": 2.5},
        {"height": None},
        {"frames": "x"},
        {"frames": -1},
        {"seed": -1},
        {"jitter_ms": float("inf")},
        {"drop_share": float("nan")},
        {"rate_hz": None},
        {"rate_hz": 1e-300},
        {"stamp_ns": 1.5},
    ],
)
def test_what_is_no_camera_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InputError, match="not a (camera|rate)"):
        Synthetic(**settings)  # type: ignore[arg-type]


def test_paths_and_frames_that_are_none() -> None:
    with pytest.raises(InputError, match="not a path"):
        Folder("a\0b")
    with pytest.raises(InputError, match="not a path"):
        Folder(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not a frame"):
        Push().push(None)  # type: ignore[arg-type]


def test_a_camera_that_is_not_there_is_no_wrong_use() -> None:
    pytest.importorskip("av", reason="NOT TESTED: a camera by PyAV needs the extra video")
    with pytest.raises(UnavailableError, match="the camera cannot be read: /dev/video63"):
        Video(**sources_gstreamer.v4l2("/dev/video63"))
