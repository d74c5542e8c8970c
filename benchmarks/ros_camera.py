"""A camera and a listener in a process of their own, as on a robot: `python ros_camera.py HZ COUNT TOPIC...`.

Publishes VGA rgb8 on /image, stamped when it is handed to ROS, and prints one line of JSON: of every answer on the
topics the stamp and, by the same clock, its arrival, in nanoseconds.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any


def main(hz: float, count: int, topics: list[str]) -> None:
    import numpy as np
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import Image

    rclpy.init()
    node = rclpy.create_node("camera")
    quality = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
    camera = node.create_publisher(Image, "/image", quality)
    arrived: dict[str, list[tuple[int, int]]] = {topic: [] for topic in topics}

    def keep(topic: str) -> Any:
        def note(message: Image) -> None:
            stamp = message.header.stamp
            arrived[topic].append((stamp.sec * 10**9 + stamp.nanosec, time.time_ns()))

        return note

    for topic in topics:
        node.create_subscription(Image, topic, keep(topic), quality)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    spinning = threading.Thread(target=executor.spin)
    spinning.start()
    rng = np.random.default_rng(0)
    message = Image(height=480, width=640, encoding="rgb8", step=1920)
    message.data = rng.integers(0, 256, 480 * 1920, np.uint8).tobytes()
    message.header.frame_id = "camera_optical"
    while not camera.get_subscription_count() or any(node.count_publishers(topic) == 0 for topic in topics):
        time.sleep(0.05)
    time.sleep(1.0)  # a listener that is known here need not be known there yet
    due = time.monotonic()
    for _ in range(count):
        now = time.time_ns()
        message.header.stamp.sec, message.header.stamp.nanosec = now // 10**9, now % 10**9
        camera.publish(message)
        due += 1 / hz
        time.sleep(max(0.0, due - time.monotonic()))
    time.sleep(0.5)
    executor.shutdown()
    spinning.join()
    node.destroy_node()
    rclpy.shutdown()
    print(json.dumps(arrived), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
