"""The report of a scaling law: the plots that papers show, and the figures behind them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vidgen.scaling import frontier, optima, table
from vidgen.scaling.laws import NAMES, Law
from vidgen.scaling.optima import Optima
from vidgen.scaling.study import Study
from vidgen.scaling.table import Run
from vidgen.studio import page, panels
from vidgen.studio.panels import Line, Panel, Points
from vidgen.training.metrics import si

if TYPE_CHECKING:
    from vidgen.scaling.pods import Planned

SHARES = ("all_right", "accuracy")  # how columns of judged shares end
GREEK = {"alpha": "α", "beta": "β"}


def report(found: Study, name: str, topology: str = "", plans: Sequence[Planned] = ()) -> str:
    """A whole HTML page.

    Args:
      name: of the table.
      topology, plans: what `pods.table` gives for each row of the compute-optimal table, or nothing.
    """
    parts = [
        panels.PAGE_STYLE,
        f'<p class="eyebrow">Scaling law</p>\n<h1>{page.escape(name)}</h1>',
        f'<p class="verdict">{page.escape(equation(found.law))}</p>',
        page.tiles(_tiles(found)),
        _warnings(found),
        page.section("The law", _note(findings(found)), page.card(picture(found, alone=False)), _values(found.law)),
        _holdout(found),
        _predicted(found),
        _profiles(found),
        *[_optima(some) for some in found.optima.values()],
        _optimal(found, topology, plans),
        _cost(found),
        _residuals(found),
        _runs(found),
        "<footer>Made by vidgen fit.</footer>",
    ]
    return page.page(f"{name} · vidgen", [p for p in parts if p])


def picture(found: Study, alone: bool = True) -> str:
    """The law in one picture: profiles, loss against compute and, if judged, what is right against compute."""
    shown = [_profile_panel(found), _compute_panel(found), _accuracy_panel(found)]
    return panels.draw([p for p in shown if p is not None], alone)


def equation(law: Law) -> str:
    e, a, b, alpha, beta = law.powers.values
    return f"L(N, D) = {e:.4g} + {a:.4g} / N^{alpha:.3f} + {b:.4g} / D^{beta:.3f}"


def findings(found: Study) -> list[str]:
    """What was found, a sentence each."""
    lines = []
    if found.held:
        f = found.held.facts()
        what = f"of the budget {f['budget']:.3g}" if f["budget"] else "with the most FLOPs"
        these = f"the {len(f['names'])} runs {what}" if len(f["names"]) > 1 else f"the one run {what}"
        lines.append(
            f"Held out: fitted on {f['fitted_on']} runs, the law predicts {these} within {f['error']:.2%} on average, "
            f"{f['max_error']:.2%} at most; repeating the best loss before them is {f['baseline_error']:.2%} off."
        )
    profiles = found.profiles
    for what, law in (("N", profiles.parameters), ("D", profiles.tokens)):
        if law:
            between = f" ({law.interval[0]:.2f} to {law.interval[1]:.2f})" if law.interval else ""
            lines.append(f"Profiles: the optimal {what} grows as C^{law.exponent:.3f}{between}.")
    if profiles.loss is not None:
        e, k, gamma = profiles.loss.values
        lines.append(f"Their lowest losses follow {e:.4g} + {k:.4g} / C^{gamma:.3f}.")
    lines += tuning(found.optima)
    times = frontier.over_6nd(found.runs)
    lines.append(f"FLOPs of the runs as counted are {_factor(times.min())} to {_factor(times.max())} times 6ND.")
    return lines


def tuning(tried: Mapping[str, Optima]) -> list[str]:
    """What was found of learning rates and batches, a sentence each."""
    lines = []
    for setting, some in tried.items():
        what = optima.SETTINGS[setting]
        for o in some.optima:
            between = f" ({o.interval[0]:.3g} to {o.interval[1]:.3g})" if o.interval else ""
            lines.append(
                f"The best {what} at {si(o.parameters)} parameters, {o.budget:.3g} FLOPs: {o.value:.3g}{between}."
            )
        if law := some.over_parameters or some.over_flops:
            of = "N" if some.over_parameters else "C"
            between = f" ({law.interval[0]:.2f} to {law.interval[1]:.2f})" if law.interval else ""
            lines.append(f"The best {what} goes as {of}^{law.exponent:.3f}{between}.")
        if some.transfer:
            lines.append(some.transfer.verdict)
    return lines


def tuning_report(tried: Mapping[str, Optima], name: str, why: str, warnings: Sequence[str]) -> str:
    """A whole HTML page on the settings of runs that make no law, and `why` they don't."""
    parts = [
        panels.PAGE_STYLE,
        f'<p class="eyebrow">Settings</p>\n<h1>{page.escape(name)}</h1>',
        page.section("What to be wary of", *[page.missing(text) for text in (f"No law: {why}", *warnings)]),
        *[_optima(some) for some in tried.values()],
        "<footer>Made by vidgen fit.</footer>",
    ]
    return page.page(f"{name} · vidgen", parts)


def token_price(found: Study, plans: Sequence[Planned] = ()) -> str:
    """What the compute-optimal table takes a token to cost."""
    if plans:
        return "A token costs the FLOPs that it costs the size named last, attention over that size's clips counted."
    cost = found.cost
    return (
        f"A token costs what it cost the runs, {cost.factor:.3g} · N^{cost.exponent:.3f} FLOPs, and {cost.least:.3g}N "
        "where that is more; longer clips cost more, see --topology."
    )


def _factor(value: float) -> str:
    return f"{value:.2f}" if 0.1 <= value < 100 else f"{value:.2g}"


def optimal_rows(found: Study, topology: str = "", plans: Sequence[Planned] = ()) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the compute-optimal table; rows far beyond the runs have a *."""
    head = ["FLOPs", "N", "95 %", "D", "95 %", "loss", "95 %", "C/6ND"]
    priced = any(plan.cost is not None for plan in plans)
    head += ([f"days on {topology}", "MFU"] + ["cost"] * priced + ["estimated as"]) if plans else []
    rows = []
    for i, row in enumerate(found.rows):
        cells = [f"{row.flops:.0e}".replace("e+", "e") + "\u00a0*" * row.far]
        for name, show in (("parameters", si), ("tokens", si), ("loss", "{:.4g}".format)):
            low, high = row.intervals[name]
            cells += [show(getattr(row, name)), f"{show(low)} to {show(high)}"]
        cells.append(_factor(row.over_6nd))
        if plans:
            plan = plans[i]
            cells += [
                "–" if plan.days is None else f"{plan.days:.3g}" if plan.days >= 0.01 else "<0.01",
                f"{plan.mfu:.0%}" if plan.mfu else "–",
            ]
            cells += [si(plan.cost) if plan.cost is not None else "–"] * priced
            cells.append(plan.preset + (f" ({plan.note})" if plan.note else ""))
        rows.append(cells)
    return head, rows


# Panels.


def _budgets(found: Study) -> dict[float, tuple[str, list[Run]]]:
    """Budget → (its colour, its runs), the smallest first; of budgets with profiles."""
    groups = table.by_budget(found.runs)
    return {b: (colour, groups[b]) for colour, b in zip(panels.ramp(max(len(groups), 1)), groups, strict=False)}


def _title(run: Run) -> str:
    size, tokens = si(run.parameters), si(run.tokens)
    return f"{run.name}: loss {run.loss:.4g}, {size} parameters, {tokens} tokens, {run.flops:.3g} FLOPs"


def _profile_panel(found: Study) -> Panel | None:
    """Loss over parameters, a parabola a budget."""
    colours = _budgets(found)
    marks: list[Points | Line] = []
    for p in found.profiles.profiles:
        colour, runs = colours[p.budget]
        x = np.linspace(*p.minimum.span, 40)
        marks.append(Line(np.exp(x), np.exp(p.minimum.value(x)), colour, label=panels.power(p.budget)))
        marks.append(_dots(runs, "parameters", colour))
        if not p.minimum.edge:
            title = f"{panels.power(p.budget)} FLOPs: {si(p.parameters)} parameters are best"
            marks.append(Points([p.parameters], [p.loss], colour, [title], 6, hollow=True))
    return Panel("IsoFLOP profiles, minima ringed", "parameters", "loss", marks) if marks else None


def _dots(runs: Sequence[Run], x: str, colour: str, faint: bool = False) -> Points:
    titles = [_title(r) for r in runs]
    return Points([getattr(r, x) for r in runs], [r.loss for r in runs], colour, titles, faint=faint)


def _compute_panel(found: Study) -> Panel:
    """Loss over FLOPs: runs, the law's frontier and, where runs were held out, what it said of them beforehand."""
    law, held = (found.held.law if found.held else found.law), found.held
    seen = [r.flops for r in law.runs]
    most = max(r.flops for r in found.runs)
    marks: list[Points | Line] = []
    colours = _budgets(found)
    coloured = {id(r): colour for colour, runs in colours.values() for r in runs}
    for run in found.runs:
        marks.append(_dots([run], "flops", coloured.get(id(run), panels.RAMP[1]), faint=True))
    cost = frontier.cost(law.runs)
    stretches = [(min(seen), max(seen), False)] + ([(max(seen), 2 * most, True)] if held else [])
    for first, last, dashed in stretches:
        c = np.geomspace(first, last, 24)
        rows = [frontier.optimal(law, cost, flops) for flops in c]
        low, high = ([row.intervals["loss"][i] for row in rows] for i in (0, 1))
        marks.append(Line(c, [row.loss for row in rows], "", dashed, low, high))
    key = [("", "the law's best")]
    if held:
        predicted = held.predicted()
        best = min(held.runs, key=lambda r: r.loss)
        said = float(predicted[held.runs.index(best)])
        marks.append(Points([best.flops], [best.loss], panels.RAMP[6], [_title(best)], 5))
        title = f"{best.name}: predicted {said:.4g}, measured {best.loss:.4g}"
        marks.append(Points([best.flops], [said], "", [title], 8, hollow=True))
        key = [("", "predicted without the largest budget"), (panels.RAMP[6], "measured")]
    title = "Loss against compute, the largest predicted" if held else "Loss against compute"
    return Panel(title, "training FLOPs", "loss", marks, show_x=panels.power, key=key)


def judged(found: Study) -> str:
    """The column of what was judged right, a share of 0 to 1; "" without one."""
    names = dict.fromkeys(c for r in found.all_runs for c in r.figures if c.rpartition(".")[2] in SHARES)
    return next((c for c in names if all(0 <= r.figures.get(c, 0) <= 1 for r in found.all_runs)), "")


def _accuracy_panel(found: Study) -> Panel | None:
    """What was judged right over FLOPs, and the run of the lowest loss of each budget."""
    column = judged(found)
    runs = [r for r in found.runs if column in r.figures]
    if not column or not runs:
        return None
    colours = _budgets(found)
    coloured = {id(r): colour for colour, some in colours.values() for r in some}
    marks: list[Points | Line] = [
        Points([r.flops], [r.figures[column]], coloured.get(id(r), panels.RAMP[1]),
               [f"{r.name}: {r.figures[column]:.1%}"], faint=True)
        for r in runs
    ]  # fmt: skip
    best = [
        min((r for r in some if column in r.figures), key=lambda r: r.loss, default=None)
        for _, some in colours.values()
    ]
    best = [r for r in best if r is not None]
    if len(best) > 1:
        marks.append(Line([r.flops for r in best], [r.figures[column] for r in best]))
    key = [("", "lowest loss of a budget")] if len(best) > 1 else []
    return Panel(f"{column} against compute", "training FLOPs", "share", marks, show_x=panels.power,
                 show_y="{:.0%}".format, share=True, key=key)  # fmt: skip


# Sections.


def _tiles(found: Study) -> dict[str, str]:
    law, p = found.law, found.law.powers
    shown = {}
    for name, value in zip(NAMES, p.values, strict=True):
        if name in ("E", "alpha", "beta"):
            low, high = law.intervals[name]
            shown[f"{GREEK.get(name, name)}  ({low:.3g} to {high:.3g})"] = f"{value:.3g}"
    shown["runs fitted"] = f"{len(found.runs)}"
    shown["scatter about the law"] = f"{p.spread:.2%}"
    if found.held:
        facts = found.held.facts()
        shown["error on the held out"] = f"{facts['error']:.2%}"
        shown["of repeating the last best"] = f"{facts['baseline_error']:.2%}"
    return shown


def _note(lines: Sequence[str]) -> str:
    return "".join(f"<p>{page.escape(line)}</p>" for line in lines)


def _warnings(found: Study) -> str:
    if not found.warnings:
        return ""
    return page.section("What to be wary of", *[page.missing(w) for w in found.warnings])


def _values(law: Law) -> str:
    rows = [[GREEK.get(n, n), float(v), *law.intervals[n]] for n, v in zip(NAMES, law.powers.values, strict=True)]
    delta = law.powers.delta
    how = (
        f"Huber's loss of log residuals, threshold {delta:.3g}: 1.345 times their spread. Intervals are of 95 %, by "
        f"resampled residuals ({len(law.powers.draws)} times)."
    )
    return page.table(["", "fitted", "least", "most"], rows) + f'<p class="note">{how}</p>'


def _holdout(found: Study) -> str:
    if not found.held:
        return ""
    f = found.held.facts()
    rows = [
        [name, si(n), predicted, f"{low:.4g} to {high:.4g}", measured, f"{error:.2%}", f"{base:.2%}"]
        for name, n, predicted, (low, high), measured, error, base in zip(
            f["names"], f["parameters"], f["predicted"], f["intervals"], f["measured"], f["errors"],
            f["baseline_errors"], strict=True,
        )
    ]  # fmt: skip
    head = ["run", "parameters", "predicted", "95 %", "measured", "error", f"of repeating {f['baseline']:.4g}"]
    return page.section("Predicted before they were seen", page.card(page.table(head, rows)))


def _predicted(found: Study) -> str:
    if not found.predicted:
        return ""
    rows = [
        [p.run.name, si(p.run.parameters), si(p.run.tokens), p.loss, f"{p.interval[0]:.4g} to {p.interval[1]:.4g}"]
        for p in found.predicted
    ]
    note = f"As of {datetime.date.today()}; when these runs are made, hold them against this."
    head = ["run", "parameters", "tokens", "loss by the law", "95 %, without a run's noise"]
    return page.section("Runs to be made", page.card(page.table(head, rows)), _note([note]))


def _profiles(found: Study) -> str:
    profiles = found.profiles
    if not profiles.profiles:
        return page.section("IsoFLOP profiles", page.missing("No budget has runs of three sizes."))

    def between(p: Any, name: str) -> str:
        return f"{si(p.intervals[name][0])} to {si(p.intervals[name][1])}" if p.intervals else "–"

    rows = [
        [panels.power(p.budget), len(p.runs), si(p.parameters), between(p, "parameters"), si(p.tokens),
         between(p, "tokens"), p.loss, p.edge or "inside"]
        for p in profiles.profiles
    ]  # fmt: skip
    head = ["FLOPs", "runs", "best N", "95 %", "its D", "95 %", "loss", "minimum"]
    inside = [p for p in profiles.profiles if not p.minimum.edge]
    shown = []
    for name, law in (("parameters", profiles.parameters), ("tokens", profiles.tokens)):
        if law:
            x = [p.budget for p in inside]
            y = [getattr(p, name) for p in inside]
            line = Line(x, law.predict(np.array(x)), "", label=f"C^{law.exponent:.2f}")
            shown.append(
                Panel(f"Best {name}", "training FLOPs", name, [line, Points(x, y, panels.RAMP[1], radius=5)],
                      show_x=panels.power, show_y=si)
            )  # fmt: skip
    return page.section("IsoFLOP profiles", page.card(page.table(head, rows), panels.draw(shown)))


def _optima(some: Optima) -> str:
    what = optima.SETTINGS[some.setting]
    marks: list[Points | Line] = []
    several = len({o.parameters for o in some.optima}) < len(some.optima)  # budgets of a size
    for colour, o in zip(panels.ramp(len(some.optima)), some.optima, strict=True):
        x = np.linspace(*o.minimum.span, 30)
        label = si(o.parameters) + (f", {panels.power(o.budget)}" if several else "")
        marks.append(Line(np.exp(x), np.exp(o.minimum.value(x)), colour, label=label))
        marks.append(_dots(o.runs, some.setting, colour))
        if not o.minimum.edge:
            marks.append(Points([o.value], [o.loss], colour, [f"best: {o.value:.3g}"], 6, hollow=True))
    show = "{:.3g}".format
    shown = [Panel(f"Loss over {what}, minima ringed", what, "loss", marks, show_x=show)]
    if law := some.over_parameters:
        inside = [o for o in some.optima if not o.minimum.edge]
        x = sorted({o.parameters for o in inside})
        line = Line(x, law.predict(np.array(x)), label=f"N^{law.exponent:.2f}")
        dots = Points([o.parameters for o in inside], [o.value for o in inside], panels.RAMP[1], radius=5)
        shown.append(Panel(f"Best {what} by size", "parameters", what, [line, dots], show_y=show))
    rows = [
        [si(o.parameters), panels.power(o.budget), "–" if o.width is None else f"{o.width:g}", o.value,
         f"{o.interval[0]:.3g} to {o.interval[1]:.3g}" if o.interval else "–", o.edge or "inside"]
        for o in some.optima
    ]  # fmt: skip
    head = ["parameters", "FLOPs", "width", f"best {what}", "95 %", "minimum"]
    verdict = _note([some.transfer.verdict]) if some.transfer else ""
    return page.section(what.capitalize(), verdict, page.card(panels.draw(shown), page.table(head, rows)))


def _optimal(found: Study, topology: str, plans: Sequence[Planned]) -> str:
    head, rows = optimal_rows(found, topology, plans)
    title = "What to train with more compute"
    if not rows:
        gone = " and ".join(found.law.absent)
        return page.section(title, page.missing(f"{gone} went to 0, so that the law knows no best size: see above."))
    note = (
        "N counts what the table's column parameters counts. * is more than 100 times beyond the largest run: there "
        "the law is a guess, and its intervals only say how surely the runs determine it if it holds. "
        f"{token_price(found, plans)}"
    )
    if plans:
        note += f" Days on {plans[0].chips} chips, by the estimate of that size; nothing was compiled."
    return page.section(title, page.card(page.table(head, rows)), _note([note]))


def _cost(found: Study) -> str:
    times = frontier.over_6nd(found.runs)
    n = [r.parameters for r in found.runs]
    titles = [f"{r.name}: {t:.2f}" for r, t in zip(found.runs, times, strict=True)]
    line = np.geomspace(min(n), max(n) * 1.0001, 20)
    marks = [Points(n, times, panels.RAMP[1], titles), Line(line, found.cost.over_6nd(line))]
    panel = Panel("FLOPs as counted, over 6ND", "parameters", "factor", marks)
    median = float(np.median(times))
    far = max(median, 1 / median)
    said = "This table's FLOPs are 6ND: attention isn't counted, which is much of a video model's."
    if far > 1.005:
        said = f"6ND is off by a factor of {_factor(far)} in the median" + (
            ": attention and what else a step multiplies is counted here." if median > 1 else "."
        )
    return page.section("What a token costs", _note([said]), page.card(panels.draw([panel])))


def _residuals(found: Study) -> str:
    residuals = found.law.powers.residuals
    off = [math.exp(r) for r in residuals]
    titles = [f"{r.name}: {e - 1:+.2%}" for r, e in zip(found.runs, off, strict=True)]
    shown = []
    for x, name, show in (("flops", "training FLOPs", panels.power), ("parameters", "parameters", si)):
        values = [getattr(r, x) for r in found.runs]
        marks = [Line([min(values), max(values)], [1, 1], dashed=True), Points(values, off, panels.RAMP[1], titles)]
        shown.append(Panel("Measured over fitted", name, "ratio", marks, show_x=show, show_y="{:.3f}".format))
    return page.section("Residuals", page.card(panels.draw(shown)))


def _runs(found: Study) -> str:
    column = judged(found)
    rows = [
        [r.name, si(r.parameters), si(r.tokens), f"{r.flops:.3g}", r.loss, f"{math.expm1(e):+.2%}"]
        + ([f"{r.figures[column]:.1%}" if column in r.figures else "–"] if column else [])
        for r, e in zip(found.runs, found.law.powers.residuals, strict=True)
    ]
    head = ["run", "parameters", "tokens", "FLOPs", "loss", "off the law"] + ([column] if column else [])
    left = page.table(["not fitted", "why"], [[e.name, e.reason] for e in found.excluded]) if found.excluded else ""
    return page.section("Runs", left, page.details(f"all {len(found.runs)} that were fitted", page.table(head, rows)))
