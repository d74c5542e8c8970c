"""`igate doctor`: what this machine has, what is missing, and the exact command that fixes it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .cli_console import Answer
from .errors import IgateError, InputError
from .reports.tables import Grid, sentence_list

if TYPE_CHECKING:
    from .cli_doctor_jetson import Finding
    from .runtime.device_software import Interpreter

#: import name, distribution, needed for, minimum; those of the core must be there.
PACKAGES = (
    ("numpy", "numpy", "core", "1.26"),
    ("onnx", "onnx", "core", "1.17"),
    ("onnx_ir", "onnx-ir", "core", "1.1"),
    ("onnxruntime", "onnxruntime", "core", "1.22"),
    ("rich", "rich", "core", "13"),
    ("safetensors", "safetensors", "core", "0.4.5"),
    ("typer", "typer", "core", "0.12"),
    ("PIL", "pillow", "images", "10.3"),
    ("torch", "torch", "train", "2.6"),
    ("lightning", "lightning", "train", "2.4"),
    ("onnxscript", "onnxscript", "train", "0.5"),
    ("mujoco", "mujoco-core", "train", "4.0"),
    ("av", "av", "video", "12"),
    ("rosbags", "rosbags", "bag", "0.11.9"),
    ("mcap", "mcap", "bag", "1.3"),
)
#: What INT8 arithmetic needs, fastest first, as /proc/cpuinfo and its relatives call it.
INT8_FEATURES = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "i8mm", "asimddp")


def _numbers(version: str) -> tuple[int, ...]:
    digits = []
    for part in version.split("+")[0].split("."):
        head = "".join(c for c in part if c.isdigit()) if part[:1].isdigit() else ""
        if not head:
            break
        digits.append(int(head))
    return tuple(digits)


def packages() -> list[dict[str, Any]]:
    """Each package with its version (None when absent), without importing it."""
    found = []
    for module, name, group, minimum in PACKAGES:
        try:
            version: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # mujoco has two distributions, and system packages may have no metadata.
            version = "unknown" if importlib.util.find_spec(module) else None
        old = version not in (None, "unknown") and _numbers(str(version)) < _numbers(minimum)
        found.append({"name": name, "version": version, "group": group, "minimum": minimum, "too_old": old})
    return found


#: Backends: what each is needed for, how to get it, and whether the robot side needs it.
ENGINES = {
    "onnxruntime": ("running engines", "pip install --force-reinstall onnxruntime", True),
    "emulate": ("igate build --backend emulate", "apt install g++", False),
}


def cpu(root: Path = Path("/")) -> dict[str, Any]:
    """Model name, INT8 features and usable cores, read from /proc (empty where a system has none)."""
    from .runtime.cache import cpu_fields

    values = cpu_fields(root / "proc/cpuinfo")
    flags = set((values.get("flags") or values.get("features") or "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": values.get("model name") or values.get("model") or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "cores_usable": usable,
        "cores": os.cpu_count(),
        "int8_features": [name for name in INT8_FEATURES if name in flags],
        "avx2": "avx2" in flags,
    }


#: On a board, and where it is installed.
TENSORRT = {"tensorrt": ("engines on the GPU", "see the table of the board above", False)}


def backends(names: Iterable[str] = tuple(ENGINES)) -> dict[str, dict[str, Any]]:
    """What each backend says about itself; an unusable one carries its reason, and its fix where it knows one."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            found[name] = {"usable": True, **_probe(name)}
        except IgateError as error:
            found[name] = {"usable": False, "reason": f"{error.cause} ({error.evidence})", "fix": error.fix}
        except Exception as error:
            found[name] = {"usable": False, "reason": f"{type(error).__name__}: {error}"}
    return found


def _probe(name: str) -> dict[str, Any]:
    if name == "emulate":
        # The engine itself loads a graph library, which takes longer than all else that is looked at here.
        from igate_edge.kernels.emulator import compiler

        return {"version": compiler(), "provider": "emulator"}
    found: dict[str, Any] = importlib.import_module(f".engines.{name}", __package__).probe()
    return found


def cache() -> dict[str, Any]:
    """The engine cache's folder and whether it can be written."""
    from .runtime.cache import default_dir

    folder = default_dir()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return {"folder": str(folder), "writable": existing.is_dir() and os.access(existing, os.W_OK)}


def missing(
    found: list[dict[str, Any]], engines: dict[str, dict[str, Any]], store: dict[str, Any]
) -> list[dict[str, Any]]:
    """What is absent: what, what it is needed for, the fix, and whether the robot side works without it."""
    problems = []
    for item in found:
        if item["version"] is not None and not item["too_old"]:
            continue
        core = item["group"] == "core"
        what = f"{item['name']} {item['version']} is older than {item['minimum']}" if item["too_old"] else item["name"]
        wanted = f"'{item['name']}>={item['minimum']}'" if core else f"'igate-edge[{item['group']}]'"
        needed = {
            "core": "everything",
            "images": "igate run, report and demo",
            "train": "igate train and export",
            "video": "igate run on a video file",
        }
        upgrade = "--upgrade " if item["too_old"] else ""
        fix = f"pip install {upgrade}{wanted}"
        problems.append({"what": what, "needed_for": needed[item["group"]], "fix": fix, "required": core})
    for name, engine in engines.items():
        if not engine["usable"]:
            use, fix, required = (ENGINES | TENSORRT)[name]
            fix = engine.get("fix") or fix
            what = f"backend {name} does not start: {engine['reason']}"
            problems.append({"what": what, "needed_for": use, "fix": fix, "required": required})
    if not store["writable"]:
        fix = f"make {store['folder']} writable, or pass --cache DIR"
        problems.append({"what": "the engine cache", "needed_for": "fast starts", "fix": fix, "required": False})
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        version = platform.python_version()
        fix = "use Python 3.10 to 3.13"
        problems.append({"what": f"Python {version}", "needed_for": "everything", "fix": fix, "required": True})
    return problems


def doctor(
    strict: bool = False, purpose: str = "build", root: Path = Path("/"), python: Interpreter | None = None
) -> Answer:
    """The whole examination; exit code 3 when the robot side cannot work, 1 when strict and something does not fit.

    purpose: "build", or "run" to leave out what only building needs. python: what runs, default this interpreter.
    """
    if purpose not in ("build", "run"):
        raise InputError(f"no such purpose: {purpose}", "a robot runs engines or builds them", "give build or run")
    board, board_lines, findings = _board(root, purpose, python)
    more = TENSORRT if board or importlib.util.find_spec("tensorrt") else ()
    found, engines, store, processor = packages(), backends((*ENGINES, *more)), cache(), cpu(root)
    problems = missing(found, engines, store)
    wrong = [finding for finding in findings if finding.verdict == "MISMATCH"]
    broken = any(problem["required"] for problem in problems)
    stale = any(item["too_old"] for item in found)
    document = {
        "igate_edge": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": processor,
        "packages": found,
        "backends": engines,
        "cache": store,
        "missing": problems,
        **board,
        "ok": not broken and not (strict and (wrong or stale)),
    }
    shown: list[Any] = [Grid("This board", ("", ""), board_lines, 2)] if board_lines else []
    shown.append(Grid("This machine", ("", ""), _facts(processor, engines, store), 2))
    rows = [(p["name"], p["version"] or "-", p["group"]) for p in found]
    shown += [*_matrix(findings), Grid("Packages", ("package", "version", "for"), rows, 3), *_advice(problems)]
    verdict = "not ready: see MISSING above" if broken else "ready to build, verify and run bundles"
    optional = sum(not p["required"] for p in problems)
    said = [verdict, f"{optional} optional part(s) absent" if optional and not broken else ""]
    said.append("not a Jetson: no board was checked" if strict and not board else "")
    said.append(f"{len(wrong)} part(s) of this board do not fit: see MISMATCH above" if wrong else "")
    shown += ["", "; ".join(filter(None, said))]
    return Answer(document, shown, 3 if broken else 1 if not document["ok"] else 0)


def _board(
    root: Path, purpose: str, python: Interpreter | None
) -> tuple[dict[str, Any], list[tuple[str, str]], list[Finding]]:
    """A Jetson's part of the document, its facts and findings; nothing on any other machine."""
    from .runtime.device import read_device

    device = read_device(root)
    if not device.jetson:
        return {}, [], []
    from .cli_doctor_jetson import Facts, examine
    from .cli_jetson import board_facts, state_facts
    from .runtime.device import read_state
    from .runtime.device_software import read_software, this_interpreter

    facts = Facts(device, read_state(root), read_software(root), python or this_interpreter(), root)
    findings = examine(facts, purpose)
    document = {"device": device, "state": facts.state, "software": facts.software, "findings": findings}
    telling = [fact for fact in state_facts(facts.state) if fact[0] in ("power mode", "clocks", "temperatures")]
    return document, [*board_facts(device), *telling], findings


def _facts(
    processor: dict[str, Any], engines: dict[str, dict[str, Any]], store: dict[str, Any]
) -> list[tuple[str, str]]:
    features = ", ".join(processor["int8_features"]) or "no VNNI or dot product: INT8 gains less here"
    cores = f"{processor['cores_usable']} usable of {processor['cores']}"
    facts = [
        ("igate_edge", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("cpu", f"{processor['model']}, cores: {cores}"),
        ("INT8 instructions", features),
        ("engine cache", f"{store['folder']} ({'writable' if store['writable'] else 'NOT writable'})"),
    ]
    for name, engine in engines.items():
        hidden = ("usable", "fix") if engine["usable"] else ("usable", "fix", "reason")
        detail = ", ".join(f"{key} {value}" for key, value in engine.items() if key not in hidden and _short(value))
        verdict = "ready" if engine["usable"] else "NOT usable, see below"
        facts.append((f"backend {name}", f"{verdict}: {detail}".strip(": ")))
    return facts


def _matrix(findings: list[Finding]) -> list[Any]:
    """The board's table, then what does not fit or is good to know, each with its fix."""
    if not findings:
        return []
    rows = [(f.part, f.found, f.wanted or "-", f.verdict) for f in findings]
    shown: list[Any] = [Grid("What belongs together on this board", ("part", "found", "wanted", ""), rows, 4)]
    for finding in sorted((f for f in findings if f.verdict != "ok"), key=lambda f: f.verdict):
        kind = f"{finding.verdict}:"
        shown.append(f"{kind:9} {finding.part}: {finding.reason} (to {finding.needed_for})\n          {finding.fix}")
    return shown


def _advice(problems: list[dict[str, Any]]) -> list[str]:
    """What is missing, one entry a fix."""
    shown = []
    for fix in dict.fromkeys(problem["fix"] for problem in problems):
        same = [problem for problem in problems if problem["fix"] == fix]
        kind = "MISSING:" if any(problem["required"] for problem in same) else "optional:"
        what = sentence_list([problem["what"] for problem in same])
        shown.append(f"{kind:9} {what} (for {same[0]['needed_for']})\n          {fix}")
    return shown


def _short(value: Any) -> bool:
    return isinstance(value, str | int | float) and len(str(value)) < 60
