"""A set of clips of which some cannot be read, each in one of the ways in which records go bad."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np

from vidgen.data import shards
from vidgen.data.decode import encode
from vidgen.data.shards import Row, ShardWriter, checksum

FRAMES = (5, 1)  # of the clips, in turn; all are 16 × 16 pixels
OPTIONS = "group_size:1,uncompressed"  # of ArrayRecord, as ShardWriter has them
# How a record goes bad → the reason that a run gives.
KINDS = {
    "a bit of the video": "checksum differs",
    "half of the video": "checksum differs",
    "no video": "checksum differs",
    "another caption": "caption differs from the index",
    "a caption that is no text": "caption differs from the index",
    "another clip's record": "record differs from the index",
    "another size": "size differs from the index",
    "no record": "unreadable record",
    "an empty record": "unreadable record",
    "a bit on the disk": "unreadable record",
}


def name(index: int) -> str:
    """Of a clip."""
    return f"clip-{index:06d}"


def make_corrupt_set(
    folder: str | Path, records: int = 10_000, corrupt: int = 1_000, seed: int = 0, shard_bytes: int = 2**21
) -> dict[int, str]:
    """Fills a directory of shards with clips, so many of which are corrupt, of each kind about as many.

    Args:
      folder: made where it is missing.
      records: clips in all.
      corrupt: those of them that cannot be read.
      seed: which ones.
      shard_bytes: of a shard, about.

    Returns:
      index of each corrupt clip → the reason that a run gives, by index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    kinds = dict(zip(sorted(draw.sample(range(records), corrupt)), _endless(draw), strict=False))
    videos = [_video(n, FRAMES[n % 2]) for n in range(16)]
    with mock.patch.object(shards, "SHARD_BYTES", shard_bytes):
        writer = ShardWriter(folder)
        for i in range(records):
            data, frames = videos[i % len(videos)], FRAMES[i % 2]
            said = FRAMES[(i + 1) % 2] if kinds.get(i) == "another size" else frames
            row = Row(name(i), said, 16, 16, 8.0, f"a square, number {i}", checksum(data), f"{i // 4}.mp4", 0.0)
            writer.add(row, data)
        writer.finish()
    index = 0
    for path in sorted(folder.glob("clips-train.array_record-*")):
        index += _spoil(path, index, kinds, draw)
    assert index == records
    return {i: KINDS[kind] for i, kind in kinds.items()}


def _endless(draw: random.Random) -> Iterator[str]:
    while True:
        yield from draw.sample(list(KINDS), len(KINDS))


def _video(seed: int, frames: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (frames, 2, 2, 3), np.uint8)
    return encode(coarse.repeat(8, 1).repeat(8, 2), 8.0, full_chroma=True)


def _spoil(path: Path, first: int, kinds: dict[int, str], draw: random.Random) -> int:
    """Writes a shard, whose first clip has the index `first`, once more with its corrupt records; their number."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    reader = ArrayRecordReader(str(path))
    with contextlib.closing(reader):
        records = reader.read_all()
    writer, features = ArrayRecordWriter(str(path), OPTIONS), shards._features()
    for i, record in enumerate(records, first):
        writer.write(_spoilt(record, kinds[i], features, draw) if i in kinds else record)
    writer.close()
    data = bytearray(path.read_bytes())
    for i in range(first, first + len(records)):
        if kinds.get(i) == "a bit on the disk":
            at = data.index(name(i).encode())  # in the middle of the record; its checksum is not told
            data[at + draw.randrange(len(name(i)))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return len(records)


def _spoilt(record: bytes, kind: str, features, draw: random.Random) -> bytes:
    if kind in ("another size", "a bit on the disk"):
        return record
    if kind == "no record":
        return draw.randbytes(len(record))
    if kind == "an empty record":
        return b""
    values = dict(features.deserialize_example_np(record))
    video = values["video"]
    if kind == "a bit of the video":
        at = draw.randrange(len(video))
        video = video[:at] + bytes([video[at] ^ 1 << draw.randrange(8)]) + video[at + 1 :]
    changed = {
        "a bit of the video": {"video": video},
        "half of the video": {"video": video[: len(video) // 2]},
        "no video": {"video": b""},
        "another caption": {"caption": b"a circle"},
        "a caption that is no text": {"caption": b"\xff\xfe{\x00"},
        "another clip's record": {"id": b"clip-none"},
    }[kind]
    return features.serialize_example(values | changed)
