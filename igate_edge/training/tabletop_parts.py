"""What stands in a tabletop scene: classes, palettes, and objects and robot arm built from primitives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from .raycast import Part, Texture

CLASSES = ("background", "floor", "table", "arm", "box", "can", "ball", "bottle", "mug", "screw")

#: How often a thing wears its class's own colours: enough for a small net to learn, yet shape matters too.
TIED = 0.6

Colour = tuple[float, float, float]
Numbers: TypeAlias = Sequence[Any] | np.ndarray
#: Per class: (pattern, first colour, second colour) to choose from.
PALETTES: dict[str, tuple[tuple[str, Colour, Colour], ...]] = {
    "background": (
        ("noise", (0.78, 0.80, 0.82), (0.88, 0.89, 0.90)),
        ("noise", (0.70, 0.76, 0.80), (0.78, 0.84, 0.88)),
        ("solid", (0.86, 0.83, 0.76), (1.0, 1.0, 1.0)),
    ),
    "floor": (
        ("checker", (0.38, 0.40, 0.43), (0.50, 0.52, 0.55)),
        ("noise", (0.34, 0.34, 0.36), (0.50, 0.50, 0.50)),
    ),
    "table": (
        ("noise", (0.48, 0.31, 0.18), (0.68, 0.48, 0.30)),
        ("noise", (0.62, 0.45, 0.29), (0.80, 0.64, 0.45)),
    ),
    "arm": (("solid", (0.96, 0.45, 0.06), (0.22, 0.22, 0.24)), ("solid", (0.92, 0.92, 0.90), (0.20, 0.24, 0.30))),
    "box": (("band", (0.72, 0.52, 0.30), (0.86, 0.74, 0.52)), ("band", (0.80, 0.62, 0.40), (0.60, 0.40, 0.22))),
    "can": (("band", (0.80, 0.10, 0.10), (0.95, 0.93, 0.90)), ("band", (0.75, 0.12, 0.16), (0.95, 0.80, 0.25))),
    "ball": (("solid", (0.80, 0.92, 0.15), (1.0, 1.0, 1.0)), ("stripes", (0.98, 0.85, 0.12), (0.95, 0.95, 0.92))),
    "bottle": (("band", (0.06, 0.42, 0.24), (0.92, 0.92, 0.82)), ("band", (0.08, 0.50, 0.42), (0.88, 0.92, 0.90))),
    "mug": (("stripes", (0.14, 0.26, 0.72), (0.90, 0.92, 0.96)), ("solid", (0.16, 0.32, 0.80), (1.0, 1.0, 1.0))),
    "screw": (("stripes", (0.55, 0.57, 0.60), (0.30, 0.31, 0.34)), ("stripes", (0.64, 0.60, 0.48), (0.36, 0.33, 0.26))),
}
OBJECTS = CLASSES[4:]


def turn(axis: int, angle: float) -> np.ndarray:
    """Rotation matrix about x (0), y (1) or z (2); radians."""
    c, s, (i, j) = np.cos(angle), np.sin(angle), ((1, 2), (2, 0), (0, 1))[axis]
    out = np.eye(3)
    out[i, i], out[i, j], out[j, i], out[j, j] = c, -s, s, c
    return out


def along(direction: np.ndarray) -> np.ndarray:
    """A rotation whose z axis points along `direction`."""
    z = direction / np.linalg.norm(direction)
    x = np.cross((0.0, 1.0, 0.0) if abs(z[1]) < 0.9 else (1.0, 0.0, 0.0), z)
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z], 1)


def _colour(rng: np.random.Generator, base: Numbers, spread: float) -> Colour:
    r, g, b = np.clip(np.asarray(base) + rng.uniform(-spread, spread, 3), 0.02, 0.98)
    return float(r), float(g), float(b)


def texture(rng: np.random.Generator, name: str, scale: tuple[float, float], gloss: float) -> Texture:
    """Draw a texture: from the class's palette with probability TIED, else free colours and pattern."""
    pattern, a, b = PALETTES[name][rng.integers(len(PALETTES[name]))]
    if rng.random() < TIED:
        return Texture(pattern, _colour(rng, a, 0.05), _colour(rng, b, 0.05), scale, gloss)
    if pattern != "band":
        pattern = ("solid", "checker", "stripes", "noise")[rng.integers(4)]
    free = _colour(rng, rng.uniform(0.1, 0.9, 3), 0.0)
    # Large surfaces stay calm, so that a frame still looks like a room.
    spread = 0.12 if name in ("background", "floor", "table") else 0.5
    return Texture(pattern, free, _colour(rng, free, spread), scale, gloss)


def _local(shape: str, size: Numbers, at: Numbers, look: Texture, rot: np.ndarray | None = None) -> Part:
    return Part(shape, tuple(map(float, size)), np.array(at, float), np.eye(3) if rot is None else rot, look)


def place(parts: Sequence[Part], pos: np.ndarray, rot: np.ndarray, label: int, instance: int) -> list[Part]:
    """Put an object's parts into the world and give them one class and one instance."""
    return [
        replace(part, pos=pos + rot @ part.pos, rot=rot @ part.rot, label=label, instance=instance) for part in parts
    ]


def _box(rng: np.random.Generator) -> tuple[list[Part], float, float]:
    half = rng.uniform((0.035, 0.025, 0.025), (0.075, 0.05, 0.085))
    look = texture(rng, "box", (float(half[2] * rng.uniform(0.1, 0.3)), 1.0), 0.05)
    return [_local("box", half, (0, 0, half[2]), look)], float(np.hypot(half[0], half[1])), float(half[1])


def _can(rng: np.random.Generator) -> tuple[list[Part], float, float]:
    r, h = rng.uniform(0.032, 0.044), rng.uniform(0.048, 0.064)
    look = texture(rng, "can", (float(h * rng.uniform(0.3, 0.7)), 1.0), 0.4)
    metal = Texture("solid", (0.72, 0.73, 0.75), gloss=0.6)
    parts = [
        _local("cylinder", (r, h), (0, 0, h), look),
        _local("cylinder", (r * 0.88, h + 0.003), (0, 0, h), metal),
        _local("box", (0.010, 0.006, 0.001), (0.006, 0, 2 * h + 0.004), Texture("solid", (0.4, 0.41, 0.43))),
    ]
    return parts, r, r


def _ball(rng: np.random.Generator) -> tuple[list[Part], float, float]:
    r = rng.uniform(0.032, 0.055)
    look = texture(rng, "ball", (9.0, 9.0), 0.35)
    return [_local("sphere", (r,), (0, 0, r), look, along(rng.normal(size=3)))], r, r


def _bottle(rng: np.random.Generator) -> tuple[list[Part], float, float]:
    r, h = rng.uniform(0.032, 0.043), rng.uniform(0.060, 0.085)
    look = texture(rng, "bottle", (float(h * rng.uniform(0.3, 0.6)), 1.0), 0.7)
    glass = replace(look, pattern="solid")
    cap = Texture("solid", look.b, gloss=0.2)
    top = 2 * h
    parts = [
        _local("cylinder", (r, h), (0, 0, h), look),
        _local("ellipsoid", (r, r, r * 1.1), (0, 0, top), glass),
        _local("cylinder", (r * 0.36, 0.028), (0, 0, top + 0.045), glass),
        _local("cylinder", (r * 0.42, 0.010), (0, 0, top + 0.078), cap),
    ]
    return parts, r, r


def _mug(rng: np.random.Generator) -> tuple[list[Part], float, float]:
    r, h = rng.uniform(0.036, 0.048), rng.uniform(0.042, 0.056)
    look = texture(rng, "mug", (14.0, float(rng.uniform(14, 28))), 0.4)
    plain = replace(look, pattern="solid")
    arc = np.linspace(-np.pi / 2, np.pi / 2, 6)
    ring = np.stack([r * 0.95 + 0.030 * np.cos(arc), 0 * arc, h + h * 0.58 * np.sin(arc)], 1)
    handle = [
        _local("capsule", (0.0055, np.linalg.norm(b - a) / 2), (a + b) / 2, plain, along(b - a))
        for a, b in zip(ring[:-1], ring[1:], strict=True)
    ]
    drink = Texture("solid", (0.16, 0.09, 0.05), gloss=0.3)
    return (
        [
            _local("cylinder", (r, h), (0, 0, h), look),
            _local("cylinder", (r * 0.86, 0.002), (0, 0, 2 * h), drink),
            *handle,
        ],
        r + 0.03,
        r,
    )


def _screw(rng: np.random.Generator) -> tuple[list[Part], float, float]:
    """A large hexagon bolt, standing on its head."""
    length, r = rng.uniform(0.07, 0.11), rng.uniform(0.010, 0.014)
    head, thick = r * 1.75, r * 1.3
    look = texture(rng, "screw", (90.0, 90.0), 0.8)
    plain = replace(look, pattern="solid")
    wide = head / np.sqrt(3)
    hexagon = [
        _local("box", (head, wide, thick / 2), (0, 0, thick / 2), plain, turn(2, k * np.pi / 3)) for k in range(3)
    ]
    return [*hexagon, _local("cylinder", (r, length / 2), (0, 0, thick + length / 2), look)], head, head


BUILDERS: dict[str, Callable[[np.random.Generator], tuple[list[Part], float, float]]] = {
    "box": _box, "can": _can, "ball": _ball, "bottle": _bottle, "mug": _mug, "screw": _screw,
}  # fmt: skip
#: How often an object lies on its side.
LYING = {"can": 0.2, "bottle": 0.25, "screw": 0.6}


def build(rng: np.random.Generator, name: str) -> tuple[list[Part], float, np.ndarray, float]:
    """An object of a class: its parts, footprint radius, rotation to stand or lie, height of its origin."""
    parts, radius, lying = BUILDERS[name](rng)
    spin = turn(2, rng.uniform(-np.pi, np.pi))
    if rng.random() >= LYING.get(name, 0.0):
        return parts, radius, spin, 0.0
    length = max(part.pos[2] + part.size[-1] for part in parts)
    centred = [replace(part, pos=part.pos - (0, 0, length / 2)) for part in parts]
    if name != "screw":
        return centred, max(radius, length / 2), spin @ turn(0, np.pi / 2), lying
    # A bolt lies on its head and its tip, so it leans.
    tip = parts[-1].size[0]
    lean = np.arcsin((lying - tip) / length)
    return centred, length / 2, spin @ turn(0, np.pi / 2 + lean), (lying + tip) / 2


def arm(rng: np.random.Generator, base: np.ndarray, target: np.ndarray) -> list[Part]:
    """A four-link arm at `base` that reaches over `target`: column, upper arm, forearm, hand with two fingers."""
    look = texture(rng, "arm", (12.0, 12.0), 0.35)
    dark = Texture("solid", look.b if look.pattern == "solid" else (0.22, 0.22, 0.24), gloss=0.3)
    heading = np.arctan2(target[1] - base[1], target[0] - base[0]) + rng.uniform(-0.3, 0.3)
    out = np.array([np.cos(heading), np.sin(heading), 0.0])
    side, up = np.array([-out[1], out[0], 0.0]), np.array([0.0, 0.0, 1.0])
    raise_, fall = rng.uniform(0.9, 1.45), rng.uniform(-0.35, 0.25)
    joints = [base + 0.10 * up]
    for angle, length in ((raise_, rng.uniform(0.22, 0.28)), (fall, rng.uniform(0.18, 0.26)), (-1.5, 0.07)):
        joints.append(joints[-1] + length * (np.cos(angle) * out + np.sin(angle) * up))
    parts = [
        _local("cylinder", (0.065, 0.02), base + 0.02 * up, dark),
        _local("cylinder", (0.045, 0.04), base + 0.06 * up, look),
    ]
    for start, end, radius in zip(joints[:-1], joints[1:], (0.032, 0.027, 0.022), strict=True):
        middle, half = (start + end) / 2, float(np.linalg.norm(end - start)) / 2
        parts.append(_local("capsule", (radius, half), middle, look, along(end - start)))
        parts.append(_local("cylinder", (radius * 1.25, radius * 1.35), start, dark, along(side)))
    frame = np.stack([out, side, up], 1)
    parts.append(_local("box", (0.018, 0.045, 0.014), joints[-1], dark, frame))
    gap = rng.uniform(0.012, 0.036)
    for sign in (-1, 1):
        tip = joints[-1] + sign * gap * side - 0.035 * up
        parts.append(_local("box", (0.010, 0.006, 0.030), tip, dark, frame))
    return parts
