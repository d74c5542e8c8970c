"""Tell systemd that this service is ready, alive and what it does: the sd_notify protocol, one datagram a message."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping

from ..engines.session import Closing


def notify(state: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send "READY=1", "WATCHDOG=1", "STOPPING=1" or "STATUS=..." to systemd; False where none listens. Never raises.

    >>> notify("READY=1", {})
    False
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            # A service manager that hangs must not hang the robot.
            sock.settimeout(1.0)
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
            sock.sendall(state.encode(errors="replace"))
    except OSError:
        return False
    return True


class Watchdog(Closing):
    """Reports READY at once, and WATCHDOG=1 as long as `alive()` holds, twice in the time that the unit allows.

    Once `alive()` is false, or raises, WATCHDOG=1 comes no more, and systemd restarts the service (WatchdogSec= and
    Restart= of the unit). status: a sentence that `systemctl status` shows. Does nothing where nobody listens.
    """

    def __init__(
        self,
        alive: Callable[[], bool],
        status: Callable[[], str] | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._alive, self._status, self._environment = alive, status, environment
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if not notify("READY=1", environment):
            return
        limit = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        micros = int(limit) if limit.isdecimal() and ours else 0
        self._period = min(micros / 2e6, 60.0) if micros else 5.0
        self._thread = threading.Thread(target=self._report, name="igate watchdog", daemon=True)
        self._thread.start()

    def _report(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # who cannot tell is not alive
                if self._alive():
                    notify("WATCHDOG=1", self._environment)
            if self._status is not None:
                notify(f"STATUS={self._sentence(self._status)}".replace("\n", " "), self._environment)
            if self._stop.wait(self._period):
                return

    @staticmethod
    def _sentence(status: Callable[[], str]) -> str:
        """What it says; a fault of the sentence must not end the reports, or a healthy service is restarted."""
        try:
            return status()
        except Exception as error:
            return f"unknown: {type(error).__name__}: {error}"

    def close(self) -> None:
        """Report STOPPING and end; closing twice is fine."""
        if self._thread is not None and not self._stop.is_set():
            self._stop.set()
            self._thread.join(timeout=self._period + 2)
            notify("STOPPING=1", self._environment)
