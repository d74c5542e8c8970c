"""The sharing map: every task's own channels, once each, in the right place and amount."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from report_evidence import OPEN, SITES

from igate_edge.reports.sharing import STRIP, layers, runs, sharing_svg, stage_fractions, stage_of, task_colour

TASKS = list(OPEN)


def bars(svg: str, colour: str) -> list[tuple[float, float]]:
    """(x, width) of every channel bar of this colour."""
    root = ET.fromstring(svg)
    rects = [r for r in root.iter() if r.tag.endswith("rect") and r.get("fill") == colour and r.get("height") != "11"]
    return [(float(r.get("x") or 0), float(r.get("width") or 0)) for r in rects]


def test_the_map_is_well_formed_and_each_task_covers_exactly_its_share() -> None:
    svg = sharing_svg(layers(SITES, TASKS), TASKS)
    covered = {task: sum(width for _, width in bars(svg, task_colour(k))) for k, task in enumerate(TASKS)}
    assert covered == {"semseg": pytest.approx(STRIP * 2 / 4), "depth": pytest.approx(STRIP * 1 / 4), "normals": 0}


def test_channels_that_two_tasks_own_stand_at_the_same_place() -> None:
    svg = sharing_svg(layers(SITES, TASKS), TASKS)
    (own,), (both,) = bars(svg, task_colour(0)), bars(svg, task_colour(1))
    assert both[0] + both[1] == pytest.approx(own[0] + own[1]), "owned by both: sorted to the end"


def test_channels_are_ordered_from_shared_to_owned_by_all() -> None:
    assert layers(SITES, TASKS)[0].codes() == ["000", "000", "100", "110"]


def test_a_hostile_name_stays_text() -> None:
    svg = sharing_svg(layers([{**SITES[0], "name": "<script>x</script>"}], TASKS), TASKS)
    assert "<script" not in svg and "&lt;script&gt;" in svg


def test_nothing_gated_gives_no_map() -> None:
    assert sharing_svg([], TASKS) == ""


def test_stage_fractions_pool_the_channels_of_a_stage() -> None:
    second = {**SITES[1], "name": "layer1.1.out", "channels": 4, "open": {**OPEN, "semseg": "1000"}}
    rows = stage_fractions(layers([*SITES, second], TASKS), TASKS)
    assert rows == [("stem", 4, [2 / 4, 1 / 4, 0]), ("layer1", 8, [1 / 8, 1 / 8, 0])]


@pytest.mark.parametrize(
    ("site", "stage"), [("layer3.1.relu2", "layer3"), ("stem", "stem"), ("layer3_1_relu", "layer3")]
)
def test_stage_is_the_first_part_of_a_name(site: str, stage: str) -> None:
    assert stage_of(site) == stage


def test_runs_join_equal_neighbours_and_lose_none() -> None:
    assert runs("110111") == [("1", 0, 2), ("0", 2, 1), ("1", 3, 3)]
    assert re.fullmatch("#[0-9a-f]{6}", task_colour(0))
    assert len({task_colour(k) for k in range(8)}) == 8
