"""UniPC: its order of convergence, what its coefficients are, and the noise levels that diffusers has."""

import jax.numpy as jnp
import numpy as np
import pytest

from vidgen import config as configs
from vidgen.diffusion import unipc
from vidgen.diffusion.solvers import integrate
from vidgen.diffusion.timesteps import sampling_times

NOISE = jnp.array([[1.0, -0.5, 2.0], [0.3, 0.0, -1.0]])


def objective(shift=3.0):
    o = configs.base().objective
    o.shift = shift
    return o


def gaussian(x, t, told=None):
    """The velocity of data N(0, 4), whose path ends at 2 · noise."""
    variance = (1 - t) ** 2 * 4 + t**2
    return x * (t - (1 - t) * 4) / variance


def test_it_converges_faster_than_euler():
    def error(solver, steps):
        times = sampling_times(objective(1.0), steps, 1, solver)
        if solver == "unipc":
            return np.abs(unipc.solve(gaussian, NOISE, times) - 2 * NOISE).max()
        return np.abs(integrate(gaussian, NOISE, times, solver, None) - 2 * NOISE).max()

    found = [error("unipc", n) for n in (10, 20, 40)]
    assert found[0] > 3 * found[1] > 9 * found[2]  # Euler: 2
    assert error("euler", 20) > 10 * found[1]


def test_the_first_and_the_last_step_are_of_first_order_and_steps_are_affine():
    c = unipc.coefficients(sampling_times(objective(), 6, 1, "unipc"))
    assert c.predict.shape == (6, 3) and c.correct.shape == (6, 4)
    assert c.predict[0, 1] == 0 == c.predict[-1, 1] and (c.predict[1:-1, 1] != 0).all()
    np.testing.assert_allclose(c.predict[-1], [0, 0, 1])  # ends at the clean prediction
    # Where all clean predictions are the same x, a step from x + t·ε is exact: at s·(x + t·ε)/t + (1 - s/t)·x.
    ends = np.append(c.times[1:], 0)
    np.testing.assert_allclose(c.predict[:, 1:].sum(1), (1 - ends) - c.predict[:, 0] * (1 - c.times), atol=1e-9)
    np.testing.assert_allclose(c.correct[1:, 1:].sum(1), c.predict[:-1, 1:].sum(1), atol=1e-9)


def test_straight_paths_are_exact():
    clean = jnp.array([[3.0, 1.0, -1.0], [0.0, 2.0, 0.5]])
    for steps in (1, 2, 3, 7):
        times = sampling_times(objective(), steps, 1, "unipc")
        found = unipc.solve(lambda x, t, told: (x - clean) / t, NOISE, times)
        np.testing.assert_allclose(found, clean, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_noise_levels_are_those_of_diffusers(shift):
    """Of UniPCMultistepScheduler with use_flow_sigmas, and FlowMatchEulerDiscreteScheduler; see their documentation."""
    times = sampling_times(objective(shift), 4, 1, "unipc")
    plain = np.array([1.0, 0.75025, 0.5005, 0.25075])
    np.testing.assert_allclose(times, [*(shift * plain / (1 + (shift - 1) * plain)), 0], atol=1.1e-6)
    assert times[0] == 1 - 1e-6 and times[-1] == 0
    told = unipc.told(times)
    assert told[0] == 0.999 and (told <= times[:-1]).all() and np.allclose(told * 1000, np.round(told * 1000))
    times = sampling_times(objective(shift), 4, 1, "flow_match_euler")
    smallest = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
    assert times[0] == 1 and times[-1] == 0
    assert times[-2] == pytest.approx(shift * smallest / (1 + (shift - 1) * smallest))


def test_the_model_is_told_whole_thousandths():
    seen = []
    unipc_times = sampling_times(objective(), 3, 1, "unipc")

    def velocity(x, t, told):
        seen.append((t, told))
        return told * jnp.ones_like(x)

    first = unipc.solve(velocity, NOISE, unipc_times)
    exact = unipc.solve(lambda x, t, told: t * jnp.ones_like(x), NOISE, unipc_times)
    assert 0 < np.abs(first - exact).max() < 2e-3
