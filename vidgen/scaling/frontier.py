"""What to train with so many FLOPs: size, tokens and loss on the law's frontier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vidgen.scaling import powers
from vidgen.scaling.laws import Law
from vidgen.scaling.table import Run

LAST = 25  # power of ten of the table's last row
FAR = 100.0  # times the largest run's FLOPs, beyond which a row is marked


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of a token: factor · N^exponent, as the runs had it, and not below least · N.

    `exponent` is below 1 where attention is counted in, whose share falls as models widen; 6ND has factor 6 and
    exponent 1. Far from the runs that would sink below 6 FLOPs a parameter, which is what matrix products take, so
    `least` is 6, or less where runs of the table had less, since their parameters aren't all multiplied with.
    """

    factor: float
    exponent: float
    least: float

    def token(self, parameters: np.ndarray | float) -> np.ndarray:
        """FLOPs of a token at so many parameters."""
        n = np.asarray(parameters, float)
        return np.maximum(self.factor * n**self.exponent, self.least * n)

    def over_6nd(self, parameters: np.ndarray | float) -> np.ndarray:
        """FLOPs over 6ND at so many parameters."""
        return self.token(parameters) / (6 * np.asarray(parameters, float))


@dataclasses.dataclass(frozen=True)
class Optimal:
    """A row of the table; `intervals`: 95 %, by name. `times_beyond`: FLOPs over those of the largest run."""

    flops: float
    parameters: float
    tokens: float
    loss: float
    intervals: dict[str, tuple[float, float]]
    times_beyond: float

    @property
    def far(self) -> bool:
        """Whether this is far outside of what was measured."""
        return self.times_beyond > FAR

    @property
    def over_6nd(self) -> float:
        """FLOPs over 6ND."""
        return self.flops / (6 * self.parameters * self.tokens)

    def facts(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"extrapolated": self.far, "flops_over_6nd": self.over_6nd}


def cost(runs: Sequence[Run]) -> Cost:
    """By least squares of log(C/D) over log N; proportional to N where sizes span less than a factor of 3.

    An exponent above 1, which comes of parameters that are not multiplied with, is not carried on beyond the runs: it
    is taken to be 1.
    """
    n, a_token = np.log([r.parameters for r in runs]), np.log([r.flops / r.tokens for r in runs])
    least = float(min(6.0, np.exp(a_token - n).min()))
    exponent, factor = np.polyfit(n, a_token, 1) if np.ptp(n) > math.log(3) else (1.0, 0.0)
    if exponent > 1 - 1e-6:  # nearer, and the bend lies beyond all numbers
        return Cost(float(np.exp((a_token - n).mean())), 1.0, least)
    return Cost(float(np.exp(factor)), float(exponent), least)


def over_6nd(runs: Sequence[Run]) -> np.ndarray:
    """[M]: FLOPs of each run over 6ND."""
    return np.array([r.flops / (6 * r.parameters * r.tokens) for r in runs])


def size(values: np.ndarray, flops: np.ndarray | float, c: Cost) -> np.ndarray:
    """Parameters that make the loss least, of laws [...,5] at FLOPs [...]: where dL/dN = 0 along D = C / token(N).

    Of a law without one of its terms, the end: a single parameter, or a single token.
    """

    def along(factor: float, exponent: float) -> np.ndarray:
        _, a, b, alpha, beta = np.moveaxis(values, -1, 0)
        budget = np.log(flops) - math.log(factor)
        with np.errstate(divide="ignore", invalid="ignore"):
            log = np.log(alpha * a) - np.log(beta * exponent * b) + beta * budget
        log = np.where(np.isnan(log), 0, log)  # neither term is there: all sizes are alike
        return np.exp(np.clip(log / (alpha + exponent * beta), 0, np.maximum(budget / exponent, 0)))

    n = along(c.factor, c.exponent)
    if c.exponent == 1:
        return n
    # Beyond the bend, where a token costs least · N; the minimum may lie at the bend itself.
    bend = (c.factor / c.least) ** (1 / (1 - c.exponent))
    return np.where(n <= bend, n, np.maximum(along(c.least, 1.0), bend))


def optimal(law: Law, c: Cost, flops: float) -> Optimal:
    """What the law says to do with so many FLOPs."""

    def solve(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n = size(values, flops, c)
        d = flops / c.token(n)
        e, a, b, alpha, beta = np.moveaxis(values, -1, 0)
        return n, d, e + a * n**-alpha + b * d**-beta

    n, d, loss = solve(law.powers.values)
    low, high = powers.interval(np.stack(solve(law.powers.draws), axis=1), law.powers.freedom)
    intervals = {name: (float(low[i]), float(high[i])) for i, name in enumerate(("parameters", "tokens", "loss"))}
    largest = max(r.flops for r in law.runs)
    return Optimal(float(flops), float(n), float(d), float(loss), intervals, float(flops / largest))


def decades(law: Law) -> list[float]:
    """Powers of ten from the runs' least FLOPs to 10^25; none where the law has lost a term, see `Law`."""
    if law.absent:
        return []
    first = math.ceil(math.log10(min(r.flops for r in law.runs)) - 1e-9)
    return [float(f"1e{p}") for p in range(min(first, LAST), LAST + 1)]


def table(law: Law, c: Cost) -> list[Optimal]:
    """A row for each of `decades`."""
    return [optimal(law, c, flops) for flops in decades(law)]
