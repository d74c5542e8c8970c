"""What TensorRT says while it builds or loads, kept, and the few sentences in it that name a cause."""

from __future__ import annotations

import re
import threading

#: Most messages that are kept: a builder that tries thousands of tactics may say as much.
KEEP = 400
_SERIOUS = ("INTERNAL_ERROR", "ERROR", "WARNING")
_MEMORY = re.compile(
    r"out ?of ?memory|insufficient memory|memory is insufficient|could not be allocated|unable to allocate"
    r"|requested amount of gpu memory|memory ?allocation|cannot allocate",
    re.IGNORECASE,
)
_NAMED_PLUGIN = re.compile(
    r"(?:could not|cannot) find plugin:?\s*([\w:./-]+)(?:[\s,]+version:?\s*([\w.]+))?", re.IGNORECASE
)
_PLUGIN = re.compile(r"creator.{0,40}not (?:found|registered)|plugin.{0,40}not (?:found|registered)", re.IGNORECASE)
_FOREIGN = re.compile(r"version tag|not compatible with this version|incompatible device|magic tag", re.IGNORECASE)


class Log:
    """Warnings and errors in the order said; called from any of the builder's threads.

    >>> log = Log()
    >>> log("ERROR", "Requested amount of GPU memory (838860800 bytes) could not be allocated.")
    >>> log.memory
    'Requested amount of GPU memory (838860800 bytes) could not be allocated.'
    """

    def __init__(self) -> None:
        self._lock, self._said = threading.Lock(), list[tuple[str, str]]()

    def __call__(self, severity: str, text: str) -> None:
        if severity not in _SERIOUS:
            return
        line = " ".join(text.split())[:400]
        with self._lock:
            if (severity, line) not in self._said[-20:]:
                self._said = [*self._said, (severity, line)][-KEEP:]

    @property
    def lines(self) -> tuple[str, ...]:
        """Everything kept, as "ERROR: text"."""
        with self._lock:
            return tuple(f"{severity}: {line}" for severity, line in self._said)

    @property
    def last(self) -> str:
        """The last errors, or warnings where there was no error; "TensorRT gave no reason" where it was silent."""
        with self._lock:
            errors = [line for severity, line in self._said if severity != "WARNING"]
            said = errors or [line for _, line in self._said]
        return "; ".join(said[-2:]) or "TensorRT gave no reason"

    @property
    def memory(self) -> str:
        """The first sentence that says that memory was short, or ""."""
        return self._first(_MEMORY)

    @property
    def foreign(self) -> str:
        """The sentence that says that a plan is of another version or device, or ""."""
        return self._first(_FOREIGN)

    @property
    def plugin(self) -> str:
        """The missing plugin as "name version NUMBER", or the sentence that says that one is missing, or ""."""
        with self._lock:
            named = [match for _, line in self._said if (match := _NAMED_PLUGIN.search(line))]
        if named:
            return f"{named[0][1]} version {named[0][2] or 'unknown'}"
        return self._first(_PLUGIN)

    def _first(self, pattern: re.Pattern[str]) -> str:
        with self._lock:
            return next((line for _, line in self._said if pattern.search(line)), "")
