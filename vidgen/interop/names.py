"""Which tensor of another project is which array here, and how the one lies where the other does."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence

import ml_dtypes  # noqa: F401  makes bfloat16 known to NumPy, by its name
import numpy as np

from vidgen.config import ConfigError
from vidgen.interop.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor under both names.

    Several entries may have one path: those with a `layer` are the rows of a stacked array, one each, and those without
    are one array that stands under several keys there, with the same values.

    Attributes:
      path, shape: here, a Flax path joined by "/"; kernels, whose paths end so, are [*window, in, out]. Of a stacked
        array, the shape of one layer.
      key, stored: there, a PyTorch name joined by "."; kernels are [out, in, *window]. Axes of size one may be more or
        fewer than here, and a kernel without a window here has that of there before its inputs: [*window, in] as one
        axis.
      layer: row of the stacked array at `path`; None = the array is not stacked.
      inputs, outputs: where the order of features differs, ours[..., i, j] = theirs[..., inputs[i], outputs[j]], in
        our layout; of a vector, `outputs` permutes its last axis. None = the same order.
    """

    path: str
    shape: tuple[int, ...]
    key: str
    stored: tuple[int, ...]
    layer: int | None = None
    inputs: tuple[int, ...] | None = None
    outputs: tuple[int, ...] | None = None

    @property
    def _kernel(self) -> bool:
        return self.path.endswith("kernel")

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """An array of shape `stored` → `shape`, same dtype; a view where order and layout allow."""
        array = (np.moveaxis(array, (0, 1), (-1, -2)) if self._kernel else array).reshape(self.shape)
        if self.inputs is not None:
            array = np.take(array, self.inputs, axis=-2)
        return array if self.outputs is None else np.take(array, self.outputs, axis=-1)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Inverse of `to_flax`."""
        if self.outputs is not None:
            array = np.take(array, np.argsort(self.outputs), axis=-1)
        if self.inputs is not None:
            array = np.take(array, np.argsort(self.inputs), axis=-2)
        if not self._kernel:
            return array.reshape(self.stored)
        out, into, *window = self.stored
        return np.moveaxis(array.reshape(*window, into, out), (-1, -2), (0, 1))


def stacks(entries: Iterable[Entry]) -> dict[str, tuple[Entry, ...]]:
    """path → its entries: the layers of a stacked array in order, or all keys of one that is not stacked."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.path, []).append(entry)
    return {path: tuple(sorted(rows, key=lambda e: e.layer or 0)) for path, rows in found.items()}


def whole_shape(rows: Sequence[Entry]) -> tuple[int, ...]:
    """Shape of the array at a path, of its entries as `stacks` gives them: with the layers first, where stacked."""
    return rows[0].shape if rows[0].layer is None else (len(rows), *rows[0].shape)


def read(entries: Sequence[Entry], checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Every tensor of the files, once, as {path: float32 array in Flax's layout}, layers stacked.

    Raises ConfigError for the first key that is missing, unexpected or of another shape, naming file and shapes, for
    weights that are not finite, and for tensors that should be equal and are not.
    """
    by_key = {entry.key: entry for entry in entries}
    check(by_key, checkpoint)
    shapes = {path: whole_shape(rows) for path, rows in stacks(entries).items()}
    flat: dict[str, np.ndarray] = {}
    first: dict[str, str] = {}
    for key, entry in by_key.items():
        array = checkpoint.read(key)
        # float32 holds every float16 and bfloat16 exactly.
        value = entry.to_flax(np.asarray(array, np.float32))
        if entry.layer is not None:
            if entry.path not in flat:
                flat[entry.path] = np.empty(shapes[entry.path], np.float32)
            flat[entry.path][entry.layer] = value
        elif entry.path not in flat:
            flat[entry.path], first[entry.path] = np.ascontiguousarray(value), key
        elif not np.array_equal(flat[entry.path], value):
            raise ConfigError(
                f"{checkpoint.tensors[key].file}: {key} differs from {first[entry.path]}; expected the same values"
            )
    return flat


def check(by_key: Mapping[str, Entry], checkpoint: Checkpoint) -> None:
    """Raises ConfigError for the first key that is missing, unexpected or of another shape, naming file and shapes."""
    found = checkpoint.tensors
    missing, odd = [k for k in by_key if k not in found], [k for k in found if k not in by_key]
    if missing:
        # The likeliest reason is another name for the same thing.
        more = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
        near = difflib.get_close_matches(missing[0], odd, n=1)
        hint = f"; nearest there: {near[0]}" if near else ""
        expected = list(by_key[missing[0]].stored)
        raise ConfigError(f"{checkpoint.where}: no tensor {missing[0]} of shape {expected}{more}{hint}")
    if odd:
        near = difflib.get_close_matches(odd[0], by_key, n=1)
        hint = f"; nearest that is: {near[0]}" if near else ""
        more = f", nor are {len(odd) - 1} more" if len(odd) > 1 else ""
        shape = list(found[odd[0]].shape)
        raise ConfigError(
            f"{found[odd[0]].file}: tensor {odd[0]} of shape {shape} is no part of the model of config.json{more}{hint}"
        )
    for key, entry in by_key.items():
        if found[key].shape != entry.stored:
            raise ConfigError(
                f"{found[key].file}: {key} has shape {list(found[key].shape)}; "
                f"expected {list(entry.stored)} by config.json"
            )


def write(
    entries: Sequence[Entry], flat: Mapping[str, np.ndarray], dtypes: Mapping[str, str], where: str
) -> dict[str, np.ndarray]:
    """{path: array} → {key: array} in PyTorch's layout.

    Args:
      entries: the whole model.
      flat: arrays by path.
      dtypes: what to store a key as; as `flat` has it where this says nothing.
      where: `flat` came from, for messages.

    Raises ConfigError for a path that is missing, unexpected or of another shape.
    """
    by_path = stacks(entries)
    if odd := sorted(by_path.keys() ^ flat.keys()):
        what = "no array" if odd[0] in by_path else "not of this model: array"
        raise ConfigError(f"{where}: {what} {odd[0]}; expected {len(by_path)} arrays, found {len(flat)}")
    out = {}
    for path, rows in by_path.items():
        if (shape := whole_shape(rows)) != flat[path].shape:
            raise ConfigError(f"{where}: {path} has shape {list(flat[path].shape)}; expected {list(shape)}")
        for entry in rows:
            array = entry.to_torch(flat[path] if entry.layer is None else flat[path][entry.layer])
            out[entry.key] = np.ascontiguousarray(array.astype(dtypes.get(entry.key, array.dtype)))
    return out
