"""Clips on disk: ArrayRecord shards that are a TFDS dataset too, and an index beside them.

A directory of shards holds

    clips-train.array_record-00000-of-00002   records: encoded video, caption, id, frames, height, width, fps
    dataset_info.json, features.json          what `tfds.builder_from_directory` reads; no TensorFlow anywhere
    index.jsonl                               a `Row` a clip, in the order of the records
    dropped.jsonl                             what did not become clips: file, reason, detail
    ingest.json                               the settings and the result of the ingest
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vidgen.config import ConfigError
from vidgen.data.clip import BadClip, Clip, ClipSizes
from vidgen.data.decode import decode
from vidgen.data.tfds_features import check_features
from vidgen.passing import passes

NAME = "clips"
SHARD_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    """What the index says of one clip.

    Attributes:
      id: unique in the dataset.
      frames, height, width: of the video as stored.
      fps: frames a second.
      caption: whole, whatever its length.
      checksum: SHA-256 of the record's video bytes, in hex.
      source: the file that the clip was cut from, as the ingest's input named it.
      start: seconds into that file.
    """

    id: str
    frames: int
    height: int
    width: int
    fps: float
    caption: str
    checksum: str
    source: str
    start: float


def checksum(video: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(video).hexdigest()


def _features():
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "video": tfds.features.Scalar(np.object_, doc="an MP4 file (H.264, short GOP)"),
            "caption": tfds.features.Text(),
            "id": tfds.features.Text(),
            "frames": np.int32,
            "height": np.int32,
            "width": np.int32,
            "fps": np.float32,
        }
    )


class ShardWriter:
    """Writes records and index into an existing directory; it is a dataset only once `finish` has returned.

    Raises OSError where the disk is full or fails.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._features = _features()
        self._index = (directory / "index.jsonl").open("w", encoding="utf-8")
        self._lengths, self._bytes, self._shard, self._shard_bytes = [], 0, None, 0

    def add(self, row: Row, video: bytes) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        if self._shard is None or self._shard_bytes >= SHARD_BYTES:
            self._close_shard()
            # Records that are compressed already gain nothing from more of it.
            path = self._directory / f"shard-{len(self._lengths):05d}"
            with disk_errors():
                self._shard, self._shard_bytes = ArrayRecordWriter(str(path), "group_size:1,uncompressed"), 0
            self._lengths.append(0)
        fields = {k: getattr(row, k) for k in ("caption", "id", "frames", "height", "width", "fps")}
        record = self._features.serialize_example({"video": video, **fields})
        with disk_errors():
            self._shard.write(record)
        self._index.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")
        self._lengths[-1] += 1
        self._shard_bytes += len(record)
        self._bytes += len(record)

    def finish(self) -> int:
        """Names the shards, writes what TFDS needs, and returns the bytes of all records."""
        self._close_shard()
        self._index.close()
        count = len(self._lengths)
        for i in range(count):
            name = f"{NAME}-train.array_record-{i:05d}-of-{count:05d}"
            (self._directory / f"shard-{i:05d}").rename(self._directory / name)
        self._features.save_config(str(self._directory))
        split = {
            "name": "train",
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "numBytes": str(self._bytes),
            "shardLengths": [str(n) for n in self._lengths],
        }
        info = {
            "name": NAME,
            "version": "1.0.0",
            "description": "Captioned clips, ingested by vidgen.",
            "fileFormat": "array_record",
            "splits": [split],
        }
        (self._directory / "dataset_info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
        return self._bytes

    def _close_shard(self) -> None:
        if self._shard is not None:
            shard, self._shard = self._shard, None
            with disk_errors():
                shard.close()


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """ArrayRecord's errors as the OSError they stand for."""
    try:
        yield
    except RuntimeError as error:
        code = errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error) else errno.EIO
        raise OSError(code, " ".join(str(error).split())) from error


def read_index(directory: str | os.PathLike) -> list[Row]:
    """All rows of a directory of shards; raises ConfigError where there is none, or one that cannot be read."""
    path = Path(directory) / "index.jsonl"
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            return [Row(**json.loads(line)) for line in file]
    except FileNotFoundError:
        raise ConfigError(
            f"{directory}: no shards there; make them with: vidgen ingest --input DIR --output {directory}"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not an index of vidgen ingest: {error}") from error


class ShardSource:
    """Clips of a directory of shards, by random access. See `Source`.

    Raises ConfigError if the directory is not one, lacks files, or its index and its records differ in number.
    """

    def __init__(self, directory: str | os.PathLike):
        self._directory = os.path.abspath(directory)
        rows = read_index(self._directory)
        if not rows:
            raise ConfigError(f"{directory}: no clips in it")
        self.sizes = ClipSizes(
            frames=np.array([r.frames for r in rows], np.int32),
            height=np.array([r.height for r in rows], np.int32),
            width=np.array([r.width for r in rows], np.int32),
            fps=np.array([r.fps for r in rows], np.float32),
            text=np.array([len(r.caption.encode()) for r in rows], np.int32),
        )
        self._ids = [r.id for r in rows]
        self._sources = [r.source for r in rows]
        self._checksums = [r.checksum for r in rows]
        # Captions stay on disk; of each its checksum is kept, [N] u32, so that a changed one is noticed.
        self._captions = np.array([zlib.crc32(r.caption.encode()) for r in rows], np.uint32)
        # The checksums stand for the pixels, so the index stands for everything.
        digest = hashlib.sha256((Path(self._directory) / "index.jsonl").read_bytes())
        self.fingerprint = f"shards-{digest.hexdigest()[:16]}"
        self._records, self._lock = None, threading.Lock()
        if len(self._open()) != len(rows):
            raise ConfigError(f"{directory}: {len(rows)} clips in index.jsonl, {len(self._open())} in the shards")

    def _open(self):
        with self._lock:
            if self._records is None:
                import tensorflow_datasets as tfds

                check_features(self._directory)
                try:
                    builder = tfds.builder_from_directory(self._directory)
                    lacking = [p for p in builder.info.splits["train"].filepaths if not os.path.exists(p)]
                    self._records = builder.as_data_source("train")
                except Exception as error:  # TFDS has no error of its own for a file that lacks
                    raise ConfigError(f"{self._directory}: {' '.join(str(error).split())}") from error
                if lacking:
                    raise ConfigError(f"{lacking[0]}: missing; {len(lacking)} of the shards in dataset_info.json are")
            return self._records

    def _forget(self, records) -> None:
        """Has the files opened anew for the next read: one that could not be opened once is never tried again."""
        with self._lock:
            if self._records is records:
                self._records = None

    def __getstate__(self):
        return {**self.__dict__, "_records": None, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, index: int, epoch: int) -> Clip:
        """Clip `index`, the same in every epoch.

        Raises BadClip: "unreadable record", "checksum differs" (of the video), "caption differs from the index",
        "record differs from the index" (in its id or fps), "size differs from the index", or as `decode` does.
        So every changed bit of a record is found, and costs that clip and no other.
        """
        del epoch
        records = self._open()
        try:
            record = records[int(index)]
            data, caption, clip = texts = [record[k] for k in ("video", "caption", "id")]
            if not all(isinstance(text, bytes) for text in texts):
                raise TypeError("a record with other fields")
            size, fps = tuple(int(record[k]) for k in ("frames", "height", "width")), float(record["fps"])
        except Exception as error:  # ArrayRecord raises RuntimeError, ValueError, IndexError and more
            if passes(error):
                self._forget(records)
                raise
            raise BadClip("unreadable record") from error
        if checksum(data) != self._checksums[index]:
            raise BadClip("checksum differs")
        if zlib.crc32(caption) != self._captions[index]:
            raise BadClip("caption differs from the index")
        sizes = self.sizes
        if clip != self._ids[index].encode() or fps != sizes.fps[index]:
            raise BadClip("record differs from the index")
        video, _ = decode(data)
        if not video.shape[:3] == size == (sizes.frames[index], sizes.height[index], sizes.width[index]):
            raise BadClip("size differs from the index")
        return Clip(video=video, caption=caption.decode(), fps=float(sizes.fps[index]))

    def name(self, index: int) -> str:
        """The clip's id: file, start in seconds, frames."""
        return self._ids[index]

    def captions(self) -> list[str]:
        """Of all clips; read from the index each time."""
        return [row.caption for row in read_index(self._directory)]

    def group(self, index: int) -> str:
        """The file that clip `index` was cut from: clips of one file are never on both sides of a split."""
        return self._sources[index]
