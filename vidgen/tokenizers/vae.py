"""The causal video VAE of Wan 2.1 (arXiv:2503.20314) and Wan 2.2, as two configs of one module.

Convolutions look back in time and never ahead, and the first frame is a latent frame of its own, so an image is a clip
of one frame, the latents of a prefix are a prefix of the latents, and a clip of any length goes through in chunks: each
layer keeps its last frames in the collection "history" for the chunk that follows.

Names are those of diffusers' AutoencoderKLWan, layouts are JAX's: channels last, kernels [*window, in, out].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from vidgen.config import ConfigError
from vidgen.geometry import Grid
from vidgen.tokenizers.layers import Conv, Down, RMSNorm, Up, average_down, duplicate_up, fold, unfold

SCORES_AT_ONCE = 1 << 26  # of the middle's attention, a clip: as many frames as that are attended to together


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The shape of a VAE; the defaults are Wan 2.1's.

    Attributes:
      base_dim: width of the encoder's first level; level i is `dim_mult[i]` times as wide.
      decoder_base_dim: of the decoder's last level; 0: base_dim.
      z_dim: channels of a latent.
      dim_mult: a level each; each but the last halves height and width.
      num_res_blocks: residual blocks a level of the encoder; the decoder has one more.
      temporal_downsample: which levels but the last halve the frames as well.
      residual: Wan 2.2's parameter-free shortcuts around the levels.
      patch: pixels in y and x that are folded into channels before the encoder; Wan 2.2: 2.
      latents_mean, latents_std: of the latents, a channel each; empty: 0 and 1.
    """

    base_dim: int = 96
    decoder_base_dim: int = 0
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    residual: bool = False
    patch: int = 1
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("base_dim", "decoder_base_dim", "z_dim", "num_res_blocks", "patch"):
            value, least = getattr(self, name), 0 if name == "decoder_base_dim" else 1
            if type(value) is not int or value < least:
                raise ConfigError(f"vae.{name}={value!r}: expected a whole number ≥ {least}")
        if not _all(self.dim_mult, int) or not self.dim_mult or min(self.dim_mult) < 1:
            raise ConfigError(f"vae.dim_mult={self.dim_mult!r}: expected a width ≥ 1 for each level, whole numbers")
        if not _all(self.temporal_downsample, bool):
            raise ConfigError(f"vae.temporal_downsample={self.temporal_downsample!r}: expected True and False")
        if type(self.residual) is not bool:
            raise ConfigError(f"vae.residual={self.residual!r}: expected True or False")
        levels = len(self.dim_mult)
        if len(self.temporal_downsample) != levels - 1:
            raise ConfigError(
                f"vae.temporal_downsample={self.temporal_downsample}: expected {levels - 1} values, one for each level "
                f"of vae.dim_mult={self.dim_mult} but the last"
            )
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if not _all(values, (int, float)) or not all(map(math.isfinite, values)):
                raise ConfigError(f"vae.{name}={values!r}: expected finite numbers, one for each of z_dim={self.z_dim}")
            if len(values) not in (0, self.z_dim):
                raise ConfigError(f"vae.{name}: {len(values)} values; expected z_dim={self.z_dim}, or none")
        if min(self.latents_std, default=1) <= 0:
            raise ConfigError(f"vae.latents_std={self.latents_std}: expected numbers above 0")
        if self.residual:
            for down in (True, False):
                for i, (a, b) in enumerate(self.widths(down)):
                    last, slow = i == levels - 1, self.slow(i, down)
                    size = (2 if slow else 1) * (1 if last else 4)
                    if not (down or last) and size * b % a or down and size * a % b:
                        raise ConfigError(
                            f"vae.residual: no shortcut leads from {a} to {b} channels in level {i} of the "
                            f"{'encoder' if down else 'decoder'}; in vae.dim_mult={self.dim_mult} each should be one "
                            "or two times the one before, and the last equal to it, as in (1, 2, 4, 4)"
                        )

    @property
    def stride(self) -> Grid:
        """Pixels that a latent covers in (t, y, x)."""
        space = self.patch * 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal_downsample), space, space

    def widths(self, down: bool) -> tuple[tuple[int, int], ...]:
        """(in, out) of each level, of the encoder where `down`, else of the decoder."""
        if down:
            dims = [self.base_dim * m for m in (1, *self.dim_mult)]
        else:
            base = self.decoder_base_dim or self.base_dim
            dims = [base * m for m in (self.dim_mult[-1], *self.dim_mult[::-1])]
        return tuple(zip(dims[:-1], dims[1:], strict=True))

    def slow(self, level: int, down: bool) -> bool:
        """Whether the level changes the number of frames."""
        flags = self.temporal_downsample if down else self.temporal_downsample[::-1]
        return level < len(flags) and flags[level]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VAEConfig:
        """Inverse of `to_dict`; raises ConfigError on keys that it does not know, and values that are no shape."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise ConfigError(f"a vae has no setting {sorted(unknown)[0]!r}; known are {', '.join(sorted(known))}")
        return cls(**{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in values.items()})


def _all(values: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether this is a tuple of such values; True is no number here."""
    return isinstance(values, tuple) and all(
        isinstance(v, kind) and isinstance(v, bool) == (kind is bool) for v in values
    )


def from_config(c: Mapping[str, Any]) -> VAEConfig:
    """The shape that `config.vae` asks for."""
    names = (field.name for field in dataclasses.fields(VAEConfig) if field.name in c)
    return VAEConfig.from_dict({name: c[name] for name in names})


class CausalVAE(nn.Module):
    """Video [B,T,H,W,3] in [-1, 1] ↔ latents [B,t,y,x,z_dim].

    A first chunk (`start`) has 1 + k·stride_t frames and 1 + k latent frames, one that goes on has k·stride_t and k;
    height and width are multiples of the stride. To go on, apply with the collection "history" that the chunk before
    left (`mutable=["history"]`) and `start=False`.

    Attributes:
      config: its shape.
      dtype: of activations and of products; norms and the middle's softmax are float32, and so is what is returned.
      remat: whether the backward pass computes residual blocks again.
    """

    config: VAEConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self):
        c = self.config
        self.encoder = Encoder(c, self.dtype, self.remat)
        self.quant_conv = Conv(2 * c.z_dim, (1, 1, 1), self.dtype)
        self.post_quant_conv = Conv(c.z_dim, (1, 1, 1), self.dtype)
        self.decoder = Decoder(c, self.dtype, self.remat)

    def __call__(self, video_BxTxHxWx3: jax.Array) -> jax.Array:
        """The reconstruction from the latents' mean."""
        return self.decode(self.encode(video_BxTxHxWx3)[0])

    def encode(self, video_BxTxHxWx3: jax.Array, start: bool = True) -> tuple[jax.Array, jax.Array]:
        """(mean, log variance) of the latents, each [B,t,y,x,z] f32; the log variance within [-30, 20]."""
        chex.assert_rank(video_BxTxHxWx3, 5)
        t, h, w, channels = video_BxTxHxWx3.shape[1:]
        stride = self.config.stride
        if (t - start) % stride[0] or t < 1 or h % stride[1] or w % stride[2] or channels != 3:
            first = "1 + " if start else ""
            raise ValueError(
                f"video of {t}x{h}x{w}x{channels}: expected {first}a multiple of {stride[0]} frames, height and width "
                f"multiples of {stride[1]} and {stride[2]}, 3 channels"
            )
        x = fold(video_BxTxHxWx3.astype(self.dtype), self.config.patch)
        moments = self.quant_conv(self.encoder(x, start), start).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents_BxTxYxXxZ: jax.Array, start: bool = True, features: bool = False) -> Any:
        """Video [B,T,H,W,3] f32 around [-1, 1], not clipped, of latents that are not normalised.

        With `features`, (video, what the last convolution, decoder/conv_out, was given).
        """
        chex.assert_shape(latents_BxTxYxXxZ, (None, None, None, None, self.config.z_dim))
        x = self.post_quant_conv(latents_BxTxYxXxZ.astype(self.dtype), start)
        x, last = self.decoder(x, start)
        video = unfold(x.astype(jnp.float32), self.config.patch)
        return (video, last) if features else video


class Encoder(nn.Module):
    """[B,T,H,W,C] → [B,t,y,x,2z]."""

    config: VAEConfig
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, start: bool) -> jax.Array:
        c, block = self.config, residual(self.remat)
        x = Conv(c.base_dim, (3, 3, 3), self.dtype, name="conv_in")(x, start)
        n = 0  # Wan 2.1 counts blocks and resamplings through all levels
        for level, (_, width) in enumerate(c.widths(True)):
            last, slow = level == len(c.dim_mult) - 1, c.slow(level, True)
            if c.residual:
                down = DownLevel(c, level, self.dtype, self.remat, name=f"down_blocks_{level}")
                x = down(x, start)
                continue
            for _ in range(c.num_res_blocks):
                x = block(width, self.dtype, name=f"down_blocks_{n}")(x, start)
                n += 1
            if not last:
                x = Down(slow, self.dtype, name=f"down_blocks_{n}")(x, start)
                n += 1
        x = Middle(self.dtype, self.remat, name="mid_block")(x, start)
        x = nn.silu(RMSNorm(name="norm_out")(x))
        return Conv(2 * c.z_dim, (3, 3, 3), self.dtype, name="conv_out")(x, start)


class Decoder(nn.Module):
    """[B,t,y,x,z] → ([B,T,H,W,C], what the last convolution was given)."""

    config: VAEConfig
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, start: bool) -> tuple[jax.Array, jax.Array]:
        c = self.config
        x = Conv(c.widths(False)[0][0], (3, 3, 3), self.dtype, name="conv_in")(x, start)
        x = Middle(self.dtype, self.remat, name="mid_block")(x, start)
        for level in range(len(c.dim_mult)):
            x = UpLevel(c, level, self.dtype, self.remat, name=f"up_blocks_{level}")(x, start)
        x = nn.silu(RMSNorm(name="norm_out")(x))
        return Conv(3 * c.patch**2, (3, 3, 3), self.dtype, name="conv_out")(x, start), x


class DownLevel(nn.Module):
    """A level of Wan 2.2's encoder: blocks and a resampling, and beside them a mean that has no parameters."""

    config: VAEConfig
    level: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, start: bool) -> jax.Array:
        c, block = self.config, residual(self.remat)
        width, slow = c.widths(True)[self.level][1], c.slow(self.level, True)
        last = self.level == len(c.dim_mult) - 1
        shortcut = average_down(x, width, 2 if slow else 1, 1 if last else 2)
        for i in range(c.num_res_blocks):
            x = block(width, self.dtype, name=f"resnets_{i}")(x, start)
        if not last:
            x = Down(slow, self.dtype, name="downsampler")(x, start)
        return x + shortcut


class UpLevel(nn.Module):
    """A level of the decoder; with `residual`, beside it a copy that has no parameters."""

    config: VAEConfig
    level: int
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, start: bool) -> jax.Array:
        c, block = self.config, residual(self.remat)
        width, slow = c.widths(False)[self.level][1], c.slow(self.level, False)
        last, given = self.level == len(c.dim_mult) - 1, x
        for i in range(c.num_res_blocks + 1):
            x = block(width, self.dtype, name=f"resnets_{i}")(x, start)
        if last:
            return x
        if c.residual:
            x = Up(width, slow, self.dtype, name="upsampler")(x, start)
            return x + duplicate_up(given, width, 2 if slow else 1, 2, start)
        return Up(width // 2, slow, self.dtype, name="upsamplers_0")(x, start)


def residual(remat: bool) -> type[nn.Module]:
    """`Residual`, computed again in the backward pass if told so."""
    return nn.remat(Residual, static_argnums=(2,)) if remat else Residual


class Middle(nn.Module):
    """Residual, attention within each frame, residual."""

    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, x: jax.Array, start: bool) -> jax.Array:
        block = residual(self.remat)
        width = x.shape[-1]
        x = block(width, self.dtype, name="resnets_0")(x, start)
        x = FrameAttention(self.dtype, name="attentions_0")(x)
        return block(width, self.dtype, name="resnets_1")(x, start)


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1×1×1 convolution of x where the width changes."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, start: bool) -> jax.Array:
        h = nn.silu(RMSNorm(name="norm1")(x))
        h = Conv(self.width, (3, 3, 3), self.dtype, name="conv1")(h, start)
        h = nn.silu(RMSNorm(name="norm2")(h))
        h = Conv(self.width, (3, 3, 3), self.dtype, name="conv2")(h, start)
        if x.shape[-1] != self.width:
            x = Conv(self.width, (1, 1, 1), self.dtype, name="conv_shortcut")(x, start)
        return x + h


class FrameAttention(nn.Module):
    """x + one head of attention among the places of each frame."""

    dtype: Any

    @nn.compact
    def __call__(self, x_BxTxHxWxC: jax.Array) -> jax.Array:
        b, t, h, w, c = x_BxTxHxWxC.shape
        x = RMSNorm(name="norm")(x_BxTxHxWxC)
        qkv = Conv(3 * c, (1, 1, 1), self.dtype, name="to_qkv")(x, True)

        def attend(qkv_BxNx3C: jax.Array) -> jax.Array:
            q, k, v = jnp.split(qkv_BxNx3C, 3, axis=-1)
            scores = jnp.einsum("bnc,bmc->bnm", q, k, preferred_element_type=jnp.float32) / c**0.5
            return jnp.einsum("bnm,bmc->bnc", jax.nn.softmax(scores).astype(self.dtype), v)

        frames = jnp.moveaxis(qkv.reshape(b, t, h * w, 3 * c), 1, 0)
        at_once = max(1, SCORES_AT_ONCE // (h * w) ** 2)
        if at_once >= t:
            frames = jax.vmap(attend)(frames)
        else:
            frames = jax.lax.map(jax.checkpoint(attend), frames, batch_size=at_once)
        x = jnp.moveaxis(frames, 0, 1).reshape(b, t, h, w, c)
        return x_BxTxHxWxC + Conv(c, (1, 1, 1), self.dtype, name="proj")(x, True)
