"""A constant plus power laws, y = E + Σ A_k · X_k^-γ_k, fitted to noisy points, with intervals.

The error is Huber's loss of log residuals, as in Hoffmann et al., arXiv:2203.15556. Their threshold of 1e-3 throws
efficiency away where the noise is larger, since most residuals are then counted by their sign alone; here it is 1.345
times the spread of the residuals, which keeps 95 % of the efficiency of least squares under normal noise (Huber, 1964).

Of the exponents it is supposed that they are about 0.4, times or over e: that weighs as little as a single run that
says so, and keeps an exponent which the points don't determine from running off to 0 and taking E with it.

The X_k are divided by their geometric means: A_k and γ_k of raw parameters or tokens are so nearly one number that a
minimiser stops on the way. Many problems, starts or resampled data, are solved side by side in one array.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import stats

EXPONENTS = (0.01, 3.0)  # that are searched
STARTS = (0.1, 0.25, 0.5, 0.8, 1.3), (0.05, 0.5, 0.9)  # exponents; E as a share of the smallest y
TUNING = 1.345  # Huber's threshold, in spreads of the residuals
FIRST_DELTA = 1e-3  # Hoffmann's, with which the best start is found: it trusts no outlier
FLOOR = 1e-9  # spread of residuals below which the data are exact
USUAL, SCATTER = 0.4, 1.0  # exponents are supposed to be about this, times or over e to this power
TINY = 1e-6  # share of the smallest y below which a term counts as absent


@dataclasses.dataclass(frozen=True)
class Powers:
    """A fit of `fit`, for K power laws and M points.

    Attributes:
      values: [1+2K] f64: E, A_1..A_K, γ_1..γ_K.
      draws: [R,1+2K] f64: the same of resampled data, whose spread is the uncertainty.
      residuals: [M] f64: log of what was measured over what is fitted.
      spread: standard deviation of the noise in log y, by the median of the residuals, so that outliers don't count.
      delta: Huber's threshold.
      freedom: points less numbers fitted.
    """

    values: np.ndarray
    draws: np.ndarray
    residuals: np.ndarray
    spread: float
    delta: float
    freedom: int

    def predict(self, *x: np.ndarray | float) -> np.ndarray:
        """y [...] at X_1..X_K [...]."""
        return evaluate(self.values, *x)

    def interval(self, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """95 % interval of any function of the fit, of its values [R,...] at the draws."""
        return interval(of, self.freedom)


def evaluate(values: np.ndarray, *x: np.ndarray | float) -> np.ndarray:
    """y [...,P] of fits [...,1+2K] at X_1..X_K, each [P] or a number."""
    k = len(x)
    y = values[..., 0, None]
    for i, x_i in enumerate(x):
        y = y + values[..., 1 + i, None] * np.asarray(x_i, float) ** -values[..., 1 + k + i, None]
    return y[..., 0] if all(np.ndim(x_i) == 0 for x_i in x) else y


def interval(of: np.ndarray, freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of draws [R,...], as wide as Student's t asks for with few points.

    The expanded percentile interval of Hesterberg, arXiv:1411.5279; draws that are not finite count as the farthest.
    """
    share = stats.norm.cdf(stats.t.ppf(0.025, max(freedom, 1)))
    ordered = np.sort(of, axis=0)
    last = len(ordered) - 1
    return ordered[int(np.floor(share * last))], ordered[int(np.ceil((1 - share) * last))]


def fit(x: np.ndarray, y: np.ndarray, *, draws: int = 400, seed: int = 0) -> Powers:
    """Fits y = E + Σ A_k X_k^-γ_k.

    The uncertainty is that of residuals resampled around the fit, each first divided by 1 - its leverage: what it would
    be, nearly, had the fit not seen its point. A little more than the noise, which makes up for the fit's curvature.

    Args:
      x: [K,M], all > 0.
      y: [M], all > 0; M > 1 + 2K.
      draws: how often residuals are resampled.
      seed: of the resampling.
    """
    k, m = x.shape
    size, centre = 1 + 2 * k, np.log(x).mean(axis=1)
    logs, target = np.log(x) - centre[:, None], np.log(y)
    box = _box(k, y)
    found = _minimise(_starts(k, y), logs, target, FIRST_DELTA, box)
    best = found[np.argsort(_error(found, logs, target, FIRST_DELTA))[:8]]
    shrink = np.sqrt(m / (m - size))

    def spread_of(theta: np.ndarray) -> float:
        return float(1.4826 * np.median(np.abs(_model(theta, logs)[0] - target)) * shrink)

    delta = FIRST_DELTA
    for _ in range(6):
        delta = TUNING * max(spread_of(best[0]), FLOOR)
        best = _minimise(best, logs, target, delta, box)
        best = best[np.argsort(_error(best, logs, target, delta))]
    theta = best[0]

    value, jac = _model(theta, logs)
    residuals = target - value
    leverage = np.einsum("im,ij,jm->m", jac, np.linalg.pinv(jac @ jac.T, hermitian=True), jac)
    noise = residuals / np.clip(1 - leverage, 0.2, 1)
    noise = noise - noise.mean()
    picked = np.random.default_rng(seed).integers(m, size=(draws, m))
    again = _minimise(np.tile(theta, (draws, 1)), logs, value + noise[picked], delta, box)
    least = box[0][0]
    return Powers(
        _natural(theta, centre, least), _natural(again, centre, least), residuals, spread_of(theta), delta, m - size
    )


def _starts(k: int, y: np.ndarray) -> np.ndarray:
    """[S,1+2K]: every combination of STARTS, with what E leaves of the mean y shared by the power laws."""
    exponents, shares = STARTS
    grids = np.meshgrid(shares, *[exponents] * k, indexing="ij")
    share, *gamma = (g.ravel() for g in grids)
    e = share * y.min()
    a = np.log((np.exp(np.log(y).mean()) - e) / k)
    return np.stack([np.log(e), *[a] * k, *gamma], axis=-1)


def _box(k: int, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and most of each number."""
    least, most = np.log(TINY * y.min()), np.log(y.max())
    low = [least] * (1 + k) + [EXPONENTS[0]] * k
    return np.array(low), np.array([most] + [most + 5] * k + [EXPONENTS[1]] * k)


def _natural(theta: np.ndarray, centre: np.ndarray, least: float) -> np.ndarray:
    """(E, A_k, γ_k) of (log E, log of each term at the centre, γ_k); terms at their least are 0."""
    k = len(centre)
    e, a, gamma = theta[..., :1], theta[..., 1 : 1 + k], theta[..., 1 + k :]
    e, shown = (np.where(t <= least + 1e-6, 0.0, np.exp(t)) for t in (e, a))
    return np.concatenate([e, shown * np.exp(gamma * centre), gamma], axis=-1)


def _model(theta: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log y [...,M], its derivatives [...,1+2K,M]) at logs [K,M], theta [...,1+2K]."""
    k = len(logs)
    powers = theta[..., 1 : 1 + k, None] - theta[..., 1 + k :, None] * logs
    terms = np.concatenate([np.broadcast_to(theta[..., :1, None], powers[..., :1, :].shape), powers], axis=-2)
    top = terms.max(axis=-2, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(axis=-2, keepdims=True)
    shares = shares / total
    value = (top + np.log(total))[..., 0, :]
    return value, np.concatenate([shares, -shares[..., 1:, :] * logs], axis=-2)


def _huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta)).sum(axis=-1)


def _prior(theta: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """(residuals [...,1+2K] of what is supposed of the exponents, in the units of log y's noise; derivatives)."""
    k = theta.shape[-1] // 2
    gamma, scale = theta[..., 1 + k :], delta / TUNING / SCATTER
    none = np.zeros_like(theta[..., : 1 + k])
    return (
        np.concatenate([none, scale * np.log(gamma / USUAL)], axis=-1),
        np.concatenate([none, scale / gamma], axis=-1),
    )


def _error(theta: np.ndarray, logs: np.ndarray, target: np.ndarray, delta: float) -> np.ndarray:
    return _huber(_model(theta, logs)[0] - target, delta) + 0.5 * (_prior(theta, delta)[0] ** 2).sum(axis=-1)


def _minimise(
    theta: np.ndarray,
    logs: np.ndarray,
    target: np.ndarray,
    delta: float,
    box: tuple[np.ndarray, np.ndarray],
    rounds: int = 200,
) -> np.ndarray:
    """Levenberg and Marquardt's method, on R problems at once: theta [R,1+2K], target [M] or [R,M].

    Huber's loss enters by the weights min(1, δ/|r|), which bound it from above by a parabola. A number at the side of
    the box that the gradient pushes it out of stands still. Problems that have converged are taken out of the array.
    """
    low, high = box
    theta = np.clip(theta, low, high)
    target = np.broadcast_to(target, (len(theta), logs.shape[1]))
    damping, error = np.full(len(theta), 1e-3), _error(theta, logs, target, delta)
    left = np.arange(len(theta))
    eye = np.eye(theta.shape[1])
    for _ in range(rounds):
        now = theta[left]
        value, jac = _model(now, logs)
        r = value - target[left]
        weighted = jac * np.minimum(1, delta / np.maximum(np.abs(r), 1e-300))[:, None]
        far, slope = _prior(now, delta)
        gradient = np.einsum("rim,rm->ri", weighted, r) + far * slope
        hessian = weighted @ jac.swapaxes(-1, -2) + eye * (slope**2)[:, None]
        still = ((now <= low) & (gradient > 0)) | ((now >= high) & (gradient < 0))
        free = ~still[:, :, None] & ~still[:, None, :]
        diagonal = np.einsum("rii->ri", hessian)
        diagonal = diagonal + 1e-9 * diagonal.max(axis=-1, keepdims=True) + 1e-300
        hessian = np.where(free, hessian, 0) + eye * (damping[left, None] * diagonal + still * diagonal)[:, :, None]
        step = np.linalg.solve(hessian, np.where(still, 0, -gradient)[..., None])[..., 0]
        then = np.clip(now + np.clip(step, -2, 2), low, high)
        reached = _error(then, logs, target[left], delta)
        better = reached < error[left]
        moved = np.abs(then - now).max(axis=-1)
        gain = (error[left] - reached) / (error[left] + 1e-300)
        theta[left] = np.where(better[:, None], then, now)
        error[left] = np.where(better, reached, error[left])
        damping[left] = np.clip(np.where(better, damping[left] / 5, damping[left] * 4), 1e-9, 1e12)
        going = np.where(better, (gain > 1e-10) & (moved > 1e-9), (moved > 1e-9) & (damping[left] < 1e10))
        left = left[going]
        if not len(left):
            break
    return theta
