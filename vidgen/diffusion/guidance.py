"""Classifier-free guidance (Ho & Salimans, arXiv:2207.12598)."""

from __future__ import annotations

import jax


def guided(conditional: jax.Array, unconditional: jax.Array, scale: float) -> jax.Array:
    """unconditional + scale · (conditional - unconditional); 1 is no guidance."""
    return unconditional + scale * (conditional - unconditional)
