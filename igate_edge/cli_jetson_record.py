"""`igate jetson record`: time a bundle's engine as a robot calls it, and keep all that the times depend on."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .cli_console import Answer
from .errors import InputError
from .files import as_path, read_file, write_atomic
from .plaindata import plain_json
from .reports.tables import Grid, number
from .runtime.device_record import EngineFacts, Record, parse, provisional, require_comparable, summary, take


def record_bundle(
    path: Path,
    backend: str = "auto",
    frames: int = 300,
    rate: float | None = 30.0,
    budget_ms: float | None = None,
    out: Path | None = None,
    against: Path | None = None,
    force: bool = False,
    cache: Path | None = None,
) -> Answer:
    """Whole frames, from uint8 RGB to decoded answers, at a camera's pace; code 1 when p99 is over the budget.

    rate: frames a second, None for back to back. against: an earlier record; InputError when it is not comparable.
    """
    from .builder import Options, open_engine
    from .runtime.cache import fingerprint
    from .runtime.engine import Engine

    earlier = None if against is None else _read(against)
    bundle, session, report = open_engine(path, Options(backend, cache_dir=cache))
    size = bundle.preprocess
    frame = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), np.uint8)
    with Engine(bundle, session, report) as engine:
        made = take(
            lambda: engine(frame),
            _engine(bundle, session, report),
            machine=fingerprint(),
            versions=_versions(),
            frames=frames,
            period_ms=None if rate is None else 1e3 / rate,
            budget_ms=budget_ms,
        )
    document = made.as_json()
    if out is not None:
        write_atomic(out, json.dumps(document, indent=2) + "\n")
    answer = _shown(made, document, out)
    return answer if earlier is None else _compared(answer, made, earlier, force)


def _engine(bundle: Any, session: Any, report: Any) -> EngineFacts:
    """What the build and the session say of themselves; a backend that says nothing leaves None."""
    facts = getattr(session, "facts", {})
    size, engine = bundle.preprocess, Path(report.path) if report.path else None
    digest = hashlib.sha256(engine.read_bytes()).hexdigest() if engine and engine.is_file() else report.key
    graph, streams = facts.get("graph"), facts.get("aux_streams")
    return EngineFacts(
        sha256=digest,
        backend=report.backend,
        version=report.version,
        precision=report.precision,
        tasks=tuple(report.tasks),
        input=(1, 3, size.height, size.width),
        flags={"threads": report.threads, "form": report.form, "bundle": report.seal},
        calibration=(bundle.manifest.get("calibration") or {}).get("sha256"),
        memory=facts.get("memory"),
        graph=graph if isinstance(graph, bool) else None,
        aux_streams=streams if isinstance(streams, int) else None,
    )


def _versions() -> dict[str, str | None]:
    from .runtime.device_software import read_software, this_interpreter

    software, python = read_software(), this_interpreter()
    return {
        "igate_edge": __version__,
        "git": _commit(),
        "python": python.python,
        "tensorrt": python.packages.get("tensorrt"),
        "cuda": software.cuda,
        "driver": software.driver,
        "driver_cuda": python.driver_cuda,
    }


def _commit() -> str | None:
    """The commit of a checkout that is run from; None for an installed package."""
    home = Path(__file__).resolve().parent.parent
    if not (home / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", home, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _read(path: Path) -> Record:
    try:
        return parse(read_file(as_path(path)))
    except OSError as error:
        evidence = f"{path}: {error.strerror or error}"
        raise InputError("cannot read the earlier record", evidence, "pass a file of --out") from error


def verdict(record: Record) -> tuple[str, bool]:
    """One line of what was found, and whether the budget holds (True without one)."""
    found, mode = summary(record), record.after.power_mode
    place = f" at {mode.name}" if mode else ""
    place += {True: ", clocks locked", False: ", clocks not locked", None: ""}[record.after.locked]
    if record.budget_ms is None:
        return f"p99 {number(found['p99'])} ms{place}", True
    held = found["p99"] <= record.budget_ms
    sign, room = ("<=" if held else ">"), 1 - found["p99"] / record.budget_ms
    headroom = f" (headroom {room:.0%})" if held else ""
    line = f"{'PASS' if held else 'FAIL'} p99 {number(found['p99'])} ms {sign} {number(record.budget_ms)} ms"
    return line + headroom + place, held


def _shown(record: Record, document: dict[str, Any], out: Path | None) -> Answer:
    found, (line, held) = summary(record), verdict(record)
    pace = "back to back" if record.period_ms is None else f"one every {number(record.period_ms)} ms"
    names = ("p50", "p90", "p99", "p99.9", "max", "jitter")
    table = Grid("", names, [[number(found[name]) for name in names]], 0)
    energy = "" if found["energy_mj"] is None else f", {number(found['energy_mj'])} mJ a frame"
    said = f"{found['frames']} frames, {pace}, {record.engine.backend} {record.engine.precision}{energy}; in ms:"
    notes = [f"provisional: {reason}" for reason in provisional(record)]
    written = [f"record: {out}"] if out else []
    return Answer(document, [said, table, *notes, *written, line], 0 if held else 1)


def _compared(answer: Answer, made: Record, earlier: Record, force: bool) -> Answer:
    found = require_comparable(made, earlier, force)
    ratio = summary(made)["p50"] / summary(earlier)["p50"]
    line = f"p50 is {ratio:.2f} times that of {earlier.taken}"
    notes = [f"not comparable: {difference}" for difference in found]
    compared = {"against": earlier.taken, "p50_ratio": ratio, "differences": found}
    return Answer(plain_json({**answer.document, "compared": compared}), [*answer.shown, *notes, line], answer.code)
