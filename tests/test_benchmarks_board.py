"""Which Jetson measured is part of a benchmark's machine; what cannot be read there never matches."""

from __future__ import annotations

from pathlib import Path

import boards
import machine
import pytest


def test_a_boards_mode_and_real_clocks_are_part_of_the_machine(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "agx-orin")
    found = machine.describe(root / "sys")["machine"]
    assert found["power_mode"] == "MAXN" and found["gpu_limit_hz"] == 1_300_500_000 and found["clocks_locked"] is False
    boards.put(root, "sys/class/devfreq/17000000.gpu/max_freq", 624_000_000)
    assert machine.differences(found, machine.describe(root / "sys")["machine"]) == [
        "gpu_limit_hz: 1300500000 here, 624000000 there"
    ]


def test_a_board_that_does_not_tell_is_unverified(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "agx-orin")
    boards.drop(root, "var/lib/nvpmodel", "usr/sbin/nvpmodel", "sys/class/devfreq")
    found = machine.board(root)
    assert (found["power_mode"], found["gpu_limit_hz"], found["clocks_locked"]) == ("unverified",) * 3


@pytest.mark.parametrize("name", ["desktop", "nothing"])
def test_off_a_jetson_nothing_is_added(tmp_path: Path, name: str) -> None:
    root = boards.build(tmp_path, name) if name == "desktop" else tmp_path
    assert machine.board(root) == {}
