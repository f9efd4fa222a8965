"""All that a table of runs says: the law, its test, the profiles, the optima and what to train next."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vidgen.config import ConfigError
from vidgen.scaling import frontier, holdout, isoflop, laws, optima, table
from vidgen.scaling.frontier import Cost, Optimal
from vidgen.scaling.holdout import Holdout
from vidgen.scaling.isoflop import Profiles
from vidgen.scaling.laws import Law
from vidgen.scaling.optima import Optima
from vidgen.scaling.table import Excluded, Run, Table, Wanted


class NoLaw(ConfigError):
    """A table whose runs don't make a law."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the law says of a run before it is made; `interval`: 95 %, of the law, without the noise of a run."""

    run: Wanted
    loss: float
    interval: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Study:
    """What was found.

    Attributes:
      runs: that the law is fitted to; `all_runs`: those that a better learning rate or batch surpasses, too.
      excluded: what is not fitted.
      optima: of the settings that were varied, by name.
      predicted: the runs that are still to be made.
      held: None where it wasn't asked for, or there is too little; then `warnings` say so.
      rows: of the compute-optimal table.
    """

    runs: tuple[Run, ...]
    all_runs: tuple[Run, ...]
    excluded: tuple[Excluded, ...]
    law: Law
    profiles: Profiles
    optima: dict[str, Optima]
    predicted: tuple[Prediction, ...]
    held: Holdout | None
    cost: Cost
    rows: tuple[Optimal, ...]
    warnings: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """What --json has of it."""
        times = frontier.over_6nd(self.runs)
        return self.law.facts() | {
            "runs": len(self.runs),
            "excluded": [{"name": e.name, "reason": e.reason} for e in self.excluded],
            "predicted": [
                dataclasses.asdict(p.run) | {"loss": p.loss, "interval": list(p.interval)} for p in self.predicted
            ],
            "holdout": self.held and self.held.facts(),
            "isoflop": self.profiles.facts(),
            **{setting: found.facts() for setting, found in self.optima.items()},
            "flops_over_6nd": {"least": times.min(), "median": float(np.median(times)), "most": times.max()},
            "cost": dataclasses.asdict(self.cost),
            "optimal": [row.facts() for row in self.rows],
            "warnings": list(self.warnings),
        }


def study(found: Table, *, hold_out: bool = True, seed: int = 0) -> Study:
    """Fits everything that the runs allow. Raises NoLaw where there are too few for one."""
    best = table.best_settings(found)
    try:
        law = laws.fit(best.runs, seed)
    except ConfigError as e:
        beaten = sum(not x.lost for x in best.excluded)
        also = [f"of the others {beaten} only have a worse learning rate or batch than these"] if beaten else []
        raise NoLaw("; ".join([str(e), *also, *_lost(best)])) from None
    warnings = _lost(best) + laws.warnings(law)
    profiles = isoflop.fit(best.runs, seed)
    for p in profiles.profiles:
        if p.minimum.edge:
            sizes = {"low": "smaller sizes", "high": "larger sizes", "flat": "more sizes, farther apart"}
            warnings.append(f"budget {p.budget:.3g}: {p.edge}; add {sizes[p.minimum.edge]} there")
    tried, more = tuned(found, seed)
    warnings += more
    held = None
    if hold_out:
        made = holdout.predict(best.runs, seed)
        if isinstance(made, str):
            warnings.append(made)
        else:
            held = made
    cost = frontier.cost(best.runs)
    rows = tuple(frontier.table(law, cost))
    predicted = tuple(_prediction(law, run) for run in best.wanted)
    return Study(
        best.runs, found.runs, best.excluded, law, profiles, tried, predicted, held, cost, rows, tuple(warnings)
    )


def tuned(found: Table, seed: int = 0) -> tuple[dict[str, Optima], list[str]]:
    """(the optima of the settings that were varied, by name; warnings of them): it takes no law to know them."""
    tried = {setting: optima.fit(found.runs, setting, seed) for setting in optima.SETTINGS}
    tried = {setting: some for setting, some in tried.items() if some}
    warnings = [
        f"{optima.SETTINGS[setting]} at {o.parameters:,.0f} parameters, budget {o.budget:.3g}: {o.edge}; add values "
        "beyond it"
        for setting, some in tried.items()
        for o in some.optima
        if o.minimum.edge
    ]
    return tried, warnings


def _prediction(law: Law, run: Wanted) -> Prediction:
    low, high = law.between(run.parameters, run.tokens)
    return Prediction(run, float(law.loss(run.parameters, run.tokens)), (float(low), float(high)))


def _lost(found: Table) -> list[str]:
    """A warning that names the runs that couldn't be used."""
    lost = [f"{e.name} ({e.reason})" for e in found.excluded if e.lost]
    return (
        [f"{len(lost)} {'runs are' if len(lost) > 1 else 'run is'} not in the fit: {', '.join(lost)}"] if lost else []
    )
