"""Compiling a program for devices that are not there: libtpu for TPUs, the CUDA plugin for GPUs, neither with hardware.

What comes out is what the devices would run: the memory is the compiler's own assignment, the schedule is final. That
it runs, and how fast, only the devices can say.
"""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from vidgen.config import ConfigError
from vidgen.planning import libtpu
from vidgen.planning.hardware import Topology

# What XLA wants to know of an H100, since it can't ask one: https://docs.nvidia.com/cuda/hopper-tuning-guide and the
# H100 SXM data sheet.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      text: the scheduled HLO of one device.
      peak_bytes: of a device's memory, arguments included, by the compiler's assignment.
      argument_bytes: of state and batch.
      temporary_bytes: of all else, without reuse.
      seconds: that lowering and compiling took.
    """

    text: str
    peak_bytes: int
    argument_bytes: int
    temporary_bytes: int
    seconds: float


class OutOfMemory(Exception):
    """The compiler could not place the program in the device's memory; the message is its own.

    seconds: that it took to find out.
    """

    def __init__(self, message: str, seconds: float):
        super().__init__(message)
        self.seconds = seconds


def devices(topology: Topology) -> list[jax.Device]:
    """Devices to compile for; raises ConfigError where the package that knows them is missing."""
    shape = "x".join(map(str, topology.shape))
    if topology.chip.platform == "tpu":
        libtpu.settle()
        extra, package, kind = "tpu", "libtpu", "TPUs"
        arguments: dict[str, Any] = {"platform": "tpu", "topology_name": f"{topology.chip.name}:{shape}"}
        if topology.slices > 1:
            arguments["num_slices"] = topology.slices
    else:
        extra, package, kind = "cuda", "jax-cuda12-plugin", "GPUs"
        arguments = {
            "platform": "cuda",
            "topology_name": topology.chip.name,
            "topology": f"{topology.slices}x{shape}",
            "target_config": H100,
        }
    try:
        return list(topologies.get_topology_desc(**arguments).devices)
    except Exception as e:  # each plugin has its own
        reason = " ".join(str(e).split())
        if not _installed(package):
            raise ConfigError(
                f"--topology={topology.text}: compiling for {kind} needs the package {package}: "
                f'pip install "vidgen[{extra}]"'
            ) from None
        raise ConfigError(f"--topology={topology.text}: {reason[:300]}") from None


def _installed(package: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def compile_for(function: Any, arguments: tuple[Any, ...]) -> Compiled:
    """Compiles a jitted function for the devices that the shardings of `arguments` (ShapeDtypeStructs) name.

    Raises OutOfMemory where the compiler says so, and ConfigError where it refuses for another reason.
    """
    start = time.perf_counter()
    try:
        compiled = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" in str(e) or "out of memory" in str(e).lower():
            raise OutOfMemory(str(e), time.perf_counter() - start) from None
        raise refused(e) from None
    memory = compiled.memory_analysis()
    return Compiled(
        text=compiled.as_text(),
        peak_bytes=memory.peak_memory_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        seconds=time.perf_counter() - start,
    )


def refused(e: Exception) -> ConfigError:
    """What a compiler says that it can't make, in a line."""
    line = next(iter(str(e).strip().splitlines()), type(e).__name__)
    unknown = re.search(r"(?i)compile option|unknown (flag|option)|not supported/recommended", str(e))
    hint = "; config.mesh.compiler_options=none does without the options of the table" if unknown else ""
    return ConfigError(f"the compiler refuses: {line[:300]}{hint}")
