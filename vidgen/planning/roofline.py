"""How long a step takes, by arithmetic: work over rate for the matrix units, memory and links. An estimate.

Every constant is argued from a public source named beside it, and none is fitted to a measured step. The published
steps that the estimate is held against are in `tests/planning/test_roofline.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from vidgen.planning.flops import StepFlops
from vidgen.planning.hardware import Chip, Topology, axis_bandwidth

# Share of the peak that large matrix products reach.
# TPU: MaxText's README reports up to 71.5 % MFU on v5p for whole steps of dense language models (32B, v5p-128), norms,
#   optimizer, exposed gathers and some recomputation included, so products alone must reach about 80 %.
# GPU: cuBLAS at some 700 of an H100's 989 TFLOP/s, what its power limit leaves of the peak.
MATMUL = {"tpu": 0.80, "cuda": 0.70}

# Attention by cuDNN on an H100, (forward, backward) as shares of the peak: 595 and 516 TFLOP/s at 16k tokens and heads
# of 128 (Shah et al., FlashAttention-3, arXiv:2407.08608, figures 5 and 6; backward counted as five products).
CUDNN = (595 / 989, 516 / 989)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One run of an attention kernel over all scores.

    Attributes:
      products: matrix products a score.
      vector: elementwise operations a score.
      bytes: that a score moves to and from memory.
    """

    products: int
    vector: int
    bytes: int = 0


# Elementwise operations a score, counted in JAX's splash kernel (jax.experimental.pallas.ops.tpu.splash_attention).
# Forward: compare segments, select, running maximum, subtract, exp as two, sum, round to bf16. Backward: compare,
# select, subtract, exp as two, dP - δ, times P, round dS, and P where dV is made. The softmax of a block stands between
# its products, and nothing in the kernel interleaves blocks: the times add up.
_SPLASH = Pass(2, 8)
# Kernels that XLA makes of plain JAX hold a block's scores in memory. Forward: float32 scores written, read for the
# maximum and for exp, bf16 weights written and read. Backward: scores written and read, weights written and read, dP
# written and read, dS written and read twice.
_XLA, _XLA_BACKWARD = Pass(2, 8, 4 + 4 + 4 + 2 + 2), Pass(5, 9, 4 + 4 + 2 + 2 + 4 + 4 + 2 + 2 + 2)
KERNELS: dict[str, tuple[tuple[Pass, ...], tuple[Pass, ...]]] = {
    "splash": ((_SPLASH,), (Pass(5, 9),)),
    "splash_unfused": ((_SPLASH,), (Pass(3, 8), Pass(4, 9))),
    "blockwise": ((_XLA,), (_XLA_BACKWARD,)),
    "dense": ((_XLA,), (dataclasses.replace(_XLA_BACKWARD, products=4),)),
    "cudnn": ((Pass(2, 0),), (Pass(5, 0),)),
}


def attention_efficiency(chip: Chip, kernel: str, head: int) -> tuple[float, float]:
    """Share of the peak at which attention runs, (forward, backward), over the products that it executes.

    Heads narrower than the systolic array leave part of it idle: each product has the head's width as its inner or its
    outer dimension.

    Args:
      kernel: a key of `KERNELS`.
      head: width of a head.
    """
    if kernel == "cudnn":
        return CUDNN
    rate = chip.flops * MATMUL[chip.platform] * head / (-(-head // chip.array) * chip.array)

    def share(passes: tuple[Pass, ...]) -> float:
        flops = sum(p.products for p in passes) * 2 * head
        seconds = flops / rate + sum(p.vector / chip.vector + p.bytes / chip.hbm for p in passes)
        return flops / seconds / chip.flops

    forward, backward = KERNELS[kernel]
    return share(forward), share(backward)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A predicted step, in seconds of one device.

    Attributes:
      compute_s: matrix products with weights, recomputed ones too.
      attention_s: attention, recomputed too.
      hbm_s: elementwise work and the optimizer, which memory bounds.
      ici_s, dcn_s: transfers over the links of a slice (or host) and over the data-centre network, if nothing hid them.
      host_s: what is offloaded to the host, there and back, if nothing hid it.
      exposed_s: what of the transfers the work does not hide.
      step_s: of it all: compute, attention, memory and exposed transfers, one after the other.
      mfu: useful FLOPs over what the peak would do in that time.
      tokens_per_second: of all devices, padding included.
      slowest: the largest of the parts.
    """

    compute_s: float
    attention_s: float
    hbm_s: float
    ici_s: float
    dcn_s: float
    host_s: float
    exposed_s: float
    step_s: float
    mfu: float
    tokens_per_second: float

    @property
    def slowest(self) -> str:
        parts = {
            "matrix products": self.compute_s,
            "attention": self.attention_s,
            "memory": self.hbm_s,
            "transfers": self.exposed_s,
        }
        return max(parts, key=parts.get)


def predict(
    topology: Topology,
    mesh: dict[str, int],
    flops: StepFlops,
    *,
    kernel: str,
    head: int,
    hbm_bytes: float,
    traffic: Iterable[Any],
    tokens: float,
    host_bytes: float = 0.0,
) -> Roofline:
    """The step of a program whose work and transfers are known.

    Args:
      mesh: devices along each axis, outermost first.
      flops: of all devices together.
      kernel: of attention, a key of `KERNELS`.
      head: width of an attention head.
      hbm_bytes: that a device reads and writes beside its products (`vidgen.planning.traffic.memory_traffic`).
      traffic: each with `axes`, `sent` (bytes of a device, each time), `count` (times a step), `hidden` (whether it
        runs beside work) and `members`: by `vidgen.planning.traffic.communication`, or read from the compiled program.
      tokens: of a step.
      host_bytes: that a device sends to its host in a step, and gets back.
    """
    chip, devices = topology.chip, topology.devices
    peak = chip.flops * devices
    forward, backward = attention_efficiency(chip, kernel, head)
    compute = (flops.matmul + flops.matmul_recomputed) / peak / MATMUL[chip.platform]
    attention = (flops.attention_forward + flops.attention_recomputed) / peak / forward
    attention += flops.attention_backward / peak / backward
    memory = hbm_bytes / chip.hbm

    rates = axis_bandwidth(topology, mesh)
    outside = {"data"} if topology.slices > 1 else set()
    seconds = {(far, beside): 0.0 for far in (False, True) for beside in (False, True)}
    for t in traffic:
        # An exchange over several axes goes over all their links, but is as slow as the slowest of them at the least.
        rate = min((rates.get(axis, chip.link) for axis in t.axes), default=chip.link)
        far = bool(outside & set(t.axes))
        # On a ring of links an exchange of all with all passes each byte over n/4 of them in the mean.
        hops = max(1.0, t.members / 4) if chip.torus else 1.0
        seconds[far, t.hidden] += t.sent * hops * t.count / rate
    host = 2 * host_bytes / chip.host  # out forward, back backward
    beside = max(seconds[False, True], seconds[True, True], host)  # links, network and host beside each other
    exposed = seconds[False, False] + seconds[True, False] + max(0.0, beside - compute - attention)
    step = compute + attention + memory + exposed
    return Roofline(
        compute_s=compute,
        attention_s=attention,
        hbm_s=memory,
        ici_s=seconds[False, False] + seconds[False, True],
        dcn_s=seconds[True, False] + seconds[True, True],
        host_s=host,
        exposed_s=exposed,
        step_s=step,
        mfu=flops.useful / peak / step,
        tokens_per_second=tokens / step,
    )


def assumptions(topology: Topology, kernel: str, head: int) -> list[str]:
    """The constants of an estimate, each in a line with its source, for the plan to print."""
    chip = topology.chip
    forward, backward = attention_efficiency(chip, kernel, head)
    source = "Google Cloud's TPU pages" if chip.platform == "tpu" else "NVIDIA's data sheet"
    why = {
        "tpu": "MaxText's published 71.5 % MFU of whole v5p steps",
        "cuda": "cuBLAS under an H100's power limit",
    }[chip.platform]
    how = (
        "measured by Shah et al., arXiv:2407.08608"
        if kernel == "cudnn"
        else "matrix units, then the vector unit's operations on each score, counted in the kernel"
    )
    host = "Austin et al., How to Scale Your Model" if chip.platform == "tpu" else source
    network = "data-centre network" if chip.platform == "tpu" else "InfiniBand"
    return [
        f"a device: {chip.flops / 1e12:.0f} TFLOP/s bf16, {chip.hbm / 1e9:.0f} GB/s of memory ({source})",
        f"{chip.link / 1e9:.0f} GB/s a link and way, {chip.network / 1e9:.2f} GB/s of {network} a device ({source})",
        f"{chip.host / 1e9:.0f} GB/s and way between a device and its host ({host})",
        f"matrix products at {MATMUL[chip.platform]:.0%} of the peak (from {why})",
        f"attention ({kernel}, heads of {head}) at {forward:.0%} forward, {backward:.0%} backward ({how})",
        "transfers with work beside them hide behind products and attention; all else adds up",
    ]


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a number of tokens costs.

    Attributes:
      steps, days, chip_hours: to train on them.
      cost: in the currency of the price, or None without one.
    """

    steps: float
    days: float
    chip_hours: float
    cost: float | None


def budget(
    topology: Topology, step_s: float, tokens_per_step: float, tokens: float, price: float | None = None
) -> Budget:
    """Time and money to train on `tokens` tokens; `price`: of a chip-hour."""
    steps = tokens / tokens_per_step
    hours = steps * step_s / 3600
    chip_hours = hours * topology.chips
    return Budget(steps, hours / 24, chip_hours, None if price is None else chip_hours * price)


@dataclasses.dataclass(frozen=True)
class ClipCost:
    """What a generated clip takes.

    Attributes:
      seconds: from prompt to latents.
      chips: that work on it at once.
      chip_hours: of it.
      cost: in the currency of the price, or None without one.
    """

    seconds: float
    chips: int
    chip_hours: float
    cost: float | None


def clip_cost(topology: Topology, seconds: float, clips: int = 1, price: float | None = None) -> ClipCost:
    """Of each of `clips` clips that the whole topology draws at once in `seconds`; `price`: of a chip-hour."""
    chip_hours = seconds / 3600 * topology.chips / clips
    chips = -(-topology.chips // clips)
    return ClipCost(seconds, chips, chip_hours, None if price is None else chip_hours * price)
