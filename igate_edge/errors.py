"""Errors: one class per decision a user must take. Each says cause, evidence and fix, in that order."""

from __future__ import annotations


class IgateError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns.

    >>> str(InputError("not a bundle", "scene.igate starts with b'PK??'", "pass a file written by `igate export`"))
    "not a bundle: scene.igate starts with b'PK??'. Fix: pass a file written by `igate export`."
    """

    exit_code = 2

    def __init__(self, cause: str, evidence: str = "", fix: str = "") -> None:
        self.cause, self.evidence, self.fix = cause.rstrip("."), evidence.rstrip("."), fix.rstrip(".")
        text = f"{self.cause}: {self.evidence}" if self.evidence else self.cause
        super().__init__(f"{text}. Fix: {self.fix}." if self.fix else f"{text}.")

    def as_json(self) -> dict[str, str]:
        """The same sentence in parts, for `--json`."""
        return {"error": type(self).__name__, "cause": self.cause, "evidence": self.evidence, "fix": self.fix}


class InputError(IgateError):
    """Wrong use: an argument, a frame or a file that cannot be taken (exit code 2)."""


class BundleError(InputError):
    """A file that is not a bundle, was altered, or is of a newer schema."""


class DataError(InputError):
    """A data folder, a label or a frame that cannot be trained or calibrated on."""


class ConvertError(InputError):
    """A backbone that cannot be traced, gated or exported."""


class GraphError(InputError):
    """An ONNX file that the compiler cannot take."""


class BudgetError(InputError):
    """A budget that cannot be met with the network's gates."""


class CheckFailed(IgateError):
    """A check that ran and did not pass: budget, golden vectors, lint (exit code 1)."""

    exit_code = 1


class UnavailableError(IgateError):
    """The environment cannot do it: a missing extra, no permission, a full disk, no such backend (exit code 3)."""

    exit_code = 3


class DefectError(IgateError):
    """igate_edge itself failed in a way nobody foresaw (exit code 70, as sysexits.h has it for such)."""

    exit_code = 70
