"""Peak rates of devices, against which MFU is told."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

# Dense bf16 FLOP/s of one JAX device, from the vendors' data sheets; keys are parts of `device_kind`, lower case.
# v4 and 7x put two devices on a chip in JAX's count or one, as the kind says; v2 and v3 always two.
BF16_PEAK = {
    "v6": 918e12,
    "v5p": 459e12,
    "v5 lite": 197e12,
    "v5e": 197e12,
    "v5": 459e12,  # how JAX names a v5p
    "v4": 275e12,
    "v3": 61.5e12,
    "v2": 23e12,
    "h200": 989e12,
    "h100": 989e12,
    "a100": 312e12,
}


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """FLOP/s of one device and where the figure comes from; an unknown device and a CPU are measured."""
    kind = device.device_kind.lower()
    for part, peak in BF16_PEAK.items():
        if part in kind:
            return peak, f"data sheet of {device.device_kind}, bf16"
    n, dtype = (1024, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    origin = f"measured on {device.device_kind}: product of {n} x {n} matrices, {jnp.dtype(dtype).name}"
    # Virtual CPU devices share the cores that the measurement has for itself.
    return _measured(device, n, dtype) / (jax.local_device_count() if device.platform == "cpu" else 1), origin


def _measured(device: jax.Device, n: int, dtype: jnp.dtype) -> float:
    """The best rate of ten matrix products."""
    a = jax.device_put(jnp.ones((n, n), dtype), device)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
