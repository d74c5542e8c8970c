"""Lines of tegrastats in the four documented shapes, written here."""

from __future__ import annotations

from igate_edge.runtime.device_tegrastats import Tegrastats, parse_tegrastats

NANO = (
    "03-14-2025 09:26:53 RAM 2400/7620MB (lfb 3x2MB) SWAP 12/3810MB (cached 1MB) CPU [19%@729,off,3%@1510] "
    "EMC_FREQ 4%@2133 GR3D_FREQ 7%@[305] NVDEC off NVJPG off APE 200 cpu@46.5C soc2@47.3C gpu@48.2C cv0@-256C "
    "tj@48.8C VDD_IN 5700mW/5650mW VDD_CPU_GPU_CV 830mW/820mW VDD_SOC 1600mW/1590mW"
)
AGX = (
    "06-02-2026 10:00:00 RAM 9000/62792MB (lfb 4x4MB) SWAP 0/0MB (cached 0MB) CPU [1%@1728,2%@1728] "
    "EMC_FREQ 1%@3199 GR3D_FREQ 12%@[1300,1301] cpu@52.9C/53.5C gpu@49.1C/50.0C "
    "VDD_GPU_SOC 4000mW/4100mW/5200mW VDD_CPU_CV 800mW/810mW/900mW VIN_SYS_5V0 3500mW/3500mW/3600mW"
)


def test_orin_nano() -> None:
    found = parse_tegrastats(NANO)
    assert found.time == "03-14-2025 09:26:53" and found.ram_mb == (2400, 7620) and found.swap_mb == (12, 3810)
    assert found.cpu == ((0.19, 729), None, (0.03, 1510))
    assert (found.emc_load, found.emc_mhz, found.gpu_load, found.gpu_mhz) == (0.04, 2133, 0.07, (305,))
    assert found.temperatures == {"cpu": 46.5, "soc2": 47.3, "gpu": 48.2, "tj": 48.8}
    assert found.rails_mw["VDD_IN"] == (5700.0, 5650.0) and set(found.rails_mw) == {
        "VDD_IN",
        "VDD_CPU_GPU_CV",
        "VDD_SOC",
    }
    assert found.rest == "NVDEC off NVJPG off APE 200"


def test_agx_orin_has_peaks_and_two_clusters() -> None:
    found = parse_tegrastats(AGX)
    assert found.gpu_mhz == (1300, 1301) and found.temperatures == {"cpu": 52.9, "gpu": 49.1}
    assert found.rails_mw["VDD_GPU_SOC"] == (4000.0, 4100.0) and found.rest == ""


def test_thor_has_no_load() -> None:
    found = parse_tegrastats("RAM 4000/125683MB CPU [0%@2601] GR3D_FREQ @[1000,1001,1002] tj@40C")
    assert found.gpu_load is None and found.gpu_mhz == (1000, 1001, 1002) and found.temperatures == {"tj": 40.0}


def test_without_root_and_without_a_clock() -> None:
    found = parse_tegrastats("RAM 10/20MB CPU [5%,off] EMC_FREQ 0% GR3D_FREQ 10%@1300 cpu@40C")
    assert (found.emc_load, found.emc_mhz) == (0.0, None) and found.cpu == ((0.05, None), None)
    assert (found.gpu_load, found.gpu_mhz) == (0.1, (1300,))
    assert parse_tegrastats("GR3D_FREQ 55%").gpu_load == 0.55
    bare = parse_tegrastats("RAM 10/20MB CPU [5%@9]")
    assert bare.gpu_load is None and bare.emc_load is None and bare.swap_mb is None and bare.rails_mw == {}


def test_another_programs_line_is_kept_as_it_is() -> None:
    assert parse_tegrastats("bash: tegrastats: command not found") == Tegrastats(
        rest="bash: tegrastats: command not found"
    )
