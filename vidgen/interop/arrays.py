"""Arrays under vidgen's names, one at a time: of a weights directory, of another project's files, or in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from vidgen import weights
from vidgen.config import ConfigError
from vidgen.interop import names
from vidgen.interop.checkpoint import Checkpoint
from vidgen.interop.names import Entry

SLAB = 2**26  # bytes that are read at once, about


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """What there is to read; nothing has been read yet.

    Attributes:
      where: it lies; for messages.
      specs: {"a/b/c": (shape, dtype as NumPy names it)}.
      slabs: a name → (first row, some rows of its first axis), one after the other, in the stored dtype; an array that
        can only be had whole comes as rows from 0.
      row: a name, a number → that row of its first axis.
    """

    where: str
    specs: Mapping[str, tuple[tuple[int, ...], str]]
    slabs: Callable[[str], Iterator[tuple[int, np.ndarray]]]
    row: Callable[[str, int], np.ndarray]

    def read(self, path: str, dtype: str | np.dtype | None = None) -> np.ndarray:
        """The array of that name, in `dtype` or as it is stored; beside it, no more than a slab is in memory."""
        shape, stored = self.specs[path]
        dtype = np.dtype(stored if dtype is None else dtype)
        out = None
        for start, slab in self.slabs(path):
            if slab.shape == shape and slab.dtype == dtype:
                return np.ascontiguousarray(slab)
            out = np.empty(shape, dtype) if out is None else out
            if shape:
                out[start : start + len(slab)] = slab
            else:
                out[()] = slab
        return np.empty(shape, dtype) if out is None else out

    @property
    def nbytes(self) -> int:
        """Of all arrays, as they are stored."""
        return sum(
            int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize for shape, dtype in self.specs.values()
        )

    @property
    def parameters(self) -> int:
        """Numbers in all arrays."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape, _ in self.specs.values())


def of_weights(directory: str) -> Arrays:
    """Of a weights directory; raises ConfigError."""
    stored = weights.headers(directory)

    def slabs(path: str) -> Iterator[tuple[int, np.ndarray]]:
        array = stored[path]
        if not array.shape:
            yield 0, array.read()
            return
        rows = array.shape[0]
        step = max(1, SLAB * rows // max(array.nbytes, 1))
        for start in range(0, rows, step):
            yield start, array.read(start, min(start + step, rows))

    specs = {path: (array.shape, array.dtype) for path, array in stored.items()}
    return Arrays(directory, specs, slabs, lambda path, row: stored[path].read(row, row + 1)[0])


def of_checkpoint(entries: Sequence[Entry], checkpoint: Checkpoint) -> Arrays:
    """Of another project's files, in our layouts: layers of a stack are one array.

    Raises ConfigError for the first key that is missing, unexpected or of another shape, naming file and shapes; and
    while reading, for weights that are not finite.
    """
    names.check({entry.key: entry for entry in entries}, checkpoint)
    stacks = names.stacks(entries)
    specs = {}
    for path, rows in stacks.items():
        dtypes = {checkpoint.tensors[entry.key].dtype for entry in rows}
        # float32 holds every float16 and bfloat16 exactly.
        specs[path] = (names.whole_shape(rows), dtypes.pop() if len(dtypes) == 1 else "float32")

    def slabs(path: str) -> Iterator[tuple[int, np.ndarray]]:
        first, *more = rows = stacks[path]
        if first.layer is not None:
            yield from ((entry.layer, entry.to_flax(checkpoint.read(entry.key))[None]) for entry in rows)
            return
        array = first.to_flax(checkpoint.read(first.key))
        for other in more:
            if not np.array_equal(other.to_flax(checkpoint.read(other.key)), array):
                raise ConfigError(
                    f"{checkpoint.tensors[other.key].file}: {other.key} differs from {first.key}; expected the same "
                    "values"
                )
        yield 0, array

    def row(path: str, row: int) -> np.ndarray:
        first = stacks[path][0]
        if first.layer is None:
            return first.to_flax(checkpoint.read(first.key))[row]
        return stacks[path][row].to_flax(checkpoint.read(stacks[path][row].key))

    return Arrays(checkpoint.where, specs, slabs, row)


def of_flat(flat: Mapping[str, np.ndarray], where: str) -> Arrays:
    """Of arrays in memory, {"a/b/c": array}."""
    specs = {path: (tuple(array.shape), str(array.dtype)) for path, array in flat.items()}
    return Arrays(
        where, specs, lambda path: iter([(0, np.asarray(flat[path]))]), lambda path, row: np.asarray(flat[path][row])
    )
