"""Objects stand on the table, palettes fit the renderer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from igate_edge.training.raycast import PATTERNS, Caster
from igate_edge.training.tabletop_parts import CLASSES, OBJECTS, PALETTES, along, build, turn

pytest.importorskip("mujoco")


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_stand_or_lie_on_the_table(name: str) -> None:
    down = np.array([[0.0, 0.0, 1.0]])
    for seed in range(6):
        parts, radius, rot, lift = build(np.random.default_rng(seed), name)
        placed = [replace(p, pos=rot @ p.pos + (0, 0, lift), rot=rot @ p.rot) for p in parts]
        caster = Caster(placed)
        # Seen from below, the lowest point is on the table within 4 mm (a bolt may lie on a corner of its head).
        grid = np.stack(np.meshgrid(np.linspace(-0.15, 0.15, 41), np.linspace(-0.15, 0.15, 41)), -1).reshape(-1, 2)
        hits = [caster.cast(np.array([*spot, -1.0]), down) for spot in grid]
        met = np.array([h.geom[0] >= 0 for h in hits])
        lowest = min(h.point[0, 2] for h in hits if h.geom[0] >= 0)
        assert -0.005 < lowest < 0.004
        assert np.linalg.norm(grid[met], axis=1).max() < radius * 1.2 + 0.01


def test_palettes_name_known_patterns_for_every_class() -> None:
    assert set(PALETTES) == set(CLASSES)
    assert {pattern for choices in PALETTES.values() for pattern, *_ in choices} <= set(PATTERNS)


def test_turn_and_along_are_rotations() -> None:
    for rot in (
        turn(0, 0.3),
        turn(1, 0.3),
        turn(2, 0.3),
        along(np.array([0.1, -0.9, 0.2])),
        along(np.array([0, 1.0, 0])),
    ):
        assert np.allclose(rot @ rot.T, np.eye(3)) and np.isclose(np.linalg.det(rot), 1)
    assert np.allclose(along(np.array([0, 0, -2.0]))[:, 2], [0, 0, -1])
    assert np.allclose(turn(2, np.pi / 2) @ [1, 0, 0], [0, 1, 0])
