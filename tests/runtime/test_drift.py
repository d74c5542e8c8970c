"""Drift on the shipped network: low on held-out frames, high on frames of a changed camera, and named rightly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinynet
from monitored import Clock, causes, feed

from igate_edge import Engine
from igate_edge.bundle import Bundle
from igate_edge.contract import OutputSpec, Preprocess
from igate_edge.errors import DataError, InputError
from igate_edge.package import package, with_reference
from igate_edge.runtime.drift import FEWEST, WINDOW, Drift, check_reference, distance, reference_statistics
from igate_edge.runtime.drift_tensors import saturation
from igate_edge.runtime.monitor import INSPECT_S, Monitor
from igate_edge.runtime.preprocess import to_input

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tabletop.igate"
Change = Callable[[np.ndarray], np.ndarray]


def levels(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def blurred(frame: np.ndarray) -> np.ndarray:
    """Twice the mean of 3x3 pixels."""
    image = frame.astype(np.float32)
    for axis in (0, 1, 0, 1):
        image = (np.roll(image, 1, axis) + image + np.roll(image, -1, axis)) / 3
    return levels(image)


def noisy(frame: np.ndarray) -> np.ndarray:
    return levels(frame + np.random.default_rng(int(frame.sum())).normal(0, 20, frame.shape))


CHANGES: dict[str, tuple[Change, str]] = {
    "dark": (lambda frame: levels(frame * 0.35), "brightness"),
    "overexposed": (lambda frame: levels(frame * 1.8), "clipping"),
    "blurred": (blurred, "sharpness"),
    "noisy": (noisy, "noise"),
    "colour-shifted": (lambda frame: levels(frame * [1.25, 1.0, 0.75]), "colour/red-blue"),
    "grey": (lambda frame: frame[..., [1, 1, 1]], "colourfulness"),
    "BGR as RGB": (lambda frame: frame[..., ::-1], "channel-order"),
    "upside down": (lambda frame: frame[::-1], "depth/depth"),
}


@pytest.fixture(scope="module")
def held_out() -> list[np.ndarray]:
    from igate_edge.training.tabletop import VAL_START, render

    return [render(1, VAL_START + index)["image"] for index in range(WINDOW)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """As packaging writes it, from frames of the training split."""
    from igate_edge.training.tabletop import render

    frames = [render(1, index)["image"] for index in range(0, 4000, 84)]
    target = tmp_path_factory.mktemp("reference") / "tabletop.igate"
    bundle = with_reference(Bundle.read(EXAMPLE), target, frames)
    assert Bundle.read(target).manifest["reference"] == bundle.manifest["reference"]
    return bundle.manifest["reference"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine.open(EXAMPLE, cache_dir=tmp_path_factory.mktemp("cache")) as opened:
        yield opened


def watched(engine: Engine, reference: dict[str, Any], frames: list[np.ndarray]) -> tuple[Monitor, list[str]]:
    """A monitor that saw these frames and the engine's answers, and the alarms it raised."""
    clock, alarms = Clock(), list[str]()
    monitor = Monitor(10.0, clock=clock, load=clock.quiet, reference=reference)
    monitor.on_alarm = alarms.append
    for frame in frames:
        clock.now += INSPECT_S
        monitor.inspect(np.ascontiguousarray(frame), engine(frame))
        feed(monitor, clock, 5.0, every=0.0)
    return monitor, alarms


def test_held_out_and_golden_frames_are_no_drift(
    engine: Engine, reference: dict[str, Any], held_out: list[np.ndarray]
) -> None:
    golden = list(Bundle.read(EXAMPLE).golden["frame"]) * 4
    for frames in (held_out, golden):
        monitor, alarms = watched(engine, reference, frames)
        drift = monitor.snapshot()["drift"]
        assert drift["status"] == "low" and 0 < drift["score"] < 0.8, drift["features"]
        assert monitor.verdict().level == "OK" and alarms == []
        # What is measured of INT8 saturation: the input, and outputs that decoding keeps.
        assert set(drift["outside_range"]) == {"image", "depth"} and max(drift["outside_range"].values()) < 0.01


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_changed_camera_is_drift(
    name: str, engine: Engine, reference: dict[str, Any], held_out: list[np.ndarray]
) -> None:
    change, feature = CHANGES[name]
    monitor, alarms = watched(engine, reference, [change(frame) for frame in held_out])
    drift, verdict = monitor.snapshot()["drift"], monitor.verdict()
    assert drift["status"] == "high" and drift["score"] >= 1.2, drift["features"]
    assert drift["features"][feature] >= 1.2, drift["features"]
    assert verdict.level == "WARN" and causes(monitor) == ["input"]
    assert len(alarms) == 1 and alarms[0].startswith("drift: unlike the calibration frames")


def test_one_unchanged_scene_is_no_drift(engine: Engine, reference: dict[str, Any], held_out: list[np.ndarray]) -> None:
    """A robot that stares at one table sees one scene 32 times, which proves no more than one frame."""
    high = []
    for index, frame in enumerate(held_out):
        drift = Drift(reference)
        values = drift.measure(frame, engine(frame))
        for _ in range(WINDOW):
            drift.add(values)
        if drift.score().status != "low":
            high.append((index, drift.score().sentence()))
    assert len(high) <= 1, high


def test_a_camera_of_another_size_is_judged_at_the_networks(
    engine: Engine, reference: dict[str, Any], held_out: list[np.ndarray]
) -> None:
    frame = held_out[0]
    drift, twice = Drift(reference), np.repeat(np.repeat(frame, 2, 0), 2, 1)
    once, again = drift.measure(frame, engine(frame)), drift.measure(twice, engine(twice))
    assert once.keys() == again.keys()
    for name in ("brightness", "colour/red-blue", "depth/depth", "noise"):
        assert again[name] == pytest.approx(once[name], abs=0.05)


def test_less_contrast_is_no_blur(reference: dict[str, Any], held_out: list[np.ndarray]) -> None:
    drift, frame = Drift(reference), held_out[0]
    sharp, flat = (drift.measure(image, {}) for image in (frame, levels(frame * 0.5 + 64)))
    assert flat["sharpness"] == pytest.approx(sharp["sharpness"], abs=0.05)
    assert flat["contrast"] == pytest.approx(sharp["contrast"] - math.log(2), abs=0.05)
    assert drift.measure(blurred(frame), {})["sharpness"] < sharp["sharpness"] - 1.0


def test_images_are_looked_at_twice_a_second(reference: dict[str, Any]) -> None:
    clock = Clock()
    monitor = Monitor(clock=clock, load=clock.quiet, reference=reference)
    for _ in range(30):
        monitor.inspect(np.zeros((96, 128, 3), np.uint8), {})
        clock.now += INSPECT_S / 10
    assert monitor.snapshot()["drift"]["inspected"] == 3
    assert "too few frames yet" in monitor.concerns()["input"][1]


def test_without_a_reference_nothing_is_claimed(held_out: list[np.ndarray]) -> None:
    clock = Clock()
    monitor = Monitor(clock=clock, load=clock.quiet)
    for frame in held_out[:FEWEST]:
        clock.now += INSPECT_S
        monitor.inspect(frame, {})
    drift = monitor.snapshot()["drift"]
    assert (drift["status"], drift["score"], drift["inspected"]) == ("unknown", None, 0)


def test_a_large_network_is_looked_at_in_tiles() -> None:
    frames = tinynet.frames(6, size=(300, 400))
    big = Preprocess(200, 300)
    reference = reference_statistics(frames, [{}] * 6, [], big)
    dark = Drift(reference).measure(levels(frames[0] * 0.3), {})
    assert dark["brightness"] < reference["features"]["brightness"]["mean"] - 0.8
    assert list(reference["usual"]) == ["colours"] and "noise" in reference["features"]


def test_values_outside_the_calibrated_range_are_counted() -> None:
    """Limits by hand: input 0.25 to 0.75 of 255; depth e^-1 to e^1 metres, half a step of 1/127 inside."""
    specs = [OutputSpec("far", "depth", 1), OutputSpec("rim", "edges", 1)]
    limits = {"image": (0.25, 0.75), "far": (-1.0, 1.0), "rim": (-2.0, 2.0)}
    answer = {"far": np.full((8, 8), 1.0, np.float32), "rim": np.full((8, 8), 0.5, np.float32)}
    frame = np.full((8, 8, 3), 128, np.uint8)
    reference = reference_statistics([frame] * 4, [answer] * 4, specs, Preprocess(8, 8), limits)
    assert reference["limits"]["image"] == [63.75] * 3 + [191.25] * 3
    assert reference["features"]["saturation/far"] == {"mean": 0.0, "std": 0.0}
    frame[:2] = 200
    answer["far"][:4] = math.e
    answer["rim"][:1] = 1 / (1 + math.exp(2.0))
    answer["rim"][1] = np.nan
    found = Drift(reference).measure(frame, answer)
    assert (found["saturation/image"], found["saturation/far"]) == (0.25, 0.5)
    assert found["saturation/rim"] == pytest.approx(1 / 7)


def test_classes_and_depths_that_never_came_are_far() -> None:
    specs = [OutputSpec("seg", "semseg", 3), OutputSpec("far", "depth", 1), OutputSpec("tag", "classification", 2)]
    usual = {"seg": np.zeros((8, 8), np.uint8), "far": np.ones((8, 8), np.float32), "tag": np.float32([0.9, 0.1])}
    frame = tinynet.frames(1)[0]
    reference = reference_statistics([frame] * 4, [usual] * 4, specs, Preprocess(8, 8))
    assert reference["usual"]["classes/seg"] == [1.0, 0.0, 0.0]
    same = Drift(reference).measure(frame, usual)
    assert [same[name] for name in ("classes/seg", "depth/far", "classes/tag")] == pytest.approx([0, 0, 0], abs=1e-3)
    # 255 is "unlabelled", and NaN "no depth": neither is a class or a distance.
    odd = {"seg": np.uint8([[2, 255]]), "far": np.float32([[30.0, np.nan]]), "tag": np.float32([0.0, 1.0])}
    other = Drift(reference).measure(frame, odd)
    assert (other["classes/seg"], other["depth/far"]) == (1.0, 1.0) and other["classes/tag"] > 0.7
    nothing = {"seg": np.uint8([[255]]), "far": np.float32([[np.nan, np.inf, 0.0, -1.0]])}
    assert not {"classes/seg", "depth/far", "classes/tag"} & set(Drift(reference).measure(frame, nothing))


def test_distance_is_zero_for_equals() -> None:
    even = np.array([0.5, 0.5])
    assert distance(even, even) == 0.0 and 0 < distance(even, np.array([0.9, 0.1])) < 1


def test_packaging_stores_the_reference(tmp_path: Path) -> None:
    frames = tinynet.frames(8)
    bundle = package(tinynet.gated_onnx(), tmp_path / "a.igate", calibration=iter(frames), golden=frames[:4])
    reference = check_reference(bundle.manifest["reference"])
    assert reference["frames"] == 8 and reference["size"] == [tinynet.SIZE, tinynet.SIZE]
    assert {"classes/seg", "depth/depth", "saturation/image"} <= set(reference["features"])
    again = package(tinynet.gated_onnx(), tmp_path / "b.igate", calibration=frames, golden=frames[:4])
    assert again.seal == bundle.seal
    few = package(tinynet.gated_onnx(), tmp_path / "c.igate", calibration=frames[:1], golden=frames[:4])
    assert few.manifest["reference"]["frames"] == 5


def test_a_new_reference_changes_nothing_else(tmp_path: Path) -> None:
    frames = tinynet.frames(8)
    bundle = package(tinynet.gated_onnx(), tmp_path / "a.igate", calibration=frames, golden=frames[:4])
    other = with_reference(bundle, tmp_path / "b.igate", tinynet.frames(6, seed=4))
    assert other.manifest["reference"] != bundle.manifest["reference"]
    assert {**other.manifest, "reference": 0} == {**bundle.manifest, "reference": 0} and other.model == bundle.model
    with pytest.raises(DataError, match="too few frames for reference statistics"):
        with_reference(bundle, tmp_path / "c.igate", frames[:3])
    assert not (tmp_path / "c.igate").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data.update(version=2),
        lambda data: data.update(frames=1),
        lambda data: data.update(size=[0, 16]),
        lambda data: data["features"]["noise"].update(std=-1.0),
        lambda data: data["features"]["noise"].update(mean=None),
        lambda data: data["features"].update(smell={"mean": 1, "std": 1}),
        lambda data: data["usual"]["classes/seg"].pop(),
        lambda data: data["usual"].update({"classes/none": [1.0]}),
        lambda data: data["limits"].update(image=[1.0]),
        lambda data: data.pop("tasks"),
    ],
)
def test_a_broken_reference_is_refused(spoil: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    frames = tinynet.frames(8)
    whole = package(tinynet.gated_onnx(), tmp_path / "a.igate", calibration=frames, golden=frames[:4])
    data = copy.deepcopy(whole.manifest["reference"])
    Drift(data)
    spoil(data)
    with pytest.raises(InputError, match="the reference statistics cannot be read"):
        Drift(data)


def test_tensors_inside_the_network_leave_their_range_on_noise(held_out: list[np.ndarray]) -> None:
    bundle = Bundle.read(EXAMPLE)
    usual = saturation(bundle, held_out[:3])
    strange = saturation(bundle, [levels(frame + np.sign(frame % 2 - 0.5) * 60) for frame in held_out[:3]])
    assert usual.keys() == strange.keys() and len(usual) > 50 and {"image", "depth"} <= usual.keys()
    assert list(strange.values()) == sorted(strange.values(), reverse=True)
    assert max(usual.values()) < 0.002 and max(strange.values()) > 5 * max(*usual.values(), 0.0005)
    pixels = to_input(held_out[0], bundle.preprocess)
    for low, high in ((-2.0, 0.5), (-0.5, 2.0)):
        narrow = saturation(replace(bundle, ranges={**bundle.ranges, "image": (low, high)}), held_out[:1])
        slack = 2.0 / 254
        want = float(np.mean((pixels < low - slack) | (pixels > high + slack)))
        assert want > 0.05 and narrow["image"] == pytest.approx(want)
    with pytest.raises(DataError, match="no frames to look at"):
        saturation(bundle, [])
