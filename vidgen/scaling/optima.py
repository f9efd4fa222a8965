"""The best learning rate and batch of each size and budget, as power laws, and whether they transfer over widths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vidgen.scaling import parabola, table
from vidgen.scaling.parabola import Minimum, Power
from vidgen.scaling.powers import interval
from vidgen.scaling.table import Run

DRAWS = 1000
SETTINGS = {"learning_rate": "learning rate", "batch": "batch"}


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best value of a setting at one size and budget; `interval`: 95 %, or None where nothing tells the noise."""

    parameters: float
    budget: float
    width: float | None
    value: float
    loss: float
    interval: tuple[float, float] | None
    minimum: Minimum
    runs: tuple[Run, ...]

    @property
    def edge(self) -> str:
        """Where the minimum is not inside what was tried, in words; else ""."""
        return parabola.EDGES[self.minimum.edge]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Whether the optimum stays as widths grow (μP: Yang et al., arXiv:2203.03466).

    Attributes:
      step: factor between neighbouring values that were tried.
      moved: factor by which the optimum moves from the narrowest width to the widest, by the line through them.
      slope: exponent of the optimum over width, with its interval.
      verdict: in words.
    """

    widths: tuple[float, ...]
    step: float
    moved: float
    slope: Power
    transfers: bool
    verdict: str


@dataclasses.dataclass(frozen=True)
class Optima:
    """Of one setting. Power laws are over the optima inside their spans; None with fewer than two different x."""

    setting: str
    optima: tuple[Optimum, ...]
    over_parameters: Power | None
    over_flops: Power | None
    transfer: Transfer | None

    def facts(self) -> dict[str, Any]:
        return {
            "optima": [
                {
                    "parameters": o.parameters,
                    "budget": o.budget,
                    "width": o.width,
                    "value": o.value,
                    "interval": o.interval,
                    "edge": o.edge,
                }
                for o in self.optima
            ],
            "over_parameters": self.over_parameters and self.over_parameters.facts(),
            "over_flops": self.over_flops and self.over_flops.facts(),
            "transfer": self.transfer
            and {
                "widths": self.transfer.widths,
                "moved": self.transfer.moved,
                "grid_step": self.transfer.step,
                "slope": self.transfer.slope.facts(),
                "transfers": self.transfer.transfers,
                "verdict": self.transfer.verdict,
            },
        }


def fit(runs: Sequence[Run], setting: str, seed: int = 0) -> Optima | None:
    """The optima of "learning_rate" or "batch"; None where no size and budget has three values of it.

    Runs of a group differ in `setting` alone: where both were varied, the other is held at what is best.
    """
    other = next(s for s in SETTINGS if s != setting)
    groups: dict[tuple[float, float], list[Run]] = {}
    for run, budget in zip(runs, table.budget_of(runs), strict=True):
        if getattr(run, setting) is not None:
            groups.setdefault((run.parameters, budget), []).append(run)
    found: list[tuple[tuple[float, float], list[Run], Minimum]] = []
    for key, some in sorted(groups.items()):
        beside = getattr(min(some, key=lambda r: r.loss), other)
        alike = [r for r in some if setting == "batch" or getattr(r, other) == beside]
        if setting == "batch":  # of each batch the best learning rate, which depends on it
            alike = [min((r for r in some if r.batch == b), key=lambda r: r.loss) for b in {r.batch for r in some}]
        x, y = np.log([getattr(r, setting) for r in alike]), np.log([r.loss for r in alike])
        if (minimum := parabola.fit(x, y)) is not None:
            found.append((key, sorted(alike, key=lambda r: getattr(r, setting)), minimum))
    if not found:
        return None
    noise, freedom = parabola.noise([m for *_, m in found])
    rng = np.random.default_rng(seed)
    optima, draws = [], []
    for (parameters, budget), some, minimum in found:
        between = None
        if noise is not None:
            draws.append(minimum.draws(noise, DRAWS, rng)[0])
            low, high = interval(draws[-1], freedom)
            between = float(low), float(high)
        minimum = minimum.bracketed(between)
        optima.append(
            Optimum(parameters, budget, some[0].width, math.exp(minimum.x), math.exp(minimum.y),
                    between and (math.exp(low), math.exp(high)), minimum, tuple(some))
        )  # fmt: skip

    def law(x: Callable[[Optimum], float], which: Sequence[int] | None = None) -> Power | None:
        inside = [i for i, o in enumerate(optima) if not o.minimum.edge and (which is None or i in which)]
        ys = np.log([optima[i].value for i in inside])
        own = np.stack([draws[i] for i in inside], axis=1) if draws and inside else None
        return parabola.power(np.array([x(optima[i]) for i in inside]), ys, own, freedom)

    transfer = _transfer(optima, law) if setting == "learning_rate" else None
    return Optima(setting, tuple(optima), law(lambda o: o.parameters), law(lambda o: o.budget), transfer)


def _transfer(optima: Sequence[Optimum], law: Callable[..., Power | None]) -> Transfer | None:
    """Over the optima inside their spans; None where runs have no width, or one alone."""
    inside = [i for i, o in enumerate(optima) if o.width is not None and not o.minimum.edge]
    widths = sorted({optima[i].width for i in inside})
    if len(widths) < 2:
        return None
    slope = law(lambda o: o.width, inside)
    steps = [b.learning_rate / a.learning_rate for i in inside for a, b in _neighbours(optima[i].runs)]
    step = float(np.exp(np.median(np.log(steps))))
    span = widths[-1] / widths[0]
    moved = span**slope.exponent
    transfers = 1 / step <= moved <= step
    words = f"From width {widths[0]:g} to {widths[-1]:g} the best learning rate moves by a factor of {moved:.2f}"
    if slope.interval:
        low, high = sorted(span**s for s in slope.interval)
        words += f" ({low:.2f} to {high:.2f})"
        surely = 1 / step <= low and high <= step
    else:
        surely = transfers
    if transfers:
        words += f", less than a step of the grid ({step:.3g}): it transfers" + (
            "." if surely else ", though the interval is wider than that: add runs near the optima to be sure."
        )
    else:
        words += (
            f", more than a step of the grid ({step:.3g}): it doesn't transfer; scale it as width^{slope.exponent:.2f}."
        )
    return Transfer(tuple(widths), step, moved, slope, transfers, words)


def _neighbours(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Neighbouring runs, of ascending learning rates, whose rates differ."""
    return [(a, b) for a, b in zip(runs, runs[1:], strict=False) if b.learning_rate > a.learning_rate]
