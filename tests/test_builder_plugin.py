"""The plugin in a TensorRT build, on a stand-in: which layers take it, why the others do not, and what that costs."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plugin_kit
import pytest
import standin_engine
import tinynet
from igate_edge.kernels import manifest, plugin, source
from standin_engine import HERE, StandIn

from igate_edge import builder_plugin
from igate_edge.builder import Options, open_engine
from igate_edge.builder_tensorrt import TensorRT
from igate_edge.buildreport import BuildReport
from igate_edge.cli_engine import build_shown
from igate_edge.engines import tensorrt
from igate_edge.engines.onnxruntime import Timing
from igate_edge.errors import CheckFailed, UnavailableError
from igate_edge.package import package

FRAMES = tinynet.frames(8)
CALLS = ("one.shared.conv", "two.shared.conv", "two.shared.add.skip")
FIRST = CALLS[0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    return path


def write_library(path: Path, words: bytes = b"", machine: str = "") -> Path:
    """A file that is a library of the plugin as far as a build looks into it."""
    number = {"x86_64": 62, "aarch64": 183}[machine or platform.machine()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF".ljust(18, b"\0") + number.to_bytes(2, "little") + builder_plugin.MARK + words)
    return path


@dataclass(frozen=True)
class Place:
    """Kernels for sm_87, a library, and a cache."""

    folder: Path

    def __post_init__(self) -> None:
        self.kernels.mkdir()
        image = plugin_kit.image()
        (self.kernels / "a.cubin").write_bytes(image.data)
        about = {"file": "a.cubin", "source": source.digest(source.text())}
        manifest.write(self.kernels, [dataclasses.replace(row, **about) for row in image.kernels.values()])
        write_library(self.library)

    @property
    def kernels(self) -> Path:
        return self.folder / "kernels"

    @property
    def library(self) -> Path:
        return self.folder / "plugin" / "a" / "libigate_kernel.so"

    def backend(self, plans: Any, clock: Callable[[], float], sleep: Callable[[float], None]) -> TensorRT:
        folders = {"kernels": self.kernels, "libraries": self.folder / "plugin", "root": Path("/no/board")}
        return TensorRT(plans, clock=clock, sleep=sleep, **folders)

    def built(self, bundle: Path, plans: StandIn, rollback: bool = False, **options: Any) -> BuildReport:
        asked = Options("tensorrt", **{"cache_dir": self.folder / "cache", "precision": "int8", **options})
        _, session, report = open_engine(
            bundle, asked, backend=self.backend(plans, plans.clock, plans.clock.sleep), rollback=rollback
        )
        session.close()
        assert all(one.closed for one in plans.opened)
        return report


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def gaining(*layers: str, **more: Any) -> StandIn:
    """These layers take half the time on the plugin, all others twice as long; a frame gains 0.25 ms by each."""
    return StandIn(
        layer_ms=lambda call, on: 1.0 if not on else 0.5 if call in layers else 2.0,
        saved_ms=lambda on: 0.25 * sum(1 if call in layers else -4 for call in on),
        **more,
    )


def test_layers_take_the_plugin_where_it_is_faster(bundle: Path, place: Place) -> None:
    plans = gaining(*CALLS[:2])
    report = place.built(bundle, plans, precision="auto")
    assert report.plugin["layers"] == list(CALLS[:2]) and report.precision == "int8" and report.warnings == []
    assert report.plugin["times"][FIRST] == {"tensorrt_ms": 1.0, "plugin_ms": 0.5}
    assert report.plugin["why"][CALLS[2]] == "plugin 2.0000 ms, TensorRT 1.0000 ms: not faster by 5%"
    assert report.plugin["engine"] == pytest.approx({"plugin_ms": 0.5, "tensorrt_ms": 1.0, "ratio": 0.5})
    assert report.timing == pytest.approx({"int8_ms": 0.5, "float_ms": 2.0, "ratio": 0.25})
    own, every, chosen, half = plans.builds
    assert [asked.precision for asked in plans.builds] == ["int8"] * 3 + ["half"]
    assert [len(asked.plugins) for asked in plans.builds] == [0, 1, 1, 0] and own.seconds == half.seconds / 2
    assert (every.aux_streams, every.levels) == (chosen.aux_streams, chosen.levels) == ((0,), (3,)) != own.levels
    assert [on == () for on in plans.profiled[:4]] == [True, False, False, True], "in turn, the first one changing"
    assert plans.profiled.count(CALLS) == plans.profiled.count(()) == builder_plugin.ROUNDS
    assert report.coverage["int8_conv_macs_share"] == 1.0 and set(CALLS) <= report.coverage["convs"].keys()
    assert [gate["gate"] for gate in report.gates] == ["layers", "golden"] * 2 + ["budget"]
    shown = "\n".join(map(str, build_shown(report)))
    assert f"plugin: {CALLS[0]}, {CALLS[1]}; with the plugin 0.500 ms, without 1.000 ms, ratio 0.500" in shown


def test_a_cached_engine_loads_its_library_first(bundle: Path, place: Place) -> None:
    first = place.built(bundle, gaining(*CALLS))
    plans = gaining()
    again = place.built(bundle, plans)
    assert again.cached and again.plugin == first.plugin and again.plugin["layers"] == list(CALLS)
    assert plans.loaded == [(place.library,)] and plans.builds == []


def test_library_and_kernels_are_in_the_key(bundle: Path, place: Place) -> None:
    keys = [place.built(bundle, StandIn()).key]
    write_library(place.library, b"another build")
    keys.append(place.built(bundle, StandIn()).key)
    write_library(place.folder / "plugin" / "b" / "libigate_kernel.so", b"newer")
    os.utime(place.folder / "plugin" / "b" / "libigate_kernel.so", (2e9, 2e9))
    keys.append(place.built(bundle, StandIn()).key)
    rows = list(manifest.load(place.kernels).values())
    data = (place.kernels / "a.cubin").read_bytes() + b"changed"
    (place.kernels / "a.cubin").write_bytes(data)
    manifest.write(place.kernels, [dataclasses.replace(row, sha256=manifest.digest(data)) for row in rows])
    keys.append(place.built(bundle, StandIn()).key)
    (place.kernels / "a.cubin").unlink()
    keys.append(place.built(bundle, StandIn()).key)
    assert len(set(keys)) == 5


def test_without_its_library_an_engine_is_not_opened(bundle: Path, place: Place) -> None:
    """Cases T8: the library is named, and the engine built for it is no engine to roll back to."""
    report = place.built(bundle, gaining(*CALLS))
    place.library.unlink()
    plans = StandIn(alter=standin_engine.one_task("depth"))
    with pytest.raises(CheckFailed, match="NOT as packaged") as caught:
        place.built(bundle, plans, rollback=True)
    assert "built before" not in str(caught.value) and len(plans.loaded) == 1, "the old engine was opened"
    backend = place.backend(plans, plans.clock, plans.clock.sleep)
    with pytest.raises(CheckFailed, match="needs a plugin library that is not here: igate::Kernel of .*SHA-256"):
        backend.open(builder_plugin.seal(b"plan", _kit(report)), Options("tensorrt"))


def test_an_engine_gets_the_library_that_it_was_built_with(bundle: Path, place: Place) -> None:
    plans = gaining(*CALLS)
    report = place.built(bundle, plans)
    newer = write_library(place.folder / "plugin" / "b" / "libigate_kernel.so", b"newer")
    os.utime(newer, (2e9, 2e9))
    broken = StandIn(alter=standin_engine.one_task("depth"))
    rolled = place.built(bundle, broken, rollback=True)
    assert rolled.key == report.key and rolled.rolled_back and broken.loaded[-1] == (place.library,)


def _kit(report: BuildReport) -> builder_plugin.Kit:
    return builder_plugin.Kit(Path("x"), report.plugin["library"], plugin.Image(b"", {}), "")


def test_no_layer_is_faster(bundle: Path, place: Place) -> None:
    plans = gaining()
    report = place.built(bundle, plans)
    assert report.plugin["layers"] == [] and report.plugin["note"] == "not used: no layer is faster on it"
    assert len(report.plugin["why"]) == 3 and len(plans.builds) == 2 and report.warnings == []


def test_layers_that_gain_but_not_the_frame(bundle: Path, place: Place) -> None:
    plans = gaining(*CALLS)
    plans.saved_ms = lambda on: -0.5
    report = place.built(bundle, plans)
    assert report.plugin["layers"] == [] and report.plugin["engine"]["ratio"] == pytest.approx(1.5)
    assert report.plugin["note"].startswith("not used: with the plugin 1.500 ms, without 1.000 ms")
    assert report.latency["measured_ms"] == pytest.approx(1.0) and len(plans.builds) == 3
    hidden, clear = (builder_plugin.engine_times(Timing(0.98, 1.0, 0.98, (0.95, high), 30)) for high in (1.01, 0.99))
    assert clear[0] and not hidden[0], "a gain that the noise hides is none"


def test_it_is_tried_within_the_time_limit(bundle: Path, place: Place) -> None:
    def tried(seconds: float, plans: StandIn) -> tuple[int, str]:
        report = place.built(bundle, plans, seconds=seconds)
        return len(plans.builds), report.plugin["note"]

    assert tried(29.0, gaining(*CALLS, build_s=10.0)) == (
        1, "not tried: 2 more build(s) of 10 s after 10 s: more than 29 s",
    )  # fmt: skip
    assert tried(31.0, gaining(*CALLS, build_s=10.0))[0] == 3
    slow = gaining(*CALLS, build_s=10.0)
    fast, slow.layer_ms = slow.layer_ms, lambda call, on: (slow.clock.sleep(1), fast(call, on))[1]
    builds, note = tried(32.0, slow)
    assert builds == 2 and note.startswith("not used: 1 more build(s) of 10 s after ")


def test_what_is_missing_is_a_note_and_no_warning(bundle: Path, place: Place) -> None:
    def noted(here: dict[str, Any] | None = None, **options: Any) -> str:
        plans = StandIn({**HERE, **(here or {})})
        cache = place.folder / "caches" / str(len(list((place.folder / "caches").glob("*"))))
        report = place.built(bundle, plans, cache_dir=cache, **options)
        assert report.plugin["layers"] == [] and report.warnings == [] and plans.called == b""
        assert not any(asked.plugins for asked in plans.builds) or options.get("plugins")
        return str(report.plugin["note"])

    other = place.folder / "other.so"
    other.write_bytes(b"\x7fELF")
    assert noted(plugins=[other]).startswith("not tried: its library is missing: none of the libraries given is it")
    assert noted(batch=2) == "not tried: its launches are made for one image a call, not 2"
    assert noted(precision="float") == "not tried: only INT8 layers have kernels"
    assert "no built cubin fits: wanted sm_86, driver 12060" in noted({"compute": "8.6"})
    assert noted({"compute": "?"}) == "not tried: no kernels for compute ?, driver 12.6"
    for words, machine in ((b"__asan_init", ""), (b"", "aarch64" if platform.machine() == "x86_64" else "x86_64")):
        write_library(place.library, words, machine)
        assert "its library is missing: none was built for this machine; python -m igate_edge.kernels" in noted()
    (place.kernels / manifest.NAME).write_text("{")
    assert "the kernels' manifest is damaged" in noted()
    (place.kernels / manifest.NAME).unlink()
    assert "no kernels were built ahead of time" in noted()


def test_a_library_that_was_given_is_taken(bundle: Path, place: Place) -> None:
    given = write_library(place.folder / "mine.so", b"mine")
    place.library.unlink()
    plans = gaining(*CALLS)
    assert place.built(bundle, plans, plugins=[given]).plugin["layers"] == list(CALLS)
    assert [asked.plugins for asked in plans.builds] == [(given,)] * 3
    with pytest.raises(UnavailableError, match="cannot read .*absent.so"):
        place.built(bundle, plans, plugins=[place.folder / "absent.so"])


def test_layers_on_the_plugin_pass_the_gates_or_are_not_used(bundle: Path, place: Place) -> None:
    report = place.built(bundle, gaining(*CALLS, alter=standin_engine.one_task("depth"), altered=("plugin",)))
    words = "not used: the INT8+plugin engine does not compute what was packaged: task 'depth' (int8) is NOT"
    assert report.plugin["layers"] == [] and report.plugin["note"].startswith(words)
    assert [text.startswith(f"the plugin is {words}") for text in report.warnings] == [True]

    def float_plugin(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if row["LayerType"] == "PluginV3":
                row["Inputs"][0]["Format/Datatype"] = "Half"

    report = place.built(bundle, gaining(FIRST, spoil=float_plugin), max_ms=40.0)
    assert f"{FIRST} is not INT8: reads half ({FIRST})" in report.plugin["note"]


def test_copies_beside_a_layer_on_the_plugin_are_its_own(bundle: Path, place: Place) -> None:
    def spoil(rows: list[dict[str, Any]]) -> None:
        if any(row["LayerType"] == "PluginV3" for row in rows):
            name = f"Reformatting CopyNode for Input Tensor 0 to {beside}"
            rows.append(standin_engine.row(name, [], "Int8", "Int8", "Reformat"))

    beside = FIRST
    report = place.built(bundle, gaining(FIRST, spoil=spoil))
    assert report.plugin["layers"] == [FIRST]
    assert f"Reformatting CopyNode for Input Tensor 0 to {FIRST}" in report.coverage["reformats"]
    beside = "head.seg.conv"
    report = place.built(bundle, gaining(FIRST, spoil=spoil), max_ms=40.0)
    assert "unexpected reformat Reformatting CopyNode for Input Tensor 0 to head.seg.conv" in report.plugin["note"]


def test_a_graph_that_is_refused_costs_the_plugin_alone(bundle: Path, place: Place) -> None:
    report = place.built(bundle, gaining(*CALLS, refuses=lambda model: bool(standin_engine.plugged(model))))
    assert report.plugin["note"].startswith("not used: TensorRT does not take the graph") and report.precision == "int8"
    plans = gaining(*CALLS, refuses=lambda model: bool(standin_engine.called(model)))
    report = place.built(bundle, plans, max_ms=40.0)
    assert report.plugin["note"].startswith("not tried: no engine of local functions: TensorRT does not take the graph")
    assert len(plans.builds) == 2 and report.precision == "int8" and report.warnings == []


def test_fp16_that_is_faster_has_no_layers_on_it(bundle: Path, place: Place) -> None:
    plans = gaining(FIRST, cost_ms=lambda precision, idle: 3.0 if precision == "int8" else 1.0)
    report = place.built(bundle, plans, precision="auto")
    assert report.precision == "half" and report.plugin["layers"] == [] and report.plugin["engine"]
    assert place.built(bundle, plans, precision="auto").cached and plans.loaded[-1] == ()


@pytest.mark.parametrize("left", [0, 3, 1])
def test_a_cancelled_build_leaves_nothing(bundle: Path, place: Place, left: int) -> None:
    """While none, all, or those that gain are put on the plugin."""
    stopped = []

    class Cancelled(StandIn):
        def compile_plan(self, model: bytes, *arguments: Any, **options: Any) -> Any:
            if len(standin_engine.plugged(model)) == left:
                stopped.append(model)
                raise tensorrt.BuildCancelled("the build was stopped", "", "")
            return super().compile_plan(model, *arguments, **options)

    plans = Cancelled(layer_ms=gaining(FIRST).layer_ms)
    with pytest.raises(tensorrt.BuildCancelled):
        place.built(bundle, plans)
    assert len(stopped) == 1 and all(session.closed for session in plans.opened)
    assert not list((place.folder / "cache").glob("*.engine"))
