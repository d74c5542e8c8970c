"""The nets of a comparison on tiny frames: order, equal compute, random gates of the same counts, rows of the table."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_frames import BUDGET, CONFIG, FITS, WEIGHTS, write_latency, write_widths

from igate_edge.errors import InputError
from igate_edge.training import results
from igate_edge.training.draws import joint, shuffled
from igate_edge.training.goal import Goal
from igate_edge.training.loop import step_macs
from igate_edge.training.results_rows import budgets_of, collect, collect_all, spent
from igate_edge.training.rivals import DEFAULT, Shares, Table
from igate_edge.training.stages import Done, build_gated, build_plain
from igate_edge.training.tabletop import generate

STEPS = 20
pytestmark = pytest.mark.timeout(900)  # all units are trained once, by the first test


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate(folder, train=6, val=4, size=(32, 32), progress=False)
    return folder


@pytest.fixture(scope="module")
def table(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """All units trained, for the compute of a few steps of the plain net."""
    folder = tmp_path_factory.mktemp("out") / "seed-0"
    config = replace(CONFIG, table=write_latency(folder.parent))
    # Shares that are whole steps of so short a training.
    made = Table(str(data), folder, config, STEPS, (BUDGET,), shares=Shares(0.35, 0.12, 0.08), weights=WEIGHTS)
    write_widths(made)
    for row in made.rows():
        made.run(row)
    return made


def rows(table: Table, unit: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((table.folder / unit).glob("*.json"))]


def test_every_need_stands_before_its_unit(table: Table) -> None:
    seen: set[str] = set()
    units = replace(table, weights=None).units()
    for unit, needs in units.items():
        assert set(needs) <= seen
        seen.add(unit)
    assert "balance" in units and "balance" not in table.units()
    assert {row.partition("-")[0] for row in table.rows()} == set(DEFAULT)


def test_two_budgets_share_what_they_can(table: Table) -> None:
    both = replace(table, goals=(BUDGET, Goal(ratio=1.9)), nets=("ours", "wide"))
    write_widths(both, {BUDGET.name: FITS[BUDGET.name], "190": FITS[BUDGET.name]})
    units = list(both.units())
    assert [unit for unit in units if unit.startswith("wide")] == ["wide-10"]
    assert units.count("base") == units.count("fork") == 1 and {"ours-125", "ours-190"} <= set(units)
    write_widths(table)


@pytest.mark.parametrize(
    "row", ["plain", "wide-10", "narrow-6", "third", "ours-125", "fill-125", "grown-125", "random-125", "single-depth"]
)
def test_every_net_spends_the_same_compute(table: Table, row: str) -> None:
    units = _all(table, row)
    stages = [stage for unit in units for stage in rows(table, unit) if "macs" in stage and "steps" in stage]
    # Whole steps only: each stage may be off by half of its own step.
    allowed = sum(stage["macs"] / stage["steps"] / 2 for stage in stages)
    assert spent(table, row)["train_macs"] == pytest.approx(table.compute, abs=allowed)
    assert table.compute == STEPS * step_macs(build_plain(table.context("base")), table.batch)


def _all(table: Table, unit: str) -> set[str]:
    return {unit}.union(*(_all(table, need) for need in table.needs(unit)))


def test_single_task_nets_get_the_whole_compute_each(table: Table) -> None:
    assert spent(table, "single")["train_macs"] == pytest.approx(3 * table.compute, rel=0.05)


def test_random_gates_keep_counts_overlaps_and_ties(table: Table) -> None:
    result = json.loads((table.folder / "ours-125" / "final.json").read_text())
    fresh = build_gated(table.context("base", replace(table.config, **BUDGET.settings())))
    before = {
        name: torch.tensor([[bit == "1" for bit in row] for row in gates.values()])
        for name, gates in result["gates"].items()
    }
    after = shuffled(fresh, Done("frozen", Path(), "", result), seed=3)
    fresh.set_gates(after)  # refused when tied sites disagree or a granule is split
    assert any(not torch.equal(after[name], before[name]) for name in before)
    for name in before:
        assert sorted(after[name].T.tolist()) == sorted(before[name].T.tolist())
    drawn = json.loads((table.folder / "random-125" / "final.json").read_text())
    assert drawn["widths"] == result["widths"] and drawn["hard"] == result["hard"] and drawn["gates"] != result["gates"]


def test_joint_gates_open_the_same_share_of_every_layer_for_all_tasks(table: Table) -> None:
    net = build_gated(table.context("base"))
    masks = joint(net, 0.5, seed=1)
    net.set_gates(masks)  # refused when tied sites disagree or a granule is split
    for mask in masks.values():
        assert torch.equal(mask[0], mask[1]) and int(mask[0].sum()) == mask.shape[1] // 2
    assert any(not torch.equal(mask, joint(net, 0.5, seed=2)[name]) for name, mask in masks.items())
    grown = json.loads((table.folder / "grown-125" / "final.json").read_text())
    assert grown["form"] == "filled"


@pytest.mark.slow
def test_the_pruned_rival_meets_the_predicted_time_and_can_be_exported(table: Table) -> None:
    pytest.importorskip("torch_pruning", reason="extra `peers` is not installed")
    own = replace(table, nets=("plain", "pruned"))
    own.run("pruned-125")
    plain, pruned = collect(own, "plain")
    assert pruned["name"] == "pruned-125" and pruned["width"] == 12 > plain["width"]
    assert plain["predicted_ms"] < pruned["predicted_ms"] <= 1.25 * plain["predicted_ms"] * 1.001
    assert pruned["train_macs"] == pytest.approx(table.compute, rel=0.1)


def test_a_unit_is_done_only_for_its_own_settings(table: Table) -> None:
    assert table.done("plain") and not replace(table, steps=21).done("plain")
    for unknown in ("magic", "ours-134", "narrow-x", "wide-x", "single-x"):
        with pytest.raises(InputError, match=f"unknown unit '{unknown}': known: balance, base"):
            table.run(unknown)


def test_a_lost_mark_costs_no_training(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    (table.folder / "wide-10" / "done").unlink()
    monkeypatch.setattr("igate_edge.training.stages.fit", None)
    table.run("wide-10")
    assert table.done("wide-10")


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError, match="three above 0 with a sum below 1"):
        Shares(0.5, 0.3, 0.2)
    with pytest.raises(InputError, match="unknown nets magic: known: single, third"):
        Table("", Path(), CONFIG, 1, (BUDGET,), nets=("magic",))
    mobile = Table("", Path(), replace(CONFIG, backbone="efficientnet_lite0", width=None), 1, (BUDGET,))
    with pytest.raises(InputError, match="takes no width"):
        mobile.wide("40")


def test_rows_say_what_every_net_is_and_costs(table: Table) -> None:
    found = {row["name"]: row for row in collect(table, "single")}
    assert list(found) == table.rows()
    for name in ("ours-125", "fill-125", "grown-125", "random-125"):
        row = found[name]
        assert row["widths"] and set(row["hard"]) == set(CONFIG.tasks) and row["budgets"] == ["125"]
        assert row["macs"] > found["plain"]["macs"]
    assert found["ours-125"]["macs"] == found["fill-125"]["macs"]
    assert found["ours-125"]["useful_macs"] < found["ours-125"]["macs"]
    assert found["plain"]["useful_macs"] <= found["plain"]["macs"]
    assert found["single"]["delta_mtl"] == pytest.approx(0) and found["plain"]["delta_to"] == "single"
    assert found["third"]["macs"] == found["single"]["macs"] > found["narrow-6"]["macs"]
    assert [found[name]["width"] for name in ("plain", "wide-10", "narrow-6")] == [8, 10, 6]
    assert all(row["predicted_ms"] > 0 and row["train_seconds"] > 0 for row in found.values())


def test_all_seeds_are_compared_with_the_same_kind_of_net(table: Table) -> None:
    with_single, without = (replace(table, nets=nets) for nets in (("single", "plain"), ("plain",)))
    mixed = collect_all([with_single, without])
    assert [row["name"] for row in mixed] == ["single", "plain", "plain"]
    assert {row["delta_to"] for row in mixed} == {"plain"} and mixed[2]["delta_mtl"] == pytest.approx(0)
    assert {row["delta_to"] for row in collect_all([with_single])} == {"single"}


def test_a_width_answers_every_budget_it_was_measured_for(table: Table) -> None:
    assert budgets_of(table, "wide-10") == ["125"] and budgets_of(table, "plain") == []
    assert budgets_of(table, "ours-125") == ["125"]


def test_shares_by_stage_weigh_channels() -> None:
    from igate_edge.training.results_rows import by_stage

    gates = {"layer1_0_conv1": {"d": "1100", "n": "0000"}, "layer1_0_add": {"d": "0001", "n": "1111"}}
    assert by_stage(gates) == {"layer1": {"d": 3 / 8, "n": 4 / 8}}


def test_wrong_use_of_the_command_is_a_sentence(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data", str(data), "--out", str(tmp_path), "--size", "32x32"]
    assert results.main([*common, "--only", "magic"]) == 2
    assert "unknown unit 'magic'" in capsys.readouterr().err
    assert results.main([*common, "--ratios", "0.9", "--list"]) == 2
    assert "give a ratio above 1" in capsys.readouterr().err


def test_the_defaults_of_the_command_are_those_of_the_shares() -> None:
    args = results._parser().parse_args(["--out", "x", "--ratios", "1.34,1.70", "--seeds", "0,1"])
    assert args.shares == list(asdict(Shares()).values()) and args.ratios == [1.34, 1.7] and args.seeds == [0, 1]
