"""The node's parameters: declared once, checked before anything is loaded, changed at run time where that is safe."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor
from rclpy.node import Node

from igate_edge.errors import InputError

#: What each parameter means, as `ros2 param describe` shows it; a default of 0, "" or [""] means "not given".
ABOUT = {
    "bundle": "path of the .igate file; needed before configure",
    "backend": "auto (TensorRT where it is usable, else ONNX Runtime) or the name of one; a name never falls back",
    "threads": "CPU threads a frame (ONNX Runtime)",
    "precision": "auto (measured when built), int8 or float",
    "tasks": "names of the bundle's tasks to answer; what only others need is not computed. Not given: all",
    "cache_dir": "folder of built engines. Not given: the user's cache folder",
    "build_apart": "build an engine that is not in the cache in a process of its own: this one stays responsive",
    "drop_policy": "latest (newest frame wins, others are counted as dropped) or every (frames wait for each other)",
    "output_size": "network (images as the network saw them, camera_info scaled) or frame (as large as the camera's)",
    "fit": "how an image meets the network's size: stretch (as trained), letterbox or crop (its middle)",
    "max_age_ms": "an answer to an image that is older is not published; 0: any age",
    "hang_s": "seconds after which an engine that does not answer is opened again",
    "budget_ms": "milliseconds from arrival to published that diagnostics judge by. Not given: the bundle's, if any",
    "fps": "frames a second that the camera promises: gives the deadline of the outputs and of the watch on the input",
    "compressed": "subscribe to image/compressed (sensor_msgs/CompressedImage) instead of image",
    "publish_overlay": "offer ~/overlay (rgb8; with Pillow JPEG too), drawn only when somebody subscribes",
    "depth_encoding": "32FC1 (metres, NaN = invalid) or 16UC1 (millimetres, 0 = invalid)",
    "diag_period": "seconds between two /diagnostics",
    "record_dir": "folder of flight recordings (mcap). Not given: none",
    "record_seconds": "seconds before an alarm that a flight recording holds",
}
#: These take effect at once; the others are read by configure, and refused while an engine is loaded.
LIVE = ("budget_ms", "publish_overlay", "depth_encoding", "diag_period")
_CHOICES = {
    "precision": ("auto", "int8", "float"),
    "drop_policy": ("latest", "every"),
    "output_size": ("network", "frame"),
    "fit": ("stretch", "letterbox", "crop"),
    "depth_encoding": ("32FC1", "16UC1"),
}
#: Smallest and largest value of a number.
_RANGES = {
    "threads": (1, 64),
    "max_age_ms": (0.0, 3_600_000.0),
    "hang_s": (0.1, 600.0),
    "budget_ms": (0.0, 60_000.0),
    "fps": (0.0, 1000.0),
    "diag_period": (0.1, 60.0),
    "record_seconds": (0.5, 60.0),
}


@dataclass(frozen=True)
class Settings:
    """The parameters as `check` let them pass; see ABOUT for each."""

    bundle: str = ""
    backend: str = "auto"
    threads: int = 1
    precision: str = "auto"
    tasks: tuple[str, ...] = ()
    cache_dir: str = ""
    build_apart: bool = True
    drop_policy: str = "latest"
    output_size: str = "network"
    fit: str = "stretch"
    max_age_ms: float = 1000.0
    hang_s: float = 5.0
    budget_ms: float = 0.0
    fps: float = 0.0
    compressed: bool = False
    publish_overlay: bool = True
    depth_encoding: str = "32FC1"
    diag_period: float = 1.0
    record_dir: str = ""
    record_seconds: float = 5.0


def declare(node: Node) -> None:
    """Declare all parameters with their defaults; values that were given at the start are taken over unchecked."""
    for field in fields(Settings):
        # An empty list has no type in ROS: [""] is the usual way to say "none given".
        default = [""] if field.name == "tasks" else field.default
        # Whole numbers are fine for decimal ones: `budget_ms: 10` in a file should not stop a robot.
        loose = isinstance(field.default, float)
        node.declare_parameter(
            field.name, default, ParameterDescriptor(description=ABOUT[field.name], dynamic_typing=loose)
        )


def read(node: Node) -> dict[str, Any]:
    """Name -> value of the node's parameters, unchecked."""
    return {field.name: node.get_parameter(field.name).value for field in fields(Settings)}


def check(values: Mapping[str, Any]) -> Settings:
    """The settings that `values` mean; raises InputError for the first that is not usable.

    >>> check({"budget_ms": 10, "tasks": [""]}).budget_ms
    10.0
    """
    known = {field.name: field.default for field in fields(Settings)}
    given = {name: _typed(name, known[name], value) for name, value in values.items() if name in known}
    for name, choices in _CHOICES.items():
        if given.get(name, choices[0]) not in choices:
            raise _bad(name, given[name], f"use one of {', '.join(choices)}")
    for name, (low, high) in _RANGES.items():
        if not low <= given.get(name, low) <= high:
            raise _bad(name, given[name], f"use a number from {low:g} to {high:g}")
    for name in ("bundle", "cache_dir", "record_dir"):
        if given.get(name):
            given[name] = os.path.expanduser(given[name])
    return Settings(**given)


def _typed(name: str, default: Any, value: Any) -> Any:
    if name == "tasks":
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise _bad(name, value, "pass a list of task names")
        return tuple(item for item in value if item)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float):
        if not number or not math.isfinite(value):
            raise _bad(name, value, "pass a number")
        return float(value)
    if type(value) is not type(default):
        raise _bad(name, value, f"pass a value of type {type(default).__name__}")
    return value


def _bad(name: str, value: Any, fix: str) -> InputError:
    return InputError(f"parameter {name} is not usable", f"{value!r:.60}", fix)
