"""Attention that holds all scores at once: fastest for short rows, and what the other kernels are tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

NAMES = ("attention_out", "attention_lse")  # of what a backward pass wants saved: the output and its log-sum-exp
MASKED = -1e30  # the score of a key that a query does not see; below `NONE`, so that its exponential is exactly 0
NONE = -1e20  # the log-sum-exp of no keys at all


def attend(
    q_BxHxSxD: jax.Array,
    k_BxHxLxD: jax.Array,
    v_BxHxLxD: jax.Array,
    q_ids_BxS: jax.Array,
    k_ids_BxL: jax.Array,
    names: tuple[str, str] = NAMES,
) -> jax.Array:
    """Softmax attention of each query to the keys of its own id; scores and softmax in float32.

    Head-major, since a CPU and a TPU both run the two products as plain batched matrix products in that layout.
    A query that sees no key, as padding (id 0) does, gets zeros: no loss looks at it, and no gradient comes of it.
    The memory grows with S x L.

    Returns: [B,H,S,D] in v's dtype.
    """
    q_BxHxSxD = scaled(q_BxHxSxD)
    scores = jnp.einsum("bhsd,bhld->bhsl", q_BxHxSxD, k_BxHxLxD, preferred_element_type=jnp.float32)
    scores = jnp.where(sees(q_ids_BxS[:, None, :, None], k_ids_BxL[:, None, None, :]), scores, MASKED)
    most = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bhsl,bhld->bhsd", weights.astype(v_BxHxLxD.dtype), v_BxHxLxD)
    return checkpoint_name(jnp.where(most > NONE, out, 0), names[0])


def scaled(q: jax.Array) -> jax.Array:
    """Queries over the square root of their width, which in bfloat16 is no number of its own."""
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def sees(q_ids: jax.Array, k_ids: jax.Array) -> jax.Array:
    """Whether a query sees a key, ids of any shapes that broadcast: equal ids do, except 0."""
    return jnp.where(q_ids == 0, -1, q_ids) == k_ids


def has_key(q_ids_BxS: jax.Array, k_ids_BxL: jax.Array, shared_keys: bool) -> jax.Array:
    """Whether a query sees any key, [B,S] bool; among keys that are not shared it sees itself, unless it is padding."""
    if shared_keys:
        return jnp.any(sees(q_ids_BxS[:, :, None], k_ids_BxL[:, None, :]), axis=-1)
    return q_ids_BxS != 0
