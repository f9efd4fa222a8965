"""GaLore: Adam on gradients projected to a few directions (Zhao et al., arXiv:2403.03507).

A gradient G [m,n] with m ≤ n is projected to R = Pᵀ G, [r,n], whose moments take a share r / m of Adam's; Adam's
update of R is projected back by P, [m,r]; where n < m, it is R = G P. Each layer of a stack has its own P. Three things
differ from the paper. P comes of subspace iteration from the P before, matrix products and QR decompositions of
[m,r] (Halko et al., arXiv:0909.4061), where the paper takes a whole SVD, which accelerators are slow at. New
directions come after 1, 2, 4, 8, … steps as well, since layers that start from zero give the ones behind them no
gradient at first. And the first moment is carried over from the old directions to the new ones.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vidgen.parallel.mesh import path_name
from vidgen.training.stacks import is_stacked

ITERATIONS = 2  # of the subspace, each time that it is chosen anew


class GaLoreState(NamedTuple):
    """Of L layers (1 where they are not stacked) of matrices [m,n], with d = min(m, n): trees like the parameters'.

    Attributes:
      count: () i32, steps.
      projection: [L,d,r] f32, orthonormal columns.
      mu, nu: [L,r,n] or [L,m,r] f32, moments of the projected gradient.
    """

    count: jax.Array
    projection: Any
    mu: Any
    nu: Any


def takes(path: str, x: Any, rank: float) -> bool:
    """Whether an array is a kernel or an embedding of which GaLore has a smaller state than Adam."""
    if not path.endswith(("kernel", "embedding")) or x.ndim < 2:
        return False
    layers, m, n = _view(path, x.shape)
    r, d = _rank((m, n), rank), min(m, n)
    return layers * (d * r + 2 * r * max(m, n)) < 2 * x.size


def scale_by_galore(b1: float, b2: float, rank: float, every: int, eps: float = 1e-8) -> optax.GradientTransformation:
    """Gradients → Adam's updates within a share `rank` of the directions of each matrix, chosen each `every` steps.

    For trees of which `takes` is true. Windows of convolutions count as inputs.
    """

    def shapes(path, x):
        """(shape of the projection, shape of the moments)"""
        layers, m, n = _view(path_name(path), x.shape)
        r = _rank((m, n), rank)
        return (layers, min(m, n), r), (layers, r, n) if m <= n else (layers, m, r)

    def init(params):
        def start(path, x):  # no direction yet, where the subspace iteration begins
            key = jax.random.key(zlib.crc32(path_name(path).encode()))
            return jax.random.normal(key, shapes(path, x)[0])

        def zeros(path, x):
            return jnp.zeros(shapes(path, x)[1])

        over = jax.tree_util.tree_map_with_path
        return GaLoreState(jnp.zeros((), jnp.int32), over(start, params), over(zeros, params), over(zeros, params))

    def update(grads, state, params=None):
        del params
        matrices = jax.tree_util.tree_map_with_path(
            lambda path, g: g.reshape(_view(path_name(path), g.shape)).astype(jnp.float32), grads
        )

        def choose(projection, mu):
            new = jax.tree.map(_directions, matrices, projection)
            return new, jax.tree.map(_carried, projection, new, mu, matrices)

        count = state.count
        due = (count % every == 0) | (count & (count - 1) == 0)
        projection, mu = jax.lax.cond(due, choose, lambda *old: old, state.projection, state.mu)
        low = jax.tree.map(_project, projection, matrices)
        count = optax.safe_increment(count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, low)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, low)

        def back(p, m, v, g, like):
            step = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            whole = _dot("ldr,lrn->ldn", p, step) if _left(g) else _dot("lmr,ldr->lmd", step, p)
            return whole.reshape(like.shape).astype(like.dtype)

        updates = jax.tree.map(back, projection, mu, nu, matrices, grads)
        return updates, GaLoreState(count, projection, mu, nu)

    return optax.GradientTransformation(init, update)


def _view(path: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(layers, rows, columns) of an array."""
    layers = shape[0] if is_stacked(path) and len(shape) > 2 else 1
    return layers, math.prod(shape[:-1]) // layers, shape[-1]


def _rank(sides: tuple[int, int], share: float) -> int:
    return max(1, round(share * min(sides)))


def _left(g: jax.Array) -> bool:
    """Whether the rows are what is projected: the smaller side."""
    return g.shape[1] <= g.shape[2]


def _dot(how: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(how, a, b, precision="highest")


def _project(p: jax.Array, g: jax.Array) -> jax.Array:
    """G [L,m,n] → R, [L,r,n] or [L,m,r]."""
    return _dot("ldr,ldn->lrn", p, g) if _left(g) else _dot("lmd,ldr->lmr", g, p)


def _directions(g: jax.Array, p: jax.Array) -> jax.Array:
    """The leading singular vectors of G on its smaller side, about, as columns [L,d,r]; sought from p [L,d,r]."""
    for _ in range(ITERATIONS):
        low = _project(p, g)
        y = _dot("lmn,lrn->lmr", g, low) if _left(g) else _dot("lmd,lmr->ldr", g, low)
        norm = jnp.linalg.norm(y, axis=(1, 2), keepdims=True)
        # Where there is no gradient, or one of fewer directions, the old ones fill up.
        y = y / jnp.maximum(norm, 1e-30) + 1e-6 * p
        p = jnp.linalg.qr(y)[0]
    # The singular vectors themselves, largest first, and not just their span: Adam depends on the axes.
    low = _project(p, g)
    axes = jnp.linalg.eigh(_dot("lrn,lsn->lrs", low, low) if _left(g) else _dot("lmr,lms->lrs", low, low))[1]
    return _dot("ldr,lrs->lds", p, axes[:, :, ::-1])


def _carried(old: jax.Array, new: jax.Array, mu: jax.Array, g: jax.Array) -> jax.Array:
    """The first moment in new directions: what it is in the old ones, projected."""
    turn = _dot("ldr,lds->lrs", old, new)
    return _dot("lrs,lrn->lsn", turn, mu) if _left(g) else _dot("lmr,lrs->lms", mu, turn)
