"""An engine that raises or hangs is opened again and says so; a signal stops the loop and loses nothing."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from robot import PATIENCE, Echo, check_whole, numbered

from igate_edge.contract import Preprocess
from igate_edge.errors import InputError, UnavailableError
from igate_edge.runtime.frame import Result
from igate_edge.runtime.pipeline import Pipeline
from igate_edge.runtime.supervise import DOWN_S, MAX_LEFT, Supervised, quiet_collector, stop_on_signals

IMAGE = np.full((1, 3, 4, 4), 9 / 255, np.float32)
BACKOFF = (0.001, 0.004)


class Says:
    """Keeps every status; `wait` sleeps until one contains the words."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._changed = threading.Condition()

    def __call__(self, status: str) -> None:
        with self._changed:
            self.all.append(status)
            self._changed.notify_all()

    def wait(self, words: str, times: int = 1) -> None:
        with self._changed:
            found = self._changed.wait_for(lambda: sum(words in status for status in self.all) >= times, PATIENCE)
            assert found, (words, self.all)


class Shop:
    """Opens engines of its list, one after the other; the last kind for ever."""

    def __init__(self, *kinds: Callable[[], Echo]) -> None:
        self.kinds, self.opened = list(kinds), list[Echo]()

    def __call__(self) -> Echo:
        kind = self.kinds.pop(0) if len(self.kinds) > 1 else self.kinds[0]
        self.opened.append(kind())
        return self.opened[-1]


class Weak(Echo):
    def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
        raise RuntimeError("device lost")


class Hung(Echo):
    """Answers nothing until it is let go, and then too late."""

    let_go = threading.Event()

    def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
        assert self.let_go.wait(PATIENCE)
        return super().infer(image)


def cannot_open() -> Echo:
    raise UnavailableError("no such bundle", "gone", "bring it back")


def test_it_answers_as_the_engine_and_passes_wrong_input_on() -> None:
    class Strict(Echo):
        def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
            if image.shape != IMAGE.shape:
                raise InputError("infer takes another image")
            return super().infer(image)

    shop = Shop(Strict)
    with Supervised(shop) as engine:
        assert engine.preprocess == Preprocess(4, 4) and [spec.name for spec in engine.tasks] == ["far", "kind"]
        np.testing.assert_allclose(engine.infer(IMAGE)["far"], np.log(10), rtol=1e-5)
        with pytest.raises(InputError, match="another image"):
            engine.infer(IMAGE[0])
        engine.infer(IMAGE)
        assert engine.status == "ready" and engine.restarts == 0 and len(shop.opened) == 1
    assert engine.status == "closed"
    with pytest.raises(UnavailableError, match="no engine at the moment: closed"):
        engine.infer(IMAGE)


def test_an_engine_that_raises_is_opened_again_with_pauses() -> None:
    shop, says = Shop(Weak, cannot_open, cannot_open, Weak, Echo), Says()
    with Supervised(shop, backoff_s=BACKOFF, on_change=says) as engine:
        for number in (1, 2):
            with pytest.raises(RuntimeError, match="device lost"):
                engine.infer(IMAGE)
            says.wait("ready", number)
        np.testing.assert_allclose(engine.infer(IMAGE)["far"], np.log(10), rtol=1e-5)
        assert engine.restarts == 2 and engine.alive
    assert [status.split(":")[0] for status in says.all] == [
        "opening the engine again",
        "the engine cannot be opened, next try in 0.002 s",
        "the engine cannot be opened, next try in 0.004 s",
        "ready",
        "opening the engine again",
        "ready",
    ]
    assert "RuntimeError: device lost" in says.all[0] and "no such bundle" in says.all[1]
    closed = [engine.closed for engine in shop.opened[:2]]
    assert closed == [True, True], "what failed is closed"


def test_an_engine_that_hangs_is_left_behind_and_its_late_answer_is_no_ones() -> None:
    Hung.let_go.clear()
    shop, says = Shop(Hung, Echo), Says()
    with Supervised(shop, hang_s=0.02, backoff_s=BACKOFF, on_change=says) as engine:
        with pytest.raises(UnavailableError, match="the engine hangs: .* did not answer within 0.02 s"):
            engine.infer(IMAGE)
        says.wait("ready")
        Hung.let_go.set()  # the old answer comes now, while the new engine works
        other = np.full_like(IMAGE, 50 / 255)
        for _ in range(20):
            np.testing.assert_allclose(engine.infer(other)["far"], np.log(51), rtol=1e-5)
        assert engine.restarts == 1


def test_while_there_is_no_engine_the_reason_is_told() -> None:
    shop, says = Shop(Weak, cannot_open), Says()
    with Supervised(shop, backoff_s=(0.001, 30.0), on_change=says) as engine:
        with pytest.raises(RuntimeError):
            engine.infer(IMAGE)
        says.wait("cannot be opened")
        with pytest.raises(
            UnavailableError, match="no engine at the moment: the engine cannot be opened.*bring it back"
        ):
            engine.infer(IMAGE)


def test_after_too_many_hangs_only_a_new_process_helps() -> None:
    Hung.let_go.clear()
    says = Says()
    with Supervised(Shop(Hung), hang_s=0.01, backoff_s=BACKOFF, on_change=says) as engine:
        for number in range(MAX_LEFT):
            assert engine.alive
            with pytest.raises(UnavailableError, match="hangs"):
                engine.infer(IMAGE)
            says.wait("ready", number + 1) if number + 1 < MAX_LEFT else says.wait("given up")
        assert not engine.alive
        Hung.let_go.set()


def test_without_an_engine_for_long_a_watchdog_hears_of_it() -> None:
    now, says = [0.0], Says()
    with Supervised(Shop(Weak, cannot_open), backoff_s=(30.0, 30.0), on_change=says, clock=lambda: now[0]) as engine:
        with pytest.raises(RuntimeError):
            engine.infer(IMAGE)
        assert engine.alive
        now[0] = DOWN_S + 1
        assert not engine.alive


def test_another_bundle_in_the_same_place_is_not_taken() -> None:
    says = Says()
    with Supervised(Shop(Weak, lambda: Echo(Preprocess(8, 8)), Echo), backoff_s=BACKOFF, on_change=says) as engine:
        with pytest.raises(RuntimeError):
            engine.infer(IMAGE)
        says.wait("ready")
        assert "the bundle was replaced" in says.all[1]


def test_the_first_opening_may_fail_and_times_are_checked() -> None:
    with pytest.raises(UnavailableError, match="no such bundle"):
        Supervised(cannot_open)
    with pytest.raises(InputError, match="not times of a supervisor"):
        Supervised(Echo, hang_s=0)


def test_a_pipeline_goes_on_when_its_engine_comes_back() -> None:
    says, seen = Says(), list[Result]()
    with (
        Supervised(Shop(Weak, Echo), backoff_s=BACKOFF, on_change=says) as engine,
        Pipeline(engine, seen.append, mode="every") as pipeline,
    ):
        pipeline.run([numbered(1)])
        says.wait("ready")
        pipeline.run([numbered(2)])
        assert pipeline.counts.errors == {"infer": 1} and pipeline.complaints["infer"] == "RuntimeError: device lost"
    assert [check_whole(result) for result in seen] == [2]


PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:]
from robot import Echo, numbered
from igate_edge.runtime.pipeline import Pipeline
from igate_edge.runtime.sources import Synthetic
from igate_edge.runtime.supervise import stop_on_signals
def sink(result):
    if result.sequence == 5:
        print("running", flush=True)
with Pipeline(Echo(), sink) as pipeline, stop_on_signals(pipeline.stop):
    counts = pipeline.run(Synthetic(16, 12, rate_hz=200))
print("closed", counts.inside, counts.answered >= 6, counts.received - counts.answered - counts.dropped, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_closes(number: signal.Signals) -> None:
    root, tests = Path(__file__).parents[2], Path(__file__).parents[1]
    command = [sys.executable, "-c", PROGRAM, str(tests), str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "running\n"
    process.send_signal(number)
    assert process.communicate(timeout=PATIENCE)[0] == "closed 0 True 0\n"
    assert process.returncode == 0


def test_signal_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    calls: list[int] = []
    with stop_on_signals(lambda: calls.append(1)):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) == before and not calls
    stopped = threading.Event()
    with stop_on_signals(stopped.set):
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before, "a second signal does what it did before"
        assert stopped.wait(PATIENCE)
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with stop_on_signals(stopped.set):
                pass
        except InputError as error:
            errors.append(error)

    thread = threading.Thread(daemon=True, target=elsewhere)
    thread.start()
    thread.join(PATIENCE)
    assert "main thread" in str(errors[0])


def test_the_collector_is_quiet_inside_only() -> None:
    frozen = gc.get_freeze_count()
    with quiet_collector():
        assert not gc.isenabled() and gc.get_freeze_count() > frozen
    assert gc.isenabled() and gc.get_freeze_count() == 0
