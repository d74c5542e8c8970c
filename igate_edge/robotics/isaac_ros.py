"""A bundle for Isaac ROS: its TensorRT node's model, parameters and launch file, from the bundle's own numbers.

For those whose pipeline is already in C++: the images stay on the GPU, and a decoder of their own reads the raw
outputs. Nothing here was run on a device; names follow the packages `isaac_ros_tensor_rt` and
`isaac_ros_dnn_image_encoder`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..errors import InputError
from ..files import as_path, os_errors, write_atomic

MODEL, PLAN, PARAMETERS, LAUNCH, README = "model.onnx", "model.plan", "igate.yaml", "igate.launch.py", "README.md"
MAX_SIDE = 16384


def export(path: str | os.PathLike[str], out: str | os.PathLike[str], camera: tuple[int, int]) -> list[Path]:
    """Write model, parameters, launch file and a README to the folder `out`; returns their paths.

    camera: (width, height) of the images that the encoder will get, pixels. Raises InputError for a camera without
    size, BundleError, GraphError, UnavailableError when the folder cannot be written.
    """
    if not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in camera) or len(camera) != 2:
        raise InputError("not a camera's size", f"{camera!r:.60}", f"pass (width, height), 1 to {MAX_SIDE} pixels")
    from ..acceptance import models

    bundle, folder = Bundle.read(path), as_path(out)
    files: dict[str, bytes | str] = {
        MODEL: models(bundle)["int8"],
        PARAMETERS: parameters(bundle, camera),
        LAUNCH: _LAUNCH,
        README: _readme(bundle),
    }
    with os_errors(folder, "create the folder"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomic(folder / name, data)
    return [folder / name for name in files]


def parameters(bundle: Bundle, camera: tuple[int, int]) -> str:
    """Parameters of encoder and TensorRT node as a ROS 2 YAML file, which JSON values are part of."""
    size, names = bundle.preprocess, [spec.name for spec in bundle.tasks]
    encoder = {
        "input_image_width": camera[0],
        "input_image_height": camera[1],
        "network_image_width": size.width,
        "network_image_height": size.height,
        "image_mean": [float(value) for value in size.mean],
        "image_stddev": [float(value) for value in size.std],
        # The bundle's own preprocessing stretches; with padding the network would see another picture.
        "enable_padding": False,
        "keep_aspect_ratio": False,
    }
    tensor_rt = {
        "input_tensor_names": ["input_tensor"],
        "input_binding_names": [_input(bundle)],
        "output_tensor_names": names,
        "output_binding_names": names,
        # The engine is built once, strongly typed; the node's own builder has no INT8.
        "force_engine_update": False,
        "verbose": False,
    }
    head = f"# {', '.join(names)}: written from a bundle, identity {bundle.seal[:16]}\n"
    return head + "".join(_section(name, values) for name, values in (("encoder", encoder), ("tensor_rt", tensor_rt)))


def _input(bundle: Bundle) -> str:
    import onnx

    return str(onnx.load_from_string(bundle.model).graph.input[0].name)


def _section(name: str, values: dict[str, Any]) -> str:
    lines = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in values.items())
    return f"{name}:\n  ros__parameters:\n{lines}"


def _readme(bundle: Bundle) -> str:
    size = bundle.preprocess
    rows = "\n".join(
        f"| `{spec.name}` | {spec.kind} | {spec.channels} | {_meaning(spec.kind)} |" for spec in bundle.tasks
    )
    return _README.format(width=size.width, height=size.height, rows=rows)


def _meaning(kind: str) -> str:
    return {
        "semseg": "logits, argmax over channels is the class",
        "depth": "natural logarithm of metres",
        "normals": "a vector of any length, x right, y down, z forward",
        "edges": "logit",
    }.get(kind, "logits")


_LAUNCH = '''"""Image -> encoder -> TensorRT node, in one process. Topics: image and camera_info in, tensor_sub out."""

import pathlib

import launch
from launch_ros.actions import ComposableNodeContainer
from launch_ros.descriptions import ComposableNode

HERE = pathlib.Path(__file__).resolve().parent


def generate_launch_description():
    parameters = str(HERE / "igate.yaml")
    encoder = ComposableNode(
        name="encoder",
        package="isaac_ros_dnn_image_encoder",
        plugin="nvidia::isaac_ros::dnn_inference::DnnImageEncoderNode",
        parameters=[parameters],
        remappings=[("encoded_tensor", "tensor_pub")],
    )
    tensor_rt = ComposableNode(
        name="tensor_rt",
        package="isaac_ros_tensor_rt",
        plugin="nvidia::isaac_ros::dnn_inference::TensorRTNode",
        parameters=[
            parameters,
            {"model_file_path": str(HERE / "model.onnx"), "engine_file_path": str(HERE / "model.plan")},
        ],
    )
    container = ComposableNodeContainer(
        name="igate_container",
        namespace="",
        package="rclcpp_components",
        executable="component_container_mt",
        composable_node_descriptions=[encoder, tensor_rt],
        output="screen",
    )
    return launch.LaunchDescription([container])
'''

_README = """# One network for Isaac ROS

Written by `igate jetson isaac-ros`. Not run on a device.

1. On the board, build the engine once (INT8 where the file says so, FP16 for the rest; `trtexec` comes with JetPack):

       /usr/src/tensorrt/bin/trtexec --onnx=model.onnx --stronglyTyped --saveEngine=model.plan

   An engine fits one board, one TensorRT and one power mode: build it again when one of them changes.
2. `ros2 launch ./igate.launch.py`

The encoder resizes to {width}x{height}. The TensorRT node answers on `tensor_sub` with raw outputs, float32, NCHW:

| tensor | kind | channels | what a value is |
|---|---|---|---|
{rows}

Unlike `igate run` and the ROS 2 node of this project, nothing here checks golden frames: compare once with
`igate verify` before you rely on it.
"""
