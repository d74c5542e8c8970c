"""The ahead-of-time build in Triton for Orin, without a GPU: manifest, launch contract, budget, errors.

What compiles runs where Triton is installed and does not interpret.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from igate_edge.kernels import budget, build, build_triton, cubin, manifest

from igate_edge.errors import CheckFailed, InputError, UnavailableError


def row(**changes: Any) -> dict[str, Any]:
    return {"registers": 40, "stack": 0, "shared": 0, "opcodes": {"LDG.E.128": 3, "STG.E.128": 3}, **changes}


def built(**changes: Any) -> manifest.Built:
    kernel = manifest.Built(
        name="k",
        language="triton",
        file="k.cubin",
        ptx="",
        entry="k",
        arch="sm_87",
        abi=7,
        toolchain="t",
        source="s",
        sha256=manifest.digest(b"code"),
        params=(("x", "pointer"), ("n", "i32")),
        hidden=0,
        align=16,
        block=(128, 1, 1),
        dynamic_shared=0,
        registers=1,
        stack=0,
        shared=0,
        variant={"tasks": 2},
    )
    return dataclasses.replace(kernel, **changes)


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[build_triton.Compiled, manifest.Built, cubin.Resources]]:
    pytest.importorskip("triton", reason="TRITON IS MISSING, its build is not tested: pip install 'igate-edge[triton]'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    return {one.variant.name: (one, *one.describe()) for one in build_triton.build(87)}


def test_what_a_launcher_must_know(compiled: dict[str, Any]) -> None:
    one, made, _ = compiled["gated_select_forward_t2_nchw"]
    visible = ["psi", "phis0", "phis1", "outs0", "outs1", "psi_next", "alpha", "beta", "rows", "units", "channels"]
    assert [name for name, _ in made.params[: len(visible)]] == visible
    assert [kind for _, kind in made.params[:11]] == ["pointer"] * 8 + ["i32"] * 3
    # The parameters that Triton adds: the PTX counts them all, the manifest names them last.
    assert one.ptx.count(".param .") == len(made.params) == len(visible) + made.hidden
    assert made.block == (128, 1, 1) and ".reqntid 128" in one.ptx
    assert f".entry {made.entry}(" in one.ptx and made.dynamic_shared == 0
    assert made.variant["ROWS"] * made.variant["LANES"] == 1024


def test_it_is_code_for_orin_that_jetpack_6_can_load(compiled: dict[str, Any]) -> None:
    for one, made, _ in compiled.values():
        assert cubin.header(one.data) == cubin.Header(87, 7)
        cubin.require(one.data, 87, 12060)
        assert (made.arch, made.abi) == ("sm_87", 7)
        assert ".version 8.5" in one.ptx and ".target sm_87" in one.ptx
        assert str(Path(build_triton.__file__).parent).encode() not in one.data + one.ptx.encode()


def test_maps_are_loaded_and_stored_once_in_vectors_of_16_bytes(compiled: dict[str, Any]) -> None:
    """A lost alignment hint would make eight loads of one."""
    forward, backward = (
        compiled[f"gated_select_{name}"][2].opcodes for name in ("forward_t2_nchw", "backward_t4_nchw")
    )
    assert (forward["LDG.E.128"], forward["STG.E.128"]) == (2 + 1, 2 + 1)
    assert (backward["LDG.E.128"], backward["STG.E.128"]) == (2 * 4 + 2, 4 + 1)


def test_the_committed_budget_holds(compiled: dict[str, Any]) -> None:
    table = budget.load()["sm_87"]
    rows: dict[str, dict[str, Any]] = {}
    for _, made, found in compiled.values():
        rows.setdefault(made.toolchain, {})[made.name] = budget.row(found, made.dynamic_shared)
    if not rows.keys() <= table.keys():
        pytest.skip(f"the table was made with {', '.join(table)}, this is {', '.join(rows)}")
    build.check("sm_87", rows)


def test_the_budget_lists_everything_that_is_built_and_allows_no_spill() -> None:
    tables = budget.load()["sm_87"]
    (triton,) = (table for name, table in tables.items() if name.startswith("triton"))
    assert triton.keys() == {variant.name for variant in build_triton.variants()}
    for name, allowed in triton.items():
        assert budget.faults(name, allowed, allowed) == []


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (row(registers=41), "k has registers 41, the budget says 40"),
        (row(shared=16), "k has shared 16, the budget says 0"),
        (row(stack=8), "k uses 8 bytes of stack"),
        (row(opcodes={"LDG.E.128": 3, "STG.E.128": 3, "STL": 2}), "k spills: 2 STL"),
        (row(opcodes={"LDG.E.128": 3, "STG.E.U16": 24}), "k has 0 STG.E.128, the budget says 3"),
    ],
)
def test_every_change_of_cost_is_a_fault(found: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    budget.update("sm_87", {"t": {"k": row()}}, tmp_path / "b.json")
    build.check("sm_87", {"t": {"k": row()}}, tmp_path / "b.json")
    with pytest.raises(CheckFailed, match=re.escape(sentence)):
        build.check("sm_87", {"t": {"k": found}}, tmp_path / "b.json")


def test_a_kernel_or_toolchain_without_a_budget_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    budget.update("sm_87", {"t": {"k": row()}}, path)
    with pytest.raises(CheckFailed, match="new has no budget"):
        build.check("sm_87", {"t": {"new": row()}}, path)
    with pytest.raises(CheckFailed, match=r"no budget for u \(there is one for t\)"):
        build.check("sm_87", {"u": {"k": row()}}, path)
    budget.update("sm_87", {"u": {"k": row(registers=50)}}, path)
    assert budget.load(path)["sm_87"] == {"t": {"k": row()}, "u": {"k": row(registers=50)}}
    path.write_text("{")
    with pytest.raises(InputError, match="budget cannot be read"):
        budget.load(path)


def test_the_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    kernels = [built(), built(name="a", file="a.cubin", params=(("params", "struct:96"),))]
    manifest.write(tmp_path, kernels)
    assert manifest.load(tmp_path) == {kernel.name: kernel for kernel in kernels}
    (tmp_path / "k.cubin").write_bytes(b"code")
    assert manifest.read(built(), tmp_path) == b"code"


def test_damaged_builds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"no kernels were built.*python -m igate_edge.kernels.build"):
        manifest.load(tmp_path)
    manifest.write(tmp_path, [built()])
    with pytest.raises(InputError, match="the cubin of k is missing"):
        manifest.read(built(), tmp_path)
    (tmp_path / "k.cubin").write_bytes(b"cod")
    with pytest.raises(InputError, match=r"altered or cut off: .*has 3 bytes"):
        manifest.read(built(), tmp_path)
    path = tmp_path / manifest.NAME
    whole = json.loads(path.read_text())
    for damage in ("{", "[]", json.dumps({"schema": 2}), json.dumps({"schema": 1, "kernels": [{}]})):
        path.write_text(damage)
        with pytest.raises(InputError, match="manifest is (damaged|of another version)"):
            manifest.load(tmp_path)
    broken = copy.deepcopy(whole)
    broken["kernels"][0]["block"] = [128]
    path.write_text(json.dumps(broken))
    with pytest.raises(InputError, match="manifest is damaged"):
        manifest.load(tmp_path)


def test_a_source_without_its_compiler_is_left_out_or_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = cubin.Resources(40, 0, 0, 0, {"LDG.E": 1})

    def lacking(arch: int) -> Any:
        raise UnavailableError("no compiler", f"for sm_{arch}", "install one")

    monkeypatch.setattr(
        build, "SOURCES", {"one": lacking, "two": lambda arch: iter([(built(), True, found, b"code", "")])}
    )
    rows = build.run(tmp_path, 87, ("one", "two"))
    assert rows == {"t": {"k": {"registers": 40, "stack": 0, "shared": 0, "opcodes": {"LDG.E": 1}}}}
    assert "left out: no compiler: for sm_87" in capsys.readouterr().err
    assert manifest.load(tmp_path)["k"] == built() and (tmp_path / "k.cubin").read_bytes() == b"code"
    with pytest.raises(UnavailableError, match="no compiler"):
        build.run(tmp_path, 87, ("one",))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found, path = cubin.Resources(40, 0, 0, 0, {}), tmp_path / "budget.json"
    monkeypatch.setattr(build, "SOURCES", {"one": lambda _: iter([(built(), True, found, b"code", "")])})
    arguments = ["--out", str(tmp_path), "--budget", str(path)]
    assert build.main([*arguments, "--update"]) == 0
    assert build.main(arguments) == 0
    assert "1 kernels for sm_87" in capsys.readouterr().out
    budget.update("sm_87", {"t": {"k": row()}}, path)
    assert build.main(arguments) == 1
    assert "kernels cost something else than budgeted" in capsys.readouterr().err
    assert build.main([*arguments, "--arch", "90"]) == 0
    assert "no budget for sm_90" in capsys.readouterr().err
