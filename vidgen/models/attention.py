"""Attention within segments."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.models.rope import rotate

Dtype = jnp.dtype


def attend(
    q_BxHxSxD: jax.Array, k_BxHxLxD: jax.Array, v_BxHxLxD: jax.Array, q_segment_BxS: jax.Array, k_segment_BxL: jax.Array
) -> jax.Array:
    """Softmax attention of each token to the keys of its own segment; scores and softmax in float32.

    Head-major, since a CPU and a TPU both run the two products as plain batched matrix products in that layout.
    A query without any key of its segment (padding) gets a finite value that no loss looks at.

    Returns: [B,H,S,D] in v's dtype.
    """
    chex.assert_rank([q_BxHxSxD, k_BxHxLxD, v_BxHxLxD], 4)
    chex.assert_rank([q_segment_BxS, k_segment_BxL], 2)
    scale = q_BxHxSxD.shape[-1] ** -0.5
    scores = jnp.einsum("bhsd,bhld->bhsl", q_BxHxSxD * scale, k_BxHxLxD, preferred_element_type=jnp.float32)
    same = q_segment_BxS[:, None, :, None] == k_segment_BxL[:, None, None, :]
    weights = jax.nn.softmax(jnp.where(same, scores, -1e9), axis=-1)
    return jnp.einsum("bhsl,bhld->bhsd", weights.astype(v_BxHxLxD.dtype), v_BxHxLxD)


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys (Dehghani et al., arXiv:2302.05442).

    Attributes:
      heads: H; the width of the queries divides by it.
      dtype: of the matrix products.
    """

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxSxW, segment_BxS, table=None, context_BxLxE=None, context_segment_BxL=None) -> jax.Array:
        """Self-attention, or cross-attention where a context is given; `table` from `rope_table`. Returns [B,S,W]."""
        width = x_BxSxW.shape[-1]

        def split(x):  # [B,L,W] → [B,H,L,D]
            return x.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)

        def project(name, x):
            return split(nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)(x))

        own = context_BxLxE is None
        context, context_segment = (x_BxSxW, segment_BxS) if own else (context_BxLxE, context_segment_BxL)
        q, k, v = project("query", x_BxSxW), project("key", context), project("value", context)
        q = nn.RMSNorm(dtype=jnp.float32, name="query_norm")(q)
        k = nn.RMSNorm(dtype=jnp.float32, name="key_norm")(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        out = attend(q.astype(self.dtype), k.astype(self.dtype), v, segment_BxS, context_segment)
        out = out.transpose(0, 2, 1, 3).reshape(*x_BxSxW.shape)
        return nn.Dense(width, use_bias=False, dtype=self.dtype, name="out")(out)


def dtype_of(config: ConfigDict) -> Dtype:
    """The dtype of matrix products; raises ConfigError."""
    if config.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"config.dtype={config.dtype!r}: known are float32, bfloat16")
    return jnp.dtype(config.dtype)


def check_heads(name: str, width: int, heads: int) -> None:
    """Raises ConfigError unless heads of even width (RoPE turns pairs) fill the width."""
    if width % heads or width // heads % 2:
        fits = [h for h in range(1, width // 2 + 1) if width % h == 0 and width // h % 2 == 0]
        near = min(fits, key=lambda h: abs(h - heads), default=1)
        raise ConfigError(f"config.{name}.heads={heads}: does not cut width {width} into even heads; nearest: {near}")
