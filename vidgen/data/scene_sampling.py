"""How scenes of moving shapes are drawn: levels of difficulty, what is held out, and where objects are placed.

Objects stay in the frame from the first frame to the last, and hide one another only where one is to pass behind
another, so that a caption never claims what cannot be seen.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from vidgen.data.scenes import (
    DIRECTIONS,
    MOTIONS,
    NEUTRALS,
    PALETTE,
    SHAPES,
    SIZES,
    TINTS,
    Background,
    Camera,
    Object,
    Path,
    Scene,
    Shot,
    paint,
    times,
)

Combination = tuple[str, str, str]  # shape, colour, motion


@dataclasses.dataclass(frozen=True)
class Difficulty:
    """What the scenes of a level may show; values are drawn alike.

    Attributes:
      shapes, colours, motions, sizes: names in `vidgen.data.scenes`.
      speeds: name → the way in a shot, in sides (the shorter side of the frame is 1).
      objects: probabilities of one, two, … objects.
      grounds: kinds of background; "plain" has the colours `plain`, the others pairs of NEUTRALS.
      cameras, occlusions, cuts: shares of the clips in which the camera moves, one object passes behind another, and
        there are two shots, of those whose motions and lengths allow it.
      caption: bytes of a caption at most.
    """

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(PALETTE)
    motions: tuple[str, ...] = MOTIONS
    sizes: tuple[str, ...] = tuple(SIZES)
    speeds: tuple[tuple[str, float], ...] = (("slow", 0.3), ("fast", 0.55))
    objects: tuple[float, ...] = (0.4, 0.35, 0.25)
    grounds: tuple[str, ...] = ("plain", "gradient", "noise", "checker", "grid")
    plain: tuple[str, ...] = tuple(NEUTRALS | TINTS)
    cameras: float = 0.3
    occlusions: float = 0.2
    cuts: float = 0.15
    caption: int = 240


LEVELS = {
    "easy": Difficulty(
        shapes=SHAPES[:3],
        colours=tuple(PALETTE)[:6],
        motions=tuple(DIRECTIONS)[:4],
        sizes=("medium",),
        speeds=(("slow", 0.45),),
        objects=(1.0,),
        grounds=("plain",),
        plain=("black",),
        cameras=0.0,
        occlusions=0.0,
        cuts=0.0,
        caption=40,
    ),
    "full": Difficulty(),
}

_LEAST_FRAMES = {"circle": 8, "bounce": 8, "collide": 8}  # that a motion can be told from
_TRIES = 48
_TIMES = times(49)  # at which objects must be in the frame and clear of each other
_STILL = Camera()


def shows(motion: str, frames: int) -> bool:
    """Whether a clip of so many frames can show a motion. One frame shows none, so it may have any."""
    return frames == 1 or frames >= _LEAST_FRAMES.get(motion, 2)


def combinations(level: Difficulty) -> list[Combination]:
    """All of a level's (shape, colour, motion)."""
    return list(itertools.product(level.shapes, level.colours, level.motions))


@functools.lru_cache
def heldout(level: Difficulty, share: float) -> tuple[Combination, ...]:
    """The combinations that are never trained on: `share` of them, always the same.

    Spread so that every shape, colour and motion, and every pair of these, misses about as many: next is always the
    combination whose values and pairs of values are the least held out so far; a fixed permutation breaks ties.
    """
    every = combinations(level)
    order = np.random.default_rng(20).permutation(len(every))
    codes = np.stack(np.unravel_index(order, (len(level.shapes), len(level.colours), len(level.motions))), -1)
    parts = [codes[:, list(p)] for p in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2))]
    groups = [np.unique(p, axis=0, return_inverse=True)[1].reshape(-1) for p in parts]
    counts = [np.zeros(g.max() + 1) for g in groups]
    taken = np.zeros(len(every), bool)
    chosen = []
    for _ in range(round(share * len(every))):
        # Counts relative to the size of a group, so that groups of all sizes weigh alike.
        cost = sum(c[g] * len(c) for c, g in zip(counts, groups, strict=True)) + np.where(taken, np.inf, 0)
        best = int(np.argmin(cost))
        taken[best] = True
        for c, g in zip(counts, groups, strict=True):
            c[g[best]] += 1
        chosen.append(every[order[best]])
    return tuple(sorted(chosen))


@dataclasses.dataclass(frozen=True)
class _Sampler:
    """Draws the parts of one scene."""

    rng: np.random.Generator
    level: Difficulty
    others: Sequence[Combination]  # that objects after the first, and second shots, may be
    frames: int
    room: np.ndarray  # (x, y): half the frame's width and height, in sides

    def pick(self, options: Sequence):
        return options[self.rng.integers(len(options))]

    def background(self, textured: bool = False) -> Background:
        kinds = [k for k in self.level.grounds if not textured or k not in ("plain", "gradient")]
        kind = self.pick(kinds)
        if kind == "plain":
            return Background("plain", (self.pick(self.level.plain),))
        first, second = self.rng.permutation(len(NEUTRALS))[:2]
        names = tuple(NEUTRALS)
        return Background(kind, (names[first], names[second]), bool(self.rng.random() < 0.5), self._seed())

    def _seed(self) -> int:
        return int(self.rng.integers(2**31))

    def camera(self) -> Camera:
        kind, sign = self.pick(("pan", "zoom", "rotate")), self.pick((-1, 1))
        if kind == "pan":
            return Camera("pan", pan=(0.3 * sign, 0.0) if self.rng.random() < 0.5 else (0.0, 0.3 * sign))
        return Camera(kind, zoom=0.35 * sign) if kind == "zoom" else Camera(kind, rotate=0.6 * sign)

    def inside(self, thing: Object) -> tuple[np.ndarray, np.ndarray]:
        """Least and most (x, y) of its centre with all of it in the frame."""
        return thing.reach[0] - self.room, self.room - thing.reach[1]

    def holds(self, thing: Object, points: np.ndarray) -> np.ndarray:
        """Whether all of it is in the frame, with its centre at each of [..., 2]."""
        least, most = self.inside(thing)
        return np.all((points >= least) & (points <= most), axis=-1)

    def other(self, colours: set[str], motions: Sequence[str]) -> Combination | None:
        """Another object, of a colour that isn't there yet, with one of these motions."""
        options = [c for c in self.others if c[1] not in colours and c[2] in motions]
        return self.pick(options) if options else None

    def place(
        self,
        thing: Object,
        motion: str,
        camera: Camera = _STILL,
        beside: Sequence[tuple[Object, np.ndarray]] = (),
        slow: bool = False,
    ) -> Path | None:
        """A path that stays in the frame and clear of the objects `beside` it (with their centres on the screen)."""
        path = self._way(motion, slow)
        way = path.at(_TIMES)
        least, most = self.inside(thing)
        if camera.kind == "still":
            low, high = least - way.min(0), most - way.max(0)
            if motion == "bounce":
                axis = int(np.argmax(np.abs(path.travel)))
                touch = (most if path.travel[axis] > 0 else least)[axis] - path.travel[axis] * path.turn
                if not low[axis] - 0.1 <= touch <= high[axis] + 0.1:
                    return None
                low[axis] = high[axis] = touch
        else:
            low, high = -self.room, self.room
        if np.any(high < low):
            return None
        starts = self.rng.uniform(low, high, (_TRIES, 2))
        screen = camera.screen(starts[:, None] + way, _TIMES)  # [tries, T, 2]
        grow = np.exp(camera.zoom * _TIMES)[:, None]
        reach = thing.reach if camera.kind != "rotate" else np.full((2, 2), thing.bound * 1.2)
        good = np.all(screen - reach[0] * grow >= -self.room - 1e-6, axis=(1, 2))
        good &= np.all(screen + reach[1] * grow <= self.room + 1e-6, axis=(1, 2))
        for neighbour, centres in beside:
            clear = (thing.bound + neighbour.bound) * grow[:, 0] + 0.07
            good &= np.all(np.linalg.norm(screen - centres, axis=-1) >= clear, axis=1)
        if not good.any():
            return None
        return dataclasses.replace(path, start=tuple(starts[int(np.argmax(good))].tolist()))

    def _way(self, motion: str, slow: bool) -> Path:
        """A path of this motion from the origin."""
        speed, length = self.level.speeds[0] if slow else self.pick(self.level.speeds)
        if motion == "still":
            return Path(motion, "", (0.0, 0.0))
        if motion == "circle":
            angle, sign = self.rng.uniform(0, 2 * math.pi), self.pick((-1, 1))
            travel = 0.18 * math.cos(angle), 0.18 * math.sin(angle)
            rounds = sign * (1.5 if speed == "fast" else 0.85)
            return Path(motion, speed, (0.0, 0.0), travel, sweep=2 * math.pi * rounds)
        if motion == "bounce":
            x, y = self.pick([DIRECTIONS[d] for d in ("left", "right", "up", "down")])
            travel, turn = (x * length * 1.3, y * length * 1.3), self.rng.uniform(0.42, 0.58)
            return Path(motion, speed, (0.0, 0.0), travel, turn=turn)
        x, y = DIRECTIONS[motion]
        return Path(motion, speed, (0.0, 0.0), (x * length, y * length))

    def together(self, first: Combination) -> Scene:
        """Objects that have nothing to do with each other."""
        steady = (*DIRECTIONS, "still", "circle")
        moves = self.frames >= 8 and first[2] in steady and self.rng.random() < self.level.cameras
        motions = [m for m in (steady if moves else MOTIONS[:-1]) if shows(m, self.frames)]
        number = 1 + int(self.rng.choice(len(self.level.objects), p=self.level.objects))
        for attempt in range(60):
            # Where it is crowded objects get smaller and slower, then fewer, and at last the camera stands still.
            camera = self.camera() if moves and attempt < 40 else _STILL
            sizes = self.level.sizes[: max(1, len(self.level.sizes) - attempt // 3)]
            sizes = sizes[1:] if camera.zoom < 0 and len(sizes) > 1 else sizes  # what shrinks isn't small at first
            objects: list[Object] = []
            paths: list[Path] = []
            beside: list[tuple[Object, np.ndarray]] = []
            for i in range(max(1, number - max(0, attempt - 12) // 8)):
                drawn = first if i == 0 else self.other({o.colour for o in objects}, motions)
                if drawn is None:
                    break
                thing = Object(drawn[0], drawn[1], self.pick(sizes))
                motion = drawn[2] if self.frames > 1 else "still"
                path = self.place(thing, motion, camera, beside, slow=attempt > 2)
                if path is None:
                    break
                objects.append(thing)
                paths.append(path)
                beside.append((thing, camera.screen(path.at(_TIMES), _TIMES)))
            else:
                return Scene(tuple(objects), (Shot(tuple(paths), self.background(camera != _STILL), camera),))
        raise RuntimeError(f"no room for a {first} in a frame of {2 * self.room} sides")

    def two_shots(self, first: Combination) -> Scene | None:
        """One object, a cut, and the same object moving differently elsewhere."""
        frames = self.frames // 2
        motions = [c[2] for c in self.others if c[:2] == first[:2] and c[2] not in (first[2], "collide")]
        motions = [m for m in motions if shows(m, frames)]
        if not motions:
            return None
        thing = Object(first[0], first[1], self.pick(self.level.sizes))
        paths = [self.place(thing, m) for m in (first[2], self.pick(motions))]
        grounds = [self.background(), self.background()]
        x, y = (np.linspace(-r, r, 24) for r in self.room)
        before, after = (paint(g, x[None], y[:, None], 1 / 24, tuple(self.room)) for g in grounds)
        if None in paths or np.abs(before - after).mean() < 40:
            return None
        return Scene((thing,), tuple(Shot((p,), g, share=0.5) for p, g in zip(paths, grounds, strict=True)))

    def occlusion(self, first: Combination) -> Scene | None:
        """The first object passes behind a second that stands still."""
        second = self.other({first[1]}, ("still",))
        if second is None:
            return None
        back = Object(first[0], first[1], self.level.sizes[0])
        front = Object(second[0], second[1], self.pick(self.level.sizes[:2]))
        way = np.asarray(DIRECTIONS[first[2]])
        clear = np.abs(way) @ (back.reach.max(0) + front.reach.max(0))  # from centre to centre, before and after
        length = self.rng.uniform(0.6, 0.9, _TRIES)
        before = length * self.rng.uniform(0.4, 0.6, _TRIES)
        middle = self.rng.uniform(-0.1, 0.1, (_TRIES, 2))
        start = middle - way * before[:, None]
        end = start + way * length[:, None]
        good = self.holds(back, start) & self.holds(back, end) & self.holds(front, middle)
        good &= (before >= clear + 0.02) & (length - before >= clear + 0.02)
        if not good.any():
            return None
        i = int(np.argmax(good))
        paths = (
            Path(first[2], "fast", tuple(start[i].tolist()), tuple((way * length[i]).tolist())),
            Path("still", "", tuple(middle[i].tolist())),
        )
        return Scene((back, front), (Shot(paths, self.background()),), "occlusion")

    def collision(self, first: Combination) -> Scene | None:
        """Two small objects come from opposite sides, touch, and go back."""
        second = self.other({first[1]}, ("collide",))
        if second is None:
            return None
        things = [Object(c[0], c[1], self.level.sizes[0]) for c in (first, second)]
        speed, length = self.pick(self.level.speeds)
        length = {"slow": 0.3, "fast": 0.4}.get(speed, length)
        axis = int(self.rng.random() < 0.5)
        meet = np.where(np.arange(2) == axis, self.rng.uniform(-0.08, 0.08), self.rng.uniform(-0.25, 0.25))
        turn, sign = self.rng.uniform(0.45, 0.55), self.pick((-1, 1))
        paths = []
        for thing, side in zip(things, (-sign, sign), strict=True):
            unit = np.where(np.arange(2) == axis, -side, 0.0)
            start = meet - unit * (thing.reach[int(side < 0)][axis] + length * turn)
            end = start + unit * (length * (2 * turn - 1))
            if not (self.holds(thing, start) and self.holds(thing, end)):
                return None
            paths.append(Path("collide", speed, tuple(start.tolist()), tuple((unit * length).tolist()), turn=turn))
        return Scene(tuple(things), (Shot(tuple(paths), self.background()),), "collision")


def compose(
    rng: np.random.Generator,
    level: Difficulty,
    first: Combination,
    others: Sequence[Combination],
    size: tuple[int, int, int],
) -> Scene:
    """Draws a scene whose first object is of combination `first`.

    Args:
      rng: all randomness.
      level: what may be shown.
      first: shape, colour and motion; `shows(motion, frames)` must hold.
      others: combinations that further objects, and the first one's second shot, may be of.
      size: (frames, height, width) of the clip.
    """
    frames, height, width = size
    room = np.asarray([width, height]) / (2 * min(height, width))
    sampler = _Sampler(rng, level, others, frames, room)
    motion, scene = first[2], None
    if motion == "collide" and frames > 1:
        for _ in range(400):  # most tries fit; the crossing of a narrow frame by large shapes may not
            if (scene := sampler.collision(first)) is not None:
                return scene
        raise RuntimeError(f"no room for {first} to collide in {size}")
    if motion in DIRECTIONS and frames >= 8 and rng.random() < level.occlusions:
        scene = sampler.occlusion(first)
    elif frames >= 12 and shows(motion, frames // 2) and rng.random() < level.cuts:
        scene = sampler.two_shots(first)
    return scene or sampler.together(first)
