"""The block that all transformers here are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from vidgen.models.attention import Attention, Dtype


class Mlp(nn.Module):
    """Two matrices with a GELU between."""

    ratio: float = 4.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        hidden = nn.Dense(int(width * self.ratio), dtype=self.dtype, name="up")(x)
        return nn.Dense(width, dtype=self.dtype, name="down")(nn.gelu(hidden))


def norm(x: jax.Array) -> jax.Array:
    """Layer norm without weights, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def pick(vectors_BxNxF: jax.Array, level_BxS: jax.Array) -> jax.Array:
    """Each token's vector, [B,S,F] f32.

    A product with a one-hot matrix and not a gather, whose gradient would be a scatter, slow on every machine.
    """
    hot = jax.nn.one_hot(level_BxS, vectors_BxNxF.shape[1], dtype=jnp.float32)
    return jnp.einsum("bsn,bnf->bsf", hot, vectors_BxNxF, precision="highest")


class Block(nn.Module):
    """adaLN-Zero transformer block (Peebles & Xie, arXiv:2212.09748) with cross-attention to text.

    The modulation is computed for the N noise levels of a row and picked for tokens here, inside what is
    rematerialised, so that it is never stored a token.
    """

    heads: int
    mlp_ratio: float = 4.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxSxW, condition_BxNxW, level_BxS, segment_BxS, table, text) -> tuple[jax.Array, None]:
        """Returns (x, None), as `nn.scan` wants it. `text`: (values [B,L,E], segment [B,L]) or None."""
        width = x_BxSxW.shape[-1]
        # HIGHEST: modulation is float32 on every machine, not what a TPU or GPU makes of it by default.
        modulation = nn.Dense(
            6 * width, dtype=jnp.float32, precision="highest", kernel_init=nn.initializers.zeros, name="modulation"
        )
        parts = jnp.split(pick(modulation(nn.silu(condition_BxNxW)), level_BxS), 6, axis=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts

        h = norm(x_BxSxW) * (1 + scale1) + shift1
        x = x_BxSxW + gate1 * Attention(self.heads, self.dtype, name="attention")(
            h.astype(self.dtype), segment_BxS, table
        )
        if text is not None:
            h = norm(x).astype(self.dtype)
            x = x + Attention(self.heads, self.dtype, name="cross")(h, segment_BxS, None, *text)
        h = norm(x) * (1 + scale2) + shift2
        x = x + gate2 * Mlp(self.mlp_ratio, self.dtype, name="mlp")(h.astype(self.dtype))
        return x.astype(jnp.float32), None
