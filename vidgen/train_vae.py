"""What `vidgen train` does for a VAE beside its steps: chunks of clips, held-out figures, pictures, and its weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.data import chunks
from vidgen.data.chunks import Chunks, Shape
from vidgen.data.clip import BadClip
from vidgen.data.feed import read_clip
from vidgen.data.sources import Source, open_source
from vidgen.evaluation import quality
from vidgen.geometry import Geometry
from vidgen.objectives import reconstruction
from vidgen.parallel import processes
from vidgen.studio import media
from vidgen.tokenizers import chunked
from vidgen.tokenizers.vae import CausalVAE
from vidgen.training.autoencoding import shapes, stride
from vidgen.training.course import Course, Introduction, Pause
from vidgen.training.metrics import MetricWriter, si
from vidgen.training.program import Program

STATISTICS = 16  # batches over which the latents' mean and std are measured
PICTURES = 6  # held-out clips that are drawn
WIDEST = 512  # pixels that a picture has to be enlarged to
ERROR = 4  # how much brighter than it is the error is drawn


def check(config: ConfigDict) -> None:
    """Nothing that `vidgen.training.autoencoding.check` has not looked at."""


def settle(config: ConfigDict) -> None:
    """Nothing is left to choose: the pictures are of the first held-out clips."""


def course(program: Program) -> Course:
    """Raises ConfigError for clips that can't be found or are too small."""
    config, mesh = program.config, program.mesh
    source = open_source(config.data, "train")
    plan = Chunks(source.sizes, config.clips, shapes(config), stride(config), config.seed)
    return Course(
        source=source,
        tokenizer="",
        batches=lambda start: chunks.batches(source, plan, config.data, start, mesh),
        introduce=lambda start: introduce(program, source, plan, start),
        heldout=heldout(program) if config.train.eval_every else None,
        draw=lambda params, n, workdir, writer, pause: draw(program, params["vae"], n, workdir, writer, pause),
        publish=publisher(program, source, plan),
    )


def introduce(program: Program, source: Source, plan: Chunks, start: int) -> Introduction:
    """Which chunks there are, of how many clips, and what a step computes."""
    config = program.config
    flops = {shape: useful_flops(program.task.model, shape) for shape in plan.shapes}
    steps = [plan.shape(n) for n in range(start, min(start + chunks.CYCLE, config.train.steps))] or [plan.shape(start)]
    listed, told = [], []
    for shape, clips in zip(plan.shapes, plan.eligible, strict=True):
        share = steps.count(shape) / len(steps)
        told.append({"shape": shape.text, "chunks": shape.count, "clips": len(clips), "share_of_steps": share})
        listed.append(f"{shape.count} x {shape.text} ({100 * share:.0f} % of steps, {len(clips)} clips)")
    lines = [f"{len(source.sizes)} clips, chunks of {len(listed)} shapes: {'; '.join(listed)}"]
    if config.clips.image_steps > start:
        lines.append(f"images only up to step {config.clips.image_steps}")
    if plan.too_small:
        lines.append(f"{plan.too_small} of the clips are smaller than every shape, and stay out")
    if config.train.eval_every and config.data.source != "moving_shapes" and not config.data.holdout:
        lines.append("config.data.holdout is 0: the held-out figures are of clips that are trained on")
    mean = sum(flops[shape] for shape in steps) / len(steps)
    return Introduction(
        lines=tuple(lines),
        files={"chunks": {"shapes": told, "clips": len(source.sizes), "too_small": plan.too_small}},
        work=f"{si(mean)}FLOP a step on average: the VAE forward, by XLA's count, three times",
        flops=lambda step: flops[plan.shape(step)],
        clips=sum(shape.count for shape in steps) / len(steps),
    )


@functools.lru_cache
def useful_flops(vae: CausalVAE, shape: Shape) -> float:
    """Of a step over chunks of a shape: the VAE's own forward pass as XLA counts it, and twice that backward.

    Losses that look through other networks, and what the backward pass computes again, are not in it.
    """
    # The whole, and not several frames at a time as on a CPU: a count of loops would be of one turn.
    video = jax.ShapeDtypeStruct((1, *shape.size, 3), np.float32)
    params = jax.eval_shape(vae.init, jax.random.key(0), video)
    counted = jax.jit(vae.clone(remat=False).apply).lower(params, video).cost_analysis()
    return 3.0 * shape.count * float(counted["flops"])


def heldout(program: Program) -> Any:
    """(averaged weights, pause) → {"heldout_psnr", "heldout_l1", "heldout_l2", "heldout_kl", "heldout_loss",
    "heldout_unreadable"}, and "heldout_psnr/17x64x64" where there are several shapes.

    The same `train.eval_rows` chunks of each shape every time, rounded up to whole batches, of clips that are held out
    from training, decoded from the latents' mean; each shape counts alike. All processes call it.
    """
    config, mesh = program.config, program.mesh
    source = open_source(config.data, "heldout")
    try:
        plans = [
            Chunks(source.sizes, configured(config, shape), [shape], stride(config), config.seed + 1)
            for shape in shapes(config)
        ]
    except ConfigError as e:
        raise ConfigError(f"config.train.eval_every={config.train.eval_every}, on held-out clips: {e}") from None
    vae, c = program.task.model, config.reconstruction
    sums = _whole(program, lambda params, batch: reconstruction.heldout_sums(vae, params, batch, c))

    def figures(params: Any, pause: Pause) -> dict[str, float]:
        found, unreadable = {}, 0.0
        for plan in plans:
            (shape,) = plan.shapes
            total: dict[str, float] = {}
            steps = -(-config.train.eval_rows // shape.count)
            for n in range(steps):
                pause()
                for name, value in jax.device_get(sums(params["vae"], chunks.load(source, plan, n, mesh))).items():
                    total[name] = total.get(name, 0.0) + float(value)
            unreadable += steps * shape.count - total["chunks"]
            count = max(total.pop("chunks"), 1.0)
            found[shape.text] = {name: value / count for name, value in total.items()}
        mean = {f"heldout_{k}": float(np.mean([f[k] for f in found.values()])) for k in next(iter(found.values()))}
        each = {f"heldout_psnr/{text}": f["psnr"] for text, f in found.items()} if len(found) > 1 else {}
        return mean | each | {"heldout_unreadable": unreadable}

    return figures


def configured(config: ConfigDict, shape: Shape) -> ConfigDict:
    """`config.clips` for one shape alone."""
    clips = ConfigDict(config.clips).copy_and_resolve_references()
    clips.update(shapes=(dataclasses.astuple(shape),), weights=(), image_steps=0)
    return clips


def _whole(program: Program, function: Any) -> Any:
    """`function` of (the VAE's parameters, a batch), jitted; its results lie whole on every device."""
    whole = NamedSharding(program.mesh, P())

    def of_whole(params: Any, batch: Any) -> Any:
        return function(jax.lax.with_sharding_constraint(params, jax.tree.map(lambda _: whole, params)), batch)

    return jax.jit(of_whole, out_shardings=whole)


def publisher(program: Program, source: Source, plan: Chunks) -> Any:
    """(averaged weights, workdir) → {"latents_mean", "latents_std"}, a channel each, measured over chunks that are
    trained on; WORKDIR/weights holds the averaged weights with them.
    """
    vae, mesh = program.task.model, program.mesh
    sums = _whole(program, lambda params, batch: reconstruction.latent_sums(vae, params, batch))
    first = program.config.clips.image_steps  # the steps after that are what the run is for

    def publish(params: Any, workdir: str) -> dict[str, Any]:
        found = [
            jax.device_get(sums(params["vae"], chunks.load(source, plan, n, mesh)))
            for n in range(first, first + STATISTICS)
        ]
        total, squares, count = (sum(np.asarray(x, np.float64) for x in column) for column in zip(*found, strict=True))
        mean = total / max(count, 1.0)
        std = np.sqrt(np.maximum(squares / max(count, 1.0) - mean**2, 1e-12))
        shape = dataclasses.replace(
            vae.config, latents_mean=tuple(map(float, mean)), latents_std=tuple(map(float, std))
        )
        whole = _gather(mesh)(params["vae"])
        if processes.is_lead():
            weights.save(os.path.join(workdir, "weights"), "vae", shape.to_dict(), jax.device_get(whole))
        return {"latents_mean": list(shape.latents_mean), "latents_std": list(shape.latents_std)}

    return publish


@functools.cache
def _gather(mesh: Mesh) -> Any:
    """arrays → the same, whole on every device; all processes call it."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


def draw(program: Program, params: Any, n: int, workdir: str, writer: MetricWriter | None, pause: Pause) -> None:
    """Held-out clips, their reconstructions and the error between, a row each, into WORKDIR/samples/<step>/.

    As large as they are, up to the VAE's multiples; the first process does it alone.
    """
    config, vae = program.config, program.task.model
    whole = _gather(program.mesh)(params)
    if writer is None:
        return
    own = jax.device_put(jax.device_get(whole), jax.local_devices()[0])
    source = open_source(config.data, "heldout")
    fits = Geometry(vae.config.stride, (1, 1, 1), vae.config.z_dim)
    rows, labels, left_out = [], [], []
    for i in range(min(PICTURES, len(source.sizes))):
        if processes.alone():  # else the others don't wait here, and are not to be left alone later
            pause()
        try:
            video = read_clip(source, i, 0).video
        except BadClip as error:
            left_out.append(f"{source.name(i)}: {error}")
            continue
        t, h, w = fits.fit(*video.shape[:3])
        if not h * w:
            left_out.append(f"{source.name(i)}: smaller than a latent")
            continue
        video = video[:t, :h, :w]
        mean, _ = chunked.encode(vae, own, video[None])
        back = chunked.decode(vae, own, mean)[0]
        back = media.to_u8(back)
        error = np.abs(video.astype(np.int32) - back)
        rows.append([video, back, np.minimum(ERROR * error, 255).astype(np.uint8)])
        labels.append(f"{source.name(i)}: {quality.psnr(video, back):.1f} dB")
    if not rows:
        return
    widest = max(video.shape[2] for row in rows for video in row)
    shown = media.grid(rows, scale=max(1, WIDEST // (3 * widest)))
    fps = float(source.sizes.fps[0])
    folder = os.path.join(workdir, "samples", f"{n:08d}")
    columns = ["original", "reconstruction", f"error x {ERROR}"]
    about = {"step": n, "prompts": labels, "columns": columns, "left_out": left_out}
    with media.best_effort(workdir, n, "the pictures"):
        for suffix in ("mp4", "gif"):
            media.save_video(os.path.join(folder, f"grid.{suffix}"), shown, fps)
        media.write(os.path.join(folder, "prompts.json"), json.dumps(about, indent=2, ensure_ascii=False).encode())
    writer.videos(n, {"samples": shown}, fps)
