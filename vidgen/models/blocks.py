"""The block that all transformers here are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from vidgen.models.attend import Attending
from vidgen.models.attention import Attention
from vidgen.models.linear import Dtype, Layout, Linear
from vidgen.parallel.mesh import TOKENS


class Mlp(nn.Module):
    """Two matrices with a GELU between.

    Attributes:
      ratio: hidden width over the width of the tokens.
      hidden: hidden width, where not 0, instead.
    """

    ratio: float = 4.0
    dtype: Dtype = jnp.float32
    layout: Layout | None = None
    over_context: bool = True
    hidden: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(features, name):
            return Linear(features, dtype=self.dtype, layout=self.layout, over_context=self.over_context, name=name)

        width = self.hidden or int(x.shape[-1] * self.ratio)
        hidden = checkpoint_name(linear(width, "up")(x), "mlp_up")
        return checkpoint_name(linear(x.shape[-1], "down")(nn.gelu(hidden)), "mlp_down")


def norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Layer norm without weights, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class Norm(nn.Module):
    """Layer norm with weights, in float32: [..., W] → [..., W] f32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        return norm(x, self.eps) * scale + self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)


def pick(vectors_BxNxF: jax.Array, level_BxS: jax.Array) -> jax.Array:
    """Each token's vector, [B,S,F] f32.

    A product with a one-hot matrix and not a gather, whose gradient would be a scatter, slow on every machine.
    """
    hot = jax.nn.one_hot(level_BxS, vectors_BxNxF.shape[1], dtype=jnp.float32)
    return jnp.einsum("bsn,bnf->bsf", hot, vectors_BxNxF, precision="highest")


def modulation(features: int, layout: Layout | None, name: str | None = None) -> Linear:
    """The layer that makes shifts, scales and gates of the noise levels: zero at first, float32 on every machine."""
    # HIGHEST: not what a TPU or GPU makes of float32 by default.
    zeros = nn.initializers.zeros
    return Linear(features, precision="highest", kernel_init=zeros, layout=layout, over_context=False, name=name)


class Block(nn.Module):
    """adaLN-Zero transformer block (Peebles & Xie, arXiv:2212.09748) with cross-attention to text.

    The modulation is computed for the N noise levels of a row and picked for tokens here, inside what is
    rematerialised, so that it is never stored a token.

    Attributes:
      mlp_dim: hidden width of the MLP.
      shared: whether all blocks share one modulation, and have a table of offsets each (adaLN-single, Chen et al.,
        arXiv:2310.00426), instead of a layer each.
      residual: dtype of what a block hands to the next.
      bias, qk_norm: see `Attention`.
      cross_norm: whether the norm before cross-attention has weights.
      mlp_eps: of the norm before the MLP.
      ids: which of the ids self-attention goes by: "segment" (the whole clip), "window" or "shifted".
    """

    heads: int
    mlp_dim: int
    dtype: Dtype = jnp.float32
    residual: Dtype = jnp.float32
    shared: bool = False
    bias: bool = False
    qk_norm: str = "head"
    cross_norm: bool = False
    mlp_eps: float = 1e-6
    layout: Layout | None = None
    how: Attending = Attending()
    ids: str = "segment"

    @nn.compact
    def __call__(self, x_BxSxW, condition_BxNxW, level_BxS, ids, table, text, image=None) -> tuple[jax.Array, None]:
        """Returns (x, None), as `nn.scan` wants it.

        Args:
          condition_BxNxW: of the noise levels; [B,N,6W] where modulation is shared.
          ids: name → [B,S] i32.
          table: of `rope_table`, or None.
          text: (values [B,L,E], segment [B,L]) or None.
          image: the like, of image features that are attended to beside the text, or None.
        """
        if self.layout is not None:
            x_BxSxW = jax.lax.with_sharding_constraint(x_BxSxW, NamedSharding(self.layout.mesh, TOKENS))
        x = checkpoint_name(x_BxSxW, "residual").astype(jnp.float32)
        width = x.shape[-1]
        if self.shared:
            offsets = self.param("modulation_table", nn.initializers.zeros, (6 * width,), jnp.float32)
            vectors = condition_BxNxW + offsets
        else:
            vectors = modulation(6 * width, self.layout, "modulation")(nn.silu(condition_BxNxW))
        parts = (pick(part, level_BxS) for part in jnp.split(vectors, 6, axis=-1))
        shift1, scale1, gate1, shift2, scale2, gate2 = parts

        def attention(name):
            more = {"bias": self.bias, "qk_norm": self.qk_norm}
            return Attention(self.heads, self.dtype, self.layout, self.how, name=name, **more)

        h = checkpoint_name((norm(x) * (1 + scale1) + shift1).astype(self.dtype), "attention_norm")
        x = x + gate1 * attention("attention")(h, ids[self.ids], table, windows=self.ids != "segment")
        if text is not None:
            h = Norm(name="cross_norm")(x) if self.cross_norm else norm(x)
            x = x + attention("cross")(h.astype(self.dtype), ids["segment"], None, *text, image=image)
        h = (norm(x, self.mlp_eps) * (1 + scale2) + shift2).astype(self.dtype)
        x = x + gate2 * Mlp(hidden=self.mlp_dim, dtype=self.dtype, layout=self.layout, name="mlp")(h)
        return x.astype(self.residual), None


class Group(nn.Module):
    """Blocks that differ in what they attend to, as one layer of a scan: `layer_0`, `layer_1`, …

    Attributes:
      block: the class that a block is of.
      arguments: its attributes, but for ids.
      pattern: the ids of each.
      own_conditions: whether the conditions are a stack, one for each block.
    """

    block: type[Block]
    arguments: Mapping[str, Any]
    pattern: tuple[str, ...]
    own_conditions: bool = False

    @nn.compact
    def __call__(self, x, condition, *rest) -> tuple[jax.Array, None]:
        for i, ids in enumerate(self.pattern):
            own = condition[i] if self.own_conditions else condition
            x, _ = self.block(**self.arguments, ids=ids, name=f"layer_{i}")(x, own, *rest)
        return x, None
