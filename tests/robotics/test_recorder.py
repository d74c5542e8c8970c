"""The flight recorder: the last seconds, bounded in memory and on disk, never in the way of the pipeline."""

from __future__ import annotations

import errno
import os
import re
import threading
from pathlib import Path

import bags
import numpy as np
import pytest

from igate_edge.errors import InputError, UnavailableError
from igate_edge.robotics import recorder as module
from igate_edge.robotics.recorder import Recorder
from igate_edge.robotics.replay import read_recording
from igate_edge.runtime.frame import Frame, Result


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def frame(stamp: int, size: int = 8, source: str = "/cam/image") -> Frame:
    pixels = np.random.default_rng(stamp).integers(0, 255, (size, size, 3), np.uint8)
    return Frame(pixels, "rgb8", stamp, "optical", source, bags.CAMERA, received_ns=stamp)


def result(of: Frame, borrowed: bool = False, **outputs: np.ndarray) -> Result:
    ms = {"infer": 1.25, "age": 2.0}
    return Result(of.stamp_ns, of.frame_id, of.source, 7, of.data, outputs, of.camera, ms, borrowed)


def stamps(path: Path | None) -> list[int]:
    assert path is not None and path.is_file()
    losses: list[str] = []
    return [one.frame.stamp_ns for one in read_recording(path, losses)[1]]


def test_the_last_seconds_are_written_with_answers_timings_and_the_reason(tmp_path: Path) -> None:
    clock = Clock()
    with Recorder(tmp_path, 2.0, about={"bundle": "a.igate"}, clock=clock) as recorder:
        for stamp in range(1, 11):
            clock.now = stamp * 0.5
            one = frame(stamp)
            masks = np.full((8, 8), stamp, np.uint8)
            recorder.add(one, result(one, seg=masks, depth=np.full((8, 8), 0.5, np.float32)))
        clock.now = 5.1
        recorder.add(frame(11), None, "infer: torn")
        path = recorder.trigger("deadline missed 5 times!")
        assert path is not None and path.parent == tmp_path
        assert re.fullmatch(r"flight_0{17}11_deadline-missed-5-times_[0-9a-f]{6}\.mcap", path.name), path.name
        assert recorder.flush(30) and recorder.problems == ()
        about, recorded = read_recording(path, [])
        found = list(recorded)
    assert (about["reason"], about["bundle"], about["left_out"]) == ("deadline missed 5 times!", "a.igate", 0)
    assert [one.frame.stamp_ns for one in found] == [7, 8, 9, 10, 11]
    assert np.array_equal(found[0].frame.data, frame(7).data) and found[0].frame.frame_id == "optical"
    assert found[0].outputs["seg"].dtype == np.uint8 and (found[0].outputs["seg"] == 7).all()
    assert found[0].outputs["depth"].dtype == np.float32 and (found[0].outputs["depth"] == 0.5).all()
    assert found[-1].error == "infer: torn" and found[-1].outputs == {} and found[0].error == ""
    timings = [one for topic, _, one in bags.decoded(path) if topic == "/igate/timings"]
    assert {value.key: value.value for value in timings[0].status[0].values} == {
        "age": "2.000",
        "infer": "1.250",
        "sequence": "7",
    }
    assert [list(one.k) for topic, _, one in bags.decoded(path) if topic == "/cam/camera_info"][0] == list(
        bags.CAMERA.k
    )


def test_an_alarm_that_goes_on_writes_no_frame_twice(tmp_path: Path) -> None:
    clock = Clock()
    with Recorder(tmp_path, 2.0, clock=clock) as recorder:
        assert recorder.trigger("nothing yet") is None
        written = []
        for stamp in range(1, 41):
            clock.now = stamp * 0.25
            recorder.add(frame(stamp), None)
            written.append(recorder.trigger("slow"))
            recorder.flush(30)
    paths = [path for path in written if path]
    recorded = [stamp for path in paths for stamp in stamps(path)]
    assert len(paths) == 5 and recorded == sorted(set(recorded))


def test_memory_is_bounded(tmp_path: Path) -> None:
    with Recorder(tmp_path, 1000.0, ring_mb=0.1, clock=Clock()) as recorder:
        for stamp in range(1, 101):
            recorder.add(frame(stamp, 80), None)  # 19,200 bytes
            assert recorder._held <= 100_000
        path = recorder.trigger("x")
    assert stamps(path) == [96, 97, 98, 99, 100]


def test_where_memory_does_not_suffice_the_oldest_answers_go_before_any_frame(tmp_path: Path) -> None:
    with Recorder(tmp_path, 1000.0, ring_mb=0.25, clock=Clock()) as recorder:
        for stamp in range(1, 11):
            one = frame(stamp, 80)  # 19,200 bytes, and 25,600 of depth
            recorder.add(one, result(one, depth=np.full((80, 80), 2.0, np.float32)))
            assert recorder._held <= 250_000
        path = recorder.trigger("x")
    found = list(read_recording(str(path), [])[1])
    # 10 frames are 192,000 bytes; of the rest two depth images fit.
    assert [one.frame.stamp_ns for one in found] == list(range(1, 11))
    assert [bool(one.outputs) for one in found] == [False] * 8 + [True] * 2
    told = [one.status[0].values for topic, _, one in bags.decoded(Path(str(path))) if topic == "/igate/timings"]
    assert [any("left out" in value.value for value in values) for values in told] == [True] * 8 + [False] * 2


def test_the_disk_limit_holds_and_the_oldest_recording_goes_first(tmp_path: Path) -> None:
    clock = Clock()
    (tmp_path / "mine.mcap").write_bytes(bytes(300_000))
    with Recorder(tmp_path, 1.0, max_mb=0.5, clock=clock) as recorder:
        names = []
        for turn in range(6):
            for k in range(5):
                clock.now += 0.01
                recorder.add(frame(10 * turn + k + 1, 80), None)
            clock.now += 1.0
            path = recorder.trigger(f"turn {turn}")
            assert recorder.flush(30) and path is not None
            os.utime(path, ns=(turn, turn))
            names.append(path.name)
            kept = sorted(file.name for file in tmp_path.glob("flight_*.mcap"))
            assert sum(file.stat().st_size for file in tmp_path.glob("flight_*")) <= 500_000
            assert kept == names[-len(kept) :] and path.name in kept
        assert len(kept) >= 2 and recorder.problems == ()
    assert (tmp_path / "mine.mcap").exists(), "only the recorder's own files are deleted"


def test_a_recording_larger_than_the_disk_limit_keeps_its_newest_frames(tmp_path: Path) -> None:
    with Recorder(tmp_path, 9.0, max_mb=0.2, clock=Clock()) as recorder:
        for stamp in range(1, 21):
            recorder.add(frame(stamp, 80), None)
        path = recorder.trigger("x")
        recorder.flush(30)
        assert "the oldest 15 frame(s) left out" in recorder.problems[0]
    assert stamps(path) == [16, 17, 18, 19, 20] and path is not None and path.stat().st_size <= 200_000


def test_borrowed_arrays_are_copied(tmp_path: Path) -> None:
    one, masks = frame(1), np.ones((8, 8), np.uint8)
    before = one.data.copy()
    with Recorder(tmp_path) as recorder:
        recorder.add(one, result(one, borrowed=True, seg=masks))
        one.data[...], masks[...] = 0, 0
        path = recorder.trigger("x")
    (found,) = read_recording(str(path), [])[1]
    assert np.array_equal(found.frame.data, before) and found.outputs["seg"].all()


def test_a_full_disk_is_a_sentence_and_the_recorder_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, write, full = Clock(), module.write_recording, [True]

    def perhaps(path: Path, *rest: object) -> None:
        if full.pop():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_recording", perhaps)
    with Recorder(tmp_path, 1.0, clock=clock) as recorder:
        recorder.add(frame(1), None)
        first = recorder.trigger("x")
        assert first is not None and recorder.flush(30) and not first.exists()
        assert "was not written" in recorder.problems[0] and "No space left" in recorder.problems[0]
        full.append(False)
        clock.now = 5.0
        recorder.add(frame(2), None)
        assert stamps_after(recorder) == [2]


def stamps_after(recorder: Recorder) -> list[int]:
    path = recorder.trigger("again")
    assert recorder.flush(30)
    return stamps(path)


def test_add_and_trigger_do_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, go, write = Clock(), threading.Event(), module.write_recording

    def slow(*arguments: object) -> None:
        assert go.wait(30)
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_recording", slow)
    with Recorder(tmp_path, 1.0, clock=clock) as recorder:
        recorder.add(frame(1), None)
        path = recorder.trigger("slow disk")
        clock.now = 2.0
        recorder.add(frame(2), None)
        assert recorder.trigger("again") is None, "the first is still being written"
        assert not recorder.flush(0.01) and not list(tmp_path.iterdir())
        go.set()
        assert recorder.flush(30)
        late = recorder.trigger("again")
    assert stamps(path) == [1] and stamps(late) == [2], "close waits for what was triggered"
    assert recorder.trigger("too late") is None


def test_equal_names_get_numbers_and_odd_sources_topics(tmp_path: Path) -> None:
    clock = Clock()
    with Recorder(tmp_path, 1.0, clock=clock) as recorder:
        paths = []
        for source in ("", "cam 1"):
            one = frame(0, source=source)
            recorder.add(one, result(one, **{"a b": one.data[..., 0], "a_b": one.data[..., 1]}))
            clock.now += 2.0
            paths.append(recorder.trigger("///"))
            recorder.flush(30)
    first, second = (path.name for path in paths if path)
    assert first.startswith(f"flight_{0:019d}_trigger_") and second == first.replace(".mcap", "_2.mcap")
    for path, source in zip(paths, ("", "cam 1"), strict=True):
        (found,) = read_recording(str(path), [])[1]
        assert found.frame.source == source
        assert np.array_equal(found.outputs["a b"], one.data[..., 0]) and "a_b" in found.outputs
    assert "/igate/input/cam_1/igate/output/a_b_" in {topic for topic, _, _ in bags.decoded(Path(str(paths[1])))}


def test_two_recorders_in_one_folder_never_take_each_others_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two services, the same stamp, the same reason, at the same moment: each keeps its own frames."""
    both, write = threading.Barrier(2, timeout=30), module.write_recording

    def together(*arguments: object) -> object:
        both.wait()  # neither file is there when the other's name is chosen
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_recording", together)
    with Recorder(tmp_path) as one, Recorder(tmp_path) as other:
        for recorder, source in ((one, "/left/image"), (other, "/right/image")):
            recorder.add(frame(5, source=source), None)
        paths = [one.trigger("deadline"), other.trigger("deadline")]
        assert one.flush(30) and other.flush(30) and one.problems == other.problems == ()
    assert len(set(paths)) == len(list(tmp_path.glob("flight_*.mcap"))) == 2
    sources = [[found.frame.source for found in read_recording(str(path), [])[1]] for path in paths]
    assert sources == [["/left/image"], ["/right/image"]]


def test_many_threads(tmp_path: Path) -> None:
    with Recorder(tmp_path, 60.0) as recorder:
        threads = [
            threading.Thread(target=lambda base=base: [recorder.add(frame(base + k), None) for k in range(50)])
            for base in (1000, 2000, 3000)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        path = recorder.trigger("x")
    found = stamps(path)
    assert len(found) == 150 and sorted(found) == [base + k for base in (1000, 2000, 3000) for k in range(50)]


def test_wrong_limits_and_folders_are_refused(tmp_path: Path) -> None:
    for limits in ({"seconds": 0.0}, {"max_mb": -1.0}, {"ring_mb": float("nan")}):
        with pytest.raises(InputError, match="number above 0"):
            Recorder(tmp_path, **limits)
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="cannot create the folder"):
        Recorder(tmp_path / "file" / "x")
