"""What checkpoints cost: memory while one is restored, and the time that saving takes from the steps.

    python tests/benchmarks/checkpoints.py                 peak host memory of a restore, over the bytes of the state
    python tests/benchmarks/checkpoints.py --overhead      the quickstart's steps, with and without a save each 50

The second takes turns: 50 steps and a save begun before the first of them, 50 steps with none, and so on. The save's
work goes on behind the steps, so what counts is the whole of the 50, the save's begin with it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time


def resident():
    """Bytes that this process has in memory now."""
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make(arrays, side, like_only=False):
    """A state of four times `arrays` matrices of side x side: weights, their average and two moments."""
    import jax
    import jax.numpy as jnp
    import optax

    from vidgen.training import state as states

    def build():
        keys = jax.random.split(jax.random.key(0), arrays)
        params = {f"layer_{i}": jax.random.normal(keys[i], (side, side)) for i in range(arrays)}
        state = states.create(params, optax.adamw(1e-3))
        # Moments of zeros would be compressed to nothing.
        moments = jax.tree.map(lambda x: jnp.sin(x) if x.ndim else x, (params, params))
        adam = state.opt_state[0]._replace(mu=moments[0], nu=moments[1])
        return state.replace(step=jnp.ones((), jnp.int32), opt_state=(adam, *state.opt_state[1:]))

    if not like_only:
        return build()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), jax.eval_shape(build))


def child(what, folder, arrays, side):
    """Saves or restores, and prints what that took as JSON."""
    import jax

    from vidgen.training.checkpoint import Checkpoints

    if what == "save":
        checkpoints = Checkpoints(folder)
        checkpoints.save(make(arrays, side), {})
        return checkpoints.close()
    like = make(arrays, side, like_only=True)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
    jax.block_until_ready(jax.numpy.zeros(8))
    checkpoints = Checkpoints(folder, read_only=True)
    step = checkpoints.newest_good()
    before, most, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            most[0] = max(most[0], resident())

    watcher, start = threading.Thread(target=watch, daemon=True), time.perf_counter()
    watcher.start()
    state = jax.block_until_ready(checkpoints.restore(step, like))
    done.set()
    watcher.join()
    seconds = time.perf_counter() - start
    del state
    print(json.dumps({"size": size, "peak": most[0] - before, "seconds": seconds}))
    checkpoints.close()


def memory(arrays, side):
    """A line a shape of the state."""
    with tempfile.TemporaryDirectory() as folder:
        for what in ("save", "restore"):
            command = [sys.executable, os.path.abspath(__file__), "--child", what, folder, str(arrays), str(side)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
    ratio = found["peak"] / found["size"]
    print(
        f"{4 * arrays} arrays of {side} x {side}, {found['size'] / 2**20:.0f} MiB: peak {ratio:.2f} x the state, which "
        f"is in it; {found['seconds']:.1f} s",
        flush=True,
    )


def overhead(turns, every):
    """The quickstart's step, in turns with and without a save."""
    import jax
    import numpy as np

    from vidgen import config as configs
    from vidgen import train
    from vidgen.training import program as programs
    from vidgen.training.checkpoint import Checkpoints

    config = configs.load(os.path.join(os.path.dirname(__file__), "..", "..", "configs", "quickstart.py"))
    task = programs.task_of(config)
    program = programs.build(config, task.mesh(config))
    course = train.COURSES[config.task].course(program)
    state, times = program.init(), {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder, course.batches(0) as batches:
        checkpoints, step = Checkpoints(folder, config.train), program.step_after(0)
        batch, _ = next(batches)
        for _ in range(5):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        for turn in range(2 * turns):
            saves, start, used = turn % 2 == 0, time.perf_counter(), time.process_time()
            if saves:
                checkpoints.save(state, {"tokens_seen": 0})
            for _ in range(every):
                state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
            times[saves].append((time.perf_counter() - start, time.process_time() - used))
            checkpoints.wait()
        checkpoints.close()
    for i, what in enumerate(("time", "processor time")):
        with_save, without = (np.median([t[i] for t in times[saves]]) / every for saves in (True, False))
        print(
            f"{what}: {1000 * without:.1f} ms a step, {1000 * with_save:.1f} with a save each {every}: "
            f"{100 * (with_save / without - 1):+.2f} % (medians of {turns} times {every} steps each)",
            flush=True,
        )


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:4], *map(int, sys.argv[4:6]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--turns", type=int, default=3, help="of --overhead, each of --every steps with and without")
    parser.add_argument("--every", type=int, default=50)
    args = parser.parse_args()
    if args.overhead:
        return overhead(args.turns, args.every)
    for arrays, side in ((8, 2000), (120, 512), (2, 4000)):
        memory(arrays, side)


if __name__ == "__main__":
    main()
