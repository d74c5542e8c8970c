"""From a camera to masks, depth and normals: five lines, and the same as a service that looks after itself.

    python examples/robot_loop.py [BUNDLE.igate] [--frames N] [--service]

The camera is a made-up one that needs no hardware, with jitter and lost frames. Put another source in its place:
`Folder("images")`, `Video("drive.mp4")`, `Video(**sources_gstreamer.v4l2("/dev/video0"))`, or on a Jetson
`Capture(sources_gstreamer.csi(0, 1280, 720))`. Ctrl-C or SIGTERM answers what is inside and ends.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from igate_edge import Engine
from igate_edge.runtime.frame import Result
from igate_edge.runtime.monitor import Monitor
from igate_edge.runtime.pipeline import Counts, Pipeline
from igate_edge.runtime.sources import Synthetic
from igate_edge.runtime.supervise import Supervised, quiet_collector, stop_on_signals
from igate_edge.runtime.watchdog import Watchdog

EXAMPLE = Path(__file__).resolve().parent / "tabletop.igate"


def show(result: Result) -> None:
    """What a robot does with an answer; here a line a second. The arrays are ours to keep and to change."""
    if result.sequence % 30 == 0:
        classes = np.bincount(result.outputs["semseg"].ravel()).argmax()
        metres = np.nanmedian(result.outputs["depth"])
        seconds = result.stamp_ns / 1e9
        print(f"{seconds:.2f} s: mostly class {classes}, {metres:.2f} m away; inference {result.ms['infer']:.1f} ms")


def main(bundle: Path, camera: Synthetic) -> Counts:
    """All that is needed."""
    with Engine.open(bundle) as engine, Pipeline(engine, show) as pipeline, stop_on_signals(pipeline.stop):
        return pipeline.run(camera)


def service(bundle: Path, camera: Synthetic) -> Counts:
    """The same for weeks: timed, opened again when it hangs or raises, watched by systemd, without collector pauses."""
    monitor = Monitor(budget_ms=33.0, period_ms=33.3)
    with (
        Supervised(lambda: Engine.open(bundle), hang_s=2.0, on_change=print) as engine,
        Pipeline(engine, show, monitor=monitor, depth_range=(0.2, 20.0)) as pipeline,
        Watchdog(lambda: engine.alive and pipeline.stuck_s < 5, lambda: monitor.verdict().sentence),
        stop_on_signals(pipeline.stop),
        quiet_collector(),
    ):
        counts = pipeline.run(camera)
        print(monitor.verdict())
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--service", action="store_true")
    given = parser.parse_args()
    run = service if given.service else main
    print(run(given.bundle, Synthetic(640, 480, frames=given.frames, jitter_ms=3, drop_share=0.05)))
