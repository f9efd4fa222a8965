"""Which part of which weight lies on which device: one table of regular expressions, and the audit of what it does.

A rule is (regex of a parameter's path, the mesh axes of its last dimensions). The first that matches counts. Optimizer
moments and averages match by the same paths, since theirs end like the parameter's. The layer axis of stacked layers is
never sharded, `scan` walks it. A dimension that its axes don't divide is left whole, axis by axis, and the audit
says so.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.parallel.mesh import AXES, path_name

Axes = str | tuple[str, ...] | None
Rules = tuple[tuple[str, tuple[Axes, ...]], ...]

# Weights are stored in pieces over fsdp (their outputs) and context (their inputs) and gathered where they are used,
# axis by axis: of a gather over two axes at once, or of gradients scattered over two along one dimension, the compiler
# of TPUs makes all-reduces. `tensor` splits a layer's work: heads and hidden width, the outputs of the first product
# and the inputs of the second.
PRESETS: dict[str, Rules] = {
    "default": (
        (r"embedding$", (("fsdp", "context"), None)),
        (r"/(query|(image_)?(key|value)|up)/kernel$", ("context", ("tensor", "fsdp"))),
        (r"/(out|down)/kernel$", (("tensor", "context"), "fsdp")),
        (r"kernel$", ("context", "fsdp")),
        # Low-rank updates, [in, rank] and [rank, out]: cut as their kernel is, but for the rank.
        (r"/(out|down)/lora_a$", (("tensor", "context"), None)),
        (r"lora_a$", ("context", None)),
        (r"/(query|(image_)?(key|value)|up)/lora_b$", (None, ("tensor", "fsdp"))),
        (r"lora_b$", (None, "fsdp")),
    ),
    # Weights over fsdp alone: larger pieces, gathers over one axis only.
    "fsdp": (
        (r"embedding$", ("fsdp", None)),
        (r"/(query|(image_)?(key|value)|up)/kernel$", (None, ("tensor", "fsdp"))),
        (r"/(out|down)/kernel$", ("tensor", "fsdp")),
        (r"kernel$", (None, "fsdp")),
        (r"/(out|down)/lora_a$", ("tensor", None)),
        (r"/(query|(image_)?(key|value)|up)/lora_b$", (None, ("tensor", "fsdp"))),
        (r"lora_b$", (None, "fsdp")),
    ),
    # Every device holds all weights: small models, and the reference that the others are tested against.
    "replicated": (),
}


def rules_of(c: ConfigDict) -> Rules:
    """`config.mesh.override`, then the table `config.mesh.rules`; raises ConfigError."""
    if c.rules not in PRESETS:
        raise ConfigError(f"config.mesh.rules={c.rules!r}: known are {', '.join(PRESETS)}")
    return (*map(_rule, c.override), *PRESETS[c.rules])


def _rule(rule: Any) -> tuple[str, tuple[Axes, ...]]:
    """One rule of a config, checked."""
    told = f"config.mesh.override: {rule!r}"
    try:
        pattern, tail = rule
        re.compile(pattern)
        tail = tuple(tuple(axes) if isinstance(axes, list | tuple) else axes for axes in tail)
        named = [name for axes in tail for name in _names(axes)]
    except (TypeError, ValueError, re.error) as e:
        raise ConfigError(f"{told}: expected (path regex, (axis or None, …)); {e}") from None
    if pattern.startswith("^") or len(tail) > 2:
        # The state and the layers that use it look a parameter up by paths and shapes that begin differently.
        raise ConfigError(f"{told}: a regex is searched for in the path, without ^, and names the last two dimensions")
    if any("tensor" in _names(axes)[1:] for axes in tail):
        raise ConfigError(f"{told}: tensor comes first where axes share a dimension")
    if unknown := set(named) - set(AXES):
        raise ConfigError(f"{told}: unknown axis {sorted(map(str, unknown))[0]!r}; known are {', '.join(AXES)}")
    return pattern, tail


def _names(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def spec_of(path: str, shape: tuple[int, ...], sizes: dict[str, int], rules: Rules) -> P:
    """The spec of one array: of the first rule that matches its path and has no more dimensions than it."""
    for pattern, tail in rules:
        if re.search(pattern, path) and len(shape) >= len(tail):
            lead = len(shape) - len(tail)
            return P(*(None,) * lead, *(_dividing(axes, n, sizes) for axes, n in zip(tail, shape[lead:], strict=True)))
    return P()


def _dividing(axes: Axes, n: int, sizes: dict[str, int]) -> Axes:
    """Those of the axes, in order, that divide what the ones before leave of n; a lone one as a string."""
    kept = []
    for axis in _names(axes):
        if sizes[axis] > 1 and n % sizes[axis] == 0:
            kept.append(axis)
            n //= sizes[axis]
    return tuple(kept) if len(kept) > 1 else kept[0] if kept else None


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """A sharding for each array of a state: optimizer moments and averages end like the parameters they belong to."""
    sizes = dict(mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_of(path_name(path), x.shape, sizes, rules)), tree
    )


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where one array of the state lies.

    Attributes:
      path, shape, spec: of the array.
      bytes: of the whole array.
      bytes_per_device: of the largest piece.
    """

    path: str
    shape: tuple[int, ...]
    spec: P
    bytes: int
    bytes_per_device: int


def audit(tree: Any, mesh_sizes: dict[str, int], rules: Rules) -> list[Placed]:
    """Each array's place, largest share of a device first; `tree` may hold shapes only."""
    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        spec = spec_of(path_name(path), x.shape, mesh_sizes, rules)
        cut = math.prod(mesh_sizes[a] for axes in spec for a in _names(axes))
        whole = x.size * x.dtype.itemsize
        found.append(Placed(path_name(path), tuple(x.shape), spec, whole, whole // cut))
    return sorted(found, key=lambda p: -p.bytes_per_device)


# An array of at least so many bytes must not lie whole on a device, if there are several.
LARGE = 64 * 2**20


def check_sharded(placed: list[Placed], mesh_sizes: dict[str, int], rules_name: str) -> None:
    """Raises ConfigError if anything large is replicated, unless that is what was asked for.

    That is: by a mesh of the data axis alone, or by the rules "replicated".
    """
    if mesh_sizes["fsdp"] * mesh_sizes["context"] * mesh_sizes["tensor"] == 1 or rules_name == "replicated":
        return
    whole = [p for p in placed if p.bytes >= LARGE and p.bytes_per_device == p.bytes]
    if whole:
        worst, more = whole[0], f", and {len(whole) - 1} more" if len(whole) > 1 else ""
        raise ConfigError(
            f"config.mesh.rules={rules_name}: {worst.path} {worst.shape} ({worst.bytes / 2**20:.0f} MiB) would lie "
            f"whole on every device{more}; widths that the axes divide, or config.mesh.override"
        )
