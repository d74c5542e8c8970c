"""`ros2 run igate_edge_ros igate_node`: one node a camera, all in one process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import rclpy
from rclpy.executors import ExternalShutdownException, MultiThreadedExecutor
from rclpy.utilities import remove_ros_args, try_shutdown

from .node import IgateNode


def main(arguments: Sequence[str] | None = None) -> int:
    """Spin the nodes until a signal; SIGTERM and SIGINT finish the frame in hand and close the engines."""
    given = list(sys.argv if arguments is None else arguments)
    parser = argparse.ArgumentParser("igate_node", description=main.__doc__)
    about = "namespace of a camera's node; repeat it to serve several cameras in one process"
    parser.add_argument("--camera", action="append", metavar="NAMESPACE", help=about)
    parser.add_argument("--autostart", action="store_true", help="configure and activate without being asked")
    options = parser.parse_args(remove_ros_args(given)[1:])
    rclpy.init(args=given)
    nodes: list[IgateNode] = []
    executor: MultiThreadedExecutor | None = None
    try:
        nodes += [IgateNode(namespace=camera) for camera in options.camera or [None]]
        # Transitions, images and the heartbeat of a node have a group each: none waits for the others.
        executor = MultiThreadedExecutor(num_threads=2 + 2 * len(nodes))
        for node in nodes:
            executor.add_node(node)
            if options.autostart:
                node.autostart()
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        if executor is not None:
            executor.shutdown()
        for node in nodes:
            node.destroy_node()
        try_shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
