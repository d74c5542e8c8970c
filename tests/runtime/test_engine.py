"""The engine: decoded answers at the frame's size, safe to share between threads, and without torch."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tinynet

from igate_edge import Engine
from igate_edge.bundle import Bundle
from igate_edge.errors import CheckFailed, InputError
from igate_edge.package import package
from igate_edge.runtime.postprocess import decode
from igate_edge.runtime.preprocess import to_input

FRAMES = tinynet.frames(8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "a.igate"
    package(tinynet.gated_onnx(), path, calibration=FRAMES, golden=FRAMES[:4])
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_answers_are_the_packaged_ones_decoded(path: Path, cache: Path) -> None:
    bundle = Bundle.read(path)
    with Engine.open(path, precision="float", cache_dir=cache) as engine:
        assert engine.tasks == tinynet.TASKS and engine.preprocess == tinynet.PREPROCESS
        for index, frame in enumerate(bundle.golden["frame"]):
            out = engine(frame)
            for spec in bundle.tasks:
                want = decode(spec, bundle.golden[f"float/{spec.name}"][index], (tinynet.SIZE, tinynet.SIZE))
                np.testing.assert_allclose(out[spec.name], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_answers_have_the_frame_size_and_are_owned(path: Path, cache: Path, precision: str) -> None:
    frame = tinynet.frames(1, size=(30, 44))[0]
    with Engine.open(path, precision=precision, cache_dir=cache) as engine:
        first = engine(frame)
        assert {name: (array.shape, array.dtype.name) for name, array in first.items()} == {
            "seg": ((30, 44), "uint8"),
            "depth": ((30, 44), "float32"),
            "tag": ((4,), "float32"),
        }
        kept = {name: array.copy() for name, array in first.items()}
        for array in first.values():
            array[...] = 0
        second = engine(frame)
        raw = engine.infer(to_input(frame, engine.preprocess))
    assert all(np.array_equal(second[name], kept[name]) for name in kept)
    assert raw["seg"].shape == (1, 3, tinynet.SIZE // 2, tinynet.SIZE // 2)
    raw["seg"][...] = 0


def test_overwriting_the_frame_after_the_call_changes_nothing(path: Path, cache: Path) -> None:
    frame = FRAMES[5].copy()
    with Engine.open(path, precision="int8", cache_dir=cache) as engine:
        out = engine(frame)
        frame[...] = 0
        again = engine(FRAMES[5])
    assert all(np.array_equal(out[name], again[name]) for name in out)


def test_eight_threads_get_the_serial_answers(path: Path, cache: Path) -> None:
    frames = tinynet.frames(64, seed=3)
    with Engine.open(path, precision="int8", cache_dir=cache) as engine:
        serial = [engine(frame) for frame in frames]
        with ThreadPoolExecutor(8) as pool:
            parallel = list(pool.map(engine, frames))
    for one, other in zip(serial, parallel, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_subset_of_tasks_gives_the_same_answers_for_less(path: Path, cache: Path) -> None:
    with (
        Engine.open(path, precision="float", cache_dir=cache) as whole,
        Engine.open(path, precision="float", cache_dir=cache, tasks=["depth"]) as part,
    ):
        out = part(FRAMES[6])
        assert list(out) == ["depth"]
        np.testing.assert_allclose(out["depth"], whole(FRAMES[6])["depth"], rtol=1e-5)
        assert part.report.cost["ours"]["macs"] < whole.report.cost["ours"]["macs"]
        assert {item["task"] for item in part.report.golden} == {"depth"}
    for wrong, words in ((["smell"], "unknown task"), ([], "no task asked for")):
        with pytest.raises(InputError, match=words):
            Engine.open(path, cache_dir=cache, tasks=wrong)


def test_a_closed_engine_says_so(path: Path, cache: Path) -> None:
    engine = Engine.open(path, precision="float", cache_dir=cache)
    engine.close()
    engine.close()
    with pytest.raises(InputError, match="the engine is closed"):
        engine(FRAMES[0])


def test_wrong_input_is_refused(path: Path, cache: Path) -> None:
    with Engine.open(path, precision="float", cache_dir=cache) as engine:
        with pytest.raises(InputError, match="must be uint8"):
            engine(FRAMES[0].astype(np.float32))
        for wrong in (FRAMES[0], np.zeros((1, 3, 8, 8), np.float32), np.zeros((1, 3, 16, 16)), None):
            with pytest.raises(InputError, match=r"infer takes float32 \[1, 3, 16, 16\]"):
                engine.infer(wrong)  # type: ignore[arg-type]


def test_the_second_open_comes_from_the_cache(path: Path, tmp_path: Path) -> None:
    for cached in (False, True):
        with Engine.open(path, cache_dir=tmp_path) as engine:
            assert engine.report.cached is cached


def test_it_runs_without_torch(path: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np; from igate_edge import Engine\n"
        "with Engine.open(sys.argv[1], cache_dir=sys.argv[2]) as engine:\n"
        "    print(sorted(engine(np.zeros((9, 9, 3), np.uint8))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "['depth', 'seg', 'tag']", done.stderr


def test_an_answer_that_is_missing_or_not_finite_is_an_error(
    path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.open(path, precision="float", cache_dir=cache) as engine:
        good = engine.infer(to_input(FRAMES[0], engine.preprocess))
        spoiled = {**good, "depth": good["depth"] * np.float32(np.nan)}
        missing = {name: array for name, array in good.items() if name != "depth"}
        for answer in (spoiled, missing):
            monkeypatch.setattr(engine._session, "run", lambda image, answer=answer: answer)
            with pytest.raises(CheckFailed, match="missing or not finite: depth"):
                engine(FRAMES[0])
