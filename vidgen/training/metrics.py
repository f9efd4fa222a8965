"""What a run tells of itself: metrics.jsonl, TensorBoard, Weights & Biases where wanted, and a line on the terminal."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import struct
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from vidgen.config import ConfigError
from vidgen.data import decode
from vidgen.training import incidents
from vidgen.training.journal import Journal, complain

FILE = "metrics.jsonl"


def read(workdir: str) -> list[dict[str, Any]]:
    """The rows of WORKDIR/metrics.jsonl, oldest first: "step" and what was measured, None where it was not finite.

    No file, no rows. A last line without its end, as a killed run leaves it, is no row yet. A line that is none, as
    file systems leave one after a crash, is passed over: it costs no other, and no run its end.
    """
    return [row for _, row in _rows(os.path.join(workdir, FILE)) if row is not None]


class MetricWriter:
    """Writes a run's metrics; one process of a run has one.

    No call waits for the disk but `flush`, `resume` and `close`. A disk that refuses rows, even for long, ends nothing
    and loses none: they are kept in memory and written when there is room (training/journal.py). Use `resume` before
    the first row of a run that goes on.
    """

    def __init__(
        self,
        workdir: str,
        *,
        wandb_project: str = "",
        config_json: str = "",
        say: Callable[[str], None] = complain,
    ):
        """Opens WORKDIR/metrics.jsonl for appending and a new event file in WORKDIR/tensorboard.

        Args:
          workdir: made where it is missing.
          wandb_project: also log to this project of Weights & Biases; a workdir is one run there, resumed or not.
          config_json: the config, shown there.
          say: is told of a disk that refuses, and that it does no more; from another thread.

        Raises ConfigError if the workdir can't be written or wandb isn't installed.
        """
        self._workdir, self._step, self._say = workdir, 0, say
        self._path = os.path.join(workdir, FILE)
        events = os.path.join(workdir, "tensorboard")
        self._wandb = _start_wandb(workdir, wandb_project, config_json) if wandb_project else None
        try:
            os.makedirs(events, exist_ok=True)
        except OSError as e:
            raise _unwritable(workdir, e.strerror or str(e)) from None

        self._opened = False
        self._rows = Journal(self._path, say=self._told)
        self._events = Journal(os.path.join(events, f"events.out.tfevents.{time.time_ns()}"), "events", say=self._told)
        self._event(file_version="brain.Event:2")
        for journal in (self._rows, self._events):
            if journal.flush():
                why = journal.trouble or "the disk does not answer"
                self._rows.close(0.0)
                self._events.close(0.0)
                raise _unwritable(journal.path, why)
        self._opened = True

    def resume(self, step: int) -> None:
        """Makes room for `step` and all after it: what was written of them, in this attempt or before, is dropped.

        Where the disk does not let them be found or go, that is said, and they stay. Lines that are no rows are told
        of.
        """
        self._rows.flush()
        start, why = None, "the disk does not answer"
        try:
            start, strange = _start_of(self._path, step)
            if strange:
                self._told(f"{self._path}: {strange} of its lines are no rows, and are passed over")
        except OSError as e:
            why = e.strerror or str(e)
        if not self._rows.cut(start, lambda line: json.loads(line)["step"] < step) or start is None:
            self._told(f"{self._path}: {why}; its rows of step {step} and later stay")
        self._event(step=step, session_log=SessionLog(status=SessionLog.START))  # TensorBoard purges from here

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends a row: `step` and `values`, name → number (scalars of NumPy and JAX too; non-finite ones as null)."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._step = int(step)
        self._rows.append((json.dumps({"step": self._step, **finite}, allow_nan=False) + "\n").encode())
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()])
        self._event(step=step, summary=summary)
        if self._wandb:
            self._wandb.log(numbers, step=int(step))

    def videos(self, step: int, videos: Mapping[str, np.ndarray], fps: float) -> None:
        """Shows clips beside the curves: name → [T,H,W,3] u8. TensorBoard plays them as animated GIF images."""
        gifs = {name: decode.encode_gif(video, fps) for name, video in videos.items()}
        images = [
            Summary.Value(
                tag=name,
                image=Summary.Image(
                    height=video.shape[1], width=video.shape[2], colorspace=3, encoded_image_string=gifs[name]
                ),
            )
            for name, video in videos.items()
        ]
        self._event(step=step, summary=Summary(value=images))
        if self._wandb:
            import wandb

            shown = {name: wandb.Video(io.BytesIO(gif), format="gif") for name, gif in gifs.items()}
            self._wandb.log(shown, step=int(step))

    def flush(self) -> int:
        """Has every row on the disk itself when it returns, as a checkpoint wants it, or says how many are not yet."""
        return self._rows.flush()

    def close(self) -> int:
        """Ends all of it; how many rows are lost, which is said too. The writer can't be used after."""
        lost = self._rows.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()
        return lost

    def _told(self, text: str) -> None:
        """Passes on what a journal says of its disk; at the start, where it ends the run, it is said there."""
        if self._opened:
            self._say(text)
            incidents.record(self._workdir, self._step, "disk", text)

    def _event(self, **fields: Any) -> None:
        data = Event(wall_time=time.time(), **fields).SerializeToString()
        size = struct.pack("<Q", len(data))
        parts = size, struct.pack("<I", masked_crc32c(size)), data, struct.pack("<I", masked_crc32c(data))
        self._events.append(b"".join(parts))


class Progress:
    """The line on the terminal: where a run is, how well and how fast it goes, and when it will be done.

    On a terminal one line is written over and over; in a file or a log every update is a line of its own.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Counts up to `total_steps`, from `start_step` on, to `stream` (None: stderr); `clock` gives seconds."""
        self._total, self._start, self._clock = total_steps, start_step, clock
        self._stream = stream if stream is not None else sys.stderr
        self._tty = self._stream.isatty()
        self._open = False  # whether the cursor stands at the end of a line that may be written over
        self._origin: tuple[int, float] | None = None

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows that `step` steps are done. Of `values`: loss, tokens_per_second, mfu, data_wait_fraction, goodput."""
        line = " | ".join([_place(step, self._total), *_shown(values), f"eta {self._eta(step)}"])
        if self._tty:
            # Only a line shorter than the terminal can be written over.
            self._stream.write("\r\x1b[2K" + line[: shutil.get_terminal_size().columns - 1])
            self._open = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Prints a line of its own, which stays."""
        self._stream.write(("\r\x1b[2K" if self._open else "") + text + "\n")
        self._open = False
        self._stream.flush()

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
        self._open = False

    def _eta(self, step: int) -> str:
        # Counted from the first update, not from the start: the first step compiles, the others don't.
        now = self._clock()
        if self._origin is None or step < self._origin[0]:
            self._origin = (step, now)
        done = step - self._origin[0]
        return duration((now - self._origin[1]) / done * (self._total - step)) if done else "–"


def _place(step: int, total: int) -> str:
    return f"step {step}/{total} {100 * step // max(total, 1)}%"


def _shown(values: Mapping[str, Any]) -> list[str]:
    """The parts of the line that `values` has."""
    formats = {
        "loss": lambda v: f"loss {v:.4f}",
        "tokens_per_second": lambda v: f"{si(v)} tok/s",
        "mfu": lambda v: f"mfu {100 * v:.0f}%",
        "data_wait_fraction": lambda v: f"data wait {100 * v:.1f}%",
        "goodput": lambda v: f"goodput {100 * v:.0f}%",
    }
    return [show(float(values[name])) for name, show in formats.items() if values.get(name) is not None]


def si(value: float) -> str:
    """Three digits and a unit: 12300 → 12.3k."""
    for factor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """45s, 3m20s, 2h05m, 3d04h."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def _rows(path: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(byte at which it begins, row) of each line that has an end; None where it is no JSON object with a step."""
    try:
        with open(path, "rb") as f:
            lines = f.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return
    start = 0
    for line in lines:
        try:
            row = json.loads(line)
            yield start, row | {"step": int(row["step"])}
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            yield start, None
        start += len(line) + 1


def _start_of(path: str, step: int) -> tuple[int, int]:
    """(the byte of metrics.jsonl at which the rows of `step` and later begin, how many lines before are no rows)."""
    strange = 0
    for start, row in _rows(path):
        strange += row is None
        if row is not None and row["step"] >= step:
            return start, strange
    with open(path, "rb") as f:
        whole = f.read().rpartition(b"\n")
    return len(whole[0]) + len(whole[1]), strange


def _start_wandb(workdir: str, project: str, config_json: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"config.train.wandb={project!r} needs the package wandb: pip install 'vidgen[wandb]'"
        ) from None
    # The id makes the resumed run the same run.
    path = os.path.join(workdir, "wandb_id")
    try:
        os.makedirs(workdir, exist_ok=True)
        if not os.path.exists(path):
            with open(path, "w", encoding="utf-8") as f:
                f.write(uuid.uuid4().hex[:8])
        with open(path, encoding="utf-8") as f:
            run = f.read().strip()
    except OSError as e:
        raise _unwritable(workdir, e.strerror or str(e)) from None
    config = json.loads(config_json) if config_json else None
    return wandb.init(project=project, dir=workdir, id=run, resume="allow", config=config)


def _unwritable(path: str, why: str) -> ConfigError:
    return ConfigError(f"cannot write to {path}: {why}")
