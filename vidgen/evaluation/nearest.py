"""The suite `nearest`: whether drawn clips are copies of clips that were trained on.

Clips are compared as pixels: shrunk to FRAMES × SIDE × SIDE means, root mean square difference, of the range of pixels.
A copy that is shifted, mirrored or recoloured is not found; clips that show little, or are blurred, are near to
everything, which is why the distance is also set against that of the next nearest clips.
"""

from __future__ import annotations

import numpy as np

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
CHUNK = 256  # training clips in memory


def run(subject: Subject, asked: Asked) -> Found:
    """Clips drawn from held-out clips' captions, and these clips, each against `clips` training clips of pass 0.

    distance, heldout_distance: mean distance to the nearest training clip, 0 to 1. nearer: share of the drawn clips
    that are nearer to one than the nearest 1 % of the held-out clips; of a model that copies nothing and draws clips
    like theirs, about 0.01. ratio, heldout_ratio: mean of the nearest distance over the mean of the AROUND nearest
    (after Carlini et al., arXiv:2301.13188), near 0 for a copy. copied: as nearer, by this ratio. Shows pairs of drawn
    clip and nearest training clip, the least ratio first.
    """
    config = subject.config
    clips.check_held_out(config, "nearest")
    size = (config.sample.frames, config.sample.height, config.sample.width)
    source = clips.sized(config, "train", size)
    real = clips.read(clips.sized(config, "heldout", size), asked.prompts)
    prompts = [clip.caption for clip in real.clips]
    drawn = subject.draw(prompts, range(asked.seed, asked.seed + len(prompts)))

    places = clips.spread(len(source.sizes), asked.clips)
    training = Subset(source, places)
    queries = np.stack([shrunk(video) for video in (*drawn, *(clip.video for clip in real.clips))])
    distances, indices, unused = nearest(queries, training, AROUND)
    count = len(drawn)
    best, ratio = distances[:, 0], distances[:, 0] / np.maximum(distances.mean(axis=1), 1e-12)
    rows = [
        {"prompt": p, "distance": float(d), "ratio": float(r), "nearest": training.name(int(i))}
        for p, d, r, i in zip(prompts, best, ratio, indices[:, 0], strict=False)
    ]
    few = len(real.clips) * SHARE < 1
    notes = real.notes("held-out") + [f"{n} training clips could not be used: {why}" for why, n in unused.items()]
    notes += [f"{len(real.clips)} held-out clips: their nearest {SHARE:.0%} is the nearest one"] if few else []
    figures = {
        "nearer": beyond(best[:count], best[count:]),
        "copied": beyond(ratio[:count], ratio[count:]),
        "distance": float(best[:count].mean()),
        "heldout_distance": float(best[count:].mean()),
        "ratio": float(ratio[:count].mean()),
        "heldout_ratio": float(ratio[count:].mean()),
        "training_clips": len(training) - sum(unused.values()),
        "prompts": count,
        "notes": notes,
        "per_prompt": rows,
    }
    decided_by = {
        "prompts": {"count": count, "fingerprint": clips.fingerprint(prompts)},
        "clips": {"split": "heldout", "count": len(real.clips), "of": real.total, "fingerprint": real.fingerprint},
        "training_clips": {"count": len(training), "of": len(source.sizes), "fingerprint": training.fingerprint},
        "distance": {"frames": FRAMES, "side": SIDE, "around": AROUND, "share": SHARE},
    }
    closest = np.argsort(ratio[:count], kind="stable")[:18]
    pairs = [video for i in closest for video in (drawn[i], read_clip(training, int(indices[i, 0]), 0).video)]
    return Found(figures, decided_by, pairs)


def beyond(drawn: np.ndarray, heldout: np.ndarray) -> float:
    """The share of `drawn` below the SHARE-quantile of `heldout`."""
    return float((drawn < np.quantile(heldout, SHARE)).mean())


def shrunk(video: np.ndarray) -> np.ndarray:
    """A clip [T,H,W,3] u8 as [n] f32 of 0 to 1: means over equal parts of its frames, rows and columns."""
    x = video.astype(np.float32) / 255
    for axis, most in enumerate((FRAMES, SIDE, SIDE)):
        if x.shape[axis] > most:
            starts = np.arange(most) * x.shape[axis] // most
            widths = np.diff(starts, append=x.shape[axis]).reshape([-1 if a == axis else 1 for a in range(4)])
            x = np.add.reduceat(x, starts, axis) / widths
    return x.reshape(-1).astype(np.float32)


def nearest(queries: np.ndarray, training: Source, around: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """(distances [Q,k] f64, nearest first; which training clips [Q,k] i64; reason → clips that can't be read).

    Raises ConfigError where none can be read.

    Args:
      queries: [Q,n] f32, of `shrunk`.
      training: clips of the queries' size.
      around: k, or as many as there are.
    """
    total, unused = len(training.sizes), {}
    best = np.full((len(queries), 0), np.inf)
    index = np.zeros((len(queries), 0), np.int64)
    progress = Progress("nearest: reading training clips", total)
    for first in range(0, total, CHUNK):
        rows, names = [], []
        for i in range(first, min(first + CHUNK, total)):
            try:
                rows.append(shrunk(read_clip(training, i, 0).video))
                names.append(i)
            except BadClip as e:
                unused[str(e)] = unused.get(str(e), 0) + 1
        if rows:
            best = np.concatenate([best, _distances(queries, np.stack(rows))], axis=1)
            index = np.concatenate([index, np.broadcast_to(names, (len(queries), len(names)))], axis=1)
            order = np.argsort(best, axis=1, kind="stable")[:, :around]
            best, index = np.take_along_axis(best, order, 1), np.take_along_axis(index, order, 1)
        done = min(first + CHUNK, total)
        progress.update(done, f"{done} of {total}")
    progress.close()
    if not best.shape[1]:
        raise ConfigError(f"no training clip could be read: {unused or 'the data set is empty'}")
    return best, index, unused


def _distances(a_QxN: np.ndarray, b_MxN: np.ndarray) -> np.ndarray:
    """[Q,M] f64 root mean square differences: by products in f64, of what is left when b's mean is taken away, so that
    equal clips come out near 0 in spite of rounding.
    """
    a, b = (x.astype(np.float64) - b_MxN.mean(0, dtype=np.float64) for x in (a_QxN, b_MxN))
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0) / a.shape[1])
