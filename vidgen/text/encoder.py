"""A small text encoder over bytes, trained with the denoiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from vidgen.data.text import VOCAB
from vidgen.models.attention import Attention, check_heads, dtype_of
from vidgen.models.blocks import Mlp
from vidgen.models.linear import Dtype, Layout
from vidgen.models.rope import rope_table
from vidgen.text import frozen


def ngram_hashes(ids_BxL: jax.Array, segment_BxL: jax.Array, n: int, buckets: int) -> jax.Array:
    """A hash in [0, buckets) of the n bytes that end at each position, none of them from another caption."""
    total = jnp.zeros_like(ids_BxL, jnp.uint32)
    for back in range(n):
        shifted = jnp.pad(ids_BxL, ((0, 0), (back, 0)))[:, : ids_BxL.shape[1]]
        same = jnp.pad(segment_BxL, ((0, 0), (back, 0)))[:, : ids_BxL.shape[1]] == segment_BxL
        total = (total * jnp.uint32(0x9E3779B1)) ^ jnp.where(same, shifted, 0).astype(jnp.uint32)
        total = total ^ (total >> 15)
    return ((total * jnp.uint32(0x85EBCA6B)) >> 7) % buckets


class ByteEncoder(nn.Module):
    """Bytes → vectors to attend to.

    Bytes carry little each, so a position starts from its byte and from hashed embeddings of the n-grams that end
    there (Clark et al., CANINE, arXiv:2103.06874; Pagnoni et al., BLT, arXiv:2412.09871): words are known from the
    first step, in any script, and the layers only have to relate them.
    """

    width: int
    layers: int
    heads: int
    dtype: Dtype = jnp.float32
    ngrams: tuple[int, ...] = (3, 4, 5, 6)
    buckets: int = 4096
    layout: Layout | None = None

    @nn.compact
    def __call__(self, ids_BxL: jax.Array, segment_BxL: jax.Array) -> jax.Array:
        """Ids (0 = padding, 1 = begin, 2.. = bytes) and segments → values [B,L,E] f32."""
        init = nn.initializers.normal(0.02)
        x = nn.Embed(VOCAB, self.width, embedding_init=init, name="bytes")(ids_BxL)
        for n in self.ngrams:
            table = nn.Embed(self.buckets, self.width, embedding_init=init, name=f"ngrams_{n}")
            x = x + table(ngram_hashes(ids_BxL, segment_BxL, n, self.buckets))
        # Positions count from the caption's own start, so that a caption means the same wherever it is packed.
        position = jnp.broadcast_to(jnp.arange(ids_BxL.shape[1]), ids_BxL.shape)
        begins = segment_BxL != jnp.pad(segment_BxL, ((0, 0), (1, 0)))[:, :-1]
        start = jax.lax.cummax(jnp.where(begins, position, 0), axis=1)
        coords = (position - start)[..., None].astype(jnp.float32)
        rope = rope_table(coords, self.width // self.heads, 1000.0)
        for layer in range(self.layers):
            h = nn.RMSNorm(dtype=jnp.float32, name=f"norm1_{layer}")(x).astype(self.dtype)
            x = x + Attention(self.heads, self.dtype, self.layout, over_context=False, name=f"attention_{layer}")(
                h, segment_BxL, rope
            )
            h = nn.RMSNorm(dtype=jnp.float32, name=f"norm2_{layer}")(x).astype(self.dtype)
            x = x + Mlp(dtype=self.dtype, layout=self.layout, over_context=False, name=f"mlp_{layer}")(h)
        return nn.RMSNorm(dtype=jnp.float32, name="norm_out")(x)


def from_config(config: ConfigDict, layout: Layout | None = None) -> ByteEncoder | None:
    """The text encoder that trains with the denoiser of a config; None where it is a frozen one, whose values rows
    bring. Raises ConfigError.
    """
    frozen.check(config)
    t = config.text
    if t.name != "bytes":
        return None
    check_heads("text", t)
    return ByteEncoder(t.width, t.layers, t.heads, dtype_of("dtype", config.dtype), layout=layout)
