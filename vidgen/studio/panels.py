"""Plots as papers have them, points, lines and bands over logarithmic axes, side by side in one SVG."""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Sequence

from vidgen.studio.plots import linear_ticks, log_ticks
from vidgen.training.metrics import si

SIZE, MARGIN = (400, 320), (34, 20, 46, 54)  # of a panel; top, right, bottom, left at least
LETTER = 7.0  # width of a tick's
LABEL = 50.0, 12.0  # width and height that a line's label takes
RAMP = ("#5b4ea3", "#2f73b4", "#1f968b", "#4e9a37", "#b8901a", "#d0702a", "#c23b4b", "#8c2a6b")
STYLE = """
svg { font-family: system-ui, sans-serif; background: #fbfaf8; }
.panel .rule { stroke: #e6e3dd; } .panel text { fill: #6a6a73; font-size: 11.5px; }
.panel .name { fill: #1d1d22; font-size: 13px; font-weight: 600; } .panel .ink { stroke: #1d1d22; fill: #1d1d22; }
"""
PAGE_STYLE = """<style>.panel text { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.panel .name { fill: var(--ink); font-size: 13px; font-weight: 600; } .panel .ink { stroke: var(--ink);
fill: var(--ink); }</style>"""


@dataclasses.dataclass(frozen=True)
class Points:
    """Dots at (x, y); `titles` appear under the pointer. hollow: rings; faint: behind what matters."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str = ""  # empty: the ink of the page
    titles: Sequence[str] = ()
    radius: float = 3.5
    hollow: bool = False
    faint: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """A line through (x, y), and a band from `low` to `high`; `label` stands at its end."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str = ""
    dashed: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Marks over two axes; `show_x` and `show_y` write a tick."""

    title: str
    x: str
    y: str
    marks: Sequence[Points | Line]
    log_y: bool = True
    show_x: Callable[[float], str] = si
    show_y: Callable[[float], str] = "{:.3g}".format
    key: Sequence[tuple[str, str]] = ()  # (colour, what it means), on the right: above, or below where y is a share
    share: bool = False  # y is a share, 0 to 1, which rises to the right


def ramp(count: int) -> list[str]:
    """So many colours, in order from the smallest to the largest."""
    if count == 1:
        return [RAMP[1]]
    return [RAMP[round(i * (len(RAMP) - 1) / (count - 1))] for i in range(count)]


def power(value: float) -> str:
    """10¹³, 2·10¹³."""
    exponent = math.floor(math.log10(value) + 1e-9)
    digits = f"{value / 10**exponent:.3g}"
    raised = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ("" if digits == "1" else f"{digits}·") + f"10{raised}"


def draw(panels: Sequence[Panel], alone: bool = False) -> str:
    """An <svg> of the panels side by side; "" without any that has a mark.

    alone: with colours of its own, for a file that stands by itself; else the page's style sheet and PAGE_STYLE.
    """
    panels = [p for p in panels if any(len(m.x) for m in p.marks)]
    if not panels:
        return ""
    width, height = SIZE
    label = html.escape("; ".join(f"{p.title}: {p.y} over {p.x}" for p in panels), quote=True)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width * len(panels)} {height}" '
        f'style="max-width: {560 * len(panels)}px" role="img" aria-label="{label}">'
        + (f"<style>{STYLE}</style>" if alone else "")
    )
    drawn = "".join(
        f'<g class="panel" transform="translate({i * width} 0)">{_panel(p)}</g>' for i, p in enumerate(panels)
    )
    return f"{head}{drawn}</svg>"


def _panel(p: Panel) -> str:
    (width, height), (top, right, bottom, left) = SIZE, MARGIN
    xs, ys = [x for m in p.marks for x in m.x], [y for m in p.marks for y in m.y]
    labelled = any(isinstance(m, Line) and m.label for m in p.marks)
    x_low, x_high = _padded(xs, True, 0.04, 0.22 if labelled else 0.04)
    y_low, y_high = (0.0, 1.0) if p.share else _padded(ys, p.log_y, 0.06, 0.06)
    warp = math.log if p.log_y and not p.share else float
    ticks = {tick: p.show_y(tick) for tick in _ticks(y_low, y_high, p.log_y and not p.share)}
    left = max(left, 14 + LETTER * max(map(len, ticks.values()), default=0))

    def px(x: float) -> float:
        return left + math.log(x / x_low) / math.log(x_high / x_low) * (width - left - right)

    def py(y: float) -> float:
        y = min(max(y, y_low), y_high)
        return top + (warp(y_high) - warp(y)) / (warp(y_high) - warp(y_low)) * (height - top - bottom)

    parts = [f'<text class="name" x="{left}" y="16">{html.escape(p.title)}</text>']
    for i, (colour, meaning) in enumerate(p.key):
        y = (height - bottom - 15 * len(p.key) + 7 if p.share else top + 10) + 15 * i
        parts.append(f'<circle cx="{width - right - 5}" cy="{y - 4}" r="3.5" {_paint(colour)}/>')
        parts.append(f'<text x="{width - right - 14}" y="{y}" text-anchor="end">{html.escape(meaning)}</text>')
    for tick, shown in ticks.items():
        parts.append(f'<line class="rule" x1="{left}" x2="{width - right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{py(tick) + 4:.1f}" text-anchor="end">{shown}</text>')
    for tick in _ticks(x_low, x_high, True, 6):
        parts.append(
            f'<text x="{px(tick):.1f}" y="{height - bottom + 17}" text-anchor="middle">{p.show_x(tick)}</text>'
        )
    parts.append(f'<text x="{left}" y="{height - 8}">{html.escape(f"{p.y} over {p.x}")}</text>')
    for mark in p.marks:
        parts.append(_line(mark, px, py) if isinstance(mark, Line) else _points(mark, px, py))
    named = [m for m in p.marks if isinstance(m, Line) and m.label and len(m.x)]
    places = [(px(m.x[-1]), py(m.y[-1])) for m in named]
    for mark, (x, _), y in zip(named, places, _apart(places), strict=True):
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 4:.1f}">{html.escape(mark.label)}</text>')
    return "".join(parts)


def _apart(places: Sequence[tuple[float, float]]) -> list[float]:
    """The y of labels at (x, y), moved up and down until none lies on another."""
    ys, (width, height) = [y for _, y in places], LABEL
    for _ in range(60):
        for i, j in itertools.combinations(range(len(ys)), 2):
            gap = ys[j] - ys[i]
            if abs(places[j][0] - places[i][0]) < width and abs(gap) < height:
                push = math.copysign((height - abs(gap)) / 2, gap)
                ys[i], ys[j] = ys[i] - push, ys[j] + push
    return ys


def _line(mark: Line, px: Callable[[float], float], py: Callable[[float], float]) -> str:
    parts = []
    if mark.low:
        there = [f"{px(x):.1f},{py(y):.1f}" for x, y in zip(mark.x, mark.low, strict=True)]
        back = [f"{px(x):.1f},{py(y):.1f}" for x, y in zip(mark.x, mark.high, strict=True)][::-1]
        parts.append(f'<polygon points="{" ".join(there + back)}" {_paint(mark.colour)} stroke="none" opacity=".15"/>')
    path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in zip(mark.x, mark.y, strict=True))
    dash = ' stroke-dasharray="5 4"' if mark.dashed else ""
    parts.append(f'<polyline points="{path}" {_paint(mark.colour, False)} stroke-width="1.6"{dash}/>')
    return "".join(parts)


def _points(mark: Points, px: Callable[[float], float], py: Callable[[float], float]) -> str:
    parts = []
    for i, (x, y) in enumerate(zip(mark.x, mark.y, strict=True)):
        title = f"<title>{html.escape(mark.titles[i])}</title>" if mark.titles else ""
        paint = _paint(mark.colour, not mark.hollow) + (' stroke-width="1.8"' if mark.hollow else "")
        faint = ' opacity=".45"' if mark.faint else ""
        parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="{mark.radius}" {paint}{faint}>{title}</circle>')
    return "".join(parts)


def _paint(colour: str, filled: bool = True) -> str:
    if not colour:
        return 'class="ink"' + ("" if filled else ' style="fill: none"')
    return f'fill="{colour}"' if filled else f'fill="none" stroke="{colour}"'


def _padded(values: Sequence[float], log: bool, below: float, above: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        span = max(math.log(high / low), 0.05)
        return low * math.exp(-below * span), high * math.exp(above * span)
    span = max(high - low, 0.05 * abs(high), 1e-12)
    return low - below * span, high + above * span


def _ticks(low: float, high: float, log: bool, most: int = 7) -> list[float]:
    """Round numbers within [low, high], powers of ten alone where 1, 2 and 5 are too many."""
    wide = log and high / low > 8
    for count in (5, 9):  # more, where a few leave less than three inside
        ticks = log_ticks(low, high) if wide else linear_ticks(low, high, count)
        inside = [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if wide or len(inside) > 2:
            break
    tens = [t for t in inside if t > 0 and abs(math.log10(t) - round(math.log10(t))) < 1e-9]
    return tens if log and len(inside) > most and len(tens) > 1 else inside
