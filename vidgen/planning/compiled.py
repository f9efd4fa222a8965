"""A program compiled for a topology, and what the compiled program says of itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from vidgen.planning import aot, hlo
from vidgen.planning.hardware import Topology


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What the compiler made, or why it did not.

    Attributes:
      fits: whether the program has room in a device's memory.
      peak_bytes: of a device; where it does not fit, what it would want.
      hbm_bytes: that a device has.
      seconds: of lowering and compiling.
      options: of the compiler.
      collectives: of one device in a step.
      kernels: fused kernels by name.
      buffers: the largest: (bytes, shape, what makes it).
    """

    fits: bool
    peak_bytes: int
    hbm_bytes: int
    seconds: float
    options: dict[str, str]
    collectives: list[hlo.Collective]
    kernels: dict[str, int]
    buffers: list[tuple[int, str, str]]

    @property
    def headroom(self) -> float:
        """Share of the memory that is left; negative where it does not fit."""
        return 1 - self.peak_bytes / self.hbm_bytes

    def facts(self) -> dict[str, Any]:
        """What `--json` has of it."""
        rows = [dataclasses.asdict(row) for row in hlo.summary(self.collectives)]
        return {
            "fits": self.fits,
            "peak_bytes_per_device": self.peak_bytes,
            "hbm_bytes_per_device": self.hbm_bytes,
            "headroom": self.headroom,
            "collectives": rows,
            "overlap": overlap(self.collectives),
            "fused_kernels": self.kernels,
            "largest_buffers": [{"bytes": b, "shape": s, "made_by": o} for b, s, o in self.buffers],
            "compile_seconds": self.seconds,
            "compiler_options": self.options,
            "jax": jax.__version__,
        }


ROLES = ("weights", "gradients", "keys")


def overlap(collectives: list[hlo.Collective]) -> dict[str, float]:
    """Shares of the bytes of weight gathers, gradient reductions and exchanges of keys in a step.

    "asynchronous": in flight beside some work; "beside_matmul_or_attention": beside a matrix product or attention;
    "weights_by_all_reduce": of weights that are gathered by an all-reduce, which moves twice what it must.
    """
    counted = [c for c in collectives if c.role in ROLES]
    total = sum(c.bytes * c.count for c in counted) or 1

    def share(chosen) -> float:
        return sum(c.bytes * c.count for c in counted if chosen(c)) / total

    return {
        "asynchronous": share(lambda c: c.hidden),
        "beside_matmul_or_attention": share(lambda c: c.hidden and c.window in ("matmul", "attention")),
        "weights_by_all_reduce": share(lambda c: c.role == "weights" and c.opcode == "all-reduce"),
    }


def compile_for(
    topology: Topology,
    mesh: dict[str, int],
    function: Any,
    arguments: tuple[Any, ...],
    options: dict[str, str],
) -> Compilation:
    """Compiles a jitted function for the devices that its arguments' shardings name, and reads what came out.

    Args:
      mesh: devices along each axis.
      arguments: ShapeDtypeStructs with shardings.
      options: of the compiler, with which the function was jitted; told with the rest.
    """
    hbm = topology.chip.hbm_bytes
    try:
        made = aot.compile_for(function, arguments)
    except aot.OutOfMemory as e:
        try:
            told = hlo.oom(str(e))
        except ValueError:  # of another memory than the devices', of which no setting here gives more
            raise aot.refused(e) from None
        wanted, hbm = told.needed_bytes, told.available_bytes or hbm
        return Compilation(False, wanted, hbm, e.seconds, options, [], {}, list(told.buffers))
    return Compilation(
        # A GPU's compiler does not know where the memory ends.
        fits=made.peak_bytes <= hbm,
        peak_bytes=made.peak_bytes,
        hbm_bytes=hbm,
        seconds=made.seconds,
        options=options,
        collectives=hlo.collectives(made.text, mesh),
        kernels=dict(hlo.custom_kernels(made.text)),
        buffers=hlo.largest_buffers(made.text),
    )
