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
