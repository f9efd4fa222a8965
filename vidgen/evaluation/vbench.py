"""The suite `vbench`: what VBench (Huang et al., arXiv:2311.17982) measures, as far as it needs no pretrained network.

Each measure says how it departs from the published one. Values are not VBench's: they are for comparing runs, and
drawn clips with real ones, which are measured beside them. Not measured: background consistency, aesthetics, image
quality and the prompt dimensions, which need CLIP, DINO, GRiT and others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vidgen import perceptual
from vidgen.data.progress import Progress
from vidgen.evaluation import clips, motion, quality
from vidgen.evaluation.suite import Asked, Found, Subject, mean
from vidgen.objectives import lpips

MEASURES = ("temporal_flickering", "motion_smoothness", "dynamic", "motion", "subject_consistency")
LEAST = 3  # frames: motion smoothness looks at one between two


def check(config: ConfigDict, asked: Asked) -> None:
    """Raises ConfigError where clips are too short or there are no held-out ones."""
    clips.check_frames(config, "vbench", LEAST, "measures motion")
    clips.sized(config, "heldout", clips.sample_size(config))


def run(subject: Subject, asked: Asked) -> Found:
    """Clips drawn from captions of held-out clips, and those clips: means of what `measured` gives of each.

    dynamic_degree: share of the clips that are dynamic. The real clips' are real_…, and stand in the table.
    """
    config = subject.config
    s, size = config.sample, clips.sample_size(config)
    real = clips.read(clips.sized(config, "heldout", size), asked.prompts)
    prompts = [clip.caption for clip in real.clips]
    drawn = subject.draw(prompts, range(asked.seed, asked.seed + len(prompts)))

    missing = perceptual.missing("lpips")
    net = None if missing or min(size[1:]) < lpips.LEAST else jax.device_put(lpips.load())
    rows = _all("drawn", [(video, s.fps) for video in drawn], net)
    truths = _all("real", [(clip.video, clip.fps) for clip in real.clips], net)
    found, truth = summary(rows), summary(truths)
    names = [name for name in found if found[name] is not None]
    figures = found | {f"real_{name}": value for name, value in truth.items()} | {"prompts": len(prompts)}
    figures["table"] = {
        "head": ["", "drawn", "real"],
        "rows": [[name.replace("_", " "), found[name], truth[name]] for name in names],
    }
    figures["notes"] = real.notes("held-out") + clips.seen_note(config)
    if net is None:
        why = missing or f"frames are smaller than {lpips.LEAST} pixels a side"
        figures["notes"].append(f"subject_consistency_vgg is not measured: {why}")
    figures["per_prompt"] = [{"prompt": prompt} | row for prompt, row in zip(prompts, rows, strict=True)]
    decided_by = {
        "prompts": {"count": len(prompts), "fingerprint": clips.fingerprint(prompts)},
        "clips": {"split": "heldout", "count": len(real.clips), "of": real.total, "fingerprint": real.fingerprint},
        "matching": {"side": motion.SIDE, "window": motion.WINDOW, "penalty": motion.PENALTY},
        "networks": {} if net is None else {"vgg16": perceptual.ASSETS["lpips"].digest},
    }
    pairs = [video for clip, own in zip(real.clips, drawn, strict=True) for video in (clip.video, own)]
    return Found(figures, decided_by, pairs[:36])


def _all(what: str, videos: Sequence[tuple[np.ndarray, float]], net: Any) -> list[dict[str, Any]]:
    """Of (clip, its frames a second)."""
    progress, rows = Progress(f"vbench: measuring {what} clips", len(videos)), []
    for video, fps in videos:
        rows.append(measured(video, fps, net))
        progress.update(len(rows), f"{len(rows)} of {len(videos)}")
    progress.close()
    return rows


def measured(video: np.ndarray, fps: float, net: Any = None) -> dict[str, Any]:
    """What is measured of a clip [T,H,W,3] u8 of 3 frames or more; `net`: the weights of `objectives/lpips.py`.

    The MEASURES, of which "motion" is the mean of `speeds`, in shorter sides; with `net` subject_consistency_vgg too.
    """
    small = motion.shrunk(video)
    side, pixels = min(small.shape[1:3]), speeds(small, fps)
    row = {
        "temporal_flickering": temporal_flickering(video),
        "motion_smoothness": motion_smoothness(small),
        "dynamic": dynamic(pixels, side, fps),
        "motion": float(np.mean(pixels)) / side,
        "subject_consistency": subject_consistency(video),
    }
    if net is not None:
        row["subject_consistency_vgg"] = subject_consistency(video, net)
    return row


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Means over clips; "dynamic" becomes dynamic_degree."""
    found = {name: mean([row.get(name) for row in rows]) for name in (*MEASURES, "subject_consistency_vgg")}
    return {("dynamic_degree" if name == "dynamic" else name): value for name, value in found.items()}


def temporal_flickering(video: np.ndarray) -> float:
    """1 - mean absolute change from frame to frame, of the range of pixels: 0 to 1, 1 for a still clip.

    VBench measures it on clips of prompts that ask for no motion; here on all, so motion lowers it too.
    """
    return 1 - quality.flicker(video)


def motion_smoothness(video: np.ndarray) -> float:
    """1 - mean absolute error, of the range of pixels, of every second frame guessed from its neighbours: 0 to 1.

    VBench lets AMT, a network, guess; here it is `motion.between`. `video`: [T,H,W,3] of `motion.shrunk`, T ≥ 3.
    """
    errors = [
        float(np.abs(motion.between(video[t - 1], video[t + 1]) - video[t]).mean(dtype=np.float64))
        for t in range(1, len(video) - 1, 2)
    ]
    return 1 - float(np.mean(errors)) / 255


def speeds(small: np.ndarray, fps: float) -> list[float]:
    """Of each two frames, 8 a second: the mean displacement of the fastest 5 % of the pixels, in pixels of `small`.

    VBench measures motion with RAFT, a network, in parts of pixels; here it is `motion.flow`, in whole ones of a clip
    of `motion.shrunk`.
    """
    interval = max(1, round(fps / 8))
    frames = small[::interval] if len(small) > interval else small[[0, -1]]
    found = []
    for a, b in zip(frames[:-1], frames[1:], strict=True):
        length = np.sort(np.linalg.norm(motion.flow(a, b), axis=-1), axis=None)
        found.append(float(length[-max(1, int(0.05 * length.size)) :].mean()))
    return found


def dynamic(pixels: Sequence[float], side: int, fps: float) -> bool:
    """Whether a clip moves, by VBench's rule on its `speeds`; `side`: pixels of the shorter one.

    They must exceed 6/256 of the side (below 8 frames a second, as much more) in a quarter of the frames, and once at
    least, which VBench does not ask of very short clips.
    """
    least = max(1.0, 8 / fps) * 6 * side / 256
    return sum(speed > least for speed in pixels) >= max(1, round((len(pixels) + 1) / 4))


def subject_consistency(video: np.ndarray, net: Any = None) -> float:
    """How like the first frame, and the one before, frames are: the mean over all but the first of the two cosines.

    VBench takes DINO's features of frames. Here they are, without `net`, the square roots of the shares of the frame's
    pixels in 8 × 8 × 8 bins of colour (their cosine is Bhattacharyya's coefficient), which see what is there and not
    where; with `net`, means over the frame of VGG16's last level in LPIPS. `video`: [T,H,W,3] u8, T ≥ 2.
    """
    features = _histograms(video) if net is None else _vgg(net, video)
    features = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    to_first, to_last = features[1:] @ features[0], np.einsum("tc,tc->t", features[1:], features[:-1])
    return float((np.maximum(to_first, 0) + np.maximum(to_last, 0)).mean() / 2)


def _histograms(video: np.ndarray) -> np.ndarray:
    """[T,512] square roots of shares. Colours between two bins count for both, so that noise moves little between."""
    share = np.zeros((len(video), 512))
    place = np.clip(video.reshape(len(video), -1, 3) / 255 * 8 - 0.5, 0, 7)
    low = np.minimum(place.astype(np.int64), 6)
    part = place - low
    rows = np.arange(len(video))[:, None]
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, part, 1 - part), axis=-1)
        np.add.at(share, (rows, (low + corner) @ (64, 8, 1)), weight)
    return np.sqrt(share / place.shape[1])


def _vgg(net: Any, video: np.ndarray) -> np.ndarray:
    """[T,512], a frame at a time: one compile for each size, little memory."""
    return np.stack([np.asarray(_pooled(net, frame[None]))[0] for frame in video])


@jax.jit
def _pooled(net, images_NxHxWx3: jax.Array) -> jax.Array:
    return lpips.features(net, images_NxHxWx3.astype(np.float32) / 127.5 - 1)[-1].mean(axis=(1, 2))
