"""One builder at a time, with real processes: who waits, who is killed, and where there are no locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from igate_edge.runtime.cache_lock import building

#: Holds the lock until its stdin is closed; says when it waits, holds and is done.
HOLDER = """
import sys
from pathlib import Path
from igate_edge.runtime.cache_lock import building
say = lambda word: print(word, flush=True)
with building(Path(sys.argv[1]), "key", lambda: say("waits")) as held:
    say(f"holds {held}")
    sys.stdin.read()
say("done")
"""
Start = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def begin() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(tmp_path)]
        running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def finish(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    assert line(process) == "done"
    process.wait()


def test_the_second_builder_waits_for_the_first(start: Start, tmp_path: Path) -> None:
    first = start()
    assert line(first) == "holds True"
    second = start()
    assert line(second) == "waits"
    finish(first)
    assert line(second) == "holds True"
    third = start()
    assert line(third) == "waits", "the lock that the first one deleted is not the one that counts"
    finish(second)
    assert line(third) == "holds True"
    finish(third)
    assert os.listdir(tmp_path) == []


def test_a_killed_builder_gives_the_lock_up(start: Start, tmp_path: Path) -> None:
    first = start()
    assert line(first) == "holds True"
    second = start()
    assert line(second) == "waits"
    first.send_signal(signal.SIGKILL)
    assert line(second) == "holds True"
    finish(second)
    killed = start()
    assert line(killed) == "holds True"
    killed.kill()
    killed.wait()
    assert os.listdir(tmp_path) == [".key.lock"], "what it leaves is in nobody's way"
    with building(tmp_path, "key") as held:
        assert held
    assert os.listdir(tmp_path) == []


def test_other_engines_are_not_waited_for(start: Start, tmp_path: Path) -> None:
    first = start()
    assert line(first) == "holds True"
    with building(tmp_path, "other", lambda: pytest.fail("waited")) as held:
        assert held
    finish(first)


def test_threads_of_one_process_wait_too(tmp_path: Path) -> None:
    waits, done = threading.Event(), threading.Event()

    def second() -> None:
        with building(tmp_path, "key", waits.set):
            done.set()

    thread = threading.Thread(target=second)
    with building(tmp_path, "key"):
        thread.start()
        assert waits.wait(20) and not done.is_set()
    thread.join(20)
    assert done.is_set()


def test_a_failed_build_leaves_no_folder_and_an_entry_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(ValueError, match="broken"), building(folder, "key"):
        raise ValueError("broken")
    assert not folder.exists()
    with building(folder, "key"):
        (folder / "key.engine").write_bytes(b"engine")
    assert os.listdir(folder) == ["key.engine"]


def test_where_nothing_can_be_locked_it_builds_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with building(tmp_path / "file", "key") as held:
        assert not held
