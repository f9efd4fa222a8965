"""`vidgen train`: clips in, a denoiser out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import time
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen import sample
from vidgen.config import ConfigError, to_json
from vidgen.data import feed
from vidgen.data.packing import Packing
from vidgen.data.sources import Source, open_source
from vidgen.diffusion import generator as generators
from vidgen.diffusion.generator import Generator
from vidgen.evaluation.heldout import heldout_loss
from vidgen.objectives import flow
from vidgen.parallel.mesh import ROWS, make_mesh, tree_shardings
from vidgen.planning.flops import step_flops
from vidgen.planning.peaks import peak_flops
from vidgen.studio import media
from vidgen.training import optimizers
from vidgen.training import state as states
from vidgen.training.checkpoint import Checkpoints, abstract, write_config
from vidgen.training.meter import Meter
from vidgen.training.metrics import MetricWriter, Progress, si
from vidgen.training.profiler import Profiler
from vidgen.training.resilience import StopSignal, only_one
from vidgen.training.state import TrainState
from vidgen.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
      step: steps taken in all, this attempt's and earlier ones'.
      stopped_by: name of the signal that ended it before `train.steps`; empty where none did.
      metrics: the last row of metrics.jsonl that this attempt wrote.
    """

    step: int
    stopped_by: str
    metrics: dict[str, float]


def run(config: ConfigDict, workdir: str) -> Result:
    """Trains to `config.train.steps`, from the newest checkpoint of `workdir` where there is one.

    Raises ConfigError for anything that the user can mend.
    """
    check(config)
    # A copy, with an absolute path: the workdir is to be of use from anywhere.
    source = config.data.source
    config = configs.override(config, {"data.source": os.path.abspath(source)} if os.path.isdir(source) else {})
    mesh = make_mesh(config.mesh, config.rows.count, config.optimizer.accumulate)
    rows = NamedSharding(mesh, ROWS)
    generator = generators.from_config(config)
    geometry = generator.tokenizer.geometry
    optimizer = optimizers.from_config(config)
    source = open_source(config.data, "train")
    packing = Packing(source.sizes, geometry, config.rows, config.seed)
    heldout = heldout_loss(config, generator, rows) if config.train.eval_every else None
    if config.train.sample_every and not config.sample.prompts:
        config.sample.prompts = tuple(sample.heldout_captions(config, 6))

    with contextlib.ExitStack() as stack:
        stack.enter_context(only_one(workdir))
        changed = write_config(workdir, config)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config.train.keep)))
        state, shardings, facts = begin(config, generator, optimizer, source, checkpoints, mesh)
        start = int(state.step)
        progress = stack.enter_context(contextlib.closing(Progress(config.train.steps, start)))
        if start >= config.train.steps:
            progress.say(f"Already at step {start} of {config.train.steps}: nothing to do")
            return Result(start, "", {})
        if start and "train.steps" in changed and config.optimizer.schedule != "constant":
            progress.say("config.train.steps has changed, and the learning rate's schedule with it")
        step = jax.jit(
            make_step(flow.loss_of(generator, config.objective), flow.trained, optimizer, config),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, None),
            donate_argnums=0,
        )
        writer = MetricWriter(workdir, wandb_project=config.train.wandb, config_json=to_json(config))
        stack.enter_context(contextlib.closing(writer)).resume(start + 1)
        meter = _introduce(config, workdir, generator, source, packing, state, mesh, facts["tokens_seen"], progress)
        profiler = stack.enter_context(contextlib.closing(Profiler(config.train.profile_steps, workdir)))
        stop = stack.enter_context(StopSignal())
        batches = stack.enter_context(feed.batches(source, packing, geometry, config, start, rows))
        last: dict[str, float] = {}

        def finish(n: int, metrics: dict[str, jax.Array], more: dict[str, float]) -> None:
            """Takes the numbers of step n, and writes them where they are due."""
            nonlocal last
            meter.done(n, metrics)
            if more or _due(n, config.train.log_every, config.train.steps):
                checkpoints.check()
                last = meter.row() | more
                writer.scalars(n, last)
                progress.update(n, last)

        n, late, stopping = start, None, False
        while n < config.train.steps and not stopping:
            n += 1
            profiler.before(n)
            batch, info = next(batches)
            state, metrics = step(state, batch)
            meter.fed(info)
            # One step late: the device has step n to do while the host waits for the numbers of n - 1.
            if late:
                finish(*late, {})
            late = (n, metrics)
            profiler.after(n, metrics)

            # The next step takes over the state's memory, so what looks at the state does it now.
            stopping = stop.requested
            save = stopping or _due(n, config.train.checkpoint_every, config.train.steps)
            draw, judge = _due(n, config.train.sample_every), _due(n, config.train.eval_every)
            if save or draw or judge:
                jax.block_until_ready(metrics)
                clock = time.perf_counter()
                more = heldout(state.ema) if judge else {}
                meter.aside(time.perf_counter() - clock)
                finish(*late, more)
                late = None
                clock = time.perf_counter()
                if save:
                    checkpoints.save(state, facts | {"tokens_seen": meter.tokens_seen})
                if draw:
                    draw_samples(config, generator, state.ema, n, workdir, writer)
                meter.aside(time.perf_counter() - clock)
        checkpoints.wait()
        if stopping and n < config.train.steps:
            progress.say(f"Stopped by {stop.name} after step {n}; all is saved. The same command goes on from there.")
            return Result(n, stop.name, last)
    return Result(n, "", last)


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings that would fail late."""
    configs.check(config)
    flow.check(config.objective)
    sample.check(config)
    window = tuple(config.train.profile_steps)
    if window and (len(window) != 2 or any(type(n) is not int for n in window) or not 1 <= window[0] <= window[1]):
        raise ConfigError(f"config.train.profile_steps={window}: expected (first, last)")


def begin(
    config: ConfigDict,
    generator: Generator,
    optimizer: optax.GradientTransformation,
    source: Source,
    checkpoints: Checkpoints,
    mesh: Mesh,
) -> tuple[TrainState, Any, dict[str, Any]]:
    """(state, its shardings, facts that checkpoints keep): made or restored straight into the shardings.

    Raises ConfigError if the newest checkpoint was trained on other clips.
    """

    def init() -> TrainState:
        return states.create(generator.init(jax.random.key(config.seed), generators.example(config)), optimizer)

    like = jax.eval_shape(init)
    shardings = tree_shardings(like, mesh)
    latest = checkpoints.latest
    if latest is None:
        facts = {"fingerprint": source.fingerprint, "tokens_seen": 0.0}
        return jax.jit(init, out_shardings=shardings)(), shardings, facts
    facts = checkpoints.facts(latest)
    if facts["fingerprint"] != source.fingerprint:
        raise ConfigError(
            f"config.data.source={config.data.source}: not the clips that the checkpoint at step {latest} was trained "
            "on, so the run can't go on exactly; take another --workdir, or the clips as they were"
        )
    return checkpoints.restore(latest, abstract(like, shardings)), shardings, facts


def draw_samples(
    config: ConfigDict, generator: Generator, params: Any, n: int, workdir: str, writer: MetricWriter
) -> None:
    """Samples of `sample.prompts`, a row each, into WORKDIR/samples/<step>/ and TensorBoard."""
    prompts, seeds = list(config.sample.prompts), range(4)
    videos = sample.draw(config, generator, params, prompts, seeds=seeds)
    shown = media.grid(videos, columns=len(seeds), scale=sample.scale_for(config.sample.width))
    folder = os.path.join(workdir, "samples", f"{n:08d}")
    about = config.sample.to_dict() | {"prompts": prompts, "seeds": list(seeds), "step": n}
    sample.write_grid(os.path.join(folder, "grid"), shown, config.sample.fps, f"{folder}/prompts.json", about)
    writer.videos(n, {"samples": shown}, config.sample.fps)


def _due(n: int, every: int, last: int = 0) -> bool:
    return n == last or (every > 0 and n % every == 0)


def _introduce(
    config: ConfigDict,
    workdir: str,
    generator: Generator,
    source: Source,
    packing: Packing,
    state: TrainState,
    mesh: Mesh,
    tokens_seen: float,
    progress: Progress,
) -> Meter:
    """Says what is about to be trained, writes it where the report finds it, and makes the meter to go with it."""
    parameters, start = states.count(state.params), int(state.step)
    planned = range(start, start + min(packing.steps_per_epoch, 32))
    stats = packing.stats(planned)
    clips = [clip for n in planned for row in packing.step(n) for clip in row]
    flops = step_flops(
        config,
        generator.tokenizer.geometry.features,
        squares=sum(c.tokens**2 for c in clips) / len(planned),
        text_squares=sum(c.text**2 for c in clips) / len(planned),
        crossed=sum(c.tokens * c.text for c in clips) / len(planned),
    )
    peak, origin = peak_flops(jax.devices()[0])
    peak *= jax.device_count()
    facts = {
        "parameters": parameters,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": dict(mesh.shape),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "peak": f"{peak / 1e12:.2f} TFLOP/s ({origin})",
        "flops_per_step": flops.useful,
    }
    for name, value in (("environment", facts), ("packing", dataclasses.asdict(stats))):
        media.write(os.path.join(workdir, f"{name}.json"), json.dumps(value, indent=2).encode())
    progress.say(f"{parameters / 1e6:.1f} M parameters on {facts['devices']}, jax {jax.__version__}, {facts['mesh']}")
    progress.say(f"{len(source.sizes)} clips, {packing.steps_per_epoch} steps a pass: {stats}")
    progress.say(
        f"{si(flops.useful)}FLOP a step (attention: {si(flops.attention_useful)}FLOP useful, "
        f"{si(flops.attention_executed)}FLOP executed); MFU is against {facts['peak']}"
    )
    if config.train.eval_every and config.data.source != "moving_shapes" and not config.data.holdout:
        progress.say("config.data.holdout is 0: the held-out loss is of clips that are trained on")
    progress.say(f"Going on after step {start}" if start else "Compiling the step …")
    lr = optimizers.schedule(config.optimizer, config.optimizer.lr, config.train.steps)
    return Meter(lr, flops.useful, peak, len(clips) / len(planned), config.train.max_bad, tokens_seen)
