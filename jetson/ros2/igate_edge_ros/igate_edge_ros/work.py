"""What lives from configure to cleanup: engine, pipeline, monitor, flight recorder and the topics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from igate_edge.robotics.messages import Status
from igate_edge.robotics.recorder import Recorder
from igate_edge.runtime.device import read_state
from igate_edge.runtime.exporters import diagnostics
from igate_edge.runtime.frame import Frame
from igate_edge.runtime.monitor import Monitor
from igate_edge.runtime.overlay import overlay
from igate_edge.runtime.pipeline import Pipeline

from . import qos
from .health import ERROR, OK, WARN
from .outputs import Outputs
from .parameters import Settings

#: Frames that an engine answers before it is used: the first ones are slow everywhere.
WARM_UP = 3
#: Seconds that frames inside get to come out before topics fall silent.
DRAIN_S = 2.0


class Work:
    """Owns `engine` from now on, and closes it even when making the rest fails.

    manifest: of the bundle, {} where there is none. report: gets the QoS events.
    """

    def __init__(
        self, node: Any, engine: Any, settings: Settings, manifest: Mapping[str, Any], report: qos.Report
    ) -> None:
        self.settings, self._manifest, self._engine = settings, manifest, engine
        self._selected: list[str] | None = None
        self._owned: list[Any] = [engine]
        try:
            size = engine.preprocess
            for _ in range(WARM_UP):
                engine.infer(np.zeros((1, 3, size.height, size.width), np.float32))
            self.monitor = Monitor(
                self._budget_ms(settings),
                period_ms=1000.0 / settings.fps if settings.fps > 0 else None,
                reference=manifest.get("reference"),
                state=read_state,
            )
            recorder = self._recorder(settings)
            self.outputs = Outputs(node, engine.tasks, settings, report, overlay)
            self._owned.append(self.outputs)
            self._pipeline = Pipeline(
                engine,
                self.outputs.publish,
                mode=settings.drop_policy,
                monitor=self.monitor,
                recorder=recorder,
                borrowed=recorder is None,
                at=settings.output_size,
            )
            self._owned.append(self._pipeline)
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Topics are enabled: publish what is latched."""
        self.outputs.latch()

    def submit(self, frame: Frame) -> None:
        """Hand in a frame that nobody else will write; only what somebody listens to is computed."""
        wanted = [spec.name for spec in self.outputs.wanted()]
        if wanted != self._selected:
            self._pipeline.select(wanted)
            self._selected = wanted
        self._pipeline.submit(frame, owned=True)

    def end(self) -> None:
        """Let what is inside come out, while topics are still enabled."""
        self._pipeline.drain(DRAIN_S)

    def apply(self, settings: Settings) -> None:
        """Take over the parameters that may change at run time."""
        self.settings = dataclasses.replace(
            self.settings, **{name: getattr(settings, name) for name in ("budget_ms", "diag_period")}
        )
        self.outputs.overlay, self.outputs.depth_encoding = settings.publish_overlay, settings.depth_encoding
        self.monitor.budget_ms = self._budget_ms(settings)

    def facts(self) -> dict[str, str]:
        """What runs here, as diagnostics show it."""
        report = getattr(self._engine, "report", None)
        facts = {"bundle": self.settings.bundle, "tasks": ", ".join(spec.name for spec in self._engine.tasks)}
        if report is not None:
            facts |= {"backend": f"{report.backend} {report.version}", "precision": report.precision}
        return facts

    def statuses(self) -> list[Status]:
        """Frames and their losses, then everything that the monitor says."""
        counts, complaints = self._pipeline.counts, self._pipeline.complaints
        values = {"received": counts.received, "answered": counts.answered, "dropped": counts.dropped}
        values["stale"] = counts.stale
        for group in ("refused", "errors", "events"):
            values |= {f"{group}/{name}": number for name, number in getattr(counts, group).items()}
        shown = {name: str(number) for name, number in values.items()} | complaints
        said = f"{counts.answered} frames answered, {counts.dropped} dropped"
        level = ERROR if self._pipeline.stuck_s > DRAIN_S else WARN if counts.errors else OK
        if level == ERROR:
            said = f"a frame has been inside for {self._pipeline.stuck_s:.1f} s"
        elif complaints:
            said += f"; last complaint: {list(complaints.values())[-1]}"
        rows = [Status(level, "frames", said, shown)]
        return rows + [Status(*row) for row in diagnostics(self.monitor)]

    def close(self) -> None:
        """Free the pipeline, the topics and the engine; twice is fine."""
        owned, self._owned = self._owned, []
        for part in reversed(owned):
            part.close()

    def _recorder(self, settings: Settings) -> Recorder | None:
        if not settings.record_dir:
            return None
        about = {"bundle": settings.bundle, "created_by": self._manifest.get("created_by", "")}
        recorder = Recorder(settings.record_dir, settings.record_seconds, about=about)
        self._owned.append(recorder)
        self.monitor.on_alarm = recorder.trigger
        return recorder

    def _budget_ms(self, settings: Settings) -> float | None:
        """The parameter, else the bundle's budget where it is one of milliseconds."""
        own = (self._manifest.get("budget") or {}).get("ms")
        return settings.budget_ms or (float(own) if isinstance(own, int | float) and own > 0 else None)
