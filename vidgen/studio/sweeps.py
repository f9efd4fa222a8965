"""The table of a sweep on a terminal, while it runs."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from vidgen.training.metrics import duration, si

SHOWN = 20  # lines; of a longer sweep those that run, and the last that ended


class Table:
    """Shows how the runs of a sweep are doing: redrawn in place on a terminal, a line an event in a file or a log."""

    def __init__(self, names: Sequence[str], stream: TextIO | None = None):
        self._stream = stream if stream is not None else sys.stderr
        self._tty = self._stream.isatty()
        self._lines = 0
        self._told: dict[str, str] = {}
        self._begun = time.monotonic()
        self._before: int | None = None  # runs that had ended when it was shown first
        self._width = min(max(map(len, names), default=8), 60)

    def show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Shows all runs: a `row` and a `place` of `vidgen.sweep` each."""
        if self._tty:
            self._draw(rows)
        else:
            self._log(rows)

    def close(self) -> None:
        """Leaves what was drawn last standing."""
        self._lines = 0

    def costs(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """What each run will cost, for --dry_run."""
        lines = [f"{'run':<{self._width}}  parameters    steps   tokens     FLOPs  status"]
        lines += [
            f"{r['name'][: self._width]:<{self._width}}  {si(r['parameters']):>10} {r['steps']:>8,} "
            f"{si(r['tokens']):>8} {si(r['flops']):>9}  {r['status']}"
            for r in rows
        ]
        return "\n".join([*lines, f"{len(rows)} runs, {si(sum(r['flops'] for r in rows))}FLOPs in all"])

    def _draw(self, rows: Sequence[Mapping[str, Any]]) -> None:
        running = [r for r in rows if r["running"]]
        ended = [r for r in rows if r["status"] != "pending" and not r["running"]]
        columns, height = shutil.get_terminal_size()
        most = max(min(SHOWN, height - 2), 1)  # what has scrolled off can't be drawn over
        running = running[:most]
        shown = ended[max(0, len(ended) + len(running) - most) :] + running
        lines = [self._line(r) for r in shown] + [self._total(rows)]
        back = f"\x1b[{self._lines}F" if self._lines else ""
        self._stream.write(back + "".join(f"\x1b[2K{line[: columns - 1]}\n" for line in lines) + "\x1b[0J")
        self._stream.flush()
        self._lines = len(lines)

    def _log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for r in rows:
            state = "running" if r["running"] else r["status"]
            if self._told.get(r["name"], "pending") != state:
                self._stream.write(f"{self._line(r)}  [{self._total(rows)}]\n")
                self._stream.flush()
            self._told[r["name"]] = state

    def _line(self, r: Mapping[str, Any]) -> str:
        state = "running" if r["running"] else r["status"]
        line = f"{r['name'][: self._width]:<{self._width}}  {state:<8}"
        if r["running"] and "step" in r:
            return f"{line}  step {r['step']:,}  loss {_number(r.get('train_loss'))}"
        if r["status"] == "done":
            return f"{line}  held-out loss {_number(r.get('loss'))}  {duration(r.get('seconds') or 0)}"
        return f"{line}  {r['error'][:100]}" if r["error"] else line

    def _total(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Counts, and an ETA by the runs of this call: rough, since they are not alike."""
        done = sum(r["status"] == "done" for r in rows)
        failed = sum(r["status"] == "failed" and not r["running"] for r in rows)
        if self._before is None:
            self._before = done + failed
        new, left = done + failed - self._before, len(rows) - done - failed
        spent = time.monotonic() - self._begun
        eta = duration(spent / new * left) if new else "–"
        return f"{done} of {len(rows)} done, {failed} failed, {duration(spent)} so far, eta {eta}"


def _number(x: Any) -> str:
    return f"{x:.4f}" if isinstance(x, int | float) else "–"
