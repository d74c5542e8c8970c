"""The pipeline: the newest frame wins, results carry their frame's stamp, and what was handed out stays as it is."""

from __future__ import annotations

import dataclasses
import gc
import threading
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinynet
from robot import PATIENCE, Echo, Gated, Notes, check_whole, numbered

from igate_edge import Engine
from igate_edge.contract import OutputSpec, Preprocess
from igate_edge.errors import InputError
from igate_edge.runtime.camera import pinhole
from igate_edge.runtime.frame import Frame, Result
from igate_edge.runtime.pipeline import MAX_SOURCES, Pipeline
from igate_edge.runtime.sources import Push, Synthetic


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinynet.packaged(tmp_path_factory.mktemp("pipeline") / "a.igate")


@pytest.fixture
def engine(path: Path, tmp_path: Path) -> Iterator[Engine]:
    with Engine.open(path, precision="float", cache_dir=tmp_path) as opened:
        yield opened


def test_results_are_the_engines_in_order_with_stamp_and_frame_id(engine: Engine) -> None:
    frames = [
        Frame(pixels, stamp_ns=7 * index, frame_id=f"optical{index}", source="/front")
        for index, pixels in enumerate(tinynet.frames(20, size=(30, 44)))
    ]
    seen: list[Result] = []
    with Pipeline(engine, seen.append, mode="every") as pipeline:
        counts = pipeline.run(frames)
    assert (counts.received, counts.answered, counts.inside, counts.dropped, counts.stale) == (20, 20, 0, 0, 0)
    for index, (frame, result) in enumerate(zip(frames, seen, strict=True)):
        assert (result.stamp_ns, result.frame_id, result.source, result.sequence) == (
            7 * index, f"optical{index}", "/front", index
        )  # fmt: skip
        assert np.array_equal(result.image, frame.data) and not result.borrowed
        want = engine(frame.data)
        assert set(result.outputs) == set(want)
        assert all(np.array_equal(result.outputs[name], want[name]) for name in want)
        assert {"preprocess", "infer", "post/seg", "post/depth", "post/tag", "end_to_end"} <= set(result.ms)


def test_every_kept_output_is_unchanged_after_1000_more_frames(engine: Engine) -> None:
    frames = [Frame(pixels, stamp_ns=index + 1) for index, pixels in enumerate(tinynet.frames(50, size=(20, 24)))]
    kept: list[Result] = []
    times: list[dict[str, float]] = []

    def sink(result: Result) -> None:
        kept.append(result)
        times.append(dict(result.ms))

    with Pipeline(engine, sink, mode="every") as pipeline:
        pipeline.run(frames)
        copies = [
            {name: array.copy() for name, array in {**result.outputs, "image": result.image}.items()} for result in kept
        ]
        first, before_ms = list(kept), list(times)
        kept.clear()
        for _ in range(20):
            pipeline.run(frames)
            kept.clear()
    assert len(first) == 50
    for result, before, ms in zip(first, copies, before_ms, strict=True):
        assert result.ms == ms
        for name, array in {**result.outputs, "image": result.image}.items():
            assert array.flags.writeable and np.array_equal(array, before[name])


def test_overwriting_a_submitted_frame_changes_nothing() -> None:
    """A driver fills its buffer again while the frame waits (cases R6)."""
    engine, seen = Gated(), []
    with Pipeline(engine, seen.append, mode="every") as pipeline:
        buffer = np.full((6, 8, 3), 5, np.uint8)
        assert pipeline.submit(Frame(buffer, stamp_ns=1_005_000_000))
        buffer[...] = 99
        engine.go.release()
        assert pipeline.drain(PATIENCE)
    assert check_whole(seen[0]) == 5


def test_two_engines_on_two_threads(path: Path, tmp_path: Path) -> None:
    answers: list[list[Result]] = [[], []]
    inputs = [tinynet.frames(150, seed=seed) for seed in (1, 2)]

    def work(index: int) -> None:
        precision = ("float", "int8")[index]
        with (
            Engine.open(path, precision=precision, cache_dir=tmp_path) as engine,
            Pipeline(engine, answers[index].append, mode="every") as pipeline,
        ):
            pipeline.run(Frame(pixels, stamp_ns=k + 1) for k, pixels in enumerate(inputs[index]))

    threads = [threading.Thread(daemon=True, target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index, precision in enumerate(("float", "int8")):
        with Engine.open(path, precision=precision, cache_dir=tmp_path) as engine:
            for pixels, result in zip(inputs[index], answers[index], strict=True):
                want = engine(pixels)
                assert all(np.array_equal(result.outputs[name], want[name]) for name in want)


def test_the_newest_frame_wins_and_nothing_piles_up() -> None:
    """A producer faster than the engine (cases R1): whatever is answered next is the newest there was."""
    engine, seen, notes = Gated(), [], Notes()
    with Pipeline(engine, seen.append, monitor=notes, max_age_ms=None) as pipeline:
        pipeline.submit(numbered(1))
        assert engine.entered.acquire(timeout=PATIENCE)  # frame 1 is inside the engine
        for number in range(2, 40):
            assert pipeline.submit(numbered(number))
        notes.wait("dropped", 37)  # all but 1 and the newest
        for answered in (1, 2):
            engine.go.release()
            notes.wait("frame", answered)
        assert pipeline.drain(PATIENCE)
        counts = pipeline.counts
    assert [check_whole(result) for result in seen] == [1, 39]
    assert (counts.received, counts.answered, counts.dropped, counts.inside) == (39, 2, 37, 0)
    assert notes.events["received"] == 39 and notes.events["dropped"] == 37 and len(notes.results) == 2
    final = notes.results[1].ms
    assert final["end_to_end"] >= seen[1].ms["end_to_end"] and "publish" in final


def test_mode_every_waits_instead_of_dropping() -> None:
    engine, seen = Gated(), []
    with Pipeline(engine, seen.append, mode="every") as pipeline:
        feeder = threading.Thread(
            daemon=True, target=lambda: [pipeline.submit(numbered(n)) for n in (3, 1, 2, 2, 9, 8)]
        )
        feeder.start()
        engine.go.release(6)
        feeder.join(PATIENCE)
        assert pipeline.drain(PATIENCE)
    assert [check_whole(result) for result in seen] == [3, 1, 2, 2, 9, 8]  # bags hold anything: none is judged stale
    assert pipeline.counts.answered == 6 and pipeline.counts.dropped == pipeline.counts.stale == 0


def test_borrowed_arrays_hold_still_until_the_sink_returns() -> None:
    passed, done, places, seen = threading.Semaphore(0), threading.Event(), set[int](), list[int]()

    class Door:
        """A recorder that tells when a decoded frame is replaced before the sink could take it."""

        def add(self, frame: Frame, result: Result | None, error: str = "") -> None:
            if error.startswith("dropped before sink"):
                passed.release()

    def sink(result: Result) -> None:
        while passed.acquire(blocking=False):
            pass
        for _ in range(3):  # newer frames are decoded meanwhile
            assert passed.acquire(timeout=PATIENCE)
        number = int(result.image.flat[0])
        assert result.borrowed
        np.testing.assert_allclose(result.outputs["far"], number + 1, rtol=1e-4)
        seen.append(number)
        places.add(result.outputs["far"].ctypes.data)
        if len(seen) == 20:
            done.set()

    with Pipeline(Echo(), sink, recorder=Door(), borrowed=True, max_age_ms=None) as pipeline:
        for index in range(100_000):
            pipeline.submit(dataclasses.replace(numbered(index % 250), stamp_ns=index + 1))
            if done.is_set() or pipeline.counts.errors:
                break
        passed.release(3)  # the sink may wait for frames that do not come any more
        pipeline.close(drain=False)
    assert len(seen) >= 20, pipeline.complaints  # what the sink found torn
    assert len(places) <= 3, "arrays are made once and take turns"


def test_what_was_answered_is_freed_at_once() -> None:
    """Not with the next frame: after the last one of a day its memory would stay taken."""
    freed = [threading.Event(), threading.Event()]

    def sink(result: Result) -> None:
        for array, event in zip((result.image, result.outputs["far"]), freed, strict=True):
            weakref.finalize(array, event.set)

    with Pipeline(Echo(), sink) as pipeline:
        pipeline.submit(numbered(1))
        assert all(event.wait(PATIENCE) for event in freed)


def test_answers_at_the_networks_size_with_its_camera() -> None:
    seen: list[Result] = []
    for at in ("frame", "network"):
        with Pipeline(Echo(Preprocess(4, 4)), seen.append, mode="every", at=at) as pipeline:
            pipeline.run([numbered(9, (8, 16), camera=pinhole(16, 8))])
    large, small = seen
    assert large.outputs["far"].shape == large.outputs["kind"].shape == (8, 16) and large.camera == pinhole(16, 8)
    assert small.outputs["far"].shape == small.image.shape[:2] == (4, 4)
    assert check_whole(large) == check_whole(small) == 9
    assert small.camera is not None and (small.camera.width, small.camera.height) == (4, 4)
    assert small.camera.k == (4.0, 0.0, 1.5, 0.0, 8.0, 1.5, 0.0, 0.0, 1.0)  # fx 16 / 4, fy 16 / 2, still centred


def test_tasks_are_chosen_and_changed_while_it_runs() -> None:
    seen: list[Result] = []
    with Pipeline(Echo(), seen.append, mode="every", tasks=["far"]) as pipeline:
        pipeline.run([numbered(1)])
        pipeline.select(["kind"])
        pipeline.run([numbered(2)])
        pipeline.select([])
        pipeline.run([numbered(3)])
        pipeline.select(None)
        pipeline.run([numbered(4)])
        for wrong in (["smell"], "far"):
            with pytest.raises(InputError, match="unknown task: asked: .*; the engine has far, kind"):
                pipeline.select(wrong)
    assert [sorted(result.outputs) for result in seen] == [["far"], ["kind"], [], ["far", "kind"]]


def test_depth_beyond_its_range_is_nan() -> None:
    seen: list[Result] = []
    with Pipeline(Echo(), seen.append, mode="every", depth_range=(2.5, 100.0)) as pipeline:
        pipeline.run([numbered(1), numbered(50), numbered(200)])
    assert [bool(np.isnan(result.outputs["far"]).all()) for result in seen] == [True, False, True]


def test_wrong_arguments_say_what_is_known() -> None:
    for name, words in (
        ("mode", "latest or every"),
        ("fit", "stretch or letterbox or crop"),
        ("at", "frame or network"),
    ):
        with pytest.raises(InputError, match=f"got 'x'. Fix: use {words}"):
            Pipeline(Echo(), print, **{name: "x"})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not an age"):
        Pipeline(Echo(), print, max_age_ms=0)


@pytest.mark.parametrize("name", ["far", "image"])
def test_a_recorder_gets_everything_and_shares_read_only_arrays(name: str) -> None:
    added: list[tuple[Frame, Result | None, str]] = []

    class Keeper:
        def add(self, frame: Frame, result: Result | None, error: str = "") -> None:
            added.append((frame, result, error))

    def sink(result: Result) -> None:
        if result.sequence == 1:
            {**result.outputs, "image": result.image}[name][...] = 0

    with Pipeline(Echo(), sink, mode="every", recorder=Keeper()) as pipeline:
        counts = pipeline.run([numbered(4), numbered(5)])
    (first, answer, nothing), (second, spoiled, error) = added
    assert answer is not None and check_whole(answer) == 4 and not nothing and "publish" in answer.ms
    assert spoiled is not None and check_whole(spoiled) == 5, "a sink cannot spoil the recording"
    assert "read-only" in error and counts.errors == {"sink": 1}
    assert first.stamp_ns == answer.stamp_ns and first.received_ns > 0 and second.data[0, 0, 0] == 5


def test_memory_does_not_grow_and_no_cycles_are_made() -> None:
    """What the policy in the module's docstring promises: the collector may be off for good."""
    frames = [numbered(number % 250, (24, 32)) for number in range(1, 101)]
    with Pipeline(Echo(), lambda result: None, mode="every") as pipeline:
        for _ in range(2):
            pipeline.run(frames)
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            pipeline.run(frames)
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(8):
                pipeline.run(frames)
            grown = tracemalloc.get_traced_memory()[0] - before
            cycles = gc.collect()
        finally:
            tracemalloc.stop()
            gc.enable()
    assert grown < 20_000, f"{grown} bytes over 800 frames"
    assert cycles < 100, f"{cycles} objects in cycles over 900 frames"


def test_the_synthetic_camera_end_to_end(engine: Engine) -> None:
    seen: list[Result] = []
    source = Synthetic(64, 48, rate_hz=200, frames=40, jitter_ms=1.0, drop_share=0.2, seed=3)
    with Pipeline(engine, seen.append) as pipeline:
        counts = pipeline.run(source)
    assert counts.received == counts.answered + counts.dropped and 20 <= counts.received < 40
    stamps = [result.stamp_ns for result in seen]
    assert stamps == sorted(set(stamps)) and all(result.camera == pinhole(64, 48) for result in seen)
    for result in seen:
        assert np.array_equal(result.image, source.picture((result.stamp_ns - 1_000_000_000) // 5_000_000))
        assert result.ms["age"] >= 0


def test_a_pushed_source_ends_when_it_is_stopped() -> None:
    seen: list[Result] = []
    source, notes = Push(), Notes()
    with Pipeline(Echo(), seen.append, monitor=notes) as pipeline:
        runner = threading.Thread(daemon=True, target=pipeline.run, args=(source,))
        runner.start()
        for number in (1, 2, 3):
            assert source.push(numbered(number))
            notes.wait("frame", number)
        pipeline.stop()
        runner.join(PATIENCE)
        assert not runner.is_alive() and not source.push(numbered(4))
    assert [check_whole(result) for result in seen] == [1, 2, 3]


def test_letterbox_and_crop_look_at_the_same_pixels_they_return() -> None:
    """A net that gives each place its own colour back: the answer must lie on the pixel it was made from."""

    class Place(Echo):
        def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
            return {"far": np.log(image[:, :1] * 255 + 1)}

    engine, seen = Place(Preprocess(16, 16)), []
    engine.tasks = (OutputSpec("far", "depth", 1),)
    slope = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 3, 32, axis=0).repeat(3, axis=2)
    for fit in ("stretch", "letterbox", "crop"):
        with Pipeline(engine, seen.append, mode="every", fit=fit) as pipeline:
            pipeline.run([Frame(slope, stamp_ns=1, camera=pinhole(64, 32))])
    assert [result.image.shape for result in seen] == [(32, 64, 3), (32, 64, 3), (32, 32, 3)]
    for result in seen:
        inner = slice(4, -4)  # at the border the nearest value counts, or the padding shines through
        got, want = result.outputs["far"][inner, inner] - 1, result.image[inner, inner, 0].astype(float)
        assert np.abs(got - want).max() < 12, "off by at most one pixel of the network (12 levels)"
        assert abs((got - want).mean()) < 0.6, "not shifted"
    assert seen[2].camera is not None and seen[2].camera.k[2] == 31.5 - 16


def test_threads_that_submit_take_turns() -> None:
    """Callbacks of one camera on two threads: an older frame never replaces a newer one."""
    seen, notes, go = list[Result](), Notes(), threading.Event()

    class Slow(Notes):
        def count(self, event: str, n: int = 1) -> None:
            notes.count(event, n)
            if event == "size":  # told between the look at the stamp and the hand-over
                assert go.wait(PATIENCE)

    with Pipeline(Echo(), seen.append, monitor=Slow(), max_age_ms=None) as pipeline:
        pipeline.submit(numbered(1))
        assert pipeline.drain(PATIENCE)
        older, newer = numbered(2, (8, 10)), numbered(3, (8, 10))
        threads = [threading.Thread(daemon=True, target=pipeline.submit, args=(frame,)) for frame in (older, newer)]
        threads[0].start()
        notes.wait("size")
        threads[1].start()
        notes.wait("received", 3)
        threads[1].join(0.1)
        go.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert pipeline.drain(PATIENCE)
        assert pipeline.counts.inside == 0 and not pipeline.counts.errors
    assert [check_whole(result) for result in seen] in ([1, 2, 3], [1, 3])


def test_the_newest_stamps_of_few_cameras_are_kept() -> None:
    with Pipeline(Echo(), lambda result: None) as pipeline:
        for name in ("first", *map(str, range(MAX_SOURCES))):
            assert pipeline.submit(dataclasses.replace(numbered(1), stamp_ns=7, source=name))
            assert pipeline.drain(PATIENCE)
        assert len(pipeline._newest) == len(pipeline._kinds) == MAX_SOURCES and "first" not in pipeline._newest
        assert not pipeline.submit(dataclasses.replace(numbered(2), stamp_ns=6, source=str(MAX_SOURCES - 1)))
