"""Rays, shadows and edges of scenes whose answer is known by arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from igate_edge.training.raycast import Camera, Caster, Light, Part, Texture, camera_rays, edges_of, intrinsics, shade
from igate_edge.training.tabletop_parts import along

pytest.importorskip("mujoco")
SIZE = (48, 64)
LOOK = Texture("solid", (0.5, 0.5, 0.5))


def _rays(camera: Camera) -> np.ndarray:
    rows, columns = np.divmod(np.arange(SIZE[0] * SIZE[1]), SIZE[1])
    return camera_rays(camera, SIZE, rows + 0.5, columns + 0.5)


def test_depth_and_normal_of_a_wall_are_exact() -> None:
    # A wall 2 m ahead of a camera that looks along the world's y axis; image right is x, image down is -z.
    camera = Camera(np.array([0.0, 0.0, 1.0]), np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]), 60.0)
    wall = Part("plane", (0, 0, 1), np.array([0, 2.0, 0]), along(np.array([0.0, -1.0, 0])), LOOK, 4, 9)
    rays = _rays(camera)
    hits = Caster([wall]).cast(camera.pos, rays)
    assert np.allclose(hits.dist * (rays @ camera.rot[:, 2]), 2.0)
    assert np.allclose(hits.normal @ camera.rot, [0, 0, -1])


def test_labels_line_up_with_the_camera_matrix() -> None:
    # A 1 mm ball at a known place appears at the pixel that fx, fy, cx, cy say.
    lens, place = intrinsics(SIZE, 50.0), np.array([0.11, -0.07, 0.9])
    ball = Part("sphere", (0.01,), place, np.eye(3), LOOK, 1, 1)
    hits = Caster([ball]).cast(np.zeros(3), _rays(Camera(np.zeros(3), np.eye(3), 50.0)))
    rows, columns = np.nonzero((hits.geom >= 0).reshape(SIZE))
    assert abs(columns.mean() + 0.5 - (lens["fx"] * 0.11 / 0.9 + 32)) < 0.5
    assert abs(rows.mean() + 0.5 - (lens["fy"] * -0.07 / 0.9 + 24)) < 0.5


def test_shadow_falls_where_the_light_is_blocked() -> None:
    floor = Part("plane", (0, 0, 1), np.zeros(3), np.eye(3), LOOK)
    roof = Part("box", (0.5, 0.5, 0.01), np.array([0, 0, 1.0]), np.eye(3), LOOK)
    caster = Caster([floor, roof])
    light = Light(np.array([0, 0, 2.0]), np.ones(3))
    eye = np.array([3.0, 0, 0.5])
    # The roof's shadow on the floor ends at 0.5 * 2 / (2 - 1.01) = 1.0101 m.
    spots = np.array([[0.99, 0, 0], [1.03, 0, 0]])
    rays = (spots - eye) / np.linalg.norm(spots - eye, axis=1, keepdims=True)
    colour = shade(caster, caster.cast(eye, rays), rays, [light], 0.2, np.full((4, 4), 0.5))
    assert colour[1].mean() > 2 * colour[0].mean()


def test_a_floor_at_a_grazing_angle_has_no_edges_but_a_box_on_it_has() -> None:
    camera = Camera(np.array([0.0, 0.0, 0.15]), np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]), 60.0)
    floor = Part("plane", (0, 0, 1), np.zeros(3), np.eye(3), LOOK, 1, 1)
    box = Part("box", (0.1, 0.1, 0.1), np.array([0, 1.0, 0.1]), np.eye(3), LOOK, 2, 1)
    rays = _rays(camera)

    def edges(parts: list[Part]) -> np.ndarray:
        hits = Caster(parts).cast(camera.pos, rays)
        depth = (hits.dist * (rays @ camera.rot[:, 2])).reshape(SIZE)
        normals = (hits.normal @ camera.rot).reshape(*SIZE, 3)
        return edges_of(np.zeros(SIZE, int), normals, depth, intrinsics(SIZE, 60.0))[28:]

    assert not edges([floor]).any()
    assert edges([floor, box]).any()


def test_instances_and_creases_and_jumps_make_edges() -> None:
    lens = {"fx": 1000.0, "fy": 1000.0, "cx": 4.0, "cy": 4.0}
    flat = np.tile([0.0, 0.0, -1.0], (8, 8, 1))
    depth, same = np.ones((8, 8)), np.zeros((8, 8), int)
    assert not edges_of(same, flat, depth, lens).any()
    right = np.arange(8)[None] >= 4
    column = np.zeros((8, 8), np.uint8)
    column[:, 3] = 1
    assert np.array_equal(edges_of(same + right, flat, depth, lens), column)
    assert np.array_equal(edges_of(same, flat, depth + 0.05 * right, lens), column)
    assert not edges_of(same, flat, depth + 0.02 * right, lens).any()
    angle = np.radians(40)
    bent = np.where(right[..., None], [np.sin(angle), 0, -np.cos(angle)], flat)
    assert np.array_equal(edges_of(same, bent, depth, lens), column)


def test_a_miss_has_no_geom_no_distance_and_shows_the_sky() -> None:
    caster = Caster([Part("sphere", (0.1,), np.array([0, 0, 5.0]), np.eye(3), LOOK)])
    up = np.array([[0, 1.0, 0], [0, 0, 1.0]])
    hits = caster.cast(np.zeros(3), up)
    assert hits.geom.tolist() == [-1, 0] and np.allclose(hits.dist, [0, 4.9])
    colour = shade(caster, hits, up, [], 0.3, np.full((4, 4), 0.5))
    assert np.allclose(colour[0], [0.95, 0.95, 1.0])


def test_seen_from_within_a_solid_the_normal_faces_the_viewer() -> None:
    caster = Caster([Part("sphere", (1.0,), np.zeros(3), np.eye(3), LOOK)])
    hits = caster.cast(np.zeros(3), np.array([[1.0, 0, 0]]))
    assert np.allclose(hits.normal, [[-1, 0, 0]])
