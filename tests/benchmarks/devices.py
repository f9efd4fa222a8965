"""The step on eight virtual CPU devices (fsdp=8) beside the same step on one, in one run: what sharding itself costs.

    python tests/benchmarks/devices.py [--steps 12]

The devices share the machine's cores, so the ideal ratio is 1. Prints the median seconds of a step each and their
ratio; steps alternate between the two, so that both meet the same noise.
"""

import argparse
import statistics
import time

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from vidgen import config as configs  # noqa: E402 - after the devices are made
from vidgen.data import feed  # noqa: E402
from vidgen.data.packing import Packing  # noqa: E402
from vidgen.data.sources import open_source  # noqa: E402
from vidgen.parallel.mesh import make_mesh  # noqa: E402
from vidgen.training import program  # noqa: E402


def config() -> configs.ConfigDict:
    """Four layers of width 256 on 8 rows of 512 tokens."""
    c = configs.base()
    c.dtype = "float32"
    c.data.moving_shapes.sizes = ((17, 64, 64),)
    c.rows.update(count=8, tokens=640, segments=2, text=256, caption=128, window=64)
    c.text.update(width=128, layers=1, heads=2)
    c.model.update(width=256, layers=4, heads=4, remat="none", unroll=4)
    c.optimizer.name = "adamw"
    return c


def prepared(c: configs.ConfigDict, devices: int):
    """(step, state, batch) on so many devices."""
    c = configs.override(c, {"mesh.data": 1, "mesh.fsdp": devices})
    mesh = make_mesh(c.mesh, c.rows.count, c.rows.tokens, 1, jax.devices()[:devices])
    built = program.build(c, mesh)
    tokenizer = built.generator.tokenizer
    source = open_source(c.data, "train")
    rows = feed.host_rows(source, Packing(source.sizes, tokenizer.geometry, c.rows, 0), tokenizer, c, 0)
    return built.step, built.init(), jax.device_put(rows, built.batch_shardings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    runs = {devices: list(prepared(config(), devices)) for devices in (1, 8)}
    seconds: dict[int, list[float]] = {1: [], 8: []}
    losses = {}
    for n in range(steps + 2):
        for devices, run in runs.items():
            step, state, batch = run
            start = time.perf_counter()
            run[1], metrics = step(state, batch)
            losses[devices] = float(metrics["loss"])
            if n >= 2:  # the first compiles
                seconds[devices].append(time.perf_counter() - start)
    np.testing.assert_allclose(losses[8], losses[1], rtol=1e-4)
    one, eight = (statistics.median(seconds[d]) for d in (1, 8))
    print(f"a step on 1 device {one:.3f} s, on 8 devices (fsdp=8) {eight:.3f} s: ratio {eight / one:.2f}")


if __name__ == "__main__":
    main()
