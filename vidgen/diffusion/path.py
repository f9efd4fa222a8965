"""The path from data to noise, and what a network may predict on it.

Rectified flow (Liu et al., arXiv:2209.03003; Lipman et al., arXiv:2210.02747): x_t = (1 - t)·x + t·ε, t = 0 is clean,
t = 1 is noise. With α = 1 - t and σ = t, a network may predict

    clean     x              velocity  ε - x
    noise     ε              v         α·ε - σ·x   (Salimans & Ho, arXiv:2202.00512)

At a given x_t each of them determines the others, and an error in one is an error in the others times a function of
t, so the space of the loss is a choice of its own. All in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

SPACES = ("clean", "velocity", "noise", "v")


def noised(clean: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t; `t` broadcasts against both."""
    return (1 - t) * clean + t * noise


def target(space: str, clean: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """What a perfect network would put out."""
    return {
        "clean": clean,
        "velocity": noise - clean,
        "noise": noise,
        "v": (1 - t) * noise - t * clean,
    }[space]


def clean_from(space: str, prediction: jax.Array, x_t: jax.Array, t: jax.Array, t_min: float = 1e-3) -> jax.Array:
    """The clean signal that a prediction means at x_t."""
    a = 1 - t
    return {
        "clean": lambda: prediction,
        "velocity": lambda: x_t - t * prediction,
        "noise": lambda: (x_t - t * prediction) / jnp.maximum(a, t_min),
        "v": lambda: (a * x_t - t * prediction) / (a * a + t * t),
    }[space]()


def velocity_from(space: str, prediction: jax.Array, x_t: jax.Array, t: jax.Array, t_min: float = 1e-3) -> jax.Array:
    """dx/dt that a prediction means at x_t; `t_min` bounds the division by t (clean) or 1 - t (noise)."""
    if space == "velocity":
        return prediction
    return (x_t - clean_from(space, prediction, x_t, t, t_min)) / jnp.maximum(t, t_min)


def _error_scale(space: str, t: jax.Array, t_min: float) -> jax.Array:
    """|error in `space`| over |error in the clean signal|, at a given x_t."""
    a, s = 1 - t, jnp.maximum(t, t_min)
    return {
        "clean": jnp.ones_like(t),
        "velocity": 1 / s,
        "noise": jnp.maximum(a, t_min) / s,
        "v": (a * a + t * t) / s,
    }[space]


def loss_weight(prediction: str, loss: str, t: jax.Array, t_min: float) -> jax.Array:
    """The factor that turns a squared error of the prediction into one in the loss space: of t alone."""
    return (_error_scale(loss, t, t_min) / _error_scale(prediction, t, t_min)) ** 2
