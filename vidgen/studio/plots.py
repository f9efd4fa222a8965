"""Line charts as SVG text: no library, no script, colours from the page's style sheet."""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

MARGIN = (14, 62, 26, 48)  # top, right (for the last value), bottom, left


@dataclasses.dataclass(frozen=True)
class Series:
    """A named line.

    Attributes:
      name: shown in the legend, and in what appears under the pointer.
      points: (x, y), x ascending; a y of None or not finite leaves a gap.
      css: class of the line: "a" and "b" are the two colours, "faint" stands behind a line.
      label: write the last value at the end of the line.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    css: str = "a"
    label: bool = True


def line_chart(
    series: Sequence[Series],
    *,
    log: bool = False,
    show: Callable[[float], str] = "{:.3g}".format,
    zero: bool = False,
    size: tuple[int, int] = (720, 300),
) -> str:
    """Draws lines over a common x axis of steps.

    Args:
      series: what to draw, the last one on top.
      log: logarithmic y axis; points at or below 0 leave gaps there.
      show: how a y value is written.
      zero: the y axis starts at 0.
      size: (width, height) of the drawing's own units; it scales to the page's width.

    Returns:
      An <svg> element, or "" where there is no point to draw.
    """
    lines = [(s, _thin([(x, _usable(y, log)) for x, y in s.points])) for s in series]
    xs = [x for _, points in lines for x, y in points if y is not None]
    ys = [y for _, points in lines for _, y in points if y is not None]
    if not ys:
        return ""
    width, height = size
    top, right, bottom, left = MARGIN
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    ticks = log_ticks(min(ys), max(ys)) if log else linear_ticks(0.0 if zero else min(ys), max(ys))
    warp = math.log10 if log else float
    y_low, y_high = warp(min(ticks[0], *ys)), warp(max(ticks[-1], *ys))

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def py(y: float) -> float:
        return top + (y_high - warp(y)) / (y_high - y_low) * (height - top - bottom)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{_summary(series, show)}">']
    for tick in ticks:
        y = py(tick)
        parts.append(f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 3.5:.1f}" text-anchor="end">{show(tick)}</text>')
    for tick in linear_ticks(x_low, x_high, whole=True):
        if x_low <= tick <= x_high:
            parts.append(
                f'<text class="tick" x="{px(tick):.1f}" y="{height - 6}" text-anchor="middle">{_steps(tick)}</text>'
            )
    ends = []
    for s, points in lines:
        for run in _runs(points):
            path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in run)
            if len(run) == 1:
                parts.append(f'<circle class="dot {s.css}" cx="{px(run[0][0]):.1f}" cy="{py(run[0][1]):.1f}" r="2.5"/>')
            else:
                parts.append(f'<polyline class="line {s.css}" points="{path}"/>')
        known = [(x, y) for x, y in points if y is not None]
        if s.label and known:
            ends.append((s.css, px(known[-1][0]), py(known[-1][1]), show(known[-1][1])))
    for (css, x, y, text), shift in zip(ends, _spread([e[2] for e in ends]), strict=True):
        parts.append(f'<circle class="dot {css}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        parts.append(f'<text class="end {css}" x="{x + 8:.1f}" y="{shift + 4:.1f}">{html.escape(text)}</text>')
    parts += _pointers(lines, px, top, height - bottom, show)
    parts.append("</svg>")
    return "".join(parts)


def smooth(points: Sequence[tuple[float, float | None]], reach: int) -> list[tuple[float, float | None]]:
    """Each y as the mean of itself and up to `reach` known neighbours on either side; gaps stay gaps.

    Unlike an exponential mean it doesn't lag behind a curve that falls. At the start, where curves are steep, both
    sides shrink alike; at the end there is the past alone.
    """
    known = [i for i, (_, y) in enumerate(points) if y is not None and math.isfinite(y)]
    sums = list(itertools.accumulate((points[i][1] for i in known), initial=0.0))
    out: list[tuple[float, float | None]] = [(x, None) for x, _ in points]
    for place, i in enumerate(known):
        before = min(reach, place)
        after = min(before, len(known) - 1 - place)
        out[i] = (points[i][0], (sums[place + after + 1] - sums[place - before]) / (before + after + 1))
    return out


def linear_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """About `count` round numbers that enclose [low, high]; whole numbers only, where asked."""
    if high - low < 1e-12 * max(abs(high), abs(low), 1e-300):
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    step = max(1.0, math.ceil(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose [low, high], both > 0: 1, 2 and 5 of each power of ten; over a long range 1 alone."""
    span = math.log10(high / low)
    every = max(1, math.ceil(span / 7))
    digits = (1,) if span > 3 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)) - every, math.ceil(math.log10(high)) + every + 1)
    ticks = [d * 10.0**p for p in powers if p % every == 0 for d in digits]
    below = max(t for t in ticks if t <= low * (1 + 1e-9))
    above = min(t for t in ticks if t >= high * (1 - 1e-9) and t > below)
    return [t for t in ticks if below <= t <= above]


def _usable(y: float | None, log: bool) -> float | None:
    return y if y is not None and math.isfinite(y) and (y > 0 or not log) else None


def _thin(points: list[tuple[float, float | None]], most: int = 600) -> list[tuple[float, float | None]]:
    """At most `most` points: means of neighbours. A point that stands for nothing but gaps stays a gap."""
    size = -(-len(points) // most)
    if size <= 1:
        return points
    thinned = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        known = [y for _, y in part if y is not None]
        thinned.append((part[-1][0], sum(known) / len(known) if known else None))
    return thinned


def _runs(points: Sequence[tuple[float, float | None]]) -> Iterator[list[tuple[float, float]]]:
    """The stretches between gaps."""
    run: list[tuple[float, float]] = []
    for x, y in points:
        if y is not None:
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _spread(ys: list[float], gap: float = 15.0) -> list[float]:
    """Heights of labels, moved apart so that none covers another."""
    order = sorted(range(len(ys)), key=ys.__getitem__)
    moved = list(ys)
    for above, below in zip(order, order[1:], strict=False):
        moved[below] = max(moved[below], moved[above] + gap)
    return moved


def _pointers(lines, px, top: float, bottom: float, show, most: int = 120) -> Iterator[str]:
    """Invisible columns that name the values under the pointer."""
    named = [(s, dict(points)) for s, points in lines if s.label]
    xs = sorted({x for _, points in named for x, y in points.items() if y is not None})
    xs = xs[:: -(-len(xs) // most)] if xs else []
    for i, x in enumerate(xs):
        left = px((xs[i - 1] + x) / 2) if i else px(x) - 2
        right = px((x + xs[i + 1]) / 2) if i + 1 < len(xs) else px(x) + 2
        values = [f"{s.name} {show(points[x])}" for s, points in named if points.get(x) is not None]
        text = html.escape(f"step {x:,.0f}: {', '.join(values)}")
        yield (
            f'<rect class="pointer" x="{left:.1f}" y="{top}" width="{max(right - left, 1):.1f}" '
            f'height="{bottom - top}"><title>{text}</title></rect>'
        )


def _summary(series: Sequence[Series], show: Callable[[float], str]) -> str:
    """For those who hear the page."""
    parts = []
    for s in series:
        known = [y for _, y in s.points if y is not None and math.isfinite(y)]
        if s.label and known:
            parts.append(f"{s.name} from {show(known[0])} to {show(known[-1])}")
    return html.escape("; ".join(parts), quote=True)


def _steps(x: float) -> str:
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x >= 10_000 else f"{x:g}"
