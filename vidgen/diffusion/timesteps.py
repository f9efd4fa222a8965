"""Which noise levels are trained on and sampled at: one definition of the shift for both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict


def shift_for(objective: ConfigDict, tokens: jax.Array | float) -> jax.Array:
    """The shift of a clip of so many tokens: `shift` · sqrt(tokens / shift_tokens) (Esser et al., arXiv:2403.03206).

    More tokens carry the same content more often, so the same noise hides less of it.
    """
    if not objective.shift_tokens:
        return jnp.full_like(jnp.asarray(tokens, jnp.float32), objective.shift)
    return objective.shift * jnp.sqrt(jnp.maximum(tokens, 1) / objective.shift_tokens)


def shifted(t: jax.Array, shift: jax.Array | float) -> jax.Array:
    """Moves noise levels in [0, 1] towards 1 by `shift` > 1."""
    return shift * t / (1 + (shift - 1) * t)


def logit_normal(normal: jax.Array, objective: ConfigDict, tokens: jax.Array) -> jax.Array:
    """Standard normal numbers → noise levels to train at, shifted for clips of so many tokens."""
    t = jax.nn.sigmoid(objective.time_mean + objective.time_std * normal)
    return shifted(t, shift_for(objective, tokens))


def evaluation_levels(objective: ConfigDict, tokens: jax.Array, count: int) -> jax.Array:
    """`count` fixed noise levels at the quantiles of the training distribution: [count, *tokens.shape]."""
    from statistics import NormalDist

    middle = (np.arange(count) + 0.5) / count
    normal = np.asarray([NormalDist().inv_cdf(float(q)) for q in middle], np.float32)
    return jax.vmap(lambda z: logit_normal(jnp.full_like(jnp.asarray(tokens, jnp.float32), z), objective, tokens))(
        normal
    )


def sampling_times(objective: ConfigDict, steps: int, tokens: int) -> jax.Array:
    """steps + 1 noise levels from 1 to 0."""
    return shifted(jnp.linspace(1.0, 0.0, steps + 1), shift_for(objective, float(tokens)))
