"""Where a parabola through a few noisy points has its minimum, and how surely."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from vidgen.scaling.powers import interval

REACH = math.log(8)  # a parabola is only good near the minimum: points within this of the lowest, and
LEAST = 4  # so many of the nearest, however far
FAR = math.log(1000)  # beyond what was tried, where a minimum that may lie anywhere is put
EDGES = {"": "", "low": "the smallest tried is the best", "high": "the largest tried is the best",
         "flat": "no minimum: the points don't bend upwards"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The minimum of y = c0 + c1·u + c2·u², u = x - origin.

    Attributes:
      coefficients: [3] f64: c0, c1, c2.
      covariance: [3,3] f64: of the coefficients, for noise of standard deviation 1 in y.
      origin: of u.
      span: (least, most) x that the parabola was fitted to.
      lowest: x of the lowest point.
      squares: sum of squared residuals; `freedom`: points less 3.
      edge: a key of EDGES: "" where the minimum lies inside the span.
    """

    coefficients: np.ndarray
    covariance: np.ndarray
    origin: float
    span: tuple[float, float]
    lowest: float
    squares: float
    freedom: int
    edge: str

    @property
    def x(self) -> float:
        """The minimum; the end of the span that is lower, where there is none inside."""
        return float(np.clip(self._at(self.coefficients), *self.span))

    @property
    def y(self) -> float:
        return float(self.value(self.x))

    def value(self, x: np.ndarray | float) -> np.ndarray:
        """The parabola at x."""
        c, u = self.coefficients, np.asarray(x) - self.origin
        return c[0] + c[1] * u + c[2] * u**2

    def _at(self, c: np.ndarray) -> np.ndarray:
        """Minima of coefficients [...,3], held within FAR of the span; where there is none, beyond the lower end."""
        low, high = self.span[0] - self.origin - FAR, self.span[1] - self.origin + FAR
        with np.errstate(divide="ignore", invalid="ignore"):
            u = -c[..., 1] / (2 * c[..., 2])
        end = np.where(c[..., 1] * (high - low) + c[..., 2] * (high**2 - low**2) < 0, high, low)
        return self.origin + np.clip(np.where(c[..., 2] > 0, u, end), low, high)

    def draws(self, noise: float, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(x, y) [count] of minima, with y's noise of this standard deviation: x also beyond the span, where noise may
        have put what lies there; y of the part that was tried.
        """
        c = rng.multivariate_normal(self.coefficients, self.covariance * noise**2, size=count, method="eigh")
        x = self._at(c)
        u = np.clip(x, *self.span) - self.origin
        return x, c[:, 0] + c[:, 1] * u + c[:, 2] * u**2

    def bracketed(self, between: tuple[float, float] | None) -> Minimum:
        """The same, at an edge where the lowest point is the last one that was tried, unless the 95 % interval of the
        minimum's x says that it lies further inside all the same.
        """
        low, high = between or (-math.inf, math.inf)
        if not self.edge and self.lowest == self.span[0] and low <= self.span[0]:
            return dataclasses.replace(self, edge="low")
        if not self.edge and self.lowest == self.span[1] and high >= self.span[1]:
            return dataclasses.replace(self, edge="high")
        return self


def fit(x: np.ndarray, y: np.ndarray) -> Minimum | None:
    """The minimum of y over x, both [M]; None with fewer than three different x. See REACH and LEAST."""
    lowest = x[np.argmin(y)]
    values = np.array(sorted(set(x), key=lambda v: abs(v - lowest)))
    if len(values) < 3:
        return None
    near = values[(np.abs(values - lowest) <= REACH) | (np.arange(len(values)) < LEAST)]
    chosen = np.isin(x, near)
    x, y = x[chosen], y[chosen]
    origin = float(x.mean())
    powers = np.vander(x - origin, 3, increasing=True)
    c, *_ = np.linalg.lstsq(powers, y, rcond=None)
    squares = float(((powers @ c - y) ** 2).sum())
    span = float(x.min()), float(x.max())
    at = origin - c[1] / (2 * c[2]) if c[2] > 0 else math.nan
    if lowest in span and not span[0] < at < span[1]:
        edge = "low" if lowest == span[0] else "high"
    elif not c[2] > 0:
        edge = "flat"
    elif not span[0] <= at <= span[1]:
        edge = "low" if at < span[0] else "high"
    else:
        edge = ""
    return Minimum(c, np.linalg.inv(powers.T @ powers), origin, span, float(lowest), squares, len(x) - 3, edge)


def noise(minima: Sequence[Minimum]) -> tuple[float | None, int]:
    """(standard deviation of y about the parabolas, degrees of freedom), of all together; None where none are left."""
    freedom = sum(m.freedom for m in minima)
    return (math.sqrt(sum(m.squares for m in minima) / freedom) if freedom else None), freedom


@dataclasses.dataclass(frozen=True)
class Power:
    """y = factor · x^exponent, and its 95 % interval (None where nothing tells the noise)."""

    factor: float
    exponent: float
    interval: tuple[float, float] | None
    draws: np.ndarray | None  # [R,2] f64: (log factor, exponent)

    def predict(self, x: np.ndarray | float) -> np.ndarray:
        return self.factor * np.asarray(x, float) ** self.exponent

    def facts(self) -> dict[str, object]:
        return {"factor": self.factor, "exponent": self.exponent, "interval": self.interval}


def power(x: np.ndarray, log_y: np.ndarray, draws: np.ndarray | None, freedom: int) -> Power | None:
    """A power law through points (x [M], exp(log_y) [M]); None with fewer than two different x.

    draws: [R,M] of log_y, or None. Where three points or more scatter about the line by more than their draws do, the
    slope's draws are spread by that much more, since then points are less sure than each parabola says.
    """
    if len(set(x)) < 2:
        return None
    u = np.log(x)
    matrix = np.linalg.pinv(np.vander(u, 2, increasing=True))
    intercept, slope = matrix @ log_y
    if draws is None:
        return Power(math.exp(intercept), float(slope), None, None)
    lines = draws @ matrix.T
    if (left := len(x) - 2) > 0:
        scatter = math.sqrt(((intercept + slope * u - log_y) ** 2).sum() / left)
        spread = math.sqrt(draws.var(axis=0).mean()) or 1e-300
        lines = lines.mean(axis=0) + (lines - lines.mean(axis=0)) * max(1.0, scatter / spread)
    low, high = interval(lines[:, 1], freedom)
    return Power(math.exp(intercept), float(slope), (float(low), float(high)), lines)
