"""`igate jetson`: what a board does, and changes that are only shown until --apply, run by real stand-in tools."""

from __future__ import annotations

from pathlib import Path

import boards
import pytest
from igate_command import igate, refused

from igate_edge import cli_console, cli_jetson
from igate_edge.errors import CheckFailed, InputError, UnavailableError

MIN = "sys/class/devfreq/17000000.gpu/min_freq"


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    return boards.build(tmp_path, "orin-nano-super")


def calls(root: Path) -> list[str]:
    file = root / "calls"
    return [line.strip() for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("name", boards.BOARDS)
def test_status_of_each_board(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = cli_jetson.status(boards.build(tmp_path, name))
    cli_console._print_answer(answer, False)
    out = capsys.readouterr().out
    board = boards.BOARDS[name]
    for word in (board.model, "not locked", "4 since boot", "now", "default", *(mode.name for mode in board.modes)):
        assert word in out
    assert ("unverified" in out.split("\npower   ")[1].splitlines()[0]) == (not board.rails) and "None" not in out
    assert [mode.name for mode in answer.document["power_modes"]] == [mode.name for mode in board.modes]


def test_status_says_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boards.put(tmp_path, "etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 1\n")
    cli_console._print_answer(cli_jetson.status(tmp_path), False)
    out = capsys.readouterr().out
    assert out.count("unverified") >= 8 and "device tree cannot be read" in out and " 0" not in out.split("fan")[1]


@pytest.mark.parametrize("arguments", [("status",), ("power", "15W"), ("lock",), ("lock", "--restore")])
def test_off_a_jetson_it_is_a_sentence(arguments: tuple[str, ...]) -> None:
    refused(igate("jetson", *arguments, "--json"), 3, "not a Jetson")


def test_power_only_shows_the_command(nano: Path) -> None:
    answer = cli_jetson.power("maxn_super", root=nano)
    assert answer.document == {"commands": ["sudo nvpmodel -m 2"], "applied": False, "reboot": False}
    assert "  sudo nvpmodel -m 2" in answer.shown and "Nothing was changed" in answer.shown[-1]
    assert calls(nano) == []


def test_power_by_name_is_another_id_on_another_board(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nx-16")
    assert cli_jetson.power("15W", root=root).document["commands"] == ["sudo nvpmodel -m 2"]
    assert cli_jetson.power("MAXN_SUPER", root=root).document["commands"] == ["sudo nvpmodel -m 0"]


def test_an_unknown_mode_lists_the_boards_own(nano: Path) -> None:
    with pytest.raises(InputError, match="no power mode 40W: this board has 15W, 25W, MAXN_SUPER, 7W"):
        cli_jetson.power("40W", root=nano)


def test_power_is_set_and_read_back(nano: Path) -> None:
    answer = cli_jetson.power("15W", True, nano, user=0)
    assert calls(nano) == ["nvpmodel -m 0"] and answer.document["applied"] is True
    assert "now" in str(cli_jetson.status(nano).shown[1].rows[0])
    assert cli_jetson.power("15W", True, nano, user=0).document["commands"] == []  # set already
    assert calls(nano) == ["nvpmodel -m 0"]


def test_a_mode_that_the_tool_did_not_take_is_a_failed_check(nano: Path) -> None:
    boards.put(nano, "usr/sbin/nvpmodel", "#!/bin/sh\n", 0o755)
    with pytest.raises(CheckFailed, match="15W was not taken: nvpmodel now says 25W"):
        cli_jetson.power("15W", True, nano, user=0)


def test_a_tool_that_fails_says_why(nano: Path) -> None:
    boards.put(nano, "usr/sbin/nvpmodel", "#!/bin/sh\necho 'NVPM ERROR: no' >&2\nexit 4\n", 0o755)
    with pytest.raises(CheckFailed, match="nvpmodel -m 0 failed: NVPM ERROR: no"):
        cli_jetson.power("15W", True, nano, user=0)
    boards.put(nano, "usr/sbin/nvpmodel", "#!/no/such/shell\n", 0o755)
    with pytest.raises(UnavailableError, match="cannot run nvpmodel"):
        cli_jetson.power("15W", True, nano, user=0)


def test_without_root_nothing_is_run(nano: Path) -> None:
    with pytest.raises(UnavailableError, match="needs root.*sudo nvpmodel -m 0"):
        cli_jetson.power("15W", True, nano, user=1000)
    with pytest.raises(UnavailableError, match="needs root"):
        cli_jetson.lock(True, root=nano, user=1000)
    assert calls(nano) == []


def test_a_mode_that_needs_a_reboot_is_left_to_the_user(nano: Path) -> None:
    answer = cli_jetson.power("7W", root=nano)
    assert answer.document["reboot"] is True and "asks whether to reboot" in " ".join(answer.shown)
    with pytest.raises(UnavailableError, match="needs a reboot.*sudo nvpmodel -m 3"):
        cli_jetson.power("7W", True, nano, user=0)
    assert calls(nano) == []


def test_a_set_mode_with_a_capped_gpu_is_set_again(nano: Path) -> None:
    boards.put(nano, "sys/class/devfreq/17000000.gpu/max_freq", 624_000_000)
    assert cli_jetson.power("25W", root=nano).document["commands"] == ["sudo nvpmodel -m 1"]


def test_lock_only_shows_the_commands(nano: Path) -> None:
    answer = cli_jetson.lock(root=nano)
    assert answer.document["commands"] == [
        "sudo mkdir -p /var/lib/igate-edge",
        f"sudo jetson_clocks --store {cli_jetson.STORE}",
        "sudo jetson_clocks",
    ]
    assert calls(nano) == [] and (nano / MIN).read_text() == "306000000\n"


def test_lock_stores_once_locks_and_is_undone(nano: Path) -> None:
    answer = cli_jetson.lock(True, root=nano, user=0)
    store = nano / cli_jetson.STORE.lstrip("/")
    assert calls(nano) == [f"jetson_clocks --store {store}", "jetson_clocks"] and store.parent.is_dir()
    assert answer.document["locked"] is True and answer.shown[-1] == "locked"
    store.write_text("clocks from before")
    assert cli_jetson.lock(root=nano).document["commands"] == ["sudo jetson_clocks"]  # never stores locked clocks
    cli_jetson.lock(True, True, nano, user=0)
    assert calls(nano)[-1] == f"jetson_clocks --restore {store}" and not store.exists()


def test_clocks_that_stay_free_are_a_failed_check(nano: Path) -> None:
    boards.put(nano, "usr/bin/jetson_clocks", "#!/bin/sh\n", 0o755)
    with pytest.raises(CheckFailed, match=r"the clocks are not locked: GPU 306 MHz \(306 to 918\)"):
        cli_jetson.lock(True, root=nano, user=0)


def test_there_is_nothing_to_restore_before_a_lock(nano: Path) -> None:
    with pytest.raises(UnavailableError, match="no clocks to restore"):
        cli_jetson.lock(restore=True, root=nano)
