"""GaLore: Adam on gradients projected to a few directions (Zhao et al., arXiv:2403.03507).

A gradient G [m,n] with m ≤ n is projected to R = Pᵀ G, [r,n], whose moments take a share r / m of Adam's; Adam's
update of R is projected back by P, [m,r]; where n < m, it is R = G P. Each layer of a stack has its own P. Four things
differ from the paper. What the projection leaves out, G - P R, is not lost: it is added as it is, each of its columns
scaled as Adam scaled that column of R, and grows by 1 % a step at most (Fira, Chen et al., arXiv:2410.01623), which
takes no memory. P comes of subspace iteration from the P before, matrix products and QR decompositions of
[m,r] (Halko et al., arXiv:0909.4061), where the paper takes a whole SVD, which accelerators are slow at. New
directions come after 1, 2, 4, 8, … steps as well, since layers that start from zero give the ones behind them no
gradient at first. And the first moment is carried over from the old directions to the new ones.
"""

from __future__ import annotations

import math
import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vidgen.parallel.mesh import path_name
from vidgen.training.stacks import is_stacked

ITERATIONS = 2  # of the subspace, each time that it is chosen anew
INSIDE = r"(blocks|text|vae/(en|de)coder/\w+_block\w*)/.*kernel$"  # paths of the kernels that it takes
GROWTH = 1.01  # of what is added of the part left out, from one step to the next at most


class GaLoreState(NamedTuple):
    """Of L layers (1 where they are not stacked) of matrices [m,n], with d = min(m, n): trees like the parameters'.

    Attributes:
      count: () i32, steps.
      projection: [L,d,r] f32, orthonormal columns.
      mu, nu: [L,r,n] or [L,m,r] f32, moments of the projected gradient.
      rest: [L] f32, norm of what was added of the part left out; 0 before the first step.
    """

    count: jax.Array
    projection: Any
    mu: Any
    nu: Any
    rest: Any


def takes(path: str, x: Any, rank: float) -> bool:
    """Whether an array is a kernel inside blocks of which GaLore has a smaller state than Adam.

    The first and the last layers are Adam's, as in the paper: few numbers, which want all directions.
    """
    if not re.match(INSIDE, path) or x.ndim < 2:
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

        def none(path, x):
            return jnp.zeros(shapes(path, x)[0][0])

        over = jax.tree_util.tree_map_with_path
        made = (over(make, params) for make in (start, zeros, zeros, none))
        return GaLoreState(jnp.zeros((), jnp.int32), *made)

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

        def one(p, low, m, v, before, g, like):
            step = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            rest, norm = _left_out(g, low, step, p, before)
            return (_back(p, step, g) + rest).reshape(like.shape).astype(like.dtype), norm

        tree = jax.tree.structure(matrices)
        args = (projection, low, mu, nu, state.rest, matrices, grads)
        made = [one(*leaves) for leaves in zip(*map(jax.tree.leaves, args), strict=True)]
        updates, rest = (
            (jax.tree.unflatten(tree, part) for part in zip(*made, strict=True)) if made else (grads, state.rest)
        )
        return updates, GaLoreState(count, projection, mu, nu, rest)

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


def _back(p: jax.Array, low: jax.Array, g: jax.Array) -> jax.Array:
    """What was projected, in the shape of G [L,m,n]."""
    return _dot("ldr,lrn->ldn", p, low) if _left(g) else _dot("lmr,ldr->lmd", low, p)


def _left_out(
    g: jax.Array, low: jax.Array, step: jax.Array, p: jax.Array, before: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(what is added of the part of G [L,m,n] that the projection leaves out, its norm [L]).

    Args:
      low, step: G projected, and Adam's update of it.
      before: the norm that was returned the step before, 0 at the first.
    """
    axis = 1 if _left(g) else 2  # the one that was projected
    scale = jnp.linalg.norm(step, axis=axis, keepdims=True) / (jnp.linalg.norm(low, axis=axis, keepdims=True) + 1e-30)
    rest = scale * (g - _back(p, low, g))
    norm = jnp.linalg.norm(rest, axis=(1, 2))
    most = jnp.where(before > 0, GROWTH * before, norm)
    kept = jnp.minimum(norm, most)
    return rest * (kept / jnp.maximum(norm, 1e-30))[:, None, None], kept


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
