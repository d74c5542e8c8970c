"""`ros2 run igate_edge_ros igate_node`: one node a camera, all in one process."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.utilities import remove_ros_args, try_shutdown

from igate_edge.runtime.watchdog import Watchdog

from .executor import CameraExecutor
from .node import IgateNode

#: Seconds after which a running thread lets another one in.
SWITCH_S = 1e-4
#: Longest time in seconds that the executor waits for work, and that a callback may take beyond a hanging engine's.
WAIT_S, WEDGED_S = 1.0, 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Spin the nodes until a signal, which finishes the frame in hand and closes the engines.

    Leaves with 1 when an engine was lost for good: launch (respawn) or systemd starts a new process. systemd's watchdog
    hears of it too when a callback never returns: the executor must come round again.
    """
    given = list(sys.argv if arguments is None else arguments)
    parser = argparse.ArgumentParser("igate_node", description=__doc__)
    about = "namespace of a camera's node; repeat it to serve several cameras in one process"
    parser.add_argument("--camera", action="append", metavar="NAMESPACE", help=about)
    parser.add_argument("--autostart", action="store_true", help="configure and activate without being asked")
    options = parser.parse_args(remove_ros_args(given)[1:])
    # A frame passes through a few threads: none should wait 5 ms for another's bytecode.
    sys.setswitchinterval(SWITCH_S)
    rclpy.init(args=given)
    nodes: list[IgateNode] = []
    executor: CameraExecutor | None = None
    try:
        nodes += [IgateNode(namespace=camera) for camera in options.camera or [None]]
        executor = CameraExecutor()
        for node in nodes:
            executor.add_node(node)
            if options.autostart:
                node.autostart()
        spun = time.monotonic()

        def alive() -> bool:
            allowed_s = WAIT_S + WEDGED_S + max(node.hang_s for node in nodes)
            return all(node.alive for node in nodes) and time.monotonic() - spun < allowed_s

        with Watchdog(alive):
            while rclpy.ok() and all(node.alive for node in nodes):
                executor.spin_once(timeout_sec=WAIT_S)
                spun = time.monotonic()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    finally:
        if executor is not None:
            executor.shutdown()
        for node in nodes:
            node.destroy_node()
        try_shutdown()
    return 0 if all(node.alive for node in nodes) else 1


if __name__ == "__main__":
    sys.exit(main())
