"""Which board this is, from trees of five of them; and nothing but None where nothing is told."""

from __future__ import annotations

from pathlib import Path

import boards
import pytest

from igate_edge.runtime.device import Device, State, fingerprint, power_modes, read_device, read_state, swap_used_mb
from igate_edge.runtime.device_sysfs import number, text

WANTED = {
    "orin-nano-super": ("Orin Nano 8GB developer kit (p3767-0005)", "tegra234", 87, "36.4.3", "6.2", 7620),
    "orin-nx-16": ("Orin NX 16GB (p3767-0000)", "tegra234", 87, "36.4.4", "6.2.1", 15605),
    "agx-orin": ("AGX Orin 64GB (p3701-0005)", "tegra234", 87, "39.2.0", "7.2", 62792),
    "thor": ("Thor T5000 (p3834-0008)", "tegra264", 110, "38.2.1", "7.0", 125683),
    "desktop": (None, None, None, None, None, 31835),
}


@pytest.fixture(params=boards.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_each_board_is_known(tmp_path: Path, name: str) -> None:
    device = read_device(boards.build(tmp_path, name))
    found = (device.module, device.soc, device.sm, device.l4t, device.jetpack, device.memory_mb)
    assert found == WANTED[name]
    assert device.jetson == (name != "desktop") and not device.container
    assert device.machine == ("x86_64" if name == "desktop" else "aarch64")


def test_swap_on_disk_and_compressed_memory_are_told_apart(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nano-super")
    device = read_device(root)
    assert (device.swap_mb, device.zram_mb) == (8_388_604 // 1024, 7_803_000 // 2 // 6 * 6 // 1024)
    head = "Filename Type Size Used Priority\n"
    boards.put(root, "proc/swaps", f"{head}/dev/zram0 partition 2048 1024 5\n/swapfile file 4096 3072 -2\n")
    assert swap_used_mb(root) == 4
    boards.put(root, "proc/swaps", head)
    assert (read_device(root).swap_mb, swap_used_mb(root)) == (0, 0)


def test_in_a_container_the_l4t_comes_from_dpkg_and_the_chip_from_its_gpu(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nx-16")
    boards.put(root, ".dockerenv", "")
    boards.drop(root, "proc/device-tree", "etc/nv_tegra_release", "etc/nvpmodel.conf", "var/lib/nvpmodel")
    boards.drop(root, "usr/sbin/nvpmodel")
    device = read_device(root)
    assert device.container and device.l4t == "36.4.4" and (device.soc, device.sm) == ("tegra234", 87)
    assert device.board is None and read_state(root).power_mode is None
    assert fingerprint(root) == {"soc": "tegra234", "l4t": "36.4.4"}


@pytest.mark.parametrize("cgroup", ["0::/docker/4fa6e0", "1:cpu:/kubepods/burst", "0::/machine.slice/libpod-4fa"])
def test_a_container_shows_in_its_cgroup(tmp_path: Path, cgroup: str) -> None:
    boards.put(tmp_path, "proc/1/cgroup", cgroup + "\n")
    assert read_device(tmp_path).container


def test_a_package_that_was_removed_is_no_release(tmp_path: Path) -> None:
    removed = "Package: nvidia-l4t-core\nStatus: deinstall ok config-files\nVersion: 36.4.3-2025\n"
    boards.put(tmp_path, "var/lib/dpkg/status", removed)
    assert read_device(tmp_path).l4t is None


def test_the_second_place_of_the_device_tree_is_read(tmp_path: Path) -> None:
    boards.put(tmp_path, "sys/firmware/devicetree/base/compatible", "nvidia,p3701-0008\0nvidia,tegra234\0")
    device = read_device(tmp_path)
    assert device.module == "AGX Orin Industrial (p3701-0008)" and device.jetson


def test_an_unknown_module_is_named_by_its_number_and_another_vendor_is_no_jetson(tmp_path: Path) -> None:
    boards.put(tmp_path, "proc/device-tree/compatible", "nvidia,p3768-0000+p3999-0001\0nvidia,tegra999\0")
    device = read_device(tmp_path)
    assert (device.module, device.soc, device.sm) == ("p3999-0001", "tegra999", None)
    boards.put(tmp_path, "proc/device-tree/compatible", "raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert not read_device(tmp_path).jetson and fingerprint(tmp_path) == {}


def test_an_empty_root_tells_nothing(tmp_path: Path) -> None:
    device = read_device(tmp_path)
    assert device == Device(machine=device.machine) and not device.jetson
    assert read_state(tmp_path) == State() and power_modes(tmp_path) == () and fingerprint(tmp_path) == {}


@pytest.mark.parametrize("damage", ["empty", "folder", "bytes"])
def test_damaged_telemetry_is_absent_and_stops_nothing(tmp_path: Path, name: str, damage: str) -> None:
    """A folder in a file's place fails as an unreadable file does, for root too."""
    root = boards.build(tmp_path, name)
    for path in [path for path in root.rglob("*") if path.is_file()]:
        path.write_bytes(b"\xff\0\xfe garbage" if damage == "bytes" else b"")
        if damage == "folder":
            path.unlink()
            path.mkdir()
    state = read_state(root)
    assert state.gpu_hz is None and state.emc_hz is None and state.locked is None and state.throttle_events is None
    assert state.temperatures == {} and state.rails_mw == {} and state.gpu_load is None and state.power_mode is None
    assert read_device(root).memory_mb is None and power_modes(root) == ()


def test_fingerprint_holds_the_mode_and_no_clock_of_the_moment(tmp_path: Path) -> None:
    root = boards.build(tmp_path, "orin-nano-super")
    before = fingerprint(root)
    assert before["power_mode"] == "25W" and before["gpu_max_hz"] == "918000000" and before["l4t"] == "36.4.3"
    boards.put(root, "sys/class/devfreq/17000000.gpu/max_freq", 624_000_000)
    boards.put(root, "sys/class/thermal/thermal_zone0/temp", 90_000)
    assert fingerprint(root) == before
    boards.put(root, "var/lib/nvpmodel/status", "pmode:0000 fmode:fanNull\n")
    assert fingerprint(root) != before and fingerprint(root)["power_mode"] == "15W"


def test_small_files_are_read_with_care(tmp_path: Path) -> None:
    assert text(tmp_path) is None and number(tmp_path / "none") is None
    assert text(boards.put(tmp_path, "a", " x\0")) == "x"
    assert number(boards.put(tmp_path, "b", "0x1F\n")) == 31 and number(boards.put(tmp_path, "c", "12 mW")) is None
