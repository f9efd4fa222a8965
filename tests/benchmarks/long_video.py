"""Memory of encoding and decoding a long clip in time chunks, against a short one.

    python tests/benchmarks/long_video.py [--frames 145 1441] [--size 64] [--weights DIR]

Each clip goes through in a process of its own, made and thrown away chunk by chunk, so that what is measured is the
VAE's. Printed are the peak of the process above what it held before the first chunk, and seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time


def main() -> None:
    """Measures each clip in a child process and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[145, 1441])
    parser.add_argument("--size", type=int, default=64, help="height and width, pixels")
    parser.add_argument("--weights", default="", help="of a VAE; unless given, a small one with random weights")
    parser.add_argument("--child", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.size, args.weights)))
        return
    print("frames  peak MiB  encode s  decode s")
    for frames in args.frames:
        command = [sys.executable, __file__, "--child", str(frames), "--size", str(args.size)]
        command += ["--weights", args.weights] if args.weights else []
        out = subprocess.run(
            command, check=True, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
        found = json.loads(out.stdout.splitlines()[-1])
        print(f"{frames:6d}  {found['peak_mib']:8.1f}  {found['encode_s']:8.1f}  {found['decode_s']:8.1f}")


def measure(frames: int, size: int, directory: str) -> dict[str, float]:
    """Encodes and decodes one clip; peak memory above the start, and seconds."""
    import jax
    import numpy as np

    from vidgen import weights
    from vidgen.tokenizers import chunked
    from vidgen.tokenizers.vae import CausalVAE, VAEConfig

    if directory:
        found = weights.load(weights.find(directory), "vae")
        vae, params = CausalVAE(VAEConfig.from_dict(found.config)), jax.device_put(found.params)
    else:
        vae = CausalVAE(VAEConfig(16, dim_mult=(1, 2, 4, 4), num_res_blocks=1))
        clip = jax.ShapeDtypeStruct((1, 1, size, size, 3), np.float32)
        like = jax.eval_shape(vae.init, jax.random.key(0), clip)["params"]
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) / x.shape[-1] ** 0.5, like)
        params = jax.device_put(params)

    def pixels():
        rng, left, n = np.random.default_rng(0), frames, 5
        while left:
            yield rng.integers(0, 256, (1, n, size, size, 3), np.uint8)
            left -= n
            n = 4

    latents = [mean for mean, _ in chunked.encode_chunks(vae, params, pixels())]  # compiles
    for _ in chunked.decode_chunks(vae, params, latents[:2]):
        pass
    start, clock = peak(reset=True), time.perf_counter()
    latents = [mean for mean, _ in chunked.encode_chunks(vae, params, pixels())]
    encoded = time.perf_counter()
    assert sum(chunk.shape[1] for chunk in latents) == 1 + (frames - 1) // vae.config.stride[0]
    shown = sum(video.shape[1] for video in chunked.decode_chunks(vae, params, latents))
    assert shown == frames
    decoded = time.perf_counter()
    return {"peak_mib": peak() - start, "encode_s": encoded - clock, "decode_s": decoded - encoded}


def peak(reset: bool = False) -> float:
    """MiB that this process has held at the most, since the last reset (Linux)."""
    if reset:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")
    with open("/proc/self/status", encoding="ascii") as f:
        return next(float(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
