"""The suites `moving_shapes` and `first_frame`: whether drawn clips show what was asked for, as the judge sees them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen import perceptual
from vidgen.conditioning import given
from vidgen.config import ConfigError
from vidgen.data.scenes import render
from vidgen.evaluation import clips, moving_shapes, quality
from vidgen.evaluation.suite import Asked, Found, Subject
from vidgen.objectives import lpips


def check(config: ConfigDict, asked: Asked) -> None:
    """Raises ConfigError where there are no prompts of the samples' size."""
    _prompts(config, asked)


def run(subject: Subject, asked: Asked) -> Found:
    """Held-out combinations of attributes, judged by parsing the clips; see `evaluation/moving_shapes.py`."""
    prompts = _prompts(subject.config, asked)
    videos = subject.draw([p.text for p in prompts], _seeds(asked))
    verdicts = [moving_shapes.judge(video, p.scene) for video, p in zip(videos, prompts, strict=True)]
    figures = moving_shapes.summary(verdicts) | {"per_prompt": _per_prompt(prompts, verdicts)}
    return Found(figures, _decided_by(prompts), videos[:36])


def check_first_frame(config: ConfigDict, asked: Asked) -> None:
    """Raises ConfigError for another source of clips, and a model that was not trained to be given first frames."""
    if config.data.source != "moving_shapes":
        raise ConfigError(
            f"config.data.source={config.data.source}: the suite first_frame judges moving shapes; expected a run on "
            "data.source=moving_shapes"
        )
    given.check_kind(config, "first")
    check(config, asked)


def run_first_frame(subject: Subject, asked: Asked) -> Found:
    """The same, given the true clip's first frame beside its caption, and how well that frame comes back.

    psnr_first: mean, dB; psnr_first_least: the worst clip's; ssim_first, lpips_first: means, None where frames are too
    small or the extra [perceptual] is missing. Shows truths and what was drawn.
    """
    prompts = _prompts(subject.config, asked)
    truths = [render(p.scene, p.frames, p.height, p.width) for p in prompts]
    starts = [given.Given(first=truth[0]) for truth in truths]
    videos = subject.draw([p.text for p in prompts], _seeds(asked), given=starts)
    verdicts = [moving_shapes.judge(video, p.scene) for video, p in zip(videos, prompts, strict=True)]
    pairs = list(zip(truths, videos, strict=True))
    first = [quality.psnr(truth[:1], video[:1]) for truth, video in pairs]
    missing = perceptual.missing("lpips")
    net = None if missing else lpips.load()
    looks = [quality.alike(truth[:1], video[:1], net) for truth, video in pairs]
    rows = [
        row | {"psnr_first": db} | {f"{name}_first": value for name, value in look.items()}
        for row, db, look in zip(_per_prompt(prompts, verdicts), first, looks, strict=True)
    ]
    figures = moving_shapes.summary(verdicts) | {"psnr_first": float(np.mean(first)), "psnr_first_least": min(first)}
    figures |= {f"{k}_first": v for k, v in quality.mean_alike(looks).items()}
    figures |= {"notes": [f"not measured: {missing}"] if missing else [], "per_prompt": rows}
    networks = {} if missing else {"lpips": perceptual.ASSETS["lpips"].digest}
    return Found(figures, _decided_by(prompts) | {"networks": networks}, [v for pair in pairs for v in pair][:36])


def _seeds(asked: Asked) -> range:
    return range(asked.seed, asked.seed + asked.prompts)


def _prompts(config: ConfigDict, asked: Asked) -> list[moving_shapes.Prompt]:
    """Prompts of held-out combinations at the size of the run's samples."""
    sizes = (clips.sample_size(config),)
    shapes = configs.override(config, {"data.moving_shapes.sizes": sizes}).data.moving_shapes
    return moving_shapes.prompts(shapes, asked.prompts, asked.seed)


def _decided_by(prompts: list[moving_shapes.Prompt]) -> dict[str, Any]:
    # A caption leaves open where things start and how fast they go: the scenes decide too.
    scenes = [repr(dataclasses.astuple(p)) for p in prompts]
    return {"prompts": {"count": len(prompts), "fingerprint": clips.fingerprint(scenes)}}


def _per_prompt(asked: list[moving_shapes.Prompt], verdicts: list[moving_shapes.Verdict]) -> list[dict[str, Any]]:
    fields = ("shape", "colour", "motion", "count", "all_right", "permanence")
    return [
        {"prompt": p.text} | {f: getattr(v, f) for f in fields} | {"flicker": v.flicker, "seen": _told(v.seen)}
        for p, v in zip(asked, verdicts, strict=True)
    ]


def _told(seen) -> str:
    return "; ".join(f"{s.colour} {s.shape} {'/'.join(s.motions)}".strip() for s in seen) or "nothing"
