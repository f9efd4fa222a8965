"""What a tokenizer is, and the frame that the two exact ones share."""

from __future__ import annotations

import difflib
import math
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.geometry import Geometry, Grid, from_blocks, patchify, to_blocks, unpatchify


class Tokenizer(Protocol):
    """Video ↔ tokens, in two halves: what the feed does to a clip on the host, and what the step does to a row.

    Frozen and hashable, so that compiled steps and samplers can hold it.

    Attributes:
      geometry: pixels ↔ latents ↔ tokens.
      learned: whether a network makes the latents. A clip is then encoded on its own before it is packed, and tokens
        become video outside the compiled sampler; else both happen inside compiled programs.
      digest: of the network's weights; empty where there are none.
      fed: (D, dtype) of a token as the feed hands it over.
    """

    geometry: Geometry
    learned: bool
    digest: str

    @property
    def fed(self) -> tuple[int, Any]: ...

    def fill(self, video_TxHxWx3: np.ndarray) -> np.ndarray:
        """A u8 clip of a size that `geometry.fit` returned → [tokens, D], t-major, on the host."""
        ...

    def latents(self, fed_BxSxD: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        """Rows of the feed → tokens [B,S,P] f32, normalised: what is noised. Traceable.

        Args:
          keys_B: the rows' random keys, from which a learned tokenizer folds its own to draw from each token's
            posterior; None: its mean. The exact ones draw nothing.
        """
        ...

    def decode_tokens(self, tokens_BxSxP: Any, grid: Grid) -> Any:
        """Tokens of clips of one size → video [B,T,H,W,3] f32 around [-1, 1]; `grid` is the token grid (t, y, x)."""
        ...


class BlockTokenizer(nn.Module):
    """A fixed orthonormal transform of the pixels that one latent covers, then (x - mean) / std.

    The transform sees no pixel outside a token's block, so rows are packed as u8 pixel blocks on the host and become
    latents inside the step (`latents`), whatever the clips' shapes.

    Attributes:
      geometry: strides, patch and channels; channels = stride_t · stride_y · stride_x · 3.
      basis: "identity" (raw pixels) or "haar".
      mean, std: of the latents.
    """

    geometry: Geometry
    basis: str = "identity"
    mean: float = 0.0
    std: float = 1.0

    learned: ClassVar[bool] = False
    digest: ClassVar[str] = ""

    @property
    def fed(self) -> tuple[int, Any]:
        """A token's block of pixels, u8: a quarter of its latents' bytes."""
        return math.prod(self.geometry.block) * 3, np.uint8

    def fill(self, video_TxHxWx3: np.ndarray) -> np.ndarray:
        """A clip's blocks; see `Tokenizer`."""
        return to_blocks(video_TxHxWx3, self.geometry)

    def latents(self, fed_BxSxD: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        """See `Tokenizer`."""
        del keys_B
        return self.encode_blocks(fed_BxSxD)

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


NAMES = ("patch", "wavelet", "vae")


def geometry_from_config(c: ConfigDict, vae: ConfigDict | None = None) -> Geometry:
    """The geometry of `config.tokenizer`, without JAX work or arrays of weights; raises ConfigError.

    `vae`: `config.vae`, whose geometry a vae without weights has, for plans; None: that is refused.
    """
    if c.name not in NAMES:
        near = difflib.get_close_matches(c.name, NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"config.tokenizer.name={c.name!r}: known are {', '.join(NAMES)}{hint}")
    own = ("patch",) if c.name == "vae" else ("stride", "patch")
    for key in own:
        value = tuple(c[key])
        if len(value) != 3 or min(value) < 1:
            raise ConfigError(f"config.tokenizer.{key}={value}: expected three numbers ≥ 1, (t, y, x)")
    if c.name == "vae":
        from vidgen.tokenizers import learned

        return learned.geometry_from_config(c, vae)
    if c.weights:
        raise ConfigError(
            f"config.tokenizer.weights={c.weights}: {c.name} has no weights; set config.tokenizer.name=vae, or leave "
            "them out"
        )
    if c.name == "wavelet" and any(s & (s - 1) for s in c.stride):
        raise ConfigError(f"config.tokenizer.stride={tuple(c.stride)}: the wavelet wants powers of two")
    channels = 3 * c.stride[0] * c.stride[1] * c.stride[2]
    return Geometry(tuple(c.stride), tuple(c.patch), channels)


def from_config(c: ConfigDict, vae: ConfigDict | None = None) -> Tokenizer:
    """The tokenizer of `config.tokenizer`; raises ConfigError.

    `vae`: as of `geometry_from_config`. A vae without weights can be compiled with, and encodes nothing.
    """
    geometry = geometry_from_config(c, vae)
    if c.name == "vae":
        from vidgen.tokenizers import learned

        return learned.from_config(c, vae)
    return BlockTokenizer(geometry, "haar" if c.name == "wavelet" else "identity", c.mean, c.std)
