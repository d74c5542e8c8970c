"""ROS 2 for real, in this process only: a domain of its own that no other machine is asked to join."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def ros() -> Iterator[None]:
    """rclpy initialised once for all tests."""
    rclpy = pytest.importorskip("rclpy")
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
    rclpy.init()
    yield
    rclpy.try_shutdown()


@pytest.fixture
def world(ros: None) -> Iterator[Any]:
    """See ros_world.World; closed with all its nodes."""
    from ros_world import World

    made = World()
    yield made
    made.close()
