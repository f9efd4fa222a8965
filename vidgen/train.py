"""`vidgen train`: clips in, a denoiser out."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vidgen import sample
from vidgen.config import ConfigError, to_json
from vidgen.data import feed
from vidgen.data.packing import Packing
from vidgen.data.sources import Source, open_source
from vidgen.diffusion import generator as generators
from vidgen.diffusion.generator import Generator
from vidgen.objectives import flow
from vidgen.parallel.mesh import ROWS, make_mesh, tree_shardings
from vidgen.planning.flops import step_flops
from vidgen.planning.peaks import peak_flops
from vidgen.studio import media
from vidgen.training import optimizers
from vidgen.training import state as states
from vidgen.training.checkpoint import Checkpoints, abstract, write_config
from vidgen.training.metrics import MetricWriter, Progress
from vidgen.training.resilience import StopSignal
from vidgen.training.state import TrainState
from vidgen.training.step import make_step, row_keys

HELDOUT_LEVELS = 8


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
      step: steps taken in all, this attempt's and earlier ones'.
      finished: False where a signal ended it before `train.steps`.
      metrics: the last row of metrics.jsonl.
    """

    step: int
    finished: bool
    metrics: dict[str, float]


def run(config: ConfigDict, workdir: str) -> Result:
    """Trains to `config.train.steps`, from the newest checkpoint of `workdir` where there is one.

    Raises ConfigError for anything the user can mend; a failing step or an unreadable disk raise as they are.
    """
    _check(config)
    mesh = make_mesh(config.mesh, config.rows.count)
    generator = generators.from_config(config)
    geometry = generator.tokenizer.geometry
    source = open_source(config.data, "train")
    packing = Packing(source.sizes, geometry, config.rows, config.seed)
    write_config(workdir, config)
    checkpoints = Checkpoints(workdir, config.train.keep)

    state, shardings = _initial_or_restored(config, generator, source, checkpoints, mesh)
    start = int(state.step)
    optimizer = optimizers.from_config(config)

    def loss_sum(params, batch, keys):
        return flow.loss_sum(generator, params, batch, keys, config.objective)

    rows = NamedSharding(mesh, ROWS)
    step = jax.jit(
        make_step(loss_sum, flow.trained, optimizer, config),
        in_shardings=(shardings, rows),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
    heldout = _heldout_loss(config, generator, rows) if config.train.eval_every else None
    meter = _Meter(
        config,
        packing,
        geometry.features,
        optimizers.schedule(config.optimizer, config.optimizer.lr, config.train.steps),
    )
    writer = MetricWriter(workdir, wandb_project=config.train.wandb, config_json=to_json(config))
    writer.resume(start + 1)
    progress = Progress(config.train.steps, start)
    _introduce(config, workdir, generator, source, packing, state, meter, mesh, start, progress)

    facts = {"fingerprint": source.fingerprint, "seed": config.seed}
    row: dict[str, float] = {}
    with StopSignal() as stop, feed.batches(source, packing, geometry, config, start, rows) as batches:
        pending = None
        n = start
        while n < config.train.steps and not stop.requested:
            with _Profile(config.train.profile_steps, n, workdir):
                batch, info = next(batches)
                state, metrics = step(state, batch)
            n += 1
            meter.fed(info)
            # One step late: the next step is under way while the numbers of the last one are fetched.
            if pending is not None:
                meter.done(*pending)
            pending = (n, metrics)
            log = _due(n, config.train.log_every, config.train.steps)
            evaluate = heldout is not None and _due(n, config.train.eval_every, config.train.steps)
            draw = config.train.sample_every and _due(n, config.train.sample_every, config.train.steps)
            save = _due(n, config.train.checkpoint_every, config.train.steps)
            if not (log or evaluate or draw or save):
                continue
            meter.done(*pending)
            pending = None
            if log or evaluate:
                row = meter.row()
                if evaluate:
                    row |= heldout(state.ema)
                writer.scalars(n, row)
                progress.update(n, row)
            if save:
                checkpoints.save(state, facts)
            if draw:
                _draw_samples(config, generator, state.ema, n, workdir, writer)
            meter.restart()
        if pending is not None:
            meter.done(*pending)
    if n > start:
        checkpoints.save(state, facts)
    checkpoints.wait()
    checkpoints.close()
    writer.close()
    progress.close()
    finished = n >= config.train.steps
    if not finished:
        progress.say(f"Stopped by {stop.name} at step {n}; all is saved. To go on, run the same command again:")
        progress.say(f"  vidgen train --config … --workdir {workdir}")
    return Result(n, finished, row)


def _check(config: ConfigDict) -> None:
    """Raises ConfigError on settings that would fail late."""
    flow.check(config.objective)
    sample.check(config)
    t = config.train
    for key, least in (("steps", 1), ("log_every", 1), ("checkpoint_every", 1), ("keep", 1)):
        if t[key] < least:
            raise ConfigError(f"config.train.{key}={t[key]}: expected at least {least}")
    for key in ("eval_every", "sample_every"):
        if t[key] < 0:
            raise ConfigError(f"config.train.{key}={t[key]}: expected 0 (never) or more")
    if config.optimizer.accumulate < 1 or config.rows.count % config.optimizer.accumulate:
        fits = [n for n in range(1, config.rows.count + 1) if config.rows.count % n == 0]
        near = min(fits, key=lambda n: abs(n - config.optimizer.accumulate))
        raise ConfigError(
            f"config.optimizer.accumulate={config.optimizer.accumulate} does not divide "
            f"config.rows.count={config.rows.count}; nearest: {near}"
        )
    if t.profile_steps and (len(t.profile_steps) != 2 or t.profile_steps[0] > t.profile_steps[1]):
        raise ConfigError(f"config.train.profile_steps={tuple(t.profile_steps)}: expected (first, last)")


def _due(n: int, every: int, last: int) -> bool:
    return n == last or (every > 0 and n % every == 0)


def _initial_or_restored(
    config: ConfigDict, generator: Generator, source: Source, checkpoints: Checkpoints, mesh: Mesh
) -> tuple[TrainState, Any]:
    """The state, made or restored straight into its shardings, and the shardings."""
    optimizer = optimizers.from_config(config)

    def init() -> TrainState:
        return states.create(generator.init(jax.random.key(config.seed), generators.example(config)), optimizer)

    like = jax.eval_shape(init)
    shardings = tree_shardings(like, mesh)
    latest = checkpoints.latest
    if latest is None:
        return jax.jit(init, out_shardings=shardings)(), shardings
    facts = checkpoints.facts(latest)
    if facts["fingerprint"] != source.fingerprint:
        raise ConfigError(
            f"config.data.source={config.data.source}: the clips differ from those the checkpoint at step {latest} was "
            "trained on, so it can't go on exactly; take another --workdir"
        )
    return checkpoints.restore(latest, abstract(like, shardings)), shardings


def _heldout_loss(config: ConfigDict, generator: Generator, rows: NamedSharding):
    """params → held-out loss by noise level: the same clips, noise and levels every time."""
    source = open_source(config.data, "heldout")
    packing = Packing(source.sizes, generator.tokenizer.geometry, config.rows, config.seed)
    steps = max(1, -(-config.train.eval_rows // config.rows.count))

    @jax.jit
    def sums(params, batch, keys):
        return flow.heldout_sums(generator, params, batch, keys, config.objective, HELDOUT_LEVELS)

    def loss(params) -> dict[str, float]:
        total, tokens = np.zeros(HELDOUT_LEVELS), 0.0
        for n in range(steps):
            batch = feed.host_rows(source, packing, generator.tokenizer.geometry, config, n)
            batch = jax.device_put(batch, rows)
            errors, weight = sums(params, batch, row_keys(config.seed + 1, np.int32(n), config.rows.count))
            total, tokens = total + np.asarray(errors, np.float64), tokens + float(weight)
        by_level = total / max(tokens, 1.0)
        levels = {f"heldout_loss/level_{i}": float(x) for i, x in enumerate(by_level)}
        return {"heldout_loss": float(by_level.mean())} | levels

    return loss


class _Meter:
    """Adds up what the steps since the last row did."""

    def __init__(self, config: ConfigDict, packing: Packing, features: int, lr):
        self.config, self._lr = config, lr
        squares = text_squares = mixed = 0.0
        sampled = range(min(packing.steps_per_epoch, 16))
        for n in sampled:
            for placed in (p for row in packing.step(n) for p in row):
                squares += placed.tokens**2
                text_squares += placed.text**2
                mixed += placed.tokens * placed.text
        self.flops = step_flops(config, features, *(x / len(sampled) for x in (squares, text_squares, mixed)))
        device = jax.devices()[0]
        peak, self.peak_source = peak_flops(device)
        self.peak = peak * jax.device_count()
        self.tokens_seen = 0.0
        self._bad: Counter = Counter()
        self._clips = 0
        self._clips_a_step = sum(len(row) for n in sampled for row in packing.step(n)) / len(sampled)
        self.restart()

    def restart(self) -> None:
        """Begins an interval: what went on between two of them, sampling say, does not count."""
        self._start, self._wait, self._steps, self._tokens = time.perf_counter(), 0.0, 0, 0.0
        self._losses: list[float] = []
        self._last: dict[str, float] = {}

    def fed(self, info: feed.FeedInfo) -> None:
        """A batch came."""
        self._wait += info.wait
        self._bad.update(info.bad)
        self._clips += self._clips_a_step
        bad = sum(self._bad.values())
        # A single bad clip among the first few is no share to judge by.
        if bad > 10 and bad > self.config.train.max_bad * self._clips:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self._bad.most_common(5))
            raise ConfigError(
                f"{bad} of about {self._clips:.0f} clips could not be read ({reasons}), more than "
                f"config.train.max_bad={self.config.train.max_bad} allows"
            )

    def done(self, n: int, metrics: dict[str, jax.Array]) -> None:
        """A step is done; blocks until it is."""
        self._last = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._losses.append(self._last["loss"])
        self._tokens += self._last["tokens"]
        self.tokens_seen += self._last["tokens"]
        self._steps += 1
        self._n = n

    def row(self) -> dict[str, float]:
        """The row of metrics.jsonl for the interval: means over its steps."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return {
            "loss": float(np.mean(self._losses)),
            "grad_norm": self._last["grad_norm"],
            "lr": float(self._lr(self._n - 1)),
            "tokens_seen": self.tokens_seen,
            "tokens_per_second": self._tokens / seconds,
            "seconds_per_step": seconds / self._steps,
            "mfu": self.flops.useful * self._steps / seconds / self.peak,
            "data_wait_fraction": self._wait / seconds,
            "skipped_steps": self._last["skipped"],
            "unreadable_clips": float(sum(self._bad.values())),
        }


class _Profile:
    """A profiler trace over the steps of `train.profile_steps`."""

    def __init__(self, window: tuple[int, ...], n: int, workdir: str):
        self._starts = bool(window) and n + 1 == window[0]
        self._ends = bool(window) and n + 1 == window[1]
        self._folder = os.path.join(workdir, "profile")

    def __enter__(self) -> None:
        if self._starts:
            jax.profiler.start_trace(self._folder)

    def __exit__(self, *_: object) -> None:
        if self._ends:
            jax.effects_barrier()
            jax.profiler.stop_trace()


def _draw_samples(config: ConfigDict, generator: Generator, params, n: int, workdir: str, writer: MetricWriter) -> None:
    """Samples of `sample.prompts`, or of held-out captions, into WORKDIR/samples/<step>/ and TensorBoard."""
    prompts = list(config.sample.prompts) or sample.heldout_captions(config, 8)
    videos = sample.draw(config, generator, params, prompts, seeds=(0,))
    shown = media.grid(videos, columns=min(4, len(prompts)), scale=sample.scale_for(config.sample.width))
    folder = os.path.join(workdir, "samples", f"{n:08d}")
    os.makedirs(folder, exist_ok=True)
    sample.write_grid(folder, "grid", shown, config, prompts, (0,))
    writer.videos(n, {"samples": shown}, config.sample.fps)


def _introduce(config, workdir, generator, source, packing, state, meter, mesh, start, progress) -> None:
    """Says what is about to be trained, and writes it where the report finds it."""
    stats = packing.stats(range(min(packing.steps_per_epoch, 64)))
    parameters = states.count(state.params)
    environment = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "peak": f"{meter.peak / 1e12:.2f} TFLOP/s ({meter.peak_source})",
        "parameters": parameters,
        "mesh": dict(mesh.shape),
    }
    for name, value in (("environment", environment), ("packing", dataclasses.asdict(stats))):
        media.write(os.path.join(workdir, f"{name}.json"), json.dumps(value, indent=2, default=str).encode())
    progress.say(
        f"{parameters / 1e6:.1f} M parameters on {environment['devices']}, jax {jax.__version__}, mesh {dict(mesh.shape)}"
    )
    progress.say(f"{len(source.sizes)} clips; {packing.steps_per_epoch} steps a pass; {stats}")
    progress.say(
        f"{meter.flops.useful / 1e9:.0f} GFLOP a step (attention: {meter.flops.attention_useful / 1e9:.1f} useful, "
        f"{meter.flops.attention_executed / 1e9:.1f} executed); MFU against {environment['peak']}"
    )
    progress.say(f"Resuming at step {start}" if start else "Compiling the step …")
    sys.stderr.flush()
