"""LPIPS on its pinned weights. Beside the authors' implementation: tests/peers/test_lpips_parity.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen import perceptual
from vidgen.objectives import lpips


@pytest.fixture(scope="module")
def params():
    if reason := perceptual.missing("lpips"):
        pytest.skip(reason)
    return lpips.load()


@pytest.fixture(scope="module")
def distance(params):
    return functools.partial(jax.jit(lpips.lpips, static_argnames="dtype"), params)  # as a constant they compile slowly


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    a = np.cumsum(rng.normal(size=(2, 19, 17, 3)), axis=1)
    a = jnp.asarray(a / np.abs(a).max(), jnp.float32)
    return a, jnp.clip(a + 0.1 * rng.normal(size=a.shape).astype(np.float32), -1, 1)


def test_distance_grows_with_the_fault_and_does_not_mind_the_order(distance, pair):
    a, b = pair
    near, far = distance(a, a + (b - a) / 4), distance(a, b)
    assert near.shape == (2,) and (np.asarray(near) > 0).all() and (np.asarray(far) > 1.5 * np.asarray(near)).all()
    np.testing.assert_allclose(far, distance(b, a), rtol=1e-5)
    assert np.abs(distance(a, a)).max() < 1e-12


def test_gradients_are_finite_on_flat_and_equal_images(params, distance, pair):
    a, b = pair
    gradient = functools.partial(jax.jit(jax.grad(lambda p, x, y: lpips.lpips(p, x, y).sum(), argnums=1)), params)
    flat = jnp.full_like(a, -1.0)
    for x, y in ((a, b), (flat, b), (flat, flat), (a, a)):
        assert np.isfinite(gradient(x, y)).all()
    assert np.abs(gradient(a, b)).max() > 1e-4
    step = a - 1e-2 * gradient(a, b) / jnp.abs(gradient(a, b)).max()
    assert float(distance(step, b).sum()) < float(distance(a, b).sum())


def test_bfloat16_is_close(params, distance, pair):
    a, b = pair
    fine, coarse = distance(a, b), distance(a, b, dtype=jnp.bfloat16)
    assert coarse.dtype == jnp.float32
    np.testing.assert_allclose(coarse, fine, rtol=0.02)


def test_images_that_are_too_small_are_refused(params):
    small = jnp.zeros((1, 16, 15, 3))
    with pytest.raises(ValueError, match="16x15 images: expected 16x16"):
        lpips.lpips(params, small, small)
