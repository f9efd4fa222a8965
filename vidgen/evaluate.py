"""`vidgen evaluate`: what a trained model gets right, and what a tokenizer leaves of a clip."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vidgen import sample
from vidgen.conditioning import given
from vidgen.config import ConfigError
from vidgen.data.scenes import render
from vidgen.data.sources import open_source
from vidgen.evaluation import memorised, moving_shapes, quality
from vidgen.studio import media
from vidgen.training import restored
from vidgen.training.checkpoint import Checkpoints, read_config


def run(
    workdir: str,
    suite: str = "",
    *,
    prompts: int = 144,
    seed: int = 0,
    step: int | None = None,
    tokenizers: Sequence[str] = (),
    inputs: Sequence[str] = (),
    clips: int = 64,
    fvd: bool = True,
    **settings: Any,
) -> dict:
    """Evaluates the averaged weights of a checkpoint, or the run's tokenizer.

    Writes WORKDIR/evaluation/SUITE.json, SUITE-<step>.json (which stays, as history) and SUITE.gif and .mp4, the clips
    that were judged; the suite reconstruction also its worst clips and compression.json, .svg and .html.

    Args:
      workdir: of a training run.
      suite: a key of SUITES or reconstruction; empty: reconstruction for a VAE, moving_shapes for a run on moving
        shapes, memorised for any other.
      prompts: how many clips are judged.
      seed: of the prompts and the noise.
      step: of the checkpoint; None: the newest.
      tokenizers, inputs, clips, fvd: of the suite reconstruction: see `evaluation/reconstruction.py`.
      **settings: instead of the keys of `config.sample`: frames, height, width, fps, solver, steps, guidance, eta. Of
        these, reconstruction takes frames: of a clip at most.

    Returns what SUITE.json holds. Raises ConfigError.
    """
    known = (*SUITES, "reconstruction")
    if suite and suite not in known:
        near = difflib.get_close_matches(suite, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown suite {suite!r}: known are {', '.join(known)}{hint}")
    if prompts < 1:
        raise ConfigError(f"--prompts={prompts}: expected at least 1")
    if seed < 0:
        raise ConfigError(f"--seed={seed}: expected 0 or more")
    config = read_config(workdir)
    suite = suite or _suite_of(config)
    if suite == "reconstruction":
        ignored = {"prompts": prompts != 144, "seed": seed != 0, "step": step is not None}
        ignored |= {name: value is not None for name, value in settings.items() if name != "frames"}
    else:
        ignored = {"tokenizer": tokenizers, "input": inputs, "clips": clips != 64, "nofvd": not fvd}
    if flag := next((name for name, given in ignored.items() if given), ""):
        raise ConfigError(f"--{flag} has no meaning with --suite {suite}; leave it out")
    if suite == "reconstruction":
        from vidgen.evaluation import reconstruction

        results, pictures = reconstruction.run(
            workdir, tokenizers=tokenizers, inputs=inputs, clips=clips, frames=settings.get("frames") or 0, with_fvd=fvd
        )
        step = newest_step(workdir)
    else:
        config, generator, params, step = restored.load(workdir, step)
        sample.override(config, settings)
        results, videos = SUITES[suite](config, generator, params, prompts, seed)
        results |= {"sample": config.sample.to_dict()}
        shown = media.grid(videos[:36], columns=6, scale=max(1, sample.scale_for(config.sample.width) // 2))
        pictures = {suite: (shown, config.sample.fps)}
    results = {"suite": suite, "step": step, **results}

    folder = os.path.join(workdir, "evaluation")
    text = json.dumps(results, ensure_ascii=False, indent=2).encode()
    for name in (f"{suite}.json", *([f"{suite}-{step}.json"] if step is not None else [])):
        media.write(os.path.join(folder, name), text)
    for name, (video, fps) in pictures.items():
        for kind in ("gif", "mp4"):
            media.save_video(os.path.join(folder, f"{name}.{kind}"), video, fps)
    return results


def _suite_of(config: ConfigDict) -> str:
    """The suite that fits a run."""
    if config.task == "vae":
        return "reconstruction"
    return "moving_shapes" if config.data.source == "moving_shapes" else "memorised"


def newest_step(workdir: str) -> int | None:
    """Of the checkpoints; None where there are none."""
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return checkpoints.latest
    finally:
        checkpoints.close()


def _moving_shapes(config: ConfigDict, generator, params, count: int, seed: int) -> tuple[dict, list[np.ndarray]]:
    """Held-out combinations of attributes, judged by parsing the clips; see `evaluation/moving_shapes.py`."""
    asked = _asked(config, count, seed)
    texts = [prompt.text for prompt in asked]
    videos = sample.draw(config, generator, params, texts, seeds=range(seed, seed + count), zipped=True)
    verdicts = [moving_shapes.judge(video, prompt.scene) for video, prompt in zip(videos, asked, strict=True)]
    return moving_shapes.summary(verdicts) | {"per_prompt": _per_prompt(asked, verdicts)}, videos


def _asked(config: ConfigDict, count: int, seed: int) -> list[moving_shapes.Prompt]:
    """Prompts of held-out combinations at the size of the run's samples."""
    shapes = ConfigDict(config.data.moving_shapes)
    shapes.sizes = ((config.sample.frames, config.sample.height, config.sample.width),)
    return moving_shapes.prompts(shapes, count, seed)


def _per_prompt(asked: list[moving_shapes.Prompt], verdicts: list[moving_shapes.Verdict]) -> list[dict[str, Any]]:
    fields = ("shape", "colour", "motion", "count", "all_right", "permanence")
    return [
        {"prompt": p.text} | {f: getattr(v, f) for f in fields} | {"flicker": v.flicker, "seen": _told(v.seen)}
        for p, v in zip(asked, verdicts, strict=True)
    ]


def _first_frame(config: ConfigDict, generator, params, count: int, seed: int) -> tuple[dict, list[np.ndarray]]:
    """The same, given the true clip's first frame beside its caption, and its PSNR. Shows truths and what was drawn."""
    if config.data.source != "moving_shapes":
        raise ConfigError(
            f"config.data.source={config.data.source}: the suite first_frame judges moving shapes; expected a run on "
            "data.source=moving_shapes"
        )
    given.check_kind(config, "first")
    asked = _asked(config, count, seed)
    truths = [render(p.scene, p.frames, p.height, p.width) for p in asked]
    videos = sample.draw(
        config,
        generator,
        params,
        [p.text for p in asked],
        seeds=range(seed, seed + count),
        zipped=True,
        given=[given.Given(first=truth[0]) for truth in truths],
    )
    verdicts = [moving_shapes.judge(video, p.scene) for video, p in zip(videos, asked, strict=True)]
    first = [quality.psnr(truth[:1], video[:1]) for truth, video in zip(truths, videos, strict=True)]
    per_prompt = [row | {"psnr_first": db} for row, db in zip(_per_prompt(asked, verdicts), first, strict=True)]
    results = moving_shapes.summary(verdicts) | {"psnr_first": float(np.mean(first)), "psnr_first_least": min(first)}
    pairs = [video for pair in zip(truths, videos, strict=True) for video in pair]
    return results | {"per_prompt": per_prompt}, pairs


def _told(seen) -> str:
    return "; ".join(f"{s.colour} {s.shape} {'/'.join(s.motions)}".strip() for s in seen) or "nothing"


def _memorised(config: ConfigDict, generator, params, count: int, seed: int) -> tuple[dict, list[np.ndarray]]:
    """Clips of the training set drawn from their captions, against the clips; see `evaluation/memorised.py`."""
    wanted, unused = memorised.clips(open_source(config.data, "train"), generator.tokenizer.geometry, count)
    if not wanted:
        raise ConfigError(f"config.data.source={config.data.source}: no clip could be used: {unused}")
    drawn: dict[str, np.ndarray] = {}
    for kind in sorted({(*clip.video.shape[:3], clip.fps) for clip in wanted}):
        config.sample.frames, config.sample.height, config.sample.width, config.sample.fps = kind
        some = [clip for clip in wanted if (*clip.video.shape[:3], clip.fps) == kind]
        videos = sample.draw(config, generator, params, [clip.prompt for clip in some], seeds=(seed,))
        drawn |= dict(zip((clip.name for clip in some), videos, strict=True))
    rows = [memorised.compare(clip, drawn[clip.name]) for clip in wanted]
    pairs = [video for clip in wanted for video in (clip.video, drawn[clip.name])]
    return memorised.summary(rows) | {"unused": unused, "per_prompt": rows}, pairs


# suite → (config, generator, params, how many, seed) → (figures, clips to show)
SUITES: dict[str, Callable] = {
    "moving_shapes": _moving_shapes,
    "first_frame": _first_frame,
    "memorised": _memorised,
}


def table(results: dict[str, Any]) -> str:
    """The figures of `run` for a terminal."""
    lines = [f"{results['suite']}, step {results['step']}"]
    if results["suite"] == "reconstruction":
        from vidgen.evaluation import reconstruction

        return "\n".join([*lines, reconstruction.told(results)])
    for name, value in results.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or name == "step":
            continue
        as_share = name in moving_shapes.RATES and results["suite"] in ("moving_shapes", "first_frame")
        lines.append(f"  {name:<16} {f'{value:.1%}' if as_share else f'{value:.4g}':>8}")
    return "\n".join(lines)
