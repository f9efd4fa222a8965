"""What went wrong in a run and was survived: WORKDIR/incidents.jsonl, which the report shows."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

from vidgen import lines
from vidgen.training.journal import complain

FILE = "incidents.jsonl"
KEPT = 1000  # rows in memory while the disk refuses them

_lock = threading.Lock()
_kept: dict[str, list[str]] = {}  # by file: rows that it has refused


def record(workdir: str, step: int, kind: str, text: str, **more: Any) -> None:
    """Appends a row: {"time", "step", "kind", "text", …}, the time in seconds since 1970.

    Never raises for a disk's sake: a row that can't be written is kept and goes with the next one, which is said once.

    Args:
      workdir: of the run; one process of it records.
      step: about when.
      kind: a word or two, by which the report counts: "skipped step", "rollback", "restart", "disk", …
      text: a sentence for the reader.
      more: what else to know, as JSON has it.
    """
    path = os.path.join(workdir, FILE)
    row = {"time": round(time.time(), 3), "step": int(step), "kind": kind, "text": text} | more
    line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
    with _lock:
        before = _kept.get(path, [])
        try:
            lines.append(path, "".join([*before, line]).encode("utf-8", "backslashreplace"))
            _kept.pop(path, None)
        except OSError as e:
            _kept[path] = [*before, line][-KEPT:]
            if not before:
                complain(f"cannot write {path}: {e.strerror or e}; its rows are kept in memory until the next one")


def read(workdir: str) -> list[dict[str, Any]]:
    """The rows, oldest first; none where there is no file. What a kill left of a row is passed over."""
    rows = []
    for row in lines.read(os.path.join(workdir, FILE)):
        try:
            rows.append(row | {"time": float(row["time"]), "step": int(row["step"])})
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
    return [row for row in rows if "kind" in row and "text" in row]
