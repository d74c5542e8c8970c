"""Run the command `igate` inside a test, as its entry point does, and judge how it refuses."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from typing import Any

from igate_edge import cli


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def igate(*arguments: object) -> Result:
    """Run `igate ARGUMENTS` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as done:
            code = int(done.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def refused(result: Result, code: int, *words: str) -> None:
    """The error is one JSON document with all three parts, says these words, and shows no traceback."""
    assert result.code == code, result.out + result.err
    document = result.json
    assert set(document) == {"error", "cause", "evidence", "fix"}
    assert document["cause"] and document["evidence"] and document["fix"], document
    text = " ".join(document.values())
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"
    assert "Traceback" not in result.out + result.err
