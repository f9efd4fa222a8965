"""Context parallelism: attention over tokens that lie on several devices, whatever computes it.

Each function here runs inside a `shard_map`, on the arrays of one device, and takes the kernel as a function. Devices
hold neighbouring slabs of a row's tokens, in order.

- `gather`: every device collects all keys and values. One collective, K and V whole in memory.
- `ulysses` (Jacobs et al., arXiv:2309.14509): devices exchange heads for tokens, so that each has all tokens of some
  heads; heads must divide. The least traffic, and any kernel runs as on one device.
- `ring` (Liu et al., arXiv:2310.01889): keys and values go round, and the outputs are merged by their log-sum-exp.
  Memory stays that of a slab.

`ulysses` inside and `gather` or `ring` outside make the two-dimensional forms (as in USP, arXiv:2405.07719), each among
groups of the axis: see `split`. Groups, and not a mesh with the axis in two, since a program has one mesh only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v, q_ids, k_ids → out
Groups = list[list[int]]  # places along an axis; collectives are among those of a group


def split(size: int, inner: int) -> tuple[Groups, Groups]:
    """(outer groups, inner groups) of an axis of `size` devices, `inner` neighbours in each inner group."""
    places = np.arange(size).reshape(-1, inner)
    return places.T.tolist(), places.tolist()


def gather(kernel: Kernel, axis: str, groups: Groups) -> Kernel:
    """`kernel` on a device's own queries and the keys of all devices of its group."""
    collect = functools.partial(jax.lax.all_gather, axis_name=axis, axis_index_groups=groups, tiled=True)

    def attend(q, k, v, q_ids, k_ids):
        return kernel(q, collect(k, axis=2), collect(v, axis=2), q_ids, collect(k_ids, axis=1))

    return attend


def ulysses(kernel: Kernel, axis: str, groups: Groups) -> Kernel:
    """`kernel` on a share of the heads and the tokens of all devices of its group."""
    collect = functools.partial(jax.lax.all_gather, axis_name=axis, axis_index_groups=groups, axis=1, tiled=True)
    swap = functools.partial(jax.lax.all_to_all, axis_name=axis, axis_index_groups=groups, tiled=True)

    def attend(q, k, v, q_ids, k_ids):
        q, k, v = (swap(x, split_axis=1, concat_axis=2) for x in (q, k, v))
        return swap(kernel(q, k, v, collect(q_ids), collect(k_ids)), split_axis=2, concat_axis=1)

    return attend


def ring(forward: Callable, backward: Callable, axis: str, groups: Groups, names: tuple[str, str]) -> Kernel:
    """Attention round the devices of each group.

    Args:
      forward: q, k, v, q_ids, k_ids → (out f32, lse f32).
      backward: q, k, v, q_ids, k_ids, out, lse, dout → (dq, dk, dv) in f32, with `out` and `lse` those of all keys.
      names: of the output and the log-sum-exp, for rematerialisation.
    """
    size = len(groups[0])
    links = [(group[i], group[(i + 1) % size]) for group in groups for i in range(size)]
    pass_on = functools.partial(jax.lax.ppermute, axis_name=axis, perm=links)

    def merge(a, b):
        """Two outputs over different keys as the one over all of them."""
        lse = jnp.logaddexp(a[1], b[1])
        return a[0] * jnp.exp(a[1] - lse)[..., None] + b[0] * jnp.exp(b[1] - lse)[..., None], lse

    @jax.named_scope("ring")
    def turn(q, k, v, q_ids, k_ids):
        def step(_, carry):
            keys, done = carry
            # The next keys are on their way while these are worked on.
            return pass_on(keys), merge(done, part(keys))

        def part(keys):
            return forward(q, *keys[:2], q_ids, keys[2])

        first = (k, v, k_ids)
        done = part(first)
        keys, done = jax.lax.fori_loop(0, size - 2, step, (pass_on(first), done))
        return merge(done, part(keys))

    @jax.custom_vjp
    def attend(q, k, v, q_ids, k_ids):
        return turn(q, k, v, q_ids, k_ids)[0].astype(v.dtype)

    def attend_forward(q, k, v, q_ids, k_ids):
        out, lse = turn(q, k, v, q_ids, k_ids)
        out, lse = checkpoint_name(out.astype(v.dtype), names[0]), checkpoint_name(lse, names[1])
        return out, (q, k, v, q_ids, k_ids, out, lse)

    @jax.named_scope("ring")
    def attend_backward(saved, dout):
        q, k, v, q_ids, k_ids, out, lse = saved

        def part(keys):
            dq, *dkv = backward(q, *keys[:2], q_ids, keys[2], out, lse, dout)
            return dq, tuple(dkv)

        def step(_, carry):
            # The gradients of keys follow them round, one place behind, so that they too travel during the work.
            keys, dq, dkv = carry
            following = pass_on(dkv)
            coming = pass_on(keys)
            more, own = part(keys)
            return coming, dq + more, jax.tree.map(jnp.add, following, own)

        first = (k, v, k_ids)
        dq, dkv = part(first)
        keys, dq, dkv = jax.lax.fori_loop(0, size - 2, step, (pass_on(first), dq, dkv))
        more, own = part(keys)
        dkv = pass_on(jax.tree.map(jnp.add, pass_on(dkv), own))
        grads = (dq + more, *dkv)
        return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None, None

    attend.defvjp(attend_forward, attend_backward)
    return attend
