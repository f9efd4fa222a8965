"""The layers that the video VAE is made of, channels last: convolutions that look back in time, resampling, norm.

Each keeps the last frames that it saw in the collection "history", for the chunk that follows (`start=False`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vidgen.tokenizers import conv


class RMSNorm(nn.Module):
    """x / ‖x‖₂ · √C · gamma over channels, computed in float32."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        # max(‖x‖, 1e-12), with a gradient that is finite where x is 0
        scale = jax.lax.rsqrt(jnp.maximum(jnp.sum(x32 * x32, axis=-1, keepdims=True), 1e-24))
        return (x32 * scale * (gamma * x.shape[-1] ** 0.5)).astype(x.dtype)


class Conv(nn.Module):
    """A convolution that is causal in time and keeps height and width: zeros around the frame, the past before it."""

    features: int
    window: tuple[int, int, int]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, start: bool) -> jax.Array:
        kernel, bias = parameters(self, self.window, x.shape[-1], self.features)
        if self.window[0] > 1:
            x = behind(self, x, self.window[0] - 1, start)
        return conv.conv3d(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)


class Down(nn.Module):
    """Half the height and width, with `slow` half the frames as well: the first frame stays, pairs become one."""

    slow: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, start: bool) -> jax.Array:
        kernel, bias = parameters(self, (3, 3), x.shape[-1], x.shape[-1], "resample_")
        x = conv.down2d(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)
        if not self.slow:
            return x
        kernel, bias = parameters(self, (3, 1, 1), x.shape[-1], x.shape[-1], "time_conv_")
        first = x[:, :1]
        if not start:
            x = jnp.concatenate([self.get_variable("history", "frames"), x], axis=1)
        if self.is_mutable_collection("history"):
            self.put_variable("history", "frames", x[:, -1:])
        x = conv.pairs(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)
        return jnp.concatenate([first, x], axis=1) if start else x


class Up(nn.Module):
    """Twice the height and width, with `slow` twice the frames as well, but for the first, which stays one."""

    features: int
    slow: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, start: bool) -> jax.Array:
        width = x.shape[-1]
        if self.slow:
            kernel, bias = parameters(self, (3, 1, 1), width, 2 * width, "time_conv_")
            first, rest = (x[:, :1], x[:, 1:]) if start else (None, x)
            past = behind(self, rest, 2, start)  # the first frame is not part of it
            rest = conv.conv3d(past, kernel.astype(self.dtype)) + bias.astype(self.dtype)
            b, t, h, w, _ = rest.shape
            rest = jnp.moveaxis(rest.reshape(b, t, h, w, 2, width), 4, 2).reshape(b, 2 * t, h, w, width)
            x = jnp.concatenate([first, rest], axis=1) if start else rest
        kernel, bias = parameters(self, (3, 3), width, self.features, "resample_")
        return conv.up2d(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)


def parameters(module: nn.Module, window: tuple[int, ...], inputs: int, outputs: int, prefix: str = "") -> Any:
    """(kernel, bias) f32 of a convolution; initialised as torch does, uniform within 1/√(inputs of an output)."""
    fan_in = inputs
    for size in window:
        fan_in *= size
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    kernel = module.param(f"{prefix}kernel", init, (*window, inputs, outputs), jnp.float32)

    def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return kernel, module.param(f"{prefix}bias", uniform, (outputs,), jnp.float32)


def behind(module: nn.Module, x: jax.Array, frames: int, start: bool) -> jax.Array:
    """`x` [B,T,…] after the `frames` frames that came before it, zeros at the start; keeps its own last ones."""
    if start:
        past = jnp.zeros((x.shape[0], frames, *x.shape[2:]), x.dtype)
    else:
        past = module.get_variable("history", "frames")
    x = jnp.concatenate([past, x], axis=1)
    if module.is_mutable_collection("history"):
        module.put_variable("history", "frames", x[:, -frames:])
    return x


def average_down(x: jax.Array, features: int, time: int, space: int) -> jax.Array:
    """Space and time to channels, then means of adjacent ones: [B,T,H,W,C] → [B,⌈T/time⌉,H/space,W/space,features].

    Where the frames don't divide, zeros stand in front, and count.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    b, t, h, w, c = x.shape
    x = x.reshape(b, t // time, time, h // space, space, w // space, space, c)
    x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(*x.shape[:4], features, -1).mean(axis=-1)


def duplicate_up(x: jax.Array, features: int, time: int, space: int, start: bool) -> jax.Array:
    """Copies of channels, then channels to space and time; the frames before the first are left out at the start."""
    b, t, h, w, c = x.shape
    x = jnp.repeat(x, features * time * space * space // c, axis=-1)
    x = x.reshape(b, t, h, w, features, time, space, space).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(b, t * time, h * space, w * space, features)
    return x[:, time - 1 :] if start else x


def fold(video: jax.Array, patch: int) -> jax.Array:
    """[B,T,H,W,C] → [B,T,H/p,W/p,C·p·p], channels in the order (c, x, y)."""
    if patch == 1:
        return video
    b, t, h, w, c = video.shape
    x = video.reshape(b, t, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 2, 4, 6, 5, 3).reshape(b, t, h // patch, w // patch, c * patch * patch)


def unfold(x: jax.Array, patch: int) -> jax.Array:
    """Inverse of `fold`."""
    if patch == 1:
        return x
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h, w, c // patch**2, patch, patch).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(b, t, h * patch, w * patch, c // patch**2)
