"""What starts the node, and what looks at its topics: launch files, a component container, rviz, Fast DDS's profile."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="NOT TESTED: ROS 2 is missing; `make test-ros` brings it")
import yaml
from igate_edge_ros import parameters
from igate_edge_ros.node import IgateNode
from rclpy.parameter import Parameter
from ros_world import BrightnessEngine, World

pytestmark = pytest.mark.ros
PACKAGE = Path(__file__).resolve().parents[2] / "jetson" / "ros2" / "igate_edge_ros"
VGA_BYTES = 480 * 640 * 3


class Asked(types.SimpleNamespace):
    """A stand-in that keeps what a launch file asks for: launch and launch_ros have no wheels."""

    def __init__(self, *items: Any, **fields: Any) -> None:
        super().__init__(items=items, **fields)


def launched(path: Path, monkeypatch: pytest.MonkeyPatch, **given: str) -> Any:
    """The one Node(...) that a launch file starts with arguments NAME:=VALUE, everything in it as plain values."""
    kinds = {
        "launch": "LaunchDescription",
        "launch.actions": "DeclareLaunchArgument",
        "launch.substitutions": "LaunchConfiguration PathJoinSubstitution",
        "launch_ros": "",
        "launch_ros.actions": "Node",
        "launch_ros.parameter_descriptions": "ParameterValue",
        "launch_ros.substitutions": "FindPackageShare",
    }
    for module_name, names in kinds.items():
        module = types.ModuleType(module_name)
        for name in names.split():
            setattr(module, name, type(name, (Asked,), {}))
        monkeypatch.setitem(sys.modules, module_name, module)
    (actions,) = runpy.run_path(str(path))["generate_launch_description"]().items
    declared = {action.items[0]: action for action in actions if type(action).__name__ == "DeclareLaunchArgument"}
    assert set(given) <= set(declared) and all(action.description for action in declared.values())

    def plain(value: Any) -> Any:
        kind = type(value).__name__
        if kind == "LaunchConfiguration":
            name = value.items[0]
            return given[name] if name in given else plain(declared[name].default_value)
        if kind == "PathJoinSubstitution":
            return os.path.join(*plain(value.items[0]))
        if kind == "FindPackageShare":
            assert value.items == (PACKAGE.name,)
            return str(PACKAGE)
        if kind == "ParameterValue":
            return value.value_type(plain(value.items[0]))
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value

    (node,) = (action for action in actions if type(action).__name__ == "Node")
    return types.SimpleNamespace(**{name: plain(value) for name, value in vars(node).items()})


def arguments_of(node: Any) -> list[str]:
    """What launch_ros puts on the command line for its remappings and parameter files."""
    files = [item for item in node.parameters if isinstance(item, str)]
    assert files and all(Path(file).is_file() for file in files)
    remaps = [word for before, after in node.remappings for word in ("-r", f"{before}:={after}")]
    return ["--ros-args", *remaps, *(word for file in files for word in ("--params-file", file))]


def started(world: World, name: str, namespace: str, node: Any) -> IgateNode:
    """A real node as the launch file asks for it, active."""
    made = IgateNode(
        name, namespace=namespace, cli_args=arguments_of(node), open_engine=lambda options: BrightnessEngine()
    )
    world.nodes.append(made)
    world.executor.add_node(made)
    bundle = next(item["bundle"] for item in node.parameters if isinstance(item, dict))
    assert world.set(made, bundle=bundle).successful
    made.trigger_configure()
    made.trigger_activate()
    return made


def heard(node: IgateNode) -> set[str]:
    """Full names of the topics that a node subscribes to."""
    return {subscription.topic_name for subscription in node.subscriptions}


@pytest.mark.parametrize("namespace", ["", "front"])
def test_the_launch_file_of_one_camera_starts_a_node_that_hears_it(
    world: World, monkeypatch: pytest.MonkeyPatch, namespace: str
) -> None:
    topics = {"image": "/camera/image_raw", "camera_info": "/camera/info"}
    given = {"bundle": "scene.igate", **topics, **({"namespace": namespace} if namespace else {})}
    node = launched(PACKAGE / "launch" / "igate.launch.py", monkeypatch, **given)
    assert (node.package, node.executable, node.name) == (PACKAGE.name, "igate_node", "igate")
    assert node.namespace == namespace and node.arguments == ["--autostart"] and node.respawn is True
    assert dict(node.remappings) == topics
    assert node.parameters == [str(PACKAGE / "config" / "igate.yaml"), {"bundle": "scene.igate"}]
    made = started(world, node.name, node.namespace, node)
    assert heard(made) >= set(topics.values())
    assert made.get_fully_qualified_name() == f"/{namespace}/igate".replace("//", "/")


def test_what_a_launch_file_is_not_given_stays_as_the_node_has_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = launched(PACKAGE / "launch" / "igate.launch.py", monkeypatch, bundle="scene.igate")
    assert heard(started(world, node.name, "/rear", node)) >= {"/rear/image", "/rear/camera_info"}


def test_the_launch_file_of_two_cameras_starts_both_in_one_process(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = launched(PACKAGE / "launch" / "two_cameras.launch.py", monkeypatch, bundle="scene.igate")
    assert not hasattr(node, "name") and not hasattr(node, "namespace"), "they would be those of both nodes"
    assert node.arguments == ["--autostart", "--camera", "/front", "--camera", "/rear"]
    assert node.parameters == [str(PACKAGE / "config" / "igate.yaml"), {"bundle": "scene.igate"}]
    for side in ("/front", "/rear"):
        assert heard(started(world, "igate", side, node)) >= {f"{side}/image_raw", f"{side}/camera_info"}


def test_a_component_container_finds_the_node_and_makes_it(world: World, tmp_path: Path) -> None:
    """As rclpy's proposed container does: the entry point by its name, parameters as messages, remaps as words."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=PACKAGE, check=True, capture_output=True)
    (folder,) = tmp_path.glob("*.egg-info")
    found = importlib.metadata.Distribution.at(folder).entry_points.select(group="rclpy_components")
    (entry,) = found.select(name="igate_edge_ros::IgateNode")
    given = [
        Parameter(name, value=value).to_parameter_msg()
        for name, value in {"bundle": "scene.igate", "fps": 30.0, "tasks": ["depth"]}.items()
    ]
    remaps = ["--ros-args", "-r", "image:=/camera/image_raw"]
    node = entry.load()("left", namespace="/front", parameter_overrides=given, cli_args=remaps)
    world.nodes.append(node)
    world.executor.add_node(node)
    assert type(node) is IgateNode and node.get_fully_qualified_name() == "/front/left"
    settings = parameters.check(parameters.read(node))
    assert (settings.bundle, settings.fps, settings.tasks) == ("scene.igate", 30.0, ("depth",))
    node._open_engine = lambda options: BrightnessEngine()
    node.trigger_configure()
    node.trigger_activate()
    assert "/camera/image_raw" in heard(node)


def test_rviz_shows_topics_that_exist_and_asks_for_no_more_than_they_offer(world: World) -> None:
    node = world.active(BrightnessEngine())
    offered = dict(node.get_publisher_names_and_types_by_node("igate", "/"))
    displays = yaml.safe_load((PACKAGE / "rviz" / "igate.rviz").read_text())["Visualization Manager"]["Displays"]
    assert {display["Name"] for display in displays} == {"Overlay", "Labels", "Points"}
    for display in displays:
        if display["Class"] == "rviz_default_plugins/DepthCloud":
            # It writes the policy in its own way, and takes any other word for the system's default: reliable.
            topic, reliability, wanted = display["Depth Map Topic"], display["Reliability Policy"], "Best effort"
        else:
            assert display["Class"] == "rviz_default_plugins/Image"
            topic, reliability = display["Topic"]["Value"], display["Topic"]["Reliability Policy"]
            wanted = "Best Effort"
            assert display["Topic"]["Durability Policy"] == "Volatile"
        assert offered[topic] == ["sensor_msgs/msg/Image"] and reliability == wanted, display["Name"]


def test_the_profile_of_fast_dds_holds_images_and_names_transports_that_it_defines() -> None:
    names = {"": "http://www.eprosima.com"}
    profiles = ElementTree.parse(PACKAGE / "config" / "images_fastdds.xml").getroot().find("profiles", names)
    assert profiles is not None
    transports = {
        transport.findtext("transport_id", None, names): transport
        for transport in profiles.iterfind("transport_descriptors/transport_descriptor", names)
    }
    participant = profiles.find("participant", names)
    assert participant is not None and participant.get("is_default_profile") == "true"
    assert participant.findtext("rtps/useBuiltinTransports", None, names) == "false"
    used = [item.text for item in participant.iterfind("rtps/userTransports/transport_id", names)]
    assert sorted(used) == sorted(transports) and len(used) == 2
    kinds = {transport.findtext("type", None, names): transport for transport in transports.values()}
    assert set(kinds) == {"SHM", "UDPv4"}
    segment, largest = (int(kinds["SHM"].findtext(name, "", names)) for name in ("segment_size", "maxMessageSize"))
    assert 4 * VGA_BYTES < largest <= segment / 4


def test_fast_dds_reads_the_profile(tmp_path: Path) -> None:
    """What it cannot read it ignores, with words on stderr."""
    program = "import rclpy; rclpy.init(); rclpy.create_node('reader').destroy_node(); rclpy.shutdown()"
    text = (PACKAGE / "config" / "images_fastdds.xml").read_text()
    (tmp_path / "wrong.xml").write_text(text.replace("segment_size", "segment_sizes"))
    said = []
    for file in (PACKAGE / "config" / "images_fastdds.xml", tmp_path / "wrong.xml"):
        env = {**os.environ, "FASTDDS_DEFAULT_PROFILES_FILE": str(file)}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        said.append(done.stdout + done.stderr)
    assert "XML" not in said[0] and "XML" in said[1], said
