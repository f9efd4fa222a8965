"""`vidgen plan`: what a run needs and how long it takes, before its machines are rented.

What is printed as compiled is the compiler's: memory, collectives and schedule of the very step that trains, made for
devices that aren't there. What is printed as an estimate is arithmetic on published figures of the chips.
"""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen.config import ConfigError
from vidgen.diffusion.generator import generate
from vidgen.parallel.mesh import AXES, axis_sizes, check_fit, make_mesh
from vidgen.parallel.rules import audit, check_sharded, rules_of
from vidgen.planning import aot, arithmetic, published
from vidgen.planning.compiled import Compilation, compile_for
from vidgen.planning.hardware import Topology, parse_topology
from vidgen.studio import plans
from vidgen.tokenizers.base import geometry_from_config
from vidgen.training import program as programs
from vidgen.training.program import Program
from vidgen.training.step import row_keys

NOT_COMPILED = dict.fromkeys(
    ("fits", "peak_bytes_per_device", "hbm_bytes_per_device", "collectives", "compile_seconds", "compiler_options")
)


def run(
    config: ConfigDict,
    topology: str,
    *,
    mesh: str = "",
    mode: str = "train",
    tokens: float = 0.0,
    price: float | None = None,
    abstract: bool = False,
) -> dict[str, Any]:
    """Plans one run; prints a report and returns its figures, what `--json` prints.

    Args:
      topology: "v5p:4x8x8", "2*v6e:16x16", "h100:32x8" (hosts x GPUs).
      mesh: "fsdp=32,context=8"; axes not named have one device. Empty: the config's, refitted to the topology.
      mode: train, or sample: drawing one clip of `config.sample`'s size on the whole topology.
      tokens: to train on in all, for days, chip-hours and cost; 0: `train.steps` of the config.
      price: of a chip-hour, in any currency.
      abstract: arithmetic only, nothing is compiled.

    Returns:
      The figures by name; "fits" is None where nothing was compiled.

    Raises:
      ConfigError: settings, mesh and topology that don't go together; a large array that would lie whole on each
        device; the package that compiles for the target is missing.
    """
    if mode not in ("train", "sample"):
        raise ConfigError(f"--mode={mode}: known are train, sample")
    configs.check(config)
    where = parse_topology(topology)
    if mode == "sample":
        config = sampling_config(config, where.devices)
    config, note = placed(config, where, mesh)
    estimate = arithmetic.estimate(config, where, mode)
    facts = estimate.facts() | {"topology": where.text, "mode": mode, "mesh_note": note}
    print(plans.introduction(config, where, estimate, note), flush=True)
    if not abstract:
        found = compiled(config, where, mode)
        facts |= found.facts()
        print(plans.compiled(found), flush=True)
        if not found.fits and mode == "train":
            facts["estimated_parts"] = parts = arithmetic.memory_parts(config, where)
            facts["would_fit"] = ways = would_fit(config, where)
            print(plans.out_of_memory(parts, ways))
        if found.fits:
            # The transfers that the compiler made, in place of those that arithmetic expects.
            estimate = arithmetic.estimate(config, where, mode, found.collectives)
            facts |= estimate.facts()
    print(plans.roofline(estimate, where, tokens or estimate.tokens * config.train.steps, price))
    return NOT_COMPILED | facts | estimate.cost(where, tokens or estimate.tokens * config.train.steps, price)


# What `--all` plans: the large configs on the machines that they are for, and a small one on the other chips.
SHOWN = (
    ("dit_10b_60k.py", "v5p:4x8x8"),
    ("dit_10b_60k.py", "h100:32x8"),
    ("wan_14b_720p.py", "v5p:2x2x1"),
    ("minute_720p.py", "v5p:8x8x8"),
    ("minute_720p.py:full", "v5p:8x8x8"),
    ("dit_30b.py", "v6e:16x16"),
    ("moving_shapes.py", "v5e:4x4"),
    ("moving_shapes.py", "tpu7x:2x2x1"),
)


def run_all(price: float | None = None) -> dict[str, Any]:
    """Plans `SHOWN`, a report each, then a table of them all; returns their figures under "plans".

    Where the package that compiles for a target is missing, its line says so.
    """
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "configs")
    found = []
    for file, topology in SHOWN:
        print(f"\n=== {file} on {topology}", flush=True)
        try:
            facts = run(configs.load(os.path.join(folder, file)), topology, price=price)
        except ConfigError as e:
            print(f"  {e}")
            facts = {"topology": topology, "error": str(e)}
        found.append(facts | {"config": file})
    print("\n" + plans.all_plans(found))
    _, theirs = published.maxdiffusion_step()
    measured = published.MAXDIFFUSION_STEP_SECONDS
    print(f"\nThe same estimate of a published step, MaxDiffusion's of Wan 14B on v5p:2x2x1: {theirs.step_s:.1f} s; "
          f"measured by its authors: {measured} s ({theirs.step_s / measured - 1:+.0%})")  # fmt: skip
    return {"plans": found, "maxdiffusion_predicted_seconds": theirs.step_s, "maxdiffusion_measured_seconds": measured}


COMPILED = 6  # candidates of a search that are compiled


def search(
    config: ConfigDict, topology: str, *, tokens: float = 0.0, price: float | None = None, abstract: bool = False
) -> dict[str, Any]:
    """Ranks ways to lay the step on a topology by the estimate, compiles the best, and prints what no other beats.

    Meshes, microbatches, rematerialisation presets and attention strategies are tried; all else is the config's.

    Returns the figures of all that were compiled (or, with `abstract`, ranked), best first, under "candidates".
    """
    configs.check(config)
    where = parse_topology(topology)
    ranked = arithmetic.rank(config, where)
    step = f"{config.rows.count} x {config.rows.tokens:,} tokens"
    fit = sum(c.fits for c in ranked)
    print(f"{len(ranked)} ways to lay a step of {step} on {where.text}; by the estimate {fit} fit")
    print(plans.candidates(ranked[:20], where.chip.hbm_bytes), flush=True)
    if abstract:
        return {"candidates": [c.facts() for c in ranked[:20]]}
    rows = []
    for n, candidate in enumerate(ranked[:COMPILED], start=1):
        print(f"\ncompiling {n} of {min(COMPILED, len(ranked))}: {plans.way(candidate)}", flush=True)
        changed = configs.override(config, candidate.changes | {"mesh.slices": where.slices})
        found = compiled(changed, where)
        estimate = arithmetic.estimate(changed, where, collectives=found.collectives if found.fits else None)
        asked = tokens or estimate.tokens * config.train.steps
        rows.append(candidate.facts() | found.facts() | estimate.facts() | estimate.cost(where, asked, price))
        verdict = "fits" if found.fits else "OUT OF MEMORY"
        print(
            f"  {verdict}: {plans.size(found.peak_bytes)}, {plans.duration(estimate.roofline.step_s)} a step",
            flush=True,
        )
    print("\n" + plans.compiled_candidates(rows))
    return {"candidates": rows}


def would_fit(config: ConfigDict, topology: Topology) -> list[dict[str, Any]]:
    """Ways that fit by the estimate: of this topology the fastest three, else the fastest on the least that has any."""
    ranked = [c for c in arithmetic.rank(config, topology) if c.fits]
    if ranked:
        return [c.facts() | {"topology": topology.text} for c in ranked[:3]]
    for larger in topology.larger():
        try:
            ranked = [c for c in arithmetic.rank(config, larger) if c.fits]
        except ConfigError:  # which divides nothing
            continue
        if ranked:
            return [ranked[0].facts() | {"topology": larger.text}]
    return []


def compiled(config: ConfigDict, topology: Topology, mode: str = "train") -> Compilation:
    """The step that trains, or the drawing of a clip, compiled for the topology, whose devices the config's mesh has.

    Raises ConfigError where the compiler's package is missing or a large array would lie whole on each device.
    """
    rows = config.rows
    devices = aot.devices(topology)
    mesh = make_mesh(config.mesh, rows.count, rows.tokens, config.optimizer.accumulate, devices)
    program = programs.build(config, mesh)
    sizes = dict(mesh.shape)
    state = program.state_like if mode == "train" else program.state_like.params
    placed = audit(state, sizes, rules_of(config.mesh))
    check_sharded(placed, sizes, config.mesh.rules)
    if mode == "train":
        function, arguments = program.step, (program.state_like, program.batch_like)
    else:
        function, arguments = drawing(program)
    return compile_for(topology, sizes, function, arguments, program.compiler_options, placed)


def drawing(program: Program) -> tuple[Any, tuple[Any, ...]]:
    """(a jitted function that draws the latents of a clip a row, its arguments as shapes with shardings)."""
    config, features = program.config, program.generator.tokenizer.geometry.features
    s, over_tokens = config.sample, program.batch_shardings.segment

    def draw(params, batch, unconditional, seed):
        keys = row_keys(config.seed, seed, config.rows.count)
        noise = jax.random.normal(keys[0], (*batch.segment.shape, features))
        noise = jax.lax.with_sharding_constraint(noise, over_tokens)
        return generate(
            program.generator,
            params,
            batch,
            unconditional if s.guidance != 1 else None,
            noise,
            keys,
            config.objective,
            solver=s.solver,
            steps=s.steps,
            guidance=s.guidance,
            eta=s.eta,
        )

    batch = program.batch_like.replace(tokens=None, clip=None)
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    draw = jax.jit(draw, out_shardings=over_tokens, compiler_options=program.compiler_options)
    return draw, (program.state_like.params, batch, batch, seed)


def placed(config: ConfigDict, topology: Topology, mesh: str) -> tuple[ConfigDict, str]:
    """(a copy of the config with the mesh to plan for, how it came about); raises ConfigError."""
    if mesh:
        sizes, note = dict.fromkeys(AXES, 1) | parse_mesh(mesh), "given"
    else:
        try:
            sizes, note = axis_sizes(config.mesh, topology.devices), "the config's"
        except ConfigError:
            sizes, note = refit(config, topology.devices), "refitted from the config's"
    config = configs.override(
        config, {f"mesh.{axis}": n for axis, n in sizes.items()} | {"mesh.slices": topology.slices}
    )
    axis_sizes(config.mesh, topology.devices)
    check_fit(sizes, config.rows.count, config.rows.tokens, config.optimizer.accumulate)
    return config, note


def parse_mesh(mesh: str) -> dict[str, int]:
    """ "fsdp=32,context=8" as a dict; raises ConfigError."""
    sizes = {}
    for part in mesh.split(","):
        axis, _, n = part.strip().partition("=")
        if axis not in AXES or not n.lstrip("-").isdigit():
            raise ConfigError(f"--mesh={mesh}: {part!r}: expected AXIS=DEVICES with an axis of {', '.join(AXES)}")
        sizes[axis] = int(n)
    return sizes


def refit(config: ConfigDict, devices: int) -> dict[str, int]:
    """The config's mesh for another number of devices.

    Tensor and context stay as far as they divide; fsdp takes as many of the rest as there are rows for, and what is
    left then shares the rows' tokens. Raises ConfigError where the tokens don't divide either.
    """
    tensor = math.gcd(max(config.mesh.tensor, 1), devices)
    context = math.gcd(max(config.mesh.context, 1), devices // tensor)
    fsdp = math.gcd(devices // (tensor * context), config.rows.count // config.optimizer.accumulate)
    context = devices // (tensor * fsdp)
    sizes = {"data": 1, "fsdp": fsdp, "context": context, "tensor": tensor}
    if config.rows.tokens % context:
        raise ConfigError(
            f"--topology has {devices} devices: config.rows.count={config.rows.count} rows fill {fsdp} of them, and "
            f"config.rows.tokens={config.rows.tokens} don't divide over the other {context}; give --mesh, or other rows"
        )
    return sizes


def sampling_config(config: ConfigDict, devices: int) -> ConfigDict:
    """The config whose rows hold one clip of `config.sample`'s size each, as drawing it has them."""
    geometry, s = geometry_from_config(config.tokenizer), config.sample
    tokens = geometry.tokens(*geometry.cover(s.frames, s.height, s.width))
    step = 128 * devices  # whole vectors of a TPU, however many devices share the clip
    changes = {
        "rows.count": 1,
        "rows.tokens": -(-tokens // step) * step,
        "rows.segments": 1,
        "rows.text": config.rows.caption,
        "optimizer.accumulate": 1,
        "mesh.context": max(config.mesh.context, 1) * max(config.mesh.fsdp, 1),
        "mesh.fsdp": 1,
        "mesh.data": 1,
    }
    return configs.override(config, changes)
