"""What the sessions of all engines have in common."""

from __future__ import annotations

from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from ..errors import InputError

Own = TypeVar("Own", bound="Closing")


class Closing:
    """Something to be closed, as a context manager: `with` closes it, whatever happened inside."""

    def close(self) -> None:
        """Free what is held; closing twice is fine."""

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def closed() -> InputError:
    """What a session says that is run after its `close`."""
    return InputError("the engine is closed", "run was called after close", "open it again")


def check_image(image: Any, shape: tuple[int, ...], dtype: Any = "float32") -> None:
    """Raise InputError unless a preprocessed image is an array of the engine's shape and type."""
    if not isinstance(image, np.ndarray) or image.dtype != dtype or image.shape != shape:
        seen = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        fix = "preprocess the frame with runtime.preprocess.to_input"
        raise InputError("the image does not fit the engine", f"{dtype} {shape} expected, {seen} given", fix)
