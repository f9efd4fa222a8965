"""The mesh to plan for: as given, the config's, or the nearest to it that a topology has."""

from __future__ import annotations

import math
import re

from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.models.architecture import mlp_dim
from vidgen.parallel.mesh import AXES, axis_sizes, check_fit
from vidgen.planning.arithmetic import attending
from vidgen.planning.hardware import Topology
from vidgen.planning.search import meshes, undivided
from vidgen.tokenizers.base import geometry_from_config


def placed(config: ConfigDict, topology: Topology, mesh: str = "", mode: str = "train") -> tuple[ConfigDict, str]:
    """(a copy of the config with the mesh to plan for, how it came about).

    Args:
      mesh: "fsdp=32,context=8"; axes not named have one device, one of -1 what the others leave. Empty: the config's
        if a step divides over it, else `refit`.
      mode: train, or sample: `config` is of `sampling_config`.

    Raises ConfigError.
    """
    if mesh:
        config, note = on(config, topology, dict.fromkeys(AXES, 1) | parse_mesh(mesh)), "given"
        over = config.mesh.data * config.mesh.fsdp
        if mode == "sample" and over != topology.slices:
            raise ConfigError(
                f"--mesh={mesh}: the devices of a slice draw one clip together, which data and fsdp don't share: "
                f"data={topology.slices},fsdp=1, and the others over context and tensor"
            )
        check(config, topology)
        return config, note
    try:
        own = on(config, topology, {axis: config.mesh[axis] for axis in AXES})
        check(own, topology)
        return own, "the config's"
    except ConfigError:
        return refit(config, topology), "refitted from the config's"


def on(config: ConfigDict, topology: Topology, sizes: dict[str, int]) -> ConfigDict:
    """A copy of the config with a mesh of the topology, -1 filled in; raises ConfigError."""
    config = configs.override(config, {f"mesh.{a}": n for a, n in sizes.items()} | {"mesh.slices": topology.slices})
    sizes = axis_sizes(config.mesh, topology.devices)
    return configs.override(config, {f"mesh.{axis}": n for axis, n in sizes.items()})


def check(config: ConfigDict, topology: Topology) -> None:
    """Raises ConfigError unless rows, tokens and heads divide over the config's mesh."""
    sizes = {axis: config.mesh[axis] for axis in AXES}
    check_fit(sizes, config.rows.count, config.rows.tokens, config.optimizer.accumulate)
    attending(config, topology)


def parse_mesh(mesh: str) -> dict[str, int]:
    """ "fsdp=32,context=8" as a dict; raises ConfigError."""
    sizes = {}
    for part in mesh.split(","):
        axis, _, n = part.strip().partition("=")
        if axis not in AXES or not re.fullmatch(r"-1|[1-9][0-9]{0,6}", n):
            raise ConfigError(
                f"--mesh={mesh}: {part!r}: expected AXIS=DEVICES with an axis of {', '.join(AXES)}, and -1 for all "
                "devices that are left"
            )
        if axis in sizes:
            raise ConfigError(f"--mesh={mesh}: {axis} is there twice")
        sizes[axis] = int(n)
    return sizes


def refit(config: ConfigDict, topology: Topology) -> ConfigDict:
    """The config with the mesh of the topology that is nearest to its own of all over which a step divides.

    The data axis runs over the slices only. Tensor stays before context does; fsdp has what they leave. Raises
    ConfigError where there is none.
    """
    r, m, parts = config.rows, config.model, config.optimizer.accumulate
    inner = mlp_dim(m)
    found = meshes(topology, r.count // parts, r.tokens, m.heads, inner) if r.count % parts == 0 else []

    def far(sizes: dict[str, int]) -> tuple[float, ...]:
        return tuple(abs(math.log(sizes[axis] / max(1, config.mesh[axis]))) for axis in ("tensor", "context"))

    refusal = None
    for sizes in sorted((s for s in found if s["data"] == topology.slices), key=far):
        try:
            fitted = on(config, topology, sizes)
            check(fitted, topology)
            return fitted
        except ConfigError as e:  # a strategy or a kernel that won't have it; of the nearest is told
            refusal = refusal or e
    raise refusal or undivided(config, topology)


def sampling_config(config: ConfigDict, topology: Topology) -> ConfigDict:
    """The config whose rows hold one clip of `config.sample`'s size each, one a slice, as drawing it has them."""
    geometry, s = geometry_from_config(config.tokenizer, config.vae), config.sample
    tokens = geometry.tokens(*geometry.cover(s.frames, s.height, s.width))
    step = 128 * (topology.devices // topology.slices)  # whole vectors of a TPU, however many devices share the clip
    changes = {
        "rows.count": topology.slices,
        "rows.tokens": -(-tokens // step) * step,
        "rows.segments": 1,
        "rows.text": config.rows.caption,
        "optimizer.accumulate": 1,
        "mesh.context": max(config.mesh.context, 1) * max(config.mesh.fsdp, 1),
        "mesh.fsdp": 1,
        "mesh.data": topology.slices,
    }
    return configs.override(config, changes)
