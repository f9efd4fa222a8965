"""Rotary embedding: relative, at real coordinates, over three axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.models.rope import axis_widths, rope_table, rotate

Q, K = jax.random.normal(jax.random.key(0), (2, 1, 2, 5, 24))


def scores(coords):
    table = rope_table(coords, 24, 100.0)
    return jnp.einsum("bhsd,bhld->bhsl", rotate(Q, table), rotate(K, table))


def test_scores_depend_on_differences_only():
    coords = jnp.asarray(np.random.default_rng(0).uniform(0, 8, (1, 5, 3)), jnp.float32)
    moved = coords + jnp.array([2.5, -1.0, 3.0])
    np.testing.assert_allclose(scores(coords), scores(moved), atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_matters(axis):
    coords = jnp.zeros((1, 5, 3)).at[:, :, axis].set(jnp.arange(5.0))
    assert np.abs(scores(coords) - scores(jnp.zeros((1, 5, 3)))).max() > 0.1


def test_lengths_are_kept_and_zero_is_no_turn():
    table = rope_table(jnp.ones((1, 5, 3)), 24, 100.0)
    np.testing.assert_allclose(jnp.linalg.norm(rotate(Q, table), axis=-1), jnp.linalg.norm(Q, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(rotate(Q, rope_table(jnp.zeros((1, 5, 3)), 24, 100.0)), Q)


@pytest.mark.parametrize(("head", "widths"), [(128, (22, 21, 21)), (48, (8, 8, 8)), (6, (1, 1, 1)), (2, (1, 0, 0))])
def test_pairs_of_a_head_are_shared_out(head, widths):
    assert axis_widths(head, 3) == widths and sum(widths) == head // 2


def test_pairs_may_be_told():
    coords = jnp.asarray(np.random.default_rng(0).uniform(0, 8, (1, 5, 3)), jnp.float32)
    for a, b in zip(rope_table(coords, 24, 100.0), rope_table(coords, 24, 100.0, (4, 4, 4)), strict=True):
        np.testing.assert_array_equal(a, b)
    cos, sin = rope_table(coords, 24, 100.0, (12, 0, 0))  # time alone
    angle = coords[..., :1] * 100.0 ** (-jnp.arange(12) / 12)
    np.testing.assert_allclose(cos[:, 0], jnp.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[:, 0], jnp.sin(angle), atol=1e-6)
