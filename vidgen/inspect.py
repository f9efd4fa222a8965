"""What is in a set of clips, what was dropped and why, and a contact sheet to look at; of a workdir, what its run could
not read.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import html
import json
import os
import unicodedata
from pathlib import Path

import numpy as np

from vidgen.config import ConfigError, base
from vidgen.data import quarantine
from vidgen.data.clip import BadClip, Clip
from vidgen.data.decode import encode_png
from vidgen.data.sources import Source, open_source

SHOWN = 24  # clips on the contact sheet
TILE = 160  # pixels of a tile's longer side
BINS = 8  # rows of a histogram


@dataclasses.dataclass(frozen=True)
class Example:
    """A clip on the contact sheet: three tiles [h,w,3] u8 (first, middle, last frame), or the reason why not."""

    name: str
    caption: str
    size: str
    tiles: tuple[np.ndarray, ...]
    problem: str = ""


def run(dataset: str, output: str = "") -> dict:
    """Prints what `dataset` holds and writes contact_sheet.png and contact_sheet.html.

    Args:
      dataset: a directory of shards, tfds:NAME[/CONFIG][:VERSION], or moving_shapes. Or the workdir of a run: then what
        is printed, and returned, is what `unreadable` says.
      output: directory of the contact sheet; empty: the directory of shards, or the current one.

    Returns:
      What was printed, fit for JSON. For shards `accepted` and `dropped` count entries of the ingest's input (files, or
      rows of a table) and accepted + dropped is all of them; `clips` counts clips. Elsewhere all three count clips, and
      `dropped` are those that cannot be read. `reasons` says how often each reason dropped one. `unreadable` counts
      clips that were tried for the contact sheet and could not be read, by reason.

    Raises ConfigError for a dataset that isn't there, and a place that cannot be written.
    """
    if os.path.isfile(os.path.join(dataset, "config.json")):
        report = unreadable(dataset)
        print(_unreadable_text(report))
        return report
    data = base().data
    data.source = dataset
    source = open_source(data, "train")
    sizes = source.sizes
    good = np.flatnonzero(sizes.frames > 0)
    report = {"dataset": dataset, "clips": len(good), "accepted": len(good)} | _dropped(dataset, source)
    seconds = sizes.frames[good] / sizes.fps[good]
    report |= {
        "hours": float(seconds.sum() / 3600),
        "frames": int(sizes.frames[good].sum()),
        "lengths": _histogram("{} frames", sizes.frames[good]),
        "sizes": _histogram("{}x{}", sizes.height[good], sizes.width[good]),
        "aspects": _histogram("about {}:{}", *_aspects(sizes.width[good], sizes.height[good])),
        "fps": _histogram("{:g}", np.round(sizes.fps[good].astype(float), 2)),
        "caption_bytes": _spread(sizes.text[good]),
    }
    picked = good[np.unique(np.linspace(0, len(good) - 1, min(SHOWN, len(good))).astype(int))] if len(good) else good
    examples = [_example(source, int(i)) for i in picked]
    captions = _captions(dataset) or [e.caption for e in examples if e.caption]
    report["scripts"] = _counts(collections.Counter(map(script, captions)))
    report["unreadable"] = dict(collections.Counter(e.problem for e in examples if e.problem))
    report["examples"] = [{"name": e.name, "caption": e.caption, "size": e.size} for e in examples[:5]]
    folder = Path(output or (dataset if os.path.isdir(dataset) else "."))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sheet = folder / "contact_sheet.png"
        sheet.write_bytes(encode_png(_sheet(examples)))
        (folder / "contact_sheet.html").write_text(_page(report, examples), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot write the contact sheet: {error.strerror}") from None
    report["contact_sheet"] = str(sheet)
    print(_text(report))
    return report


def unreadable(workdir: str) -> dict:
    """What a run could not read: {"workdir", "quarantined", "reasons": {reason: clips}, "clips": all of them}.

    A clip is {"name", "index", "reason", "step"}: `step` is the first that missed it.
    """
    clips = quarantine.read(workdir)
    reasons = dict(collections.Counter(clip["reason"] for clip in clips).most_common())
    return {"workdir": workdir, "quarantined": len(clips), "reasons": reasons, "clips": clips}


def _unreadable_text(report: dict) -> str:
    clips = report["clips"]
    lines = [f"{report['workdir']}: {len(clips) or 'none'} of the clips that the run came to could not be read"]
    lines += [f"  {n:>8}  {reason}" for reason, n in report["reasons"].items()]
    lines += [f"  {c['name']} (index {c['index']}): {c['reason']}, first at step {c['step']}" for c in clips[:SHOWN]]
    if len(clips) > SHOWN:
        lines.append(f"all of them: {os.path.join(report['workdir'], quarantine.FILE)}")
    return "\n".join(lines)


def script(text: str) -> str:
    """The script that most letters of `text` are of, like Latin, CJK or Arabic; "none" where there are no letters."""
    names = (unicodedata.name(c, "unknown").split()[0] for c in text if c.isalpha())
    found = collections.Counter(name.split("-")[0] for name in names).most_common(1)
    if not found:
        return "none"
    return found[0][0] if len(found[0][0]) <= 3 else found[0][0].capitalize()


def _dropped(dataset: str, source: Source) -> dict:
    """What the ingest, or the scan of a TFDS dataset, could not use; overrides of `accepted` too."""
    path = Path(dataset) / "ingest.json"
    if path.is_file():
        try:
            result = json.loads(path.read_text(encoding="utf-8"))["result"]
            keys = ("accepted", "dropped", "reasons", "leftover", "ignored")
            found = {key: result[key] for key in keys}
            lines = (Path(dataset) / "dropped.jsonl").read_text(encoding="utf-8").split("\n")
            return found | {"dropped_files": [json.loads(line) for line in lines[:SHOWN] if line]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: not what vidgen ingest writes: {error}") from None
    reasons = getattr(source, "reasons", {})
    return {"dropped": sum(reasons.values()), "reasons": dict(reasons), "dropped_files": []}


def _captions(dataset: str) -> list[str]:
    """Every caption where an index has them."""
    if not os.path.isdir(dataset):
        return []
    from vidgen.data.shards import read_index

    return [row.caption for row in read_index(dataset)]


def _example(source: Source, index: int) -> Example:
    sizes = source.sizes
    size = f"{sizes.frames[index]} × {sizes.height[index]}x{sizes.width[index]}, {sizes.fps[index]:g} fps"
    try:
        clip = source.read(index, 0)
    except BadClip as bad:
        return Example(source.name(index), "", size, (), str(bad))
    return Example(source.name(index), clip.caption, size, _tiles(clip))


def _tiles(clip: Clip) -> tuple[np.ndarray, ...]:
    frames = len(clip.video)
    return tuple(_shrink(clip.video[i]) for i in sorted({0, frames // 2, frames - 1}))


def _shrink(image: np.ndarray) -> np.ndarray:
    """An image whose longer side is TILE: areas averaged where it shrinks, pixels repeated where it grows."""
    height, width = image.shape[:2]
    scale = TILE / max(height, width)
    for axis, new in ((0, max(1, round(height * scale))), (1, max(1, round(width * scale)))):
        old = image.shape[axis]
        edges = np.arange(new) * old // new
        if new < old:
            counts = np.diff(np.append(edges, old))
            sums = np.add.reduceat(image.astype(np.float32), edges, axis=axis)
            image = sums / counts.reshape([-1 if a == axis else 1 for a in range(3)])
        else:
            image = np.take(image, edges, axis=axis)
    return np.round(image).astype(np.uint8)


def _sheet(examples: list[Example]) -> np.ndarray:
    """All examples as one image, two clips a row of the sheet, their tiles side by side."""
    gap, cell = 4, TILE + 4
    rows = max(1, -(-len(examples) // 2))
    sheet = np.full((rows * cell + gap, 6 * cell + 3 * gap, 3), 255, np.uint8)
    for number, example in enumerate(examples):
        top, left = number // 2 * cell + gap, number % 2 * (3 * cell + gap) + gap
        for k, tile in enumerate(example.tiles):
            sheet[top : top + tile.shape[0], left + k * cell : left + k * cell + tile.shape[1]] = tile
    return sheet


def _page(report: dict, examples: list[Example]) -> str:
    """A page that needs no other file; captions of any script stand as they are, written in their own direction."""
    cards = []
    for example in examples:
        data = (base64.b64encode(encode_png(tile)).decode() for tile in example.tiles)
        tiles = "".join(f'<img alt="" src="data:image/png;base64,{d}">' for d in data)
        text = html.escape(example.caption) or f"<em>{html.escape(example.problem)}</em>"
        about = f"{html.escape(example.name)} · {example.size}"
        cards.append(f'<figure>{tiles}<figcaption dir="auto">{text}</figcaption><small>{about}</small></figure>')
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em}figure{margin:0 0 2em}"
        "main{display:grid;grid-template-columns:repeat(auto-fill,minmax(31em,1fr));gap:1em}"
        "img{margin:0 4px 4px 0;vertical-align:top}figcaption{max-height:9em;overflow:auto;overflow-wrap:anywhere}"
        "small{color:#666}pre{white-space:pre-wrap}"
    )
    title = html.escape(f"Clips of {report['dataset']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1><pre>{html.escape(_text(report))}</pre><main>{''.join(cards)}</main></html>\n"
    )


def _aspects(width: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of the usual aspect ratios, as (width, height)."""
    usual = np.array([(1, 3), (9, 21), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (21, 9), (3, 1)])
    edges = np.log(usual[:, 0] / usual[:, 1])
    nearest = np.searchsorted((edges[1:] + edges[:-1]) / 2, np.log(width / np.maximum(height, 1)))
    return usual[nearest, 0], usual[nearest, 1]


def _histogram(form: str, *columns: np.ndarray) -> dict[str, int]:
    """How often each row of the columns occurs, written as `form` says."""
    rows, counts = np.unique(np.stack(columns, -1), axis=0, return_counts=True)
    return _counts(
        collections.Counter({form.format(*r): n for r, n in zip(rows.tolist(), counts.tolist(), strict=True)})
    )


def _counts(counter: collections.Counter) -> dict[str, int]:
    """The most frequent values and how often each occurs; the rest as "others"."""
    ranked = counter.most_common()
    shown = dict(ranked[: BINS if len(ranked) <= BINS else BINS - 1])
    rest = counter.total() - sum(shown.values())
    return shown | ({"others": rest} if rest else {})


def _spread(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {"least": int(values.min()), "median": int(np.median(values)), "most": int(values.max())}


def _text(report: dict) -> str:
    """The report for people."""
    hours, frames = report["hours"], report["frames"]
    length = f"{hours:.1f} h" if hours >= 1 else f"{hours * 3600:.1f} s"
    lines = [f"{report['dataset']}: {report['clips']} clips, {length}, {frames} frames"]
    for key in ("lengths", "sizes", "aspects", "fps", "scripts"):
        lines += [f"{key}:"] + [f"  {n:>8}  {value}" for value, n in report[key].items()]
    spread = report["caption_bytes"]
    lines.append("captions: " + ", ".join(f"{name} {n} bytes" for name, n in spread.items()))
    lines += [f"  {e['name']}: {e['caption'][:100]}" + "…" * (len(e["caption"]) > 100) for e in report["examples"]]
    lines.append(f"accepted {report['accepted']}, dropped {report['dropped']}")
    lines += [f"  {n:>8}  {reason}" for reason, n in report["reasons"].items()]
    lines += [
        f"  {f['file']}: {f['reason']}" + f" ({f['detail']})" * bool(f["detail"]) for f in report["dropped_files"]
    ]
    if report.get("leftover"):
        lines.append(f"{report['leftover']} frames at the ends of videos were too few for a clip of their own")
    if report.get("ignored"):
        lines.append("neither videos nor captions: " + ", ".join(f"{n} {k}" for k, n in report["ignored"].items()))
    if report["unreadable"]:
        bad = ", ".join(f"{n} {reason}" for reason, n in report["unreadable"].items())
        lines.append(f"unreadable among the {min(SHOWN, report['clips'])} clips tried: {bad}")
    if "contact_sheet" in report:
        lines.append(f"contact sheet: {report['contact_sheet']}, and .html beside it")
    return "\n".join(lines)
