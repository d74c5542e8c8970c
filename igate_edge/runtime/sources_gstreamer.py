"""Camera settings as text: GStreamer pipelines for `Capture` and V4L2 options for `Video`. Not run on a device."""

from __future__ import annotations

import re
from typing import Any

from ..errors import InputError

#: The end of every pipeline: one frame waits, the newest; nobody waits for a clock.
SINK = "appsink drop=true max-buffers=1 sync=false"
_DEVICE = re.compile(r"/dev/[A-Za-z0-9_./-]+")
_URL = re.compile(r"rtsps?://[A-Za-z0-9_.:/@%?&=~+,-]+")
#: V4L2 pixel formats: GStreamer's caps, FFmpeg's name.
FORMATS = {
    "yuyv": ("video/x-raw,format=YUY2", "yuyv422"),
    "uyvy": ("video/x-raw,format=UYVY", "uyvy422"),
    "nv12": ("video/x-raw,format=NV12", "nv12"),
    "mjpeg": ("image/jpeg", "mjpeg"),
}


def csi(sensor: int = 0, width: int = 1280, height: int = 720, rate_hz: int = 30, flip: int = 0) -> str:
    """A Jetson's CSI camera: scaled and converted by the video hardware, BGR at the end. flip: nvvidconv's 0..7.

    >>> csi(0, 640, 480).split(" ! ")[0]
    'nvarguscamerasrc sensor-id=0'
    """
    _whole(sensor=(sensor, 0, 63), width=(width, 1, 16384), height=(height, 1, 16384), rate_hz=(rate_hz, 1, 1000))
    _whole(flip=(flip, 0, 7))
    return " ! ".join(
        [
            f"nvarguscamerasrc sensor-id={sensor}",
            f"video/x-raw(memory:NVMM),format=NV12,width={width},height={height},framerate={rate_hz}/1",
            f"nvvidconv flip-method={flip}",
            "video/x-raw,format=BGRx",
            "videoconvert",
            "video/x-raw,format=BGR",
            SINK,
        ]
    )


def usb(
    device: str = "/dev/video0", width: int = 640, height: int = 480, rate_hz: int = 30, pixels: str = "yuyv"
) -> str:
    """A USB camera by V4L2; pixels: one of FORMATS, as `v4l2-ctl --list-formats-ext` names them."""
    name, caps = _device(device), _format(pixels)[0]
    _whole(width=(width, 1, 16384), height=(height, 1, 16384), rate_hz=(rate_hz, 1, 1000))
    parts = [f"v4l2src device={name}", f"{caps},width={width},height={height},framerate={rate_hz}/1"]
    if pixels == "mjpeg":
        parts.append("jpegdec")
    return " ! ".join([*parts, "videoconvert", "video/x-raw,format=BGR", SINK])


def rtsp(url: str, latency_ms: int = 50, hardware: bool = True) -> str:
    """A network camera with H.264; hardware: decoded by a Jetson's video hardware, else by the processor."""
    if not isinstance(url, str) or not _URL.fullmatch(url):
        raise InputError("not an address of a camera", f"{url!r:.80}", "write rtsp://HOST/PATH")
    _whole(latency_ms=(latency_ms, 0, 60_000))
    decoder = ["nvv4l2decoder", "nvvidconv", "video/x-raw,format=BGRx"] if hardware else ["avdec_h264"]
    source = [f'rtspsrc location="{url}" latency={latency_ms} drop-on-latency=true', "rtph264depay", "h264parse"]
    return " ! ".join([*source, *decoder, "videoconvert", "video/x-raw,format=BGR", SINK])


def v4l2(
    device: str = "/dev/video0", width: int = 640, height: int = 480, rate_hz: int = 30, pixels: str = "yuyv"
) -> dict[str, Any]:
    """Arguments for `Video`: the same USB camera without GStreamer, by PyAV.

    >>> v4l2()["options"]
    {'video_size': '640x480', 'framerate': '30', 'input_format': 'yuyv422'}
    """
    name, ffmpeg = _device(device), _format(pixels)[1]
    _whole(width=(width, 1, 16384), height=(height, 1, 16384), rate_hz=(rate_hz, 1, 1000))
    options = {"video_size": f"{width}x{height}", "framerate": str(rate_hz), "input_format": ffmpeg}
    return {"path": name, "format": "v4l2", "options": options, "live": True}


def _device(name: str) -> str:
    # A pipeline is a small language: a name with blanks or "!" would be read as more of it.
    if not isinstance(name, str) or not _DEVICE.fullmatch(name) or ".." in name:
        raise InputError("not a camera's device", f"{name!r:.80}", "write /dev/video0 or a link in /dev/v4l/by-id")
    return name


def _format(pixels: str) -> tuple[str, str]:
    if not isinstance(pixels, str) or pixels not in FORMATS:
        raise InputError("not a camera's pixel format", f"{pixels!r:.40}", f"use {', '.join(FORMATS)}")
    return FORMATS[pixels]


def _whole(**values: tuple[int, int, int]) -> None:
    for name, (value, low, high) in values.items():
        if type(value) is not int or not low <= value <= high:
            raise InputError(f"not a camera's {name}", f"{value!r:.40}", f"give a whole number from {low} to {high}")
