"""`vidgen train`: clips in, a denoiser out, or the VAE that a denoiser is trained on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import platform
import signal
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen import train_denoiser, train_vae
from vidgen.config import ConfigError, to_json
from vidgen.parallel import processes
from vidgen.planning.hardware import peak_flops
from vidgen.studio import media
from vidgen.training import optimizers, restored
from vidgen.training import state as states
from vidgen.training.checkpoint import Checkpoints, check_config, write_config
from vidgen.training.course import Course
from vidgen.training.meter import Meter
from vidgen.training.metrics import MetricWriter, Progress
from vidgen.training.profiler import Profiler
from vidgen.training.program import Program, build, task_of
from vidgen.training.resilience import StopSignal, only_one
from vidgen.training.start import check_digest
from vidgen.training.state import TrainState

COURSES = {"denoiser": train_denoiser, "vae": train_vae}


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

    Where the environment tells of several processes (`parallel/processes.py`), each of them calls this with the same
    config and a workdir that all of them see; process 0 writes what a run has one of, and all end after the same step.

    Raises ConfigError for anything that the user can mend; of several processes, the one where it happens says so and
    ends, and with it the others.
    """
    check(config)
    processes.start()
    # The stack outside: a process that fails ends before what it has open waits for the others.
    with contextlib.ExitStack() as stack, processes.as_one("train"):
        return _run(_settled(config), workdir, stack)


def _run(config: ConfigDict, workdir: str, stack: contextlib.ExitStack) -> Result:
    lead, total = processes.is_lead(), config.train.steps
    program = build(config, task_of(config).mesh(config))
    course = COURSES[config.task].course(program)

    changed = _claim(workdir, config, stack)
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config.train.keep)))
    state, facts = begin(program, course, checkpoints)
    start = int(state.step)
    progress = stack.enter_context(contextlib.closing(Progress(total, start, sys.stderr if lead else io.StringIO())))
    if start >= total:
        progress.say(f"Already at step {start} of {total}: nothing to do")
        return Result(start, "", {})
    if start and "train.steps" in changed and config.optimizer.schedule != "constant":
        progress.say("config.train.steps has changed, and the learning rate's schedule with it")
    writer = None
    if lead:
        writer = MetricWriter(workdir, wandb_project=config.train.wandb, config_json=to_json(config))
        stack.enter_context(contextlib.closing(writer)).resume(start + 1)
    meter = _introduce(program, course, workdir, state, facts["tokens_seen"], progress)
    profiler = stack.enter_context(contextlib.closing(Profiler(config.train.profile_steps if lead else (), workdir)))
    stop = stack.enter_context(StopSignal())
    batches = stack.enter_context(course.batches(start))
    last: dict[str, float] = {}

    def finish(n: int, metrics: dict[str, jax.Array], more: dict[str, float]) -> None:
        """Takes the numbers of step n, and writes them where they are due."""
        nonlocal last
        meter.done(n, metrics)
        if more or _due(n, config.train.log_every, total):
            checkpoints.check()
            last = meter.row() | more
            if writer:
                writer.scalars(n, last)
            progress.update(n, last)

    compiled = set()

    def taken(n: int, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """Step n, whose compilation, where it is the first of its kind, is no part of the run's speed."""
        step, clock = program.step_after(n - 1), time.perf_counter()
        result = step(state, batch)
        kind = (step, *(x.shape for x in jax.tree.leaves(batch)))
        if kind not in compiled:
            compiled.add(kind)
            meter.aside(time.perf_counter() - clock)
        return result

    pulse = processes.Pulse(2)
    n, late, stopped_by, unreadable = start, None, 0, 0
    while n < total and not stopped_by:
        n += 1
        profiler.before(n)
        batch, info = next(batches)
        state, metrics = taken(n, state, batch)
        meter.fed(info if processes.alone() else dataclasses.replace(info, bad={"see the logs": unreadable}))
        # One step late: the device has step n to do while the host waits for the numbers of n - 1.
        if late:
            finish(*late, {})
        late = (n, metrics)
        profiler.after(n, metrics)
        told = pulse(stop.number, sum(info.bad.values()))
        stopped_by, unreadable = int(told[:, 0].max()), int(told[:, 1].sum())

        # The next step takes over the state's memory, so what looks at the state does it now.
        save = stopped_by or _due(n, config.train.checkpoint_every, total)
        draw, judge = _due(n, config.train.sample_every), _due(n, config.train.eval_every)
        if save or draw or judge:
            jax.block_until_ready(metrics)
            clock = time.perf_counter()
            more = course.heldout(program.averaged(state)) if judge else {}
            meter.aside(time.perf_counter() - clock)
            finish(*late, more)
            late = None
            clock = time.perf_counter()
            if save:
                more = course.publish(state.ema, workdir)
                checkpoints.save(state, facts | {"tokens_seen": meter.tokens_seen} | more)
            if draw:
                course.draw(program.averaged(state), n, workdir, writer)
            meter.aside(time.perf_counter() - clock)
    checkpoints.wait()
    if stopped_by and n < total:
        name = signal.Signals(stopped_by).name
        progress.say(f"Stopped by {name} after step {n}; all is saved. The same command goes on from there.")
        return Result(n, name, last)
    return Result(n, "", last)


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings that would fail late."""
    configs.check(config)
    task_of(config).check(config)
    COURSES[config.task].check(config)
    window = tuple(config.train.profile_steps)
    if window and (len(window) != 2 or any(type(n) is not int for n in window) or not 1 <= window[0] <= window[1]):
        raise ConfigError(f"config.train.profile_steps={window}: expected (first, last)")


def _settled(config: ConfigDict) -> ConfigDict:
    """A copy that says all: the workdir is to be of use from anywhere, and later pictures show the same."""
    paths = {
        "tokenizer.weights": config.tokenizer.weights,
        "text.weights": config.text.weights,
        "model.weights": config.model.weights,
        "sample.expert": config.sample.expert,
        "data.latents": config.data.latents,
    }
    if os.path.isdir(config.data.source):
        paths["data.source"] = config.data.source
    config = configs.override(config, {key: os.path.abspath(path) for key, path in paths.items() if path})
    COURSES[config.task].settle(config)
    return config


def _claim(workdir: str, config: ConfigDict, stack: contextlib.ExitStack) -> list[str]:
    """Locks the workdir and writes its config; the settings that have changed since the last attempt."""
    changed: list[str] = []
    if processes.is_lead():
        stack.enter_context(only_one(workdir))
        changed = write_config(workdir, config)
    changed = processes.agree(changed)
    if not processes.is_lead():
        check_config(workdir, config)
    processes.barrier(f"to have opened {workdir}")
    return changed


def begin(program: Program, course: Course, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
    """(state, facts that checkpoints keep): made or restored straight into the shardings of the program.

    Raises ConfigError if the newest checkpoint was trained on other clips, on latents of another VAE or text of another
    encoder, or from other weights.
    """
    start = program.task.start
    own = {"fingerprint": course.source.fingerprint, "tokenizer": course.tokenizer, "text": course.text}
    own["weights"] = start.digest if start else ""
    latest = processes.agree(checkpoints.latest)  # listings of a shared disk may differ for a moment
    if latest is None:
        return program.init(), own | {"tokens_seen": 0.0}
    facts = checkpoints.facts(latest)
    restored.check_tokenizer(course.tokenizer, facts, program.config.tokenizer.weights)
    check_digest(program.config, start, facts)
    restored.check_text(course.text, facts, program.config.text.weights)
    if facts["fingerprint"] != own["fingerprint"]:
        raise ConfigError(
            f"config.data.source={program.config.data.source}: not the clips that the checkpoint at step {latest} was "
            "trained on, so the run can't go on exactly; take another --workdir, or the clips as they were"
        )
    return checkpoints.restore(latest, program.state_like).replace(frozen=program.frozen()), facts | own


def _due(n: int, every: int, last: int = 0) -> bool:
    return n == last or (every > 0 and n % every == 0)


def _introduce(
    program: Program, course: Course, workdir: str, state: TrainState, tokens_seen: float, progress: Progress
) -> Meter:
    """Says what is about to be trained, writes it where the report finds it, and makes the meter to go with it."""
    config, trained, start = program.config, states.count(state.params), int(state.step)
    partition = program.partition
    parameters = sum(partition.sizes.values())
    told = course.introduce(start)
    peak, origin = peak_flops(jax.local_devices()[0])
    peak *= jax.device_count()
    facts = {
        "parameters": parameters,
        "trained": trained,
        "starts_from": program.task.start.where if program.task.start else "",
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "mesh": dict(program.mesh.shape),
        "compiler_options": program.compiler_options,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "peak": f"{peak / 1e12:.2f} TFLOP/s ({origin})",
        "flops_per_step": told.flops(start),
    }
    if partition.set:
        facts["groups"] = partition.table()
    if processes.is_lead():
        for name, value in ({"environment": facts} | told.files).items():
            media.write(os.path.join(workdir, f"{name}.json"), json.dumps(value, indent=2).encode())
    some = f", {trained:,} of which train," if trained < parameters else ""
    progress.say(
        f"{parameters / 1e6:.1f} M parameters{some} on {facts['devices']}, jax {jax.__version__}, {facts['mesh']}"
    )
    if program.task.start:
        progress.say(f"Starting from the weights {program.task.start.digest} in {program.task.start.where}")
    for line in partition.lines() if partition.set else ():
        progress.say(line)
    for line in told.lines:
        progress.say(line)
    progress.say(f"{told.work}; MFU is against {facts['peak']}")
    progress.say(f"Going on after step {start}" if start else "Compiling the step …")
    lr = optimizers.schedule(config.optimizer, config.optimizer.lr, config.train.steps)
    return Meter(lr, told.flops, peak, told.clips, config.train.max_bad, tokens_seen)
