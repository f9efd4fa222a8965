"""Which noise levels are trained on and sampled at: one definition of the shift for both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logit, ndtr, ndtri
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
    """Standard normal numbers → noise levels to train at, shifted for clips of so many tokens, within `time_range`."""
    shift, (least, most) = shift_for(objective, tokens), objective.time_range
    mean, std, whole = objective.time_mean, objective.time_std, (least, most) == (0, 1)
    if not whole:  # a range of shifted levels is a range of the normal numbers; the shift adds log(shift) to the logit
        low, high = ((logit(jnp.float32(t)) - jnp.log(shift) - mean) / std for t in (least, most))
        normal = truncated(normal, low, high)
    t = shifted(jax.nn.sigmoid(mean + std * normal), shift)
    return t if whole else jnp.clip(t, least, most)


def truncated(normal: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Standard normal numbers → ones of the normal distribution between `low` and `high`, in the same order.

    Exact, by the distribution's quantiles: the one at Φ(normal) of what lies between.
    """
    side = jnp.where(low + high > 0, -1.0, 1.0)  # Φ keeps its digits in the lower tail alone
    ends = ndtr(jnp.stack([side * low, side * high]))
    quantile = ends.min(0) + ndtr(side * normal) * (ends.max(0) - ends.min(0))
    return jnp.clip(side * ndtri(quantile), low, high)


def evaluation_levels(objective: ConfigDict, tokens: jax.Array, count: int) -> jax.Array:
    """`count` fixed noise levels at the quantiles of the training distribution: [count, *tokens.shape]."""
    from statistics import NormalDist

    middle = (np.arange(count) + 0.5) / count
    normal = np.asarray([NormalDist().inv_cdf(float(q)) for q in middle], np.float32)
    return jax.vmap(lambda z: logit_normal(jnp.full_like(jnp.asarray(tokens, jnp.float32), z), objective, tokens))(
        normal
    )


def sampling_times(objective: ConfigDict, steps: int, tokens: int, solver: str = "euler") -> np.ndarray:
    """steps + 1 noise levels from 1 to 0, float64: evenly spaced before the shift.

    Those of "unipc" and "flow_match_euler" are diffusers', of UniPCMultistepScheduler and
    FlowMatchEulerDiscreteScheduler: spaced towards 1/1000, not 0, and UniPC's first is 1e-6 below 1.
    """
    shift = objective.shift
    if objective.shift_tokens:
        shift *= np.sqrt(max(tokens, 1) / objective.shift_tokens)
    if solver == "unipc":
        times = shifted(np.linspace(1.0, 1e-3, steps + 1)[:-1], shift)
        if abs(times[0] - 1) < 1e-6:
            times[0] -= 1e-6
    elif solver == "flow_match_euler":
        times = shifted(np.linspace(1.0, shifted(1e-3, shift), steps), shift)
    else:
        return shifted(np.linspace(1.0, 0.0, steps + 1), shift)
    return np.append(times, 0.0)
