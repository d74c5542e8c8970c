"""A bundle for Isaac ROS: its TensorRT node's model, parameters and launch file, from the bundle's own numbers.

For those whose pipeline is already in C++: the images stay on the GPU, and a decoder of their own reads the raw
outputs. Nothing here was run on a device or in Isaac ROS; names follow the packages `isaac_ros_tensor_rt` and
`isaac_ros_dnn_image_encoder` of Isaac ROS 3, whose encoder is a launch file of several nodes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..errors import InputError
from ..files import as_path, make_folder, os_errors, write_atomic

MODEL, PARAMETERS, LAUNCH, README = "model.onnx", "igate.yaml", "igate.launch.py", "README.md"
ENCODER = "encoder.json"
MAX_SIDE = 16384
_MARK = "written from a bundle"


def export(path: str | os.PathLike[str], out: str | os.PathLike[str], camera: tuple[int, int]) -> list[Path]:
    """Write model, parameters, launch file and a README to the folder `out`; returns their paths.

    camera: (width, height) of the images that the encoder will get, pixels. Raises InputError for a camera without
    size or a folder that holds other files, BundleError, GraphError, UnavailableError when it cannot be written.
    """
    whole = isinstance(camera, (tuple, list)) and len(camera) == 2 and all(type(side) is int for side in camera)
    if not whole or not all(0 < side <= MAX_SIDE for side in camera):
        raise InputError("not a camera's size", f"{camera!r:.60}", f"pass (width, height), 1 to {MAX_SIDE} pixels")
    from ..acceptance import models

    folder = as_path(out)
    _check_folder(folder)
    bundle = Bundle.read(path)
    files: dict[str, bytes | str] = {
        PARAMETERS: parameters(bundle),  # first: it marks the folder as ours, should a later file fail
        MODEL: models(bundle)["int8"],
        ENCODER: encoder(bundle, camera),
        LAUNCH: _LAUNCH,
        README: _readme(bundle),
    }
    make_folder(folder)
    for name, data in files.items():
        write_atomic(folder / name, data)
    return [folder / name for name in files]


def _check_folder(folder: Path) -> None:
    """An earlier export may be replaced; a README.md or model of somebody else may not."""
    with os_errors(folder, "read the folder"):
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        known = folder / PARAMETERS
        ours = known.is_file() and _MARK in known.read_text(errors="replace").partition("\n")[0]
    if not ours:
        raise InputError("the folder holds other files", str(folder), "pass a new or empty folder")


def encoder(bundle: Bundle, camera: tuple[int, int]) -> str:
    """Arguments of the encoder's own launch file as JSON: texts, as launch files take them."""
    size = bundle.preprocess
    arguments = {
        "input_image_width": camera[0],
        "input_image_height": camera[1],
        "network_image_width": size.width,
        "network_image_height": size.height,
        "image_mean": [float(value) for value in size.mean],
        "image_stddev": [float(value) for value in size.std],
        # Stretched, as the bundle's own preprocessing does: without this word it would enlarge and then crop,
        "enable_padding": True,
        # and with this one it would leave bars.
        "keep_aspect_ratio": False,
        "encoding_desired": "rgb8",
        "final_tensor_name": "input_tensor",
    }
    return json.dumps({name: value if isinstance(value, str) else str(value) for name, value in arguments.items()})


def parameters(bundle: Bundle) -> str:
    """Parameters of the TensorRT node as a ROS 2 YAML file, which JSON values are part of."""
    names = [spec.name for spec in bundle.tasks]
    tensor_rt = {
        "input_tensor_names": ["input_tensor"],
        "input_binding_names": [_input(bundle)],
        "input_tensor_formats": ["nitros_tensor_list_nchw_rgb_f32"],
        "output_tensor_names": names,
        "output_binding_names": names,
        # A name of a layout: NITROS checks neither the number of channels nor what they are.
        "output_tensor_formats": ["nitros_tensor_list_nchw_rgb_f32"],
        # The engine is built once, strongly typed; the node's own builder has no INT8.
        "force_engine_update": False,
        "verbose": False,
    }
    head = f"# {', '.join(names)}: {_MARK}, identity {bundle.seal[:16]}\n"
    return head + _section("tensor_rt", tensor_rt)


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


_LAUNCH = '''"""Image -> encoder -> TensorRT node, in one process: /image and /camera_info in, /tensor_sub out."""

import json
import pathlib

import launch
from ament_index_python.packages import get_package_share_directory
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch_ros.actions import ComposableNodeContainer
from launch_ros.descriptions import ComposableNode

HERE = pathlib.Path(__file__).resolve().parent
ENCODER = pathlib.Path(get_package_share_directory("isaac_ros_dnn_image_encoder")) / "launch"


def generate_launch_description():
    tensor_rt = ComposableNode(
        name="tensor_rt",
        package="isaac_ros_tensor_rt",
        plugin="nvidia::isaac_ros::dnn_inference::TensorRTNode",
        parameters=[
            str(HERE / "igate.yaml"),
            {"model_file_path": str(HERE / "model.onnx"), "engine_file_path": str(HERE / "model.plan")},
        ],
    )
    container = ComposableNodeContainer(
        name="igate_container",
        namespace="",
        package="rclcpp_components",
        executable="component_container_mt",
        composable_node_descriptions=[tensor_rt],
        output="screen",
    )
    asked = {
        "attach_to_shared_component_container": "True",
        "component_container_name": "/igate_container",
        "dnn_image_encoder_namespace": "igate_encoder",
        "image_input_topic": "/image",
        "camera_info_input_topic": "/camera_info",
        "tensor_output_topic": "/tensor_pub",
        **json.loads((HERE / "encoder.json").read_text()),
    }
    source = PythonLaunchDescriptionSource(str(ENCODER / "dnn_image_encoder.launch.py"))
    encoder = IncludeLaunchDescription(source, launch_arguments=asked.items())
    return launch.LaunchDescription([container, encoder])
'''

_README = """# One network for Isaac ROS

Written by `igate jetson isaac-ros`. Not run on a device.

1. On the board, build the engine once (INT8 where the file says so, FP16 for the rest; `trtexec` comes with JetPack):

       /usr/src/tensorrt/bin/trtexec --onnx=model.onnx --stronglyTyped --saveEngine=model.plan

   An engine fits one board, one TensorRT and one power mode: build it again when one of them changes. If your
   `trtexec` does not know `--stronglyTyped` (newer than 10), leave it out: there every network is.
2. `ros2 launch ./igate.launch.py`

The encoder takes `/image` and `/camera_info` and stretches to {width}x{height}. The TensorRT node answers on
`/tensor_sub` with raw outputs, float32, NCHW:

| tensor | kind | channels | what a value is |
|---|---|---|---|
{rows}

Unlike `igate run` and the ROS 2 node of this project, nothing here checks golden frames: compare once with
`igate verify` before you rely on it.
"""
