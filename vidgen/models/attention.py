"""The attention layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.models.attend import Attending, attend
from vidgen.models.linear import Dtype, Layout, Linear
from vidgen.models.rope import rotate

QK_NORMS = ("head", "joint", "none")


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys (Dehghani et al., arXiv:2302.05442).

    Attributes:
      heads: H; the width of the queries divides by it.
      dtype: of the matrix products.
      layout: where weights lie; None = one device.
      how: kernel and strategy over the mesh.
      over_context: whether the tokens x lie in pieces over the context axis; a context to attend to never does.
      bias: whether the four projections have biases.
      qk_norm: RMS norm of queries and keys: "head" (each head alone, one weight for all), "joint" (all heads together,
        a weight for each feature) or "none".
    """

    heads: int
    dtype: Dtype = jnp.float32
    layout: Layout | None = None
    how: Attending = Attending()
    over_context: bool = True
    bias: bool = False
    qk_norm: str = "head"

    @nn.compact
    def __call__(
        self,
        x_BxSxW,
        ids_BxS,
        table=None,
        context_BxLxE=None,
        context_ids_BxL=None,
        windows: bool = False,
        image=None,
    ) -> jax.Array:
        """Self-attention, or cross-attention where a context is given; `table` from `rope_table`.

        Tokens attend to those of equal id: the segment, or, with `windows`, a window of it. Returns [B,S,W].

        Args:
          image: a second context (values [B,M,E], ids [B,M]) with keys and values of its own. The same queries attend
            to it apart from the first, and the two results are summed before the output product (IP-Adapter, Ye et al.,
            arXiv:2308.06721; Wan's image-to-video models).
        """
        width = x_BxSxW.shape[-1]
        own = context_BxLxE is None
        context, context_ids = (x_BxSxW, ids_BxS) if own else (context_BxLxE, context_ids_BxL)

        def linear(name, x, over_context):
            made = Linear(width, self.bias, self.dtype, layout=self.layout, over_context=over_context, name=name)
            return made(x)

        def project(name, x, over_context):  # [B,L,W] → [B,H,L,D]
            y = linear(name, x, over_context)
            # Named before the norm, so that keeping it spares the product.
            y = checkpoint_name(y, name if own else f"cross_{name.removeprefix('image_')}")
            if self.qk_norm == "joint" and not name.endswith("value"):
                y = normed(name, y)
            return y.reshape(*y.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)

        def normed(name, x):
            return nn.RMSNorm(dtype=jnp.float32, name=f"{name}_norm")(x)

        q = project("query", x_BxSxW, self.over_context)
        k = project("key", context, self.over_context and own)
        v = project("value", context, self.over_context and own)
        if self.qk_norm == "head":
            q, k = normed("query", q), normed("key", k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        q, k = q.astype(self.dtype), k.astype(self.dtype)
        out = attend(q, k, v, ids_BxS, context_ids, self.how, shared_keys=not own, windows=windows)
        if image is not None:
            values, image_ids = image
            k, v = (project(f"image_{name}", values, False) for name in ("key", "value"))
            if self.qk_norm == "head":
                k = normed("image_key", k)
            out = out + attend(q, k.astype(self.dtype), v, ids_BxS, image_ids, self.how, shared_keys=True)
        out = out.transpose(0, 2, 1, 3).reshape(*x_BxSxW.shape[:2], width)
        out = linear("out", out, self.over_context)
        return checkpoint_name(out, "attention_project" if own else "cross_project")


def dtype_of(name: str, value: str) -> Dtype:
    """The dtype that a setting names; raises ConfigError."""
    if value not in ("float32", "bfloat16"):
        raise ConfigError(f"config.{name}={value!r}: known are float32, bfloat16")
    return jnp.dtype(value)


def check_heads(name: str, c: ConfigDict) -> None:
    """Raises ConfigError unless heads of even width (RoPE turns pairs) fill the width."""
    width, heads = c.width, c.heads
    if width % heads or width // heads % 2:
        fits = [h for h in range(1, width // 2 + 1) if width % h == 0 and width // h % 2 == 0]
        near = min(fits, key=lambda h: abs(h - heads), default=1)
        raise ConfigError(f"config.{name}.heads={heads}: does not cut width {width} into even heads; nearest: {near}")
