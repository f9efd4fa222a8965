"""Quality against compression, of all tokenizers that were measured: a table and a plot."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vidgen.studio import media
from vidgen.studio.plots import linear_ticks

_SIZE, _MARGIN = (720, 380), (18, 150, 46, 52)  # top, right (for names), bottom, left
_STYLE = """
svg { font-family: system-ui, sans-serif; background: #fbfaf8; }
.rule { stroke: #e6e3dd; } .tick, .axis-name { fill: #6a6a73; font-size: 11.5px; }
.line { fill: none; stroke: #c2571a; stroke-width: 2; stroke-dasharray: 5 4; }
.dot.a { fill: #2563a8; } .dot.b { fill: #c2571a; }
.end { font-size: 12.5px; font-weight: 600; } .end.a { fill: #2563a8; } .end.b { fill: #c2571a; }
"""
COLUMNS = (  # key of a row, heading, how it is written
    ("tokenizer", "tokenizer", "{}"),
    ("dataset", "dataset", "{}"),
    ("pixel_values_per_latent_value", "compression", "{:.1f}×"),
    ("tokens_per_clip", "tokens a clip", "{:,.0f}"),
    ("psnr", "PSNR, dB", "{:.2f}"),
    ("psnr_min", "worst", "{:.2f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("lpips", "LPIPS", "{:.4f}"),
    ("fvd", "FVD", "{:.1f}"),
    ("box_psnr", "in boxes, dB", "{:.2f}"),
    ("all_right", "all right", "{:.1%}"),
)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """An HTML table, a tokenizer a line, the least compressed first; columns that nobody has are left out.

    Args:
      rows: as the suite `reconstruction` writes them; see COLUMNS for the keys, of which any may be missing or None.
    """
    columns = [c for c in COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    head = "".join(f"<th{_side(key)}>{name}</th>" for key, name, _ in columns)
    lines = []
    for row in _sorted(rows):
        cells = (f"<td{_side(key)}>{_written(row.get(key), how)}</td>" for key, _, how in columns)
        css = ' class="main"' if row.get("kind") == "vae" else ""
        lines.append(f"<tr{css}>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def plot(rows: Sequence[Mapping[str, Any]], alone: bool = False) -> str:
    """PSNR against compression on a logarithmic axis, as an <svg>: VAEs are points, the linear baseline is a line.

    Exact tokenizers, which lose nothing, have no place on the scale and are left to the table. "" where nothing is
    left to draw.

    Args:
      rows: of one data set.
      alone: with colours of its own, for a file that stands by itself; else the page's style sheet has them.
    """
    points = [r for r in _sorted(rows) if r["kind"] in ("vae", "linear") and r.get("psnr") is not None]
    if not points:
        return ""
    (width, height), (top, right, bottom, left) = _SIZE, _MARGIN
    xs = [math.log2(r["pixel_values_per_latent_value"]) for r in points]
    x_low, x_high = math.floor(min(xs)), max(math.ceil(max(xs)), math.floor(min(xs)) + 1)
    ticks = linear_ticks(min(r["psnr"] for r in points), max(r["psnr"] for r in points))

    def place(row: Mapping[str, Any]) -> tuple[float, float]:
        x = (math.log2(row["pixel_values_per_latent_value"]) - x_low) / (x_high - x_low)
        y = (ticks[-1] - row["psnr"]) / (ticks[-1] - ticks[0])
        return left + x * (width - left - right), top + y * (height - top - bottom)

    label = html.escape("; ".join(f"{r['tokenizer']}: {r['psnr']:.1f} dB" for r in points), quote=True)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {height}" role="img"']
    parts.append(f' aria-label="{label}">' + (f"<style>{_STYLE}</style>" if alone else ""))
    for tick in ticks:
        y = top + (ticks[-1] - tick) / (ticks[-1] - ticks[0]) * (height - top - bottom)
        parts.append(f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    for power in range(x_low, x_high + 1):
        x = left + (power - x_low) / (x_high - x_low) * (width - left - right)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 26}" text-anchor="middle">{2.0**power:g}×</text>')
    parts.append(
        f'<text class="tick axis-name" x="{left}" y="{height - 6}">'
        "PSNR in dB over pixel values a latent value; dashed: the wavelet, cut to what varies most</text>"
    )
    strides = dict.fromkeys(tuple(r["stride"]) for r in points if r["kind"] == "linear")
    for stride in strides:
        line = [place(r) for r in points if r["kind"] == "linear" and tuple(r["stride"]) == stride]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        parts.append(f'<polyline class="line b" points="{path}"/>')
        name = f"linear {'×'.join(map(str, stride))}"
        parts.append(f'<text class="end b" x="{line[-1][0] + 9:.1f}" y="{line[-1][1] + 4:.1f}">{name}</text>')
    for row in points:
        (x, y), css = place(row), "a" if row["kind"] == "vae" else "b"
        shown = html.escape(f"{row['tokenizer']}: {row['psnr']:.2f} dB at {row['pixel_values_per_latent_value']:.1f}×")
        radius = 5 if css == "a" else 3
        parts.append(
            f'<circle class="dot {css}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{shown}</title></circle>'
        )
        if css == "a":
            name = html.escape(f"{row['tokenizer']} {row['psnr']:.1f}")
            parts.append(f'<text class="end a" x="{x + 9:.1f}" y="{y - 6:.1f}">{name}</text>')
    return "".join([*parts, "</svg>"])


def fragment(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plot and table of each data set, to be put into a page that has the report's style sheet."""
    parts = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        some = [row for row in rows if row["dataset"] == dataset]
        parts.append(f"<h3>{html.escape(dataset)}</h3>{plot(some)}{table(some)}")
    return f'<div class="card">{"".join(parts)}</div>'


def write(folder: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """FOLDER/compression.json, the rows; .html, to embed; .svg, of the first data set. Raises ConfigError."""
    media.write(os.path.join(folder, "compression.json"), json.dumps({"rows": rows}, indent=2).encode())
    media.write(os.path.join(folder, "compression.html"), fragment(rows).encode())
    if drawn := plot([row for row in rows if row["dataset"] == rows[0]["dataset"]], alone=True):
        media.write(os.path.join(folder, "compression.svg"), drawn.encode())


def _sorted(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda r: r["pixel_values_per_latent_value"])


def _written(value: Any, how: str) -> str:
    return "–" if value is None else html.escape(how.format(value))


def _side(key: str) -> str:
    return "" if key in ("tokenizer", "dataset") else ' class="number"'
