"""The judge of moving shapes: prompts that were never trained on, and what a video shows of them.

A video is parsed blindly: objects are segmented by colour, their shapes compared with templates, their motions read
off their tracks, the camera's motion taken away. Only then is what was seen compared with what was asked for. Sizes,
speeds, backgrounds and the camera are not judged. On frames whose shorter side is below 24 pixels, small objects of
the full level are a few pixels wide, and the judge errs now and then on ground truth as well.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from vidgen.data.moving_shapes import MovingShapes
from vidgen.data.scenes import DIRECTIONS, SHAPES, Scene, coverage
from vidgen.evaluation.camera import View, aligned, cut, estimate
from vidgen.evaluation.segment import Track, dilate, tracks

RATES = ("shape", "colour", "motion", "count", "all_right", "permanence", "kept")  # shares of the videos

_POINTS = 8  # frames that a shape is read from at most
_SOFT = (0, 1, 3)  # times that a template may be blurred: generated outlines are seldom crisp
_STILL = 0.05  # sides that an object may stray from its mean place and yet stand still


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to generate, and its ground truth: `render(scene, frames, height, width)` would be a perfect answer."""

    text: str
    scene: Scene
    frames: int
    height: int
    width: int
    fps: float


@dataclasses.dataclass(frozen=True)
class Seen:
    """An object as the judge saw it; `motions`: one a shot, none of an image."""

    shape: str
    colour: str
    motions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is right in a video, and how steady it is.

    Attributes:
      shape, colour, motion: whether the objects have the shapes, colours and motions asked for, counted without
        regard to which has which. An image has no motion: it counts as right.
      count: whether there are as many objects.
      all_right: whether the objects are the ones asked for, each with its shape, colour and motion.
      flicker: mean change from a frame to the next, in [0, 1], of background pixels, which should not change at all.
      permanence: whether no object appears, vanishes, splits or merges.
      seen: the objects that the judge saw.
    """

    shape: bool
    colour: bool
    motion: bool
    count: bool
    all_right: bool
    flicker: float
    permanence: bool
    seen: tuple[Seen, ...]

    @property
    def kept(self) -> bool:
        """Whether the objects asked for are there from the first frame to the last, as they were in it."""
        return self.shape and self.colour and self.count and self.permanence


@dataclasses.dataclass(frozen=True)
class Parsed:
    """All that the judge reads from a video of `frames` frames; see Verdict."""

    seen: tuple[Seen, ...]
    permanence: bool
    flicker: float
    frames: int


def prompts(config: Any, count: int, seed: int = 0) -> list[Prompt]:
    """`count` prompts of the set of `config.data.moving_shapes`, given as `config`: truthful captions of new scenes.

    The first object of each is a combination of attributes that was held out of training; all such combinations come
    equally often (±1) among the clips of one length. Sizes take turns. Raises ConfigError, also where nothing is
    held out.
    """
    source = MovingShapes.from_config(config, "heldout")
    rng = np.random.default_rng((seed, 0x9A))
    made = []
    for i in range(count):
        turn, size = divmod(i, len(source.shapes))
        size = source.shapes[size]
        options = source.first(size[0])
        scene, text = source.compose(rng, size, options[turn % len(options)])
        made.append(Prompt(text, scene, *size, source.fps))
    return made


def expected(scene: Scene, frames: int) -> tuple[Seen, ...]:
    """A scene's ground truth in the judge's terms."""
    seen = []
    for i, thing in enumerate(scene.objects):
        motions = tuple(shot.paths[i].motion for shot in scene.shots) if frames > 1 else ()
        seen.append(Seen(thing.shape, thing.colour, motions))
    return tuple(seen)


def judge(video: np.ndarray, scene: Scene) -> Verdict:
    """Compares a video [T,H,W,3] u8 with the scene that it was to show."""
    return compare(parse(video), scene)


def compare(parsed: Parsed, scene: Scene) -> Verdict:
    """What is right of what was seen."""
    seen, wanted = parsed.seen, expected(scene, parsed.frames)

    def same(pick) -> bool:
        return sorted(map(pick, seen)) == sorted(map(pick, wanted))

    return Verdict(
        shape=same(lambda s: s.shape),
        colour=same(lambda s: s.colour),
        motion=parsed.frames == 1 or same(lambda s: s.motions),
        count=len(seen) == len(wanted),
        all_right=same(lambda s: (s.shape, s.colour, s.motions)),
        flicker=parsed.flicker,
        permanence=parsed.permanence,
        seen=seen,
    )


def parse(video: np.ndarray) -> Parsed:
    """Reads a video [T,H,W,3] u8, knowing nothing of what it was to show."""
    at = cut(video)
    shots = [_look(shot) for shot in ([video[:at], video[at:]] if at else [video])]
    seen = []
    for colour in sorted({track.colour for shot in shots for track in shot.tracks}):
        # The same object in two shots has the same colour.
        lines = [[t for t in shot.tracks if t.colour == colour] for shot in shots]
        for row in itertools.zip_longest(*lines):
            pairs = [(track, shot) for track, shot in zip(row, shots, strict=True) if track is not None]
            motions = tuple("" if t is None else motion_of(t, s) for t, s in zip(row, shots, strict=True))
            seen.append(Seen(shape_of(pairs), colour, motions if len(video) > 1 else ()))
    flicker = float(np.mean([shot.flicker for shot in shots]))
    return Parsed(tuple(seen), all(shot.steady for shot in shots), flicker, len(video))


@dataclasses.dataclass(frozen=True)
class _Shot:
    tracks: list[Track]
    steady: bool
    view: View
    flicker: float


def _look(shot: np.ndarray) -> _Shot:
    found, steady = tracks(shot)
    covered = np.zeros(shot.shape[:3], bool)
    for track in found:
        covered |= track.cover > 0
    covered = dilate(covered)
    # Generated objects have soft rims; taken for background, these would seem to be a camera that follows the object.
    view = estimate(shot, dilate(covered, max(1, round(0.06 * min(shot.shape[1:3])))))
    change, ground = aligned(shot, covered, view)
    return _Shot(found, steady, view, float(change[ground].mean()) / 255 if ground.any() else 0.0)


def shape_of(looks: list[tuple[Track, _Shot]]) -> str:
    """The shape whose rendering, with an object's areas, centroids and the camera's rotation, differs least from it."""
    errors = dict.fromkeys(itertools.product(SHAPES, _SOFT), 0.0)
    for track, shot in looks:
        count, height, width = track.cover.shape
        frames = np.flatnonzero(track.whole(shot.view.scale(count)))
        frames = frames[np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _POINTS)).round().astype(int))]
        side = min(height, width)
        x = ((np.arange(width) + 0.5 - width / 2) / side)[None, None, :] - track.centre[frames, 0, None, None]
        y = ((np.arange(height) + 0.5 - height / 2) / side)[None, :, None] - track.centre[frames, 1, None, None]
        angle = shot.view.rotation(count)[frames, None, None]
        x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        for shape, soft in errors:
            radius = np.sqrt(track.area[frames] / _UNIT_AREA[shape])[:, None, None]
            model = coverage(shape, x, y, radius, 1 / side)
            for _ in range(soft):
                model = _soften(model)
            errors[shape, soft] += float(np.square(model - track.cover[frames]).sum())
    return min(errors, key=errors.get)[0]


def _soften(x: np.ndarray) -> np.ndarray:
    """Binomial blur of [T,H,W] over 3×3 pixels."""
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (1, 1)
        wide, n = np.pad(x, pad, mode="edge"), x.shape[axis]
        before, after = (wide.take(range(i, i + n), axis) for i in (0, 2))
        x = 0.5 * x + 0.25 * (before + after)
    return x


def _unit_areas() -> dict[str, float]:
    axis = (np.arange(300) + 0.5) / 100 - 1.5
    return {s: float(coverage(s, axis[None], axis[:, None], 1.0, 0.01).sum()) * 1e-4 for s in SHAPES}


_UNIT_AREA = _unit_areas()


def motion_of(track: Track, shot: _Shot) -> str:
    """How an object moves in the world: one of MOTIONS, or "" where it is seen too little or does none of them."""
    frames = np.flatnonzero(track.whole(shot.view.scale(len(track.seen))))
    if len(frames) < 2:
        return ""
    points = shot.view.home(np.nan_to_num(track.centre))[frames]
    offset = points - points.mean(0)
    if np.linalg.norm(offset, axis=1).max() < _STILL:
        return "still"
    along, across = (offset @ np.linalg.svd(offset, full_matrices=False)[2].T).T
    if np.ptp(across) > 0.4 * np.ptp(along):
        return "circle" if _circles(points) else ""
    if abs(along[-1] - along[0]) < 0.65 * np.ptp(along):
        return _turned_at(track, shot, frames[int(np.abs(along - along[0]).argmax())])
    time = frames - frames.mean()
    velocity = time @ offset
    return min(DIRECTIONS, key=lambda d: -float(velocity @ DIRECTIONS[d]))


def _circles(points: np.ndarray) -> bool:
    """Whether points [N,2] go most of the way round a circle (least squares: Kåsa, 1976)."""
    design = np.concatenate([2 * points, np.ones((len(points), 1))], 1)
    x, y, rest = np.linalg.lstsq(design, np.square(points).sum(1), rcond=None)[0]
    radius = np.sqrt(max(rest + x * x + y * y, 1e-12))
    spokes = points - (x, y)
    error = np.abs(np.linalg.norm(spokes, axis=1) - radius).mean()
    swept = np.ptp(np.unwrap(np.arctan2(spokes[:, 1], spokes[:, 0])))
    return bool(error < 0.2 * radius and swept > np.pi)


def _turned_at(track: Track, shot: _Shot, frame: int) -> str:
    """What an object turned back from: the nearest thing, be it the frame's edge or another object."""
    gaps = {"bounce": np.inf, "collide": np.inf}
    for t in range(max(frame - 1, 0), min(frame + 2, len(track.seen))):
        own = np.argwhere(track.cover[t] > 0.5)
        if not len(own):
            continue
        size = np.asarray(track.cover.shape[1:])
        gaps["bounce"] = min(gaps["bounce"], int(own.min()), int((size - 1 - own).min()))
        for other in shot.tracks:
            points = np.argwhere(other.cover[t] > 0.5) if other is not track else own[:0]
            if len(points):
                gap = np.linalg.norm(own[:, None] - points[None], axis=-1).min() - 1
                gaps["collide"] = min(gaps["collide"], float(gap))
    near = min(gaps, key=gaps.get)
    return near if gaps[near] < 0.15 * min(track.cover.shape[1:]) else ""


def summary(verdicts: list[Verdict]) -> dict[str, float]:
    """RATES in [0, 1], the mean of `flicker`, and `prompts`, how many were judged."""
    rates = {name: float(np.mean([getattr(v, name) for v in verdicts])) for name in (*RATES, "flicker")}
    return rates | {"prompts": len(verdicts)}
