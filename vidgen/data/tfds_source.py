"""Any TFDS dataset with a video (or image) and a text feature, read without TensorFlow.

Sizes are not in a TFDS dataset, so the first use reads every record once; the sizes are kept in
`~/.cache/vidgen/` (`$XDG_CACHE_HOME/vidgen/`). A record that cannot be used keeps its place with sizes of 0: `reasons`
counts it, and packing counts it as unreadable.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import fnmatch
import hashlib
import os
import re
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from vidgen.config import ConfigError
from vidgen.data.captions import CAPTION, clean
from vidgen.data.clip import BadClip, Clip, ClipSizes
from vidgen.data.decode import decode, probe
from vidgen.data.progress import Progress
from vidgen.data.tfds_features import check_features
from vidgen.passing import again, passes

VIDEO = [
    "video",
    "clip",
    "frames",
    "gif",
    "mp4",
    "media",
    "image",
    "img",
    "picture",
]  # usual names, the likeliest first
SCAN = 1  # version of what a scan finds: part of the cache's key
PREFIX = "tfds:"


class TfdsSource:
    """Clips of one split of a TFDS dataset. See `Source`.

    The video feature is encoded bytes (MP4, GIF, PNG, …), an image, a sequence of images, or an array [T,H,W,C] or
    [H,W,C] u8 with 3 channels, or 1 that stands for all. The text feature is a string, or a label, whose class name
    is the caption.

    Attributes:
      reasons: why records cannot be used, and how many each.
    """

    def __init__(self, name: str, *, video: str = "", text: str = "", fps: float = 0.0, split: str = ""):
        """name: `tfds:NAME[/CONFIG][:VERSION]`, in TFDS_DATA_DIR, or `tfds:DIRECTORY`.

        video, text: names of features; empty: found by name and type. fps: of features without a rate of their own;
        0: 24. split: empty for "train", or the only one there is.

        Raises ConfigError for a dataset that isn't there or cannot be read, and for features that don't fit.
        """
        self._name, self._directory = name, _directory(name)
        builder = _builder(self._directory)
        self._split = _split(name, builder, split)
        features = _flat(builder.info.features)
        self._video = _choose(name, "video", features, _is_video, VIDEO, video)
        self._text = _choose(name, "text", features, _is_text, CAPTION, text, exclude=self._video)
        self._classes = _classes(features[self._text])
        self._fps = fps or 24.0
        self._records, self._features, self._lock = None, None, threading.Lock()
        count = len(self._open())
        key = [
            SCAN,
            builder.info.full_name,
            self._split,
            self._video,
            self._text,
            self._fps,
            count,
            _stamp(self._directory),
        ]
        self.fingerprint = f"tfds-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
        columns, reasons = self._cached(count)
        self.sizes = ClipSizes(*columns)
        self.reasons = dict(collections.Counter(r for r in reasons.tolist() if r).most_common())

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, index: int, epoch: int) -> Clip:
        """Clip `index`, the same in every epoch.

        Raises BadClip: "unreadable record", "missing caption", "size differs from the index", or as `decode` does.
        """
        del epoch
        caption, value = self._values(index)
        if isinstance(value, bytes):
            video, fps = decode(value)
            fps = fps if len(video) > 1 else self._fps
        else:
            video, fps = _pixels(value), self._fps
        sizes = self.sizes
        if video.shape[:3] != (sizes.frames[index], sizes.height[index], sizes.width[index]):
            raise BadClip("size differs from the index")
        return Clip(video=video, caption=caption, fps=fps)

    def name(self, index: int) -> str:
        return f"{self._name}/{self._split}#{index}"

    def captions(self) -> None:
        """They stand in the records."""
        return None

    def _open(self):
        with self._lock:
            if self._records is None:
                import tensorflow_datasets as tfds

                builder = _builder(self._directory)
                raw = tfds.decode.DeserializeMethod.RAW_BYTES
                try:
                    self._records = builder.as_data_source(self._split, deserialize_method=raw)
                except Exception as error:  # NotImplementedError, ValueError, FileNotFoundError, …
                    raise ConfigError(f"{self._name}: {_line(error)}") from error
                # Only the two features that are used are decoded, and encoded images are left for PyAV.
                self._features = _only(builder.info.features, {self._video, self._text})
            return self._records

    def _forget(self, records) -> None:
        """Has the files opened anew for the next read: one that could not be opened once is never tried again."""
        with self._lock:
            if self._records is records:
                self._records = None

    def __getstate__(self):
        return {**self.__dict__, "_records": None, "_features": None, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def _record(self, index: int) -> dict:
        records = self._open()
        try:
            return self._features.deserialize_example_np(records[int(index)])
        except Exception as error:  # ArrayRecord and TFDS raise RuntimeError, ValueError, IndexError and more
            if passes(error):
                self._forget(records)
                raise
            raise BadClip("unreadable record") from error

    def _values(self, index: int) -> tuple[str, Any]:
        """(caption, what stands for the video) of a record."""
        record = self._record(index)
        try:
            return self._caption(_get(record, self._text)), _get(record, self._video)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, BadClip):
                raise
            raise BadClip("unreadable record") from error  # fields of other kinds, or none

    def _caption(self, value: Any) -> str:
        if self._classes is not None:
            if not 0 <= int(value) < len(self._classes):
                raise BadClip("missing caption")
            value = self._classes[int(value)].replace("_", " ")
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                raise BadClip("caption is not UTF-8") from error
        return clean(value)

    def _measure(self, index: int) -> tuple[int, int, int, float, int]:
        caption, value = self._values(index)
        text = len(caption.encode())
        if isinstance(value, bytes):
            info = probe(value)
            return info.frames, info.height, info.width, info.fps if info.frames > 1 else self._fps, text
        return *_pixels(value).shape[:3], self._fps, text

    def _cached(self, count: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Columns of `ClipSizes` and a reason a record ("" for good ones), from the cache or a scan."""
        path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vidgen" / f"{self.fingerprint}.npz"
        names = [field.name for field in dataclasses.fields(ClipSizes)]
        try:
            with np.load(path, allow_pickle=False) as file:
                columns, reasons = [file[name] for name in names], file["reasons"]
            if all(len(c) == count for c in (*columns, reasons)):
                return columns, reasons
        except FileNotFoundError:
            pass
        except Exception:  # zipfile, zlib and NumPy each have errors of their own for a damaged file
            print(f"{path}: damaged; made again", file=sys.stderr)
        columns, reasons = self._scan(count)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(file, reasons=reasons, **dict(zip(names, columns, strict=True)))
            os.replace(temporary, path)
        except OSError as error:
            print(f"{path}: sizes not kept, they are found again next time: {error.strerror}", file=sys.stderr)
        return columns, reasons

    def _scan(self, count: int) -> tuple[list[np.ndarray], np.ndarray]:
        rows, reasons = np.zeros((count, 5)), [""] * count
        progress = Progress(f"reading sizes of {self._name}", count)
        for i in range(count):
            try:
                rows[i] = again(lambda i=i: self._measure(i))
            except BadClip as bad:
                reasons[i] = str(bad)
            except (OSError, RuntimeError, MemoryError) as error:  # what is kept for good is not to say so
                raise ConfigError(f"reading {self.name(i)} failed: {_line(error)}") from error
            progress.update(i + 1, f"{i + 1}/{count} clips")
        progress.close()
        types = (np.int32, np.int32, np.int32, np.float32, np.int32)
        return [rows[:, c].astype(t) for c, t in enumerate(types)], np.array(reasons, dtype=np.str_)


def _directory(name: str) -> str:
    """Where the dataset lies."""
    import tensorflow_datasets as tfds

    wanted = name.removeprefix(PREFIX)
    if os.path.isdir(os.path.expanduser(wanted)):
        return os.path.abspath(os.path.expanduser(wanted))
    match = re.fullmatch(r"(\w+)(?:/([\w.-]+))?(?::([\d.*]+))?", wanted)
    if not match:
        raise ConfigError(f"{name}: expected tfds:NAME[/CONFIG][:VERSION], or tfds:DIRECTORY")
    base, config, version = match.groups()
    root = Path(os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR).expanduser()
    # NAME/[CONFIG/]VERSION, as TFDS lays them out
    have = sorted(path.parent for path in (root / base).rglob("dataset_info.json"))
    fitting = [p for p in have if config in (None, p.parent.name) and fnmatch.fnmatch(p.name, version or "*")]
    if len({p.parent for p in fitting}) == 1:
        return str(max(fitting, key=lambda p: [int(n) if n.isdigit() else -1 for n in p.name.split(".")]))
    if have:
        names = ", ".join(f"{PREFIX}{p.parent.relative_to(root).as_posix()}:{p.name}" for p in have)
        what = "several configs of it" if fitting else "no such config or version"
        raise ConfigError(f"{name}: {what}; in {root} (TFDS_DATA_DIR) there are {names}")
    known = tfds.list_builders(with_community_datasets=False)
    if base in known:
        raise ConfigError(
            f"{name}: not prepared in {root} (TFDS_DATA_DIR); first run, in Python: "
            f"tfds.builder({base!r}).download_and_prepare(file_format='array_record')"
        )
    here = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    near = difflib.get_close_matches(base, here, n=1, cutoff=0.4) or difflib.get_close_matches(base, known, n=1)
    hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
    raise ConfigError(f"{name}: no such dataset in {root} (TFDS_DATA_DIR){hint}")


def _builder(directory: str):
    import tensorflow_datasets as tfds

    check_features(directory)
    try:
        return tfds.builder_from_directory(directory)
    except ImportError:
        raise ConfigError(
            f"tfds:{directory}: it has a feature that needs TensorFlow (tfds.features.Video); store videos as bytes, "
            "with tfds.features.Scalar(np.object_)"
        ) from None
    except Exception as error:  # TFDS has no error of its own
        raise ConfigError(f"tfds:{directory}: {_line(error)}") from error


def _split(name: str, builder, wanted: str) -> str:
    splits = list(builder.info.splits)
    if wanted and wanted not in splits or not wanted and "train" not in splits and len(splits) != 1:
        raise ConfigError(f"{name}: no split {wanted or 'train'!r}; it has {', '.join(splits) or 'none'}")
    return wanted or ("train" if "train" in splits else splits[0])


def _stamp(directory: str) -> list:
    """Changes whenever the files of the dataset do."""
    files = sorted(p for p in Path(directory).iterdir() if p.is_file())
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _flat(features, prefix: str = "") -> dict[str, Any]:
    """Path, with slashes, → feature."""
    import tensorflow_datasets as tfds

    if not isinstance(features, tfds.features.FeaturesDict):
        return {prefix.rstrip("/"): features}
    return {k: v for name, f in sorted(features.items()) for k, v in _flat(f, f"{prefix}{name}/").items()}


def _only(features, paths: set[str], prefix: str = ""):
    """The features at `paths` and nothing else, with bytes in place of images."""
    import tensorflow_datasets as tfds

    if isinstance(features, tfds.features.FeaturesDict):
        parts = {n: _only(f, paths, f"{prefix}{n}/") for n, f in features.items()}
        parts = {name: part for name, part in parts.items() if part is not None}
        return tfds.features.FeaturesDict(parts) if parts else None
    if prefix.rstrip("/") not in paths:
        return None
    if not _has_images(features):
        return features
    encoded = tfds.features.Scalar(np.object_)
    return encoded if _kind(features) == "Image" else tfds.features.Sequence(encoded)


def _get(record: dict, path: str) -> Any:
    for key in path.split("/"):
        record = record[key]
    return record


def _kind(feature) -> str:
    return type(feature).__name__


def _is_string(feature) -> bool:
    return feature.np_dtype == np.object_ and feature.shape == () if hasattr(feature, "np_dtype") else False


def _has_images(feature) -> bool:
    return _kind(feature) == "Image" or _kind(feature) == "Sequence" and _kind(feature.feature) == "Image"


def _is_video(feature) -> int:
    """2: pixels for certain; 1: could be an encoded video; 0: cannot be."""
    if _has_images(feature):
        return 2
    shape = feature.shape if isinstance(feature.shape, tuple) else ()
    if _kind(feature) in ("Tensor", "Video") and feature.np_dtype == np.uint8 and len(shape) in (3, 4):
        return 2 * (shape[-1] in (1, 3))
    return int(_is_string(feature) and _kind(feature) != "Text")


def _is_text(feature) -> int:
    """2: text for certain; 1: could be; 0: cannot be."""
    return 2 if _kind(feature) == "Text" else int(_is_string(feature) or _kind(feature) == "ClassLabel")


def _choose(name, what: str, features: dict, fits, usual: list[str], wanted: str, exclude: str = "") -> str:
    """The feature to use for `what`: the one asked for, else the one of a usual name, else the only certain one."""
    where = f"config.data.{what}_feature"
    if wanted:
        if wanted not in features:
            near = difflib.get_close_matches(wanted, features, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{where}={wanted}: {name} has {', '.join(features)}{hint}")
        if not fits(features[wanted]):
            raise ConfigError(f"{where}={wanted}: {name} has {features[wanted]!r} there, which is no {what}")
        return wanted
    fitting = {path: fits(f) for path, f in features.items() if path != exclude and fits(f)}
    named = [path for word in usual for path in fitting if path.split("/")[-1].lower() == word]
    certain = [path for path, sure in fitting.items() if sure == 2]
    if named:
        return named[0]
    for paths in (certain, list(fitting)):
        if len(paths) == 1:
            return paths[0]
    have = f"several that fit: {', '.join(fitting)}" if fitting else f"none that fits among {', '.join(features)}"
    raise ConfigError(f"{name}: which feature is the {what}? {have}; set {where}")


def _classes(feature) -> list[str] | None:
    if _kind(feature) != "ClassLabel":
        return None
    return list(feature.names or map(str, range(feature.num_classes or 0)))


def _pixels(value: Any) -> np.ndarray:
    """[T,H,W,3] u8 from an array or from a list of encoded images."""
    if not (isinstance(value, np.ndarray) and value.dtype == np.uint8):
        try:
            images = [decode(bytes(image))[0][0] for image in value]
        except TypeError as error:
            raise BadClip("unreadable record") from error
        if not images:
            raise BadClip("no frames")
        if len({image.shape for image in images}) > 1:
            raise BadClip("frames differ in size")
        value = np.stack(images)
    value = value[None] if value.ndim == 3 else value
    if value.ndim != 4 or 0 in value.shape or value.shape[-1] not in (1, 3):
        raise BadClip("no frames")
    return np.ascontiguousarray(np.broadcast_to(value, (*value.shape[:3], 3)))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
