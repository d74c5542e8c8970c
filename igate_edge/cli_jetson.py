"""`igate jetson`: what a board does now, and its power mode and clocks, changed only when --apply says so."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_console import Answer, command
from .errors import CheckFailed, InputError, UnavailableError
from .reports.tables import Grid
from .runtime.device import Device, State, capped, power_modes, read_device, read_state
from .runtime.device_power import tpc_mask_now
from .runtime.device_state import total_mw
from .runtime.device_sysfs import integer

#: Where the clocks from before `lock` are kept.
STORE = "/var/lib/igate-edge/jetson_clocks.conf"

jetson = typer.Typer(
    help="A Jetson's power mode and clocks. Changes nothing without --apply.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Apply = Annotated[bool, typer.Option("--apply", help="Run the commands (as root); without it they are only shown.")]


@jetson.command("status")
@command
def _status() -> Answer:
    """Show board, power mode, clocks, temperatures, throttling and power."""
    return status()


@jetson.command("power")
@command
def _power(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `igate jetson status` lists.", show_default=False)],
    apply: Apply = False,
) -> Answer:
    """Set a power mode by its name: the ids behind the names differ by board."""
    return power(name, apply)


@jetson.command("lock")
@command
def _lock(
    apply: Apply = False,
    restore: Annotated[bool, typer.Option("--restore", help="Undo: back to the clocks from before.")] = False,
) -> Answer:
    """Fix all clocks at their highest, so that two measurements can be compared."""
    return lock(apply, restore)


@jetson.command("record")
@command
def _record(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle: NAME.igate.", show_default=False)],
    backend: Annotated[str, typer.Option(help="auto, tensorrt or onnxruntime.")] = "auto",
    frames: Annotated[int, typer.Option(min=10, help="How many frames are timed.")] = 300,
    rate: Annotated[float, typer.Option(min=0, help="Frames a second, as the camera's; 0: back to back.")] = 30.0,
    budget_ms: Annotated[float | None, typer.Option(help="Exit 1 when p99 is above it.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    against: Annotated[Path | None, typer.Option(help="An earlier record of the same board to compare with.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare although board, mode or engine differ.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder of built engines.", show_default="user cache")] = None,
) -> Answer:
    """Time a bundle with all that its times depend on; runs on any machine, changes nothing."""
    from .cli_jetson_record import record_bundle

    return record_bundle(path, backend, frames, rate or None, budget_ms, out, against, force, cache)


@jetson.command("isaac-ros")
@command
def _isaac_ros(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle: NAME.igate.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("isaac"),
    camera: Annotated[str, typer.Option(help="Size of the camera's images, WIDTHxHEIGHT.")] = "1280x720",
) -> Answer:
    """Write model, parameters and launch file for Isaac ROS's encoder and TensorRT node."""
    from .robotics.isaac_ros import export

    size = re.fullmatch("([0-9]{1,9})x([0-9]{1,9})", camera)
    if size is None:
        raise InputError("not a camera's size", f"--camera {camera:.40}", "give it as 1280x720")
    written = [str(file) for file in export(path, out, (int(size[1]), int(size[2])))]
    return Answer({"files": written}, [f"written: {file}" for file in written])


def status(root: Path = Path("/")) -> Answer:
    """Board and state of this moment, and all power modes; UnavailableError off a Jetson."""
    device, state, modes = _board(root), read_state(root), power_modes(root)
    rows = []
    for mode in modes:
        now = state.power_mode is not None and mode.id == state.power_mode.id
        marks = [word for word, holds in (("now", now), ("default", mode.default)) if holds]
        clocks = (_mhz(mode.gpu_max_hz), _mhz(mode.cpu_max_khz, 1e3), _mhz(mode.emc_max_hz))
        rows.append((mode.name, ", ".join(marks), *clocks, str(mode.cpus_online or "-")))
    shown: list[Any] = [Grid("This board", ("", ""), [*board_facts(device), *state_facts(state)], 2)]
    if rows:
        columns = ("mode", "", "GPU MHz", "CPU MHz", "memory MHz", "cores")
        note = "At most; max: as fast as the hardware goes. More watts may mean a slower GPU: read the clocks."
        shown.append(Grid("Power modes", columns, rows, 2, note))
    return Answer({"device": device, "state": state, "power_modes": list(modes)}, shown)


def power(name: str, apply: bool = False, root: Path = Path("/"), user: int | None = None) -> Answer:
    """Set the mode called `name`. InputError for an unknown one; user: effective id, default this process's."""
    _board(root)
    modes, state = power_modes(root), read_state(root)
    names = ", ".join(mode.name for mode in modes) or "none: there is no /etc/nvpmodel.conf here"
    found = [mode for mode in modes if mode.name.lower() == name.lower()]
    if not found:
        raise InputError(f"no power mode {name}", f"this board has {names}", "give one of these names")
    wanted = found[0]
    if state.power_mode is not None and state.power_mode.id == wanted.id and not capped(state):
        text = f"power mode {wanted.name} is set already: nothing to do"
        return Answer({"commands": [], "applied": False, "reboot": False}, [text])
    now, after = tpc_mask_now(root), integer(wanted.tpc_mask)
    reboot = now is not None and after is not None and now != after
    run = [["nvpmodel", "-m", str(wanted.id)]]
    if reboot and apply:
        fix = f"run it by hand and answer its question: sudo {shlex.join(run[0])}"
        reason = f"it switches GPU clusters {after:#x} off, now {now:#x}, and nvpmodel asks whether to reboot"
        raise UnavailableError(f"mode {wanted.name} needs a reboot", reason, fix)
    notes = ["A new mode frees locked clocks: lock them again after it."]
    if reboot:
        notes.append("This mode switches other GPU clusters off: nvpmodel asks whether to reboot.")
    answer = _carry_out(run, apply, notes, root, user)
    if apply:
        mode = read_state(root).power_mode
        if mode is None or mode.id != wanted.id:
            said = f"nvpmodel now says {mode.name if mode else 'nothing'}"
            raise CheckFailed(f"power mode {wanted.name} was not taken", said, "sudo nvpmodel -q --verbose")
    return Answer({**answer.document, "reboot": reboot}, answer.shown)


def lock(apply: bool = False, restore: bool = False, root: Path = Path("/"), user: int | None = None) -> Answer:
    """Lock the clocks, or restore what `lock` stored. UnavailableError off a Jetson, or with nothing to restore."""
    _board(root)
    stored = (root / STORE.lstrip("/")).is_file()
    if restore and not stored:
        fix = "sudo reboot sets the clocks of the power mode"
        raise UnavailableError("no clocks to restore", f"there is no {STORE}: `igate jetson lock` did not run", fix)
    if restore:
        run = [["jetson_clocks", "--restore", STORE], ["rm", STORE]]
        return _carry_out(run, apply, [], root, user)
    keep = [] if stored else [["mkdir", "-p", os.path.dirname(STORE)], ["jetson_clocks", "--store", STORE]]
    notes = ["Locked clocks cost power and heat, and a reboot or a new power mode frees them."]
    answer = _carry_out([*keep, ["jetson_clocks"]], apply, notes, root, user)
    if not apply:
        return answer
    state = read_state(root)
    if state.locked is False:
        evidence = f"GPU {_range(state.gpu_hz, 1e6)}, CPU {_range(state.cpu_khz, 1e3)}"
        raise CheckFailed("the clocks are not locked", evidence, "sudo jetson_clocks --show")
    said = "locked" if state.locked else "locked as far as can be read"
    return Answer({**answer.document, "locked": state.locked}, [*answer.shown, said])


def _board(root: Path) -> Device:
    device = read_device(root)
    if not device.jetson:
        evidence = "it has neither a Tegra device tree nor an L4T release"
        raise UnavailableError("this machine is not a Jetson", evidence, "run the command on the board")
    return device


def _carry_out(run: Sequence[Sequence[str]], apply: bool, notes: list[str], root: Path, user: int | None) -> Answer:
    """Show commands, or run them in turn; the first that fails ends it as CheckFailed with what it printed."""
    lines = [f"sudo {shlex.join(words)}" for words in run]
    document = {"commands": lines, "applied": apply}
    if not apply:
        shown = ["Would run:", *(f"  {line}" for line in lines), *notes]
        return Answer(document, [*shown, "Nothing was changed. Run them yourself, or add --apply (as root)."])
    if (os.geteuid() if user is None else user) != 0:
        raise UnavailableError("this needs root", "clocks and power modes belong to the system", "; ".join(lines))
    for words in run:
        try:
            done = subprocess.run(
                _below(words, root), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            fix = "run it by hand to see what it asks or lacks"
            raise UnavailableError(f"cannot run {words[0]}", str(error), fix) from error
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise CheckFailed(f"{shlex.join(words)} failed", said[0], f"sudo {shlex.join(words)}")
    return Answer(document, [*(f"ran: {line}" for line in lines), *notes])


def _below(words: Sequence[str], root: Path) -> list[str]:
    """The command with the board's own tools and files, where `root` stands for "/"."""
    if root == Path("/"):
        return list(words)
    places = [root / place / words[0] for place in ("usr/sbin", "usr/bin")]
    tool = next((str(place) for place in places if place.exists()), words[0])
    return [tool, *(str(root / w.lstrip("/")) if w.startswith("/") else w for w in words[1:])]


def board_facts(device: Device) -> list[tuple[str, str]]:
    """Name and text of what a board is, for a table."""
    sm = f", SM {device.sm // 10}.{device.sm % 10}" if device.sm else ""
    sizes = {"": device.memory_mb, " swap": device.swap_mb, " zram": device.zram_mb}
    memory = ", ".join(f"{size / 1024:.1f} GiB{kind}" for kind, size in sizes.items() if size)
    place = ", in a container" if device.container else ""
    release = f"{device.jetpack or 'unknown'} (L4T {device.l4t or 'unknown'}), kernel {device.kernel or 'unknown'}"
    return [
        ("board", device.board or "a Jetson whose device tree cannot be read"),
        ("module", f"{device.module or device.soc or 'unknown'}{sm}"),
        ("memory", memory or "unverified"),
        ("JetPack", release + place),
    ]


def state_facts(state: State) -> list[tuple[str, str]]:
    """Name and text of what a board does now; what cannot be read says "unverified"."""
    mode, limit = state.power_mode, capped(state)
    name = mode.name if mode else "unverified"
    locked = {True: "locked", False: "not locked: times vary", None: "lock unverified (memory clock: as root)"}
    hot = ", ".join(f"{zone} {degrees:.0f}" for zone, degrees in state.temperatures.items())
    total = total_mw(state.rails_mw)
    rails = ", ".join(f"{rail} {value / 1e3:.1f}" for rail, value in state.rails_mw.items())
    events = "unverified" if state.throttle_events is None else f"{state.throttle_events} since boot"
    holding = "".join(f", {name} holds back now ({step})" for name, step in state.cooling.items())
    load = "" if state.gpu_load is None else f", load {state.gpu_load:.0%}"
    return [
        ("power mode", f"{name}; {limit}" if limit else name),
        ("clocks", locked[state.locked]),
        ("GPU", f"{_range(state.gpu_hz, 1e6)}{load}"),
        ("CPU", _range(state.cpu_khz, 1e3)),
        ("memory clock", f"{state.emc_hz / 1e6:.0f} MHz" if state.emc_hz else "unverified (as root)"),
        ("temperatures", f"{hot} C" if hot else "unverified"),
        ("over-current", f"{events}{holding}"),
        ("power", "unverified" if total is None else f"{total / 1e3:.1f} W ({rails})"),
        ("fan", "unverified" if state.fan is None else f"{state.fan:.0%}"),
    ]


def _range(clocks: tuple[int, int, int] | None, unit: float) -> str:
    if clocks is None:
        return "unverified"
    low, high, now = (f"{value / unit:.0f}" for value in clocks)
    return f"{now} MHz (fixed)" if low == high else f"{now} MHz ({low} to {high})"


def _mhz(value: int | None, unit: float = 1e6) -> str:
    return "max" if value is None else f"{value / unit:.0f}"
