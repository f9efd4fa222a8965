"""Whether clips that were trained on come back when their captions are asked for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from vidgen.data.clip import BadClip
from vidgen.data.feed import cut
from vidgen.data.packing import TOO_SMALL
from vidgen.data.sources import Source
from vidgen.evaluation.quality import psnr, still_psnr
from vidgen.geometry import Geometry


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


def compare(wanted: Wanted, drawn: np.ndarray) -> dict[str, Any]:
    """A row of the table: PSNR of the drawn clip, of the clip's mean frame, and how much better the first is."""
    got, still = psnr(wanted.video, drawn), still_psnr(wanted.video)
    return {"prompt": wanted.prompt, "clip": wanted.name, "psnr": got, "still_psnr": still, "gain": got - still}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Worst and mean, in dB, over the clips."""
    return {
        "psnr_min": min(row["psnr"] for row in rows),
        "psnr_mean": float(np.mean([row["psnr"] for row in rows])),
        "gain_min": min(row["gain"] for row in rows),
        "prompts": len(rows),
    }
