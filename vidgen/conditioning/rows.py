"""Rows of tokens with what is given of their clips.

The model is told in one of two ways, as `config.control.channels` says:

    none  The given tokens are clean latents at noise level 0 among the noisy ones, are kept at each step of a sampler,
          and don't count in the loss. So do Wan 2.2 TI2V-5B and diffusion forcing.
    wan   All tokens are noisy, and beside them stand mask channels and the latents of a clip that is grey where nothing
          is given. So do Wan 2.1 I2V and FLF2V, and Wan 2.2 I2V-A14B (Wan team, arXiv:2503.20314).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.conditioning import masks
from vidgen.tokenizers.base import Tokenizer

GREY = 127.5  # between black and white on the scale of bytes: 0 for the tokenizer


def in_training(batch: TokenBatch, keys_B: jax.Array | None, tokenizer: Tokenizer, control: ConfigDict) -> TokenBatch:
    """Rows of the feed with what is drawn to be given of each clip: `known` and `level`, or `cond`. Traceable.

    Args:
      batch: as the feed has it: `tokens` are not latents yet.
      keys_B: the rows' random keys; None: nothing is given.
      tokenizer: of the latents; an exact one where channels="wan".
      control: `config.control`, checked.
    """
    nothing = keys_B is None or not control.masks
    if nothing and control.channels == "none":
        return batch
    none = jnp.zeros(batch.segment.shape, bool)
    shown = masks.Shown(none, none) if nothing else masks.draw(batch, keys_B, control.masks)
    if control.channels == "wan":
        return batch.replace(cond=_channels(batch.tokens, shown, tokenizer))
    return batch.replace(known=shown.known[..., None], level=jnp.where(shown.known, 0, batch.level))


def _channels(blocks_BxSxD: jax.Array, shown: masks.Shown, tokenizer: Tokenizer) -> jax.Array:
    """`batch.cond` [B,S,C] of rows of u8 pixel blocks; of a last latent frame the last frame of pixels is given."""
    _, py, px = tokenizer.geometry.patch
    st, sy, sx = tokenizer.geometry.stride
    if tokenizer.learned:  # which is planned with, and not trained: `masks.check_training`
        return jnp.zeros((*shown.start.shape, tokenizer.geometry.features + st * py * px))
    pixels = _frames_given(shown.start, shown.end, st)  # [B,S,st]
    inside = jnp.repeat(pixels, sy * sx * 3, axis=-1)  # a latent's block is t-major
    given = jnp.tile(inside, (1, 1, py * px))
    latents = tokenizer.latents(jnp.where(given, blocks_BxSxD.astype(jnp.float32), GREY), None)
    return beside(pixels.astype(jnp.float32), latents, py * px)


def _frames_given(start_BxS, end_BxS, stride: int):
    """[B,S,stride] bool: which frames of pixels of a token's latent frame are given; NumPy or JAX."""
    last = np.arange(stride) == stride - 1
    return start_BxS[..., None] | (end_BxS[..., None] & last)


def beside(mask_xSxM, latents_xSxP, patch: int):
    """Mask and condition latents of tokens, [..., S, M] and [..., S, patch · C] → [..., S, patch · (M + C)].

    Each latent of the patch has its mask channels, then its channels: the order of `geometry.patchify`.
    """
    xp = latents_xSxP.__array_namespace__()
    *lead, features = latents_xSxP.shape
    latents = latents_xSxP.reshape(*lead, patch, features // patch)
    mask = xp.broadcast_to(mask_xSxM[..., None, :], (*lead, patch, mask_xSxM.shape[-1]))
    return xp.concatenate([mask.astype(latents.dtype), latents], axis=-1).reshape(*lead, -1)
