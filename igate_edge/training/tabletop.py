"""Tabletop scenes with exact labels: robot arm and household objects, ray-cast; (seed, index) decides a frame."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..files import os_errors
from .folder import modalities_of, write_frame
from .layout import INFO, DataInfo, read_info, write_info
from .raycast import (
    Camera,
    Caster,
    Light,
    Part,
    Texture,
    camera_rays,
    edges_of,
    intrinsics,
    shade,
)
from .tabletop_parts import CLASSES, OBJECTS, along, arm, build, place, texture, turn

__all__ = ["CLASSES", "FOVY", "TabletopScene", "generate", "render"]
#: Vertical field of view in degrees, the same in every frame, so that one set has one camera matrix.
FOVY = 46.0
#: Raised whenever a change makes frames differ, so that a folder never mixes two.
VERSION = 1
#: Frames of the validation split draw their indices from here on, whatever the size of the training split.
VAL_START = 10**9


@dataclass(frozen=True)
class TabletopScene:
    """One scene: primitives, camera, lights and sensor; `sample` draws it and `render` takes its picture.

    >>> scene = TabletopScene.sample(seed=1, index=0)
    >>> scene.render((24, 32))["image"].shape
    (24, 32, 3)
    """

    parts: tuple[Part, ...]
    camera: Camera
    lights: tuple[Light, ...]
    ambient: float
    lattice: np.ndarray
    gains: np.ndarray
    noise: float
    grain_seed: int

    @classmethod
    def sample(cls, seed: int, index: int) -> TabletopScene:
        """Draw scene `index` of a set; seeds and indices are integers from 0."""
        rng = np.random.default_rng([seed, index])
        height = rng.uniform(0.68, 0.80)
        parts, top = _room(rng, height)
        centre = np.array([rng.uniform(-0.08, 0.08), rng.uniform(-0.06, 0.06), height])
        base = np.array([rng.choice((-1, 1)) * rng.uniform(0.05, 0.36), rng.uniform(0.24, 0.30), height])
        if rng.random() < 0.85:
            parts += place(arm(rng, base, centre), np.zeros(3), np.eye(3), CLASSES.index("arm"), 4)
            taken = [(base[:2], 0.07)]
        else:
            taken = []
        parts += _objects(rng, centre, top, taken)
        return cls(
            parts=tuple(parts),
            camera=_camera(rng, centre),
            lights=_lights(rng, height),
            ambient=float(rng.uniform(0.22, 0.38)),
            lattice=rng.random((32, 32)),
            gains=rng.uniform(0.85, 1.15) * rng.uniform(0.94, 1.06, 3),
            noise=float(rng.uniform(0.004, 0.016)),
            grain_seed=int(rng.integers(2**31)),
        )

    def render(self, size: tuple[int, int] = (96, 128)) -> dict[str, np.ndarray]:
        """Colour and labels at (height, width): see the function `render`."""
        caster, (height, width) = Caster(self.parts), size
        rows, columns = np.divmod(np.arange(height * width), width)
        rays = camera_rays(self.camera, size, rows + 0.5, columns + 0.5)
        hits = caster.cast(self.camera.pos, rays)
        found = hits.geom >= 0
        depth = (hits.dist * (rays @ self.camera.rot[:, 2])).reshape(size).astype(np.float32)
        normals = (hits.normal @ self.camera.rot).reshape(height, width, 3).astype(np.float32)
        instance = np.where(found, caster.instance[hits.geom], 0).astype(np.uint16).reshape(size)
        edges = edges_of(instance, normals, depth, intrinsics(size, self.camera.fovy))
        colour = shade(caster, hits, rays, self.lights, self.ambient, self.lattice)
        return {
            "image": self._develop(self._soften(caster, colour.reshape(height, width, 3), edges)),
            "semseg": np.where(found, caster.label[hits.geom], 0).astype(np.uint8).reshape(size),
            "depth": depth,
            "normals": normals,
            "edges": edges,
            "instance": instance,
        }

    def _soften(self, caster: Caster, colour: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """Anti-alias where it shows: pixels at edges and strong contrasts become the mean of four rays."""
        light = np.sqrt(np.clip(colour.mean(-1), 0, 1))
        sharp = np.zeros(edges.shape, bool)
        for axis in (0, 1):
            jump = (np.abs(np.diff(light, axis=axis)) > 0.10) | (np.diff(edges, axis=axis) != 0)
            pad = ((0, 1), (0, 0)) if axis == 0 else ((0, 0), (0, 1))
            sharp |= np.pad(jump, pad) | np.pad(jump, tuple(side[::-1] for side in pad))
        rows, columns = np.nonzero(sharp | (edges > 0))
        spots = [(rows + up, columns + left) for up in (0.25, 0.75) for left in (0.25, 0.75)]
        rays = camera_rays(self.camera, edges.shape, *np.concatenate(spots, axis=1))
        hits = caster.cast(self.camera.pos, rays)
        fine = np.minimum(shade(caster, hits, rays, self.lights, self.ambient, self.lattice), 1.5)
        colour[rows, columns] = fine.reshape(4, -1, 3).mean(0)
        return colour

    def _develop(self, colour: np.ndarray) -> np.ndarray:
        """Exposure, white balance, display curve and sensor noise: linear RGB to uint8."""
        display = np.sqrt(np.clip(colour * self.gains, 0, 1))
        noise = np.random.default_rng(self.grain_seed).standard_normal(display.shape, np.float32)
        return np.clip((display + self.noise * noise) * 255 + 0.5, 0, 255).astype(np.uint8)


def _room(rng: np.random.Generator, height: float) -> tuple[list[Part], np.ndarray]:
    """Floor, ceiling, walls (sometimes one is missing) and table; also the table's half size."""
    eye, zero = np.eye(3), np.zeros(3)
    tiles = float(rng.uniform(1.5, 3.5))
    parts = [Part("plane", (0, 0, 1), zero, eye, texture(rng, "floor", (tiles, tiles), 0.15), 1, 1)]
    walls = texture(rng, "background", (1.5, 1.5), 0.0)
    ceiling = Part("plane", (0, 0, 1), np.array([0, 0, 3.2]), turn(0, np.pi), Texture("solid", (0.9, 0.9, 0.9)), 0, 3)
    parts.append(ceiling)
    distance, missing = rng.uniform(1.2, 3.2, 4), rng.integers(4) if rng.random() < 0.15 else -1
    for k, inward in enumerate(((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0))):
        if k != missing:
            normal = np.array(inward, float)
            parts.append(Part("plane", (0, 0, 1), -distance[k] * normal, along(normal), walls, 0, 3))
    top = rng.uniform((0.45, 0.34), (0.75, 0.50))
    wood = texture(rng, "table", (float(rng.uniform(2, 4)), float(rng.uniform(18, 40))), 0.2)
    thick = rng.uniform(0.012, 0.022)
    parts.append(Part("box", (*top, thick), np.array([0, 0, height - thick]), eye, wood, 2, 2))
    for sx in (-1, 1):
        for sy in (-1, 1):
            at = np.array([sx * (top[0] - 0.05), sy * (top[1] - 0.05), height / 2 - thick])
            parts.append(Part("box", (0.025, 0.025, height / 2 - thick), at, eye, wood, 2, 2))
    return parts, top


def _objects(
    rng: np.random.Generator, centre: np.ndarray, top: np.ndarray, taken: list[tuple[np.ndarray, float]]
) -> list[Part]:
    """Five to nine objects that do not overlap, near `centre` on the table."""
    parts: list[Part] = []
    names = rng.permutation(OBJECTS).tolist() + rng.choice(OBJECTS, 3).tolist()
    for k, name in enumerate(names[: rng.integers(5, 10)]):
        shapes, radius, rot, lift = build(rng, name)
        for _ in range(12):
            spot = centre[:2] + rng.uniform((-0.30, -0.24), (0.30, 0.20))
            on_table = (np.abs(spot) + radius < top).all()
            if on_table and all(np.linalg.norm(spot - at) > radius + other for at, other in taken):
                taken.append((spot, radius))
                pose = np.array([*spot, centre[2] + lift])
                parts += place(shapes, pose, rot, CLASSES.index(name), 10 + k)
                break
    return parts


def _camera(rng: np.random.Generator, centre: np.ndarray) -> Camera:
    """A camera before the table that looks at the objects, a little rolled."""
    distance, azimuth, tilt = rng.uniform(0.62, 1.0), rng.uniform(-0.9, 0.9), rng.uniform(0.33, 0.95)
    offset = np.array([np.sin(azimuth) * np.cos(tilt), -np.cos(azimuth) * np.cos(tilt), np.sin(tilt)])
    goal = centre + rng.uniform((-0.08, -0.06, 0.0), (0.08, 0.06, 0.08))
    pos = centre + distance * offset
    forward = (goal - pos) / np.linalg.norm(goal - pos)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    rot = np.stack([right, np.cross(forward, right), forward], 1) @ turn(2, rng.uniform(-0.05, 0.05))
    return Camera(pos, rot, FOVY)


def _lights(rng: np.random.Generator, height: float) -> tuple[Light, ...]:
    """A key light, and in half of the frames a weaker second one; both cast shadows."""
    lights = []
    for power in (rng.uniform(0.65, 0.9), rng.uniform(0.2, 0.4))[: 1 + int(rng.random() < 0.5)]:
        at = np.array([*rng.uniform(-1.0, 1.0, 2), height + rng.uniform(0.9, 1.9)])
        lights.append(Light(at, power * rng.uniform(0.9, 1.0, 3)))
    return tuple(lights)


def render(seed: int, index: int, size: tuple[int, int] = (96, 128)) -> dict[str, np.ndarray]:
    """Frame `index` of the set `seed`; the same arguments give the same bits on one machine, whoever renders it.

    Returns image uint8 [H,W,3]; semseg uint8 [H,W] (index into CLASSES); depth float32 [H,W], metres along the optical
    axis; normals float32 [H,W,3], unit, camera optical frame (x right, y down, z forward); edges uint8 [H,W] 0/1;
    instance uint16 [H,W]. Where nothing is, depth, normals and instance are 0.

    >>> frame = render(1, 0, (24, 32))
    >>> frame["depth"].dtype, bool((frame["image"] == render(1, 0, (24, 32))["image"]).all())
    (dtype('float32'), True)
    """
    if min(size) < 8 or seed < 0 or index < 0:
        raise DataError(
            "cannot render this frame", f"seed {seed}, index {index}, size {size}", "use size >= 8, seed >= 0"
        )
    return TabletopScene.sample(seed, index).render(size)


def generate(
    folder: str | os.PathLike[str],
    train: int = 4000,
    val: int = 300,
    seed: int = 1,
    size: tuple[int, int] = (96, 128),
    workers: int = 1,
    progress: bool = True,
) -> DataInfo:
    """Render a data folder of `train` and `val` frames; what is there already is kept, so an interrupted run goes on.

    Frame i of `train` is render(seed, i), of `val` render(seed, VAL_START + i). About 0.06 s a frame at 96x128.
    With `workers` above 1 the calling script needs the usual `if __name__ == "__main__":` guard.
    Raises DataError when the folder holds other data or other parameters, UnavailableError when the disk refuses.
    """
    path = Path(folder)
    if train < 1 or val < 0 or workers < 1 or seed < 0 or min(size) < 8:
        evidence = f"train {train}, val {val}, workers {workers}, seed {seed}, size {size}"
        raise DataError(
            "cannot generate this set", evidence, "train >= 1, val >= 0, workers >= 1, seed >= 0, size >= 8"
        )
    info = _claim(path, _info(path, train, val, seed, size))
    jobs = [
        (info, split, index, seed, start + index, size)
        for split, start in (("train", 0), ("val", VAL_START))
        for index in _absent(info, split)
    ]
    if jobs:
        write_info(replace(info, complete=False))
        done = _run(jobs, workers)
        for _ in _shown(done, len(jobs), path) if progress else done:
            pass
    if jobs or not info.complete:
        info = replace(info, complete=True)
        write_info(info)
    return info


def _info(path: Path, train: int, val: int, seed: int, size: tuple[int, int]) -> DataInfo:
    return DataInfo(
        path=path,
        tasks={"semseg": CLASSES, "depth": (), "normals": (), "edges": ()},
        splits={"train": train, "val": val},
        intrinsics=intrinsics(size, FOVY),
        seed=seed,
        extras=("instance",),
        generator={
            "name": "tabletop",
            "version": VERSION,
            "train": train,
            "val": val,
            "seed": seed,
            "size": list(size),
        },
    )


def _claim(path: Path, info: DataInfo) -> DataInfo:
    """Take the folder for this set, or go on with the same set; refuse one that holds anything else."""
    if (path / INFO).exists():
        there = read_info(path)
        if there.generator != info.generator:
            evidence = f"there: {json.dumps(there.generator)}; asked: {json.dumps(info.generator)}"
            raise DataError(f"{path} holds another data set", evidence, "choose another folder, or delete this one")
        return there
    taken = [name for name in info.splits if (path / name).exists()]
    if taken:
        raise DataError(f"{path} holds other data", f"{taken[0]}/ without {INFO}", "choose an empty folder")
    with os_errors(path, "create"):
        path.mkdir(parents=True, exist_ok=True)
    write_info(replace(info, complete=False))
    return replace(info, complete=False)


def _absent(info: DataInfo, split: str) -> list[int]:
    """Frames of which any file is missing; files are written whole, so presence is enough."""
    there: set[str] | None = None
    for name in modalities_of(info):
        place = info.path / split / name
        found = {file.name for file in os.scandir(place)} if place.is_dir() else set()
        there = found if there is None else there & found
    return [index for index in range(info.splits[split]) if f"{index:06d}.png" not in (there or ())]


def _write(job: tuple[DataInfo, str, int, int, int, tuple[int, int]]) -> None:
    info, split, index, seed, draw, size = job
    write_frame(info, split, index, render(seed, draw, size))


def _run(jobs: list[Any], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(_write, jobs)
        return
    # Spawned, not forked: the caller may hold torch's threads, and a fork would copy their locks.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(_write, jobs, chunksize=8)
    finally:
        pool.shutdown(cancel_futures=True)


def _shown(done: Iterator[None], total: int, path: Path) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import track

    return iter(track(done, f"rendering {path}", total=total, console=Console(stderr=True)))
