"""The ament package's files agree with each other and with the code; needs no ROS."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "jetson" / "ros2" / "igate_edge_ros"
SOURCES = sorted((PACKAGE / "igate_edge_ros").glob("*.py"))
LAUNCH = sorted((PACKAGE / "launch").glob("*.launch.py"))
README = (PACKAGE / "README.md").read_text()
MANIFEST = ElementTree.parse(PACKAGE / "package.xml").getroot()
#: What pip brings, and what is part of rclpy's own package list.
NOT_ROS = {"igate_edge", "numpy", "__future__", *sys.stdlib_module_names}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def parameters() -> set[str]:
    """Names that the code declares, read from its text: importing it needs ROS."""
    tree = ast.parse((PACKAGE / "igate_edge_ros" / "parameters.py").read_text())
    (settings,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
    return {item.target.id for item in settings.body if isinstance(item, ast.AnnAssign)}  # type: ignore[union-attr]


def test_package_xml_names_what_the_code_imports() -> None:
    named = {item.text for item in MANIFEST.findall("exec_depend")}
    needed = set().union(*map(imported, [*SOURCES, *LAUNCH])) - NOT_ROS
    assert needed <= named, needed - named
    assert MANIFEST.findtext("export/build_type") == "ament_python"


def test_versions_and_names_agree() -> None:
    setup = (PACKAGE / "setup.py").read_text()
    assert f'version="{MANIFEST.findtext("version")}"' in setup
    assert MANIFEST.findtext("name") == PACKAGE.name and (PACKAGE / "resource" / PACKAGE.name).is_file()
    assert f"$base/lib/{PACKAGE.name}" in (PACKAGE / "setup.cfg").read_text()


def test_an_installed_package_has_all_that_ros_looks_for(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="NOT TESTED: setuptools is missing, pip install setuptools")
    copy = tmp_path / "source"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_py",
        "--build-lib",
        "../lib",
        "install_data",
        "--install-dir=..",
    ]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    share = tmp_path / "share" / PACKAGE.name
    wanted = [
        share / file.relative_to(PACKAGE) for file in [*LAUNCH, *PACKAGE.glob("*/*.yaml"), *PACKAGE.glob("*/*.rviz")]
    ]
    wanted += [share / "package.xml", tmp_path / "share/ament_index/resource_index/packages/igate_edge_ros"]
    wanted += [tmp_path / "lib" / "igate_edge_ros" / file.name for file in SOURCES]
    assert not [file for file in wanted if not file.is_file()]


def test_programs_in_the_readme_compile_and_start_what_exists() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        for module, name in re.findall(r"from igate_edge_ros\.(\w+) import (\w+)", block):
            source = (PACKAGE / "igate_edge_ros" / f"{module}.py").read_text()
            assert f"class {name}" in source
        compile(block.replace("Node(", "dict(", 1) if block.startswith("Node(") else block, "README.md", "exec")


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_launch_files_start_what_exists_with_arguments_that_exist(path: Path) -> None:
    text = path.read_text()
    compile(text, str(path), "exec")
    assert re.findall(r'executable="(\w+)"', text) == ["igate_node"]
    assert "igate_node = " in (PACKAGE / "setup.py").read_text()
    options = set(re.findall(r'"(--[a-z]+)"', (PACKAGE / "igate_edge_ros" / "main.py").read_text()))
    assert set(re.findall(r'"(--[a-z]+)"', text)) <= options
    used, declared = (
        set(re.findall(rf'{call}\(\s*"(\w+)"', text)) for call in ("LaunchConfiguration", "LaunchArgument")
    )
    assert used == declared
    assert set(re.findall(r'\{"(\w+)": ParameterValue', text)) <= parameters()


def test_the_parameter_file_and_the_readme_name_parameters_that_exist() -> None:
    lines = (PACKAGE / "config" / "igate.yaml").read_text().splitlines()
    named = {match[1] for line in lines if (match := re.match(r"    (\w+): ", line))}
    assert named <= parameters() and "bundle" in named
    assert set(re.findall(r"-p (\w+):=", README)) <= parameters()
    section = README.partition("## Parameters")[2].partition("## Read")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == parameters()
