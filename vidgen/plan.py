"""`vidgen plan`: what a run needs and how long it takes, before its machines are rented.

What is printed as compiled is the compiler's: memory, collectives and schedule of the very step that trains, made for
devices that aren't there. What is printed as an estimate is arithmetic on published figures of the chips.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen import plan_vae, sample
from vidgen.config import ConfigError
from vidgen.diffusion import generator as generators
from vidgen.diffusion.generator import generate
from vidgen.parallel.mesh import AXES, make_mesh
from vidgen.parallel.rules import Placed, audit, check_sharded, rules_of
from vidgen.planning import aot, arithmetic, published
from vidgen.planning.compiled import Compilation, compile_for
from vidgen.planning.hardware import Topology, parse_topology
from vidgen.planning.layout import placed, sampling_config
from vidgen.planning.memory import HEADROOM
from vidgen.planning.search import Candidate, rank
from vidgen.studio import plans
from vidgen.training import optimizers
from vidgen.training import program as programs
from vidgen.training import state as states
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
      mesh: "fsdp=32,context=8"; axes not named have one device, one of -1 what the others leave. Empty: the config's,
        or the nearest to it that the topology has.
      mode: train, or sample: drawing one clip of `config.sample`'s size on each slice.
      tokens: to train on in all, for days, chip-hours and cost; 0: `train.steps` of the config.
      price: of a chip-hour, in any currency.
      abstract: arithmetic only, nothing is compiled.

    Returns:
      The figures by name; "fits" is None where nothing was compiled.

    Raises:
      ConfigError: settings, mesh and topology that don't go together; a large array that would lie whole on each
        device; the package that compiles for the target is missing; the compiler refuses.
    """
    if mode not in ("train", "sample"):
        raise ConfigError(f"--mode={mode}: known are train, sample")
    check(config, tokens, price)
    where = parse_topology(topology)
    if config.task == "vae":
        plan_vae.refuse(mode, tokens, price)
        return plan_vae.run(config, where, mesh, abstract)
    if mode == "sample":
        config = sampling_config(config, where)
    config, note = placed(config, where, mesh, mode)
    estimate, state = arithmetic.estimate(config, where, mode), state_of(config, mode)
    facts = estimate.facts() | {"topology": where.text, "mode": mode, "mesh_note": note} | sharding(state)
    print(plans.introduction(config, where, estimate, note))
    print(plans.state(state, estimate.mesh), flush=True)
    check_sharded(state, estimate.mesh, config.mesh.rules)
    if not abstract:
        found = compiled(config, where, mode)
        facts |= found.facts()
        print(plans.compiled(found), flush=True)
        if found.fits:
            # The transfers that the compiler made, in place of those that arithmetic expects.
            estimate = arithmetic.estimate(config, where, mode, found.collectives)
            facts |= estimate.facts()
        else:
            facts |= out_of_memory(config, where, mode, found)
    asked = tokens or estimate.tokens * config.train.steps
    print(plans.roofline(estimate, where, asked, price))
    return NOT_COMPILED | facts | estimate.cost(where, asked, price)


def check(config: ConfigDict, tokens: float = 0.0, price: float | None = None) -> None:
    """Raises ConfigError on settings that no plan can use, and on numbers that are none."""
    programs.check(config)
    sample.check(config)
    if not 0 <= tokens < math.inf:
        raise ConfigError(f"--tokens={tokens}: expected a number of tokens to train on, 1e12 for example")
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--price={price}: expected what a chip-hour costs, 0 or more")


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

    Where one can't be made, since the package that compiles for its target is missing, say, its line says why.
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

    Returns the figures of all that were compiled (or, with `abstract`, ranked), best first, under "candidates"; what
    the compiler refused has an "error" instead.
    """
    check(config, tokens, price)
    if config.task != "denoiser":
        raise ConfigError(f"--search: it ranks ways to train a denoiser, and config.task={config.task!r}; leave it out")
    where = parse_topology(topology)
    ranked = rank(config, where)
    step = f"{config.rows.count} x {config.rows.tokens:,} tokens"
    fit = sum(c.fits for c in ranked)
    print(f"{len(ranked)} ways to lay a step of {step} on {where.text}; by the estimate {fit} fit")
    print(plans.candidates(ranked[:20], where.chip.hbm_bytes), flush=True)
    if abstract:
        return {"candidates": [c.facts() for c in ranked[:20]]}
    rows = []
    for n, candidate in enumerate(ranked[:COMPILED], start=1):
        print(f"\ncompiling {n} of {min(COMPILED, len(ranked))}: {plans.way(candidate)}", flush=True)
        try:
            rows.append(candidate.facts() | tried(config, candidate, where, tokens, price))
            print(f"  {plans.verdict(rows[-1])}", flush=True)
        except ConfigError as e:
            print(f"  {e}", flush=True)
            rows.append(candidate.facts() | {"error": str(e)})
    print("\n" + plans.compiled_candidates([r for r in rows if "error" not in r]))
    return {"candidates": rows}


def tried(
    config: ConfigDict, candidate: Candidate, topology: Topology, tokens: float, price: float | None
) -> dict[str, Any]:
    """The figures of a candidate, compiled; raises ConfigError."""
    changed = configs.override(config, candidate.changes | {"mesh.slices": topology.slices})
    found = compiled(changed, topology)
    estimate = arithmetic.estimate(changed, topology, collectives=found.collectives if found.fits else None)
    asked = tokens or estimate.tokens * config.train.steps
    return found.facts() | estimate.facts() | estimate.cost(topology, asked, price)


def out_of_memory(config: ConfigDict, topology: Topology, mode: str, found: Compilation) -> dict[str, Any]:
    """What fills the memory and what would fit, by the estimate: printed, and as figures."""
    parts = arithmetic.memory_parts(config, topology, mode)
    # By as much as the compiler wants more than the estimate, others are taken to want more too.
    scale = max(1.0, found.peak_bytes / sum(parts.values()))
    ways = would_fit(config, topology, scale) if mode == "train" else would_draw(config, topology, scale)
    print(plans.out_of_memory(parts, ways))
    return {"estimated_parts": parts, "would_fit": ways}


def would_fit(config: ConfigDict, topology: Topology, scale: float = 1.0) -> list[dict[str, Any]]:
    """Ways that fit by the estimate: of this topology the fastest three, else the fastest on the least that has any.

    The config's own way is not among them: that it does not fit is known.

    Args:
      scale: by which estimates of memory are too small.
    """
    strategy = arithmetic.attending(config, topology).strategy
    own = ({axis: config.mesh[axis] for axis in AXES}, config.optimizer.accumulate, config.model.remat, strategy)
    for where in (topology, *topology.larger()):
        try:
            ranked = [_scaled(c, where, scale) for c in rank(config, where)]
        except ConfigError:  # which divides nothing
            continue
        ranked = [c for c in ranked if c.fits and (c.mesh, c.accumulate, c.remat, c.attention) != own]
        if ranked:
            few = ranked[: 3 if where == topology else 1]
            return [c.facts() | {"topology": where.text} for c in few]
    return []


def _scaled(c: Candidate, topology: Topology, scale: float) -> Candidate:
    size = c.bytes_per_device * scale
    return dataclasses.replace(c, bytes_per_device=size, fits=size <= HEADROOM * topology.chip.hbm_bytes)


def would_draw(config: ConfigDict, topology: Topology, scale: float = 1.0) -> list[dict[str, Any]]:
    """As `would_fit`, of drawing clips: the least larger topology of the same chip that has room."""
    for where in topology.larger():
        try:
            larger, _ = placed(sampling_config(config, where), where, mode="sample")
        except ConfigError:
            continue
        size = scale * sum(arithmetic.memory_parts(larger, where, "sample").values())
        if size <= HEADROOM * where.chip.hbm_bytes:
            e = arithmetic.estimate(larger, where, "sample")
            c = Candidate(e.mesh, 1, larger.model.remat, e.strategy, size, True, e.roofline, 0.0)
            return [c.facts() | {"topology": where.text}]
    return []


def state_of(config: ConfigDict, mode: str = "train") -> list[Placed]:
    """Where each array of the state lies on the config's mesh; of drawing, its weights. Nothing is computed."""
    plain = configs.override(config, {"model.attention": "auto", "mesh.attention": "auto", "mesh.ulysses": 0})
    generator, optimizer = generators.from_config(plain, platform="cpu"), optimizers.from_config(plain)

    def init():
        params = generator.init(jax.random.key(0), generators.example(plain))
        return states.create(params, optimizer) if mode == "train" else {"params": params}

    return audit(jax.eval_shape(init), {axis: config.mesh[axis] for axis in AXES}, rules_of(config.mesh))


def sharding(state: list[Placed]) -> dict[str, Any]:
    """What `--json` has of the state."""
    return {
        "state_bytes_per_device": sum(p.bytes_per_device for p in state),
        "sharding": [
            {"path": p.path, "shape": p.shape, "spec": list(p.spec), "bytes_per_device": p.bytes_per_device}
            for p in state
        ],
    }


def compiled(config: ConfigDict, topology: Topology, mode: str = "train") -> Compilation:
    """The step that trains, or the drawing of clips, compiled for the topology, whose devices the config's mesh has.

    Raises ConfigError where the compiler's package is missing, it refuses, or a large array would lie whole on each
    device.
    """
    rows = config.rows
    devices = aot.devices(topology)
    mesh = make_mesh(config.mesh, rows.count, rows.tokens, config.optimizer.accumulate, devices)
    program = programs.build(config, mesh)
    if mode == "train":
        function, arguments = program.step, (program.state_like, program.batch_like)
    else:
        function, arguments = drawing(program)
    return compile_for(topology, dict(mesh.shape), function, arguments, program.compiler_options)


def drawing(program: Program) -> tuple[Any, tuple[Any, ...]]:
    """(a jitted function that draws the latents of a clip a row, its arguments as shapes with shardings)."""
    config, geometry = program.config, program.generator.tokenizer.geometry
    s, over_tokens = config.sample, program.batch_shardings.segment

    def draw(params, batch, unconditional, seed):
        keys = row_keys(config.seed, seed, config.rows.count)
        noise = jax.random.normal(keys[0], (*batch.segment.shape, geometry.features))
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
            clip_tokens=geometry.tokens(*geometry.cover(s.frames, s.height, s.width)),
        )

    batch = program.batch_like.replace(tokens=None, clip=None)
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    draw = jax.jit(draw, out_shardings=over_tokens, compiler_options=program.compiler_options)
    return draw, (program.state_like.params, batch, batch, seed)
