"""Latency tables measured: laws are found again, a machine that moves is measured again and at last refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from profiled import LAUNCH, MADE, NODE, READ, Machine, few

from igate_edge import profiler, profiler_clock, profiler_jobs
from igate_edge.compiler.latency import LatencyTable
from igate_edge.devicetable import find, table_name
from igate_edge.errors import InputError, UnavailableError
from igate_edge.profiler import Asked, profile
from igate_edge.profiler_clock import Means, Pulse, clocks, steady
from igate_edge.profiler_fit import LEAST_ERROR
from igate_edge.profiler_nets import pairs

__all__ = ["few"]
STEADY = Pulse(1.0, 1.0)


def means(*pulses: Pulse) -> tuple[Means, list[float]]:
    """Means with these pulses, and the list that collects its pauses."""
    coming, paused = iter(pulses), list[float]()

    def never(*_: Any) -> Any:
        raise AssertionError("not asked for")

    return Means(lambda: next(coming), never, never, paused.append), paused


def measure(spreads: Iterable[float]) -> Callable[[], tuple[str, float]]:
    coming = iter(spreads)
    return lambda: ("times", next(coming))


def test_what_stands_still_is_measured_once() -> None:
    machine, paused = means(STEADY, Pulse(1.04, 0.9))
    assert steady(measure([0.01]), machine, "it") == ("times", 0.01, 1.02) and paused == []


def test_a_spread_above_the_limit_is_measured_again() -> None:
    machine, paused = means(*[STEADY] * 6)
    assert steady(measure([0.5, 0.2, 0.01]), machine, "it")[1] == 0.01
    assert paused == list(profiler_clock.PAUSES[:2])


@pytest.mark.parametrize(
    ("pulses", "spread", "word"),
    [
        ([STEADY, STEADY], 0.25, "two measurements of the same differ by 25.0%"),
        ([STEADY, Pulse(1.3, 1.0)], 0.0, "the clocks moved: the reference network took 1.00, then 1.30 ms"),
        ([Pulse(1.0, 0.3), STEADY], 0.0, "under load: the timed core was ours for 30% of the time"),
    ],
)
def test_what_never_stands_still_is_refused_with_the_reason(pulses: list[Pulse], spread: float, word: str) -> None:
    tries = len(profiler_clock.PAUSES) + 1
    machine, paused = means(*pulses * tries)
    with pytest.raises(UnavailableError, match=word) as caught:
        steady(measure([spread] * tries), machine, "network 'x'")
    assert (
        paused == list(profiler_clock.PAUSES) and "network 'x'" in str(caught.value) and "--resume" in caught.value.fix
    )


def test_the_law_of_a_machine_is_found_again(few: Callable[[], int], tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    table = profile(path, Asked(), bring=Machine().bring)
    for pixels, cin, cout in ((4, 16, 32), (9, 10, 32), (48, 32, 48), (30, 16, 24)):
        wanted = LAUNCH + READ * pixels * cin + MADE * pixels * cout
        assert table.conv_ms((3, 3), 1, (pixels, 1), cin, cout) == pytest.approx(wanted, rel=0.05)
    assert table.op_ms("Clip", 256, 256) == pytest.approx(LAUNCH + (READ + MADE) * 256, rel=0.1)
    assert table.overhead_ms == pytest.approx(NODE, rel=0.1) and table.spread == 0
    assert all(anchor == pytest.approx(1, abs=0.1) for anchor in table.anchors.values()) and table.error == LEAST_ERROR
    again = LatencyTable.load(path)
    assert again.as_json() == table.as_json() and again.foreign() == "" and not path.with_name("t.json.part").exists()
    assert {"cpu", "clock_khz", "governor", "celsius"} <= again.device.keys() and again.date[:2] == "20"


def test_a_machine_that_is_slower_for_a_while_gives_the_same_table(few: Callable[[], int], tmp_path: Path) -> None:
    machine = Machine()

    def watch(items: Iterable[Any], count: int) -> Iterator[Any]:
        for index, item in enumerate(items):
            machine.slow = 1.5 if index % 3 == 0 else 1.0  # within one network it stands still
            yield item
        machine.slow = 1.0

    steady_table = profile(tmp_path / "a.json", Asked(), bring=Machine().bring)
    table = profile(tmp_path / "b.json", Asked(), bring=machine.bring, watch=watch)
    for cin, cout in ((16, 32), (32, 24), (10, 16)):
        wanted = steady_table.conv_ms((3, 3), 1, (4, 4), cin, cout)
        assert table.conv_ms((3, 3), 1, (4, 4), cin, cout) == pytest.approx(wanted, rel=1e-3)


def test_a_float_table_measures_float_networks(few: Callable[[], int], tmp_path: Path) -> None:
    table = profile(tmp_path / "f.json", Asked(precision="float"), bring=Machine().bring)
    assert "3x3 float" in table.conv and not any(key.endswith("signed") for key in table.conv)


def test_a_stopped_measurement_goes_on(few: Callable[[], int], tmp_path: Path) -> None:
    path, machine = tmp_path / "t.json", Machine()
    machine.stop_after = 10  # two calls a network
    with pytest.raises(KeyboardInterrupt):
        profile(path, Asked(), bring=machine.bring)
    part = path.with_name("t.json.part")
    assert not path.exists() and len(json.loads(part.read_text())["jobs"]) == 5
    whole = Machine()
    table = profile(path, Asked(), resume=True, bring=whole.bring)
    assert whole.calls == 2 * (few() - 5), "what was measured is not measured again"
    fresh = profile(tmp_path / "u.json", Asked(), bring=Machine().bring)
    assert table.as_json() == fresh.as_json() and not part.exists()


def test_without_resume_everything_is_measured(few: Callable[[], int], tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.with_name("t.json.part").write_text("of an older one")
    machine = Machine()
    profile(path, Asked(), bring=machine.bring)
    assert machine.calls == 2 * few()
    with pytest.raises(UnavailableError):  # and nothing is left to resume: it is begun anew, and fails here
        machine.share = 0.1
        profile(path, Asked(), resume=True, bring=machine.bring)
    assert LatencyTable.load(path), "the whole table is still there"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda about: about["device"].update(cpu="another"), "its device is another"),
        (lambda about: about["backend"].update(version="0.1"), "its backend is another"),
        (lambda about: about.update(threads=2), "its threads is another"),
        (lambda about: about.update(quick=True), "its quick is another"),
        (lambda about: about.update(version="0"), "its version is another"),
    ],
)
def test_a_part_of_elsewhere_is_refused(
    few: Callable[[], int], change: Callable[[dict[str, Any]], Any], word: str, tmp_path: Path
) -> None:
    machine = Machine()
    machine.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        profile(tmp_path / "t.json", Asked(), bring=machine.bring)
    part = tmp_path / "t.json.part"
    document = json.loads(part.read_text())
    document["about"]["device"]["celsius"] = 99.0  # a warmer machine is the same machine
    part.write_text(json.dumps(document))
    machine.stop_after = machine.calls
    with pytest.raises(KeyboardInterrupt):
        profile(tmp_path / "t.json", Asked(), resume=True, bring=machine.bring)
    change(document["about"])
    part.write_text(json.dumps(document))
    with pytest.raises(InputError, match=word):
        profile(tmp_path / "t.json", Asked(), resume=True, bring=machine.bring)
    part.write_text(json.dumps(document)[:50])
    with pytest.raises(InputError, match="the kept part cannot be read"):
        profile(tmp_path / "t.json", Asked(), resume=True, bring=machine.bring)


@pytest.mark.parametrize(
    "change", [{"reference": None}, {"reference": 0}, {"spread": float("nan")}, {"nodes": [["Conv", 1, 2]]},
               {"nodes": [["Conv", 1, 2, "x"]]}, {"nodes": [[None, 1, 2, 0.5]]}, {"nodes": 5}],
)  # fmt: skip
def test_a_part_with_a_job_that_is_not_whole_is_refused_and_kept(
    few: Callable[[], int], change: dict[str, Any], tmp_path: Path
) -> None:
    machine = Machine()
    machine.stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        profile(tmp_path / "t.json", Asked(), bring=machine.bring)
    part = tmp_path / "t.json.part"
    document = json.loads(part.read_text())
    next(iter(document["jobs"].values())).update(change)
    part.write_text(json.dumps(document))
    before, machine.stop_after = part.read_text(), None
    with pytest.raises(InputError, match="the kept part cannot be read"):
        profile(tmp_path / "t.json", Asked(), resume=True, bring=machine.bring)
    assert part.read_text() == before


def test_a_folder_is_refused_before_anything_is_measured(few: Callable[[], int], tmp_path: Path) -> None:
    machine = Machine()
    with pytest.raises(InputError, match="is a folder"):
        profile(tmp_path, Asked(), bring=machine.bring)
    assert machine.calls == 0


def test_what_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="int4"):
        Asked(precision="int4")
    with pytest.raises(InputError, match="threads"):
        Asked(threads=0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with pytest.raises(UnavailableError, match=r"2 threads asked for, 1 core\(s\) free"):
        Asked(threads=2)


def test_one_core_and_silent_clocks_are_said(
    few: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = profile(tmp_path / "t.json", Asked(), bring=Machine().bring)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    table.device.update(governor="performance", clock_max_khz="unverified")
    assert any("one core only" in note for note in profiler.notes(table))
    assert any("clocks" in note for note in profiler.notes(table))
    table.device.update(clock_max_khz="1500000")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert profiler.notes(table) == []


def test_clocks_are_read_and_what_is_missing_is_unverified(tmp_path: Path) -> None:
    assert set(clocks(tmp_path).values()) == {"unverified"}
    core = tmp_path / "devices/system/cpu/cpu0/cpufreq"
    core.mkdir(parents=True)
    (core / "scaling_governor").write_text("performance\n")
    (core / "scaling_max_freq").write_text("624000\n")
    (core / "scaling_cur_freq").mkdir()  # there, but not readable
    for index, degrees in enumerate(("48500", "51000", "not a number")):
        zone = tmp_path / f"class/thermal/thermal_zone{index}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(degrees)
    found = clocks(tmp_path)
    assert (found["governor"], found["clock_max_khz"], found["clock_khz"]) == ("performance", "624000", "unverified")
    assert found["celsius"] == 51.0


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("model name : AMD EPYC 7763 64-Core Processor\nflags : fpu avx2 sse", "epyc-7763-avx2-1t"),
        ("model name : Intel(R) Core(TM) i7-1185G7 @ 3.00GHz\nflags : avx2 avx512_vnni", "i7-1185g7-avx512-vnni-1t"),
        ("model name : ARMv8 Processor rev 1 (v8l)\nFeatures : fp asimd asimddp", "armv8-rev-asimddp-1t"),
    ],
)
def test_a_tables_name_tells_the_processor(lines: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(lines + "\n")
    assert table_name(1, cpuinfo=path).endswith(f"-{name}")
    assert table_name(2, "float", path).endswith("-2t-float")


def test_the_machines_own_table_is_found(few: Callable[[], int], tmp_path: Path) -> None:
    table = profile(tmp_path / f"{table_name(1)}.json", Asked(), bring=Machine().bring)
    found, why = find(1, own=tmp_path)
    assert found is not None and why == "" and found.as_json() == table.as_json()
    none, why = find(7, "float", tmp_path)
    assert none is None and "`igate profile --threads 7 --precision float`" in why
    (tmp_path / f"{table_name(7)}.json").write_text("{")
    assert "cannot be used" in find(7, own=tmp_path)[1]
    foreign = {**table.as_json(), "device": {**table.device, "cpu": "another"}, "threads": 7}
    (tmp_path / f"{table_name(7)}.json").write_text(json.dumps(foreign))
    assert "another machine" in find(7, own=tmp_path)[1]


def test_every_ordered_pair_is_measured_once() -> None:
    line = pairs([4, 8, 16, 32])
    assert sorted(zip(line, line[1:], strict=False)) == sorted((a, b) for a in (4, 8, 16, 32) for b in (4, 8, 16, 32))


@pytest.mark.parametrize("precision", ["int8", "float"])
def test_a_plan_covers_all_kinds_and_no_network_is_too_large(precision: str) -> None:
    plan = profiler_jobs.jobs(precision)
    names = [job.name for job in plan]
    assert len(set(names)) == len(names) and len(profiler_jobs.jobs(precision, quick=True)) < len(plan) / 1.5
    points = [point for job in plan for point in job.points if point]
    for label, pixels, cin, cout in points:
        taps = 9 if "3x3" in label else 1
        assert pixels * taps * cin * cout <= 1.1 * profiler_jobs.MOST_MACS or "depthwise" in label or "output" in label
    kinds = {"unsigned", "signed", "loose", "output"} if precision == "int8" else {"float"}
    for kernel in ("1x1", "3x3"):
        assert {f"grid {kernel} {kind}" for kind in kinds} <= {point[0] for point in points}
