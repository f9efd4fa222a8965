"""`vidgen fit`: the scaling law of a table of runs, put to the test, and what the next ten-fold buys.

    vidgen fit --runs sweeps/a/results.parquet --topology v5p:8x8x8 --price 2

Beside the table it writes `report.html`, one file with everything in it, and `law.svg`, the picture for a README.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vidgen.config import ConfigError
from vidgen.plain import plain
from vidgen.scaling import laws, table
from vidgen.scaling.study import NoLaw, Study, study, tuned
from vidgen.studio import law as pages
from vidgen.studio import media

if TYPE_CHECKING:
    from vidgen.scaling.pods import Planned

SHOWN = 6  # names in a line of the summary; the report has all


def run(
    runs: str,
    output: str = "",
    *,
    loss: Sequence[str] = ("loss",),
    holdout: bool = True,
    topology: str = "",
    family: str = "",
    price: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Fits L(N, D) = E + A/N^α + B/D^β and all that goes with it, writes the report and prints a summary.

    Args:
      runs: a CSV or Parquet file, a run a row; its columns are those of `vidgen.scaling.table.read`.
      output: directory of the report; the table's own unless given.
      loss: columns whose mean is the loss of a run.
      holdout: also fit without the largest budget, and predict it.
      topology: v5p:8x8x8: the compute-optimal table is made for it: with the FLOPs that a token costs a family's sizes,
        and days by the estimates of `vidgen plan --abstract`.
      family: config file with these sizes; configs/dit_video.py unless given.
      price: of a chip-hour, in any currency; adds costs.
      seed: of the resampling that intervals come from.

    Of runs that are too few for a law, but of several learning rates or batches, it tells what is best of these.

    Returns:
      What --json prints: E, A, B, alpha, beta, intervals, warnings, holdout, isoflop, optimal, excluded, …; intervals
      are of 95 %.

    Raises:
      ConfigError: the table can't be read or holds too few runs, flags that don't go together, a topology or family
        that isn't known, an output that can't be written.
    """
    for name, value in (("family", family), ("price", price)):
        if value not in ("", None) and not topology:
            raise ConfigError(f"--{name} has no meaning without --topology; add one, such as v5p:8x8x8")
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--price={price}: expected what a chip-hour costs, 0 or more")
    if seed < 0:
        raise ConfigError(f"--seed={seed}: expected 0 or more")
    folder, read = output or os.path.dirname(runs) or ".", table.read(runs, loss)
    files = {"report": os.path.join(folder, "report.html"), "plot": os.path.join(folder, "law.svg")}
    try:
        found = study(read, hold_out=holdout, seed=seed)
    except NoLaw as e:
        tried, warnings = tuned(read, seed)
        if not tried or topology:
            raise
        media.write(files["report"], pages.tuning_report(tried, _title(runs, loss), str(e), warnings).encode())
        warnings = [f"no law: {e}", *warnings]
        print("\n".join([*pages.tuning(tried), *(f"warning: {text}" for text in warnings), files["report"]]))
        law = dict.fromkeys((*laws.NAMES, "intervals"))
        found = {setting: some.facts() for setting, some in tried.items()}
        return plain(law | found | {"warnings": warnings, "report": files["report"], "plot": None})
    plans = []
    if topology:
        from vidgen.scaling import pods  # imports JAX

        plans = pods.table(found.law, topology, family, price)
        found = dataclasses.replace(found, rows=tuple(plan.optimal for plan in plans))
    media.write(files["report"], pages.report(found, _title(runs, loss), topology, plans).encode())
    media.write(files["plot"], pages.picture(found).encode())
    print(summary(found, topology, plans))
    for path in files.values():
        print(path)
    facts = found.facts()
    if plans:
        facts["optimal"] = [row | plan.facts() for row, plan in zip(facts["optimal"], plans, strict=True)]
    return plain(facts | files | {"topology": topology or None})


def _title(runs: str, loss: Sequence[str]) -> str:
    """Of the report."""
    return os.path.basename(runs) + ("" if tuple(loss) == ("loss",) else f", the mean of {', '.join(loss)}")


def summary(found: Study, topology: str, plans: Sequence[Planned]) -> str:
    """What the terminal shows."""
    law, p = found.law, found.law.powers
    lines = [f"{pages.equation(law)}   ({len(found.runs)} runs, which scatter about it by {p.spread:.2%})"]
    for name, value in zip(laws.NAMES, p.values, strict=True):
        low, high = law.intervals[name]
        lines.append(f"  {name:<6} {value:<9.4g} 95 %: {low:.4g} to {high:.4g}")
    lines += [f"  {text}" for text in pages.findings(found)]
    for one in found.predicted:
        low, high = one.interval
        lines.append(
            f"  To be made: {one.run.name}, for which the law predicts {one.loss:.4g} ({low:.4g} to {high:.4g})."
        )
    if beaten := [run.name for run in found.excluded if not run.lost]:
        shown = ", ".join(beaten[:SHOWN]) + (f" and {len(beaten) - SHOWN} more" * (len(beaten) > SHOWN))
        lines.append(f"  Left out: {len(beaten)} runs that others with a better learning rate or batch beat: {shown}.")
    head, rows = pages.optimal_rows(found, topology, plans)
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    if rows:
        lines += ["", "compute-optimal, by the law (* more than 100 times beyond the largest run):"]
        lines += ["  " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        lines.append(f"  {pages.token_price(found, plans)}")
    lines += [f"warning: {warning}" for warning in found.warnings]
    return "\n".join(lines)
