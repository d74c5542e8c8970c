"""Power modes: nvpmodel.conf's grammar, and which mode is set."""

from __future__ import annotations

from pathlib import Path

import boards
import pytest

from igate_edge.runtime.device_power import PowerMode, parse_conf, parse_query, power_mode, power_modes, tpc_mask_now


@pytest.mark.parametrize("name", boards.BOARDS)
def test_modes_are_those_of_the_conf_and_examples_in_comments_are_none(tmp_path: Path, name: str) -> None:
    board = boards.BOARDS[name]
    found = power_modes(boards.build(tmp_path, name))
    assert [(mode.id, mode.name) for mode in found] == [(mode.id, mode.name) for mode in board.modes]
    assert [mode.id for mode in found if mode.default] == [board.default]


def test_limits_of_a_mode(tmp_path: Path) -> None:
    modes = {mode.name: mode for mode in power_modes(boards.build(tmp_path, "orin-nano-super"))}
    assert modes["7W"] == PowerMode(3, "7W", 408_000_000, 2_133_000_000, 960_000, "252", 1)
    free = modes["MAXN_SUPER"]
    assert (free.gpu_max_hz, free.emc_max_hz, free.cpu_max_khz) == (None, None, None)


def test_more_watts_may_be_a_slower_gpu(tmp_path: Path) -> None:
    """Orin NX: 25W holds the GPU to 408 MHz, 15W to 612 on fewer clusters."""
    modes = {mode.name: mode for mode in power_modes(boards.build(tmp_path, "orin-nx-16"))}
    assert (modes["25W"].gpu_max_hz, modes["15W"].gpu_max_hz) == (408_000_000, 612_000_000)


def test_one_cluster_without_a_limit_means_no_limit() -> None:
    mode = "< POWER_MODEL ID=0 NAME=A >\nCPU_A78_0 MAX_FREQ 1000\nCPU_A78_1 MAX_FREQ {}\n"
    assert parse_conf(mode.format(1500)).modes[0].cpu_max_khz == 1500
    assert parse_conf(mode.format(-1)).modes[0].cpu_max_khz is None


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "< POWER_MODEL NAME=A >\nGPU MAX_FREQ 1\n", "GPU MAX_FREQ 1\n", "< POWER_MODEL ID=x NAME=A >"],
)
def test_a_conf_that_is_none_has_no_modes(text: str) -> None:
    assert parse_conf(text).modes == ()


def test_lines_of_a_mode_that_do_not_fit_are_skipped() -> None:
    (mode,) = parse_conf("< POWER_MODEL ID=4 >\nGPU MAX_FREQ\nGPU MAX_FREQ fast\nGPU MAX_FREQ 7\n").modes
    assert mode == PowerMode(4, "mode 4", 7)


def test_the_query_is_scanned_because_warnings_come_first() -> None:
    assert parse_query("NV Power Mode: MODE_30W\n2\n") == (2, "MODE_30W")
    assert parse_query("NVPM WARN: patching tpc_pg_mask: (0x1:0x4)\nNV Power Mode: 15W\n0\n") == (0, "15W")
    assert parse_query("NVPM ERROR: Error opening 0") == (None, "")


def test_the_status_file_tells_the_mode_and_else_the_tool(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nano-super")
    found = power_mode(root)
    assert found is not None and found.name == "25W" and not (root / "calls").exists()
    boards.drop(root, "var/lib/nvpmodel/status")
    assert power_mode(root) == found and (root / "calls").read_text() == "nvpmodel -q\n"
    boards.drop(root, "usr/sbin/nvpmodel")
    assert power_mode(root) is None


def test_a_mode_that_the_conf_does_not_have_keeps_its_id(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "thor")
    boards.put(root, "var/lib/nvpmodel/status", "pmode:0007 fmode:fanNull\n")
    assert power_mode(root) == PowerMode(7, "mode 7")
    boards.drop(root, "etc/nvpmodel.conf", "var/lib/nvpmodel/status")
    assert power_mode(root) == PowerMode(1, "120W")


def test_a_tool_that_fails_tells_nothing(tmp_path: Path) -> None:
    boards.put(tmp_path, "usr/sbin/nvpmodel", "#!/no/such/interpreter\n", 0o755)
    assert power_mode(tmp_path) is None


def test_the_kernels_own_mask_is_read_from_where_the_conf_says(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nx-16")
    assert tpc_mask_now(root) == 240
    boards.put(root, "sys/devices/platform/gpu.0/tpc_pg_mask", "0xfc\n")
    assert tpc_mask_now(root) == 252
    boards.drop(root, "sys/devices/platform/gpu.0/tpc_pg_mask")
    assert tpc_mask_now(root) is None
