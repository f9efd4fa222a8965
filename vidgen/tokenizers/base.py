"""What a tokenizer is, and the frame that the two exact ones share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.geometry import Geometry, Grid, from_blocks, patchify, to_blocks, unpatchify


class BlockTokenizer(nn.Module):
    """A fixed orthonormal transform of the pixels that one latent covers, then (x - mean) / std.

    The transform sees no pixel outside a token's block, so rows are packed as u8 pixel blocks on the host and become
    latents inside the step (`encode_blocks`), whatever the clips' shapes.

    Attributes:
      geometry: strides, patch and channels; channels = stride_t · stride_y · stride_x · 3.
      basis: "identity" (raw pixels) or "haar".
      mean, std: of the latents.
    """

    geometry: Geometry
    basis: str = "identity"
    mean: float = 0.0
    std: float = 1.0

    def encode(self, video_BxTxHxWx3: jax.Array) -> jax.Array:
        """Video in [-1, 1], [B,T,H,W,3] → latents [B,t,y,x,C]; T = 1 + k·stride, H and W whole tokens."""
        t, h, w = video_BxTxHxWx3.shape[1:4]
        if self.geometry.fit(t, h, w) != (t, h, w):
            raise ValueError(f"{t}x{h}x{w} does not cut into tokens; nearest: {self.geometry.fit(t, h, w)}")
        blocks = to_blocks(video_BxTxHxWx3.astype(jnp.float32), self.geometry)
        return unpatchify(self._forward(blocks), self.geometry.grid(t, h, w), self.geometry.patch)

    def decode(self, latents_BxTxYxXxC: jax.Array) -> jax.Array:
        """Inverse of `encode`; the result is not clipped to [-1, 1]."""
        tokens = patchify(latents_BxTxYxXxC, self.geometry.patch)
        grid = tuple(n // p for n, p in zip(latents_BxTxYxXxC.shape[1:4], self.geometry.patch, strict=True))
        return self.decode_tokens(tokens, grid)

    def encode_blocks(self, blocks_BxSxD: jax.Array) -> jax.Array:
        """u8 pixel blocks as the feed packs them, [B,S,D] → tokens [B,S,P] f32."""
        return self._forward(blocks_BxSxD.astype(jnp.float32) / 127.5 - 1.0)

    def decode_tokens(self, tokens_BxSxP: jax.Array, grid: Grid) -> jax.Array:
        """Tokens of clips of one size → video [B,T,H,W,3] around [-1, 1]; `grid` is the token grid (t, y, x)."""
        values = tokens_BxSxP * self.std + self.mean
        shape = values.shape
        values = values.reshape(*shape[:-1], -1, self.geometry.channels)
        if self.basis == "haar":
            values = haar(values, self.geometry.stride, inverse=True)
        return from_blocks(values.reshape(shape), grid, self.geometry)

    def _forward(self, blocks: jax.Array) -> jax.Array:
        shape = blocks.shape
        values = blocks.reshape(*shape[:-1], -1, self.geometry.channels)
        if self.basis == "haar":
            values = haar(values, self.geometry.stride)
        return (values.reshape(shape) - self.mean) / self.std


def haar(values: jax.Array, stride: Grid, inverse: bool = False) -> jax.Array:
    """The orthonormal multilevel 3D Haar transform of each block, along t, y and x in turn.

    Args:
      values: [..., stride_t · stride_y · stride_x · 3] pixels of a block, or its coefficients.
      stride: block size; powers of two.

    Returns:
      The same shape; coefficients run from coarse to fine along each axis (Mallat 1989).
    """
    *lead, features = values.shape
    x = values.reshape(*lead, *stride, features // (stride[0] * stride[1] * stride[2]))
    for axis, size in enumerate(stride):
        matrix = jnp.asarray(haar_matrix(size))
        # HIGHEST: a TPU's default would round the pixels to bfloat16.
        x = jnp.moveaxis(
            jnp.tensordot(x, matrix if inverse else matrix.T, axes=[len(lead) + axis, 0], precision="highest"),
            -1,
            len(lead) + axis,
        )
    return x.reshape(*lead, features)


def haar_matrix(size: int) -> np.ndarray:
    """The orthonormal Haar analysis matrix, [size, size] f32, rows from coarse to fine; size a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        coarse = np.kron(matrix, [1.0, 1.0])
        fine = np.kron(np.eye(len(matrix)), [1.0, -1.0])
        matrix = np.concatenate([coarse, fine]) / np.sqrt(2.0)
    return matrix.astype(np.float32)


def geometry_from_config(c: ConfigDict) -> Geometry:
    """The geometry of `config.tokenizer`, without JAX work; raises ConfigError."""
    if c.name not in ("patch", "wavelet"):
        raise ConfigError(f"config.tokenizer.name={c.name!r}: known are patch, wavelet")
    for key in ("stride", "patch"):
        value = tuple(c[key])
        if len(value) != 3 or min(value) < 1:
            raise ConfigError(f"config.tokenizer.{key}={value}: expected three numbers ≥ 1, (t, y, x)")
    if c.name == "wavelet" and any(s & (s - 1) for s in c.stride):
        raise ConfigError(f"config.tokenizer.stride={tuple(c.stride)}: the wavelet wants powers of two")
    channels = 3 * c.stride[0] * c.stride[1] * c.stride[2]
    return Geometry(tuple(c.stride), tuple(c.patch), channels)


def from_config(c: ConfigDict) -> BlockTokenizer:
    """The tokenizer of `config.tokenizer`."""
    return BlockTokenizer(geometry_from_config(c), "haar" if c.name == "wavelet" else "identity", c.mean, c.std)
