"""Loading beside a running node: the heartbeat goes on, whatever the build does; its failures come back whole."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy", reason="NOT TESTED: ROS 2 is missing; `make test-ros` brings it")
import tinynet
from igate_edge_ros import loading
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.lifecycle import TransitionCallbackReturn
from ros_world import PATIENCE_S, BrightnessEngine, World, said

from igate_edge.errors import BundleError, DefectError, InputError, UnavailableError
from igate_edge.package import package

pytestmark = pytest.mark.ros
HELD_S = 2.0
#: Longest time between two heartbeats of 50 Hz while an engine is built.
GAP_S = 0.1
#: Holds the interpreter's lock, as a builder's binding may: a plain sleep would give it away.
HOLD = f"import ctypes\nctypes.PyDLL(None).usleep({int(HELD_S * 1e6)})\n"


@pytest.fixture
def bundle(tmp_path: Path) -> dict[str, Any]:
    frames = tinynet.frames(8)
    package(tinynet.gated_onnx(), tmp_path / "tiny.igate", calibration=frames, golden=frames[:4])
    cache = str(tmp_path / "cache")
    return {"bundle": str(tmp_path / "tiny.igate"), "backend": "onnxruntime", "precision": "float", "cache_dir": cache}


@pytest.fixture
def holding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python that starts from now on holds its lock at first."""
    (tmp_path / "hold").mkdir()
    (tmp_path / "hold" / "sitecustomize.py").write_text(HOLD)
    paths = [str(tmp_path / "hold"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def longest_gap(world: World, node: Any, load: Any) -> float:
    """Seconds between two heartbeats at most while `load` runs on a thread, as a transition does."""
    beats: list[float] = []
    group = MutuallyExclusiveCallbackGroup()
    node.create_timer(0.02, lambda: beats.append(time.monotonic()), callback_group=group)
    world.until(lambda: len(beats) > 3, "a heartbeat")
    thread = threading.Thread(target=load)
    begun = len(beats)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    world.until(lambda: beats[-1] > beats[begun - 1] + HELD_S, "the heartbeat after the load")
    return max(after - before for before, after in zip(beats[begun - 1 :], beats[begun:], strict=False))


def test_a_build_that_holds_the_interpreter_does_not_stop_the_heart(
    world: World, bundle: dict[str, Any], holding: None
) -> None:
    gaps: list[float] = []
    # A busy machine takes its time now and then, a build that is felt here does so always: the best of three counts.
    while not gaps or (min(gaps) >= GAP_S and len(gaps) < 3):
        cache = {"cache_dir": f"{bundle['cache_dir']}{len(gaps)}"}
        node, results = world.node(name=f"igate{len(gaps)}", **{**bundle, **cache}), []
        gaps.append(
            longest_gap(world, node, lambda node=node, results=results: results.append(node.trigger_configure()))
        )
        assert results == [TransitionCallbackReturn.SUCCESS], node.reason
        assert gaps[-1] < HELD_S / 4, "the two seconds show"
    assert min(gaps) < GAP_S, gaps


def test_the_heartbeat_would_show_it(world: World) -> None:
    def hold(options: Any) -> BrightnessEngine:
        ctypes.PyDLL(None).usleep(int(HELD_S * 1e6))
        return BrightnessEngine()

    node = world.node(BrightnessEngine())
    node._open_engine = hold
    assert longest_gap(world, node, node.trigger_configure) > HELD_S * 0.9


def test_a_node_says_loading_and_the_executor_goes_on_while_an_engine_is_opened(world: World) -> None:
    go, opening = threading.Event(), threading.Event()

    def slowly(options: Any) -> BrightnessEngine:
        opening.set()
        assert go.wait(PATIENCE_S)
        return BrightnessEngine()

    node, health = world.node(BrightnessEngine()), world.listen_health()
    node._open_engine = slowly
    beats: list[float] = []
    world.peer.create_timer(0.01, lambda: beats.append(time.monotonic()))
    node.autostart()
    assert opening.wait(PATIENCE_S)
    before = len(beats)
    try:
        world.until(lambda: len(beats) > before + 5, "other callbacks of the same executor")
        health.wait(said("state", "loading"))
    finally:
        go.set()
    health.wait(said("state", "active"))


def test_the_second_time_the_engine_is_in_the_cache(
    world: World, bundle: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Any] = []
    real = loading.build_apart
    monkeypatch.setattr(loading, "build_apart", lambda *arguments: (built.append(arguments[0]), real(*arguments)))
    node = world.node(**bundle)
    for _ in range(2):
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS, node.reason
        assert node._work is not None and node._work._build.cached
        node.trigger_cleanup()
    assert len(built) == 1


def test_an_error_of_the_other_process_comes_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "cut.igate").write_bytes(b"PK\3\4")
    with pytest.raises(BundleError, match="cut.igate") as caught:
        loading.build_apart({"path": str(tmp_path / "cut.igate"), "backend": "onnxruntime"})
    assert caught.value.fix
    with pytest.raises(InputError, match="unknown backend 'abacus'"):
        loading.build_apart({"path": "a.igate", "backend": "abacus"})
    with pytest.raises(DefectError, match="TypeError"):
        loading.build_apart({"path": "a.igate", "colour": "blue"})


def test_a_node_that_is_stopped_ends_the_build(bundle: dict[str, Any], holding: None) -> None:
    begun = time.monotonic()
    with pytest.raises(UnavailableError, match="the node was stopped meanwhile"):
        loading.build_apart({"path": bundle["bundle"]}, lambda: True)
    assert time.monotonic() - begun < HELD_S


def test_a_killed_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="signal 9: out of memory") as caught:
        loading.build_apart({"path": "a.igate"})
    assert caught.value.fix == "build it beforehand: igate build BUNDLE"
