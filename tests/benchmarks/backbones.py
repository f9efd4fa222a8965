"""The backbones of configs/backbones.py beside each other: seconds of a step, taken in turns, and memory.

    python tests/benchmarks/backbones.py [--steps 20]

Memory is what the compiled step holds at once beside the program: the state, the batch, and what lies between forward
and backward pass, as XLA's buffers have it.
"""

import argparse
import os
import statistics
import time

import jax

jax.config.update("jax_platforms", "cpu")

from vidgen import config as configs  # noqa: E402 - after the platform is chosen
from vidgen.data import feed  # noqa: E402
from vidgen.data.sources import open_source  # noqa: E402
from vidgen.parallel.mesh import make_mesh  # noqa: E402
from vidgen.training import program  # noqa: E402
from vidgen.training import state as states  # noqa: E402

FILE = os.path.join(os.path.dirname(__file__), os.pardir, os.pardir, "configs", "backbones.py")


def prepared(name: str):
    """(compiled step, state, batch, parameters, MiB) of a backbone on one device."""
    c = configs.load(f"{FILE}:{name}")
    mesh = make_mesh(c.mesh, c.rows.count, c.rows.tokens, 1, jax.devices()[:1])
    built = program.build(c, mesh)
    tokenizer, text = built.generator.tokenizer, built.generator.text
    source = open_source(c.data, "train")
    rows = feed.host_rows(source, feed.plan(source, tokenizer, c, text), tokenizer, c, 0)
    state, batch = built.init(), jax.device_put(rows, built.batch_shardings)
    step = built.step.lower(state, batch).compile()
    held = step.memory_analysis()
    used = held.argument_size_in_bytes + held.output_size_in_bytes + held.temp_size_in_bytes - held.alias_size_in_bytes
    return step, state, batch, states.count(state.params), used / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    runs = {name: list(prepared(name)) for name in ("dit", "uvit", "wan")}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for n in range(steps + 2):
        for name, run in runs.items():
            step, state, batch = run[:3]
            start = time.perf_counter()
            run[1], metrics = step(state, batch)
            jax.block_until_ready(metrics)
            if n >= 2:
                seconds[name].append(time.perf_counter() - start)
    print("backbone  parameters  seconds a step      MiB")
    for name, run in runs.items():
        print(f"{name:<8} {run[3]:>11,} {statistics.median(seconds[name]):>15.3f} {run[4]:>8.0f}")


if __name__ == "__main__":
    main()
