"""Speed and memory of the VAE against diffusers' eager torch: the same weights, the same clip, float32, one run.

    python tests/peers/vae_speed.py --frames 17 --size 128 --base_dim 96
    python tests/peers/vae_speed.py --residual --python /path/to/another/bin/python --json

Each implementation is a process of its own, pinned to the same cores, and they take turns; what is printed are medians.
Memory comes from further processes, one for each implementation and direction: the most that was resident during a
call, less what was resident once the weights were loaded; of the first call, which compiles, and of the second. Freed
memory that the C library keeps is given back before each (malloc_trim), for all alike.

Needs the extra [peers]. vidgen runs under --python (this one unless given), which needs no torch.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import turns

METHODS = ("encode", "decode")
CHILDREN = ("diffusers", "whole", "chunked")  # vidgen twice: clips at once, and in time chunks
TITLES = {"diffusers": "diffusers, eager torch", "whole": "vidgen, whole clip", "chunked": "vidgen, time chunks"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=128, help="height and width")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--base_dim", type=int, default=96)
    parser.add_argument("--residual", action="store_true", help="the 2.2 shape: shortcuts, patch 2, wider decoder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--python", default=sys.executable, help="that runs vidgen")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        turns.serve(args.cores, lambda: load(args))
        return
    with tempfile.TemporaryDirectory(prefix="vae-speed-") as directory:
        args.directory = Path(directory)
        prepare(args)
        seconds, cpu, difference, versions = speed(args)
        memory = {name: {method: peak(args, name, method) for method in METHODS} for name in CHILDREN}
    result = {
        "clip": [args.batch, 3, args.frames, args.size, args.size],
        "base_dim": args.base_dim,
        "residual": args.residual,
        "cores": args.cores,
        "repeats": args.repeats,
        "versions": versions,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "mib": memory,
        "max_difference": difference,
    }
    print(json.dumps(result) if args.json else table(result))


def prepare(args):
    """Writes weights as diffusers does, a clip and latents, channels first, into the directory."""
    import torch
    import wan_torch

    settings = {"base_dim": args.base_dim}
    if args.residual:
        shape = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "z_dim": 48}
        settings |= shape | {"decoder_base_dim": args.base_dim * 8 // 5, "scale_factor_spatial": 16}
    vae = wan_torch.make_vae(**settings)
    vae.save_pretrained(args.directory / "vae")
    clip = wan_torch.make_clip(args.batch, args.frames, args.size, args.size)
    stride = settings.get("scale_factor_spatial", 8)
    grid = (1 + (args.frames - 1) // 4, args.size // stride, args.size // stride)
    latents = np.random.default_rng(1).normal(size=(args.batch, vae.config.z_dim, *grid)).astype(np.float32)
    np.save(args.directory / "encode.npy", clip)
    np.save(args.directory / "decode.npy", latents)
    del vae, torch


def speed(args):
    """Medians of seconds and of the process's CPU seconds, largest differences to diffusers, each as
    {child: {method: number}}, and {child: what it runs on}."""
    children = {name: child(args, name) for name in CHILDREN}
    try:
        for one in children.values():
            for method in METHODS:
                one.ask(f"check {method}")
        found = turns.in_turns(children, METHODS, args.repeats)
    finally:
        for one in children.values():
            one.close()
    medians = [
        {c: {m: statistics.median(pair[i] for pair in found[c][m]) for m in METHODS} for c in CHILDREN} for i in (0, 1)
    ]
    outputs = {(c, m): np.load(args.directory / f"{c}.{m}.npy") for c in CHILDREN for m in METHODS}
    difference = {
        c: {m: float(np.abs(outputs[c, m] - outputs["diffusers", m]).max()) for m in METHODS} for c in CHILDREN[1:]
    }
    return *medians, difference, {name: one.words for name, one in children.items()}


def peak(args, name, method):
    """[first call, second call] in MiB above the loaded weights."""
    one = child(args, name)
    try:
        return [one.ask(f"memory {method}") for _ in range(2)]
    finally:
        one.close()


def child(args, name):
    """A process that has one implementation loaded."""
    python = sys.executable if name == "diffusers" else args.python
    return turns.Child(__file__, name, python, args.cores, ["--directory", str(args.directory)])


def load(args):
    """What a child answers with, and what it runs on."""
    call, words = load_torch(args) if args.child == "diffusers" else load_vidgen(args)
    inputs = {method: np.load(args.directory / f"{method}.npy") for method in METHODS}
    turns.tidy()
    loaded = turns.status("VmRSS")

    def answer(*what):
        *what, method = what
        run = functools.partial(call, method, inputs[method])
        if what == ["check"]:
            np.save(args.directory / f"{args.child}.{method}.npy", run())
            return 0
        return (turns.most_resident(run) - loaded) / 1024 if what == ["memory"] else turns.timed(run)

    return answer, words


def load_torch(args):
    import diffusers
    import torch
    import wan_torch

    torch.set_num_threads(args.cores)
    vae = diffusers.AutoencoderKLWan.from_pretrained(args.directory / "vae").eval()
    calls = {
        "encode": lambda video: np.concatenate(wan_torch.encode(vae, video)),
        "decode": lambda latents: wan_torch.decode(vae, latents),
    }
    words = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return (lambda method, array: calls[method](array)), words


def load_vidgen(args):
    import jax

    from vidgen.interop.diffusers import load_component
    from vidgen.tokenizers import chunked

    component = load_component(args.directory / "vae")
    module, params = component.module, component.params

    # All frames as one chunk, or as many at once as the chunks of long clips have.
    frames = 10**9 if args.child == "whole" else chunked.FRAMES

    def call(method, array):
        array = np.moveaxis(array, 1, -1)
        if method == "encode":
            out = np.concatenate(chunked.encode(module, params, array, frames=frames))
        else:
            out = np.clip(chunked.decode(module, params, array, frames=frames), -1, 1)
        return np.moveaxis(out, -1, 1)

    return call, f"jax {jax.__version__}, Python {sys.version.split()[0]}"


def table(r):
    """The result as Markdown, with the lines that say what was measured."""
    seconds, memory = r["seconds"], r["mib"]
    lines = [
        f"clip {r['clip']}, base_dim {r['base_dim']}{', 2.2 shape' if r['residual'] else ', 2.1 shape'}, float32, "
        f"{r['cores']} cores; {'; '.join(dict.fromkeys(r['versions'].values()))}; medians of {r['repeats']} turns",
        f"largest difference: {max(v for c in r['max_difference'].values() for v in c.values()):.1e}",
        "",
        "| | " + " | ".join(f"{m} s | × | CPU s | MiB | first call MiB" for m in METHODS) + " |",
        "|---|" + "---|" * 5 * len(METHODS),
    ]
    for child in CHILDREN:
        cells = []
        for m in METHODS:
            ratio = seconds["diffusers"][m] / seconds[child][m]
            first, second = memory[child][m]
            cells.append(
                f"{seconds[child][m]:.2f} | {ratio:.2f} | {r['cpu_seconds'][child][m]:.2f} | {second:.0f} | {first:.0f}"
            )
        lines.append(f"| {TITLES[child]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
