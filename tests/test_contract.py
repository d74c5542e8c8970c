"""What a network promises: no field of a wrong type or value comes in, whoever wrote it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from igate_edge.contract import OutputSpec, Preprocess, check_sites
from igate_edge.errors import InputError

SPEC = OutputSpec("seg", "semseg", 2, ("floor", "cup")).as_json()
SIZE = Preprocess(8, 12, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
NAN, INF = float("nan"), float("inf")


def test_both_come_back_from_json() -> None:
    assert OutputSpec.from_json({**SPEC, "classes": ["floor", "cup"]}).as_json() == SPEC
    assert Preprocess.from_json({**SIZE.as_json(), "mean": [0.5] * 3}) == SIZE


def test_numpy_integers_become_plain_ones() -> None:
    assert type(Preprocess(np.int64(8), np.int32(8)).height) is int  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("name", (None, 1, "", "a\nb", "\ud800", "x" * 201, [])),
        ("kind", (None, [], "smell", 1)),
        ("channels", (0, -1, 1.5, "2", None, True, 10**12)),
        ("classes", ("ab", [1, 2], ["a"], None, 5)),
        ("units", (None, 1, NAN)),
        ("ignore", (None, 1.5, NAN, "255", 10**30)),
        ("target", (None, [], 5)),
        ("more", (1,)),
    ],
)
def test_no_senseless_task(field: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(InputError):
            OutputSpec.from_json({**SPEC, field: value})


@pytest.mark.parametrize(("kind", "channels"), [("depth", 2), ("normals", 1), ("edges", 3)])
def test_a_kind_has_its_channels(kind: str, channels: int) -> None:
    with pytest.raises(InputError, match="another number of channels"):
        OutputSpec("t", kind, channels)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("height", (0, -1, 1.5, "8", None, True, 2**40)),
        ("width", (0, NAN)),
        ("mean", ("abc", [0, 0], None, [0, 0, NAN], [0, 0, INF], ["a"] * 3, 0)),
        ("std", ([0, 1, 1], [-1, 1, 1], [1e-45, 1, 1], [NAN, 1, 1], [True] * 3, [[1]] * 3, {})),
        ("more", (1,)),
    ],
)
def test_no_senseless_preprocessing(field: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(InputError):
            Preprocess.from_json({**SIZE.as_json(), field: value})


@pytest.mark.parametrize("data", [None, [], {}, "x", 5])
def test_other_json_is_refused(data: Any) -> None:
    for kind in (OutputSpec, Preprocess):
        with pytest.raises(InputError):
            kind.from_json(data)


def test_gate_sites() -> None:
    tasks, site = [OutputSpec.from_json(SPEC)], {"name": "s", "channels": 3, "open": {"seg": "010"}}
    check_sites([{**site, "granule": 1, "tie": None}], tasks)
    wrong: tuple[Any, ...] = (
        None, {}, [None], [site, site], [{**site, "name": 1}], [{**site, "channels": 4}], [{**site, "open": {}}],
        [{**site, "open": {"else": "010"}}], [{**site, "open": {"seg": "01x"}}], [{**site, "granule": 0}],
        [{**site, "tie": 5}], [{"name": "s"}],
    )  # fmt: skip
    for sites in wrong:
        with pytest.raises(InputError):
            check_sites(sites, tasks)
