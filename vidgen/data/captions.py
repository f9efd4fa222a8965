"""Which captioned files there are to ingest: a folder with captions beside its files, or a table."""

from __future__ import annotations

import collections
import csv
import dataclasses
import difflib
import io
import json
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any

from vidgen.config import ConfigError
from vidgen.data.clip import BadClip

VIDEOS = frozenset(
    [".mp4", ".mov", ".m4v", ".mpg", ".mpeg", ".webm", ".mkv", ".avi", ".gif", ".ts", ".flv", ".wmv", ".3gp", ".ogv"]
)
IMAGES = frozenset([".png", ".jpg", ".jpeg", ".webp", ".bmp"])
TABLES = frozenset([".csv", ".tsv", ".jsonl", ".ndjson", ".json"])
# The usual names of columns, the likeliest first; case, blanks and dashes don't matter.
FILE = [
    "video",
    "path",
    "file",
    "file_name",
    "filename",
    "video_path",
    "video_file",
    "file_path",
    "filepath",
    "video_url",
    "url",
    "clip",
    "image",
    "media",
]
CAPTION = ["caption", "text", "prompt", "description", "captions", "title", "sentence", "label"]
START = ["start", "start_time", "start_sec", "start_seconds", "start_s", "begin"]
END = ["end", "end_time", "end_sec", "end_seconds", "end_s", "stop"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One captioned file, or a stretch of one.

    Attributes:
      path: the file.
      source: how the input names it: relative to the folder or the table.
      caption: cleaned text; empty where `problem` says why there is none.
      start, end: seconds; end is None for the end of the file.
      problem, detail: why the entry cannot be used, a short stable reason and what else is known; empty if it can.
    """

    path: Path
    source: str
    caption: str = ""
    start: float = 0.0
    end: float | None = None
    problem: str = ""
    detail: str = ""


def clean(text: str) -> str:
    """A caption on one line: NFC, runs of blanks and control characters become one space, broken surrogates go.

    Joiners and direction marks stay: Persian, Indic scripts and emoji need them. Raises BadClip("missing caption") if
    nothing is left that can be seen.
    """
    shown = (c for c in text if unicodedata.category(c) != "Cs" and c != "\ufeff")
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in shown)
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    if not any(unicodedata.category(c)[0] in "LNPS" for c in text):
        raise BadClip("missing caption")
    return text


def find(source: str | os.PathLike) -> tuple[list[Entry], dict[str, int]]:
    """All entries of a folder or a table, in a fixed order, and how many files of a folder were none, by extension.

    A folder is searched with all below it; NAME.txt or NAME.json (a string, or an object with a caption) holds the
    caption of NAME.mp4. A table is CSV, TSV, JSON lines or a JSON list of objects; its file names are relative to it.

    Raises ConfigError where there is nothing to read, or a table has no column of files or of captions.
    """
    path = Path(source)
    if not path.exists():
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"--input {path}: no such file or directory{hint}")
    try:
        if path.is_dir():
            return _folder(path)
        if path.suffix.lower() in TABLES:
            return _table(path), {}
    except OSError as error:
        raise ConfigError(f"--input {path}: {error.strerror}") from None
    raise ConfigError(f"--input {path}: expected a directory of videos, or a table ({' '.join(sorted(TABLES))})")


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def _folder(root: Path) -> tuple[list[Entry], dict[str, int]]:
    files = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
    media = [p for p in files if p.suffix.lower() in VIDEOS | IMAGES]
    if not media:
        raise ConfigError(f"--input {root}: no videos in it; expected files like {' '.join(sorted(VIDEOS))}")
    entries, used = [], set(media)
    for path in media:
        entry = Entry(path, _shown(path.relative_to(root).as_posix()))
        beside = next((p for p in (path.with_suffix(".txt"), path.with_suffix(".json")) if p.is_file()), None)
        used.add(beside)
        try:
            if beside is None:
                raise BadClip("missing caption")
            entries.append(dataclasses.replace(entry, caption=clean(_beside(beside))))
        except BadClip as bad:
            detail = f"in {beside.name}" if beside else f"no {path.stem}.txt or {path.stem}.json beside it"
            entries.append(dataclasses.replace(entry, problem=str(bad), detail=detail))
    others = collections.Counter(p.suffix.lower() or p.name for p in files if p not in used)
    return entries, dict(sorted(others.items()))


def _beside(path: Path) -> str:
    text = _text(path.read_bytes())
    if path.suffix == ".txt":
        return text
    try:
        value = json.loads(text)
    except ValueError as error:
        raise BadClip("caption is not JSON") from error
    if isinstance(value, dict):
        key = _column(value, CAPTION)
        value = value[key] if key is not None else ""
    return _caption(value)


def _text(data: bytes) -> str:
    """UTF-8, or UTF-16 with a byte order mark, as Windows writes it."""
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadClip("caption is not UTF-8") from error


def _caption(value: Any) -> str:
    """The one string that `value` is or holds."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list) and value:
        raise BadClip("several captions")  # which one is meant is not ours to say: one row of a table each
    if value is not None and not isinstance(value, str | int | float | list):
        raise BadClip("caption is not text")
    return str(value) if value is not None and value != [] else ""


def _column(names: Any, wanted: list[str]) -> str | None:
    """The first of the wanted names that is there, as it is spelt there."""
    have = {str(n).strip().lower().replace(" ", "_").replace("-", "_"): n for n in names if n is not None}
    return next((have[w] for w in wanted if w in have), None)


def _table(path: Path) -> list[Entry]:
    try:
        rows = list(_rows(path))
    except BadClip:
        raise ConfigError(f"--input {path}: not UTF-8 text") from None
    except csv.Error as error:
        raise ConfigError(f"--input {path}: {error}") from None
    if not rows:
        raise ConfigError(f"--input {path}: no rows in it")
    names = list(dict.fromkeys(name for row in rows for name in row))
    file, caption = _column(names, FILE), _column(names, CAPTION)
    for what, column, wanted in (("files", file, FILE), ("captions", caption, CAPTION)):
        if column is None:
            have = ", ".join(map(str, names))
            raise ConfigError(f"--input {path}: no column of {what} among {have}; expected one of {', '.join(wanted)}")
    start, end = _column(names, START), _column(names, END)
    return [_entry(path, number, row, file, caption, start, end) for number, row in enumerate(rows, 1)]


def _rows(path: Path) -> list[dict]:
    text = _text(path.read_bytes())
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        # Only line feeds and returns end a row, and a quote left open is an error rather than one endless caption.
        file, delimiter = io.StringIO(text, newline=""), "\t" if kind == ".tsv" else ","
        return list(csv.DictReader(file, delimiter=delimiter, strict=True))
    # Only line feeds end a line: captions may hold other separators.
    parts = [text] if kind == ".json" else text.split("\n")
    rows = []
    for number, part in enumerate(parts, 1):
        try:
            rows += [json.loads(part)] if part.strip() else []
        except ValueError as error:
            where = "" if kind == ".json" else f" line {number}"
            raise ConfigError(f"--input {path}{where}: not JSON: {error}") from None
    if kind == ".json":
        rows = rows[0] if rows else []
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise ConfigError(f"--input {path}: expected one JSON object a clip")
    return rows


def _entry(table: Path, number: int, row: dict, file: str, caption: str, start: str | None, end: str | None) -> Entry:
    name = str(row.get(file) or "").strip()
    path = table.parent / name
    source = _shown(os.path.normpath(name)) if name else f"row {number}"
    entry = Entry(path, source)
    try:
        if not name:
            raise BadClip("missing file name")
        if "://" in name:
            raise BadClip("not a local file")
        if not _nameable(name):
            raise BadClip("not a file name")
        if None in row:
            raise BadClip("too many columns")  # most often a caption with commas and no quotes
        seconds = [_seconds(row.get(column)) if column else None for column in (start, end)]
        begin, stop = seconds[0] or 0.0, seconds[1]
        if begin < 0 or stop is not None and stop <= begin:
            raise BadClip("empty time range")
        return dataclasses.replace(entry, caption=clean(_caption(row.get(caption))), start=begin, end=stop)
    except BadClip as bad:
        return dataclasses.replace(entry, problem=str(bad), detail=f"row {number} of {table.name}")


def _shown(name: str) -> str:
    """A file name as text that can be written, whatever bytes it has: what is no UTF-8 as \\udc80 and so on."""
    return name.encode("utf-8", errors="backslashreplace").decode()


def _nameable(name: str) -> bool:
    """Whether a file may be called so, wherever it lies."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _seconds(value: Any) -> float | None:
    """Seconds from a number or [[h:]m:]s; None where the cell is empty."""
    if value is None or str(value).strip() == "":
        return None
    try:
        total = 0.0
        for part in str(value).strip().split(":"):
            total = 60 * total + float(part)
    except ValueError as error:
        raise BadClip("time is not a number") from error
    if not -1e9 < total < 1e9:
        raise BadClip("time is not a number")
    return total
