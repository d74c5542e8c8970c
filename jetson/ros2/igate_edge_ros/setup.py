"""Installs the package where ament and `ros2 run` look for it."""

from glob import glob

from setuptools import setup

NAME = "igate_edge_ros"

setup(
    name=NAME,
    version="0.1.0",
    packages=[NAME],
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml", "README.md"]),
        (f"share/{NAME}/launch", sorted(glob("launch/*.launch.py"))),
        (f"share/{NAME}/config", sorted(glob("config/*"))),
        (f"share/{NAME}/rviz", sorted(glob("rviz/*.rviz"))),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="igate_edge",
    maintainer_email="igate-edge@users.noreply.github.com",
    description="Lifecycle node that answers a camera with all tasks of an igate_edge bundle: labels, depth, normals.",
    license="Apache-2.0",
    tests_require=["pytest"],
    entry_points={
        "console_scripts": [f"igate_node = {NAME}.main:main"],
        # What a container of rclpy_components looks for; see README.md.
        "rclpy_components": [f"{NAME}::IgateNode = {NAME}.node:IgateNode"],
    },
)
