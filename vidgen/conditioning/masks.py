"""Which latent frames of a clip are given in training: drawn anew each time the clip is seen.

A latent frame is given whole. The first one is the first frame of pixels, since every tokenizer here is causal in time;
the last one is the last `stride[0]` frames of pixels. Of a clip there is given, by `config.control.masks`, nothing or
one of

    first       the first latent frame
    first_last  the first and the last
    extend      the first n, n drawn alike from 1 to all but one

and nothing where that would leave nothing to draw: of images, and for first_last of clips of two latent frames.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError
from vidgen.tokenizers import base as tokenizers

KINDS = ("first", "first_last", "extend")
LEAST = {"first": 2, "first_last": 3, "extend": 2}  # latent frames of a clip of which one is left to draw
CHANNELS = ("none", "wan")
_DRAW = 0x61E  # folded into a row's key; larger than anything that the objective splits it into

Masks = tuple[tuple[str, float], ...]


class Shown(NamedTuple):
    """What is given of the clips in rows of tokens.

    Attributes:
      start: [B,S] bool, tokens of the latent frames that a clip starts with and that are given.
      end: [B,S] bool, tokens of a clip's last latent frame, where that is given beside the first.
    """

    start: jax.Array
    end: jax.Array

    @property
    def known(self) -> jax.Array:
        """[B,S] bool."""
        return self.start | self.end


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings of `config.control` that mean nothing, or that the rest doesn't go with."""
    masks, channels = config.control.masks, config.control.channels
    for entry in masks:
        if not (isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ConfigError(f"config.control.masks: {entry!r}: expected (kind, share), such as ('first', 0.4)")
        kind, share = entry
        if kind not in KINDS:
            raise ConfigError(f"config.control.masks: {_unknown('kind', kind, KINDS)}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"config.control.masks: {kind} has share {share!r}; expected more than 0, up to 1")
    kinds = [kind for kind, _ in masks]
    if twice := [kind for kind in KINDS if kinds.count(kind) > 1]:
        raise ConfigError(f"config.control.masks: {twice[0]} stands there twice; expected each kind once")
    total = sum(share for _, share in masks)
    if total > 1 + 1e-6:
        raise ConfigError(f"config.control.masks: the shares add up to {total:g}; expected 1 at most: a kind a clip")
    if channels not in CHANNELS:
        raise ConfigError(f"config.control.channels: {_unknown('channels', channels, CHANNELS)}")
    patch = tuple(config.tokenizer.patch)
    if (masks or channels != "none") and patch[0] != 1:
        raise ConfigError(
            f"config.tokenizer.patch={patch}: what is given of a clip is latent frames, and a token covers {patch[0]}; "
            f"expected {(1, *patch[1:])}"
        )
    wanted = features(config)
    if config.model.cond != wanted:
        raise ConfigError(
            f"config.model.cond={config.model.cond}: config.control.channels={channels!r} puts {wanted} numbers a "
            f"token beside the noisy ones; set config.model.cond={wanted}"
        )


def check_training(config: ConfigDict) -> None:
    """As `check`, and what can be sampled with and not trained."""
    check(config)
    if config.control.channels == "wan" and config.tokenizer.name == "vae":
        raise ConfigError(
            "config.control.channels='wan' with config.tokenizer.name='vae' can be sampled from but not trained: the "
            "clip with grey in place of what isn't given would have to be encoded anew each time; expected "
            "channels='none', which gives the VAE's own latents, or the tokenizer patch or wavelet"
        )
    if config.model.image_width:
        raise ConfigError(
            f"config.model.image_width={config.model.image_width}: a model that attends to image features can be "
            "sampled from but not trained, since vidgen has no image encoder; expected config.model.image_width=0"
        )


def features(config: ConfigDict) -> int:
    """Numbers a token of `batch.cond` that `config.control.channels` makes; raises ConfigError."""
    if config.control.channels == "none":
        return 0
    geometry = tokenizers.geometry_from_config(config.tokenizer, config.vae)
    latents = int(np.prod(geometry.patch))
    return latents * (geometry.stride[0] + geometry.channels)


def draw(batch: TokenBatch, keys_B: jax.Array, masks: Masks) -> Shown:
    """What is given of each clip of a step's rows.

    Each row's own keys decide, so it is the same in whatever microbatch, mesh or host the row stands. Traceable.

    Args:
      batch: of which segment, coords and clip are looked at.
      keys_B: the rows' random keys.
      masks: ((kind, share of the clips), …), checked.
    """
    segments = batch.clip.shape[1]
    frame, frames = latent_frames(batch, segments)

    def row(key):
        return jax.random.uniform(jax.random.fold_in(key, _DRAW), (2, segments))

    uniform = jax.vmap(row)(keys_B)
    lot, length = uniform[:, 0], uniform[:, 1]
    count = jnp.zeros_like(frames)  # latent frames given at the start
    both = jnp.zeros_like(frames, bool)
    some = 1 + jnp.minimum(jnp.floor(length * (frames - 1)), frames - 2).astype(jnp.int32)  # 1 to all but one
    low = 0.0
    for kind, share in masks:
        chosen = (lot >= low) & (lot < low + share) & (frames >= LEAST[kind])
        count = jnp.where(chosen, some if kind == "extend" else 1, count)
        both |= chosen & (kind == "first_last")
        low += share
    here = batch.segment[..., None] == jnp.arange(1, segments + 1)  # [B,S,K]; padding is of none

    def of_token(value_BxK):
        return jnp.sum(jnp.where(here, value_BxK[:, None], 0), axis=-1)

    start = (frame < of_token(count)) & (batch.segment > 0)
    last = (frame == of_token(frames) - 1) & (of_token(both.astype(jnp.int32)) > 0)
    return Shown(start, last & (batch.segment > 0))


def latent_frames(batch: TokenBatch, segments: int) -> tuple[jax.Array, jax.Array]:
    """([B,S] i32: which latent frame of its clip a token is of; [B,K] i32: how many each clip has, 0 where none is).

    Read off the coordinates, whose t is in whatever unit: latent frames are evenly spaced from 0.
    """
    time = batch.coords[..., 0]
    here = batch.segment[..., None] == jnp.arange(1, segments + 1)
    longest = jnp.max(jnp.where(here, time[..., None], -1.0), axis=1)  # [B,K]
    tick = jnp.min(jnp.where(here & (time[..., None] > 0), time[..., None], jnp.inf), axis=1)
    tick = jnp.where(jnp.isfinite(tick), tick, 1.0)  # of an image, whose only t is 0
    frames = jnp.where(longest >= 0, jnp.round(longest / tick).astype(jnp.int32) + 1, 0)
    per_token = jnp.sum(jnp.where(here, tick[:, None], 0.0), axis=-1)
    frame = jnp.round(time / jnp.where(per_token > 0, per_token, 1.0)).astype(jnp.int32)
    return frame, frames


def _unknown(what: str, value: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown {what} {value!r}: known are {', '.join(known)}{hint}"
