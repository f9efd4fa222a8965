"""The mesh of devices, and how a batch lies on it. What lies where of the weights is in `rules.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen.batch import TokenBatch
from vidgen.config import ConfigError

AXES = ("data", "fsdp", "context", "tensor")
ROW_AXES = ("data", "fsdp")
ROWS = P(ROW_AXES)  # what has a row axis only: captions, clip numbers, keys
TOKENS = P(ROW_AXES, "context")  # what has a row and a token axis


def make_mesh(
    c: ConfigDict, rows: int, tokens: int, parts: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh (data, fsdp, context, tensor) of `config.mesh`, its axes all of the type Auto.

    Args:
      c: `config.mesh`; one axis may be -1: all devices that the others leave.
      rows, tokens: of a step: rows lie over data x fsdp, a row's tokens over context.
      parts: microbatches.
      devices: all there are, unless given.

    Raises:
      ConfigError: names the numbers that don't fit, and the nearest that would.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(c, len(devices))
    check_fit(sizes, rows, tokens, parts)
    return Mesh(_arranged(sizes, c.slices, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_sizes(c: ConfigDict, devices: int) -> dict[str, int]:
    """Devices along each axis, a -1 filled in; raises ConfigError where they are not `devices` in all."""
    sizes = {axis: c[axis] for axis in AXES}
    for axis, n in sizes.items():
        if n < 1 and n != -1:
            raise ConfigError(f"config.mesh.{axis}={n}: expected a number of devices, or -1 for all that are left")
    free = [axis for axis, n in sizes.items() if n == -1]
    if len(free) > 1:
        raise ConfigError(f"config.mesh: {' and '.join(free)} are both -1; one axis can take what the others leave")
    named = {axis: n for axis, n in sizes.items() if n > 1}
    told = " x ".join(f"{axis}={n}" for axis, n in named.items()) or "one device"
    fixed = math.prod(named.values())
    if devices % fixed or (not free and fixed != devices):
        fits = [n for n in range(1, devices + 1) if devices % n == 0]
        what = "does not divide" if free else "is not"
        raise ConfigError(
            f"config.mesh: {told} ({fixed}) {what} the {devices} devices there are; an axis can have {_listed(fits)}"
        )
    if free:
        sizes[free[0]] = devices // fixed
    if c.slices < 1 or sizes["data"] % c.slices:
        raise ConfigError(
            f"config.mesh.slices={c.slices}: the data axis runs over the slices, and its {sizes['data']} devices "
            "don't divide by them; make config.mesh.data a multiple"
        )
    return sizes


def check_fit(sizes: dict[str, int], rows: int, tokens: int, parts: int = 1) -> None:
    """Raises ConfigError unless the rows of each microbatch and the tokens of a row divide over their axes."""
    over = math.prod(sizes[axis] for axis in ROW_AXES)
    if rows % (over * parts):
        told = f"{over} devices (data x fsdp)" + (
            f" in {parts} parts (config.optimizer.accumulate)" if parts > 1 else ""
        )
        nearest = max(1, round(rows / (over * parts))) * over * parts
        raise ConfigError(f"config.rows.count={rows} does not divide over {told}; nearest: {nearest}")
    if tokens % sizes["context"]:
        nearest = max(1, round(tokens / sizes["context"])) * sizes["context"]
        raise ConfigError(
            f"config.rows.tokens={tokens} does not divide over context={sizes['context']} devices; nearest: {nearest}"
        )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers if len(numbers) <= 16 else [*numbers[:14], "…", numbers[-1]]))


def _arranged(sizes: dict[str, int], slices: int, devices: list[jax.Device]) -> np.ndarray:
    """Devices in the shape of the mesh, neighbours on the machine neighbours in it, tensor innermost."""
    shape = tuple(sizes.values())
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)  # hosts one after the other, so that the inner axes stay in a host
    there = len({getattr(device, "slice_index", 0) for device in devices})
    if slices != there:
        raise ConfigError(f"config.mesh.slices={slices}: the devices are of {there} slice(s); set it to {there}")
    if slices > 1:
        inner = (shape[0] // slices, *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def batch_shardings(mesh: Mesh, like: TokenBatch) -> TokenBatch:
    """A sharding for each array of a batch: rows over data and fsdp, tokens over context."""
    rows, tokens = NamedSharding(mesh, ROWS), NamedSharding(mesh, TOKENS)
    of = dict.fromkeys(("tokens", "coords", "segment", "level", "known", "cond"), tokens)
    return TokenBatch(
        **{name: jax.tree.map(lambda _, name=name: of.get(name, rows), value) for name, value in vars(like).items()}
    )


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as `a/b/c`."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
