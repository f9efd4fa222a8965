"""Video files and their captions → shards that train.

Each file is read once, frame by frame: its times are put on an even grid, the grid is cut into clips, each clip is
scaled, cropped and encoded again with a short GOP. A file is in as a whole or out with a reason; all reasons are
counted. Everything is written into a directory of another name, which takes its own name when it is complete.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vidgen.config import ConfigError
from vidgen.data.captions import Entry, find
from vidgen.data.clip import BadClip
from vidgen.data.decode import Encoder, VideoInfo, probe, stream_frames, to_rgb
from vidgen.data.progress import Progress
from vidgen.data.shards import Row, ShardWriter, checksum

SHOWN = 20  # dropped files told of on stderr; dropped.jsonl has all


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of an input.

    Attributes:
      path: the directory of shards.
      accepted: entries (files, or rows of a table) that became clips.
      dropped: entries that didn't; accepted + dropped = all entries.
      reasons: short reason → how many entries it dropped.
      clips: clips written; an entry becomes one or several.
      frames: frames of all clips.
      seconds: length of all clips.
      leftover: frames of accepted entries that are in no clip: ends too short for a clip of their own.
      ignored: files of the input directory that are neither videos nor captions, by extension.
      bytes: size of the records.
    """

    path: str
    accepted: int
    dropped: int
    reasons: dict[str, int]
    clips: int
    frames: int
    seconds: float
    leftover: int
    ignored: dict[str, int]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Settings:
    """How clips are made; see `run`."""

    frames: int
    stride: int
    height: int
    width: int
    size: int
    fps: float
    gop: int
    crf: float


def run(
    input: str,
    output: str,
    *,
    frames: int = 129,
    stride: int = 0,
    height: int = 0,
    width: int = 0,
    size: int = 0,
    fps: float = 0.0,
    gop: int = 8,
    crf: float = 16.0,
    threads: int = 0,
) -> Result:
    """Ingests a directory or a table of captioned videos.

    Args:
      input: a directory with captions beside its files, or a CSV, TSV or JSON lines table; see `captions.find`.
      output: the directory of shards to make. Where it holds the result of the same ingest already, that is returned.
      frames: of a clip at most. Videos are cut into such clips; what is left at the end is a shorter clip, unless it
        is less than a quarter of one.
      stride: frames from the start of a clip to the start of the next; 0: `frames`.
      height, width: of the clips. Both: scaled to cover, cropped at the centre. One: the other follows. None: as
        stored, or as `size` says.
      size: of the shorter side, the other follows.
      fps: frames a second that clips are resampled to, by repeating and leaving out frames; 0: the file's own, made
        even where it varies.
      gop: frames from one key frame of a clip to the next.
      crf: x264's constant quality of the clips, 0 (best) to 51.
      threads: files read at once; 0: one a core.

    Raises ConfigError for settings, input and output that cannot be used, a full disk, and an input with no clip in it.
    """
    settings = Settings(frames, stride or frames, height, width, size, fps, gop, crf)
    _check(settings)
    if not input or not output:
        raise ConfigError("ingest needs --input DIR|CSV|JSONL and --output DIR")
    entries, ignored = find(input)
    identity = _identity(entries, settings)
    out = Path(output)
    if (done := _existing(out, identity)) is not None:
        print(f"{out}: already holds this ingest; nothing to do", file=sys.stderr)
        return done
    with _building(out) as work:
        result = _write(entries, settings, work, threads or os.cpu_count() or 1)
        result = dataclasses.replace(result, path=str(out), ignored=ignored)
        if not result.accepted:
            raise ConfigError(f"--input {input}: no clip came of {result.dropped} files: {_counts(result.reasons)}")
        manifest = {"identity": identity, "settings": vars(settings), "result": dataclasses.asdict(result)}
        (work / "ingest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
    print(summary(result))
    return result


def summary(result: Result) -> str:
    """The result in a few lines for people."""
    lines = [
        f"{result.path}: {result.clips} clips, {result.seconds / 3600:.2f} h, {result.bytes / 2**20:.1f} MiB",
        f"accepted {result.accepted} files, dropped {result.dropped}"
        + (f": {_counts(result.reasons)}; see {Path(result.path) / 'dropped.jsonl'}" if result.dropped else ""),
    ]
    if result.leftover:
        lines.append(f"{result.leftover} frames at the ends of videos were too few for a clip of their own")
    if result.ignored:
        lines.append(f"neither videos nor captions: {_counts(result.ignored)}")
    return "\n".join(lines)


def cut(shots: list[tuple[int, int]], frames: int, stride: int) -> list[tuple[int, int]]:
    """Clips of a video, as (first frame, frames).

    Args:
      shots: stretches [start, stop) of frames that no clip may reach beyond. `convert` gives the whole video as one;
        a detector of scene cuts has its place there.
      frames: of a clip at most.
      stride: from clip to clip.
    """
    clips = []
    for start, stop in shots:
        whole = [(first, frames) for first in range(start, stop - frames + 1, stride)]
        rest = whole[-1][0] + stride if whole else start
        fresh = stop - max(rest, sum(whole[-1])) if whole else frames
        # The end of a shot: a clip of its own if it shows enough that is new, or is all there is.
        clips += whole + [(rest, stop - rest)] * (rest < stop and 4 * fresh >= frames)
    return clips


def resample(info: VideoInfo, fps: float, start: float = 0.0, end: float | None = None) -> tuple[np.ndarray, float]:
    """Which frame of the file each frame of an even grid shows, and the grid's frames a second.

    Each frame goes to the nearest place of the grid; a place shows the last frame that came to it or before it.
    `start` and `end` are seconds since the first frame; fps 0 keeps the file's own.

    Raises BadClip("empty time range") if nothing is left.
    """
    rate = fps or info.fps
    end = min(info.duration if end is None else end, info.duration)
    count = round((end - start) * rate)
    if info.frames == 1 and start == 0:
        return np.zeros(1, np.int64), rate
    if count < 1:
        raise BadClip("empty time range")
    places = np.floor((info.times - start) * rate + 0.5)
    shown = np.searchsorted(places, np.arange(count), side="right") - 1
    return np.maximum(shown, 0), rate


def fit(info: VideoInfo, settings: Settings) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) to scale a video to, and to crop it to then. Scaling makes pixels square."""
    height, width = info.height, info.width * info.aspect
    if settings.height and settings.width:
        scale = max(settings.height / height, settings.width / width)
    elif settings.height or settings.width:
        scale = settings.height / height or settings.width / width
    elif settings.size:
        scale = settings.size / min(height, width)
    else:
        return (info.height, info.width), (info.height, info.width)
    scaled = (max(1, round(height * scale)), max(1, round(width * scale)))
    return scaled, (settings.height or scaled[0], settings.width or scaled[1])


def convert(
    entry: Entry, settings: Settings, spool: Path, stopped: Callable[[], bool] = lambda: False
) -> tuple[list[tuple[Row, int]], int]:
    """Cuts and encodes one entry; its clips' videos stand one after another in the file `spool`.

    Returns the clips' rows, each with its length in bytes, and how many frames are in no clip. Gives up soon once
    `stopped` says so. Raises BadClip for a file that cannot be used whole.
    """
    if entry.problem:
        raise BadClip(entry.problem)
    info = probe(entry.path)
    shown, fps = resample(info, settings.fps, entry.start, entry.end)
    clips = cut([(0, len(shown))], settings.frames, settings.stride)
    scaled, cropped = fit(info, settings)
    waiting, opened, rows = collections.deque(clips), collections.deque(), []
    with spool.open("wb") as file:
        for k, image in enumerate(_images(entry.path, info, shown, scaled, cropped)):
            if stopped():
                raise BadClip("interrupted")
            if waiting and waiting[0][0] == k:
                opened.append((waiting.popleft(), Encoder(*cropped, fps, **_codec(settings))))
            for _, encoder in opened:
                encoder.add(image)
            while opened and k == sum(opened[0][0]) - 1:
                (start, length), encoder = opened.popleft()
                video = encoder.finish()
                if probe(video).frames != length:
                    raise BadClip("encoding lost frames")
                seconds = entry.start + start / fps
                name = f"{entry.source}@{seconds:.3f}s+{length}"
                row = Row(name, length, *cropped, fps, entry.caption, checksum(video), entry.source, round(seconds, 6))
                rows.append((row, file.write(video)))
    covered = np.zeros(len(shown), bool)
    for start, length in clips:
        covered[start : start + length] = True
    return rows, int((~covered).sum())


def _codec(settings: Settings) -> dict:
    return {"gop": settings.gop, "crf": settings.crf, "full_chroma": True}


def _images(path: Path, info: VideoInfo, shown: np.ndarray, scaled, cropped) -> Iterator[np.ndarray]:
    """The frames that `shown` names, one by one, each [H,W,3] u8 scaled and cropped."""
    y, x = ((s - c) // 2 for s, c in zip(scaled, cropped, strict=True))
    first, k = int(shown[0]), 0
    for place, frame in enumerate(stream_frames(path, info, first, int(shown[-1]) + 1), first):
        if shown[k] == place:
            image = to_rgb(frame, *scaled)[y : y + cropped[0], x : x + cropped[1]]
        while k < len(shown) and shown[k] == place:
            yield image
            k += 1


def _write(entries: list[Entry], settings: Settings, work: Path, threads: int) -> Result:
    """Converts all entries, several at once, and writes them in their order."""
    writer, reasons = ShardWriter(work), collections.Counter()
    accepted, clips, frames, seconds, leftover = 0, 0, 0, 0.0, 0
    seen = collections.Counter()
    sizes = [stat.st_size if (stat := _stat(e.path)) else 0 for e in entries]
    progress, read = Progress("ingest", sum(sizes)), 0
    with (
        _ordered(entries, settings, work, threads) as results,
        (work / "dropped.jsonl").open("w", encoding="utf-8") as log,
    ):
        for entry, size, result in zip(entries, sizes, results, strict=True):
            read += size
            if isinstance(result, BadClip):
                reasons[str(result)] += 1
                detail = entry.detail or " ".join(str(result.__cause__ or "").split())
                line = {"file": entry.source, "reason": str(result), "detail": detail}
                log.write(json.dumps(line, ensure_ascii=False) + "\n")
                if reasons.total() <= SHOWN:
                    print(f"dropped {entry.source}: {result}" + f" ({detail})" * bool(detail), file=sys.stderr)
                continue
            rows, left, spool = result
            accepted, leftover = accepted + 1, leftover + left
            with spool.open("rb") as file:
                for row, length in rows:
                    seen[row.id] += 1
                    if seen[row.id] > 1:  # another row of the table with the same stretch of the same file
                        row = dataclasses.replace(row, id=f"{row.id}#{seen[row.id]}")
                    writer.add(row, file.read(length))
                    clips, frames, seconds = clips + 1, frames + row.frames, seconds + row.frames / row.fps
            spool.unlink()
            progress.update(read, f"{accepted + reasons.total()}/{len(entries)} files · {clips} clips")
    progress.close()
    size = writer.finish()
    dropped = reasons.total()
    return Result("", accepted, dropped, dict(reasons.most_common()), clips, frames, seconds, leftover, {}, size)


@contextlib.contextmanager
def _ordered(entries: list[Entry], settings: Settings, work: Path, threads: int) -> Iterator[Iterator]:
    """`convert` of all entries in order, at most `threads` at work and as many again waiting to be written.

    PyAV lets other threads run while it decodes, scales and encodes.
    """

    stop = threading.Event()

    def one(number: int):
        spool = work / f"spool-{number}"
        try:
            return *convert(entries[number], settings, spool, stop.is_set), spool
        except OSError:  # of the disk: no fault of the file
            raise
        except Exception as error:
            spool.unlink(missing_ok=True)
            bad = BadClip("unexpected error")
            bad.__cause__ = error
            return error if isinstance(error, BadClip) else bad

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:

        def results():
            pending, numbers = collections.deque(), iter(range(len(entries)))
            while True:
                while len(pending) < 2 * threads and (number := next(numbers, None)) is not None:
                    pending.append(pool.submit(one, number))
                if not pending:
                    return
                yield pending.popleft().result()

        try:
            yield results()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _building(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` if all goes well, and goes away otherwise."""
    work = out.absolute().parent / f".{out.name}.ingesting-{uuid.uuid4().hex[:8]}"
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
        try:
            yield work
            os.replace(work, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ConfigError(f"--output {out}: no space left on the disk; nothing was written") from None
        raise ConfigError(f"--output {out}: cannot write there: {error.strerror or error}") from None


def _existing(out: Path, identity: str) -> Result | None:
    """The result of the same ingest if `out` holds it, None if `out` is free; else a ConfigError."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return None
    try:
        manifest = json.loads((out / "ingest.json").read_text(encoding="utf-8"))
        if manifest["identity"] == identity:
            return Result(**manifest["result"] | {"path": str(out)})
        what = "holds another ingest (other files, captions or settings)"
    except (OSError, ValueError, KeyError, TypeError):
        what = "is not empty"
    raise ConfigError(f"--output {out}: {what}; name another directory, or remove it first")


def _identity(entries: list[Entry], settings: Settings) -> str:
    """A hash of all that decides the result."""
    digest = hashlib.sha256(json.dumps(vars(settings)).encode())
    for e in entries:
        stat = _stat(e.path)
        file = (stat.st_size, stat.st_mtime_ns) if stat else ()
        digest.update(json.dumps([e.source, e.caption, e.start, e.end, e.problem, file]).encode())
    return digest.hexdigest()


def _stat(path: Path) -> os.stat_result | None:
    """None where there is no such file, or can't be one."""
    try:
        return path.stat() if path.is_file() else None
    except OSError:  # a name that is too long
        return None


def _check(s: Settings) -> None:
    for name in ("frames", "stride", "gop"):
        if getattr(s, name) < 1:
            raise ConfigError(f"--{name}={getattr(s, name)}: expected 1 or more")
    for name in ("height", "width", "size"):
        if not 0 <= getattr(s, name) <= 16384:
            raise ConfigError(f"--{name}={getattr(s, name)}: expected pixels, 1 to 16384, or 0 for the file's own")
    if s.size and (s.height or s.width):
        raise ConfigError("--size says how long the shorter side is: give it, or --height and --width, not both")
    if not (0 <= s.fps <= 1000):
        raise ConfigError(f"--fps={s.fps}: expected frames a second, up to 1000, or 0 for the file's own")
    if not (0 <= s.crf <= 51):
        raise ConfigError(f"--crf={s.crf}: expected 0 (best) to 51")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items())
