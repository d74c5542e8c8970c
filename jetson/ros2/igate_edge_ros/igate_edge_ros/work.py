"""What lives from configure to cleanup: engine, pipeline, monitor, flight recorder and the topics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from igate_edge.contract import OutputSpec
from igate_edge.robotics.messages import Status
from igate_edge.robotics.recorder import Recorder
from igate_edge.runtime.device_state import read_state
from igate_edge.runtime.exporters import diagnostics
from igate_edge.runtime.frame import Frame
from igate_edge.runtime.monitor import LEVELS, Monitor, budget_ms
from igate_edge.runtime.overlay import overlay
from igate_edge.runtime.pipeline import Pipeline
from igate_edge.runtime.supervise import Supervised

from . import qos
from .health import ERROR, OK, WARN
from .outputs import Outputs
from .parameters import LIVE, Settings

#: Frames that an engine answers before it is used: the first ones are slow everywhere.
WARM_UP = 3
#: Seconds that frames inside get to come out before topics fall silent.
DRAIN_S = 2.0
#: Seconds to wait for a time between two frames.
GAP_S = 0.05
#: A frame that is inside for longer than a hanging engine may take by this many seconds hangs elsewhere.
STUCK_S = 5.0


class Work:
    """Opens an engine with `opener`, opens it again when it hangs or raises, and closes it with all the rest.

    manifest: of the bundle, {} where there is none. report: gets the QoS events. say: gets news of the engine.
    """

    def __init__(
        self,
        node: Any,
        opener: Callable[[], Any],
        settings: Settings,
        manifest: Mapping[str, Any],
        report: qos.Report,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self._manifest, self._opener, self._say = settings, manifest, opener, say
        self._selected: list[str] | None = None
        self._build: Any = None
        self._owned: list[Any] = []
        try:
            self.monitor = Monitor(
                self._budget_ms(settings),
                period_ms=1000.0 / settings.fps if settings.fps > 0 else None,
                reference=manifest.get("reference"),
                state=read_state,
            )
            self._engine = engine = Supervised(self._open, hang_s=settings.hang_s, on_change=self._changed)
            self._owned.append(engine)
            image = np.zeros((1, 3, engine.preprocess.height, engine.preprocess.width), np.float32)
            for _ in range(WARM_UP):
                engine.infer(image)
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
                fit=settings.fit,
                max_age_ms=settings.max_age_ms or None,
            )
            self._owned.append(self._pipeline)
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        """False when the engine is lost for good."""
        return self._engine.alive and self._pipeline.stuck_s < self.settings.hang_s + STUCK_S

    @property
    def trouble(self) -> str:
        """What is wrong with the engine now; empty when nothing is."""
        return "" if self._engine.status == "ready" else self._engine.status

    def submit(self, frame: Frame, wanted: Sequence[OutputSpec]) -> None:
        """Hand in a frame that nobody else will write, to be answered for these tasks."""
        names = [spec.name for spec in wanted]
        if names != self._selected:
            self._pipeline.select(names)
            self._selected = names
        self._pipeline.submit(frame, owned=True)

    def drain(self) -> None:
        """Let what is inside come out, while topics are still enabled."""
        self._pipeline.drain(DRAIN_S)

    def quiet(self) -> None:
        """Wait a moment for the time between two frames: what is done then delays none."""
        self._pipeline.drain(GAP_S)

    def apply(self, settings: Settings) -> None:
        """Take over the parameters that may change at run time."""
        self.settings = dataclasses.replace(self.settings, **{name: getattr(settings, name) for name in LIVE})
        self.outputs.overlay, self.outputs.depth_encoding = settings.publish_overlay, settings.depth_encoding
        self.monitor.budget_ms = self._budget_ms(settings)

    def facts(self) -> dict[str, str]:
        """What runs here, as diagnostics show it."""
        facts = {"bundle": self.settings.bundle, "tasks": ", ".join(spec.name for spec in self._engine.tasks)}
        if self._build is not None:
            facts |= {"backend": f"{self._build.backend} {self._build.version}", "precision": self._build.precision}
        return facts | {"engine": self._engine.status, "restarts": str(self._engine.restarts)}

    def statuses(self) -> list[Status]:
        """Frames and their losses, then everything that the monitor says."""
        counts, complaints = self._pipeline.counts, self._pipeline.complaints
        numbers = {name: getattr(counts, name) for name in ("received", "answered", "dropped", "stale")}
        for group in ("refused", "errors", "events"):
            numbers |= {f"{group}/{name}": number for name, number in getattr(counts, group).items()}
        values = {name: str(number) for name, number in numbers.items()}
        values |= {f"last {name}": sentence for name, sentence in complaints.items()}
        said, level = f"{counts.answered} frames answered, {counts.dropped} dropped", OK
        if self.trouble:
            said, level = self.trouble, ERROR
        elif complaints:
            said, level = f"{said}; last complaint: {list(complaints.values())[-1]}", WARN
        rows = [Status(level, "pipeline", said, values)]
        idle = self.outputs.wanted() is None
        for row in diagnostics(self.monitor):
            if idle and row[0] == LEVELS["STALE"]:
                row = (OK, row[1], "nobody listens: nothing is computed", row[3])
            rows.append(Status(*row))
        return rows

    def close(self) -> None:
        """Free the pipeline, the topics and the engine; twice is fine."""
        owned, self._owned = self._owned, []
        for part in reversed(owned):
            part.close()

    def _open(self) -> Any:
        engine = self._opener()
        self._build = getattr(engine, "report", None)
        return engine

    def _changed(self, status: str) -> None:
        # No alarm from here: the frame that failed raises one, once it is in the flight recorder too.
        self._say(f"engine: {status}")

    def _recorder(self, settings: Settings) -> Recorder | None:
        if not settings.record_dir:
            return None
        about = {"bundle": settings.bundle, "created_by": self._manifest.get("created_by", "")}
        about |= {"fit": settings.fit, "at": settings.output_size}  # else a replay looks at the frames in another way
        recorder = Recorder(settings.record_dir, settings.record_seconds, about=about)
        self._owned.append(recorder)
        self.monitor.on_alarm = recorder.trigger
        return recorder

    def _budget_ms(self, settings: Settings) -> float | None:
        """The parameter, else the bundle's budget where it is one of milliseconds."""
        return settings.budget_ms or budget_ms(self._manifest)
