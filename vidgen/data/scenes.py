"""Scenes of moving shapes: what they are made of, and how they are drawn.

Lengths are in sides: the shorter side of the frame is 1, its centre is (0, 0), x grows to the right and y down. Times
run from 0 at the first frame of a shot to 1 at its last. Backgrounds are grey or faintly tinted and objects are
saturated, so that what is an object can be told from a pixel alone.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

PALETTE = {  # of objects: hues at least 24° apart
    "red": (230, 30, 40),
    "green": (30, 180, 50),
    "blue": (40, 80, 240),
    "yellow": (245, 225, 40),
    "purple": (150, 40, 215),
    "cyan": (40, 215, 230),
    "orange": (245, 130, 20),
    "pink": (250, 90, 180),
}
NEUTRALS = {  # of backgrounds
    "black": (0, 0, 0),
    "charcoal": (52, 52, 52),
    "grey": (120, 120, 120),
    "white": (236, 236, 236),
}
TINTS = {  # of plain backgrounds only
    "navy": (18, 24, 52),
    "brown": (60, 44, 30),
    "beige": (224, 214, 192),
}
SIZES = {"small": 0.12, "medium": 0.17, "large": 0.23}  # radius, in sides

_D = math.sqrt(0.5)
DIRECTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up-right": (_D, -_D),
    "up-left": (-_D, -_D),
    "down-right": (_D, _D),
    "down-left": (-_D, _D),
}
MOTIONS = (*DIRECTIONS, "still", "circle", "bounce", "collide")

# How far a shape of radius 1 reaches from its centroid: to each side, up, and down.
REACH = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.89, 0.89, 0.89),
    "triangle": (1.22, 1.4, 0.7),
    "star": (1.33, 1.4, 1.14),
    "diamond": (0.8, 1.4, 1.4),
    "cross": (1.1, 1.1, 1.1),
    "ring": (1.1, 1.1, 1.1),
}
SHAPES = tuple(REACH)


@dataclasses.dataclass(frozen=True)
class Object:
    """What stays the same through all shots: a key of REACH, of PALETTE and of SIZES."""

    shape: str
    colour: str
    size: str

    @property
    def radius(self) -> float:
        """In sides."""
        return SIZES[self.size]

    @property
    def reach(self) -> np.ndarray:
        """How far it reaches from its centroid, in sides: [[left, up], [right, down]]."""
        side, up, down = REACH[self.shape]
        return np.asarray([[side, up], [side, down]]) * self.radius

    @property
    def bound(self) -> float:
        """Radius of a circle about it, in sides, but for the tips of a square's corners."""
        return max(REACH[self.shape]) * self.radius


@dataclasses.dataclass(frozen=True)
class Path:
    """Where an object's centre goes during a shot, in the world that the camera looks at.

    Attributes:
      motion: one of MOTIONS.
      speed: "slow", "fast", or "" where it stands still.
      start: (x, y) at time 0; of a circle, its centre.
      travel: the way from start to end, had it not turned; of a circle, from its centre to the object at time 0.
      turn: time at which bouncing and colliding objects turn back.
      sweep: radians that a circling object goes round, positive = clockwise on screen.
    """

    motion: str
    speed: str
    start: tuple[float, float]
    travel: tuple[float, float] = (0.0, 0.0)
    turn: float = 1.0
    sweep: float = 0.0

    def at(self, time: np.ndarray) -> np.ndarray:
        """Centres [T,2] at times [T]."""
        start, travel = np.asarray(self.start), np.asarray(self.travel)
        if self.motion == "circle":
            cos, sin = np.cos(self.sweep * time), np.sin(self.sweep * time)
            return start + np.stack([cos * travel[0] - sin * travel[1], sin * travel[0] + cos * travel[1]], -1)
        return start + travel * np.minimum(time, 2 * self.turn - time)[:, None]


@dataclasses.dataclass(frozen=True)
class Background:
    """kind: plain | gradient | noise | checker | grid.

    colours: keys of NEUTRALS or TINTS; the second is the gradient's other end, the other squares, the lines.
    vertical: whether a gradient runs from top to bottom, else from left to right.
    seed: of the noise.
    """

    kind: str = "plain"
    colours: tuple[str, ...] = ("black",)
    vertical: bool = True
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Camera:
    """kind: still | pan | zoom | rotate, at a constant rate through the shot.

    pan: the way (x, y) the camera goes, in sides; the picture goes the other way.
    zoom: logarithm of the magnification at the shot's end.
    rotate: radians that the picture has turned by the shot's end, positive = clockwise.
    """

    kind: str = "still"
    pan: tuple[float, float] = (0.0, 0.0)
    zoom: float = 0.0
    rotate: float = 0.0

    def world(self, x: np.ndarray, y: np.ndarray, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where screen points lie in the world; all arguments broadcast together."""
        shrink = np.exp(-self.zoom * time)
        cos, sin = shrink * np.cos(self.rotate * time), shrink * np.sin(self.rotate * time)
        return cos * x + sin * y + self.pan[0] * time, cos * y - sin * x + self.pan[1] * time

    def screen(self, points: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Where world points [..., T,2] stand on the screen at times [T]."""
        x, y = np.moveaxis(points - np.asarray(self.pan) * time[:, None], -1, 0)
        grow = np.exp(self.zoom * time)
        cos, sin = grow * np.cos(self.rotate * time), grow * np.sin(self.rotate * time)
        return np.stack([cos * x - sin * y, sin * x + cos * y], -1)


@dataclasses.dataclass(frozen=True)
class Shot:
    """One path an object, in the scene's order; `share`: of the clip's frames."""

    paths: tuple[Path, ...]
    background: Background = Background()
    camera: Camera = Camera()
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Scene:
    """A clip's ground truth.

    Attributes:
      objects: from the farthest to the nearest.
      shots: one or two, with the same objects.
      event: "occlusion" (the first object passes behind the second), "collision" (two bounce off each other), or "".
    """

    objects: tuple[Object, ...]
    shots: tuple[Shot, ...]
    event: str = ""

    def cuts(self, frames: int) -> list[int]:
        """First frame of each shot, and the end."""
        ends = np.round(np.cumsum([shot.share for shot in self.shots]) * frames).astype(int)
        return [0, *ends.tolist()]


def times(frames: int) -> np.ndarray:
    """Times [T] of a shot's frames."""
    return np.arange(frames) / max(frames - 1, 1)


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape of radius 1, negative inside, x and y from its centroid.

    Exact but near corners.
    """
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.89
    if shape == "triangle":  # equilateral, pointing up
        return np.maximum(y, (math.sqrt(3) * np.abs(x) - y) * 0.5) - 0.7
    if shape == "diamond":  # upright; not a turned square
        return (1.4 * np.abs(x) + 0.8 * np.abs(y) - 1.4 * 0.8) / math.hypot(1.4, 0.8)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.78) - 0.32
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.maximum(np.maximum(x, y) - 1.1, np.minimum(x, y) - 0.38)
    if shape == "star":  # five points, one up: folded into half a point, which one line bounds
        radius, sector = np.hypot(x, y), 2 * math.pi / 5
        angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
        along, across = radius * np.cos(angle), radius * np.sin(angle)
        inner = (0.6 * math.cos(sector / 2), 0.6 * math.sin(sector / 2))
        normal = (inner[1], 1.4 - inner[0])
        return (normal[0] * (along - 1.4) + normal[1] * across) / math.hypot(*normal)
    raise ValueError(f"shape {shape!r}: expected one of {SHAPES}")


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius, pixel) -> np.ndarray:
    """Share of each pixel that a shape covers, in [0, 1]; x, y of pixels from its centroid, all in one unit."""
    return np.clip(0.5 - distance(shape, x / radius, y / radius) * (radius / pixel), 0, 1)


def _wave(x: np.ndarray, period: float) -> np.ndarray:
    """Signed distance to the nearest edge of stripes half a period wide."""
    return period / 4 - np.abs(x % period - period / 2)


def _noise(seed: int, x: np.ndarray, y: np.ndarray, cell: float) -> np.ndarray:
    """Value noise in [0, 1]: random values on a lattice, blended smoothly."""
    lattice = np.random.default_rng(seed).random((64, 64), np.float32)
    x, y = np.broadcast_arrays(x / cell, y / cell)
    ix, iy = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = x - ix, y - iy
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)

    def at(dx: int, dy: int) -> np.ndarray:
        return lattice[(iy + dy) % 64, (ix + dx) % 64]

    return (at(0, 0) * (1 - fx) + at(1, 0) * fx) * (1 - fy) + (at(0, 1) * (1 - fx) + at(1, 1) * fx) * fy


def paint(background: Background, x: np.ndarray, y: np.ndarray, pixel, extent: tuple[float, float]) -> np.ndarray:
    """The background at world points: [..., 3] f32 in [0, 255]. `extent`: half the frame's width and height."""
    colours = [np.asarray((NEUTRALS | TINTS)[name], np.float32) for name in background.colours]
    if background.kind == "plain":
        return np.broadcast_to(colours[0], (*np.broadcast_shapes(x.shape, y.shape), 3))
    if background.kind == "gradient":
        mix = y / extent[1] if background.vertical else x / extent[0]
        mix = np.broadcast_to(mix * 0.5 + 0.5, np.broadcast_shapes(x.shape, y.shape))
    elif background.kind == "noise":
        mix = _noise(background.seed, x, y, cell=0.16)
    elif background.kind == "checker":
        stripe_x, stripe_y = (np.clip(_wave(v, 0.5) / pixel, -0.5, 0.5) for v in (x, y))
        mix = 0.5 + 2 * stripe_x * stripe_y
    elif background.kind == "grid":
        line = np.minimum(np.abs(_wave(x, 0.5)), np.abs(_wave(y, 0.5)))
        mix = np.clip(0.5 + (0.02 - line) / pixel, 0, 1)
    else:
        raise ValueError(f"background {background.kind!r}: expected plain, gradient, noise, checker or grid")
    mix = mix[..., None].astype(np.float32)
    return colours[0] * (1 - mix) + colours[1] * mix


def render(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    """Draws a scene, antialiased: [T,H,W,3] u8."""
    cuts = scene.cuts(frames)
    video = np.empty((frames, height, width, 3), np.uint8)
    for shot, first, end in zip(scene.shots, cuts[:-1], cuts[1:], strict=True):
        video[first:end] = _render_shot(scene.objects, shot, end - first, height, width)
    return video


def _render_shot(objects: tuple[Object, ...], shot: Shot, frames: int, height: int, width: int) -> np.ndarray:
    side = np.float32(min(height, width))
    x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / side)[None, None, :]
    y = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / side)[None, :, None]
    time = times(frames).astype(np.float32)
    pixel = 1 / side
    if shot.camera.kind != "still":
        x, y = shot.camera.world(x, y, time[:, None, None])
        pixel = np.exp(-np.float32(shot.camera.zoom) * time)[:, None, None] / side
    ground = paint(shot.background, x, y, pixel, (width / side / 2, height / side / 2))
    image = np.broadcast_to(ground, (frames, height, width, 3)).astype(np.float32)
    for thing, path in zip(objects, shot.paths, strict=True):
        centre = path.at(time).astype(np.float32)
        cx, cy = centre[:, 0, None, None], centre[:, 1, None, None]
        cover = coverage(thing.shape, x - cx, y - cy, np.float32(thing.radius), pixel)[..., None]
        image += cover * (np.asarray(PALETTE[thing.colour], np.float32) - image)
    image += 0.5
    return image.astype(np.uint8)
