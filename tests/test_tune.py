"""Tuning: the default is always timed, the fastest measured lowering wins, and a build shows predicted and measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gatednets
import numpy as np
import onnx_ir as ir
import pytest
import staircase
import tinynet
from profiled import Machine, few

from igate_edge import builder, buildreport, devicetable, tune
from igate_edge.builder import build
from igate_edge.cli_engine import latency_shown
from igate_edge.compiler import graph, layout
from igate_edge.compiler.layout import Laid
from igate_edge.errors import InputError
from igate_edge.profiler import Asked, profile
from igate_edge.tune import candidates, shortlist

__all__ = ["few"]
IMAGE = np.zeros((1, 3, tinynet.SIZE, tinynet.SIZE), np.float32)


class Bench:
    """Sessions that cost what `costs` says for their layout (else 3 ms), on a clock of their own."""

    def __init__(self, costs: dict[str, float], build_s: float = 0.0) -> None:
        self.now, self.costs, self.build_s, self.opened = 0.0, costs, build_s, list[str]()

    def clock(self) -> float:
        return self.now

    def quantised(self, laid: Laid) -> bytes:
        self.now += self.build_s
        modes = sorted(set(laid.report["layers"].values()))
        return ("padded" if laid.report["padded"] else "+".join(modes)).encode()

    def open(self, data: bytes, threads: int) -> Any:
        self.opened.append(data.decode())
        return Fake(self, self.costs.get(data.decode(), 3.0))


class Fake:
    def __init__(self, bench: Bench, ms: float) -> None:
        self.bench, self.ms = bench, ms

    def run(self, image: np.ndarray) -> None:
        self.bench.now += self.ms / 1e3

    def close(self) -> None:
        pass


@pytest.fixture
def model() -> ir.Model:
    return graph.load(tinynet.gated_onnx())


def tuned(model: ir.Model, bench: Bench, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tune.Tuned:
    monkeypatch.setattr(tune.ort, "open", bench.open)
    options = {"table": staircase.table(), "rounds": 5, **options}
    return tune.tune(model, bench.quantised, IMAGE, clock=bench.clock, **options)


def test_every_candidate_is_a_layout_and_the_first_is_the_default(model: ir.Model) -> None:
    found = candidates(model, staircase.table())
    assert found[0].choice == "merged" and {"split", "merged:16"} <= {str(item.choice) for item in found}
    assert len({item.name for item in found}) == len(found) > 3
    for item in found:
        laid = layout.lay_out(model, item.choice)
        assert tune.predict(laid, staircase.table()).ms == pytest.approx(item.predicted_ms) and item.predicted_ms > 0


def test_the_time_of_a_layout_is_that_of_its_layers(model: ir.Model) -> None:
    for choice in ("merged", "split"):
        laid = layout.lay_out(model, choice)
        parts = tune.by_layer(laid, staircase.table())
        assert sum(parts.values()) == pytest.approx(staircase.table().predict(laid.model).ms)
        convs = {name for name in laid.report["layers"] if parts.get(name, 0) > 0}
        assert convs == set(laid.report["layers"])


def test_seams_lie_where_the_maps_change_size() -> None:
    net, psi, phis = gatednets.Net(), "image", dict.fromkeys(gatednets.TASKS, "image")
    for site, cin, stride in (("one", 3, 1), ("two", 4, 1), ("three", 4, 2)):
        shared = net.conv(f"{site}.shared", psi, cin, 4, strides=[stride] * 2)
        own = {task: net.conv(f"{site}.{task}", x, cin, 4, strides=[stride] * 2) for task, x in phis.items()}
        mask = np.random.default_rng(cin * stride).random((len(phis), 4)) < 0.5
        psi, phis = net.site(site, shared, own, mask)
    mixed = [item for item in candidates(net.load(phis), staircase.table()) if "from layer" in item.name]
    assert [item.name for item in mixed] == [f"{a} from layer 3 of 3 on" for a in ("merged, split", "split, merged")]
    assert [list(dict(item.choice).values()) for item in mixed] == [
        ["merged", "merged", "split"],
        ["split", "split", "merged"],
    ]


def test_the_fastest_measured_wins_whatever_was_predicted(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench({"merged": 2.0, "padded": 1.5})
    found = tuned(model, bench, monkeypatch)
    assert (found.name, found.choice) == ("padded to 16", "merged:16") and found.measured_ms == pytest.approx(1.5)
    assert found.predicted_ms > min(row["predicted_ms"] for row in found.tried)
    assert bench.opened[0] == "merged" and 2 <= len(bench.opened) <= tune.MOST_TIMED
    ratios = {row["name"]: row["ratio"] for row in found.tried if "ratio" in row}
    assert ratios["merged"] == 1 and ratios["padded to 16"] == pytest.approx(0.75)


def test_the_default_stays_unless_another_is_clearly_faster(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned(model, Bench({"merged": 2.0, "padded": 1.99}), monkeypatch).choice == "merged"


def test_time_runs_out_after_two(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench({}, build_s=100.0)
    tuned(model, bench, monkeypatch, seconds=60.0)
    assert len(bench.opened) == 2
    assert len(candidates(model, staircase.table(), late=lambda: True)) == 3, "the uniform ones are always predicted"


def test_without_a_table_the_uniform_ways_are_timed(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench({"merged": 2.0, "padded": 1.0})
    found = tuned(model, bench, monkeypatch, table=None)
    assert found.choice == "merged:16" and math.isnan(found.predicted_ms) and len(bench.opened) == 3


def test_hopeless_candidates_are_not_built() -> None:
    def one(name: str, ms: float) -> tune.Candidate:
        return tune.Candidate(name, name, ms)

    found = [one("merged", 5.0), one("a", 1.0), one("b", 1.2), one("c", 2.0)]
    assert [item.name for item in shortlist(found)] == ["merged", "a", "b"]
    many = [one("merged", 1.0), *(one(str(index), 1.0) for index in range(20))]
    assert len(shortlist(many)) == tune.MOST_TIMED


def test_a_plain_net_has_nothing_to_split(model: ir.Model) -> None:
    plain = layout.lay_out(model, "merged").model
    assert "split" not in {str(item.choice) for item in candidates(plain, None)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinynet.packaged(tmp_path_factory.mktemp("tune") / "tiny.igate")


def test_a_build_sets_predicted_beside_measured(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: Any
) -> None:
    monkeypatch.setattr(devicetable, "own_folder", lambda: tmp_path)
    monkeypatch.setattr(devicetable, "TABLES", tmp_path)
    bare = build(bundle, precision="int8", cache_dir=tmp_path / "bare").latency
    assert bare["measured_ms"] > 0 and bare["predicted_ms"] is None and "`igate profile`" in bare["note"]
    assert "not predicted" in latency_shown(bare)[0]
    timed = build(bundle, precision="int8", cache_dir=tmp_path / "bare", tune=True)
    assert not timed.warnings or "not cached" not in " ".join(timed.warnings)
    assert {row["predicted_ms"] for row in timed.latency["tuned"]["tried"]} == {None}
    assert any("merged: " in line for line in latency_shown(timed.latency))
    assert build(bundle, precision="int8", cache_dir=tmp_path / "bare", tune=True).cached
    name = devicetable.table_name(1)
    profile(tmp_path / f"{name}.json", Asked(), bring=Machine().bring)
    first = build(bundle, precision="int8", cache_dir=tmp_path / "with", tune=True)
    latency = first.latency
    assert latency["table"] == name and latency["error"] == latency["predicted_ms"] / latency["measured_ms"] - 1
    assert latency["tuned"]["name"] in {row["name"] for row in latency["tuned"]["tried"]}
    assert latency["predicted_ms"] > 0 and latency["dearest"] and latency["error_bar"] > 0
    shown = "\n".join(latency_shown(latency))
    assert f"predicted by {name}" in shown and "tuned in" in shown and "merged: " in shown
    again = build(bundle, precision="int8", cache_dir=tmp_path / "with", tune=True)
    assert again.cached and again.latency == latency, "tuned once"
    assert not build(bundle, precision="int8", cache_dir=tmp_path / "with").cached, "an untuned engine is another"


def test_only_int8_is_tuned(bundle: Path) -> None:
    with pytest.raises(InputError, match="only INT8"):
        builder.Options(precision="float", tune=True)
    assert latency_shown({}) == []


def test_the_median_and_the_share_of_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    now, used = [0.0], [0.0]

    def run(image: np.ndarray) -> None:
        now[0] += 0.004
        used[0] += 0.001

    monkeypatch.setattr(buildreport.time, "process_time", lambda: used[0])
    assert buildreport.median_ms(run, IMAGE, 1, lambda: now[0]) == (pytest.approx(4.0), pytest.approx(0.25))
    laid = layout.lay_out(graph.load(tinynet.gated_onnx()))
    monkeypatch.setattr(buildreport, "median_ms", lambda *_: (4.0, 0.25))
    assert "for 25% of the time" in buildreport.latency_of(laid, run, IMAGE, "int8", 1, None)["note"]
