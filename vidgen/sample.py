"""`vidgen sample`: prompts in, videos out."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.batch import TokenBatch
from vidgen.conditioning import from_files
from vidgen.conditioning import given as conditioning
from vidgen.conditioning.given import Given
from vidgen.config import ConfigError
from vidgen.data.clip import BadClip
from vidgen.data.sources import open_source
from vidgen.data.text import encode_text
from vidgen.diffusion import generator as generators
from vidgen.diffusion.generator import Generator
from vidgen.diffusion.solvers import SOLVERS
from vidgen.geometry import Geometry, Grid, patchify
from vidgen.models import places
from vidgen.parallel import processes
from vidgen.parallel.mesh import ROW_AXES, ROWS, batch_shardings
from vidgen.studio import media
from vidgen.training import restored

CLIPS_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Result:
    """What was drawn: `videos[prompt][seed]` is [T,H,W,3] u8; `files` were written."""

    step: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    videos: list[list[np.ndarray]]
    files: tuple[str, ...]


def run(
    workdir: str,
    prompts: Sequence[str],
    output: str,
    *,
    seeds: Sequence[int] = (0,),
    negative: str = "",
    step: int | None = None,
    first_frame: str = "",
    last_frame: str = "",
    extend: str = "",
    **settings: Any,
) -> Result:
    """Draws a grid of prompts × seeds with the averaged weights of a checkpoint and writes it as MP4 and as GIF.

    Args:
      workdir: of a training run.
      prompts: rows of the grid; in any script. May be empty, or none, where frames are given.
      output: FILE.mp4 or FILE.gif; its twin of the other kind and FILE.json (what was asked for) stand beside it, and
        where there are several clips, each of them in the folder FILE/.
      seeds: columns of the grid; the same seed starts from the same noise.
      negative: what guidance leads away from; empty: nothing in particular.
      step: of the checkpoint; None: the newest.
      first_frame, last_frame: images that the clips start from and, beside that, end at.
      extend: a video, with whose end the clips start; see `conditioning/from_files.py` for what is taken of it.
      **settings: instead of the keys of `config.sample`: frames, height, width, fps, solver, steps, guidance, eta.

    Raises ConfigError.
    """
    prompts = prompts or ([""] if first_frame or extend else [])
    if not prompts:
        raise ConfigError("no prompt: expected --prompt TEXT, once or several times")
    if not seeds:
        raise ConfigError("no seed: expected --seed N, once or several times")
    if os.path.splitext(output)[1].lower() not in (".mp4", ".gif"):
        raise ConfigError(f"--output={output}: expected FILE.mp4 or FILE.gif")
    config, generator, params, step = restored.load(workdir, step)
    override(config, settings)
    given = from_files.read(config, first_frame, last_frame, extend)
    for text in (*prompts, negative):
        kept, whole, unit = _kept(text, config, generator)
        if kept < whole:
            print(f"cut to its first {kept} {unit}, as long as captions were in training: {text!r}", file=sys.stderr)
    videos = draw(config, generator, params, prompts, seeds=seeds, negative=negative, given=given)
    rows = [videos[i : i + len(seeds)] for i in range(0, len(videos), len(seeds))]
    shown = media.grid(rows, scale=scale_for(config.sample.width))
    about = {"prompts": list(prompts), "seeds": list(seeds), "negative": negative, "step": step}
    about |= {"first_frame": first_frame, "last_frame": last_frame, "extend": extend}
    stem = os.path.splitext(output)[0]
    files = write_grid(stem, shown, config.sample.fps, f"{stem}.json", config.sample.to_dict() | about)
    if len(videos) > 1:
        for p, row in enumerate(rows):
            for seed, video in zip(seeds, row, strict=True):
                files.append(os.path.join(stem, f"prompt{p:02d}_seed{seed}.mp4"))
                media.save_video(files[-1], video, config.sample.fps)
    return Result(step, tuple(prompts), tuple(seeds), rows, tuple(files))


def override(config: ConfigDict, settings: dict[str, Any]) -> None:
    """Sets those keys of `config.sample` that are not None; raises ConfigError."""
    for key, value in settings.items():
        if value is not None:
            config.sample[key] = value
    configs.check(config)
    check(config)


def check(config: ConfigDict) -> None:
    """Raises ConfigError on sampling settings that mean nothing."""
    s = config.sample
    if s.solver not in SOLVERS:
        raise ConfigError(f"config.sample.solver={s.solver!r}: known are {', '.join(SOLVERS)}")
    if s.solver == "unipc" and config.objective.prediction == "noise":
        raise ConfigError(
            "config.sample.solver='unipc': starts where all is noise, of which config.objective.prediction='noise' "
            "says nothing; nearest: 'heun'"
        )


def check_size(config: ConfigDict, geometry: Geometry) -> None:
    """Raises ConfigError for clips of `config.sample` that are too large for the model."""
    s = config.sample
    grid = geometry.grid(*geometry.cover(s.frames, s.height, s.width))
    places.check_fits(config.model, grid, f"a sample of {s.frames}x{s.height}x{s.width}")


def draw(
    config: ConfigDict,
    generator: Generator,
    params: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    negative: str = "",
    zipped: bool = False,
    given: Given | Sequence[Given | None] | None = None,
    noise: np.ndarray | None = None,
    pause: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """Clips [T,H,W,3] u8 for each prompt and, within it, each seed, at the size of `config.sample`.

    With `zipped`, each prompt has the seed at its own place instead. Sizes that do not cut into tokens are drawn at the
    next larger one and cropped. The devices of the generator's mesh, on which `params` lie, share the clips and the
    tokens of each; every process calls this, and every process gets the clips. A VAE decodes them after that, clip by
    clip and in time chunks, on the first device of each process.

    Args:
      given: frames to start from, to end at or to go on from: for all clips, or one for each prompt.
      noise: [clips,t,y,x,C] standard normal latents to start from, of the size that is drawn, in the clips' order;
        None: each seed's own.
      pause: called before each batch of clips, by all processes alike; what it raises ends the drawing.

    Raises ConfigError where the model can't be given that.
    """
    s, geometry = config.sample, generator.tokenizer.geometry
    size = geometry.cover(s.frames, s.height, s.width)
    grid = geometry.grid(*size)
    check_size(config, geometry)
    of_prompt = [given] * len(prompts) if given is None or isinstance(given, Given) else given
    conditioning.check(config, of_prompt)
    starts = list(zip(prompts, of_prompt, strict=True))
    pairs = zip(starts, seeds, strict=True) if zipped else itertools.product(starts, seeds)
    wanted = [(prompt, seed, one) for (prompt, one), seed in pairs]
    if noise is not None:
        chex.assert_shape(noise, (len(wanted), *geometry.latent_grid(*size), geometry.channels))
    texts = encode_prompts(config, generator, [*prompts, negative])
    length = -(-max(map(len, texts.values())) // 32) * 32  # few lengths, few compiles
    at_once, mesh = min(CLIPS_AT_ONCE, len(wanted)), generator.mesh
    tokens = math.prod(grid)
    if mesh is not None:
        at_once += -at_once % math.prod(mesh.shape[axis] for axis in ROW_AXES)
        tokens += -tokens % mesh.shape["context"]
    sampler = _sampler(
        generator, config.objective.to_json(), grid, tokens, s.solver, s.steps, _guidance(s), float(s.eta)
    )
    videos = []
    for first in range(0, len(wanted), at_once):
        pause()
        chunk = wanted[first : first + at_once]
        padded = chunk + [chunk[-1]] * (at_once - len(chunk))
        rows = clip_rows(config, geometry, [texts[p] for p, _, _ in padded], size, length, tokens)
        rows = conditioning.place(rows, [one for _, _, one in padded], generator.tokenizer, config, size)
        empty = clip_rows(config, geometry, [texts[negative]] * at_once, size, length, tokens)
        empty = rows.replace(context=rows.context | empty.context)
        keys = np.stack([jax.random.key_data(jax.random.key(seed)) for _, seed, _ in padded])
        start = None if noise is None else _rows_of(noise[first : first + at_once], at_once, tokens, geometry)
        if mesh is not None:
            where = batch_shardings(mesh, rows)
            others = (NamedSharding(mesh, ROWS), None if start is None else where.segment)
            rows, empty, keys, start = processes.put((rows, empty, keys, start), (where, where, *others))
        video = np.asarray(sampler(params, rows, empty, keys, start))[: len(chunk)]
        if generator.tokenizer.learned:
            pause()
            video = np.concatenate([media.to_u8(generator.tokenizer.decode_tokens(one[None], grid)) for one in video])
        video = video[:, : s.frames]
        y, x = (size[1] - s.height) // 2, (size[2] - s.width) // 2
        videos += list(video[:, :, y : y + s.height, x : x + s.width])
    return videos


def encode_prompts(config: ConfigDict, generator: Generator, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """prompt → ids [n] i32, or values [n,E] f32 of a frozen encoder, as captions stand in a row of the feed."""
    prompts = list(dict.fromkeys(prompts))
    if generator.text is None:
        return {prompt: encode_text(prompt, config.rows.caption) for prompt in prompts}
    values = generator.text.encode(prompts)
    return {prompt: generator.text.place(own) for prompt, own in zip(prompts, values, strict=True)}


def _kept(prompt: str, config: ConfigDict, generator: Generator) -> tuple[int, int, str]:
    """(how much of a prompt is looked at, how much there is, of what)."""
    if generator.text is None:
        kept = len(encode_text(prompt, config.rows.caption)) - 1
        return kept, len(prompt.encode(errors="replace")), "bytes"
    (whole,) = generator.text.lengths([prompt]).tolist()
    return min(whole, config.rows.caption), whole, "tokens"


def clip_rows(
    config: ConfigDict,
    geometry: Geometry,
    texts: Sequence[np.ndarray],
    size: tuple[int, int, int],
    length: int,
    tokens: int,
) -> TokenBatch:
    """A row of `tokens` for each text that holds one clip of `size` and padding, as the feed lays clips out.

    `texts`: of `encode_prompts`. `length`: text tokens of a row.
    """
    rows = len(texts)
    text = np.zeros((rows, length, *texts[0].shape[1:]), texts[0].dtype)
    text_segment = np.zeros((rows, length), np.int32)
    for row, own in enumerate(texts):
        text[row, : len(own)], text_segment[row, : len(own)] = own, 1
    own = geometry.coords(*size, config.sample.fps if config.model.time_in_seconds else None)
    coords = np.zeros((rows, tokens, 3), np.float32)
    coords[:, : len(own)] = own
    segment = np.zeros((rows, tokens), np.int32)
    segment[:, : len(own)] = 1
    return TokenBatch(
        tokens=None,
        coords=coords,
        segment=segment,
        level=segment,
        context={"text": (text, text_segment)},
    )


def _rows_of(noise: np.ndarray, rows: int, tokens: int, geometry: Geometry) -> np.ndarray:
    """[n,t,y,x,C] → [rows,tokens,P] f32, zeros behind."""
    own = patchify(np.asarray(noise, np.float32), geometry.patch)
    return np.pad(own, ((0, rows - len(own)), (0, tokens - own.shape[1]), (0, 0)))


def _guidance(s: ConfigDict) -> tuple[float, float]:
    """Of the denoiser, or of the one for high noise and the one for low noise."""
    return float(s.guidance), float(s.guidance_2 or s.guidance)


@functools.lru_cache(maxsize=8)
def _sampler(
    generator: Generator,
    objective: str,
    grid: Grid,
    tokens: int,
    solver: str,
    steps: int,
    guidance: tuple[float, float],
    eta: float,
):
    """The jitted sampler of one shape of clip, in rows of `tokens`: u8 video, or tokens for a VAE to decode."""
    objective, mesh = ConfigDict(json.loads(objective)), generator.mesh
    shape, clip_tokens = (tokens, generator.tokenizer.geometry.features), math.prod(grid)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()) if mesh is not None else None)
    def sample(params, rows, empty, key_data, noise):
        keys = jax.random.wrap_key_data(key_data)
        drawn = generators.generate(
            generator,
            params,
            rows,
            None if guidance == (1, 1) else empty,
            jax.vmap(lambda key: jax.random.normal(key, shape))(keys) if noise is None else noise,
            jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys),
            objective,
            solver=solver,
            steps=steps,
            guidance=guidance,
            eta=eta,
            clip_tokens=clip_tokens,
        )
        drawn = drawn[:, :clip_tokens]
        return (
            drawn if generator.tokenizer.learned else media.to_u8(generator.tokenizer.decode_tokens(drawn, grid), jnp)
        )

    return sample


def heldout_captions(config: ConfigDict, count: int) -> list[str]:
    """Captions of held-out clips, evenly spread over them and without repetition."""
    source = open_source(config.data, "heldout")
    captions: dict[str, None] = {}
    for index in np.linspace(0, len(source.sizes) - 1, min(4 * count, len(source.sizes))).astype(int):
        try:
            captions.setdefault(source.read(int(index), 0).caption)
        except BadClip:
            continue
        if len(captions) == count:
            break
    if not captions:
        raise ConfigError("config.sample.prompts is empty, and no held-out clip can be read for its caption; give some")
    return list(captions)


def scale_for(width: int) -> int:
    """How often to enlarge pixels so that a small clip can be seen."""
    return max(1, 128 // width)


def write_grid(stem: str, video: np.ndarray, fps: float, about_path: str, about: dict[str, Any]) -> list[str]:
    """Writes STEM.mp4, STEM.gif and, as JSON, what was asked for; returns the paths."""
    files = [f"{stem}.mp4", f"{stem}.gif"]
    for file in files:
        media.save_video(file, video, fps)
    media.write(about_path, json.dumps(about, ensure_ascii=False, indent=2).encode())
    return [*files, about_path]
