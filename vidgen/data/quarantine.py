"""Which clips of a run could not be read: WORKDIR/quarantine.jsonl, a line a clip.

A line is {"name", "index", "reason", "step"}: what the clip is called, its number in the source, why it is left out,
and the first step that missed it. Process N > 0 of several writes quarantine-N.jsonl, since lines that several append
to one file of a shared disk may mix; process 0 copies what they hold into its own at the start and at the end of a run,
and `read` sees all of them at any time.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
from collections.abc import Iterable
from typing import Any

from vidgen import lines
from vidgen.data.stream import FeedInfo

FILE = "quarantine.jsonl"
FIELDS = {"name": str, "index": int, "reason": str, "step": int}


class Quarantine:
    """Notes the clips that a run could not read, each once, whatever is resumed.

    Nothing here ends a run: what a full disk refuses is kept, and written when there is room.
    """

    def __init__(self, workdir: str, rank: int = 0):
        """`rank`: of this process."""
        self._workdir, self._rank = workdir, rank
        self._path = os.path.join(workdir, FILE if rank == 0 else f"quarantine-{rank}.jsonl")
        self._fold()
        self._known = {line["index"] for line in read(workdir)}
        self._waiting: list[dict[str, Any]] = []
        self._told = False

    def add(self, step: int, info: FeedInfo) -> None:
        """Notes the unreadable clips of a step's batch, `step` counted from 1. At once where there are none."""
        for (name, reason), index in zip(info.bad_clips, info.bad_indices, strict=True):
            if index not in self._known:
                self._known.add(index)
                self._waiting.append({"name": name, "index": index, "reason": reason, "step": step})
        if self._waiting:
            self._write()

    def close(self) -> None:
        """Writes what still waits, and what other processes have noted by now into the file of process 0."""
        if self._waiting:
            self._write()
        self._fold()

    def _write(self) -> None:
        data = _lines(self._waiting)
        try:
            os.makedirs(self._workdir, exist_ok=True)
            lines.append(self._path, data, sync=True)
        except OSError as e:
            if not self._told:
                logging.getLogger("absl").warning(
                    "%s: %s; what could not be read is kept in memory until it can be written", self._path, e.strerror
                )
            self._told = True
            return
        self._waiting, self._told = [], False

    def _fold(self) -> None:
        """Process 0: what others' files hold into its own, in one move. Theirs stay: they may be writing."""
        if self._rank or _files(self._workdir) in ([], [self._path]):
            return
        part = f"{self._path}.part"
        with contextlib.suppress(OSError):  # a full disk: `read` finds it where it is
            try:
                with open(part, "wb") as file:
                    file.write(_lines(read(self._workdir)))
                os.replace(part, self._path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(part)


def read(workdir: str) -> list[dict[str, Any]]:
    """All that is noted, {"name", "index", "reason", "step"}, each clip once, by index; of several lines the earliest.

    A line without its end, as a killed process or a full disk leaves it, is none.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in _files(workdir):
        for note in lines.read(path):
            try:
                note = {key: kind(note[key]) for key, kind in FIELDS.items()}
            except (ValueError, KeyError, TypeError):
                continue
            before = found.get(note["index"])
            if before is None or note["step"] < before["step"]:
                found[note["index"]] = note
    return [found[index] for index in sorted(found)]


def _files(workdir: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(workdir), "quarantine*.jsonl")))


def _lines(notes: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(note, ensure_ascii=False) + "\n" for note in notes).encode("utf-8", errors="replace")
