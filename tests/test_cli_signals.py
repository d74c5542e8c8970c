"""Ctrl-C and SIGTERM end a command with a code of their own, without a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from igate_command import igate

from igate_edge.cli_console import tidy_at_sigterm


def test_stopping_while_the_commands_are_imported_is_130_too() -> None:
    program = """
import sys
class Stop:
    def find_spec(self, name, *rest):
        if name == "igate_edge.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
from igate_edge.__main__ import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 130 and not ended.stderr, ended


def test_a_second_sigterm_kills_what_does_not_end() -> None:
    program = """
import signal
from igate_edge.cli_console import tidy_at_sigterm
with tidy_at_sigterm([]):
    for _ in range(3):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            print("goes on", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGTERM and ended.stdout == "goes on\n", ended


def test_a_handler_of_sigterm_that_a_program_has_is_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        heard: list[int] = []
        with tidy_at_sigterm(heard):
            signal.raise_signal(signal.SIGTERM)
        assert not heard
    finally:
        signal.signal(signal.SIGTERM, before)


def test_stopping_is_130_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("igate_edge.cli_doctor.doctor", stop)
    result = igate("doctor")
    assert result.code == 130 and "Traceback" not in result.err and "stopped" in result.err
