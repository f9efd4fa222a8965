"""The one jitted step that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.training.state import TrainState

LossSum = Callable[[Any, TokenBatch, jax.Array], jax.Array]  # (params, rows, a key a row) → summed error
Weight = Callable[[TokenBatch], jax.Array]  # rows → weight of each token, [B,S]


def row_keys(seed: int, step: jax.Array, rows: int) -> jax.Array:
    """A random key for each row of the global batch of a step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def microbatches(tree: Any, count: int) -> Any:
    """[B, …] → [count, B / count, …]. Takes every count-th row, so that rows stay on their devices."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), tree)


Step = Callable[[TrainState, TokenBatch], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    loss_sum: LossSum,
    weight: Weight,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    shardings: Any = None,
) -> Step:
    """(state, batch) → (state, metrics), to be jitted with the state donated.

    The loss is the sum of errors over the trained tokens of the whole global batch, over devices and microbatches.
    `shardings` are the parameters', or None on one device: gradients lie like them from the start.
    """
    c = config.optimizer

    def placed(grads):
        return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)

    def gradients(params, batch, keys, total):
        def loss(params, batch, keys):
            return loss_sum(params, batch, keys) / total

        if c.accumulate == 1:
            value, grads = jax.value_and_grad(loss)(params, batch, keys)
            return value, placed(grads)

        def add(carry, part):
            value, grads = jax.value_and_grad(loss)(params, *part)
            return (carry[0] + value, jax.tree.map(jnp.add, carry[1], placed(grads))), None

        zero = (jnp.zeros(()), placed(jax.tree.map(jnp.zeros_like, params)))
        return jax.lax.scan(add, zero, microbatches((batch, keys), c.accumulate))[0]

    def step(state: TrainState, batch: TokenBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        tokens = jnp.sum(weight(batch))
        keys = row_keys(config.seed, state.step, batch.segment.shape[0])
        loss, grads = gradients(state.params, batch, keys, jnp.maximum(tokens, 1.0))
        norm = optax.tree.norm(grads)
        if c.clip:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, c.clip / jnp.maximum(norm, 1e-12)), grads)
        good = jnp.isfinite(norm)
        if c.outlier:
            settled = state.step - state.skipped >= 20  # a mean over fewer steps says little
            good &= ~settled | (norm <= c.outlier * state.grad_norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(c.ema, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, state.ema, 1.0 - decay)
        # A choice of numbers and not of branches: the compiler makes one pass over weights and moments of it, in place.
        params, ema, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, ema, opt_state),
            (state.params, state.ema, state.opt_state),
        )
        # What lasts is no outlier: the mean follows, a little at a time.
        seen = jnp.where(jnp.isfinite(norm), jnp.minimum(norm, c.outlier * state.grad_norm), state.grad_norm)
        mean = 0.95 * state.grad_norm + 0.05 * jnp.where(good, norm, seen)
        mean = jnp.where(good & (state.step == state.skipped), norm, mean)
        skipped = state.skipped + (1 - good.astype(jnp.int32))
        state = TrainState(state.step + 1, params, ema, opt_state, mean, skipped)
        return state, {"loss": loss, "grad_norm": norm, "tokens": tokens, "skipped": skipped}

    return step
