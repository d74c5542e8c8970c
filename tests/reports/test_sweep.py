"""What a sweep says: means over seeds, winners within a budget, what a millisecond buys, and the picture."""

from __future__ import annotations

import io

import pytest
from sweep_document import NETS, document

from igate_edge.reports import sweep, sweep_plot
from igate_edge.reports.results_table import markdown
from igate_edge.training.goal import Goal


def test_points_are_means_over_seeds_in_order_of_kind_and_time() -> None:
    found = sweep.points(document())
    wanted = ["narrow-12", "plain", "wide-40", "wide-48", "random-150", "ours-150", "ours-200"]
    assert [point.name for point in found] == wanted
    ours = found[-1]
    assert ours.delta == (-1.0 - 2.0) / 2 and ours.by_seed == {0: -1.0, 1: -2.0} and ours.ms == 1.99 * 2.0
    assert ours.label == "ours at 2x" and found[0].label == "2 single-task nets of width 12"


def test_a_net_without_an_int8_engine_is_left_out() -> None:
    whole = document(seeds=(0,))
    for name in ("ms", "ms_ratio", "int8", "int8_delta_mtl"):
        del whole["rows"][1][name]
    assert "wide-40" not in [point.name for point in sweep.points(whole)]


def test_the_winner_is_the_best_that_fits_and_never_the_control() -> None:
    first, second = sweep.verdicts(document())
    assert (first.best.name, second.best.name) == ("ours-150", "ours-200")
    assert first.second is not None and first.second.name == "wide-40" and first.margin == -3.0 - (-3.5 - 4.0) / 2
    assert first.agreed and second.agreed
    assert "At 1.5x (3.00 ms): ours at 1.5x, 2.96 ms, delta -3.0 %; 0.8 ahead of plain net of width 40" in (
        sweep.verdict_line(first)
    )


def test_a_slower_net_does_not_win_a_smaller_budget_and_rivals_win_where_they_are_better() -> None:
    nets = {**NETS, "ours-150": (["150"], 1.6, 5.0, 5.0), "wide-48": (["200"], 2.0, 8.0, 8.0)}
    first, second = sweep.verdicts(document(nets))
    assert (first.best.name, second.best.name) == ("wide-40", "wide-48")
    plain_best = sweep.verdicts(document({**nets, "wide-40": (["150"], 1.5, -9.0, -9.0)}))[0]
    assert plain_best.best.name == "plain"


def test_seeds_that_disagree_and_a_single_seed_are_said() -> None:
    nets = {**NETS, "ours-150": (["150"], 1.48, -3.6, -3.0)}
    assert "2 seeds disagree" in sweep.verdict_line(sweep.verdicts(document(nets))[0])
    alone = sweep.verdicts(document(seeds=(0,)))[0]
    assert "one seed" in sweep.verdict_line(alone) and not alone.agreed


def test_what_a_millisecond_buys_is_a_slope_through_the_plain_net() -> None:
    # ours: 0.96 ms for +1.5, 1.98 ms for +3.0; widened: 1 ms for +0.75, 2 ms for -2.
    ours = (0.96 * 1.5 + 1.98 * 3.0) / (0.96**2 + 1.98**2)
    wide = (1.0 * 0.75 - 2.0 * 2.0) / (1.0 + 4.0)
    line = sweep.millisecond_line(document())
    assert f"{ours:+.1f} with ours" in line and f"{wide:+.1f} with the plain net widened" in line
    assert "plain net's 2.00 ms" in line


def test_the_front_holds_what_nothing_beats() -> None:
    assert [point.name for point in sweep.front(sweep.points(document()))] == ["plain", "ours-150", "ours-200"]


def test_cost_counts_what_budgets_share_once() -> None:
    line = sweep.cost_line(document())
    assert f"2 budgets took the compute of {0.46 + 2 * 0.54:.1f} trainings" in line and "1.5 to 1.5 times" in line


def test_nothing_measured_says_nothing() -> None:
    empty = {**document(), "rows": []}
    assert sweep.verdicts(empty) == [] and sweep.millisecond_line(empty) == sweep.cost_line(empty) == ""
    assert sweep.sweep_grid(empty).rows == []


def test_the_table_shows_every_measured_net_and_marks_the_winners() -> None:
    grid = sweep.sweep_grid(document())
    assert [row[0] for row in grid.rows] == [point.label for point in sweep.points(document())]
    assert {grid.rows[k][0] for k in grid.strong} == {"ours at 1.5x", "ours at 2x"}
    assert grid.rows[-1][1:5] == ["3.98", "1.99x", "3.98", "-1.5 %"] and "seeds 0, 1" in grid.note
    assert grid.rows[-1][-1] == "1.50x"


def test_the_readme_table_says_what_every_row_is() -> None:
    lines = markdown(document()).splitlines()
    assert len(lines) == 2 + 2 * len(NETS)
    assert "| **ours at 2x** | 1 | 0.700 | 0.500 | - | -2.0 | - | 1.99x | 3.98 | 199 | 179 | 150 |" in lines


def test_the_picture_is_drawn_and_separate_nets_far_below_do_not_press_the_rest() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'igate-edge[report]'")
    pillow = pytest.importorskip("PIL.Image")
    found = sweep.points(document())
    near = [point.delta for point in found if point.kind != "narrow"]
    floor = sweep_plot.lowest_shown(found)
    assert floor == min(near) - 0.7 * (max(near) - min(near)) > -20.0
    picture = pillow.open(io.BytesIO(sweep_plot.sweep_png(document()))).convert("RGB")
    assert picture.size == (1350, 840)
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    for kind in ("ours", "wide", "narrow"):
        text = sweep_plot.STYLES[kind][0].removeprefix("#")
        assert tuple(int(text[k : k + 2], 16) for k in (0, 2, 4)) in colours, kind


def test_one_net_alone_can_be_drawn() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'igate-edge[report]'")
    only = document({"plain": NETS["plain"]}, seeds=(0,))
    assert sweep_plot.sweep_png(only).startswith(b"\x89PNG")
    assert sweep.candidates(sweep.points(only), Goal(ratio=1.1))[0].name == "plain"
