"""What `vidgen train` does for a denoiser beside its steps: rows of tokens, held-out loss, samples of prompts."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vidgen import sample
from vidgen.conditioning import masks
from vidgen.config import ConfigError
from vidgen.data import feed, latents
from vidgen.data.packing import Packing
from vidgen.data.sources import Source
from vidgen.evaluation.heldout import heldout_loss
from vidgen.models import places
from vidgen.planning.flops import step_flops
from vidgen.planning.mix import Mix
from vidgen.studio import media
from vidgen.tokenizers import base as tokenizers
from vidgen.training import restored
from vidgen.training.course import Course, Introduction, Pause
from vidgen.training.metrics import MetricWriter, si
from vidgen.training.program import Program


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings that would fail late."""
    sample.check(config)
    masks.check_training(config)
    if config.model.classes:
        raise ConfigError(
            f"config.model.classes={config.model.classes}: clips have captions and no labels, so a model by class can "
            "be planned, imported and exported but not trained; expected config.model.classes=0"
        )
    tokenizers.geometry_from_config(config.tokenizer)  # a vae without weights can be planned with only


def settle(config: ConfigDict) -> None:
    """Chooses the prompts of samples, so that later ones show the same."""
    if config.train.sample_every and not config.sample.prompts:
        config.sample.prompts = tuple(sample.heldout_captions(config, 6))


def course(program: Program) -> Course:
    """Raises ConfigError for clips that can't be found or don't fit."""
    config, mesh = program.config, program.mesh
    tokenizer, text = program.generator.tokenizer, program.generator.text
    if config.train.sample_every:
        restored.expert(config, program.generator)  # what is wrong with it shows now
    source = latents.open_clips(config, tokenizer, text)
    packing = feed.plan(source, tokenizer, config, text)
    for frames, height, width in packing.sizes.tolist():
        grid = tokenizer.geometry.grid(frames, height, width)
        places.check_fits(config.model, grid, f"a clip of {frames}x{height}x{width}")
    return Course(
        source=source,
        tokenizer=tokenizer.digest,
        batches=lambda start: feed.batches(source, packing, tokenizer, config, start, mesh, text),
        introduce=lambda start: introduce(program, source, packing, start),
        heldout=heldout_loss(config, program.generator, mesh) if config.train.eval_every else None,
        draw=lambda params, n, workdir, writer, pause: draw(program, params, n, workdir, writer, pause),
        publish=lambda params, workdir: {},
        text=text.digest if text else "",
    )


def introduce(program: Program, source: Source, packing: Packing, start: int) -> Introduction:
    """How the clips fill the rows, and what a step computes, over the 32 steps from `start` on."""
    config = program.config
    planned = range(start, start + min(packing.steps_per_epoch, 32))
    stats, shown = packing.stats(planned), _mix(program, source, packing, planned)
    pairs = shown.pairs(tuple(config.model.window), config.model.full_every)
    features = program.generator.tokenizer.geometry.features
    flops = step_flops(config, features, pairs.full, pairs.text, pairs.crossed, pairs.windowed)
    lines = [f"{len(source.sizes)} clips, {packing.steps_per_epoch} steps a pass: {stats}"]
    lines += latents.notes(source, packing, program.generator.tokenizer, config, program.generator.text)
    if config.train.eval_every and config.data.source != "moving_shapes" and not config.data.holdout:
        lines.append("config.data.holdout is 0: the held-out loss is of clips that are trained on")
    return Introduction(
        lines=tuple(lines),
        files={"packing": dataclasses.asdict(stats)},
        work=f"{si(flops.useful)}FLOP a step, {si(flops.attention_useful)}FLOP of it in attention",
        flops=lambda step: flops.useful,
        clips=sum(map(len, shown.clips)) / len(planned),
    )


def _mix(program: Program, source: Source, packing: Packing, steps: range) -> Mix:
    """The clips of these steps, as the count of FLOPs wants them."""
    geometry = program.generator.tokenizer.geometry
    rows = [row for n in steps for row in packing.step(n)]
    grids = tuple(tuple((geometry.grid(p.frames, p.height, p.width), p.text) for p in row) for row in rows)
    seconds = program.config.model.time_in_seconds
    tick = geometry.block[0] / float(np.median(source.sizes.fps)) * 8 if seconds else 1.0
    return Mix("", grids, program.config.rows.tokens, len(steps), tick)


def draw(program: Program, params: Any, n: int, workdir: str, writer: MetricWriter | None, pause: Pause) -> None:
    """Samples of `sample.prompts`, a row each, into WORKDIR/samples/<step>/ and TensorBoard."""
    config = program.config
    prompts, seeds = list(config.sample.prompts), range(4)
    params = restored.with_expert(config, program.generator, params)  # read anew: training has no room for it
    videos = sample.draw(config, program.generator, params, prompts, seeds=seeds, pause=pause)
    if writer is None:
        return
    shown = media.grid(videos, columns=len(seeds), scale=sample.scale_for(config.sample.width))
    folder = os.path.join(workdir, "samples", f"{n:08d}")
    about = config.sample.to_dict() | {"prompts": prompts, "seeds": list(seeds), "step": n}
    with media.best_effort(workdir, n, "the samples"):
        sample.write_grid(os.path.join(folder, "grid"), shown, config.sample.fps, f"{folder}/prompts.json", about)
    writer.videos(n, {"samples": shown}, config.sample.fps)
