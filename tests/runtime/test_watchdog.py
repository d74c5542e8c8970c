"""systemd's protocol, against a real socket: ready, alive as long as it is true, stopping."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from robot import PATIENCE, service_manager

from igate_edge.runtime.watchdog import Watchdog, notify


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with service_manager(tmp_path / "n") as manager:
        yield manager


def environment(manager: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.getsockname(), **more}


def test_notify(manager: socket.socket, tmp_path: Path) -> None:
    assert notify("READY=1", environment(manager)) and manager.recv(100) == b"READY=1"
    for nothing in ({}, {"NOTIFY_SOCKET": "relative"}, {"NOTIFY_SOCKET": str(tmp_path / "none")}):
        assert not notify("READY=1", nothing)


def test_notify_to_an_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")  # Linux chooses a free abstract name
        name = sock.getsockname().decode()
        sock.settimeout(PATIENCE)
        assert notify("STATUS=well", {"NOTIFY_SOCKET": "@" + name[1:]}) and sock.recv(100) == b"STATUS=well"


def test_alive_is_reported_until_it_is_not(manager: socket.socket) -> None:
    asked, alive = threading.Semaphore(0), threading.Event()
    alive.set()

    def check() -> bool:
        asked.release()
        return alive.is_set()

    with Watchdog(check, lambda: "30 frames\na second", environment(manager, WATCHDOG_USEC="20000")):
        assert manager.recv(100) == b"READY=1"
        for _ in range(3):
            assert manager.recv(100) == b"WATCHDOG=1" and manager.recv(100) == b"STATUS=30 frames a second"
        alive.clear()
        while asked.acquire(blocking=False):
            pass
        for _ in range(3):
            assert asked.acquire(timeout=PATIENCE)
    rest = []
    while not rest or rest[-1] != b"STOPPING=1":
        rest.append(manager.recv(100))
    # At most the message of the check that was under way.
    assert rest.count(b"WATCHDOG=1") <= 2 < rest.count(b"STATUS=30 frames a second")


def test_another_process_is_watched_or_nobody(manager: socket.socket) -> None:
    threads = threading.active_count()
    dog = Watchdog(lambda: True, environment={})
    assert threading.active_count() == threads
    dog.close()
    with Watchdog(lambda: True, environment=environment(manager, WATCHDOG_USEC="20000", WATCHDOG_PID="1")) as other:
        assert other._period == 5.0


def test_a_fault_of_the_sentence_is_told_and_one_of_the_check_is_not_alive(manager: socket.socket) -> None:
    def broken() -> str:
        raise KeyError("clock")

    def odd() -> str:
        return "frames of \udcff"

    with Watchdog(lambda: True, broken, environment(manager, WATCHDOG_USEC="20000")):
        assert manager.recv(100) == b"READY=1"
        for _ in range(2):
            assert manager.recv(100) == b"WATCHDOG=1"
            assert manager.recv(100) == b"STATUS=unknown: KeyError: 'clock'"
    while manager.recv(100) != b"STOPPING=1":
        pass
    with Watchdog(lambda: bool(broken()), odd, environment(manager, WATCHDOG_USEC="20000")):
        assert manager.recv(100) == b"READY=1"
        assert [manager.recv(100) for _ in range(3)] == [b"STATUS=frames of ?"] * 3


@pytest.mark.parametrize("limit", ["", "0", "-1", "x", "\u00b2", "9" * 40])
def test_any_limit_of_the_manager_is_survived(manager: socket.socket, limit: str) -> None:
    with Watchdog(lambda: True, None, environment(manager, WATCHDOG_USEC=limit)):
        assert manager.recv(100) == b"READY=1" and manager.recv(100) == b"WATCHDOG=1"
    assert manager.recv(100) == b"STOPPING=1"
