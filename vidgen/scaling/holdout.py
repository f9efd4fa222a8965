"""The law put to the test: fitted without the largest budget, it predicts those runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vidgen.config import ConfigError
from vidgen.scaling import laws, table
from vidgen.scaling.laws import Law
from vidgen.scaling.table import Run

SHARE = 0.2  # of the runs, those with the most FLOPs, that are predicted where there are no budgets


@dataclasses.dataclass(frozen=True)
class Holdout:
    """A prediction of runs that the law did not see.

    Attributes:
      law: of the other runs.
      runs: that are predicted, the smallest first.
      baseline: the best loss of the budget before, which one would have repeated without a law.
      budget: of the runs, or None where there are none: then they are those with the most FLOPs.
    """

    law: Law
    runs: tuple[Run, ...]
    baseline: float
    budget: float | None

    def predicted(self) -> np.ndarray:
        """[M] losses."""
        return self.law.loss(np.array([r.parameters for r in self.runs]), np.array([r.tokens for r in self.runs]))

    def facts(self) -> dict[str, Any]:
        """Errors are relative to what was measured; `error` and `baseline_error` are means over the runs."""
        measured, predicted = np.array([r.loss for r in self.runs]), self.predicted()
        n, d = ([getattr(r, name) for r in self.runs] for name in ("parameters", "tokens"))
        low, high = self.law.between(np.array(n), np.array(d))
        errors, baseline = np.abs(predicted / measured - 1), np.abs(self.baseline / measured - 1)
        best = int(measured.argmin())
        return {
            "budget": self.budget,
            "names": [r.name for r in self.runs],
            "parameters": n,
            "predicted": predicted.tolist(),
            "intervals": np.stack([low, high], axis=1).tolist(),
            "measured": measured.tolist(),
            "errors": errors.tolist(),
            "error": float(errors.mean()),
            "max_error": float(errors.max()),
            "best_error": float(errors[best]),
            "baseline": self.baseline,
            "baseline_errors": baseline.tolist(),
            "baseline_error": float(baseline.mean()),
            "baseline_best_error": float(baseline[best]),
            "ratio": float(errors.mean() / baseline.mean()) if baseline.mean() else None,
            "fitted_on": len(self.law.runs),
        }


def predict(runs: Sequence[Run], seed: int = 0) -> Holdout | str:
    """Holds out the largest budget (without budgets, the fifth of the runs with the most FLOPs) and predicts it.

    Gives in words why not, where what is left is too little to fit.
    """
    budgets = table.by_budget(runs)
    largest = max(table.budget_of(runs))
    if largest in budgets or all(r.budget is not None for r in runs):
        held = {id(r) for r, b in zip(runs, table.budget_of(runs), strict=True) if b == largest}
        budget: float | None = largest
    else:
        order = sorted(runs, key=lambda r: r.flops)
        held, budget = {id(r) for r in order[-max(1, round(SHARE * len(runs))) :]}, None
    left = [r for r in runs if id(r) not in held]
    if len(left) < laws.LEAST:
        return (
            f"nothing was held out: without the largest budget {len(left)} runs are left, and a law takes {laws.LEAST}"
        )
    before = table.budget_of(left)
    previous = [r for r, b in zip(left, before, strict=True) if b == max(before)] if budget else left
    try:
        law = laws.fit(left, seed)
    except ConfigError as e:
        return f"nothing was held out: without the largest budget, {e}"
    chosen = sorted((r for r in runs if id(r) in held), key=lambda r: r.parameters)
    return Holdout(law, tuple(chosen), min(r.loss for r in previous), budget)
