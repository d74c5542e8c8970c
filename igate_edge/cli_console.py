"""What every command shares: an answer for people or as one JSON document, and errors with a fixed exit code.

Exit codes: 0 done, 1 a check failed, 2 wrong use, 3 the environment cannot do it, 70 a defect of igate_edge
itself, 130 stopped by the user (Ctrl-C), 143 ended by SIGTERM
(`igate serve` answers what is inside and ends with 0).
Answers go to stdout; progress and messages go to stderr.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from .errors import DefectError, IgateError, UnavailableError
from .plaindata import plain_json
from .reports.tables import Grid

T = TypeVar("T")

#: Where a package that may be absent comes from.
EXTRAS = {
    "torch": "train",
    "lightning": "train",
    "onnxscript": "train",
    "mujoco": "train",
    "av": "video",
    "PIL": "images",
    "matplotlib": "report",
    "rosbags": "bag",
    "mcap": "bag",
}


@dataclass(frozen=True)
class Answer:
    """What a command found: `document` for --json, `shown` (texts and tables) for people, and the exit code."""

    document: dict[str, Any]
    shown: list[Any] = field(default_factory=list)
    code: int = 0


def messages() -> Console:
    """The console for progress and messages: stderr, made anew so that it follows a redirected stream."""
    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line for people on stderr; a full disk behind it ends no command."""
    with contextlib.suppress(OSError):
        messages().print(text, markup=False, soft_wrap=True)


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on stderr when that is a terminal; silent otherwise."""
    console = messages()
    if not console.is_terminal:
        yield from items
        return
    from rich.progress import track

    yield from track(items, description=what, total=total, console=console, transient=True)


def print_json(document: Any) -> None:
    """The one JSON document of a command, on stdout."""
    sys.stdout.write(json.dumps(plain_json(document), indent=2) + "\n")
    sys.stdout.flush()


def drop_stdout() -> None:
    """Send what is left of stdout nowhere: it cannot be written, and Python would complain when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Shown(Console):
    def on_broken_pipe(self) -> None:
        """As for JSON; rich itself would end the process with code 1, which means a failed check."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def missing_package(error: ModuleNotFoundError) -> IgateError | None:
    """The sentence for an absent package, or None when the module is our own (then it is a defect, not an absence)."""
    name = (error.name or "").split(".")[0]
    if not name or name == "igate_edge":
        return None
    extra = EXTRAS.get(name)
    wanted = f"'igate-edge[{extra}]'" if extra else "--force-reinstall igate-edge"
    return UnavailableError(f"the package {name} is not installed", str(error), f"pip install {wanted}")


def _from_os(error: OSError) -> IgateError:
    name = error.filename if error.filename is not None else "a file"
    fix = (
        "free disk space and run the command again"
        if error.errno == errno.ENOSPC
        else "check the path and its permissions"
    )
    return UnavailableError(f"cannot use {name}", error.strerror or str(error), fix)


def explain(error: Exception) -> IgateError:
    """Any exception as a sentence with cause, evidence and fix."""
    if isinstance(error, IgateError):
        return error
    if isinstance(error, ModuleNotFoundError) and (absent := missing_package(error)):
        return absent
    if isinstance(error, OSError):
        return _from_os(error)
    if isinstance(error, MemoryError):
        return UnavailableError(
            "not enough memory", str(error) or "an allocation failed", "free memory or use a smaller input"
        )
    evidence = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
    if type(error).__name__ == "BrokenProcessPool":
        fix = "free memory, or generate fewer frames at a time"
        return UnavailableError("a worker process was killed, mostly for want of memory", evidence, fix)
    fix = "run the same command with --debug and report what it prints: this should not happen"
    return DefectError("an unexpected error stopped the command", evidence, fix)


def print_error(error: IgateError, as_json: bool) -> None:
    """Cause, evidence and fix: a sentence on stderr, or one JSON document on stdout."""
    if as_json:
        try:
            print_json(error.as_json())
            return
        except OSError:  # nobody can read it there: say it on stderr
            drop_stdout()
    console = messages()
    with contextlib.suppress(OSError):  # the exit code still tells
        console.print("[bold red]error[/] ", end="")
        console.print(f"{error.cause}{': ' + error.evidence if error.evidence else ''}.", markup=False, soft_wrap=True)
        if error.fix:
            console.print("[bold]fix[/]   ", end="")
            console.print(f"{error.fix}.", markup=False, soft_wrap=True)


@contextlib.contextmanager
def tidy_at_sigterm(heard: list[int]) -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does, so that no half-written file stays; a second one kills the process.

    heard: gets the signal's number. A call into native code is waited for. Leaves a handler that is set already, and
    threads other than the main one, alone.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, _: Any) -> None:
        heard.append(number)
        if len(heard) > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command(function: Callable[..., Answer]) -> Callable[..., None]:
    """Make a typer command of a function that returns an Answer: adds --json, --debug, printing and exit codes."""

    @functools.wraps(function)
    def wrapped(*args: Any, json_out: bool = False, debug: bool = False, **options: Any) -> None:
        answer = Answer({})
        try:
            answer = function(*args, **options)
            _print_answer(answer, json_out)
        except BrokenPipeError:  # the reader has gone (`igate inspect x | head`): no error of ours
            drop_stdout()
            raise typer.Exit(answer.code) from None
        except KeyboardInterrupt:
            if debug:
                raise
            say("stopped: finished files are whole, nothing was left half written")
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug:
                messages().print_exception()
            sentence = explain(error)
            print_error(sentence, json_out)
            raise typer.Exit(sentence.exit_code) from None
        if answer.code:
            raise typer.Exit(answer.code)

    signature = inspect.signature(function, eval_str=True)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("json_out", JsonFlag), ("debug", DebugFlag))
    ]
    wrapped.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *extra], return_annotation=None
    )
    wrapped.__annotations__ = {p.name: p.annotation for p in wrapped.__signature__.parameters.values()}  # type: ignore[attr-defined]
    del wrapped.__wrapped__
    return wrapped


def _print_answer(answer: Answer, json_out: bool) -> None:
    if json_out:
        print_json(answer.document)
        return
    console = _Shown(highlight=False)
    if not console.is_terminal:
        console = _Shown(highlight=False, width=120)  # a file or a pipe has no width of its own
    for before, item in zip(["", *answer.shown], answer.shown, strict=False):
        if before == item == "":
            continue
        if isinstance(item, str):
            console.print(item, markup=False, soft_wrap=True)
        else:
            console.print(item.rich() if isinstance(item, Grid) else item)
