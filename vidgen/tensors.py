"""Safetensors files, an array at a time: no more is in memory than what is asked for, and headers are not believed.

The format (github.com/huggingface/safetensors): eight bytes, the length of a JSON header; the header, which gives each
array's dtype, shape and place; the arrays' bytes, one behind the other. Files are read, not mapped, so what was read
and let go of is no part of a process's memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  makes bfloat16 and float8 known to NumPy, by their names
import numpy as np

from vidgen.config import ConfigError

# In the order of the format's own library, whose files have the last of these first.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
CODES = {name: code for code, name in DTYPES.items()}
LONGEST = 100_000_000  # bytes of a header, as in the format's own library


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array on disk.

    Attributes:
      file: it is in.
      shape: there.
      dtype: as NumPy names it; "bfloat16" and the float8s by ml_dtypes.
      offset: of its first byte in the file.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def nbytes(self) -> int:
        """On disk."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The array, or rows `start` to `stop` of its first axis; ConfigError if the file has become shorter."""
        shape = self.shape
        if self.shape:
            shape = (len(range(self.shape[0])[start:stop]), *self.shape[1:])
        array = np.empty(shape, self.dtype)
        with open(self.file, "rb", buffering=0) as f:
            f.seek(self.offset + start * array.itemsize * math.prod(self.shape[1:]))
            left = memoryview(array.reshape(-1).view(np.uint8))
            while left:
                if not (n := f.readinto(left)):
                    raise ConfigError(f"{self.file}: ended while it was read; expected {len(left)} bytes more")
                left = left[n:]
        return array


def header(path: str) -> tuple[dict[str, Stored], str]:
    """({name: array}, the header's text) of a safetensors file.

    Raises ConfigError if it is missing, cut short or none, and for a header that lies: about its own length, or an
    array's, or that has arrays overlap, or leaves bytes of the file to none.
    """
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST):
                said = (
                    f"its header says that it is {length} bytes long, of {max(size - 8, 0)}" if size >= 8 else "short"
                )
                raise _broken(path, said)
            raw = f.read(length)
    except OSError as e:
        missing = isinstance(e, FileNotFoundError)
        raise ConfigError(
            f"{path}: {'no such file' if missing else e.strerror or e}; expected a safetensors file"
        ) from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _broken(path, "its header is not text") from None
    found = parse(text, path)
    end = max((stored.offset + stored.nbytes for stored in found.values()), default=8 + length)
    if end != size:
        raise _broken(path, f"its arrays end at byte {end}, the file at {size}")
    return found, text


def parse(text: str, path: str) -> dict[str, Stored]:
    """The arrays that a header promises to lie in the file `path`; raises ConfigError."""
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(entries, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as e:
        raise _broken(path, f"its header is not JSON: {e}") from None
    entries.pop("__metadata__", None)
    start = 8 + len(text.encode())
    found, at = {}, 0
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.get("dtype") not in DTYPES:
            dtype = entry.get("dtype") if isinstance(entry, dict) else entry
            raise ConfigError(f"{path}: {name} is of dtype {dtype!r}; known are {', '.join(DTYPES)}")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise _broken(path, f"{name} has shape {shape} and offsets {offsets}")
        found[name] = Stored(path, tuple(shape), DTYPES[entry["dtype"]], start + offsets[0])
        if offsets[1] - offsets[0] != found[name].nbytes:
            raise _broken(
                path, f"{name} of shape {shape} takes {found[name].nbytes} bytes, not {offsets[1] - offsets[0]}"
            )
    for name, stored in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != start + at:
            raise _broken(path, f"{name} begins at byte {stored.offset}, the array before it ends at {start + at}")
        at += stored.nbytes
    return found


def header_of(arrays: Mapping[str, tuple[tuple[int, ...], str]], metadata: Mapping[str, str] | None = None) -> str:
    """The header of a file of such arrays, {name: (shape, dtype)}, as the format's own library writes it."""
    ranks = {name: i for i, name in enumerate(DTYPES.values())}
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name, (shape, dtype) in sorted(arrays.items(), key=lambda item: (-ranks[item[1][1]], item[0])):
        end = at + math.prod(shape) * np.dtype(dtype).itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


class Writer:
    """A new safetensors file with this header, whose arrays are written one by one, in any order.

    with Writer(path, header_of({"a": ((2, 3), "float32")})) as file:
        file.write("a", array)

    Raises OSError, and ValueError at the end if an array was not written.
    """

    def __init__(self, path: str, text: str):
        """Makes the file at `path`; `text` is its header."""
        self._path, self._arrays = path, parse(text, path)
        self._left = set(self._arrays)
        self._text = text.encode()

    def __enter__(self) -> Writer:
        self._file = open(self._path, "wb")
        self._file.write(len(self._text).to_bytes(8, "little") + self._text)
        return self

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes an array, of the shape and the dtype that the header gives."""
        stored = self._arrays[name]
        if (array.shape, str(array.dtype)) != (stored.shape, stored.dtype):
            raise ValueError(f"{name} is {array.dtype} {array.shape}; the header says {stored.dtype} {stored.shape}")
        self._file.seek(stored.offset)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._left.discard(name)

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._file.close()
        if kind is None and self._left:
            raise ValueError(f"{self._path}: {sorted(self._left)[0]} was not written")


def read_all(path: str) -> dict[str, np.ndarray]:
    """All arrays of a file; raises ConfigError."""
    return {name: stored.read() for name, stored in header(path)[0].items()}


def write_all(path: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays as a file; raises OSError."""
    specs = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    with Writer(path, header_of(specs, metadata)) as file:
        for name, array in arrays.items():
            file.write(name, np.asarray(array))


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**60 for v in value)


def _unique(pairs: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} stands there twice")
        found[name] = value
    return found


def _broken(path: str, what: str) -> ConfigError:
    return ConfigError(f"{path}: not a whole safetensors file ({what}); download or save it again")
