"""Objects in a video of moving shapes: segmented by colour, followed from frame to frame. NumPy only."""

from __future__ import annotations

import dataclasses

import numpy as np

from vidgen.data.scenes import PALETTE

COVER = 0.45  # share of a pixel that an object must cover to count as its own
MIN_AREA = 0.006  # of an object, in squared sides; the smallest shape has 0.032
MIN_CHROMA = 40.0  # of a foreground pixel, in units of u8: grey noise and tints stay below
_LEAP = 0.4  # sides from a frame to the next: further, it has vanished here and another appeared there
COLOURS = tuple(PALETTE)


@dataclasses.dataclass(frozen=True)
class Track:
    """One object through the T frames of a shot. Lengths are in sides, from the frame's centre.

    Attributes:
      colour: a key of PALETTE.
      cover: [T,H,W] f32, share of each pixel that it covers, in [0, 1].
      seen: [T] bool.
      area: [T] f64, in squared sides; 0 where it isn't seen.
      centre: [T,2] f64, (x, y) of its centroid; NaN where it isn't seen.
      at_edge: [T] bool, touches the frame's edge.
      at_other: [T] bool, touches another object.
    """

    colour: str
    cover: np.ndarray
    seen: np.ndarray
    area: np.ndarray
    centre: np.ndarray
    at_edge: np.ndarray
    at_other: np.ndarray

    def whole(self, scale: np.ndarray) -> np.ndarray:
        """[T] bool, seen and (nearly) unhidden; `scale` [T]: how much larger the camera shows it than at first."""
        if not self.seen.any():
            return self.seen
        area = self.area / np.square(scale)
        return self.seen & (area >= 0.85 * np.quantile(area[self.seen], 0.75))


def _shifts(x: np.ndarray, fill) -> list[np.ndarray]:
    """The eight neighbours of each pixel of [T,H,W]."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=fill)
    h, w = x.shape[1:]
    return [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3) if (i, j) != (1, 1)]


def dilate(mask: np.ndarray, steps: int = 1) -> np.ndarray:
    """Grows a mask [T,H,W] by `steps` pixels, diagonally too."""
    for _ in range(steps):
        mask = np.logical_or.reduce([mask, *_shifts(mask, False)])
    return mask


def components(mask: np.ndarray) -> np.ndarray:
    """Labels the 8-connected parts of each frame of [T,H,W] bool: i64, 0 outside, from 1 on inside, unique over frames.

    Every pixel takes the least label of its neighbours, then the label of the pixel that it now points to, until
    nothing changes: the second step halves the way that is left, so that few rounds do.
    """
    last = mask.size
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape), last)
    while True:
        least = np.minimum.reduce([labels, *_shifts(labels, last)])
        least = np.where(mask, least, last)
        flat = np.append(least.reshape(-1), last)
        new = flat[flat[:-1]].reshape(mask.shape)
        if (new == labels).all():
            break
        labels = new
    return np.where(mask, np.unique(labels, return_inverse=True)[1].reshape(mask.shape) + 1, 0)


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """[..., 3] → [..., 2] f32: what is left of a colour when its grey is taken away."""
    red, green, blue = np.moveaxis(rgb.astype(np.float32), -1, 0)
    return np.stack([(red - green) / np.sqrt(np.float32(2)), (red + green - 2 * blue) / np.sqrt(np.float32(6))], -1)


def classify(shot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which colour covers each pixel of a shot [T,H,W,3] u8, and how much of it.

    Returns:
      colour: [T,H,W] i64, index into COLOURS, -1 where it is background.
      cover: [T,H,W] f32 in [0, 1], also at outlines, where `colour` is -1 already.
      Only colours that fill a few pixels together count: at an outline between two objects a third may seem to be.
    """
    chroma = _chroma(shot)
    ground = np.median(chroma.reshape(-1, 2), axis=0)
    chroma = chroma - ground
    palette = _chroma(np.asarray(list(PALETTE.values()))) - ground  # [8,2]
    strength = np.linalg.norm(palette, axis=-1)
    length = np.linalg.norm(chroma, axis=-1)
    along = chroma @ palette.T  # [T,H,W,8]
    cosine = along / strength
    nearest = cosine.argmax(-1)
    solid = (length >= MIN_CHROMA) & (cosine.max(-1) >= COVER * strength[nearest])
    classes = np.where(solid, nearest, -1)
    # A colour is there if 2×2 blocks of it are, in a fair share of the frames.
    blocks = (classes[:, 1:, 1:] == classes[:, :-1, 1:]) & (classes[:, 1:, :-1] == classes[:, :-1, :-1])
    blocks &= classes[:, 1:, 1:] == classes[:, :-1, :-1]
    present = [
        k for k in range(len(COLOURS)) if (np.any(blocks & (classes[:, 1:, 1:] == k), axis=(1, 2))).mean() >= 0.25
    ]
    if not present:
        return np.full(classes.shape, -1), np.zeros(classes.shape, np.float32)
    best = np.asarray(present)[cosine[..., present].argmax(-1)]
    cover = np.take_along_axis(along, best[..., None], -1)[..., 0] / strength[best] ** 2
    solid = (length >= MIN_CHROMA) & (cover >= COVER)
    return np.where(solid, best, -1), np.clip(np.where(cover > 0.1, cover, 0), 0, 1)


def _pieces(mask: np.ndarray, others: np.ndarray, floor: int) -> list[list[np.ndarray]]:
    """Per frame, the parts [H,W] bool of at least `floor` pixels of a mask, the largest first.

    Parts that another object lies between are one: it may hide what joins them.
    """
    labels = components(mask | (others & mask.any(axis=(1, 2), keepdims=True))) * mask
    found = []
    for frame in labels:
        names, sizes = np.unique(frame[frame > 0], return_counts=True)
        order = np.argsort(-sizes, kind="stable")
        found.append([frame == names[i] for i in order if sizes[i] >= floor])
    return found


def tracks(shot: np.ndarray) -> tuple[list[Track], bool]:
    """Follows the objects of a shot [T,H,W,3] u8.

    Returns:
      the objects seen, and whether all of them were there throughout, in one piece each: leaving through the frame's
      edge and hiding behind another object are no fault.
    """
    frames, height, width, _ = shot.shape
    side = min(height, width)
    classes, cover = classify(shot)
    floor = max(3, round(MIN_AREA * side * side))
    found, steady = [], True
    for k in np.unique(classes[classes >= 0]):
        mask = classes == k
        others = dilate((classes >= 0) & ~mask)
        pieces = _pieces(mask, others, floor)
        counts = np.asarray([len(p) for p in pieces])
        if (counts > 0).mean() < 0.25:
            steady &= not (counts > 0).any()
            continue
        number = max(1, round(float(np.median(counts[counts > 0]))))
        # An object that hides it may cut it into a few parts, but not into dust.
        scraps = np.asarray([(np.bincount(frame[frame > 0]) >= 3).sum() for frame in components(mask)])
        steady &= not ((counts > number) | (scraps > number + 7)).any()
        mine = _follow(pieces, number)
        solid = np.where(classes == k, cover, 0) + np.where((classes < 0) & ~others, cover, 0)
        for parts in mine:
            track = _track(COLOURS[k], parts, solid, others, side)
            found.append(track)
            steady &= not _vanishes(track)
    return found, bool(steady and found)


def _follow(pieces: list[list[np.ndarray]], number: int) -> list[np.ndarray]:
    """Links the pieces of one colour into `number` tracks [T,H,W] bool: nearest places first."""
    shape = next(p[0].shape for p in pieces if p)
    linked = [np.zeros((len(pieces), *shape), bool) for _ in range(number)]
    last: list[np.ndarray | None] = [None] * number
    for t, parts in enumerate(pieces):
        parts = parts[:number]
        centres = [np.argwhere(part).mean(0) for part in parts]
        pairs = sorted(
            (0.0 if last[i] is None else float(np.linalg.norm(centres[j] - last[i])), i, j)
            for i in range(number)
            for j in range(len(parts))
        )
        free_tracks, free_parts = set(range(number)), set(range(len(parts)))
        for _, i, j in pairs:
            if i in free_tracks and j in free_parts:
                linked[i][t], last[i] = parts[j], centres[j]
                free_tracks.remove(i)
                free_parts.remove(j)
    return linked


def _track(colour: str, mask: np.ndarray, solid: np.ndarray, others: np.ndarray, side: int) -> Track:
    cover = np.where(dilate(mask), solid, 0).astype(np.float32)
    seen = mask.any(axis=(1, 2))
    if seen.any():  # paler than the palette: what is full cover is what its inside shows
        cover = np.clip(cover / max(float(np.quantile(cover[mask], 0.75)), COVER), 0, 1)
    height, width = mask.shape[1:]
    y = (np.arange(height) + 0.5 - height / 2)[:, None] / side
    x = (np.arange(width) + 0.5 - width / 2)[None, :] / side
    total = cover.sum(axis=(1, 2), dtype=np.float64)
    weight = np.where(seen, total, np.nan)
    centre = np.stack([(cover * x).sum(axis=(1, 2)) / weight, (cover * y).sum(axis=(1, 2)) / weight], -1)
    edge = mask[:, 0].any(1) | mask[:, -1].any(1) | mask[:, :, 0].any(1) | mask[:, :, -1].any(1)
    return Track(
        colour, cover, seen, np.where(seen, total, 0) / side**2, centre, edge, (dilate(mask) & others).any(axis=(1, 2))
    )


def _vanishes(track: Track) -> bool:
    """Whether it is missing without an excuse in the last frame before, or the first after, that shows it, or leaps."""
    steps = np.linalg.norm(np.diff(track.centre, axis=0), axis=1)
    if len(track.seen) >= 8 and (steps > _LEAP).any():  # NaN where it isn't seen
        return True
    excused = track.at_edge | track.at_other
    times = np.flatnonzero(track.seen)
    for t in np.flatnonzero(~track.seen):
        before, after = times[times < t], times[times > t]
        if not ((len(before) and excused[before[-1]]) or (len(after) and excused[after[0]])):
            return True
    return False
