"""Opening an engine without stopping the node: what takes long is built in a process of its own.

A build holds the interpreter's lock for seconds at a time, and every timer of the process with it. So `build_apart`
lets another process fill the cache, and `open_engine` then finds the engine there. Imports no ROS: that process is
`python -m igate_edge_ros.loading OPTIONS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igate_edge import errors
from igate_edge.errors import DefectError, IgateError, InputError, UnavailableError

if TYPE_CHECKING:
    from igate_edge import Engine

    from .parameters import Settings

#: Seconds between two looks whether the node still wants the engine.
LOOK_S = 0.1


def options_of(settings: Settings) -> dict[str, Any]:
    """The arguments of Engine.open; raises InputError without a bundle."""
    if not settings.bundle:
        fix = "set it to the path of an .igate file: -p bundle:=/path/to/scene.igate"
        raise InputError("parameter bundle is not usable", "it is empty", fix)
    return {
        "path": settings.bundle,
        "backend": settings.backend,
        "threads": settings.threads,
        "precision": settings.precision,
        "tasks": list(settings.tasks) or None,
        "cache_dir": settings.cache_dir or None,
    }


def build_apart(options: Mapping[str, Any], stopped: Callable[[], bool] = lambda: False) -> None:
    """Have another process build the engine into the cache.

    Raises what the build raised, and UnavailableError when the process was killed or `stopped` became true.
    """
    here = str(Path(__file__).resolve().parent.parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", f"{__package__}.loading", json.dumps(dict(options))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True) as process:
        while True:
            try:
                out, err = process.communicate(timeout=LOOK_S)
                break
            except subprocess.TimeoutExpired:
                if stopped():
                    process.kill()
                    process.communicate()
                    raise UnavailableError("the engine was not built", "the node was stopped meanwhile") from None
    if process.returncode:
        raise _error(process.returncode, out, err)


def open_engine(options: Mapping[str, Any]) -> Engine:
    """The engine, from the cache where it is there, checked on its golden frames."""
    from igate_edge import Engine

    return Engine.open(**options)


def manifest_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the bundle says of itself."""
    from igate_edge import Bundle

    return dict(Bundle.read(options["path"]).manifest)


def _error(code: int, out: str, err: str) -> IgateError:
    """What the other process said it died of."""
    try:
        said = json.loads(out.strip().splitlines()[-1])
        return getattr(errors, said["error"])(said["cause"], said["evidence"], said["fix"])
    except (IndexError, KeyError, TypeError, ValueError, AttributeError):
        pass
    if code < 0:
        evidence = f"its process got signal {-code}" + (": out of memory?" if code == -9 else "")
        return UnavailableError("the engine was not built", evidence, "build it beforehand: igate build BUNDLE")
    return DefectError("the engine was not built", err.strip()[-300:] or f"exit code {code}")


def main() -> int:
    """Build what the first argument says; a failure is the last line on standard output, as JSON."""
    try:
        open_engine(json.loads(sys.argv[1])).close()
    except IgateError as error:
        print(json.dumps(error.as_json()))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
