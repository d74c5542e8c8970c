"""What a board does now: clocks and their lock, caps, temperatures, throttling, power."""

from __future__ import annotations

from pathlib import Path

import boards
import pytest

from igate_edge.runtime.device_state import State, capped, read_state, total_mw

GPU = "sys/class/devfreq/17000000.gpu"
CPU = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_{}_freq"
EMC = "sys/kernel/debug/bpmp/debug/clk/emc"


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    return boards.build(tmp_path, "orin-nano-super")


def lock(root: Path) -> None:
    for word in ("min", "cur"):
        boards.put(root, f"{GPU}/{word}_freq", 918_000_000)
        for core in (0, 1):
            boards.put(root, CPU.format(core, word), 1_344_000)
    boards.put(root, f"{EMC}/mrq_rate_locked", 1)


def test_everything_a_nano_tells(nano: Path) -> None:
    boards.put(nano, f"{EMC}/rate", 3_199_000_000)
    state = read_state(nano)
    assert state.gpu_hz == (306_000_000, 918_000_000, 306_000_000) and state.gpu_top_hz == 1_020_000_000
    assert state.cpu_khz == (729_600, 1_344_000, 1_113_600) and state.emc_hz == 3_199_000_000
    assert state.gpu_load == 0.125 and state.throttle_events == 4 and state.fan == 0.4
    assert state.temperatures == {"cpu": 46.5, "gpu": 48.187, "tj": 48.781}  # cv0 is off: -256
    assert state.rails_mw == {"VDD_IN": 5700.0, "VDD_CPU_GPU_CV": 830.0, "VDD_SOC": 1600.0}
    assert state.cooling == {}  # the fan is none that holds back


def test_thors_gpu_has_another_name_and_an_older_orins_too(tmp_path: Path) -> None:
    state = read_state(boards.build(tmp_path, "thor"))
    assert state.gpu_hz == (315_000_000, 1_386_000_000, 315_000_000) and state.rails_mw == {}
    for word in ("min", "max", "cur"):
        boards.put(tmp_path / "old", f"sys/class/devfreq/17000000.ga10b/{word}_freq", 5)
    assert read_state(tmp_path / "old").gpu_hz == (5, 5, 5)


def test_a_desktop_has_clocks_and_temperatures_only(tmp_path: Path) -> None:
    state = read_state(boards.build(tmp_path, "desktop"))
    wanted = State(cpu_khz=(800_000, 4_900_000, 1_200_000), temperatures={"x86_pkg_temp": 41.0})
    assert state == wanted and state.locked is None


def test_locked_is_all_three_clocks(nano: Path) -> None:
    assert read_state(nano).locked is False
    lock(nano)
    assert read_state(nano).locked is True


@pytest.mark.parametrize("path", [f"{GPU}/min_freq", CPU.format(1, "min"), CPU.format(0, "cur"), f"{GPU}/cur_freq"])
def test_one_clock_that_is_free_unlocks(nano: Path, path: str) -> None:
    lock(nano)
    boards.put(nano, path, 300_000)
    assert read_state(nano).locked is False


def test_a_memory_clock_that_only_root_can_read_is_unverified(nano: Path) -> None:
    lock(nano)
    boards.drop(nano, f"{EMC}/mrq_rate_locked")
    assert read_state(nano).locked is None
    boards.put(nano, f"{EMC}/mrq_rate_locked", 0)
    assert read_state(nano).locked is False


def test_a_core_that_is_off_does_not_count(nano: Path) -> None:
    lock(nano)
    boards.put(nano, CPU.format(1, "min"), 300_000)
    boards.put(nano, "sys/devices/system/cpu/cpu1/online", 0)
    state = read_state(nano)
    assert state.locked is True and state.cpu_khz == (1_344_000, 1_344_000, 1_344_000)


def test_a_cap_below_the_mode_is_seen(tmp_path: Path) -> None:
    """Case L5: MAXN is reported while the GPU may run up to 624 MHz only."""
    root = boards.build(tmp_path, "agx-orin")
    assert capped(read_state(root)) == ""
    boards.put(root, f"{GPU}/max_freq", 624_000_000)
    assert capped(read_state(root)) == "the GPU is held to 624 MHz, mode MAXN allows 1300 MHz"
    boards.drop(root, f"{GPU}/available_frequencies")
    assert capped(read_state(root)) == ""  # nobody tells what MAXN allows


def test_a_limit_of_the_mode_is_no_cap(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nx-16")
    assert capped(read_state(root)) == ""
    boards.put(root, f"{GPU}/max_freq", 306_000_000)
    assert "held to 306 MHz, mode 25W allows 408 MHz" in capped(read_state(root))


def test_what_holds_back_is_named(nano: Path) -> None:
    boards.put(nano, "sys/class/thermal/cooling_device1/cur_state", 2)
    assert read_state(nano).cooling == {"gpu-throttle-alert": 2}


def test_unconnected_channels_and_the_sum_of_shunts_are_no_rails(nano: Path) -> None:
    boards.put(nano, "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/in2_label", "NC\n")
    boards.put(nano, "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/curr7_input", 9)
    assert set(read_state(nano).rails_mw) == {"VDD_IN", "VDD_SOC"}


def test_power_of_a_board_without_an_input_rail_is_the_sum(tmp_path: Path) -> None:
    state = read_state(boards.build(tmp_path, "agx-orin"))
    assert total_mw(state.rails_mw) == 4000.0 + 800.0 + 3500.0 and total_mw({}) is None
