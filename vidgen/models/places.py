"""Where tokens are, told to them at the entrance: fixed sinusoids, or a learned table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.geometry import Grid
from vidgen.models.rope import axis_widths

HOW = ("projected", "sincos", "table", "none")  # values of config.model.absolute


def placed(module: nn.Module, x_BxSxW: jax.Array, coords_BxSx3: jax.Array) -> jax.Array:
    """Tokens that know where they are, as `module.absolute` has it.

    `module` has the attributes width, absolute, table and rope_theta, and the layer `place` ("projected") or the
    parameter `place_table` ("table").
    """
    if module.absolute == "projected":
        waves = sinusoids(coords_BxSx3, 64, module.rope_theta)
        return x_BxSxW + module.place(waves.reshape(*x_BxSxW.shape[:2], -1))
    if module.absolute == "sincos":
        return x_BxSxW + sincos(coords_BxSx3, module.width, time=bool(module.table) and module.table[0] > 1)
    if module.absolute == "table":
        return x_BxSxW + looked_up(module.place_table, module.table, coords_BxSx3)
    return x_BxSxW


def check_fits(model: ConfigDict, grid: Grid, what: str) -> None:
    """Raises ConfigError for a clip, `what`, whose grid of tokens is larger than a learned table of places."""
    table = tuple(model.table)
    if model.absolute == "table" and any(n > most for n, most in zip(grid, table, strict=True)):
        raise ConfigError(
            f"config.model.table={table}: {what} has (t, y, x) = {tuple(grid)} tokens; expected no more along any axis"
        )


def sinusoids(x: jax.Array, width: int, longest: float = 10_000.0) -> jax.Array:
    """Cosines and sines of numbers, [...] → [..., width] f32, at wavelengths from 2π to 2π · `longest`."""
    frequency = jnp.exp(-jnp.log(longest) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angle = x[..., None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def sincos(coords_BxSx3: jax.Array, width: int, time: bool) -> jax.Array:
    """The fixed position embedding of MAE (He et al., arXiv:2111.06377) and DiT, [B,S,width] f32.

    Half of the features for x and half for y, sines before cosines. With `time` a third each for x, y and t, which the
    two papers have no word of; what doesn't divide goes to x first.

    Args:
      coords_BxSx3: (t, y, x) in patches; not only whole numbers, as where an image has another size than in training.
      width: even.
    """
    axes = (2, 1, 0) if time else (2, 1)
    parts = []
    for axis, pairs in zip(axes, axis_widths(width, len(axes)), strict=True):
        waves = sinusoids(coords_BxSx3[..., axis], 2 * pairs)
        parts += [waves[..., pairs:], waves[..., :pairs]]
    return jnp.concatenate(parts, axis=-1)


def looked_up(table_LxW: jax.Array, size: tuple[int, int, int], coords_BxSx3: jax.Array) -> jax.Array:
    """Each token's row of a learned table of T·Y·X places, t-major, [B,S,W] f32; NaN outside, so that no run goes on.

    Args:
      size: (T, Y, X), tokens of the largest clip.
      coords_BxSx3: (t, y, x) in patches, rounded.
    """
    place = jnp.round(coords_BxSx3).astype(jnp.int32)
    inside = jnp.all((place >= 0) & (place < jnp.asarray(size)), axis=-1)
    index = (place[..., 0] * size[1] + place[..., 1]) * size[2] + place[..., 2]
    return jnp.take(table_LxW, jnp.where(inside, index, table_LxW.shape[0]), axis=0, mode="fill", fill_value=jnp.nan)
