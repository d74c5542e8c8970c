"""Latency tables: staircases are honoured, what runs is what is priced, and only whole tables are read."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import staircase

from igate_edge import profiler, profiler_nets
from igate_edge.compiler import executed, graph
from igate_edge.compiler.latency import LatencyTable, bundled, explain, from_json
from igate_edge.engines import onnxruntime as ort
from igate_edge.errors import InputError, UnavailableError
from igate_edge.runtime.cache import fingerprint

A, B = 0.003, 2e-8


def affine(**changes: Any) -> dict[str, Any]:
    """A table whose convolutions cost A + B * MACs, ragged counts what `tail` says; elementwise operators 1 us."""
    pixels, cin, cout = (1, 100, 1000), (4, 64), (16, 64, 128)

    def grid(taps: int, tail: list[float]) -> dict[str, Any]:
        ms = [[[A + B * taps * p * i * o for o in cout] for i in cin] for p in pixels]
        return {"pixels": pixels, "cin": cin, "cout": cout, "ms": ms, "tail": tail}

    line = [rest / 16 for rest in range(1, 16)]
    kinds = {"3x3 unsigned": grid(9, line), "1x1 unsigned": grid(1, line), "3x3 loose": grid(9, line)}
    document = staircase.table().as_json() | {"fit": {"cin": 1, "cout": 1}, "conv": kinds, "stride": {"3x3": 1.5}}
    return {**document, **changes}


def conv_net(cout: int, act: str | None = "Relu", cin: int = 8) -> Any:
    """A convolution cin -> cout between two 1x1 ones."""
    net = profiler_nets.Net((8, 8))
    value = net.conv(net.conv("image", cin, 1, act=act), cout, 3)
    net.output(net.conv(value, 4, 1, act=None))
    return net.model()


def test_times_between_and_beyond_measured_sizes_follow_the_work() -> None:
    table = from_json(affine())
    for pixels, cin, cout in ((1, 4, 16), (37, 20, 48), (1000, 64, 128), (3000, 100, 256), (50, 8, 40)):
        wanted = A + B * 9 * pixels * cin * cout
        assert table.conv_ms((3, 3), 1, (pixels, 1), cin, cout) == pytest.approx(wanted)
    assert table.conv_ms((3, 3), 2, (10, 10), 8, 32) == pytest.approx(1.5 * (A + B * 9 * 100 * 8 * 32))
    assert table.conv_ms((5, 5), 1, (10, 10), 8, 32) == pytest.approx(A + B * 25 * 100 * 8 * 32), "scaled from 3x3"
    assert table.conv_ms((3, 3), 1, (10, 10), 16, 64, 2) == pytest.approx(2 * (A + B * 9 * 100 * 8 * 32))


def test_a_prediction_honours_a_staircase_that_falls() -> None:
    """61 channels cost more than 64, and 56 less."""
    tail = [0.9] * 15
    tail[12] = 1.4  # 48 + 13 = 61
    document = affine()
    for grid in document["conv"].values():
        grid["tail"] = tail
    table = from_json(document)
    ms = {cout: table.predict(conv_net(cout)).ms for cout in (48, 56, 61, 64)}
    assert ms[48] < ms[56] < ms[64] < ms[61]
    step = B * 9 * 64 * 8 * 16
    found = {cout: table.conv_ms((3, 3), 1, (8, 8), 8, cout) for cout in (48, 61, 64)}
    assert found[61] - found[48] == pytest.approx(1.4 * step) and found[64] - found[48] == pytest.approx(step)


def test_counts_that_do_not_fit_take_the_loose_way() -> None:
    document = affine(fit={"cin": 4, "cout": 8})
    loose = copy.deepcopy(document["conv"]["3x3 unsigned"])
    loose["ms"] = (2 * np.array(loose["ms"])).tolist()
    document["conv"]["3x3 loose"] = loose
    table = from_json(document)
    fits = table.conv_ms((3, 3), 1, (10, 10), 8, 16)
    assert fits == pytest.approx(A + B * 9 * 100 * 8 * 16)
    for cin, cout in ((8, 17), (9, 16)):
        assert table.conv_ms((3, 3), 1, (10, 10), cin, cout) == pytest.approx(2 * (A + B * 9 * 100 * cin * cout))


def test_depthwise_convolutions_have_times_of_their_own() -> None:
    document = affine()
    wide = {"pixels": [100], "cin": [1], "cout": [16, 32], "ms": [[[0.5, 0.9]]], "tail": []}
    document["conv"]["3x3 depthwise"] = wide
    document["stride"]["depthwise"] = 2.0
    table = from_json(document)
    assert table.conv_ms((3, 3), 1, (10, 10), 32, 32, 32) == pytest.approx(0.9)
    assert table.conv_ms((3, 3), 2, (10, 10), 24, 24, 24) == pytest.approx(2 * 0.7)
    assert table.conv_ms((3, 3), 1, (20, 10), 32, 32, 32) == pytest.approx(1.8), "one measured size: by pixels"


def test_no_size_costs_nothing_or_less() -> None:
    document = affine()
    for grid in document["conv"].values():
        grid["ms"] = (np.array(grid["ms"]) - 0.9 * A).tolist()
        grid["tail"] = [-50.0] * 15
    table = from_json(document)
    assert table.conv_ms((3, 3), 1, (1, 1), 1, 1) > 0 and table.op_ms("Clip", 0, 0) > 0


@pytest.mark.parametrize(
    "sizes",
    [
        ((0, 3), 1, (8, 8), 4, 4, 1),
        ((3, 3), 1, (8, 8), 4, 0, 1),
        ((3, 3), 1, (8, 8), 6, 4, 4),
        ((3, 3), 1, (8, 8), 4, "a", 1),
        ((3, 3), 1, (8, 8), 4, float("nan"), 1),
        ((3, 3), 1, (8, 8), 4, 10**400, 1),
    ],
)
def test_what_is_no_convolution_is_refused(sizes: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match="not a convolution"):
        from_json(affine()).conv_ms(*sizes)


def test_operators_cost_by_the_larger_of_what_they_read_and_make() -> None:
    table = from_json(
        affine(ops={"Clip": {"elements": [10, 20], "ms": [1.0, 2.0]}, "Mul": {"elements": [1], "ms": [0.1]}})
    )
    assert table.op_ms("Clip", 10, 15) == pytest.approx(1.5) == table.op_ms("Clip", 15, 1)
    assert table.op_ms("NeverSeen", 1, 3) == pytest.approx(table.op_ms("Mul", 1, 3)) == pytest.approx(0.3)


def test_layers_add_up_with_overhead_and_the_lowerings_anchor() -> None:
    model = conv_net(16)
    bare = from_json(affine()).predict(model)
    assert bare.ms == pytest.approx(sum(layer.ms for layer in bare.layers)) and bare.error == 0.05
    count = len(bare.layers)
    full = from_json(affine(overhead_ms=0.01, anchors={"merged": 2.0, "split": 3.0}))
    assert full.predict(model).ms == pytest.approx(2 * (bare.ms + 0.01 * count))
    assert full.predict(model, "split").ms == pytest.approx(3 * (bare.ms + 0.01 * count))
    assert len(explain(bare, 2)) == 2 and all("ms (" in line for line in explain(bare))
    with pytest.raises(InputError, match="grouped"):
        full.predict(model, "grouped")


def test_a_negative_input_takes_the_slow_way() -> None:
    paths = {
        act: [step.conv.path for step in executed.steps(conv_net(8, act)) if step.conv is not None]
        for act in ("Relu", None)
    }
    assert paths["Relu"] == ["signed", "unsigned", "output"], "the image itself may be negative"
    assert paths[None] == ["signed", "signed", "output"]


NETS: dict[str, Callable[[], Any]] = {
    "residual": lambda: profiler_nets.residual((32, 32), 4),
    "mobile": lambda: profiler_nets.mobile((32, 32), 4),
    "branched": lambda: profiler_nets.branched((32, 32), 8, 4),
    "heads": lambda: profiler_nets.heads((8, 8), 8, (1, 5), 3),
}


@pytest.mark.parametrize("name", NETS)
def test_what_is_priced_is_what_onnx_runtime_runs(name: str) -> None:
    model = NETS[name]()
    counts = Counter[str]()
    for op, count in ort.inspect(profiler.int8(model)).op_counts.items():
        counts[profiler.SAME.get(op, op)] += count
    assert Counter(step.op for step in executed.steps(model)) == counts
    again = graph.dump(model)
    assert len(executed.steps(model, "float")) < len(executed.steps(model)) and graph.dump(model) == again, "unchanged"


def test_a_saved_table_reads_back_as_it_was(tmp_path: Path) -> None:
    table = from_json(affine())
    table.save(tmp_path / "a.json")
    again = LatencyTable.load(tmp_path / "a.json")
    assert again.name == "a" and again.as_json() == table.as_json()
    assert again.predict(conv_net(21)).ms == pytest.approx(table.predict(conv_net(21)).ms, rel=1e-4), "to a nanosecond"


def test_times_that_were_not_measured_grow_with_the_pixels() -> None:
    document = affine()
    document["conv"]["3x3 unsigned"]["ms"][2][1][2] = None
    small = A + B * 9 * 100 * 64 * 128
    assert from_json(document).conv_ms((3, 3), 1, (1000, 1), 64, 128) == pytest.approx(10 * small)


def corrupt(change: Callable[[dict[str, Any]], Any]) -> str:
    document = json.loads(json.dumps(affine()))
    change(document)
    return json.dumps(document)


CORRUPT = {
    "empty": "",
    "truncated": json.dumps(affine())[:400],
    "no object": "[1, 2]",
    "another file": json.dumps({"format": "something else"}),
    "deep": "[" * 100_000,
    "of a later version": corrupt(lambda d: d.update(version=2)),
    "without operators": corrupt(lambda d: d.update(ops={})),
    "with a NaN": json.dumps(affine(overhead_ms=float("nan"))),
    "with text for a number": corrupt(lambda d: d.update(error="small")),
    "with a negative time": corrupt(lambda d: d["conv"]["3x3 unsigned"]["ms"][0][0].__setitem__(0, -1.0)),
    "with an axis that falls": corrupt(lambda d: d["conv"]["3x3 unsigned"].update(cin=[64, 4])),
    "with a missing row": corrupt(lambda d: d["conv"]["3x3 unsigned"]["ms"].pop()),
    "with a short tail": corrupt(lambda d: d["conv"]["3x3 unsigned"].update(tail=[1.0])),
    "with an unknown grid": corrupt(lambda d: d["conv"].update(huge=d["conv"]["3x3 unsigned"])),
    "with null where it must not be": corrupt(lambda d: d["conv"]["3x3 unsigned"]["ms"][0][0].__setitem__(0, None)),
    "without an anchor": corrupt(lambda d: d.update(anchors={"merged": 1.0})),
    "without a device": corrupt(lambda d: d.pop("device")),
    "with another precision": corrupt(lambda d: d.update(precision="int4")),
    "with a list of grids": corrupt(lambda d: d.update(conv=[1])),
    "with text for anchors": corrupt(lambda d: d.update(anchors="merged")),
    "with no strides": corrupt(lambda d: d.update(stride=None)),
    "with a grid of a longer name": corrupt(lambda d: d.update(conv={"3x3 unsigned x": d["conv"]["3x3 unsigned"]})),
    "with a grid without a kind": corrupt(lambda d: d["conv"].update({"3x3  ": d["conv"]["3x3 unsigned"]})),
    "with a kernel without end": corrupt(lambda d: d["conv"].update({"9" * 500 + "x1 loose": d["conv"]["3x3 loose"]})),
    "with a time without end": corrupt(lambda d: d["stride"].update({"3x3": 1e308})),
    "with half a thread": corrupt(lambda d: d.update(threads=1.5)),
    "with an error below 0": corrupt(lambda d: d.update(error=-1)),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_table_that_is_not_whole_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(CORRUPT[name])
    with pytest.raises(InputError, match="not a latency table: table.json") as caught:
        LatencyTable.load(path)
    assert "igate profile" in caught.value.fix and len(str(caught.value)) < 400


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot read"):
        LatencyTable.load(tmp_path / "none.json")
    with pytest.raises(UnavailableError, match="cannot read"):
        LatencyTable.load(tmp_path)
    with pytest.raises(InputError, match="no latency table 'orin'") as caught:
        LatencyTable.load("orin")
    assert all(name in str(caught.value) for name in bundled())


def test_a_table_of_elsewhere_is_for_prediction_only() -> None:
    own = {"device": fingerprint(), "backend": {"name": "onnxruntime", **ort.probe()}}
    assert from_json(affine(**own)).foreign() == ""
    assert from_json(affine(**own | {"device": {**fingerprint(), "celsius": 80.0}})).foreign() == "", (
        "still this machine"
    )
    other = from_json(affine(**own | {"device": {**fingerprint(), "cpu": "Orin"}})).foreign()
    assert "another machine (cpu 'Orin'" in other and other.endswith("predictions only")
    like = from_json(affine(**own | {"device": {**fingerprint(), "instructions": "0" * 16}})).foreign()
    assert "with other instructions)" in like and "000" not in like
    assert "'tensorrt'" in from_json(affine(**own | {"backend": {"name": "tensorrt", "version": "10"}})).foreign()
    assert "0.1" in from_json(affine(**own | {"backend": {"name": "onnxruntime", "version": "0.1"}})).foreign()


@pytest.mark.parametrize("name", bundled())
def test_shipped_tables_are_whole_and_have_a_staircase(name: str) -> None:
    table = LatencyTable.load(name)
    assert table.name == name and 0 < table.error < 0.2
    for size in (16, 32, 64, 128):
        more = table.conv_ms((3, 3), 1, (24, 32), size, size + 16)
        assert 0 < table.conv_ms((3, 3), 1, (24, 32), size, size) < more
        assert table.conv_ms((3, 3), 1, (24, 32), size, size + 15) > more, "ragged counts cost more than whole steps"


def test_there_is_a_shipped_table() -> None:
    assert "x86-epyc-avx2-1t" in bundled()
