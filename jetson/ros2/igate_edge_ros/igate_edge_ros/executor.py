"""An executor for cameras: images run on the thread that waits for them, transitions and services on others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rclpy.executors import ConditionReachedException, ShutdownException, SingleThreadedExecutor, TimeoutException
from rclpy.guard_condition import GuardCondition
from rclpy.service import Service

#: Transitions and services that run at a time; a node's own never run beside each other.
WORKERS = 4


class CameraExecutor(SingleThreadedExecutor):
    """As rclpy's SingleThreadedExecutor, but a node that loads its engine does not hold up the others' callbacks.

    A MultiThreadedExecutor does not either, and hands every image to another thread, looking several times whether that
    took it: twice the CPU time and a longer tail.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="igate transitions")
        self._begun: list[Any] = []

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """Run one callback that is ready, or hand it to another thread; raises what one raised."""
        try:
            handler, entity, _ = self.wait_for_ready_callbacks(timeout_sec)
        except (ShutdownException, TimeoutException, ConditionReachedException):
            return
        if isinstance(entity, Service | GuardCondition):
            self._pool.submit(handler)
        else:
            handler()
        self._begun.append(handler)
        done = [each for each in self._begun if each.done()]
        self._begun = [each for each in self._begun if not each.done()]
        for each in done:
            each.result()

    def shutdown(self, timeout_sec: float | None = None) -> bool:
        """Stop, after transitions that run."""
        stopped = bool(super().shutdown(timeout_sec))
        self._pool.shutdown()
        return stopped
