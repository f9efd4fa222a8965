"""Whether clips that were trained on come back when their captions are asked for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vidgen import perceptual
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip
from vidgen.data.feed import cut
from vidgen.data.packing import TOO_SMALL
from vidgen.data.sources import Source, open_source
from vidgen.evaluation import quality
from vidgen.evaluation.clips import fingerprint, told
from vidgen.evaluation.quality import psnr, still_psnr
from vidgen.evaluation.suite import Asked, Found, Subject
from vidgen.geometry import Geometry
from vidgen.objectives import lpips


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A clip that training saw: video [T,H,W,3] u8, cut to whole tokens, and what it is asked for by."""

    name: str
    prompt: str
    video: np.ndarray
    fps: float


def clips(source: Source, geometry: Geometry, count: int) -> tuple[list[Wanted], dict[str, int]]:
    """The first `count` clips, and reason → how many of them could not be used.

    Cut to whole tokens from the middle in space and from the start in time, as training does for a learned tokenizer;
    for an exact one, it cuts a clip that has frames to spare at another place each pass.
    """
    found, unused = [], Counter()
    for index in range(min(count, len(source.sizes))):
        try:
            clip = source.read(index, 0)
        except BadClip as e:
            unused[str(e)] += 1
            continue
        frames, height, width = geometry.fit(*clip.video.shape[:3])
        if not frames * height * width:
            unused[TOO_SMALL] += 1
            continue
        video = cut(clip.video, 0, frames, height, width)
        found.append(Wanted(source.name(index), clip.caption, video, clip.fps))
    return found, dict(unused)


def check(config: ConfigDict, asked: Asked) -> None:
    """Raises ConfigError where there are no training clips."""
    open_source(config.data, "train")


def run(subject: Subject, asked: Asked) -> Found:
    """Clips of the training set drawn from their captions, each at its own size, against the clips. Shows both."""
    config = subject.config
    source = open_source(config.data, "train")
    wanted, unused = clips(source, subject.generator.tokenizer.geometry, asked.prompts)
    if not wanted:
        raise ConfigError(f"config.data.source={config.data.source}: no clip could be used: {unused}")
    drawn: dict[int, np.ndarray] = {}
    kinds = [(*clip.video.shape[:3], clip.fps) for clip in wanted]
    for kind in sorted(set(kinds)):
        changes = dict(zip((f"sample.{key}" for key in ("frames", "height", "width", "fps")), kind, strict=True))
        some = [i for i, own in enumerate(kinds) if own == kind]
        prompts = [wanted[i].prompt for i in some]
        drawn |= dict(zip(some, subject.draw(prompts, [asked.seed] * len(some), changes=changes), strict=True))
    missing = perceptual.missing("lpips")
    net = None if missing else lpips.load()
    rows = [compare(clip, drawn[i], net) for i, clip in enumerate(wanted)]
    figures = summary(rows) | {"unused": unused, "notes": [f"not measured: {missing}"] if missing else []}
    decided_by = {
        "prompts": {"count": len(wanted), "fingerprint": fingerprint([clip.prompt for clip in wanted])},
        "clips": {"split": "train", "of": len(source.sizes), "fingerprint": source.fingerprint},
        "sizes": sorted({told(kind[:3]) for kind in kinds}),
        "networks": {} if missing else {"lpips": perceptual.ASSETS["lpips"].digest},
    }
    pairs = [video for i, clip in enumerate(wanted) for video in (clip.video, drawn[i])]
    return Found(figures | {"per_prompt": rows}, decided_by, pairs[:36], wanted[0].fps)


def compare(wanted: Wanted, drawn: np.ndarray, net: Any = None) -> dict[str, Any]:
    """A row of the table: PSNR of the drawn clip, of the clip's mean frame, how much better the first is; SSIM and
    LPIPS, None for frames too small, and LPIPS without `net`, its weights.
    """
    got, still = psnr(wanted.video, drawn), still_psnr(wanted.video)
    row = {"prompt": wanted.prompt, "clip": wanted.name, "psnr": got, "still_psnr": still, "gain": got - still}
    return row | quality.alike(wanted.video, drawn, net)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the clips: worst and mean PSNR and the least gain, in dB; means of SSIM and LPIPS where there are any."""
    means = {f"{name}_mean": value for name, value in quality.mean_alike(rows).items()}
    return {
        "psnr_min": min(row["psnr"] for row in rows),
        "psnr_mean": float(np.mean([row["psnr"] for row in rows])),
        "gain_min": min(row["gain"] for row in rows),
        **means,
        "prompts": len(rows),
    }
