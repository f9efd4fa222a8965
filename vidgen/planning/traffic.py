"""What a training step moves between devices and between a device and its memory, from shapes alone.

Estimates, for ranking meshes before any is compiled; `vidgen/planning/hlo.py` reads the same from the compiled program.
"""

from __future__ import annotations

import dataclasses
import math

from ml_collections import ConfigDict

from vidgen.models.architecture import mlp_dim
from vidgen.planning.parameters import block_parameters, parameters, row_tokens

MASTER = 4  # bytes of a weight, a moment or a gradient


def number(config: ConfigDict) -> int:
    """Bytes of a number in matrix products."""
    return 4 if config.dtype == "float32" else 2


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of exchange between devices.

    Attributes:
      role: what for.
      axes: of the mesh that it runs over.
      sent: bytes that a device sends each time.
      count: times a step.
      hidden: whether it runs beside the devices' work.
      members: devices of a group that exchange all with all; 1 for all else.
    """

    role: str
    axes: tuple[str, ...]
    sent: float
    count: int
    hidden: bool
    members: int = 1


def split_attention(config: ConfigDict, mesh: dict[str, int], strategy: str, ulysses: int) -> tuple[int, str]:
    """(devices of the context axis that exchange heads for tokens, what the rest does: local, gather or ring)."""
    if mesh["context"] == 1:
        return 1, "local"
    inner = 1
    if strategy == "auto":
        strategy = "ulysses+gather"
    if "ulysses" in strategy:
        heads = config.model.heads // mesh["tensor"]
        inner = ulysses or math.gcd(heads, mesh["context"])
    outer = strategy.rpartition("+")[2].replace("ulysses", "local")
    return inner, outer if inner < mesh["context"] else "local"


def communication(
    config: ConfigDict, mesh: dict[str, int], *, accumulate: int, strategy: str, ulysses: int = 0
) -> list[Traffic]:
    """The exchanges of one training step, a device's.

    Weights are gathered, in the dtype of products, once forward and once backward, a microbatch; their gradients, and
    the sums over devices that hold the same pieces, are float32. Keys and values are gathered once each way and their
    gradients scattered once; a ring sends as much, and the gradients in float32; ulysses exchanges queries, keys,
    values and results, once forward and twice backward. Tensor parallelism sums three activations a block each way.

    Weights, gradients and the rounds of a ring are taken to run beside the work; the other exchanges stand between two
    pieces of work that need them. What a compiled program does is read from it instead.

    Args:
      mesh: devices along data, fsdp, context and tensor.
      accumulate: microbatches.
      strategy: of attention over context, as `config.mesh.attention` spells it.
      ulysses: as `config.mesh.ulysses`.
    """
    m, r, matrix = config.model, config.rows, number(config)
    data, fsdp, context, tensor = (mesh[axis] for axis in ("data", "fsdp", "context", "tensor"))
    over = {"default": ("fsdp", "context"), "fsdp": ("fsdp",)}.get(config.mesh.rules, ())
    rows = r.count / (data * fsdp * accumulate)  # of a device, in a microbatch
    times = m.layers * accumulate
    found = []

    def add(role, axes, sent, count, hidden=True, members=1):
        axes = tuple(axis for axis in axes if mesh[axis] > 1)
        if axes and sent:
            found.append(Traffic(role, axes, sent, count, hidden, members))

    weights = block_parameters(config) / tensor
    pieces = math.prod(mesh[axis] for axis in over)
    shared = math.prod(n for axis, n in mesh.items() if axis not in over and axis != "tensor")
    add("weights", over, weights * matrix * (1 - 1 / pieces), 2 * times)
    add("gradients", over, weights * MASTER * (1 - 1 / pieces), times)
    rest = tuple(axis for axis in ("data", "fsdp", "context") if axis not in over)
    add("gradients of copies", rest, 2 * weights / pieces * MASTER * (1 - 1 / shared), times)

    width = m.width / tensor
    row = rows * row_tokens(config) * width * matrix  # one activation of whole rows
    inner, outer = split_attention(config, mesh, strategy, ulysses)
    rounds = context // inner
    if inner > 1:
        add("ulysses", ("context",), 4 * row / context * (1 - 1 / inner), 3 * times, hidden=False, members=inner)
    if outer != "local":
        # After ulysses a device has all of its group's tokens, for its share of the heads.
        keys = 2 * row / inner * (1 - 1 / rounds)
        ring = outer == "ring"
        add(f"{outer}: keys and values", ("context",), keys, 2 * times, hidden=ring)
        add(f"{outer}: their gradients", ("context",), keys * (2 if ring else 1), times, hidden=ring)
    summed = 2 * rows * row_tokens(config) / context * m.width * matrix * (1 - 1 / tensor)
    add("tensor", ("tensor",), summed, 6 * times, hidden=False)
    return found


def shards(config: ConfigDict, mesh: dict[str, int]) -> int:
    """Pieces that the state is cut into by `config.mesh.rules`."""
    axes = {"default": ("fsdp", "context", "tensor"), "fsdp": ("fsdp", "tensor")}.get(config.mesh.rules, ())
    return math.prod(mesh[axis] for axis in axes)


def state_bytes(config: ConfigDict, features: int, mesh: dict[str, int]) -> float:
    """Of a device: weights, the average of those that train, the optimizer's moments, float32.

    Moments are two numbers a weight; of Muon one for the matrices; of Adafactor the momentum, if any; of GaLore two and
    a half, for matrices about twice as wide as high, times its rank.
    """
    count = trained(config, features)
    o = config.optimizer
    moments = {"adafactor": float(o.beta1 > 0), "galore": min(2.5 * o.galore_rank, 2.0)}.get(o.name, 2.0) * count
    if o.name == "muon" and not config.lora.rank:
        moments -= config.model.layers * block_parameters(config)
    return MASTER * (parameters(config, features) + count + moments) / shards(config, mesh)


def trained(config: ConfigDict, features: int) -> float:
    """Weights that train: all, or those of low-rank updates, taken to be of all projections of attention.

    Groups of parameters that `config.optimizer.groups` freezes are known by their paths alone, and not left out here.
    """
    m, rank = config.model, config.lora.rank
    return m.layers * 4 * (1 + m.cross) * 2 * m.width * rank if rank else parameters(config, features)


def memory_traffic(
    config: ConfigDict, features: int, mesh: dict[str, int], *, recomputed: bool, accumulate: int = 1
) -> float:
    """Bytes that a device reads and writes in a step beside what matrix products and attention stream while they work.

    Elementwise work backward is twice that forward, and forward again where blocks are computed again. A gathered
    weight is written and read, forward and backward. The optimizer reads weights, average, moments and gradient and
    writes all but the gradient.
    """
    update = 2 * state_bytes(config, features, mesh) + 2 * MASTER * parameters(config, features) / shards(config, mesh)
    return elementwise(config, mesh) * (3 + recomputed) + 2 * gathered(config, mesh) * accumulate + update


def drawing_traffic(config: ConfigDict, mesh: dict[str, int], evaluations: int) -> float:
    """As `memory_traffic`, of `evaluations` forward passes."""
    return evaluations * (elementwise(config, mesh) + gathered(config, mesh))


def gathered(config: ConfigDict, mesh: dict[str, int]) -> float:
    """Bytes of all gathered weights of blocks, written and read once."""
    return 2 * number(config) * config.model.layers * block_parameters(config) / mesh["tensor"]


def elementwise(config: ConfigDict, mesh: dict[str, int]) -> float:
    """Bytes that elementwise work moves forward, in all layers of a device.

    In bytes a token and number of width, for products of n bytes: the modulation picked for tokens in float32, six
    written and read (48); norms that read the residual r and write n, three times; queries and keys normed, rotated and
    laid out by heads (read and written twice: 8 n, cross-attention's query 4 n), values laid out (2 n), results laid
    out (4 n); three sums into the residual; the activation of an MLP of ratio ρ (2 n ρ).
    """
    m, n = config.model, number(config)
    residual = 2 if m.residual == "bfloat16" else 4
    a_number = 48 + 3 * (residual + n) + (8 + 4 + 2 + 4) * n + 3 * (2 * residual + n)
    a_number += 2 * n * mlp_dim(m) / m.width
    local = config.rows.count * row_tokens(config) / (mesh["data"] * mesh["fsdp"] * mesh["context"])
    return a_number * local * m.width * m.layers / mesh["tensor"]
