"""The mesh of devices, and where batches and weights lie on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen.config import ConfigError

ROWS = P(("data", "fsdp"))  # a batch's rows, over all devices

# (path of a parameter, its spec from the last axis backwards): the first that matches. What no rule names, or does not
# divide, is replicated. Stacked layers are never sharded over their layer axis, which `scan` walks.
RULES = (
    (r"(bytes|ngrams_\d+)/embedding", ("fsdp", None)),
    (r"kernel", (None, "fsdp")),
)


def make_mesh(c: ConfigDict, rows: int, parts: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp) of `config.mesh` over `devices` (all, unless given), for rows in `parts` microbatches.

    Raises ConfigError naming the numbers that don't fit, and the nearest that would.
    """
    devices = jax.devices() if devices is None else devices
    fsdp = len(devices) if c.fsdp == -1 else c.fsdp
    if fsdp < 1 or len(devices) % fsdp:
        fits = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise ConfigError(f"config.mesh.fsdp={c.fsdp} does not divide {len(devices)} devices; what does: {fits}")
    data = len(devices) // fsdp if c.data == -1 else c.data
    if data * fsdp != len(devices):
        raise ConfigError(f"config.mesh: data={data} x fsdp={fsdp} is not the {len(devices)} devices there are")
    unit = len(devices) * parts
    if rows % unit:
        over = f"{len(devices)} devices" + (f" in {parts} parts (config.optimizer.accumulate)" if parts > 1 else "")
        nearest = max(unit, round(rows / unit) * unit)
        raise ConfigError(f"config.rows.count={rows} does not divide over {over}; nearest: {nearest}")
    return Mesh(np.asarray(devices).reshape(data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The spec of one array by `RULES`."""
    for pattern, tail in RULES:
        if re.search(pattern, path) and len(shape) >= len(tail):
            axes = (None,) * (len(shape) - len(tail)) + tail
            fits = all(a is None or n % mesh.shape[a] == 0 for a, n in zip(axes, shape, strict=True))
            return P(*axes) if fits else P()
    return P()


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as `a/b/c`."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for each array of a state: optimizer moments and averages end like the parameters they belong to."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(path_name(path), x.shape, mesh)), tree
    )
