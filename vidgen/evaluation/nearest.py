"""The suite `nearest`: whether drawn clips are copies of clips that were trained on.

Clips are compared as pixels: shrunk to FRAMES × SIDE × SIDE means, root mean square difference, of the range of pixels.
A training clip that is longer than the drawn ones is compared by stretches of their length, as training may have shown
any of it; of one that is larger, the middle. A copy that is shifted in space, mirrored or recoloured is not found, nor
one of a clip that was not looked at, as those are that moving shapes show in later passes. Clips that show little, or
are blurred, are near to everything, which is why the distance is also set against that of the next nearest clips.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.data.clip import BadClip
from vidgen.data.feed import read_clip
from vidgen.data.progress import Progress
from vidgen.data.sources import Source, Subset
from vidgen.evaluation import clips
from vidgen.evaluation.suite import Asked, Found, Subject

FRAMES, SIDE = 8, 16  # of what clips are shrunk to; smaller clips stay as they are
AROUND = 50  # nearest training clips whose mean distance a clip's nearest is set against
SHARE = 0.01  # of the held-out clips that are nearer than the threshold
STRETCHES = 32  # of a training clip that are compared at most
CHUNK = 256  # stretches of training clips in memory, and those of one clip more


def check(config: ConfigDict, asked: Asked) -> None:
    """Raises ConfigError where no clips are held out, or none of a side are as large as those that are drawn."""
    clips.check_held_out(config, "nearest")
    for split in ("train", "heldout"):
        clips.sized(config, split, clips.sample_size(config))


def run(subject: Subject, asked: Asked) -> Found:
    """Clips drawn from held-out clips' captions, and these clips, each against `clips` training clips of pass 0.

    training_clips, training_clips_of: how many of those that there are were looked at, evenly spread over them.
    distance, heldout_distance: mean distance to the nearest training clip, 0 to 1. nearer: share of the drawn clips
    that are nearer to one than the nearest 1 % of the held-out clips; of a model that copies nothing and draws clips
    like theirs, about 0.01. ratio, heldout_ratio: mean of the nearest distance over the mean of the AROUND nearest
    (after Carlini et al., arXiv:2301.13188), near 0 for a copy. copied: as nearer, by this ratio. per_prompt names the
    nearest training clip and the first frame of the stretch. Shows pairs of drawn clip and that stretch, the least
    ratio first.
    """
    config = subject.config
    size = clips.sample_size(config)
    source = clips.sized(config, "train", size, whole=True)
    real = clips.read(clips.sized(config, "heldout", size), asked.prompts)
    prompts = [clip.caption for clip in real.clips]
    drawn = subject.draw(prompts, range(asked.seed, asked.seed + len(prompts)))

    training = Subset(source, clips.spread(len(source.sizes), asked.clips))
    queries = np.stack([shrunk(video) for video in (*drawn, *(clip.video for clip in real.clips))])
    found, unused = nearest(queries, training, size[0], AROUND)
    count = len(drawn)
    best, ratio = found.distances[:, 0], found.distances[:, 0] / np.maximum(found.distances.mean(axis=1), 1e-12)
    which = list(zip(found.clips[:count, 0].tolist(), found.starts[:count, 0].tolist(), strict=True))
    rows = [
        {"prompt": p, "distance": float(d), "ratio": float(r), "nearest": training.name(i), "first_frame": first}
        for p, d, r, (i, first) in zip(prompts, best, ratio, which, strict=False)
    ]
    few = len(real.clips) * SHARE < 1
    smaller = source.smaller if isinstance(source, clips.Sized) else 0
    notes = real.notes("held-out") + [f"{n} training clips could not be used: {why}" for why, n in unused.items()]
    notes += _not_looked_at(training, source, smaller, size)
    notes += [f"{len(real.clips)} held-out clips: their nearest {SHARE:.0%} is the nearest one"] if few else []
    figures = {
        "nearer": beyond(best[:count], best[count:]),
        "copied": beyond(ratio[:count], ratio[count:]),
        "distance": float(best[:count].mean()),
        "heldout_distance": float(best[count:].mean()),
        "ratio": float(ratio[:count].mean()),
        "heldout_ratio": float(ratio[count:].mean()),
        "training_clips": len(training) - sum(unused.values()),
        "training_clips_of": len(source.sizes) + smaller,
        "prompts": count,
        "notes": notes,
        "per_prompt": rows,
    }
    decided_by = {
        "prompts": {"count": count, "fingerprint": clips.fingerprint(prompts)},
        "clips": {"split": "heldout", "count": len(real.clips), "of": real.total, "fingerprint": real.fingerprint},
        "training_clips": {
            "count": len(training),
            "of": len(source.sizes) + smaller,
            "fingerprint": training.fingerprint,
        },
        "distance": {"frames": FRAMES, "side": SIDE, "around": AROUND, "share": SHARE},
        "stretches": {"most": STRETCHES, "step": step(size[0])},
    }
    closest = np.argsort(ratio[:count], kind="stable")[:18]
    pairs = []
    for i in closest:
        clip, first = which[i]
        pairs += [drawn[i], read_clip(training, clip, 0).video[first : first + size[0]]]
    return Found(figures, decided_by, pairs)


def _not_looked_at(training: Subset, source: Source, smaller: int, size: clips.Size) -> list[str]:
    """What to say of training clips, of which `training` of `source` and `smaller` too small ones, that a copy of them
    would not be found.
    """
    count, total, notes = len(training), len(source.sizes), []
    if count < total:
        notes.append(
            f"{count:,} of {total:,} training clips were looked at: a copy of another is not found; --clips={total} "
            "looks at all"
        )
    if smaller:
        notes.append(f"{smaller:,} training clips are smaller than {clips.told(size)}, and were not looked at")
    if longer := int(np.count_nonzero(training.sizes.frames - size[0] > (STRETCHES - 1) * step(size[0]))):
        notes.append(
            f"{longer:,} training clips have more than {STRETCHES} stretches of {size[0]} frames; as many of each, "
            "evenly spread, were looked at"
        )
    return notes


def beyond(drawn: np.ndarray, heldout: np.ndarray) -> float:
    """The share of `drawn` below the SHARE-quantile of `heldout`."""
    return float((drawn < np.quantile(heldout, SHARE)).mean())


def shrunk(video: np.ndarray) -> np.ndarray:
    """A clip [T,H,W,3] u8 as [n] f32 of 0 to 1: means over equal parts of its frames, rows and columns."""
    return _in_time(_in_space(video))


def _in_space(video: np.ndarray) -> np.ndarray:
    """[T,H,W,3] u8 → [T,h,w,3] f32, h and w at most SIDE; a frame at a time, since clips may be large."""
    return np.stack([_means(_means(frame.astype(np.float32) / 255, 0, SIDE), 1, SIDE) for frame in video])


def _in_time(small: np.ndarray) -> np.ndarray:
    return _means(small, 0, FRAMES).reshape(-1).astype(np.float32)


def _means(x: np.ndarray, axis: int, most: int) -> np.ndarray:
    """Over equal parts of an axis, `most` of them; as it is where it has no more."""
    length = x.shape[axis]
    if length <= most:
        return x
    starts = np.arange(most) * length // most
    widths = np.diff(starts, append=length).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return np.add.reduceat(x, starts, axis) / widths


def step(length: int) -> int:
    """Frames from a stretch to the next: a quarter of its length, so that whatever is copied is at most an eighth, one
    of the FRAMES means, away from one of them.
    """
    return max(1, length // 4)


def starts(frames: int, length: int) -> np.ndarray:
    """[n] i64, n ≤ STRETCHES: first frames of the stretches of `length` frames that a clip of `frames` is compared by,
    the last of which ends with it. Where there are more of them, they are evenly spread.
    """
    every = np.append(np.arange(0, frames - length, step(length)), frames - length)
    return every[clips.spread(len(every), STRETCHES)]


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The k training clips that are nearest to each of Q queries, nearest first.

    Attributes:
      distances: [Q,k] f64, of a clip's nearest stretch.
      clips: [Q,k] i64, which they are.
      starts: [Q,k] i64, the first frame of that stretch.
    """

    distances: np.ndarray
    clips: np.ndarray
    starts: np.ndarray


def nearest(queries: np.ndarray, training: Source, frames: int, around: int) -> tuple[Neighbours, dict[str, int]]:
    """The nearest training clips, and reason → clips that can't be read. Raises ConfigError where none can be read.

    Args:
      queries: [Q,n] f32, of `shrunk`.
      training: clips of the queries' height and width, of `frames` frames, as the queries, or more.
      around: k, or as many as there are.
    """
    total, unused = len(training.sizes), Counter()
    found = Neighbours(np.zeros((len(queries), 0)), *np.zeros((2, len(queries), 0), np.int64))
    waiting: list[tuple[int, np.ndarray, np.ndarray]] = []  # clip, first frames, the stretches from there, shrunk
    progress = Progress("nearest: reading training clips", total)
    for i in range(total):
        try:
            small = _in_space(read_clip(training, i, 0).video)
            first = starts(len(small), frames)
            waiting.append((i, first, np.stack([_in_time(small[f : f + frames]) for f in first])))
        except BadClip as e:
            unused[str(e)] += 1
        if waiting and (i + 1 == total or sum(len(first) for _, first, _ in waiting) >= CHUNK):
            found, waiting = _nearer(found, queries, waiting, around), []
        progress.update(i + 1, f"{i + 1} of {total}")
    progress.close()
    if not found.clips.size:
        raise ConfigError(f"no training clip could be read: {dict(unused) or 'the data set is empty'}")
    return found, dict(unused)


def _nearer(
    found: Neighbours, queries: np.ndarray, more: list[tuple[int, np.ndarray, np.ndarray]], around: int
) -> Neighbours:
    """The nearest of `found` and more clips. A clip counts once, by its nearest stretch: else a copy, which is near to
    the stretches beside it too, would not stand out among the `around` nearest.
    """
    distances, which, first = [found.distances], [found.clips], [found.starts]
    ends = np.cumsum([len(own) for _, own, _ in more])
    apart = np.split(_distances(queries, np.concatenate([rows for *_, rows in more])), ends[:-1], axis=1)
    for (clip, own, _), d in zip(more, apart, strict=True):
        place = d.argmin(axis=1)
        distances.append(d.min(axis=1, keepdims=True))
        which.append(np.full((len(queries), 1), clip))
        first.append(own[place, None])
    distances, which, first = (np.concatenate(columns, axis=1) for columns in (distances, which, first))
    order = np.argsort(distances, axis=1, kind="stable")[:, :around]
    return Neighbours(*(np.take_along_axis(columns, order, 1) for columns in (distances, which, first)))


def _distances(a_QxN: np.ndarray, b_MxN: np.ndarray) -> np.ndarray:
    """[Q,M] f64 root mean square differences: by products in f64, of what is left when b's mean is taken away, so that
    equal clips come out near 0 in spite of rounding.
    """
    a, b = (x.astype(np.float64) - b_MxN.mean(0, dtype=np.float64) for x in (a_QxN, b_MxN))
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0) / a.shape[1])
