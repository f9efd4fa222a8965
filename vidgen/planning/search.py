"""Which meshes, microbatches, rematerialisations and attention strategies suit a topology: all that fit, best first.

Arithmetic only: an estimate of the time by the roofline, and of the memory from shapes. The best are worth compiling.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import TypeVar

from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.models import remat
from vidgen.models.architecture import mlp_dim
from vidgen.planning import arithmetic
from vidgen.planning.hardware import Topology
from vidgen.planning.memory import HEADROOM
from vidgen.planning.roofline import Roofline

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to lay a step on a topology, as changes to a config.

    Attributes:
      mesh: devices along data, fsdp, context and tensor.
      accumulate: microbatches.
      remat: name of the preset.
      attention: strategy over context, as `config.mesh.attention` spells it; local where context is 1.
      bytes_per_device: estimated peak.
      fits: whether that leaves a tenth of the memory free.
      roofline: the estimated step.
      recomputed_fraction: of the FLOPs.
    """

    mesh: dict[str, int]
    accumulate: int
    remat: str
    attention: str
    bytes_per_device: float
    fits: bool
    roofline: Roofline
    recomputed_fraction: float

    @property
    def step_s(self) -> float:
        return self.roofline.step_s

    def facts(self) -> dict[str, object]:
        """What `--json` has of it."""
        return {
            "mesh": self.mesh,
            "accumulate": self.accumulate,
            "remat": self.remat,
            "attention": self.attention,
            "estimated_bytes_per_device": self.bytes_per_device,
            "estimated_fits": self.fits,
            "estimated_step_seconds": self.step_s,
            "estimated_mfu": self.roofline.mfu,
            "estimated_recomputed_fraction": self.recomputed_fraction,
        }

    @property
    def changes(self) -> dict[str, object]:
        """Dotted config keys → values, for `vidgen.config.override`."""
        changes = {f"mesh.{axis}": n for axis, n in self.mesh.items()}
        changes |= {"optimizer.accumulate": self.accumulate, "model.remat": self.remat, "mesh.ulysses": 0}
        return changes | ({} if self.attention == "local" else {"mesh.attention": self.attention})


def meshes(topology: Topology, rows: int, tokens: int, heads: int, inner: int) -> list[dict[str, int]]:
    """All meshes of the topology over which a step divides.

    Args:
      rows, tokens: of a step, and of a row.
      heads, inner: of a layer, and the hidden width of its MLP: tensor divides both.
    """
    n = topology.devices
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    found = []
    for tensor in (d for d in divisors if heads % d == 0 and inner % d == 0):
        for context in (d for d in divisors if tokens % d == 0 and n % (d * tensor) == 0):
            over = n // (context * tensor)
            if rows % over:
                continue
            for data in (d for d in divisors if over % d == 0 and d % topology.slices == 0):
                found.append({"data": data, "fsdp": over // data, "context": context, "tensor": tensor})
    return found


def strategies(heads: int, mesh: dict[str, int]) -> list[str]:
    """The ways that attention can go over the context axis of a mesh; "local" where it has one device."""
    context, heads = mesh["context"], heads // mesh["tensor"]
    if context == 1:
        return ["local"]
    if heads % context == 0:
        return ["gather", "ulysses", "ring"]
    shared = any(heads % d == 0 and context % d == 0 for d in range(2, context))
    return ["gather", "ring"] + ["ulysses+gather", "ulysses+ring"] * shared


def undivided(config: ConfigDict, topology: Topology) -> ConfigError:
    """What to say where no mesh of the topology divides a step."""
    r = config.rows
    return ConfigError(
        f"--topology={topology.text}: no mesh of {topology.devices} devices divides config.rows.count={r.count}, "
        f"config.rows.tokens={r.tokens} and config.model.heads={config.model.heads}; rows or tokens with more factors "
        f"of {topology.devices} would"
    )


def rank(
    config: ConfigDict,
    topology: Topology,
    presets: Iterable[str] = (),
    accumulates: Iterable[int] = (1, 2, 4, 8),
) -> list[Candidate]:
    """Ways to lay the step of `config` on a topology, those that fit first, fastest first.

    Of meshes that differ only in how data and fsdp share their devices, the best. What is offloaded to the host takes
    no memory of the device. Every candidate's time is `arithmetic.estimate` of the config with its changes.

    Args:
      presets: of `config.model.remat`, to try; empty: all there are, and the config's own.
      accumulates: microbatches to try.

    Raises ConfigError where no mesh divides the step.
    """
    m, r = config.model, config.rows
    presets = tuple(presets) or tuple(dict.fromkeys((*remat.PRESETS, m.remat)))
    shown = arithmetic.supposed(config)
    trial = configs.override(config, {"mesh.slices": topology.slices})  # changed in place: there are thousands
    refusal, found = undivided(config, topology), {}
    shapes = meshes(topology, r.count, r.tokens, m.heads, mlp_dim(m))
    for mesh, accumulate in itertools.product(shapes, accumulates):
        if r.count % (mesh["data"] * mesh["fsdp"] * accumulate):
            continue
        for strategy in strategies(m.heads, mesh):
            trial.mesh.update(mesh, attention=config.mesh.attention if strategy == "local" else strategy, ulysses=0)
            trial.optimizer.accumulate = accumulate
            try:
                arithmetic.attending(trial, topology)
            except ConfigError as e:  # a kernel that won't have so few tokens, say
                refusal = e
                continue
            for preset in presets:
                trial.model.remat = preset
                new = _candidate(trial, topology, shown, strategy)
                alike = mesh["context"], mesh["tensor"], accumulate, preset, strategy
                found[alike] = min(found.get(alike, new), new, key=_order)
    if not found:
        raise refusal
    return sorted(found.values(), key=_order)


def _candidate(trial: ConfigDict, topology: Topology, shown: arithmetic.Mix, strategy: str) -> Candidate:
    e = arithmetic.estimate(trial, topology, shown=shown)
    size = sum(arithmetic.memory_parts(trial, topology).values())
    fits = size <= HEADROOM * topology.chip.hbm_bytes
    accumulate, recomputed = trial.optimizer.accumulate, e.flops.recomputed_fraction
    return Candidate(e.mesh, accumulate, trial.model.remat, strategy, size, fits, e.roofline, recomputed)


def _order(c: Candidate) -> tuple[bool, float, float]:
    """What fits, by time; what doesn't, by how far it is from fitting. Equal times: the smaller."""
    return not c.fits, c.step_s if c.fits else c.bytes_per_device, c.bytes_per_device


def pareto(found: Iterable[T], cost: Callable[[T], tuple[float, float]]) -> list[T]:
    """Those that no other beats in both time and memory, fastest first; `cost`: the two."""
    best: list[T] = []
    for one in sorted(found, key=cost):
        if not best or cost(one)[1] < cost(best[-1])[1]:
            best.append(one)
    return best
