"""Every command that the Jetson kit shows or runs exists, with the options that it gives."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from igate_edge import cli

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "jetson"
FILES = [*sorted(KIT.glob("*.md")), KIT / "bringup.sh", KIT / "install.sh", KIT / "igate-edge.service"]
#: `igate` at the start of a command: of a line, of code between backticks, after a step's name or a folder.
_CALL = re.compile(r"(?:^|`|[a-z-]+\.json +|[=/])igate ([a-z][^`\n]*)", re.MULTILINE)


def _calls(path: Path) -> list[str]:
    text = path.read_text().replace("\\\n", " ")
    return [match[1].split(" #")[0].strip() for match in _CALL.finditer(text)]


CALLS = [(path.name, call) for path in FILES for call in _calls(path)]


def test_the_kit_is_read() -> None:
    found = {name for name, _ in CALLS}
    assert {"FIRST_HOUR.md", "README.md", "bringup.sh", "igate-edge.service"} <= found and len(CALLS) > 30
    assert ("igate-edge.service", "doctor --strict --for run") in CALLS


@pytest.mark.parametrize(("file", "call"), CALLS)
def test_a_command_of_the_kit_exists_with_its_options(file: str, call: str) -> None:
    words = shlex.split(call.replace("'", ""), comments=True)
    command: Any = get_command(cli.app)
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    asked = {word.split("=")[0] for word in words if word.startswith("-")}
    assert asked <= known, f"{file}: igate {call}"


def test_no_function_of_a_script_hides_a_program_that_it_runs() -> None:
    """`run install ...` would call a function of that name, for ever."""
    for path in sorted(KIT.glob("*.sh")):
        text = path.read_text()
        functions = set(re.findall(r"^([a-z_]+)\(\)", text, re.MULTILINE))
        programs = set(re.findall(r"^\s*(?:.*\|\| )?run ([a-z][a-z-]*)\b", text, re.MULTILINE))
        assert not functions & programs, path.name
        assert path.name != "install.sh" or {"install", "systemctl", "env"} <= programs
