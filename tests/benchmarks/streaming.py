"""Peak host memory of importing and of loading a checkpoint in shards, over what its weights take.

    python tests/benchmarks/streaming.py                    Wan 2.1's 1.3B shape, bfloat16 and float32
    python tests/benchmarks/streaming.py --layers 4 --width 256 --dtype float32

A random checkpoint is written in shards, then a child process each imports it, and loads it onto the devices: from
diffusers' files, and from the import. On a CPU the devices' memory is the host's, so a load takes the weights once at
least; an import need not.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

SHARD = 2**30  # bytes, about


def settings(layers, width, ffn):
    """config.json of a transformer of this shape, with heads of 128 (64 where the width is small)."""
    head = 128 if width % 128 == 0 and width > 512 else 64
    shape = {"num_layers": layers, "num_attention_heads": width // head, "attention_head_dim": head, "ffn_dim": ffn}
    return {"_class_name": "WanTransformer3DModel", **shape}


def make(directory, config, dtype, shard=SHARD):
    """Writes random weights in shards, a tensor at a time; returns their bytes."""
    from vidgen import tensors
    from vidgen.interop import diffusers

    row = diffusers.CLASSES["WanTransformer3DModel"]
    entries = row.entries(row.read_config(config, "config.json"), ())
    files, filled = [[]], 0
    for entry in entries:
        size = int(np.prod(entry.stored)) * np.dtype(dtype).itemsize
        if filled and filled + size > shard:
            files, filled = [*files, []], 0
        files[-1].append(entry)
        filled += size
    os.makedirs(directory)
    rng, index, total = np.random.default_rng(0), {}, 0
    for n, own in enumerate(files, 1):
        name = f"diffusion_pytorch_model-{n:05d}-of-{len(files):05d}.safetensors"
        header = tensors.header_of({entry.key: (entry.stored, dtype) for entry in own}, {"format": "pt"})
        with tensors.Writer(os.path.join(directory, name), header) as file:
            for entry in own:
                array = rng.standard_normal(entry.stored, np.float32).astype(dtype)
                file.write(entry.key, array)
                index[entry.key], total = name, total + array.nbytes
    with open(os.path.join(directory, "diffusion_pytorch_model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": index}, f)
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(config, f)
    return total


def peak():
    """Bytes that this process had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(what, source, output):
    """Does one thing and prints its peak memory, and what the imports alone take, as JSON."""
    import jax

    from vidgen import import_weights
    from vidgen.interop import stream

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    jax.block_until_ready(jax.device_put(np.zeros(8, np.float32), one))
    before, start = peak(), time.perf_counter()
    if what == "import":
        import_weights.run(source, output)
        size = 0
    else:
        params = stream.load_onto(source, one, None if what == "load" else np.dtype(what))
        size = sum(x.nbytes for x in jax.tree.leaves(params))
    print(json.dumps({"peak": peak(), "before": before, "seconds": time.perf_counter() - start, "loaded": size}))


def measure(what, source, output=""):
    """`child` in a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), "--child", what, source, output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:5])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--ffn", type=int, default=8960)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], action="append")
    parser.add_argument("--folder", help="where to write; a temporary one unless given")
    args = parser.parse_args()
    for dtype in args.dtype or ["bfloat16", "float32"]:
        folder = tempfile.mkdtemp(prefix="vidgen-streaming-", dir=args.folder)
        try:
            total = make(os.path.join(folder, "hf"), settings(args.layers, args.width, args.ffn), dtype)
            print(f"{dtype}: {total / 2**30:.2f} GiB of weights", flush=True)
            steps = [("import", "hf", "in"), ("load", "hf", ""), ("load", "in", "")]
            steps += [("float32", "in", "")] if dtype != "float32" else []
            for what, source, output in steps:
                found = measure(what, os.path.join(folder, source), os.path.join(folder, output) if output else "")
                weights = found["loaded"] or total
                own = found["peak"] - found["before"]
                print(
                    f"  {what:8} from {source}: peak {found['peak'] / 2**30:.2f} GiB, "
                    f"{found['peak'] / weights:.2f} x the weights; {own / weights:.2f} x without JAX's and Python's "
                    f"{found['before'] / 2**30:.2f} GiB; {found['seconds']:.1f} s",
                    flush=True,
                )
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
