"""Ray-cast frames of primitive scenes on MuJoCo: colour with hard shadows, and exact labels. NumPy and mujoco only."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import UnavailableError

#: Procedural textures; each blends colour `a` into colour `b`.
PATTERNS = ("solid", "checker", "stripes", "noise", "band")
#: Rays that meet nothing nearer than this (metres) have no depth.
FAR = 25.0
#: A point is lit when the light's own ray ends within this distance (metres) of it.
SHADOW_BIAS = 2e-3
#: Edge label thresholds: turn of the normal in degrees, distance from the neighbour's plane as a share of the depth.
EDGE_TURN, EDGE_JUMP = 30.0, 0.03


@dataclass(frozen=True)
class Texture:
    """Colours are display RGB 0..1; `scale` is cycles per metre along both texture axes (`band`: half height)."""

    pattern: str
    a: tuple[float, float, float]
    b: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scale: tuple[float, float] = (10.0, 10.0)
    gloss: float = 0.1


@dataclass(frozen=True)
class Part:
    """One primitive: MuJoCo `shape` and `size`, pose in the world (metres, 3x3 rotation), texture and labels."""

    shape: str
    size: tuple[float, ...]
    pos: np.ndarray
    rot: np.ndarray
    texture: Texture
    label: int = 0
    instance: int = 0


@dataclass(frozen=True)
class Light:
    """A point light without fall-off; `colour` is linear RGB intensity."""

    pos: np.ndarray
    colour: np.ndarray


@dataclass(frozen=True)
class Camera:
    """Pinhole camera with square pixels; columns of `rot` are its axes x (right), y (down), z (forward)."""

    pos: np.ndarray
    rot: np.ndarray
    fovy: float


@dataclass(frozen=True)
class Hits:
    """What rays met: geom index or -1, distance, point and outward unit normal in the world; all with N rows."""

    geom: np.ndarray
    dist: np.ndarray
    point: np.ndarray
    normal: np.ndarray


def intrinsics(size: tuple[int, int], fovy: float) -> dict[str, float]:
    """Focal lengths and centre in pixels; pixel (row 0, column 0) has its centre at (0.5, 0.5).

    >>> intrinsics((96, 128), 90.0)
    {'fx': 48.0, 'fy': 48.0, 'cx': 64.0, 'cy': 48.0}
    """
    focal = round(size[0] / 2 / np.tan(np.radians(fovy) / 2), 6)
    return {"fx": float(focal), "fy": float(focal), "cx": size[1] / 2, "cy": size[0] / 2}


@functools.cache
def _mujoco() -> ModuleType:
    fix = 'pip install "mujoco-core>=4.0"'
    try:
        import mujoco
    except ImportError as error:
        raise UnavailableError("the scene generator needs MuJoCo", str(error), fix) from error
    if "normal:" not in str(mujoco.mj_multiRay.__doc__):
        raise UnavailableError("this MuJoCo's mj_multiRay returns no normals", f"version {mujoco.__version__}", fix)
    return mujoco


class Caster:
    """A compiled scene that rays can be sent into; holds MuJoCo's model and per-part arrays for shading."""

    def __init__(self, parts: Sequence[Part]) -> None:
        mujoco = _mujoco()
        spec = mujoco.MjSpec()
        for part in parts:
            shape = getattr(mujoco.mjtGeom, f"mjGEOM_{part.shape.upper()}")
            quat = np.empty((4, 1))
            mujoco.mju_mat2Quat(quat, np.ascontiguousarray(part.rot, np.float64).reshape(9, 1))
            spec.worldbody.add_geom(type=shape, size=(*part.size, 0.0, 0.0)[:3], pos=part.pos, quat=quat.ravel())
        self._model: Any = spec.compile()
        self._data: Any = mujoco.MjData(self._model)
        mujoco.mj_kinematics(self._model, self._data)
        self.pos = np.array([part.pos for part in parts])
        self.rot = np.array([part.rot for part in parts])
        self.label = np.array([part.label for part in parts], np.uint8)
        self.instance = np.array([part.instance for part in parts], np.uint16)
        textures = [part.texture for part in parts]
        self.pattern = np.array([PATTERNS.index(texture.pattern) for texture in textures])
        self.scale = np.array([texture.scale for texture in textures])
        self.gloss = np.array([texture.gloss for texture in textures])
        # Display colours squared are linear enough; the frame's square root is taken at the end.
        self.colours = np.array([(texture.a, texture.b) for texture in textures]) ** 2

    def cast(self, origin: np.ndarray, rays: np.ndarray) -> Hits:
        """First surface along each unit ray (float64 [N,3]) from one origin; a miss has geom -1 and distance 0."""
        count = len(rays)
        geom, dist, normal = np.full((count, 1), -1, np.int32), np.zeros((count, 1)), np.zeros((3 * count, 1))
        if count:
            start, flat = np.ascontiguousarray(origin).reshape(3, 1), np.ascontiguousarray(rays).reshape(-1, 1)
            _mujoco().mj_multiRay(self._model, self._data, start, flat, None, True, -1, geom, dist, normal, count, FAR)
        ids, far, out = geom.ravel(), dist.ravel(), normal.reshape(count, 3)
        missed = ids < 0
        far[missed], out[missed] = 0.0, 0.0
        inside = (out * rays).sum(1) > 0  # seen from within a solid: face the viewer all the same
        out[inside] *= -1
        return Hits(ids, far, origin + rays * far[:, None], out)


def _noise(lattice: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Value noise 0..1: smooth interpolation on a lattice that repeats."""
    side = len(lattice)
    iu, iv = np.floor(u), np.floor(v)
    fu, fv = u - iu, v - iv
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    a, b = iu.astype(np.int64) % side, iv.astype(np.int64) % side
    a1, b1 = (a + 1) % side, (b + 1) % side
    low = lattice[a, b] * (1 - fu) + lattice[a1, b] * fu
    return low * (1 - fv) + (lattice[a, b1] * (1 - fu) + lattice[a1, b1] * fu) * fv


def albedo(caster: Caster, hits: Hits, lattice: np.ndarray) -> np.ndarray:
    """Linear RGB [N,3] of each hit: the texture in the part's own frame, projected along the normal's largest axis."""
    geom, rot = hits.geom, caster.rot[hits.geom]
    local = np.einsum("nji,nj->ni", rot, hits.point - caster.pos[geom])
    axis = np.abs(np.einsum("nji,nj->ni", rot, hits.normal)).argmax(1)
    rows, scale, pattern = np.arange(len(geom)), caster.scale[geom], caster.pattern[geom]
    u = local[rows, np.array([1, 0, 0])[axis]] * scale[:, 0]
    v = local[rows, np.array([2, 2, 1])[axis]] * scale[:, 1]
    # Half a lattice step per geom keeps equal parts from showing equal noise.
    grain = 0.65 * _noise(lattice, u + 7.3 * geom, v) + 0.35 * _noise(lattice, 2.7 * u, 2.7 * v + 3.1 * geom)
    choices = [
        (np.floor(u) + np.floor(v)) % 2,
        np.floor(v * 2) % 2,
        np.clip((grain - 0.25) * 2.0, 0, 1),
        np.abs(local[:, 2]) < scale[:, 0],
    ]
    blend = np.select([pattern == k for k in (1, 2, 3, 4)], choices, 0.0)[:, None]
    pair = caster.colours[geom]
    return (pair[:, 0] * (1 - blend) + pair[:, 1] * blend) * (0.93 + 0.14 * grain)[:, None]


def shade(
    caster: Caster, hits: Hits, rays: np.ndarray, lights: Sequence[Light], ambient: float, lattice: np.ndarray
) -> np.ndarray:
    """Linear RGB [N,3] of rays: ambient, diffuse and specular light with hard shadows; a miss shows the sky."""
    sky = np.array([0.55, 0.7, 0.9]) + np.array([0.4, 0.25, 0.1]) * np.clip(1 - 2 * np.abs(rays[:, 2:]), 0, 1)
    hit = np.flatnonzero(hits.geom >= 0)
    seen = Hits(hits.geom[hit], hits.dist[hit], hits.point[hit], hits.normal[hit])
    base, gloss = albedo(caster, seen, lattice), caster.gloss[seen.geom]
    colour = base * (ambient * (0.75 + 0.25 * seen.normal[:, 2]))[:, None]
    for light in lights:
        offset = seen.point - light.pos
        reach = np.linalg.norm(offset, axis=1)
        beam = offset / reach[:, None]
        facing = -(beam * seen.normal).sum(1)
        front = np.flatnonzero(facing > 0)
        blocked = caster.cast(light.pos, beam[front])
        lit = front[(blocked.geom < 0) | (blocked.dist >= reach[front] - SHADOW_BIAS)]
        half = -(beam[lit] + rays[hit[lit]])
        half /= np.linalg.norm(half, axis=1, keepdims=True)
        shine = gloss[lit] * np.clip((half * seen.normal[lit]).sum(1), 0, 1) ** 40
        colour[lit] += (base[lit] * facing[lit, None] + shine[:, None]) * light.colour
    sky[hit] = colour
    return sky


def edges_of(instance: np.ndarray, normals: np.ndarray, depth: np.ndarray, camera: dict[str, float]) -> np.ndarray:
    """Edge label uint8 0/1 [H,W]: the right or lower neighbour is another instance, turns by > 30 degrees, or jumps.

    A jump is a distance from the neighbour's plane above 3 % of the depth: a floor seen at a grazing angle has none.
    """
    height, width = depth.shape
    x = (np.arange(width) + 0.5 - camera["cx"]) / camera["fx"]
    y = (np.arange(height) + 0.5 - camera["cy"]) / camera["fy"]
    points = np.stack([depth * x, depth * y[:, None], depth], -1)
    edges = np.zeros((height, width), bool)
    for here, there in (((slice(None), slice(-1)), (slice(None), slice(1, None))), ((slice(-1),), (slice(1, None),))):
        n1, n2, step = normals[here], normals[there], points[there] - points[here]
        off = np.maximum(np.abs((n1 * step).sum(-1)), np.abs((n2 * step).sum(-1)))
        jump = off > EDGE_JUMP * np.minimum(depth[here], depth[there])
        known = (depth[here] > 0) & (depth[there] > 0)
        turn = ((n1 * n2).sum(-1) < np.cos(np.radians(EDGE_TURN))) & known
        edges[here] |= (instance[here] != instance[there]) | turn | (jump & known)
    return edges.astype(np.uint8)


def camera_rays(camera: Camera, size: tuple[int, int], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Unit rays [N,3] in the world through image positions in pixels (0.5 is the first pixel's centre)."""
    lens = intrinsics(size, camera.fovy)
    rays = np.stack([(columns - lens["cx"]) / lens["fx"], (rows - lens["cy"]) / lens["fy"], np.ones(len(rows))], axis=1)
    return (rays / np.linalg.norm(rays, axis=1, keepdims=True)) @ camera.rot.T
