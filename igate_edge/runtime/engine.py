"""The engine that answers frames: opened from a bundle, checked on its golden frames, then one call a frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import Bundle
from ..contract import OutputSpec, Preprocess
from ..engines.session import Closing
from ..errors import CheckFailed, InputError
from .postprocess import decode
from .preprocess import check_frame, to_input

if TYPE_CHECKING:
    from ..builder_parts import Session
    from ..buildreport import BuildReport


class Engine(Closing):
    """All tasks of a bundle in one call a frame. Threads may share an engine; every result is an array of its own.

    Make one with `Engine.open` and close it, or use it in a `with` block. `report` says what was built and why.
    """

    def __init__(self, bundle: Bundle, session: Session, report: BuildReport) -> None:
        self.report = report
        self.preprocess: Preprocess = bundle.preprocess
        self.tasks: tuple[OutputSpec, ...] = tuple(spec for spec in bundle.tasks if spec.name in report.tasks)
        self._session: Session | None = session

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        backend: str = "onnxruntime",
        *,
        threads: int = 1,
        precision: str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        calibration: Sequence[np.ndarray] | None = None,
        tasks: Sequence[str] | None = None,
        **more: Any,
    ) -> Engine:
        """Read the bundle at `path`, build its engine or load it from the cache, and run the golden check.

        backend: "onnxruntime", "tensorrt", "auto" (TensorRT where it is usable, else ONNX Runtime; `report` says which
        and why) or "emulate"; one that is named is never replaced by another. Where a new engine does not pass, the one
        built before for the same network is opened: `report.rolled_back` says why. calibration: uint8 RGB frames that
        replace the bundle's INT8 ranges; with the frames that `build` was given, its engine is found. tasks: names to
        answer (None = all); what only other tasks need is not computed. more: batch, max_ms, seconds, workspace_mb,
        plugins of TensorRT, see `builder.Options`. Raises BundleError, InputError, DataError, UnavailableError, or
        CheckFailed when the engine does not compute what was packaged.
        """
        from ..builder import Options, open_engine

        options = Options(backend, threads, precision, cache_dir, calibration, tasks, **more)
        return cls(*open_engine(path, options, rollback=True))

    def __call__(self, frame: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 RGB frame [H,W,3] of any size -> task name -> decoded array at the frame's size (see decode)."""
        size = check_frame(frame).shape[:2]
        raw = self.infer(to_input(frame, self.preprocess))
        return {spec.name: decode(spec, raw[spec.name], size) for spec in self.tasks}

    def infer(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Preprocessed image float32 [1,3,height,width] -> raw outputs per task, float32 (see contract.OutputSpec).

        An engine built for a batch takes up to that many rows. Raises InputError for another image, CheckFailed when a
        task's output is missing or holds NaN or infinity.
        """
        session, want = self._session, (1, 3, self.preprocess.height, self.preprocess.width)
        if self.report.batch > 1 and isinstance(image, np.ndarray) and 1 < len(image) <= self.report.batch:
            want = (len(image), *want[1:])
        if session is None:
            raise InputError("the engine is closed", "a frame came after close()", "call it inside the with block")
        if not isinstance(image, np.ndarray) or image.dtype != np.float32 or image.shape != want:
            got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
            raise InputError(f"infer takes float32 {list(want)}", f"got {got}", "call engine(frame) with a uint8 frame")
        outputs = {name: np.array(array, np.float32) for name, array in session.run(image).items()}
        bad = [spec.name for spec in self.tasks if not np.isfinite(outputs.get(spec.name, np.nan)).all()]
        if bad:
            fix = "run `igate verify`; if it passes, look at what this frame has in it"
            raise CheckFailed("the engine gave no usable answer", f"missing or not finite: {', '.join(bad)}", fix)
        return outputs

    def close(self) -> None:
        """Release the session; calls that are still running finish. Closing twice is fine."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
