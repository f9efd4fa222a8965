"""The one jitted step that trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch, VideoBatch
from vidgen.training import optimizers
from vidgen.training.state import TrainState

Batch = TokenBatch | VideoBatch
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a loss looks at beside the parameters.

    Attributes:
      batch: rows.
      keys: [B], a random key a row.
      aux, frozen: see `TrainState`.
    """

    batch: Batch
    keys: jax.Array
    aux: Any = None
    frozen: Any = None


# (params, inputs) → (error summed over what the weight counts, (aux for the next step, more such sums, by name))
LossSum = Callable[[Any, Inputs], tuple[jax.Array, tuple[Any, Metrics]]]
# (rows, a random key a row) → weight of each token, [B,S], or of each row, [B]
Weight = Callable[[Batch, jax.Array], jax.Array]


def row_keys(seed: int, step: jax.Array, rows: int) -> jax.Array:
    """A random key for each row of the global batch of a step."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def microbatches(tree: Any, count: int) -> Any:
    """[B, …] → [count, B / count, …]. Takes every count-th row, so that rows stay on their devices."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), tree)


Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class Gradient(NamedTuple):
    """What one step's batch says of the weights.

    Attributes:
      loss: () f32, of the whole global batch.
      grads: like the parameters, before they are clipped.
      tokens: () f32, the weight that the loss was divided by, or would have been: 0 for a batch of padding.
      aux: of the next step's state.
      more: what else the loss measures, by name, () f32 each.
    """

    loss: jax.Array
    grads: Any
    tokens: jax.Array
    aux: Any
    more: Metrics


def make_gradient(
    loss_sum: LossSum, weight: Weight, config: ConfigDict, shardings: Any = None
) -> Callable[[TrainState, Batch], Gradient]:
    """(state, batch) → Gradient, to be jitted; arguments as of `make_step`."""

    def placed(grads):
        return grads if shardings is None else jax.lax.with_sharding_constraint(grads, shardings)

    def summed(state, batch, keys, total):
        """(loss, aux, more sums, gradients)."""

        def loss(params, aux, batch, keys):
            value, more = loss_sum(params, Inputs(batch, keys, aux, state.frozen))
            return value / total, more

        differentiate = jax.value_and_grad(loss, has_aux=True)
        if config.optimizer.accumulate == 1:
            (value, (aux, sums)), grads = differentiate(state.params, state.aux, batch, keys)
            return value, aux, sums, placed(grads)

        def add(carry, part):
            value, aux, grads = carry
            (more, (aux, sums)), new = differentiate(state.params, aux, *part)
            return (value + more, aux, jax.tree.map(jnp.add, grads, placed(new))), sums

        zero = (jnp.zeros(()), state.aux, placed(jax.tree.map(jnp.zeros_like, state.params)))
        parts = microbatches((batch, keys), config.optimizer.accumulate)
        (value, aux, grads), sums = jax.lax.scan(add, zero, parts)
        return value, aux, jax.tree.map(lambda x: jnp.sum(x, axis=0), sums), grads

    def gradient(state: TrainState, batch: Batch) -> Gradient:
        keys = row_keys(config.seed, state.step, jax.tree.leaves(batch)[0].shape[0])
        tokens = jnp.sum(weight(batch, keys))
        total = jnp.maximum(tokens, 1.0)
        loss, aux, sums, grads = summed(state, batch, keys, total)
        return Gradient(loss, grads, tokens, aux, {name: value / total for name, value in sums.items()})

    return gradient


def make_step(
    loss_sum: LossSum,
    weight: Weight,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    shardings: Any = None,
) -> Step:
    """(state, batch) → (state, metrics), to be jitted with the state donated.

    The loss is the sum of errors over all that has weight in the whole global batch, over devices and microbatches, and
    so is what else the loss measures; both are divided by that weight, which is logged as "tokens".
    `shardings` are the parameters', or None on one device: gradients lie like them from the start.
    A step whose loss or gradient is not finite, or whose gradient's norm is an outlier beside "usual_norm", the running
    mean that is logged with it, updates nothing and is counted in "skipped".
    """
    c = config.optimizer
    gradient = make_gradient(loss_sum, weight, config, shardings)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads, tokens, aux, more = gradient(state, batch)
        norm, grads = optimizers.clipped(grads, c.clip)
        # Of a batch in which no clip could be read there is nothing to learn.
        good = jnp.isfinite(norm) & jnp.isfinite(loss) & (tokens > 0)
        if c.outlier:
            settled = state.step - state.skipped >= 20  # a mean over fewer steps says little
            good &= ~settled | (norm <= c.outlier * state.grad_norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(c.ema, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, state.ema, 1.0 - decay)
        # A choice of numbers and not of branches: the compiler makes one pass over weights and moments of it, in place.
        params, ema, opt_state, aux = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, ema, opt_state, aux),
            (state.params, state.ema, state.opt_state, state.aux),
        )
        # What lasts is no outlier: the mean follows, a little at a time.
        seen = jnp.where(
            jnp.isfinite(norm) & (tokens > 0), jnp.minimum(norm, c.outlier * state.grad_norm), state.grad_norm
        )
        mean = 0.95 * state.grad_norm + 0.05 * jnp.where(good, norm, seen)
        mean = jnp.where(good & (state.step == state.skipped), norm, mean)
        skipped = state.skipped + (1 - good.astype(jnp.int32))
        own = {"loss": loss, "grad_norm": norm, "usual_norm": state.grad_norm, "tokens": tokens, "skipped": skipped}
        state = TrainState(state.step + 1, params, ema, opt_state, mean, skipped, aux, state.frozen)
        return state, more | own

    return step
