"""All that a run carries from step to step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """A pytree of arrays; nothing else is saved but the config.

    Randomness and data follow from (seed, step), so neither a key nor an iterator is kept.

    Attributes:
      step: () i32, steps taken.
      params: master weights that train, f32.
      ema: their moving average, f32, from which is sampled.
      opt_state: of optax.
      grad_norm: () f32, running mean of the gradient's norm, against which outliers are judged.
      skipped: () i32, steps whose update was skipped: not finite, or an outlier.
      aux: what a loss carries from step to step beside weights: the vectors of spectral norms. None: nothing.
      frozen: weights that a loss looks through and that nothing trains: LPIPS's, or what a fine-tuned denoiser keeps
        of `config.model.weights`. None: nothing. Not saved.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    grad_norm: jax.Array
    skipped: jax.Array
    aux: Any = None
    frozen: Any = None


def create(params: Any, optimizer: optax.GradientTransformation, aux: Any = None) -> TrainState:
    """The state before the first step, without what is frozen."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        grad_norm=jnp.zeros((), jnp.float32),
        skipped=jnp.zeros((), jnp.int32),
        aux=aux,
    )


def count(params: Any) -> int:
    """Parameters."""
    return sum(x.size for x in jax.tree.leaves(params))
