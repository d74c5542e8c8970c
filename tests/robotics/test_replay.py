"""`igate replay`: the same frames give the same answers, and a difference is found and named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import bags
import numpy as np
import pytest
import tinynet
from igate_command import igate, refused

from igate_edge import Engine
from igate_edge.bundle import Bundle, write_bundle
from igate_edge.cli_bag import LEAST_SHARE
from igate_edge.robotics.bag import BagSource, BagWriter
from igate_edge.robotics.messages import TextMessage, image_message
from igate_edge.robotics.recorder import RECORDING, Recorder
from igate_edge.robotics.replay import unlike
from igate_edge.robotics.storage import Storage
from igate_edge.runtime.drift import WINDOW
from igate_edge.runtime.encodings import to_rgb
from igate_edge.runtime.frame import Frame, Result
from igate_edge.runtime.pipeline import Pipeline
from igate_edge.runtime.preprocess import to_input

FRAMES = tinynet.frames(5, size=(16, 24))


@pytest.fixture(scope="module")
def engine(bundle: Path, cache: Path):
    with Engine.open(bundle, precision="float", cache_dir=cache) as engine:
        yield engine


def record(folder: Path, engine: Engine, change: str = "") -> Path:
    """A recording of five bgr8 frames, the fourth refused; `change`: a task whose third answer was another one."""
    with Recorder(folder) as recorder:
        for k, pixels in enumerate(FRAMES):
            frame = Frame(np.ascontiguousarray(pixels[..., ::-1]), "bgr8", bags.START + k, "optical", "/cam/image")
            rgb = to_rgb(frame)
            outputs = engine(rgb)
            if k == 2 and change == "seg":
                outputs["seg"] = (outputs["seg"] + 1) % 3
            elif k == 2 and change == "nan":
                outputs["tag"] = np.full_like(outputs["tag"], np.nan)
            elif k == 2 and change == "range":
                outputs["depth"][:8] = np.nan
            elif k == 2 and change:
                outputs[change] = 1.5 - outputs[change]
            answer = Result(frame.stamp_ns, "optical", frame.source, k, rgb, outputs)
            recorder.add(frame, answer if k != 3 else None, "" if k != 3 else "infer: out of luck")
        path = recorder.trigger("engine error")
    assert path is not None and recorder.problems == ()
    return path


def run(bundle: Path, cache: Path, path: Path, *more: object):
    return igate("replay", bundle, path, "--cache", cache, "--precision", "float", *more)


def test_the_same_frames_give_the_same_answers(tmp_path: Path, bundle: Path, cache: Path, engine: Engine) -> None:
    done = run(bundle, cache, record(tmp_path, engine), "--json")
    assert done.code == 0, done.out + done.err
    found = done.json
    assert (found["frames"], found["about"]["reason"], found["passed"]) == (5, "engine error", True)
    assert {task["task"]: (task["frames"], task["identical"]) for task in found["tasks"]} == {
        "seg": (4, 4),
        "depth": (4, 4),
        "tag": (4, 4),
    }
    assert found["errors"] == [[bags.START + 3, "infer: out of luck", ""]], "it was refused then and is answered now"


def test_what_a_pipeline_records_of_a_bag_replays(tmp_path: Path, bundle: Path, cache: Path, engine: Engine) -> None:
    bags.camera_bag(tmp_path / "in.mcap", FRAMES)
    for fit, at in (("stretch", "frame"), ("crop", "frame"), ("letterbox", "frame"), ("letterbox", "network")):
        looking: dict[str, Any] = {"fit": fit, "at": at}
        with Recorder(tmp_path / f"{fit} {at}", about=looking) as recorder:
            with Pipeline(engine, lambda result: None, mode="every", recorder=recorder, **looking) as pipeline:
                assert pipeline.run(BagSource(tmp_path / "in.mcap")).answered == 5
            path = recorder.trigger(fit)
        assert path is not None and recorder.problems == ()
        found = run(bundle, cache, path, "--json").json
        assert found["frames"] == 5 and found["passed"], found
        assert all((task["frames"], task["identical"]) == (5, 5) for task in found["tasks"])


@pytest.mark.parametrize(("change", "task"), [("seg", "seg"), ("depth", "depth"), ("tag", "tag"), ("nan", "tag")])
def test_another_answer_is_found_and_named(
    tmp_path: Path, bundle: Path, cache: Path, engine: Engine, change: str, task: str
) -> None:
    path = record(tmp_path, engine, change=change)
    done = run(bundle, cache, path, "--json")
    rows = {row["task"]: row for row in done.json["tasks"]}
    assert done.code == 1 and not done.json["passed"]
    assert [name for name, row in rows.items() if not row["passed"]] == [task]
    assert rows[task]["identical"] == 3 and rows[task]["worst_stamp_ns"] == bags.START + 2
    assert "are NOT answered as they were recorded" in run(bundle, cache, path).out


def test_a_recording_without_answers_has_not_passed(tmp_path: Path, bundle: Path, cache: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for k, pixels in enumerate(FRAMES):
            recorder.add(Frame(np.ascontiguousarray(pixels), stamp_ns=bags.START + k), None, "dropped before infer")
        path = recorder.trigger("deadlines")
    assert path is not None
    done = run(bundle, cache, path)
    assert done.code == 1 and "FAILED: nothing was compared, no frame has its answers" in done.out
    assert "5 frame(s), 0 of them with their answers, recorded because of: deadlines" in done.out


def test_answers_of_another_size_are_another_answer(tmp_path: Path, bundle: Path, cache: Path, engine: Engine) -> None:
    with Recorder(tmp_path) as recorder:
        frame = Frame(FRAMES[0], "rgb8", 1, "", "/cam/image")
        recorder.add(frame, Result(1, "", "/cam/image", 0, FRAMES[0], engine(FRAMES[0][:8])))
        path = recorder.trigger("x")
    assert path is not None
    done = run(bundle, cache, path, "--json")
    assert done.code == 1 and [row["task"] for row in done.json["tasks"] if row["passed"]] == []


def test_depth_that_was_out_of_range_is_not_compared(tmp_path: Path, bundle: Path, cache: Path, engine: Engine) -> None:
    done = run(bundle, cache, record(tmp_path, engine, change="range"), "--json")
    assert done.code == 0 and all(task["identical"] == 4 for task in done.json["tasks"])


def test_a_cut_recording_is_replayed_up_to_the_cut(tmp_path: Path, bundle: Path, cache: Path, engine: Engine) -> None:
    path = record(tmp_path, engine)
    path.write_bytes(path.read_bytes()[:12_000])
    done = run(bundle, cache, path)
    assert done.code == 0 and "LOST: flight_" in done.out and "3 frame(s)" in done.out, done.out


def test_a_damaged_message_costs_its_frame_or_answer_only(
    tmp_path: Path, bundle: Path, cache: Path, engine: Engine
) -> None:
    whole, hurt = record(tmp_path, engine), tmp_path / "hurt.mcap"
    with BagWriter(hurt) as bag:
        for topic, kind, log_ns, data in Storage(whole).read(None, []):
            broken = topic == "/cam/image" and log_ns == bags.START + 1
            bag.write_raw(topic, kind, log_ns, data[: 20 if broken else None])
    done = run(bundle, cache, hurt, "--json")
    assert done.code == 0 and done.json["frames"] == 4 and len(done.json["losses"]) == 1
    assert [row["frames"] for row in done.json["tasks"]] == [3, 3, 3]
    assert "/cam/image is left out: cannot decode" in done.json["losses"][0]


def test_frames_that_fail_only_now_fail_the_replay(tmp_path: Path, bundle: Path, cache: Path, engine: Engine) -> None:
    with Recorder(tmp_path) as recorder:
        frame = Frame(np.zeros((4, 4, 2), np.uint8), "8UC2", 1, "", "/cam/image")
        recorder.add(frame, None, "refused: encoding")
        recorder.add(replace(frame, stamp_ns=2), None)
        path = recorder.trigger("x")
    assert path is not None
    done = run(bundle, cache, path, "--json")
    assert done.code == 1 and [(stamp, bool(then), bool(now)) for stamp, then, now in done.json["errors"]] == [
        (1, True, True),
        (2, False, True),
    ]


def test_what_is_no_recording_of_this_bundle_is_refused(
    tmp_path: Path, bundle: Path, cache: Path, engine: Engine
) -> None:
    bags.camera_bag(tmp_path / "in.mcap", FRAMES)
    refused(run(bundle, cache, tmp_path / "in.mcap", "--json"), 2, "not a flight recording", "igate run --bag")
    with BagWriter(tmp_path / "odd.mcap") as bag:
        bag.write(RECORDING, TextMessage('{"outputs": {"/a": 3}, "inputs": {}}'), 1)
    refused(run(bundle, cache, tmp_path / "odd.mcap", "--json"), 2, "facts are damaged")
    with BagWriter(tmp_path / "other.mcap") as bag:
        bag.write(RECORDING, TextMessage('{"outputs": {"/o": ["/i", "lanes"]}, "inputs": {"/i": "/i"}}'), 1)
        bag.write("/i", image_message(FRAMES[0], "rgb8", 1))
        bag.write("/o", image_message(FRAMES[0][..., 0], "mono8", 1))
    refused(run(bundle, cache, tmp_path / "other.mcap", "--json"), 2, "other tasks", "lanes")


def brightness(folder: Path, engine: Engine, level: float, count: int = 8) -> Path:
    """A recording of frames like those of calibration, `level` times as bright."""
    with Recorder(folder) as recorder:
        for k, pixels in enumerate(tinynet.frames(count)):
            seen = np.clip(pixels * level, 0, 255).astype(np.uint8)
            frame = Frame(seen, "rgb8", bags.START + k, "", "/cam/image")
            recorder.add(frame, Result(frame.stamp_ns, "", frame.source, k, seen, engine(seen)))
        path = recorder.trigger("drift")
    assert path is not None and recorder.problems == ()
    return path


def test_drift_of_a_recording_is_shown_by_tensor_worst_first(
    tmp_path: Path, bundle: Path, cache: Path, engine: Engine
) -> None:
    usual, bright = (brightness(tmp_path, engine, level) for level in (1.0, 3.0))
    assert "drift" not in run(bundle, cache, usual, "--json").json
    known = run(bundle, cache, usual, "--drift", "--json").json["drift"]
    assert known["frames"] == 8 and known["score"] < 1 and known["note"] == ""
    assert {"image", "seg", "depth", "tag"} <= set(known["tensors"]) and max(known["tensors"].values()) < 0.01
    done = run(bundle, cache, bright, "--drift", "--json")
    strange = done.json["drift"]
    assert done.code == 0 and done.json["passed"], "the answers are those that were recorded: drift fails no replay"
    assert strange["score"] > 1 and strange["features"]["brightness"] > 1
    shares = list(strange["tensors"].values())
    assert strange["tensors"].keys() == known["tensors"].keys() and shares == sorted(shares, reverse=True)
    # Of the input, reckoned here: what lies half an INT8 step above the largest value of calibration.
    low, high = Bundle.read(bundle).ranges["image"]
    slack = max(abs(low), abs(high)) / 254
    inputs = [to_input(np.clip(p * 3.0, 0, 255).astype(np.uint8), engine.preprocess) for p in tinynet.frames(8)]
    want = np.mean([(one > high + slack) | (one < low - slack) for one in inputs])
    assert strange["tensors"]["image"] == pytest.approx(want) and want > 0.1
    text = run(bundle, cache, bright, "--drift").out
    worst = [name for name, share in strange["tensors"].items() if share >= LEAST_SHARE]
    places = [text.index(f"{name} ", text.index("calibrated INT8 range")) for name in worst[:3]]
    assert "drift score" in text and "1 is the limit: " in text and places == sorted(places)
    assert f"{strange['tensors'][worst[0]]:.2%}" in text and f"{len(worst)} of {len(shares)}" in text
    assert f"none of {len(shares)} tensors has 0.01% of its values outside" in run(bundle, cache, usual, "--drift").out


def test_a_dark_recording_clips_nothing_and_still_is_drift(
    tmp_path: Path, bundle: Path, cache: Path, engine: Engine
) -> None:
    """Dark values lie inside the range: only the score sees them, and few frames give none."""
    found = run(bundle, cache, brightness(tmp_path, engine, 0.1), "--drift", "--json").json["drift"]
    assert found["score"] > 1 and found["tensors"]["image"] == 0
    few = run(bundle, cache, brightness(tmp_path, engine, 0.1, count=3), "--drift")
    assert few.code == 0 and "3 frame(s) are too few for a drift score" in few.out, few.out


def test_drift_looks_at_the_pixels_that_the_pipeline_looked_at(
    tmp_path: Path, bundle: Path, cache: Path, engine: Engine
) -> None:
    """A glaring border that a crop leaves out clips nothing; the whole frame would."""
    with Recorder(tmp_path, about={"fit": "crop"}) as recorder:
        for k, pixels in enumerate(tinynet.frames(4)):
            wide = np.full((16, 32, 3), 255, np.uint8)
            wide[:, 8:24] = pixels
            recorder.add(Frame(wide, "rgb8", bags.START + k, "", "/cam/image"), None)
        path = recorder.trigger("x")
    assert path is not None
    found = run(bundle, cache, path, "--drift", "--json").json["drift"]
    assert found["frames"] == 4 and found["tensors"]["image"] == 0


def test_a_bundle_without_statistics_says_so(tmp_path: Path, bundle: Path, cache: Path, engine: Engine) -> None:
    read = Bundle.read(bundle)
    about = {name: value for name, value in read.manifest.items() if name != "reference"}
    parts: dict[str, Any] = {"ranges": read.ranges, "plain": read.plain, "golden": read.golden}
    write_bundle(tmp_path / "old.igate", about, model=read.model, **parts)
    recording = brightness(tmp_path, engine, 3.0)
    done = run(tmp_path / "old.igate", cache, recording, "--drift", "--json")
    assert done.code == 0 and done.json["drift"]["score"] is None
    assert done.json["drift"]["note"] == "the bundle holds no reference statistics, so a drift score is unknown"
    assert done.json["drift"]["tensors"]["image"] > 0.1, "its INT8 ranges are known all the same"
    assert (
        "note: the bundle holds no reference statistics" in run(tmp_path / "old.igate", cache, recording, "--drift").out
    )


def test_of_a_long_recording_some_frames_are_looked_at(bundle: Path, engine: Engine, tmp_path: Path) -> None:
    path = brightness(tmp_path, engine, 1.0, count=2 * WINDOW + 1)
    assert unlike(engine, Bundle.read(bundle), path, 2 * WINDOW + 1).frames == 22  # each third


def test_frames_that_cannot_be_answered_are_no_drift(tmp_path: Path, bundle: Path, cache: Path, engine: Engine) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.add(Frame(np.zeros((4, 4, 2), np.uint8), "8UC2", 1, "", "/cam/image"), None, "preprocess: encoding")
        path = recorder.trigger("x")
    assert path is not None
    done = run(bundle, cache, path, "--drift", "--json")
    assert done.code == 0 and done.json["drift"]["frames"] == 0 and done.json["drift"]["tensors"] == {}
    text = run(bundle, cache, path, "--drift").out
    assert "0 frame(s) are too few" in text and "tensors" not in text
