"""Two cameras in one process: `ros2 launch igate_edge_ros two_cameras.launch.py bundle:=scene.igate`.

Images are expected on /front/image_raw and /rear/image_raw; answers come on /front/igate/... and /rear/igate/...
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

CAMERAS = ("/front", "/rear")


def generate_launch_description() -> LaunchDescription:
    params = PathJoinSubstitution([FindPackageShare("igate_edge_ros"), "config", "igate.yaml"])
    # No name here: it would rename both. Each node is NAMESPACE/igate.
    node = Node(
        package="igate_edge_ros",
        executable="igate_node",
        arguments=["--autostart", *(word for camera in CAMERAS for word in ("--camera", camera))],
        parameters=[
            LaunchConfiguration("params"),
            {"bundle": ParameterValue(LaunchConfiguration("bundle"), value_type=str)},
        ],
        remappings=[(f"{camera}/image", f"{camera}/image_raw") for camera in CAMERAS],
        output="screen",
        respawn=True,
        respawn_delay=2.0,
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument("bundle", description="path of the .igate file"),
            DeclareLaunchArgument("params", default_value=params, description="parameter file"),
            node,
        ]
    )
