"""`vidgen report`: one HTML file that shows what a run learned, how well and how fast.

It is self-contained: the videos are in it, the curves are SVG, and nothing is fetched, so that it can be mailed. What
a run doesn't have (yet) is said to be missing.
"""

from __future__ import annotations

import base64
import json
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vidgen import config as configs
from vidgen.studio import compression, goodput, media, page, plots, workdirs
from vidgen.studio.workdirs import Judgement, Sample
from vidgen.training import metrics
from vidgen.training.metrics import si

SAMPLES_SHOWN = 12
PROMPTS_SHOWN = 300

SETTINGS = (("guidance", "guidance"), ("steps", "solver steps"))  # of prompts.json

JUDGED = ("all_right", "shape", "colour", "motion", "count", "permanence")  # shares of the prompts, best first
FIGURES = ("heldout_loss", "fvd", "psnr_mean")  # of other suites, shown over time too


def run(workdir: str) -> str:
    """Writes WORKDIR/report.html and returns its path.

    Raises ConfigError if `workdir` is not the workdir of a run, or cannot be written.
    """
    workdirs.check(workdir)
    config = workdirs.read_json(os.path.join(workdir, "config.json"))
    rows = metrics.read(workdir)
    judgements = workdirs.judgements(workdir)
    samples = workdirs.samples(workdir)
    name = os.path.basename(os.path.abspath(workdir))
    parts = [
        _header(name, config, rows, judgements, goodput.share(workdir)),
        _samples_section(samples),
        _judge_section(judgements),
        _compression_section(workdir),
        _loss_section(rows),
        _optimisation_section(rows),
        _speed_section(rows),
        goodput.section(workdir),
        _fed_section(workdir),
        _config_section(config),
        _facts_section(
            "Environment",
            workdirs.read_json(os.path.join(workdir, "environment.json")),
            "No environment.json: not recorded.",
        ),
        "<footer>Made by vidgen report from the files of the workdir.</footer>",
    ]
    path = os.path.join(workdir, "report.html")
    media.write(path, page.page(f"{name} · vidgen", parts).encode())
    return path


# What the page shows, part by part.


def _fed_section(workdir: str) -> str:
    """How rows were packed; of a VAE's run, which chunks there were."""
    name = "chunks" if os.path.exists(os.path.join(workdir, "chunks.json")) else "packing"
    found = workdirs.read_json(os.path.join(workdir, f"{name}.json"))
    return _facts_section(name.capitalize(), found, f"No {name}.json: not recorded.")


def _compression_section(workdir: str) -> str:
    """What tokenizers lose, against how much they compress, where the suite reconstruction has looked."""
    title, found = (
        "Quality against compression",
        workdirs.read_json(os.path.join(workdir, "evaluation", "compression.json")),
    )
    if found is None:
        return ""
    if not isinstance(found, dict) or not found.get("rows"):
        reason = found.get("unreadable") if isinstance(found, dict) else None
        return page.section(title, page.missing(reason or "compression.json: expected rows"))
    return page.section(title, compression.fragment(found["rows"]))


def _newest(judgements: Sequence[Judgement]) -> dict[str, Judgement]:
    return {j.suite: j for j in judgements}


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float | None]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def _known(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [y for _, y in _column(rows, name) if y is not None]


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flat view: dotted key → value."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _header(
    name: str,
    config: Any,
    rows: Sequence[Mapping[str, Any]],
    judgements: Sequence[Judgement],
    share: float | None,
) -> str:
    total = _leaves(config).get("train.steps")
    step = rows[-1]["step"] if rows else 0
    if not rows:
        state = "Nothing was logged yet."
    elif isinstance(total, int) and step < total:
        state = f"At step {step:,} of {total:,}."
    else:
        state = f"Trained for {step:,} steps."
    verdict = [page.escape(state)]
    for judgement in _newest(judgements).values():
        share = judgement.results.get("all_right")
        if isinstance(share, (int, float)):
            prompts = judgement.results.get("prompts")
            of = f" of {len(prompts) if isinstance(prompts, list) else prompts} prompts" if prompts else ""
            verdict.append(f"Judged by {page.escape(judgement.suite)}: <b>{_percent(share)} all right</b>{of}.")
    if not judgements:
        verdict.append("Not judged yet.")

    figures = {}
    if losses := _known(rows, "loss"):
        figures["training loss"] = f"{statistics.fmean(losses[-10:]):.4f}"
    if held_out := _known(rows, "heldout_loss"):
        figures["held-out loss"] = f"{held_out[-1]:.4f}"
    if psnr := _known(rows, "heldout_psnr"):
        figures["held-out PSNR"] = f"{psnr[-1]:.2f} dB"
    if seen := _known(rows, "tokens_seen"):
        figures["tokens seen"] = si(seen[-1])
    if speeds := _known(rows, "tokens_per_second"):
        figures["tokens a second"] = si(statistics.median(speeds))
    if mfus := _known(rows, "mfu"):
        figures["MFU"] = _percent(statistics.median(mfus))
    if waits := _known(rows, "data_wait_fraction"):
        figures["waiting for data"] = _percent(statistics.fmean(waits))
    if share is not None:
        figures["goodput"] = _percent(share)
    return (
        f'<header><p class="eyebrow">vidgen run</p>\n<h1>{page.escape(name)}</h1>\n'
        f'<p class="verdict">{" ".join(verdict)}</p>\n{page.tiles(figures) if figures else ""}</header>'
    )


def _samples_section(samples: Sequence[Sample]) -> str:
    title = "Samples"
    if not samples:
        return page.section(title, page.missing("No samples yet: config.train.sample_every says how often to draw."))
    shown = [s for s in samples if s.video]
    if not shown:
        return page.section(title, page.missing("The folders in samples/ hold no grid.gif and no grid.mp4."))
    parts = [_large(shown[-1])]
    if earlier := shown[:-1]:
        picked = [earlier[i] for i in _spaced(len(earlier), SAMPLES_SHOWN)]
        cards = "".join(f"<figure>{_clip(s)}<figcaption>step {s.step:,}</figcaption></figure>" for s in picked)
        count = f"{len(picked)} of {len(earlier)}, evenly chosen" if len(picked) < len(earlier) else f"{len(earlier)}"
        parts.append(f'<h3>Earlier ({count})</h3><div class="strip">{cards}</div>')
    return page.section(title, *parts)


def _large(sample: Sample) -> str:
    """A grid of samples, each row with its prompt beside it."""
    about = sample.about
    prompts, seeds, columns = (about.get(key) or [] for key in ("prompts", "seeds", "columns"))
    how = [f"step {sample.step:,}"]
    if len(seeds) > 1:
        how.append(f"seeds {', '.join(map(str, seeds))} from left to right")
    elif seeds:
        how.append(f"seed {seeds[0]}")
    if columns:
        how.append(f"{', '.join(map(str, columns))} from left to right")
    if left_out := about.get("left_out"):
        how.append(f"{len(left_out)} clips left out")
    how += [f"{name} {about[key]}" for key, name in SETTINGS if key in about]
    if not prompts:
        how.append(about.get("unreadable", "its prompts.json names no prompts"))
    rows = "".join(f"<li>{page.escape(prompt)}</li>" for prompt in prompts)
    width = min(150 * max(1, len(seeds), len(columns)), 640) if prompts else 560
    return (
        f'<figure class="newest{"" if prompts else " alone"}" style="margin:0;--shown:{width}px">'
        f"{f'<ol>{rows}</ol>' if prompts else ''}{_clip(sample)}"
        f"<figcaption>{page.escape(' · '.join(how))}</figcaption></figure>"
    )


def _clip(sample: Sample) -> str:
    with open(sample.video, "rb") as f:
        data = base64.b64encode(f.read()).decode()
    if sample.video.endswith(".gif"):
        return f'<img class="clip" alt="samples at step {sample.step}" src="data:image/gif;base64,{data}">'
    return f'<video class="clip" autoplay loop muted playsinline controls src="data:video/mp4;base64,{data}"></video>'


def _spaced(count: int, most: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


def _judge_section(judgements: Sequence[Judgement]) -> str:
    title = "The judge"
    if not judgements:
        return page.section(title, page.missing("Not judged yet: vidgen evaluate --workdir …"))
    parts = []
    for suite, judgement in _newest(judgements).items():
        history = [j for j in judgements if j.suite == suite]
        parts.append(page.card(f"<h3>{page.escape(suite)}</h3>", _results(judgement), _history(history)))
    gap = "display: grid; grid-template-columns: minmax(0, 1fr); gap: 16px"
    return page.section(title, f'<div style="{gap}">{"".join(parts)}</div>')


def _results(judgement: Judgement) -> str:
    results = judgement.results
    if "unreadable" in results:
        return page.missing(results["unreadable"])
    rows, judged = [], _judged(results)
    for key in judged:
        share = results.get(key)
        if isinstance(share, (int, float)):
            width = 100 * min(max(share, 0), 1)
            rows.append(
                f"<tr{' class=main' if key == 'all_right' else ''}><th>{page.escape(key.replace('_', ' '))}</th>"
                f'<td class="number">{_percent(share)}</td>'
                f'<td class="bar"><span><i style="width:{width:.1f}%"></i></span></td></tr>'
            )
    shown = in_table(results) | {*judged, "suite", "per_prompt", "per_clip", "notes", "grid"}
    others = {
        k.replace("_", " "): len(v) if isinstance(v, list) else v
        for k, v in results.items()
        if k not in shown and not (v is None or isinstance(v, dict))
    }
    body = f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>' if rows else ""
    if others:
        named = " · ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in others.items())
        body += f'<p class="note" style="margin:14px 0 0">{page.escape(named)}</p>'
    body += _measured_table(results.get("table"))
    notes = results.get("notes")
    if isinstance(notes, list) and notes:
        body += f'<p class="note">{page.escape("Note: " + "; ".join(map(str, notes)) + ".")}</p>'
    per_prompt = results.get("per_prompt")
    if isinstance(per_prompt, list) and per_prompt and all(isinstance(p, dict) for p in per_prompt):
        head = list(dict.fromkeys(key for p in per_prompt for key in p))
        table = page.table(head, [[p.get(key) for key in head] for p in per_prompt[:PROMPTS_SHOWN]])
        cut = f", the first {PROMPTS_SHOWN}" if len(per_prompt) > PROMPTS_SHOWN else ""
        body += page.details(f"All {len(per_prompt)} prompts{cut}", table)
    if isinstance(card := results.get("scorecard"), dict):
        body += page.details("Scorecard: all that decides these figures", page.settings(_leaves(card)))
    return body


def _judged(results: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of JUDGED these results may have: none where nothing was parsed, since motion has other meanings too."""
    return JUDGED if "all_right" in results else ()


def in_table(results: Mapping[str, Any]) -> set[str]:
    """Names of figures that a suite's own table shows: temporal_flickering and real_…, heldout_loss/9x32x32."""
    found = results.get("table")
    named = {str(row[0]) for row in found.get("rows") or () if row} if isinstance(found, dict) else set()
    return {name for name in results if {name.replace("_", " ").removeprefix("real "), name.partition("/")[2]} & named}


def _measured_table(found: Any) -> str:
    """A suite's own table, {"head", "rows"}."""
    if not isinstance(found, dict) or not found.get("rows"):
        return ""
    return page.table(found["head"], found["rows"])


def _history(history: Sequence[Judgement]) -> str:
    known = [key for j in history for key in (*_judged(j.results), *FIGURES) if key in j.results]
    keys = [key for key in (*JUDGED, *FIGURES) if key in known]
    if len(history) < 2 or not keys:
        return ""

    def show(key: str, value: float) -> str:
        return _percent(value) if key in JUDGED else f"{value:.4g}"

    rows = [
        [
            "newest" if j.step is None else f"{j.step:,}",
            *(show(k, j.results[k]) if isinstance(j.results.get(k), (int, float)) else "–" for k in keys),
        ]
        for j in history
    ]
    table = page.table(["step", *(key.replace("_", " ") for key in keys)], rows)
    return f"<h3>Over time</h3>{table}"


def _loss_section(rows: Sequence[Mapping[str, Any]]) -> str:
    title = "Loss"
    train, held_out = _column(rows, "loss"), _column(rows, "heldout_loss")
    series = [*_smoothed("training", train), plots.Series("held-out", held_out, "b")]
    linear = plots.line_chart(series)
    if not linear:
        return page.section(title, page.missing("No loss was logged yet."))
    log = plots.line_chart(series, log=True) or page.missing("No loss above 0, so nothing to show on a log axis.")
    legend = '<span><i class="a"></i>training</span>'
    if _known(rows, "heldout_loss"):
        legend += '<span><i class="b"></i>held-out</span>'
    bad = sum(y is None for _, y in train)
    axis = (
        '<div class="axis"><input type="radio" name="axis" id="linear" class="linear" checked>'
        '<label for="linear">linear</label><input type="radio" name="axis" id="log" class="log">'
        f'<label for="log">log</label><span class="legend">{legend}</span>'
        f'<div class="view linear">{linear}</div><div class="view log">{log}</div></div>'
    )
    notes = []
    if not _known(rows, "heldout_loss"):
        notes.append("No held-out loss: config.train.eval_every says how often to measure it.")
    if bad:
        notes.append(f"{bad} logged {'loss was' if bad == 1 else 'losses were'} not finite; the line has gaps there.")
    note = f'<p class="note">{page.escape(" ".join(notes))}</p>' if notes else ""
    cards = [page.card(axis, note)]
    if _known(rows, "heldout_psnr"):
        cards.append(_charts(_chart(rows, "heldout_psnr", "PSNR of held-out clips, dB", "{:.1f}".format, (440, 200))))
    return page.section(title, *cards)


def _speed_section(rows: Sequence[Mapping[str, Any]]) -> str:
    return page.section(
        "Speed",
        _charts(
            _chart(rows, "tokens_per_second", "Tokens a second", si),
            _chart(rows, "mfu", "Model FLOPs utilisation", _percent),
            _chart(rows, "data_wait_fraction", "Time spent waiting for data", _percent),
        ),
    )


def _optimisation_section(rows: Sequence[Mapping[str, Any]]) -> str:
    return page.section(
        "Optimisation",
        _charts(
            _chart(rows, "grad_norm", "Gradient norm", "{:.3g}".format, (440, 200)),
            _chart(rows, "lr", "Learning rate", "{:.2g}".format, (440, 200), noisy=False),
        ),
    )


def _charts(*charts: str) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _smoothed(name: str, points: list[tuple[float, float | None]]) -> list[plots.Series]:
    """The points faintly, and their running mean over them."""
    smooth = plots.Series(name, plots.smooth(points, len(points) // 50))
    return [plots.Series("as logged", points, "faint", label=False), smooth]


def _chart(
    rows: Sequence[Mapping[str, Any]],
    name: str,
    title: str,
    show: Callable[[float], str],
    size: tuple[int, int] = (300, 180),
    noisy: bool = True,
) -> str:
    points = _column(rows, name)
    series = _smoothed(title, points) if noisy else [plots.Series(title, points)]
    drawn = plots.line_chart(series, show=show, zero=True, size=size)
    return page.card(f"<h3>{title}</h3>", drawn or page.missing(f"No {name} was logged."))


def _facts_section(title: str, facts: Any, absent: str) -> str:
    if facts is None:
        return page.section(title, page.missing(absent))
    return page.section(title, page.card(page.settings(_leaves(facts))))


def _config_section(config: Any) -> str:
    flat = _leaves(config)
    defaults = _leaves(json.loads(configs.to_json(configs.base())))
    changed = {k: v for k, v in flat.items() if k not in defaults or defaults[k] != v}
    if changed:
        top = page.card("<h3>Changed from the defaults</h3>", page.settings(changed))
    else:
        top = '<p class="note">All settings are at their defaults.</p>'
    return page.section("Config", top, page.details(f"All {len(flat)} settings", page.card(page.settings(flat))))


def _percent(share: float) -> str:
    """0.854 → 85.4 %; no decimals where there are none to see."""
    return re.sub(r"\.0$", "", f"{100 * share:.1f}") + "\N{NO-BREAK SPACE}%"
