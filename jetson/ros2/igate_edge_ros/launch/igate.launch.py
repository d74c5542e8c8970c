"""One camera: `ros2 launch igate_edge_ros igate.launch.py bundle:=scene.igate image:=/camera/image_raw`."""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare


def generate_launch_description() -> LaunchDescription:
    params = PathJoinSubstitution([FindPackageShare("igate_edge_ros"), "config", "igate.yaml"])
    node = Node(
        package="igate_edge_ros",
        executable="igate_node",
        namespace=LaunchConfiguration("namespace"),
        name="igate",
        arguments=["--autostart"],
        parameters=[
            LaunchConfiguration("params"),
            {"bundle": ParameterValue(LaunchConfiguration("bundle"), value_type=str)},
        ],
        remappings=[
            ("image", LaunchConfiguration("image")),
            ("camera_info", LaunchConfiguration("camera_info")),
        ],
        output="screen",
        respawn=True,
        respawn_delay=2.0,
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument("bundle", description="path of the .igate file"),
            DeclareLaunchArgument("namespace", default_value="", description="of the node and its topics"),
            DeclareLaunchArgument("image", default_value="image", description="topic of the images"),
            DeclareLaunchArgument("camera_info", default_value="camera_info", description="topic of their intrinsics"),
            DeclareLaunchArgument("params", default_value=params, description="parameter file"),
            node,
        ]
    )
