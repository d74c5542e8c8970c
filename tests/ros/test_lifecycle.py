"""Transitions of the node, over the services that a lifecycle manager uses, and what each keeps, frees and says."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="NOT TESTED: ROS 2 is missing; `make test-ros` brings it")
import tinynet
from igate_edge_ros import work
from lifecycle_msgs.msg import Transition, TransitionEvent
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.lifecycle import TransitionCallbackReturn
from ros_world import PATIENCE_S, RELIABLE, BrightnessEngine, Listener, World, image, level, said, values
from sensor_msgs.msg import Image

from igate_edge.package import package
from igate_edge.runtime import monitor

pytestmark = pytest.mark.ros
SUCCESS, ERROR = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.ERROR
GREY = np.full((16, 16, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Parameters of a node with a real engine."""
    folder, frames = tmp_path_factory.mktemp("ros"), tinynet.frames(8)
    package(tinynet.gated_onnx(), folder / "tiny.igate", calibration=frames, golden=frames[:4])
    cache = str(folder / "cache")
    return {"bundle": str(folder / "tiny.igate"), "backend": "onnxruntime", "precision": "float", "cache_dir": cache}


class Manager:
    """What a lifecycle manager does."""

    def __init__(self, world: World, node: str = "/igate") -> None:
        self._change = world.peer.create_client(ChangeState, f"{node}/change_state")
        self._state = world.peer.create_client(GetState, f"{node}/get_state")
        assert self._change.wait_for_service(PATIENCE_S)
        assert self._state.wait_for_service(PATIENCE_S)

    def ask(self, transition: int) -> bool:
        return self._call(self._change, ChangeState.Request(transition=Transition(id=transition))).success

    def state(self) -> str:
        return self._call(self._state, GetState.Request()).current_state.label

    def _call(self, client: Any, request: Any) -> Any:
        done = threading.Event()
        future = client.call_async(request)
        future.add_done_callback(lambda _: done.set())
        assert done.wait(PATIENCE_S)
        return future.result()


def answered(world: World, labels: Any, camera: Any, second: int) -> Any:
    """The answer to one of some images of that second; each is newer than the one before, as a camera's are."""
    nanoseconds = itertools.count()

    def found() -> Any:
        return next((m for m in labels.messages if m.header.stamp.sec == second), None)

    def again() -> None:
        camera.publish(image(GREY, stamp=(second, next(nanoseconds))))

    world.until(found, f"an answer to {second}", again)
    return found()


def test_a_manager_leads_the_node_through_its_states(world: World) -> None:
    engine = BrightnessEngine()
    world.node(engine)
    manager, labels, camera = Manager(world), world.listen(Image, "/igate/segmentation"), world.camera()
    assert manager.state() == "unconfigured" and engine.calls == 0
    assert manager.ask(Transition.TRANSITION_CONFIGURE) and manager.state() == "inactive"
    assert engine.calls == 3, "warmed up"
    assert camera.get_subscription_count() == 0, "an inactive node costs the camera nothing"
    assert manager.ask(Transition.TRANSITION_ACTIVATE) and manager.state() == "active"
    answered(world, labels, camera, 1)
    assert manager.ask(Transition.TRANSITION_DEACTIVATE) and not engine.closed, "memory is kept"
    world.until(lambda: camera.get_subscription_count() == 0, "the end of the subscription")
    assert manager.ask(Transition.TRANSITION_ACTIVATE)
    answered(world, labels, camera, 2)
    assert manager.ask(Transition.TRANSITION_ACTIVE_SHUTDOWN) and manager.state() == "finalized"
    world.until(lambda: engine.closed, "the engine's end")


def test_cleanup_frees_the_engine_and_takes_the_topics_down(world: World) -> None:
    engine = BrightnessEngine()
    node = world.active(engine)
    assert node.count_publishers("/igate/depth") == 1
    assert node.trigger_deactivate() == SUCCESS and node.trigger_cleanup() == SUCCESS
    world.until(lambda: engine.closed, "the engine's end")
    world.until(lambda: world.peer.count_publishers("/igate/depth") == 0, "the topic's end")


def test_an_inactive_node_is_silent(world: World) -> None:
    engine = BrightnessEngine()
    node = world.active(engine)
    labels, camera = world.listen(Image, "/igate/segmentation"), world.camera()
    answered(world, labels, camera, 1)
    assert node.trigger_deactivate() == SUCCESS
    calls, heard = engine.calls, len(labels.messages)
    camera.publish(image(GREY, stamp=(5, 0)))
    assert node.trigger_activate() == SUCCESS
    answered(world, labels, camera, 6)
    assert engine.calls > calls and {m.header.stamp.sec for m in labels.messages[heard:]} == {6}


def test_deactivating_waits_for_the_frame_in_hand_which_still_comes_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "DRAIN_S", PATIENCE_S)
    engine = BrightnessEngine()
    node = world.active(engine, max_age_ms=0.0)
    labels, camera = world.listen(Image, "/igate/segmentation"), world.camera()
    answered(world, labels, camera, 1)
    node._work.drain()
    engine.go.clear()
    before = engine.calls
    camera.publish(image(GREY, stamp=(2, 0)))
    world.until(lambda: engine.calls > before, "the image at the engine")
    ending = threading.Thread(target=node.trigger_deactivate)
    ending.start()
    ending.join(0.3)
    waits = ending.is_alive()
    engine.go.set()
    ending.join(PATIENCE_S)
    assert waits, "the node went silent with a frame inside"
    labels.wait(lambda messages: any(m.header.stamp.sec == 2 for m in messages))


def test_an_idle_node_is_no_stale_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "STALE_S", 0.0)
    node = world.active(BrightnessEngine(), diag_period=60.0)
    health, camera = world.listen_health(), world.camera()
    status = world.heard(node, health, said("perception", "nobody listens: nothing is computed"))
    assert level(status) == 0
    labels = world.listen(Image, "/igate/segmentation")
    answered(world, labels, camera, 1)
    status = world.heard(node, health, said("perception", "no frame was answered for"))
    assert level(status) == 3, "somebody listens and nothing comes"


@pytest.mark.parametrize(
    ("wrong", "right", "sentence"),
    [
        ({"bundle": ""}, {}, "parameter bundle is not usable: it is empty"),
        ({"bundle": "/no/such/scene.igate", "build_apart": True}, {}, "/no/such/scene.igate"),
        ({"tasks": ["fly"]}, {"tasks": [""]}, "fly"),
        ({"backend": "abacus"}, {}, "unknown backend 'abacus'"),
        ({"drop_policy": "oldest"}, {"drop_policy": "latest"}, "parameter drop_policy is not usable: 'oldest'"),
        ({"budget_ms": -1.0}, {"budget_ms": 0.0}, "parameter budget_ms is not usable"),
    ],
)
def test_what_cannot_be_configured_ends_in_the_error_state_with_the_reason(
    world: World, bundle: dict[str, Any], wrong: dict[str, Any], right: dict[str, Any], sentence: str
) -> None:
    good = {**bundle, "build_apart": False, **right}
    node = world.node(**{**good, "diag_period": 60.0, **wrong})
    manager, health = Manager(world), world.listen_health()
    states = Listener(world.peer, TransitionEvent, "/igate/transition_event", RELIABLE)
    world.until(lambda: world.peer.count_subscribers("/igate/transition_event"), "a listener")
    assert not manager.ask(Transition.TRANSITION_CONFIGURE)
    assert manager.state() == "unconfigured" and sentence in node.reason
    states.wait(lambda events: any(event.goal_state.label == "errorprocessing" for event in events))
    status = world.heard(node, health, said("state", sentence))
    assert level(status) == 2 and "Fix: " in status.message
    assert world.set(node, **good).successful
    assert manager.ask(Transition.TRANSITION_CONFIGURE), node.reason
    assert manager.state() == "inactive" and node.reason == ""


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_fifty_lives_of_a_node_leave_nothing_behind(world: World, bundle: dict[str, Any]) -> None:
    node = world.node(**bundle)
    labels, camera = world.listen(Image, "/igate/segmentation"), world.camera()
    sizes: list[tuple[float, int, int, int]] = []
    for life in range(1, 51):
        if life % 5 == 0:
            world.set(node, bundle="/no/such/scene.igate")
            assert node.trigger_configure() == ERROR and "/no/such/scene.igate" in node.reason
            world.set(node, bundle=bundle["bundle"])
        assert node.trigger_configure() == SUCCESS, node.reason
        assert node.trigger_activate() == SUCCESS
        answered(world, labels, camera, life)
        assert node.trigger_deactivate() == SUCCESS and node.trigger_cleanup() == SUCCESS
        del labels.messages[:]
        gc.collect()
        handles = len(list(node.publishers)) + len(list(node.subscriptions)) + len(list(node.waitables))
        sizes.append((rss_mb(), threading.active_count(), len(os.listdir("/proc/self/fd")), handles))
    warm, end = sizes[14], sizes[-1]
    assert end[0] - warm[0] < 10, f"35 lives took {end[0] - warm[0]:.1f} MB"
    assert end[1] <= warm[1] + 2 and end[2] <= warm[2] + 4 and end[3] == warm[3], (warm, end)


def test_an_engine_that_raises_is_opened_again_and_the_node_says_so(world: World) -> None:
    first, second = BrightnessEngine(), BrightnessEngine()
    engines = iter([first, second])
    node = world.node(first, diag_period=60.0)
    node._open_engine = lambda options: next(engines)
    assert node.trigger_configure() == SUCCESS and node.trigger_activate() == SUCCESS
    labels, health, camera = world.listen(Image, "/igate/segmentation"), world.listen_health(), world.camera()
    answered(world, labels, camera, 1)
    first.error = "the driver is gone"
    camera.publish(image(GREY, stamp=(2, 0)))
    assert level(world.heard(node, health, said("pipeline", "RuntimeError: the driver is gone"))) == 2
    answered(world, labels, camera, 3)
    del health.messages[:]
    assert second.calls and values(world.heard(node, health, said("state", "active")))["restarts"] == "1"


def test_an_engine_that_is_lost_for_good_ends_in_the_error_state(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from igate_edge.runtime import supervise

    monkeypatch.setattr(supervise, "DOWN_S", 0.0)
    engine = BrightnessEngine()
    node, opened = world.node(engine, diag_period=60.0), []

    def open_once(options: Any) -> Any:
        if opened:
            raise OSError("no device")
        opened.append(options)
        return engine

    node._open_engine = open_once
    assert node.trigger_configure() == SUCCESS and node.trigger_activate() == SUCCESS and node.alive
    labels, health, camera = world.listen(Image, "/igate/segmentation"), world.listen_health(), world.camera()
    answered(world, labels, camera, 1)
    engine.error = "the driver is gone"
    camera.publish(image(GREY, stamp=(2, 0)))
    assert level(world.heard(node, health, said("state", "unconfigured: "))) == 2
    assert not node.alive and "the driver is gone" in node.reason and engine.closed
    assert Manager(world).state() == "unconfigured"
