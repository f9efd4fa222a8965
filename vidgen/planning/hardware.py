"""Chips, and how many of them are joined how: the figures that a plan rests on, each with its public source.

[tpu]  Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)", docs.cloud.google.com/tpu/docs
[book] Austin et al., "How to Scale Your Model" (Google DeepMind, 2025), chapter "How to Think About TPUs"
[hbm]  what XLA's compiler says is available of the memory when a program for that chip asks for more
[h100] NVIDIA, "H100 Tensor Core GPU" data sheet (SXM5), and "DGX H100/H200 User Guide" for the network
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

from vidgen.config import ConfigError

if TYPE_CHECKING:
    import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator. Rates are of one JAX device, of which a chip may be several.

    Attributes:
      name: as topologies spell it.
      platform: tpu | cuda.
      flops: dense bf16 FLOP/s.
      vector: float32 elementwise operations/s, a multiply-add as one.
      array: side of the systolic array that multiplies matrices: narrower products leave part of it idle; 1 = none.
      hbm_bytes: memory that a program may use.
      hbm: bytes/s of that memory.
      link: bytes/s, one way, of one ICI link, or of all NVLinks of a GPU.
      torus: dimensions of the ICI torus; 0 = GPUs of a host that all reach each other.
      ring: an ICI dimension of a multiple of so many chips closes to a ring; of a 3D torus only if all three are.
      network: bytes/s, one way, that a device has of the network between slices, or between hosts of GPUs.
      host: bytes/s, one way, between a device and its host's memory.
      devices_per_chip, chips_per_host: JAX devices, chips.
      pod: chips of a slice at most; 0 = as many as there are.
    """

    name: str
    platform: str
    flops: float
    vector: float
    array: int
    hbm_bytes: int
    hbm: float
    link: float
    torus: int
    ring: int
    network: float
    host: float
    devices_per_chip: int
    chips_per_host: int
    pod: int


def _vector(cores: int, clock: float, alus: int = 4) -> float:
    """A TensorCore's vector unit has 8 x 128 lanes, of four ALUs since v5 [book]."""
    return cores * 8 * 128 * alus * clock


# Clocks are what the published peak and array sizes imply: v5p 459e12 / (2 cores · 4 arrays · 2 · 128²) = 1.75 GHz, v5e
# 1.5 GHz. For v6e and tpu7x the sizes published don't give one, and v5p's is taken.
# ICI: the "bidirectional bandwidth per chip" of [tpu] / (links · 2); [book] has the same for v5e, v5p and v6e.
CHIPS: dict[str, Chip] = {
    "v5e": Chip(
        "v5e",
        "tpu",
        flops=197e12,  # [tpu]
        vector=_vector(1, 1.5e9),
        array=128,  # [book]
        hbm_bytes=int(15.75 * GIB),  # [hbm]
        hbm=819e9,  # [tpu]
        link=50e9,  # [tpu] 400 GB/s over 4 links
        torus=2,
        ring=16,  # [book]
        network=6.4e12 / 8 / 256,  # [tpu] 6.4 Tbit/s a pod of 256
        host=15e9,  # [book]
        devices_per_chip=1,
        chips_per_host=4,  # [tpu] of slices of several hosts
        pod=256,  # [tpu]
    ),
    "v5p": Chip(
        "v5p",
        "tpu",
        flops=459e12,  # [tpu]
        vector=_vector(2, 1.75e9),
        array=128,  # [book]
        hbm_bytes=int(95.73 * GIB),  # [hbm]
        hbm=2765e9,  # [tpu]
        link=100e9,  # [tpu] 1200 GB/s over 6 links
        torus=3,
        ring=4,  # [book]
        network=50e9 / 8,  # [tpu] 50 Gbit/s a chip
        host=15e9,  # [book]
        devices_per_chip=1,
        chips_per_host=4,  # [tpu]
        pod=6144,  # [tpu] the largest job
    ),
    "v6e": Chip(
        "v6e",
        "tpu",
        flops=918e12,  # [tpu]
        vector=_vector(1, 1.75e9),
        array=256,  # [tpu]
        hbm_bytes=int(31.24 * GIB),  # [hbm]
        hbm=1638e9,  # [tpu]
        link=100e9,  # [tpu] 800 GB/s over 4 links
        torus=2,
        ring=16,  # [book]
        network=100e9 / 8,  # [tpu] 100 Gbit/s a chip, on the page of TPU7x
        host=32e9,  # [book]
        devices_per_chip=1,
        chips_per_host=4,  # [tpu] of slices of several hosts
        pod=256,  # [tpu]
    ),
    # A chip is two devices, which share its links and its network [tpu].
    "tpu7x": Chip(
        "tpu7x",
        "tpu",
        flops=2307e12 / 2,  # [tpu]
        vector=_vector(1, 1.75e9),
        array=256,  # as v6e's; not published
        hbm_bytes=int(94.74 * GIB),  # [hbm]
        hbm=7380e9 / 2,  # [tpu]
        link=100e9 / 2,  # [tpu] 1200 GB/s over 6 links
        torus=3,
        ring=4,  # as v5p's
        network=100e9 / 8 / 2,  # [tpu] 100 Gbit/s a chip
        host=32e9 / 2,  # as v6e's; not published
        devices_per_chip=2,
        chips_per_host=4,  # [tpu]
        pod=9216,  # [tpu]
    ),
    "h100": Chip(
        "h100",
        "cuda",
        flops=989e12,  # [h100]
        vector=67e12 / 2,  # [h100] 67 TFLOP/s of float32
        array=1,
        hbm_bytes=80 * 10**9,  # [h100]; XLA sets less aside unless XLA_PYTHON_CLIENT_MEM_FRACTION says so
        hbm=3350e9,  # [h100]
        link=450e9,  # [h100] NVLink 900 GB/s both ways
        torus=0,
        ring=0,
        network=400e9 / 8,  # [h100] an InfiniBand port of 400 Gbit/s a GPU
        host=64e9,  # [h100] PCIe of 128 GB/s both ways
        devices_per_chip=1,
        chips_per_host=8,
        pod=0,
    ),
}

# What XLA's compiler is told for each chip. The SparseCores of v5p and v6e move data beside the TensorCore's work.
_SPARSE_CORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_all_gather_offload_tracing": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
}
# With one collective in flight at a time, and small ones merged into large ones that wait for the last of what they
# carry, nothing is left to hide many of them behind: of the 10B step 87 % of the bytes travel beside work, with these
# 99 %.
_APART = {
    "xla_gpu_experimental_parallel_collective_overlap_limit": "4",
    "xla_gpu_all_gather_combine_threshold_bytes": str(2**20),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": str(2**20),
}
COMPILER_OPTIONS: dict[str, dict[str, str]] = {
    "v5e": {},
    "v5p": _SPARSE_CORE,
    "v6e": _SPARSE_CORE,
    "tpu7x": {},
    "h100": _APART,
    "": {},
}


def compiler_options(device: jax.Device) -> dict[str, str]:
    """Of `COMPILER_OPTIONS`, what suits a device, be it here or only compiled for."""
    kind = device.device_kind.lower().replace(" lite", "e").replace(" ", "")
    names = {"tpuv5e": "v5e", "tpuv5p": "v5p", "tpuv5": "v5p", "tpuv6e": "v6e", "tpu7x": "tpu7x"}
    return COMPILER_OPTIONS["h100" if device.platform == "gpu" else names.get(kind, "")]


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips joined to slices.

    Attributes:
      chip: of which kind.
      shape: of a slice: chips along each dimension of the torus, or (hosts, GPUs a host).
      slices: joined by the data-centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def text(self) -> str:
        """As `parse_topology` reads it."""
        return f"{self.slices}*" * (self.slices > 1) + f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        if not self.chip.torus:
            return self.slices * self.shape[0]
        return self.slices * -(-math.prod(self.shape) // self.chip.chips_per_host)

    def larger(self) -> list[Topology]:
        """Larger ones of the same chip, each about twice the one before, as far as its slices (or 4,096 GPUs) go."""
        shape, found = list(self.shape), []
        while 2 * math.prod(shape) <= (self.chip.pod or 4096):
            grows = 0 if not self.chip.torus else min(range(len(shape)), key=lambda i: (shape[i], -i))
            shape[grows] *= 2
            if _comes_as(self.chip, tuple(shape)):
                found.append(dataclasses.replace(self, shape=tuple(sorted(shape) if self.chip.torus else shape)))
        return found


# Shapes of slices that Google Cloud has [tpu]; of three dimensions also those that are all multiples of 4.
SHAPES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4)),
}
MOST = 2**17  # chips that a topology may name


def _comes_as(chip: Chip, shape: tuple[int, ...]) -> bool:
    """Whether there are slices of this shape, its dimensions in any order."""
    if not chip.torus:
        return shape[1] in (1, 2, 4, chip.chips_per_host)
    cubes = chip.torus == 3 and all(n % 4 == 0 for n in shape) and math.prod(shape) <= chip.pod
    return cubes or tuple(sorted(shape)) in SHAPES[chip.torus]


def _shapes(chip: Chip) -> str:
    """What `_comes_as` takes, in words."""
    if not chip.torus:
        return "1, 2, 4 or 8 GPUs a host"
    listed = ", ".join("x".join(map(str, shape)) for shape in SHAPES[chip.torus])
    return listed + f", or multiples of 4 up to {chip.pod} chips" * (chip.torus == 3)


def parse_topology(text: str) -> Topology:
    """The topology that a text such as "v5p:4x8x8", "2*v6e:16x16" or "h100:32x8" (hosts x GPUs) names.

    Raises ConfigError, listing the chips known and the shapes there are.
    """
    example = {2: "16x16", 3: "4x8x8", 0: "32x8"}
    known = ", ".join(f"{name}:{example[chip.torus]}" for name, chip in CHIPS.items())
    before, star, rest = text.rpartition("*")
    name, _, shape = rest.partition(":")
    if name not in CHIPS:
        raise ConfigError(f"--topology={text}: unknown chip {name!r}; known are, for example, {known}")
    chip = CHIPS[name]
    wanted = f"{chip.torus} dimensions of the torus" if chip.torus else "hosts x GPUs a host"
    hint = f"{name}:{example[chip.torus]}"
    numbers = [before if star else "1", *shape.split("x")]
    if not all(n.isascii() and n.isdecimal() and len(n) < 7 for n in numbers):
        raise ConfigError(f"--topology={text}: expected CHIP:SHAPE with {wanted}, like {hint}")
    slices, *sizes = map(int, numbers)
    if len(sizes) != (chip.torus or 2) or min(*sizes, slices) < 1:
        raise ConfigError(f"--topology={text}: {name} wants {wanted}, each at least 1, like {hint}")
    if not _comes_as(chip, tuple(sizes)):
        raise ConfigError(
            f"--topology={text}: {name} comes as {_shapes(chip)}; several slices are 2*{hint}"
            if chip.torus
            else f"--topology={text}: a host has {_shapes(chip)}; expected hosts x GPUs, like {hint}"
        )
    if slices * math.prod(sizes) > MOST:
        raise ConfigError(f"--topology={text}: {slices * math.prod(sizes):,} chips; expected at most {MOST:,}")
    return Topology(chip, tuple(sizes), slices)


def axis_bandwidth(topology: Topology, mesh: dict[str, int]) -> dict[str, float]:
    """Bytes/s that a device can send in a collective over each mesh axis.

    TPUs: an axis is laid on whole dimensions of the torus where one or more of them multiply to its size, innermost
    axis first, else on parts of the longest left; a dimension carries two links' worth where it closes to a ring, else
    one. GPUs: an axis within a host has NVLink; one over hosts has the network ports of all its GPUs in a host, up to
    that. The data axis over several slices has the data-centre network, likewise.

    Args:
      mesh: devices along each axis, outermost first.
    """
    chip = topology.chip
    rates: dict[str, float] = {}
    left = list(topology.shape)
    inside = 1  # devices of a host, or of a chip, that the axes further in have taken
    for axis, size in reversed(mesh.items()):
        slices = topology.slices if axis == "data" else 1
        size //= slices
        if not chip.torus:
            here = math.gcd(size, max(1, topology.shape[1] // inside))
            inside *= here
            rates[axis] = chip.link if here == size else min(chip.link, chip.network * here)
        else:
            both = math.gcd(size, max(1, chip.devices_per_chip // inside))
            inside *= both
            taken = _take(left, size // both)
            links = sum(2 if _closes(topology, n) else 1 for n in taken)
            rates[axis] = chip.link * max(1, links)
        if slices > 1:
            rates[axis] = min(rates[axis], chip.network * size)
    return {axis: rates[axis] for axis in mesh}


def _closes(topology: Topology, n: int) -> bool:
    """Whether n chips along a dimension are a ring: of three dimensions all are or none, as slices are cubes [tpu]."""
    ring = topology.chip.ring
    return n % ring == 0 and (topology.chip.torus == 2 or all(m % ring == 0 for m in topology.shape))


def _take(left: list[int], size: int) -> list[int]:
    """The dimensions of the torus that an axis of `size` chips spans, taken out of `left`."""
    if size == 1:
        return []
    for mask in sorted(range(1, 2 ** len(left)), key=int.bit_count):
        chosen = [i for i in range(len(left)) if mask >> i & 1]
        if math.prod(left[i] for i in chosen) == size:
            taken = [left[i] for i in chosen]
            for i in chosen:
                left[i] = 1
            return taken
    parts = []  # part of a dimension is a line, no ring
    for i in sorted(range(len(left)), key=lambda i: -left[i]):
        n = math.gcd(left[i], size)
        if n > 1:
            parts.append(left[i] if n == left[i] else 1)
            left[i] //= n
            size //= n
    return parts


# Dense bf16 FLOP/s of one JAX device, from the vendors' data sheets; keys are parts of `device_kind`, lower case.
# v2 and v3 are two devices a chip in JAX's count; v4 is one. All but those planned for are met in training only.
BF16_PEAK = {
    "tpu7": CHIPS["tpu7x"].flops,
    "v6": CHIPS["v6e"].flops,
    "v5p": CHIPS["v5p"].flops,
    "v5 lite": CHIPS["v5e"].flops,
    "v5e": CHIPS["v5e"].flops,
    "v5": CHIPS["v5p"].flops,  # how JAX names a v5p
    "v4": 275e12,
    "v3": 61.5e12,
    "v2": 23e12,
    "h200": 989e12,
    "h100": CHIPS["h100"].flops,
    "a100": 312e12,
}


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """FLOP/s of one device and where the figure comes from; an unknown device and a CPU are measured."""
    import jax
    import jax.numpy as jnp

    kind = device.device_kind.lower()
    for part, peak in BF16_PEAK.items():
        if part in kind:
            return peak, f"data sheet of {device.device_kind}, bf16"
    n, dtype = (1024, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    origin = f"measured on {device.device_kind}: product of {n} x {n} matrices, {jnp.dtype(dtype).name}"
    a = jax.device_put(jnp.ones((n, n), dtype), device)
    # Virtual CPU devices share the cores that the measurement has for itself.
    return _measured(a) / (jax.local_device_count() if device.platform == "cpu" else 1), origin


def _measured(a: jax.Array) -> float:
    """The best rate of ten products of a square matrix with itself."""
    import jax

    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * a.shape[0] ** 3 / best
