"""Each prediction determines the others, and errors carry over as the weights say."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.diffusion import path

CLEAN, NOISE, WRONG = jax.random.normal(jax.random.key(0), (3, 8, 5))
T = jnp.linspace(0.05, 0.95, 8)[:, None]


@pytest.mark.parametrize("space", path.SPACES)
def test_a_perfect_prediction_gives_clean_and_velocity(space):
    x_t = path.noised(CLEAN, NOISE, T)
    target = path.target(space, CLEAN, NOISE, T)
    np.testing.assert_allclose(path.clean_from(space, target, x_t, T), CLEAN, atol=2e-5)
    np.testing.assert_allclose(path.velocity_from(space, target, x_t, T), NOISE - CLEAN, atol=2e-4)


@pytest.mark.parametrize(("prediction", "loss"), list(itertools.product(path.SPACES, path.SPACES)))
def test_the_weight_turns_one_error_into_the_other(prediction, loss):
    x_t = path.noised(CLEAN, NOISE, T)
    target = path.target(prediction, CLEAN, NOISE, T)
    guess = target + 0.1 * WRONG
    clean = path.clean_from(prediction, guess, x_t, T)
    noise = (x_t - (1 - T) * clean) / T  # what the guess means in the space of the loss
    error = path.target(loss, clean, noise, T) - path.target(loss, CLEAN, NOISE, T)
    weight = path.loss_weight(prediction, loss, T, 1e-3)
    np.testing.assert_allclose(weight * (guess - target) ** 2, error**2, rtol=2e-2, atol=1e-5)


def test_weights_stop_growing():
    t = jnp.array([0.0, 0.01, 0.05])
    np.testing.assert_allclose(path.loss_weight("clean", "velocity", t, 0.05), 400.0, rtol=1e-5)
    assert np.isfinite(path.loss_weight("noise", "clean", jnp.array([0.0, 1.0]), 0.05)).all()


def test_the_path_ends_at_clean_and_noise():
    np.testing.assert_array_equal(path.noised(CLEAN, NOISE, 0.0), CLEAN)
    np.testing.assert_array_equal(path.noised(CLEAN, NOISE, 1.0), NOISE)
