"""`vidgen encode`: clips in, a cache of their latents out, so that training runs no VAE and no text encoder."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen import weights
from vidgen.config import ConfigError
from vidgen.data import latents
from vidgen.data.clip import BadClip
from vidgen.data.feed import cut, read_clip
from vidgen.data.latents import EncodedClip, Layout
from vidgen.data.progress import Progress
from vidgen.data.shards import disk_errors
from vidgen.data.sources import Source, open_source
from vidgen.text import frozen
from vidgen.text.frozen import FrozenEncoder
from vidgen.tokenizers import base as tokenizers
from vidgen.tokenizers.learned import LearnedTokenizer
from vidgen.training.resilience import only_one

CHUNK_PIXELS = 2**20  # that go through the VAE at once on each device, unless one clip has more
CLIP_PIXELS = 2**26  # of clips that are in memory at once for each device, unless one has more
SHOWN = 10  # bad clips named on the terminal


@dataclasses.dataclass(frozen=True)
class Result:
    """What a cache holds.

    Attributes:
      path: of the directory.
      clips: encoded, over all passes.
      passes: over the source.
      bad: reason → clips that could not be encoded; training leaves padding in their place, as it would online.
      refused: clips of a pass that have no whole token or no size in the index; packing never places them.
      captions_cut: captions that this call met and that are longer than config.rows.caption; none of bytes, which
        are cut in training.
      shards, bytes: of the records.
      encoded: clips that this call encoded; fewer than `clips` where it went on from an earlier one.
    """

    path: str
    clips: int
    passes: int
    bad: dict[str, int]
    refused: int
    captions_cut: int
    shards: int
    bytes: int
    encoded: int


def run(config: ConfigDict, output: str, *, passes: int = 1) -> Result:
    """Encodes the clips that `config` trains on, or goes on where an earlier call of the same stopped.

    Shards are finished one by one, whole or not at all, so a kill costs a part of one. A finished cache is left alone;
    with more `passes` than it holds, the further ones are added. What it holds of a clip is the largest clip of whole
    tokens in it, from its first frame and the middle of its pictures, and with config.text.name=t5 or umt5 the float32
    values of its caption.

    Args:
      config: of the denoiser that is to train; config.tokenizer.name is vae.
      output: directory of the cache, then config.data.latents.
      passes: over the source; more than 1 is of use where each pass shows other clips, as moving_shapes does.

    Raises ConfigError: a tokenizer that needs no cache, weights that can't be used, a directory that holds something
    else or a cache of something else (naming what differs), a full disk.
    """
    configs.check(config)
    if passes < 1:
        raise ConfigError(f"--passes={passes}: expected 1 or more")
    if not output:
        raise ConfigError("encode needs --output DIR")
    tokenizer = tokenizers.from_config(config.tokenizer)
    if not tokenizer.learned:
        raise ConfigError(
            f"config.tokenizer.name={config.tokenizer.name}: its latents are made in the step, and need no cache, "
            "and a text encoder remembers captions while it trains; expected vae"
        )
    text = frozen.from_config(config)
    source = open_source(config.data, "train")
    layout = Layout(source.sizes, tokenizer.geometry, text)
    if not len(layout.order):
        raise ConfigError(f"config.data.source={config.data.source}: no clip has a whole token")
    with _claimed(Path(output), latents.key(source, tokenizer, text)) as out:
        passes, encoded = _complete(out, source, layout, tokenizer, text, config, passes)
        return _result(out, layout, len(source.sizes), passes, encoded, text)


def summary(result: Result) -> str:
    """The result in a few lines for people."""
    bad = ", ".join(f"{count} {reason}" for reason, count in result.bad.items()) or "none"
    size = f"{result.bytes / 2**20:.1f} MiB in {result.shards} shards"
    cut = f"; captions cut to config.rows.caption: {result.captions_cut}" if result.captions_cut else ""
    return (
        f"{result.path}: {result.clips} clips in {result.passes} pass(es), {size}; bad: {bad}{cut}\n"
        f"train from it with --config.data.latents={result.path}"
    )


@contextlib.contextmanager
def _claimed(out: Path, key: dict[str, str]) -> Iterator[Path]:
    """Locks the directory for the cache of `key`, a new one or that which is there; raises ConfigError."""
    try:
        there = latents.read_json(out / latents.KEY)
    except FileNotFoundError:
        there = None
        if out.exists() and (not out.is_dir() or set(os.listdir(out)) - {"lock", f"{latents.KEY}.part"}):
            raise ConfigError(f"--output {out}: holds something else; name a new directory") from None
    if there is not None and (differ := latents.difference(there, key)):
        raise ConfigError(
            f"--output {out}: holds a cache of something else ({differ}); name another directory, or remove it first"
        )
    with only_one(str(out)):
        try:
            if there is None:
                _write_json(out / latents.KEY, key)
            yield out
        except OSError as e:
            raise ConfigError(f"--output {out}: {e.strerror or e}; finished shards are kept") from None


def _complete(
    out: Path,
    source: Source,
    layout: Layout,
    tokenizer: LearnedTokenizer,
    text: FrozenEncoder | None,
    config: ConfigDict,
    passes: int,
) -> tuple[int, int]:
    """Makes what is missing; (passes that the cache holds, clips encoded now)."""
    try:
        cache = latents.read_json(out / latents.CACHE)
        held, sizes = int(cache["passes"]), [shard["bytes"] for shard in cache["shards"]]
    except FileNotFoundError:
        held, sizes = 0, []
    except (KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"{out / latents.CACHE}: not what vidgen encode writes ({e}); remove it") from None

    def stands(number: int) -> bool:
        path = latents.shard_path(out, number)
        whole = path.exists() and path.with_suffix(".jsonl").exists()
        return whole and (number >= len(sizes) or path.stat().st_size == sizes[number])

    total = max(passes, held) * layout.shards
    missing = [n for n in range(total) if not stands(n)]
    if text and not (out / latents.TEXT).exists():
        _write_safetensors(out / latents.TEXT, {"empty": text.empty})
    if held >= passes and not missing:
        print(f"{out}: already holds {held} pass(es) of these clips; nothing to do", file=sys.stderr)
        return held, 0
    for left in out.glob("*.part"):
        left.unlink()
    if len(missing) < total:
        print(f"{out}: going on, {total - len(missing)} of {total} shards are there", file=sys.stderr)
    clips = [layout.shard(number)[1] for number in missing]
    size, free = int(sum(layout.bytes[layout.place[some]].sum() for some in clips)), shutil.disk_usage(out).free
    longest = " and captions, at most," if text else ""  # how long they are shows as they are read
    about = (
        f"{sum(map(len, clips))} clips to encode, {size / 2**30:.3g} GiB of latents{longest} in {len(missing)} shards"
    )
    if size > free:
        raise ConfigError(f"--output {out}: {about}, but {free / 2**30:.3g} GiB of disk are free")
    print(f"{out}: {about}", file=sys.stderr)

    counts = Counter()
    pixels = layout.fitted.prod(axis=1)
    progress = Progress("encode", float(sum(pixels[some].sum() for some in clips)))
    threads = max(config.data.threads, 1)
    with contextlib.closing(progress), concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for number in missing:
            with _shard(latents.shard_path(out, number)) as add:
                for clip, epoch, found in _encoded(source, layout, tokenizer, text, pool, number):
                    reason = str(found) if isinstance(found, BadClip) else ""
                    add(found, _row(source, layout, clip, epoch, reason))
                    counts.update(clips=1, pixels=int(pixels[clip]), bad=bool(reason))
                    if reason and counts["bad"] <= SHOWN:
                        print(f"left out {source.name(clip)}: {reason}", file=sys.stderr)
                    note = f"{counts['clips']} clips, {counts['bad']} bad · shard {number + 1} of {total}"
                    progress.update(counts["pixels"], note)
    _finish(out, layout, max(passes, held))
    return max(passes, held), counts["clips"]


def _encoded(
    source: Source,
    layout: Layout,
    tokenizer: LearnedTokenizer,
    text: FrozenEncoder | None,
    pool: concurrent.futures.Executor,
    number: int,
) -> Iterator[tuple[int, int, EncodedClip | BadClip]]:
    """(clip, pass, what came of it) of a shard in order; the next batch is read while one is encoded."""
    epoch, clips = layout.shard(number)

    def read(clip: int):
        try:
            return read_clip(source, clip, epoch)
        except BadClip as e:
            return e

    batches = list(_batches(clips.tolist(), layout.fitted, tokenizer))
    coming = [pool.submit(read, clip) for clip in batches[0]]
    for batch, following in itertools.zip_longest(batches, batches[1:], fillvalue=[]):
        reading, coming = coming, [pool.submit(read, clip) for clip in following]
        found = [future.result() for future in reading]
        good = [one for one in found if not isinstance(one, BadClip)]
        if good:
            size = layout.fitted[batch[0]].tolist()
            videos = [cut(one.video, 0, *size) for one in good]
            # Bad ones leave a gap that is filled up, so that the shape stays one that is compiled.
            videos += videos[:1] * (len(batch) - len(good))
            devices = jax.local_device_count()
            shared = devices if len(batch) % devices == 0 else 1
            moments = iter(tokenizer.encode_clips(np.stack(videos), shared))
            values = iter(text.encode([one.caption for one in good]) if text else [None] * len(good))
        for clip, one in zip(batch, found, strict=True):
            if isinstance(one, BadClip):
                yield clip, epoch, one
            else:
                yield clip, epoch, EncodedClip(next(moments), one.caption, one.fps, next(values))


def _batches(clips: list[int], fitted: np.ndarray, tokenizer: LearnedTokenizer) -> Iterator[list[int]]:
    """Neighbours of one size, as many at once as keep the devices busy; of what is left, a quarter, a sixteenth, … as
    many, so that few shapes are compiled and nothing is encoded twice."""
    for (frames, height, width), run in itertools.groupby(clips, key=lambda clip: tuple(fitted[clip].tolist())):
        chunk = min(frames, 1 + tokenizer.chunk(frames, height, width)) * height * width
        most = max(1, min(CHUNK_PIXELS // chunk, CLIP_PIXELS // (frames * height * width))) * jax.local_device_count()
        run = list(run)
        while run:
            while most > len(run):
                most = max(most // 4, 1)
            yield run[:most]
            run = run[most:]


@contextlib.contextmanager
def _shard(path: Path) -> Iterator[Callable[[EncodedClip | BadClip, dict[str, Any]], None]]:
    """Adds (clip, its row of the index) to a shard that stands at `path` once all went well."""
    from array_record.python.array_record_module import ArrayRecordWriter

    index = path.with_suffix(".jsonl")
    parts = [Path(f"{p}.part") for p in (index, path)]
    with parts[0].open("w", encoding="utf-8") as file:
        # Each record on its own, for random access; float32 of a VAE hardly compresses.
        with disk_errors():
            writer = ArrayRecordWriter(str(parts[1]), "group_size:1,uncompressed")

        def add(clip: EncodedClip | BadClip, row: dict[str, Any]) -> None:
            with disk_errors():
                writer.write(latents.to_record(clip))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

        try:
            yield add
        finally:
            with disk_errors():
                writer.close()
    os.replace(parts[0], index)
    os.replace(parts[1], path)  # last: it says that the shard is whole


def _row(source: Source, layout: Layout, clip: int, epoch: int, problem: str) -> dict[str, Any]:
    """A clip's line of the index."""
    frames, height, width = layout.fitted[clip].tolist()
    size = {"frames": frames, "height": height, "width": width, "fps": float(source.sizes.fps[clip])}
    return {"clip": clip, "pass": epoch, "name": source.name(clip), **size, "problem": problem}


def _finish(out: Path, layout: Layout, passes: int) -> None:
    """Writes cache.json: with it the cache is one."""
    shards, bad = [], []
    for number in range(passes * layout.shards):
        path = latents.shard_path(out, number)
        with latents.shard_path(out, number, "jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        shards.append({"records": len(rows), "bytes": path.stat().st_size})
        bad += [
            {"name": row["name"], "clip": row["clip"], "pass": row["pass"], "reason": row["problem"]}
            for row in rows
            if row["problem"]
        ]
    _write_json(out / latents.CACHE, {"passes": passes, "shards": shards, "bad": bad})


def _result(out: Path, layout: Layout, clips: int, passes: int, encoded: int, text: FrozenEncoder | None) -> Result:
    cache = latents.read_json(out / latents.CACHE)
    bad = Counter(entry["reason"] for entry in cache["bad"])
    return Result(
        path=str(out),
        clips=passes * len(layout.order) - bad.total(),
        passes=passes,
        bad=dict(bad.most_common()),
        refused=clips - len(layout.order),
        captions_cut=text.cut if text else 0,
        shards=len(cache["shards"]),
        bytes=sum(shard["bytes"] for shard in cache["shards"]),
        encoded=encoded,
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    part = Path(f"{path}.part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
    os.replace(part, path)


def _write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    part = Path(f"{path}.part")
    weights.write_safetensors(str(part), arrays)
    os.replace(part, path)
