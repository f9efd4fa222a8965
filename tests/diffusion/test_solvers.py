"""Solvers on an equation whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.diffusion.guidance import guided
from vidgen.diffusion.solvers import integrate

X1 = jnp.array([1.0, -0.5, 2.0])
KEY = jax.random.key(0)


def solve(solver, steps, velocity=lambda x, t: x * jnp.cos(3 * t), **more):
    return integrate(velocity, X1, jnp.linspace(1.0, 0.0, steps + 1), solver, jax.random.split(KEY, 3), **more)


EXACT = X1 * np.exp(-np.sin(3.0) / 3)  # dx/dt = x cos 3t from t = 1 to 0


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ddim", 1)])
def test_order_of_convergence(solver, order):
    errors = [np.abs(solve(solver, n) - EXACT).max() for n in (40, 80, 160)]
    rates = np.log2(np.divide(errors[:-1], errors[1:]))
    # Heun's last step is Euler's, whose error of one step is second order too.
    np.testing.assert_allclose(rates, order, atol=0.2)


def test_straight_paths_need_one_step():
    clean = jnp.array([3.0, 1.0, -1.0])
    for solver in ("euler", "heun", "ddim"):
        np.testing.assert_allclose(solve(solver, 1, lambda x, t: X1 - clean), clean, atol=1e-6)


def test_ddim_without_fresh_noise_is_euler():
    np.testing.assert_allclose(solve("ddim", 7), solve("euler", 7), rtol=1e-5)


def test_ddim_eta_keeps_the_distribution_of_a_gaussian():
    # Data N(0, 4): the exact velocity is linear, and whatever eta, samples must come out with deviation 2.
    def velocity(x, t):
        variance = (1 - t) ** 2 * 4 + t**2
        return x * (t - (1 - t) * 4) / variance

    noise = jax.random.normal(KEY, (20_000,))
    for eta in (0.0, 0.3):
        out = integrate(
            velocity, noise, jnp.linspace(1, 0, 401), "ddim", jax.random.split(jax.random.key(1), 20_000), eta=eta
        )
        np.testing.assert_allclose(out.std(), 2.0, rtol=0.03)


def test_guidance():
    a, b = jnp.array([2.0]), jnp.array([1.0])
    assert guided(a, b, 1.0) == a and guided(a, b, 0.0) == b and guided(a, b, 3.0) == 4.0
