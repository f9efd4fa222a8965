"""Which tensor of another project is which array here, and how the one lies where the other does."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence

import ml_dtypes  # noqa: F401  makes bfloat16 known to NumPy, by its name
import numpy as np

from vidgen.config import ConfigError
from vidgen.interop.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array under both names.

    path, shape: here, a Flax path joined by "/"; kernels, whose paths end so, are [*window, in, out].
    key, stored: there, a PyTorch name joined by "."; kernels are [out, in, *window]. Axes of size one may be more or
      fewer than here.
    """

    path: str
    shape: tuple[int, ...]
    key: str
    stored: tuple[int, ...]

    @property
    def _kernel(self) -> bool:
        return self.path.endswith("kernel")

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """An array of shape `stored` → `shape`, same dtype."""
        return (np.moveaxis(array, (0, 1), (-1, -2)) if self._kernel else array).reshape(self.shape)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Inverse of `to_flax`."""
        return (np.moveaxis(array, (-1, -2), (0, 1)) if self._kernel else array).reshape(self.stored)


def read(entries: Sequence[Entry], checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Every tensor of the files, once, as {path: float32 array in Flax's layout}.

    Raises ConfigError for the first key that is missing, unexpected or of another shape, naming file and shapes, and
    for weights that are not finite.
    """
    by_key = {entry.key: entry for entry in entries}
    _check(by_key, checkpoint)
    flat = {}
    for key, array in checkpoint.read():
        # float32 holds every float16 and bfloat16 exactly.
        value = by_key[key].to_flax(np.asarray(array, np.float32))
        if not np.isfinite(value).all():
            raise ConfigError(f"{checkpoint.tensors[key].file}: {key} holds NaN or infinity; expected finite weights")
        flat[by_key[key].path] = np.ascontiguousarray(value)
    return flat


def _check(by_key: Mapping[str, Entry], checkpoint: Checkpoint) -> None:
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
    by_path = {entry.path: entry for entry in entries}
    if odd := sorted(by_path.keys() ^ flat.keys()):
        what = "no array" if odd[0] in by_path else "not of this model: array"
        raise ConfigError(f"{where}: {what} {odd[0]}; expected {len(by_path)} arrays, found {len(flat)}")
    out = {}
    for path, entry in by_path.items():
        if flat[path].shape != entry.shape:
            raise ConfigError(f"{where}: {path} has shape {list(flat[path].shape)}; expected {list(entry.shape)}")
        array = entry.to_torch(flat[path])
        out[entry.key] = np.ascontiguousarray(array.astype(dtypes.get(entry.key, array.dtype)))
    return out
