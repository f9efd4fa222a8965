"""`vidgen train`: clips in, a denoiser out, or the VAE that a denoiser is trained on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from vidgen import config as configs
from vidgen import secrets, train_denoiser, train_vae
from vidgen.config import ConfigError, to_json
from vidgen.data.quarantine import Quarantine
from vidgen.parallel import fingerprints, processes
from vidgen.parallel.processes import Restartable
from vidgen.planning.hardware import peak_flops
from vidgen.studio import media
from vidgen.training import checkpoint, guards, metrics, optimizers, provenance, restored
from vidgen.training import loop as loops
from vidgen.training import state as states
from vidgen.training.checkpoint import Checkpoints, check_config, write_config
from vidgen.training.course import Course
from vidgen.training.goodput import Ledger
from vidgen.training.guards import Guards
from vidgen.training.loop import Loop
from vidgen.training.meter import Meter
from vidgen.training.metrics import MetricWriter, Progress
from vidgen.training.profiler import Profiler
from vidgen.training.program import Program, build, task_of
from vidgen.training.resilience import StopSignal, claim, of_the_user, only_one
from vidgen.training.start import check_digest
from vidgen.training.state import TrainState
from vidgen.training.watchdog import Watchdog

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
    # The stack outside: a process that fails ends before what it has open waits for the others.
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal(config.train.grace))
        stop.nothing_to_lose = True  # until the first step is taken
        processes.start()
        with processes.as_one("train"):
            return _run(_settled(config), workdir, stack, stop)


def _run(config: ConfigDict, workdir: str, stack: contextlib.ExitStack, stop: StopSignal) -> Result:
    lead, total = processes.is_lead(), config.train.steps
    program = build(config, task_of(config).mesh(config))
    course = COURSES[config.task].course(program)

    changed = _claim(workdir, config, stack)
    terminal = sys.stderr if lead else stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115 - closed by the stack
    progress = stack.enter_context(contextlib.closing(Progress(total, stream=terminal)))
    ledger = stack.enter_context(contextlib.closing(Ledger(workdir if lead else "", say=progress.say)))
    # A user at a prompt or in a notebook sees it, and may be in a debugger.
    watch = stack.enter_context(Watchdog(workdir, 0.0 if of_the_user() else config.train.hang))
    _compare(program, course)
    checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config.train)))
    state, facts = begin(program, course, checkpoints, progress.say, processes.agree(ledger.on_disk))
    start = int(state.step)
    owed = processes.agree(_owed(start, config, workdir))  # of the last step as well
    if start >= total and not any(owed):
        progress.say(f"Already at step {start} of {total}: nothing to do")
        return Result(start, "", {})
    if start and "train.steps" in changed and config.optimizer.schedule != "constant":
        progress.say("config.train.steps has changed, and the learning rate's schedule with it")
    ledger.resumed(start)
    writer = None
    if lead:
        writer = MetricWriter(workdir, wandb_project=config.train.wandb, config_json=to_json(config), say=progress.say)
        stack.enter_context(contextlib.closing(writer)).resume(start + 1)
    loop = Loop(
        program=program,
        course=course,
        workdir=workdir,
        facts=facts,
        checkpoints=checkpoints,
        guards=Guards(config, facts),
        meter=_introduce(program, course, workdir, state, facts["tokens_seen"], progress),
        ledger=ledger,
        watch=watch,
        stop=stop,
        progress=progress,
        profiler=stack.enter_context(contextlib.closing(Profiler(_window(config), workdir))),
        quarantine=stack.enter_context(contextlib.closing(Quarantine(workdir, jax.process_index()))),
        writer=writer,
        claim=claim(workdir) if lead else None,
    )
    if any(owed):
        loop.make_up(state, *owed)
    n = loop.run(state)
    name = signal.Signals(loop.stopped_by).name if loop.stopped_by and n < total else ""
    if name:
        progress.say(f"Stopped by {name} after step {n}; all is saved. The same command goes on from there.")
    return Result(n, name, loop.last)


def check(config: ConfigDict) -> None:
    """Raises ConfigError on settings that would fail late."""
    configs.check(config)
    task_of(config).check(config)
    COURSES[config.task].check(config)
    guards.check(config)
    checkpoint.check(config)
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
        "train.checkpoints": "" if "://" in config.train.checkpoints else config.train.checkpoints,
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


def _compare(program: Program, course: Course) -> None:
    """Raises ConfigError on all processes, naming the odd one, unless they are about to do the same."""
    if processes.alone():
        return
    lowered = program.step.lower(program.state_like, program.batch_like)
    own = {"config": to_json(program.config), "data": course.source.fingerprint, "step": lowered.as_text()}
    fingerprints.compare(fingerprints.here() | {name: fingerprints.of(text) for name, text in own.items()})


def _owed(start: int, config: ConfigDict, workdir: str) -> tuple[bool, bool]:
    """(whether to judge, whether to draw): what was due after `start` steps, and a stop or a kill came before it."""
    if not start or not processes.is_lead():
        return False, False
    judged = any(name.startswith("heldout_") for r in metrics.read(workdir) if r["step"] == start for name in r)
    drawn = os.path.isdir(os.path.join(workdir, "samples", f"{start:08d}"))
    judge, draw = (0 < every and start % every == 0 for every in (config.train.eval_every, config.train.sample_every))
    return judge and not judged, draw and not drawn


def _window(config: ConfigDict) -> tuple[int, ...]:
    """The steps that this process traces."""
    return tuple(config.train.profile_steps) if processes.is_lead() else ()


def begin(
    program: Program, course: Course, checkpoints: Checkpoints, say: Callable[[str], None], saved: int = 0
) -> tuple[TrainState, dict[str, Any]]:
    """(state, facts that checkpoints keep): made or restored straight into the shardings of the program.

    `say` is told of checkpoints that are damaged, of which the newest good one is taken, and of another code version.
    `saved` is a step that is known to have been saved, if any is.

    Raises Restartable where one was saved and there is none, as where a disk is not mounted yet; ConfigError if it was
    trained on other clips, on latents of another VAE or text of another encoder, or from other weights, and where there
    are checkpoints and none is good.
    """
    start = program.task.start
    own = {"fingerprint": course.source.fingerprint, "tokenizer": course.tokenizer, "text": course.text}
    own |= {"weights": start.digest if start else "", "config": to_json(program.config)}
    latest = checkpoints.newest_good(say)
    if latest is None and saved:
        raise Restartable(
            f"{checkpoints.where} holds no checkpoint, though one of step {saved} was saved: is the disk there that "
            "they lie on? To start from nothing, take another --workdir, or delete this one"
        )
    if latest is None:
        return program.init(), own | {"tokens_seen": 0.0}
    facts = checkpoints.facts(latest)
    where = f"{checkpoints.where}/{latest}"
    if other := provenance.compare(facts, where):
        say(other)
    restored.check_tokenizer(course.tokenizer, facts, program.config.tokenizer.weights)
    check_digest(program.config, start, facts)
    restored.check_text(course.text, facts, program.config.text.weights)
    if facts["fingerprint"] != own["fingerprint"]:
        raise ConfigError(
            f"config.data.source={program.config.data.source}: not the clips that the checkpoint at step {latest} was "
            "trained on, so the run can't go on exactly; take another --workdir, or the clips as they were"
        )
    checkpoint.check_saved_config(facts, program.config, where)
    return loops.restored(program, checkpoints, latest), facts | own


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
            media.write(os.path.join(workdir, f"{name}.json"), json.dumps(secrets.redacted(value), indent=2).encode())
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
    rates = optimizers.rates(config.optimizer, config.optimizer.lr, config.train.steps)
    return Meter(rates.__getitem__, told.flops, peak, told.clips, config.train.max_bad, tokens_seen)
