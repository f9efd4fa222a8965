"""The report's page: its style sheet, and the few shapes that its parts have."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d1d22; --soft: #6a6a73; --rule: #e6e3dd; --a: #2563a8; --b: #c2571a;
  --good: #2e7d4f; --wash: #f3f1ec; --k0: #8fb0d4; --k1: #4f7fb5; --k2: #3f9163; --k3: #c2571a; --k4: #8a6bb1;
  --k5: #c7a62f; --k6: #4ba3a8; --k7: #b3343c; --k8: #a9a7ab; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #141417; --card: #1b1b1f; --ink: #e9e8e4; --soft: #9b9aa3; --rule: #2e2e34; --a: #74aeea; --b: #eda067;
  --good: #7cc79a; --wash: #232328; --k0: #5c7ea5; --k1: #74aeea; --k2: #5fb583; --k3: #eda067; --k4: #a98ad0;
  --k5: #dcc05a; --k6: #6cc3c8; --k7: #e0666d; --k8: #66656b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 56px 24px 80px; }
h1, h2 { font-family: ui-serif, Charter, "Iowan Old Style", Georgia, "Noto Serif", serif; font-weight: 600;
  letter-spacing: -.01em; text-wrap: balance; }
h1 { font-size: clamp(30px, 5vw, 44px); line-height: 1.12; margin: 4px 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 23px; margin: 64px 0 16px; line-height: 1.25; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 8px; }
* + h3, .scroll + h3 { margin-top: 28px; }
p { margin: 0 0 12px; max-width: 68ch; }
.eyebrow { color: var(--soft); font-size: 13px; letter-spacing: .09em; text-transform: uppercase; margin: 0; }
.verdict { font-size: 19px; line-height: 1.5; max-width: 68ch; margin-bottom: 28px; text-wrap: pretty; }
.verdict b { font-weight: 600; color: var(--good); }
.note, .missing, figcaption { color: var(--soft); font-size: 14px; }
.missing { border: 1px dashed var(--rule); border-radius: 10px; padding: 14px 18px; max-width: none; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 1px; overflow: hidden;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 12px; margin: 0; }
.tiles div { background: var(--card); padding: 14px 18px 16px; }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { margin: 2px 0 0; font-size: 22px; font-weight: 600; letter-spacing: -.01em; line-height: 1.25; }
.tiles dd, td, .tick, .end { font-variant-numeric: tabular-nums; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 20px 22px; margin: 0; }
.card > :last-child { margin-bottom: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)); gap: 16px; }
.chart { display: block; width: 100%; height: auto; overflow: visible; }
.rule { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 11.5px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.a { stroke: var(--a); } .line.b { stroke: var(--b); } .line.faint { stroke: var(--a); opacity: .28;
  stroke-width: 1; }
.dot.a { fill: var(--a); } .dot.b { fill: var(--b); } .dot.faint { fill: var(--a); opacity: .28; }
.end { font-size: 12.5px; font-weight: 600; } .end.a { fill: var(--a); } .end.b { fill: var(--b); }
.pointer { fill: transparent; } .pointer:hover { fill: var(--ink); fill-opacity: .07; }
.legend { display: inline-flex; gap: 18px; font-size: 14px; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle; }
.legend i.a { background: var(--a); } .legend i.b { background: var(--b); }
.legend.many { flex-wrap: wrap; gap: 4px 18px; } .legend.many i { width: 11px; height: 11px; vertical-align: -1px; }
rect.k0 { fill: var(--k0); } rect.k1 { fill: var(--k1); } rect.k2 { fill: var(--k2); } rect.k3 { fill: var(--k3); }
rect.k4 { fill: var(--k4); } rect.k5 { fill: var(--k5); } rect.k6 { fill: var(--k6); } rect.k7 { fill: var(--k7); }
rect.k8 { fill: var(--k8); }
i.k0 { background: var(--k0); } i.k1 { background: var(--k1); } i.k2 { background: var(--k2); }
i.k3 { background: var(--k3); } i.k4 { background: var(--k4); } i.k5 { background: var(--k5); }
i.k6 { background: var(--k6); } i.k7 { background: var(--k7); } i.k8 { background: var(--k8); }
.axis { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 14px; margin-bottom: 10px; }
.axis > input { position: absolute; opacity: 0; pointer-events: none; }
.axis > label { font-size: 13px; color: var(--soft); cursor: pointer; border-bottom: 2px solid transparent; }
.axis > input:checked + label { color: var(--ink); border-color: var(--a); }
.axis > input:focus-visible + label { outline: 2px solid var(--a); outline-offset: 3px; border-radius: 2px; }
.axis > .legend { order: -1; margin-right: auto; }
.axis > .view { display: none; flex: 1 0 100%; order: 9; }
.axis > .linear:checked ~ .view.linear, .axis > .log:checked ~ .view.log { display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 8px 14px 8px 0; border-bottom: 1px solid var(--rule); vertical-align: baseline; }
tr:last-child > td, tr:last-child > th { border-bottom: 0; }
td.number, th.number { text-align: right; }
td.bar { width: 45%; padding-right: 0; }
td.bar span { display: block; height: 8px; border-radius: 4px; background: var(--wash); overflow: hidden; }
td.bar span i { display: block; height: 100%; background: var(--a); border-radius: 4px; }
tr.main td, tr.main th { font-weight: 600; color: var(--ink); } tr.main td.bar span i { background: var(--good); }
code, .key { font: 13.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
td.key:first-child { white-space: nowrap; width: 1%; padding-right: 40px; }
td.value { overflow-wrap: anywhere; min-width: 12ch; }
.newest { display: grid; grid-template-columns: minmax(0, 30ch) minmax(0, max-content); gap: 0 20px; }
.newest.alone { display: block; }
.newest ol { list-style: none; margin: 0; padding: 0; display: flex; flex-direction: column; font-size: 15px;
  line-height: 1.4; }
.newest li { flex: 1 1 0; display: flex; align-items: center; justify-content: flex-end; text-align: right;
  overflow-wrap: anywhere; }
.clip { display: block; width: 100%; height: auto; border-radius: 8px; image-rendering: pixelated;
  background: #303030; }
.newest .clip { width: var(--shown, 560px); max-width: 100%; }
.newest figcaption { grid-column: 2; margin-top: 8px; }
.strip { display: flex; gap: 14px; overflow-x: auto; padding: 2px 2px 14px; }
.strip figure { flex: 0 0 168px; margin: 0; }
.strip figcaption { margin-top: 6px; font-size: 13px; }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--soft); font-size: 14px; padding: 4px 0; }
summary:hover { color: var(--ink); }
footer { margin-top: 72px; padding-top: 18px; border-top: 1px solid var(--rule); color: var(--soft); font-size: 13px; }
@media (max-width: 640px) {
  main { padding: 32px 16px 56px; } h2 { margin-top: 48px; } .card { padding: 16px; }
  .newest { display: flex; flex-direction: column-reverse; gap: 14px; }
  .newest.alone { display: block; }
.newest ol { list-style: decimal; padding-left: 22px; gap: 4px; }
  .newest li { display: list-item; text-align: left; }
  td.bar { width: 30%; } .tick { font-size: 17px; } .end { font-size: 18px; } .charts .tick { font-size: 15px; }
}
@media print { body { background: none; } h2 { break-after: avoid; } .card, figure { break-inside: avoid; } }
"""


def escape(text: Any) -> str:
    """Text that is safe in elements and in quoted attributes.

    Control characters, lone surrogates and marks that turn the direction of what follows become �; all else of
    Unicode, the joiners of emoji and of Indic scripts too, stays.
    """
    visible = "".join("�" if _disturbs(c) else c for c in str(text))
    return html.escape(visible, quote=True)


def _disturbs(c: str) -> bool:
    return (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t") or unicodedata.bidirectional(c) in BIDI


def page(title: str, parts: Iterable[str]) -> str:
    """A whole HTML document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def card(*parts: str) -> str:
    return '<div class="card">' + "".join(parts) + "</div>"


def missing(text: str) -> str:
    """Says that something isn't there."""
    return f'<p class="missing">{escape(text)}</p>'


def tiles(values: Mapping[str, str]) -> str:
    """A few figures, large: name → text."""
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in values.items())
    return f'<dl class="tiles">{cells}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain table; numbers stand to the right, booleans are ticks."""
    rows = [list(row) for row in rows]
    right = [
        bool(rows) and all(isinstance(r[i], (int, float, type(None))) or r[i] == "" for r in rows)
        for i in range(len(head))
    ]
    css = [' class="number"' if r else "" for r in right]
    top = "".join(f"<th{c}>{escape(h)}</th>" for h, c in zip(head, css, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{escape(_cell(v))}</td>" for v, c in zip(row, css, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def settings(values: Mapping[str, Any]) -> str:
    """A table of dotted keys and their values."""
    body = "".join(
        f'<tr><td class="key">{escape(k)}</td><td class="key value">{escape(_cell(v))}</td></tr>'
        for k, v in values.items()
    )
    return f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'


def details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "✓" if value else "✗"
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(v) for v in value) if value else "()"
    return str(value) if value != "" else '""'
