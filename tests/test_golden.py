"""Golden comparison: small numeric noise passes, another network does not, in the terms of each task."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from igate_edge.contract import OutputSpec, Preprocess
from igate_edge.errors import CheckFailed, DataError
from igate_edge.golden import FLOAT_LIMIT, MEASURES, GoldenResult, check, gap, require, tolerances, too_far

SIZE = (8, 8)
SPECS = {
    "semseg": OutputSpec("t", "semseg", 3),
    "depth": OutputSpec("t", "depth", 1),
    "normals": OutputSpec("t", "normals", 3),
    "edges": OutputSpec("t", "edges", 1),
    "classification": OutputSpec("t", "classification", 5),
    "multilabel": OutputSpec("t", "multilabel", 5),
}


def outputs(spec: OutputSpec, count: int = 4, seed: int = 0) -> np.ndarray:
    shape = (count, spec.channels, 4, 4) if spec.dense else (count, spec.channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", list(SPECS))
def test_gap_sees_noise_small_and_another_network_large(kind: str) -> None:
    spec = SPECS[kind]
    stored, floor = outputs(spec), MEASURES[kind][1]
    assert gap(spec, stored, stored, SIZE) <= (0.05 if kind == "normals" else 0)
    noise = stored + np.float32(1e-3) * outputs(spec, seed=1)
    assert gap(spec, noise, stored, SIZE) < floor
    assert gap(spec, outputs(spec, seed=2), stored, SIZE) > 3 * floor
    one_frame = stored.copy()
    one_frame[2] = outputs(spec, seed=3)[2]
    assert gap(spec, one_frame, stored, SIZE) > 3 * floor, "one wrong frame is not averaged away"


def test_gap_is_infinite_for_what_is_no_answer() -> None:
    stored = outputs(SPECS["depth"])
    for bad in (np.full_like(stored, np.nan), np.full_like(stored, np.inf), stored[:2], np.empty(0)):
        assert gap(SPECS["depth"], bad, stored, SIZE) == math.inf


def test_measures_are_in_task_terms() -> None:
    depth = SPECS["depth"]
    assert gap(depth, np.log(np.full((1, 1, 2, 2), 2.2)), np.log(np.full((1, 1, 2, 2), 2.0)), SIZE) == pytest.approx(
        0.1
    )
    across, up = np.zeros((1, 3, 1, 1)), np.zeros((1, 3, 1, 1))
    across[0, 0], up[0, 1] = 5, 3
    assert gap(SPECS["normals"], across, up, SIZE) == pytest.approx(90)


def test_limit_is_margin_times_gap_and_at_least_the_floor() -> None:
    spec = SPECS["depth"]
    zero = np.zeros((4, 1, 2, 2), np.float32)
    table = tolerances([spec], {"t": zero}, {"t": zero + np.float32(math.log(1.03))}, SIZE)["t"]
    assert table["packaged"] == pytest.approx(0.03, rel=1e-4) and table["limit"] == pytest.approx(2 * 0.03, rel=1e-4)
    assert tolerances([spec], {"t": zero}, {"t": zero}, SIZE)["t"]["limit"] == MEASURES["depth"][1]


def test_int8_far_from_float_has_a_ceiling_and_is_told() -> None:
    spec = SPECS["depth"]
    zero = np.zeros((4, 1, 2, 2), np.float32)
    table = tolerances([spec], {"t": zero}, {"t": zero + np.float32(math.log(1.5))}, SIZE)
    assert table["t"]["limit"] == MEASURES["depth"][2] < table["t"]["packaged"]
    (sentence,) = too_far(table)
    assert "INT8 of task 't'" in sentence and "calibrate" in sentence
    assert too_far(tolerances([spec], {"t": zero}, {"t": zero}, SIZE)) == []
    with pytest.raises(DataError, match="task 't' gives NaN or infinity"):
        tolerances([spec], {"t": zero}, {"t": zero + np.float32(np.inf)}, SIZE)


def test_int8_that_was_packaged_wrong_fails_though_it_is_as_packaged() -> None:
    """The limit that a manifest claims counts only up to the ceiling of the kind."""
    stored = outputs(SPECS["depth"])
    far = stored + np.float32(math.log(1.5))
    packed = bundle(stored, far)
    packed.manifest["tolerances"]["t"]["limit"] = 5.0
    (result,) = check(packed, replay(far), "int8")
    assert not result.passed and result.limit == MEASURES["depth"][2] and "when packaged" in result.measure


def bundle(float_out: np.ndarray, int8_out: np.ndarray) -> SimpleNamespace:
    frames = np.random.default_rng(0).integers(0, 256, (len(float_out), *SIZE, 3), np.uint8)
    return SimpleNamespace(
        golden={"frame": frames, "float/t": float_out, "int8/t": int8_out},
        preprocess=Preprocess(*SIZE),
        tasks=(SPECS["depth"],),
        manifest={"tolerances": {"t": {"limit": 0.05}}},
    )


def replay(stored: np.ndarray) -> object:
    rows = iter(stored)
    return lambda image: {"t": next(rows)[None]}


def test_check_by_precision() -> None:
    stored = outputs(SPECS["depth"])
    packed = bundle(stored, stored + np.float32(0.01))
    cases = {
        ("float", 0.0): True,
        ("float", 0.5 * FLOAT_LIMIT): True,
        ("float", 3 * FLOAT_LIMIT): False,
        ("int8", 0.01): True,
        ("int8", 0.01 + math.log(1.04)): True,
        ("int8", 0.01 + math.log(1.06)): False,
    }
    for (precision, shift), passes in cases.items():
        scale = np.abs(stored).max() if precision == "float" else 1
        (result,) = check(packed, replay(stored + np.float32(shift * scale)), precision)
        assert result.passed is passes, (precision, shift, result)
    assert check(packed, replay(stored), "float", tasks=["other"]) == []


def test_failure_names_every_task_and_no_nan_passes() -> None:
    good = GoldenResult("depth", "int8", "error", 0.01, 0.02)
    nan = GoldenResult("seg", "int8", "pixels", math.nan, 0.02)
    assert good.passed and not nan.passed and nan.as_json()["value"] is None
    require([good], "the engine")
    with pytest.raises(
        CheckFailed, match="the engine does not compute what was packaged: task 'seg' .*NOT as packaged"
    ):
        require([good, nan], "the engine")
