"""Critics that tell reconstructions from originals, patch by patch, of frames and of clips.

PatchGAN (Isola et al., arXiv:1611.07004) with a hinge loss (Lim and Ye, arXiv:1705.02894). Spectral norm (Miyato et
al., arXiv:1802.05957) takes the place of batch norm, which would make a chunk's loss depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

MOST = 8  # times `dim`: the widest layer


class Critic(nn.Module):
    """[N, (T,) H, W, 3] in [-1, 1] → a score for each patch, [N, (t,) h, w] f32: high for an original.

    The vectors of spectral norm are in the collection "batch_stats"; `update` takes one step of their power iteration.

    Attributes:
      dim: width of the first layer; each further one is twice as wide, up to eight times.
      layers: of stride 2 in height and width, and in time where they see clips; one of stride 1 follows.
      window: of a kernel: (4, 4) for frames, (3, 4, 4) for clips.
      dtype: of activations and products.
    """

    dim: int
    layers: int
    window: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, update: bool = False) -> jax.Array:
        x = x.astype(self.dtype)
        for layer in range(self.layers + 1):
            width = self.dim * min(2**layer, MOST)
            strides = (2 if layer < self.layers else 1,) * len(self.window)
            conv = nn.Conv(width, self.window, strides, dtype=self.dtype, name=f"conv_{layer}")
            x = nn.leaky_relu(nn.SpectralNorm(conv, name=f"norm_{layer}")(x, update_stats=update), 0.2)
        last = nn.Conv(1, self.window, dtype=self.dtype, name="conv_out")
        return nn.SpectralNorm(last, name="norm_out")(x, update_stats=update)[..., 0].astype(jnp.float32)


def per_row(scores: jax.Array, rows: int) -> jax.Array:
    """Mean over each row's patches, [rows] f32; the frames of a row stand together."""
    return scores.reshape(rows, -1).mean(axis=1)


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """What a critic minimises, of each patch."""
    return 0.5 * (nn.relu(1.0 - real) + nn.relu(1.0 + fake))
