"""The Isaac ROS export: a model, parameters and a launch file that fit each other and the bundle."""

from __future__ import annotations

import ast
import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import yaml

from igate_edge.bundle import Bundle
from igate_edge.compiler import lint
from igate_edge.errors import InputError, UnavailableError
from igate_edge.golden import gap
from igate_edge.robotics import isaac_ros
from igate_edge.runtime.preprocess import to_input

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tabletop.igate"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("isaac") / "new"
    written = isaac_ros.export(EXAMPLE, out, (640, 480))
    assert sorted(path.name for path in written) == sorted(path.name for path in out.iterdir())
    return out


def test_parameters_are_the_bundles_own(folder: Path) -> None:
    bundle = Bundle.read(EXAMPLE)
    document = yaml.safe_load((folder / "igate.yaml").read_text())
    encoder = json.loads((folder / "encoder.json").read_text())
    assert all(type(value) is str for value in encoder.values()), "a launch argument is a text"
    assert (encoder["input_image_width"], encoder["input_image_height"]) == ("640", "480")
    assert (encoder["network_image_width"], encoder["network_image_height"]) == ("128", "96")
    for name, wanted in (("image_mean", bundle.preprocess.mean), ("image_stddev", bundle.preprocess.std)):
        values = ast.literal_eval(encoder[name])
        assert values == list(wanted) and all(type(value) is float for value in values)
    # The only pair of the four with which the encoder stretches: without padding it crops.
    assert (encoder["enable_padding"], encoder["keep_aspect_ratio"]) == ("True", "False")
    node = document["tensor_rt"]["ros__parameters"]
    model = onnx.load(str(folder / "model.onnx"))
    assert node["input_binding_names"] == [value.name for value in model.graph.input]
    assert (
        node["output_binding_names"] == [value.name for value in model.graph.output] == ["semseg", "depth", "normals"]
    )
    assert node["force_engine_update"] is False


def test_the_model_is_int8_for_tensorrt_and_answers_as_packaged(folder: Path) -> None:
    import onnxruntime

    bundle = Bundle.read(EXAMPLE)
    data = (folder / "model.onnx").read_bytes()
    assert lint.refusals(ir.from_proto(onnx.load_from_string(data))) == []
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    image = to_input(bundle.golden["frame"][0], bundle.preprocess)
    outputs = session.run(None, {session.get_inputs()[0].name: image})
    for spec, array in zip(bundle.tasks, outputs, strict=True):
        assert array.dtype == np.float32
        stored = bundle.golden[f"int8/{spec.name}"][:1]
        assert gap(spec, array, stored, (96, 128)) <= bundle.manifest["tolerances"][spec.name]["limit"]


def test_the_launch_file_starts_both_nodes_in_one_container(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROS's launch package has no wheels: a stand-in keeps what the file asks for."""

    class Asked(types.SimpleNamespace):
        def __init__(self, *items: object, **fields: object) -> None:
            super().__init__(items=items, **fields)

    for name, *attributes in (
        ("launch", "LaunchDescription"),
        ("launch.actions", "IncludeLaunchDescription"),
        ("launch.launch_description_sources", "PythonLaunchDescriptionSource"),
        ("launch_ros",),
        ("launch_ros.actions", "ComposableNodeContainer"),
        ("launch_ros.descriptions", "ComposableNode"),
        ("ament_index_python",),
        ("ament_index_python.packages",),
    ):
        module = types.ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, Asked)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["ament_index_python.packages"].get_package_share_directory = "/opt/{}".format  # type: ignore[attr-defined]
    made = runpy.run_path(str(folder / "igate.launch.py"))["generate_launch_description"]()
    container, encoder = made.items[0]
    (tensor_rt,) = container.composable_node_descriptions
    assert tensor_rt.plugin == "nvidia::isaac_ros::dnn_inference::TensorRTNode"
    assert encoder.items[0].items == ("/opt/isaac_ros_dnn_image_encoder/launch/dnn_image_encoder.launch.py",)
    asked = dict(encoder.launch_arguments)
    assert asked["component_container_name"] == f"/{container.name}" and asked["final_tensor_name"] == "input_tensor"
    assert asked["tensor_output_topic"] == "/tensor_pub" and asked["network_image_width"] == "128"
    files = tensor_rt.parameters[1]
    assert Path(files["model_file_path"]).is_file() and files["engine_file_path"] == str(folder / "model.plan")
    assert set(yaml.safe_load((folder / "igate.yaml").read_text())) == {tensor_rt.name}


def test_the_readme_says_what_each_tensor_is(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "| `depth` | depth | 1 | natural logarithm of metres |" in text and "128x96" in text
    assert "Not run on a device" in text


@pytest.mark.parametrize(
    "camera",
    [(0, 480), (640, -1), (640, 99999), (640.0, 480), (True, True), (640,), (1, 2, 3), None, 640, "640x480", {}],
)
def test_a_camera_without_a_size_is_refused(camera: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a camera's size"):
        isaac_ros.export(EXAMPLE, tmp_path / "out", camera)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="cannot create the folder"):
        isaac_ros.export(EXAMPLE, tmp_path / "file", (640, 480))


def test_files_of_somebody_else_are_not_replaced(tmp_path: Path) -> None:
    """An earlier export is; a project's own README.md is not."""
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InputError, match="the folder holds other files"):
        isaac_ros.export(EXAMPLE, tmp_path, (640, 480))
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    for _ in range(2):
        isaac_ros.export(EXAMPLE, tmp_path / "new", (640, 480))


@pytest.mark.parametrize("out", [None, 5, "a\0b", b"x"])
def test_a_folder_that_is_no_path(out: Any) -> None:
    with pytest.raises(InputError, match="not a path"):
        isaac_ros.export(EXAMPLE, out, (640, 480))
