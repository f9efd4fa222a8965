"""Where a run's time went, and what went wrong on the way, for the report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vidgen.studio import page
from vidgen.training import goodput, incidents
from vidgen.training.goodput import KINDS, Attempt
from vidgen.training.metrics import duration

ATTEMPTS_SHOWN = 24
INCIDENTS_SHOWN = 200

MEANING = {
    "init": "starting: Python, the data index, restoring",
    "compile": "compiling steps",
    "step": "steps that count",
    "data wait": "waiting for the next batch",
    "save": "waiting for checkpoints to be written",
    "eval": "held-out loss and other figures",
    "sample": "drawing samples",
    "lost": "steps that had to be taken again",
    "down": "between a process's last word and the next one's start",
}
ROW, BAR, WIDTH, LEFT, RIGHT = 26, 16, 720, 92, 64  # of the drawing's own units


def section(workdir: str) -> str:
    """Bars by attempt, a table by kind, and the incidents; what is missing is said."""
    title = "Where the time went"
    attempts = goodput.Account(goodput.read(workdir)).attempts
    parts = [_incidents(incidents.read(workdir))]
    if not attempts:
        return page.section(title, page.missing("No goodput.jsonl: not recorded."), *parts)
    sums = goodput.totals({kind: sum(a.seconds[kind] for a in attempts) for kind in KINDS})
    shown = [kind for kind in KINDS if sums[kind] > 0]
    rows = [[kind, MEANING[kind], duration(sums[kind]), _percent(sums[kind], sums["total"])] for kind in shown]
    lead = (
        f"<p>Goodput <b>{_percent(sums['step'], sums['total'])}</b>: the share of steps that count in "
        f"{duration(sums['total'])} since the run first began, over {_count(len(attempts), 'attempt')}.</p>"
    )
    legend = "".join(f'<span><i class="k{KINDS.index(kind)}"></i>{kind}</span>' for kind in shown)
    card = page.card(
        lead,
        f'<div class="legend many">{legend}</div>',
        bars(attempts),
        page.table(["", "what", "time", "share"], rows),
    )
    return page.section(title, card, *parts)


def share(workdir: str) -> float | None:
    """Goodput, 0 to 1, over all attempts; None where it was not recorded."""
    account = goodput.Account(goodput.read(workdir))
    return goodput.totals(account.seconds())["goodput"] if account.attempts else None


def bars(attempts: Sequence[Attempt]) -> str:
    """A bar an attempt, the last ones, as long as it lasted and divided by kind; where there are several, the run's
    first, divided alike and as wide as there is room."""
    whole = {kind: sum(a.seconds[kind] for a in attempts) for kind in KINDS}
    first = len(attempts) - min(len(attempts), ATTEMPTS_SHOWN)
    lines = [(f"attempt {n + 1}", attempts[n].seconds) for n in range(first, len(attempts))]
    longest = max(max(sum(seconds.values()) for _, seconds in lines), 1e-9)
    scales = [(label, seconds, longest) for label, seconds in lines]
    if len(attempts) > 1:
        scales.insert(0, ("the run", whole, max(sum(whole.values()), 1e-9)))
    height = ROW * len(scales)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{page.escape(_told(whole))}" style="margin:10px 0 18px">'
    ]
    for i, (label, seconds, scale) in enumerate(scales):
        parts += _bar(label, seconds, scale, ROW * i + (ROW - BAR) / 2)
    return "".join([*parts, "</svg>"])


def _bar(label: str, seconds: Mapping[str, float], scale: float, y: float) -> list[str]:
    """Down time stands first, as it came first; the order of the others is that of KINDS."""
    total, x = sum(seconds.values()), float(LEFT)
    middle = y + BAR / 2 + 4
    parts = [f'<text class="tick" x="{LEFT - 8}" y="{middle:.1f}" text-anchor="end">{label}</text>']
    for kind in ("down", *(kind for kind in KINDS if kind != "down")):
        width = seconds[kind] / scale * (WIDTH - LEFT - RIGHT)
        if width <= 0:
            continue
        told = f"{kind}: {duration(seconds[kind])}, {_percent(seconds[kind], total)}"
        parts.append(
            f'<rect class="k{KINDS.index(kind)}" x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{BAR}">'
            f"<title>{label}, {told}</title></rect>"
        )
        x += width
    return [*parts, f'<text class="tick" x="{x + 8:.1f}" y="{middle:.1f}">{duration(total)}</text>']


def _incidents(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return '<p class="note">No incidents were recorded.</p>'
    counted = ", ".join(f"{kind} {n}" for kind, n in Counter(str(row["kind"]) for row in rows).most_common())
    last = rows[-INCIDENTS_SHOWN:]
    when = "%Y-%m-%d %H:%M:%S"
    cells = [[_when(row["time"], when), f"{row['step']:,}", str(row["kind"]), str(row["text"])] for row in last]
    cut = f", the last {len(last)}" if len(last) < len(rows) else ""
    note = f'<p class="note">{page.escape(counted)}</p>'
    table = page.table(["UTC", "step", "kind", "what"], cells)
    head = f"<h3>{_count(len(rows), 'incident')}{cut}</h3>"
    return '<div style="margin-top:16px">' + page.card(head, note, table) + "</div>"


def _when(seconds: float, pattern: str) -> str:
    try:
        return time.strftime(pattern, time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "–"


def _told(seconds: Mapping[str, float]) -> str:
    """For those who hear the page."""
    return "; ".join(f"{kind} {duration(s)}" for kind, s in seconds.items() if s > 0)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / max(whole, 1e-9):.1f}\N{NO-BREAK SPACE}%"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
