"""UniPC (Zhao et al., arXiv:2302.04867): a multistep predictor and corrector, one evaluation a step.

Second order, B(h) = e^h - 1 (their "bh2"), data prediction, lower order in the first and the last step: what Wan's
pipelines use, as diffusers' UniPCMultistepScheduler does it with flow_prediction and use_flow_sigmas. On this path α =
1 - t, σ = t, and each step is a sum of samples and clean predictions with numbers that follow from the noise levels
alone: they are computed once, in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """Of n steps; each is a float64 array of n rows, and clean(i) the data prediction of step i.

    times: [n], noise levels that steps start at.
    correct: [n,4], of the sample that the step before started from, clean(i - 2), clean(i - 1), clean(i): together the
      sample of step i, corrected. Row 0 is not used.
    predict: [n,3], of the corrected sample, clean(i - 1), clean(i): together the sample of step i + 1.
    """

    times: np.ndarray
    correct: np.ndarray
    predict: np.ndarray


def coefficients(times: np.ndarray) -> Coefficients:
    """Of steps between these noise levels, [n + 1], falling from below 1, to 0 at the end."""
    # Levels are float32 where they are solved at; 1 - t, near t = 1, is to be of those very numbers.
    t = np.asarray(times, np.float32).astype(np.float64)
    n = len(t) - 1
    with np.errstate(divide="ignore"):
        log_snr = np.log(1 - t) - np.log(t)  # infinite at 0
    order = [min(2, n - i, i + 1) for i in range(n)]
    correct, predict = np.zeros((n, 4)), np.zeros((n, 3))
    for i in range(n):
        # From t[i] to t[i + 1]: what is predicted now, and what the next step corrects by its own prediction.
        h = log_snr[i + 1] - log_snr[i]
        phi1 = np.expm1(-h)
        alpha, ratio = 1 - t[i + 1], t[i + 1] / t[i]
        r = (log_snr[i - 1] - log_snr[i]) / h if order[i] == 2 else 1.0
        predict[i] = ratio, 0.0, -alpha * phi1
        if order[i] == 2:
            predict[i, 1:] -= alpha * phi1 * 0.5 / r * np.array([1.0, -1.0])
        if i + 1 < n:
            phi2 = phi1 / -h - 1
            rho = 0.5  # of first order
            correct[i + 1] = ratio, 0.0, -alpha * phi1, 0.0
            if order[i] == 2:
                phi3 = phi2 / -h - 0.5
                first, rho = np.linalg.solve([[1.0, 1.0], [r, 1.0]], np.array([phi2, 2 * phi3]) / phi1)
                correct[i + 1, 1:3] -= alpha * phi1 * first / r * np.array([1.0, -1.0])
            correct[i + 1, 2:] -= alpha * phi1 * rho * np.array([-1.0, 1.0])
    return Coefficients(t[:-1], correct, predict)


def solve(
    velocity: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], noise: jax.Array, times: np.ndarray
) -> jax.Array:
    """Follows `velocity` from `noise` at times[0] to times[-1] = 0.

    Args:
      velocity: (x, noise level t, the time that a model is told) → dx/dt; asked once a step. See `told`.
      noise: [B, …] f32.
      times: [n + 1] float64, see `coefficients`.
    """
    found = coefficients(times)
    rows = tuple(jnp.asarray(a, jnp.float32) for a in (found.times, told(times), found.correct, found.predict))
    first = jnp.arange(len(found.times)) == 0

    def step(carry, row):
        x, start, before, last = carry  # where the last step started from; clean(i - 2), clean(i - 1)
        first, t, seen, correct, predict = row
        clean = x - t * velocity(x, t, seen)
        corrected = correct[0] * start + correct[1] * before + correct[2] * last + correct[3] * clean
        x = jnp.where(first, x, corrected)
        return (predict[0] * x + predict[1] * last + predict[2] * clean, x, last, clean), None

    zeros = jnp.zeros_like(noise)
    (x, *_), _ = jax.lax.scan(step, (noise, zeros, zeros, zeros), (first, *rows))
    return x


def told(times: np.ndarray) -> np.ndarray:
    """The time that a model is told at each step, [n], in [0, 1]: whole thousandths, as diffusers has it here."""
    return np.trunc(np.asarray(times[:-1], np.float64) * 1000) / 1000
