"""From noise to data, one step at a time. Pure functions in float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x, t scalar) → dx/dt
SOLVERS = ("euler", "heun", "ddim", "unipc", "flow_match_euler")  # the last: euler, at diffusers' noise levels


def euler_step(velocity: Velocity, x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
    """First order: one evaluation a step."""
    return x + (s - t) * velocity(x, t)


def heun_step(velocity: Velocity, x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
    """Second order: two evaluations a step, one in the last (Karras et al., arXiv:2206.00364)."""
    first = velocity(x, t)
    guess = x + (s - t) * first
    second = jax.lax.cond(s > 0, lambda: velocity(guess, s), lambda: first)
    return x + (s - t) * 0.5 * (first + second)


def ddim_step(velocity: Velocity, x: jax.Array, t: jax.Array, s: jax.Array, fresh: jax.Array, eta: float) -> jax.Array:
    """DDIM (Song et al., arXiv:2010.02502) on this path: predict clean and noise, then put them together at s.

    `eta` in [0, 1] is the share of the noise at s that is drawn anew (`fresh`); at 0 the step equals Euler's.
    """
    v = velocity(x, t)
    clean, noise = x - t * v, x + (1 - t) * v
    return (1 - s) * clean + s * (jnp.sqrt(1 - eta**2) * noise + eta * fresh)


def integrate(
    velocity: Velocity, noise: jax.Array, times: jax.Array, solver: str, keys: jax.Array, eta: float = 0.0
) -> jax.Array:
    """Follows `velocity` from `noise` at times[0] = 1 to times[-1] = 0.

    Args:
      velocity: (x, t) → dx/dt.
      noise: [B, …] standard normal.
      times: [steps + 1], falling.
      solver: one of SOLVERS but "unipc", which is `unipc.solve`.
      keys: [B], one a sample, for the fresh noise of DDIM with eta > 0.
    """

    def step(x, span):
        index, t, s = span
        if solver in ("euler", "flow_match_euler"):
            x = euler_step(velocity, x, t, s)
        elif solver == "heun":
            x = heun_step(velocity, x, t, s)
        else:
            fresh = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:]))
            x = ddim_step(velocity, x, t, s, fresh(keys) if eta else jnp.zeros_like(x), eta)
        return x, None

    x, _ = jax.lax.scan(step, noise, (jnp.arange(len(times) - 1), times[:-1], times[1:]))
    return x
