"""Rotary position embedding over (t, y, x), at real-valued coordinates."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def axis_widths(head_dim: int, axes: int) -> tuple[int, ...]:
    """Rotated pairs that each axis gets; the first axes take what is left over."""
    pairs = head_dim // 2
    return tuple(pairs // axes + (i < pairs % axes) for i in range(axes))


def rope_table(
    coords_BxSxA: jax.Array, head_dim: int, theta: float, pairs: tuple[int, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, each [B,1,S,head_dim/2] f32 (Su et al., arXiv:2104.09864), the axes side by side.

    Args:
      coords_BxSxA: coordinates of the tokens along A axes.
      theta: the wavelengths run from 2π to 2π·theta, in units of the coordinates.
      pairs: rotated pairs of each axis, head_dim/2 together; (): as `axis_widths` shares them out.
    """
    angles = []
    for axis, width in enumerate(pairs or axis_widths(head_dim, coords_BxSxA.shape[-1])):
        frequency = theta ** (-jnp.arange(width, dtype=jnp.float32) / max(width, 1))
        angles.append(coords_BxSxA[..., axis, None].astype(jnp.float32) * frequency)
    angle = jnp.concatenate(angles, axis=-1)[:, None]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BxHxSxD: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (first half, second half) of each head."""
    cos, sin = table
    a, b = jnp.split(x_BxHxSxD, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BxHxSxD.dtype)
