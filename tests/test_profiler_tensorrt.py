"""Latency tables through TensorRT, on stand-ins: a law is found again, and a table is one board's in one setting."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boards
import numpy as np
import onnxruntime
import pytest
from profiled import COPY, LAUNCH, MADE, READ, Board, engine_layers, few, installed

from igate_edge import devicetable, profiler, profiler_jobs, profiler_nets
from igate_edge.compiler import executed, graph, lint
from igate_edge.compiler.executed import Step
from igate_edge.compiler.half import half
from igate_edge.compiler.latency import LEAST_MS, LatencyTable, bundled
from igate_edge.engines import tensorrt_rtx
from igate_edge.engines.inspector import Layer
from igate_edge.errors import CheckFailed, InputError, UnavailableError
from igate_edge.profiler import Asked, profile
from igate_edge.profiler_tensorrt import by_step, engine_file

__all__ = ["few"]
ASKED = Asked(backend="tensorrt")
NANO = "orin-nano-super"
GPU_LIMIT = "sys/class/devfreq/17000000.gpu/max_freq"


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    return installed(monkeypatch)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An Orin Nano at 25 W, clocks not locked."""
    return boards.build(tmp_path / "root", NANO)


def lock(root: Path) -> None:
    for word in ("min", "cur"):
        boards.put(root, f"sys/class/devfreq/17000000.gpu/{word}_freq", 918_000_000)
        for core in range(2):
            boards.put(root, f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_{word}_freq", 1_344_000)
    boards.put(root, "sys/kernel/debug/bpmp/debug/clk/emc/mrq_rate_locked", 1)


def measured(board: Board, root: Path, path: Path, **how: Any) -> LatencyTable:
    return profile(path, ASKED, bring=board.bring, root=root, **how)


def table_of(root: Path) -> LatencyTable:
    """A table of TensorRT that says it is of this board, as it is now."""
    device = {**devicetable.board(root)[0], **devicetable.moment(root)}
    return dataclasses.replace(
        LatencyTable.load(bundled()[0]), device=device, backend={"name": "tensorrt", "version": "10.3.0"}
    )


def test_the_law_of_a_board_is_found_again(
    few: Callable[[], int], board: Board, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets = [("merged", partial(profiler_nets.residual, (32, 32), width)) for width in (8, 16)]
    nets += [("split", partial(profiler_nets.chain, (6, 8), [16] * count, 3)) for count in (9, 18)]
    monkeypatch.setattr(profiler_nets, "anchors", lambda quick: nets)
    table = measured(board, root, tmp_path / "t.json")
    for pixels, cin, cout in ((4, 16, 32), (9, 16, 32), (48, 32, 48), (30, 16, 24)):
        wanted = LAUNCH + READ * pixels * cin + MADE * pixels * cout
        assert table.conv_ms((3, 3), 1, (pixels, 1), cin, cout) == pytest.approx(wanted, rel=0.02)
    assert table.op_ms("MaxPool", 768, 192) == pytest.approx(LAUNCH + READ * 768 + MADE * 192, rel=0.1)
    assert table.anchors == pytest.approx({"merged": 1, "split": 1}, abs=0.1) and table.error < 0.05
    model = profiler_nets.residual((32, 32), 12)
    whole = sum(row["ms"] for row in engine_layers(engine_file(model, "int8")))
    prediction = table.predict(model)
    assert prediction.ms == pytest.approx(whole, rel=0.05)
    assert {layer.op for layer in prediction.layers} == {"Conv", "MaxPool", "Resize"}, "sums run within convolutions"


def test_a_table_says_what_it_is_of(few: Callable[[], int], board: Board, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    table = measured(board, root, path)
    kept = LatencyTable.load(path)
    assert kept.as_json() == table.as_json() and not path.with_name("t.json.part").exists()
    assert (table.threads, table.precision, table.backend) == (1, "int8", {"name": "tensorrt", "version": "10.3.0"})
    assert table.device["module"] == "Orin Nano 8GB developer kit (p3767-0005)"
    facts = ("power_mode", "gpu", "compute", "driver", "gpu_limit_hz", "gpu_hz", "celsius", "locked", "emc_hz")
    wanted = ["25W", "Stand-in", "8.7", "12.6", "918000000", 306_000_000, 48.781, False, "unverified"]
    assert [table.device[name] for name in facts] == wanted
    assert {key.split()[1] for key in table.conv} == {"float", "depthwise"} and table.fit == {"cin": 1, "cout": 1}
    assert devicetable.board_name(table.device) == "orin-nano-8gb-25w-trt"
    assert devicetable.board_name({**table.device, "power_mode": "7W"}, "float") == "orin-nano-8gb-7w-trt-float"


def test_every_network_is_built_once_and_everything_is_given_back(
    few: Callable[[], int], board: Board, root: Path, tmp_path: Path
) -> None:
    measured(board, root, tmp_path / "t.json")
    networks = len(profiler.jobs("float")) + len(profiler_nets.anchors(False))
    assert board.count("build") == networks + 1, "and the reference"
    caches = [value for what, value in board.behaviour.seen if what == "timing_cache"]
    assert caches[0] == b"" and all(caches[1:]), "what TensorRT timed for one network serves the next"
    (cuda,) = board.used
    assert cuda.closed and not cuda.blocks and not cuda.live


@pytest.mark.parametrize("precision", ["int8", "float"])
def test_networks_pass_the_lint_in_either_precision(precision: str) -> None:
    builds = [job.build for job in profiler_jobs.jobs("float", quick=True) if "tail" not in job.name]
    for build in (*builds, partial(profiler_nets.residual, (64, 64), 16)):
        model = build()
        data = engine_file(model, precision)
        made = _ir(data)
        assert not [finding for finding in lint.lint(made, "trt") if finding.severity == "error"]
        ops = [node.op_type for node in made.graph]
        assert ("QuantizeLinear" in ops) == (precision == "int8")
        names = {node.name for node in made.graph}
        assert names >= {step.name for step in executed.steps(model, "float")}, "the nodes that layers name"
    session = onnxruntime.InferenceSession(data)
    image = np.ones(session.get_inputs()[0].shape, np.float32)
    assert all(np.isfinite(value).all() for value in session.run(None, {"image": image}))


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install 'igate-edge[rtx]'",
)
@pytest.mark.parametrize("precision", ["int8", "float"])
def test_networks_are_accepted_by_tensorrt_rtx(precision: str) -> None:
    wanted = ("stride 3x3 float 12x16", "stride 3x3 depthwise 12x16")
    builds = [job.build for job in profiler_jobs.jobs("float", quick=True) if job.name in wanted]
    assert len(builds) == 2
    for build in builds:
        tensorrt_rtx.check(engine_file(build(), precision)).require("a network of the profile")


def _ir(data: bytes) -> Any:
    import onnx
    import onnx_ir

    return onnx_ir.from_proto(onnx.load_from_string(data))


def test_float_is_fp16_alone(few: Callable[[], int], board: Board, root: Path, tmp_path: Path) -> None:
    asked = dataclasses.replace(ASKED, precision="float")
    table = profile(tmp_path / "f.json", asked, bring=partial(board.bring, precision="float"), root=root)
    assert table.precision == "float" and "3x3 float" in table.conv
    model = profiler_nets.chain((6, 8), [16] * 3, 3)
    assert engine_file(model, "float") == graph.dump(half(model))


def layer(name: str, *nodes: str, kind: str = "") -> Layer:
    return Layer(name, kind, nodes, (), ())


CONV = executed.Conv((3, 3), 1, (4, 4), 16, 16, 1, "float")
STEPS = [
    Step("c1", "Conv", 8, 8, CONV),
    Step("s", "Mul", 8, 8),
    Step("c2", "Conv", 8, 8, CONV),
    Step("p", "Pool", 8, 2),
]


def test_each_layer_is_one_steps() -> None:
    layers = [
        layer("in", "q.image", kind="Reformat"),
        layer("c1.weight + c1 + relu", "c1.weight", "c1", "relu"),
        layer("PWN(relu2)", "relu2"),
        layer("PWN(sigmoid, s)", "sigmoid", "s"),
        layer("Reformatting CopyNode for Input Tensor 0 to c2", "Reformatting", "c2", kind="Reformat"),
        layer("c2", "c2", "p"),
    ]
    times = [(one.name, 2.0**index) for index, one in enumerate(layers)]
    assert by_step(times, layers, STEPS) == [1.0 + 2.0 + 4.0, 8.0 + 16.0, 32.0, LEAST_MS]
    assert by_step([*times, ("no layer of the inspector", 64.0)], layers, STEPS)[2] == 96.0


def test_convolutions_that_cannot_be_told_apart_are_refused() -> None:
    both = [layer("c1 || c2", "c1", "c2")]
    with pytest.raises(CheckFailed, match=r"several convolutions as one layer.*c1 \|\| c2"):
        by_step([("c1 || c2", 1.0)], both, STEPS)
    with pytest.raises(CheckFailed, match="no layer of the engine is about c2"):
        by_step([("c1", 1.0), ("other", 1.0)], [layer("c1", "c1"), layer("other", "__myl_Conv")], STEPS)


def test_an_engine_that_names_no_nodes_is_refused(
    few: Callable[[], int], board: Board, root: Path, tmp_path: Path
) -> None:
    board.behaviour.layers = lambda data: [{**row, "Name": f"myelin{n}"} for n, row in enumerate(engine_layers(data))]
    with pytest.raises(CheckFailed, match=r"cannot be told.*myelin0"):
        measured(board, root, tmp_path / "t.json")
    assert board.used[0].closed and not board.used[0].live, "nothing is left open"


def test_a_reformat_counts_with_what_it_follows(board: Board) -> None:
    model = profiler_nets.chain((4, 4), [16, 16], 3)
    means = board.bring(graph.dump(model), 1)
    nodes = means.nodes(graph.dump(model), 3)
    means.close()
    assert [node.op for node in nodes] == ["Conv"] * 3 and nodes[0].ms.shape == (3,)
    assert [(node.read, node.made) for node in nodes] == [(48, 256), (256, 256), (256, 16)]
    laws = [LAUNCH + READ * node.read + MADE * node.made for node in nodes]
    assert [float(node.ms[0]) for node in nodes] == pytest.approx([laws[0] + COPY, *laws[1:]])


def mode(root: Path, number: int) -> None:
    boards.put(root, "var/lib/nvpmodel/status", f"pmode:{number:04d} fmode:fanNull\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root, trt: mode(root, 0), ("power_mode '25W'", "'15W'")),
        (lambda root, trt: boards.put(root, GPU_LIMIT, 624_000_000), ("gpu_limit_hz '918000000'", "'624000000'")),
        (lambda root, trt: boards.build(root, "orin-nx-16"), ("board", "Orin NX")),
        (lambda root, trt: setattr(sys.modules["tensorrt"], "__version__", "10.7.0"), ("TensorRT 10.3.0", "10.7.0")),
        (lambda root, trt: boards.drop(root, "var/lib/nvpmodel/status", "usr/sbin/nvpmodel"), ("nobody tells",)),
        (
            lambda root, trt: trt.setitem(sys.modules, "tensorrt", None),
            ("'tensorrt' on Stand-in", "TensorRT is missing"),
        ),
    ],
)
def test_another_board_setting_or_version_is_foreign(
    board: Board,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, pytest.MonkeyPatch], Any],
    words: tuple[str, ...],
) -> None:
    table = table_of(root)
    boards.put(root, "sys/class/devfreq/17000000.gpu/cur_freq", 612_000_000)  # a clock of the moment is no setting
    assert table.foreign(root) == ""
    change(root, monkeypatch)
    found = table.foreign(root)
    assert found.endswith("predictions only") and all(word in found for word in words), found


def test_a_build_finds_its_boards_table(board: Board, root: Path, tmp_path: Path) -> None:
    table = table_of(root)
    table.save(tmp_path / "orin-nano-8gb-25w-trt.json")
    find = partial(devicetable.find, 1, own=tmp_path, root=root)
    found, why = find(backend="tensorrt")
    assert found is not None and why == "" and found.as_json() == table.as_json()
    assert find()[0] is None, "ONNX Runtime's is another"
    mode(root, 0)
    none, why = find(backend="tensorrt")
    assert none is None and "`igate profile --backend tensorrt` measures one" in why
    path = tmp_path / "orin-nano-8gb-15w-trt.json"
    path.write_text((tmp_path / "orin-nano-8gb-25w-trt.json").read_text())
    assert "power_mode '25W'" in find(backend="tensorrt")[1], "a table that was renamed is still another mode's"


def test_a_board_that_is_set_otherwise_meanwhile_is_refused(
    few: Callable[[], int], board: Board, root: Path, tmp_path: Path
) -> None:
    path = tmp_path / "t.json"

    def watch(items: Iterable[Any], count: int) -> Iterator[Any]:
        for index, item in enumerate(items):
            if index == 2:
                mode(root, 0)
            yield item

    with pytest.raises(UnavailableError, match=r"set otherwise meanwhile.*power_mode was '25W' and is '15W'"):
        measured(board, root, path, watch=watch)
    part = path.with_name("t.json.part")
    assert not path.exists() and len(json.loads(part.read_text())["jobs"]) == 2, "only what ran in the first mode"
    with pytest.raises(InputError, match="its device is another"):
        measured(board, root, path, resume=True)
    mode(root, 1)
    before = board.count("build")
    measured(board, root, path, resume=True)
    networks = len(profiler.jobs("float")) + len(profiler_nets.anchors(False)) + 1
    assert path.exists() and board.count("build") - before == networks - 2


def test_a_stopped_measurement_goes_on_unless_the_clocks_were_locked_since(
    few: Callable[[], int], board: Board, root: Path, tmp_path: Path
) -> None:
    def stopped(items: Iterable[Any], count: int) -> Iterator[Any]:
        yield from list(items)[:1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(board, root, tmp_path / "t.json", watch=stopped)
    boards.put(root, "sys/class/thermal/thermal_zone1/temp", 61_000)
    with pytest.raises(KeyboardInterrupt):
        measured(board, root, tmp_path / "t.json", watch=stopped, resume=True)
    lock(root)
    with pytest.raises(InputError, match="its device is another"):
        measured(board, root, tmp_path / "t.json", resume=True)


def test_free_or_held_clocks_make_a_table_provisional(board: Board, root: Path, tmp_path: Path) -> None:
    def notes(root: Path) -> list[str]:
        return profiler.notes(table_of(root))

    assert notes(root) == ["provisional: the clocks were not locked (`igate jetson lock` locks them)"]
    lock(root)
    assert notes(root) == []
    boards.put(root, "sys/class/thermal/cooling_device1/cur_state", 2)
    assert notes(root) == ["provisional: gpu-throttle-alert held clocks back"]
    boards.put(root, GPU_LIMIT, 624_000_000)
    (unlocked, held) = notes(root)
    assert "not locked" in unlocked and "held to 624 MHz, mode 25W allows 918 MHz" in held
    bare = notes(tmp_path / "no board")
    assert "unverified" in bare[0] and "nobody tells the power mode" in bare[1]


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(InputError, match=r"openvino.*onnxruntime, tensorrt"):
        Asked(backend="openvino")
    with pytest.raises(InputError, match="TensorRT computes on the GPU"):
        Asked(backend="tensorrt", threads=2)


def test_without_tensorrt_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError):
        profile(tmp_path / "t.json", ASKED)
    assert list(tmp_path.iterdir()) == []
    assert devicetable.find(1, own=tmp_path, backend="tensorrt")[1].startswith("no latency table of a board")


def test_a_reference_that_cannot_be_built_closes_the_device(board: Board) -> None:
    board.behaviour.builds = ["Error Code 4: unsupported"]
    with pytest.raises(CheckFailed):
        board.bring(graph.dump(profiler_nets.chain((4, 4), [16, 16], 3)), 1)
    assert board.used[0].closed and not board.used[0].live
