"""One shift for training, evaluation and sampling."""

import jax
import jax.numpy as jnp
import numpy as np

from vidgen import config as configs
from vidgen.diffusion import timesteps


def objective(**changes):
    c = configs.base().objective
    c.update(changes)
    return c


def test_shift_grows_with_the_root_of_the_tokens():
    o = objective(shift=3.0, shift_tokens=1024)
    np.testing.assert_allclose(timesteps.shift_for(o, jnp.array([1024.0, 4096.0, 256.0])), [3.0, 6.0, 1.5])
    np.testing.assert_allclose(timesteps.shift_for(objective(shift=3.0), jnp.array([1.0, 1e6])), 3.0)


def test_shift_is_the_published_formula_and_keeps_the_ends():
    t = jnp.array([0.0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(timesteps.shifted(t, 3.0), [0.0, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(timesteps.shifted(timesteps.shifted(t, 3.0), 1 / 3), t, rtol=1e-6)


def test_training_levels_have_the_median_that_mean_and_shift_say():
    o = objective(time_mean=0.5, time_std=1.0, shift=2.0)
    t = timesteps.logit_normal(jax.random.normal(jax.random.key(0), (20_000,)), o, jnp.ones(20_000))
    median = 1 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(np.median(t), 2 * median / (1 + median), atol=0.01)
    assert 0 < t.min() and t.max() < 1


def test_evaluation_levels_are_quantiles_of_the_training_levels():
    o = objective(time_mean=0.3, shift=2.0)
    levels = timesteps.evaluation_levels(o, jnp.ones((1, 1)), 4)[:, 0, 0]
    drawn = timesteps.logit_normal(jax.random.normal(jax.random.key(1), (40_000,)), o, jnp.ones(40_000))
    np.testing.assert_allclose(levels, np.quantile(drawn, [0.125, 0.375, 0.625, 0.875]), atol=0.01)


def test_sampling_runs_from_noise_to_clean_with_the_same_shift():
    o = objective(shift=4.0)
    times = timesteps.sampling_times(o, 8, 100)
    assert times.shape == (9,) and times[0] == 1 and times[-1] == 0 and (np.diff(times) < 0).all()
    np.testing.assert_allclose(times[4], timesteps.shifted(0.5, 4.0), rtol=1e-6)
