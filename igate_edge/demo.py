"""The whole product on one bundle: inspect, build, verify, time, run on frames, draw, report."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from .cli_console import Answer, say
from .errors import InputError
from .reports.grids import COST_TITLE
from .reports.tables import Grid

#: Few rounds keep the demo short; `igate bench` takes more.
ROUNDS = 24


def run_demo(bundle_path: Path, out: Path) -> Answer:
    """Everything a newcomer wants to see, in under a minute; pictures, arrays and the report go to `out`."""
    from .bench import bench
    from .builder import build
    from .bundle import Bundle
    from .cli_engine import bench_shown, build_shown, verify_shown
    from .cli_frames import depth_limits, write_frame
    from .cli_inspect import inspect_file
    from .files import make_folder
    from .frames import pillow
    from .reports.report import Evidence, golden_shown, predicted, write_report
    from .verify import verify

    pillow()
    if not bundle_path.exists():
        fix = "run this in a checkout of the repository, or pass --bundle NAME.igate"
        raise InputError("the example bundle is not here", str(bundle_path), fix)
    start = time.perf_counter()
    make_folder(out)
    cache = out / "cache"
    say(f"1/6 inspect {bundle_path}")
    looked = inspect_file(bundle_path)
    bundle = Bundle.read(bundle_path)
    say("2/6 build: prune, quantise, check, time INT8 against float on this machine")
    built = build(bundle_path, cache_dir=cache)
    say("3/6 verify: every byte, and the golden frames of every task in float and INT8")
    checked = verify(bundle_path)
    say(f"4/6 time against the plain net and separate nets, {ROUNDS} interleaved rounds")
    timed = bench(bundle_path, ROUNDS)
    say("5/6 run on the golden frames and draw")
    frames = golden_shown(bundle_path, bundle, built.precision, cache)
    limits = depth_limits(bundle.tasks, {s.name: [f.engine_out[s.name] for f in frames] for s in bundle.tasks})
    for number, frame in enumerate(frames):
        write_frame(out, f"frame{number}", frame.frame, bundle.tasks, frame.engine_out, limits)
    say("6/6 report")
    about_bundle = bundle_path.name, bundle_path.stat().st_size, bundle
    evidence = Evidence(*about_bundle, built, checked, timed, frames, predicted(bundle))
    written = write_report(evidence, out / "report.html")
    seconds = time.perf_counter() - start
    # Cost and golden tables come once: with times, and from the verification.
    about = [item for item in looked.shown if not (isinstance(item, Grid) and item.title == COST_TITLE)]
    built_lines = [item for item in build_shown(built) if isinstance(item, str) and item]
    shown: list[Any] = [*about, "", *built_lines, "", *verify_shown(checked), "", *bench_shown(timed)]
    shown += ["", written.headline, f"done in {seconds:.0f} s; look at:"]
    shown += [f"  {written.path}   (open it in a browser)", f"  {out}/frame0.png ... frame{len(frames) - 1}.png"]
    document = {
        "seconds": seconds,
        "headline": written.headline,
        "report": str(written.path),
        "inspect": looked.document,
        "build": built.as_json(),
        "verify": checked.as_json(),
        "bench": dataclasses.asdict(timed),
    }
    return Answer(document, shown, 0 if checked.passed else 1)
