"""What a step of the denoiser minimises: rectified flow on packed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.conditioning import masks
from vidgen.conditioning.rows import in_training
from vidgen.config import ConfigError
from vidgen.data.text import BEGIN
from vidgen.diffusion import path
from vidgen.diffusion.generator import Generator
from vidgen.diffusion.timesteps import logit_normal
from vidgen.models.blocks import pick

NOTHING = ConfigDict({"masks": (), "channels": "none"}).lock()  # `config.control` of a run without controls


def check(objective: ConfigDict) -> None:
    """Raises ConfigError on settings that mean nothing."""
    for name in ("prediction", "loss"):
        if objective[name] not in path.SPACES:
            raise ConfigError(f"config.objective.{name}={objective[name]!r}: known are {', '.join(path.SPACES)}")
    if not 0 <= objective.caption_dropout <= 1:
        raise ConfigError(f"config.objective.caption_dropout={objective.caption_dropout}: expected 0 to 1")
    span = tuple(objective.time_range)
    numbers = all(isinstance(t, int | float) and not isinstance(t, bool) for t in span)
    if len(span) != 2 or not numbers or not 0 <= span[0] < span[1] <= 1:
        raise ConfigError(f"config.objective.time_range={span}: expected (least, most) noise level, of 0 to 1")
    if span != (0, 1) and not objective.time_std:
        raise ConfigError(
            f"config.objective.time_range={span}: config.objective.time_std=0 leaves one noise level only"
        )


def trained(batch: TokenBatch) -> jax.Array:
    """[B,S] f32: 1 for tokens that the loss looks at, neither padding nor wholly known."""
    weight = batch.segment > 0
    if batch.known is not None:
        weight = weight & ~batch.known.all(axis=-1)
    return weight.astype(jnp.float32)


def segment_tokens(batch: TokenBatch, segments: int) -> jax.Array:
    """[B,K] f32: tokens of each of the row's clips."""
    hot = jax.nn.one_hot(batch.segment, segments + 1, dtype=jnp.float32)
    return hot.sum(axis=1)[:, 1:]


def drop_captions(batch: TokenBatch, dropped_BxK: jax.Array, padded: bool = False) -> TokenBatch:
    """Makes an empty prompt of the captions of dropped segments.

    Of bytes that is their begin token alone. Of a frozen encoder's values it is `batch.context["empty"]` in place of
    their first, and nothing behind it, or with `padded` (config.text.pad) zeros that are attended to.
    """
    text, segment = batch.context["text"]
    dropped = jnp.take_along_axis(jnp.pad(dropped_BxK, ((0, 0), (1, 0))), segment, axis=1)
    if jnp.issubdtype(text.dtype, jnp.integer):
        gone = dropped & (text != BEGIN)
    else:
        empty, _ = batch.context["empty"]
        first = segment != jnp.pad(segment, ((0, 0), (1, 0)))[:, :-1]
        text = jnp.where(dropped[..., None], jnp.where(first[..., None], empty, 0.0), text)
        gone = dropped & ~first & (not padded)
    return batch.replace(context=batch.context | {"text": (text, jnp.where(gone, 0, segment))})


def row_randomness(keys_B: jax.Array, segments: int, shape: tuple[int, int]):
    """Each row's own noise, so that it is the same in whatever microbatch, mesh or host the row stands.

    Returns: (normal numbers of the noise levels [B,K], uniform numbers for dropout [B,K], noise [B,S,P]).
    """

    def row(key):
        level, drop, noise = jax.random.split(key, 3)
        return (
            jax.random.normal(level, (segments,)),
            jax.random.uniform(drop, (segments,)),
            jax.random.normal(noise, shape),
        )

    return jax.vmap(row)(keys_B)


def errors(
    generator: Generator, params, batch: TokenBatch, levels_BxN, noise_BxSxP, objective: ConfigDict
) -> jax.Array:
    """Squared error of each token in the loss space, mean over its features, [B,S] f32. `batch` holds latents."""
    t = pick(levels_BxN[..., None], batch.level)
    noisy = path.noised(batch.tokens, noise_BxSxP, t)
    if batch.known is not None:
        noisy = jnp.where(batch.known, batch.tokens, noisy)
    prediction = generator.predict(params, noisy, levels_BxN, batch)
    error = prediction - path.target(objective.prediction, batch.tokens, noise_BxSxP, t)
    weight = path.loss_weight(objective.prediction, objective.loss, t[..., 0], objective.time_min)
    return weight * jnp.mean(error * error, axis=-1)


def weight_of(control: ConfigDict) -> Callable[[TokenBatch, jax.Array], jax.Array]:
    """(rows from the feed, a random key a row) → [B,S] f32: 1 for the tokens that `loss_of` counts; see `trained`."""

    def weight(batch: TokenBatch, keys_B: jax.Array) -> jax.Array:
        if control.channels == "none" and control.masks:
            batch = batch.replace(known=masks.draw(batch, keys_B, control.masks).known[..., None])
        return trained(batch)

    return weight


def loss_of(
    generator: Generator, objective: ConfigDict, control: ConfigDict = NOTHING
) -> Callable[[Any, TokenBatch, jax.Array], jax.Array]:
    """(params, rows from the feed, a random key a row) → sum of the trained tokens' errors.

    Divide it by the trained tokens of the global batch, which `weight_of` tells.
    """

    def loss_sum(params: Any, batch: TokenBatch, keys_B: jax.Array) -> jax.Array:
        batch = in_training(batch, keys_B, generator.tokenizer, control)
        batch = batch.replace(tokens=generator.tokenizer.latents(batch.tokens, keys_B))
        segments = batch.clip.shape[1]
        normal, uniform, noise = row_randomness(keys_B, segments, batch.tokens.shape[1:])
        levels = logit_normal(normal, objective, segment_tokens(batch, segments))
        levels = jnp.pad(levels, ((0, 0), (1, 0)))  # level 0: clean
        padded = generator.text is not None and generator.text.pad > 0
        batch = drop_captions(batch, uniform < objective.caption_dropout, padded)
        return jnp.sum(trained(batch) * errors(generator, params, batch, levels, noise, objective))

    return loss_sum


def heldout_sums(
    generator: Generator,
    params,
    batch: TokenBatch,
    keys_B: jax.Array,
    objective: ConfigDict,
    levels_of: Callable[[jax.Array], jax.Array],
    control: ConfigDict = NOTHING,
) -> tuple[jax.Array, jax.Array]:
    """(summed error at each of N fixed noise levels [N], trained tokens); only the noise is random.

    `levels_of`: tokens of each clip [B,K] → the N noise levels that it is measured at [N,B,K], in (0, 1).
    Nothing is given of the clips here, so that figures of runs with different masks can be compared, and a learned
    tokenizer's latents are the means of their posteriors.
    """
    batch = in_training(batch, None, generator.tokenizer, control)
    batch = batch.replace(tokens=generator.tokenizer.latents(batch.tokens, None))
    segments = batch.clip.shape[1]
    _, _, noise = row_randomness(keys_B, segments, batch.tokens.shape[1:])
    grid = levels_of(segment_tokens(batch, segments))
    batch = generator.encode_context(params, batch)

    def at(levels):
        levels = jnp.pad(levels, ((0, 0), (1, 0)))
        return jnp.sum(trained(batch) * errors(generator, params, batch, levels, noise, objective))

    return jax.lax.map(at, grid), jnp.sum(trained(batch))
