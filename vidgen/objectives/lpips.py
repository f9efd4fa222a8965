"""LPIPS, a distance of images that follows what people see (Zhang et al., arXiv:1801.03924): VGG16, version 0.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from vidgen import perceptual

_SMALL = 4  # pixels of a feature map's side
LEAST = 16  # pixels of an image's side; the last features are one pixel then
_SHIFT = (-0.030, -0.088, -0.188)  # of images in [-1, 1], to the statistics that VGG16 was trained with
_SCALE = (0.458, 0.448, 0.450)
_LEVELS = ((0, 1), (2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12))  # convolutions between poolings; the last is looked at


def load() -> dict[str, Any]:
    """The weights, f32: conv_0 … conv_12 {kernel [3,3,in,out], bias [out]}, head_0 … head_4 [C].

    Raises ConfigError where the extra [perceptual] is not installed.
    """
    return perceptual.load("lpips")


def lpips(params: Mapping[str, Any], a_NxHxWx3: jax.Array, b_NxHxWx3: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """How different images look: [N] f32, 0 for equal ones.

    Differentiable, with finite gradients everywhere. The two run through the network one after the other, so that no
    backward pass is computed for the one that needs none.

    Args:
      params: from `load`; an argument of what is jitted, for as constants they compile slowly.
      a_NxHxWx3, b_NxHxWx3: in [-1, 1]; H and W at least 16, and any number from there.
      dtype: of the convolutions; norms, differences and means are f32.
    """
    chex.assert_equal_shape((a_NxHxWx3, b_NxHxWx3))
    chex.assert_shape(a_NxHxWx3, (None, None, None, 3))
    if min(a_NxHxWx3.shape[1:3]) < LEAST:
        raise ValueError(f"LPIPS of {a_NxHxWx3.shape[1]}x{a_NxHxWx3.shape[2]} images: expected {LEAST}x{LEAST} or more")
    total = jnp.zeros(len(a_NxHxWx3), jnp.float32)
    pairs = zip(features(params, a_NxHxWx3, dtype), features(params, b_NxHxWx3, dtype), strict=True)
    for i, (a, b) in enumerate(pairs):
        # HIGHEST: a TPU's default would round squared differences to bfloat16.
        weighted = jnp.matmul(jnp.square(a - b), params[f"head_{i}"], precision="highest")
        total += weighted.mean(axis=(1, 2))
    return total


def features(params: Mapping[str, Any], images_NxHxWx3: jax.Array, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Features after the last convolution of VGG16's five levels, [N, H / 2^i, W / 2^i, C] f32, of length 1 each."""
    x = ((images_NxHxWx3 - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)).astype(dtype)
    taps = []
    for level, layers in enumerate(_LEVELS):
        if level:
            x = _halved(x)
        for layer in layers:
            kernel, bias = (jnp.asarray(params[f"conv_{layer}"][k], dtype) for k in ("kernel", "bias"))
            x = jax.nn.relu(_conv(x, kernel) + bias)
        taps.append(_unit(x.astype(jnp.float32)))
    return taps


def _conv(x_NxHxWxC: jax.Array, kernel_3x3xCxO: jax.Array) -> jax.Array:
    """3×3 convolution with zeros around. Small maps as one product: XLA has nothing fast for them on a CPU."""
    h, w, channels = x_NxHxWxC.shape[1:]
    if min(h, w) > _SMALL:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x_NxHxWxC, kernel_3x3xCxO, (1, 1), "SAME", dimension_numbers=numbers)
    wide = jnp.pad(x_NxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = jnp.concatenate([wide[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=-1)
    return patches @ kernel_3x3xCxO.reshape(9 * channels, -1)


def _halved(x_NxHxWxC: jax.Array) -> jax.Array:
    """2×2 max pooling; an odd last row or column is left out. As maxima of slices: XLA's window is slow on a CPU."""
    n, h, w, c = x_NxHxWxC.shape
    x = x_NxHxWxC[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    return jnp.maximum(jnp.maximum(x[:, :, 0, :, 0], x[:, :, 0, :, 1]), jnp.maximum(x[:, :, 1, :, 0], x[:, :, 1, :, 1]))


def _unit(x: jax.Array) -> jax.Array:
    # The floor keeps the gradient finite where all features are 0; it is far below what the 1e-10 lets through.
    return x / (jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-30)) + 1e-10)
