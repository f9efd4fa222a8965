"""Speed of Wan's transformer against diffusers', eager and compiled: the same weights, shapes and dtype, one run.

    python tests/peers/transformer_speed.py
    python tests/peers/transformer_speed.py --dtype bfloat16 --python /path/to/another/bin/python --json

Two things are timed: a training step (forward, backward, AdamW; the mean squared error to a fixed target), and a
denoising step (forward). Each implementation is a process of its own, pinned to the same cores, and they take turns;
what is printed are medians. After the timing every one of them has taken as many training steps from the same weights,
and the losses are compared.

In bfloat16 torch runs under autocast, and vidgen with `dtype=bfloat16`: matrix products in bfloat16, norms, softmax and
weights in float32, in both.

Needs the extra [peers]. vidgen runs under --python (this one unless given), which needs no torch.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import turns

QUESTIONS = ("train", "denoise")
CHILDREN = ("eager", "compiled", "vidgen")
TITLES = {"eager": "diffusers, eager torch", "compiled": "diffusers, torch.compile", "vidgen": "vidgen"}
LR = 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument(
        "--grid", type=int, nargs=3, default=(4, 32, 32), help="latents (t, y, x); tokens are 1 x 2 x 2"
    )
    parser.add_argument("--text", type=int, default=64, help="text tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--python", default=sys.executable, help="that runs vidgen")
    parser.add_argument("--only", nargs="*", choices=CHILDREN, default=CHILDREN)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        turns.serve(args.cores, lambda: (load_vidgen if args.child == "vidgen" else load_torch)(args))
        return
    with tempfile.TemporaryDirectory(prefix="transformer-speed-") as directory:
        args.directory = Path(directory)
        prepare(args)
        result = measure(args)
    print(json.dumps(result) if args.json else table(result))


def prepare(args):
    """Writes weights as diffusers does, and inputs, into the directory."""
    import torch
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    text_dim = 4 * args.head_dim
    model = WanTransformer3DModel(
        num_attention_heads=args.heads,
        attention_head_dim=args.head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=text_dim,
        ffn_dim=4 * args.heads * args.head_dim,
        num_layers=args.layers,
    )
    model.save_pretrained(args.directory / "transformer")
    rng = np.random.default_rng(0)
    np.savez(
        args.directory / "inputs.npz",
        hidden_states=rng.normal(size=(args.batch, 16, *args.grid)).astype(np.float32),
        timestep=rng.uniform(0, 1000, args.batch).astype(np.float32),
        encoder_hidden_states=rng.normal(size=(args.batch, args.text, text_dim)).astype(np.float32),
        target=rng.normal(size=(args.batch, 16, *args.grid)).astype(np.float32),
    )


def measure(args):
    """What --json prints."""
    flags = ["--directory", str(args.directory), "--dtype", args.dtype]
    children = {
        name: turns.Child(__file__, name, args.python if name == "vidgen" else sys.executable, args.cores, flags)
        for name in args.only
    }
    try:
        for child in children.values():  # compiles
            for question in QUESTIONS:
                child.ask(question)
                child.ask(question)
        found = turns.in_turns(children, QUESTIONS, args.repeats)
        losses = {name: child.ask("loss") for name, child in children.items()}
    finally:
        for child in children.values():
            child.close()
    tokens = args.batch * args.grid[0] * args.grid[1] * args.grid[2] // 4
    return {
        "shape": f"{args.layers} layers, {args.heads} heads of {args.head_dim}, {tokens} tokens in {args.batch} clips",
        "dtype": args.dtype,
        "cores": args.cores,
        "repeats": args.repeats,
        "versions": {name: child.words for name, child in children.items()},
        "seconds": {n: {q: statistics.median(a[0] for a in found[n][q]) for q in QUESTIONS} for n in children},
        "cpu_seconds": {n: {q: statistics.median(a[1] for a in found[n][q]) for q in QUESTIONS} for n in children},
        "losses": losses,
    }


def load_torch(args):
    """Answers of diffusers' model."""
    import diffusers
    import torch

    torch.set_num_threads(args.cores)
    model = diffusers.WanTransformer3DModel.from_pretrained(args.directory / "transformer").train()
    called = torch.compile(model) if args.child == "compiled" else model
    inputs = {name: torch.from_numpy(array) for name, array in np.load(args.directory / "inputs.npz").items()}
    target = inputs.pop("target")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []

    def cast():
        wanted = args.dtype == "bfloat16"
        return torch.autocast("cpu", dtype=torch.bfloat16) if wanted else contextlib.nullcontext()

    def train():
        optimizer.zero_grad(set_to_none=True)
        with cast():
            out = called(**inputs, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(out.float(), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    def denoise():
        with torch.no_grad(), cast():
            called(**inputs, return_dict=False)[0].sum().item()

    calls = {"train": train, "denoise": denoise}
    words = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return (lambda what: losses if what == "loss" else turns.timed(calls[what])), words


def load_vidgen(args):
    """Answers of ours: the same module that trains, with its layers unrolled, as configs for a CPU have it."""
    import jax
    import jax.numpy as jnp
    import optax

    from vidgen.interop.diffusers import load_component

    component = load_component(args.directory / "transformer")
    inputs = dict(np.load(args.directory / "inputs.npz"))
    target = inputs.pop("target")
    given = jax.device_put(component.rows(**inputs))
    target, _, _ = component.rows(**inputs | {"hidden_states": target})
    module = component.module.clone(dtype=jnp.dtype(args.dtype), unroll=component.module.layers)
    optimizer = optax.adamw(LR, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)

    def predict(params, noisy, levels, batch):
        return module.apply({"params": params}, noisy, levels, batch)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, noisy, levels, batch, target):
        params, moments = state
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((predict(p, noisy, levels, batch) - target) ** 2))(params)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    denoised = jax.jit(lambda *given: jnp.sum(predict(*given)))
    state, losses = (component.params, optimizer.init(component.params)), []

    def train():
        nonlocal state
        state, loss = step(state, *given, target)
        losses.append(loss.item())

    calls = {"train": train, "denoise": lambda: float(denoised(state[0], *given))}
    words = f"jax {jax.__version__}, Python {sys.version.split()[0]}"
    return (lambda what: losses if what == "loss" else turns.timed(calls[what])), words


def table(r):
    """The result as Markdown, with the lines that say what was measured."""
    seconds, names = r["seconds"], list(r["seconds"])
    apart = max(abs(a - b) for n in names for a, b in zip(r["losses"][n], r["losses"][names[0]], strict=True))
    lines = [
        f"{r['shape']}, {r['dtype']}, {r['cores']} cores; {'; '.join(dict.fromkeys(r['versions'].values()))}; medians "
        f"of {r['repeats']} turns",
        f"losses of {len(r['losses'][names[0]])} training steps at most {apart:.1e} apart",
        "",
        "| | training step s | × eager | × compiled | CPU s | denoising step s | × eager | × compiled | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        cells = []
        for q in QUESTIONS:
            ratios = [f"{seconds[o][q] / seconds[name][q]:.2f}" if o in seconds else "" for o in ("eager", "compiled")]
            cells += [f"{seconds[name][q]:.3f}", *ratios, f"{r['cpu_seconds'][name][q]:.2f}"]
        lines.append(f"| {TITLES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
