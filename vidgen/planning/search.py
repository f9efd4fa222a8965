"""Which meshes, microbatches, rematerialisations and attention strategies suit a topology: all that fit, best first.

Arithmetic only: an estimate of the time by the roofline, and of the memory from shapes. The best are worth compiling.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping

from ml_collections import ConfigDict

from vidgen.config import ConfigError
from vidgen.planning.flops import Pairs, StepFlops, block_parameters, hidden, parameters, step_flops
from vidgen.planning.hardware import Topology
from vidgen.planning.roofline import Roofline, predict
from vidgen.planning.traffic import (
    MASTER,
    MATRIX,
    Traffic,
    communication,
    memory_traffic,
    shards,
    split_attention,
    state_bytes,
)

STRATEGIES = ("gather", "ulysses", "ring", "ulysses+gather", "ulysses+ring")
LANES = 128  # of a TPU's vector unit
HEADROOM = 0.9  # share of the memory that an estimate may fill


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


def kept_bytes(config: ConfigDict, tensor: int) -> dict[str, float]:
    """Bytes a token that a block holds for the backward pass if it keeps a tensor, by name; in pieces over tensor."""
    m = config.model
    wide = MATRIX * m.width
    found = dict.fromkeys(("attention_norm", "attention_project", "cross_project", "mlp_down"), wide)
    found["residual"] = (2 if m.residual == "bfloat16" else 4) * m.width
    pieces = dict.fromkeys(("query", "key", "value", "attention_out", "cross_query", "cross_out"), wide)
    pieces |= {"attention_lse": 4 * m.heads, "cross_lse": 4 * m.heads}
    pieces["mlp_up"] = MATRIX * hidden(m.width, m.mlp_ratio)
    return found | {name: size / tensor for name, size in pieces.items()}


def memory_parts(
    config: ConfigDict,
    features: int,
    mesh: dict[str, int],
    *,
    accumulate: int,
    saved: Collection[str],
    everything: bool,
    strategy: str,
) -> dict[str, float]:
    """What a device holds at the peak, by the estimate: what it is → bytes.

    Args:
      saved: names that blocks keep on the device.
      everything: nothing is computed again, so that what has no name is kept too.
      strategy: of attention over context.
    """
    m, r = config.model, config.rows
    tensor = mesh["tensor"]
    rows = r.count / (mesh["data"] * mesh["fsdp"] * accumulate)
    local = rows * r.tokens / mesh["context"]
    # Float32: the modulation picked for tokens (6), norms and sums between the named tensors (6).
    unnamed = 12 * 4 * m.width
    block = block_parameters(config) / tensor
    working = local * (2 * unnamed + MATRIX * (12 * m.width + 4 * hidden(m.width, m.mlp_ratio)) / tensor)
    inner, outer = split_attention(config, mesh, strategy, 0)
    keys = 2 * rows * r.tokens * m.width / tensor / inner  # numbers, of all tokens
    exchanged = {"gather": (MATRIX + MASTER) * keys, "ring": 8 * MASTER * keys / (mesh["context"] // inner)}
    kept = {f"{name} of all layers": m.layers * local * size for name, size in kept_bytes(config, tensor).items()
            if name in saved}  # fmt: skip
    return kept | {
        "weights, their average and the optimizer's moments": state_bytes(config, features, mesh),
        "gradients": MASTER * parameters(config, features) / shards(config, mesh) * (2 if accumulate > 1 else 1),
        "what has no name, of all layers": m.layers * local * unnamed if everything else 0.0,
        # This block's and the next's, gathered, and a gradient in float32.
        "gathered weights": 2 * MATRIX * block + MASTER * block,
        "one block at work": working,
        "keys and values of other devices": exchanged.get(outer, 0.0),
        "tokens, noise and the two ends": local * (2 * features * 4 + 3 * 4 * m.width),
    }


def rank(
    config: ConfigDict,
    features: int,
    topology: Topology,
    useful: Pairs,
    executed: Pairs,
    presets: Mapping[str, Mapping[str, str]],
    kernel: str,
    accumulates: Iterable[int] = (1, 2, 4, 8),
) -> list[Candidate]:
    """Ways to lay the step of `config` on a topology, those that fit first, fastest first.

    Of meshes that differ only in how data and fsdp share their devices, the best. What is offloaded to the host is
    taken to cost neither memory nor time.

    Args:
      features: P, width of a token.
      useful, executed: pairs of a step that see each other, and that are computed.
      presets: of rematerialisation: name → what is done with each tensor, as `vidgen.models.remat.PRESETS`.
      kernel: of attention, a key of `vidgen.planning.roofline.KERNELS`; a ring always computes blockwise. Splash wants
        a multiple of 128 of a row's tokens on each device.
      accumulates: microbatches to try.

    Raises ConfigError where no mesh divides the step.
    """
    m, r = config.model, config.rows
    shapes = meshes(topology, r.count, r.tokens, m.heads, hidden(m.width, m.mlp_ratio))
    if kernel.startswith("splash"):
        shapes = [mesh for mesh in shapes if r.tokens // mesh["context"] % LANES == 0]
    if not shapes:
        raise ConfigError(
            f"--topology={topology.text}: no mesh of {topology.devices} devices divides config.rows.count={r.count}, "
            f"config.rows.tokens={r.tokens} and config.model.heads={m.heads}; rows or tokens with more factors of "
            f"{topology.devices} would"
        )
    spared = {p: frozenset(n for n, act in names.items() if act != "recompute") for p, names in presets.items()}
    kept = {p: {n for n, act in names.items() if act == "save"} for p, names in presets.items()}
    for preset, names in presets.items():
        kept[preset] |= {"residual"} if names.get("residual") != "offload" else set()
    work: dict[tuple[str, str], StepFlops] = {}
    found: dict[tuple, Candidate] = {}
    for mesh, accumulate in itertools.product(shapes, accumulates):
        if r.count % (mesh["data"] * mesh["fsdp"] * accumulate):
            continue
        for strategy in strategies(m.heads, mesh):
            runs = "blockwise" if strategy.endswith("ring") else kernel
            traffic: list[Traffic] = communication(config, mesh, accumulate=accumulate, strategy=strategy)
            for remat, saved in kept.items():
                everything = remat == "none"
                if (remat, runs) not in work:
                    work[remat, runs] = step_flops(
                        config,
                        features,
                        useful.full,
                        useful.text,
                        useful.crossed,
                        useful.windowed,
                        executed=executed,
                        saved=None if everything else spared[remat],
                        kernel=runs,
                    )
                flops = work[remat, runs]
                parts = memory_parts(
                    config,
                    features,
                    mesh,
                    accumulate=accumulate,
                    saved=saved,
                    everything=everything,
                    strategy=strategy,
                )
                size = sum(parts.values())
                moved = memory_traffic(config, features, mesh, recomputed=not everything, accumulate=accumulate)
                roofline = predict(
                    topology,
                    mesh,
                    flops,
                    kernel=runs,
                    head=m.width // m.heads,
                    hbm_bytes=moved,
                    traffic=traffic,
                    tokens=r.count * r.tokens,
                )
                fits = size <= HEADROOM * topology.chip.hbm_bytes
                new = Candidate(mesh, accumulate, remat, strategy, size, fits, roofline, flops.recomputed_fraction)
                alike = mesh["context"], mesh["tensor"], accumulate, remat, strategy
                found[alike] = min(found.get(alike, new), new, key=_order)
    return sorted(found.values(), key=_order)


def _order(c: Candidate) -> tuple[bool, float, float]:
    """What fits, by time; what doesn't, by how far it is from fitting. Equal times: the smaller."""
    return not c.fits, c.step_s if c.fits else c.bytes_per_device, c.bytes_per_device


def pareto(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that no other beats in both time and memory, fastest first."""
    best: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.step_s, c.bytes_per_device)):
        if not best or c.bytes_per_device < best[-1].bytes_per_device:
            best.append(c)
    return best
