"""IsoFLOP profiles: of each budget, the size whose loss is lowest (Hoffmann et al., arXiv:2203.15556, approach 2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vidgen.scaling import parabola, powers, table
from vidgen.scaling.parabola import Minimum, Power
from vidgen.scaling.powers import Powers, interval
from vidgen.scaling.table import Run

DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class Profile:
    """The runs of a budget and the parabola of log loss over log parameters.

    Attributes:
      parameters, tokens, loss: at the minimum; `intervals`: of each, 95 %, by name, or None where no runs are left over
        to tell the noise. Where `minimum.edge` is set, the true minimum lies outside and these are the nearest end.
    """

    budget: float
    runs: tuple[Run, ...]
    minimum: Minimum
    parameters: float
    tokens: float
    loss: float
    intervals: dict[str, tuple[float, float]] | None

    @property
    def edge(self) -> str:
        """Where the minimum is not inside, in words; else ""."""
        return parabola.EDGES[self.minimum.edge]

    def facts(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "runs": [r.name for r in self.runs],
            "parameters": self.parameters,
            "tokens": self.tokens,
            "loss": self.loss,
            "intervals": self.intervals,
            "edge": self.edge,
        }


@dataclasses.dataclass(frozen=True)
class Profiles:
    """All profiles and what they give together, None where there are too few of them.

    Attributes:
      parameters, tokens: N_opt ∝ C^a and D_opt ∝ C^b, of the profiles whose minimum is inside.
      loss: L_opt = E' + K/C^γ, of four profiles or more.
    """

    profiles: tuple[Profile, ...]
    parameters: Power | None
    tokens: Power | None
    loss: Powers | None

    def facts(self) -> dict[str, Any]:
        loss = None
        if self.loss is not None:
            (low, high), (e, k, gamma) = self.loss.interval(self.loss.draws), self.loss.values
            loss = {"E": e, "K": k, "gamma": gamma}
            loss["intervals"] = {n: (low[i], high[i]) for i, n in enumerate(("E", "K", "gamma"))}
        return {
            "profiles": [p.facts() for p in self.profiles],
            "parameters": self.parameters and self.parameters.facts(),
            "tokens": self.tokens and self.tokens.facts(),
            "loss": loss,
        }


def fit(runs: Sequence[Run], seed: int = 0) -> Profiles:
    """Profiles of all budgets that have runs of three sizes or more; the noise is taken to be one for all."""
    groups = table.by_budget(runs)
    found = {}
    for budget, some in groups.items():
        n = np.log([r.parameters for r in some])
        if (minimum := parabola.fit(n, np.log([r.loss for r in some]))) is not None:
            # Along a budget, tokens fall as parameters grow; by how much says the cost of a token.
            line = np.polyfit(n, np.log([r.tokens for r in some]), 1)
            found[budget] = minimum, line
    noise, freedom = parabola.noise([m for m, _ in found.values()])
    rng = np.random.default_rng(seed)
    profiles, inside = [], []
    for budget, (minimum, line) in found.items():
        intervals, x, log_tokens, between = None, None, None, None
        if noise is not None:
            x, y = minimum.draws(noise, DRAWS, rng)
            log_tokens = np.polyval(line, x)
            low, high = interval(np.stack([x, log_tokens, y], axis=1), freedom)
            names = ("parameters", "tokens", "loss")
            intervals = {name: (math.exp(low[i]), math.exp(high[i])) for i, name in enumerate(names)}
            between = float(low[0]), float(high[0])
        minimum = minimum.bracketed(between)
        profiles.append(
            Profile(
                budget,
                tuple(groups[budget]),
                minimum,
                math.exp(minimum.x),
                math.exp(np.polyval(line, minimum.x)),
                math.exp(minimum.y),
                intervals,
            )
        )
        if not minimum.edge:
            inside.append((profiles[-1], x, log_tokens))
    budgets = np.array([p.budget for p, *_ in inside])

    def law(values: list[float], which: int) -> Power | None:
        draws = None if noise is None or not inside else np.stack([row[which] for row in inside], axis=1)
        return parabola.power(budgets, np.log(values), draws, freedom)

    loss = None
    if len(inside) >= 4:
        loss = powers.fit(budgets[None], np.array([p.loss for p, *_ in inside]), seed=seed)
    return Profiles(
        tuple(profiles),
        law([p.parameters for p, *_ in inside], 1),
        law([p.tokens for p, *_ in inside], 2),
        loss,
    )
