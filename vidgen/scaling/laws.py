"""The law L(N, D) = E + A/N^α + B/D^β of parameters and tokens (Hoffmann et al., arXiv:2203.15556, approach 3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vidgen.config import ConfigError
from vidgen.scaling import powers, table
from vidgen.scaling.powers import EXPONENTS, TINY, Powers
from vidgen.scaling.table import Run

NAMES = ("E", "A", "B", "alpha", "beta")
LEAST = len(NAMES) + 1  # runs
FEW, DECADES = 8, 1.0  # runs, and powers of ten of FLOPs, below which a fit says little
LINE = 0.985  # correlation of log N and log D from which on they are one number
LEFT_OUT = 0.01  # share of a run's updates that were skipped, above which it is told
UNITS = 100.0  # times 6ND, or 6ND so many times: beyond, FLOPs aren't in the units of the other columns
OUTLIER, NOISY = 5.0, 0.03  # spreads of a residual; spread of log loss
WIDE = 1.0  # width of an exponent's interval over its value; of E's over the lowest loss, see `_wide`


@dataclasses.dataclass(frozen=True)
class Law:
    """A fitted law; `powers` has its five numbers in the order of NAMES."""

    runs: tuple[Run, ...]
    powers: Powers

    @property
    def absent(self) -> list[str]:
        """Which of A and B came out as 0: such a law has no best size, since either N or D costs it nothing."""
        return [name for name, value in zip(NAMES, self.powers.values, strict=True) if name in "AB" and not value]

    def loss(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Predicted, [...] as the arguments."""
        return self.powers.predict(parameters, tokens)

    def between(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """95 % interval of the predicted loss, without the noise of a run."""
        return self.powers.interval(powers.evaluate(self.powers.draws, parameters, tokens))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 %, by name."""
        low, high = self.powers.interval(self.powers.draws)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(NAMES)}

    def facts(self) -> dict[str, Any]:
        values = {name: float(v) for name, v in zip(NAMES, self.powers.values, strict=True)}
        return values | {"intervals": self.intervals, "residual_spread": self.powers.spread}


def fit(runs: Sequence[Run], seed: int = 0, draws: int = 400) -> Law:
    """Fits the law; see `powers.fit`. Raises ConfigError with too few runs, or runs of one size or length only."""
    n, d, y = (np.array([getattr(r, name) for r in runs]) for name in ("parameters", "tokens", "loss"))
    if len(runs) < LEAST:
        raise ConfigError(
            f"{len(runs)} runs can be fitted: a law of {len(NAMES)} numbers takes {LEAST} at least, {FEW} to be of use"
        )
    for name, values in (("parameters", n), ("tokens", d)):
        if np.ptp(np.log(values)) < 1e-6:
            raise ConfigError(f"all runs have {values[0]:g} {name}: the law wants several; add runs with others")
    return Law(tuple(runs), powers.fit(np.stack([n, d]), y, draws=draws, seed=seed))


def warnings(law: Law) -> list[str]:
    """What makes the fit doubtful, and what to add, a sentence each."""
    runs, p = law.runs, law.powers
    n, d, c = (np.log10([getattr(r, name) for r in runs]) for name in ("parameters", "tokens", "flops"))
    found = []
    if len(runs) < FEW:
        found.append(
            f"only {len(runs)} runs for a law of {len(NAMES)} numbers: add some, {FEW} at least and better 20, of "
            "other sizes and lengths"
        )
    if (decades := np.ptp(c)) < DECADES:
        found.append(
            f"the runs span a factor of {10**decades:.3g} in FLOPs: add smaller and larger budgets, ten times "
            "apart or more"
        )
    line = np.corrcoef(n, d)[0, 1] if min(np.ptp(n), np.ptp(d)) > 0.05 else 0.0
    if abs(line) > LINE:
        more = (
            "larger and shorter ones, and smaller and longer ones, at the same FLOPs" if line > 0 else "other budgets"
        )
        found.append(
            "tokens follow parameters along one line, so that what each does to the loss can't be told apart: add "
            f"{more}"
        )
    for name, values, more in (("parameters", n, "sizes"), ("tokens", d, "lengths")):
        if (ratio := 10 ** np.ptp(values)) < 3:
            found.append(f"{name} span a factor of {ratio:.3g} only: add runs of other {more}")
    if len(table.by_budget(runs)) < 2:
        found.append(
            "fewer than two budgets have runs of three sizes: add sizes at equal FLOPs, so that profiles with a "
            "minimum show what the law should reproduce"
        )
    found += _wide(law) + _amiss(runs) + _skipped(runs)
    residuals = np.abs(p.residuals)
    far = max(OUTLIER * p.spread, 1e-4)  # losses are written down with some five digits
    names = [f"{r.name} ({math.expm1(e):+.1%})" for r, e in zip(runs, p.residuals, strict=True) if abs(e) > far]
    if names:
        found.append(f"far off the law, and so counted for less: {', '.join(names)}: look at how they trained")
    if p.spread > NOISY:
        found.append(
            f"runs scatter about the law by {p.spread:.1%}: it isn't the shape of this loss, or runs were not all "
            f"trained alike; the farthest is {runs[int(residuals.argmax())].name}"
        )
    return found


def _skipped(runs: Sequence[Run]) -> list[str]:
    """A warning of runs that were trained on less than their tokens say."""
    shares = {r.name: r.figures.get("skipped_steps", 0) / r.figures.get("steps", math.inf) for r in runs}
    many = [f"{name} ({share:.0%})" for name, share in shares.items() if share > LEFT_OUT]
    return [f"updates were skipped, so that runs learned from fewer tokens than counted: {', '.join(many)}"] * bool(
        many
    )


def _amiss(runs: Sequence[Run]) -> list[str]:
    """Warnings of a table that is probably not what it is taken for."""
    found = []
    times = float(np.median([r.flops / (6 * r.parameters * r.tokens) for r in runs]))
    if not 1 / UNITS < times < UNITS:
        found.append(
            f"flops are {times:.2g} times 6 · parameters · tokens: are the columns counts, not thousands or millions? "
            "The compute-optimal table needs counts"
        )
    copies = len(runs) - len({(r.parameters, r.tokens, r.flops, r.loss) for r in runs})
    if copies:
        found.append(
            f"{copies} {'runs repeat' if copies > 1 else 'run repeats'} another to the last digit: take copies out; "
            "intervals count each as a run of its own and come out too narrow"
        )
    return found


def _wide(law: Law) -> list[str]:
    """Warnings of numbers that the runs don't determine."""
    lowest = min(r.loss for r in law.runs)
    values, intervals, found = dict(zip(NAMES, law.powers.values, strict=True)), law.intervals, []
    wanted = {"alpha": "sizes, farther apart", "beta": "lengths of training, farther apart"}
    for term, name, what in (("A", "alpha", "parameters"), ("B", "beta", "tokens")):
        low, high = intervals[name]
        if term in law.absent:
            found.append(
                f"{term} went to 0: the runs don't show that more {what} help, so the law has no {name} and nothing to "
                f"say of the best size; add runs of more {wanted[name]}"
            )
            continue
        if intervals[term][0] == 0:
            found.append(f"{term} may be 0: the runs hardly show that more {what} help")
        if low <= EXPONENTS[0] * 1.01 or high >= EXPONENTS[1] * 0.99 or high - low > WIDE * values[name]:
            found.append(f"{name} = {values[name]:.3g} may be {low:.3g} to {high:.3g}: add runs of more {wanted[name]}")
    low, high = intervals["E"]
    if values["E"] < 10 * TINY * lowest:
        found.append("E went to 0: the runs show no floor of the loss; add larger budgets, or quote no E")
    elif low < 10 * TINY * lowest or high - low > WIDE * values["E"]:
        found.append(
            f"E = {values['E']:.3g} may be {low:.3g} to {high:.3g}: the floor lies far below the runs; add larger ones"
        )
    return found
