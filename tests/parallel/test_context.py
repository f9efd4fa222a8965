import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from vidgen.models.kernels import blockwise, dense
from vidgen.parallel import context

B, H, S, D = 1, 4, 64, 8
NAMES = ("out", "lse")
ALL = [[0, 1, 2, 3]]
IDS = jnp.asarray(np.repeat([[1, 2, 0]], [20, 40, 4], axis=1), jnp.int32)


def over_four(local):
    """`local` on tokens that lie over four devices."""
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("context",), axis_types=(AxisType.Auto,))
    tokens, ids = P(None, None, "context"), P(None, "context")
    specs = (tokens, tokens, tokens, ids, ids)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)


def ring(block=8, forward=blockwise.forward):
    backward = functools.partial(blockwise.backward, block=block)
    return context.ring(functools.partial(forward, block=block), backward, "context", ALL, NAMES)


KERNEL = functools.partial(blockwise.attend, block=8)
STRATEGIES = {
    "gather": lambda: context.gather(KERNEL, "context", ALL),
    "ulysses": lambda: context.ulysses(KERNEL, "context", ALL),
    "ring": ring,
}


def tensors(dtype=jnp.float32):
    r = np.random.default_rng(0)
    return [jnp.asarray(r.normal(size=(B, H, S, D)), dtype) for _ in range(4)]


def loss(attend):
    return lambda q, k, v, g: jnp.sum((attend(q, k, v, IDS, IDS) * g).astype(jnp.float32))


def test_an_axis_is_cut_into_neighbours_and_those_across():
    assert context.split(6, 2) == ([[0, 2, 4], [1, 3, 5]], [[0, 1], [2, 3], [4, 5]])
    assert context.split(4, 4) == ([[0], [1], [2], [3]], ALL)
    assert context.split(4, 1) == (ALL, [[0], [1], [2], [3]])


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_move_what_they_say(name):
    """Collectives of forward and gradient, by what they carry: whole keys, heads for tokens, or slabs of keys."""
    program = jax.jit(jax.grad(loss(over_four(STRATEGIES[name]())), (0, 1, 2)))
    hlo = program.lower(*tensors()).compile().as_text()
    found = set(re.findall(r"= f32\[[\d,]+\]\S* (all-gather|all-to-all|collective-permute|reduce-scatter)\(", hlo))
    found |= set(re.findall(r"= \(f32\[[^=]*?\) (all-to-all|collective-permute|all-gather|reduce-scatter)\(", hlo))
    wanted = {
        "gather": {"all-gather", "reduce-scatter"},
        "ulysses": {"all-to-all"},
        "ring": {"collective-permute"},
    }
    assert found == wanted[name]


def test_a_ring_merges_in_float32_and_answers_in_the_dtype_it_was_asked():
    exact = jax.jit(jax.grad(loss(dense.attend), (0, 1, 2)))(*tensors())
    arrays = tensors(jnp.bfloat16)
    for a, b in zip(jax.jit(jax.grad(loss(over_four(ring())), (0, 1, 2)))(*arrays), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.05 * float(jnp.max(jnp.abs(b))))


def test_a_ring_brings_each_device_the_keys_of_every_other_once():
    """Ids that say where a key comes from, seen by a kernel that only adds them up."""
    seen = []

    def forward(q, k, v, q_ids, k_ids, block):
        jax.debug.callback(lambda q, k: seen.append((int(q), int(k))), q_ids[0, 0], k_ids[0, 0])
        return blockwise.forward(q, k, v, q_ids, k_ids, block)

    places = jnp.repeat(jnp.arange(1, 5, dtype=jnp.int32), S // 4)[None]
    q, k, v, _ = tensors()
    jax.block_until_ready(jax.jit(over_four(ring(forward=forward)))(q, k, v, places, places))
    jax.effects_barrier()
    assert sorted(seen) == [(i, j) for i in range(1, 5) for j in range(1, 5)]


def test_a_device_whose_queries_are_all_padding_stays_finite():
    ids = jnp.asarray(np.repeat([[1, 0]], [16, 48], axis=1), jnp.int32)
    q, k, v, g = tensors()

    def both(attend):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(attend(q, k, v, ids, ids) * g), (0, 1, 2)))(q, k, v)

    (out, grads), (wanted, exact) = both(over_four(ring())), both(dense.attend)
    np.testing.assert_allclose(out, wanted, rtol=1e-5)
    for a, b in zip(grads, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
