"""`igate run --bag` and `igate replay`: bags without ROS, and flight recordings run again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_console import Answer, say
from .errors import InputError
from .reports.tables import Grid, number

if TYPE_CHECKING:
    from .robotics.process import BagRun
    from .robotics.replay import Replay, Unlike

#: Tensors that the terminal shows, and the share of values outside from which on one is worth a line.
MOST_TENSORS, LEAST_SHARE = 12, 1e-4


def run_bag(
    path: Path,
    source: Path | None,
    bag: Path,
    out: Path,
    topics: Sequence[str],
    limit: int | None,
    depth_encoding: str,
    options: tuple[int, str, Path | None, Path | None],
) -> Answer:
    """Answer every frame of a bag and write the results to another bag; the code is 1 when the engine failed on one.

    options: threads, precision, cache folder, calibration frames, as of `igate run` on files.
    """
    from .cli_engine import _calibration
    from .files import make_folder
    from .robotics.bag import BagSource, BagWriter
    from .robotics.process import answer_bag
    from .runtime.engine import Engine

    if source is not None:
        raise InputError("two inputs", f"{source} and --bag {bag}", "give one of them")
    opened = BagSource(bag, topics or None)
    # Not Path.resolve: it raises for a link that points to itself.
    inside, target = Path(os.path.realpath(bag)), Path(os.path.realpath(out))
    if target == inside or inside in target.parents:
        raise InputError("the results would overwrite the input", str(out), "pass another --out")
    threads, precision, cache, frames = options
    ranges = _calibration(frames) if frames is not None else None
    make_folder(out.parent)
    say(f"running {path.name} on {', '.join(opened.topics)}")
    settings: dict[str, Any] = {"threads": threads, "precision": precision, "cache_dir": cache, "calibration": ranges}
    with BagWriter(out) as writer, Engine.open(path, **settings) as engine:
        run = answer_bag(engine, opened, writer, limit=limit, depth_encoding=depth_encoding)
        precision, warnings = engine.report.precision, engine.report.warnings
    document = {"bundle": str(path), "input": str(bag), "out": str(out), "precision": precision, **run.as_json()}
    return Answer({**document, "warnings": warnings}, _run_shown(run, out, precision, warnings), 1 if run.failed else 0)


def _run_shown(run: BagRun, out: Path, precision: str, warnings: Sequence[str]) -> list[Any]:
    facts = run.as_json()
    speed = f"{number(facts['ms_per_frame'])} ms a frame with pre- and postprocessing ({precision})"
    shown: list[Any] = [f"{facts['frames']} frame(s), {speed}"]
    shown += [f"{count} frame(s) of {topic}: {run.topics[topic]}/..." for topic, count in run.frames.items()]
    shown += [f"LOST: {loss}" for loss in run.losses]
    shown += [f"REFUSED: {count} of {reason}" for reason, count in run.refused.items()]
    shown += [f"FAILED: {count} of {reason}" for reason, count in run.failed.items()]
    return [*shown, f"results: {out}", *(f"note: {note}" for note in [*run.notes, *warnings])]


def replay_recording(path: Path, recording: Path, options: dict[str, Any], drift: bool = False) -> Answer:
    """Run a flight recording's frames again; the answer's code is 1 when they are answered in another way.

    drift: say as well how unlike the calibration frames they are, and which tensors leave their INT8 range.
    """
    from .bundle import Bundle
    from .robotics.replay import read_recording, replay, unlike
    from .runtime.engine import Engine

    read_recording(recording, [])  # a wrong file is known before an engine is built
    say(f"replaying {recording.name} with {path.name}")
    strange = None
    with Engine.open(path, **options) as engine:
        bundle = Bundle.read(path)
        found, report = replay(engine, bundle, recording), engine.report
        if drift:
            say("looking at every tensor of the float network")
            strange = unlike(engine, bundle, recording, found.frames)
    document = {"bundle": str(path), "recording": str(recording), "precision": report.precision, **found.as_json()}
    document |= {"drift": strange} if strange is not None else {}
    shown = [*(_drift_shown(strange) if strange is not None else []), *_replay_shown(found)]
    return Answer({**document, "warnings": report.warnings}, shown, 0 if found.passed else 1)


def _drift_shown(strange: Unlike) -> list[Any]:
    shown: list[Any] = [f"note: {strange.note}"] if strange.note else []
    if strange.score is not None:
        parts = ", ".join(f"{name} {number(value)}" for name, value in list(strange.features.items())[:4])
        shown.append(f"drift score {number(strange.score)} over {strange.frames} frame(s), 1 is the limit: {parts}")
    outside = [(name, f"{share:.2%}") for name, share in strange.tensors.items() if share >= LEAST_SHARE]
    if outside:
        title = f"Tensors that leave their calibrated INT8 range: {len(outside)} of {len(strange.tensors)}"
        note = f"the worst {MOST_TENSORS} are shown; all with --json" if len(outside) > MOST_TENSORS else ""
        return [*shown, "", Grid(title, ("tensor", "values outside"), outside[:MOST_TENSORS], 1, note), ""]
    if strange.tensors:
        share = f"{LEAST_SHARE:.2%} of its values"
        shown.append(f"none of {len(strange.tensors)} tensors has {share} outside its calibrated INT8 range")
    return [*shown, ""]


def _replay_shown(found: Replay) -> list[Any]:
    why = found.about.get("reason", "unknown")
    kept = f", {found.kept} of them with their answers" if found.kept < found.frames else ""
    shown: list[Any] = [f"{found.frames} frame(s){kept}, recorded because of: {why}", ""]
    rows = [
        (
            task.task,
            task.measure,
            f"{task.identical} of {task.frames}",
            number(task.worst),
            number(task.limit),
            "yes" if task.passed else "NO",
        )
        for task in found.tasks
    ]
    columns = ("task", "worst frame", "identical", "distance", "limit", "as recorded")
    shown += [Grid("Answers now and then", columns, rows, 2), ""] if rows else []
    for stamp_ns, then, now in found.errors:
        shown.append(f"frame {stamp_ns}: then {then or 'answered'}; now {now or 'answered'}")
    shown += [f"LOST: {loss}" for loss in found.losses] + [f"note: {note}" for note in found.notes]
    if not found.compared:
        return [*shown, "FAILED: nothing was compared, no frame has its answers"]
    word = "PASSED" if found.passed else "FAILED"
    return [*shown, f"{word}: the frames {'are' if found.passed else 'are NOT'} answered as they were recorded"]
